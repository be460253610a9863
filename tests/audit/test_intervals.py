"""Figures of attacks against scikit-learn and against counting."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import auc, roc_auc_score, roc_curve

from flexolmo.audit.intervals import area, area_of, caught, roc, share

SCORES = st.lists(st.integers(0, 8), min_size=1, max_size=30).map(lambda x: np.array(x, float))


@given(SCORES, SCORES)
def test_area_and_curve_are_scikit_learns(yes, no):
    labels = np.repeat([1, 0], [len(yes), len(no)])
    expected = roc_auc_score(labels, np.concatenate([yes, no]))
    assert area_of([(yes, no)]) == pytest.approx(expected)
    curve = roc(yes, no)
    assert curve[0] == [0, 0] and curve[-1] == [1, 1]
    assert auc(*zip(*curve, strict=True)) == pytest.approx(expected)
    false, true, _ = roc_curve(labels, np.concatenate([yes, no]))
    assert curve == [list(point) for point in zip(false, true, strict=True)]


def test_a_long_curve_keeps_its_ends():
    rng = np.random.default_rng(0)
    yes, no = rng.normal(size=(2, 500))
    curve = roc(yes, no, most=20)
    assert area(yes, no, 0)["auc"] == area_of([(yes, no)])
    assert len(curve) == 20 and curve[0] == [0, 0] and curve[-1] == [1, 1]


@given(st.integers(1, 30), st.integers(1, 30))
def test_a_few_scores_that_lie_apart_leave_room(some, others):
    """A resample of them lies apart too, so resampling alone would say that all is known."""
    least = share(np.ones(min(some, others)))["interval"]
    for yes, no in ((some, others), (others, some)):
        found = area(np.arange(yes) + 100.0, np.arange(no) * 1.0, 0)
        assert found == {"auc": 1.0, "interval": least} and least[0] < 0.9
        found = area(np.arange(yes) * 1.0, np.arange(no) + 100.0, 0)
        assert found["auc"] == 0 and found["interval"] == pytest.approx([0, 1 - least[0]])


@given(SCORES, SCORES, st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.5]))
def test_the_most_members_are_caught_that_so_few_false_alarms_allow(yes, no, rate):
    found = caught(yes, no, rate)
    allowed = [t for t in (-1, *no) if (no > t).mean() <= rate]
    assert found["share"] == max((yes > t).mean() for t in allowed)
    assert found["false_alarms"]["share"] <= rate
    assert found["false_alarms"]["interval"][1] > 0  # so few others cannot exclude some
