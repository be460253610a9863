"""Every figure draws from any results a run can leave, and is written whole."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from flexolmo.report import drawing, plots

PLOTS = (
    plots.plot_bits_per_byte,
    plots.plot_optout_matrix,
    plots.plot_routing,
    plots.plot_kept_gain,
)
MakeResults = Callable[..., dict[str, Any]]


def assert_nothing_is_cut_or_overlaps(fig: Figure) -> None:
    """Every text lies inside the figure; tick labels of an axis do not overlap."""
    fig.canvas.draw()
    renderer = fig.canvas.get_renderer()  # type: ignore[attr-defined]
    bounds = fig.bbox.padded(1)
    for ax in fig.axes:
        if not ax.axison:
            continue
        box = ax.get_tightbbox(renderer)
        assert box is not None
        assert bounds.x0 <= box.x0 and box.x1 <= bounds.x1, (box, bounds)
        assert bounds.y0 <= box.y0 and box.y1 <= bounds.y1, (box, bounds)
        shown = [t.get_window_extent(renderer) for t in ax.get_yticklabels() if t.get_text()]
        for one, other in pairwise(shown):
            assert not one.overlaps(other)


@pytest.mark.parametrize("owners", [1, 7])
@pytest.mark.parametrize("plot", PLOTS, ids=lambda p: p.__name__)
def test_each_figure_holds_one_or_seven_owners(
    plot: Any, owners: int, make_results: MakeResults
) -> None:
    fig = plot(make_results(owners))
    assert fig.get_figwidth() <= drawing.MAX_WIDTH_INCHES
    assert_nothing_is_cut_or_overlaps(fig)


@pytest.mark.parametrize("plot", PLOTS, ids=lambda p: p.__name__)
@pytest.mark.parametrize("left_out", ["paper_router", "owners", "bits_per_byte", None])
def test_what_is_missing_is_left_out(
    plot: Any, left_out: str | None, make_results: MakeResults
) -> None:
    results = make_results(1) if left_out else {}
    results.pop(left_out or "", None)
    assert isinstance(plot(results), Figure)


@pytest.mark.parametrize("plot", PLOTS, ids=lambda p: p.__name__)
def test_unmeasured_numbers_leave_a_gap(plot: Any, make_results: MakeResults) -> None:
    results = make_results()
    results["bits_per_byte"]["mixture"]["code"] = None
    del results["bits_per_byte"]["mixture without forum"]
    del results["bits_per_byte"]["expert maths"]
    results["routing"]["weights"]["code"][0][1] = None
    plot(results).canvas.draw()


def texts_of(fig: Figure) -> list[str]:
    return [t.get_text() for ax in fig.axes for t in ax.texts]


def test_the_matrix_prints_change_against_the_anchor_in_percent() -> None:
    results = {
        "bits_per_byte": {
            "anchor": {"public": 2.0, "code": 4.0},
            "mixture": {"public": 2.01, "code": 3.0},
            "mixture without code": {"public": 2.0, "code": 3.9999},
        }
    }
    fig = plots.plot_optout_matrix(results | {"owners": [{"name": "code"}]})
    assert texts_of(fig) == ["+0.5", "−25.0", "0.0", "0.0"]
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["our router"]


def test_the_papers_router_is_a_second_panel(make_results: MakeResults) -> None:
    fig = plots.plot_optout_matrix(make_results(1))
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["our router", "the paper's router"]


def test_kept_gain_is_the_mixtures_gain_over_the_pairs() -> None:
    results = {
        "bits_per_byte": {
            "anchor": {"code": 4.0},
            "expert code": {"code": 3.0},
            "mixture": {"code": 3.25},
        }
    }
    assert texts_of(plots.plot_kept_gain(results)) == ["75\u00a0% kept, ours"]


def test_a_mixture_worse_than_the_anchor_is_drawn_left_of_zero(make_results: MakeResults) -> None:
    fig = plots.plot_kept_gain(make_results(1, paper_kept=-0.4))
    assert fig.axes[0].get_xlim()[0] < -1


def test_a_router_that_ignores_layers_is_said_to(make_results: MakeResults) -> None:
    results = make_results(1)
    assert "all layers" in plots.plot_routing(results).get_supxlabel()
    assert "all layers" not in plots.plot_routing(results, paper=True).get_supxlabel()


def make_curve(series: int = 3, points: int = 5) -> dict[str, Any]:
    """A size-quality curve as `measure_curve` returns it."""
    kinds = ("FFN of low rank", "FFN and deltas of low rank", "narrow FFN")
    return {
        "set": "maths",
        "whole_bytes": 7_300_000,
        "bits_per_byte": {"anchor": 2.2, "whole": 1.7},
        "points": [
            {
                "series": kind,
                ("width" if "narrow" in kind else "rank"): 2 ** (i + 1),
                "bytes": (j + 1) * 100_000 + i * 900_000,
                "bits_per_byte": 2.15 - 0.1 * i,
            }
            for j, kind in enumerate(kinds[:series])
            for i in range(points)
        ],
    }


@pytest.mark.parametrize("series", [0, 1, 3])
def test_a_curve_shows_every_point_between_the_anchor_and_the_whole_expert(series: int) -> None:
    fig = plots.plot_compression(make_curve(series))
    assert_nothing_is_cut_or_overlaps(fig)
    shown = texts_of(fig)
    assert shown == [
        *["2", "4", "8", "16", "32"] * series,
        "the anchor alone",
        "the expert as it was",
    ]
    assert "maths" in fig.axes[0].get_ylabel()
    for lacking in ("set", "whole_bytes", "bits_per_byte", "points"):
        curve = make_curve(series)
        del curve[lacking]
        plots.plot_compression(curve).canvas.draw()


def test_many_layers_are_drawn_without_numbers(make_results: MakeResults) -> None:
    fig = plots.plot_routing(make_results(1, num_layers=32))
    assert texts_of(fig) == []
    assert_nothing_is_cut_or_overlaps(fig)


def test_every_owner_has_a_colour_of_its_own_and_public_is_grey(make_results: MakeResults) -> None:
    colours = plots.owner_colours(make_results(7))
    assert list(colours) == ["public", *plots.owner_names(make_results(7))]
    assert len(set(colours.values())) == 8
    assert colours["public"] == drawing.GREY


def test_public_is_the_first_set_and_never_an_owner(make_results: MakeResults) -> None:
    results = make_results()
    results["owners"].insert(0, {"name": "public"})
    assert plots.set_names(results) == ["public", "code", "forum", "maths"]
    assert plots.owner_names(results) == ["code", "forum", "maths"]


def test_a_letter_that_the_font_lacks_is_marked() -> None:
    assert drawing.make_drawable("né 漢", "DejaVu Sans") == "né \ufffd"


def test_a_figure_is_saved_whole_and_twice_the_same(
    tmp_path: Path, make_results: MakeResults
) -> None:
    for name in ("one.png", "two.png"):
        drawing.save_figure(plots.plot_kept_gain(make_results(1)), tmp_path / "new" / name)
    one, two = ((tmp_path / "new" / n).read_bytes() for n in ("one.png", "two.png"))
    assert one.startswith(b"\x89PNG") and one == two
    one, two = ((tmp_path / "new" / n).read_bytes() for n in ("one.svg", "two.svg"))
    assert b"<svg" in one and one == two
    assert len(list((tmp_path / "new").iterdir())) == 4
