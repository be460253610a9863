"""The documents of a set on their way to being prepared: cleaned, cut, fingerprinted, on disk.

A *piece* is a source document, or a part of one that was too long. Each is a row of fixed size; its
text, source and id lie in a spill file, its MinHash signature in another.
"""

import hashlib
import os
import struct
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flexolmo.data.clean import clean_text, split_text
from flexolmo.data.corpus import LARGE_SHARE, Losses
from flexolmo.data.deduplicate import SIGNATURE, SIGNATURE_SIZE, hash_words, sketch, split_words
from flexolmo.data.documents import Document
from flexolmo.data.rows import Rows, sort_rows
from flexolmo.data.settings import PrepareSettings

_DOCUMENTS_AT_ONCE = 1024
_BYTES_AT_ONCE = 1 << 20
_SHOWN_CHARACTERS = 60

# `order` is all up to `place`: pieces are sorted by it, so that what is kept does not depend on
# the order in which documents came, but for texts that are the same.
_FIELDS: dict[str, tuple[Any, int]] = {
    "order": ("S80", 0),
    "parent": ("S32", 0),  # the hash of the words, or of the unit, which decides the split
    "head": (">u8", 0),  # its first bytes
    "parent_text": ("S32", 32),  # tells apart parents of the same words
    "index": (">u4", 64),  # among the pieces of a source document
    "batch": (">u8", 68),  # of documents that were cleaned together, in the order of reading
    "place": (">u4", 76),  # in that batch
    "words": ("S32", 80),  # the hash of the words of the source document
    "exact": ("S32", 112),  # the hash of the text
    "start": ("<i8", 144),  # in the spill file
    "size": ("<i8", 152),  # bytes of text
    "source_bytes": ("<u4", 160),
    "id_bytes": ("<u4", 164),
    "part": ("<u4", 168),  # number of the spill file
    "row": ("<i8", 172),  # among the pieces of that part
}
PIECE = np.dtype(
    {
        "names": list(_FIELDS),
        "formats": [kind for kind, _ in _FIELDS.values()],
        "offsets": [offset for _, offset in _FIELDS.values()],
        "itemsize": 180,
    }
)
_PLACES = ("part", "start", "size", "source_bytes", "id_bytes")


class Place(NamedTuple):
    """Place of a piece's text, source and id, which lie one after another."""

    part: int  # number of the spill file
    start: int
    size: int  # bytes of text
    source_bytes: int
    id_bytes: int


def places_of(pieces: np.ndarray) -> list[Place]:
    """Places of the rows `pieces`."""
    columns = [pieces[name].tolist() for name in _PLACES]
    return [Place(*values) for values in zip(*columns, strict=True)]


@dataclass
class Removed(Losses):
    """Documents that are not in the prepared set, by reason, and pairs that show why."""

    found: int = 0  # documents, before any was removed
    # By reason: the first document removed and, of the same set, the one it was taken for.
    examples: dict[str, list[Document]] = field(default_factory=dict)
    replaced_characters: int = 0

    def add(self, other: "Removed") -> None:
        """Count what `other` counted too; it has no examples."""
        self.documents.update(other.documents)
        self.bytes.update(other.bytes)
        self.found += other.found
        self.replaced_characters += other.replaced_characters

    def card(self) -> dict[str, Any]:
        """Counts for the card, and ids, but no text, of the examples."""
        return {
            "documents": dict(self.documents),
            "bytes": dict(self.bytes),
            "characters_replaced_by_a_space": self.replaced_characters,
            "examples": {
                reason: [document.id for document in pair] for reason, pair in self.examples.items()
            },
        }

    def lines(self) -> Iterator[str]:
        """Sentences for the owner: what was taken for the same, and whether much is missing."""
        for reason, pair in self.examples.items():
            shown = show_difference([document.text for document in pair])
            named = [
                f"{document.id} ({words})" for document, words in zip(pair, shown, strict=True)
            ]
            taken = "." if len(pair) == 1 else f" was taken for {named[1]}."
            yield (
                f"{self.documents[reason]} documents removed, {reason}. "
                f"For example {named[0]}{taken}"
            )
        gone = self.documents.total()
        if gone > LARGE_SHARE * self.found:
            yield f"{gone} of {self.found} documents are not in the set: {self.describe()}."


def show_difference(texts: list[str]) -> list[str]:
    """A few words of each, from shortly before they differ, or from the start if they do not."""
    pairs = enumerate(zip(*texts, strict=False))
    same = next((i for i, pair in pairs if len({*pair}) > 1), min(map(len, texts)))
    start = 0 if same == max(map(len, texts)) else max(0, same - 20)
    return [repr(text[start : start + _SHOWN_CHARACTERS]) for text in texts]


@dataclass
class Cleaned:
    """Pieces of some documents, placed from 0, with their text one after another."""

    pieces: np.ndarray  # PIECE [n]
    text: bytes  # with sources and ids
    signatures: np.ndarray  # uint32 [n,S]
    removed: Removed


def clean_documents(settings: PrepareSettings, documents: Sequence[Document]) -> Cleaned:
    """Clean, cut and fingerprint some documents."""
    removed = Removed()
    rows: list[bytes] = []
    texts: list[bytes] = []
    words_of_pieces: list[list[str]] = []
    start = 0
    for document in documents:
        text, replaced = clean_text(document.text, settings.normalise)
        removed.found += 1
        removed.replaced_characters += replaced
        whole = text.encode()
        if len(whole) < settings.min_document_bytes or not text.strip():
            removed.count("too short" if text.strip() else "empty", len(whole))
            continue
        words = split_words(text)
        same_words = hash_words(words)
        unit = document.unit
        parent = same_words if unit is None else hashlib.sha256(unit.encode()).digest()
        parent_text = hashlib.sha256(whole).digest()
        name = document.id or parent_text.hex()[:16]
        source = document.source.encode()
        parts = split_text(text, settings.max_document_bytes)
        removed.found += len(parts) - 1
        for index, part in enumerate(parts):
            is_whole = part == text
            encoded = whole if is_whole else part.encode()
            exact = parent_text if is_whole else hashlib.sha256(encoded).digest()
            identity = (name if len(parts) == 1 else f"{name}#{index + 1}").encode()
            # In the order of the fields of PIECE; batch, part and row are set where it is stored
            numbers = struct.pack(">IQI", index, 0, len(rows))
            sizes = struct.pack("<qqIIIq", start, len(encoded), len(source), len(identity), 0, 0)
            rows.append(parent + parent_text + numbers + same_words + exact + sizes)
            texts += (encoded, source, identity)
            words_of_pieces.append(words if is_whole else split_words(part))
            start += len(encoded) + len(source) + len(identity)
    pieces = np.frombuffer(bytearray().join(rows), dtype=PIECE)
    return Cleaned(pieces, b"".join(texts), sketch(words_of_pieces), removed)


def batch_documents(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of some documents, in their order, each of about as many bytes."""
    batch: list[Document] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document.text)
        if held >= _BYTES_AT_ONCE or len(batch) == _DOCUMENTS_AT_ONCE:
            yield batch
            batch = []
            held = 0
    if batch:
        yield batch


class Batch(NamedTuple):
    """Some pieces, for work that is done together."""

    pieces: np.ndarray  # PIECE [n]
    numbers: np.ndarray  # int64 [n], of the pieces among all that were kept
    sources: np.ndarray  # int64 [n], number of the source document in the split


def batch_pieces(pieces: Rows, places: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[Batch]:
    """The pieces at `places`, with the numbers of their source documents, in batches."""
    for numbers, sources in places:
        for first in range(0, len(numbers), _DOCUMENTS_AT_ONCE):
            some = slice(first, first + _DOCUMENTS_AT_ONCE)
            rows = pieces.take(numbers[some])
            ends = np.cumsum(rows["size"]) // _BYTES_AT_ONCE
            cuts = np.flatnonzero(np.diff(ends)) + 1
            columns = (rows, numbers[some], sources[some])
            yield from map(Batch, *(np.split(column, cuts) for column in columns))


def cut(rows: np.ndarray) -> list[np.ndarray]:
    """`rows` in arrays of at most 1024, where much belongs to each and little may be in memory."""
    return np.array_split(rows, max(1, -(-len(rows) // _DOCUMENTS_AT_ONCE)))


class PieceStore:
    """Pieces of one part of a set, in files of `directory`, in the order of reading.

    Raises:
        DataError: they are only to be read, and one of them is missing.
    """

    def __init__(self, directory: Path, part: int = 0, is_read_only: bool = False) -> None:
        self.part = part
        self.pieces = Rows(PIECE, _pieces(directory, part), is_read_only=is_read_only)
        self.signatures = Rows(SIGNATURE, _signatures(directory, part), is_read_only=is_read_only)
        self._texts = Rows("u1", _spill(directory, part), is_read_only=is_read_only)

    @property
    def counts(self) -> dict[str, int]:
        """Pieces, signatures, and bytes of text with sources and ids, that are in the files."""
        return {
            "pieces": len(self.pieces),
            "signatures": len(self.signatures),
            "text_bytes": len(self._texts),
        }

    def add(self, batch: int, cleaned: Cleaned) -> None:
        """Write what was made of batch number `batch` of the documents."""
        cleaned.pieces["batch"] = batch
        cleaned.pieces["part"] = self.part
        cleaned.pieces["row"] = len(self.pieces) + np.arange(len(cleaned.pieces))
        cleaned.pieces["start"] += len(self._texts)
        self.pieces.append(cleaned.pieces)
        self.signatures.append(cleaned.signatures)
        self._texts.append(np.frombuffer(cleaned.text, dtype=np.uint8))


def remove_pieces(directory: Path, part: int) -> None:
    """Remove the files that `PieceStore` wrote of one part, if they are there."""
    for path in (_pieces(directory, part), _signatures(directory, part), _spill(directory, part)):
        path.unlink(missing_ok=True)


def sort_pieces(directory: Path, parts: int) -> tuple[Rows, Rows]:
    """Pieces of all parts in the order of their hashes, and their signatures, in new files."""
    stores = [PieceStore(directory, part, is_read_only=True) for part in range(parts)]
    pieces = Rows(PIECE, directory / "pieces")
    signatures = Rows(SIGNATURE, directory / "signatures")
    unsorted = chain.from_iterable(store.pieces.batches() for store in stores)
    for some in sort_rows(unsorted, "order", directory):
        pieces.append(some)
        for few in cut(some):
            found = np.empty((len(few), SIGNATURE_SIZE), dtype=np.uint32)
            for store in stores:
                is_there = few["part"] == store.part
                if is_there.any():
                    found[is_there] = store.signatures.take(few["row"][is_there])
            signatures.append(found)
    return pieces, signatures


class Spill:
    """Reads texts, sources and ids of the pieces in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[int, int] = {}

    def text(self, place: Place) -> str:
        """Text of one piece."""
        return os.pread(self._file(place.part), place.size, place.start).decode()

    def document(self, place: Place) -> Document:
        """One piece as a document."""
        size, source_bytes = place.size, place.source_bytes
        whole = size + source_bytes + place.id_bytes
        data = os.pread(self._file(place.part), whole, place.start)
        source = data[size : size + source_bytes].decode()
        return Document(data[:size].decode(), source, data[size + source_bytes :].decode())

    def _file(self, part: int) -> int:
        if part not in self._files:
            self._files[part] = os.open(_spill(self._directory, part), os.O_RDONLY)
            weakref.finalize(self, os.close, self._files[part])
        return self._files[part]


def _pieces(directory: Path, part: int) -> Path:
    return directory / f"pieces-{part:05d}"


def _signatures(directory: Path, part: int) -> Path:
    return directory / f"signatures-{part:05d}"


def _spill(directory: Path, part: int) -> Path:
    return directory / f"texts-{part:05d}"
