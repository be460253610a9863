"""Files of other people: how their bytes become records.

Reads JSON, JSON lines, Parquet and plain text as a stream, all but Parquet also within .gz or .zst.
Any bytes give records or a DataError that names the file and the place, in linear time and in
memory for one record. Knows nothing of documents.
"""

import codecs
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import charset_normalizer
import pyarrow
import pyarrow.parquet
import zstandard

from flexolmo.errors import DataError
from flexolmo.progress import Meter

JSON_LINES = (".jsonl", ".ndjson")
PLAIN = (".txt", ".md")
KINDS = "expected .jsonl, .ndjson, .json, .txt, .md (also with .gz or .zst) or .parquet"
_PARQUET_ROWS_AT_ONCE = 16  # a row may be as large as `max_record_bytes`
_CHARACTERS_AT_ONCE = 1 << 16
_ZSTD_BYTES_AT_ONCE = 1024  # each may stand for 32 KiB of text
_BOMB_BYTES = 1 << 30  # text of this size that is
_BOMB_RATIO = 1000  # this many times as large as its file is not text
_RECORD_BYTES = 64  # that a record takes at least, besides its text
_PARQUET_BOMB_BYTES = 1 << 28  # the same for a row group, of which a column may be one page
_PARQUET_BOMB_RATIO = 200
_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_CONTROLS = bytes([*range(9), *range(14, 32), 127])


def show(name: Any) -> str:
    """`name` of a file or field in Unicode, escaped where it is not."""
    return str(name).encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class ReadSettings:
    """Choices in reading files."""

    text_field: str = "text"  # field or column that holds the text; a plain file is all text
    encoding: str | None = None  # of what is not Unicode; None refuses it
    zstd_window: int = 27  # largest window of a .zst file, as a power of 2 (bytes); at most 31
    max_record_bytes: int = 1 << 25  # of one line, row, element or plain file
    unit_field: str | None = None  # field or column that says whom or what a text is about

    def __post_init__(self) -> None:
        for field in (self.text_field, self.unit_field or ""):
            if show(field) != field:
                raise DataError(f"{field!r} cannot name a field: it is not Unicode.")
        if not 10 <= self.zstd_window <= 31:
            raise DataError(f"A Zstandard window of {self.zstd_window}: expected 10 to 31.")
        try:
            "".encode(self.encoding or "utf-8")
        except (LookupError, UnicodeError):
            raise DataError(
                f"{self.encoding!r} is no text encoding; expected a name like cp1252 or gb18030."
            ) from None


READ_AS_USUAL = ReadSettings()


def kind_of(file: Path) -> str:
    """Suffix that says how to read `file`, without compression; empty for a kind we do not read."""
    suffix = file.suffix.lower()
    if suffix in (".gz", ".zst"):
        suffix = Path(file.stem).suffix.lower()
        return suffix if suffix in (*JSON_LINES, ".json", *PLAIN) else ""
    return suffix if suffix in (*JSON_LINES, ".json", *PLAIN, ".parquet") else ""


def read_records(
    file: Path, settings: ReadSettings, noted: Counter[str], meter: Meter | None
) -> Iterator[tuple[str, Any]]:
    """Every record of one file, with its place: a JSON value, a row, or all text of a plain file.

    Args:
        noted: counts what was decoded from other than UTF-8.
        meter: advanced by the bytes read.
    Raises:
        DataError: whatever is wrong with the file, with the place.
    """
    where = show(file)
    kind = kind_of(file)
    text_bytes = 0
    try:
        with _MeteredFile(file, meter) as raw:
            most_bytes = max(_BOMB_BYTES, _BOMB_RATIO * os.fstat(raw.fileno()).st_size)
            if kind == ".parquet":
                records = _read_parquet(raw, where, settings)
            elif kind in PLAIN:
                content = _decompress(raw, file, settings).read(settings.max_record_bytes + 1)
                _check_size(len(content), where, settings)
                whole = _decode(content, where, settings, noted)
                records = iter([(where, {settings.text_field: whole, "id": show(file.name)})])
            else:
                read = _read_json_lines if kind in JSON_LINES else _read_json
                records = read(_decompress(raw, file, settings), where, settings, noted)
            for where, record in records:
                text = record.get(settings.text_field) if isinstance(record, dict) else None
                if isinstance(text, str):
                    text_bytes += _RECORD_BYTES + len(text)
                    _check_text(text, text_bytes, most_bytes, where)
                yield where, record
                where = f"{where}, and after it"
    except EOFError:
        raise DataError(f"{where}: the file is cut off; copy it again.") from None
    except MemoryError:
        raise DataError(
            f"{where}: needs more memory than there is. If the file is sound, cut it into "
            "smaller ones."
        ) from None
    except UnicodeError as e:
        raise DataError(f"{where}: not UTF-8 or UTF-16 text ({e}).") from None
    except (pyarrow.ArrowException, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as e:
        raise DataError(f"{where}: the file is damaged ({show(e)}); copy it again.") from None
    except OSError as e:
        raise DataError(f"{where}: cannot be read ({e.strerror or show(e)}).") from None


def _check_text(text: str, text_bytes: int, most_bytes: int, where: str) -> None:
    """Refuse the text of a decompression bomb, and UTF-16 that something read as UTF-8."""
    if text_bytes > most_bytes:
        raise DataError(
            f"{where}: the file holds over {_BOMB_RATIO} times its size, which no text does: a "
            "decompression bomb. Leave it out."
        )
    wide = _find_wide(text.encode("utf-8", "replace"))
    if wide:
        raise DataError(
            f"{where}: {wide} text that was read as another encoding; write the file again from "
            "the source."
        )


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return value


_JSON = json.JSONDecoder(object_pairs_hook=_build_object)


def _find_wide(data: bytes) -> str:
    """UTF-16 or UTF-32, with its byte order, if `data` is such text without a mark that says so.

    Three of four of its high bytes are then below 32: U+0000 to U+1FFF, which has all alphabets.
    """
    if len(data) < 16 or _count_controls(data) <= len(data) // 100:
        return ""
    for encoding, high in (
        ("utf_32_le", data[3::4]),
        ("utf_32_be", data[0::4]),
        ("utf_16_le", data[1::2]),
        ("utf_16_be", data[0::2]),
    ):
        if 4 * len(high.translate(None, bytes(range(32)))) <= len(high):
            try:
                data.decode(encoding)
            except UnicodeDecodeError:
                continue
            return encoding
    return ""


def _count_controls(data: bytes) -> int:
    return len(data) - len(data.translate(None, _CONTROLS))


def _decode(data: bytes, where: str, settings: ReadSettings, noted: Counter[str]) -> str:
    """`data` as text: UTF-8, UTF-16 or UTF-32, else `settings.encoding`; counted if not UTF-8.

    Raises:
        DataError: another encoding, or no text; names the one it looks like.
    """
    marked = json.detect_encoding(data) if data.startswith(_WIDE_MARKS) else "utf-8-sig"
    encoding: str | None = None
    reason = "not UTF-8 text"
    try:
        text = data.decode(marked)
        encoding = marked if marked != "utf-8-sig" else _find_wide(data) or marked
        if encoding == "utf-8-sig":
            is_escaped = "\x1b" in text and _guess_encoding(data).startswith(("iso2022", "hz"))
            if not is_escaped and _count_controls(data) <= len(data) // 2:
                return text
            reason = "not plain text"
            encoding = settings.encoding
    except UnicodeError as e:
        reason = f"not UTF-8 text ({e})"
        encoding = _find_wide(data) or settings.encoding
    if encoding is None:
        raise DataError(
            f"{where}: {reason}; it looks like {_guess_encoding(data)}. If you know its encoding, "
            "name it, for example --encoding cp1252; if it is no text, leave the file out."
        )
    try:
        text = data.decode(encoding)
    except UnicodeError as e:
        raise DataError(f"{where}: {reason}, and not {encoding} ({e}).") from None
    noted[f"texts decoded from {encoding}"] += 1
    return text


def _guess_encoding(data: bytes) -> str:
    if len(data) < 64:
        return "anything, being so short"
    match = charset_normalizer.from_bytes(data[: 1 << 15]).best()
    return "nothing we know" if match is None else match.encoding


def _check_size(size: int, where: str, settings: ReadSettings) -> None:
    if size > settings.max_record_bytes:
        raise DataError(
            f"{where}: over {settings.max_record_bytes:,} bytes in one record; one document each "
            "was expected. Cut it into documents, or raise --max-record-bytes."
        )


class _MeteredFile(io.FileIO):
    """A file that tells `meter` how many of its bytes were read."""

    def __init__(self, file: Path, meter: Meter | None):
        super().__init__(file)
        self._meter = meter

    def readinto(self, buffer: Any) -> int | None:
        size = super().readinto(buffer)
        if self._meter is not None and size:
            self._meter.advance(size)
        return size


class _ZstandardReader(io.RawIOBase):
    """Decompressed bytes of a .zst file: all its frames, and an error if the last is cut off.

    The library's own reader is silent at a missing end.
    """

    def __init__(self, file: BinaryIO, largest_window: int, where: str):
        self._file = file
        self._where = where
        self._largest_window = largest_window
        self._frame: Any = None
        self._ready = memoryview(b"")
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._pending or self._file.read(_ZSTD_BYTES_AT_ONCE)
            self._pending = b""
            if not compressed:
                if self._frame is not None:
                    raise EOFError
                return 0
            if self._frame is None:
                if len(compressed) < 18:  # the longest header
                    compressed += self._file.read(_ZSTD_BYTES_AT_ONCE)
                self._check_window(compressed)
                self._frame = zstandard.ZstdDecompressor(
                    max_window_size=1 << self._largest_window
                ).decompressobj()
            self._ready = memoryview(self._frame.decompress(compressed))
            if self._frame.eof:
                self._pending, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _check_window(self, start: bytes) -> None:
        """Refuse a frame with a longer window than allowed, naming the option for it."""
        try:
            window = zstandard.get_frame_parameters(start).window_size
        except zstandard.ZstdError:
            return  # the decompressor says why
        needed = (window - 1).bit_length()
        if needed > self._largest_window:
            raise DataError(
                f"{self._where}: Zstandard with a long window: reading takes {window:,} bytes of "
                f"memory; up to 2^{self._largest_window} is allowed. Give --zstd-window {needed}."
            )


def _decompress(raw: _MeteredFile, file: Path, settings: ReadSettings) -> BinaryIO:
    buffered = io.BufferedReader(raw)
    if file.suffix.lower() == ".gz":
        return gzip.GzipFile(fileobj=buffered)  # type: ignore[return-value]
    if file.suffix.lower() == ".zst":
        return io.BufferedReader(_ZstandardReader(buffered, settings.zstd_window, show(file)))
    return buffered


def _open_text(binary: BinaryIO, noted: Counter[str]) -> io.TextIOWrapper:
    """`binary` as text: UTF-16 or UTF-32 by its first bytes (counted), else UTF-8 in which other
    bytes are kept, for `_to_unicode` to decode."""
    encoding = json.detect_encoding(binary.peek(4)[:4])  # type: ignore[attr-defined]
    if encoding.startswith("utf-8"):
        return io.TextIOWrapper(
            binary, encoding="utf-8-sig", errors="surrogateescape", newline="\n"
        )
    noted[f"files decoded from {encoding}"] += 1
    return io.TextIOWrapper(binary, encoding=encoding, newline="\n")


def _parse(text: str, where: str, settings: ReadSettings, noted: Counter[str]) -> Any:
    """The one JSON value in `text`, whose bytes are decoded first where they are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = _decode(text.encode("utf-8", "surrogateescape"), where, settings, noted)
    try:
        return _JSON.decode(text)
    except (ValueError, RecursionError) as e:
        raise _not_json(where, e) from None


def _not_json(where: str, e: Exception) -> DataError:
    reason = "nested too deeply" if isinstance(e, RecursionError) else getattr(e, "msg", e)
    return DataError(f"{where}: not JSON ({reason}); one JSON object a document was expected.")


def _read_json_lines(
    binary: BinaryIO, where: str, settings: ReadSettings, noted: Counter[str]
) -> Iterator[tuple[str, Any]]:
    number = 0
    with _open_text(binary, noted) as text:
        while line := text.readline(settings.max_record_bytes + 1):
            number += 1
            place = f"{where}, line {number}"
            _check_size(len(line), place, settings)
            if not line.isspace():
                yield place, _parse(line, place, settings, noted)


def _read_json(
    binary: BinaryIO, where: str, settings: ReadSettings, noted: Counter[str]
) -> Iterator[tuple[str, Any]]:
    """Elements of a JSON array, or values one after another, each parsed once it is complete."""
    number = 0
    with _open_text(binary, noted) as text:
        pieces = _JsonPieces(text)
        is_array = pieces.peek() == "["
        if is_array:
            pieces.skip()
        while pieces.peek() not in ("", "]"):
            number += 1
            place = f"{where}, record {number}"
            yield place, _parse(pieces.take(place, settings), place, settings, noted)
        if is_array and not pieces.peek():
            raise EOFError
        if pieces.peek():
            pieces.skip()
            if not is_array or pieces.peek():
                raise DataError(f"{where}: text after the end of the JSON, {number} records on.")


class _JsonPieces:
    """JSON text read piece by piece, so that a file may be larger than memory."""

    def __init__(self, text: io.TextIOWrapper):
        self._text = text
        self._held = ""
        self._at = 0

    def peek(self) -> str:
        """The next character that is no space and no comma; empty at the end."""
        while True:
            while self._at < len(self._held) and self._held[self._at] in " \t\r\n,":
                self._at += 1
            if self._at < len(self._held):
                return self._held[self._at]
            self._held, self._at = self._text.read(_CHARACTERS_AT_ONCE), 0
            if not self._held:
                return ""

    def skip(self) -> None:
        """Go past the character that `peek` returned."""
        self._at += 1

    def take(self, place: str, settings: ReadSettings) -> str:
        """Text of the next value, and go past it."""
        while True:
            size = len(self._held) - self._at
            try:
                end = _JSON.raw_decode(self._held, self._at)[1]
            except RecursionError as e:
                raise _not_json(place, e) from None
            except ValueError as e:  # perhaps only incomplete; doubling keeps the time linear
                more = ""
                if size <= settings.max_record_bytes:
                    more = self._text.read(max(size, _CHARACTERS_AT_ONCE))
                if not more:
                    raise _not_json(place, e) from None
                self._held, self._at = self._held[self._at :] + more, 0
                continue
            _check_size(end - self._at, place, settings)
            value, self._at = self._held[self._at : end], end
            return value


def _read_parquet(
    raw: io.RawIOBase, where: str, settings: ReadSettings
) -> Iterator[tuple[str, dict[str, Any]]]:
    file_bytes = os.fstat(raw.fileno()).st_size
    with pyarrow.parquet.ParquetFile(
        io.BufferedReader(raw), pre_buffer=False, buffer_size=1 << 20
    ) as table:
        names = table.schema_arrow.names
        if settings.text_field not in names:
            yield where, dict.fromkeys(names)  # is refused, with its columns
        fields = (settings.text_field, settings.unit_field or "id", "id", "source")
        wanted = [n for n in dict.fromkeys(fields) if n in names]
        for name in wanted:
            if names.count(name) > 1:
                raise DataError(
                    f"{where}: {names.count(name)} columns are called {name!r}; one was expected. "
                    "Rename the others."
                )
        for group in range(table.num_row_groups):
            # A column's own metadata, if damaged, makes pyarrow end the process; this does not.
            whole = table.metadata.row_group(group).total_byte_size
            if whole > max(_PARQUET_BOMB_BYTES, _PARQUET_BOMB_RATIO * file_bytes):
                raise DataError(
                    f"{where}: {file_bytes:,} bytes that stand for {whole:,} in row group "
                    f"{group + 1}, as no text does: a decompression bomb. Leave the file out."
                )
        row = 0
        for batch in table.iter_batches(_PARQUET_ROWS_AT_ONCE, columns=wanted, use_threads=False):
            for i in range(batch.num_rows):
                row += 1
                place = f"{where}, row {row}"
                try:
                    record = {name: batch.column(name)[i].as_py() for name in wanted}
                except UnicodeDecodeError as e:
                    raise DataError(f"{place}: text that is not UTF-8 ({e.reason}).") from None
                _check_size(len(str(record[settings.text_field])), place, settings)
                yield place, record
