"""The privacy budget: what is spent, by another accountant too, and noise that keeps to it."""

import sys

import dp_accounting
import pytest
from dp_accounting import pld
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV

from flexolmo.errors import ConfigError
from flexolmo.model.private_statistics import find_sigma
from flexolmo.train.budget import (
    LEAST_NOISE,
    SLACK,
    PrivacySettings,
    _find_domain,
    find_noise,
    spent_epsilon,
)

DELTA = 1e-6


def accounted(noise, rate, steps, table_noise, delta=DELTA):
    """Epsilon by composing privacy loss distributions, an upper bound: the oracle."""
    found = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    if table_noise is not None:
        found.compose(dp_accounting.GaussianDpEvent(table_noise))
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    found.compose(step, steps)
    return found.get_epsilon(delta)


CASES = [
    (0.8, 0.1, 20, 2.23),
    (1.1, 0.3, 12, 2.23),
    (2.5, 1.0, 8, 2.23),
    (0.7, 0.01, 300, None),
    (4.0, 0.5, 60, 8.0),
]


@pytest.mark.parametrize("case", CASES)
def test_what_is_spent_is_what_another_accountant_says(case):
    """Ours is an upper bound, by a hundredth above."""
    oracle = accounted(*case)
    assert oracle - 1e-3 <= spent_epsilon(DELTA, *case) <= oracle + 0.02


def test_no_loss_is_left_out_that_opacus_would_look_at():
    for noise, rate, steps, table in [*CASES[1::2], (0.3, 0.5, 10, None)]:  # the last is wide
        history = (
            [(noise, rate, steps)] if table is None else [(table, 1.0, 1), (noise, rate, steps)]
        )
        prvs = [PoissonSubsampledGaussianPRV(rate, noise) for noise, rate, _ in history]
        given = (prvs, [count for *_, count in history], 0.01, DELTA / 1000)
        theirs, ours = PRVAccountant()._get_domain(*given), _find_domain(*given)
        assert ours.dt == pytest.approx(theirs.dt)
        assert theirs.t_max <= ours.t_max < 1.1 * theirs.t_max
        assert ours.t_min == pytest.approx(-ours.t_max, abs=2 * ours.dt)


def test_epsilon_is_that_of_opacus_with_its_own_domain():
    noise, rate, steps = 0.5, 0.1, 20
    accountant = PRVAccountant()
    accountant.history = [(noise, rate, steps)]
    expected = accountant.get_epsilon(DELTA)
    assert spent_epsilon(DELTA, noise, rate, steps, None) == pytest.approx(expected, rel=1e-6)


def test_a_table_alone_costs_what_its_own_noise_says():
    """A step that hardly reads anybody spends nothing."""
    for epsilon in (1.0, 2.0, 4.0):
        spent = spent_epsilon(DELTA, 50.0, 1e-4, 1, find_sigma(epsilon, DELTA))
        assert epsilon - 1e-3 <= spent <= epsilon + 0.02


@given(
    st.floats(0.5, 20), st.floats(0.01, 1.0), st.integers(1, 80), st.floats(0.1, 0.6), st.booleans()
)
@example(8.0, 0.0107, 10, 0.25, True)  # noise a little above the least
@settings(max_examples=3, phases=[Phase.explicit, Phase.generate])
def test_noise_keeps_to_the_budget_and_is_hardly_more_than_that(
    epsilon, rate, steps, share, has_table
):
    table = find_sigma(share * epsilon, DELTA) if has_table else None
    noise = find_noise(PrivacySettings(epsilon=epsilon), rate, steps, table)
    assert accounted(noise, rate, steps, table) <= epsilon
    less = noise * (1 - 3 * SLACK)
    assert noise == LEAST_NOISE or spent_epsilon(DELTA, less, rate, steps, table) > epsilon


@pytest.mark.parametrize("epsilon", [1.0, 3.0, 8.0, 12.0])
def test_noise_is_never_a_little_too_small(epsilon):
    table = find_sigma(epsilon / 4, DELTA)
    noise = find_noise(PrivacySettings(epsilon=epsilon), 0.15, 25, table)
    assert spent_epsilon(DELTA, noise, 0.15, 25, table) <= epsilon


def test_a_table_that_takes_all_is_refused():
    with pytest.raises(ConfigError, match="leaves nothing to train with: lower"):
        find_noise(PrivacySettings(epsilon=2.0), 0.1, 10, find_sigma(2.0, DELTA))


def test_without_opacus_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(ConfigError, match=r"pip install flexolmo\[private\]"):
        spent_epsilon(DELTA, 1.2345, 0.1, 3, None)
