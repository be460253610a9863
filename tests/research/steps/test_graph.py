"""Steps: what runs, what does not run again, and what is left after a kill."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import reduce
from pathlib import Path

import made_kinds
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.errors import ConfigError, FlexOlmoError
from flexolmo.research.steps import graph, jobs, step
from flexolmo.research.steps.graph import order_steps, run_graph
from flexolmo.research.steps.jobs import JobFailed
from flexolmo.research.steps.step import Step, step_kind


@pytest.fixture(autouse=True)
def ran(tmp_path, monkeypatch):
    """What the steps told, line by line."""
    monkeypatch.setenv("RAN", str(tmp_path / "ran.txt"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.02)
    (tmp_path / "ran.txt").touch()
    return lambda: (tmp_path / "ran.txt").read_text().splitlines()


def is_running(directory):
    """Whether a process still works in a step's directory; it holds a lock while it lives."""
    with open(directory / "log" / "lock") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def wait_until(is_so, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- what runs --------------------------------------------------------------------------------


def test_the_same_work_under_two_labels_is_done_once(tmp_path, ran):
    one = Step("one", "add", {"n": 1, "m": 0})
    same = Step("the same", "add", {"m": 0, "n": 1})
    both = Step("both", "add", {"n": 10}, {"left": one, "right": same})
    assert one.identity == same.identity and len(one.identity) == 64
    assert run_graph([both, same], tmp_path, 2) == ["one", "both"] == ran()
    assert both.result(tmp_path)["metrics"] == {"value": 12}
    assert same.result(tmp_path) == one.result(tmp_path)
    assert run_graph([both], tmp_path, 2) == [] and len(ran()) == 2


def test_what_a_step_leaves(tmp_path):
    first = Step("first", "add", {"n": 1})
    last = Step("last/one two", "describe", {"seed": 7}, {"before": first})
    run_graph([last], tmp_path, 1)
    directory = last.directory(tmp_path)
    assert directory == tmp_path / "steps" / f"describe-{last.identity[:16]}"
    assert {p.name for p in directory.iterdir()} == {"step.json", "done.json", "log", "empty"}
    assert (directory / "log" / "last-one-two.txt").exists()
    assert json.loads((directory / "step.json").read_text()) == {
        "label": "last/one two",
        "kind": "describe",
        "version": 1,
        "settings": {"seed": 7},
        "identity": last.identity,
        "inputs": {"before": {"kind": "add", "identity": first.identity}},
    }
    done = last.result(tmp_path, verify=True)
    assert done["metrics"] == {"cwd": str(directory), "threads": "1", "label": "last/one two"}
    assert done["run"]["seed"] == 7 and set(done["run"]["data"]) == {"before"}
    assert set(done["outputs"]) == {"empty"} and done["outputs"]["empty"]["bytes"] == 0
    assert set(first.result(tmp_path)["outputs"]) == {"deep/value.txt"}


def test_roles_settings_kind_and_version_decide_a_step_and_its_label_does_not():
    a, b = Step("a", "add", {"n": 1}), Step("b", "add", {"n": 2})
    steps = [
        a,
        b,
        Step("", "subtract", {"n": 1}),
        Step("", "add", {"n": 1.0}),
        Step("", "add", {"n": 1}, {"x": a, "y": b}),
        Step("", "add", {"n": 1}, {"x": b, "y": a}),
        Step("", "add", {"n": 1}, {"x": a, "z": b}),
    ]
    assert len({s.identity for s in steps}) == len(steps)
    assert Step("other", "add", {"n": 1}).identity == a.identity


nodes = st.tuples(
    st.sampled_from(["add", "subtract"]), st.integers(0, 1), st.lists(st.integers(0, 5), max_size=3)
)
edits = st.tuples(
    st.integers(0, 5),
    nodes,
    st.sampled_from([None, None, "add", "subtract"]),
    st.sets(st.integers(0, 5), min_size=1),
)


class _Ended:
    """A process that did its work at once."""

    def __init__(self, job, *_):
        step._do_step(Path(job.arguments[0]), float(job.arguments[1]), job.arguments[2])

    def poll(self):
        return 0


@settings(max_examples=15)
@given(st.lists(nodes, min_size=6, max_size=6), st.lists(edits, min_size=1, max_size=4))
def test_just_the_work_never_done_before_is_done(made, changes):
    """Against brute force: every piece of work written out whole, with all it needs."""
    done = set()
    versions = {"add": 1, "subtract": 1}

    def written_out(i):
        kind, n, needs = made[i]
        return (kind, versions[kind], n, tuple(written_out(k) for k in needs if k < i))

    def value(work):
        kind, _, n, needs = work
        sign = (lambda k: 1) if kind == "add" else (lambda k: (-1) ** (k + 1))
        return n + sum(sign(k) * value(needed) for k, needed in enumerate(needs))

    def all_in(work):
        return {work}.union(*map(all_in, work[3]))

    def step_of(i):
        kind, n, needs = made[i]
        inputs = {"abc"[r]: step_of(k) for r, k in enumerate(k for k in needs if k < i)}
        return Step(f"node {i}", kind, {"n": n}, inputs)

    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "start_child", _Ended)
        patch.setattr(jobs, "_POLL_SECONDS", 0.0)
        patch.setattr("flexolmo.runtime.run_record", lambda *_: {})
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(step, "_KINDS", dict(step._KINDS))
        for where, node, newer, targets in changes:
            made[where] = node
            if newer:
                versions[newer] += 1
                step_kind(newer, versions[newer])(getattr(made_kinds, newer))
            needed = set().union(*(all_in(written_out(i)) for i in targets))
            steps = [step_of(i) for i in sorted(targets)]
            ordered = order_steps(steps, root)
            assert len(ordered) == len(needed)
            assert sum(not is_done for _, is_done in ordered) == len(needed - done)
            assert len(run_graph(steps, root, 2)) == len(needed - done)
            done |= needed
            assert run_graph(steps, root, 2) == []
            for i, s in zip(sorted(targets), steps, strict=True):
                assert s.result(root)["metrics"] == {"value": value(written_out(i))}


def test_the_longest_chain_goes_first(tmp_path, ran):
    chain = Step("chain 1", "add", {"n": 0})
    for i in (2, 3):
        chain = Step(f"chain {i}", "add", {"n": i}, {"before": chain})
    run_graph([Step("short", "add", {"n": 9}), chain], tmp_path, 1)
    assert ran()[:2] == ["chain 1", "chain 2"]


def test_of_steps_that_expect_to_take_long_the_longest_goes_first(tmp_path):
    brief = Step("brief", "add", {"n": 0}, expected_seconds=2.0)
    after = Step("after", "add", {"n": 1}, {"x": brief}, expected_seconds=5.0)
    long = Step("long", "add", {"n": 2}, expected_seconds=6.5)
    assert graph._seconds_to_the_end([brief, after, long], tmp_path) == {
        brief.identity: 7.0,
        after.identity: 5.0,
        long.identity: 6.5,
    }
    assert brief.identity == Step("brief", "add", {"n": 0}).identity


def test_a_step_starts_as_soon_as_it_can_while_others_run(tmp_path, monkeypatch):
    """One waits to meet another that must itself wait for a third."""
    alive, most, start = [], [], jobs.start_child

    def watch(job, variables):
        alive.append(start(job, variables))
        most.append(sum(p.poll() is None for p in alive))
        return alive[-1]

    monkeypatch.setattr(jobs, "start_child", watch)
    late = Step("late", "meet", {"me": 1, "other": 0}, {"x": Step("first", "add", {"n": 1})})
    run_graph([Step("early", "meet", {"me": 0, "other": 1}), late], tmp_path, 2)
    assert max(most) == 2


def test_kinds_that_took_long_are_taken_to_take_long(tmp_path):
    run_graph([Step("old", "add", {"n": 0})], tmp_path, 1)
    done = next(tmp_path.glob("steps/*/done.json"))
    done.write_text(json.dumps({**json.loads(done.read_text()), "seconds": 100.0}))
    first = Step("a", "add", {"n": 1})
    last = Step("b", "add", {"n": 2}, {"x": first})
    assert graph._seconds_to_the_end([first, last], tmp_path) == {
        first.identity: 200.0,
        last.identity: 100.0,
    }


# --- what goes wrong --------------------------------------------------------------------------


def test_a_killed_step_resumes_where_it_was_and_its_seconds_add_up(tmp_path, ran, monkeypatch):
    monkeypatch.setattr(graph, "_NOTE_EVERY_SECONDS", 0.0)
    count = Step("count", "count", {"n": 20, "die_at": 15})
    with pytest.raises(JobFailed, match="1 of 1 steps failed"):
        run_graph([count], tmp_path, 1)
    spent = json.loads((count.directory(tmp_path) / "log" / "seconds.json").read_text())
    assert spent > 15 * 0.02 and not count.is_done(tmp_path)
    assert run_graph([count], tmp_path, 1) == ["count"]
    assert ran() == ["count from 0", "count from 15"]
    assert count.result(tmp_path)["seconds"] > spent + 5 * 0.02


def test_a_failing_step_stops_only_those_that_need_it(tmp_path, capfd):
    bad = Step("bad", "refuse")
    gone = Step("gone", "vanish")
    good = Step("good", "add", {"n": 1})
    better = Step("better", "add", {"n": 1}, {"x": good})
    hindered = Step("hindered", "add", {"n": 1}, {"x": better, "y": bad})
    more = Step("more hindered", "add", {"n": 1}, {"x": hindered})
    with pytest.raises(JobFailed) as caught:
        run_graph([bad, gone, more], tmp_path, 1)
    log = bad.directory(tmp_path) / "log" / "bad.txt"
    said = str(caught.value)
    assert f"2 of 6 steps failed:\n  bad (log: {log})\n  gone (log: " in said
    assert said.endswith("Not run, for want of these: hindered, more hindered.")
    assert better.is_done(tmp_path) and not hindered.directory(tmp_path).exists()
    shown = capfd.readouterr().err
    assert f"bad failed with exit code 2 (log: {log})" in shown and "line 19" in shown
    assert "DataError: this text will not do" in shown and "Traceback" not in shown
    assert re.search(r"better: done in \d+:\d\d \(\d/6 done, \d+:\d\d elapsed\)", shown)


@pytest.mark.parametrize("left", [b"", b'{"identity": ', b"[]", b'{"identity": "other"}'])
def test_a_half_written_done_json_is_not_taken_for_done(tmp_path, ran, left):
    one = Step("one", "add", {"n": 1})
    run_graph([one], tmp_path, 1)
    whole = (one.directory(tmp_path) / "done.json").read_bytes()
    (one.directory(tmp_path) / "done.json").write_bytes(left)
    assert [is_done for _, is_done in order_steps([one], tmp_path)] == [False]
    with pytest.raises(FlexOlmoError, match="one is not done"):
        one.result(tmp_path)
    assert run_graph([one], tmp_path, 1) == ["one"] and ran() == ["one", "one"]
    assert (one.directory(tmp_path) / "done.json").read_bytes() != left != whole


def test_a_damaged_input_is_refused(tmp_path, capfd):
    one = Step("one", "add", {"n": 1})
    run_graph([one], tmp_path, 1)
    file = one.directory(tmp_path) / "deep" / "value.txt"
    time_noted = file.stat().st_mtime_ns
    os.utime(file)  # another time, the same content: nothing is wrong
    one.result(tmp_path)
    file.write_text("2")
    with pytest.raises(FlexOlmoError, match=r"value\.txt: not the content that was written"):
        one.result(tmp_path)
    with pytest.raises(JobFailed):
        run_graph([Step("two", "add", {"n": 2}, {"x": one})], tmp_path, 1)
    assert "value.txt: not the content that was written" in capfd.readouterr().err
    os.utime(file, ns=(time_noted, time_noted))  # hidden well: found only by reading it
    one.result(tmp_path)
    with pytest.raises(FlexOlmoError, match="not the content"):
        run_graph([one], tmp_path, 1, verify=True)
    file.write_text("longer")
    with pytest.raises(FlexOlmoError, match="6 bytes, expected 1"):
        one.result(tmp_path)
    file.unlink()
    with pytest.raises(FlexOlmoError, match=r"value\.txt: missing"):
        one.result(tmp_path)


def driver(root):
    """Another Python that runs two steps without an end."""
    code = (
        "import sys, made_kinds; from flexolmo.research.steps.graph import run_graph, Step; "
        "run_graph([Step('a', 'hang'), Step('b', 'hang', {'x': 1})], sys.argv[1], 2)"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(root)], stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_from_outside_it_leaves_no_child_and_can_go_on(tmp_path, ran, sign):
    steps = [Step("a", "hang"), Step("b", "hang", {"x": 1})]
    process = driver(tmp_path)
    try:
        wait_until(lambda: all((s.directory(tmp_path) / "begun").exists() for s in steps))
        assert all(is_running(s.directory(tmp_path)) for s in steps)
        with pytest.raises(FlexOlmoError, match="Another run is at work in"):
            run_graph(steps, tmp_path, 1)
        process.send_signal(sign)
        process.wait(10)
        if sign != signal.SIGKILL:  # else they are ended by the system, a moment later
            assert not any(is_running(s.directory(tmp_path)) for s in steps)
        wait_until(lambda: not any(is_running(s.directory(tmp_path)) for s in steps))
    finally:
        process.kill()
        process.wait()
    if sign != signal.SIGKILL:
        assert all((s.directory(tmp_path) / "log" / "seconds.json").exists() for s in steps)
    assert sorted(ran()) == ["a", "b"]
    assert run_graph([Step("c", "add", {"n": 1})], tmp_path, 1) == ["c"]  # the lock is free


def test_a_step_waits_for_an_attempt_that_is_still_ending(tmp_path, ran):
    one = Step("one", "add", {"n": 1})
    lock = one.directory(tmp_path) / "log" / "lock"
    with step.hold_lock(lock, wait=False), jobs.running_jobs(0, 1, jobs.Children(1)) as running:
        running.start(one.prepare(tmp_path)[0])
        for _ in range(20):
            assert not running.ended() and ran() == []
    run_graph([one], tmp_path, 1)


def test_a_kind_whose_code_changed_during_the_run_is_refused(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(step, "_KINDS", dict(step._KINDS))
    step_kind("add", 2)(made_kinds.add)  # here, but not in the file that the child reads
    with pytest.raises(JobFailed):
        run_graph([Step("one", "add", {"n": 1})], tmp_path, 1)
    assert "version 2 of kind 'add' is gone" in capfd.readouterr().err


def test_bad_steps_and_kinds_are_refused_in_words(tmp_path):
    known = r"kind 'ad' is unknown; known: (.*, )?add, (.*, )?count,"
    with pytest.raises(ConfigError, match=known):
        Step("x", "ad")
    with pytest.raises(ConfigError, match="Step x: settings are not plain JSON"):
        Step("x", "add", {"n": float("nan")})
    with pytest.raises(ConfigError, match="nested more than 200 levels"):
        Step("x", "add", {"n": reduce(lambda value, _: [value], range(300), 1)})
    with pytest.raises(ConfigError, match="Two different steps are labelled 'x'"):
        order_steps([Step("x", "add", {"n": 1}), Step("x", "add", {"n": 2})], tmp_path)
    with pytest.raises(ConfigError, match="that no other module uses"):
        step_kind("add", 1)(lambda _: None)
    with pytest.raises(ConfigError, match="letters, digits and _"):
        step_kind("../add", 1)(made_kinds.add)


# --- what is kept -----------------------------------------------------------------------------


def test_a_root_can_be_moved(tmp_path, ran):
    one = Step("one", "add", {"n": 1})
    run_graph([one], tmp_path / "here", 1)
    (tmp_path / "here").rename(tmp_path / "there")
    two = Step("two", "add", {"n": 2}, {"x": one})
    assert run_graph([two], tmp_path / "there", 1, verify=True) == ["two"]


def test_progress_of_a_step_is_shown(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(jobs, "_LINE_EVERY_SECONDS", 0.0)
    run_graph([Step("count", "count", {"n": 30})], tmp_path, 1)
    shown = capfd.readouterr().err
    assert re.search(r"count: done in \d+:\d\d \(1/1 done, \d+:\d\d elapsed\)", shown)
    assert "/30 numbers, " in shown and " left" in shown


def test_a_step_runs_with_the_seed_it_names_and_says_where_it_was_made(tmp_path):
    """The real thing, torch included: a kind in a module of its own."""
    (tmp_path / "kinds").mkdir()
    (tmp_path / "kinds" / "drawing_kinds.py").write_text(
        "from flexolmo.research.steps.step import step_kind\n\n\n"
        "@step_kind('draw', version=1)\ndef draw(step):\n    import torch\n"
        "    return {'x': torch.rand(()).item(), 'threads': torch.get_num_threads()}\n"
    )
    code = (
        "import sys, drawing_kinds; from flexolmo.research.steps.graph import Step, run_graph; "
        "run_graph([Step('draw', 'draw', {'seed': 5})], sys.argv[1], 1)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "kinds")},
    )
    import torch

    done = json.loads(next(tmp_path.glob("steps/*/done.json")).read_text())
    x = torch.rand((), generator=torch.Generator().manual_seed(5)).item()
    assert done["metrics"] == {"x": x, "threads": 1}
    assert done["run"]["machine"]["torch_threads"] == 1 and "torch" in done["run"]["software"]
