"""Page of a study's results.json: page.md for a code host, page.html, figures/*.png and *.svg.

Says what the page contains and in which order. Its numbers are in `findings`, its tables in
`tables`, its figures in `figures`; a missing method, table or seed leaves its part out. What only a
person can say, why an order differs, is taken from notes.md beside the page.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flexolmo.model.shape import count_anchor
from flexolmo.model.transformer import ModelConfig
from flexolmo.numbers import format_change, format_number, format_percent
from flexolmo.report.page import Block, Cell, Fold, Items, Picture, Row, Table, Text, save_page
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
    table_of_strongest,
)

_HOW_TO_READ = (
    Text(
        ", of a set: (public − method) / (public − that set's dense expert), in bits on that set's "
        "text. 0 is the anchor, the public model alone; 1 is as good as the dense expert (the "
        "whole anchor trained further on that set alone) on its own set. A method's number is the "
        "mean over the owners' sets.",
        term="Gap closed",
    ),
    Text(" are of one set each.", term="Held-out documents"),
    Text(
        " are spliced from held-out paragraphs of several sets, so that no single choice is right "
        "for a whole one; there the mark of 1 is what a set's dense expert makes of its own "
        "pieces, reading the whole document.",
        term="Mixed documents",
    ),
    Text(
        " What weight an expert or a model gets for a token depends on the tokens before it and on "
        "training text, never on the token itself or what follows. BTM goes by the posterior so "
        "far; the weighted soup and prompt routing read the start of a text, which the mean soup "
        "and the anchor predict, and then stay with their choice. In the paper, BTM and the "
        "weighted soup take their weights from the whole test input at once.",
        term="No method sees the text it predicts.",
    ),
    Text(
        " are of one forward pass per token, matrices only, relative to the anchor's; ours from "
        "how often each expert was really active.",
        term="FLOPs",
    ),
    Text(
        ": taking an owner out removes all of that owner's influence, with no training.",
        term="Strict opt-out",
    ),
)
_FIGURES = (
    (
        "figure_2_routing",
        figures.plot_routing,
        "Heat maps of routing weights by set and expert",
        "Figure 2",
        " (numbers as in the paper). Routing weights. The paper's router decides in "
        "every layer, and its weights need not add up to 1, for what the experts that were not "
        "chosen had is dropped.",
    ),
    (
        "figure_3_active_experts",
        figures.plot_active_experts,
        "Lines of gap closed by number of active experts",
        "Figure 3.",
        " Gap closed by the number of active experts, first seed. The paper's MMLU "
        "with 1, 2, 4 and 8 of 8 active: 50.9, 54.5, 60.4, 60.4.",
    ),
    (
        "figure_4_optout",
        figures.plot_optout,
        "Matrices of the change of bits per byte by owner switched off and by set",
        "Figure 4.",
        " Every owner opted out in turn. Read down a column: only the outlined cell, "
        "the owner's own set, should get worse, and the number in brackets there, against the "
        "anchor, should not be above 0. In the paper, opting news out left news below the public "
        "model.",
    ),
    (
        "methods",
        figures.plot_methods,
        "Scatter of gap closed against FLOPs per token, by method",
        "All methods",
        ": gap closed against forward FLOPs per token. Bars: standard deviation "
        "over seeds, where there are several.",
    ),
    (
        "kept_gain",
        figures.plot_kept_gain,
        "Dots of the share of gain that is kept, by owner",
        "What merging keeps",
        ": the share of the own pair's gain that the mixture has on the "
        "owner's set, each family against its own pair; where a pair gains next to nothing, the "
        "share says little. Lines: from the lowest seed to the highest. Beyond the frame, the "
        "number tells.",
    ),
)


def write_page(results: Results, out: Path) -> Path:
    """Write the page and its figures into `out`, from what results.json holds; path of page.md.

    A file notes.md in `out` becomes part of the page: as it is in page.md, as plain lines in HTML.
    """
    out = Path(out)
    return save_page(_blocks(results, out / "notes.md"), out / "page.md", out / "page.html")


def _blocks(results: Results, notes: Path) -> Iterator[Block]:
    yield from _opening(results)
    if results.get("seeds_done"):
        yield from _how_to_read(results)
        yield from table_of_methods(results)
        yield from _bars(results)
        yield from table_of_bits(results)
        yield from table_of_ablations(results)
        yield from table_of_strongest(results)
        yield from _pictures(results)
        yield from table_by_owner(results)
        yield from _orders(results)
        if notes.is_file():
            yield Text(notes.read_text(encoding="utf-8").strip(), "md")
    yield from table_of_cost(results)


# --- what was run ---------------------------------------------------------------------------------


def _opening(results: Results) -> Iterator[Block]:
    recipe: Mapping[str, Any] = results.get("recipe") or {}
    owners, done = owners_of(results), results.get("seeds_done") or []
    yield Text(f"Every method of the paper against ours, on {len(owners)} owners", "h1")
    said = [
        f"{len(owners)} owners ({_listed(owners)}) each hold a set of text that they do not share."
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
    yield Text(" ".join(said))
    seeds = ": no numbers yet."
    if done:
        spread = "With one seed there is no spread to show."
        if len(done) > 1:
            spread = "Numbers are means over seeds, ± one standard deviation."
        seeds = f" ({_listed(done)}); each trains anchor, experts and rivals anew. {spread}"
    yield Text(f"{len(done)} of {len(recipe.get('seeds') or done)} seeds done{seeds}")
    parts = []
    if machine := results.get("machine"):
        parts.append(
            "{cpu_count} cores, {torch_threads} thread a step, {platform}".format(**machine)
        )
    if software := results.get("software"):
        parts.append(_listed(f"{k} {v}" for k, v in software.items()))
    if commits := [str(c).partition("+") for c in results.get("commits") or []]:
        parts.append("commit " + _listed(c[:10] + plus + rest for c, plus, rest in commits))
    changed = ""
    if any(plus for _, plus, _ in commits):
        changed = " (+changes: the code had changes that are not in that commit.)"
    if parts:
        yield Text(f"Run on {'; '.join(parts)}.{changed}")


def _listed(words: Iterable[Any]) -> str:
    return ", ".join(map(str, words))


def _parameters(recipe: Mapping[str, Any]) -> int:
    """Numbers in the anchor; 0 if its shape is not in the recipe."""
    shape = (recipe.get("anchor") or {}).get("model") or {}
    try:
        return count_anchor(ModelConfig(vocab_size=recipe["vocab_size"], **shape))
    except (KeyError, TypeError, ValueError):
        return 0


def _tokens(train: Mapping[str, Any]) -> str:
    count = train["steps"] * train["batch_size"] * train["seq_len"]
    return f"{count / 1e6:.2f} million" if count >= 1e6 else f"{count:,}"


def _how_to_read(results: Results) -> Iterator[Block]:
    found: dict[str, list[str]] = {}
    for chosen in over_seeds(results, "chosen_on_validation"):
        for method, values in chosen.items():
            found.setdefault(method, []).append(_listed(f"{k} {v:g}" for k, v in values.items()))
    points = list(_HOW_TO_READ)
    if found:
        listed = [
            f"{word(m)}: {v[0] if len(set(v)) == 1 else ' / '.join(v)}" for m, v in found.items()
        ]
        points.append(
            Text(
                f", in every seed anew and for each kind of text by itself: {'; '.join(listed)}. "
                "For our methods and the others the study chooses nothing; their settings are in "
                "the recipe, in results.json.",
                term="Chosen on validation text",
            )
        )
    yield Text("How to read the numbers", "h2")
    yield Items(points)


# --- what was reached -----------------------------------------------------------------------------


def _bars(results: Results) -> Iterator[Block]:
    bars, several = find_bars(results), len(results["seeds_done"]) > 1
    asked = [b for b in bars if b.met is not None]
    yield Text("What was asked, and what was reached", "h2")
    yield Table(
        f'{sum(b.met is True for b in asked)} of {len(asked)} bars met. "Times" are ratios '
        "of gaps closed, our default's over the rival's. A bar is judged by the mean over "
        'seeds, or by the worst seed where it says "every".',
        ["Part", "Verdict", "Asked", "Reached", *(["By seed"] * several)],
        [_bar_row(b, several) for b in bars],
        "lllr",
    )


def _bar_row(bar: Bar, several: bool) -> Row:
    reached = _in_unit(bar.value, bar.unit) + (f" ({bar.detail})" if bar.detail else "")
    by_seed = " / ".join(_in_unit(x, bar.unit) for x in bar.by_seed) or "–"
    verdict = "(for information)" if bar.is_information else Cell.verdict(bar.met)
    return [bar.part, verdict, bar.asked, reached, *([by_seed] * several)]


def _in_unit(x: float, unit: str) -> str:
    if math.isnan(x):
        return "–"
    if unit == "times":
        return "rival not above the anchor" if math.isinf(x) else format_number(x, 2)
    return format_change(x, 2) if unit == "change" else format_percent(x)


def _pictures(results: Results) -> Iterator[Block]:
    yield Text("Figures", "h2")
    for name, plot, alt, term, caption in _FIGURES:
        figure = plot(results)
        if figure is not None:
            yield Picture(f"figures/{name}", figure, alt, caption, term)


def _orders(results: Results) -> Iterator[Block]:
    found = {kind: compare_orders(results, kind) for kind in TABLES}
    known = {kind: a for kind, a in found.items() if a is not None}
    if not known:
        return
    yield Text("Where ours and the paper's ordering agree and differ", "h2")
    yield Text(
        "Only the order can be compared: the paper's averages are accuracies of large models, "
        "ours are bits. Kendall's tau is 1 if all pairs stand as in the paper, −1 if none "
        "does."
    )
    points: list[Text] = []
    swaps: list[dict[str, str]] = []
    for kind, agreement in known.items():
        said = (
            f"{TABLES[kind].capitalize()}: tau {format_number(agreement.tau, 2)} over "
            f"{len(agreement.methods)} methods; {len(agreement.swaps)} of "
            f"{agreement.num_pairs} pairs swap."
        )
        ours = compare_orders(results, kind, {"flexolmo_paper": DEFAULT})
        if ours is not None and "flexolmo_paper" in ours.methods:
            tau = format_number(ours.tau, 2)
            said += f" With our default in the place of the paper's FlexOlmo: {tau}."
        points.append(Text(said))
        swaps += [
            {
                "Text": TABLES[kind].split()[0],
                "Ahead in the paper": word(s.better),
                "but behind": word(s.worse),
                "The paper's averages": f"{_paper(s.better)} v {_paper(s.worse)}",
                "Gap closed here": " v ".join(format_number(x, 3) for x in s.ours),
                "Seeds": f"{s.seeds} of {len(results['seeds_done'])}",
            }
            for s in agreement.swaps
        ]
    yield Items(points)
    order = list(dict.fromkeys(m for a in known.values() for m in a.methods))
    ranks = [sorted(a.ours, key=a.ours.__getitem__, reverse=True) for a in known.values()]
    yield Table(
        "In the paper's order, the best first.",
        ["Method", "The paper's average", *(f"Our place, {TABLES[kind]}" for kind in known)],
        [
            [word(m), _paper(m), *(str(r.index(m) + 1) if m in r else "–" for r in ranks)]
            for m in order
        ],
        "lr",
    )
    if swaps:
        table = Table.of("Two methods a row, in another order than the paper's.", swaps, "lllr")
        yield Fold(f"All {len(swaps)} pairs that swap", table)


def _paper(method: str) -> str:
    return f"{PAPER_AVERAGES[method]:.1f}"
