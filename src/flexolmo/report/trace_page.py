"""The page of `flexolmo trace query`: a text with its spans marked, and where each occurs.

Shows what `trace.spans` found; looks nothing up. Text and names on it may be anybody's.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from flexolmo.files import write_bytes
from flexolmo.numbers import format_number
from flexolmo.report.page import Block, Cell, Marked, Table, Text, render_page
from flexolmo.trace.index import Occurrence
from flexolmo.trace.spans import Span


def write_trace_page(text: str, spans: Sequence[Span], sources: Sequence[str], out: Path) -> Path:
    """Write the page as `out`, .html or .md, which its owner alone reads; its path.

    Args:
        spans: Spans of `text` in the order of their numbers on the page.
        sources: Every source that was asked, those without a span too.
    """
    asked = ", ".join(sources)
    found = f"Spans that occur word for word in training text of {asked}: {len(spans):,}."
    blocks: list[Block] = [Text("Where a text may come from", "h1"), Text(found, "lead")]
    blocks += [Marked(mark_spans(text, spans))]
    if spans:
        rows = [_row(number, text, span) for number, span in enumerate(spans, 1)]
        heads = ["span", "source", "tokens", "bits", "places", "words"]
        blocks += [Text("Spans", "h2"), Table("Least likely first", heads, rows, "llrrrl")]
    places = [_place(n, o) for n, span in enumerate(spans, 1) for o in span.occurrences]
    if places:
        heads = ["span", "document", "byte", "before", "span", "after"]
        blocks += [Text("Places", "h2"), Table("Text around each", heads, places, "llrlll")]
    blocks += [
        Text(
            "A span that occurs in a source's text need not come from it: common phrases occur "
            "everywhere. Bits say how unlikely its words are to stand together by chance.",
            "note",
        )
    ]
    page = render_page(blocks, out.suffix[1:], {})
    write_bytes(out, page.encode(), is_private=True)
    return out


def mark_spans(text: str, spans: Sequence[Span]) -> list[tuple[str, str]]:
    """`text` cut where spans begin or end; with each piece, the numbers of those it is in."""
    cuts = sorted({0, len(text)} | {k for span in spans for k in (span.first, span.last)})
    pieces = []
    for first, last in pairwise(cuts):
        numbers = [n for n, s in enumerate(spans, 1) if s.first <= first and last <= s.last]
        pieces.append((text[first:last], ", ".join(map(str, numbers))))
    return pieces


def _row(number: int, text: str, span: Span) -> list[Cell | str]:
    return [
        str(number),
        span.source,
        str(span.end - span.start),
        "–" if span.bits is None else format_number(span.bits, 0),
        "–" if span.count is None else format_number(span.count, 0),
        Cell(text[span.first : span.last], mono=True),
    ]


def _place(number: int, o: Occurrence) -> list[Cell | str]:
    parts = [
        Cell(o.before, mono=True),
        Cell(o.text, bold=True, mono=True),
        Cell(o.after, mono=True),
    ]
    return [str(number), o.document, f"{o.position:,}", *parts]
