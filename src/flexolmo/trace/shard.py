"""One part of an index: whole documents in tokens, and all their suffixes in order.

A directory with these NumPy files, which are memory-mapped:

    tokens.npy      uint8 [n * width], ids one after another, the highest byte first, so that
                    bytes compare as ids do; every document ends with the end-of-text id
    suffixes.npy    int32 [n], places of tokens in the order of the text from there on
    documents.npy   int64 [d + 1], where documents start, and the end
    names.npy       uint8, the documents' names in UTF-8, one after another
    name_ends.npy   int64 [d], where each name ends

Letters: n tokens of the part, d its documents, width bytes of an id.
"""

import bisect
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from flexolmo.errors import DataError

FILES = ("tokens.npy", "suffixes.npy", "documents.npy", "names.npy", "name_ends.npy")
MAX_SHARD_BYTES = 2**31 - 1  # places fit into 32 bits
_FIRST_TOKENS = 64  # compared at first; few matches are longer
_AT_ONCE = 1 << 20


def id_bytes(vocab_size: int) -> int:
    """Bytes in which each of so many ids is written: 2 or 3."""
    if vocab_size > 1 << 24:
        raise DataError(f"A vocabulary of {vocab_size:,} ids cannot be indexed: at most 2**24.")
    return 2 if vocab_size <= 1 << 16 else 3


def encode_ids(ids: Sequence[int] | np.ndarray, width: int) -> np.ndarray:
    """`ids` as the index writes them, uint8 [n * width]."""
    whole = np.asarray(ids, dtype=">u4").view(np.uint8).reshape(-1, 4)
    return np.ascontiguousarray(whole[:, 4 - width :]).reshape(-1)


def write_shard(
    directory: Path, ids: np.ndarray, documents: np.ndarray, names: Sequence[str], width: int
) -> None:
    """Write a part's files into `directory`.

    Peak memory is about 5 * width + 4 bytes a token.

    Args:
        ids: [n], each document followed by the end-of-text id.
        documents: int64 [d + 1], where documents start in `ids`, and the end.
    """
    from pydivsufsort import divsufsort

    text = encode_ids(ids, width)
    if len(text) > MAX_SHARD_BYTES:
        raise DataError(f"A part of {len(ids):,} tokens is too large: give fewer --shard-tokens.")
    np.save(directory / "tokens.npy", text, allow_pickle=False)
    # Suffixes of all bytes; those that begin inside an id are left out.
    order = divsufsort(text)
    suffixes = np.lib.format.open_memmap(
        directory / "suffixes.npy", mode="w+", dtype=np.int32, shape=(len(ids),)
    )
    done = 0
    for start in range(0, len(order), _AT_ONCE):
        some = order[start : start + _AT_ONCE]
        some = some[some % width == 0] // width
        suffixes[done : done + len(some)] = some
        done += len(some)
    suffixes.flush()
    encoded = [name.encode() for name in names]
    joined = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    np.save(directory / "documents.npy", documents.astype(np.int64), allow_pickle=False)
    np.save(directory / "names.npy", joined, allow_pickle=False)
    np.save(directory / "name_ends.npy", ends, allow_pickle=False)


class Shard:
    """One part, open for searching. A pattern is ids as `encode_ids` writes them, as bytes."""

    def __init__(self, directory: Path, width: int):
        """Open `directory`; DataError if its files are not of one part."""
        arrays = [self._load(directory / name) for name in FILES]
        tokens, suffixes, self.documents, names, self._name_ends = arrays
        kinds = [(a.dtype.str, a.ndim) for a in arrays]
        is_whole = (
            kinds == [("|u1", 1), ("<i4", 1), ("<i8", 1), ("|u1", 1), ("<i8", 1)]
            and len(tokens) == width * len(suffixes)
            and len(self.documents) == len(self._name_ends) + 1
        )
        if not is_whole:
            raise DataError(f"{directory} holds files that do not fit together: index again.")
        self.width = width
        self.num_tokens = len(suffixes)
        self._tokens, self._names = tokens, names
        self._text = tokens.data
        self._suffixes = suffixes.data

    @staticmethod
    def _load(path: Path) -> np.ndarray:
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as e:
            raise DataError(f"{path} cannot be opened ({e}): index again.") from None

    def longest(self, pattern: bytes) -> int:
        """Number of ids with which `pattern` begins somewhere in this part."""
        size = _FIRST_TOKENS * self.width
        while True:
            found = self._longest(pattern[:size])
            if found < size or size >= len(pattern):
                return found // self.width
            size *= 4

    def _longest(self, pattern: bytes) -> int:
        """Bytes of the longest beginning of `pattern` found."""
        place = self._bisect(bisect.bisect_left, pattern)
        around = self._suffixes[max(0, place - 1) : place + 1]  # neighbours in order share most
        return max((_common(pattern, self._at(k, len(pattern))) for k in around), default=0)

    def find(self, pattern: bytes) -> range:
        """Numbers in the order of suffixes, of all that begin with `pattern`."""
        first = self._bisect(bisect.bisect_left, pattern)
        return range(first, self._bisect(bisect.bisect_right, pattern))

    def place(self, number: int) -> int:
        """The token at which suffix `number` begins."""
        return self._suffixes[number]

    def document(self, place: int) -> int:
        """Number, in this part, of the document that token `place` is in."""
        return int(np.searchsorted(self.documents, place, side="right")) - 1

    def name(self, document: int) -> str:
        """Name of a document."""
        start = int(self._name_ends[document - 1]) if document else 0
        return bytes(self._names[start : int(self._name_ends[document])]).decode(errors="replace")

    def ids(self, start: int, end: int) -> list[int]:
        """Ids of tokens [start, end)."""
        some = self._tokens[start * self.width : end * self.width].reshape(-1, self.width)
        weights = 256 ** np.arange(self.width - 1, -1, -1)
        return (some @ weights).tolist()

    def _at(self, place: int, num_bytes: int) -> bytes:
        start = place * self.width
        return bytes(self._text[start : start + num_bytes])

    def _bisect(self, side: Callable[..., int], pattern: bytes) -> int:
        """Place of `pattern` in the order of suffixes, of which as many bytes are compared."""
        text = self._text
        width = self.width
        size = len(pattern)

        def read(place: int) -> bytes:
            return bytes(text[place * width : place * width + size])

        return side(self._suffixes, pattern, key=read)


def _common(a: bytes, b: bytes) -> int:
    """Number of bytes with which both begin."""
    size = min(len(a), len(b))
    differing = int.from_bytes(a[:size]) ^ int.from_bytes(b[:size])
    return size - (differing.bit_length() + 7) // 8
