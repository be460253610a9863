"""The report of `flexolmo audit access`: what the switch of each source does, seen from outside.

Shows what `audit.access` found; computes nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from flexolmo.numbers import format_number, format_percent
from flexolmo.report.drawing import GREY, INK, MAX_WIDTH_INCHES, MUTED, styled, wrap_name
from flexolmo.report.page import Block, Items, Picture, Table, Text, save_page

_DEFINITIONS = (
    Text(
        ": was the source on? It is told from the log-probability that the model gives a document "
        "of the owner's that it was not trained on, as the chance that an answer with the source "
        "scores above one without it (AUC; 0.5 is chance, 1 is certainty). Calibrated: the "
        "anchor's own log-probability, which everybody has, is taken off first. Recognised: the "
        "share of answers with the source that stand out from all but 1 % of those without it. "
        "High is what a switch that works looks like: who may use the source gets something else.",
        term="Domain distinguishability",
    ),
    Text(
        ": is a document among those trained on? They are told from unseen ones by the same "
        "calibrated score (AUC). With the source off nothing of its text takes part in the answer, "
        "and what is left is other owners' experts and the kind of documents; with the source on "
        "it is also what the expert remembers.",
        term="Membership",
    ),
    Text(
        ": the share of bits per byte that whoever may not use the source loses on its owner's "
        "unseen documents, (off − on) / off. This is what access is worth.",
        term="Utility gap",
    ),
)


def write_access_page(found: Mapping[str, Any], out: Path) -> Path:
    """Write `out`/page.html and page.md of what `audit_access` found; the first path."""
    measured = {n: x for n, x in found["experts"].items() if "too_few" not in x}
    blocks: list[Block] = [
        Text("What each source's switch does", "h1"),
        Text(
            "An observer sees the log-probabilities that the mixture gives texts, with one source "
            "on and off and all others on, and has the public anchor. Both measures are after "
            "PermLLM (arXiv 2505.22860).",
            "lead",
        ),
    ]
    if measured:
        blocks += [
            Table(
                "With 95 % intervals, by bootstrap over documents",
                [
                    "source",
                    "on or off told, plain",
                    "calibrated",
                    "recognised",
                    "training text",
                    "membership, on",
                    "off",
                    "bits per byte, on",
                    "off",
                    "utility gap",
                ],
                [_row(name, x) for name, x in measured.items()],
                "lr",
            ),
            Picture(
                "access",
                plot_access(measured),
                "Distinguishability, membership with the source on and off, and utility gap of "
                "each source, with intervals",
                "Bars are 95 % intervals; the dashed line is chance.",
            ),
        ]
    for name, x in found["experts"].items():
        counts = " and ".join(f"{n:,} {kind}" for kind, n in x["documents"].items())
        too_few = (
            f"; not measured, with fewer than {x['too_few']} of a kind" if "too_few" in x else ""
        )
        blocks.append(Text(f": {counts} documents{too_few}.", "note", term=name))
    blocks += [Text("What is measured", "h2"), Items(_DEFINITIONS)]
    return save_page(blocks, out / "page.html", out / "page.md")


def _row(name: str, x: Mapping[str, Any]) -> list[str]:
    told, member, gap = x["distinguishability"], x["membership"], x["utility_gap"]
    return [
        name,
        _with_interval(told["plain"], "auc"),
        _with_interval(told["calibrated"], "auc"),
        _with_interval(told["recognised"], "share"),
        _with_interval(told["trained"], "auc"),
        _with_interval(member["on"], "auc"),
        _with_interval(member["off"], "auc"),
        format_number(gap["on"], 3),
        format_number(gap["off"], 3),
        _with_interval(gap, "gap"),
    ]


def _with_interval(figure: Mapping[str, Any], kind: str) -> str:
    low, high = figure["interval"]
    if kind == "auc":
        return f"{figure[kind]:.3f} ({low:.3f} to {high:.3f})"
    return f"{format_percent(figure[kind])} ({100 * low:.1f} to {100 * high:.1f})"


@styled
def plot_access(measured: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Three panels over the sources: distinguishability, membership, utility gap."""
    names = list(measured)
    places = np.arange(len(names))
    fig = Figure(figsize=(MAX_WIDTH_INCHES, 1.2 + 0.45 * len(names)))
    told, member, gap = fig.subplots(1, 3, sharey=True)

    def draw(
        axes: Any, figures: list[Mapping[str, Any]], kind: str, shift: float, **look: Any
    ) -> None:
        values = np.array([f[kind] for f in figures])
        low, high = np.array([f["interval"] for f in figures]).T
        spread = [(values - low).clip(0), (high - values).clip(0)]
        axes.errorbar(values, places + shift, xerr=spread, fmt="o", **look)

    rows = list(measured.values())
    draw(told, [r["distinguishability"]["calibrated"] for r in rows], "auc", 0, color=INK)
    draw(member, [r["membership"]["on"] for r in rows], "auc", -0.12, color=INK, label="on")
    draw(
        member,
        [r["membership"]["off"] for r in rows],
        "auc",
        0.12,
        color=GREY,
        mfc="white",
        label="off",
    )
    draw(gap, [r["utility_gap"] for r in rows], "gap", 0, color=INK)
    for axes, title in (
        (told, "Distinguishability, AUC"),
        (member, "Membership, AUC"),
        (gap, "Utility gap"),
    ):
        axes.set_title(title)
        axes.axvline(0.0 if axes is gap else 0.5, color=MUTED, linestyle="--", linewidth=0.8)
        axes.grid(axis="x")
    for axes in (told, member):
        axes.set_xlim(0.35, 1.03)
    gap.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
    member.legend(loc="upper right")
    told.set_yticks(places, [wrap_name(n, 18) for n in names])
    told.set_ylim(len(names) - 0.5, -0.5)
    return fig
