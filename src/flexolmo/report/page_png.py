"""The blocks of a page drawn as one picture, for those who look at no HTML.

Samples are cut where they would make the picture endless. Widths are those of the letters as they
will be drawn, so that no line leaves its column. Knows nothing of results.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg, get_hinting_flag
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.transforms import IdentityTransform

from flexolmo.report import drawing
from flexolmo.report.drawing import INK, MUTED, RULE, make_drawable
from flexolmo.report.page import Block, Cell, Picture, Sample, Table, Text

PAGE_PX, MARGIN_PX = 1600, 60
_BODY_PX = 18
_MAX_DRAWN_LETTERS, _MAX_DRAWN_LINES = 900, 30  # of a sample; the HTML has all of it


@functools.lru_cache(maxsize=16384)
def _advance(letter: str, size: float, mono: bool, bold: bool) -> float:
    """Width in pixels of a letter of `size` pixels, rounded as drawing rounds it."""
    font = get_font(
        findfont(FontProperties(family=_family(mono), weight="bold" if bold else "normal"))
    )
    font.set_size(size * 0.72, 100)
    return font.load_char(ord(letter), flags=get_hinting_flag()).horiAdvance / 64


def _family(mono: bool) -> str:
    return "DejaVu Sans Mono" if mono else "DejaVu Sans"


def _width(text: str, size: float, mono: bool = False, bold: bool = False) -> float:
    return sum(_advance(c, size, mono, bold) for c in text)


def _wrap(
    text: str, width: float, size: float, mono: bool = False, bold: bool = False
) -> list[str]:
    """Lines of `text` at most `width` pixels wide; blanks are kept, long words are cut."""
    lines = []
    for paragraph in make_drawable(text, _family(mono)).split("\n"):
        line = ""
        for word in re.findall(r"\S+ *| +", paragraph):
            if line and _width(line + word.rstrip(), size, mono, bold) > width:
                lines.append(line)
                line = ""
            while _width(word.rstrip(), size, mono, bold) > width and len(word) > 1:
                cut = max(
                    1,
                    next(
                        i
                        for i in range(1, len(word) + 1)
                        if _width(word[:i], size, mono, bold) > width
                    )
                    - 1,
                )
                lines.append(word[:cut])
                word = word[cut:]
            line += word
        lines.append(line)
    return lines


class _Sheet:
    """A page drawn from the top; y runs down in pixels, and the height is known at the end."""

    def __init__(self) -> None:
        self.y = float(MARGIN_PX)
        self.texts: list[tuple[float, float, str, dict[str, Any]]] = []
        self.boxes: list[tuple[float, float, float, float, str, float]] = []
        self.images: list[tuple[float, float, np.ndarray]] = []

    def write(
        self,
        text: str,
        x: float,
        y: float,
        width: float,
        size: float = _BODY_PX,
        colour: str = INK,
        mono: bool = False,
        bold: bool = False,
        is_right: bool = False,
    ) -> float:
        """Write wrapped text with its top at `y`; the y below it."""
        for line in _wrap(text, width, size, mono, bold):
            self.texts.append(
                (
                    x + width * is_right,
                    y + 1.05 * size,
                    line.rstrip(),
                    {
                        "fontsize": size * 0.72,
                        "color": colour,
                        "family": _family(mono),
                        "fontweight": "bold" if bold else "normal",
                        "ha": "right" if is_right else "left",
                    },
                )
            )
            y += 1.42 * size
        return y

    def finish(self) -> Figure:
        height = math.ceil(self.y + MARGIN_PX)
        with rc_context(drawing.STYLE):
            fig = Figure(figsize=(PAGE_PX / 100, height / 100), dpi=100)
            FigureCanvasAgg(fig)
            pixels = IdentityTransform()
            for x, y, w, h, colour, alpha in self.boxes:
                fig.add_artist(
                    Rectangle(
                        (x, height - y - h),
                        w,
                        h,
                        lw=0,
                        facecolor=colour,
                        alpha=alpha,
                        transform=pixels,
                    )
                )
            for x, y, image in self.images:
                fig.figimage(image, round(x), round(height - y - image.shape[0]))
            for x, y, text, how in self.texts:
                fig.text(x, height - y, text, transform=pixels, va="baseline", **how)
        return fig


def draw_page(blocks: Sequence[Block]) -> Figure:
    """All blocks below one another, on a sheet `PAGE_PX` wide and as high as they need."""
    sheet, wide = _Sheet(), PAGE_PX - 2 * MARGIN_PX
    for block in blocks:
        if isinstance(block, Text):
            size = {"h1": 38, "h2": 26, "lead": 21, "note": 17}.get(block.kind, _BODY_PX)
            if block.kind == "h2":
                sheet.y += 34
                sheet.boxes.append((MARGIN_PX, sheet.y, wide, 1, RULE, 1))
                sheet.y += 20
            sheet.y = 10 + sheet.write(
                block.text,
                MARGIN_PX,
                sheet.y,
                wide,
                size,
                MUTED if block.kind == "note" else INK,
                bold=block.kind in ("h1", "h2"),
            )
        elif isinstance(block, Table):
            _draw_table(sheet, block, wide)
        elif isinstance(block, Picture):
            block.figure.set_dpi(wide / drawing.MAX_WIDTH_INCHES)
            canvas = FigureCanvasAgg(block.figure)
            canvas.draw()
            image = np.asarray(canvas.buffer_rgba()).copy()
            sheet.images.append((MARGIN_PX, sheet.y + 14, image))
            sheet.y = (
                sheet.write(
                    block.caption, MARGIN_PX, sheet.y + image.shape[0] + 24, wide, 16, MUTED
                )
                + 20
            )
        elif isinstance(block, Sample):
            _draw_sample(sheet, block, wide)
        else:
            sheet.y = (
                sheet.write(
                    f"{block.title}: in report.html and results.json.",
                    MARGIN_PX,
                    sheet.y,
                    wide,
                    16,
                    MUTED,
                )
                + 10
            )
    return sheet.finish()


def _draw_table(sheet: _Sheet, table: Table, wide: float) -> None:
    size, pad = 15.5, 10.0
    head = [
        Cell(h, bold=True, number=any(r[i].number for r in table.rows))
        for i, h in enumerate(table.head)
    ]
    grid = [head, *table.rows]
    # Narrow columns get what they ask for; the widest share what is left.
    asked = [
        min(
            760.0,
            3
            + max(
                _width(make_drawable(line, _family(c.mono)), size, c.mono, c.bold)
                for c in column
                for line in (
                    c.text.split("\n")
                    if c is not column[0]
                    else [max(c.text.split() or [""], key=len)]
                )
            ),
        )
        for column in zip(*grid, strict=True)
    ]
    room, share = wide - 2 * pad * len(asked), max(asked, default=0.0)
    while sum(min(a, share) for a in asked) > room:
        share *= 0.98
    widths = [min(a, share) for a in asked]
    sheet.y = sheet.write(table.caption, MARGIN_PX, sheet.y + 6, wide, 16, MUTED) + 6
    for i, row in enumerate(grid):
        x, top, bottom, tints = float(MARGIN_PX), sheet.y, sheet.y, []
        for cell, width in zip(row, widths, strict=True):
            end = sheet.write(
                cell.text,
                x + pad,
                top + 5,
                width,
                size,
                INK if i else MUTED,
                cell.mono,
                cell.bold,
                cell.number,
            )
            tints.append((x, width + 2 * pad, cell.tint))
            x, bottom = x + width + 2 * pad, max(bottom, end + 5)
        sheet.boxes += [(a, top, w, bottom - top, tint, 0.2) for a, w, tint in tints if tint]
        sheet.boxes.append((MARGIN_PX, bottom, x - MARGIN_PX, 1 if i else 2, RULE, 1))
        sheet.y = bottom + 1
    sheet.y += 22


def _draw_sample(sheet: _Sheet, sample: Sample, wide: float) -> None:
    column, top, bottom = (wide - 30) / 2, sheet.y + 10, sheet.y
    for i, (word, text) in enumerate(zip(("with", "without"), sample.parts, strict=True)):
        x = MARGIN_PX + i * (column + 30)
        y = sheet.write(f"{word} {sample.source}", x + 16, top + 14, column - 32, 17, bold=True)
        for part, colour in ((sample.prompt.removesuffix("\n"), MUTED), (text, INK)):
            short = "\n".join(part[:_MAX_DRAWN_LETTERS].split("\n")[:_MAX_DRAWN_LINES])
            short += " …" if len(short) < len(part) else ""
            y = sheet.write(short, x + 16, y + 4, column - 32, 15.5, colour, sample.mono)
        bottom = max(bottom, y + 14)
    for i, colour in enumerate((sample.colour, RULE)):
        x = MARGIN_PX + i * (column + 30)
        sheet.boxes += [
            (x, top, column, bottom - top, "#f6f8fa", 1),
            (x, top, column, 4, colour, 1),
        ]
    sheet.y = bottom + 18
