"""datatrove's tasks give the bytes of the small path, also when they are cut off midway."""

import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.data import pieces
from flexolmo.data.corpus import Corpus, open_corpus
from flexolmo.data.formats import READ_AS_USUAL
from flexolmo.data.prepare import plan_preparation, prepare_set
from flexolmo.errors import ConfigError, DataError
from made_sets import SMALL, made_text, write_raw

pytest.importorskip("datatrove", reason="datatrove is not here: pip install 'flexolmo[scale]'")
from flexolmo.data import scale
from flexolmo.data.scale import make_pipelines, prepare_at_scale, share_of, work_directory

NEAR = SMALL.model_copy(update={"near_duplicate": 0.7})


def _corpus(directory, files):
    """Texts with repeats of all kinds, in so many files."""
    rng = random.Random(files)
    texts = [made_text(i % 33 + 50) + " more" * (i % 3) for i in range(90)] + ["", "é\x00" * 30]
    texts += [made_text(3), "tiny"]
    rng.shuffle(texts)
    for number in range(files):
        write_raw(directory / "in" / str(number), "owner", texts[number::files])
    return open_corpus(directory / "in", "owner")


def _files(directory):
    return {f.name: f.read_bytes() for f in directory.iterdir() if f.name != "salt"}


@pytest.mark.parametrize(("files", "tasks"), [(1, 3), (3, 2)])
def test_the_result_is_that_of_the_small_path(tmp_path, public_set, monkeypatch, files, tasks):
    monkeypatch.setattr(pieces, "_BYTES_AT_ONCE", 900)
    corpus = _corpus(tmp_path, files)
    said: list[list[str]] = [[], []]
    card = prepare_set(corpus, tmp_path / "a", None, public_set, (), NEAR, say=said[0].append)
    task = plan_preparation(corpus, tmp_path / "b", None, public_set, (), NEAR)
    found = prepare_at_scale(task, say=said[1].append, tasks=tasks)
    assert found == card and said[0] == said[1] != []
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    assert not work_directory(tmp_path / "b").exists()
    assert prepare_at_scale(task, say=pytest.fail) == card
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("stage", ["CleanStage", "TokenizeStage"])
def test_a_run_that_was_cut_off_goes_on_where_it_was(tmp_path, public_set, monkeypatch, stage):
    """The task that was cut off is done again, from what it left; those before it are not."""
    monkeypatch.setattr(pieces, "_BYTES_AT_ONCE", 900)
    corpus = _corpus(tmp_path, 2)
    prepare_set(corpus, tmp_path / "a", None, public_set, (), NEAR, say=len)
    task = plan_preparation(corpus, tmp_path / "b", None, public_set, (), NEAR)
    ran = []
    for kind in ("CleanStage", "ChooseStage", "TokenizeStage", "WriteStage"):
        cls = getattr(scale, kind)

        def work_on(self, part, kind=kind, real=cls.work_on):
            ran.append((kind, part))
            real(self, part)
            if (kind, part) == (stage, 1) and ran.count((stage, 1)) == 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(cls, "work_on", work_on)
    with pytest.raises(KeyboardInterrupt):
        prepare_at_scale(task, say=len, tasks=2)
    prepare_at_scale(task, say=len, tasks=2)
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    twice = {one for one in ran if ran.count(one) > 1}
    assert twice == {(stage, 1)}


def test_other_settings_begin_anew_and_errors_come_out(tmp_path, public_set):
    corpus = _corpus(tmp_path, 1)
    task = plan_preparation(corpus, tmp_path / "b", None, public_set, (), NEAR)
    work = work_directory(task.out)
    work.mkdir()
    (work / "plan.json").write_text('{"recipe": "another", "tasks": 1}')
    (work / "pieces-00000").write_bytes(b"left")
    with open(corpus.files[0][0], "a") as f:
        f.write(" ")
    with pytest.raises(DataError, match="has changed"):
        prepare_at_scale(task)
    assert (work / "pieces-00000").read_bytes() == b""


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(1, 12))
def test_every_batch_of_documents_is_one_tasks_in_the_order_of_reading(sizes, parts):
    class File:
        def __init__(self, size):
            self.st_size = size

        def stat(self):
            return self

    files = [(File(size), number) for number, size in enumerate(sizes)]
    corpus = Corpus({"name": "a"}, files, READ_AS_USUAL, "a", {})
    shares = [share_of(corpus, part, parts) for part in range(parts)]
    read = [[number for _, number in some.files] for some, _, lane, lanes in shares if lane < lanes]
    firsts = [numbers for numbers, (_, _, lane, _) in zip(read, shares, strict=True) if lane == 0]
    assert [number for some in firsts for number in some] == list(range(len(files)))
    for some, group, _, lanes in shares:
        same = [lane for other, g, lane, _ in shares if g == group and other.files == some.files]
        assert not some.files or sorted(same) == list(range(lanes))


def test_on_slurm_four_jobs_are_submitted_each_after_the_one_before(
    tmp_path, public_set, monkeypatch
):
    tools = tmp_path / "tools"
    tools.mkdir()
    sbatch = tools / "sbatch"
    sbatch.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        f'for file; do :; done\ncat "$file" >> {tmp_path}/scripts\n'
        f"echo Submitted batch job $(wc -l < {tmp_path}/asked)\n"
    )
    sbatch.chmod(0o755)
    task = plan_preparation(_corpus(tmp_path, 2), tmp_path / "b", None, public_set, (), NEAR)
    cluster = {"cluster": "slurm", "partition": "cpu", "time": "1:00:00"}
    monkeypatch.setenv("PATH", os.environ["PATH"].replace("/slurm/", "/"))
    with pytest.raises(ConfigError, match="sbatch is not here"):
        prepare_at_scale(task, tasks=3, workers=2, **cluster)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    assert prepare_at_scale(task, tasks=3, workers=2, **cluster) is None
    asked = (tmp_path / "asked").read_text().splitlines()
    stages = [line for line in asked if "RUN_OFFSET" in line]
    assert len(stages) == 4 and "dependency" not in stages[0]
    numbers = [asked.index(line) + 1 for line in stages]
    for line, before in zip(stages[1:], numbers, strict=False):
        assert f"--dependency=afterok:{before}" in line
    scripts = (tmp_path / "scripts").read_text()
    assert scripts.count("#SBATCH --array=0-2%2") == 2 and "#SBATCH --partition=cpu" in scripts
    for stage in ("clean", "choose", "tokenize", "write"):
        assert f"launch_pickled_pipeline {work_directory(task.out)}/logs/{stage}" in scripts


def test_on_ray_the_same_four_stages_wait_for_each_other(tmp_path, public_set):
    task = plan_preparation(_corpus(tmp_path, 2), tmp_path / "b", None, public_set, (), NEAR)
    last = make_pipelines(task, 4, 2, "ray")
    found = []
    while last is not None:
        found.append((type(last).__name__, last.pipeline[0].name, last.tasks))
        last = last.depends
    names = [("write", 1), ("tokenize", 4), ("choose", 1), ("clean", 4)]
    assert found == [("RayPipelineExecutor", name, tasks) for name, tasks in names]
