"""The splits of a set: each source document, whole, by its hash."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexolmo.data.pieces import PIECE
from flexolmo.data.prepared import SPLITS
from flexolmo.data.rows import Rows, group_starts, rows_at_once, whole_groups
from flexolmo.data.settings import PrepareSettings
from flexolmo.errors import DataError

PARENTS_FILE = "parents"
# A source document, or a unit: its pieces, their bytes, and its hash as a share of the range.
_PARENT = np.dtype([("first", "<i8"), ("end", "<i8"), ("size", "<i8"), ("share", "<f8")])


@dataclass(frozen=True)
class Split:
    """Source documents of one split: those of number `first` to `end` of `parents`."""

    parents: Rows
    first: int
    end: int
    is_falling: bool  # the last comes first

    @property
    def num_pieces(self) -> int:
        """Number of its documents."""
        if self.first == self.end:
            return 0
        first, last = self.parents.take([self.first, self.end - 1])
        return int(last["end"] - first["first"])

    def places(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers of its pieces, int64 [n], and of the source document of each in this split,
        int64 [n]; some at a time, source documents whole."""
        step = rows_at_once(PIECE)
        count = 0
        for parents in _batches(self.parents, self.first, self.end, self.is_falling, step):
            sizes = parents["end"] - parents["first"]
            before = np.cumsum(sizes) - sizes
            places = np.repeat(parents["first"] - before, sizes) + np.arange(sizes.sum())
            yield places, np.repeat(count + np.arange(len(parents)), sizes)
            count += len(parents)


def split_by_hash(
    pieces: Rows, settings: PrepareSettings, name: str, whole: str, directory: Path
) -> dict[str, Split]:
    """The splits of `pieces`, which are sorted; whole source documents together.

    A source document's hash, read as a fraction of its range, decides: the lowest are held out,
    the highest validate. When the share gives less text than the minimum, the next in hash order
    join. So documents added later leave train documents where they are. `whole` is what source
    documents are called in errors; a file of them is written to `directory`.
    """
    parents = Rows(_PARENT, directory / PARENTS_FILE)
    for rows in whole_groups(pieces.batches(), "parent"):
        starts = group_starts(rows["parent"])
        found = np.empty(len(starts), dtype=_PARENT)
        begun = int(parents.read(len(parents) - 1, len(parents))["end"][0]) if len(parents) else 0
        found["first"] = begun + starts
        found["end"] = begun + np.append(starts[1:], len(rows))
        found["size"] = np.add.reduceat(rows["size"], starts)
        found["share"] = rows["head"][starts] / 2.0**64
        parents.append(found)
    total_bytes = sum(int(rows["size"].sum()) for rows in parents.batches())
    least_bytes = min(settings.min_split_bytes, total_bytes // 10)
    count = len(parents)

    def count_taken(batches: Iterable[np.ndarray], share: float, is_falling: bool) -> int:
        """Number of source documents that come first in `batches` and belong to the split."""
        taken = 0
        taken_bytes = 0
        for rows in batches:
            places = 1 - rows["share"] if is_falling else rows["share"]
            for place, size in zip(places.tolist(), rows["size"].tolist(), strict=True):
                if place >= share and taken_bytes >= least_bytes:
                    return taken
                taken += 1
                taken_bytes += size
        return taken

    rising = _batches(parents, 0, count, is_falling=False)
    heldout = count_taken(rising, settings.heldout_share, is_falling=False)
    falling = _batches(parents, heldout, count, is_falling=True)
    validation = count_taken(falling, settings.validation_share, is_falling=True)
    splits = {
        "train": Split(parents, heldout, count - validation, is_falling=False),
        "validation": Split(parents, count - validation, count, is_falling=True),
        "heldout": Split(parents, 0, heldout, is_falling=False),
    }
    if not all(split.first < split.end for split in splits.values()):
        largest = max((int(rows["size"].max()) for rows in parents.batches()), default=0)
        needed = f"at least {len(SPLITS)} {whole} are needed"
        if count >= len(SPLITS):
            needed = (
                f"with {least_bytes:,} bytes to choose settings on and as many held out, none are "
                "left to train on"
            )
        raise DataError(
            f"{name}: found {count} {whole} of {total_bytes:,} bytes after cleaning, the "
            f"largest of {largest:,}; {needed}. Each, however long, is "
            "either trained on, or used to choose settings, or held out. Give more; or cut where "
            "a part stands by itself, such as chapters, into a file or a record each."
        )
    return splits


def open_splits(directory: Path, ranges: dict[str, list[int]]) -> dict[str, Split]:
    """The splits that `split_by_hash` wrote to `directory`, by `first` and `end` of each."""
    parents = Rows(_PARENT, directory / PARENTS_FILE, is_read_only=True)
    found = {}
    for split in SPLITS:
        first, end = ranges[split]
        found[split] = Split(parents, first, end, is_falling=split == "validation")
    return found


def _batches(
    parents: Rows, first: int, end: int, is_falling: bool, step: int = 1 << 13
) -> Iterator[np.ndarray]:
    """Source documents `first` to `end`, some at a time, in rising or falling order."""
    starts = range(first, end, step)
    if is_falling:
        starts = starts[::-1]
    for start in starts:
        rows = parents.read(start, min(start + step, end))
        yield rows[::-1] if is_falling else rows
