"""Files are the old ones or the new ones, never pieces."""

import hashlib
import json
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo import files
from flexolmo.errors import CheckpointError, FlexOlmoError
from flexolmo.files import (
    canonical_json,
    digest_bytes,
    digest_file,
    read_json,
    write_aside,
    write_bytes,
    write_directory_aside,
    write_json,
)

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=3
        )
    ),
    max_leaves=8,
)
stops = pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt, SystemExit])


def names(directory):
    return sorted(p.name for p in directory.iterdir())


@stops
def test_a_stop_while_writing_a_file_leaves_the_old_one_alone(tmp_path, stop):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(stop), write_aside(path) as aside:
        aside.write_text("half of the ne")
        assert path.read_text() == "old"
        raise stop
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]
    with pytest.raises(stop), write_aside(tmp_path / "b.json"):
        raise stop
    assert names(tmp_path) == ["a.json"]


def test_a_file_appears_whole_and_readable_by_others(tmp_path):
    path = tmp_path / "new" / "deep" / "a.safetensors"
    with write_aside(path) as aside:
        assert aside.parent == path.parent and aside.suffix == path.suffix
        aside.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert names(path.parent) == ["a.safetensors"]


@stops
@pytest.mark.parametrize("has_old", [True, False])
def test_a_stop_while_writing_a_directory_leaves_the_old_one_alone(tmp_path, stop, has_old):
    path = tmp_path / "model"
    if has_old:
        path.mkdir()
        (path / "x").write_text("old")
    with pytest.raises(stop), write_directory_aside(path, "x") as aside:
        (aside / "x").write_text("new")
        (aside / "deep").mkdir()
        (aside / "deep" / "y").write_text("new")
        raise stop
    assert names(tmp_path) == (["model"] if has_old else [])
    if has_old:
        assert names(path) == ["x"] and (path / "x").read_text() == "old"


def test_a_directory_is_replaced_whole(tmp_path):
    path = tmp_path / "model"
    path.mkdir()  # an empty directory is nobody's
    for generation, kept in (("first", "a"), ("second", "b")):
        with write_directory_aside(path, "x") as aside:
            assert names(aside) == []
            (aside / kept).write_text(generation)
            (aside / "x").touch()
        assert names(path) == [kept, "x"] and (path / kept).read_text() == generation
        assert names(tmp_path) == ["model"]
        assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_what_is_not_of_the_same_kind_is_not_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("ten years of work")
    (tmp_path / "notes").write_text("x")
    for name in ("thesis", "notes"):
        with (
            pytest.raises(FlexOlmoError, match=f"{name} exists and is not replaced"),
            write_directory_aside(tmp_path / name, "x"),
        ):
            raise AssertionError("refused before any work")
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "ten years of work"
    assert names(tmp_path) == ["notes", "thesis"]


@pytest.mark.parametrize("rename", [1, 2])
def test_a_stop_at_either_rename_leaves_the_old_directory_or_the_new(tmp_path, monkeypatch, rename):
    path, calls, replace = tmp_path / "model", [], os.replace
    path.mkdir()
    (path / "x").write_text("old")

    def stop(source, target):
        calls.append(target)
        if len(calls) == rename:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt), write_directory_aside(path, "x") as aside:
        (aside / "x").write_text("new")
    assert (path / "x").read_text() in ("old", "new")


@given(value=VALUES)
def test_canonical_json_is_one_spelling_and_loses_nothing(value):
    data = canonical_json(value)
    assert json.loads(data) == value
    assert canonical_json(json.loads(data)) == data
    if isinstance(value, dict):
        assert canonical_json(dict(reversed(value.items()))) == data


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_say_is_not_written(tmp_path, value):
    with pytest.raises(ValueError):
        canonical_json(value)
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": value})
    assert read_json(tmp_path / "a.json") == {"x": 1}


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 1])
def test_digests_of_bytes_and_files_agree_with_hashlib(tmp_path, size):
    data = os.urandom(size)
    write_bytes(tmp_path / "f", data)
    expected = "sha256:" + hashlib.sha256(data).hexdigest()
    assert digest_bytes(data) == digest_file(tmp_path / "f") == expected


def test_written_json_is_readable_and_keeps_its_order(tmp_path):
    write_json(tmp_path / "a.json", {"z": "é", "a": [1, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.index("z") < text.index('a"') and "é" in text and text.endswith("}\n")
    assert read_json(tmp_path / "a.json") == {"z": "é", "a": [1, None]}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", None])
def test_json_that_cannot_be_read_is_refused_by_path_with_the_callers_error(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    for error in (CheckpointError, FlexOlmoError):
        with pytest.raises(error, match=r"a\.json"):
            read_json(path, error)
