"""Documents, where they are found on a disk, and the one file format we write them to.

Read as a stream, so a corpus may be larger than memory. Knows nothing of cleaning, splits or
tokens; `formats` knows how bytes become records.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from flexolmo.data.formats import KINDS, READ_AS_USUAL, ReadSettings, kind_of, read_records, show
from flexolmo.errors import DataError
from flexolmo.files import write_aside
from flexolmo.progress import Meter


@dataclass(frozen=True)
class Document:
    """One natural unit of text: an article, a chapter, a module, a mail."""

    text: str
    source: str  # name of the source it came from, for the corpus card
    id: str | None = None  # its name there, where it has one
    unit: str | None = None  # whom or what it is about, where a field was named that says so


def find_files(path: Path) -> tuple[list[Path], dict[str, list[str]]]:
    """Files of a kind we read at `path` (one file, or a directory with all below it).

    Returns:
        The files, sorted by name, and the names of all others by the reason why they are not read.
        A directory that we wrote ourselves holds its documents in .jsonl.zst files alone.
    Raises:
        DataError: nothing there, nothing of a kind we read, or a directory that may not be read.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_dir() and not (path.is_file() and kind_of(path)):
            raise DataError(f"{show(path)} is not a kind of file we read: {KINDS}.")
        files, others = ([path], {}) if path.is_file() else _walk(path)
    except OSError as e:
        raise DataError(f"{show(e.filename or path)}: cannot be read ({e.strerror}).") from None
    if not files:
        raise DataError(f"{show(path)} has no documents: {KINDS}.")
    return sorted(files), {reason: sorted(others[reason]) for reason in sorted(others)}


def _walk(path: Path) -> tuple[list[Path], dict[str, list[str]]]:
    def stop(e: OSError) -> None:
        raise e

    is_ours = is_written_by_us(path)
    files, others = [], dict[str, list[str]]()
    for directory, below, names in os.walk(path, onerror=stop):
        hidden = [name for name in below if name.startswith(".")]
        below[:] = [name for name in below if name not in hidden]
        links = [name for name in below if (Path(directory) / name).is_symlink()]  # not followed
        for name in [*names, *hidden, *links]:
            file = Path(directory) / name
            if name.startswith("."):
                reason = "hidden"
            elif not file.is_file():
                reason = "no file, or a link to none"
            elif kind_of(file) and (not is_ours or name.endswith(".jsonl.zst")):
                files.append(file)
                continue
            else:
                suffix = file.suffix.lower()
                reason = f"of kind {suffix}" if suffix else "without a suffix"
            others.setdefault(show(reason), []).append(show(file.relative_to(path)))
    return files, others


def is_written_by_us(directory: Path) -> bool:
    """True if `directory` is a fetched or prepared set, by its card."""
    try:
        with open(directory / "card.json", encoding="utf-8") as f:
            return re.match(r'\{\s*"format": "flexolmo-', f.read(100)) is not None
    except (OSError, UnicodeDecodeError):
        return False


def read_documents(
    path: Path,
    source: str | None = None,
    settings: ReadSettings = READ_AS_USUAL,
    noted: Counter[str] | None = None,
    meter: Meter | None = None,
) -> Iterator[Document]:
    """Every document at `path`, files in order of name, one at a time.

    Args:
        path: a file, or a directory searched with its subdirectories.
        source: name of the source; by default the record's own `source`, else the file's name.
        noted: counts what was changed or left out on the way, by reason.
        meter: advanced by the bytes read.
    Raises:
        DataError: names the file, the line or row, what was found and what was expected.
    """
    noted = Counter() if noted is None else noted
    for file in find_files(path)[0]:
        file_source = source or show(file.name).split(".")[0]
        for where, record in read_records(file, settings, noted, meter):
            document = _to_document(record, source, file_source, where, settings, noted)
            if document is not None:
                yield document


def write_documents(path: Path, documents: Iterable[Document]) -> int:
    """Write `documents` to `path` (.jsonl.zst), all or nothing; how many there were.

    The same documents give the same bytes.
    """
    count = 0
    with (
        write_aside(path) as aside,
        zstandard.open(
            aside, "wt", encoding="utf-8", newline="\n", cctx=zstandard.ZstdCompressor(level=10)
        ) as f,
    ):
        for document in documents:
            record = {"id": document.id, "source": document.source, "text": document.text}
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count


def _to_document(
    record: Any,
    source: str | None,
    file_source: str,
    where: str,
    settings: ReadSettings,
    noted: Counter[str],
) -> Document | None:
    """The document in `record`, or None (counted) where its text is null."""
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: found a JSON {type(record).__name__}; an object with a text field was "
            "expected."
        )
    if settings.text_field not in record:
        fields = show(", ".join(sorted(record))[:500]) or "none"
        raise DataError(
            f"{where}: no field {settings.text_field!r}; its fields are: {fields}. Name the "
            "field that holds the text with --text-field, or leave the file out."
        )
    text = record[settings.text_field]
    if text is None:
        noted["records without text"] += 1
        return None
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {settings.text_field!r} is {type(text).__name__}; a string was "
            "expected."
        )
    names = {}
    for key in ("id", "source"):
        value = record.get(key)
        if value is not None and not isinstance(value, str | int | float):
            raise DataError(
                f"{where}: field {key!r} is {type(value).__name__}; a string or a number was "
                "expected."
            )
        names[key] = None if value is None else _mend(str(value), noted)
    return Document(
        text=_mend(text, noted),
        source=source or names["source"] or file_source,
        id=names["id"],
        unit=None if settings.unit_field is None else _unit(record, settings.unit_field, where),
    )


def _unit(record: dict[str, Any], field: str, where: str) -> str:
    """The unit that a record names: a whole number, or a string without the space around it."""
    value = record.get(field)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column with gaps is read as floats
    is_named = isinstance(value, str | int) and not isinstance(value, bool)
    unit = str(value).strip() if is_named else ""
    if not unit:
        fields = show(", ".join(sorted(record))[:500])
        found = f"is {value!r}" if field in record else f"is not there, its fields are: {fields}"
        raise DataError(
            f"{where}: field {field!r} {found}; a string or a whole number was expected "
            "that says whom or what the text is about (--unit-field). Plain files have no fields."
        )
    try:
        unit.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: field {field!r} is {value!r}, which holds half of a character: whom or what "
            "the text is about would be a guess. Correct it, or leave the record out."
        ) from None
    return unit


def _mend(text: str, noted: Counter[str]) -> str:
    """`text` with a question mark (counted) for each half of a character, which JSON may hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        noted["texts with halves of characters, now question marks"] += 1
    return text.encode("utf-8", "replace").decode()
