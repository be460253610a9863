"""A fetched set of documents made ready for training: clean, distinct, split, tokenized.

An owner runs this alone: of the public set only fingerprints and the tokenizer are needed, of
other owners nothing. The same input gives the same bytes; a run killed midway leaves nothing.
Memory does not grow with the set: what is known of each document lies on the disk.

Words: a *source document* is what was fetched; a *document* is a source document, or a piece of
one that was too long. All pieces of a source document lie in one split, and so do texts that
differ in case, spacing and punctuation alone. Where a field says whom or what each text is about
(a *unit*, such as a patient), all texts of a unit lie in one split and count as one source
document; of texts of the same words in several units one is kept.
"""

import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo.data.corpus import Corpus, open_corpus, warn_of_losses
from flexolmo.data.deduplicate import SIGNATURE, open_fingerprints
from flexolmo.data.kept_work import without_dead_work
from flexolmo.data.pieces import (
    PIECE,
    PieceStore,
    Place,
    Removed,
    Spill,
    batch_documents,
    batch_pieces,
    clean_documents,
    cut,
    places_of,
    sort_pieces,
)
from flexolmo.data.prepared import (
    EXACT_FILE,
    FORMAT,
    NEAR_FILE,
    SALT_BYTES,
    SALT_FILE,
    TOKENIZER_FILE,
    card_digest,
    check_file,
    read_card,
    read_salt,
)
from flexolmo.data.repeats import find_repeats, mark_those_in
from flexolmo.data.rows import Rows
from flexolmo.data.settings import PrepareSettings
from flexolmo.data.shards import write_splits
from flexolmo.data.splits import PARENTS_FILE, open_splits, split_by_hash
from flexolmo.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from flexolmo.data.workers import Run, open_workers
from flexolmo.errors import DataError
from flexolmo.files import (
    canonical_json,
    digest_bytes,
    digest_file,
    read_json,
    recover,
    write_bytes,
    write_directory_aside,
    write_json,
)
from flexolmo.progress import progress

MARKER = "train_tokens.npy"  # says that a directory is a prepared set
_WORK = "work"  # directory of what is only needed on the way
_CHOSEN = "chosen.json"
_KEPT = "kept"
_KEPT_SIGNATURES = "kept_signatures"
_UNTIL_CHOSEN = ("marks", "pieces", "signatures")


@dataclass
class Preparation:
    """One set to be prepared: from what, to where, and how; `prepare_set` tells of each field."""

    corpus: Corpus
    out: Path
    tokenizer: Tokenizer | None = None
    public: Path | None = None
    disjoint_from: tuple[Path, ...] = ()
    settings: PrepareSettings = field(default_factory=PrepareSettings)

    def __post_init__(self) -> None:
        if self.tokenizer is None and self.public is not None:
            self.tokenizer = load_tokenizer(self.public)

    @cached_property
    def recipe(self) -> str:
        """`sha256:` digest of all that the result depends on."""
        card = {
            "format": FORMAT,
            "settings": self.settings.model_dump(),
            "corpus": digest_bytes(canonical_json(self.corpus.card)),
            "tokenizer": self.tokenizer.digest if self.tokenizer else None,
            "public": card_digest(read_card(self.public)) if self.public else None,
            "disjoint_from": sorted(card_digest(read_card(other)) for other in self.disjoint_from),
        }
        return digest_bytes(canonical_json(card))

    @property
    def has_units(self) -> bool:
        """True if texts are grouped by whom or what they are about."""
        return self.corpus.settings.unit_field is not None


def prepare_set(
    raw: Path | Corpus,
    out: Path,
    tokenizer: Tokenizer | None = None,
    public: Path | None = None,
    disjoint_from: Sequence[Path] = (),
    settings: PrepareSettings | None = None,
    may_replace: bool = False,
    say: Callable[[str], object] = warnings.warn,
    workers: int = 1,
) -> dict[str, Any]:
    """Prepare the documents of `raw` into `out`; returns its card.

    Per split `out` holds `<split>_tokens.npy` (uint16 or uint32, each document followed by the
    eos), `<split>_offsets.npy` (int64 [n + 1], where documents start), `<split>_bytes.npy`
    (int64 [n], UTF-8 bytes of each document), `<split>_sources.npy` (int64 [n], number of the
    source document it is a piece of, ascending; texts of the same words, or of one unit, share
    one) and `<split>.jsonl.zst` (the text), all in the same order; besides these fingerprints,
    `tokenizer.json` and `card.json`.

    Args:
        raw: what `open_corpus` returns, or the directory of a fetched set.
        out: directory to write; if it already holds this very result, nothing is done.
        tokenizer: by default the public set's; for the public set itself one is trained on its
            train split.
        public: prepared public set, whose text is removed from this one.
        disjoint_from: prepared sets whose text is removed too (the curated corpus; an owner on
            their own has none).
        may_replace: whether another prepared set in `out` is replaced instead of refused.
        say: told in a sentence of what was taken for the same, of much that is missing (here, or
            in the download already), and of text that the tokenizer changes.
        workers: processes that do the work; the result is the same for any number. With several,
            a script that calls this keeps the call under `if __name__ == "__main__":`.
    Raises:
        DataError: `raw` cannot be read, too little text is left, the tokenizer changes more than
            a fifth of the documents, or `out` holds another set.
    """
    corpus = raw if isinstance(raw, Corpus) else open_corpus(raw)
    chosen = settings or PrepareSettings()
    task = Preparation(corpus, Path(out), tokenizer, public, tuple(disjoint_from), chosen)
    with without_dead_work(task.out):
        done = find_finished(task, may_replace)
        if done is not None:
            return done
        with (
            write_directory_aside(task.out, MARKER, is_private=corpus.is_private) as aside,
            open_workers(workers) as run,
        ):
            work = aside / _WORK
            work.mkdir(mode=0o700)
            removed = _clean_all(task, work, run)
            choose_pieces(task, work, 1, removed, say)
            card = write_set(task, work, aside, run, say)
            shutil.rmtree(work)
        return card


def find_finished(task: Preparation, may_replace: bool) -> dict[str, Any] | None:
    """The card of the result if it is there already and whole, else none.

    Raises:
        DataError: another set is there, and `may_replace` is false.
    """
    if task.out.parent.is_dir():
        recover(task.out)  # text that a killed run left, even if this one has nothing to write
    done = _finished(task.out, task.recipe)
    if done is None and not may_replace:
        refuse_another(task.out, task.corpus, task.recipe)
    return done


def choose_pieces(
    task: Preparation, work: Path, parts: int, removed: Removed, say: Callable[[str], object]
) -> None:
    """Drop the pieces in `work` that repeat others, split the rest, and learn a tokenizer of the
    training text if none was given; all is written to `work`.

    Args:
        parts: number of the files of pieces.
        removed: documents that cleaning left out, to which those that are dropped here are added.
    """
    name = task.corpus.name
    kept = _deduplicate(task, work, parts, removed)
    try:
        whole = "units (--unit-field)" if task.has_units else "documents"
        splits = split_by_hash(kept, task.settings, name, whole, work)
    except DataError as e:
        raise DataError(f"{e} Removed: {removed.describe()}.") from None
    for line in (*warn_of_losses(task.corpus.card), *removed.lines()):
        say(f"{name}: {line}")
    tokenizer = task.tokenizer
    if tokenizer is None:
        spill = Spill(work)
        texts = (
            spill.text(place)
            for batch in batch_pieces(kept, splits["train"].places())
            for place in places_of(batch.pieces)
        )
        tokenizer = train_tokenizer(texts, task.settings.vocab_size)
    tokenizer.save(work / TOKENIZER_FILE)
    ranges = {split: [chosen.first, chosen.end] for split, chosen in splits.items()}
    reading = task.corpus.describe_reading()
    write_json(work / _CHOSEN, {"splits": ranges, "removed": removed.card(), "reading": reading})


def remove_choice(work: Path) -> None:
    """Remove the files in `work` that a killed run of `choose_pieces` left."""
    for left in (*_UNTIL_CHOSEN, _KEPT, _KEPT_SIGNATURES, PARENTS_FILE):
        (work / left).unlink(missing_ok=True)


def chosen_batches(work: Path) -> Iterator[list[Place]]:
    """Places of the texts that `write_set` asks tokens for, batch by batch, of all splits."""
    kept = Rows(PIECE, work / _KEPT, is_read_only=True)
    splits = open_splits(work, read_json(work / _CHOSEN, DataError)["splits"])
    for documents in splits.values():
        for batch in batch_pieces(kept, documents.places()):
            yield places_of(batch.pieces)


def write_set(
    task: Preparation, work: Path, aside: Path, run: Run, say: Callable[[str], object]
) -> dict[str, Any]:
    """Tokenize the chosen pieces in `work` and write the prepared set to `aside`; its card.

    `run` is asked once for each split, for the tokens of its texts.

    Raises:
        DataError: the tokenizer changes more than a fifth of the documents.
    """
    name = task.corpus.name
    chosen = read_json(work / _CHOSEN, DataError)
    tokenizer = load_tokenizer(work)
    tokenizer.save(aside / TOKENIZER_FILE)
    kept = (
        Rows(PIECE, work / _KEPT, is_read_only=True),
        Rows(SIGNATURE, work / _KEPT_SIGNATURES, is_read_only=True),
    )
    written = write_splits(kept, open_splits(work, chosen["splits"]), work, aside, name, run)
    written.judge_tokenizer(name, say)
    corpus = task.corpus
    card = {
        "format": FORMAT,
        "name": name,
        "recipe": task.recipe,
        "splits": written.splits,
        "removed": chosen["removed"],
        "settings": task.settings.model_dump(),
        "tokenizer": {
            "digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
            "eos": tokenizer.eos,
            "eos_id": tokenizer.eos_id,
            "changed_documents": written.changed_documents,
        },
        "public": card_digest(read_card(task.public)) if task.public else None,
        "corpus_card": digest_bytes(canonical_json(corpus.card)),
        "reading": chosen["reading"],
        **({"unit_field": corpus.settings.unit_field} if task.has_units else {}),
        "licences": sorted({source["licence"] for source in corpus.card["sources"]}),
        "weak_spots": corpus.card.get("weak_spots", []),
        "sources": [
            {
                **source,
                "kept_documents": written.documents[source["source"]],
                "kept_bytes": written.bytes[source["source"]],
            }
            for source in corpus.card["sources"]
        ],
        "files": {
            file.name: {"bytes": file.stat().st_size, "digest": digest_file(file)}
            for file in sorted(aside.iterdir())
            if file.is_file()
        },
    }
    write_json(aside / "card.json", card)
    salt = _salt_for(task.out, task.recipe)
    write_bytes(aside / SALT_FILE, salt, is_private=corpus.is_private)
    return card


def _finished(out: Path, recipe: str) -> dict[str, Any] | None:
    """The card in `out` if it is of this recipe and every file is as it says."""
    try:
        card = read_card(out)
        read_salt(out)
    except DataError:
        return None
    files = card["files"]
    if card["recipe"] != recipe or not all(
        (out / file).is_file() and digest_file(out / file) == files[file]["digest"]
        for file in files
    ):
        return None
    return card


def _salt_for(out: Path, recipe: str) -> bytes:
    """The salt of a set of this recipe: that of a damaged one in `out`, if any, else a new one."""
    try:
        if read_card(out)["recipe"] == recipe:
            return read_salt(out)
    except DataError:
        pass
    return secrets.token_bytes(SALT_BYTES)


def refuse_another(out: Path, corpus: Corpus, recipe: str) -> None:
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


def _clean_all(task: Preparation, work: Path, run: Run) -> Removed:
    """Clean, cut and fingerprint every document, into `work`; what was left out."""
    removed = Removed()
    store = PieceStore(work)
    batches = batch_documents(task.corpus.read())
    for number, cleaned in enumerate(run(partial(clean_documents, task.settings), batches)):
        store.add(number, cleaned)
        removed.add(cleaned.removed)
    return removed


def _deduplicate(task: Preparation, work: Path, parts: int, removed: Removed) -> Rows:
    """Pieces that repeat nothing public, nothing of other sets, and no piece before them.

    Goes in hash order, so what is kept does not depend on the order documents came in.
    """
    others = [(task.public, "in public set")] if task.public else []
    others += [(other, "in other sets") for other in task.disjoint_from]
    kept = Rows(PIECE, work / _KEPT)
    kept_signatures = Rows(SIGNATURE, work / _KEPT_SIGNATURES)
    spill = Spill(work)
    pieces, signatures = sort_pieces(work, parts)
    marks = np.memmap(work / "marks", dtype=np.uint8, mode="w+", shape=max(1, len(pieces)))
    total = len(pieces) * (1 + len(others))
    with progress(f"Removing duplicates from {task.corpus.name}", total, "documents") as meter:
        for number, (other, _) in enumerate(others, 1):
            held = _checked_fingerprints(other)
            mark_those_in((pieces, signatures), held, marks, number, work)
            meter.advance(len(pieces))
        reasons = [reason for _, reason in others]
        near = task.settings.near_duplicate
        first = 0
        for batch, repeats in find_repeats(
            pieces, signatures, marks, reasons, near, task.has_units, work
        ):
            is_kept = np.ones(len(batch), dtype=bool)
            for repeat in repeats:
                place = repeat.number - first
                is_kept[place] = False
                removed.count(repeat.reason, int(batch["size"][place]))
                if repeat.reason not in removed.examples:
                    shown = [n for n in (repeat.number, repeat.same) if n is not None]
                    pair = places_of(pieces.take(shown))
                    removed.examples[repeat.reason] = list(map(spill.document, pair))
            kept.append(batch[is_kept])
            for some in cut(np.flatnonzero(is_kept)):
                kept_signatures.append(signatures.take(first + some))
            first += len(batch)
            meter.advance(len(batch))
    for used in _UNTIL_CHOSEN:
        (work / used).unlink()
    return kept


def _checked_fingerprints(prepared: Path) -> tuple[Rows, Rows]:
    card = read_card(prepared)
    for name in (EXACT_FILE, NEAR_FILE):
        check_file(prepared, card, name)
    return open_fingerprints(prepared)
