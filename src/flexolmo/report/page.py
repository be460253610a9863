"""Parts of a page, and the page as one HTML file and as Markdown for a code host.

A page is a list of blocks, and the first is its heading. The HTML loads nothing from anywhere and
runs no script; a policy in its head forbids both. Everything shown goes through `make_printable`
and is escaped, in both forms: it may be what a model or an owner wrote. Knows nothing of results.
"""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from flexolmo.files import write_bytes
from flexolmo.report.drawing import save_figure
from flexolmo.terminal import make_printable

_VERDICTS = {
    True: ("✓ met", "#009E73"),
    False: ("✗ not met", "#D55E00"),
    None: ("not measured", None),
}
# Not every reader of Markdown knows a backslash before the second kind.
_ESCAPES = str.maketrans(
    {c: f"\\{c}" for c in "\\`*_{}[]#!"} | {c: f"&#{ord(c)};" for c in "&<>|~$"}
)


@dataclass(frozen=True)
class Text:
    """A heading, a paragraph, or lines to keep as they are."""

    text: str
    kind: str = "p"  # h1, h2, lead, p, note, pre, or md: a person's own Markdown
    term: str = ""  # bold, right before the text


@dataclass(frozen=True)
class Items:
    """A list."""

    points: Sequence[Text]


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    tint: str | None = None  # in HTML alone
    bold: bool = False
    italic: bool = False
    mono: bool = False
    term: str = ""  # bold, right before the text

    @classmethod
    def verdict(cls, is_met: bool | None) -> Self:
        """Verdict on what was asked; None: not measured."""
        said, tint = _VERDICTS[is_met]
        return cls(said, tint, bold=is_met is False)


Row = Sequence[Cell | str]


@dataclass(frozen=True)
class Table:
    """A table; its caption stands above it, and the first cell of a row is its heading."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Row]
    align: str = "l"  # l, or r for numbers, by column; the last letter is for all that follow

    @classmethod
    def of(cls, caption: str, rows: Sequence[Mapping[str, Cell | str]], align: str) -> Self:
        """A table of rows by heading, those of the longest row; a row may lack some."""
        longest = max(rows, key=len) if rows else {}
        head = list(longest)
        return cls(caption, head, [[row.get(h, "–") for h in head] for row in rows], align)

    def columns(self) -> list[tuple[str, bool]]:
        """Each heading, and whether there are numbers below it."""
        letters = self.align.ljust(len(self.head), self.align[-1])
        return [(h, letter == "r") for h, letter in zip(self.head, letters, strict=False)]

    def lines(self) -> list[list[tuple[Cell, bool]]]:
        """Each row's cells, and whether they are among numbers."""
        return [
            [
                (cell if isinstance(cell, Cell) else Cell(cell), is_number)
                for cell, (_, is_number) in zip(row, self.columns(), strict=True)
            ]
            for row in self.rows
        ]


@dataclass(frozen=True)
class Picture:
    """A figure with its text for those who do not see it."""

    name: str  # NAME.png beside the page
    figure: Figure
    alt: str
    caption: str
    term: str = ""  # bold, right before the caption

    def width_pixels(self) -> int:
        """Width on the page, in pixels."""
        return round(self.figure.get_figwidth() * 98)


@dataclass(frozen=True)
class Sample:
    """A text that a model went on with, with and without one owner."""

    source: str
    colour: str
    prompt: str
    parts: tuple[str, str]  # with the source, without it
    mono: bool


@dataclass(frozen=True)
class Marked:
    """A text in pieces one after another, with a mark on those that have a note."""

    pieces: Sequence[tuple[str, str]]  # text, note or nothing


@dataclass(frozen=True)
class Link:
    """A line that leads to another file of the same run, named as seen from the page."""

    text: str
    path: str

    @property
    def target(self) -> str:
        """The path as an address, which can be no other host and no script."""
        return quote(self.path)


@dataclass(frozen=True)
class Fold:
    """A part that is shown when asked for."""

    title: str
    inside: Text | Table


Block = Text | Items | Table | Picture | Sample | Marked | Link | Fold


def save_page(blocks: Iterable[Block], *paths: Path) -> Path:
    """Write the page as each of `paths`, in the form of its ending, .html or .md; the first path.

    The pictures lie beside the page, as PNG and SVG; HTML holds them too. All files are replaced
    whole, and the pages last.
    """
    blocks, images = list(blocks), {}
    for block in blocks:
        if isinstance(block, Picture):
            picture = paths[0].parent / f"{block.name}.png"
            save_figure(block.figure, picture)
            images[block.name] = picture.read_bytes()
    for path in paths:
        write_bytes(path, render_page(blocks, path.suffix[1:], images).encode())
    return paths[0]


def render_page(blocks: Sequence[Block], form: str, images: Mapping[str, bytes]) -> str:
    """The page as "html" or "md"; `images` has each picture's PNG by its name."""
    encoded = {name: base64.b64encode(image).decode() for name, image in images.items()}
    page = _template(form).render(blocks=blocks, images=encoded)
    return page.strip() + "\n"


@cache
def _template(form: str) -> Template:
    """The template of "html" or "md" pages, compiled."""
    make_safe = {"html": make_printable, "md": escape_markdown}[form]
    environment = Environment(
        loader=PackageLoader("flexolmo.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: make_safe(value) if type(value) is str else value,
    )
    environment.filters |= {"breakable": _breakable, "indented": _indented, "marked": _marked}
    return environment.get_template(f"page.{form}")


def escape_markdown(text: str) -> Markup:
    """`text` on one line, with nothing in it that Markdown or HTML would act on."""
    shown = make_printable(text).replace("\n", " ").translate(_ESCAPES)
    return Markup(re.sub(r"^(\s*\d*)([-+.)])(?=[\s-]|$)", r"\1\\\2", shown))  # no list


def _breakable(text: str) -> Markup:
    """`text` escaped, with a place for a new line after every _ of a long name."""
    return Markup(str(escape(make_printable(text))).replace("_", "_<wbr>"))


def _marked(text: str, mark: str) -> Markup:
    """`text` escaped, without the spaces around it, between two `mark`s of Markdown."""
    shown = escape_markdown(text).strip()
    return Markup(f"{mark}{shown}{mark}" if shown else "")


def _indented(text: str) -> Markup:
    """Lines that Markdown shows as they are."""
    return Markup("\n".join(f"    {line}" for line in make_printable(text).split("\n")))
