"""Several processes at once: who fails, who is stopped, what is said."""

import _thread
import os
import stat
import sys
import threading
import time

import pytest

from flexolmo.research.steps import jobs as room
from flexolmo.research.steps.jobs import Job, JobFailed, run_jobs

PROGRAM = f"""#!{sys.executable} -S
import os, sys, time
assert sys.argv[1:4] == ["-P", "-m", "flexolmo"]
word, *rest = sys.argv[4:]
if word == "sleep":
    open("pid", "w").write(str(os.getpid()))
    time.sleep(float(rest[0]))
    open("finished", "w").close()
elif word == "say":
    print(*rest, sep="\\n")
elif word == "die":
    os.kill(os.getpid(), 9)
elif word == "fail":
    print(*(f"line {{i}}" for i in range(20)), sep="\\n")
    print("MergeError: it does not fit", file=sys.stderr)
    sys.exit(2)
elif word == "progress":
    path = os.environ["FLEXOLMO_PROGRESS_FILE"]
    open(path, "w").write('{{"text": "3/4 tok", "done": 3, "total": 4, "seconds_left": 61}}')
    time.sleep(float(rest[0]))
"""


@pytest.fixture(autouse=True)
def program(tmp_path, monkeypatch):
    """In place of `python -m flexolmo`: a script that does as told."""
    path = tmp_path / "program"
    path.write_text(PROGRAM)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(room.sys, "executable", str(path))


def is_alive(directory):
    try:
        os.kill(int((directory / "pid").read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def test_each_job_runs_in_its_own_directory_and_its_seconds_are_told(tmp_path):
    jobs = [
        Job("a", ("sleep", "0.3"), tmp_path / "one"),
        Job("b b", ("say", "hi"), tmp_path / "two"),
    ]
    seconds = run_jobs(jobs, 2)
    assert set(seconds) == {"a", "b b"}
    assert 0.3 <= seconds["a"] < 10 and seconds["b b"] > 0
    assert (tmp_path / "one" / "finished").exists()
    assert jobs[1].log == tmp_path / "two" / "log" / "b-b.txt"
    assert jobs[1].log.read_text() == "hi\n"


def test_no_more_run_at_once_than_asked(tmp_path, monkeypatch):
    running, most, start = set(), [], room._start

    def watch(job):
        process = start(job)
        running.add(process)
        most.append(sum(p.poll() is None for p in running))
        return process

    monkeypatch.setattr(room, "_start", watch)
    seconds = run_jobs([Job(f"j{i}", ("sleep", "1"), tmp_path / f"d{i}") for i in range(3)], 2)
    assert len(seconds) == 3
    assert max(most) == 2


def test_no_jobs_take_no_time():
    assert run_jobs([], 2) == {}


def test_a_failing_job_gives_its_last_words_and_stops_the_others(tmp_path):
    jobs = [
        Job("long", ("sleep", "60"), tmp_path / "long"),
        Job("bad", ("fail",), tmp_path / "bad"),
        Job("later", ("sleep", "0"), tmp_path / "later"),
    ]
    started = time.monotonic()
    with pytest.raises(JobFailed) as caught:
        run_jobs(jobs, 2)
    said = str(caught.value)
    assert time.monotonic() - started < 20
    assert said.startswith("bad failed with exit code 2") and str(jobs[1].log) in said
    assert said.endswith("MergeError: it does not fit")
    assert "line 19" in said and "line 3\n" not in said  # the end of it, not all
    assert not (tmp_path / "long" / "finished").exists()
    assert not is_alive(tmp_path / "long")
    assert not (tmp_path / "later").exists()


def test_ctrl_c_stops_the_children(tmp_path):
    def interrupt():
        while not (tmp_path / "long" / "pid").exists():
            time.sleep(0.02)
        _thread.interrupt_main()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_jobs([Job("long", ("sleep", "60"), tmp_path / "long")], 1)
    thread.join()
    assert not (tmp_path / "long" / "finished").exists()
    assert not is_alive(tmp_path / "long")


def test_what_a_job_says_of_its_progress_is_shown(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(room, "_LINE_EVERY_SECONDS", 0.0)
    run_jobs([Job("train", ("progress", "0.5"), tmp_path / "d")], 1)
    shown = capfd.readouterr().err
    assert "train: 3/4 tok, 1:01 left" in shown
    assert "train: done in 0:" in shown


def test_progress_of_an_earlier_run_is_not_shown(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(room, "_LINE_EVERY_SECONDS", 0.0)
    job = Job("train", ("sleep", "0.1"), tmp_path / "d")
    job.log.parent.mkdir(parents=True)
    room._state_file(job).write_text('{"text": "old", "done": 1, "total": 1, "seconds_left": 0}')
    run_jobs([job], 1)
    assert "old" not in capfd.readouterr().err


def test_last_words_are_of_this_run(tmp_path):
    """A process that is killed says nothing; its log may hold what the run before said."""
    run_jobs([Job("a", ("say", "all is well"), tmp_path)], 1)
    with pytest.raises(JobFailed) as caught:
        run_jobs([Job("a", ("die",), tmp_path)], 1)
    assert "exit code -9" in str(caught.value)
    assert "all is well" not in str(caught.value)
