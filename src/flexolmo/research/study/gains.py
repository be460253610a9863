"""A study's numbers from log-probabilities: every method on every set, per seed.

NumPy only. What a method must choose (temperatures, prompt lengths) is chosen here, on the
validation split, for each kind of text by itself; the held-out split is only reported.

E models, T positions.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.errors import DataError
from flexolmo.research.rivals.baselines import (
    btm_prefix_weights,
    btm_weights,
    mix_log_probs,
    prefix_for_budget,
    prompt_routing_weights,
)

MIXED = "mixed"
Rows = dict[str, list[np.ndarray]]  # by set: log-probabilities in nats, float32 [T] a window
TEMPERATURES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
PROMPTS = (8, 16, 32, 64)  # tokens


def gap_closed(
    method: Rows, public: Rows, dense: Mapping[str, Rows], names: Sequence[str]
) -> dict[str, float]:
    """(public - method) / (public - dense expert of that set), in nats, by owner's set."""
    found = {}
    for n in names:
        base = total(public[n])
        best = total(dense[n][n])
        found[n] = (total(method[n]) - base) / (best - base)
    return found


def gap_closed_mixed(
    method: Rows,
    public: Rows,
    dense: Mapping[str, Rows],
    sources: Sequence[np.ndarray],
    set_names: Sequence[str],
    names: Sequence[str],
) -> dict[str, float]:
    """Gains over the tokens of mixed documents that came from each owner's set; what an owner's
    dense model says of its own pieces, reading the whole document, is the mark of 1.

    DataError: an owner of whom no mixed document has a piece.
    """
    found = {}
    for n in names:
        place = set_names.index(n)
        if not any((s == place).any() for s in sources):
            raise DataError(
                f"None of the {len(sources)} mixed documents has a piece of {n}; ask "
                "for more of them (heldout_mixed, validation_mixed)."
            )

        def on(rows: Rows, place: int = place) -> float:
            return sum(
                float(r[s == place].astype(np.float64).sum())
                for r, s in zip(rows[MIXED], sources, strict=True)
            )

        base = on(public)
        found[n] = (on(method) - base) / (on(dense[n]) - base)
    return found


def total(rows: Sequence[np.ndarray]) -> float:
    """Sum of a model's log-probabilities, in nats."""
    return float(sum(r.astype(np.float64).sum() for r in rows))


def bits_per_byte(rows: Rows, sizes: Mapping[str, int]) -> dict[str, float]:
    """Bits per byte of each set; `sizes` are bytes of text."""
    return {n: -total(r) / np.log(2) / sizes[n] for n, r in rows.items()}


# --- rivals that mix what dense models say --------------------------------------------------------


def stack(readings: Mapping[str, Rows], names: Sequence[str], name: str, window: int) -> np.ndarray:
    """[E,T] of one window, the models in the order of `names`."""
    return np.stack([readings[n][name][window] for n in names])


def mix(readings: Mapping[str, Rows], weigh: Callable[[np.ndarray, str, int], np.ndarray]) -> Rows:
    """A rival's log-probabilities; `weigh(log_probs [E,T], set, window)` gives weights [E,T]."""
    names = list(readings)
    found: Rows = {}
    for name, rows in readings[names[0]].items():
        found[name] = []
        for i in range(len(rows)):
            log_probs = stack(readings, names, name, i)
            found[name].append(mix_log_probs(log_probs, weigh(log_probs, name, i)))
    return found


def btm(
    readings: Mapping[str, Rows],
    temperature: float,
    top_k: int | None = None,
    switch_rate: float = 0.0,
) -> Rows:
    """BTM over all models; see `baselines.btm_weights`."""
    return mix(
        readings,
        lambda p, _n, _i: btm_weights(
            p, temperature=temperature, top_k=top_k, switch_rate=switch_rate
        ),
    )


def btm_equal_flops(
    readings: Mapping[str, Rows], temperature: float, top_k: int, budget: float
) -> tuple[Rows, float]:
    """BTM within a budget of `budget` dense models a token: all read a prefix, `top_k` go on.

    Returns the rows and the dense models really run per token.
    """
    spent = tokens = 0

    def weigh(p: np.ndarray, _name: str, _window: int) -> np.ndarray:
        nonlocal spent, tokens
        E, T = p.shape
        prefix = prefix_for_budget(T, E, top_k, budget) or 0
        spent += prefix * E + (T - prefix) * top_k
        tokens += T
        return btm_prefix_weights(p, prefix_tokens=prefix, top_k=top_k, temperature=temperature)

    rows = mix(readings, weigh)
    return rows, spent / tokens


def prompt_routing(
    readings: Mapping[str, Rows], probabilities: Mapping[str, np.ndarray], prompt_tokens: int
) -> Rows:
    """One dense model for the rest of a text, by a classifier's reading of its start.

    `probabilities` holds [windows,E] by set, in the order of `readings`.
    """
    public = list(readings).index(PUBLIC)
    return mix(
        readings,
        lambda p, name, i: prompt_routing_weights(
            probabilities[name][i], p.shape[1], prompt_tokens, public
        ),
    )
