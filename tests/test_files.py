"""Files are the old ones or the new ones, never pieces."""

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

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


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_file_appears_whole_with_the_mode_of_the_umask_or_private(tmp_path, umask):
    for is_private in (False, True):
        path = tmp_path / "new" / f"private-{is_private}" / "a.safetensors"
        with write_aside(path, is_private=is_private) as aside:
            assert aside.suffix == path.suffix and aside.stat().st_dev == path.parent.stat().st_dev
            assert mode_of(aside.parent) == 0o700
            aside.unlink()  # as safetensors does, which puts a file of mode 0600 in its place
            os.close(os.open(aside, os.O_CREAT, 0o600 if not is_private else 0o644))
            aside.write_bytes(b"new")
            assert not path.exists()
        assert path.read_bytes() == b"new"
        assert mode_of(path) == (0o600 if is_private else 0o666 & ~umask)
        assert mode_of(path.parent) == (0o700 if is_private else 0o777 & ~umask)
        assert names(path.parent) == ["a.safetensors"]


def test_tensors_have_the_mode_of_the_umask_or_private(tmp_path, umask):
    files.save_tensors(tmp_path / "a.safetensors", {"a": torch.arange(6).view(2, 3).T})
    files.save_tensors(tmp_path / "b.safetensors", {"a": torch.ones(2)}, is_private=True)
    assert mode_of(tmp_path / "a.safetensors") == 0o666 & ~umask
    assert mode_of(tmp_path / "b.safetensors") == 0o600
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert names(tmp_path) == ["a.safetensors", "b.safetensors"]


def test_a_private_directory_is_private_throughout(tmp_path, umask):
    for is_private in (False, True):
        path = tmp_path / str(is_private)
        with write_directory_aside(path, "x", is_private=is_private) as aside:
            (aside / "x").write_text("text")
            (aside / "deep").mkdir()
            (aside / "deep" / "y").write_text("text")
            (aside / "link").symlink_to("/etc/hostname")
        found = [mode_of(p) for p in (path, path / "deep", path / "x", path / "deep" / "y")]
        public = [0o777 & ~umask] * 2 + [0o666 & ~umask] * 2
        assert found == ([0o700, 0o700, 0o600, 0o600] if is_private else public)


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
    """Where the file system cannot exchange two directories in one step."""
    path, calls, replace = tmp_path / "model", [], os.replace
    path.mkdir()
    (path / "x").write_text("old")

    def stop(source, target):
        calls.append(target)
        if len(calls) == rename:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    monkeypatch.setattr(files.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt), write_directory_aside(path, "x") as aside:
        (aside / "x").write_text("new")
    assert (path / "x").read_text() == "old"
    assert names(tmp_path) == ["model"]


# --- killed -------------------------------------------------------------------------------------

KILLED = """
    import json, os, signal, sys
    from pathlib import Path
    from flexolmo import files
    path, kind, can_exchange = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
    if not can_exchange:
        files._exchange = lambda *_: False

    def write(text):
        if kind == "file":
            files.write_bytes(path, text.encode())
        else:
            with files.write_directory_aside(path, "x.json", is_private=True) as aside:
                (aside / "x.json").write_text(text)
                (aside / "y").write_text(text)

    def content():
        if kind == "file":
            return [files.read_json(path)]
        return [files.read_json(path / "x.json"), json.loads((path / "y").read_text())]

    def kill_at(place):
        seen = 0
        def hook(event, arguments):
            nonlocal seen
            if event.startswith(("open", "os.", "shutil.", "tempfile.", "fcntl.")):
                seen += 1
                if seen == place:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)

    found = []
    write('"old"')
    while True:
        child = os.fork()
        if not child:
            kill_at(len(found) + 1)
            write('"new"')
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        after = content()
        write('"old"')
        found.append([status, after, content(), sorted(os.listdir(path.parent))])
        if status == 0:
            break
    print(json.dumps(found))
"""


@pytest.mark.parametrize("kind, can_exchange", [("file", True), ("tree", True), ("tree", False)])
def test_a_kill_at_any_point_leaves_the_old_or_the_new_and_is_swept(tmp_path, kind, can_exchange):
    """Killed before each call to the system, from the first to the last."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), tmp_path / "a", kind, str(can_exchange)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert len(found) > 10
    for status, after, again, listed in found:
        assert status in (0, signal.SIGKILL)
        assert len(set(after)) == 1 and after[0] in ("old", "new")
        assert set(again) == {"old"} and listed == ["a"]
    assert found[0][1][0] == "old" and found[-1][1][0] == "new" and found[-1][0] == 0
    assert "left by a run that was killed" in done.stderr
    assert ("Put " in done.stderr) is not can_exchange


def test_only_what_a_dead_run_left_of_the_same_target_is_swept(tmp_path, capsys):
    others = [".a.json.12345678", ".a.b.json.abcdefgh.aside", ".a.json.abcdefg.aside", "a.json.d"]
    for name in others:
        (tmp_path / name).mkdir()
    with write_aside(tmp_path / "a.json") as aside:
        (tmp_path / ".a.json.abcdefgh.aside").mkdir()
        write_json(tmp_path / "a.json", 1)  # the other run's, alive, is not taken
        aside.write_text("2")
    assert read_json(tmp_path / "a.json") == 2
    assert names(tmp_path) == sorted([*others, "a.json"])
    assert ".a.json.abcdefgh.aside, left by a run" in capsys.readouterr().err


# --- values -------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        None,
        b"[" * 100_000,
        b"[" * 201 + b"]" * 201,
        b'{"a":' * 1500 + b"1" + b"}" * 1500,
    ],
)
def test_json_that_cannot_be_read_is_refused_by_path_with_the_callers_error(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    for error in (CheckpointError, FlexOlmoError):
        with pytest.raises(error, match=r"a\.json"):
            read_json(path, error)


def test_json_as_deep_as_allowed_is_read(tmp_path):
    deep = b"[" * 200 + b"]" * 200
    (tmp_path / "a.json").write_bytes(deep)
    assert canonical_json(read_json(tmp_path / "a.json")) == deep


# --- tensors ------------------------------------------------------------------------------------

DTYPES = [
    torch.int64,
    torch.float64,
    torch.float32,
    torch.int32,
    torch.bfloat16,
    torch.float16,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
LAYOUTS = {
    "plain": lambda t: t,
    "turned": lambda t: t.mT.contiguous().mT if t.dim() == 2 else t,
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t,
    "later": lambda t: files.LaterTensor(t.dtype, tuple(t.shape), lambda: t),
}


@st.composite
def named_tensors(draw):
    names = draw(st.lists(st.text("ab.é", min_size=1, max_size=4), max_size=5, unique=True))
    found = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 5), max_size=2))
        values = torch.randint(0, 2, shape, generator=torch.manual_seed(len(name)))
        found[name] = values.to(draw(st.sampled_from(DTYPES)))
    return found


@settings(max_examples=60)
@given(
    tensors=named_tensors(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    piece_bytes=st.sampled_from([8, 16, 1 << 20]),
    metadata=st.none() | st.just({"format": "pt é"}),
)
def test_tensors_are_written_as_the_library_writes_them(tensors, layout, piece_bytes, metadata):
    """Byte for byte, in pieces of any size, whatever the memory they come from looks like."""
    given_tensors = {n: LAYOUTS[layout](t) for n, t in tensors.items()}
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        path = Path(directory) / "t.safetensors"
        patch.setattr(files, "_PIECE_BYTES", piece_bytes)
        patch.setattr(files, "sync", lambda _: None)  # 60 times
        files.save_tensors(path, given_tensors, metadata)
        assert path.read_bytes() == safetensors.torch.save(tensors, metadata)
        assert files.size_of_tensors(tensors) == len(safetensors.torch.save(tensors))
        assert files.size_of_tensors(tensors, metadata) == path.stat().st_size


@given(rows=st.integers(1, 9), width=st.integers(1, 9), piece_bytes=st.sampled_from([4, 24, 4096]))
def test_no_piece_of_a_tensor_is_larger_than_asked(rows, width, piece_bytes):
    whole = torch.arange(rows * width, dtype=torch.float32).view(rows, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_PIECE_BYTES", piece_bytes)
        for tensor in (whole, whole.T.contiguous().T):
            pieces = [bytes(piece) for piece in files.pieces_of(tensor)]
            assert b"".join(pieces) == whole.numpy().tobytes()
            assert max(map(len, pieces)) <= piece_bytes


def test_a_later_tensor_is_made_when_it_is_its_turn_and_not_kept(tmp_path):
    alive = []

    def make():
        assert all(ref() is None for ref in alive)
        made = torch.ones(3)
        alive.append(weakref.ref(made))
        return made

    later = {n: files.LaterTensor(torch.float32, (3,), make) for n in "abc"}
    files.save_tensors(tmp_path / "t.safetensors", later)
    assert len(alive) == 3
