"""The report of `flexolmo audit membership`: can an attacker tell what was trained on?

Shows what `audit.membership` found; computes nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from flexolmo.audit.membership import strongest_of
from flexolmo.audit.results import ATTACKS, SUBJECTS
from flexolmo.numbers import format_percent
from flexolmo.report.drawing import INK, MUTED, styled
from flexolmo.report.page import Block, Cell, Items, Picture, Table, Text, save_page

COLOURS = {
    "alone": "#CC79A7",
    "on": "#0072B2",
    "off": "#D55E00",
    "anchor": "#767676",
    "model": "#009E73",
}
LOOKS = {"off": "--", "anchor": ":"}
_DEFINITIONS = (
    Text(
        ": a document's tokens are likelier than the reference makes them, by more than for a text "
        "that the reference would write itself (arXiv 2510.05582). The reference is the same "
        "mixture with the owner's expert off; for the mixture without it, the anchor.",
        term="InfoRMIA",
    ),
    Text(": the same without that correction.", term="Likelihood ratio"),
    Text(
        ": the owner's expert reads every token, past the router. Whoever has the bundle can do "
        "so; whoever only asks a server cannot.",
        term="Expert alone",
    ),
    Text(
        ": the mean log-probability of the tokens, alone; over the bytes of the zipped text "
        "(arXiv 2012.07805); and of the least likely fifth of the tokens, in deviations of what "
        "was predicted (Min-K%++, arXiv 2404.02936).",
        term="Loss, zlib ratio, Min-K%++",
    ),
    Text(
        ": the chance that a member scores above another document; 0.5 is chance, 1 certainty.",
        term="AUC",
    ),
    Text(
        ": the share of members found when at most this share of other documents is taken for "
        "members. In brackets, its interval, and the highest share of false alarms that the number "
        "of other documents leaves possible: with few of them a small rate cannot be known.",
        term="Found at 1 % and 0.1 %",
    ),
)


def write_membership_page(found: Mapping[str, Any], out: Path) -> Path:
    """Write `out`/page.html and page.md of what `audit_membership` found; the first path."""
    counts = found["documents"]
    blocks: list[Block] = [
        Text("Membership", "h1"),
        Text(
            "Can somebody who has the model, and a document, tell whether it was trained on? "
            f"{counts['members']:,} members, documents whose first {found['tokens']} tokens "
            f"training read (of {counts['in_training_split']:,} in the training split), against "
            f"{counts['others']:,} others of the same set, which it did not.",
            "lead",
        ),
        Table(
            "With 95 % intervals. Bold: the attack that finds most",
            ["model", "attack", "AUC", "found at 1 %", "found at 0.1 %"],
            [
                _row(subject, attack, by_attack[attack], attack == strongest_of(by_attack))
                for subject, by_attack in found["subjects"].items()
                for attack in ATTACKS
                if attack in by_attack
            ],
            "llr",
        ),
        Picture(
            "roc",
            plot_roc(found["subjects"]),
            "ROC curves of the attack that finds most on each model",
            "Both axes are logarithmic, for it is the few documents found with hardly a false "
            "alarm that matter. Dotted: chance.",
        ),
        *control_blocks(found),
        Text("What is measured", "h2"),
        Items(_DEFINITIONS),
    ]
    return save_page(blocks, out / "page.html", out / "page.md")


def control_blocks(found: Mapping[str, Any]) -> list[Block]:
    """The control of an attack: without the expert, the anchor's numbers."""
    if found["off_equals_anchor"] is None:
        return []
    head = ["control", "met"]
    said = "With the expert off, every number is the anchor's, to the bit"
    return [Table("Control", head, [[said, Cell.verdict(found["off_equals_anchor"])]])]


def _row(subject: str, attack: str, x: Mapping[str, Any], is_strongest: bool) -> list[Cell | str]:
    low, high = x["interval"]
    return [
        SUBJECTS[subject],
        Cell(ATTACKS[attack], bold=is_strongest),
        Cell(f"{x['auc']:.3f} ({low:.3f} to {high:.3f})", bold=is_strongest),
        *(_rate(x["caught"][rate]) for rate in ("0.01", "0.001")),
    ]


def _rate(x: Mapping[str, Any]) -> str:
    low, high = x["interval"]
    most = x["false_alarms"]["interval"][1]
    return (
        f"{format_percent(x['share'])} ({100 * low:.1f} to {100 * high:.1f}; "
        f"false alarms up to {100 * most:.1f})"
    )


@styled
def plot_roc(subjects: Mapping[str, Mapping[str, Any]]) -> Figure:
    """ROC curves of the attack that finds most on each subject, on logarithmic axes."""
    fig = Figure(figsize=(6.0, 4.6))
    ax = fig.subplots()
    ax.plot([1e-3, 1], [1e-3, 1], ":", color=MUTED, linewidth=1)
    for name, by_attack in subjects.items():
        attack = strongest_of(by_attack)
        false, true = zip(*by_attack[attack]["roc"], strict=True)
        if len(false) == 2:  # all scores are one, as of what is its own reference
            continue
        label = f"{SUBJECTS[name]}, {ATTACKS[attack]}"
        look = LOOKS.get(name, "-")
        ax.step(false, true, look, where="post", color=COLOURS[name], label=label)
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda x, _: f"{100 * x:g} %")
    ax.set_xlim(1e-3, 1)
    ax.set_ylim(1e-3, 1.05)
    ax.set_xlabel("false alarms: share of other documents", color=INK)
    ax.set_ylabel("share of members found", color=INK)
    ax.grid()
    ax.legend(loc="lower right", fontsize=9)
    return fig
