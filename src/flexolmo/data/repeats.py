"""Texts of a set that repeat another of it, or one of another set; with only some in memory.

Keys (digests, and hashes of bands of signatures) are sorted on disk, which brings together the
texts that share one. Of a set's texts only those that share a key with another are looked at one
by one, in the order of the set, and what is kept of them is noted in files as well.

n texts, S signature size, B bands, m keys.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from flexolmo.data.deduplicate import (
    BANDS,
    NEAR_DUPLICATE_JACCARD,
    are_near,
    choose_bands,
    hash_bands,
)
from flexolmo.data.rows import Rows, group_starts, sort_rows, whole_groups

_DIGEST = np.dtype([("key", "S32"), ("number", "<i8")])
_BAND = np.dtype([("key", "<u8"), ("number", "<i8")])
_GROUPED = np.dtype([("number", "<i8"), ("group", "<i8")])
_LINK = np.dtype([("number", "<i8"), ("before", "<i8")])


@dataclass(frozen=True)
class Repeat:
    """One text that is dropped."""

    number: int  # of the text, in the order of the set
    reason: str
    same: int | None  # number of the text of the same set that it repeats


def mark_those_in(
    own: tuple[Rows, Rows], other: tuple[Rows, Rows], marks: np.ndarray, mark: int, scratch: Path
) -> None:
    """Set `marks`, uint8 [n], where it is 0, to `mark` for each text that the other set has too, or
    whose words nearly are there.

    Args:
        own: pieces of the set, rows of PIECE [n], and their signatures [n,S].
        other: digests "S32" of the other set's texts, and their signatures.
    """
    _mark_exact(own[0], other[0], marks, mark, scratch)
    _mark_near(own[1], other[1], marks, mark, scratch)


def _mark_exact(own: Rows, other: Rows, marks: np.ndarray, mark: int, scratch: Path) -> None:
    both = chain(_keyed(own, "exact"), _theirs(_keyed(other)))
    for rows in whole_groups(sort_rows(both, "key", scratch), "key"):
        starts = group_starts(rows["key"])
        has_theirs = np.logical_or.reduceat(rows["number"] < 0, starts)
        sizes = np.diff(starts, append=len(rows))
        found = rows["number"][np.repeat(has_theirs, sizes) & (rows["number"] >= 0)]
        _mark(marks, found, mark)


def _mark_near(own: Rows, other: Rows, marks: np.ndarray, mark: int, scratch: Path) -> None:
    """Mark texts of which a band is that of another's, where their whole signatures are near."""
    both = chain(_band_rows(own, *BANDS), _theirs(_band_rows(other, *BANDS)))
    for rows in whole_groups(sort_rows(both, "key", scratch), "key"):
        is_theirs = rows["number"] < 0
        theirs = rows[is_theirs]
        ours = rows[~is_theirs]
        at = np.searchsorted(theirs["key"], ours["key"], side="left")
        end = np.searchsorted(theirs["key"], ours["key"], side="right")
        asked = ours["number"]
        while True:  # one candidate of each at a time
            is_left = (at < end) & (marks[asked] == 0)
            if not is_left.any():
                break
            asked = asked[is_left]
            at = at[is_left]
            end = end[is_left]
            candidates = other.take(~theirs["number"][at])
            is_near = are_near(candidates, own.take(asked), NEAR_DUPLICATE_JACCARD)
            _mark(marks, asked[is_near], mark)
            at = at + 1


def find_repeats(
    pieces: Rows,
    signatures: Rows,
    marks: np.ndarray,
    reasons: list[str],
    near: float | None,
    has_units: bool,
    scratch: Path,
) -> Iterator[tuple[np.ndarray, list[Repeat]]]:
    """Some pieces at a time, in their order, with those of them that are dropped.

    Args:
        pieces: rows of PIECE [n].
        signatures: of the same texts, [n,S].
        marks: uint8 [n], 0, or 1 more than the place in `reasons` for which a text is dropped.
        near: share of word 5-grams (estimated Jaccard) from which two texts are near duplicates;
            none: they are never looked for.
        has_units: whether texts of the same words may be of several units, of which one is kept.
    """
    exact = _Groups(_find_groups(_keyed(pieces, "exact"), scratch))
    words = _Groups(_find_groups(_keyed(pieces, "words"), scratch) if has_units else [])
    bands: Iterable[np.ndarray] = []
    if near is not None:
        bands = _find_groups(_band_rows(signatures, *choose_bands(near)), scratch)
    alike = _Groups(bands)
    kept_exact = _Kept(scratch)
    kept_words = _Kept(scratch)
    kept_alike = _Kept(scratch)
    first = 0
    for batch in pieces.batches():
        end = first + len(batch)
        exact_of = exact.below(end)
        words_of = words.below(end)
        alike_of = alike.below(end)
        marked = np.flatnonzero(marks[first:end]) + first
        repeats: list[Repeat] = []
        for number in sorted({*marked.tolist(), *exact_of, *words_of, *alike_of}):
            if marks[number]:
                repeats.append(Repeat(number, reasons[marks[number] - 1], None))
                continue
            same = kept_exact.first(exact_of[number])
            if same is not None:
                repeats.append(Repeat(number, "exact duplicate", same))
                continue
            if near is not None:
                others = kept_alike.all(alike_of[number])
                same = _find_near(number, others, pieces, signatures, near)
                if same is not None:
                    repeats.append(Repeat(number, "near duplicate", same))
                    continue
            of_words = words_of[number]
            same = kept_words.first(of_words)
            if same is None:
                kept_words.add(of_words, number)
            elif pieces.take([same])["parent"][0] != batch["parent"][number - first]:
                repeats.append(Repeat(number, "same words in another unit", same))
                continue
            kept_exact.add(exact_of[number], number)
            kept_alike.add(alike_of[number], number)
        yield batch, repeats
        first = end


def _find_near(
    number: int, others: list[int], pieces: Rows, signatures: Rows, near: float
) -> int | None:
    """The first of `others`, in the order of reading, with nearly the words of text `number`."""
    if not others:
        return None
    asked = np.array(sorted({*others}))
    is_near = are_near(signatures.take(asked), signatures.read(number, number + 1), near)
    found = asked[is_near]
    if not len(found):
        return None
    rows = pieces.take(found)
    return int(found[np.lexsort([rows["place"], rows["batch"]])[0]])


def _find_groups(keyed: Iterable[np.ndarray], scratch: Path) -> Iterator[np.ndarray]:
    """Texts that share a key with another, each with the number of its group, by text."""

    def grouped() -> Iterator[np.ndarray]:
        count = 0
        for rows in whole_groups(sort_rows(keyed, "key", scratch), "key"):
            sizes = np.diff(group_starts(rows["key"]), append=len(rows))
            is_shared = sizes > 1
            found = np.empty(int(sizes[is_shared].sum()), dtype=_GROUPED)
            found["number"] = rows["number"][np.repeat(is_shared, sizes)]
            shared = int(np.count_nonzero(is_shared))
            found["group"] = np.repeat(count + np.arange(shared), sizes[is_shared])
            count += shared
            yield found

    return sort_rows(grouped(), "number", scratch)


class _Groups:
    """Groups of each text that has any, read in the order of the texts."""

    def __init__(self, batches: Iterable[np.ndarray]) -> None:
        self._batches = iter(batches)
        self._held = np.zeros(0, dtype=_GROUPED)

    def below(self, end: int) -> defaultdict[int, list[int]]:
        """Groups of the texts before `end` that were not asked for yet."""
        found: defaultdict[int, list[int]] = defaultdict(list)
        while True:
            last = int(np.searchsorted(self._held["number"], end))
            numbers = self._held["number"][:last].tolist()
            for number, group in zip(numbers, self._held["group"][:last].tolist(), strict=True):
                found[number].append(group)
            self._held = self._held[last:]
            if len(self._held):
                return found
            more = next(self._batches, None)
            if more is None:
                return found
            self._held = more


class _Kept:
    """Texts that were kept so far, by group: for each group a chain of links in a file."""

    def __init__(self, scratch: Path) -> None:
        self._lasts = Rows("<i8", directory=scratch)  # 1 more than the place of the last link
        self._links = Rows(_LINK, directory=scratch)

    def add(self, groups: list[int], number: int) -> None:
        """Remember text `number` in `groups`."""
        for group in groups:
            link = np.array([(number, self._last(group))], dtype=_LINK)
            self._links.append(link)
            self._lasts.write(group, np.array([len(self._links)]))

    def all(self, groups: list[int]) -> list[int]:
        """Texts remembered in any of `groups`, some more than once."""
        found = []
        for group in groups:
            place = self._last(group)
            while place:
                ((number, place),) = self._links.read(place - 1, place).tolist()
                found.append(number)
        return found

    def first(self, groups: list[int]) -> int | None:
        """The text that was remembered first in `groups`, if any."""
        return min(self.all(groups), default=None)

    def _last(self, group: int) -> int:
        found = self._lasts.read(group, group + 1)
        return int(found[0]) if len(found) else 0


def _keyed(rows: Rows, field: str | None = None) -> Iterator[np.ndarray]:
    """Digests with the numbers of their texts; `field` of the rows, or the rows themselves."""
    first = 0
    for batch in rows.batches():
        yield _number(batch if field is None else batch[field], first, _DIGEST)
        first += len(batch)


def _band_rows(signatures: Rows, bands: int, rows: int) -> Iterator[np.ndarray]:
    first = 0
    for batch in signatures.batches():
        yield _number(hash_bands(batch, bands, rows), first, _BAND)
        first += len(batch)


def _number(keys: np.ndarray, first: int, dtype: np.dtype) -> np.ndarray:
    """Rows of `keys`, [n] or [n,B], with the numbers of their texts, from `first`."""
    found = np.empty(keys.shape, dtype=dtype)
    found["key"] = keys
    numbers = np.arange(first, first + len(keys))
    found["number"] = numbers if keys.ndim == 1 else numbers[:, None]
    return found.ravel()


def _theirs(batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Rows of another set, told apart from ours by numbers below 0."""
    for rows in batches:
        rows["number"] = ~rows["number"]
        yield rows


def _mark(marks: np.ndarray, numbers: np.ndarray, mark: int) -> None:
    marks[numbers[marks[numbers] == 0]] = mark
