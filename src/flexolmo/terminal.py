"""Printing: text from outside reaches a terminal with nothing in it that acts.

Names, terms, metadata and model output come from other people and may hold escape sequences. On a
terminal, control characters appear as their pictures. A file or a pipe gets the text unchanged,
for another program to read. All printing in this package goes through here; a test checks it.
"""

import io
import sys
import unicodedata
from typing import Any

from rich.console import Console
from rich.progress import Task, TextColumn
from rich.text import Text


def make_printable(text: Any) -> str:
    """`text` with nothing invisible in it that acts: safe to show, in HTML, drawn or printed.

    Controls become their pictures (U+2400 on); lone surrogates and marks that turn the direction
    of writing become U+FFFD. Line ends become a line feed, tabs four spaces.
    """
    shown = []
    for c in str(text).replace("\r\n", "\n").replace("\r", "\n").replace("\t", "    "):
        kind = unicodedata.category(c)
        if c in "\n\u2028\u2029\u0085":
            c = "\n"
        elif ord(c) < 0x20:
            c = chr(0x2400 + ord(c))
        elif kind in ("Cc", "Cs", "Co", "Cn") or (kind == "Cf" and c not in "\u200c\u200d\u00ad"):
            c = "\ufffd"
        shown.append(c)
    return "".join(shown)


def echo(text: Any = "", *, end: str = "\n", err: bool = False) -> None:
    """Print `text` to standard output, or to standard error; printable, with its tabs, on a
    terminal, unchanged elsewhere."""
    stream = sys.stderr if err else sys.stdout
    shown = str(text)
    if stream.isatty():
        shown = "\t".join(make_printable(part) for part in shown.split("\t"))
    stream.write(shown + end)
    stream.flush()


def accept_any_character() -> None:
    """Write characters that the output's encoding lacks as backslash escapes from now on."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class PlainConsole(Console):
    """A rich console for tables and bars, which takes text from outside as text: no markup, no
    emoji names, no control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        options |= {"markup": False, "emoji": False}
        return super().render_str(make_printable(text), **options)


class PlainColumn(TextColumn):
    """Text beside a progress bar, taken as `PlainConsole` takes it."""

    def render(self, task: Task) -> Text:
        return Text(make_printable(self.text_format.format(task=task)), no_wrap=True)
