"""Texts that are the same or nearly so, found by fingerprints.

A fingerprint is two rows: the SHA-256 of the text as it is, and a MinHash signature of its word
5-grams. An owner needs only the public set's fingerprints to avoid
public text. A set's own fingerprints stay with it: whoever holds a text could ask them whether
the set has it.

n texts, S signature size, B bands.
"""

import hashlib
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexolmo.errors import DataError

SHINGLE_WORDS = 5
SIGNATURE_SIZE = 128
NEAR_DUPLICATE_JACCARD = 0.7
_BANDS, _BAND_ROWS = 14, 9  # datasketch's choice for that share: what it finds is compared again
_HASHES_AT_ONCE = 256  # so that a block of their 128 permutations stays in the processor's cache
_ROWS_AT_ONCE = 4096
_WORD = re.compile(r"\w+")
# datasketch's "legacy" scheme, pinned: signatures of different versions must stay comparable.
_RANDOM = np.random.RandomState(1)
_FACTORS, _OFFSETS = np.array(
    [
        [_RANDOM.randint(least, 2**61 - 1, dtype=np.uint64) for least in (1, 0)]
        for _ in range(SIGNATURE_SIZE)
    ]
).T.copy()


@dataclass(frozen=True)
class Fingerprints:
    """Digests and sketches by which texts are compared with others."""

    exact: np.ndarray  # uint8 [n,32]
    signatures: np.ndarray  # uint32 [n,S]


def split_words(text: str) -> list[str]:
    """Words of `text` without regard to case; all of it if it has none."""
    return _WORD.findall(text.casefold()) or [text]


def hash_words(words: Sequence[str]) -> bytes:
    """32 bytes, equal for texts that differ in case, spacing or punctuation only."""
    return hashlib.sha256(" ".join(words).encode()).digest()


def sketch(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """MinHash signatures uint32 [n,S] of the 5-grams of each text's words.

    Source: Broder 1997; h -> (a h + b mod 2^64) mod (2^61 - 1), the lower 32 bits, as datasketch.
    """
    hashes = [_hash_shingles(words) for words in texts]
    sizes = np.array([len(some) for some in hashes], dtype=np.int64)
    ends = sizes.cumsum()  # [n]
    begins = ends - sizes
    found = np.full((len(texts), SIGNATURE_SIZE), 2**32 - 1, dtype=np.uint32)
    everything = np.concatenate([np.zeros(0, dtype=np.uint64), *hashes])[:, None]
    for first in range(0, len(everything), _HASHES_AT_ONCE):
        permuted = everything[first : first + _HASHES_AT_ONCE] * _FACTORS  # [.,S]
        permuted += _OFFSETS
        # The lower half of the remainder by 2^61 - 1, but for one number in 2^58
        permuted += permuted >> 61
        last = first + len(permuted)
        before, until = np.searchsorted(ends, [first, last - 1], side="right")
        at = slice(before, until + 1)  # texts with hashes in this block
        starts = np.maximum(begins[at], first) - first
        least = np.minimum.reduceat(permuted.astype(np.uint32), starts, axis=0)
        np.minimum(found[at], least, out=found[at])
    return found


def _hash_shingles(words: Sequence[str]) -> np.ndarray:
    """CRC-32 of each run of five words, uint64 [m]; of all words if they are fewer."""
    joined = " ".join(words).encode()
    if len(words) <= SHINGLE_WORDS:
        return np.array([zlib.crc32(joined)], dtype=np.uint64)
    spaces = np.flatnonzero(np.frombuffer(joined, dtype=np.uint8) == ord(" "))
    starts = [0, *(spaces[: 1 - SHINGLE_WORDS] + 1).tolist()]
    ends = [*spaces[SHINGLE_WORDS - 1 :].tolist(), len(joined)]
    view = memoryview(joined)
    crc = zlib.crc32
    return np.array(
        [crc(view[start:end]) for start, end in zip(starts, ends, strict=True)], dtype=np.uint64
    )


def _hash_bands(signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """uint64 [n,B], a number for each band of `rows` parts of a signature, and its place."""
    parts = signatures[:, : bands * rows].reshape(-1, bands, rows).astype(np.uint64)
    mixed = np.full(parts.shape[:2], 0x9E3779B97F4A7C15, dtype=np.uint64)
    mixed *= np.arange(1, bands + 1, dtype=np.uint64)
    for row in range(rows):
        mixed = (mixed ^ parts[:, :, row]) * np.uint64(0xFF51AFD7ED558CCD)
        mixed ^= mixed >> np.uint64(32)
    return mixed


class Index:
    """Fingerprints of one set, sorted, to ask which other texts repeat one of them."""

    def __init__(self, marks: Fingerprints) -> None:
        self._exact = {row.tobytes() for row in marks.exact}
        self._signatures = marks.signatures
        keys = _hash_bands(marks.signatures, _BANDS, _BAND_ROWS)
        self._order = np.argsort(keys, axis=0, kind="stable").astype(np.int32)  # [n,B]
        self._keys = np.take_along_axis(keys, self._order, axis=0)

    def find(self, marks: Fingerprints) -> np.ndarray:
        """True, [n], for each text that is in the set, or whose words nearly are."""
        found = np.array([row.tobytes() in self._exact for row in marks.exact], dtype=bool)
        keys = _hash_bands(marks.signatures, _BANDS, _BAND_ROWS)
        for band in range(_BANDS):
            asked = np.flatnonzero(~found)
            held = self._keys[:, band]
            at = np.searchsorted(held, keys[asked, band])
            end = np.searchsorted(held, keys[asked, band], side="right")
            while len(asked := asked[is_left := at < end]):  # one candidate of each at a time
                at, end = at[is_left], end[is_left]
                others = self._signatures[self._order[at, band]]
                is_near = _are_near(others, marks.signatures[asked], NEAR_DUPLICATE_JACCARD)
                found[asked[is_near]] = True
                asked, at, end = asked[~is_near], at[~is_near] + 1, end[~is_near]
        return found


class Seen:
    """Texts of one set that were kept so far, and which of them another repeats.

    Args:
        signatures: uint32 [n,S] of all texts of the set, those that may come.
        near: share of word 5-grams (estimated Jaccard) from which two texts are near duplicates;
            none: they are never looked for.
    """

    def __init__(self, signatures: np.ndarray, near: float | None) -> None:
        self._signatures = signatures
        self._near = near
        self._exact: dict[bytes, int] = {}
        self._buckets: dict[int, list[int]] = {}
        self._keys = np.zeros((len(signatures), 0), dtype=np.uint64)
        if near is not None:
            keys = _hash_bands(signatures, *_choose_bands(near))
            values, counts = np.unique(keys, return_counts=True)
            keys[~np.isin(keys, values[counts > 1])] = 0  # no other text has it
            self._keys = keys

    def add(self, exact: bytes, number: int) -> None:
        """Remember text `number` of the set, with its digest."""
        self._exact.setdefault(exact, number)
        for key in self._keys[number].tolist():
            if key:
                self._buckets.setdefault(key, []).append(number)

    def find_exact(self, exact: bytes) -> int | None:
        """Number of the first remembered text that is the same, character by character."""
        return self._exact.get(exact)

    def find_near(self, number: int) -> int | None:
        """Number of a remembered text with nearly the same words as text `number`."""
        if self._near is None:
            return None
        keys = self._keys[number].tolist()
        others = {other for key in keys for other in self._buckets.get(key, [])}
        if not others:
            return None
        asked = np.array(sorted(others))
        signature = self._signatures[number]
        is_near = _are_near(self._signatures[asked], signature, self._near)
        return int(asked[is_near.argmax()]) if is_near.any() else None


def _are_near(one: np.ndarray, other: np.ndarray, near: float) -> np.ndarray:
    """True, [n], where two signatures [n,S] agree in at least a share `near`."""
    return np.mean(one == other, axis=1) >= near


def _choose_bands(near: float) -> tuple[int, int]:
    """Bands and rows of a band that find texts which share `near`, or more loosely."""
    if near >= NEAR_DUPLICATE_JACCARD:
        return _BANDS, _BAND_ROWS
    from datasketch import MinHashLSH  # brings scipy, and is seldom needed

    chosen = MinHashLSH(threshold=near, num_perm=SIGNATURE_SIZE)
    return chosen.b, chosen.r


def save_fingerprints(
    directory: Path, exact: np.ndarray, signatures: np.ndarray, order: np.ndarray
) -> None:
    """Write `fingerprints_exact.npy`, and `fingerprints_near.npy` of `signatures[order]`, into
    `directory`."""
    exact_path, near_path = _paths(directory)
    np.save(exact_path, exact, allow_pickle=False)
    shape = (len(order), SIGNATURE_SIZE)
    kind = {"descr": signatures.dtype.str, "fortran_order": False, "shape": shape}
    with open(near_path, "wb") as f:
        np.lib.format.write_array_header_1_0(f, kind)
        for first in range(0, len(order), _ROWS_AT_ONCE):
            f.write(signatures[order[first : first + _ROWS_AT_ONCE]].tobytes())


def load_fingerprints(directory: Path) -> Fingerprints:
    """The fingerprints of a prepared set, mapped.

    Raises:
        DataError: the directory has none, or not of this size.
    """
    try:
        exact, near = (np.load(p, mmap_mode="r", allow_pickle=False) for p in _paths(directory))
    except (OSError, ValueError) as e:
        raise DataError(
            f"{directory} has no readable fingerprints ({e}): it must be a directory "
            "written by `flexolmo data prepare`."
        ) from None
    if exact.shape[1:] != (32,) or near.shape != (len(exact), SIGNATURE_SIZE):
        raise DataError(
            f"{directory}: fingerprints of shapes {exact.shape} and {near.shape}; "
            f"expected [n, 32] and [n, {SIGNATURE_SIZE}]. Prepare the set again."
        )
    return Fingerprints(exact, near)


def _paths(directory: Path) -> list[Path]:
    return [Path(directory) / "fingerprints_exact.npy", Path(directory) / "fingerprints_near.npy"]
