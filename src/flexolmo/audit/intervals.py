"""Figures of attacks with their 95 % intervals. Knows nothing of experts or texts.

n units of an attack.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 400  # of an interval


def share(hits: np.ndarray) -> dict[str, Any]:
    """Share of hits [n] and its 95 % interval by Wilson's score; none of nothing."""
    n = len(hits)
    if not n:
        return {"share": None, "interval": None}
    z, p = 1.96, float(hits.mean())
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    bounds = [
        max(0.0, (middle - half) / (1 + z * z / n)),
        min(1.0, (middle + half) / (1 + z * z / n)),
    ]
    return {"share": p, "interval": bounds}


def area(
    yes: np.ndarray,
    no: np.ndarray,
    seed: int,
    yes_strata: np.ndarray | None = None,
    no_strata: np.ndarray | None = None,
) -> dict[str, Any]:
    """Area under the ROC curve, the chance that a score of `yes` is above one of `no` (ties count
    half), and its 95 % bootstrap interval; with strata, pairs of one stratum alone count.

    Where every pair is ordered alike, so are those of every resample; the interval is then Wilson's
    of as many pairs as have no document in common.
    """
    if yes_strata is None or no_strata is None:
        yes_strata = np.zeros(len(yes), int)
        no_strata = np.zeros(len(no), int)
    both = [
        (yes[yes_strata == stratum], no[no_strata == stratum])
        for stratum in np.intersect1d(yes_strata, no_strata)
    ]
    if not both:
        return {"auc": None, "interval": None}
    rng = np.random.default_rng(seed)
    found = [
        area_of(
            [
                (rng.choice(ours, len(ours)), rng.choice(theirs, len(theirs)))
                for ours, theirs in both
            ]
        )
        for _ in range(RESAMPLES)
    ]
    auc = area_of(both)
    bounds = [float(x) for x in np.quantile(found, [0.025, 0.975])]
    if auc in (0.0, 1.0):
        apart = sum(min(len(ours), len(theirs)) for ours, theirs in both)
        bounds = share(np.full(apart, auc))["interval"]
    return {"auc": auc, "interval": bounds}


def area_of(strata: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """The same of pairs of one stratum each, without an interval."""
    won = pairs = 0.0
    for yes, no in strata:
        no = np.sort(no)
        won += (
            float((np.searchsorted(no, yes, "left") + np.searchsorted(no, yes, "right")).sum()) / 2
        )
        pairs += len(yes) * len(no)
    return won / pairs


def caught(yes: np.ndarray, no: np.ndarray, rate: float) -> dict[str, Any]:
    """Share of `yes` whose score is above all of `no` but at most the share `rate`, with Wilson's
    interval; and under "false_alarms" the share of `no` above that score, with its own, which says
    how well so few can know it."""
    allowed = int(rate * len(no))
    least = np.sort(no)[len(no) - 1 - allowed]
    return share(yes > least) | {"false_alarms": share(no > least)}


def roc(yes: np.ndarray, no: np.ndarray, most: int = 200) -> list[list[float]]:
    """The ROC curve as [false positive rate, true positive rate], from [0, 0] to [1, 1], in at most
    about `most` points."""
    scores = np.concatenate([yes, no])
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # of each score
    hits = np.cumsum(np.repeat([1, 0], [len(yes), len(no)])[order])[last]
    alarms = last + 1 - hits
    is_turn = np.ones(len(last), dtype=bool)
    is_turn[1:-1] = (np.diff(hits, 2) != 0) | (np.diff(alarms, 2) != 0)
    false = np.append(0, alarms[is_turn]) / len(no)
    true = np.append(0, hits[is_turn]) / len(yes)
    kept = np.unique(np.linspace(0, len(false) - 1, min(most, len(false))).astype(int))
    return [[float(false[i]), float(true[i])] for i in kept]
