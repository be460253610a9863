"""Every figure draws from any results a run can leave, and is written whole."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from flexolmo import plots

PLOTS = (plots.plot_bits_per_byte, plots.plot_optout_matrix, plots.plot_routing,
         plots.plot_kept_gain)
SHORT = ("code", "forum", "maths")
LONG = ("code", "clinical_trial_reports_2024", "news", "parliament debates and minutes", "maths",
        "poems", "a$b_{x}$\u202e")


def make_results(names: tuple[str, ...] = SHORT, kept: float = 0.93, paper_kept: float | None = 0.4,
                 num_layers: int = 4, seed: int = 0) -> dict[str, Any]:
    """Plausible results of a demo with these owners; numbers are made up by a formula."""
    rng = np.random.default_rng(seed)
    sets = ["public", *names]
    anchor = {s: round(2.1 + 0.25 * i, 3) for i, s in enumerate(sets)}
    gain = {s: 0.12 + 0.22 * float(rng.random()) for s in names}

    def rows(share: float, noise: float) -> dict[str, dict[str, float]]:
        def row(on: tuple[str, ...], part: float) -> dict[str, float]:
            return {s: anchor[s] * (1 - (part * gain[s] if s in on else 0.0)
                                    + noise * float(rng.normal())) for s in sets}
        found = {f"expert {n}": row((n,), 1.0) for n in names}
        found["mixture"] = row(names, share)
        for n in names:
            found[f"mixture without {n}"] = row(tuple(m for m in names if m != n), share)
        return found

    def routing(spread: float, same: bool) -> dict[str, Any]:
        weights = {}
        for s in sets:
            layers = []
            for _ in range(1 if same else num_layers):
                w = rng.random(len(sets)) * spread + 3.0 * (np.array(sets) == s) + 0.05
                layers.append((w / w.sum()).round(4).tolist())
            weights[s] = layers * (num_layers if same else 1)
        return {"sets": sets, "experts": sets, "weights": weights}

    def summary(bits: dict[str, dict[str, float]]) -> dict[str, Any]:
        kept_of = {n: (anchor[n] - bits["mixture"][n]) / (anchor[n] - bits[f"expert {n}"][n])
                   for n in names}
        return {
            "kept_of_pair_gain": {**kept_of, "mean": sum(kept_of.values()) / len(names)},
            "public_change": bits["mixture"]["public"] / anchor["public"] - 1,
            "optout_vs_anchor": {n: bits[f"mixture without {n}"][n] / anchor[n] - 1
                                 for n in names},
            "optout_side_effect": {n: max((bits[f"mixture without {n}"][s] / bits["mixture"][s] - 1
                                           for s in sets if s != n), key=abs) for n in names},
        }

    ours = {"anchor": anchor, **rows(kept, 0.002)}
    results: dict[str, Any] = {
        "bits_per_byte": ours, "summary": summary(ours), "routing": routing(0.1, True),
        "owners": [{
            "name": n, "owner": f"{n.title()} House", "set_description": f"text about {n}",
            "documents": 1200 + 77 * i, "tokens": 510_000 + 9_000 * i, "tokens_seen": 983_040,
            "seconds": 61.5 + i, "licence": "Python-2.0", "terms": "research only",
            "bundle_bytes": 4_720_000, "key_id": "ed25519:" + "9f" * 16,
            "sources": [f"{n} standard library"]} for i, n in enumerate(names)],
        "seconds": {"data": 41.0, "anchor": 190.2,
                    **{f"expert {n}": 61.5 for n in names}, "total": 480.1},
        "seed": seed,
    }
    results["summary"]["bars"] = [
        {"text": "mixture better than the anchor on every owner's set", "met": True,
         "value": f"{len(names)} of {len(names)}"},
        {"text": "at least 90 % of each pair's gain is kept", "met": False, "value": "87 %"}]
    if paper_kept is not None:
        paper = rows(paper_kept, 0.004)
        results["paper_router"] = {"bits_per_byte": paper, "routing": routing(4.0, False),
                                   "summary": summary({"anchor": anchor, **paper})}
    return results


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


@pytest.mark.parametrize("names", [SHORT[:1], LONG], ids=["1", "7"])
@pytest.mark.parametrize("plot", PLOTS, ids=lambda p: p.__name__)
def test_each_figure_holds_one_or_seven_owners(plot: Any, names: tuple[str, ...]) -> None:
    fig = plot(make_results(names))
    assert fig.get_figwidth() <= plots.MAX_WIDTH_INCHES
    assert_nothing_is_cut_or_overlaps(fig)


@pytest.mark.parametrize("plot", PLOTS, ids=lambda p: p.__name__)
@pytest.mark.parametrize("left_out", ["paper_router", "owners", "bits_per_byte", None])
def test_what_is_missing_is_left_out(plot: Any, left_out: str | None) -> None:
    results = make_results() if left_out else {}
    results.pop(left_out or "", None)
    assert isinstance(plot(results), Figure)


@pytest.mark.parametrize("plot", PLOTS, ids=lambda p: p.__name__)
def test_unmeasured_numbers_leave_a_gap(plot: Any) -> None:
    results = make_results()
    results["bits_per_byte"]["mixture"]["code"] = None
    del results["bits_per_byte"]["mixture without forum"]
    del results["bits_per_byte"]["expert maths"]
    results["routing"]["weights"]["code"][0][1] = None
    plot(results).canvas.draw()


def texts_of(fig: Figure) -> list[str]:
    return [t.get_text() for ax in fig.axes for t in ax.texts]


def test_the_matrix_prints_change_against_the_anchor_in_percent() -> None:
    results = {"bits_per_byte": {
        "anchor": {"public": 2.0, "code": 4.0}, "mixture": {"public": 2.01, "code": 3.0},
        "mixture without code": {"public": 2.0, "code": 3.9999}}}
    fig = plots.plot_optout_matrix(results | {"owners": [{"name": "code"}]})
    assert texts_of(fig) == ["+0.5", "−25.0", "0.0", "0.0"]
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["our router"]


def test_the_papers_router_is_a_second_panel() -> None:
    fig = plots.plot_optout_matrix(make_results())
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["our router", "the paper's router"]


def test_kept_gain_is_the_mixtures_gain_over_the_pairs() -> None:
    results = {"bits_per_byte": {"anchor": {"code": 4.0}, "expert code": {"code": 3.0},
                                 "mixture": {"code": 3.25}}}
    assert texts_of(plots.plot_kept_gain(results)) == ["75 % kept, ours"]


def test_a_mixture_worse_than_the_anchor_is_drawn_left_of_zero() -> None:
    fig = plots.plot_kept_gain(make_results(paper_kept=-0.4))
    assert fig.axes[0].get_xlim()[0] < -1


def test_a_router_that_ignores_layers_is_said_to() -> None:
    results = make_results()
    assert "all layers" in plots.plot_routing(results).get_supxlabel()
    assert "all layers" not in plots.plot_routing(results, paper=True).get_supxlabel()


def test_many_layers_are_drawn_without_numbers() -> None:
    fig = plots.plot_routing(make_results(SHORT[:1], num_layers=32))
    assert texts_of(fig) == []
    assert_nothing_is_cut_or_overlaps(fig)


def test_every_owner_has_a_colour_of_its_own_and_public_is_grey() -> None:
    colours = plots.owner_colours(make_results(LONG))
    assert list(colours) == ["public", *LONG]
    assert len(set(colours.values())) == 8
    assert colours["public"] == plots.GREY


def test_public_is_the_first_set_and_never_an_owner() -> None:
    results = make_results()
    results["owners"].insert(0, {"name": "public"})
    assert plots.set_names(results) == ["public", *SHORT]
    assert plots.owner_names(results) == list(SHORT)


def test_nothing_invisible_that_acts_is_shown() -> None:
    assert plots.make_printable("a\x00b\x1b[2J\r\nc\td") == "a␀b␛[2J\nc    d"
    assert plots.make_printable("\ud800\u202etxt\x7f\u2028é") == "\ufffd\ufffdtxt\ufffd\né"
    assert plots.make_printable("né 漢", "DejaVu Sans") == "né \ufffd"


def test_a_figure_is_saved_whole_and_twice_the_same(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        plots.save_figure(plots.plot_kept_gain(make_results(SHORT[:1])), tmp_path / "new" / name)
    one, two = ((tmp_path / "new" / n).read_bytes() for n in ("one.png", "two.png"))
    assert one.startswith(b"\x89PNG") and one == two
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["one.png", "two.png"]
