"""Texts that are the same or nearly so, found by fingerprints.

A fingerprint is two rows: the SHA-256 of the text as it is, and a MinHash signature of its word
5-grams. An owner needs only the public set's fingerprints to avoid
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
    """Digest and sketch by which a text is compared with others."""

    exact: bytes  # 32 bytes
    signature: np.ndarray  # uint32 [SIGNATURE_SIZE]


def fingerprint(text: str) -> Fingerprint:
    """Fingerprint of `text`, to find the same text and text of nearly the same words."""
    words = _words(text)
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    shingles = {zlib.crc32(" ".join(words[i : i + SHINGLE_WORDS]).encode()) for i in range(last)}
    sketch = MinHash(
        num_perm=SIGNATURE_SIZE, hashfunc=int, permutations=_PERMUTATIONS, scheme=_SCHEME
    )
    sketch.update_batch(sorted(shingles))
    exact = hashlib.sha256(text.encode()).digest()
    return Fingerprint(exact, sketch.hashvalues.astype(np.uint32))


def hash_words(text: str) -> bytes:
    """32 bytes, equal for texts that differ in case, spacing or punctuation only."""
    return hashlib.sha256(" ".join(_words(text)).encode()).digest()


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold()) or [text]


class Seen:
    """Fingerprints seen so far, numbered from 0, and which of them a new one repeats.

    Args:
        near: share of word 5-grams (estimated Jaccard) from which two texts are near duplicates;
            none: they are never looked for.
    """

    def __init__(self, near: float | None = NEAR_DUPLICATE_JACCARD) -> None:
        self._near = near
        self._exact: dict[bytes, int] = {}
        self._signatures: list[np.ndarray] = []
        self._lsh: MinHashLSH | None = None
        if near is not None:  # a wide net: what it finds is compared again
            wide = min(near, NEAR_DUPLICATE_JACCARD)
            self._lsh = MinHashLSH(threshold=wide, num_perm=SIGNATURE_SIZE)

    def add(self, mark: Fingerprint) -> None:
        """Remember `mark`."""
        number = len(self._signatures)
        self._exact.setdefault(mark.exact, number)
        self._signatures.append(mark.signature)
        if self._lsh is not None:
            self._lsh.insert(number, _sketch(mark.signature), check_duplication=False)

    def find_exact(self, mark: Fingerprint) -> int | None:
        """Number of the first remembered text that is the same, character by character."""
        return self._exact.get(mark.exact)

    def find_near(self, mark: Fingerprint) -> int | None:
        """Number of a remembered text with nearly the same words."""
        if self._lsh is None:
            return None
        for number in self._lsh.query(_sketch(mark.signature)):
            if np.mean(self._signatures[number] == mark.signature) >= self._near:
                return int(number)
        return None

    def find(self, mark: Fingerprint) -> int | None:
        """Number of a remembered text that is the same or nearly the same."""
        exact = self.find_exact(mark)
        return self.find_near(mark) if exact is None else exact


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
