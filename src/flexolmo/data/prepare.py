"""A fetched set of documents made ready for training: clean, distinct, split, tokenized.

An owner runs this alone: of the public set only fingerprints and the tokenizer are needed, of
other owners nothing. The same input gives the same bytes; a run killed midway leaves nothing.

Words: a *source document* is what was fetched; a *document* is a source document, or a piece of
one that was too long. All pieces of a source document lie in one split.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flexolmo.data.clean import clean_text, split_text
from flexolmo.data.corpus import Corpus, open_corpus
from flexolmo.data.deduplicate import (
    Fingerprint,
    Seen,
    fingerprint,
    load_fingerprints,
    save_fingerprints,
)
from flexolmo.data.documents import Document, write_documents
from flexolmo.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from flexolmo.errors import DataError
from flexolmo.files import (
    canonical_json,
    digest_bytes,
    digest_file,
    read_json,
    recover,
    write_directory_aside,
    write_json,
)
from flexolmo.progress import progress

FORMAT = "flexolmo-prepared-set-1"
SPLITS = ("train", "validation", "heldout")
_DOCUMENTS_TOKENIZED_AT_ONCE = 256


@dataclass(frozen=True)
class PrepareSettings:
    """Choices of `prepare_set`; ours, except where a table is named."""

    min_characters: int = 200  # shorter source documents are dropped
    max_document_bytes: int = 50_000  # longer ones are cut into pieces at blank lines
    validation_share: float = 0.05  # of source documents, for choosing settings
    heldout_share: float = 0.05  # of source documents, only ever reported
    min_split_bytes: int = 60_000  # of validation and of held-out text, if that is below a tenth
    vocab_size: int = 4096  # of the tokenizer trained when none is given


@dataclass
class _Piece:
    """One document on its way: where its text lies in the spill file, and what identifies it."""

    parent: bytes  # 32 bytes, the hash that decides the split
    parent_text: bytes  # 32 bytes, tells apart parents that differ only in case or spaces
    index: int
    source: str
    id: str
    start: int
    size: int
    mark: Fingerprint


@dataclass
class _Removed:
    """What is not in the prepared set, and why (source documents for the first, else documents)."""

    too_short: int = 0
    exact_duplicate: int = 0
    near_duplicate: int = 0
    in_public_set: int = 0
    in_other_sets: int = 0
    bytes_in_all: int = 0


def prepare_set(
    raw: Path | Corpus,
    out: Path,
    tokenizer: Tokenizer | None = None,
    public: Path | None = None,
    disjoint_from: Sequence[Path] = (),
    settings: PrepareSettings = PrepareSettings(),
    may_replace: bool = False,
) -> dict[str, Any]:
    """Prepare the documents of `raw` into `out`; returns its card.

    Per split `out` holds `<split>_tokens.npy` (uint16 or uint32, each document followed by the
    eos), `<split>_offsets.npy` (int64 [n + 1], where documents start), `<split>_bytes.npy`
    (int64 [n], UTF-8 bytes of each document) and `<split>.jsonl.zst` (the text), all in the same
    order; besides these fingerprints, `tokenizer.json` and `card.json`.

    Args:
        raw: what `open_corpus` returns, or the directory of a fetched set.
        out: directory to write; if it already holds this very result, nothing is done.
        tokenizer: by default the public set's; for the public set itself one is trained on its
            train split.
        public: prepared public set, whose text is removed from this one.
        disjoint_from: prepared sets whose text is removed too (the curated corpus; an owner on
            their own has none).
        may_replace: whether another prepared set in `out` is replaced instead of refused.
    Raises:
        DataError: `raw` cannot be read, too little text is left, or `out` holds another set.
    """
    out = Path(out)
    corpus = raw if isinstance(raw, Corpus) else open_corpus(raw)
    name = corpus.name
    if tokenizer is None and public is not None:
        tokenizer = load_tokenizer(public)
    recipe = digest_bytes(
        canonical_json(
            {
                "format": FORMAT,
                "settings": asdict(settings),
                "corpus": digest_bytes(canonical_json(corpus.card)),
                "tokenizer": tokenizer.digest if tokenizer else None,
                "public": card_digest(read_card(public)) if public else None,
                "disjoint_from": sorted(card_digest(read_card(other)) for other in disjoint_from),
            }
        )
    )
    if out.parent.is_dir():
        recover(out)  # text that a killed run left, even if this one has nothing to write
    done = _finished(out, recipe)
    if done is not None:
        return done
    if not may_replace:
        _refuse_another(out, corpus, recipe)

    with write_directory_aside(out, "train_tokens.npy", is_private=corpus.is_private) as aside:
        spill = aside / "spill"
        removed = _Removed()
        with open(spill, "wb") as f:
            pieces = _clean_all(corpus, f, settings, removed)
        pieces = _deduplicate(name, pieces, public, disjoint_from, removed)
        try:
            splits = split_by_hash(pieces, settings, name)
        except DataError as e:
            raise DataError(f"{e} Removed: {asdict(removed)}.") from None
        with open(spill, "rb") as f:
            if tokenizer is None:
                texts = (_text(f, piece) for piece in splits["train"])
                tokenizer = train_tokenizer(texts, settings.vocab_size)
            counts = {
                split: _write_split(aside, split, splits[split], f, tokenizer, name)
                for split in SPLITS
            }
        spill.unlink()
        save_fingerprints(aside, [piece.mark for split in SPLITS for piece in splits[split]])
        tokenizer.save(aside / "tokenizer.json")
        card = {
            "format": FORMAT,
            "name": name,
            "recipe": recipe,
            "splits": counts,
            "removed": asdict(removed),
            "settings": asdict(settings),
            "tokenizer": {
                "digest": tokenizer.digest,
                "vocab_size": tokenizer.vocab_size,
                "eos": tokenizer.eos,
                "eos_id": tokenizer.eos_id,
            },
            "public": card_digest(read_card(public)) if public else None,
            "corpus_card": digest_bytes(canonical_json(corpus.card)),
            "reading": corpus.describe_reading(),
            "licences": sorted({source["licence"] for source in corpus.card["sources"]}),
            "weak_spots": corpus.card.get("weak_spots", []),
            "sources": _sources_kept(corpus.card, splits),
            "files": {
                file.name: {"bytes": file.stat().st_size, "digest": digest_file(file)}
                for file in sorted(aside.iterdir())
            },
        }
        write_json(aside / "card.json", card)
    return card


def card_digest(card: dict[str, Any]) -> str:
    """`sha256:` digest that names a prepared set: its card lists the digests of all its files."""
    return digest_bytes(canonical_json(card))


def read_card(prepared: Path) -> dict[str, Any]:
    """The card of a prepared set.

    Raises:
        DataError: `prepared` is not a prepared set of this format.
    """
    card = read_json(Path(prepared) / "card.json", DataError)
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise DataError(
            f"{prepared} is not a prepared set of format {FORMAT}: make one with "
            "`flexolmo data prepare`."
        )
    return card


def split_by_hash(
    pieces: Sequence[_Piece], settings: PrepareSettings, name: str
) -> dict[str, list[_Piece]]:
    """`pieces` of each split, whole source documents together.

    A source document's hash, read as a fraction of its range, decides: the lowest are held out,
    the highest validate. When the share gives less text than the minimum, the next in hash order
    join. So documents added later leave train documents where they are.
    """
    by_parent: dict[bytes, list[_Piece]] = {}
    for piece in sorted(pieces, key=lambda p: (p.parent, p.index)):
        by_parent.setdefault(piece.parent, []).append(piece)
    total_bytes = sum(piece.size for piece in pieces)
    least_bytes = min(settings.min_split_bytes, total_bytes // 10)
    rising = list(by_parent)

    def take(order: list[bytes], share: float, falling: bool) -> list[bytes]:
        taken: list[bytes] = []
        taken_bytes = 0
        for parent in order:
            place = int.from_bytes(parent[:8]) / 2**64
            if (1 - place if falling else place) >= share and taken_bytes >= least_bytes:
                break
            taken.append(parent)
            taken_bytes += sum(piece.size for piece in by_parent[parent])
        return taken

    heldout = take(rising, settings.heldout_share, falling=False)
    validation = take(rising[len(heldout) :][::-1], settings.validation_share, falling=True)
    train = rising[len(heldout) : len(rising) - len(validation)]
    if not (train and validation and heldout):
        raise DataError(
            f"{name}: {len(by_parent)} source documents with {total_bytes} bytes are left after "
            "cleaning; that is too few to train on and still hold some out. Give more documents, "
            "or cut long ones into chapters, one document each."
        )
    chosen = {"train": train, "validation": validation, "heldout": heldout}
    return {
        split: [piece for parent in parents for piece in by_parent[parent]]
        for split, parents in chosen.items()
    }


def _finished(out: Path, recipe: str) -> dict[str, Any] | None:
    """The card in `out` if it is of this recipe and every file is as it says."""
    try:
        card = read_card(out)
    except DataError:
        return None
    files = card["files"]
    if card["recipe"] != recipe or not all(
        (out / file).is_file() and digest_file(out / file) == files[file]["digest"]
        for file in files
    ):
        return None
    return card


def _refuse_another(out: Path, corpus: Corpus, recipe: str) -> None:
    """Refuse to prepare `corpus` into `out` if a set of other text or settings is there."""
    card = read_json(out / "card.json", DataError) if (out / "card.json").is_file() else None
    if card is not None and card.get("recipe") != recipe:
        origins = [
            ", ".join(f"{s.get('package')} ({s.get('client')})" for s in sources)
            for sources in (card.get("sources", []), corpus.card["sources"])
        ]
        raise DataError(
            f"{out} holds a set prepared from {origins[0]}, of other text or settings than this "
            f"one, from {origins[1]}. Give another --name or --out, or --replace to replace it."
        )


def _clean_all(
    corpus: Corpus, spill: BinaryIO, settings: PrepareSettings, removed: _Removed
) -> list[_Piece]:
    """Clean, cut and fingerprint every document of `corpus`; their text goes to `spill`."""
    pieces = []
    start = 0
    for document in corpus.read():
        text = clean_text(document.text)
        if len(text) < settings.min_characters:
            removed.too_short += 1
            removed.bytes_in_all += len(text.encode())
            continue
        parent_text = hashlib.sha256(text.encode()).digest()
        parent = fingerprint(text)
        parts = split_text(text, settings.max_document_bytes)
        for index, part in enumerate(parts):
            encoded = part.encode()
            spill.write(encoded)
            pieces.append(
                _Piece(
                    parent=parent.exact,
                    parent_text=parent_text,
                    index=index,
                    source=document.source,
                    id=(document.id or parent.exact.hex()[:16])
                    + (f"#{index + 1}" if len(parts) > 1 else ""),
                    start=start,
                    size=len(encoded),
                    mark=parent if len(parts) == 1 else fingerprint(part),
                )
            )
            start += len(encoded)
    return pieces


def _deduplicate(
    name: str,
    pieces: list[_Piece],
    public: Path | None,
    disjoint_from: Sequence[Path],
    removed: _Removed,
) -> list[_Piece]:
    """Pieces that repeat nothing public, nothing of other sets, and no piece before them.

    Goes in hash order, so what is kept does not depend on the order documents came in.
    """
    in_public, in_others, seen = Seen(), Seen(), Seen()
    for mark in load_fingerprints(public) if public else []:
        in_public.add(mark)
    for other in disjoint_from:
        for mark in load_fingerprints(other):
            in_others.add(mark)
    kept = []
    with progress(f"Removing duplicates from {name}", len(pieces), "documents") as meter:
        for piece in sorted(pieces, key=lambda p: (p.parent, p.parent_text, p.index)):
            meter.advance()
            if in_public.has(piece.mark):
                removed.in_public_set += 1
            elif in_others.has(piece.mark):
                removed.in_other_sets += 1
            elif seen.has_exact(piece.mark):
                removed.exact_duplicate += 1
            elif seen.has_near(piece.mark):
                removed.near_duplicate += 1
            else:
                seen.add(piece.mark)
                kept.append(piece)
                continue
            removed.bytes_in_all += piece.size
    return kept


def _text(spill: BinaryIO, piece: _Piece) -> str:
    spill.seek(piece.start)
    return spill.read(piece.size).decode()


def _write_split(
    aside: Path, split: str, pieces: list[_Piece], spill: BinaryIO, tokenizer: Tokenizer, name: str
) -> dict[str, int]:
    """Write one split's shards and text into `aside`; its counts."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    lengths = []
    flat = aside / f"{split}_tokens.flat"
    with (
        open(flat, "wb") as f,
        progress(f"Tokenizing {name} {split}", len(pieces), "documents") as meter,
    ):
        for first in range(0, len(pieces), _DOCUMENTS_TOKENIZED_AT_ONCE):
            some = pieces[first : first + _DOCUMENTS_TOKENIZED_AT_ONCE]
            for ids in tokenizer.encode_batch([_text(spill, piece) for piece in some]):
                f.write(np.array([*ids, tokenizer.eos_id], dtype=dtype).tobytes())
                lengths.append(len(ids) + 1)
            meter.advance(len(some))
    num_tokens = sum(lengths)
    shard = np.lib.format.open_memmap(aside / f"{split}_tokens.npy", "w+", dtype, (num_tokens,))
    shard[:] = np.memmap(flat, dtype, "r", shape=(num_tokens,))
    shard.flush()
    flat.unlink()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    sizes = np.array([piece.size for piece in pieces], dtype=np.int64)
    np.save(aside / f"{split}_offsets.npy", offsets, allow_pickle=False)
    np.save(aside / f"{split}_bytes.npy", sizes, allow_pickle=False)
    write_documents(aside / f"{split}.jsonl.zst", _as_documents(pieces, spill))
    return {
        "source_documents": len({piece.parent for piece in pieces}),
        "documents": len(pieces),
        "bytes": int(sizes.sum()),
        "tokens": num_tokens,
    }


def _as_documents(pieces: list[_Piece], spill: BinaryIO) -> Iterator[Document]:
    for piece in pieces:
        yield Document(_text(spill, piece), piece.source, piece.id)


def _sources_kept(corpus: dict[str, Any], splits: dict[str, list[_Piece]]) -> list[dict[str, Any]]:
    """The corpus card's sources, each with what of it is in the prepared set."""
    documents: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for pieces in splits.values():
        for piece in pieces:
            documents[piece.source] += 1
            sizes[piece.source] += piece.size
    return [
        {
            **source,
            "kept_documents": documents[source["source"]],
            "kept_bytes": sizes[source["source"]],
        }
        for source in corpus["sources"]
    ]
