"""BTM and its kin against plain loops, and the laws that keep the comparison honest."""

import math
from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.errors import ConfigError
from flexolmo.research.rivals.baselines import (
    btm_prefix_weights,
    btm_weights,
    likelihood_weights,
    mix_log_probs,
    prefix_for_budget,
)

FREQUENT = settings(derandomize=True, max_examples=60)
TEMPERATURES = st.sampled_from([0.3, 1.0, 4.0])
RATES = st.sampled_from([0.0, 1e-4, 0.1, 1.0])
# every way of weighting a window token by token, as (log_probs, top_k) -> [E,T]
METHODS = {
    "btm": lambda lp, k: btm_weights(lp, top_k=k),
    "cool btm": lambda lp, k: btm_weights(lp, top_k=k, temperature=0.2),
    "fixed share": lambda lp, k: btm_weights(lp, top_k=k, switch_rate=0.05),
    "prefix": lambda lp, k: btm_prefix_weights(lp, prefix_tokens=4, top_k=k),
    "no prefix": lambda lp, k: btm_prefix_weights(lp, prefix_tokens=0, top_k=k),
}
METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@st.composite
def windows(draw, max_experts=5, max_tokens=12):
    """Log-probabilities [E,T], mostly far from each other, without ties."""
    shape = draw(st.integers(1, max_experts)), draw(st.integers(1, max_tokens))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    return -rng.exponential(draw(st.sampled_from([0.1, 3.0, 60.0])), shape)


def softmax_loop(scores):
    highest = max(scores)
    parts = [math.exp(s - highest) for s in scores]
    return [p / math.fsum(parts) for p in parts]


def keep_top_loop(weights, k):
    """The K largest, the first of equals first, renormalised."""
    kept = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[:k]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


def btm_loop(log_probs, temperature=1.0, top_k=None):
    E, T = log_probs.shape
    columns = []
    for t in range(T):
        past = [math.fsum(log_probs[i, :t]) / temperature for i in range(E)]
        columns.append(keep_top_loop(softmax_loop(past), top_k or E))
    return np.array(columns).T


def paths(E, length, rate):
    """Every way to switch between E models: (models in order, prior probability)."""
    for path in product(range(E), repeat=length):
        prior = 1 / E
        for a, b in pairwise(path):
            prior *= rate / E + (1 - rate) * (a == b)
        yield path, prior


def fixed_share_by_paths(log_probs, temperature, rate):
    """P(the model at t | tokens before t), by summing over every path of switches."""
    E, T = log_probs.shape
    weights = np.zeros((E, T))
    for t in range(T):
        for path, prior in paths(E, t + 1, rate):
            past = sum(log_probs[path[s], s] for s in range(t))
            weights[path[t], t] += prior * math.exp(past / temperature)
    return weights / weights.sum(0)


# --- laws of every method -----------------------------------------------------------------------


@METHOD
@FREQUENT
@given(log_probs=windows(), top_k=st.integers(1, 6))
def test_weights_are_a_distribution_over_at_most_top_k(method, log_probs, top_k):
    for k in (top_k, len(log_probs)):
        weights = method(log_probs, k)
        assert weights.shape == log_probs.shape and weights.dtype == np.float64
        assert (weights >= 0).all()
        np.testing.assert_allclose(weights.sum(0), 1, rtol=1e-12)
        late = weights[:, 4:] if method is METHODS["prefix"] else weights
        assert ((late > 0).sum(0) <= k).all()


@METHOD
@FREQUENT
@given(log_probs=windows(), top_k=st.integers(1, 6), data=st.data())
def test_no_weight_depends_on_its_own_token_or_a_later_one(method, log_probs, top_k, data):
    t = data.draw(st.integers(0, log_probs.shape[1] - 1))
    other = log_probs.copy()
    other[:, t:] = data.draw(windows(1, 1))[0, 0] * np.arange(1, len(other) + 1)[:, None]
    before, after = method(log_probs, top_k), method(other, top_k)
    assert (before[:, : t + 1] == after[:, : t + 1]).all()
    np.testing.assert_allclose(method(log_probs[:, : t + 1], top_k), before[:, : t + 1], rtol=1e-12)


def test_these_weights_do_depend_on_the_tokens_before():
    """Else the law above would hold of anything."""
    log_probs = -np.random.default_rng(0).exponential(2, (3, 8))
    other = log_probs.copy()
    other[0, 4] -= 5
    for name, method in METHODS.items():
        assert (method(log_probs, 3)[:, 5:] != method(other, 3)[:, 5:]).all(), name


@METHOD
@FREQUENT
@given(log_probs=windows(), top_k=st.integers(1, 6), seed=st.integers(0, 99))
def test_permuting_the_models_permutes_the_weights(method, log_probs, top_k, seed):
    order = np.random.default_rng(seed).permutation(len(log_probs))
    # before the first token all are equal, and "ties to the first" does know positions
    k, start = (len(order), 0) if method is METHODS["no prefix"] else (top_k, 1)
    gaps = np.diff(np.sort(method(log_probs, len(order)), axis=0), axis=0)
    untied = (gaps > 1e-12).all(0) | (k == len(order))  # the best k are no matter of place
    untied[:start] = False
    there, here = method(log_probs[order], k), method(log_probs, k)[order]
    np.testing.assert_allclose(there[:, untied], here[:, untied], rtol=1e-9, atol=1e-15)


@METHOD
def test_single_precision_is_read_in_double(method):
    log_probs = -np.random.default_rng(0).exponential(2, (3, 20)).astype(np.float32)
    assert (method(log_probs, 2) == method(log_probs.astype(np.float64), 2)).all()


@METHOD
def test_long_windows_neither_overflow_nor_forget_how_to_count(method):
    log_probs = np.full((3, 4000), -40.0)
    log_probs[1] = -30.0
    weights = method(log_probs, 2)
    assert np.isfinite(weights).all()
    if method is not METHODS["no prefix"]:
        assert weights[:, -1].argmax() == 1


@METHOD
def test_losses_and_missing_numbers_are_no_log_probabilities(method):
    with pytest.raises(AssertionError, match="at most 0"):
        method(np.full((2, 9), 2.5), 2)
    with pytest.raises(AssertionError), np.errstate(invalid="ignore"):
        method(np.full((2, 9), np.nan), 2)


# --- BTM ----------------------------------------------------------------------------------------


@FREQUENT
@given(windows(), TEMPERATURES, st.sampled_from([None, 1, 2, 3]))
def test_btm_is_the_softmax_of_what_was_said_so_far(log_probs, temperature, top_k):
    found = btm_weights(log_probs, temperature=temperature, top_k=top_k)
    np.testing.assert_allclose(
        found, btm_loop(log_probs, temperature, top_k), rtol=1e-9, atol=1e-300
    )


@FREQUENT
@given(windows(3, 5), TEMPERATURES, RATES)
def test_fixed_share_sums_over_every_way_to_switch(log_probs, temperature, rate):
    log_probs = np.maximum(log_probs, -20)  # the sum over paths is not guarded against underflow
    found = btm_weights(log_probs, temperature=temperature, switch_rate=rate)
    np.testing.assert_allclose(
        found, fixed_share_by_paths(log_probs, temperature, rate), rtol=1e-9, atol=1e-300
    )


@FREQUENT
@given(windows(), TEMPERATURES)
def test_a_vanishing_switch_rate_is_plain_btm(log_probs, temperature):
    log_probs = np.maximum(log_probs, -5)  # else a share even of 1e-300 could tell in the end
    np.testing.assert_allclose(
        btm_weights(log_probs, temperature=temperature, switch_rate=1e-300),
        btm_weights(log_probs, temperature=temperature),
        rtol=1e-9,
    )


@FREQUENT
@given(windows(3, 5), RATES)
def test_the_mixture_of_a_window_is_the_mean_over_paths(log_probs, rate):
    """The chain rule: step by step, or all at once over every way to switch."""
    stepwise = mix_log_probs(log_probs, btm_weights(log_probs, switch_rate=rate)).sum()
    E, T = log_probs.shape
    total = [
        math.log(prior) + sum(log_probs[m, t] for t, m in enumerate(path))
        for path, prior in paths(E, T, rate)
        if prior > 0
    ]
    assert stepwise == pytest.approx(np.logaddexp.reduce(total), rel=1e-9)


@FREQUENT
@given(windows(max_tokens=40))
def test_plain_btm_loses_at_most_log_e_to_the_best_model(log_probs):
    mixed = mix_log_probs(log_probs, btm_weights(log_probs)).sum()
    assert mixed >= log_probs.sum(1).max() - math.log(len(log_probs)) - 1e-9


def test_fixed_share_follows_a_switch_that_plain_btm_misses():
    log_probs = np.full((2, 200), -5.0)
    log_probs[0, :100] = log_probs[1, 100:] = -2.0
    plain, shared = btm_weights(log_probs), btm_weights(log_probs, switch_rate=0.01)
    assert plain[1, 110] < 1e-50 and shared[1, 110] > 0.98
    assert shared[0, 90] > 0.98


def test_ties_go_to_the_first():
    log_probs = np.full((4, 6), -1.0)
    for weights in (
        btm_weights(log_probs, top_k=2),
        btm_weights(log_probs, top_k=2, switch_rate=0.1),
        btm_prefix_weights(log_probs, prefix_tokens=0, top_k=2),
    ):
        assert (weights[:2] == 0.5).all() and (weights[2:] == 0).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"top_k": 0},
        {"switch_rate": -0.1},
        {"switch_rate": 1.5},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} .* found; expected"):
        btm_weights(np.zeros((2, 2)), **wrong)


# --- BTM at a budget ----------------------------------------------------------------------------


@FREQUENT
@given(windows(), st.integers(0, 14), st.integers(1, 6), TEMPERATURES)
def test_members_are_chosen_by_the_prefix_and_weigh_among_themselves(
    log_probs, prefix, top_k, temperature
):
    E, T = log_probs.shape
    seen = [math.fsum(log_probs[i, :prefix]) for i in range(E)]
    members = sorted(sorted(range(E), key=lambda i: (-seen[i], i))[:top_k])
    expected = btm_loop(log_probs, temperature)
    expected[:, prefix:] = 0
    expected[members, prefix:] = btm_loop(log_probs[members], temperature)[:, prefix:]
    found = btm_prefix_weights(
        log_probs, prefix_tokens=prefix, top_k=top_k, temperature=temperature
    )
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-300)
    assert found.shape == (E, T)


@FREQUENT
@given(windows(), st.integers(0, 14), st.integers(1, 6))
def test_what_was_not_run_is_not_read(log_probs, prefix, top_k):
    weights = btm_prefix_weights(log_probs, prefix_tokens=prefix, top_k=top_k)
    mixed = mix_log_probs(log_probs, weights)
    seen = log_probs[:, :prefix].cumsum(1)[:, -1] if prefix else np.zeros(len(log_probs))
    not_run = log_probs.copy()
    not_run[np.argsort(-seen, kind="stable")[top_k:], prefix:] = np.nan
    assert (btm_prefix_weights(not_run, prefix_tokens=prefix, top_k=top_k) == weights).all()
    assert (mix_log_probs(not_run, weights) == mixed).all()


@FREQUENT
@given(windows())
def test_a_prefix_of_the_whole_window_is_plain_btm(log_probs):
    for prefix, top_k in ((99, 1), (0, len(log_probs))):
        assert (
            btm_prefix_weights(log_probs, prefix_tokens=prefix, top_k=top_k)
            == btm_weights(log_probs)
        ).all()


def test_the_prefix_is_the_longest_within_the_budget():
    """Every tenth of a model counts: 2.3 as a budget is 2.3, not what a float makes of it."""
    for T, E, top_k, tenths in product((1, 7, 20, 50), range(1, 5), range(1, 6), range(5, 45)):
        k, budget = min(top_k, E), Fraction(tenths, 10)
        found = prefix_for_budget(T, E, top_k, tenths / 10)
        if budget < k:
            assert found is None
        elif budget >= E:
            assert found == T
        else:
            assert found == math.floor((budget - k) * T / (E - k))


def test_settings_of_the_prefix_are_refused_too():
    for wrong in (
        {"prefix_tokens": -1, "top_k": 1},
        {"prefix_tokens": 1, "top_k": 0},
        {"prefix_tokens": 1, "top_k": 1, "temperature": -1.0},
    ):
        with pytest.raises(ConfigError, match="found; expected"):
            btm_prefix_weights(np.zeros((2, 2)), **wrong)


# --- mixing -------------------------------------------------------------------------------------


@FREQUENT
@given(windows(), st.integers(0, 99))
def test_mixing_is_the_log_of_the_weighted_sum(log_probs, seed):
    log_probs = np.maximum(log_probs, -300)
    weights = np.random.default_rng(seed).random(log_probs.shape) ** 4
    weights[0, log_probs.shape[1] // 2 :] = 0
    weights /= np.maximum(weights.sum(0), 1e-300)
    for t, found in enumerate(mix_log_probs(log_probs, weights)):
        total = math.fsum(
            w * math.exp(lp) for w, lp in zip(weights[:, t], log_probs[:, t], strict=True)
        )
        assert found == (pytest.approx(math.log(total), rel=1e-9) if total else -math.inf)


def test_mixing_survives_tiny_probabilities():
    log_probs = np.array([[-2000.0], [-2001.0], [np.nan]])
    mixed = mix_log_probs(log_probs, np.array([[0.25], [0.75], [0.0]]))
    assert mixed == pytest.approx(-2000 + math.log(0.25 + 0.75 / math.e))
    with pytest.raises(AssertionError):
        mix_log_probs(log_probs, np.array([[0.5], [0.7], [-0.2]]))


@FREQUENT
@given(windows(max_tokens=1), TEMPERATURES)
def test_likelihood_weights_are_a_softmax(log_likelihood, temperature):
    log_likelihood = log_likelihood[:, 0] * 100
    found = likelihood_weights(log_likelihood, temperature)
    np.testing.assert_allclose(
        found, softmax_loop((log_likelihood / temperature).tolist()), rtol=1e-9, atol=1e-300
    )
    with pytest.raises(ConfigError, match="temperature"):
        likelihood_weights(log_likelihood, 0.0)
