"""Search of a corpus for items of evaluation tasks, before training, in one pass over it.

Words are runs of letters and digits, in Unicode NFKC and folded case; an n-gram is n words in a
row. An item is hit when a document has one of its n-grams. A paraphrase or a translation is not
found, and counting ("1 2 3") or a famous line is: look at the shares. Knows nothing of prompts
or models.

Source: Brown et al. 2020 (arXiv 2005.14165), appendix C. There n is 8 to 13 by task, from the
lengths of its items; here it is 13, and less only for an item that is shorter. They pass over an
n-gram that is in more than 10 documents; we one that is in more than 10 items of the task.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import repeat
from typing import Any

import numpy as np

from flexolmo.data.documents import Document
from flexolmo.errors import ConfigError, DataError
from flexolmo.progress import Meter

LEAST_WORDS = 8  # an item of fewer says too little to be known by
SHOWN_DOCUMENTS = 5  # ids kept for each item
_WORD = re.compile(r"[^\W_]+")
_PIECE_CHARACTERS = 1 << 20
_BATCH_WORDS = 1 << 18
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word of an n-gram is lost


@dataclass
class ItemHit:
    """An item that the corpus holds, whole or in part."""

    example: str  # an n-gram found, in the words compared
    share: float = 0.0  # of the item's n-grams found, 0 to 1, in all documents together
    num_documents: int = 0
    documents: list[str] = field(default_factory=list)  # ids of the first few


@dataclass
class DocumentHit:
    """A document that holds items, whole or in part."""

    items: int = 0
    largest_share: float = 0.0  # of its items' shares in the corpus, 0 to 1


@dataclass
class TaskOverlap:
    """Overlaps found of one task; what is too short or template cannot be looked for."""

    items: int = 0
    too_short: int = 0  # items of fewer than LEAST_WORDS (or n) words
    only_template: int = 0  # items whose every n-gram is in too many items of the task
    template_share: float = 0.0  # of the n-grams of all items, 0 to 1, left out as template
    hits: dict[str, ItemHit] = field(default_factory=dict)  # by item id, in the order of the items


@dataclass
class Overlaps:
    """Findings of `find_overlaps`."""

    n: int
    template_items: int
    num_documents: int = 0
    read_bytes: int = 0  # UTF-8
    tasks: dict[str, TaskOverlap] = field(default_factory=dict)
    documents: dict[str, DocumentHit] = field(default_factory=dict)  # by id, as they came

    def contaminated_documents(self, least_share: float = 0.0) -> list[str]:
        """Ids of documents to remove: those with an item of which the corpus has `least_share`.

        A document without id is "#7" if it was the 7th read.
        """
        return [name for name, hit in self.documents.items() if hit.largest_share >= least_share]

    def to_json(self) -> dict[str, Any]:
        """All of it in JSON's types, and `items_hit` for each task."""
        found = asdict(self)
        for task in found["tasks"].values():
            task["items_hit"] = len(task["hits"])
        return found


def find_overlaps(
    items: Iterable[tuple[str, str, str]],
    documents: Iterable[Document],
    *,
    n: int = 13,
    template_items: int = 10,
    meter: Meter | None = None,
) -> Overlaps:
    """Search `documents` for the items of tasks; returns which are there, and where.

    Documents are streamed, a quarter of a million words at a time. Each n-gram of the items takes
    about 25 bytes, and three times that while they are sorted. An n-gram goes by 64 bits, not
    checked against its words: with 10 million of them, clean text gives one false find in about
    10^12 words.

    Args:
        items: (task, item id, question and answer). Leave out few-shot examples, which all share.
        n: words in a row; an item of fewer, but at least LEAST_WORDS, is looked for whole.
        template_items: an n-gram in more items of a task than this is the task's own wording, or
            from a passage with many questions, and is not looked for in that task.
        meter: advances by one for each document.
    Raises:
        ConfigError: n or template_items below 1.
        DataError: no item, or an item id twice in one task.
    """
    if n < 1 or template_items < 1:
        raise ConfigError(f"n {n} and template_items {template_items} found; expected 1 or more.")
    found = Overlaps(n, template_items)
    index = _Index(items, found)
    hits: dict[int, ItemHit] = {}
    owned: dict[str, list[int]] = {}  # items by document id
    last_number = [0] * len(index.names)
    for words, starts, places in _batches(documents, found, meter):
        for at, item, position, length in sorted(index.find(words, starts)):
            number, name = places[at]
            if last_number[item] == number:
                continue  # a long document, met again in its next batch
            last_number[item] = number
            example = " ".join(words[position : position + length])
            hit = hits.setdefault(item, ItemHit(example))
            hit.num_documents += 1
            if len(hit.documents) < SHOWN_DOCUMENTS:
                hit.documents.append(name)
            owned.setdefault(name, []).append(item)
    shares = index.shares_found()
    for item in sorted(hits):
        hits[item].share = shares[item]
        task, name = index.names[item]
        found.tasks[task].hits[name] = hits[item]
    found.documents = {
        name: DocumentHit(len(set(own)), max(shares[item] for item in own))
        for name, own in owned.items()
    }
    return found


class _Index:
    """The n-grams of all items, sorted, each as often as there are items that have it.

    A word is 64 bits of its BLAKE2b, which is the same in every run; Python's own hash is not. It
    is taken once for each word of the items; any other word is 0, which no item has.
    """

    def __init__(self, items: Iterable[tuple[str, str, str]], found: Overlaps):
        self.names: list[tuple[str, str]] = []  # (task, item id) of items that can be looked for
        self._word_values: dict[str, int] = {}
        seen: set[tuple[str, str]] = set()
        lengths, grams, tasks = [], [], []
        for task, name, text in items:
            if (task, name) in seen:
                raise DataError(f"Task {task} has item {name} twice; give each its own id.")
            seen.add((task, name))
            overlap = found.tasks.setdefault(task, TaskOverlap())
            overlap.items += 1
            words = _words(text)
            if len(words) < min(found.n, LEAST_WORDS):
                overlap.too_short += 1
                continue
            for word in set(words).difference(self._word_values):
                digest = blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
                self._word_values[word] = int.from_bytes(digest, "big")
            lengths.append(min(found.n, len(words)))
            grams.append(np.unique(_hash_grams(self._hash_words(words), lengths[-1])))
            tasks.append(list(found.tasks).index(task))
            self.names.append((task, name))
        if not found.tasks:
            raise DataError("No item found to look for in the documents; give those of a task.")
        self._lengths = sorted(set(lengths))
        self._sort(grams, np.array(tasks, dtype=np.int64), found)

    def _sort(self, grams: list[np.ndarray], task_of: np.ndarray, found: Overlaps) -> None:
        """Keep `grams` of each item but those that are template; count what is left out."""
        owners = np.repeat(np.arange(len(grams), dtype=np.int32), [len(g) for g in grams])
        every = np.concatenate([np.zeros(0, dtype=np.uint64), *grams])
        order = np.lexsort((task_of[owners], every))
        every, owners = every[order], owners[order]
        tasks = task_of[owners]
        is_new = (np.diff(every, prepend=~every[:1]) != 0) | (np.diff(tasks, prepend=-1) != 0)
        group = np.cumsum(is_new) - 1  # of one n-gram in one task
        is_kept = np.bincount(group)[group] <= found.template_items
        self._grams, self._owners = every[is_kept], owners[is_kept]
        self._is_found = np.zeros(len(self._grams), dtype=bool)
        self._sizes = np.bincount(self._owners, minlength=len(grams))
        for number, overlap in enumerate(found.tasks.values()):
            overlap.only_template = int((self._sizes[task_of == number] == 0).sum())
            if (tasks == number).any():
                overlap.template_share = 1 - float(is_kept[tasks == number].mean())
        bits = max(10, (8 * len(self._grams)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._mask = np.uint64((1 << bits) - 1)
        self._is_likely = np.zeros(1 << bits, dtype=bool)  # a Bloom filter, to spare searches
        self._is_likely[self._grams >> self._shift] = True
        self._is_likely[self._grams & self._mask] = True

    def find(self, words: list[str], starts: list[int]) -> Iterator[tuple[int, int, int, int]]:
        """(document, item, position, length) once for each document and item that share an n-gram.

        A document is its place in `starts`, where each begins in `words`; a position is in `words`.
        """
        values = self._hash_words(words)
        for length in self._lengths:
            grams = _hash_grams(values, length)
            at = np.flatnonzero(self._is_likely[grams >> self._shift])
            at = at[self._is_likely[grams[at] & self._mask]]
            first = np.searchsorted(self._grams, grams[at], side="left")
            is_hit = self._grams.take(first, mode="clip") == grams[at]
            at, first = at[is_hit], first[is_hit]
            counts = np.searchsorted(self._grams, grams[at], side="right") - first
            entries = np.arange(counts.sum()) + np.repeat(first - counts.cumsum() + counts, counts)
            self._is_found[entries] = True
            positions, items = np.repeat(at, counts), self._owners[entries]
            places = np.searchsorted(starts, positions, side="right") - 1
            once = np.unique(places * len(self.names) + items, return_index=True)[1]
            yield from zip(
                places[once].tolist(),
                items[once].tolist(),
                positions[once].tolist(),
                repeat(length),
            )

    def shares_found(self) -> list[float]:
        """The share of each item's n-grams that were found; 0 where it has none."""
        counts = np.bincount(self._owners[self._is_found], minlength=len(self.names))
        return (counts / np.maximum(self._sizes, 1)).tolist()

    def _hash_words(self, words: list[str]) -> np.ndarray:
        """Values of words, uint64 [words]."""
        values = map(self._word_values.get, words, repeat(0))
        return np.fromiter(values, dtype=np.uint64, count=len(words))


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _hash_grams(values: np.ndarray, length: int) -> np.ndarray:
    """One uint64 for each `length` words in a row: a polynomial modulo 2^64 of their values."""
    count = max(0, len(values) - length + 1)
    grams = np.full(count, length, dtype=np.uint64)
    for i in range(length):
        grams = grams * _MULTIPLIER + values[i : i + count]
    return grams


def _batches(
    documents: Iterable[Document], found: Overlaps, meter: Meter | None
) -> Iterator[tuple[list[str], list[int], list[tuple[int, str]]]]:
    """Words of documents in a row; where each document begins; its number, from 1, and id.

    A "" ends a document, so that no n-gram reaches across. One too long for a batch goes on in the
    next, from n - 1 words earlier. Counts documents and bytes in `found`.
    """
    words: list[str] = []
    starts: list[int] = []
    places: list[tuple[int, str]] = []
    for document in documents:
        found.num_documents += 1
        found.read_bytes += len(document.text.encode("utf-8", "replace"))
        starts.append(len(words))
        places.append((found.num_documents, document.id or f"#{found.num_documents}"))
        begin = 0
        while begin < len(document.text):  # a piece at a time, cut before a space
            end = document.text.find(" ", begin + _PIECE_CHARACTERS)
            words += _words(document.text[begin : end if end >= 0 else None])
            begin = end if end >= 0 else len(document.text)
            if len(words) >= _BATCH_WORDS:
                yield words, starts, places
                words = words[max(starts[-1], len(words) - found.n + 1) :]
                starts, places = [0], places[-1:]
        words.append("")
        if meter is not None:
            meter.advance()
    yield words, starts, places
