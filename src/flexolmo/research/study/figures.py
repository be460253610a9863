"""Figures of a study's results, in the look of `plots`; all numbers are means over seeds.

Draws what results.json holds; a figure for which it has nothing is None. Knows nothing of the page
around them.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.numbers import format_number, format_percent, format_signed
from flexolmo.report.drawing import (
    GREY,
    INK,
    MAX_WIDTH_INCHES,
    MUTED,
    colour_labels,
    darken_for_text,
    draw_cells,
    draw_legend,
    label_columns,
    list_rows,
    make_handle,
    note,
    note_below,
    outline,
    styled,
    wrap_name,
    write_cell,
)
from flexolmo.report.plots import owner_colours
from flexolmo.research.study.findings import (
    DEFAULT,
    MIXED,
    OURS,
    PAPERS,
    TABLES,
    UNSEPARATED,
    Results,
    anchor_flops,
    average,
    bits_of,
    over_seeds,
    owners_of,
    word,
)

_OUR_COLOUR, _PAPER_COLOUR, _RIVAL_COLOUR = "#0072B2", "#D55E00", "#009E73"
FAMILIES = {
    "default": ("our default", _OUR_COLOUR, DEFAULT),
    "paper": ("the paper's FlexOlmo", _PAPER_COLOUR, "flexolmo_paper"),
}
_MAX_LAYERS = 8  # of the paper's router that are drawn; of more, evenly chosen ones
_KEPT_RANGE = (-25.0, 125.0)  # percent; beyond it a value is written at the edge


def colours_of(results: Results) -> dict[str, str]:
    """One colour an owner in all figures; public is grey."""
    return owner_colours({"owners": [{"name": n} for n in owners_of(results)]})


# --- routing: the paper's figure 2 ----------------------------------------------------------------


def plot_routing(results: Results) -> Figure | None:
    """Mean weight of each expert (columns) by set (rows): our router, and the paper's by layer."""
    panels = []
    for family, (said, _, method) in FAMILIES.items():
        found = over_seeds(results, "routing", method)
        if not found or not found[0].get("routing"):
            continue
        weights = {
            s: np.array(w, dtype=float) for s, w in average([f["routing"] for f in found]).items()
        }  # by set [L,E]
        experts = [str(e) for e in found[0]["experts"]]
        sets = [s for s in [PUBLIC, *owners_of(results), MIXED] if s in weights]
        same = all(np.allclose(w, w[:1], atol=5e-4) for w in weights.values())
        num_layers = len(next(iter(weights.values())))
        if family == "default":
            shown = [
                (
                    f"{said}, {'every layer' if same else 'mean of layers'}",
                    np.stack([weights[s].mean(0) for s in sets]),
                )
            ]
        else:
            chosen = np.unique(
                np.linspace(0, num_layers - 1, min(num_layers, _MAX_LAYERS)).round().astype(int)
            )
            shown = [
                (f"{said}, layer {i + 1} of {num_layers}", np.stack([weights[s][i] for s in sets]))
                for i in chosen
            ]
        panels += [(title, matrix, sets, experts) for title, matrix in shown]
    return _draw_routing(panels, colours_of(results)) if panels else None


@styled
def _draw_routing(
    panels: Sequence[tuple[str, np.ndarray, list[str], list[str]]], colours: Mapping[str, str]
) -> Figure:
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    height = max(len(sets) for _, _, sets, _ in panels)
    fig = Figure(
        figsize=(max(5.5, MAX_WIDTH_INCHES * columns / 3), rows * (1.25 + 0.3 * height) + 0.4)
    )
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for i, (ax, (title, matrix, sets, experts)) in enumerate(zip(axes, panels, strict=False)):
        shown = draw_cells(ax, matrix, "Greys", 0, 1.15)
        crowded = len(experts) > 5
        for (y, x), v in np.ndenumerate(matrix):
            text = format_number(v, 2)
            text = text.removeprefix("0") if crowded else text
            write_cell(ax, x, y, text, shown[y, x], 8 if crowded else 8.5)
            if sets[y] == experts[x]:
                outline(ax, x, y, colours.get(sets[y], INK))
        label_columns(ax, experts, colours, 11, slanted=len(experts) > 3)
        _label_rows(ax, sets if i % columns == 0 else [""] * len(sets), colours)
        ax.set_title(title, fontsize=9.5, pad=6)
        if i % columns == 0:
            ax.set_ylabel("text of the set")
    note_below(
        fig,
        "Mean weight of each expert (columns) on each set's text (rows), after the "
        "choice of active experts. Outlined: the set's own expert.",
    )
    return fig


# --- active experts: the paper's figure 3 ---------------------------------------------------------


def plot_active_experts(results: Results) -> Figure | None:
    """Gap closed by the number of active experts, where the ablations have it."""
    found: dict[str, dict[int, Any]] = {}
    for name, entry in (results.get("ablations") or {}).items():
        match = re.fullmatch(r"(default|paper), top-(\d+)", name)
        if match:
            found.setdefault(match[1], {})[int(match[2])] = entry
    return _draw_active(found) if found else None


@styled
def _draw_active(found: Mapping[str, Mapping[int, Any]]) -> Figure:
    fig = Figure(figsize=(MAX_WIDTH_INCHES, 3.6))
    for ax, (kind, said) in zip(fig.subplots(1, 2, sharey=True), TABLES.items(), strict=True):
        for family, by_count in found.items():
            title, colour, _ = FAMILIES[family]
            counts = [k for k in sorted(by_count) if by_count[k].get(kind)]
            values = [by_count[k][kind]["mean"] for k in counts]
            ax.plot(
                counts,
                values,
                color=colour,
                lw=2,
                marker="os"[family == "paper"],
                ms=6,
                label=title,
            )
            for k, v in zip(counts, values, strict=True):
                others = [
                    e[k][kind]["mean"]
                    for f, e in found.items()
                    if f != family and e.get(k, {}).get(kind)
                ]
                is_below = any(v < x or (v == x and family == "paper") for x in others)
                away, va = (-8, "top") if is_below else (7, "bottom")
                ink = darken_for_text(colour)
                note(ax, f"{v:.2f}", (k, v), (0, away), ha="center", va=va, color=ink)
        ax.axhline(0, color=INK, lw=1)
        ax.grid(axis="y")
        ax.margins(x=0.06, y=0.14)
        ax.set_xticks(sorted({k for by_count in found.values() for k in by_count}))
        ax.set_xlabel("active experts per token, the public one among them")
        ax.set_title(said)
    fig.axes[0].set_ylabel("gap closed")
    draw_legend(fig, 2, handles=fig.axes[0].get_legend_handles_labels()[0])
    return fig


# --- opting out: the paper's figure 4 -------------------------------------------------------------


def plot_optout(results: Results) -> Figure | None:
    """Change of bits per byte when an owner is off (rows), by set (columns), for both routers."""
    bits, sets = bits_of(results), [PUBLIC, *owners_of(results)]
    anchor = bits.get("dense public", {})
    panels = []
    for family, (said, _, method) in FAMILIES.items():
        off = average(over_seeds(results, "optout", family))
        whole = bits.get(method, {})
        rows = [n for n in owners_of(results) if isinstance(off, dict) and n in off]
        if rows:
            panels.append(
                (
                    said,
                    rows,
                    np.array([[_change(off[n], whole, s) for s in sets] for n in rows]),
                    [_change(off[n], anchor, n) for n in rows],
                )
            )
    return _draw_optout(panels, sets, colours_of(results)) if panels else None


def _change(bits: Mapping[str, float], base: Mapping[str, float], name: str) -> float:
    return bits[name] / base[name] - 1 if name in bits and base.get(name) else math.nan


@styled
def _draw_optout(
    panels: Sequence[tuple[str, list[str], np.ndarray, list[float]]],
    sets: list[str],
    colours: Mapping[str, str],
) -> Figure:
    cell = min(0.95, (MAX_WIDTH_INCHES - 1.5) / (len(sets) * len(panels)))
    rows = max(len(names) for _, names, _, _ in panels)
    fig = Figure(
        figsize=(
            max(6.5, min(MAX_WIDTH_INCHES, 2 + cell * len(sets) * len(panels))),
            1.75 + 0.5 * rows,
        )
    )
    limit = max(
        [0.05, *(float(np.nanmax(np.abs(m))) for _, _, m, _ in panels if np.isfinite(m).any())]
    )
    for i, (ax, (title, names, matrix, to_anchor)) in enumerate(
        zip(fig.subplots(1, len(panels), squeeze=False)[0], panels, strict=True)
    ):
        shown = draw_cells(ax, matrix, "RdBu_r", -limit, limit)
        for (y, x), v in np.ndenumerate(matrix):
            own, size = names[y] == sets[x], 9 if cell > 0.65 else 8
            write_cell(ax, x, y - 0.17 * own, format_signed(100 * v, 1), shown[y, x], size)
            if own:
                text = f"({format_signed(100 * to_anchor[y], 1)})"
                write_cell(ax, x, y + 0.21, text, shown[y, x], 7.5)
                outline(ax, x, y, colours.get(sets[x], INK))
        label_columns(ax, sets, colours, max(4, int(cell * 13)), slanted=cell < 0.8)
        _label_rows(ax, names if i == 0 else [""] * len(names), colours)
        ax.set_title(title, pad=8)
    fig.axes[0].set_ylabel("owner switched off")
    note_below(
        fig,
        "% change of bits per byte v the full mixture of the same panel, by held-out "
        "set. Red: worse, blue: better.\nOutlined: the set of the owner that is off; "
        "in brackets its change v the anchor.",
    )
    return fig


# --- all methods, and what is kept ----------------------------------------------------------------


def plot_methods(results: Results) -> Figure | None:
    """Gap closed against FLOPs per token, one point a method, for both kinds of text."""
    one = anchor_flops(results)
    panels = [
        (said, _distinct(results[kind])) for kind, said in TABLES.items() if results.get(kind)
    ]
    return _draw_methods(panels, one) if panels and not math.isnan(one) else None


def _distinct(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Methods to draw: all but the own pair, and one that chose to be what another is once."""
    twin, of = "soup_weighted_equal_flops", "soup_weighted"
    hidden = {"own_pair"} | ({twin} if entries.get(twin) == entries.get(of) else set())
    return {m: e for m, e in entries.items() if m not in hidden}


@styled
def _draw_methods(panels: Sequence[tuple[str, Mapping[str, Any]]], one: float) -> Figure:
    fig = Figure(figsize=(MAX_WIDTH_INCHES, 0.6 + 4.6 * len(panels)))
    FigureCanvasAgg(fig)
    axes = fig.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for ax, (said, entries) in zip(axes, panels, strict=True):
        ax.set_xscale("log")
        for y, text in ((0, "the anchor"), (1, "that set's\ndense expert")):
            ax.axhline(y, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
            at = ("axes fraction", "data")
            note(ax, text, (1, y), (4, 0), xycoords=at, va="center", color=MUTED)
        for m, e in entries.items():
            colour = method_colour(m)
            ax.errorbar(
                e["flops_per_token"] / one,
                e["mean"],
                yerr=e.get("spread"),
                fmt="o",
                ms=8,
                mew=1.8,
                mec=colour,
                mfc=colour if e["strict_opt_out"] else "white",
                ecolor=colour,
                elinewidth=1.2,
                zorder=3,
            )
        ax.margins(x=0.1, y=0.14)
        ax.set_ylabel("gap closed")
        ax.set_title(said)
        ax.grid()
        ax.xaxis.set_minor_locator(NullLocator())
    most = max(e["flops_per_token"] / one for _, entries in panels for e in entries.values())
    ticks = [
        t for t in (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32) if t <= 1.15 * most
    ]
    axes[-1].set_xticks(ticks)
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes[-1].set_xlabel("forward FLOPs per token, in the anchor's (log scale)")
    kinds = [
        (_OUR_COLOUR, "ours", True),
        (_PAPER_COLOUR, "the paper's FlexOlmo", True),
        (_RIVAL_COLOUR, "rivals", True),
        (GREY, "trained on all data together", True),
        (INK, "hollow: no strict opt-out", False),
    ]
    handles = [
        make_handle(text, "o", colour, colour if full else "white", 8, 1.8)
        for colour, text, full in kinds
    ]
    draw_legend(fig, 5, handles=handles, handletextpad=0.2, columnspacing=1.4)
    fig.draw_without_rendering()  # labels are placed in pixels, so the axes must have theirs
    for ax, (_, entries) in zip(axes, panels, strict=True):
        _place_labels(
            ax,
            [
                (e["flops_per_token"] / one, e["mean"], word(m), method_colour(m), m == DEFAULT)
                for m, e in entries.items()
            ],
        )
    return fig


def method_colour(method: str) -> str:
    """Colour by the origin of a method: ours, the paper's, trained on all data, or a rival's."""
    for methods, colour in ((OURS, _OUR_COLOUR), (PAPERS, _PAPER_COLOUR), (UNSEPARATED, GREY)):
        if method in methods:
            return colour
    return _RIVAL_COLOUR


_ANGLES = np.radians([0, 180, 35, -35, 145, -145, 65, -65, 115, -115, 90, -90])
_OFFSETS = np.concatenate(  # [offsets,2] of a label from its point, the nearest first
    [
        far * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
        for far in (9, 14, 20, 28, 38, 50, 64, 80, 98)
    ]
)


def _place_labels(ax: Axes, points: Sequence[tuple[float, float, str, str, bool]]) -> None:
    """Write a label near every point where it covers no other; joined by a line where far."""
    renderer = ax.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    pixel = renderer.points_to_pixels(1.0)
    inside = np.array([ax.get_window_extent().extents])
    places = [ax.transData.transform((x, y)) for x, y, *_ in points]
    half = 6 * pixel  # of a point's mark
    taken = [np.array([x - half, y - half, x + half, y + half]) for x, y in places]
    for (x, y, text, colour, is_bold), place in zip(points, places, strict=True):
        label = ax.annotate(
            wrap_name(text, 40, 1),
            (x, y),
            (9, 0),
            textcoords="offset points",
            fontsize=8.5,
            color=darken_for_text(colour),
            zorder=4,
            fontweight="bold" if is_bold else "normal",
            arrowprops={"arrowstyle": "-", "lw": 0.7, "color": GREY, "shrinkA": 0, "shrinkB": 4},
        )
        label.set_in_layout(False)
        size = label.get_window_extent(renderer)
        moved = _OFFSETS * pixel
        left = place[0] + moved[:, 0] - size.width * (0.5 - 0.5 * np.sign(np.round(moved[:, 0])))
        bottom = place[1] + moved[:, 1] - size.height / 2
        boxes = np.stack([left, bottom, left + size.width, bottom + size.height], axis=1)
        covered = _shared(boxes, np.array(taken)) - _shared(boxes, inside)
        nearest = int(np.flatnonzero(covered < covered.min() + 1e-6)[0])
        taken.append(boxes[nearest])
        best = _OFFSETS[nearest].tolist()
        label.set_position(best)
        side = int(np.sign(round(best[0])))
        label.set_horizontalalignment(("center", "left", "right")[side])
        label.set_verticalalignment("center")
        if math.hypot(*best) < 13 and label.arrow_patch is not None:
            label.arrow_patch.set_visible(False)


def _shared(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Area in pixels that each of `boxes` [M,4] shares with all of `others` [N,4]; of each box x0,
    y0, x1, y1. Comes back as [M]."""
    high = np.minimum(boxes[:, None, 2:], others[:, 2:])
    sides = high - np.maximum(boxes[:, None, :2], others[:, :2])  # [M,N,2]
    return sides.clip(min=0).prod(axis=2).sum(axis=1)


def plot_kept_gain(results: Results) -> Figure | None:
    """Share of each owner's own pair's gain that the mixture keeps, by family."""
    kinds = [
        ("default", "our default", "o", 75),
        ("low", "low rank", "D", 48),
        ("paper", "the paper's FlexOlmo", "X", 60),
    ]
    found = {family: over_seeds(results, "kept", family) for family, *_ in kinds}
    kinds = [k for k in kinds if found[k[0]]]
    return _draw_kept(kinds, found, owners_of(results), colours_of(results)) if kinds else None


@styled
def _draw_kept(
    kinds: Sequence[tuple[str, str, str, int]],
    found: Mapping[str, list[Any]],
    names: list[str],
    colours: Mapping[str, str],
) -> Figure:
    rows = [*names, "mean"]
    fig = Figure(figsize=(MAX_WIDTH_INCHES, 1.6 + 0.5 * len(rows)))
    ax = fig.subplots()
    low, high = _KEPT_RANGE
    for y, name in enumerate(rows):
        for i, (family, _, marker, size) in enumerate(kinds):
            values = [
                100 * (k["mean"] if name == "mean" else k["sets"].get(name, math.nan))
                for k in found[family]
            ]
            x = float(np.mean(values))
            colour = colours.get(name, INK)
            if math.isnan(x):
                continue
            at, level = min(max(x, low), high), y + 0.24 * (i - (len(kinds) - 1) / 2)
            face = "white" if family != "default" else colour
            ax.scatter(
                [at],
                [level],
                s=size,
                marker=marker,
                lw=1.6,
                zorder=3,
                edgecolors=colour,
                facecolors=face,
                clip_on=False,
            )
            ends = np.clip([min(values), max(values)], low, high)
            ax.plot(ends, [level] * 2, color=colour, lw=1.6, zorder=2)
            note(
                ax,
                format_percent(x / 100, 0),
                (max(at, ends[1]), level),
                (8, 0),
                va="center",
                color=INK if family == "default" else MUTED,
                zorder=2.5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
            )
    list_rows(ax, rows, 1, "% of the own pair's gain on the owner's set that is left after merging")
    colour_labels(ax.get_yticklabels(), rows, colours, 10)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    drawn = [100 * v for f in found.values() for k in f for v in [*k["sets"].values(), k["mean"]]]
    ax.set_xlim(max(low, min([0.0, *drawn])) - 2, max(105.0, min(high, max(drawn))) + 8)
    for x, text in ((90, "asked: 90 % "), (100, " all")):
        ax.axvline(x, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
        side = "right" if x < 100 else "left"
        how = {"xycoords": ("data", "axes fraction"), "color": MUTED, "ha": side}
        note(ax, text, (x, 1), (0, 2), **how)
    ax.axvline(0, color=INK, lw=1, zorder=1)
    handles = [
        make_handle(said, marker, MUTED, MUTED if family == "default" else "white", 8, 1.6)
        for family, said, marker, _ in kinds
    ]
    draw_legend(fig, 3, handles=handles, handletextpad=0.2)
    return fig


def _label_rows(ax: Axes, names: Sequence[str], colours: Mapping[str, str]) -> None:
    """Row names beside the cells, each in its owner's colour."""
    ax.set_yticks(range(len(names)), [wrap_name(n, 14, 2) if n else "" for n in names])
    colour_labels(ax.get_yticklabels(), names, colours, 8.5)
