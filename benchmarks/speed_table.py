"""Markdown of what speed.py found: one row for each figure and its bar, a column for each size.

Preparing text and starting come first, in a table of their own, for they have no size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """A figure: its place under part and size in the results, and the bar it should reach."""

    text: str
    part: str
    place: str
    bar: float | None = None
    is_least: bool = True  # the bar is the least that will do; else the most
    unit: str = "x"


BEFORE = (
    Row(
        "prepare text",
        "data",
        "prepare/runs/prepare/megabytes_per_processor_second",
        2,
        unit=" MB/s of processor time",
    ),
    Row("the same against `encode_batch`", "data", "prepare/share_of_encode_batch", 0.8),
    Row("`flexolmo --help`", "data", "mixture/help_seconds", 0.3, False, " s"),
    Row("first token of `generate`, 371 MB at S", "data", "mixture/first_token_seconds", unit=" s"),
)


def rows() -> list[Row]:
    """Rows of the table, in order."""
    found = [
        Row("expert, default scope, against upstream's way", "training", "all/vs_upstream", 1.3),
        Row("the same, both compiled", "training", "all_compiled/vs_upstream_compiled"),
        Row("the same against dense training of the anchor", "training", "all/vs_dense", 1.0),
        Row("the same against stock, its experts alone trained", "training", "all/vs_stock"),
        Row("the same, compiled, % of GEMM", "training", "all_compiled/pct_gemm", 80, unit=" %"),
        Row("the same, peak memory", "training", "all/peak_memory_vs_upstream", 0.7, False),
        Row("expert, FFN scope, against upstream's way", "training", "ffn/vs_upstream", 1.4),
        Row("expert, low-rank FFN, against upstream's way", "training", "low_rank/vs_upstream", 2),
    ]
    for shape in ("1x128", "1x512", "4x512", "16x64"):
        found.append(Row(f"read {shape}, against stock", "prefill", f"{shape}/vs_stock", 1.0))
    found += [
        Row("read 4x512, % of the GEMM ceiling", "prefill", "4x512/pct_gemm", 75, unit=" %"),
        Row(
            "read 4x512, default router's time over the linear one's",
            "prefill",
            "4x512/evidence_vs_linear",
            1.05,
            False,
        ),
    ]
    for shape in ("1x512", "4x512"):
        text = f"read {shape}, default mixture: time over what its FLOPs say"
        found.append(Row(text, "prefill", f"{shape}/default/times_flops", 1.15, False))
    for batch, bar in ((1, 2.0), (16, 2.0), (64, 1.3)):
        found.append(
            Row(f"write, batch {batch}, against stock", "decode", f"{batch}/vs_stock", bar)
        )
    found.append(
        Row("write, batch 1, time over the bandwidth floor", "decode", "1/times_floor", 4, False)
    )
    for batch in (16, 64):
        text = f"write, batch {batch}, cost of masks that differ"
        found.append(Row(text, "decode", f"{batch}/mixed_mask_cost", 1.05, False))
    for batch in (1, 16, 64):
        text = f"write, batch {batch}, default mixture: time over what its FLOPs say"
        found.append(Row(text, "decode", f"{batch}/default/times_flops", 1.15, False))
    for batch in (16, 64):
        text = f"write, batch {batch}, default mixture: time over what FLOPs and bytes say"
        found.append(Row(text, "decode", f"{batch}/default/times_ceilings"))
    return found


def find(results: Mapping[str, Any], place: str) -> float | None:
    """The figure at a place with slashes; None if it was not measured."""
    level: Any = results
    for step in place.split("/"):
        if not isinstance(level, Mapping) or step not in level:
            return None
        level = level[step]
    return None if level is None else float(level)


def cell(row: Row, value: float | None) -> str:
    """The figure in words, bold if it misses its bar."""
    if value is None:
        return "-"
    text = f"{value:.0f}" if row.unit == " %" else f"{value:.2f}"
    misses = row.bar is not None and (value < row.bar if row.is_least else value > row.bar)
    return f"**{text}{row.unit}**" if misses else text + row.unit


def bar_of(row: Row) -> str:
    """The bar in words."""
    if row.bar is None:
        return ""
    return f"{'≥' if row.is_least else '≤'} {row.bar:g}{row.unit}"


def markdown_table(results: Mapping[str, Any]) -> str:
    """The table, with two threads' figures after one thread's; rows without any are left out."""
    runs = [results[k] if k else results for k in ("", "two_threads") if not k or k in results]
    measured = {size for run in runs for part in PARTS for size in run.get(part, ())}
    sizes = [s for s in ("pico", "S", "M", "L") if s in measured]
    lines = [
        f"| one thread{' / two' if len(runs) > 1 else ''} | bar | {' | '.join(sizes)} |",
        "|---|---|" + "---|" * len(sizes),
    ]
    for row in rows():
        values = [[find(r, f"{row.part}/{s}/{row.place}") for r in runs] for s in sizes]
        if all(v is None for both in values for v in both):
            continue
        cells = [" / ".join(cell(row, v) for v in both) for both in values]
        lines.append(f"| {row.text} | {bar_of(row)} | {' | '.join(cells)} |")
    if "data" in results:
        before = ["| | bar | |", "|---|---|---|"]
        for row in BEFORE:
            value = cell(row, find(results, f"data/{row.place}"))
            before.append(f"| {row.text} | {bar_of(row)} | {value} |")
        lines = [*before, "", *lines] if sizes else before
    return "\n".join(lines)


PARTS = ("training", "prefill", "decode")
