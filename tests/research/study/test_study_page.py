"""A study's page says what results.json holds, nothing else, and judges bars at their marks."""

import copy
import html
import itertools
import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from flexolmo.cli import app
from flexolmo.files import write_bytes
from flexolmo.numbers import format_number
from flexolmo.report.page import Table, escape_markdown, render_page
from flexolmo.research.study.figures import plot_methods, plot_routing
from flexolmo.research.study.findings import DEFAULT, PAPER_AVERAGES, TABLES, WORDS
from flexolmo.research.study.study_page import write_page
from made_results import FIGURES, METHODS, ONE, OWNERS, make_results, set_mean


def rows_of(page: str, heading: str) -> dict[str, list[str]]:
    """The rows of the first table after `heading`, by their first cell, as shown."""
    block = page[page.index(heading) :]
    table = itertools.takewhile(
        lambda line: line.startswith("|"),
        itertools.dropwhile(lambda line: not line.startswith("|"), block.splitlines()),
    )
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]
    assert len({len(row) for row in cells}) == 1  # as wide as its head
    return {row[0]: row[1:] for row in cells[2:]}


def pruned(value: Any, keys: set[str]) -> Any:
    """`value` without those keys, at any depth."""
    if isinstance(value, dict):
        return {k: pruned(v, keys) for k, v in value.items() if k not in keys}
    return value


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the figures that would have been written; they are made, but not rendered."""
    names: set[str] = set()
    monkeypatch.setattr(
        "flexolmo.report.page.save_figure",
        lambda fig, path: names.add(path.stem) or write_bytes(path, b""),
    )
    return names


def test_the_page_shows_every_figure_it_wrote(whole: tuple[dict[str, Any], Path, str]) -> None:
    _, out, page = whole
    shown = set(re.findall(r"!\[[^\]]+\]\(figures/(\w+)\.png\)", page))
    assert shown == FIGURES == {p.stem for p in (out / "figures").iterdir()}
    for name in FIGURES:
        width = matplotlib.image.imread(out / "figures" / f"{name}.png").shape[1]
        assert 800 <= width <= 1780, name


def cells_of(text: str) -> list[str]:
    """Words of every cell of every table in HTML."""
    found = re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", text, re.DOTALL)
    return [html.unescape(re.sub(r"<[^>]+>", "", cell)) for cell in found]


def test_both_forms_of_the_page_have_the_same_cells(
    whole: tuple[dict[str, Any], Path, str],
) -> None:
    _, out, page = whole
    shown = cells_of((out / "page.html").read_text(encoding="utf-8"))
    assert shown == cells_of(MarkdownIt("commonmark").enable("table").render(page))
    assert len(shown) > 500 and "0.0\u00a0%" in shown


def test_table_1_has_every_method_with_its_numbers(whole: tuple[dict[str, Any], Path, str]) -> None:
    results, _, page = whole
    rows = {
        k.split(":")[0].strip("*"): v
        for k, v in rows_of(page, "## Table 1").items()
        if not k.startswith(("*For", "*Told"))
    }
    assert set(rows) == {WORDS[m] for m in METHODS if m != "own_pair"}
    bits = [s["bits_per_byte"] for s in results["seeds"].values()]
    heights = []
    for m in METHODS:
        if m == "own_pair":
            continue
        row = rows[WORDS[m]]
        for shown, kind in zip(row, TABLES, strict=False):
            e = results[kind][m]
            assert shown == f"{e['mean']:.3f}\u00a0±\u00a0{e['spread']:.3f}"
        assert row[2] == f"{fmean(b[m][n] for b in bits for n in OWNERS):.3f}"
        gain = fmean(
            1 - fmean(b[m][n] for b in bits) / fmean(b["dense public"][n] for b in bits)
            for n in OWNERS
        )
        assert row[3] == f"{100 * gain:+.1f}\u00a0%"
        assert row[4] == f"{METHODS[m][2]:.2f}"
        assert row[5] == ("yes" if METHODS[m][3] else "no")
        assert row[6] == (f"{PAPER_AVERAGES[m]:.1f}" if m in PAPER_AVERAGES else "–")
    for shown in rows:
        m = next(k for k, v in WORDS.items() if v == shown)
        heights.append(results["gap_closed"][m]["mean"] + results["mixed"][m]["mean"])
    assert heights == sorted(heights, reverse=True)


def test_table_2_has_bits_of_every_model_by_set(whole: tuple[dict[str, Any], Path, str]) -> None:
    results, _, page = whole
    rows = rows_of(page, "## Table 2")
    assert len(rows) == 1 + len(OWNERS) + 7
    for n, shown in zip(["public", *OWNERS, "mixed"], rows["**our default**"], strict=True):
        mean = fmean(s["bits_per_byte"][DEFAULT][n] for s in results["seeds"].values())
        assert shown.strip("*") == f"{mean:.3f}"
    assert rows["own pair"][0] == rows["own pair"][-1] == "–"


def test_table_3_has_every_variant_once_and_its_difference(
    whole: tuple[dict[str, Any], Path, str],
) -> None:
    results, _, page = whole
    table = page[page.index("## Table 3") : page.index("## Table 4")]
    for name, entry in results["ablations"].items():
        [line] = [x for x in table.splitlines() if f"| {escape_markdown(name)} |" in x]
        assert f"| {entry['gap_closed']['mean']:.3f} |" in line
        if "," in name:
            base = results["ablations"][name.partition(",")[0]]
            change = entry["mixed"]["mean"] - base["mixed"]["mean"]
            assert f"| {change:+.3f} |".replace("-", "−") in line
    assert table.index("top-2 |") < table.index("top-8 |")


def test_table_4_shows_what_was_best_on_validation_text(
    whole: tuple[dict[str, Any], Path, str],
) -> None:
    results, _, page = whole
    table = page[page.index("## Table 4") : page.index("## Figures")]
    tried, best = (results["strongest_paper"][k] for k in ("tried", "best"))
    for kind, name in best.items():
        training, _, reading = name.partition("; ")
        [line] = [x for x in table.splitlines() if x.startswith(f"| {training} |")]
        assert f"| {reading} | **{tried['validation'][name][kind]['mean']:.3f}** |" in line
        assert f"| **{tried['heldout'][name][kind]['mean']:.3f}** |" in line


@given(x=st.floats(-9, 9), flops=st.floats(0.5, 9))
def test_any_number_in_the_results_is_the_one_shown(x: float, flops: float) -> None:
    from flexolmo.research.study.tables import table_of_methods

    results = copy.deepcopy(SMALL)
    set_mean(results, "gap_closed", "dume", x)
    results["gap_closed"]["dume"]["flops_per_token"] = flops * ONE
    page = render_page(list(table_of_methods(results)), "md", {})
    [row] = [v for k, v in rows_of(page, "## Table 1").items() if k.startswith("DUME")]
    assert row[0] == format_number(x, 3)
    assert float(row[0].replace("−", "-")) == pytest.approx(x, abs=6e-4)
    assert row[4] == f"{flops:.2f}"


def test_spread_is_shown_with_several_seeds_only(tmp_path: Path, saved: set[str]) -> None:
    page = write_page(make_results(1, ("code", "news")), tmp_path).read_text(encoding="utf-8")
    assert "±" not in page and "By seed" not in page and "1 of 3 seeds done (0)" in page
    assert saved == FIGURES - {"figure_3_active_experts"} and "Table 3" not in page


def test_the_opening_says_what_was_run(whole: tuple[dict[str, Any], Path, str]) -> None:
    opening = whole[2][: whole[2].index("## How")]
    for said in (
        "7 owners",
        "3.3 million parameters",
        "1.64 million tokens",
        "327,680 tokens",
        "40,000 bytes",
        "48 mixed documents of 512 tokens",
        "3 of 3 seeds done (0, 1, 2)",
        "833d67d012+changes",
        "2 cores",
        "torch 2.13.0",
        "40 steps",
        "81,920",
    ):
        assert said in opening
    assert "temperature (held-out) 8, temperature (mixed) 256" in whole[2]


# --- whatever is missing --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing",
    [
        {"mixed"},
        {"flexolmo_paper", "paper"},
        {DEFAULT, "default"},
        {"btm", "dume", "own_pair"},
        {"routing", "optout"},
        {"kept", "bytes", "low_rank_share_of_gain", "software", "train", "anchor"},
        {"bits_per_byte"},
        {"anchor_flops_per_token"},
        {"chosen_on_validation", "cost", "commits", "machine", "recipe"},
        {"gap_closed"},
    ],
)
def test_what_is_missing_is_left_out(missing: set[str], tmp_path: Path, saved: set[str]) -> None:
    made = make_results(1, ("code", "news"), has_ablations=True, num_layers=2)
    results = pruned(made, missing)
    page = write_page(results, tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"\bnan\b|\binf\b|None", page)
    assert saved == set(re.findall(r"\(figures/(\w+)\.png\)", page))
    for m in missing & set(WORDS):
        assert not re.search(rf"^\| \**{re.escape(WORDS[m])}\**:", page, re.MULTILINE)


def test_a_study_with_nothing_done_has_a_page_that_says_so(tmp_path: Path) -> None:
    results = make_results(0) | {"cost": {}}
    page = write_page(results, tmp_path).read_text(encoding="utf-8")
    assert "0 of 3 seeds done: no numbers yet." in page and "Table" not in page
    assert not (tmp_path / "figures").exists()


def test_a_method_this_page_does_not_know_is_shown_by_its_name(
    tmp_path: Path, no_figures: None
) -> None:
    results = make_results(2, ("code", "news"))
    for table in (
        *(results[k] for k in TABLES),
        *(s[k] for s in results["seeds"].values() for k in TABLES),
    ):
        table["new_rival"] = dict(table["dume"])
    assert "| new\\_rival |" in write_page(results, tmp_path).read_text(encoding="utf-8")


def test_notes_become_part_of_the_page_as_they_are(tmp_path: Path, no_figures: None) -> None:
    (tmp_path / "notes.md").write_text("The **why**: café, 漢字.\n", encoding="utf-8")
    page = write_page(make_results(1, ("code", "news")), tmp_path).read_text(encoding="utf-8")
    assert "\n\nThe **why**: café, 漢字.\n\n## Cost" in page
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<pre class="mono">The **why**: café, 漢字.</pre>' in text


def test_names_cannot_act_on_the_page(tmp_path: Path, sketched: None) -> None:
    names = ("a|b_c*d", "<script>x</script>", "é漢\ud83d\u202e`$x_{1}$", "line\nend")
    page = write_page(make_results(1, names), tmp_path).read_bytes()
    text = page.decode("utf-8")
    assert b"<script" not in (tmp_path / "page.html").read_bytes()
    assert "<script" not in text and "\u202e" not in text and "a&#124;b\\_c\\*d" in text
    rows_of(text, "## Table 2")  # still a table
    assert json.loads(json.dumps(text)) == text


@given(text=st.text())
def test_escaped_text_stays_in_its_cell(text: str) -> None:
    row = render_page([Table("A table", ["a", "b"], [[text, "x"]])], "md", {}).splitlines()[2:]
    assert len(row) == 3 and len(re.split(r"(?<!\\)(?:\\\\)*\|", row[2])) == 4


# --- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 3])
def test_no_two_labels_of_methods_cover_each_other(seeds: int) -> None:
    names = {WORDS[m] for m in METHODS}
    fig = plot_methods(make_results(seeds))
    assert fig is not None
    fig.draw_without_rendering()
    for ax in fig.axes:
        boxes = [t.get_window_extent() for t in ax.texts if t.get_text() in names]
        assert len(boxes) == len(METHODS) - 1
        for a, b in itertools.combinations(boxes, 2):
            assert not a.shrunk(0.96, 0.8).overlaps(b.shrunk(0.96, 0.8))


def test_of_many_layers_some_are_drawn() -> None:
    fig = plot_routing(make_results(1, ("code", "news"), num_layers=32))
    assert fig is not None
    titles = [ax.get_title(loc="left") for ax in fig.axes if ax.axison]
    assert len(titles) == 1 + 8 and "every layer" in titles[0]
    assert "layer 1 of 32" in titles[1] and "layer 32 of 32" in titles[-1]


def test_the_command_writes_results_and_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexolmo.research.steps.graph.run_graph", lambda *_: [])
    done = CliRunner().invoke(app, ["study", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "page.html" in done.output and "results.json" in done.output
    assert "no numbers yet" in (tmp_path / "page.md").read_text(encoding="utf-8")


SMALL = make_results(1, ("code", "news"))
