"""What retention removes is gone but for its hashes, and all that is left still verifies."""

import datetime
import os

import pytest

from flexolmo.errors import AuditError
from flexolmo.serving.audit_check import check_log, public_key
from flexolmo.serving.audit_log import AuditLog
from flexolmo.serving.audit_proof import prove_continuation, prove_entry
from flexolmo.serving.retention import remove_entries
from made_audit import fill

DAYS = ["2026-11-01"] * 3 + ["2026-11-02"] * 2 + ["2026-11-03"] * 3


@pytest.fixture
def audit(tmp_path, monkeypatch):
    """Directory and checkpoints of a log of three days: files of entries 0, 3, 5."""
    return write(tmp_path / "audit", monkeypatch, DAYS)


def write(directory, monkeypatch, days, **options):
    log = AuditLog.open(directory, **options)
    checkpoints = []
    for day in days:
        now = f"{day}T12:00:00.000000Z"
        monkeypatch.setattr("flexolmo.serving.audit_log.utc_now", lambda now=now: now)
        fill(log, 1)
        checkpoints.append(log.checkpoint())
    log.close()
    monkeypatch.undo()
    return directory, checkpoints


def remove(directory, day):
    return remove_entries(directory, datetime.date.fromisoformat(day), public_key(directory))


@pytest.mark.parametrize(
    "day, removed",
    [("2026-11-01", 0), ("2026-11-02", 3), ("2026-11-03", 5), ("2026-11-04", 5), ("2099-01-01", 5)],
)
def test_days_before_are_removed_and_the_rest_still_verifies(audit, day, removed):
    directory, checkpoints = audit
    key = public_key(directory)
    assert remove(directory, day) == removed
    entries = "".join(p.read_text() for p in directory.glob("0*.jsonl"))
    assert ["reason 0" in line for line in entries.splitlines()] == [True] * (8 - removed)
    report = check_log(directory, key, checkpoints)
    assert (report.findings, report.num_entries, report.num_removed) == ([], 8, removed)
    for number in range(8):
        if number < removed:
            with pytest.raises(AuditError, match="was removed: only its hash is left"):
                prove_entry(directory, number, key)
        else:
            assert prove_entry(directory, number, key).claim(key)
    for old in checkpoints:
        assert prove_continuation(directory, old, key).claim(key)
    assert remove(directory, day) == 0
    log = AuditLog.open(directory)
    assert log.append("stopped", {"why": "x"}) == 8
    log.close()
    assert check_log(directory, key).findings == []


def test_an_empty_last_file_as_a_kill_may_leave_it_hinders_nothing(audit):
    directory, _ = audit
    (directory / f"{8:020}.jsonl").touch()
    assert remove(directory, "2026-11-03") == 5
    log = AuditLog.open(directory)
    assert log.append("stopped", {"why": "x"}) == 8
    log.close()
    assert check_log(directory, public_key(directory)).findings == []


def test_no_day_is_removed_in_part(tmp_path, monkeypatch):
    directory, _ = write(tmp_path / "audit", monkeypatch, ["2026-11-01"] * 4, segment_bytes=1)
    assert len(list(directory.glob("0*.jsonl"))) == 4
    assert remove(directory, "2026-11-02") == 0


def test_entries_that_no_checkpoint_counts_are_kept(tmp_path, monkeypatch):
    log = AuditLog.open(tmp_path / "audit")
    days = iter(["2026-11-01", "2026-11-02"])
    monkeypatch.setattr(
        "flexolmo.serving.audit_log.utc_now", lambda: f"{next(days)}T00:00:00.000000Z"
    )
    fill(log, 2)
    assert remove(tmp_path / "audit", "2026-11-02") == 0
    monkeypatch.undo()
    log.checkpoint()
    assert remove(tmp_path / "audit", "2026-11-02") == 1  # while the server writes
    fill(log, 1)
    log.close()
    assert check_log(tmp_path / "audit", public_key(tmp_path / "audit")).findings == []


def test_nothing_is_removed_from_a_log_that_does_not_hold_up(audit):
    directory, _ = audit
    file = directory / f"{0:020}.jsonl"
    file.write_bytes(file.read_bytes().replace(b"reason", b"season"))
    before = sorted(directory.iterdir())
    with pytest.raises(AuditError, match="Nothing was removed"):
        remove(directory, "2026-11-03")
    assert sorted(directory.iterdir()) == before


@pytest.mark.parametrize("call", ["replace", "unlink"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dies_before", [True, False])
def test_a_removal_that_is_killed_anywhere_is_finished_by_the_next(
    audit, monkeypatch, call, count, dies_before
):
    directory, checkpoints = audit
    act, calls = getattr(os, call), []

    def die(*args, **options):
        calls.append(args)
        if len(calls) == count and dies_before:
            raise KeyboardInterrupt
        act(*args, **options)
        if len(calls) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, call, die)
    with pytest.raises(KeyboardInterrupt):
        remove(directory, "2026-11-03")
    monkeypatch.undo()
    assert check_log(directory, public_key(directory), checkpoints).findings == []
    remove(directory, "2026-11-03")
    report = check_log(directory, public_key(directory), checkpoints)
    assert (report.findings, report.num_removed) == ([], 5)
    assert sorted(p.suffix for p in directory.glob("0*")) == [".hashes", ".hashes", ".jsonl"]


def test_changed_hashes_of_removed_entries_are_found(audit):
    directory, _ = audit
    remove(directory, "2026-11-03")
    for path in directory.glob("*.hashes"):
        whole = path.read_bytes()
        for at in range(0, len(whole), 7):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert check_log(directory, public_key(directory)).findings, at
        path.write_bytes(whole[:-32])
        assert check_log(directory, public_key(directory)).findings
        path.write_bytes(whole)
    assert check_log(directory, public_key(directory)).findings == []
