"""Files that are never half-written, and digests that name their content.

Knows nothing of models or data; everything that writes a result goes through here.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexolmo.errors import FlexOlmoError


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


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`.

    A kill at any moment leaves the old file or the new one, never a piece.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(fd)
    aside = Path(name)
    try:
        yield aside
        with open(aside, "rb") as f:
            os.fsync(f.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
        _sync_directory(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def write_directory_aside(path: Path, marker: str) -> Iterator[Path]:
    """Yield an empty directory beside `path`; on success rename it to `path`.

    A directory already at `path` is replaced, once the new one is complete, only if it is empty
    or holds the file `marker`, which says that it is one of the same kind; FlexOlmoError if not.
    """
    path = Path(path)
    if path.exists() and not (
        path.is_dir() and ((path / marker).is_file() or not any(path.iterdir()))
    ):
        raise FlexOlmoError(
            f"{path} exists and is not replaced: it has no {marker}, so it is "
            "something else. Choose another place."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield aside
        os.chmod(aside, 0o755)
        for file in aside.rglob("*"):
            if file.is_file():
                with open(file, "rb") as f:
                    os.fsync(f.fileno())
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.replace(path, old / "old")
            try:
                os.replace(aside, path)
            except BaseException:
                os.replace(old / "old", path)
                old.rmdir()
                raise
            shutil.rmtree(old)
        else:
            os.replace(aside, path)
        _sync_directory(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, all or nothing."""
    with write_aside(path) as aside:
        aside.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON (indented, keys in the order given), all or nothing."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def read_json(path: Path, error: type[FlexOlmoError] = FlexOlmoError) -> Any:
    """The JSON value in `path`; raises `error` with a plain message if missing or malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} does not exist.") from None
    except (OSError, ValueError) as e:
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
