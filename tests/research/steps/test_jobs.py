"""Several processes at once: who fails, who is stopped, what is said."""

import _thread
import os
import stat
import sys
import threading
import time

import pytest

from flexolmo.research.steps import jobs as room
from flexolmo.research.steps.jobs import Children, Job, running_jobs

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
elif word == "threads":
    print(os.environ["OMP_NUM_THREADS"])
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


def run_jobs(jobs):
    """Run `jobs` together until one fails; exit code and seconds of each that ended, by label."""
    found = {}
    with running_jobs(0, len(jobs), Children(len(jobs))) as running:
        for job in jobs:
            running.start(job)
        while running.seconds() and not any(code for code, _ in found.values()):
            found |= {job.label: (code, seconds) for job, code, seconds in running.ended()}
    return found


def test_each_job_runs_in_its_own_directory_and_its_seconds_are_told(tmp_path):
    jobs = [
        Job("a", ("sleep", "0.3"), tmp_path / "one"),
        Job("b b", ("say", "hi"), tmp_path / "two"),
    ]
    ended = run_jobs(jobs)
    assert {label: code for label, (code, _) in ended.items()} == {"a": 0, "b b": 0}
    assert 0.3 <= ended["a"][1] < 10 and ended["b b"][1] > 0
    assert (tmp_path / "one" / "finished").exists()
    assert jobs[1].log == tmp_path / "two" / "log" / "b-b.txt"
    assert jobs[1].log.read_text() == "hi\n"


@pytest.mark.parametrize("set_before", [None, "7"])
@pytest.mark.parametrize(("count", "threads"), [(1, 6), (2, 3), (4, 1), (9, 1)])
def test_jobs_share_out_the_processors_unless_told_how_many(
    tmp_path, monkeypatch, count, threads, set_before
):
    monkeypatch.setattr(room, "count_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_before is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", set_before)
    job = Job("threads", ("threads",), tmp_path)
    assert Children(count).start(job, False).wait() == 0
    assert job.log.read_text() == f"{set_before or threads}\n"


def test_a_failing_job_gives_its_last_words_and_the_others_are_stopped_on_the_way_out(
    tmp_path, capfd
):
    jobs = [
        Job("long", ("sleep", "60"), tmp_path / "long"),
        Job("bad", ("fail",), tmp_path / "bad"),
    ]
    started = time.monotonic()
    assert run_jobs(jobs)["bad"][0] == 2
    assert time.monotonic() - started < 20
    said = capfd.readouterr().err
    assert said.startswith("bad failed with exit code 2") and str(jobs[1].log) in said
    assert said.endswith("MergeError: it does not fit\n")
    assert "line 19" in said and "line 3\n" not in said  # the end of it, not all
    assert jobs[1].last_words(lines=1) == "MergeError: it does not fit"
    assert not (tmp_path / "long" / "finished").exists()
    assert not is_alive(tmp_path / "long")


def test_ctrl_c_stops_the_children(tmp_path):
    def interrupt():
        while not (tmp_path / "long" / "pid").exists():
            time.sleep(0.02)
        _thread.interrupt_main()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_jobs([Job("long", ("sleep", "60"), tmp_path / "long")])
    thread.join()
    assert not (tmp_path / "long" / "finished").exists()
    assert not is_alive(tmp_path / "long")


def test_what_a_job_says_of_its_progress_is_shown(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(room, "_LINE_EVERY_SECONDS", 0.0)
    run_jobs([Job("train", ("progress", "0.5"), tmp_path / "d")])
    shown = capfd.readouterr().err
    assert "train: 3/4 tok, 1:01 left" in shown
    assert "train: done in 0:" in shown


def test_progress_of_an_earlier_run_is_not_shown(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(room, "_LINE_EVERY_SECONDS", 0.0)
    job = Job("train", ("sleep", "0.1"), tmp_path / "d")
    job.log.parent.mkdir(parents=True)
    room._state_file(job).write_text('{"text": "old", "done": 1, "total": 1, "seconds_left": 0}')
    run_jobs([job])
    assert "old" not in capfd.readouterr().err


def test_last_words_are_of_this_run(tmp_path):
    """A process that is killed says nothing; its log may hold what the run before said."""
    run_jobs([Job("a", ("say", "all is well"), tmp_path)])
    killed = Job("a", ("die",), tmp_path)
    assert run_jobs([killed])["a"][0] == -9
    assert killed.last_words() == ""
