"""The lower bound on epsilon against the paper's loop, another library, and known mechanisms."""

import numpy as np
import opake.auditing as opake
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opake.random import key
from scipy.stats import binom

from flexolmo.audit.epsilon import epsilon_bound, p_value, refuted_epsilon


def loop_p_value(m, r, v, epsilon, delta):
    """The appendix of arXiv 2305.08846, term by term."""
    q = 1 / (1 + np.exp(-epsilon))
    beta = sum(binom.pmf(i, r, q) for i in range(v, r + 1))
    alpha = total = 0.0
    for i in range(1, v + 1):
        total += binom.pmf(v - i, r, q)
        alpha = max(alpha, total / i)
    return min(1.0, beta + alpha * delta * 2 * m)


@given(st.data(), st.floats(0, 5), st.sampled_from([0.0, 1e-6, 1e-3]))
def test_a_p_value_is_the_papers(data, epsilon, delta):
    r = data.draw(st.integers(1, 60))
    v = data.draw(st.integers(0, r))
    m = r + data.draw(st.integers(0, 40))
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(loop_p_value(m, r, v, epsilon, delta))


@given(st.integers(30, 60))
def test_a_bound_without_delta_is_that_of_another_library(right):
    """Of 60 canaries, all guessed at a given threshold."""
    m = 60
    coins = opake.coin_flip(range(m), num_canaries=m, key=key(3))
    is_in = np.isin(coins.canary_indices, coins.in_indices)
    wrong = np.arange(m) < m - right
    guess_in = is_in ^ wrong
    scores = opake.canary_scores(guess_in.astype(float), canary_indices=coins.canary_indices)
    estimate = opake.one_run(scores, coin_flip=coins)
    theirs = estimate.eps_delta().epsilon_at(delta=0.0, significance=0.05, threshold=0.5)
    assert refuted_epsilon(m, m, right, 0.0, 0.05) == pytest.approx(theirs, abs=1e-3)


def test_randomised_response_is_rarely_said_to_leak_more_than_it_does():
    """Coins told truly with the chance that epsilon 1 allows: in 200 runs at 95 % confidence more
    than 22 false bounds have odds below 1 in 1,000."""
    rng = np.random.default_rng(0)
    truth = 1 / (1 + np.exp(-1.0))
    false = 0
    for _ in range(200):
        is_in = rng.random(200) < 0.5
        told = is_in ^ (rng.random(200) > truth)
        scores = told + rng.random(200) / 2  # in no order among equals
        false += epsilon_bound(scores, is_in, 0.0)["epsilon"] > 1
    assert false <= 22


def test_who_is_always_right_shows_much_and_who_guesses_shows_nothing():
    rng = np.random.default_rng(1)
    is_in = rng.random(400) < 0.5
    sure = epsilon_bound(is_in + rng.random(400) / 2, is_in, 1e-6)
    assert sure["epsilon"] > 3 and sure["right"] / sure["guesses"] > 0.9
    assert epsilon_bound(rng.random(400), is_in, 1e-6)["epsilon"] < 0.3
    assert epsilon_bound(-1.0 * is_in, is_in, 1e-6)["epsilon"] == 0.0


def test_delta_weakens_a_bound():
    right = [refuted_epsilon(200, 100, 95, delta, 0.05) for delta in (0.0, 1e-5, 1e-3)]
    assert right[0] > right[1] > right[2]
