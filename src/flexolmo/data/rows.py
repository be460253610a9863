"""Rows of one size in a file: appended, read by place, and sorted, with only some in memory.

For what is known of every document of a set that may be larger than memory. Knows nothing of
documents. Files are read, not mapped: mapped pages would count as memory of the process.
"""

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo.errors import DataError

BYTES_AT_ONCE = 1 << 22
_LEAST_BYTES_OF_RUN = 1 << 12


class Rows:
    """Rows of `dtype` in a file, which is made if absent, but for one that is only read.

    Args:
        dtype: of one row; one with a shape, such as `(np.uint32, (128,))`, gives arrays [n,128].
        path: the file; none is one in `directory` that has no name and goes with this object.
        offset: bytes of the file before the first row.
    Raises:
        DataError: a file that is only to be read is missing.
    """

    def __init__(
        self,
        dtype: Any,
        path: Path | None = None,
        directory: Path | None = None,
        offset: int = 0,
        is_read_only: bool = False,
    ) -> None:
        self.dtype = np.dtype(dtype)
        self._offset = offset
        if path is None:
            with tempfile.TemporaryFile(dir=directory) as f:
                self._fd = os.dup(f.fileno())
        elif is_read_only:
            try:
                self._fd = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                raise DataError(f"{path} is missing: prepare the set again.") from None
        else:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        weakref.finalize(self, os.close, self._fd)
        self._count = (os.fstat(self._fd).st_size - offset) // self.dtype.itemsize

    def __len__(self) -> int:
        return self._count

    def append(self, rows: np.ndarray) -> None:
        """Write `rows` after the last."""
        self.write(self._count, rows)

    def write(self, first: int, rows: np.ndarray) -> None:
        """Write `rows` from row `first` on; any that are skipped are zero."""
        data = memoryview(np.ascontiguousarray(rows, self.dtype.base).tobytes())
        at = self._at(first)
        while data:
            written = os.pwrite(self._fd, data, at)
            data = data[written:]
            at += written
        self._count = max(self._count, first + len(rows))

    def read(self, first: int, end: int) -> np.ndarray:
        """Rows `first` to `end`, or to the last; may not be written to."""
        size = self.dtype.itemsize
        data = os.pread(self._fd, max(0, min(end, self._count) - first) * size, self._at(first))
        return np.frombuffer(data, dtype=self.dtype)

    def take(self, places: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows at `places`, in that order."""
        if len(places) and np.all(np.diff(places) == 1):
            return self.read(int(places[0]), int(places[-1]) + 1)
        size = self.dtype.itemsize
        data = b"".join(os.pread(self._fd, size, self._at(int(place))) for place in places)
        return np.frombuffer(data, dtype=self.dtype)

    def batches(self, first: int = 0, end: int | None = None) -> Iterator[np.ndarray]:
        """Rows `first` to `end` in order, some at a time."""
        end = self._count if end is None else end
        step = rows_at_once(self.dtype)
        for start in range(first, end, step):
            yield self.read(start, min(start + step, end))

    def _at(self, row: int) -> int:
        """Place of `row` in the file, in bytes."""
        return self._offset + row * self.dtype.itemsize


class ArrayWriter:
    """An .npy file of numbers or rows that are appended; the same bytes as `numpy.save` writes."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self.count = 0

    def __enter__(self) -> "ArrayWriter":
        self._write_header()  # as long whatever the count, which is known at the end
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()

    def append(self, rows: np.ndarray) -> None:
        """Write `rows` after the last."""
        self._file.write(np.ascontiguousarray(rows, self.dtype.base).tobytes())
        self.count += len(rows)

    def _write_header(self) -> None:
        kind = {
            "descr": np.lib.format.dtype_to_descr(self.dtype.base),
            "fortran_order": False,
            "shape": (self.count, *self.dtype.shape),
        }
        np.lib.format.write_array_header_1_0(self._file, kind)


def rows_at_once(dtype: Any) -> int:
    """Rows of `dtype` that are held in memory together."""
    return max(1, BYTES_AT_ONCE // np.dtype(dtype).itemsize)


def sort_rows(batches: Iterable[np.ndarray], key: str, directory: Path) -> Iterator[np.ndarray]:
    """All rows of `batches`, some at a time, in rising order of their field `key`.

    Sorted stretches are written to `directory` and merged. Memory is that of one stretch, and
    4 KiB more for each beyond a thousand. Rows with the same key come in any order.
    """
    starts = [0]  # of the runs, as rows of `runs`
    runs: Rows | None = None
    held: np.ndarray | None = None
    for run in _in_runs(batches):
        if held is not None:
            runs = runs or Rows(run.dtype, directory=directory)
            runs.append(held)
            starts.append(len(runs))
        held = _sorted(run, key)
    if held is None:
        return
    if runs is None:
        yield held
        return
    runs.append(held)
    del held
    yield from _merge(runs, list(pairwise([*starts, len(runs)])), key)


def _merge(runs: Rows, left: list[tuple[int, int]], key: str) -> Iterator[np.ndarray]:
    """Rows of all sorted runs in rising order of `key`; `left` has first and end of each run."""
    bytes_of_run = max(BYTES_AT_ONCE // len(left), _LEAST_BYTES_OF_RUN)
    step = max(1, bytes_of_run // runs.dtype.itemsize)
    while left:
        blocks = [runs.read(first, min(first + step, end)) for first, end in left]
        keys = [np.ascontiguousarray(block[key]) for block in blocks]
        # No row after these blocks comes before the least of their last rows
        lasts = [
            some[-1]
            for some, (first, end) in zip(keys, left, strict=True)
            if first + len(some) < end
        ]
        taken = blocks
        if lasts:
            least = min(lasts)
            counts = [int(np.searchsorted(some, least, side="right")) for some in keys]
            taken = [block[:count] for block, count in zip(blocks, counts, strict=True)]
        yield _sorted(np.concatenate(taken), key)
        moved = [(first + len(some), end) for some, (first, end) in zip(taken, left, strict=True)]
        left = [(first, end) for first, end in moved if first < end]


def whole_groups(batches: Iterable[np.ndarray], key: str) -> Iterator[np.ndarray]:
    """Sorted rows cut elsewhere, so that rows of one `key` come together."""
    held: np.ndarray | None = None
    for batch in batches:
        if not len(batch):
            continue
        joined = batch if held is None else np.concatenate([held, batch])
        keys = joined[key]
        last = int(np.searchsorted(keys, keys[-1], side="left"))
        if last:
            yield joined[:last]
        held = joined[last:]
    if held is not None:
        yield held


def group_starts(keys: np.ndarray) -> np.ndarray:
    """Places, int64, where sorted `keys` differ from the one before; the first, too."""
    is_first = np.ones(len(keys), dtype=bool)
    is_first[1:] = keys[1:] != keys[:-1]
    return np.flatnonzero(is_first)


def _in_runs(batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Rows joined to stretches of at least BYTES_AT_ONCE, but for the last."""
    held: list[np.ndarray] = []
    held_bytes = 0
    for batch in batches:
        if not len(batch):
            continue
        held.append(batch)
        held_bytes += batch.nbytes
        if held_bytes >= BYTES_AT_ONCE:
            yield np.concatenate(held)
            held = []
            held_bytes = 0
    if held:
        yield np.concatenate(held)


def _sorted(rows: np.ndarray, key: str) -> np.ndarray:
    return rows[np.argsort(rows[key], kind="stable")]
