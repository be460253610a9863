"""Findings of a study's results.json: means over seeds, bars met or missed, orders compared.

Reads results and nothing else; a method or a table that is not there leaves its finding out. Knows
nothing of pages or figures.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean
from typing import Any

from flexolmo.bundle.manifest import PUBLIC

Results = Mapping[str, Any]
Table = Mapping[str, Any]  # one of `TABLES`: by method, its mean and what else was measured

MIXED, ANCHOR = "mixed", "dense public"  # a set; the anchor's row of bits
DEFAULT = "flexolmo_default"
TABLES = {"gap_closed": "held-out documents", "mixed": "mixed documents"}
OURS = (DEFAULT, "flexolmo_probabilities", "flexolmo_all_active", "low_rank")
PAPERS = ("flexolmo_paper", "flexolmo_joint_tuned")
UNSEPARATED = ("unrestricted_1x", "unrestricted_2x")  # trained on all sets together
RIVALS = (
    "soup_mean",
    "soup_weighted",
    "soup_weighted_equal_flops",
    "prompt_routing",
    "btm_equal_flops",
    "btx",
    "dume",
)
WORDS = {
    DEFAULT: "our default",
    "flexolmo_probabilities": "our default, probabilities mixed",
    "flexolmo_all_active": "our default, all experts active",
    "low_rank": "our default, low rank",
    "own_pair": "own pair",
    "flexolmo_paper": "the paper's FlexOlmo",
    "flexolmo_joint_tuned": "the paper's FlexOlmo + RT",
    "soup_mean": "mean soup",
    "soup_weighted": "weighted soup",
    "soup_weighted_equal_flops": "weighted soup at our FLOPs",
    "btm": "BTM",
    "btm_switching": "switching BTM",
    "btm_equal_flops": "BTM at our FLOPs",
    "prompt_routing": "prompt routing",
    "btx": "BTX",
    "dume": "DUME",
    "unrestricted_1x": "unrestricted 1x",
    "unrestricted_2x": "unrestricted 2x",
    PUBLIC: "the anchor",
}
# Averages of the paper's table 1 (four sets, 24 tasks), for those methods that are in it.
# Source: arXiv 2507.07024v4, table 1; of its two prompt routers the better one (the other: 40.0).
PAPER_AVERAGES = {
    PUBLIC: 36.9,
    "soup_mean": 39.6,
    "soup_weighted": 42.2,
    "btm": 43.4,
    "prompt_routing": 40.8,
    "btx": 40.0,
    "flexolmo_paper": 46.7,
    "flexolmo_joint_tuned": 47.8,
    "unrestricted_1x": 46.3,
    "unrestricted_2x": 51.5,
}
FLOPS_SLACK = 1.02  # a rival may spend this much of our default's FLOPs and count as equal
_ROUNDING = 1e-9


# --- reading results ------------------------------------------------------------------------------


def word(method: str) -> str:
    """Name of a method on the page."""
    return WORDS.get(method, method)


def owners_of(results: Results) -> list[str]:
    return [str(n) for n in (results.get("recipe") or {}).get("owners") or []]


def over_seeds(results: Results, *path: str) -> list[Any]:
    """Values of every finished seed at `path`; seeds without it are left out."""
    found = []
    for seed in results.get("seeds_done") or []:
        value: Any = (results.get("seeds") or {}).get(str(seed))
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            found.append(value)
    return found


def average(values: Sequence[Any]) -> Any:
    """The mean of numbers, or of equal places in lists and dicts of them; NaN of nothing."""
    if not values:
        return math.nan
    if isinstance(values[0], Mapping):
        keys = dict.fromkeys(k for v in values for k in v)
        return {k: average([v[k] for v in values if k in v]) for k in keys}
    if isinstance(values[0], list):
        return [average(places) for places in zip(*values, strict=True)]
    return fmean(values)


def bits_of(results: Results) -> dict[str, dict[str, float]]:
    """Bits per byte by row and set, the mean over seeds."""
    found = over_seeds(results, "bits_per_byte")
    return average(found) if found else {}


def anchor_flops(results: Results) -> float:
    """Forward FLOPs a token of the anchor; NaN if unknown."""
    return average(over_seeds(results, "anchor_flops_per_token"))


def mean_of(table: Table, method: str) -> float:
    """A method's mean in a table; NaN if it is not there."""
    return float((table.get(method) or {}).get("mean", math.nan))


# --- bars -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """One thing that was asked of the study, and what it reached."""

    part: str
    asked: str
    value: float  # over all seeds; NaN: not measured
    by_seed: list[float]
    met: bool | None  # None: not measured, or only for information
    unit: str  # times, share, change
    detail: str = ""
    is_information: bool = False


Choose = Callable[[Table], str | None]  # whom to hold our default against


def find_bars(results: Results) -> list[Bar]:
    """All bars, in the order in which they were asked."""
    return [
        *_kept_bars(results),
        *_rival_bars(results),
        *_unrestricted_bars(results),
        *_size_bars(results),
        *_optout_bars(results),
    ]


def best_rival(table: Table) -> str | None:
    """The best method that respects data separation at our default's inference FLOPs, or less."""
    if DEFAULT not in table:
        return None
    limit = FLOPS_SLACK * table[DEFAULT]["flops_per_token"]
    found = [m for m in RIVALS if m in table and table[m]["flops_per_token"] <= limit]
    return max(found, key=lambda m: mean_of(table, m), default=None)


def _kept_bars(results: Results) -> Iterator[Bar]:
    yield _bar(
        "a",
        "merged, our default keeps at least 90 % of what each own pair gains, mean over sets",
        over_seeds(results, "kept", "default", "mean"),
        lambda x: _at_least(x, 0.9),
        "share",
    )
    yield _bar(
        "a",
        "it needs at most 1 % more bits for public text than the anchor",
        over_seeds(results, "kept", "default", "public_change"),
        lambda x: _at_least(0.01, x),
        "change",
    )


def _rival_bars(results: Results) -> Iterator[Bar]:
    for kind, text in TABLES.items():
        yield _versus(
            results,
            kind,
            "b",
            f"{text}: at least 1.1 times the best rival that "
            "respects data separation at equal inference FLOPs (up to 1.02 times ours)",
            best_rival,
            1.1,
        )
    yield _versus(
        results,
        "mixed",
        "b",
        "mixed documents: at least 1.1 times BTM without a limit of FLOPs",
        _take("btm"),
        1.1,
    )
    yield _versus(
        results,
        "gap_closed",
        "b",
        "held-out documents: at least 0.95 times BTM without a limit of FLOPs",
        _take("btm"),
        0.95,
    )
    yield _versus(
        results,
        "mixed",
        "b",
        "mixed documents, against BTM that may switch (our "
        "strengthening of the rival), without a limit",
        _take("btm_switching"),
        None,
    )


def _unrestricted_bars(results: Results) -> Iterator[Bar]:
    for kind, text in TABLES.items():
        yield _versus(
            results,
            kind,
            "c",
            f"{text}: better than unrestricted training with 1x FLOPs",
            _take("unrestricted_1x"),
            1.0,
            is_strict=True,
        )
    for kind, text in TABLES.items():
        yield _versus(
            results,
            kind,
            "c",
            f"{text}: at least half of what unrestricted training with 2x FLOPs closes",
            _take("unrestricted_2x"),
            0.5,
        )
    for kind, text in TABLES.items():
        yield _versus(
            results,
            kind,
            "c",
            f"{text}: does it beat unrestricted training with 2x FLOPs (more than 1)?",
            _take("unrestricted_2x"),
            None,
        )


def _size_bars(results: Results) -> Iterator[Bar]:
    sizes = [
        (max(low / full for low, full in zip(b["low"], b["default"], strict=True)), b)
        for b in over_seeds(results, "bytes")
        if b.get("low") and b.get("default")
    ]
    totals = [
        fmean(sum(b[f]) / len(b[f]) for _, b in sizes) / 1e6 if sizes else math.nan
        for f in ("low", "default")
    ]
    yield _bar(
        "d",
        "a low-rank expert is at most a quarter of the full one's bytes, every owner",
        [ratio for ratio, _ in sizes],
        lambda x: _at_least(0.25, x),
        "share",
        f"mean {totals[0]:.2f} of {totals[1]:.2f} MB",
        over=max,
    )
    yield _bar(
        "d",
        "it has at least 95 % of the full expert's gain, mean over sets",
        [fmean(s.values()) for s in over_seeds(results, "low_rank_share_of_gain") if s],
        lambda x: _at_least(x, 0.95),
        "share",
    )


def _optout_bars(results: Results) -> Iterator[Bar]:
    for family, said in (
        (
            "default",
            "with an owner off, its own set is at most 0.5 % worse than "
            "under the anchor, every owner and seed",
        ),
        ("paper", "the same with the paper's FlexOlmo"),
    ):
        worst, names = [], []
        for off, bits in zip(
            over_seeds(results, "optout", family),
            over_seeds(results, "bits_per_byte", ANCHOR),
            strict=False,
        ):
            change = {n: off[n][n] / bits[n] - 1 for n in off if n in off[n] and bits.get(n)}
            if change:
                names.append(max(change, key=change.__getitem__))
                worst.append(change[names[-1]])
        name = names[worst.index(max(worst))] if worst else ""
        yield _bar(
            "opt-out",
            said,
            worst,
            (lambda x: _at_least(0.005, x)) if family == "default" else None,
            "change",
            f"worst: {name}",
            over=max,
        )


def _take(method: str) -> Choose:
    return lambda table: method if method in table else None


def _versus(
    results: Results,
    kind: str,
    part: str,
    asked: str,
    choose: Choose,
    least: float | None,
    is_strict: bool = False,
) -> Bar:
    """Our default's gap closed over a rival's: of the means over seeds, and in every seed."""

    def ratio(table: Table) -> float:
        rival = choose(table)
        if rival is None or DEFAULT not in table:
            return math.nan
        ours = mean_of(table, DEFAULT)
        theirs = mean_of(table, rival)
        if theirs > 0:
            return ours / theirs
        return math.inf if ours > 0 else math.nan

    def is_enough(x: float) -> bool:
        return least is not None and (x > least if is_strict else _at_least(x, least))

    whole: Table = results.get(kind) or {}
    rival = choose(whole)
    is_met = None if least is None else is_enough
    detail = (
        f"{mean_of(whole, DEFAULT):.3f} v {mean_of(whole, rival):.3f}, {word(rival)}"
        if rival and DEFAULT in whole
        else ""
    )
    value = ratio(whole)
    bar = _bar(
        part,
        asked,
        [ratio(t) for t in over_seeds(results, kind)],
        is_met,
        "times",
        detail,
        over=lambda _: value,
    )
    if detail and math.isnan(value) and least is not None:  # neither is better than the anchor
        return Bar(part, asked, value, bar.by_seed, False, "times", detail)
    return bar


def _bar(
    part: str,
    asked: str,
    by_seed: Sequence[float],
    is_met: Callable[[float], bool] | None,
    unit: str,
    detail: str = "",
    over: Callable[[Sequence[float]], float] = fmean,
) -> Bar:
    value = over(by_seed) if by_seed else math.nan
    met = None if is_met is None or math.isnan(value) else is_met(value)
    return Bar(
        part,
        asked,
        value,
        list(by_seed),
        met,
        unit,
        detail if by_seed else "",
        is_information=is_met is None,
    )


def _at_least(x: float, y: float) -> bool:
    return x >= y - _ROUNDING


# --- the paper's order and ours -------------------------------------------------------------------


@dataclass(frozen=True)
class Swap:
    """Two methods whose order is not the paper's: there `better` is ahead of `worse`."""

    better: str
    worse: str
    ours: tuple[float, float]  # gap closed, of better and worse
    seeds: int  # in how many of them it is so


@dataclass(frozen=True)
class Agreement:
    """Agreement of our order of methods with the paper's."""

    methods: list[str]  # in the paper's order, best first
    ours: dict[str, float]  # gap closed by each
    num_pairs: int
    tau: float  # Kendall's, -1 to 1: agreeing pairs less swapped ones, over all
    swaps: list[Swap] = field(default_factory=list)


def compare_orders(
    results: Results, kind: str, stand_ins: Mapping[str, str] | None = None
) -> Agreement | None:
    """Our order in the table `kind` against the paper's averages; None below two methods.

    `stand_ins`: for a method of the paper's, the one of ours to put in its place. The anchor's
    gap closed is 0.
    """
    stand_ins, table = stand_ins or {}, results.get(kind) or {}
    ours: dict[str, float] = {}
    for method in PAPER_AVERAGES:
        taken = stand_ins.get(method, method)
        if table and (method == PUBLIC or taken in table):
            ours[method] = 0.0 if method == PUBLIC else mean_of(table, taken)
    methods = sorted(ours, key=lambda m: -PAPER_AVERAGES[m])
    if len(methods) < 2:
        return None
    pairs = list(combinations(methods, 2))
    agreeing = sum(ours[a] > ours[b] for a, b in pairs)
    swapped = [(a, b) for a, b in pairs if ours[a] < ours[b]]

    def in_seed(one: Table, method: str) -> float:
        return 0.0 if method == PUBLIC else mean_of(one, stand_ins.get(method, method))

    tables = over_seeds(results, kind)
    swaps = [
        Swap(a, b, (ours[a], ours[b]), sum(in_seed(t, a) < in_seed(t, b) for t in tables))
        for a, b in swapped
    ]
    return Agreement(methods, ours, len(pairs), (agreeing - len(swaps)) / len(pairs), swaps)
