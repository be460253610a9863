"""Signals of membership against sums over the vocabulary, one token at a time."""

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.audit.signals import scores_of, signals_of


def predictions(seed, T=6, V=9):
    """Log-probabilities of a model and of its reference, and targets."""
    g = torch.Generator().manual_seed(seed)
    own, other = (torch.randn(2, T, V, generator=g, dtype=torch.double) * 2).log_softmax(-1)
    return own, other, torch.randint(V, (T,), generator=g)


@given(st.integers(0, 10_000))
def test_signals_are_those_of_their_definitions(seed):
    own, other, targets = predictions(seed)
    found = signals_of(own, other, targets)
    for t, x in enumerate(targets.tolist()):
        p, q = own[t].exp().tolist(), other[t].exp().tolist()
        mean = sum(c * math.log(c) for c in p)
        variance = sum(c * math.log(c) ** 2 for c in p) - mean**2
        divergence = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        assert float(found.log_prob[t]) == pytest.approx(math.log(p[x]))
        assert float(found.surprise[t]) == pytest.approx(
            (math.log(p[x]) - mean) / math.sqrt(variance)
        )
        assert float(found.ratio[t]) == pytest.approx(math.log(p[x] / q[x]))
        assert float(found.information[t]) == pytest.approx(math.log(p[x] / q[x]) + divergence)


@given(st.integers(0, 10_000))
def test_a_text_that_the_reference_writes_has_no_information_on_average(seed):
    own, other, _ = predictions(seed, T=1)
    V = own.shape[1]
    each = signals_of(own.expand(V, -1), other.expand(V, -1), torch.arange(V)).information
    assert float((other[0].exp() * each).sum()) == pytest.approx(0, abs=1e-9)


def test_without_a_reference_there_are_no_ratios():
    own, _, targets = predictions(3)
    assert set(scores_of(signals_of(own, None, targets), "text")) == {"loss", "zlib", "min_k"}


def test_scores_sum_up_signals():
    own, other, targets = predictions(5)
    signals = signals_of(own, other, targets)
    found = scores_of(signals, "a text, a text")
    assert found["loss"] == pytest.approx(float(signals.log_prob.mean()))
    assert found["zlib"] == pytest.approx(
        float(signals.log_prob.sum()) / len(zlib.compress(b"a text, a text"))
    )
    lowest = np.sort(signals.surprise.numpy())[:2]  # a fifth of six, rounded up
    assert found["min_k"] == pytest.approx(lowest.mean())
    assert found["ratio"] == pytest.approx(float(signals.ratio.mean()))
    assert found["informia"] == pytest.approx(float(signals.information.mean()))


def test_a_prediction_that_is_certain_is_no_division_by_zero():
    certain = torch.tensor([[40.0, 0.0, -100.0]]).log_softmax(-1)
    found = signals_of(certain, certain, torch.tensor([0]))
    for values in (found.surprise, found.ratio, found.information):
        assert values.isfinite().all()
