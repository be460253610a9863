"""Tables of a study's page, each with its heading and what must be said of it.

From results.json to blocks; a table for which there is nothing is left out.
"""

import math
import re
from collections.abc import Iterator, Mapping
from statistics import fmean, stdev
from typing import Any

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.numbers import (
    format_change,
    format_number,
    format_percent,
    format_signed,
    format_spread,
)
from flexolmo.report.page import Block, Cell, Table, Text
from flexolmo.research.study.findings import (
    ANCHOR,
    DEFAULT,
    MIXED,
    OURS,
    PAPER_AVERAGES,
    TABLES,
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
_YES_OR_NO = {True: "yes", False: "no", None: "–"}
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


def table_of_methods(results: Results) -> Iterator[Block]:
    """Every method, ordered by its mean gap closed on both kinds of text."""
    held, mixed = (results.get(kind) or {} for kind in TABLES)
    bits = bits_of(results)
    owners = owners_of(results)
    one = anchor_flops(results)
    if not held:
        return
    rows: list[dict[str, Cell | str]] = []

    def shown(entry: Mapping[str, Any] | None) -> str:
        return "–" if entry is None else format_spread(entry["mean"], entry.get("spread"), 3)

    def add(
        said: Cell, method: str, entry: Mapping[str, Any], on_mixed: Mapping[str, Any] | None
    ) -> None:
        by_set = {n: x for n, x in bits.get(method, {}).items() if n in owners}
        gains = [1 - x / bits[ANCHOR][n] for n, x in by_set.items() if ANCHOR in bits]
        paper = PAPER_AVERAGES.get(PUBLIC if method == ANCHOR else method)
        rows.append(
            {
                "Method": said,
                "Gap closed, held-out": shown(entry),
                "Gap closed, mixed": shown(on_mixed),
                "Bits per byte": format_number(average(list(by_set.values())), 3),
                "Relative gain": format_change(average(gains)),
                "FLOPs per token": format_number(entry.get("flops_per_token", one) / one, 2),
                "Strict opt-out": _YES_OR_NO[entry.get("strict_opt_out")],
                "Paper": format_number(paper, 1),
            }
        )

    def height(method: str) -> float:
        return fmean(mean_of(t, method) for t in (held, mixed) if method in t)

    for m in sorted((m for m in held if m != "own_pair"), key=lambda m: -height(m)):
        what = f": {_WHAT[m]}" if m in _WHAT else ""
        said = Cell(what, term=word(m)) if m in OURS else Cell(word(m) + what)
        add(said, m, held[m], mixed.get(m))
    if ANCHOR in bits:
        add(Cell("For reference: the anchor", italic=True), ANCHOR, {"mean": 0.0}, {"mean": 0.0})
    if single := _best_single_expert(results):
        said = Cell(f"For reference: the best single dense expert ({single[0]})", italic=True)
        add(said, f"dense {single[0]}", single[1], None)
    if owners and all(f"dense {n}" in bits for n in owners):
        bits["its own"] = {n: bits[f"dense {n}"][n] for n in owners}
        said = Cell("Told whose text it is: that set's dense expert", italic=True)
        add(said, "its own", {"mean": 1.0}, {"mean": 1.0})
    if "own_pair" in held:
        said = Cell(
            "Told whose text it is: own pair, the anchor with that owner's expert", italic=True
        )
        add(said, "own_pair", held["own_pair"] | {"strict_opt_out": None}, mixed.get("own_pair"))
    yield Text("Table 1. All methods", "h2")
    yield Table.of(
        "The paper's tables 1 and 2 with our numbers. Rows by the mean of the two gaps closed; "
        "ours in bold. Bits per byte, and the relative gain (by how much fewer they are "
        "than the anchor's), are means over the owners' sets. The last column is the average "
        "over 24 tasks in the paper's table 1 where it has the method: another scale, from "
        "far larger models, of which only the order can be compared.",
        rows,
        "lr",
    )


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


def table_of_bits(results: Results) -> Iterator[Block]:
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
        **{f"dense {n}": f"{n}'s dense expert" for n in owners},
        **{m: word(m) for m in models},
    }
    rows = {m: said for m, said in rows.items() if m in bits}
    if not rows:
        return
    sets = [s for s in [PUBLIC, *owners, MIXED] if any(s in bits[m] for m in rows)]
    least = {s: format_number(min(bits[m][s] for m in rows if s in bits[m]), 3) for s in sets}

    def cell(m: str, s: str) -> Cell:
        shown = format_number(bits[m].get(s), 3)
        return Cell(shown, bold=shown == least[s])

    yield Text("Table 2. Bits per byte by set", "h2")
    yield Table(
        "Held-out text, lower is better; means over seeds. Bold: the least of a column. "
        "The own pair is read on each owner's own set, with that owner's expert.",
        ["Model", *sets],
        [[Cell(said, bold=m in OURS), *(cell(m, s) for s in sets)] for m, said in rows.items()],
        "lr",
    )


def table_of_ablations(results: Results) -> Iterator[Block]:
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

    def row(name: str) -> Iterator[tuple[str, str]]:
        base = found.get(name.partition(",")[0], {})
        yield "What", groups[name]
        yield "Variant", name
        for kind, text in TABLES.items():
            mean, before = (mean_of(entry, kind) for entry in (found[name], base))
            difference = math.nan if base is found[name] else mean - before
            yield f"Gap closed, {text.split()[0]}", format_number(mean, 3)
            yield f"difference, {text.split()[0]}", format_signed(difference, 3)
        public = (found[name].get("bits_per_byte") or {}).get(PUBLIC, math.nan)
        yield "Bits, public text v anchor", format_change(public / (anchor or math.nan) - 1)
        yield "Paper's average", _PAPERS_ABLATIONS.get(name, "–")

    yield Text("Table 3. One change at a time", "h2")
    yield Table.of(
        f"Seed {first} alone. A difference is from the variant before the comma. The "
        "rows of the paper's router start here with the anchor's mean hidden state, as in "
        "its table 3; its own ablations in table 1 take away one thing after the other.",
        [dict(row(name)) for name in groups],
        "llr",
    )


def table_of_strongest(results: Results) -> Iterator[Block]:
    """Each training of the paper's method, read in the way that is best on validation text."""
    found: Mapping[str, Any] = results.get("strongest_paper") or {}
    if not found:
        return
    tried = found["tried"]
    rows: list[dict[str, Cell | str]] = []
    for training in dict.fromkeys(n.partition("; ")[0] for n in tried["heldout"]):
        row: dict[str, Cell | str] = {"Training": training}
        for kind in found["best"]:
            means = {
                name: mean_of(entry, kind)
                for name, entry in tried["validation"].items()
                if name.partition("; ")[0] == training
            }
            best = max(means, key=means.__getitem__)
            is_best = best == found["best"][kind]
            said = TABLES[kind].split()[0]
            row[f"Read, {said}"] = best.partition("; ")[2]
            for split, name in (("validation", "validation"), ("heldout", "held out")):
                shown = format_number(mean_of(tried[split][best], kind), 3)
                row[f"Gap closed, {said}, {name}"] = Cell(shown, bold=is_best)
        rows.append(row)
    first = (results.get("seeds_done") or ["?"])[0]
    yield Text("Table 4. The paper's method at its best", "h2")
    yield Table.of(
        f"Seed {first} alone. Every training was read in {len(tried['heldout']) // len(rows)} "
        "ways; shown is the way that is best on validation text, for each kind of text by itself. "
        "Bold: the training that is best there.",
        rows,
        "lr",
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts top-2 before top-10."""
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in re.split(r"(\d+)", name)]


# --- by owner, and cost ---------------------------------------------------------------------------


def table_by_owner(results: Results) -> Iterator[Block]:
    """Table of the share of each owner's gain that merging keeps, and of small experts' cost."""
    families = ("default", "low", "paper")
    kept = {f: average(over_seeds(results, "kept", f, "sets")) for f in families}
    low_rank = average(over_seeds(results, "low_rank_share_of_gain"))
    sizes = average(over_seeds(results, "bytes"))
    if not any(isinstance(c, dict) for c in (*kept.values(), low_rank)):
        return

    def shown(column: Any, name: str) -> str:
        return format_percent(column.get(name) if isinstance(column, dict) else None)

    def megabytes(family: str, i: int) -> str:
        listed = (sizes.get(family) if isinstance(sizes, dict) else None) or []
        return format_number(listed[i] / 1e6, 2) if i < len(listed) else "–"

    yield Table.of(
        "By owner: share of the own pair's gain that is kept after merging; gain of the "
        "low-rank pair relative to the full one's; size of an expert.",
        [
            {
                "Owner": n,
                "Kept, our default": shown(kept["default"], n),
                "Kept, low rank": shown(kept["low"], n),
                "Kept, the paper's": shown(kept["paper"], n),
                "Low-rank gain v full": shown(low_rank, n),
                "Full, MB": megabytes("default", i),
                "Low rank, MB": megabytes("low", i),
            }
            for i, n in enumerate(owners_of(results))
        ],
        "lr",
    )


def table_of_cost(results: Results) -> Iterator[Block]:
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
        sign = "≤ " if any(kind in at_most for kind in tokens) else ""
        return sign + format_number(flops / 1e12, 1) if flops > 0 else "–"

    total = {k: sum(c[k] for c in cost.values()) for k in ("steps", "seconds", "tokens")}
    rows: list[dict[str, Cell | str]] = [
        {
            "Work": Cell(_WORK.get(kind, kind), bold=c is total),
            "Steps": format_number(c["steps"], 0),
            "Seconds": format_number(c["seconds"], 0),
            "Tokens trained on": format_number(c["tokens"] or math.nan, 0),
            "Training FLOPs, 10¹²": spent({kind: c["tokens"]}),
        }
        for kind, c in [*sorted(cost.items(), key=lambda x: -x[1]["seconds"]), ("all", total)]
    ]
    training = (
        f" One forward pass of the anchor is {one / 1e6:.2f} million FLOPs a token. "
        "Training FLOPs are three forward passes for every token trained on; ≤: at most, "
        "for frozen weights need no gradients of their own."
    )
    yield Text("Cost", "h2")
    yield Table.of(
        f"All steps that are done, of all seeds, each on one thread: "
        f"{total['seconds'] / 3600:.1f} hours." + ("" if math.isnan(one) else training),
        rows,
        "lr",
    )
    if methods := results.get("cost_by_method"):
        yield Table.of(
            "By method, of one seed: all that it needs beyond the anchor and the text, its "
            "search for settings on validation text included. What several methods share (dense "
            "models, experts) counts in each.",
            [
                {
                    "Method": Cell(word(m), bold=m in OURS),
                    "Tokens trained on": format_number(sum(c["tokens"].values()), 0),
                    "Training FLOPs, 10¹²": spent(c["tokens"]),
                    "Seconds of training": format_number(c["training_seconds"], 0),
                    "Seconds of reading": format_number(c["reading_seconds"], 0),
                    "FLOPs per token read": format_number(forward(m) / one, 2),
                }
                for m, c in sorted(methods.items(), key=lambda x: -x[1]["training_seconds"])
            ],
            "lr",
        )
