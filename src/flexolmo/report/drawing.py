"""The look of every figure: colours, lettering, and the parts that figures are made of.

Figures are at most `MAX_WIDTH_INCHES` wide and meant for one scale, so that letters match
between them. Names come from owners: they are made printable and never read as mathematics.
"""

import functools
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from flexolmo.files import write_aside
from flexolmo.terminal import make_printable

MAX_WIDTH_INCHES = 11.0
INK, MUTED, RULE, GREY = "#1f2328", "#59636e", "#d1d9e0", "#767676"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "xtick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.unicode_minus": True,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "savefig.facecolor": "white",
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "flexolmo",  # the same names of parts in every run
}


def styled(plot: Callable[..., Figure]) -> Callable[..., Figure]:
    """`plot` drawn in the house's style, whatever the caller's settings are."""

    @functools.wraps(plot)
    def draw(*args: Any, **kwargs: Any) -> Figure:
        with rc_context(STYLE):
            fig = plot(*args, **kwargs)
        FigureCanvasAgg(fig)
        return fig

    return draw


def save_figure(fig: Figure, path: Path, dpi: int = 160, *, is_private: bool = False) -> None:
    """Write `fig` as `path`, a PNG, and as an SVG beside it, each all or nothing, with no date.

    Its parts are laid out once, for both: `savefig` would draw all of it once more for each.
    """
    path = Path(path)
    with rc_context(STYLE):
        fig.set_dpi(dpi)
        fig.draw_without_rendering()
        fig.set_layout_engine("none")
        with write_aside(path.with_suffix(".png"), is_private=is_private) as aside:
            FigureCanvasAgg(fig).print_png(aside)
        with write_aside(path.with_suffix(".svg"), is_private=is_private) as aside:
            FigureCanvasSVG(fig).print_svg(aside, metadata={"Date": None})


# --- text ------------------------------------------------------------------------------------


def make_drawable(text: Any, font: str) -> str:
    """`text` as `make_printable` shows it, with U+FFFD for what `font` cannot draw."""
    shown = make_printable(text)
    return "".join(c if c == "\n" or _has_glyph(font, c) else "\ufffd" for c in shown)


@functools.lru_cache(maxsize=65536)
def _has_glyph(font: str, character: str) -> bool:
    return bool(get_font(findfont(font)).get_char_index(ord(character)))


def wrap_name(name: str, width: int, max_lines: int = 3) -> str:
    """A name for an axis, wrapped to `width` letters and at most `max_lines` lines."""
    text = make_drawable(name, "DejaVu Sans").replace("\n", " ").replace("_", "_ ")
    lines = [line.replace("_ ", "_") for line in textwrap.wrap(text, width)] or ["?"]
    if len(lines) > max_lines:
        rest = " ".join(lines[max_lines - 1 :]).replace("_ ", "_")
        lines = [*lines[: max_lines - 1], rest[: width - 1].rstrip() + "…"]
    return "\n".join(lines)


def darken_for_text(colour: str) -> str:
    """`colour`, darkened until letters in it have a contrast of 4.5 to 1 on white. Source: WCAG."""
    rgb = np.array(to_rgb(colour))
    while (
        np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        @ [0.2126, 0.7152, 0.0722]
        > 1.05 / 4.5 - 0.05
    ):
        rgb = rgb * 0.96
    return to_hex((rgb[0], rgb[1], rgb[2]))


# --- parts of figures ------------------------------------------------------------------------


def draw_cells(ax: Axes, values: np.ndarray, colours: str, low: float, high: float) -> np.ndarray:
    """Draw a matrix as cells with white gaps; the cells' colours [rows, columns, 4]."""
    image = ax.imshow(
        np.ma.masked_invalid(values),
        cmap=colours,
        vmin=low,
        vmax=high,
        aspect="auto",
        interpolation="nearest",
    )
    ax.set_facecolor("#eeeeee")
    for edge in range(1, values.shape[1]):
        ax.axvline(edge - 0.5, color="white", lw=1.5)
    for edge in range(1, values.shape[0]):
        ax.axhline(edge - 0.5, color="white", lw=1.5 if len(values) <= 12 else 0.4)
    for spine in ax.spines.values():
        spine.set_visible(False)
    no_ticks(ax, "both")
    colour = image.to_rgba(np.ma.masked_invalid(values))
    colour[~np.isfinite(values)] = 1.0
    return colour


def no_ticks(ax: Axes, axis: Any) -> None:
    """Labels without their ticks, along "x", "y" or "both"."""
    ax.tick_params(axis=axis, length=0)


def write_cell(ax: Axes, x: int, y: float, text: str, ground: np.ndarray, size: float) -> None:
    """Write `text` at column x, row y, in what reads best on `ground` (RGBA)."""
    ink = "white" if ground[:3] @ [0.299, 0.587, 0.114] < 0.52 else INK
    ax.text(x, y, text, ha="center", va="center", color=ink, fontsize=size)


def outline(ax: Axes, x: int, y: int, colour: str, height: int = 1) -> None:
    """A frame round the cell at column x, row y, and the `height` - 1 below it."""
    ax.add_patch(
        Rectangle(
            (x - 0.46, y - 0.44),
            0.92,
            height - 0.12,
            fill=False,
            lw=2.2,
            edgecolor=colour,
            zorder=4,
            clip_on=False,
        )
    )


def label_columns(
    ax: Axes, names: list[str], colours: Mapping[str, str], width: int, slanted: bool
) -> None:
    """Column names below the cells, each in its owner's colour; slanted where they are close."""
    texts = [wrap_name(n, 15, 1) if slanted else wrap_name(n, width) for n in names]
    ax.set_xticks(range(len(names)), texts)
    colour_labels(ax.get_xticklabels(), names, colours, 8.5)
    if slanted:
        for label in ax.get_xticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor")


def colour_labels(
    labels: Iterable[Text], names: Sequence[str], colours: Mapping[str, str], size: float
) -> None:
    """Write names on an axis bold, each in its owner's colour."""
    for label, name in zip(labels, names, strict=True):
        label.set(color=darken_for_text(colours.get(name, INK)), fontweight="bold", fontsize=size)


def list_rows(ax: Axes, names: Sequence[str], pitch: float, below: str) -> None:
    """Names down the left side, `pitch` apart, a grid of values, and `below` what these are."""
    ax.set_yticks([pitch * i for i in range(len(names))], [wrap_name(n, 22) for n in names])
    no_ticks(ax, "y")
    ax.grid(axis="x")
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(below)


def note(ax: Axes, text: str, xy: tuple[Any, Any], offset: tuple[float, float], **how: Any) -> None:
    """Write `text` in small letters, `offset` points from `xy`."""
    ax.annotate(text, xy, xytext=offset, textcoords="offset points", **{"fontsize": 8.5, **how})


def note_below(fig: Figure, text: str) -> None:
    """Write what there is to know about the whole figure below it."""
    fig.supxlabel(text, fontsize=9, color=MUTED, x=0.01, ha="left")


def make_handle(label: str, marker: str, edge: str, face: str, size: float, width: float) -> Line2D:
    """A marker for a legend; `size` and the edge's `width` in points."""
    how: dict[str, Any] = {"ms": size, "mew": width, "mec": edge, "mfc": face}
    return Line2D([], [], ls="", marker=marker, label=label, **how)


def draw_legend(fig: Figure, columns: int, **how: Any) -> None:
    """Draw the legend above all else of the figure."""
    fig.legend(loc="outside upper left", ncols=columns, **how)
