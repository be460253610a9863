"""`flexolmo plan` says what a training takes, and what is wrong with the question."""

import json

import pytest
from typer.testing import CliRunner

from flexolmo.cli import app
from flexolmo.errors import ConfigError
from flexolmo.train.rates import GPUS

EXPERT = """
scope = "ffn"
router.kind = "linear"
train = { steps = 5, batch_size = 4, seq_len = 16, warmup_steps = 1 }
"""


def run(*words):
    return CliRunner().invoke(app, ["plan", *map(str, words)])


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(EXPERT)
    return path


def test_a_plan_is_told_to_people_and_to_programs(recipe, pico_anchor_dir, tmp_path):
    about = ["--anchor", pico_anchor_dir, "--gpus", "2xH100"]
    told = run(recipe, *about, "--price", 3, "--json")
    assert told.exit_code == 0, told.output
    found = json.loads(told.output)
    assert found["tokens"] == 5 * 4 * 16
    assert found["cost"] == pytest.approx(2 * 3 * found["seconds"] / 3600)
    assert found["memory_bytes"]["total"] == pytest.approx(
        sum(v for k, v in found["memory_bytes"].items() if k != "total")
    )
    shown = run(recipe, *about, "--write", tmp_path / "launch", "--name", "maths")
    assert "tokens a second" in shown.output and "It does not fit" not in shown.output
    assert "maths.run" in (tmp_path / "launch" / "torchrun.sh").read_text()
    here = tmp_path / "here.json"
    here.write_text(GPUS["H100"].model_copy(update={"memory_bytes": 1e6}).model_dump_json())
    small = run(recipe, "--anchor", pico_anchor_dir, "--machine", here)
    assert "It does not fit" in small.output


def test_what_is_wrong_is_said(recipe, pico_anchor_dir, tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    anchor = ["--anchor", pico_anchor_dir]
    for words, says in {
        (): "Name a recipe",
        (recipe, *anchor): "on what",
        (recipe, "--gpus", "8xH100"): "beside which anchor",
        (recipe, *anchor, "--gpus", "12xH100"): "multiple",
        (recipe, *anchor, "--gpus", "8xH900"): "not in the table",
        (recipe, *anchor, "--gpus", "2xH100", "--processes", 2): "--processes goes with",
        (recipe, *anchor, "--machine", bad): "not what",
        ("nothing", "--gpus", "1xH100"): "does not exist",
        ("anchor", "--gpus", "1xH100"): "--vocab-size",
        ("anchor", "--gpus", "1xH100", *anchor): "--anchor is for",
        (recipe, *anchor, "--gpus", "1xH100", "--vocab-size", 9): "--vocab-size is for",
        (recipe, *anchor, "--gpus", "1xH100", "--set", "train.stepz=1"): "train.steps",
    }.items():
        found = run(*words)
        assert isinstance(found.exception, ConfigError), (words, found.output)
        assert says in str(found.exception), words
