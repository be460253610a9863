"""Commands as steps: what they make lies where they put it, and what is done again is theirs."""

import stat
import sys

import pytest

from flexolmo.errors import FlexOlmoError
from flexolmo.research.steps import jobs, step
from flexolmo.research.steps.command import command_step
from flexolmo.research.steps.graph import elapsed_seconds, run_graph
from flexolmo.research.steps.jobs import JobFailed

PROGRAM = f"""#!{sys.executable} -S
import os, sys, time
word, name, *rest = sys.argv[4:]
if word == "write":  # refuses what is there, as most commands do
    with open(name, "x") as f:
        f.write(" ".join(rest))
elif word == "grow":  # goes on from what is there, and is killed when the file says so
    with open(name, "a") as f:
        f.write("x")
    if os.path.exists("die"):
        os.kill(os.getpid(), 9)
elif word == "refuse":
    sys.exit("This will not do.")
"""


@pytest.fixture(autouse=True)
def program(tmp_path, monkeypatch):
    """In place of `python -m flexolmo`: a script that does as told."""
    path = tmp_path / "program"
    path.write_text(PROGRAM)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(jobs.sys, "executable", str(path))
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.02)


def write(text, after=(), label="write it", files=None):
    name = label.split()[-1]
    command = f"write {name} '{text}'"
    return command_step(label, "here", command, makes=[name], after=after, files=files)


def test_a_command_writes_in_its_own_place_and_is_done_once(tmp_path):
    one = write("a  b", files={"deep/recipe.toml": "x = 1\n"})
    assert run_graph([one], tmp_path, 1) == ["write it"]
    assert (tmp_path / "here" / "it").read_text() == "a  b"
    assert (tmp_path / "here" / "deep" / "recipe.toml").read_text() == "x = 1\n"
    assert (tmp_path / "here" / "log" / "write-it.txt").exists()
    record = tmp_path / "steps" / "write-it"
    assert {p.name for p in record.iterdir()} == {"step.json", "done.json"}
    assert set(one.result(tmp_path, verify=True)["outputs"]) == {"here/it"}
    seconds = one.result(tmp_path)["seconds"]
    assert elapsed_seconds([one], tmp_path) == pytest.approx(seconds, abs=1e-3)
    assert run_graph([one], tmp_path, 1) == []


@pytest.mark.parametrize("other", [{"text": "b"}, {"text": "a", "files": {"recipe": ""}}])
def test_another_command_or_file_replaces_what_was_made_and_what_came_of_it(tmp_path, other):
    def chain(**one):
        first = write(**one)
        return [first, write("second", [first], "write next")]

    run_graph(chain(text="a"), tmp_path, 1)
    assert run_graph(chain(**other), tmp_path, 1) == ["write it", "write next"]
    assert (tmp_path / "here" / "it").read_text() == other["text"]
    assert run_graph(chain(text="a"), tmp_path, 1) == ["write it", "write next"]  # and back
    assert (tmp_path / "here" / "it").read_text() == "a"
    (tmp_path / "steps" / "write-it" / "done.json").unlink()  # made again, hence what came of it
    assert run_graph(chain(text="a"), tmp_path, 1) == ["write it", "write next"]


def test_after_a_kill_a_resumable_command_finds_what_it_left(tmp_path):
    def grow(is_resumable, **more):
        return command_step(
            "grow", "here", "grow it", makes=["it"], is_resumable=is_resumable, **more
        )

    (tmp_path / "here").mkdir()
    for is_resumable, left in ((True, "xxx"), (False, "x")):
        (tmp_path / "here" / "die").touch()
        for _ in range(2):
            with pytest.raises(JobFailed) as caught:
                run_graph([grow(is_resumable)], tmp_path, 1)
            assert list(caught.value.codes.values()) == [-9]
        (tmp_path / "here" / "die").unlink()
        run_graph([grow(is_resumable)], tmp_path, 1)
        assert (tmp_path / "here" / "it").read_text() == left
    run_graph([grow(True, files={"recipe": "new"})], tmp_path, 1)
    assert (tmp_path / "here" / "it").read_text() == "x"  # nothing of another recipe's


def test_seconds_of_a_step_that_was_finished_are_not_those_of_its_next_time(tmp_path):
    one = write("a")
    record = tmp_path / "steps" / "write-it"
    for _ in range(2):
        one.prepare(tmp_path)
        step.note_seconds(record, 100.0)  # as of an attempt under way
        assert one.prepare(tmp_path)[1] == 100.0
        one.finish(tmp_path, 101.0)
        assert one.prepare(tmp_path)[1] == 0.0


def test_a_changed_input_is_refused_by_its_path_and_made_anew_when_its_record_is_gone(tmp_path):
    first = write("a")
    run_graph([first], tmp_path, 1)
    (tmp_path / "here" / "it").write_text("b")
    second = write("second", [first], "write next")
    with pytest.raises(FlexOlmoError, match=r"steps/write-it is not as .*\n  here/it: not the"):
        run_graph([second], tmp_path, 1)
    (tmp_path / "steps" / "write-it" / "done.json").unlink()
    assert run_graph([second], tmp_path, 1) == ["write it", "write next"]
    assert (tmp_path / "here" / "it").read_text() == "a"
