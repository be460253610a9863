"""Page.md and figures/*.png from a study's results.json, to be read on a code host.

Says what the page contains and in which order. Its numbers are in `findings`, its tables in
`tables`, its figures in `figures`; a missing method, table or seed leaves its part out. What only a
person can say, why an order differs, is taken from notes.md beside the page.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from flexolmo.files import write_bytes
from flexolmo.numbers import format_change, format_number, format_percent
from flexolmo.report.drawing import save_figure
from flexolmo.report.markdown import escape, write_table
from flexolmo.research.study import figures
from flexolmo.research.study.findings import (
    DEFAULT,
    PAPER_AVERAGES,
    TABLES,
    Bar,
    Results,
    compare_orders,
    find_bars,
    over_seeds,
    owners_of,
    word,
)
from flexolmo.research.study.tables import (
    table_by_owner,
    table_of_ablations,
    table_of_bits,
    table_of_cost,
    table_of_methods,
)

_HOW_TO_READ = (
    "**Gap closed**, of a set: (public − method) / (public − that set's dense expert), in bits "
    "on that set's text. 0 is the anchor, the public model alone; 1 is as good as the dense "
    "expert (the whole anchor trained further on that set alone) on its own set. A method's "
    "number is the mean over the owners' sets.",
    "**Held-out documents** are of one set each. **Mixed documents** are spliced from held-out "
    "paragraphs of several sets, so that no single choice is right for a whole one; there the "
    "mark of 1 is what a set's dense expert makes of its own pieces, reading the whole document.",
    "**No method sees the text it predicts.** What weight an expert or a model gets for a token "
    "depends on the tokens before it and on training text, never on the token itself or what "
    "follows. BTM goes by the posterior so far; the weighted soup and prompt routing read the "
    "start of a text, which the mean soup and the anchor predict, and then stay with their "
    "choice. In the paper, BTM and the weighted soup take their weights from the whole test "
    "input at once.",
    "**FLOPs** are of one forward pass per token, matrices only, relative to the anchor's; ours "
    "from how often each expert was really active. **Strict opt-out**: taking an owner out "
    "removes all of that owner's influence, with no training.",
)
_FIGURES = (
    (
        "figure_2_routing",
        figures.plot_routing,
        "Heat maps of routing weights by set and expert",
        "**Figure 2** (numbers as in the paper). Routing weights. The paper's router decides in "
        "every layer, and its weights need not add up to 1, for what the experts that were not "
        "chosen had is dropped.",
    ),
    (
        "figure_3_active_experts",
        figures.plot_active_experts,
        "Lines of gap closed by number of active experts",
        "**Figure 3.** Gap closed by the number of active experts, first seed. The paper's MMLU "
        "with 1, 2, 4 and 8 of 8 active: 50.9, 54.5, 60.4, 60.4.",
    ),
    (
        "figure_4_optout",
        figures.plot_optout,
        "Matrices of the change of bits per byte by owner switched off and by set",
        "**Figure 4.** Every owner opted out in turn. Read down a column: only the outlined cell, "
        "the owner's own set, should get worse, and the number in brackets there, against the "
        "anchor, should not be above 0. In the paper, opting news out left news below the public "
        "model.",
    ),
    (
        "methods",
        figures.plot_methods,
        "Scatter of gap closed against FLOPs per token, by method",
        "**All methods**: gap closed against forward FLOPs per token. Bars: standard deviation "
        "over seeds, where there are several.",
    ),
    (
        "kept_gain",
        figures.plot_kept_gain,
        "Dots of the share of gain that is kept, by owner",
        "**What merging keeps**: the share of the own pair's gain that the mixture has on the "
        "owner's set, each family against its own pair; where a pair gains next to nothing, the "
        "share says little. Lines: from the lowest seed to the highest. Beyond the frame, the "
        "number tells.",
    ),
)


def write_page(results: Results, out: Path) -> Path:
    """Write page.md and figures/*.png into `out`, from what results.json holds; path of the page.

    A file notes.md in `out` becomes part of the page, as it is.
    """
    out = Path(out)
    notes = out / "notes.md"
    blocks = [*_opening(results)]
    if results.get("seeds_done"):
        blocks += [
            *_how_to_read(results),
            *table_of_methods(results),
            *_bars(results),
            *table_of_bits(results),
            *table_of_ablations(results),
            *_pictures(results, out),
            *table_by_owner(results),
            *_orders(results),
        ]
        if notes.is_file():
            blocks.append(notes.read_text(encoding="utf-8").strip())
    blocks += table_of_cost(results)
    write_bytes(out / "page.md", ("\n\n".join(blocks) + "\n").encode())
    return out / "page.md"


# --- what was run ---------------------------------------------------------------------------------


def _opening(results: Results) -> Iterator[str]:
    recipe: Mapping[str, Any] = results.get("recipe") or {}
    owners, done = owners_of(results), results.get("seeds_done") or []
    yield f"# Every method of the paper against ours, on {len(owners)} owners"
    said = [
        f"{len(owners)} owners ({', '.join(map(escape, owners))}) each hold a set of text "
        "that they do not share."
    ]
    size = _parameters(recipe)
    if size and (recipe["anchor"]).get("train"):
        said.append(
            f"The anchor is a public model of {size / 1e6:.1f} million parameters, "
            f"trained on {_tokens(recipe['anchor']['train'])} tokens of public text."
        )
    if train := recipe.get("train"):
        said.append(
            f"Every expert, ours or a rival's, is trained on {_tokens(train)} tokens of "
            "its owner's text, in the same number of steps; unrestricted training has as "
            "many tokens as all owners together (2x), or half of them (1x)."
        )
        if healing := (recipe.get("low_rank") or {}).get("train"):
            said.append(
                "Our small experts are the full ones cut to low rank and then trained for "
                f"{healing['steps']} steps on the first {_tokens(healing)} of these tokens "
                "again."
            )
    if recipe.get("heldout_bytes"):
        said.append(
            f"All read the same text: {recipe['heldout_bytes']:,} bytes held out of "
            f"every set, and {recipe['heldout_mixed']:,} mixed documents of "
            f"{recipe['seq_len']:,} tokens."
        )
    yield " ".join(said)
    listed = ", ".join(map(str, done))
    seeds = ": no numbers yet."
    if done:
        spread = "With one seed there is no spread to show."
        if len(done) > 1:
            spread = "Numbers are means over seeds, ± one standard deviation."
        seeds = f" ({listed}); each trains anchor, experts and rivals anew. {spread}"
    yield f"{len(done)} of {len(recipe.get('seeds') or done)} seeds done{seeds}"
    commits = [str(c) for c in results.get("commits") or []]
    machine, software = results.get("machine") or {}, results.get("software") or {}
    parts = (
        [
            f"{machine['cpu_count']} cores, {machine['torch_threads']} thread a step, "
            f"{escape(machine['platform'])}"
        ]
        if machine
        else []
    )
    parts += [", ".join(f"{escape(k)} {escape(v)}" for k, v in software.items())] * bool(software)
    parts += [f"commit {', '.join(map(_short, commits))}"] * bool(commits)
    if parts:
        yield f"Run on {'; '.join(parts)}." + (
            " (+changes: the code had changes that are not in that commit.)"
            if any("+changes" in c for c in commits)
            else ""
        )


def _parameters(recipe: Mapping[str, Any]) -> int:
    """Parameters of the anchor, as model/transformer.py lays them out; 0 if not in the recipe."""
    shape = (recipe.get("anchor") or {}).get("model") or {}
    try:
        D, L, F = shape["d_model"], shape["num_layers"], shape["d_ff"]
        V, heads = recipe["vocab_size"], shape["num_heads"]
    except KeyError:
        return 0
    kv = D // heads * (shape.get("num_kv_heads") or heads)
    return 2 * V * D + D + L * (2 * D * D + 2 * D * kv + D + kv + 3 * D * F + 2 * D)


def _tokens(train: Mapping[str, Any]) -> str:
    count = train["steps"] * train["batch_size"] * train["seq_len"]
    return f"{count / 1e6:.2f} million" if count >= 1e6 else f"{count:,}"


def _short(commit: str) -> str:
    digits, plus, rest = commit.partition("+")
    return escape(digits[:10] + plus + rest)


def _how_to_read(results: Results) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    for chosen in over_seeds(results, "chosen_on_validation"):
        for method, values in chosen.items():
            found.setdefault(method, []).append(
                ", ".join(f"{escape(k)} {v:g}" for k, v in values.items())
            )
    texts = list(_HOW_TO_READ)
    if found:
        listed = [
            f"{escape(word(m))}: {v[0] if len(set(v)) == 1 else ' / '.join(v)}"
            for m, v in found.items()
        ]
        texts.append(
            "**Chosen on validation text**, in every seed anew and for each kind of "
            f"text by itself: {'; '.join(listed)}. For our methods and the others the "
            "study chooses nothing; their settings are in the recipe, in results.json."
        )
    yield "## How to read the numbers"
    yield "\n".join(f"- {text}" for text in texts)


# --- what was reached -----------------------------------------------------------------------------


def _bars(results: Results) -> Iterator[str]:
    bars, several = find_bars(results), len(results["seeds_done"]) > 1
    asked = [b for b in bars if b.met is not None]
    yield "## What was asked, and what was reached"
    yield (
        f'{sum(b.met is True for b in asked)} of {len(asked)} bars met. "Times" are ratios '
        "of gaps closed, our default's over the rival's. A bar is judged by the mean over "
        'seeds, or by the worst seed where it says "every".'
    )
    yield write_table(
        ["", "Verdict", "Asked", "Reached", *(["By seed"] * several)],
        [_bar_row(b, several) for b in bars],
        "lllr" + "r" * several,
    )


def _bar_row(bar: Bar, several: bool) -> list[str]:
    said = {True: "✓ met", False: "✗ **missed**", None: "not measured"}[bar.met]
    if bar.is_information:
        said = "(for information)"
    reached = _in_unit(bar.value, bar.unit) + (f" ({escape(bar.detail)})" if bar.detail else "")
    by_seed = [_in_unit(x, bar.unit) for x in bar.by_seed]
    return [bar.part, said, bar.asked, reached, *([" / ".join(by_seed) or "–"] * several)]


def _in_unit(x: float, unit: str) -> str:
    if math.isnan(x):
        return "–"
    if unit == "times":
        return "rival not above the anchor" if math.isinf(x) else format_number(x, 2)
    return format_change(x, 2) if unit == "change" else format_percent(x)


def _pictures(results: Results, out: Path) -> Iterator[str]:
    yield "## Figures"
    for name, plot, alt, caption in _FIGURES:
        figure: Figure | None = plot(results)
        if figure is not None:
            save_figure(figure, out / "figures" / f"{name}.png")
            yield f"![{alt}](figures/{name}.png)"
            yield caption


def _orders(results: Results) -> Iterator[str]:
    found = {kind: compare_orders(results, kind) for kind in TABLES}
    known = {kind: a for kind, a in found.items() if a is not None}
    if not known:
        return
    yield "## Where ours and the paper's ordering agree and differ"
    yield (
        "Only the order can be compared: the paper's averages are accuracies of large models, "
        "ours are bits. Kendall's tau is 1 if all pairs stand as in the paper, −1 if none "
        "does."
    )
    lines, swaps = [], []
    for kind, agreement in known.items():
        line = (
            f"- {TABLES[kind].capitalize()}: tau {format_number(agreement.tau, 2)} over "
            f"{len(agreement.methods)} methods; {len(agreement.swaps)} of "
            f"{agreement.num_pairs} pairs swap."
        )
        ours = compare_orders(results, kind, {"flexolmo_paper": DEFAULT})
        if ours is not None and "flexolmo_paper" in ours.methods:
            tau = format_number(ours.tau, 2)
            line += f" With our default in the place of the paper's FlexOlmo: {tau}."
        lines.append(line)
        swaps += [
            [
                TABLES[kind].split()[0],
                word(s.better),
                word(s.worse),
                f"{_paper(s.better)} v {_paper(s.worse)}",
                " v ".join(format_number(x, 3) for x in s.ours),
                f"{s.seeds} of {len(results['seeds_done'])}",
            ]
            for s in agreement.swaps
        ]
    yield "\n".join(lines)
    order = list(dict.fromkeys(m for a in known.values() for m in a.methods))
    ranks = [sorted(a.ours, key=a.ours.__getitem__, reverse=True) for a in known.values()]
    yield write_table(
        [
            "In the paper's order",
            "The paper's average",
            *(f"Our place, {TABLES[kind]}" for kind in known),
        ],
        [
            [f"{i}. {word(m)}", _paper(m), *(str(r.index(m) + 1) if m in r else "–" for r in ranks)]
            for i, m in enumerate(order, 1)
        ],
        "lr" + "r" * len(ranks),
    )
    if swaps:
        yield f"<details><summary>All {len(swaps)} pairs that swap</summary>"
        yield write_table(
            [
                "Text",
                "Ahead in the paper",
                "but behind",
                "The paper's averages",
                "Gap closed here",
                "Seeds",
            ],
            swaps,
            "lllrrr",
        )
        yield "</details>"


def _paper(method: str) -> str:
    return f"{PAPER_AVERAGES[method]:.1f}"
