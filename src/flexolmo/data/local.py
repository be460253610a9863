"""Local files to documents, and the corpus card that every fetched set has."""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from flexolmo.data.documents import Document, list_files, read_documents, write_documents
from flexolmo.errors import DataError
from flexolmo.files import (
    canonical_json,
    digest_bytes,
    digest_file,
    read_json,
    write_directory_aside,
    write_json,
)
from flexolmo.progress import progress

FORMAT = "flexolmo-corpus-1"
DOCUMENTS = "documents.jsonl.zst"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


def fetch_local(
    path: Path, name: str, out: Path, licence: str = "not stated", text_field: str = "text"
) -> dict[str, Any]:
    """Make a set of local files (.jsonl[.gz|.zst], .parquet, .txt) in `<out>/<name>/`; its card.

    Args:
        path: a file, or a directory with its subdirectories; only its last name goes in the card.
        licence: under which the text may be used, SPDX or plain words.
        text_field: field or column that holds the text.
    Raises:
        DataError: nothing readable there, a bad name, or a malformed file (named, with its line).
    """
    if not _NAME.fullmatch(name):
        raise DataError(f"{name!r} cannot name a set: use lower-case letters, digits, - and _.")
    path, target = Path(path), Path(out) / name
    files, digests = list_files(path), digest_files(path)
    request = digest_bytes(
        canonical_json(
            {"format": FORMAT, "files": digests, "licence": licence, "text_field": text_field}
        )
    )
    done = finished_card(target, request)
    if done is not None:
        return done
    card: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "request": request,
        "weak_spots": [],
        "skipped": [],
        "sources": [
            {
                "source": name,
                "client": "local",
                "package": path.resolve().name,
                "version": None,
                "licence": licence,
                "digest": digest_bytes(canonical_json(digests)),
            }
        ],
    }

    def documents() -> Iterator[Document]:
        with progress(f"Reading {name}", len(files), "files") as meter:
            for file in files:
                yield from read_documents(file, text_field, source=name)
                meter.advance(note=file.name)

    write_set(target, documents(), card, lambda: None)
    return card


def digest_files(path: Path) -> list[list[str]]:
    """Name and digest of every file that `fetch_local` would read."""
    return [
        [str(file.relative_to(path)) if path.is_dir() else file.name, digest_file(file)]
        for file in list_files(path)
    ]


def write_set(
    target: Path, documents: Iterable[Document], card: dict[str, Any], check: Callable[[], None]
) -> None:
    """Write documents and card into `target`, counting documents and bytes of each source."""
    counts: dict[str, list[int]] = {}

    def counted() -> Iterator[Document]:
        for document in documents:
            count = counts.setdefault(document.source, [0, 0])
            count[0] += 1
            count[1] += len(document.text.encode())
            yield document

    with write_directory_aside(target, DOCUMENTS) as aside:
        card["documents"] = write_documents(aside / DOCUMENTS, counted())
        check()
        for source in card["sources"]:
            source["documents"], source["bytes"] = counts.get(source["source"], [0, 0])
        card["bytes"] = sum(source["bytes"] for source in card["sources"])
        card["files"] = {
            DOCUMENTS: {
                "bytes": (aside / DOCUMENTS).stat().st_size,
                "digest": digest_file(aside / DOCUMENTS),
            }
        }
        write_json(aside / "card.json", card)


def finished_card(target: Path, request: str) -> dict[str, Any] | None:
    """The card in `target` if it answers `request` in full and its documents are unharmed."""
    if not (target / "card.json").is_file():
        return None
    card = read_json(target / "card.json", DataError)
    whole = (
        card.get("request") == request
        and not card.get("skipped")
        and (target / DOCUMENTS).is_file()
        and digest_file(target / DOCUMENTS) == card["files"][DOCUMENTS]["digest"]
    )
    return card if whole else None
