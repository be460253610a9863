"""The report of `flexolmo audit relearning`: does what is off come back?

Shows what `audit.relearning` found; computes nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from flexolmo.audit.results import SUBJECTS
from flexolmo.numbers import format_signed
from flexolmo.report.drawing import MUTED, note, styled
from flexolmo.report.membership_page import COLOURS, LOOKS
from flexolmo.report.page import Block, Cell, Picture, Table, Text, save_page


def write_relearning_page(found: Mapping[str, Any], out: Path) -> Path:
    """Write `out`/page.html and page.md of what `audit_relearning` found; the first path."""
    extra = found["extra"]
    low, high = extra["interval"]
    blocks: list[Block] = [
        Text("Relearning", "h1"),
        Text(
            "The mixture with the owner's expert off, and the bare anchor, are trained alike on a "
            "little public and a little related text. If the owner's knowledge were only hidden, "
            "it would come back sooner in the mixture. Read are "
            f"{found['documents']:,} of the owner's training documents.",
            "lead",
        ),
        Table(
            "Bits per byte of the owner's training text",
            ["steps", SUBJECTS["off"], SUBJECTS["anchor"]],
            [
                [f"{off['step']:,}", f"{off['bits_per_byte']:.4f}", f"{bare['bits_per_byte']:.4f}"]
                for off, bare in zip(found["curves"]["off"], found["curves"]["anchor"], strict=True)
            ],
            "r",
        ),
        Picture(
            "relearning",
            plot_relearning(found),
            "Bits per byte of the owner's training text over steps of training, from both starts",
            "Solid rule: with the expert on, which is what would come back.",
        ),
        Text(
            f": {format_signed(extra['bits_per_byte'], 4)} bits per byte ({low:.4f} to "
            f"{high:.4f}). Above zero, something comes back.",
            term="The mixture gains more than the anchor",
        ),
    ]
    if found["is_same"] is not None:
        said = "At every step the mixture without the expert reads as the anchor does, to the bit"
        verdict = Cell.verdict(found["is_same"])
        blocks.append(Table("Control", ["control", "met"], [[said, verdict]]))
    return save_page(blocks, out / "page.html", out / "page.md")


@styled
def plot_relearning(found: Mapping[str, Any]) -> Figure:
    """Bits per byte over steps, of both starts."""
    fig = Figure(figsize=(6.5, 3.8))
    ax = fig.subplots()
    for name in ("anchor", "off"):
        curve = found["curves"][name]
        ax.plot(
            [p["step"] for p in curve],
            [p["bits_per_byte"] for p in curve],
            LOOKS[name],
            color=COLOURS[name],
            marker="o",
            ms=4,
            label=SUBJECTS[name],
        )
    ax.axhline(found["aimed_at"], color=MUTED, lw=1)
    at = (0, found["aimed_at"])
    note(ax, SUBJECTS["on"], at, (6, 4), xycoords=("axes fraction", "data"), color=MUTED)
    ax.set_xlabel("steps of training on public and related text")
    ax.set_ylabel("bits per byte, owner's training text")
    ax.grid()
    ax.legend()
    return fig
