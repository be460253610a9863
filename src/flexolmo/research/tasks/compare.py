"""A paired bootstrap over items: is run b better than run a, or was it lucky in its items?

Pure functions of numbers: knows nothing of models, nor of what a score means. The interval covers
the choice of items only, not the seed of training or of sampled answers, and with few items it is
narrow: at 20 items, an interval of 95 % holds the true difference in about 93 % of cases.

Source: Efron and Tibshirani 1993, chapters 13 and 16 (percentile interval, tests); Koehn 2004
(paired). That tasks are given and only their items are drawn is ours.
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from flexolmo.errors import ConfigError, DataError

_CHUNK_NUMBERS = 1 << 20  # in memory at a time


def paired_bootstrap(
    a: Mapping[str, np.ndarray],
    b: Mapping[str, np.ndarray],
    *,
    levels: Sequence[Mapping[str, Sequence[str]]] = (),
    draws: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Difference of the scores, b - a: by task, by group at every level, and overall.

    A draw takes from each task as many items as it has, with replacement, the same for a and b. A
    task is the mean of its items, a group the mean of its tasks or of the groups of the level
    below, overall the mean of the highest level; all come from the same draws. What is drawn for a
    task depends on `seed` and its name, not on the other tasks.

    Args:
        a: scores [items] by task, higher for better, in any unit.
        b: scores of the same items in the same order.
        levels: from the lowest, names of tasks by group, then of these by groups of groups, and
            so on; each name of the level below in one or more.
        confidence: of the interval, above 0 and below 1.
    Returns:
        `draws`, `seed` and `confidence`; `tasks` by name; `levels`, each by name; and `overall`.
        Each entry has `a` and `b`, their `difference` (b - a), its percentile interval `low` to
        `high`, and `p`, two-sided: 2 * (1 + k) / (draws + 1), at most 1, where k counts the draws
        at most 0 or those at least 0, whichever are fewer. A task's entry also has `items`.
    Raises:
        DataError: no task, a task in one run only, unlike lengths, no items, scores not finite.
        ConfigError: a group without tasks or with unknown ones, a task in no group, a bad number.
    """
    if draws < 1 or seed < 0 or not 0 < confidence < 1:
        raise ConfigError(
            f"draws {draws}, seed {seed}, confidence {confidence} found; expected 1 "
            "or more, 0 or more, and above 0 but below 1."
        )
    pairs = _check_pairs(a, b)
    below: Mapping[str, Any] = pairs
    for groups in levels:
        _check_groups(groups, below)
        below = groups
    drawn, tasks = {}, {}
    for task, (x, y) in pairs.items():
        drawn[task] = _draw_means(y - x, draws, _generator(seed, task))
        tasks[task] = {
            **_summary(float(x.mean()), float(y.mean()), drawn[task], confidence),
            "items": len(x),
        }
    top, found = tasks, []
    for groups in levels:
        made = {g: _average(names, drawn, top, confidence) for g, names in groups.items()}
        drawn, top = {g: d for g, (d, _) in made.items()}, {g: e for g, (_, e) in made.items()}
        found.append(top)
    return {
        "draws": draws,
        "seed": seed,
        "confidence": confidence,
        "tasks": tasks,
        "levels": found,
        "overall": _average(list(top), drawn, top, confidence)[1],
    }


def _average(
    names: Sequence[str],
    draws: Mapping[str, np.ndarray],
    entries: Mapping[str, dict[str, Any]],
    confidence: float,
) -> tuple[np.ndarray, dict[str, Any]]:
    """The mean of `names`, of each draw and summed up; in one order, whatever the order given."""
    names = sorted(set(names))
    mean = np.mean([draws[name] for name in names], axis=0)  # [draws]
    a, b = (float(np.mean([entries[name][run] for name in names])) for run in "ab")
    return mean, _summary(a, b, mean, confidence)


def _summary(a: float, b: float, draws: np.ndarray, confidence: float) -> dict[str, Any]:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    slack = 1e-12 * np.abs(draws).max()  # a mean of means may miss 0 by a rounding
    fewer = int(min((draws <= slack).sum(), (draws >= -slack).sum()))
    return {
        "a": a,
        "b": b,
        "difference": b - a,
        "low": float(low),
        "high": float(high),
        "p": min(1.0, 2 * (1 + fewer) / (len(draws) + 1)),
    }


def _draw_means(differences: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Means of resampled `differences` [items], one for each draw; [draws].

    Right or wrong leaves three values for any number of items. Where values are so few, what is
    drawn is how often each value comes, which is the same law.
    """
    n = len(differences)
    _, first, counts = np.unique(differences, return_index=True, return_counts=True)
    order = np.argsort(first)  # not by size: a and b exchanged must give the same draws
    values, shares = differences[first[order]], counts[order] / n
    is_few = 16 * len(values) < n
    rows = max(1, _CHUNK_NUMBERS // (len(values) if is_few else n))
    means = []
    for start in range(0, draws, rows):
        size = min(rows, draws - start)
        if is_few:
            means.append(generator.multinomial(n, shares, size=size) @ values / n)
        else:
            means.append(differences[generator.integers(n, size=(size, n))].mean(axis=1))
    return np.concatenate(means)


def _generator(seed: int, task: str) -> np.random.Generator:
    name = int.from_bytes(blake2b(task.encode(), digest_size=8).digest(), "big")
    return np.random.default_rng(np.random.SeedSequence([seed, name]))


def _check_pairs(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Scores of both runs by task, in float64; or an error that names every task that is wrong."""
    wrong = [f"{task} is in run a only" for task in a if task not in b]
    wrong += [f"{task} is in run b only" for task in b if task not in a]
    pairs = {}
    for task in a.keys() & b.keys():
        x, y = (np.asarray(scores, dtype=np.float64) for scores in (a[task], b[task]))
        if x.ndim != 1 or x.shape != y.shape or not len(x):
            wrong.append(f"{task} has scores of shapes {list(x.shape)} and {list(y.shape)}")
        elif not (np.isfinite(x).all() and np.isfinite(y).all()):
            wrong.append(f"{task} has scores that are not finite")
        pairs[task] = x, y
    if wrong or not pairs:
        raise DataError(
            f"Runs that cannot be compared: {'; '.join(sorted(wrong)) or 'no task'}. "
            "Both need one finite score for each of the same items of the same tasks; "
            "leave out of both what either lacks."
        )
    return {task: pairs[task] for task in a}


def _check_groups(groups: Mapping[str, Sequence[str]], tasks: Mapping[str, Any]) -> None:
    grouped = {task for names in groups.values() for task in names}
    wrong = [f"{group} has no task" for group, names in groups.items() if not names]
    wrong += [f"{task} is in a group and not in the runs" for task in grouped - tasks.keys()]
    wrong += [f"{task} is in no group" for task in tasks.keys() - grouped]
    if wrong:
        raise ConfigError(
            f"Groups that do not fit the runs: {'; '.join(sorted(wrong))}. Put every "
            "task of the runs, and no other, into a group; it may be alone there."
        )
