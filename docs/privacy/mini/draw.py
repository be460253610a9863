"""Draw the page's figures from results.json beside it: python docs/privacy/mini/draw.py."""

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flexolmo.report.drawing import GREY, MAX_WIDTH_INCHES, MUTED, note_below, save_figure, styled

HERE = Path(__file__).parent
CURVE = {  # run: place on the axis, the logarithm of epsilon
    "epsilon 1, documents": 0.0,
    "epsilon 2, documents": 1.0,
    "epsilon 8, documents": 3.0,
}
OTHERS = {"epsilon 8, documents, again": 3.3, "epsilon 8, sequences": 4.4, "rank 4, no noise": 5.5}
TICKS = {0.0: "1", 1.0: "2", 3.0: "8", 4.4: "8, for\nsequences", 5.5: "no noise"}
RECIPE = {"batch_size": 200, "rank": 4}
WEIGHTS = {  # name in results.json: legend, colour, marker
    "documents": ("documents count alike", "#0072B2", "o"),
    "bytes": ("bytes count alike", "#D55E00", "s"),
}
KINDS = {
    "word_problems": ("word problems made by rule", "#009E73", "o"),
    "sympy_docstrings": ("SymPy docstrings", "#56B4E9", "s"),
    "maxima_manual": ("Maxima manual", "#E69F00", "^"),
    "gap_manual": ("GAP manual", "#CC79A7", "D"),
}


def draw_shares(
    ax: Axes,
    kept: dict[str, Any],
    shift: float,
    label: str,
    colour: str,
    marker: str,
    curve: dict[str, float] = CURVE,
    others: dict[str, float] = OTHERS,
) -> None:
    """Share of the gain that each run keeps, in percent, with its interval; one line for runs
    that differ in one thing alone (`curve`: place of each), hollow marks for the others."""
    for runs, is_curve in ((curve, True), (others, False)):
        share = np.array([100 * kept[run]["kept"] for run in runs])
        low = np.array([100 * kept[run]["low"] for run in runs])
        high = np.array([100 * kept[run]["high"] for run in runs])
        ax.errorbar(
            np.array(list(runs.values())) + shift,
            share,
            yerr=[share - low, high - share],
            color=colour,
            marker=marker,
            markerfacecolor=colour if is_curve else "white",
            ls="-" if is_curve else "none",
            lw=1.6,
            ms=5,
            capsize=2,
            elinewidth=0.9,
            label=label if is_curve else None,
        )


@styled
def draw_gain(results: dict[str, Any]) -> Figure:
    """Share of the gain that is kept by epsilon: of all text, and of each kind."""
    fig = Figure(figsize=(MAX_WIDTH_INCHES, 4.2))
    whole, by_kind = fig.subplots(1, 2, sharey=True)
    for i, (weight, look) in enumerate(WEIGHTS.items()):
        kept = {run: shares[weight] for run, shares in results["gain_kept"].items()}
        draw_shares(whole, kept, 0.08 * i - 0.04, *look)
    for i, (kind, look) in enumerate(KINDS.items()):
        draw_shares(by_kind, results["gain_kept_by_kind"][kind], 0.06 * i - 0.09, *look)
    for ax, title in ((whole, "All text"), (by_kind, "By kind of text, documents alike")):
        ax.set_title(title)
        ax.axhline(50, color=GREY, lw=1, ls="--")
        ax.set_xticks(list(TICKS), list(TICKS.values()))
        ax.set_xlim(-0.4, 5.9)
        ax.set_ylim(-20, 100)
        ax.grid(axis="y")
        ax.set_xlabel("epsilon")
        ax.legend(loc="upper left", fontsize=8.5)
    whole.set_ylabel("% of the gain that is kept", color=MUTED)
    note_below(
        fig,
        "Filled: the recipe, one run each. Hollow beside 8: the recipe again, with other noise; "
        "no noise: rank 4. Bars: 95 % over validation documents. Dashed: half.",
    )
    return fig


@styled
def draw_batch_and_rank(results: dict[str, Any]) -> Figure:
    """Share of the gain that is kept by documents a step, and by rank, at as many steps."""
    runs = results["gain_kept_by_batch_and_rank"]
    fig = Figure(figsize=(MAX_WIDTH_INCHES, 3.6))
    axes = fig.subplots(1, 2, sharey=True)
    for ax, (varied, same) in zip(axes, permutations(RECIPE), strict=True):
        curve = {
            name: np.log2(run[varied])
            for name, run in sorted(runs.items(), key=lambda item: item[1][varied])
            if run[same] == RECIPE[same]
        }
        for i, (weight, look) in enumerate(WEIGHTS.items()):
            kept = {name: run[weight] for name, run in runs.items()}
            draw_shares(ax, kept, 0.04 * i - 0.02, *look, curve=curve, others={})
        ax.set_xticks(list(curve.values()), [str(runs[name][varied]) for name in curve])
        ax.axhline(50, color=GREY, lw=1, ls="--")
        ax.set_ylim(0, 60)
        ax.grid(axis="y")
    axes[0].set_xlabel("documents a step, rank 4")
    axes[1].set_xlabel("rank, 200 documents a step")
    axes[0].set_ylabel("% of the gain that is kept", color=MUTED)
    axes[0].legend(loc="upper left", fontsize=8.5)
    note_below(
        fig,
        "Epsilon 8, 80 steps, one window of a document a step. One run each. Bars: 95 % over "
        "validation documents. Dashed: half.",
    )
    return fig


if __name__ == "__main__":
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    for name, draw in (("gain", draw_gain), ("batch_and_rank", draw_batch_and_rank)):
        save_figure(draw(results), HERE / f"{name}.png")
        (HERE / f"{name}.svg").unlink()  # the page shows the other form
