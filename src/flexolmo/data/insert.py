"""A prepared set with documents put in among those of its training split, as tokens."""

import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo.data.batches import TokenSplit, open_set
from flexolmo.data.documents import Document, read_documents, write_documents
from flexolmo.data.prepared import SALT_BYTES, SALT_FILE
from flexolmo.data.tokenizer import load_tokenizer
from flexolmo.errors import DataError
from flexolmo.files import (
    canonical_json,
    digest_bytes,
    digest_file,
    write_bytes,
    write_directory_aside,
    write_json,
)

MARKER = "train_tokens.npy"


def insert_documents(
    prepared: Path, out: Path, documents: Sequence[np.ndarray], source: str, seed: int
) -> dict[str, Any]:
    """Write the prepared set in `prepared` to `out` with `documents`, ids without the end of text,
    put in between its training documents, at places drawn with `seed`; the new set's card.

    Each becomes a source document of its own, of the source `source`. Validation and held-out
    splits stay as they are. Raises DataError if `out` exists.
    """
    prepared = Path(prepared)
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists and is not replaced. Choose another place.")
    token_set = open_set(prepared)
    split = token_set.splits["train"]
    firsts = np.flatnonzero(np.diff(split.sources, prepend=-1))  # each source document's first
    before = np.sort(np.random.default_rng(seed).integers(0, len(firsts) + 1, len(documents)))
    # the numbers of documents, of which those below zero are new: ~i is `documents[i]`
    order = np.insert(
        np.arange(split.num_documents),
        np.append(firsts, split.num_documents)[before],
        ~np.arange(len(documents)),
    )
    texts = load_tokenizer(prepared).decode_batch([ids.tolist() for ids in documents])
    with write_directory_aside(out, MARKER, is_private=True) as aside:
        for name in token_set.card["files"]:
            if not name.startswith("train"):
                shutil.copyfile(prepared / name, aside / name)
        _write_tokens(aside, split, order, documents, token_set.eos_id)
        sizes = [len(texts[~i].encode()) if i < 0 else int(split.bytes[i]) for i in order]
        np.save(aside / "train_bytes.npy", np.array(sizes, dtype=np.int64), allow_pickle=False)
        is_first = (order < 0) | np.isin(order, firsts)
        sources = (is_first.cumsum() - 1).astype(np.int64)
        np.save(aside / "train_sources.npy", sources, allow_pickle=False)
        old = read_documents(prepared / "train.jsonl.zst")
        write_documents(aside / "train.jsonl.zst", _in_order(order, old, texts, source))
        card = token_set.card | {
            "recipe": digest_bytes(canonical_json([token_set.digest, texts, seed])),
            "splits": token_set.card["splits"]
            | {
                "train": {
                    "source_documents": int(is_first.sum()),
                    "documents": len(order),
                    "bytes": int(sum(sizes)),
                    "tokens": len(split.tokens) + sum(len(d) + 1 for d in documents),
                }
            },
            "inserted": {"documents": len(documents), "source": source},
            "files": {
                file.name: {"bytes": file.stat().st_size, "digest": digest_file(file)}
                for file in sorted(aside.iterdir())
            },
        }
        write_json(aside / "card.json", card)
        write_bytes(aside / SALT_FILE, secrets.token_bytes(SALT_BYTES), is_private=True)
    return card


def _write_tokens(
    aside: Path, split: TokenSplit, order: np.ndarray, documents: Sequence[np.ndarray], eos_id: int
) -> None:
    """Write the tokens of all documents, each followed by the end of text, and where they start."""
    lengths = [
        len(documents[~i]) + 1 if i < 0 else int(split.offsets[i + 1] - split.offsets[i])
        for i in order
    ]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    np.save(aside / "train_offsets.npy", offsets, allow_pickle=False)
    tokens = np.lib.format.open_memmap(
        aside / MARKER, mode="w+", dtype=split.tokens.dtype, shape=(int(offsets[-1]),)
    )
    for i, start, end in zip(order, offsets, offsets[1:], strict=False):
        if i < 0:
            tokens[start:end] = np.append(documents[~i], eos_id)
        else:
            tokens[start:end] = split.tokens[split.offsets[i] : split.offsets[i + 1]]
    tokens.flush()


def _in_order(
    order: np.ndarray, old: Iterator[Document], texts: Sequence[str], source: str
) -> Iterator[Document]:
    for i in order:
        yield Document(texts[~i], source, f"{source}-{~i}") if i < 0 else next(old)
