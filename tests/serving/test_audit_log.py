"""The audit log's writer: durable, whole after kills and full disks, shared by threads."""

import datetime
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from flexolmo.bundle.signing import encode_public
from flexolmo.bundle.strict import Claim
from flexolmo.errors import AuditError
from flexolmo.serving import audit_log
from flexolmo.serving.audit_check import check_log, newest_checkpoint, public_key
from flexolmo.serving.audit_log import AuditLog
from flexolmo.serving.audit_proof import prove_continuation, prove_entry
from flexolmo.serving.entries import (
    FIELDS,
    MAX_ENTRY_BYTES,
    NOTHING_BEFORE,
    Decision,
    Entry,
    digest_leaf,
)
from flexolmo.serving.metering import measure_usage
from flexolmo.serving.tree import Frontier, hash_leaf
from made_audit import decision, fill, finished
from made_disks import file_size_limit


@pytest.fixture
def log(tmp_path):
    log = AuditLog.open(tmp_path / "audit")
    yield log
    log.close()


def lines_of(directory):
    files = sorted(directory.glob("0*.jsonl"))
    return [line for file in files for line in file.read_bytes().splitlines()]


def report_of(directory):
    return check_log(directory, public_key(directory))


def assert_holds(directory, num_entries):
    report = report_of(directory)
    assert (report.findings, report.num_entries) == ([], num_entries)


class OldDecision(Claim):
    """Fields of a decision in version 1 of the format."""

    __annotations__ = {n: a for n, a in Decision.__annotations__.items() if n != "roles"}


def test_a_log_of_the_version_before_holds_and_goes_on_with_roles(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(audit_log, "NEW_ORIGIN", "flexolmo-audit-log/1/")
        patch.setitem(FIELDS, "decision", OldDecision)
        log = AuditLog.open(tmp_path / "audit")
        old = decision()
        del old["roles"]
        log.append("decision", old)
        log.append("finished", finished(0))
        kept = log.checkpoint()
        log.close()
    assert_holds(tmp_path / "audit", 2)
    log = AuditLog.open(tmp_path / "audit")
    log.append("decision", decision())
    log.append("finished", finished(2))
    with pytest.raises(AuditError, match="roles"):
        log.append("decision", old)
    log.close()
    key = public_key(tmp_path / "audit")
    report = check_log(tmp_path / "audit", key, [kept])
    assert (report.findings, report.num_entries) == ([], 4)
    assert report.newest.origin == kept.origin and kept.origin.startswith("flexolmo-audit-log/1/")
    roles = [json.loads(line)["fields"].get("roles") for line in lines_of(tmp_path / "audit")]
    assert roles == [None, None, ["doctor"], None]
    for number in range(4):
        assert f"Entry {number}" in prove_entry(tmp_path / "audit", number, key).claim(key)
    prove_continuation(tmp_path / "audit", kept, key).claim(key)
    today = datetime.datetime.now(datetime.UTC).date()
    (row,) = measure_usage(tmp_path / "audit", today, today, "principal", key)
    assert (row.name, row.requests) == ("alice", 2)


# --- what is written ------------------------------------------------------------------------------


def test_each_entry_names_the_one_before_and_all_are_under_the_signed_root(tmp_path):
    log = AuditLog.open(tmp_path / "audit")
    numbers = [log.append("decision", decision()), log.append("finished", finished(0))]
    signed = log.checkpoint()
    log.close()
    assert numbers == [0, 1]
    previous, tree = NOTHING_BEFORE, Frontier()
    for number, line in enumerate(lines_of(tmp_path / "audit")):
        entry = json.loads(line)
        assert (entry["number"], entry["previous"]) == (number, previous)
        assert line == json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
        tree.append(hash_leaf(line))
        previous = digest_leaf(hash_leaf(line))
    assert (signed.size, signed.root) == (2, tree.root())
    assert entry["kind"] == "finished" and entry["fields"] == finished(0)


def test_nothing_in_the_directory_is_for_others(tmp_path):
    before = os.umask(0)
    try:
        AuditLog.open(tmp_path / "audit").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "audit").stat().st_mode) == 0o700
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "audit").iterdir()}
    assert set(modes) == {"checkpoints.jsonl", f"{0:020}.jsonl", "log.pem", "log.pem.pub"}
    assert all(mode == 0o600 for name, mode in modes.items() if name != "log.pem.pub")


@pytest.mark.parametrize(
    "kind, fields, named",
    [
        ("decision", decision(prompt="Dear doctor"), "prompt"),
        ("finished", finished(0, answer="Dear patient"), "answer"),
        ("finished", finished(0, routes=[[0.1]]), "routes"),
        ("finished", finished(0, shares={"amber": [0.1, 0.2]}), "shares.amber"),
        ("finished", finished(0, owners={}), "owners must be given"),
        ("finished", finished(0, shares={"public": float("nan")}, owners={}), "shares.public"),
        ("finished", finished(0, prompt_tokens=-1), "prompt_tokens"),
        ("finished", finished(0, prompt_tokens=True), "prompt_tokens"),
        ("decision", decision(principal="a" * 257), "principal"),
        ("decision", decision(principal="\ud800"), "principal"),
        ("decision", {}, "request_id"),
    ],
)
def test_a_field_without_a_place_is_refused_by_name(log, kind, fields, named):
    with pytest.raises(AuditError, match=named):
        log.append(kind, fields)
    assert log.append("decision", decision()) == 0


def test_every_kind_can_be_written(log):
    loaded = {k: decision()[k] for k in ("model_digest", "policy_digest")} | {"experts": {}}
    fields = {
        "started": loaded,
        "decision": decision(),
        "finished": finished(1),
        "revoked": {"experts": ["amber"], "why": "revoked by Ann"},
        "reloaded": loaded,
        "stopped": {"why": "SIGTERM"},
        "traced": {n: decision()["model_digest"] for n in ("client", "index", "question")}
        | {"number": 1, "level": "yes", "questions": 2, "found": True},
    }
    assert fields.keys() == FIELDS.keys()
    assert [log.append(kind, f) for kind, f in fields.items()] == list(range(7))


def test_long_reasons_are_cut_and_too_long_an_entry_is_refused(log, tmp_path):
    log.append("decision", decision(refused={"birch": ["x" * 200_000]}))
    assert Entry.decode(lines_of(tmp_path / "audit")[0]).fields["refused"]["birch"] == ["x" * 1000]
    many = {f"e{i}": ["x" * 1000] for i in range(MAX_ENTRY_BYTES // 1000)}
    with pytest.raises(AuditError, match="is longer than 1,048,576"):
        log.append("decision", decision(refused=many))


def test_control_characters_stay_inside_the_line(log, tmp_path):
    log.append("decision", decision(principal="a\n\x1b[2J\u2028"))
    (line,) = lines_of(tmp_path / "audit")
    assert Entry.decode(line).fields["principal"] == "a\n\x1b[2J\u2028"


# --- checkpoints, files, keys ---------------------------------------------------------------------


def test_checkpoints_are_signed_at_opening_after_so_many_entries_and_at_closing(tmp_path):
    log = AuditLog.open(tmp_path / "audit", checkpoint_entries=3)
    fill(log, 7)
    log.close()
    AuditLog.open(tmp_path / "audit").close()
    kept = [json.loads(x) for x in (tmp_path / "audit/checkpoints.jsonl").read_bytes().splitlines()]
    assert [k["checkpoint"].split("\n")[1] for k in kept] == ["0", "3", "6", "7", "7", "7"]
    assert_holds(tmp_path / "audit", 7)


def test_a_checkpoint_is_signed_after_so_many_seconds_if_there_is_a_new_entry(tmp_path):
    log = AuditLog.open(tmp_path / "audit", checkpoint_seconds=0.02)
    key = public_key(tmp_path / "audit")
    time.sleep(0.1)
    assert len((tmp_path / "audit/checkpoints.jsonl").read_bytes().splitlines()) == 1
    fill(log, 1)
    for _ in range(500):
        if newest_checkpoint(tmp_path / "audit", key).size == 1:
            break
        time.sleep(0.01)
    assert newest_checkpoint(tmp_path / "audit", key).size == 1
    log.close()


@pytest.mark.parametrize("sizes", [[5, 4, 3], [1] * 12, [0, 12]])
def test_a_log_goes_on_where_it_ended_over_many_files(tmp_path, sizes):
    for size in sizes:
        log = AuditLog.open(tmp_path / "audit", segment_bytes=500)
        fill(log, size)
        log.close()
    assert len(list((tmp_path / "audit").glob("0*.jsonl"))) > 3
    assert_holds(tmp_path / "audit", 12)


def test_a_new_day_begins_a_new_file(tmp_path, monkeypatch):
    days = iter(["2026-11-01", "2026-11-01", "2026-11-02", "2026-11-03"])
    log = AuditLog.open(tmp_path / "audit")
    monkeypatch.setattr(
        "flexolmo.serving.audit_log.utc_now", lambda: f"{next(days)}T00:00:00.000000Z"
    )
    fill(log, 3)
    log.close()
    monkeypatch.undo()
    log = AuditLog.open(tmp_path / "audit")
    fill(log, 1)
    log.close()
    names = sorted(int(p.stem) for p in (tmp_path / "audit").glob("0*.jsonl"))
    assert names == [0, 2, 3]
    assert_holds(tmp_path / "audit", 4)


def test_a_key_can_be_kept_elsewhere_and_no_other_goes_on(tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    log = AuditLog.open(tmp_path / "audit", key)
    fill(log, 1)
    log.close()
    assert not (tmp_path / "audit/log.pem").exists()
    assert (tmp_path / "audit/log.pem.pub").read_bytes() == encode_public(key)
    assert_holds(tmp_path / "audit", 1)
    with pytest.raises(AuditError, match="is kept elsewhere, or was lost"):
        AuditLog.open(tmp_path / "audit")
    with pytest.raises(AuditError, match="was begun with another key"):
        AuditLog.open(tmp_path / "audit", ec.generate_private_key(ec.SECP256R1()))
    AuditLog.open(tmp_path / "audit", key).close()


def test_a_log_whose_making_was_cut_short_after_its_private_key_is_made(tmp_path):
    AuditLog.open(tmp_path / "audit").close()
    (tmp_path / "audit/log.pem.pub").unlink()
    AuditLog.open(tmp_path / "audit").close()
    assert_holds(tmp_path / "audit", 0)


# --- one writer -----------------------------------------------------------------------------------


def test_a_second_writer_is_refused_by_name_until_the_first_closes(tmp_path):
    first = AuditLog.open(tmp_path / "audit")
    with pytest.raises(AuditError, match=r"audit cannot be locked: another server"):
        AuditLog.open(tmp_path / "audit")
    first.append("decision", decision())
    first.close()
    second = AuditLog.open(tmp_path / "audit")
    assert second.append("decision", decision()) == 1
    second.close()


def test_a_closed_log_takes_nothing_and_can_be_closed_again(tmp_path):
    log = AuditLog.open(tmp_path / "audit")
    log.close()
    log.close()
    for act in (lambda: log.append("decision", decision()), log.checkpoint):
        with pytest.raises(AuditError, match="is closed"):
            act()


def test_many_threads_share_an_fsync_and_each_has_its_own_number(tmp_path, monkeypatch):
    log = AuditLog.open(tmp_path / "audit", checkpoint_entries=10**6)
    numbers = {i: [] for i in range(16)}
    synced = []
    fsync = os.fsync

    def slow_fsync(fd):
        time.sleep(0.005)
        synced.append(fd)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", slow_fsync)

    def work(i):
        for j in range(20):
            number = log.append("decision", decision(f"{i} {j}"))
            line = lines_of(tmp_path / "audit")[number]  # whole, before `append` returned
            assert Entry.decode(line).fields["principal"] == f"{i} {j}"
            numbers[i].append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in numbers]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    log.close()
    assert all(n == sorted(n) for n in numbers.values())
    assert sorted(itertools.chain(*numbers.values())) == list(range(320))
    assert len(synced) < 160
    assert_holds(tmp_path / "audit", 320)


def test_what_waits_when_the_log_is_closed_is_written_and_signed(tmp_path, monkeypatch):
    log = AuditLog.open(tmp_path / "audit")
    fsync, result, written, waiting = os.fsync, Future.result, [], threading.Semaphore(0)

    def slow_fsync(fd):
        time.sleep(0.05)
        fsync(fd)

    def wait(future):
        waiting.release()
        return result(future)

    monkeypatch.setattr(os, "fsync", slow_fsync)
    monkeypatch.setattr(Future, "result", wait)
    workers = [
        threading.Thread(target=lambda: written.append(log.append("decision", decision())))
        for _ in range(8)
    ]
    for worker in workers:
        worker.start()
    for _ in workers:
        waiting.acquire()
    log.close()
    for worker in workers:
        worker.join()
    assert sorted(written) == list(range(8))
    report = report_of(tmp_path / "audit")
    assert (report.findings, report.newest.size) == ([], 8)


# --- kills and full disks -------------------------------------------------------------------------

WRITER = """
import sys, threading
from pathlib import Path
from flexolmo.serving.audit_log import AuditLog
from made_audit import decision
log = AuditLog.open(Path(sys.argv[1]), segment_bytes=3000, checkpoint_entries=7)
def work():
    while True:
        sys.stdout.write(f"{log.append('decision', decision())}\\n")
        sys.stdout.flush()
for _ in range(4):
    threading.Thread(target=work).start()
"""


def start_writer(directory):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


def test_a_server_killed_at_any_moment_loses_no_entry_that_it_was_told_of(tmp_path):
    """And while it lives, another process is refused, and the log verifies."""
    told = set()
    for count in (1, 40, 90):
        with start_writer(tmp_path / "audit") as writer:
            told |= {int(writer.stdout.readline()) for _ in range(count)}
            with pytest.raises(AuditError, match="another server"):
                AuditLog.open(tmp_path / "audit")
            report = report_of(tmp_path / "audit")
            assert report.findings == [] and report.num_entries > max(told)
            writer.send_signal(signal.SIGKILL)
            told |= {int(n) for n in writer.stdout.read().split("\n")[:-1]}
    log = AuditLog.open(tmp_path / "audit")
    log.close()
    entries = [Entry.decode(line) for line in lines_of(tmp_path / "audit")]
    assert [e.number for e in entries] == list(range(len(entries)))
    assert told <= {e.number for e in entries} and len(entries) <= len(told) + 3 * 4
    assert_holds(tmp_path / "audit", len(entries))


@pytest.mark.parametrize("file", [f"{0:020}.jsonl", "checkpoints.jsonl"])
@pytest.mark.parametrize("rest", [b'{"fields":{"ask', b"\0" * 10_000])
def test_a_torn_last_line_is_removed_and_nothing_else(tmp_path, file, rest):
    log = AuditLog.open(tmp_path / "audit")
    fill(log, 3)
    log.close()
    whole = (tmp_path / "audit" / file).read_bytes()
    (tmp_path / "audit" / file).write_bytes(whole + rest)
    log = AuditLog.open(tmp_path / "audit")
    assert rest not in (tmp_path / "audit" / file).read_bytes()
    assert log.append("decision", decision()) == 3
    log.close()
    assert (tmp_path / "audit" / file).read_bytes().startswith(whole + b"{")
    assert_holds(tmp_path / "audit", 4)


@pytest.mark.parametrize("checkpoint_entries", [1, 1000])
def test_entries_after_the_newest_checkpoint_are_read_on_and_signed(tmp_path, checkpoint_entries):
    log = AuditLog.open(tmp_path / "audit", checkpoint_entries=checkpoint_entries)
    fill(log, 3)
    kept = (tmp_path / "audit/checkpoints.jsonl").read_bytes()
    log.close()
    (tmp_path / "audit/checkpoints.jsonl").write_bytes(kept)  # as a kill leaves it
    log = AuditLog.open(tmp_path / "audit")
    assert log.checkpoint().size == 3
    log.close()
    assert_holds(tmp_path / "audit", 3)


def test_a_damaged_log_is_not_gone_on_with(tmp_path):
    log = AuditLog.open(tmp_path / "audit", segment_bytes=1)
    kept = (tmp_path / "audit/checkpoints.jsonl").read_bytes()
    fill(log, 3)
    log.close()
    files = sorted((tmp_path / "audit").glob("0*.jsonl"))
    signed = (tmp_path / "audit/checkpoints.jsonl").read_bytes()
    middle, last = files[1].read_bytes(), files[-1].read_bytes()

    def refuse(checkpoints, words):
        (tmp_path / "audit/checkpoints.jsonl").write_bytes(checkpoints)
        with pytest.raises(AuditError, match=words) as e:
            AuditLog.open(tmp_path / "audit")
        assert "flexolmo audit verify" in str(e.value)

    files[-1].unlink()
    refuse(signed, "it ends before entry 2")
    files[-1].write_bytes(last)
    files[1].write_bytes(middle.replace(b"reason 1", b"reason 9"))
    refuse(kept, "entry 2 in .* is damaged")
    files[1].write_bytes(middle[:-1])
    refuse(kept, "entry 1 in .* is damaged")
    files[1].unlink()
    refuse(kept, f"entries before {files[2].name} are missing")
    refuse(b"", "the last line of checkpoints.jsonl is damaged")
    files[1].write_bytes(middle)
    (tmp_path / "audit/checkpoints.jsonl").write_bytes(signed)
    AuditLog.open(tmp_path / "audit").close()
    assert_holds(tmp_path / "audit", 3)


@pytest.mark.parametrize("can_cut", [True, False])
def test_a_full_disk_stops_the_log_and_it_goes_on_when_there_is_room(
    tmp_path, monkeypatch, can_cut
):
    log = AuditLog.open(tmp_path / "audit")
    fill(log, 3)
    file = tmp_path / "audit" / f"{0:020}.jsonl"
    whole = file.read_bytes()
    if not can_cut:
        monkeypatch.setattr(os, "ftruncate", refuse_to_cut)
    for reason in ("File too large", "File too large" if can_cut else "Input/output error"):
        with file_size_limit(len(whole) + 100), pytest.raises(AuditError) as e:
            log.append("decision", decision())
        for part in (str(tmp_path / "audit"), reason, "Nothing is half-written"):
            assert part in str(e.value)
    assert file.read_bytes()[: len(whole) + can_cut] == whole
    monkeypatch.undo()
    assert log.append("decision", decision()) == 3
    log.close()
    assert_holds(tmp_path / "audit", 4)


def refuse_to_cut(fd, size):
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("number", [1, 2, 3])  # of the new file, of the directory, of the entry
def test_an_entry_whose_fsync_fails_is_not_there(tmp_path, monkeypatch, number):
    log = AuditLog.open(tmp_path / "audit", segment_bytes=1, checkpoint_entries=10**6)
    fill(log, 2)
    whole = lines_of(tmp_path / "audit")
    fsync, calls = os.fsync, []

    def fail_once(fd):
        calls.append(fd)
        if len(calls) == number:
            raise OSError(5, "Input/output error")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(AuditError, match="Input/output error"):
        fill(log, 1)
    assert lines_of(tmp_path / "audit") == whole
    assert log.append("decision", decision()) == 2
    log.close()
    assert_holds(tmp_path / "audit", 3)


def test_a_checkpoint_that_finds_no_room_is_an_error_and_the_log_goes_on(tmp_path):
    log = AuditLog.open(tmp_path / "audit", checkpoint_entries=1)
    path = tmp_path / "audit/checkpoints.jsonl"
    size = path.stat().st_size
    with file_size_limit(size + 10):
        with pytest.raises(AuditError, match="cannot be written: File too large"):
            log.checkpoint()
        fill(log, 1)  # an entry is shorter than a checkpoint
        with pytest.raises(AuditError, match="cannot be written"):
            log.checkpoint()
        assert path.stat().st_size == size
    fill(log, 1)
    log.close()
    assert_holds(tmp_path / "audit", 2)


def test_no_log_is_opened_where_its_first_checkpoint_finds_no_room(tmp_path):
    with file_size_limit(300), pytest.raises(AuditError, match="File too large"):
        AuditLog.open(tmp_path / "audit")
    log = AuditLog.open(tmp_path / "audit")  # the lock was let go
    fill(log, 1)
    log.close()
    assert_holds(tmp_path / "audit", 1)
