"""Markdown, and numbers in it. Names come from owners: they are escaped and made printable."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

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


def number(x: float, digits: int) -> str:
    """`x` with a true minus; never a negative zero."""
    shown = f"{x:.{digits}f}"
    return shown.removeprefix("-") if float(shown) == 0 else shown.replace("-", "−")


def signed(x: float, digits: int) -> str:
    """The same, with a plus before what is above zero."""
    shown = number(x, digits)
    return shown if shown.startswith("−") or float(shown) == 0 else f"+{shown}"


def share(x: float) -> str:
    """`x` as an unsigned percentage, never broken over lines."""
    return f"{number(100 * x, 1)}\u00a0%"


def mean_and_spread(entry: Mapping[str, Any] | None) -> str:
    """An entry's mean, and its spread over seeds where there is one."""
    if entry is None:
        return "–"
    spread = entry.get("spread")
    return number(entry["mean"], 3) + ("" if spread is None else f"\u00a0±\u00a0{spread:.3f}")
