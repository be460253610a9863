"""Documents, the files they come in, and the one file format we write them to.

Reads .jsonl (plain, .gz, .zst), .parquet and .txt as a stream, so a corpus may be larger than
memory. Knows nothing of cleaning, splits or tokens.
"""

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet
import zstandard

from flexolmo.errors import DataError
from flexolmo.files import write_aside

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
_PARQUET_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Document:
    """One natural unit of text: an article, a chapter, a module, a mail."""

    text: str
    source: str  # name of the source it came from, for the corpus card
    id: str | None = None  # its name there, where it has one


def list_files(path: Path) -> list[Path]:
    """The readable files at `path` (one file, or a directory with all below it), sorted by name.

    Raises:
        DataError: nothing there, or nothing of a kind we read.
    """
    path = Path(path)
    expected = f"expected {', '.join(SUFFIXES)}"
    if path.is_file():
        if path.name.endswith(SUFFIXES):
            return [path]
        raise DataError(f"{path} is not a kind of file we read: {expected}.")
    if not path.is_dir():
        raise DataError(f"{path} does not exist: give a directory or a file of documents.")
    files = sorted(
        file
        for file in path.rglob("*")
        if file.name.endswith(SUFFIXES)
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise DataError(f"{path} has no documents: {expected}.")
    return files


def read_documents(
    path: Path, text_field: str = "text", source: str | None = None
) -> Iterator[Document]:
    """Every document at `path`, files in order of name, one at a time.

    Args:
        path: a file, or a directory searched with its subdirectories.
        text_field: field or column that holds the text; a whole .txt file is one document.
        source: name of the source; by default the record's own `source`, else the file's name.
    Raises:
        DataError: names the file, the line, what was found and what was expected.
    """
    for file in list_files(path):
        if file.name.endswith(".parquet"):
            records = _read_parquet(file, text_field)
        elif file.name.endswith(".txt"):
            records = iter([(str(file), {text_field: _read_plain(file), "id": file.name})])
        else:
            records = _read_json_lines(file)
        for where, record in records:
            yield _to_document(record, text_field, source, file, where)


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
    record: dict[str, Any], text_field: str, source: str | None, file: Path, where: str
) -> Document:
    if text_field not in record:
        fields = ", ".join(sorted(record)) or "none"
        raise DataError(
            f"{where}: no field {text_field!r}; its fields are: {fields}. Name the "
            "field that holds the text with --text-field."
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {text_field!r} is {type(text).__name__}; a string was expected."
        )
    name = record.get("id")
    return Document(
        text=text.encode("utf-8", "replace").decode(),  # JSON may hold halves of a character
        source=source or str(record.get("source") or file.name.split(".")[0]),
        id=None if name is None else str(name),
    )


class _ZstandardReader(io.RawIOBase):
    """Decompressed bytes of a .zst file: all its frames, and an error if the last is cut off.

    The library's own reader stops after the first frame, and silently at a missing end.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._frame: Any = None
        self._ready = memoryview(b"")
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._pending or self._file.read(1 << 17)
            self._pending = b""
            if not compressed:
                if self._frame is not None:
                    raise EOFError("the last Zstandard frame has no end")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(compressed))
            if self._frame.eof:
                self._pending, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_text(file: Path) -> io.TextIOBase:
    if file.name.endswith(".gz"):
        return io.TextIOWrapper(gzip.open(file), encoding="utf-8-sig", newline="\n")
    if file.name.endswith(".zst"):
        return io.TextIOWrapper(
            io.BufferedReader(_ZstandardReader(open(file, "rb"))),
            encoding="utf-8-sig",
            newline="\n",
        )
    return open(file, encoding="utf-8-sig", newline="\n")


def _read_json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    where = f"{file}, line 1"
    try:
        with _open_text(file) as lines:
            for number, line in enumerate(lines, 1):
                where = f"{file}, line {number}"
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as e:
                    raise DataError(
                        f"{where}: not JSON ({e}); one JSON object a line was expected."
                    ) from None
                if not isinstance(record, dict):
                    raise DataError(
                        f"{where}: found a JSON {type(record).__name__}; "
                        "an object with a text field was expected."
                    )
                yield where, record
                where = f"{file}, after line {number}"
    except UnicodeDecodeError as e:
        raise DataError(f"{where}: not UTF-8 text ({e.reason}).") from None
    except (OSError, EOFError, zstandard.ZstdError) as e:
        raise DataError(f"{where}: cannot be read ({e}); the file may be cut off.") from None


def _read_parquet(file: Path, text_field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise DataError(
                    f"{file}: no column {text_field!r}; its columns are: "
                    f"{', '.join(names)}. Name the column that holds the text with "
                    "--text-field."
                )
            columns = [name for name in (text_field, "id", "source") if name in names]
            row = 0
            for batch in table.iter_batches(_PARQUET_ROWS_AT_ONCE, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{file}, row {row}", record
    except (pyarrow.ArrowException, OSError) as e:
        raise DataError(f"{file}: not a readable Parquet file ({e}).") from None


def _read_plain(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(
            f"{file}: not UTF-8 text ({e.reason} at byte {e.start}); convert it "
            "first, for example with iconv."
        ) from None
    except OSError as e:
        raise DataError(f"{file}: cannot be read ({e}).") from None
