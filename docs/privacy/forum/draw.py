"""Draw the page's figure from results.json beside it: python docs/privacy/forum/draw.py."""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flexolmo.report.drawing import GREY, MAX_WIDTH_INCHES, MUTED, note_below, save_figure, styled

HERE = Path(__file__).parent
OWNERS = {  # legend: directory of results, names of its runs at epsilon 2 and 8, place, colour
    "forum, 4,162 documents": (".", ("epsilon_2", "epsilon_8"), -0.15, "#0072B2"),
    "mathematics, 1,224": ("../mini", ("epsilon_2", "epsilon_8"), 0.15, "#D55E00"),
}
WEIGHTS = {"documents": ("documents alike", "o", True), "bytes": ("bytes alike", "s", False)}
MODELS = {
    "control": "control, 86 epochs",
    "three_epochs": "three epochs",
    "dense": "dense model",
    "expert": "study's expert",
    "epsilon_8": "epsilon 8",
    "epsilon_2": "epsilon 2",
}
WHERE = {"alone": ("alone, or dense", "o"), "model": ("", "o"), "on": ("in the mixture", "s")}


def draw_kept(ax: Axes) -> None:
    """Share of the gain that each owner's private experts keep, in percent."""
    for owner, (directory, runs, shift, colour) in OWNERS.items():
        results = json.loads((HERE / directory / "results.json").read_text(encoding="utf-8"))
        for i, (weight, (label, marker, is_filled)) in enumerate(WEIGHTS.items()):
            for place, run in enumerate(runs):
                found = results["gain_kept"][run][weight]
                kept = 100 * found["kept"]
                ax.errorbar(
                    place + shift + 0.1 * i - 0.05,
                    kept,
                    yerr=[[kept - 100 * found["low"]], [100 * found["high"] - kept]],
                    color=colour,
                    marker=marker,
                    markerfacecolor=colour if is_filled else "white",
                    ms=6,
                    capsize=2,
                    label=f"{owner}: {label}" if place == 0 else None,
                )
    ax.axhline(50, color=GREY, lw=1, ls="--")
    ax.set_xticks([0, 1], ["epsilon 2", "epsilon 8"])
    ax.set_xlim(-0.5, 1.5)
    ax.set_ylim(0, 100)
    ax.grid(axis="y")
    ax.set_ylabel("% of the gain that is kept", color=MUTED)
    ax.legend(loc="upper left", fontsize=8)


def draw_membership(ax: Axes, results: dict[str, Any]) -> None:
    """The largest AUC of any attack on each model, with its interval."""
    for row, model in enumerate(reversed(MODELS)):
        for where, (label, marker) in WHERE.items():
            attacks = results["membership"].get(f"{model}, {where}")
            if attacks is None:
                continue
            found = max(
                (x for x in attacks.values() if isinstance(x, dict)), key=lambda x: x["auc"]
            )
            ax.errorbar(
                found["auc"],
                row + (0.12 if where != "on" else -0.12),
                xerr=[[found["auc"] - found["low"]], [found["high"] - found["auc"]]],
                color="#0072B2" if where != "on" else "#E69F00",
                marker=marker,
                ms=5,
                capsize=2,
                label=label if row == 0 and label else None,
            )
    ax.axvline(0.5, color=GREY, lw=1, ls="--")
    ax.set_yticks(range(len(MODELS)), list(reversed(MODELS.values())))
    ax.set_xlim(0.4, 1.02)
    ax.grid(axis="x")
    ax.set_xlabel("AUC of the attack that found most")
    ax.legend(loc="lower right", fontsize=8)


@styled
def draw_owners(results: dict[str, Any]) -> Figure:
    """Gain kept under privacy, of both owners; and membership of this one."""
    fig = Figure(figsize=(MAX_WIDTH_INCHES, 4.0))
    kept, membership = fig.subplots(1, 2)
    draw_kept(kept)
    draw_membership(membership, results)
    note_below(fig, "One run each. Bars: 95 % over documents. Dashed: half of the gain; guessing.")
    return fig


if __name__ == "__main__":
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    save_figure(draw_owners(results), HERE / "privacy.png")
    (HERE / "privacy.svg").unlink()  # the page shows the other form
