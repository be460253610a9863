"""Figures of a run's results.

Draws what results.json holds and leaves out what it lacks. Knows nothing of models, training or
the page around a figure; computes no number beyond a difference or a ratio of two that are there.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.numbers import format_change, format_number, format_percent, format_signed
from flexolmo.report.drawing import (
    GREY,
    INK,
    MAX_WIDTH_INCHES,
    MUTED,
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

Results = Mapping[str, Any]

# Okabe and Ito's colours without black and yellow, and Tol's indigo: apart for every common kind
# of colour blindness, and dark enough on white.
_OWNER_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#332288")
_MAX_NUMBERED_LAYERS = 12  # with more, cells are too low for a number


# --- reading results -------------------------------------------------------------------------


def owner_names(results: Results) -> list[str]:
    """Names of the owners' experts, in the order of `owners`, then of the bits-per-byte rows."""
    listed = [str(o["name"]) for o in results.get("owners") or [] if o.get("name")]
    rows = [
        key.removeprefix("expert ")
        for key in results.get("bits_per_byte") or {}
        if key.startswith("expert ")
    ]
    return [n for n in dict.fromkeys(listed + rows) if n != PUBLIC]


def set_names(results: Results) -> list[str]:
    """Names of the sets that were measured: public first, then the owners', then any other."""
    found = [s for row in (results.get("bits_per_byte") or {}).values() for s in row or {}]
    order = [PUBLIC, *owner_names(results), *found]
    return [s for s in dict.fromkeys(order) if s in found]


def owner_colours(results: Results) -> dict[str, str]:
    """One colour a name, the same in every figure and table; public is grey."""
    names = owner_names(results)
    return {PUBLIC: GREY} | {
        n: _OWNER_COLOURS[i % len(_OWNER_COLOURS)] for i, n in enumerate(names)
    }


def bits_table(results: Results, paper: bool = False) -> dict[str, dict[str, float]]:
    """Bits per byte by row and set; with `paper`, of the paper's router. Unmeasured: no entry.

    The anchor's row is in both, for it has no router. Empty if there is no such measurement.
    """
    found = ((results.get("paper_router") or {}) if paper else results).get("bits_per_byte") or {}
    if not found:
        return {}
    anchor = (results.get("bits_per_byte") or {}).get("anchor") or {}
    return {
        row: {s: float(x) for s, x in (values or {}).items() if _is_number(x)}
        for row, values in {"anchor": anchor, **found}.items()
    }


def relative_change(
    bits: Mapping[str, Mapping[str, float]], row: str, of_set: str, base: str = "anchor"
) -> float:
    """Bits per byte of `row` on `of_set` relative to `base`'s, minus 1; NaN if not measured."""
    x, y = (bits.get(r, {}).get(of_set, math.nan) for r in (row, base))
    return x / y - 1 if y else math.nan


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


# --- figures ---------------------------------------------------------------------------------


@styled
def plot_bits_per_byte(results: Results) -> Figure:
    """One line per set: the anchor, that set's expert alone, all experts, all but that one."""
    bits = bits_table(results)
    sets = set_names(results)
    colours = owner_colours(results)
    fig = Figure(figsize=(MAX_WIDTH_INCHES, 1.5 + 0.55 * max(len(sets), 1)))
    ax = fig.subplots()
    kinds = [
        ("anchor", "anchor", "|", 260),
        ("that set's expert alone", "expert {}", "D", 130),
        ("mixture, all on", "mixture", "o", 40),
        ("mixture without that set's expert", "mixture without {}", "x", 60),
    ]
    for y, s in enumerate(sets):
        own = colours.get(s, GREY)
        xs = {row: bits.get(row.format(s), {}).get(s) for _, row, _, _ in kinds}
        present = [x for x in xs.values() if x is not None]
        ax.plot(
            [min(present), max(present)],
            [y, y],
            color=own,
            lw=5,
            alpha=0.22,
            zorder=1,
            solid_capstyle="round",
        )
        for _, row, marker, size in kinds:
            x = xs[row]
            if x is not None:
                colour = MUTED if row == "anchor" else own
                fill = own if marker == "o" else "white"
                face: dict[str, Any] = {"edgecolors": colour, "facecolors": fill}
                if marker in "|x":
                    face = {"color": colour}
                ax.scatter([x], [y], s=size, marker=marker, lw=2, zorder=3, **face)
        change = relative_change(bits, "mixture", s)
        at: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "ha": "right"}
        note(
            ax,
            format_change(change),
            (1, y),
            (58, 0),
            fontsize=10,
            fontweight="bold",
            va="center",
            **at,
        )
    at = {"xycoords": "axes fraction", "ha": "right", "va": "bottom"}
    note(ax, "mixture\nv anchor", (1, 1), (58, 2), color=MUTED, **at)
    list_rows(ax, sets, 1, "bits per byte on held-out text of the set (further left is better)")
    ax.set_ylim(len(sets) - 0.4, -0.6)
    ax.margins(x=0.04)
    handles = [
        make_handle(text, m, MUTED, "white" if m == "D" else MUTED, 12 if m == "|" else 7.5, 2)
        for text, _, m, _ in kinds
    ]
    draw_legend(fig, 4, handles=handles, handletextpad=0.3, columnspacing=1.6)
    return fig


@styled
def plot_optout_matrix(results: Results) -> Figure:
    """Owner that is off (rows) against sets: change of bits per byte v the anchor, in percent.

    Blue is better than the anchor, red worse. The outlined cell is the set of the owner that is
    off. A second panel has the paper's router, if it was measured.
    """
    sets = set_names(results)
    names = owner_names(results)
    colours = owner_colours(results)
    panels = [
        ("our router", bits_table(results)),
        ("the paper's router", bits_table(results, paper=True)),
    ]
    panels = [(title, bits) for title, bits in panels if bits]
    rows = ["mixture", *(f"mixture without {n}" for n in names)]
    rows = [r for r in rows if any(bits.get(r) for _, bits in panels)]
    values = [
        np.array([[100 * relative_change(bits, r, s) for s in sets] for r in rows]).reshape(
            len(rows), len(sets)
        )
        for _, bits in panels
    ]
    limit = max([5.0, *(float(np.nanmax(np.abs(v))) for v in values if np.isfinite(v).any())])
    cell = min(0.95, (MAX_WIDTH_INCHES - 2.2) / max(1, len(sets) * len(panels)))
    fig = Figure(
        figsize=(
            min(MAX_WIDTH_INCHES, 2.3 + cell * max(3, len(sets) * len(panels))),
            1.75 + 0.46 * len(rows),
        )
    )
    axes = fig.subplots(1, len(panels), squeeze=False)[0] if panels and rows and sets else []
    narrow = max(4, int(cell * 13))
    for i, (ax, (title, _), matrix) in enumerate(zip(axes, panels, values, strict=False)):
        shown = draw_cells(ax, matrix, "RdBu_r", -limit, limit)
        for (y, x), v in np.ndenumerate(matrix):
            write_cell(ax, x, y, format_signed(v, 1), shown[y, x], 9.5 if cell > 0.6 else 8.5)
            if rows[y] == f"mixture without {sets[x]}":
                outline(ax, x, y, colours.get(sets[x], INK))
        label_columns(ax, sets, colours, narrow, slanted=cell < 0.7)
        off = [
            "none" if r == "mixture" else wrap_name(r.removeprefix("mixture without "), 18)
            for r in rows
        ]
        ax.set_yticks(range(len(rows)), off if i == 0 else [""] * len(rows))
        ax.set_title(title, pad=8)
    for ax in axes[:1]:
        ax.set_ylabel("owner switched off")
    note_below(
        fig,
        "% change of bits per byte v the anchor, by held-out set. Blue: better, red: "
        "worse.\nOutlined: the set of the owner that is off; 0 is the anchor.",
    )
    return fig


@styled
def plot_routing(results: Results, paper: bool = False) -> Figure:
    """One panel a set: mean weight of each expert (columns) in each layer (rows).

    With `paper`, of the paper's router. The outlined column is the set's own expert.
    """
    part = ((results.get("paper_router") or {}) if paper else results).get("routing") or {}
    weights = {
        s: np.array(w, dtype=float, ndmin=2) for s, w in (part.get("weights") or {}).items() if w
    }
    order = [*(part.get("sets") or []), *weights]
    sets = [s for s in dict.fromkeys(order) if s in weights]
    experts = [str(e) for e in part.get("experts") or []]
    colours = owner_colours(results)
    columns = min(4, max(1, len(sets)))
    rows = max(1, math.ceil(len(sets) / columns))
    layers = max([len(w) for w in weights.values()], default=1)
    low = 0.36 if layers <= _MAX_NUMBERED_LAYERS else 0.13
    wide = min(MAX_WIDTH_INCHES / columns, 0.6 + 0.75 * max(2, len(experts)))
    fig = Figure(figsize=(max(6.0, wide * columns), rows * (1.25 + low * layers) + 0.45))
    panels = fig.subplots(rows, columns, squeeze=False).ravel()
    for i, ax in enumerate(panels):
        if i >= len(sets):
            ax.set_axis_off()
            continue
        w = weights[sets[i]]
        shown = draw_cells(ax, w, "Greys", 0, 1.15)
        if len(w) <= _MAX_NUMBERED_LAYERS:
            for (y, x), v in np.ndenumerate(w):
                text = format_number(v, 2)
                text = text.removeprefix("0") if len(experts) > 5 else text
                write_cell(ax, x, y, text, shown[y, x], 8.5)
        if sets[i] in experts:
            outline(ax, experts.index(sets[i]), 0, colours.get(sets[i], INK), height=len(w))
        label_columns(ax, experts, colours, 11, slanted=len(experts) > 3)
        step = 1 if len(w) <= _MAX_NUMBERED_LAYERS else 8
        ax.set_yticks(range(0, len(w), step))
        if i % columns == 0:
            ax.set_ylabel("layer")
        ax.set_title(
            "text: " + wrap_name(sets[i], 20, max_lines=1),
            fontsize=9.5,
            color=darken_for_text(colours.get(sets[i], INK)),
            pad=6,
        )
    same = weights and all(np.allclose(w, w[:1], atol=5e-4) for w in weights.values())
    said = "Mean weight per expert (columns) and layer (rows). Outlined: the set's own expert."
    if same:
        said += "\nThis router decides once per token, so all layers have the same weights."
    note_below(fig, said)
    return fig


@styled
def plot_kept_gain(results: Results) -> Figure:
    """Gain of each owner's expert alone, and how much of it is left after merging.

    Pale: gain of the anchor with that expert alone; solid: gain of the mixture on the same set.
    One bar for our router, one for the paper's if measured, each against its own pair.
    """
    names = owner_names(results)
    colours = owner_colours(results)
    routers = [("ours", bits_table(results)), ("paper's", bits_table(results, paper=True))]
    routers = [(r, bits) for r, bits in routers if bits]
    pitch = 1.0 if len(routers) > 1 else 0.6
    fig = Figure(figsize=(MAX_WIDTH_INCHES, 1.35 + 0.62 * pitch * max(1, len(names))))
    ax = fig.subplots()
    for i, name in enumerate(names):
        for j, (router, bits) in enumerate(routers):
            y = i * pitch + 0.38 * (j - (len(routers) - 1) / 2)
            pair = -100 * relative_change(bits, f"expert {name}", name)
            kept = -100 * relative_change(bits, "mixture", name)
            paint = {"color": colours[name]} if router == "ours" else _hatched(colours[name])
            if math.isfinite(pair):
                ax.barh(y, pair, 0.34, color=colours[name], alpha=0.2, zorder=2)
            if math.isfinite(kept):
                ax.barh(y, kept, 0.2, zorder=3, **paint)
            if math.isfinite(pair) and math.isfinite(kept) and pair > 0:
                said = f"{format_percent(kept / pair, 0)} kept, {router}"
                ink = INK if router == "ours" else MUTED
                note(ax, said, (max(pair, kept, 0), y), (6, 0), va="center", color=ink)
    list_rows(ax, names, pitch, "% fewer bits per byte than the anchor on the owner's own set")
    ax.set_ylim(max(1, len(names)) * pitch - pitch / 2, -pitch / 2)
    ax.margins(x=0.17)
    ax.set_xlim(
        min(ax.get_xlim()[0], 0)
        if ax.get_xlim()[0] < -1
        and any(p.get_width() < 0 for p in ax.patches if isinstance(p, Rectangle))
        else 0,
        None,
    )
    ax.axvline(0, color=INK, lw=1, zorder=4)
    handles = [
        Patch(color=GREY, alpha=0.25, label="expert alone (the pair)"),
        Patch(color=GREY, label="mixture, our router"),
    ]
    if len(routers) > 1:
        handles.append(Patch(**_hatched(GREY), label="mixture, the paper's router"))
    draw_legend(fig, 3, handles=handles)
    return fig


def _hatched(colour: str) -> dict[str, Any]:
    return {"facecolor": "white", "edgecolor": colour, "hatch": "/////", "lw": 1}


@styled
def plot_compression(curve: Results) -> Figure:
    """Bits per byte against size: one line a way of making the expert smaller.

    `curve` is what `evaluation.compression.measure_curve` returns. The anchor alone and the whole
    expert are the two rules between which every point should lie.
    """
    points, bits = curve.get("points") or [], curve.get("bits_per_byte") or {}
    fig = Figure(figsize=(7.5, 4.3))
    ax = fig.subplots()
    for series, colour, marker in zip(
        dict.fromkeys(p["series"] for p in points), _OWNER_COLOURS, "osD^v", strict=False
    ):
        own = sorted((p for p in points if p["series"] == series), key=lambda p: p["bytes"])
        ax.plot(
            [p["bytes"] / 1e6 for p in own],
            [p["bits_per_byte"] for p in own],
            color=colour,
            marker=marker,
            ms=6,
            lw=1.8,
            label=series,
            zorder=3,
        )
        for p in own:
            size, at = str(p.get("rank", p.get("width"))), (p["bytes"] / 1e6, p["bits_per_byte"])
            note(ax, size, at, (6, 4), fontsize=8, color=darken_for_text(colour))
    for name, text in (("anchor", "the anchor alone"), ("whole", "the expert as it was")):
        if _is_number(bits.get(name)):
            ax.axhline(bits[name], color=MUTED, lw=1, ls="--" if name == "anchor" else "-")
            note(ax, text, (0, bits[name]), (6, 3), xycoords=("axes fraction", "data"), color=MUTED)
    if _is_number(curve.get("whole_bytes")) and _is_number(bits.get("whole")):
        ax.plot([curve["whole_bytes"] / 1e6], [bits["whole"]], "o", color=INK, ms=7, zorder=4)
    ax.set_xlim(0, None)
    ax.grid()
    ax.set_xlabel("MB of the expert (beside each point: its rank or width)")
    name = wrap_name(str(curve.get("set", "text")), 22, 1)
    ax.set_ylabel(f"bits per byte, {name}, anchor + expert")
    if points:
        draw_legend(fig, 3, fontsize=9)
    return fig


@styled
def plot_quality_curve(curve: Results) -> Figure:
    """One line per choice of what the router's tables hide: bits per byte on each kind of text.

    `curve` is what `audit.curve.quality_curve` returns. Dotted: the anchor alone.
    """
    anchor, points = curve["anchor"], curve["points"]
    others = [s for s in anchor["sets"] if s not in curve["experts"].values()]
    columns = ["owners' sets, mean", *others]
    fig = Figure(figsize=(MAX_WIDTH_INCHES, 1.5 + 0.35 * max(1, len(points))))
    panels = fig.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for i, (ax, name) in enumerate(zip(panels, columns, strict=True)):
        colour = _OWNER_COLOURS[i % len(_OWNER_COLOURS)]
        values = [p["sets"].get(name, p["own"]) for p in (anchor, *points)]
        ax.axvline(values[0], color=MUTED, lw=1, ls=":")
        for y, value in enumerate(values[1:]):
            ax.scatter([value], [y], s=50, color=colour, zorder=3)
            note(ax, f"{value:.3f}", (value, y), (7, 0), va="center")
        list_rows(ax, [p["name"] for p in points], 1, "bits per byte")
        ax.set_ylim(len(points) - 0.4, -0.6)
        ax.margins(x=0.25)
        ax.set_title(wrap_name(name, 22, 1))
    note_below(fig, "Further left is better. Dotted: the anchor alone. k: router.min_documents.")
    return fig
