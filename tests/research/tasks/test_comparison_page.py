"""Runs side by side: what is on the page is what is in the runs."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from flexolmo.cli import app
from flexolmo.errors import DataError
from flexolmo.inference.reader import open_reader
from flexolmo.research.tasks.comparison_page import write_page
from flexolmo.research.tasks.run import run_suite
from flexolmo.research.tasks.selection import RunSettings
from flexolmo.research.tasks.sources import Sources
from made_items import choice_items, code_items, task_of, written_items
from made_mixtures import NAMES

TASKS = [
    task_of("arc_easy", choice_items()),
    task_of("squad", written_items(), "answer"),
    task_of("mbpp", code_items(), "code"),
]


@pytest.fixture(scope="module")
def runs(house, tmp_path_factory):
    """Of the anchor, the mixture, and the mixture without an expert."""
    root = tmp_path_factory.mktemp("runs")
    found = {}
    for name, off in (("anchor", {"only": []}), ("all|of*it", {}), ("less", {"without": ["zinc"]})):
        run_suite(
            *open_reader(house.mixture_dir(NAMES, "rich"), house.trusted, **off),
            TASKS,
            Sources(),
            root / name,
            RunSettings(),
        )
        found[name] = root / name
    return found


def test_the_page_has_every_run_s_numbers(runs, tmp_path):
    page = write_page(list(runs.values()), tmp_path).read_text()
    assert (tmp_path / "tasks.png").read_bytes().startswith(b"\x89PNG")
    assert "all&#124;of\\*it" in page and "all|of*it" not in page
    assert "all|of*it" in (tmp_path / "page.html").read_text()
    table = json.loads((tmp_path / "table.json").read_text())
    for name, path in runs.items():
        results = json.loads((path / "results.json").read_text())
        assert table["runs"][name]["tasks"] == results["tasks"]
        for task in ("arc_easy", "squad", "mbpp"):
            assert f"{results['tasks'][task]['bits_per_byte']:.3f}" in page
        assert f"{results['tasks']['arc_easy']['score']:.1f}\u00a0±\u00a0" in page
    assert table["against"]["run"] == "anchor"
    assert "mbpp: not scored: programs were not run" in page


def test_the_best_of_a_row_is_bold(runs, tmp_path):
    page = write_page(list(runs.values()), tmp_path).read_text()
    (row,) = [x for x in page.split("## Scores")[0].splitlines() if x.startswith("| squad")]
    cells = [c.strip() for c in row.strip("|").split("|")[1:]]
    least = min(cells, key=lambda c: float(c.strip("*")))
    assert least.startswith("**") and sum(c.startswith("**") for c in cells) >= 1


def test_runs_that_cannot_stand_side_by_side_are_refused(runs, house, tmp_path):
    other = tmp_path / "other"
    run_suite(
        *open_reader(house.mixture_dir(NAMES, "rich"), house.trusted),
        [task_of("arc_easy", choice_items(4))],
        Sources(),
        other,
        RunSettings(),
    )
    forms = tmp_path / "forms"
    run_suite(
        *open_reader(house.mixture_dir(NAMES, "rich"), house.trusted),
        TASKS,
        Sources(),
        forms,
        RunSettings(forms=("rc",)),
    )
    more = tmp_path / "more"
    shutil.copytree(runs["anchor"], more)
    run_suite(
        *open_reader(house.mixture_dir(NAMES, "rich"), house.trusted, only=[]),
        TASKS[:1],
        Sources(),
        more,
        RunSettings(),
    )
    for paths, said in (
        ([runs["anchor"], other], "items of arc_easy, the items of squad"),
        ([runs["anchor"], forms], "differs in setting forms"),
        ([runs["anchor"], more], "more tasks than its results"),
        ([runs["anchor"]], "at least two"),
        ([runs["anchor"], runs["anchor"]], "called anchor"),
        ([runs["anchor"], tmp_path], "no finished run"),
    ):
        with pytest.raises(DataError, match=said):
            write_page(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_names_its_page(runs, tmp_path):
    found = CliRunner().invoke(
        app, ["eval", "table", *map(str, runs.values()), "--out", str(tmp_path / "t")]
    )
    assert found.exit_code == 0 and "page.md" in found.output
