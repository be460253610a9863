"""A corpus: the documents of one set before it is prepared, and the card that names their origin.

It is an owner's own files, which are read where they lie, or a fetched set. Knows nothing of
cleaning, splits or tokens.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexolmo.bundle.manifest import NAME_PATTERN, PUBLIC
from flexolmo.data.documents import Document, find_files, is_written_by_us, read_documents
from flexolmo.data.formats import READ_AS_USUAL, ReadSettings, show
from flexolmo.errors import DataError
from flexolmo.files import canonical_json, digest_bytes, digest_file, read_json
from flexolmo.progress import progress

FORMAT = "flexolmo-corpus-1"
DOCUMENTS = "documents.jsonl.zst"
LARGE_SHARE = 0.2  # of a set: losing more of it is said aloud


@dataclass
class Losses:
    """Counts of what a set lacks, and bytes of its text, by reason."""

    documents: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def count(self, reason: str, size: int) -> None:
        """Count one text of `size` bytes."""
        self.documents[reason] += 1
        self.bytes[reason] += size

    def describe(self) -> str:
        """Counts with their reasons, in a line."""
        return ", ".join(f"{n:,} {reason}" for reason, n in self.documents.items()) or "nothing"


@dataclass
class Corpus:
    """Documents of one set, and the card that says where they come from; made by `open_corpus`."""

    card: dict[str, Any]
    files: list[tuple[Path, str]]  # with their digests
    settings: ReadSettings
    source: str | None  # of every document; None for a fetched set, whose documents name theirs
    not_read: dict[str, list[str]]  # names of the files that are passed over, by reason
    noted: Counter[str] = field(default_factory=Counter)  # in reading, filled by `read`

    @property
    def name(self) -> str:
        """The name of the set."""
        return str(self.card["name"])

    @property
    def is_private(self) -> bool:
        """True if these are an owner's own files and not public."""
        return self.source not in (None, PUBLIC)

    @property
    def num_bytes(self) -> int:
        """Size of its files."""
        return sum(file.stat().st_size for file, _ in self.files)

    def read(self) -> Iterator[Document]:
        """Every document, one at a time, with progress shown.

        Raises:
            DataError: a malformed file, or one that is not the same as when it was opened.
        """
        self.noted.clear()
        with progress(f"Reading {self.name}", self.num_bytes, "bytes") as meter:
            for file, digest in self.files:
                if digest_file(file) != digest:
                    raise DataError(
                        f"{show(file)} has changed since its digest was taken. Run this again once "
                        "it is at rest; a fetched set must be fetched again."
                    )
                for document in read_documents(file, self.source, self.settings, self.noted, meter):
                    self.noted["documents"] += 1
                    yield document

    def describe_reading(self) -> dict[str, Any]:
        """Counts of files and documents read, and of changes; the files that were not read."""
        return {"files": len(self.files), **self.noted, "not_read": self.not_read}


def open_corpus(
    path: Path,
    name: str | None = None,
    licence: str = "not stated",
    settings: ReadSettings = READ_AS_USUAL,
) -> Corpus:
    """Open a fetched set, or with `name` an owner's own files.

    Args:
        path: a file, or a directory with its subdirectories; only its last name goes in the card.
        name: what to call the set of one's own files.
        licence: under which the text may be used, SPDX or plain words.
    Raises:
        DataError: nothing readable there, a bad name, or a name missing or given needlessly.
    """
    path = Path(path)
    if is_written_by_us(path):
        if name is not None:
            raise DataError(
                f"{show(path)} was made by `flexolmo data` and has a name: omit --name."
            )
        if settings.unit_field is not None:
            raise DataError(
                f"{show(path)} was made by `flexolmo data` and says of no text whom it is about: "
                "omit --unit-field."
            )
        card = _read_card(path)
        files = [(path / file, found["digest"]) for file, found in card["files"].items()]
        return Corpus(card, files, READ_AS_USUAL, None, {})
    if name is None:
        raise DataError(f"{show(path)} needs a name, for example --name hospital.")
    if not re.fullmatch(NAME_PATTERN, name):
        raise DataError(f"{name!r} cannot name a set: use lower-case letters, digits, - and _.")
    found, not_read = find_files(path)
    digests = _digest(path, found)
    card = {
        "format": FORMAT,
        "name": name,
        "settings": {k: v for k, v in asdict(settings).items() if k != "unit_field" or v},
        "sources": [
            {
                "source": name,
                "client": "local",
                "package": show(path.resolve().name),
                "version": None,
                "licence": show(licence),
                "digest": digest_bytes(canonical_json(digests)),
            }
        ],
    }
    files = [(file, digest) for file, (_, digest) in zip(found, digests, strict=True)]
    return Corpus(card, files, settings, name, not_read)


def read_losses(card: Mapping[str, Any]) -> Losses:
    """Everything that the download of a fetched set left out; no losses for own files."""
    losses = Losses()
    for source in card["sources"]:
        losses.documents.update(source.get("left_out", {}))
        losses.bytes.update(source.get("left_out_bytes", {}))
    return losses


def warn_of_losses(card: Mapping[str, Any]) -> Iterator[str]:
    """A sentence if the download of a fetched set left out over a fifth of the text it found."""
    losses = read_losses(card)
    gone = losses.bytes.total()
    found = gone + sum(source.get("bytes", 0) for source in card["sources"])
    if gone > LARGE_SHARE * found:
        yield (
            f"{gone:,} of {found:,} bytes of text were left out of the download: "
            f"{losses.describe()}."
        )


def digest_files(path: Path) -> list[list[str]]:
    """Name and digest of every file that `open_corpus` would read."""
    return _digest(path, find_files(path)[0])


def _digest(path: Path, files: list[Path]) -> list[list[str]]:
    try:
        return [
            [show(file.relative_to(path) if path.is_dir() else file.name), digest_file(file)]
            for file in files
        ]
    except OSError as e:
        raise DataError(
            f"{show(os.fsdecode(e.filename))}: cannot be read ({e.strerror})."
        ) from None


def _read_card(path: Path) -> dict[str, Any]:
    """The corpus card of a fetched set.

    Raises:
        DataError: damaged, or of something else.
    """
    card = read_json(path / "card.json", DataError)
    if card.get("format") != FORMAT:
        raise DataError(
            f"{show(path)} is of format {card.get('format')!r}; expected a set made by "
            "`flexolmo data fetch`, or a directory of your own files."
        )
    missing = [key for key in ("name", "sources", "documents", "files") if key not in card]
    if missing:
        raise DataError(f"{show(path)}/card.json lacks {', '.join(missing)}: fetch the set again.")
    if not re.fullmatch(NAME_PATTERN, str(card["name"])):
        raise DataError(
            f"{show(path)}/card.json names its set {card['name']!r}; expected lower-case letters, "
            "digits, - and _ alone."
        )
    return card
