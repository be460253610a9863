"""The probability of near-verbatim text against all texts of a small vocabulary."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.audit.discoverable import sampled_log_probs
from flexolmo.audit.near_verbatim import near_verbatim_log_probs
from flexolmo.inference.sampling import Sampling
from made_attacks import Heard

V, T = 4, 5


class Table:
    """A reader whose next token depends on the last two."""

    def __init__(self, seed):
        self.logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(V, V, V)) * 2)

    def new_state(self):
        return Heard([[0]])

    def read(self, ids, state, *, is_token=None, last):
        for row, own in zip(ids.tolist(), state.rows, strict=True):
            own += row
        return torch.stack([self.logits[own[-2], own[-1]] for own in state.rows])[:, None]

    def log_prob(self, text, prefix, sampling):
        rows = [0, *text]
        logits = torch.stack([self.logits[rows[i], rows[i + 1]] for i in range(prefix - 1, T - 1)])
        return float(sampled_log_probs(logits, torch.tensor(text[prefix:]), sampling).sum())


def mass(table, text, prefix, sampling, most):
    """The probability of all texts within a distance, added up."""
    rests = itertools.product(range(V), repeat=T - prefix)
    near = [r for r in rests if sum(a != b for a, b in zip(r, text[prefix:], strict=True)) <= most]
    return sum(np.exp(table.log_prob([*text[:prefix], *r], prefix, sampling)) for r in near)


@given(
    st.integers(0, 10_000),
    st.sampled_from(
        [Sampling(temperature=1, top_p=1), Sampling(temperature=1, top_k=2, top_p=0.9)]
    ),
    st.integers(0, 2),
)
def test_with_beams_enough_it_is_the_sum_over_all_near_texts(seed, sampling, most):
    table = Table(seed)
    texts = np.random.default_rng(seed).integers(0, V, (3, T))
    found = near_verbatim_log_probs(table, list(texts), 2, sampling, most, beams=V**T)
    for text, log_prob in zip(texts.tolist(), found, strict=True):
        assert np.exp(log_prob) == pytest.approx(mass(table, text, 2, sampling, most), abs=1e-12)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_with_few_beams_it_lies_between_the_text_and_that_sum(seed, beams):
    table = Table(seed)
    sampling = Sampling(temperature=1, top_p=1)
    texts = np.random.default_rng(seed).integers(0, V, (3, T))
    found = near_verbatim_log_probs(table, list(texts), 2, sampling, 2, beams)
    for text, log_prob in zip(texts.tolist(), found, strict=True):
        assert log_prob >= table.log_prob(text, 2, sampling) - 1e-9
        assert np.exp(log_prob) <= mass(table, text, 2, sampling, 2) + 1e-9


def test_a_text_that_is_never_written_has_no_probability():
    table = Table(0)
    greedy = Sampling(temperature=0)
    text = [0, 0]
    for _ in range(T - 2):
        text.append(int(table.logits[text[-2], text[-1]].argmin()))
    assert near_verbatim_log_probs(table, [np.array(text)], 2, greedy, 0, 3)[0] == -np.inf
