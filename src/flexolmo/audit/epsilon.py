"""A lower bound on epsilon from one training run, by guessing which canaries were in it.

If training is (epsilon, delta)-private, nobody guesses fair coins much better than epsilon allows.
So whoever guesses well shows, at some confidence, that epsilon is at least so large: a test of what
an accountant promises, not a promise itself. Source: Steinke, Nasr, Jagielski (arXiv 2305.08846),
theorem 5.2.
"""

from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom

FRACTIONS = (1.0, 0.5, 0.25, 0.1)  # of the canaries, that are guessed; none of the others
MOST = 30.0  # epsilon that is looked for


def epsilon_bound(
    scores: np.ndarray, is_in: np.ndarray, delta: float, confidence: float = 0.95
) -> dict[str, Any]:
    """Largest epsilon that the guesses refute, 0.0 if none.

    Of the canaries, `is_in` [m] by independent fair coins, those of the highest `scores` [m] are
    guessed to be in and as many of the lowest to be out. How many is tried in a few ways, and the
    confidence is shared among them, so that the best may be chosen. Ties are broken by place.
    """
    order = np.argsort(-scores, kind="stable")
    is_in = np.asarray(is_in, dtype=bool)[order]
    best: dict[str, Any] = {"epsilon": 0.0, "guesses": 0, "right": 0}
    for fraction in FRACTIONS:
        each = int(fraction * len(scores) / 2)
        if not each:
            continue
        right = int(is_in[:each].sum() + (~is_in[-each:]).sum())
        found = refuted_epsilon(
            len(scores), 2 * each, right, delta, (1 - confidence) / len(FRACTIONS)
        )
        if found >= best["epsilon"]:
            best = {"epsilon": found, "guesses": 2 * each, "right": right}
    return best | {"delta": delta, "confidence": confidence, "canaries": len(scores)}


def refuted_epsilon(
    canaries: int, guesses: int, right: int, delta: float, significance: float
) -> float:
    """Largest epsilon under which so many right guesses have at most this probability."""

    def excess(epsilon: float) -> float:
        return p_value(canaries, guesses, right, epsilon, delta) - significance

    if excess(0.0) > 0:
        return 0.0
    if excess(MOST) < 0:
        return MOST
    return float(brentq(excess, 0.0, MOST, xtol=1e-6))


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Probability, at most, of so many right guesses about `canaries` fair coins under
    (epsilon, delta)-privacy."""
    chance = 1 / (1 + np.exp(-epsilon))  # of one right guess
    alone = float(binom.sf(right - 1, guesses, chance))
    if not right:
        return 1.0
    fewer = binom.pmf(np.arange(right - 1, -1, -1), guesses, chance).cumsum()
    worst = float((fewer / np.arange(1, right + 1)).max())
    return min(1.0, alone + 2 * canaries * delta * worst)
