"""On Slurm, as made by `made_slurm`, a preparation gives the bytes of the small path or none."""

import fcntl
import os
import random
import shutil
import signal
import subprocess
from errno import ENOSPC
from pathlib import Path
from types import SimpleNamespace

import pytest

from flexolmo.data import on_slurm, pieces, slurm
from flexolmo.data.corpus import open_corpus
from flexolmo.data.kept_work import work_directory
from flexolmo.data.parts import do_part
from flexolmo.data.prepare import Preparation, prepare_set
from flexolmo.data.scale import Execution, prepare_at_scale
from flexolmo.errors import ConfigError, DataError, DiskFullError, UnfinishedError
from made_sets import SMALL, made_text, write_raw
from made_slurm import Cluster, in_a_fork, start_fork

NEAR = SMALL.model_copy(update={"near_duplicate": 0.7})
ON_SLURM = Execution("slurm", tasks=3, slurm_options=("partition=cpu",))
NO_WAIT = Execution("slurm", tasks=3, waits=False)


@pytest.fixture
def here(tmp_path):
    """A directory whose name is hard to quote."""
    directory = tmp_path / "a b $HOME 'q' \"r %a"
    directory.mkdir()
    return directory


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sync", lambda: None)  # waits for all that the machine writes
    monkeypatch.setattr(pieces, "_BYTES_AT_ONCE", 900)
    made = Cluster(tmp_path, seed=3)
    monkeypatch.setenv("PATH", f"{made.bin}:{os.environ['PATH']}")
    for theirs in ("SQUEUE_STATES", "SCANCEL_STATE", "SLURM_CLUSTERS"):  # would mislead programs
        monkeypatch.setenv(theirs, "x")
    monkeypatch.setattr(slurm, "sys", SimpleNamespace(executable=made.python))
    monkeypatch.setattr(on_slurm, "time", SimpleNamespace(sleep=made.step))
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Texts of an owner with repeats of all kinds, some of them public."""
    directory = tmp_path_factory.mktemp("corpus") / "in $HOME 'q'"
    rng = random.Random(1)
    texts = [made_text(i % 33 + 50) + " more" * (i % 3) for i in range(90)] + ["", "é\x00" * 30]
    rng.shuffle(texts)
    for number in range(2):
        write_raw(directory / f"{number} $x", "owner", texts[number::2])
    return open_corpus(directory, "owner")


@pytest.fixture
def task(corpus, here, public_set):
    return Preparation(corpus, here / "out" / "owner", None, public_set, (), NEAR)


@pytest.fixture(scope="module")
def expected(corpus, public_set, tmp_path_factory):
    """Card, files and sentences of the small path."""
    said = []
    out = tmp_path_factory.mktemp("small") / "owner"
    card = prepare_set(corpus, out, None, public_set, (), NEAR, say=said.append)
    assert card["removed"]["documents"]["in public set"] > 0
    return card, _files(out), said


def _files(directory):
    return {f.name: f.read_bytes() for f in directory.iterdir() if f.name != "salt"}


def _is_private(directory):
    return directory.stat().st_mode & 0o777 == 0o700 and all(
        f.stat().st_mode & 0o777 == 0o600 for f in directory.iterdir()
    )


def test_parts_that_fail_are_named_and_the_next_run_does_them_alone(
    cluster, task, expected, capsys
):
    cluster.faults = {("clean", 0): "lost", ("clean", 2): "killed"}
    with pytest.raises(UnfinishedError) as refused:
        prepare_at_scale(task, say=pytest.fail, execution=ON_SLURM)
    message = str(refused.value)
    assert "owner was not written: 2 of 3 parts of clean were not done." in message
    assert "part 0: it left no word" in message and "part 2: it was cut off" in message
    assert not task.out.exists() and task.out.parent.stat().st_mode & 0o777 == 0o700
    (late,) = cluster.late
    work = work_directory(task.out)
    assert work.stat().st_mode & 0o777 == 0o700

    def step_and_then_the_late_one(_):
        cluster.step()
        assert cluster.run(late, work / "late.log") == 0

    on_slurm.time.sleep = step_and_then_the_late_one
    said = []
    card = prepare_at_scale(task, say=said.append, execution=ON_SLURM)
    assert (card, _files(task.out), said) == expected
    assert _is_private(task.out) and not work.exists()
    submitted = [job["options"]["array"] for job in cluster.jobs().values()]
    assert submitted == ["0-2", "0", "0-2", "0", "0,2", "0", "0-2", "0"]
    log = task.out.parent / "late.log"
    assert cluster.run(late, log) == 2  # when all is over it does nothing
    assert "Nothing is left to do here" in log.read_text() and not work.exists()
    assert _files(task.out) == expected[1]
    assert "What is missing is submitted again" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(2))
def test_heads_and_parts_may_be_killed_at_any_time(cluster, task, expected, here, seed):
    """Kill -9, by seeds; each head goes on where those before it were stopped."""
    draw = cluster.draw = random.Random(seed)
    for stage, parts in (("clean", 3), ("choose", 1), ("tokenize", 3), ("write", 1)):
        for part in range(parts):
            if draw.random() < 0.3:
                cluster.faults[stage, part] = draw.choice(["lost", "killed"])
    num_faults = len(cluster.faults)
    work = work_directory(task.out)
    heads = 0
    while not task.out.exists() or work.exists():
        heads += 1
        steps_left = draw.randrange(6)

        def sleep(_, left=steps_left):
            if sleep.steps == left:
                os.kill(os.getpid(), signal.SIGKILL)
            sleep.steps += 1
            cluster.step()

        sleep.steps = 0
        on_slurm.time.sleep = sleep if heads < 6 else cluster.step
        in_a_fork(lambda: prepare_at_scale(task, say=len, execution=ON_SLURM), here / "heads.log")
        cluster.faults = {}  # those of the fork are its own
        assert heads < 20, (here / "heads.log").read_text()
    assert num_faults and heads > 2
    assert _files(task.out) == expected[1] and _is_private(task.out)


def test_while_jobs_live_no_other_run_takes_or_removes_their_work(cluster, task, expected, capsys):
    assert prepare_at_scale(task, execution=NO_WAIT) is None
    work = work_directory(task.out)
    before = sorted(work.rglob("*"))
    cluster.step()
    other = Preparation(task.corpus, task.out, None, task.public, (), SMALL)
    for refuse, match in ((int, "at work in"), (lambda: cluster.fail("squeue"), "does not say")):
        refuse()
        for asked, execution in ((other, NO_WAIT), (other, Execution()), (task, Execution())):
            with pytest.raises(UnfinishedError, match=match):
                prepare_at_scale(asked, execution=execution)
    with pytest.raises(UnfinishedError, match="does not answer"):
        prepare_at_scale(task, execution=NO_WAIT)
    cluster.fail("squeue", False)
    prepare_set(task.corpus, task.out, None, task.public, (), NEAR, say=len)
    assert set(before) < set(work.rglob("*"))
    assert prepare_at_scale(task, execution=NO_WAIT) is None  # though such a set is there
    shutil.rmtree(task.out)
    assert prepare_at_scale(task, execution=NO_WAIT) is None  # looks, and submits nothing
    assert len(cluster.jobs()) == 4
    said = capsys.readouterr().err
    assert "clean: 0 of 3 parts done" in said and "clean: 1 of 3 parts done" in said
    assert "Text of a run in tasks stays in" in said
    assert "3 PENDING (Priority)" in said or "4 PENDING (Priority)" in said
    while cluster.step():
        pass
    said = []
    card = prepare_at_scale(task, say=said.append, execution=NO_WAIT)
    assert (card, _files(task.out), said) == expected and not work.exists()


def test_without_their_jobs_parts_are_done_here(cluster, task, expected):
    pytest.importorskip("datatrove")
    prepare_at_scale(task, execution=NO_WAIT)
    cluster.step()
    subprocess.run(["scancel", *cluster.queue()], check=True)
    prepare_at_scale(task, say=len, execution=Execution())
    assert _files(task.out) == expected[1]


def test_jobs_of_a_run_that_was_begun_here_are_guarded_too(cluster, task, monkeypatch):
    pytest.importorskip("datatrove")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr("flexolmo.data.scale._do_stages", interrupt)
        prepare_at_scale(task, execution=Execution(tasks=3))
    assert prepare_at_scale(task, execution=NO_WAIT) is None
    other = Preparation(task.corpus, task.out, None, task.public, (), SMALL)
    with pytest.raises(UnfinishedError, match="at work in"):
        prepare_at_scale(other, execution=NO_WAIT)


def test_ctrl_c_stops_the_waiting_alone(cluster, task, expected, capsys):
    def interrupt(_):
        cluster.step()
        raise KeyboardInterrupt

    on_slurm.time.sleep = interrupt
    with pytest.raises(KeyboardInterrupt):
        prepare_at_scale(task, execution=ON_SLURM)
    assert "The jobs go on alone. Give the same command again" in capsys.readouterr().err
    on_slurm.time.sleep = cluster.step
    prepare_at_scale(task, say=len, execution=ON_SLURM)
    assert len(cluster.jobs()) == 4 and _files(task.out) == expected[1]


def test_a_refusal_while_jobs_live_is_told_and_leaves_their_work(cluster, task, monkeypatch):
    def full(_):
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr(on_slurm, "wait_for_jobs", full)
    with pytest.raises(DiskFullError, match="No space left"):
        prepare_at_scale(task, execution=ON_SLURM)
    assert work_directory(task.out).exists() and len(cluster.queue()) == 4


def test_results_that_are_seen_late_are_waited_for(cluster, task):
    """As on a network file system, of what another machine wrote."""
    looks = []

    def sleep(_):
        is_last = cluster.step() and not cluster.queue()
        if is_last:
            (result,) = work_directory(task.out).glob("*/done-write-00000.json")
            looks.append(result.rename(result.with_name("not seen yet")))
        elif not cluster.queue():
            looks.append(None)
            if len(looks) == 4:
                looks[0].rename(looks[0].with_name("done-write-00000.json"))

    on_slurm.time.sleep = sleep
    prepare_at_scale(task, say=len, execution=ON_SLURM)
    assert len(looks) == 4 and not work_directory(task.out).exists()


def test_a_part_of_changed_text_or_of_another_public_set_refuses(cluster, task, here):
    public = here / "public"
    shutil.copytree(task.public, public)
    write_raw(here / "in", "owner", [made_text(i) for i in range(40)])
    moved = Preparation(open_corpus(here / "in", "owner"), task.out, None, public, (), NEAR)
    prepare_at_scale(moved, execution=NO_WAIT)
    changed = moved.corpus.files[0][0]
    text = changed.read_text()
    changed.write_text(text[:-3] + '."}')
    while cluster.step():
        pass
    with pytest.raises(UnfinishedError, match=r"part 0: .*has changed since its digest was taken"):
        prepare_at_scale(moved, execution=ON_SLURM)
    changed.write_text(text)
    assert prepare_at_scale(moved, execution=NO_WAIT) is None
    assert not list(work_directory(task.out).glob("*/failed-*"))  # reasons of before
    card = public / "card.json"
    card.write_text(card.read_text().replace('"licences"', '"licenses"'))
    work = next(work_directory(task.out).glob("*/"))
    with pytest.raises(DataError, match=r"the public set, a set .* changed since"):
        do_part(work, "clean", 1)
    assert not task.out.exists()


def test_a_set_that_came_to_the_place_meanwhile_is_not_replaced(cluster, task):
    prepare_at_scale(task, execution=NO_WAIT)
    prepare_set(task.corpus, task.out, None, task.public, (), SMALL, say=len)
    before = _files(task.out)
    while cluster.step():
        pass
    with pytest.raises(DataError, match="of other text or settings than this one"):
        prepare_at_scale(task, execution=ON_SLURM)
    assert _files(task.out) == before
    prepare_at_scale(task, may_replace=True, say=len, execution=ON_SLURM)
    assert _files(task.out) != before


def test_what_sbatch_refuses_is_told_and_nothing_stays_in_the_queue(cluster, task):
    cluster.fail("sbatch")
    with pytest.raises(UnfinishedError, match="the jobs of choose: sbatch: error: Batch job sub"):
        prepare_at_scale(task, execution=ON_SLURM)
    assert len(cluster.jobs()) == 1 and not cluster.queue()
    other = Preparation(task.corpus, task.out, None, task.public, (), SMALL)
    with pytest.raises(ConfigError, match="needs --tasks"):
        prepare_at_scale(other, execution=Execution("slurm"))
    assert work_directory(task.out).exists()


@pytest.mark.parametrize(
    ("sbatch", "match"),
    [
        ("echo Usage: sbatch", "it answered 'Usage: sbatch"),
        (r"printf 'no \351' >&2; exit 1", "no \ufffd"),
    ],
)
def test_an_answer_of_sbatch_without_a_number_is_a_refusal(cluster, task, sbatch, match):
    (cluster.bin / "sbatch").write_text(f"#!/bin/sh\n{sbatch}\n")
    (cluster.bin / "scancel").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(UnfinishedError, match=match) as refused:
        prepare_at_scale(task, execution=ON_SLURM)
    assert "may be in the queue: `scancel --name=flexolmo-" in str(refused.value)


def test_ctrl_c_between_jobs_that_are_submitted_is_told(cluster, task, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(on_slurm, "submit_parts", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_at_scale(task, execution=NO_WAIT)
    assert "The jobs go on alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["-p", "p", "--time=1", "array=1", "job-name=x", "clusters=b", "arr=1", "wa"]
)
def test_options_that_would_break_the_jobs_are_refused(cluster, task, option):
    with pytest.raises(ConfigError, match="--slurm-option"):
        prepare_at_scale(task, execution=Execution("slurm", 3, slurm_options=(option,)))
    assert not task.out.parent.exists() and not cluster.jobs()


def test_scripts_hold_nothing_of_the_text(cluster, task):
    prepare_at_scale(task, execution=Execution("slurm", 3, 2, waits=False))
    jobs = list(cluster.jobs().values())
    name = next(work_directory(task.out).glob("*/")).name
    for stage, job in zip(("clean", "choose", "tokenize", "write"), jobs, strict=True):
        begin, command = Path(job["script"]).read_text().splitlines()
        assert begin == "#!/bin/bash" and command.endswith(f' {stage} "$SLURM_ARRAY_TASK_ID"')
        assert job["options"]["job-name"] == "flexolmo-" + name
    assert [job["options"]["array"] for job in jobs] == ["0-2%2", "0%2", "0-2%2", "0%2"]


def test_slurm_needs_its_programs_and_a_number_of_tasks(cluster, task, monkeypatch):
    with pytest.raises(ConfigError, match="needs --tasks"):
        prepare_at_scale(task, execution=Execution("slurm"))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="needs sbatch, squeue, scancel, not found here"):
        prepare_at_scale(task, execution=ON_SLURM)
    with pytest.raises(ConfigError, match="no executor 'swarm': expected local, slurm or ray"):
        prepare_at_scale(task, execution=Execution("swarm"))
    assert not list(task.out.parent.iterdir())


def test_a_part_waits_for_another_process_at_work_on_it(cluster, task, here):
    prepare_at_scale(task, execution=NO_WAIT)
    work = next(work_directory(task.out).glob("*/"))
    log = here / "second.log"
    log.touch()
    with open(work / "lock-clean-00001", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = start_fork(lambda: do_part(work, "clean", 1), log)
        while "Another process is at work on part 1 of clean: waiting" not in log.read_text():
            assert os.waitpid(second, os.WNOHANG) == (0, 0), log.read_text()
        assert not (work / "done-clean-00001.json").exists()
        fcntl.flock(lock, fcntl.LOCK_UN)  # the other has the file open too
    assert os.waitpid(second, 0) == (second, 0)
    assert (work / "done-clean-00001.json").exists()
