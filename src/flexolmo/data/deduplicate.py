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
from pathlib import Path

import numpy as np

from flexolmo.data.prepared import EXACT_FILE, NEAR_FILE
from flexolmo.data.rows import Rows
from flexolmo.errors import DataError

SHINGLE_WORDS = 5
SIGNATURE_SIZE = 128
SIGNATURE = np.dtype((np.uint32, (SIGNATURE_SIZE,)))
NEAR_DUPLICATE_JACCARD = 0.7
# Bands and rows of each, datasketch's choice for that share; what they find is compared again.
BANDS = (14, 9)
_HASHES_AT_ONCE = 256  # so that a block of their 128 permutations stays in the processor's cache
_WORD = re.compile(r"\w+")
# datasketch's "legacy" scheme, pinned: signatures of different versions must stay comparable.
_RANDOM = np.random.RandomState(1)
_FACTORS, _OFFSETS = np.array(
    [
        [_RANDOM.randint(least, 2**61 - 1, dtype=np.uint64) for least in (1, 0)]
        for _ in range(SIGNATURE_SIZE)
    ]
).T.copy()


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


def hash_bands(signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """uint64 [n,B], a number for each band of `rows` parts of a signature, and its place."""
    parts = signatures[:, : bands * rows].reshape(-1, bands, rows).astype(np.uint64)
    mixed = np.full(parts.shape[:2], 0x9E3779B97F4A7C15, dtype=np.uint64)
    mixed *= np.arange(1, bands + 1, dtype=np.uint64)
    for row in range(rows):
        mixed = (mixed ^ parts[:, :, row]) * np.uint64(0xFF51AFD7ED558CCD)
        mixed ^= mixed >> np.uint64(32)
    return mixed


def are_near(one: np.ndarray, other: np.ndarray, near: float) -> np.ndarray:
    """True, [n], where two signatures [n,S] agree in at least a share `near`."""
    return np.mean(one == other, axis=1) >= near


def choose_bands(near: float) -> tuple[int, int]:
    """Bands and rows of a band that find texts which share `near`, or more loosely."""
    if near >= NEAR_DUPLICATE_JACCARD:
        return BANDS
    from datasketch import MinHashLSH  # brings scipy, and is seldom needed

    chosen = MinHashLSH(threshold=near, num_perm=SIGNATURE_SIZE)
    return chosen.b, chosen.r


def open_fingerprints(directory: Path) -> tuple[Rows, Rows]:
    """The fingerprints of a prepared set: digests "S32", and signatures uint32 [S].

    Raises:
        DataError: the directory has none, or not of this size.
    """
    paths = [Path(directory) / EXACT_FILE, Path(directory) / NEAR_FILE]
    try:
        exact, near = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
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
    return (
        Rows("S32", paths[0], offset=exact.offset, is_read_only=True),
        Rows(SIGNATURE, paths[1], offset=near.offset, is_read_only=True),
    )
