"""Shards of a prepared set: tokens, their places, fingerprints and text, split by split.

Written in one go from the pieces that were kept, in batches; the tokens of a batch may be made by
other processes. Knows nothing of how pieces were chosen.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import pairwise, tee
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flexolmo.data.corpus import LARGE_SHARE
from flexolmo.data.deduplicate import SIGNATURE
from flexolmo.data.documents import Document, write_documents
from flexolmo.data.pieces import Batch, Place, Spill, batch_pieces, places_of, show_difference
from flexolmo.data.prepared import EXACT_FILE, NEAR_FILE, TOKENIZER_FILE
from flexolmo.data.rows import ArrayWriter, Rows
from flexolmo.data.splits import Split
from flexolmo.data.tokenizer import Tokenizer, load_tokenizer
from flexolmo.data.workers import Run
from flexolmo.errors import DataError
from flexolmo.progress import Meter, progress


class Tokenized(NamedTuple):
    """Tokens of some texts."""

    tokens: bytes  # of one text after another, each followed by the eos, in `token_type`
    lengths: list[int]  # tokens of each text, with its eos
    changed: dict[int, str]  # by place among the texts: as it is read back, where that differs


@dataclass
class Written:
    """Counts of what is in the set."""

    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    documents: Counter[str] = field(default_factory=Counter)  # by source
    bytes: Counter[str] = field(default_factory=Counter)
    changed_documents: int = 0  # that the tokenizer does not give back as they were
    example: str = ""

    def judge_tokenizer(self, name: str, say: Callable[[str], object]) -> None:
        """Say that text is changed, or refuse the tokenizer where it changes much."""
        found = self.documents.total()
        if not self.changed_documents:
            return
        line = (
            f"{name}: the tokenizer does not carry the text of {self.changed_documents} of {found} "
            f"documents. For example {self.example}."
        )
        if self.changed_documents > LARGE_SHARE * found:
            raise DataError(f"{line} Choose one that does, for example a byte-level one.")
        say(line)

    def count(self, document: Document, size: int, back: str | None) -> None:
        """Count one document of `size` bytes; `back` is its text as it is read back, if other."""
        self.documents[document.source] += 1
        self.bytes[document.source] += size
        if back is not None:
            self.changed_documents += 1
            shown = show_difference([document.text, back])
            self.example = (
                self.example or f"{document.id} has {shown[0]} and is read back as {shown[1]}"
            )


def write_splits(
    kept: tuple[Rows, Rows], splits: Mapping[str, Split], work: Path, out: Path, name: str, run: Run
) -> Written:
    """Write fingerprints, shards and text of all splits to `out`; what is in them.

    Args:
        kept: the pieces, and their signatures [n,S].
        work: directory with their text and the tokenizer.
        name: of the set.
        run: asked once for each split, for `tokenize_texts` of its batches.
    """
    pieces, signatures = kept
    tokenizer = load_tokenizer(work)
    written = Written()
    with (
        ArrayWriter(out / EXACT_FILE, np.dtype((np.uint8, (32,)))) as exact,
        ArrayWriter(out / NEAR_FILE, SIGNATURE) as near,
    ):

        def fingerprint(batches: Iterable[Batch]) -> Iterator[Batch]:
            for batch in batches:
                digests = np.ascontiguousarray(batch.pieces["exact"])
                exact.append(digests.view(np.uint8).reshape(-1, 32))
                near.append(signatures.take(batch.numbers))
                yield batch

        for split, documents in splits.items():
            batches, again = tee(batch_pieces(pieces, documents.places()))
            tokenized = run(partial(tokenize_texts, work), (places_of(b.pieces) for b in again))
            with (
                progress(f"Tokenizing {name} {split}", documents.num_pieces, "documents") as meter,
                _SplitWriter(out, split, tokenizer, Spill(work)) as writer,
            ):
                texts = writer.write(fingerprint(batches), tokenized, written, meter)
                write_documents(out / f"{split}.jsonl.zst", texts)
            written.splits[split] = writer.counts
    return written


class _SplitWriter(ExitStack):
    """Writes the arrays of one split."""

    def __init__(self, out: Path, split: str, tokenizer: Tokenizer, spill: Spill) -> None:
        super().__init__()
        self._spill = spill

        def open_array(part: str, dtype: Any) -> ArrayWriter:
            return self.enter_context(ArrayWriter(out / f"{split}_{part}.npy", dtype))

        self._tokens = open_array("tokens", token_type(tokenizer))
        self._offsets = open_array("offsets", np.int64)
        self._bytes = open_array("bytes", np.int64)
        self._sources = open_array("sources", np.int64)
        self._offsets.append(np.zeros(1))
        self._last_parent = b""
        self.counts = {"source_documents": 0, "documents": 0, "bytes": 0, "tokens": 0}

    def write(
        self,
        batches: Iterator[Batch],
        tokenized: Iterator[Tokenized],
        written: Written,
        meter: Meter,
    ) -> Iterator[Document]:
        """Write what is known of the pieces, and count and yield their documents."""
        for batch, found in zip(batches, tokenized, strict=True):
            self._write_batch(batch, found)
            for number, place in enumerate(places_of(batch.pieces)):
                document = self._spill.document(place)
                written.count(document, place.size, found.changed.get(number))
                yield document
            meter.advance(len(found.lengths))

    def _write_batch(self, batch: Batch, found: Tokenized) -> None:
        counts = self.counts
        self._tokens.append(np.frombuffer(found.tokens, dtype=self._tokens.dtype))
        self._offsets.append(counts["tokens"] + np.cumsum(found.lengths))
        self._bytes.append(batch.pieces["size"])
        self._sources.append(batch.sources)
        # Pieces of one text follow one another
        parents = [self._last_parent, *batch.pieces["parent_text"].tolist()]
        self._last_parent = parents[-1]
        counts["source_documents"] += sum(one != next_one for one, next_one in pairwise(parents))
        counts["documents"] += len(found.lengths)
        counts["bytes"] += int(batch.pieces["size"].sum())
        counts["tokens"] += sum(found.lengths)


def tokenize_texts(work: Path, places: Sequence[Place]) -> Tokenized:
    """Tokens of the texts at `places` in the spill files of `work`."""
    tokenizer = _load_tokenizer_once(work, (work / TOKENIZER_FILE).stat().st_mtime_ns)
    spill = Spill(work)
    texts = [spill.text(place) for place in places]
    batch = tokenizer.encode_arrays(texts)
    dtype = token_type(tokenizer)
    end = np.array([tokenizer.eos_id], dtype=dtype).tobytes()
    tokens = b"".join(ids.astype(dtype).tobytes() + end for ids in batch)
    lengths = [len(ids) + 1 for ids in batch]
    return Tokenized(tokens, lengths, tokenizer.find_changed(texts, batch))


def token_type(tokenizer: Tokenizer) -> np.dtype:
    """Type in which ids are stored: uint16 where they fit, else uint32."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


@lru_cache(maxsize=1)
def _load_tokenizer_once(work: Path, _modified: int) -> Tokenizer:
    return load_tokenizer(work)
