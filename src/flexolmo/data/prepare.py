"""A fetched set of documents made ready for training: clean, distinct, split, tokenized.

An owner runs this alone: of the public set only fingerprints and the tokenizer are needed, of
other owners nothing. The same input gives the same bytes; a run killed midway leaves nothing.

Words: a *source document* is what was fetched; a *document* is a source document, or a piece of
one that was too long. All pieces of a source document lie in one split, and so do texts that
differ in case, spacing and punctuation alone. Where a field says whom or what each text is about
(a *unit*, such as a patient), all texts of a unit lie in one split and count as one source
document; of texts of the same words in several units one is kept.
"""

import hashlib
import hmac
import secrets
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import compress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from flexolmo.config import Settings
from flexolmo.data.clean import clean_text, split_text
from flexolmo.data.corpus import LARGE_SHARE, Corpus, Losses, open_corpus, warn_of_losses
from flexolmo.data.deduplicate import (
    SIGNATURE_SIZE,
    Fingerprints,
    Index,
    Seen,
    hash_words,
    load_fingerprints,
    save_fingerprints,
    sketch,
    split_words,
)
from flexolmo.data.documents import Document, write_documents
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

FORMAT = "flexolmo-prepared-set-2"
SPLITS = ("train", "validation", "heldout")
PARTS = ("tokens", "offsets", "bytes", "sources")  # the arrays of a split, see prepare_set
SALT_FILE = "salt"
SALT_BYTES = 32
_DOCUMENTS_AT_ONCE = 1024
_BYTES_AT_ONCE = 1 << 20
Item = TypeVar("Item")
_SHOWN_CHARACTERS = 60


class PrepareSettings(Settings):
    """Choices of `prepare_set`; ours, except where a table is named."""

    min_document_bytes: int = Field(
        1, ge=1, description="Least bytes of UTF-8 that a source document must have to be kept."
    )
    max_document_bytes: int = Field(
        50_000,
        ge=4,
        description="Largest piece in bytes; longer documents are cut, at blank lines first.",
    )
    near_duplicate: float | None = Field(
        None,
        ge=0.05,
        le=1,
        description="Share of word 5-grams (Jaccard) from which one of two documents of the set "
        "is dropped as nearly the same; none: filled-in forms and the like all stay.",
    )
    normalise: bool = Field(
        False,
        description="Compose characters (Unicode NFC), cut spaces at the end of lines and blank "
        "lines after two in a row.",
    )
    validation_share: float = Field(
        0.05, ge=0, lt=0.5, description="Share of source documents for choosing settings."
    )
    heldout_share: float = Field(
        0.05, ge=0, lt=0.5, description="Share of source documents that are only ever reported."
    )
    min_split_bytes: int = Field(
        60_000,
        ge=0,
        description="Bytes of validation and of held-out text, if that is below a tenth.",
    )
    vocab_size: int = Field(
        4096, description="Entries of the tokenizer that is trained when none is given."
    )


@dataclass(slots=True)
class _Piece:
    """One document on its way: where its text lies in the spill file, and what identifies it.

    Nothing of the text or its signature, so that a set may be larger than memory.
    """

    parent: bytes  # 32 bytes, the hash of the words, or of the unit, which decides the split
    parent_text: bytes  # 32 bytes, tells apart parents of the same words
    words: bytes  # 32 bytes, the hash of the words of the source document
    index: int
    source: str
    id: str
    start: int
    size: int
    exact: bytes  # 32 bytes, the hash of the text
    number: int = -1  # in the order of reading


@dataclass
class _Removed(Losses):
    """Documents that are not in the prepared set, by reason, and pairs that show why."""

    found: int = 0  # documents, before any was removed
    # By reason: the first document removed and, of the same set, the one it was taken for.
    examples: dict[str, tuple[_Piece, _Piece | None]] = field(default_factory=dict)
    replaced_characters: int = 0

    def add(self, other: "_Removed") -> None:
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
                reason: [piece.id for piece in pair if piece is not None]
                for reason, pair in self.examples.items()
            },
        }

    def lines(self, spill: BinaryIO) -> Iterator[str]:
        """Sentences for the owner: what was taken for the same, and whether much is missing."""
        for reason, (removed, kept) in self.examples.items():
            texts = [_text(spill, piece) for piece in (removed, kept) if piece is not None]
            shown = _show_difference(texts)
            was = f"{removed.id} ({shown[0]})"
            yield f"{self.documents[reason]} documents removed, {reason}. For example {was}" + (
                "." if kept is None else f" was taken for {kept.id} ({shown[1]})."
            )
        gone = self.documents.total()
        if gone > LARGE_SHARE * self.found:
            yield f"{gone} of {self.found} documents are not in the set: {self.describe()}."


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
    one) and
    `<split>.jsonl.zst` (the text), all in the same order; besides these fingerprints,
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
    out = Path(out)
    settings = settings or PrepareSettings()
    corpus = raw if isinstance(raw, Corpus) else open_corpus(raw)
    name = corpus.name
    if tokenizer is None and public is not None:
        tokenizer = load_tokenizer(public)
    recipe = digest_bytes(
        canonical_json(
            {
                "format": FORMAT,
                "settings": settings.model_dump(),
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
    salt = _salt_for(out, recipe)

    with (
        write_directory_aside(out, "train_tokens.npy", is_private=corpus.is_private) as aside,
        open_workers(workers) as run,
    ):
        spill = aside / "spill"
        spilled_signatures = aside / "spill_signatures"
        removed = _Removed()
        pieces = _clean_all(corpus, spill, spilled_signatures, settings, removed, run)
        signatures = _map_signatures(spilled_signatures, len(pieces))
        pieces = _deduplicate(
            name, pieces, signatures, public, disjoint_from, settings.near_duplicate, removed
        )
        try:
            by_unit = corpus.settings.unit_field is not None
            whole = "units (--unit-field)" if by_unit else "documents"
            splits = split_by_hash(pieces, settings, name, whole)
        except DataError as e:
            raise DataError(f"{e} Removed: {removed.describe()}.") from None
        changed = _Changed()
        with open(spill, "rb") as f:
            for line in (*warn_of_losses(corpus.card), *removed.lines(f)):
                say(f"{name}: {line}")
            if tokenizer is None:
                texts = (_text(f, piece) for piece in splits["train"])
                tokenizer = train_tokenizer(texts, settings.vocab_size)
        tokenizer.save(aside / "tokenizer.json")
        counts = {
            split: _write_split(aside, split, splits[split], tokenizer, name, changed, run)
            for split in SPLITS
        }
        changed.judge(name, sum(len(splits[split]) for split in SPLITS), say)
        kept = [piece for split in SPLITS for piece in splits[split]]
        exact = np.frombuffer(b"".join(p.exact for p in kept), dtype=np.uint8).reshape(-1, 32)
        numbers = np.array([piece.number for piece in kept])
        save_fingerprints(aside, exact, signatures, numbers)
        del signatures
        spill.unlink()
        spilled_signatures.unlink()
        card = {
            "format": FORMAT,
            "name": name,
            "recipe": recipe,
            "splits": counts,
            "removed": removed.card(),
            "settings": settings.model_dump(),
            "tokenizer": {
                "digest": tokenizer.digest,
                "vocab_size": tokenizer.vocab_size,
                "eos": tokenizer.eos,
                "eos_id": tokenizer.eos_id,
                "changed_documents": changed.documents,
            },
            "public": card_digest(read_card(public)) if public else None,
            "corpus_card": digest_bytes(canonical_json(corpus.card)),
            "reading": corpus.describe_reading(),
            **({"unit_field": corpus.settings.unit_field} if by_unit else {}),
            "licences": sorted({source["licence"] for source in corpus.card["sources"]}),
            "weak_spots": corpus.card.get("weak_spots", []),
            "sources": _sources_kept(corpus.card, splits),
            "files": {
                file.name: {"bytes": file.stat().st_size, "digest": digest_file(file)}
                for file in sorted(aside.iterdir())
            },
        }
        write_json(aside / "card.json", card)
        write_bytes(aside / SALT_FILE, salt, is_private=corpus.is_private)
    return card


def card_digest(card: dict[str, Any]) -> str:
    """`sha256:` digest that names a prepared set: its card lists the digests of all its files."""
    return digest_bytes(canonical_json(card))


def commit_card(card: dict[str, Any], salt: bytes) -> str:
    """Name of a prepared set before others: `sha256:` and the HMAC-SHA256 of its card's digest,
    with the set's salt as key. Whoever shows card and salt proves which set it was; without the
    salt nobody can try a guess at the text. Source: ours."""
    return f"sha256:{hmac.new(salt, card_digest(card).encode(), 'sha256').hexdigest()}"


def read_salt(prepared: Path) -> bytes:
    """The salt of a prepared set, drawn when it was made; DataError if there is none."""
    path = Path(prepared) / SALT_FILE
    salt = path.read_bytes() if path.is_file() else None
    if salt is None or len(salt) != SALT_BYTES:
        found = "is missing" if salt is None else f"holds {len(salt)} bytes"
        raise DataError(
            f"{path} {found}; expected {SALT_BYTES} bytes drawn at random, without which an "
            "expert's bundle would tell of its text. Prepare the set again."
        )
    return salt


class _Counts(BaseModel):
    documents: int = Field(ge=0)
    bytes: int = Field(ge=0)
    tokens: int = Field(ge=0)


class _TokenizerEntry(BaseModel):
    digest: str
    vocab_size: int = Field(ge=1)
    eos_id: int = Field(ge=0)


class _FileEntry(BaseModel):
    bytes: int = Field(ge=0)
    digest: str


class _Card(BaseModel):
    """The parts of a card that are read again."""

    name: str
    recipe: str
    splits: dict[str, _Counts]
    tokenizer: _TokenizerEntry
    files: dict[str, _FileEntry]


def read_card(prepared: Path) -> dict[str, Any]:
    """The card of a prepared set.

    Raises:
        DataError: `prepared` is not a prepared set of this format, or its card lacks something.
    """
    card = read_json(Path(prepared) / "card.json", DataError)
    found = card.get("format") if isinstance(card, dict) else None
    if found != FORMAT:
        raise DataError(
            f"{prepared} is not a prepared set of format {FORMAT} (its card says {found!r}): make "
            "one with `flexolmo data prepare`; sets of an older format are prepared again."
        )
    try:
        checked = _Card.model_validate(card, strict=True)
    except ValidationError as e:
        problem = e.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise DataError(f"{prepared}/card.json, {where}: {problem['msg']}.") from None
    missing = [name for name in _files_of_set() if name not in checked.files]
    if missing or set(checked.splits) != set(SPLITS):
        raise DataError(
            f"{prepared}/card.json has the splits {', '.join(checked.splits)} and lacks these "
            f"files: {', '.join(missing) or 'none'}. Prepare the set again."
        )
    return card


def check_file(prepared: Path, card: dict[str, Any], name: str) -> Path:
    """Path of the file `name` of a prepared set, which is what the card says.

    Raises:
        DataError: it is missing or was changed.
    """
    path = Path(prepared) / name
    try:
        found = digest_file(path)
    except OSError as e:
        raise DataError(f"{path} cannot be opened ({e}): prepare the set again.") from None
    if found != card["files"][name]["digest"]:
        raise DataError(
            f"{path} is not the file that card.json describes: its digest is {found}. Prepare the "
            "set again."
        )
    return path


def _files_of_set() -> Iterator[str]:
    """Names of the files that a prepared set is read by."""
    for split in SPLITS:
        yield f"{split}.jsonl.zst"
        yield from (f"{split}_{part}.npy" for part in PARTS)
    yield from ("fingerprints_exact.npy", "fingerprints_near.npy", "tokenizer.json")


def split_by_hash(
    pieces: Sequence[_Piece], settings: PrepareSettings, name: str, whole: str = "documents"
) -> dict[str, list[_Piece]]:
    """`pieces` of each split, whole source documents together.

    A source document's hash, read as a fraction of its range, decides: the lowest are held out,
    the highest validate. When the share gives less text than the minimum, the next in hash order
    join. So documents added later leave train documents where they are. `whole` is what source
    documents are called in errors.
    """
    by_parent: dict[bytes, list[_Piece]] = {}
    for piece in sorted(pieces, key=lambda p: (p.parent, p.parent_text, p.index)):
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
        sizes = [sum(piece.size for piece in parts) for parts in by_parent.values()]
        needed = f"at least {len(SPLITS)} {whole} are needed"
        if len(sizes) >= len(SPLITS):
            needed = (
                f"with {least_bytes:,} bytes to choose settings on and as many held out, none are "
                "left to train on"
            )
        raise DataError(
            f"{name}: found {len(sizes)} {whole} of {total_bytes:,} bytes after cleaning, the "
            f"largest of {max(sizes, default=0):,}; {needed}. Each, however long, is "
            "either trained on, or used to choose settings, or held out. Give more; or cut where "
            "a part stands by itself, such as chapters, into a file or a record each."
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


@dataclass
class _Cleaned:
    """Pieces of some documents, numbered and placed from 0, with their text one after another."""

    pieces: list[_Piece]
    text: bytes
    signatures: np.ndarray  # uint32 [n,S]
    removed: _Removed


def _clean_all(
    corpus: Corpus,
    spill: Path,
    spilled_signatures: Path,
    settings: PrepareSettings,
    removed: _Removed,
    run: Run,
) -> list[_Piece]:
    """Clean, cut and fingerprint every document of `corpus`; text and signatures are spilled."""
    pieces: list[_Piece] = []
    start = 0
    batches = _in_batches(corpus.read(), lambda document: len(document.text))
    with open(spill, "wb") as texts, open(spilled_signatures, "wb") as signatures:
        for cleaned in run(partial(_clean, settings), batches):
            for piece in cleaned.pieces:
                piece.start += start
                piece.number = len(pieces)
                pieces.append(piece)
            start += len(cleaned.text)
            texts.write(cleaned.text)
            signatures.write(cleaned.signatures.tobytes())
            removed.add(cleaned.removed)
    return pieces


def _in_batches(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Lists of some `items`, in their order, each of about as many bytes."""
    batch: list[Item] = []
    held = 0
    for item in items:
        batch.append(item)
        held += size(item)
        if held >= _BYTES_AT_ONCE or len(batch) == _DOCUMENTS_AT_ONCE:
            yield batch
            batch = []
            held = 0
    if batch:
        yield batch


def _clean(settings: PrepareSettings, documents: Sequence[Document]) -> _Cleaned:
    """Clean, cut and fingerprint some documents."""
    removed = _Removed()
    pieces: list[_Piece] = []
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
        unit, same_words = document.unit, hash_words(words)
        parent = same_words if unit is None else hashlib.sha256(unit.encode()).digest()
        parent_text = hashlib.sha256(whole).digest()
        name = document.id or parent_text.hex()[:16]
        parts = split_text(text, settings.max_document_bytes)
        removed.found += len(parts) - 1
        for index, part in enumerate(parts):
            is_whole = part == text
            encoded = whole if is_whole else part.encode()
            texts.append(encoded)
            words_of_pieces.append(words if is_whole else split_words(part))
            pieces.append(
                _Piece(
                    parent=parent,
                    parent_text=parent_text,
                    words=same_words,
                    index=index,
                    source=document.source,
                    id=name if len(parts) == 1 else f"{name}#{index + 1}",
                    start=start,
                    size=len(encoded),
                    exact=parent_text if is_whole else hashlib.sha256(encoded).digest(),
                )
            )
            start += len(encoded)
    return _Cleaned(pieces, b"".join(texts), sketch(words_of_pieces), removed)


def _map_signatures(spilled: Path, count: int) -> np.ndarray:
    """The signatures that were spilled, uint32 [count,S]."""
    shape = (count, SIGNATURE_SIZE)
    if not count:
        return np.zeros(shape, dtype=np.uint32)  # an empty file cannot be mapped
    return np.asarray(np.memmap(spilled, dtype=np.uint32, mode="r", shape=shape))


def _deduplicate(
    name: str,
    pieces: list[_Piece],
    signatures: np.ndarray,
    public: Path | None,
    disjoint_from: Sequence[Path],
    near: float | None,
    removed: _Removed,
) -> list[_Piece]:
    """Pieces that repeat nothing public, nothing of other sets, and no piece before them.

    Goes in hash order, so what is kept does not depend on the order documents came in.
    """
    others = [(public, "in public set")] if public else []
    others += [(other, "in other sets") for other in disjoint_from]
    held_by: dict[int, str] = {}  # reason, by number
    seen = Seen(signatures, near)
    first_of_words: dict[bytes, _Piece] = {}
    kept: list[_Piece] = []
    total = len(pieces) * (1 + len(others))
    with progress(f"Removing duplicates from {name}", total, "documents") as meter:
        for other, reason in others:
            index = Index(_checked_fingerprints(other))
            for some in _in_batches(pieces, lambda piece: 0):
                exact = np.frombuffer(b"".join(p.exact for p in some), dtype=np.uint8)
                rows = signatures[some[0].number : some[-1].number + 1]
                found = index.find(Fingerprints(exact.reshape(-1, 32), rows))
                for piece in compress(some, found):
                    held_by.setdefault(piece.number, reason)
                meter.advance(len(some))
        for piece in sorted(pieces, key=lambda p: (p.parent, p.parent_text, p.index)):
            meter.advance()
            same = None
            if piece.number in held_by:
                reason = held_by[piece.number]
            elif (same := seen.find_exact(piece.exact)) is not None:
                reason = "exact duplicate"
            elif (same := seen.find_near(piece.number)) is not None:
                reason = "near duplicate"
            elif (first := first_of_words.setdefault(piece.words, piece)).parent != piece.parent:
                reason, same = "same words in another unit", first.number
            else:
                seen.add(piece.exact, piece.number)
                kept.append(piece)
                continue
            removed.count(reason, piece.size)
            if reason not in removed.examples:
                removed.examples[reason] = (piece, None if same is None else pieces[same])
    return kept


def _checked_fingerprints(prepared: Path) -> Fingerprints:
    card = read_card(prepared)
    for name in ("fingerprints_exact.npy", "fingerprints_near.npy"):
        check_file(prepared, card, name)
    return load_fingerprints(prepared)


@dataclass
class _Changed:
    """Documents that a tokenizer does not give back as they were."""

    documents: int = 0
    example: str = ""

    def compare(self, piece: _Piece, text: str, back: str) -> None:
        """Count the document if `back`, its text after encoding and decoding, is another."""
        if back == text:
            return
        self.documents += 1
        shown = _show_difference([text, back])
        self.example = self.example or f"{piece.id} has {shown[0]} and is read back as {shown[1]}"

    def judge(self, name: str, found: int, say: Callable[[str], object]) -> None:
        """Say that text is changed, or refuse the tokenizer where it changes much."""
        if not self.documents:
            return
        line = (
            f"{name}: the tokenizer does not carry the text of {self.documents} of {found} "
            f"documents. For example {self.example}."
        )
        if self.documents > LARGE_SHARE * found:
            raise DataError(f"{line} Choose one that does, for example a byte-level one.")
        say(line)


def _show_difference(texts: list[str]) -> list[str]:
    """A few words of each, from shortly before they differ, or from the start if they do not."""
    pairs = enumerate(zip(*texts, strict=False))
    same = next((i for i, pair in pairs if len({*pair}) > 1), min(map(len, texts)))
    start = 0 if same == max(map(len, texts)) else max(0, same - 20)
    return [repr(text[start : start + _SHOWN_CHARACTERS]) for text in texts]


def _text(spill: BinaryIO, piece: _Piece) -> str:
    return _read(spill, piece.start, piece.size)


def _read(spill: BinaryIO, start: int, size: int) -> str:
    spill.seek(start)
    return spill.read(size).decode()


def _write_split(
    aside: Path,
    split: str,
    pieces: list[_Piece],
    tokenizer: Tokenizer,
    name: str,
    changed: _Changed,
    run: Run,
) -> dict[str, int]:
    """Write one split's shards and text into `aside`; its counts."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    lengths: list[int] = []
    with (
        open(aside / "spill", "rb") as spill,
        open(aside / f"{split}_tokens.npy", "wb") as f,
        progress(f"Tokenizing {name} {split}", len(pieces), "documents") as meter,
    ):
        _write_header(f, dtype, 0)  # the length is known at the end
        batches = list(_in_batches(pieces, lambda piece: piece.size))
        places = ([(piece.start, piece.size) for piece in some] for some in batches)
        tokenized = run(partial(_tokenize, aside, dtype.str), places)

        def write_tokens() -> Iterator[Document]:
            for some, (tokens, ends, read_back) in zip(batches, tokenized, strict=True):
                f.write(tokens)
                lengths.extend(ends)
                for number, piece in enumerate(some):
                    text = _text(spill, piece)
                    changed.compare(piece, text, read_back.get(number, text))
                    yield Document(text, piece.source, piece.id)
                meter.advance(len(some))

        write_documents(aside / f"{split}.jsonl.zst", write_tokens())
        num_tokens = sum(lengths)
        f.seek(0)
        _write_header(f, dtype, num_tokens)
    parents = [piece.parent for piece in pieces]
    numbers = {parent: number for number, parent in enumerate(dict.fromkeys(parents))}
    sizes = [piece.size for piece in pieces]
    for part, values in (
        ("offsets", [0, *np.cumsum(lengths)]),
        ("bytes", sizes),
        ("sources", [numbers[parent] for parent in parents]),
    ):
        array = np.array(values, dtype=np.int64)
        np.save(aside / f"{split}_{part}.npy", array, allow_pickle=False)
    return {
        "source_documents": len({piece.parent_text for piece in pieces}),
        "documents": len(pieces),
        "bytes": sum(sizes),
        "tokens": num_tokens,
    }


def _tokenize(
    aside: Path, dtype: str, places: Sequence[tuple[int, int]]
) -> tuple[bytes, list[int], dict[int, str]]:
    """Tokens of the texts at `places` in the spill file, each followed by the eos; their numbers;
    and by number, texts that the tokenizer reads back as others."""
    tokenizer = _load_tokenizer_once(aside)
    with open(aside / "spill", "rb") as spill:
        texts = [_read(spill, start, size) for start, size in places]
    batch = tokenizer.encode_arrays(texts)
    end = np.array([tokenizer.eos_id], dtype=dtype).tobytes()
    tokens = b"".join(ids.astype(dtype).tobytes() + end for ids in batch)
    return tokens, [len(ids) + 1 for ids in batch], tokenizer.find_changed(texts, batch)


@lru_cache(maxsize=1)
def _load_tokenizer_once(aside: Path) -> Tokenizer:
    return load_tokenizer(aside)


def _write_header(f: BinaryIO, dtype: np.dtype[Any], length: int) -> None:
    """Write the start of an .npy file of `length` numbers: as many bytes whatever the length."""
    np.lib.format.write_array_header_1_0(
        f,
        {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)},
    )


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
