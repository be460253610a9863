"""Files that are never half-written, and digests that name their content.

Everything that writes a result goes through here: `write_aside`, `write_directory_aside`,
`write_bytes`, `write_json`, `save_tensors`. Each takes `is_private=True` for what is made of an
owner's text (files 0600, directories 0700), and names a full disk. Knows nothing of models or data.
"""

import ctypes
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from flexolmo.errors import DiskFullError, FlexOlmoError
from flexolmo.terminal import echo


def canonical_json(value: Any) -> bytes:
    """One byte string per JSON value: sorted keys, no spaces, UTF-8, no NaN. Source: ours."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest_bytes(data: bytes) -> str:
    """`sha256:` and 64 hex digits of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """`sha256:` and 64 hex digits of the file's content, read in 1 MiB pieces."""
    with open(path, "rb") as f:
        return "sha256:" + hashlib.file_digest(f, "sha256").hexdigest()


def cache_directory() -> Path:
    """Directory of what can be had again: $FLEXOLMO_CACHE, else ~/.cache/flexolmo."""
    named = os.environ.get("FLEXOLMO_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "flexolmo"


# --- written whole or not at all ----------------------------------------------------------------


def _full_disk_reason(error: Exception) -> str | None:
    """The system's words if `error` says that a disk, a quota or a file-size limit is used up."""
    if isinstance(error, DiskFullError):
        return error.reason
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    number = getattr(error, "errno", None)
    if number is None:  # safetensors names the number in its text, numpy writes fewer bytes
        found = re.search(r"os error (\d+)|free space|requested and \d+ written", str(error))
        number = int(found[1] or errno.ENOSPC) if found else None
    return os.strerror(number) if number in numbers else None


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn a full disk, quota or file-size limit met inside into a DiskFullError about `path`."""
    try:
        yield
    except Exception as e:
        reason = _full_disk_reason(e)
        if reason is None:
            raise
        path = Path(path).absolute()
        disk = shutil.disk_usage(next(p for p in path.parents if p.is_dir()))
        kept = "What was there before is unchanged" if path.exists() else "Nothing was left there"
        is_ours = Path(sys.argv[0]).name == "flexolmo"
        again = shlex.join(["flexolmo", *sys.argv[1:]]) if is_ours else "the same call"
        raise DiskFullError(
            f"{path} cannot be written: {reason}; {disk.free:,} of the {disk.total:,} bytes of its "
            f"disk are free. {kept}. Free some space there, or choose another place, then run "
            f"again: {again}",
            reason,
        ) from None


def path_of_open(file: int) -> Path | None:
    """A path to an open file or directory, whatever is now where it was opened; None where the
    system has none."""
    path = Path(f"/proc/self/fd/{file}")
    return path if path.exists() else None


def sync(path: Path) -> None:
    """Bring a file, or a directory's list of names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def lock_directory(path: Path, wait: bool) -> Iterator[bool]:
    """Hold a lock on the directory `path`; yields False if it is gone, or held by another run.

    The system frees the lock when its holder ends, by SIGKILL too, so a directory that can be
    locked belongs to no living run. A file system without such locks yields False too.
    """
    import fcntl  # not on every system that reads files

    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        is_held = path.exists()
    except OSError:
        is_held = False
    try:
        yield is_held
    finally:
        os.close(fd)


@contextmanager
def hold_directory(path: Path) -> Iterator[None]:
    """Hold a lock on the directory `path`, made if absent, so that what is read there stays true
    until it is written; FlexOlmoError if it cannot be locked."""
    path.mkdir(parents=True, exist_ok=True)
    with lock_directory(path, wait=True) as is_held:
        if not is_held:
            raise FlexOlmoError(
                f"{path} cannot be locked, so two runs might write there at once. Put it on a file "
                "system with locks."
            )
        yield


def _discard(aside: Path, path: Path) -> bool:
    """Remove `aside`; if it holds the only copy of `path`, put that back first and return True."""
    is_only_copy = (aside / "old").exists() and not path.exists()
    if is_only_copy:
        os.replace(aside / "old", path)
    shutil.rmtree(aside, ignore_errors=True)
    return is_only_copy


def recover(path: Path) -> None:
    """Remove what killed runs left beside `path` and say so; put a directory back that they moved.

    Only directories named by `write_aside` and `write_directory_aside` for this `path`, and only
    those whose lock no living run holds.
    """
    path = Path(path)
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.aside")
    for name in sorted(os.listdir(path.parent)):
        if pattern.fullmatch(name):
            left = path.parent / name
            with lock_directory(left, wait=False) as is_dead:
                if is_dead:
                    done = f"Put {path} back from" if _discard(left, path) else "Removed"
                    echo(f"{done} {left}, left by a run that was killed.", err=True)


@contextmanager
def work_aside(path: Path, is_private: bool = False) -> Iterator[Path]:
    """Yield a locked empty directory of mode 0700 beside `path`, removed at the end; after a kill,
    by the next write of `path`. Parents that are made get mode 0700 with `is_private`."""
    path.parent.mkdir(0o700 if is_private else 0o777, parents=True, exist_ok=True)
    recover(path)
    while True:
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".aside", dir=path.parent))
        with lock_directory(aside, wait=True):
            if not aside.exists():  # another run took it for a dead one's before it was locked
                continue
            try:
                yield aside
            finally:
                _discard(aside, path)
            return


@contextmanager
def write_aside(path: Path, *, is_private: bool = False) -> Iterator[Path]:
    """Yield a temporary path, of the same suffix, for the file `path`; on success rename it so.

    A kill at any moment leaves the old file or the new one, never a piece; what else it leaves is
    removed by the next write of `path`.

    Args:
        is_private: The file gets mode 0600, and the directory it is in, if made here, 0700. Else
            both get what the umask says.

    Raises:
        DiskFullError: the disk, a quota or the limit on a file's size is used up.
    """
    path = Path(path)
    with explain_full_disk(path), work_aside(path, is_private) as aside:
        new = aside / f"new{path.suffix}"
        new.touch(0o600 if is_private else 0o666)
        mode = new.stat().st_mode
        yield new
        os.chmod(new, mode)  # whoever wrote it may have put a file of its own in the place
        sync(new)
        os.replace(new, path)
        sync(path.parent)


@contextmanager
def write_directory_aside(path: Path, marker: str, *, is_private: bool = False) -> Iterator[Path]:
    """Yield an empty directory; on success rename it to `path`.

    A directory already at `path` is replaced, once the new one is complete, only if it is empty
    or holds the file `marker`, which says that it is one of the same kind; FlexOlmoError if not.
    Where `path` is a link, what it points to is replaced, so that no second copy stays.
    The two are exchanged in one step where the file system can; elsewhere a kill between two
    steps leaves no `path`, and the next `read_json` of a file in it, or write, puts it back.

    Args:
        is_private: Every file gets mode 0600 and every directory 0700. Else as the umask says.

    Raises:
        DiskFullError: the disk, a quota or the limit on a file's size is used up.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()
    if path.exists() and not (
        path.is_dir() and ((path / marker).is_file() or not any(path.iterdir()))
    ):
        raise FlexOlmoError(
            f"{path} exists and is not replaced: it has no {marker}, so it is "
            "something else. Choose another place."
        )
    with explain_full_disk(path), work_aside(path, is_private) as aside:
        new = aside / "new"
        new.mkdir(0o700 if is_private else 0o777)
        yield new
        for p in [new, *new.rglob("*")]:
            if p.is_symlink() or not (p.is_dir() or p.is_file()):
                continue
            if is_private:
                os.chmod(p, 0o700 if p.is_dir() else 0o600)
            sync(p)
        if not path.exists():
            os.replace(new, path)
        elif not _exchange(new, path):
            os.replace(path, aside / "old")
            os.replace(new, path)
        sync(path.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Let two paths change places in one step; False if the system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return bool(renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)


def write_bytes(path: Path, data: bytes, *, is_private: bool = False) -> None:
    """Write `data` to `path`, all or nothing; modes as in `write_aside`."""
    with write_aside(path, is_private=is_private) as aside:
        aside.write_bytes(data)


def write_json(path: Path, value: Any, *, is_private: bool = False) -> None:
    """Write `value` as readable JSON (indented, keys in the order given), all or nothing."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode(), is_private=is_private)


_PIECE_BYTES = 8 << 20
# Dtypes that are written, by torch's names, in the order in which safetensors writes them.
_DTYPES = {
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def save_tensors(
    path: Path,
    tensors: Mapping[str, Any],
    metadata: dict[str, str] | None = None,
    *,
    is_private: bool = False,
) -> None:
    """Write torch `tensors` as the safetensors file `path`, all or nothing.

    The bytes are those of `safetensors.torch.save_file`, written in pieces: nothing is copied
    whole. In place of a tensor a `LaterTensor` may stand, which is made when it is its turn.
    """
    header = _header_of(tensors, metadata)
    with write_aside(path, is_private=is_private) as aside, open(aside, "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        for name in written_order(tensors):
            given = tensors[name]
            for piece in pieces_of(given.make() if isinstance(given, LaterTensor) else given):
                f.write(piece)


def size_of_tensors(tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> int:
    """Bytes of the file that `save_tensors` writes."""
    data = sum(prod(t.shape) * t.dtype.itemsize for t in tensors.values())
    return 8 + len(_header_of(tensors, metadata)) + data


@dataclass(frozen=True)
class LaterTensor:
    """A torch tensor of this dtype and shape, made when it is written and let go of after."""

    dtype: Any
    shape: tuple[int, ...]
    make: Callable[[], Any]


def written_order(tensors: Mapping[str, Any]) -> list[str]:
    """Names of torch `tensors` in the order in which `save_tensors` writes them: those of wide
    dtypes first, then by name."""
    order = list(_DTYPES.values())
    return sorted(tensors, key=lambda n: (order.index(dtype_name(tensors[n].dtype)), n))


def dtype_name(dtype: Any) -> str:
    """Name by which safetensors calls a torch dtype."""
    return _DTYPES[str(dtype).removeprefix("torch.")]


def pieces_of(tensor: Any) -> Iterator[memoryview]:
    """Bytes of a torch tensor, row after row, as safetensors has them, in pieces of up to 8 MiB;
    views where its memory has that order."""
    import torch  # which most of what reads files lacks

    flat = tensor.detach()
    if not flat.is_contiguous() and flat.dim() and flat[0].nbytes <= _PIECE_BYTES:
        rows = max(1, _PIECE_BYTES // flat[0].nbytes)
        parts = iter(flat.split(rows))
    else:
        flat = flat.contiguous().reshape(-1)
        parts = iter(flat.split(_PIECE_BYTES // flat.element_size())) if flat.numel() else iter(())
    for part in parts:
        dense = part.contiguous().cpu()
        row = dense.as_strided((dense.numel(),), (1,))  # one number may have any stride
        yield row.view(torch.uint8).numpy().data


def _header_of(tensors: Mapping[str, Any], metadata: dict[str, str] | None) -> bytes:
    """The header of a safetensors file, spelled as the library spells it, filled up to whole 8
    bytes."""
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    begin = 0
    for name in written_order(tensors):
        shape = list(tensors[name].shape)
        dtype = tensors[name].dtype
        end = begin + prod(shape) * dtype.itemsize
        table[name] = {"dtype": dtype_name(dtype), "shape": shape, "data_offsets": [begin, end]}
        begin = end
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % 8)


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write numpy `arrays` as the .npz file `path`, all or nothing."""
    import numpy as np  # which most of what reads files lacks

    with write_aside(path) as aside, open(aside, "wb") as f:
        np.savez(f, **arrays)


# --- read ---------------------------------------------------------------------------------------

MAX_JSON_DEPTH = 200


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """The JSON value in `text`; ValueError if malformed or nested deeper than MAX_JSON_DEPTH.

    The depth is counted, because Python's own limit differs between versions and may be met only
    later, by whatever walks the value. `hooks` are those of `json.loads`.
    """
    too_deep = ValueError(f"it is nested more than {MAX_JSON_DEPTH} levels deep")
    try:
        value = json.loads(text, **hooks)
    except RecursionError:
        raise too_deep from None
    opening: tuple[Any, ...] = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, opening)) <= MAX_JSON_DEPTH:  # most texts; a walk takes far longer
        return value
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [v for v in level if isinstance(v, dict | list)]
        if not level:
            return value
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v)]
    raise too_deep


def read_bytes(path: Path, max_bytes: int, *, follows_links: bool = True) -> bytes:
    """The bytes of the file `path`; ValueError if it is something else, or longer; OSError if it
    cannot be read, or is a link that is not to be followed."""
    # O_NONBLOCK: opening a pipe must not wait for a writer.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follows_links else os.O_NOFOLLOW))
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("expected a file")
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"expected at most {max_bytes:,} bytes")
    return data


def recover_missing(directory: Path) -> None:
    """Put `directory` back if it is gone because a run was killed while it replaced it."""
    directory = Path(directory)
    if directory.parent.is_dir() and not directory.exists():
        recover(directory)


def read_json(path: Path, error: type[FlexOlmoError] = FlexOlmoError) -> Any:
    """The JSON value in `path`; raises `error` with a plain message if missing or malformed."""
    path = Path(path)
    recover_missing(path.parent)
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not path.parent.exists():
            raise error(
                f"{path.parent} does not exist; expected a directory with {path.name}."
            ) from None
        raise error(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as e:
        raise error(f"{path} is not readable JSON: {e}.") from None


@contextmanager
def hold_lock(path: Path, wait: bool) -> Iterator[None]:
    """Hold the lock file `path`, made if absent; the system frees it however we end."""
    import fcntl  # not on every system that reads files

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise FlexOlmoError(
                f"Another run is at work in {path.parent}. Wait for its end, or "
                "stop it: this one then goes on from there."
            ) from None
        yield
