"""The tables of a study's page, each with its heading and what must be said of it.

From results.json to Markdown; a table for which there is nothing is left out.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.numbers import format_change, format_number, format_percent, format_signed
from flexolmo.report.markdown import escape, mean_and_spread, write_table
from flexolmo.research.study.findings import (
    ANCHOR,
    DEFAULT,
    MIXED,
    OURS,
    PAPER_AVERAGES,
    TABLES,
    WORDS,
    Results,
    anchor_flops,
    average,
    bits_of,
    mean_of,
    over_seeds,
    owners_of,
    word,
)

_WHAT = {
    DEFAULT: "experts of whole matrices, FFN, attention, embedding and head; evidence router",
    "flexolmo_all_active": "no choice of active experts",
    "low_rank": "the same experts cut to low rank, all active",
    "flexolmo_paper": "FFN experts, linear router whose rows start from the anchor's hidden "
    "states, nothing trained after merging",
    "flexolmo_joint_tuned": "router rows then tuned together on proxies",
    "soup_mean": "one dense model, the mean of all",
    "soup_weighted": "a soup for every text, by the likelihood of its start",
    "soup_weighted_equal_flops": "the same, of shorter starts if it must",
    "btm": "all dense models run, mixed by their posterior",
    "btm_switching": "the text may change domain; our strengthening of BTM",
    "btm_equal_flops": "all read a start, the likeliest go on",
    "prompt_routing": "a classifier reads the start and picks one dense model",
    "btx": "dense FFNs as experts, then trained on public text",
    "dume": "dense FFNs, router in closed form by ridge regression",
    "unrestricted_1x": "one mixture trained on all sets together, half the text",
    "unrestricted_2x": "one mixture trained on all sets together, all the text",
}
_PAPERS_ABLATIONS = {  # averages of the paper's tables 1 and 3
    "paper": "43.5",
    "paper, MiniLM rows": "46.7 (GRIT)",
    "paper, no bias": "45.8 (from 46.7)",
    "paper, random rows": "44.4 (no bias either)",
    "paper, no coordination": "38.8 (nor bias, nor rows)",
}
_GROUPS = (
    ("start", r"paper|default"),
    ("row initialisation", r".*\brows?\b.*"),
    ("bias", r".*(bias|clamp).*"),
    ("replay of public text", r".*replay.*"),
    ("coordination", r".*coordination.*"),
    ("scope", r".*scope.*"),
    ("active experts", r".*top-\d+"),
    ("other", r".*"),
)
_WORK = {
    "corpus": "fetch, clean and tokenize the text",
    "windows": "cut the text that is read",
    "anchor": "train the anchor",
    "dense": "train a dense expert, for rivals",
    "expert": "train an expert: our default, the paper's, ablations",
    "read": "one model reads validation and held-out text",
    "read_weighted_soup": "a soup for every text, read",
    "unrestricted": "train on all data",
    "btx": "BTX's training on public text",
    "dume": "DUME's statistics and solution",
    "proxy": "find proxies of a set in public text",
    "tuned": "joint router tuning (RT)",
    "samples": "a dense model writes text for the prompt classifier",
    "score": "all methods' numbers, from what the models said",
    "uncoordinated": "an expert that was not trained to coordinate",
    "rerouted": "another router for experts that are there",
    "ridge": "the ridge router's solution",
    "embedder": "fetch the text embedder",
    "compressed": "cut an expert to low rank and train it on a little",
    "ablation_score": "the ablations' numbers",
}


# --- table 1 --------------------------------------------------------------------------------------


def table_of_methods(results: Results) -> Iterator[str]:
    """Every method, ordered by its mean gap closed on both kinds of text."""
    held, mixed = (results.get(kind) or {} for kind in TABLES)
    bits = bits_of(results)
    owners = owners_of(results)
    one = anchor_flops(results)
    if not held:
        return

    def row(
        said: str,
        method: str,
        closed: Sequence[Mapping[str, Any] | None],
        flops: float,
        strict: bool | None,
    ) -> list[str]:
        by_set = {n: x for n, x in bits.get(method, {}).items() if n in owners}
        gains = [1 - x / bits[ANCHOR][n] for n, x in by_set.items() if ANCHOR in bits]
        paper = PAPER_AVERAGES.get(PUBLIC if method == ANCHOR else method)
        return [
            said,
            *map(mean_and_spread, closed),
            format_number(fmean(by_set.values()), 3) if by_set else "–",
            format_change(fmean(gains)) if gains else "–",
            "–" if math.isnan(flops / one) else format_number(flops / one, 2),
            {True: "yes", False: "no", None: "–"}[strict],
            "–" if paper is None else f"{paper:.1f}",
        ]

    def height(method: str) -> float:
        return fmean(mean_of(t, method) for t in (held, mixed) if method in t)

    rows = [
        row(
            _method(m),
            m,
            (held[m], mixed.get(m)),
            held[m]["flops_per_token"],
            held[m]["strict_opt_out"],
        )
        for m in sorted((m for m in held if m != "own_pair"), key=lambda m: -height(m))
    ]
    none_of_it, all_of_it = {"mean": 0.0}, {"mean": 1.0}
    if ANCHOR in bits:
        rows.append(row("*For reference:* the anchor", ANCHOR, (none_of_it, none_of_it), one, None))
    if single := _best_single_expert(results):
        rows.append(
            row(
                f"*For reference:* the best single dense expert ({escape(single[0])})",
                f"dense {single[0]}",
                (single[1], None),
                one,
                None,
            )
        )
    if owners and all(f"dense {n}" in bits for n in owners):
        bits["its own"] = {n: bits[f"dense {n}"][n] for n in owners}
        rows.append(
            row(
                "*Told whose text it is:* that set's dense expert",
                "its own",
                (all_of_it, all_of_it),
                one,
                None,
            )
        )
    if "own_pair" in held:
        rows.append(
            row(
                "*Told whose text it is:* own pair, the anchor with that owner's expert",
                "own_pair",
                (held["own_pair"], mixed.get("own_pair")),
                held["own_pair"]["flops_per_token"],
                None,
            )
        )
    yield "## Table 1. All methods"
    yield (
        "The paper's tables 1 and 2 with our numbers. Rows by the mean of the two gaps closed; "
        "ours in **bold**. Bits per byte, and the relative gain (by how much fewer they are "
        "than the anchor's), are means over the owners' sets. The last column is the average "
        "over 24 tasks in the paper's table 1 where it has the method: another scale, from "
        "far larger models, of which only the order can be compared."
    )
    yield write_table(
        [
            "Method",
            "Gap closed, held-out",
            "Gap closed, mixed",
            "Bits per byte",
            "Relative gain",
            "FLOPs per token",
            "Strict opt-out",
            "Paper",
        ],
        rows,
        "lrrrrrcr",
    )


def _method(method: str) -> str:
    said = WORDS.get(method) or escape(method)
    said = f"**{said}**" if method in OURS else said
    return f"{said}: {_WHAT[method]}" if method in _WHAT else said


def _best_single_expert(results: Results) -> tuple[str, dict[str, Any]] | None:
    """The dense expert that closes most of the gap over all sets, and how much it closes."""
    owners = owners_of(results)
    found: dict[str, dict[str, Any]] = {}
    for name in owners:
        means = [
            fmean(
                (bits[ANCHOR][n] - bits[f"dense {name}"][n])
                / (bits[ANCHOR][n] - bits[f"dense {n}"][n])
                for n in owners
            )
            for bits in over_seeds(results, "bits_per_byte")
            if all(f"dense {n}" in bits for n in [PUBLIC, *owners])
        ]
        if means:
            found[name] = {"mean": fmean(means), "spread": stdev(means) if means[1:] else None}
    best = max(found, key=lambda n: found[n]["mean"], default="")
    return (best, found[best]) if found else None


# --- tables 2 and 3 -------------------------------------------------------------------------------


def table_of_bits(results: Results) -> Iterator[str]:
    """Bits per byte of the main models by set."""
    bits = bits_of(results)
    owners = owners_of(results)
    models = (
        "own_pair",
        DEFAULT,
        "flexolmo_paper",
        "low_rank",
        "btm",
        "unrestricted_1x",
        "unrestricted_2x",
    )
    rows = {
        ANCHOR: "the anchor",
        **{f"dense {n}": f"{escape(n)}'s dense expert" for n in owners},
        **{m: f"**{word(m)}**" if m in OURS else word(m) for m in models},
    }
    rows = {m: said for m, said in rows.items() if m in bits}
    if not rows:
        return
    sets = [s for s in [PUBLIC, *owners, MIXED] if any(s in bits[m] for m in rows)]
    least = {s: min(bits[m][s] for m in rows if s in bits[m]) for s in sets}

    def cell(m: str, s: str) -> str:
        if s not in bits[m]:
            return "–"
        shown = format_number(bits[m][s], 3)
        return f"**{shown}**" if shown == format_number(least[s], 3) else shown

    yield "## Table 2. Bits per byte by set"
    yield (
        "Held-out text, lower is better; means over seeds. **Bold**: the least of a column. "
        "The own pair is read on each owner's own set, with that owner's expert."
    )
    yield write_table(
        ["Model", *map(escape, sets)],
        [[said, *(cell(m, s) for s in sets)] for m, said in rows.items()],
        "l" + "r" * len(sets),
    )


def table_of_ablations(results: Results) -> Iterator[str]:
    """Every variant, grouped by what was changed."""
    found: Mapping[str, Any] = results.get("ablations") or {}
    if not found:
        return
    first = (results.get("seeds_done") or ["?"])[0]
    anchor = (over_seeds(results, "bits_per_byte", ANCHOR) or [{}])[0].get(PUBLIC)
    groups: dict[str, str] = {}  # by variant
    for group, pattern in _GROUPS:
        names = [n for n in found if n not in groups and re.fullmatch(pattern, n)]
        groups |= dict.fromkeys(sorted(names, key=_natural), group)

    def cells(name: str) -> Iterator[str]:
        base = found.get(name.partition(",")[0], {})
        for kind in TABLES:
            mean, before = (mean_of(entry, kind) for entry in (found[name], base))
            yield "–" if math.isnan(mean) else format_number(mean, 3)
            yield (
                "–"
                if base is found[name] or math.isnan(mean - before)
                else format_signed(mean - before, 3)
            )
        public = (found[name].get("bits_per_byte") or {}).get(PUBLIC)
        yield format_change(public / anchor - 1) if public and anchor else "–"

    yield "## Table 3. One change at a time"
    yield (
        f"Seed {first} alone. A difference is from the variant before the comma. The "
        "rows of the paper's router start here with the anchor's mean hidden state, as in "
        "its table 3; its own ablations in table 1 take away one thing after the other."
    )
    yield write_table(
        [
            "What",
            "Variant",
            "Gap closed, held-out",
            "difference",
            "Gap closed, mixed",
            "difference",
            "Bits, public text v anchor",
            "Paper's average",
        ],
        [
            [group, escape(n), *cells(n), _PAPERS_ABLATIONS.get(n, "–")]
            for n, group in groups.items()
        ],
        "llrrrrrr",
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts top-2 before top-10."""
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in re.split(r"(\d+)", name)]


# --- by owner, and cost ---------------------------------------------------------------------------


def table_by_owner(results: Results) -> Iterator[str]:
    """Table of the share of each owner's gain that merging keeps, and of small experts' cost."""
    columns = [average(over_seeds(results, "kept", f, "sets")) for f in ("default", "low", "paper")]
    columns.append(average(over_seeds(results, "low_rank_share_of_gain")))
    sizes = average(over_seeds(results, "bytes"))
    if not any(isinstance(c, dict) for c in columns):
        return

    def shown(column: Any, name: str) -> str:
        return format_percent(column[name]) if isinstance(column, dict) and name in column else "–"

    def megabytes(family: str, i: int) -> str:
        listed = (sizes.get(family) if isinstance(sizes, dict) else None) or []
        return format_number(listed[i] / 1e6, 2) if i < len(listed) else "–"

    yield (
        "**By owner**: share of the own pair's gain that is kept after merging; gain of the "
        "low-rank pair relative to the full one's; size of an expert."
    )
    yield write_table(
        [
            "Owner",
            "Kept, our default",
            "Kept, low rank",
            "Kept, the paper's",
            "Low-rank gain v full",
            "Full, MB",
            "Low rank, MB",
        ],
        [
            [
                escape(n),
                *(shown(c, n) for c in columns),
                megabytes("default", i),
                megabytes("low", i),
            ]
            for i, n in enumerate(owners_of(results))
        ],
        "lrrrrrr",
    )


def table_of_cost(results: Results) -> Iterator[str]:
    """Seconds, tokens and training FLOPs by kind of step, and by method."""
    cost: Mapping[str, Mapping[str, float]] = results.get("cost") or {}
    if not cost:
        return
    one, held = anchor_flops(results), results.get("gap_closed") or {}

    def forward(method: str) -> float:
        return float((held.get(method) or {}).get("flops_per_token", math.nan))

    exact = {
        "anchor": one,
        "dense": one,
        "unrestricted": forward("unrestricted_1x"),
        "btx": forward("btx"),
    }
    pair = 2 * one  # both run on every token while one learns
    at_most = {"expert": pair, "compressed": pair, "tuned": forward("flexolmo_joint_tuned")}

    def spent(tokens: Mapping[str, float]) -> str:
        flops = sum(3 * n * (exact | at_most).get(k, math.nan) for k, n in tokens.items() if n)
        return (
            "–"
            if math.isnan(flops) or not flops
            else f"{'≤ ' * any(kind in at_most for kind in tokens)}{flops / 1e12:,.1f}"
        )

    def total(what: str) -> float:
        return sum(c[what] for c in cost.values())

    rows = [
        [
            _WORK.get(k, escape(k)),
            f"{c['steps']:,}",
            f"{c['seconds']:,.0f}",
            f"{c['tokens']:,}" if c["tokens"] else "–",
            spent({k: c["tokens"]}),
        ]
        for k, c in sorted(cost.items(), key=lambda item: -item[1]["seconds"])
    ]
    rows.append(
        ["**all**", f"{total('steps'):,}", f"{total('seconds'):,.0f}", f"{total('tokens'):,}", "–"]
    )
    yield "## Cost"
    yield (
        f"All steps that are done, of all seeds, each on one thread: "
        f"{total('seconds') / 3600:.1f} hours."
        + (
            ""
            if math.isnan(one)
            else (
                f" One forward pass of the anchor is {one / 1e6:.2f} million FLOPs a token. "
                "Training FLOPs are three forward passes for every token trained on; ≤: at most, "
                "for frozen weights need no gradients of their own."
            )
        )
    )
    yield write_table(
        ["Work", "Steps", "Seconds", "Tokens trained on", "Training FLOPs, 10¹²"], rows, "lrrrr"
    )
    if methods := results.get("cost_by_method"):
        yield (
            "By method, of one seed: all that it needs beyond the anchor and the text, its "
            "search for settings on validation text included. What several methods share (dense "
            "models, experts) counts in each."
        )
        yield write_table(
            [
                "Method",
                "Tokens trained on",
                "Training FLOPs, 10¹²",
                "Seconds of training",
                "Seconds of reading",
                "FLOPs per token read",
            ],
            [
                [
                    _method(m).split(":")[0],
                    f"{sum(c['tokens'].values()):,.0f}",
                    spent(c["tokens"]),
                    f"{c['training_seconds']:,.0f}",
                    f"{c['reading_seconds']:,.0f}",
                    format_number(forward(m) / one, 2),
                ]
                for m, c in sorted(methods.items(), key=lambda item: -item[1]["training_seconds"])
            ],
            "lrrrrr",
        )
