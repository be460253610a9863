"""Probability of a text under a way of sampling, against all texts of a small vocabulary."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.audit.discoverable import (
    ATTEMPTS,
    attempts_needed,
    discoverable_curves,
    sampled_log_probs,
)
from flexolmo.inference.decode import choose_tokens
from flexolmo.inference.sampling import Sampling

WAYS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([None, 1, 2, 4, 50]),
    top_p=st.sampled_from([0.2, 0.5, 0.95, 1.0]),
)


def chances_of(logits, sampling):
    """The probability of each token, by sorting and cutting, one row of numbers at a time."""
    if sampling.temperature == 0:
        return [float(i == int(np.argmax(logits))) for i in range(len(logits))]
    weights = [math.exp((x - max(logits)) / sampling.temperature) for x in logits]
    chances = [w / sum(weights) for w in weights]
    kept, before = [], 0.0
    for i in sorted(range(len(chances)), key=lambda i: (-chances[i], i)):
        if before >= sampling.top_p or len(kept) >= (sampling.top_k or len(chances)):
            break
        kept.append(i)
        before += chances[i]
    total = sum(chances[i] for i in kept)
    return [chances[i] / total if i in kept else 0.0 for i in range(len(chances))]


@settings(max_examples=30)
@given(st.integers(0, 10_000), WAYS)
def test_all_texts_of_three_tokens_have_their_probabilities(seed, sampling):
    V, T = 4, 3
    table = np.random.default_rng(seed).normal(size=(V, V)) * 2  # logits after each token
    sums = 0.0
    for text in itertools.product(range(V), repeat=T):
        logits = torch.tensor(np.stack([table[i] for i in (0, *text[:-1])]))
        found = float(sampled_log_probs(logits, torch.tensor(text), sampling).sum().exp())
        expected = math.prod(
            chances_of(table[i].tolist(), sampling)[j]
            for i, j in zip((0, *text), text, strict=False)
        )
        assert found == pytest.approx(expected, abs=1e-12)
        sums += found
    assert sums == pytest.approx(1.0)


@given(st.integers(0, 10_000), WAYS)
def test_tokens_of_equal_probability_are_kept_by_number(seed, sampling):
    logits = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, (1, 6))).double()
    found = sampled_log_probs(logits.expand(6, -1), torch.arange(6), sampling).exp().tolist()
    assert found == pytest.approx(chances_of(logits[0].tolist(), sampling))


def test_it_is_what_decoding_draws():
    """Of 4,000 draws, each token's share is off by 0.05 with odds below 1 in 10 million."""
    sampling = Sampling(temperature=0.8, top_k=4, top_p=0.9)
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.5, 0.0, -1.0]])
    draws = torch.Generator().manual_seed(0)
    count = 4000
    drawn = choose_tokens(logits.expand(count, -1), [sampling] * count, [draws] * count)
    shares = np.bincount(drawn, minlength=6) / count
    expected = sampled_log_probs(logits.expand(6, -1), torch.arange(6), sampling).exp()
    assert shares == pytest.approx(expected.numpy(), abs=0.05)
    assert (shares[expected.numpy() == 0] == 0).all()


@given(st.floats(0.01, 0.999), st.floats(0.05, 0.99))
def test_so_many_attempts_and_no_fewer_reach_p(chance, p):
    needed = float(attempts_needed(np.array([math.log(chance)]), p)[0])
    n = math.ceil(needed - 1e-9)
    assert 1 - (1 - chance) ** n >= p - 1e-9
    assert n == 1 or 1 - (1 - chance) ** (n - 1) < p


def test_certain_and_impossible_texts_need_one_and_endless_attempts():
    assert attempts_needed(np.array([0.0, -np.inf]), 0.9).tolist() == [1.0, math.inf]


def test_curves_count_texts():
    found = discoverable_curves(np.log([1.0, 0.5, 1e-3]))
    at = {n: i for i, n in enumerate(ATTEMPTS)}
    assert [found["discoverable"]["0.5"][at[n]]["share"] for n in (1, 1000)] == [
        pytest.approx(2 / 3),
        1.0,
    ]
    assert found["discoverable"]["0.9"][at[1]]["share"] == pytest.approx(1 / 3)
    assert found["expected"][at[10]] == pytest.approx((1 + (1 - 0.5**10) + (1 - 0.999**10)) / 3)
