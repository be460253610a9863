"""Markdown. Names come from owners: they are escaped and made printable."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from flexolmo.numbers import format_number
from flexolmo.terminal import make_printable

_RULES = {"l": "---", "r": "---:", "c": ":---:"}


def escape(text: Any) -> str:
    """`text` on one line, with nothing in it that Markdown or HTML would act on."""
    shown = make_printable(text).replace("\n", " ").replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_{}\[\]#|~$!])", r"\\\1", shown)


def write_table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """A table; `align` has l, r or c for every column."""
    lines = [head, [_RULES[a] for a in align], *rows]
    assert all(len(line) == len(align) for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_and_spread(entry: Mapping[str, Any] | None) -> str:
    """An entry's mean, and its spread over seeds where there is one."""
    if entry is None:
        return "–"
    mean = format_number(entry["mean"], 3)
    spread = entry.get("spread")
    return mean if spread is None else f"{mean}\u00a0±\u00a0{format_number(spread, 3)}"
