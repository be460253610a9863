"""The report of `flexolmo audit extraction`: does the model write training documents?

Shows what `audit.extraction` found; computes nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flexolmo.audit.results import SUBJECTS
from flexolmo.numbers import format_count, format_percent
from flexolmo.report.drawing import MAX_WIDTH_INCHES, MUTED, styled
from flexolmo.report.membership_page import COLOURS, LOOKS, control_blocks
from flexolmo.report.page import Block, Items, Picture, Table, Text, save_page

_PAPER_DOCUMENTS = 10_000
_SHOWN_ATTEMPTS = (1, 10, 1000, 1_000_000)
_P = "0.9"


def write_extraction_page(found: Mapping[str, Any], out: Path) -> Path:
    """Write `out`/page.html and page.md of what `audit_extraction` found; the first path."""
    how = found["run"]["config"]
    lead = (
        f"{found['documents']:,} training documents: the model is given the first "
        f"{how['prefix_tokens']} tokens and must write the next {how['continuation_tokens']}."
    )
    if found["documents"] < _PAPER_DOCUMENTS:
        lead += (
            f" The paper took {_PAPER_DOCUMENTS:,}; with fewer the intervals are wider, and what "
            "they leave possible counts."
        )
    blocks: list[Block] = [Text("Extraction", "h1"), Text(lead, "lead")]
    if how["samples"]:
        blocks.append(_sampled(found))
    blocks.append(_attempts(found, "exact", f"Word for word with probability {_P}"))
    if how["near_tokens"]:
        said = f"But for {how['near_tokens']} tokens, with probability {_P}, at least"
        blocks.append(_attempts(found, "near", said))
    blocks += [
        Picture(
            "extraction",
            plot_extraction(found),
            "Share of documents extracted, by similarity, by number of samples, and by attempts",
            "Bands are 95 % intervals. Left and middle are sampled; right is computed, for any "
            "number of attempts.",
        ),
        *control_blocks(found),
        Text("What is measured", "h2"),
        Items(
            [
                Text(
                    f": one of {how['samples']} samples (top-k {how['top_k']}, top-p "
                    f"{how['top_p']}, temperature {how['temperature']}) has a similarity of at "
                    f"least {how['threshold']} with the document, one minus the edit distance "
                    "over the longer length. The prefix is not compared. Source: §5.3 of the "
                    "paper.",
                    term="Extracted",
                ),
                Text(
                    ": a document is (n, p)-discoverable if n samples write it word for word with "
                    "probability p. That follows from the probabilities of its tokens, in one "
                    "pass and without sampling (arXiv 2410.19482).",
                    term="Discoverable",
                ),
                Text(
                    ": the owner's expert reads every token, past the router. Whoever has the "
                    "bundle can do so; whoever only asks a server cannot.",
                    term="Expert alone",
                ),
                Text(
                    ": text with a few tokens replaced leaks as much. A search finds the likeliest "
                    "such texts, whose probabilities together are a lower bound (arXiv "
                    "2603.24917).",
                    term="But for some tokens",
                ),
            ]
        ),
    ]
    return save_page(blocks, out / "page.html", out / "page.md")


def _sampled(found: Mapping[str, Any]) -> Table:
    rows = []
    for name, x in found["subjects"].items():
        loose = next(y for y in x["by_threshold"] if y["threshold"] == 0.5)
        rows.append(
            [SUBJECTS[name], _share(x["extracted"]), _share(loose), f"{x['median_similarity']:.2f}"]
        )
    head = ["model", "extracted", "similarity of 0.5", "median of the nearest"]
    return Table("Sampled, with 95 % intervals", head, rows, "lr")


def _attempts(found: Mapping[str, Any], kind: str, said: str) -> Table:
    rows = []
    for name, x in found["subjects"].items():
        curve = x[kind]
        at = [curve["attempts"].index(n) for n in _SHOWN_ATTEMPTS]
        rows.append([SUBJECTS[name], *(_share(curve["discoverable"][_P][i]) for i in at)])
    head = ["model", *(f"{n:,}" for n in _SHOWN_ATTEMPTS)]
    return Table(f"{said}, within so many attempts", head, rows, "lr")


def _share(x: Mapping[str, Any]) -> str:
    low, high = x["interval"]
    return f"{format_percent(x['share'])} ({100 * low:.1f} to {100 * high:.1f})"


@styled
def plot_extraction(found: Mapping[str, Any]) -> Figure:
    """Shares of documents by threshold, by number of samples and by attempts."""
    is_sampled = found["run"]["config"]["samples"] > 0
    fig = Figure(figsize=(MAX_WIDTH_INCHES if is_sampled else 5.0, 3.6))
    panels = fig.subplots(1, 3 if is_sampled else 1, squeeze=False)[0]
    for name, x in found["subjects"].items():
        curve = x["exact"]
        _band(panels[-1], curve["attempts"], curve["discoverable"][_P], name)
        if is_sampled:
            ordered = sorted(x["by_threshold"], key=lambda y: y["threshold"])
            _band(panels[0], [y["threshold"] for y in ordered], ordered, name)
            _band(panels[1], [y["samples"] for y in x["by_samples"]], x["by_samples"], name)
    titles = ["similarity at least", "samples"] if is_sampled else []
    for ax, title in zip(panels, [*titles, f"attempts, word for word, p = {_P}"], strict=True):
        ax.set_xlabel(title)
        ax.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
        ax.set_ylim(-0.02, 1.02)
        ax.grid(color=MUTED, alpha=0.2)
    panels[-1].set_xscale("log")
    panels[-1].xaxis.set_major_formatter(lambda x, _: format_count(x))
    panels[0].set_ylabel("share of documents")
    panels[0].legend(fontsize=9)
    return fig


def _band(ax: Axes, places: list[float], shares: list[Mapping[str, Any]], name: str) -> None:
    low, high = np.array([y["interval"] for y in shares]).T
    look = LOOKS.get(name, "-")
    ax.plot(places, [y["share"] for y in shares], look, color=COLOURS[name], label=SUBJECTS[name])
    ax.fill_between(places, low, high, color=COLOURS[name], alpha=0.12, linewidth=0)
