"""Page of a scaling study's results.json: page.md, page.html, figures.

Its numbers are all in the results; a cell that is not done leaves its rows out. What only a person
can say is taken from notes.md beside the page.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from flexolmo.numbers import (
    format_count,
    format_megabytes,
    format_number,
    format_percent,
    format_signed,
)
from flexolmo.report.drawing import INK, MAX_WIDTH_INCHES, draw_legend, styled
from flexolmo.report.page import Block, Cell, Items, Picture, Table, Text, save_page
from flexolmo.research.study.findings import TABLES, Results

# A second of one H100 in bfloat16, at 40 % of its peak: 43 to 46 % were measured of a 1B expert
# that learns whole, with compiled blocks, and 30 % without (docs/speed.md).
GPU_FLOPS = 0.4 * 989e12
_WORDS = {
    "own_pair": "own pair",
    "default": "our default",
    "probabilities": "our default, probabilities mixed",
    "ffn": "FFN alone",
    "paper": "the paper's FlexOlmo",
    "btm": "BTM, all models",
    "unrestricted_2x": "all data together",
    "whole": "whole matrices (our default)",
}
_COLOURS = {
    "default": "#0072B2",
    "probabilities": "#332288",
    "ffn": "#56B4E9",
    "paper": "#D55E00",
    "btm": "#009E73",
    "unrestricted_2x": "#767676",
}
_RANK_COLOURS = ("#CC79A7", "#E69F00")


def write_scaling_page(results: Results, out: Path) -> Path:
    """Write the page and its figures into `out`; path of page.md. A file notes.md there becomes
    part of it."""
    out = Path(out)
    return save_page(_blocks(results, out / "notes.md"), out / "page.md", out / "page.html")


def _blocks(results: Results, notes: Path) -> Iterator[Block]:
    yield from _opening(results)
    if results["cells"]:
        for kind, said in TABLES.items():
            yield _table(results, kind, said)
            yield Picture(
                f"figures/{kind}",
                _draw(results["cells"], kind),
                f"Lines of gap closed on {said} by training tokens, a panel for each anchor",
                f": gap closed on {said} against an expert's training tokens.",
                term=said.capitalize(),
            )
        yield from _ranks(results)
        yield from _lines(results)
        yield _measured_costs(results)
    yield _planned_costs(results)
    if notes.is_file():
        yield Text(notes.read_text(encoding="utf-8").strip(), "md")


def _opening(results: Results) -> Iterator[Block]:
    recipe, cells = results["recipe"], results["cells"]
    study = recipe["study"]
    yield Text("How it grows", "h1")
    yield Text(
        f"Anchors of {', '.join(recipe['sizes'])} parameters, each trained on "
        f"{_tokens(study['anchor']['train'])} tokens of public text; {len(study['owners'])} owners "
        f"({', '.join(study['owners'])}), whose experts read "
        f"{', '.join(_tokens(study['train'] | {'steps': s}) for s in recipe['expert_steps'])} "
        f"tokens. {len(cells)} of {results['cells_asked']} cells are done."
    )
    yield Items(
        (
            Text(
                " is 0 for the anchor and 1 for a dense model of the same size, trained on that "
                "set alone for as long; mean over owners' sets.",
                term="Gap closed",
            ),
            Text(
                " is an expert beside its anchor, on its owner's text, with nobody else.",
                term="Own pair",
            ),
            Text(
                " is our default cut to that rank in all its matrices, and trained on for a "
                "quarter of its steps; trained at a rank: low from the start.",
                term="Rank",
            ),
            Text(
                " has the tokens of all owners, and no owner can be taken out.",
                term="All data together",
            ),
        )
    )
    if machine := results.get("machine"):
        parts = [f"{machine['cpu_count']} cores, one thread a step"]
        parts += [f"{k} {v}" for k, v in (results.get("software") or {}).items()]
        parts += [f"commit {str(c)[:10]}" for c in results.get("commits") or []]
        yield Text(f"Run on {', '.join(parts)}.")


def _tokens(train: Mapping[str, Any]) -> str:
    return format_count(train["steps"] * train["batch_size"] * train["seq_len"])


def word(row: str) -> str:
    """Name of a row on the page."""
    return _WORDS.get(row, row)


def _name(cell: Mapping[str, Any]) -> dict[str, Cell | str]:
    return {
        "anchor": Cell(cell["size"], bold=True),
        "expert's tokens": format_count(cell["tokens"]),
    }


def _rows(cells: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    return list(dict.fromkeys(r for c in cells for r in c[kind]))


def _table(results: Results, kind: str, said: str) -> Table:
    cells = results["cells"]
    rows: list[dict[str, Cell | str]] = []
    for cell in cells:
        bits = cell["bits_per_byte"]
        dense = fmean(bits["anchor"][n] - x for n, x in bits["dense"].items())
        row = _name(cell) | {"dense gain, bits per byte": format_number(dense, 3)}
        row |= {
            word(r): format_number(cell[kind][r]["mean"], 3)
            for r in _rows(cells, kind)
            if r in cell[kind]
        }
        rows.append(row)
    return Table.of(f"Gap closed, {said}", rows, "lr")


def _colours(cells: Sequence[Mapping[str, Any]], kind: str) -> dict[str, str]:
    cuts = [r for r in _rows(cells, kind) if r.startswith("rank ")]
    return _COLOURS | {r: _RANK_COLOURS[i % len(_RANK_COLOURS)] for i, r in enumerate(cuts)}


@styled
def _draw(cells: Sequence[Mapping[str, Any]], kind: str) -> Figure:
    """Gap closed against training tokens, a panel for each anchor, a line for each row."""
    sizes = list(dict.fromkeys(c["size"] for c in cells))
    fig = Figure(figsize=(MAX_WIDTH_INCHES, 3.8))
    axes = fig.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    colours = _colours(cells, kind)
    for ax, size in zip(axes, sizes, strict=True):
        here = [c for c in cells if c["size"] == size]
        tokens = sorted({c["tokens"] for c in here})
        for row in _rows(cells, kind):
            if row not in colours:
                continue
            places = [t for t in tokens if any(c["tokens"] == t and row in c[kind] for c in here)]
            means = [
                fmean(c[kind][row]["mean"] for c in here if c["tokens"] == t and row in c[kind])
                for t in places
            ]
            ax.plot(places, means, color=colours[row], lw=2, marker="o", ms=5, label=word(row))
        ax.axhline(0, color=INK, lw=1)
        ax.set_xscale("log")
        ax.set_xticks(tokens)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_count(x)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.margins(x=0.1, y=0.1)
        ax.grid(axis="y")
        ax.set_title(f"anchor of {size}")
        ax.set_xlabel("an expert's training tokens (log scale)")
    axes[0].set_ylabel("gap closed")
    draw_legend(fig, 4, handles=axes[0].get_legend_handles_labels()[0])
    return fig


def _ranks(results: Results) -> Iterator[Block]:
    """The share of the default's gain that each small expert keeps, and of its bytes."""
    cells = results["cells"]
    small = [r for r in _rows(cells, "gap_closed") if "rank " in r or r == "ffn"]
    rows: list[dict[str, Cell | str]] = []
    for cell in cells:
        whole = cell["gap_closed"]["default"]["mean"]
        row = _name(cell)
        row |= {
            word(r): f"{format_percent(cell['gap_closed'][r]['mean'] / whole, 0)} of gain, "
            f"{format_percent(cell['bytes'][r] / cell['bytes']['default'], 0)} of bytes"
            for r in small
            if r in cell["gap_closed"]
        }
        rows.append(row)
    yield Table.of("What small experts keep of our default, held-out documents", rows, "l")


def _lines(results: Results) -> Iterator[Block]:
    predicted = results["predicted"]
    yield Text("Lines", "h2")
    yield Text(
        "Least squares through the cells: gap closed = a + b log10(parameters / 1M) + "
        "c log10(tokens / 100k). The last columns take a line to the paper's size "
        f"({format_count(predicted['parameters'])} parameters, "
        f"{format_count(predicted['tokens'])} tokens) with the 95 % interval of one more cell. "
        "That is hundreds of times the parameters and tens of thousands of times the tokens of "
        "anything here, and a line knows of no ceiling: it says in which direction a method "
        "moves, not where it ends."
    )
    for kind, said in TABLES.items():
        rows: list[dict[str, Cell | str]] = []
        for row, line in results["lines"][kind].items():
            end = predicted[kind][row]
            interval = f"{format_number(end['low'], 1)} to {format_number(end['high'], 1)}"
            rows.append(
                {
                    "": word(row),
                    "at 1M, 100k": format_number(line["at"], 3),
                    "per tenfold parameters": format_signed(line["per_tenfold_parameters"], 3),
                    "per tenfold tokens": format_signed(line["per_tenfold_tokens"], 3),
                    "residual": format_number(line["residual"], 3),
                    "the paper's size": format_number(end["mean"], 2),
                    "95 %": interval,
                }
            )
        if rows:
            yield Table.of(f"Lines, {said}", rows, "lr")


def _measured_costs(results: Results) -> Table:
    rows: list[dict[str, Cell | str]] = []
    for cell in results["cells"]:
        row = _name(cell)
        row |= {
            word(family): f"{format_megabytes(cell['bytes'][family])} MB, "
            f"{format_number(cell['seconds'][family], 0)} s, "
            f"{format_number(cell['flops'][family], 2)}x"
            for family in cell["bytes"]
        }
        rows.append(row)
    caption = (
        "An owner's cost here: a bundle's weights, seconds of training on one thread (of a cut, "
        "those after the whole), and the mixture's FLOPs a token in the anchor's"
    )
    return Table.of(caption, rows, "lr")


def _planned_costs(results: Results) -> Table:
    rows: list[dict[str, Cell | str]] = []
    for cost in results["costs"]:
        hours = 1e9 * cost["training_flops_per_token"] / GPU_FLOPS / 3600
        rows.append(
            {
                "anchor": Cell(cost["size"], bold=True),
                "expert": word(cost["kind"]),
                "bundle, MB": format_megabytes(cost["bytes"]),
                "training FLOPs a token": format_count(cost["training_flops_per_token"]),
                "of dense training": format_number(cost["of_dense_training"], 2),
                "H100 hours a billion tokens": format_number(hours, 1),
            }
        )
    caption = (
        "An owner's cost at larger sizes, from shapes alone: weights in bfloat16; an H100 at 40 % "
        "of its peak. A rank is trained so; a cut one was first trained whole. Beside FFN alone "
        "the anchor reads a quarter of tokens"
    )
    return Table.of(caption, rows, "llr")
