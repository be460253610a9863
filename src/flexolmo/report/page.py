"""The parts of a page, and the page as one HTML file.

A page is a list of blocks. The HTML loads nothing from anywhere and runs no script; a policy in its
head forbids both. Everything shown goes through `make_printable` and is escaped: it may be what a
model wrote. Knows nothing of results.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from flexolmo.terminal import make_printable


@dataclass(frozen=True)
class Text:
    """A heading or a paragraph."""

    text: str
    kind: str = "p"  # h1, h2, lead, p or note


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    tint: str | None = None
    bold: bool = False
    mono: bool = False
    number: bool = False


@dataclass(frozen=True)
class Table:
    """A table with a caption."""

    caption: str
    head: list[str]
    rows: list[list[Cell]]  # the first cell of a row is its heading

    def columns(self) -> list[tuple[str, bool]]:
        """Each heading, and whether there are numbers below it."""
        return [(h, any(r[i].number for r in self.rows)) for i, h in enumerate(self.head)]


@dataclass(frozen=True)
class Picture:
    """A figure with its text for those who do not see it."""

    name: str  # figures/NAME.png
    figure: Figure
    alt: str
    caption: str

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
class Fold:
    """A text that is shown when asked for."""

    title: str
    text: str


Block = Text | Table | Picture | Sample | Fold


def _breakable(text: str) -> Markup:
    """`text` escaped, with a place for a new line after every _ of a long name."""
    return Markup(str(escape(make_printable(text))).replace("_", "_<wbr>"))


def write_html(blocks: Sequence[Block], images: Mapping[str, bytes]) -> str:
    """The page; `images` has each picture's PNG by its name."""
    environment = Environment(
        loader=PackageLoader("flexolmo.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: make_printable(value) if type(value) is str else value,
    )
    environment.filters["breakable"] = _breakable
    encoded = {name: base64.b64encode(image).decode() for name, image in images.items()}
    return environment.get_template("page.html").render(
        blocks=[(type(block).__name__, block) for block in blocks], images=encoded
    )
