"""The record of verified files: what counts, and all that does not."""

import errno
import fcntl
import json
import mmap
import os
import shutil
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.bundle import verified as room
from flexolmo.bundle.verified import (
    Identity,
    VerifiedFiles,
    are_ours_alone,
    identify,
    wait_until_past,
)
from flexolmo.files import canonical_json
from made_mixtures import IN_SESSION


@pytest.fixture(autouse=True)
def small_files_count(monkeypatch):
    monkeypatch.setattr(room, "SMALLEST_BYTES", 1)


@pytest.fixture
def record(tmp_path):
    return VerifiedFiles(tmp_path / "cache", tmp_path / "config" / "key")


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_bytes(b"weights" * 9)
    (tmp_path / "model" / "b").write_bytes(b"more")
    return tmp_path / "model"


def keep(record, model, facts=None):
    record.keep(model, "this", identify(model, ["a", "b"]), facts or {})


def counts(record, model, subject="this", names=("a", "b")):
    return record.find(model, subject, identify(model, names)) is not None


def statement_of(record):
    (file,) = record._cache.iterdir()
    return file


def test_what_was_kept_is_found_with_its_facts(record, model):
    assert record.find(model, "this", identify(model, ["a", "b"])) is None
    keep(record, model, {"largest": {"x": 0.5}})
    assert record.find(model, "this", identify(model, ["a", "b"])) == {"largest": {"x": 0.5}}
    assert not counts(record, model, "that")
    assert not counts(record, model, names=["a"])


def test_the_key_and_the_statements_are_the_users_alone(record, model):
    keep(record, model)
    key = record._key_file
    assert [p.stat().st_mode & 0o777 for p in (key, key.parent, statement_of(record))] == [
        0o600,
        0o700,
        0o600,
    ]
    assert len(key.read_bytes()) == 32


CHANGES = {
    "content": lambda f: f.write_bytes(b"weighty" * 9),
    "content, with the old time": lambda f: (
        f.write_bytes(b"weighty" * 9),
        os.utime(f, ns=(f.stat().st_atime_ns, OLD)),
    ),
    "time alone": lambda f: os.utime(f, ns=(0, 0)),
    "size": lambda f: f.write_bytes(b"weights"),
    "another file": lambda f: (f.rename(f.with_name("c")), shutil.copy2(f.with_name("c"), f)),
    "mode": lambda f: f.chmod(0o600),
    "link": lambda f: os.link(f, f.with_name("c")),
}
OLD = 1_700_000_000_000_000_000


@pytest.mark.parametrize("how", CHANGES)
def test_any_change_of_a_file_makes_its_statement_void(record, model, how):
    os.utime(model / "a", ns=(OLD, OLD))
    keep(record, model)
    assert counts(record, model)
    CHANGES[how](model / "a")
    assert not counts(record, model)


def test_only_links_that_came_and_went_leave_the_content_the_same(model):
    before = Identity.of(model / "a")
    os.link(model / "a", model / "c")
    (model / "c").unlink()
    after = Identity.of(model / "a")
    assert after != before and after.is_same_content(before)
    os.utime(model / "a", ns=(0, 0))
    assert not Identity.of(model / "a").is_same_content(before)


@given(at=st.integers(0, 10_000), change=st.integers(1, 255))
@settings(IN_SESSION, max_examples=60)
def test_a_statement_with_any_byte_changed_does_not_count(tmp_path_factory, at, change):
    root = tmp_path_factory.mktemp("r")
    (root / "a").write_bytes(b"w")
    (root / "b").write_bytes(b"w")
    record = VerifiedFiles(root / "cache", root / "key")
    keep(record, root)
    file = statement_of(record)
    data = bytearray(file.read_bytes())
    data[at % len(data)] ^= change
    file.write_bytes(data)
    assert not counts(record, root)


@pytest.mark.parametrize("what", ["no key", "own key", "no code", "nonsense", "deep"])
def test_a_forged_statement_does_not_count(record, model, tmp_path, what):
    """Made by one who may write to model and cache, and knows all but the key."""
    keep(record, model)
    whole = json.loads(statement_of(record).read_bytes())
    (model / "a").write_bytes(b"another" * 9)
    found = identify(model, ["a", "b"])
    whole["statement"]["files"] = {n: vars(x) for n, x in found.items()}
    forged = {
        "no key": whole,
        "own key": whole | {"code": room._authenticate(whole["statement"], b"k" * 32)},
        "no code": {"statement": whole["statement"]},
        "nonsense": ["statement"],
        "deep": {"statement": whole["statement"], "code": [[["x"]]]},
    }[what]
    statement_of(record).write_bytes(canonical_json(forged))
    assert not counts(record, model)


def test_a_statement_moved_to_another_directory_does_not_count(record, model, tmp_path):
    keep(record, model)
    old = statement_of(record)
    moved = tmp_path / "elsewhere"
    model.rename(moved)  # the very files
    assert not counts(record, moved)
    old.rename(record._place(moved))
    assert not counts(record, moved)


def test_a_statement_of_another_user_does_not_count(record, model, tmp_path, monkeypatch):
    keep(record, model)
    theirs = VerifiedFiles(record._cache, tmp_path / "theirs")
    assert not counts(theirs, model)
    keep(theirs, model)  # in the place of ours
    assert counts(theirs, model) and not counts(record, model)
    me = os.geteuid()
    keep(record, model)
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert not counts(record, model)


@pytest.mark.parametrize("how", ["readable", "link", "short", "gone"])
def test_a_key_that_others_could_know_is_not_used(record, model, how):
    keep(record, model)
    key = record._key_file
    good = key.read_bytes()
    if how == "readable":
        key.chmod(0o640)
    elif how == "link":
        key.rename(key.with_name("other"))
        key.symlink_to("other")
    elif how == "short":
        key.write_bytes(good[:31])
    else:
        key.unlink()
    assert not counts(record, model)
    keep(record, model)  # makes a new one
    assert counts(record, model) and key.read_bytes() != good
    assert key.stat().st_mode & 0o777 == 0o600


def test_another_version_of_the_program_or_of_the_checks_begins_anew(record, model, monkeypatch):
    keep(record, model)
    with monkeypatch.context() as patch:
        patch.setattr(room, "_CHECKS", room._CHECKS + 1)
        assert not counts(record, model)
    monkeypatch.setattr(room, "version", lambda _: "99")
    assert not counts(record, model)


def test_to_verify_is_to_let_nothing_count_and_to_keep_what_is_found(model, tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXOLMO_CACHE", str(tmp_path / "c"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "x"))
    keep(VerifiedFiles.of_user(verify=True), model)
    assert counts(VerifiedFiles.of_user(), model)
    assert not counts(VerifiedFiles.of_user(verify=True), model)
    monkeypatch.setenv("FLEXOLMO_VERIFY", "1")
    assert not counts(VerifiedFiles.of_user(), model)
    monkeypatch.setenv("FLEXOLMO_VERIFY", "0")
    assert counts(VerifiedFiles.of_user(), model)


def test_small_files_and_files_of_the_future_get_no_statement(record, model, monkeypatch):
    found = identify(model, ["a"])
    ahead = {"a": Identity(**vars(found["a"]) | {"touched_ns": 2**62})}
    record.keep(model, "this", ahead, {})
    assert not are_ours_alone(model, ahead)
    monkeypatch.setattr(room, "SMALLEST_BYTES", 1 << 20)
    record.keep(model, "this", found, {})
    assert not record._cache.exists()


def test_a_cache_that_cannot_be_written_is_said_and_stops_nothing(model, tmp_path, capsys):
    (tmp_path / "file").touch()
    record = VerifiedFiles(tmp_path / "file" / "cache", tmp_path / "key")
    keep(record, model)
    assert "model was verified could not be written (" in capsys.readouterr().err
    assert not counts(record, model)


def test_time_moves_on_before_what_is_read_can_be_relied_on(model):
    """Whatever is written after the wait has another time, on clocks of any grain."""
    for _ in range(5):
        (model / "a").write_bytes(b"weights")
        found = identify(model, ["a"])
        assert wait_until_past(found)
        (model / "a").write_bytes(b"changed")
        assert identify(model, ["a"])["a"].touched_ns > found["a"].touched_ns


@pytest.mark.parametrize(
    ("smallest_bytes", "is_kept"), [(1, True), (1, False), (1 << 40, False)]
)  # small files, of which nothing is kept, are mapped too
def test_the_wait_is_for_the_clock_that_gives_files_their_times(
    record, model, monkeypatch, smallest_bytes, is_kept
):
    """It stands still for milliseconds, while the system's own clock goes on."""
    monkeypatch.setattr(room, "SMALLEST_BYTES", smallest_bytes)
    found = identify(model, ["a"])
    stamp = found["a"].touched_ns
    ticks = iter([stamp, stamp, stamp + 4_000_000])
    coarse = 5  # CLOCK_REALTIME_COARSE of linux/time.h
    clocks = {coarse: lambda: next(ticks), time.CLOCK_REALTIME: lambda: stamp + 1000}
    monkeypatch.setattr(time, "clock_gettime_ns", lambda clock: clocks[clock]())
    if is_kept:
        record.keep(model, "this", found, {})
        assert counts(record, model, names=["a"])
    else:
        assert wait_until_past(found)
    assert not list(ticks)


# --- who can change a file ----------------------------------------------------------------------


def map_for_writing(path):
    """Memory whose writes go to the file, as any process of ours or of one that may write has."""
    fd = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(fd, 0)
    finally:
        os.close(fd)


def test_a_file_that_somebody_can_write_through_memory_is_not_ours_alone(model):
    found = identify(model, ["a", "b"])
    assert are_ours_alone(model, found)
    with map_for_writing(model / "b"):
        assert not are_ours_alone(model, found)
    with open(model / "a", "r+b"):
        assert not are_ours_alone(model, found)
    assert are_ours_alone(model, found)


def test_a_file_that_others_may_write_is_not_ours_alone(model, monkeypatch):
    (model / "a").chmod(0o664)
    assert not are_ours_alone(model, identify(model, ["a"]))
    (model / "a").chmod(0o644)
    assert are_ours_alone(model, identify(model, ["a"]))
    os.symlink("a", model / "c")
    os.mkfifo(model / "d")
    assert not are_ours_alone(model, identify(model, ["c"]))
    assert not are_ours_alone(model, identify(model, ["d"]))
    before = identify(model, ["a"])
    os.utime(model / "a")
    assert not are_ours_alone(model, before)
    me = os.geteuid()
    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: me + 1)
        assert not are_ours_alone(model, identify(model, ["a"]))


def refuse(*_):
    raise OSError(errno.EINVAL, "Invalid argument")


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (fcntl, "F_SETLEASE", None),  # another system
        (fcntl, "fcntl", refuse),  # a file system without leases
        (room, "path_of_open", lambda _: None),  # no /proc
    ],
)
def test_where_the_system_cannot_tell_no_file_is_ours_alone(model, monkeypatch, owner, name, value):
    found = identify(model, ["a"])
    assert are_ours_alone(model, found)
    if value is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, value)
    assert not are_ours_alone(model, found)


def test_whoever_opens_a_file_while_it_is_asked_about_does_not_end_us(model, monkeypatch):
    """The system tells the holder of a lease by a signal, which must be one that is ignored."""
    lease = fcntl.fcntl

    def open_between(fd, command, argument):
        done = lease(fd, command, argument)
        if command == fcntl.F_SETLEASE and argument == fcntl.F_RDLCK:
            with pytest.raises(BlockingIOError):
                os.open(model / "a", os.O_WRONLY | os.O_NONBLOCK)
        return done

    monkeypatch.setattr(fcntl, "fcntl", open_between)
    assert are_ours_alone(model, identify(model, ["a"]))
