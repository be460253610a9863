"""The report of `flexolmo audit canaries measure`: are planted canaries found?

Shows what `audit.canaries` found; computes nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexolmo.audit.results import SUBJECTS
from flexolmo.numbers import format_percent
from flexolmo.report.page import Block, Cell, Items, Table, Text, save_page

_DEFINITIONS = (
    Text(
        ": log2 of the number of canaries that were not planted (and itself), over a planted one's "
        "rank among them (arXiv 1802.08232). All of them are random tokens, so that only training "
        "tells them apart.",
        term="Exposure",
    ),
    Text(
        ": a fair coin decided of each canary whether it was planted. Who guesses the coins better "
        "than an epsilon allows shows that training had a larger one (arXiv 2305.08846). It tests "
        "what is promised; that no more was found promises nothing.",
        term="Epsilon, at least",
    ),
)


def write_canaries_page(found: Mapping[str, Any], out: Path) -> Path:
    """Write `out`/page.html and page.md of what `audit_canaries` found; the first path."""
    blocks: list[Block] = [
        Text("Canaries", "h1"),
        Text(
            f"{found['planted']:,} of {found['canaries']:,} canaries of {found['tokens']} random "
            "tokens were planted in the training text, once each. Does the model give them away?",
            "lead",
        ),
        Table(
            "With 95 % intervals",
            [
                "model",
                "exposure, mean",
                "largest",
                "by chance",
                "above all others",
                "AUC",
                "epsilon, at least",
            ],
            [_row(name, x) for name, x in found["subjects"].items()],
            "lr",
        ),
    ]
    if found["off_equals_anchor"] is not None:
        said = "With the expert off, every canary is as likely as the anchor makes it, to the bit"
        verdict = Cell.verdict(found["off_equals_anchor"])
        blocks.append(Table("Control", ["control", "met"], [[said, verdict]]))
    blocks += [Text("What is measured", "h2"), Items(_DEFINITIONS)]
    return save_page(blocks, out / "page.html", out / "page.md")


def _row(name: str, x: Mapping[str, Any]) -> list[str]:
    exposure, first, member = x["exposure"], x["first"], x["membership"]
    low, high = member["interval"]
    return [
        SUBJECTS[name],
        f"{exposure['mean']:.2f}",
        f"{exposure['largest']:.2f} of {exposure['most']:.2f}",
        f"{exposure['by_chance']:.2f}",
        format_percent(first["share"]),
        f"{member['auc']:.3f} ({low:.3f} to {high:.3f})",
        f"{x['epsilon']['epsilon']:.2f}",
    ]
