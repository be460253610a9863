"""Which texts say the same thing: exact and near duplicates, by fingerprints.

A fingerprint is two rows: the SHA-256 of the text without case, spaces and punctuation, and a
MinHash signature of its word 5-grams. An owner needs only the public set's fingerprints to avoid
public text. A set's own fingerprints stay with it: whoever holds a text could ask them whether
the set has it.
"""

import hashlib
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasketch import MinHash, MinHashLSH

from flexolmo.errors import DataError

SHINGLE_WORDS = 5
SIGNATURE_SIZE = 128
NEAR_DUPLICATE_JACCARD = 0.7
_SCHEME = "legacy"  # pinned: fingerprints made by different versions must stay comparable
_PERMUTATIONS = MinHash(num_perm=SIGNATURE_SIZE, scheme=_SCHEME).permutations
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Fingerprint:
    """What one text is compared by."""

    exact: bytes  # 32 bytes
    signature: np.ndarray  # uint32 [SIGNATURE_SIZE]


def fingerprint(text: str) -> Fingerprint:
    """Fingerprint of `text`; equal for texts that differ in case, spacing or punctuation only."""
    words = _WORD.findall(text.casefold())
    if not words:
        words = [text]
    exact = hashlib.sha256(" ".join(words).encode()).digest()
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    shingles = {zlib.crc32(" ".join(words[i : i + SHINGLE_WORDS]).encode()) for i in range(last)}
    sketch = MinHash(
        num_perm=SIGNATURE_SIZE, hashfunc=int, permutations=_PERMUTATIONS, scheme=_SCHEME
    )
    sketch.update_batch(sorted(shingles))
    return Fingerprint(exact, sketch.hashvalues.astype(np.uint32))


class Seen:
    """Fingerprints seen so far, and whether a new one repeats any of them."""

    def __init__(self) -> None:
        self._exact: set[bytes] = set()
        self._signatures: list[np.ndarray] = []
        self._lsh = MinHashLSH(threshold=NEAR_DUPLICATE_JACCARD, num_perm=SIGNATURE_SIZE)

    def add(self, mark: Fingerprint) -> None:
        """Remember `mark`."""
        self._exact.add(mark.exact)
        self._lsh.insert(len(self._signatures), _sketch(mark.signature), check_duplication=False)
        self._signatures.append(mark.signature)

    def has(self, mark: Fingerprint) -> bool:
        """Whether a remembered text is the same or nearly the same."""
        return self.has_exact(mark) or self.has_near(mark)

    def has_exact(self, mark: Fingerprint) -> bool:
        """Whether a remembered text has the same words in the same order."""
        return mark.exact in self._exact

    def has_near(self, mark: Fingerprint) -> bool:
        """Whether a remembered text shares about 70% of its word 5-grams (estimated Jaccard)."""
        matches = self._lsh.query(_sketch(mark.signature))
        return any(
            np.mean(self._signatures[i] == mark.signature) >= NEAR_DUPLICATE_JACCARD
            for i in matches
        )


def save_fingerprints(directory: Path, marks: Iterable[Fingerprint]) -> list[Path]:
    """Write `fingerprints_exact.npy` and `fingerprints_near.npy` into `directory`; their paths."""
    marks = list(marks)
    exact = np.frombuffer(b"".join(mark.exact for mark in marks), dtype=np.uint8)
    near = np.array([mark.signature for mark in marks], dtype=np.uint32)
    paths = _paths(directory)
    np.save(paths[0], exact.reshape(len(marks), 32), allow_pickle=False)
    np.save(paths[1], near.reshape(len(marks), SIGNATURE_SIZE), allow_pickle=False)
    return paths


def load_fingerprints(directory: Path) -> list[Fingerprint]:
    """The fingerprints of a prepared set.

    Raises:
        DataError: the directory has none, or not of this size.
    """
    paths = _paths(directory)
    try:
        exact, near = (np.load(path, allow_pickle=False) for path in paths)
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
    return [
        Fingerprint(row.tobytes(), signature) for row, signature in zip(exact, near, strict=True)
    ]


def _sketch(signature: np.ndarray) -> MinHash:
    return MinHash(
        num_perm=SIGNATURE_SIZE, hashvalues=signature, permutations=_PERMUTATIONS, scheme=_SCHEME
    )


def _paths(directory: Path) -> list[Path]:
    return [Path(directory) / "fingerprints_exact.npy", Path(directory) / "fingerprints_near.npy"]
