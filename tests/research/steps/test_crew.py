"""Steps under torchrun: who starts what, and how all end. Threads stand in for processes."""

import json
import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import made_kinds
import pytest
import torch.distributed as dist

from flexolmo.errors import ConfigError, FlexOlmoError
from flexolmo.files import write_json
from flexolmo.model import parallel
from flexolmo.model.parallel import Meeting
from flexolmo.research.steps import crew as room
from flexolmo.research.steps import jobs, step
from flexolmo.research.steps.crew import Crew, find_workers
from flexolmo.research.steps.graph import run_graph
from flexolmo.research.steps.jobs import Job

CODE = "exec(open('code.py').read())"
SAYS = "import os; print('first' if 'FLEXOLMO_PROGRESS_FILE' in os.environ else 'other'); "
FAILS_ELSEWHERE = SAYS + (
    "import sys, time; 'FLEXOLMO_PROGRESS_FILE' in os.environ and time.sleep(60); sys.exit(3)"
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(room, "_LISTEN_SECONDS", 0.01)


@pytest.fixture
def coded(monkeypatch):
    """Steps of which each does what its directory's code.py says."""
    monkeypatch.setattr(room, "job_of", lambda directory, *_: job_in(directory))


@pytest.fixture
def crew(monkeypatch, tmp_path):
    """The workers of the first of three, with two that follow."""
    store = dist.HashStore()

    @contextmanager
    def meeting():
        yield Meeting(store, getattr(here, "rank", 0), 3)

    def follow(rank):
        here.rank = rank
        with find_workers(None, tmp_path, "cpu") as workers:
            assert workers is None

    here = threading.local()
    monkeypatch.setattr(room, "meeting", meeting)
    others = [threading.Thread(target=follow, args=(rank,)) for rank in (1, 2)]
    with find_workers(None, tmp_path, "cpu") as workers:
        for thread in others:
            thread.start()
        yield workers
    for thread in others:
        thread.join(5)
        assert not thread.is_alive()


def job_in(directory):
    return Job("it", (str(directory), "0.5", "cpu"), directory, ("-c", CODE))


def job(tmp_path, kind, code):
    directory = tmp_path / "steps" / f"{kind}-{'0' * 16}"
    directory.mkdir(parents=True)
    (directory / "code.py").write_text(code)
    return job_in(directory)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def code_of(started):
    deadline = time.monotonic() + 20
    while (code := started.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return code


def test_a_shared_job_runs_in_every_process_and_has_one_log(tmp_path, crew, coded):
    assert crew.has_room(is_shared=True)
    one = job(tmp_path, "one", SAYS)
    started = crew.start(one, is_shared=True)
    assert not crew.has_room(is_shared=False)
    assert code_of(started) == 0
    assert sorted(one.log.read_text().split()) == ["first", "other", "other"]
    assert crew.has_room(is_shared=True)


def test_children_of_one_shared_job_are_one_group_of_their_own(tmp_path, crew, coded):
    told = f"import os; print(os.environ.get('{parallel.GROUP}'))"
    groups = []
    for label in ("one", "two"):
        shared = job(tmp_path, label, told)
        assert code_of(crew.start(shared, is_shared=True)) == 0
        (group,) = set(shared.log.read_text().splitlines())
        groups.append(group)
    alone = job(tmp_path, "three", told)
    assert code_of(crew.start(alone, is_shared=False)) == 0
    assert len({*groups, alone.log.read_text().strip()}) == 3


def test_other_jobs_run_one_in_each_process_at_the_same_time(tmp_path, crew, coded):
    """Each waits for the other two."""
    waits = (
        "import time; from pathlib import Path; Path('met').touch(); end = time.time() + 20\n"
        "while len(list(Path('..').glob('*/met'))) < 3: assert time.time() < end"
    )
    started = []
    for i in range(3):
        assert crew.has_room(is_shared=False)
        started.append(crew.start(job(tmp_path, f"job{i}", waits), is_shared=False))
        assert not crew.has_room(is_shared=True)
    assert [code_of(one) for one in started] == [0, 0, 0]


def test_a_failure_in_one_process_ends_the_job_in_all_and_is_told(tmp_path, crew, coded):
    one = job(tmp_path, "one", FAILS_ELSEWHERE)
    assert code_of(crew.start(one, is_shared=True)) == 3
    assert "was the first to end, with exit code 3." in one.log.read_text()
    assert "Process 0" not in one.log.read_text()
    assert code_of(crew.start(job(tmp_path, "two", SAYS), is_shared=True)) == 0


def test_jobs_of_other_processes_end_with_the_first(tmp_path, crew, coded):
    waits = "import os, time; open(str(os.getpid()), 'w').close(); time.sleep(60)"
    with jobs.running_jobs(0, 1, crew) as running:
        one = job(tmp_path, "one", waits)
        running.start(one, is_shared=True)
        deadline = time.monotonic() + 20
        while len(pids := [p for p in one.directory.iterdir() if p.name.isdigit()]) < 3:
            assert time.monotonic() < deadline
    deadline = time.monotonic() + 20
    while any(is_alive(int(p.name)) for p in pids):
        assert time.monotonic() < deadline


def test_a_process_that_shows_no_life_ends_all(monkeypatch):
    monkeypatch.setattr(parallel, "_SILENT_SECONDS", 0.05)
    store = dist.HashStore()
    first, other = (Meeting(store, rank, 2) for rank in range(2))
    for _ in range(10):
        other.show_life()
        first.refuse_silence()
        time.sleep(0.01)
    with pytest.raises(FlexOlmoError, match="One of the 2 processes ended"):
        while True:
            first.refuse_silence()
            time.sleep(0.01)


def test_steps_of_a_graph_are_dealt_out(tmp_path, monkeypatch, crew):
    """Two that wait for each other, and one after them."""
    monkeypatch.setenv("RAN", str(tmp_path / "ran.txt"))
    monkeypatch.setenv("PYTHONPATH", str(Path(made_kinds.__file__).parent))
    both = [step.Step(f"meet {i}", "meet", {"me": i, "other": 1 - i}) for i in range(2)]
    last = step.Step("last", "describe", {}, {"a": both[0], "b": both[1]})
    assert sorted(run_graph([last], tmp_path, crew)) == ["last", "meet 0", "meet 1"]
    assert last.result(tmp_path)["metrics"]["label"] == "last"


@pytest.mark.parametrize(
    "change", [{"step": "../a-0123456789abcdef"}, {"step": "a"}, {"program": ["-c", "x"]}]
)
def test_words_of_a_stranger_start_nothing(change):
    good = {"step": "a-0123456789abcdef", "earlier": 0.0, "group": None, "is_first": True}
    assert room._read_order(json.dumps(good)).step == good["step"]
    with pytest.raises(FlexOlmoError, match="reaches the port"):
        room._read_order(json.dumps(good | change))


def test_a_number_of_steps_at_a_time_is_refused_under_torchrun(crew):
    expected = pytest.raises(ConfigError, match="Leave --processes out")
    with expected, find_workers(4, Path(), "cpu"):
        pass


def test_without_torchrun_steps_are_children(monkeypatch):
    for name in parallel.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with find_workers(None, Path(), "cpu") as workers:
        assert isinstance(workers, jobs.Children) and not isinstance(workers, Crew)


@pytest.mark.parametrize("is_begun_by_several", [False, True])
def test_one_process_ends_in_a_group_what_several_began(tmp_path, monkeypatch, is_begun_by_several):
    monkeypatch.setattr(step, "_KINDS", dict(step._KINDS))
    step.step_kind("learn", 1, is_shared=True)(lambda _: None)
    one = step.Step("one", "learn")
    one.prepare(tmp_path)
    directory = one.directory(tmp_path)
    if is_begun_by_several:
        write_json(directory / "log" / "processes.json", 2)
    with step._taking_part(directory, "cpu") as device:
        assert device == "cpu"
        assert parallel.are_several() == is_begun_by_several
        step._do_step(directory, 0.0, device)
    assert one.is_done(tmp_path) and not parallel.are_several()
