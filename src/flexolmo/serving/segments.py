"""Files of the audit log's directory.

- `FIRST.jsonl`: entries from number FIRST (20 digits) on, one a line;
- `FIRST.hashes`: in the place of such a file that was removed, its entries' leaf hashes, 32 bytes
  each;
- `checkpoints.jsonl`: checkpoints, one a line;
- `log.pem`: the key that signs them, unless it is kept elsewhere; `log.pem.pub`: its public half.

Knows nothing of what the lines say.
"""

import errno
import mmap
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from flexolmo.files import sync

CHECKPOINTS = "checkpoints.jsonl"
KEY = "log.pem"
PUBLIC_KEY = "log.pem.pub"
HASH_BYTES = 32


@dataclass(frozen=True)
class Segment:
    """A file of entries, or of the hashes of entries that were removed."""

    first: int  # number of its first entry
    path: Path

    @property
    def is_removed(self) -> bool:
        """True if only hashes are left."""
        return self.path.suffix == ".hashes"


def segment_path(directory: Path, first: int) -> Path:
    """The file of the entries from number `first` on."""
    return directory / f"{first:020}.jsonl"


def list_segments(directory: Path) -> list[Segment]:
    """The log's segments in order; of one whose removal was cut short, the entries."""
    found = {}
    for name in sorted(os.listdir(directory)):  # .hashes before .jsonl
        if match := re.fullmatch(r"([0-9]{20})\.(?:jsonl|hashes)", name):
            found[int(match[1])] = Segment(int(match[1]), directory / name)
    return [found[first] for first in sorted(found)]


# --- reading ------------------------------------------------------------------------------------


@contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
    """`path` to read; OSError if it is a link, a pipe or a device."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(fd, "rb") as f:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(path))
        yield f


def read_lines(path: Path, max_bytes: int) -> Iterator[tuple[bytes, bool]]:
    """Each line without its newline, and True if there was one; only the last may lack it.

    Of a longer line the first `max_bytes` + 1 bytes are given.
    """
    with open_plain(path) as f:
        while line := f.readline(max_bytes + 1):
            end = line
            while len(end) > max_bytes and not end.endswith(b"\n"):
                end = f.readline(max_bytes + 1)
            yield line.removesuffix(b"\n"), end.endswith(b"\n")


def read_hashes(path: Path) -> Iterator[bytes]:
    """Each leaf hash of a removed segment; the last is short if the file is damaged."""
    with open_plain(path) as f:
        while leaf := f.read(HASH_BYTES):
            yield leaf


def read_last_line(path: Path, max_bytes: int) -> bytes:
    """The last whole line, without its newline; empty if there is none, or none so short."""
    with open_plain(path) as f:
        f.seek(max(0, os.fstat(f.fileno()).st_size - 2 * max_bytes - 2))
        tail = f.read()
    lines = tail[: tail.rfind(b"\n") + 1].split(b"\n")
    return lines[-2] if len(lines) > 1 else b""


# --- writing ------------------------------------------------------------------------------------


class LineFile:
    """A file that grows by whole lines, on the disk before `append` returns, or not at all.

    Opening makes it, with mode 0600, or cuts what a killed writer left of a last line.
    """

    def __init__(self, path: Path):
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            self.num_bytes = self._find_end()
            self.cut()
            os.fsync(self._fd)
            sync(path.parent)
        except BaseException:
            os.close(self._fd)
            raise

    def _find_end(self) -> int:
        """Bytes up to the end of the last whole line."""
        if os.fstat(self._fd).st_size == 0:
            return 0
        with mmap.mmap(self._fd, 0, prot=mmap.PROT_READ) as content:
            return content.rfind(b"\n") + 1

    def append(self, lines: bytes) -> None:
        """Add `lines`; after an OSError the file ends where it did before."""
        try:
            self.cut()
            written = 0
            while written < len(lines):
                written += os.pwrite(self._fd, lines[written:], self.num_bytes + written)
            os.fsync(self._fd)
        except OSError:
            with suppress(OSError):
                self.cut()
            raise
        self.num_bytes += len(lines)

    def cut(self) -> None:
        """Remove what an append that failed has left behind the last whole line."""
        if os.fstat(self._fd).st_size > self.num_bytes:
            os.ftruncate(self._fd, self.num_bytes)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
