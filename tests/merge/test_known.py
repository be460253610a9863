"""The anchor of a mixture that was verified before, and whoever exchanges directories meanwhile."""

import os
import shutil

import pytest

from flexolmo.bundle import verified as verified_room
from flexolmo.bundle.verified import VerifiedFiles, are_ours_alone
from flexolmo.errors import CheckpointError, DataError
from flexolmo.files import _exchange
from flexolmo.merge import known as room
from flexolmo.merge.known import find_anchor, open_anchor, remember_anchor
from made_mixtures import flip


@pytest.fixture
def anchor_dir(house, tmp_path):
    return shutil.copytree(house.anchor_dir, tmp_path / "m" / "anchor")


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setattr(verified_room, "SMALLEST_BYTES", 1)
    return VerifiedFiles(tmp_path / "cache", tmp_path / "key")


def verify(directory, record):
    found, _ = find_anchor(directory, record)
    assert are_ours_alone(directory, found)
    remember_anchor(directory, open_anchor(directory, found, None), found, record)
    found, verified = find_anchor(directory, record)
    assert verified is not None
    return found, verified


@pytest.mark.parametrize("whose", ["anchor", "."])
def test_the_anchor_that_was_verified_is_read_whatever_is_in_its_place(
    house, anchor_dir, record, tmp_path, monkeypatch, whose
):
    """The directory, or one around it, is another while the files are opened; no file changes."""
    found, verified = verify(anchor_dir, record)
    other = shutil.copytree(tmp_path / "m", tmp_path / "other")
    flip(other / "anchor" / "model.safetensors", 0.9, 1)
    load = room.load_anchor

    def load_exchanged(*arguments, **options):
        assert _exchange(tmp_path / "m" / whose, other / whose)
        try:
            return load(*arguments, **options)
        finally:
            assert _exchange(tmp_path / "m" / whose, other / whose)

    monkeypatch.setattr(room, "load_anchor", load_exchanged)
    anchor = open_anchor(anchor_dir, found, verified)
    own = anchor.model.state_dict()
    expected = house.anchor.model.state_dict()
    assert all(t.equal(own[name]) for name, t in expected.items())


@pytest.mark.parametrize("what", ["another directory", "one more file", "a file is gone"])
def test_other_files_than_were_found_are_refused(anchor_dir, record, tmp_path, what):
    found, verified = verify(anchor_dir, record)
    if what == "another directory":
        assert _exchange(anchor_dir, shutil.copytree(anchor_dir, tmp_path / "other"))
    elif what == "one more file":
        (anchor_dir / "NOTICE").touch()
    else:
        (anchor_dir / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="m/anchor changed while it was read"):
        open_anchor(anchor_dir, found, verified)


def test_without_a_path_to_what_is_held_nothing_is_verified_or_mapped(
    anchor_dir, record, monkeypatch
):
    found, verified = verify(anchor_dir, record)
    given = []
    load = room.load_anchor
    monkeypatch.setattr(
        room, "load_anchor", lambda d, **options: given.append(options) or load(d, **options)
    )
    open_anchor(anchor_dir, found, verified, is_mapped=True)
    monkeypatch.setattr(room, "path_of_open", lambda _: None)
    open_anchor(anchor_dir, found, verified, is_mapped=True)
    assert given == [
        {"verified": verified, "is_mapped": True},
        {"verified": None, "is_mapped": False},
    ]


def test_errors_name_the_directory_and_nothing_stays_open(anchor_dir, record):
    before = os.listdir("/proc/self/fd")
    for name, error in (("tokenizer.json", DataError), ("config.json", CheckpointError)):
        old = (anchor_dir / name).read_bytes()
        (anchor_dir / name).write_text("{}")
        found, _ = find_anchor(anchor_dir, record)
        with pytest.raises(error, match=f"m/anchor/{name}") as caught:
            open_anchor(anchor_dir, found, None)
        assert "/proc" not in str(caught.value)
        (anchor_dir / name).write_bytes(old)
    with pytest.raises(CheckpointError, match=r"nothing does not exist.*anchor\.json"):
        open_anchor(anchor_dir / "nothing", {}, None)
    assert os.listdir("/proc/self/fd") == before
