"""A study's arithmetic against plain sums."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.research.rivals.baselines import btm_weights, mix_log_probs
from flexolmo.research.study.gains import (
    MIXED,
    PUBLIC,
    bits_per_byte,
    btm,
    btm_equal_flops,
    gap_closed,
    gap_closed_mixed,
    prompt_routing,
)

NAMES = ["code", "news"]


def made_rows(rng, shift=0.0):
    """Log-probabilities of two sets, public and mixed text, three windows each."""
    return {
        n: [
            np.log(rng.uniform(0.05, 0.5, 12)).astype(np.float32) + np.float32(shift)
            for _ in range(3)
        ]
        for n in [PUBLIC, *NAMES, MIXED]
    }


@pytest.fixture
def readings():
    rng = np.random.default_rng(0)
    return {PUBLIC: made_rows(rng, -1.0)} | {n: made_rows(rng) for n in NAMES}


def test_public_closes_nothing_and_each_dense_model_all_of_its_own(readings):
    assert gap_closed(readings[PUBLIC], readings[PUBLIC], readings, NAMES) == {
        "code": 0.0,
        "news": 0.0,
    }
    for n in NAMES:
        closed = gap_closed(readings[n], readings[PUBLIC], readings, NAMES)
        assert closed[n] == pytest.approx(1.0)


@given(share=st.floats(-0.5, 1.5))
def test_half_way_is_half(share):
    rng = np.random.default_rng(1)
    public = made_rows(rng, -1.0)
    dense = {n: made_rows(rng) for n in NAMES}
    method = {
        n: [
            (1 - share) * p.astype(float) + share * d
            for p, d in zip(public[n], dense[n][n], strict=True)
        ]
        for n in NAMES
    }
    for value in gap_closed(method, public, dense, NAMES).values():
        assert value == pytest.approx(share, abs=1e-6)


def test_on_mixed_text_only_a_sets_own_pieces_count(readings):
    sources = [np.array([0] * 6 + [2] * 6), np.array([1] * 12), np.array([2] * 12)]
    method = {MIXED: [r.copy() for r in readings[PUBLIC][MIXED]]}
    method[MIXED][0][6:] = readings["news"][MIXED][0][6:]
    method[MIXED][2] = readings["news"][MIXED][2]
    method[MIXED][0][:6] = -99.0  # public's pieces, which no owner's figure may see
    closed = gap_closed_mixed(
        method, readings[PUBLIC], readings, sources, [PUBLIC, "code", "news"], NAMES
    )
    assert closed["news"] == pytest.approx(1.0) and closed["code"] == 0.0


def test_bits_per_byte_is_the_sum_over_the_text():
    rows = {"code": [np.full(8, math.log(0.5)), np.full(8, math.log(0.25))]}
    assert bits_per_byte(rows, {"code": 12}) == {"code": pytest.approx((8 + 16) / 12)}


def test_btm_reads_every_model_and_equals_its_definition(readings):
    rows = btm(readings, 2.0)
    for name in NAMES:
        for i in range(3):
            p = np.stack([readings[m][name][i] for m in readings])
            assert np.allclose(rows[name][i], mix_log_probs(p, btm_weights(p, temperature=2.0)))


@pytest.mark.parametrize("budget", [1.0, 1.5, 2.2, 3.0])
def test_btm_at_equal_flops_never_spends_more(readings, budget):
    _, spent = btm_equal_flops(readings, 1.0, 1, budget)
    assert spent <= budget + 1e-9


def test_prompt_routing_is_public_and_then_the_chosen_model(readings):
    likely = {n: np.tile([0.0, 0.0, 1.0], (3, 1)) for n in [PUBLIC, *NAMES, MIXED]}
    rows = prompt_routing(readings, likely, 5)
    for name in NAMES:
        for i in range(3):
            start, rest = readings[PUBLIC][name][i][:5], readings["news"][name][i][5:]
            expected = np.concatenate([start, rest])
            assert np.allclose(rows[name][i], expected, atol=1e-6)
