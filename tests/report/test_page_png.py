"""The drawn page keeps every word on the page and ends somewhere."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from flexolmo.report import page_png
from flexolmo.report.page import Picture, Sample
from flexolmo.report.page_png import MARGIN_PX, draw_page
from flexolmo.research.demo import report

MakePage = Callable[..., dict[str, Any]]


@pytest.mark.usefixtures("no_figures")
def test_nothing_drawn_leaves_the_page(make_page: MakePage) -> None:
    blocks = [b for b in report._blocks(make_page(7)) if not isinstance(b, Picture)]
    fig = draw_page(blocks)
    renderer = FigureCanvasAgg(fig).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in fig.texts]
    for text, box in zip(fig.texts, boxes, strict=True):
        assert box.x0 >= MARGIN_PX - 2 and box.x1 <= 1602 - MARGIN_PX, text
    for (one, other), (here, there) in zip(pairwise(fig.texts), pairwise(boxes), strict=True):
        below = one.get_position()[1] - other.get_position()[1]
        assert below > 15 or here.x1 < there.x0 + 1


@pytest.mark.parametrize("mono", [False, True])
@pytest.mark.parametrize("size", [15.5, 17, 18])
def test_a_line_is_as_wide_as_was_reckoned(size: float, mono: bool) -> None:
    text = "This paper presents our semantic parsing system for the evaluation task of open domain"
    fig = draw_page([])
    drawn = fig.text(0, 0, text, fontsize=size * 0.72, family=page_png._family(mono))
    width = drawn.get_window_extent(FigureCanvasAgg(fig).get_renderer()).width
    assert width == pytest.approx(page_png._width(text, size, mono), abs=2)


def test_a_sample_of_line_ends_does_not_make_the_png_endless() -> None:
    sample = Sample("code", "#0072B2", "", ("\n" * 100_000, "x" * 100_000), False)
    assert draw_page([sample]).get_figheight() * 100 < 1200


def test_lines_are_cut_at_the_width_and_blanks_kept() -> None:
    lines = page_png._wrap("    if x:\n" + "y" * 300 + " z", 200, 16, mono=True)
    assert lines[0] == "    if x:"
    assert "".join(lines[1:]) == "y" * 300 + " z"
    assert all(page_png._width(line.rstrip(), 16, mono=True) <= 200 for line in lines)
