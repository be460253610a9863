"""`flexolmo plan` says what a training takes, and what is wrong with the question."""

import json

import pytest
from typer.testing import CliRunner

from flexolmo.cli import app
from flexolmo.errors import ConfigError
from flexolmo.train.rates import GPUS, Machine

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
    assert "hours" not in shown.output and "seconds" in shown.output.split("time")[1]
    assert "tokens a second" in shown.output and "It does not fit" not in shown.output
    assert "maths.run" in (tmp_path / "launch" / "torchrun.sh").read_text()
    here = tmp_path / "here.json"
    here.write_text(GPUS["H100"].model_copy(update={"memory_bytes": 1e6}).model_dump_json())
    small = run(recipe, "--anchor", pico_anchor_dir, "--machine", here)
    assert "It does not fit" in small.output


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_started_is_what_was_planned(recipe, pico_anchor_dir, tmp_path, device):
    here = tmp_path / "here.json"
    here.write_text(
        Machine(
            name="mine", source="me", device=device, threads=3, float32_flops=1e11, moved_bytes=1e10
        ).model_dump_json()
    )
    about = [recipe, "--anchor", pico_anchor_dir, "--machine", here, "--processes", 2]
    shown = run(*about, "--write", tmp_path / "launch")
    assert shown.exit_code == 0, shown.output
    assert "waiting for others is not known" in shown.output
    script = (tmp_path / "launch" / "torchrun.sh").read_text()
    assert f"--device {device}" in script
    assert "--nnodes 2" in script and "--nproc-per-node 1" in script  # a machine for each
    assert "OMP_NUM_THREADS:-3}" in script


def test_what_cannot_be_planned_is_refused_before_it_is_measured(
    recipe, pico_anchor_dir, tmp_path, monkeypatch
):
    def measure(threads):
        raise AssertionError("It was measured.")

    monkeypatch.setattr("flexolmo.train.measure.measure_machine", measure)
    here = ["--measure", tmp_path / "here.json"]
    there = tmp_path / "there.json"
    there.write_text("{}")
    (tmp_path / "slurm.sh").touch()
    anchor = ["--anchor", pico_anchor_dir]
    for words, says in {
        (recipe, *anchor, "--set", "train.stepz=1"): "train.steps",
        (recipe, *anchor, "--processes", 3): "multiple of 3",
        (recipe,): "beside which anchor",
        (recipe, *anchor, "--gpus", "1xH100"): "leave out --gpus",
        ("--gpus", "1xH100"): "leave out --gpus",
        ("--machine", there): "leave out --gpus and --machine",
        ("--measure", there): "there already",
        ("--name", "$(id)"): "cannot name",
        (recipe, *anchor, "--write", tmp_path): "holds slurm.sh already",
    }.items():
        found = run(*here, *words)
        assert isinstance(found.exception, ConfigError), (words, found.output)
        assert says in str(found.exception), words
    assert str(run(*here).exception) == "It was measured."


def test_what_is_wrong_is_said(recipe, pico_anchor_dir, tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    anchor = ["--anchor", pico_anchor_dir]
    for words, says in {
        (): "Name a recipe",
        (recipe, *anchor): "on what",
        (recipe, "--gpus", "8xH100"): "beside which anchor",
        (recipe, "--gpus", "8xH100", "--anchor", tmp_path): "give --anchor the directory",
        (recipe, *anchor, "--gpus", "12xH100"): "multiple",
        (recipe, *anchor, "--gpus", "8xH900"): "not in the table",
        (recipe, *anchor, "--gpus", "2xH100", "--processes", 2): "--processes goes with",
        (recipe, *anchor, "--machine", bad): "not what",
        (recipe, *anchor, "--gpus", "1xH100", "--name", "$(id)"): "cannot name an expert",
        (recipe, *anchor, "--gpus", "1xH100", "--price", "inf"): "--price inf",
        ("nothing", "--gpus", "1xH100"): "nothing is neither a file nor a recipe",
        ("nothing.toml", "--gpus", "1xH100"): "does not exist",
        (recipe, *anchor, "--gpus", "1xH100", "--write", bad): "is a file, expected a directory",
        ("anchor", "--gpus", "1xH100"): "--vocab-size",
        ("anchor", "--gpus", "1xH100", *anchor): "--anchor is for",
        (recipe, *anchor, "--gpus", "1xH100", "--vocab-size", 9): "--vocab-size is for",
        (recipe, *anchor, "--gpus", "1xH100", "--set", "train.stepz=1"): "train.steps",
    }.items():
        found = run(*words)
        assert isinstance(found.exception, ConfigError), (words, found.output)
        assert says in str(found.exception), words
