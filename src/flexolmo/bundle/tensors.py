"""A safetensors file of weights, read once from bytes that may be hostile.

Every byte must belong to exactly one tensor, and no text may ride along. Knows nothing of the rest
of a manifest, nor which tensors an expert should have.
"""

import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
from pydantic import Field, StringConstraints

from flexolmo.bundle.strict import Claim, parse_json, raise_listed
from flexolmo.errors import BundleError

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 37_000  # a manifest of 4 MiB has room for no more
# Bits of the exponent: a float is infinite or NaN exactly when all of them are set. Whole numbers
# (I8, I64) have none.
_EXPONENT_BITS: dict[str, tuple[np.dtype[Any], int]] = {
    "BF16": (np.dtype("<u2"), 0x7F80),
    "F16": (np.dtype("<u2"), 0x7C00),
    "F32": (np.dtype("<u4"), 0x7F80_0000),
    "F64": (np.dtype("<u8"), 0x7FF0_0000_0000_0000),
    "I8": (np.dtype("<u1"), 0),
    "I64": (np.dtype("<u8"), 0),
}
_TENSOR_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}$"
_PIECE_BYTES = 1 << 20  # a multiple of every dtype's size
_WORTH_A_THREAD = 256 << 10  # bytes from which handing over a piece costs less than it saves
_OPENING = "The weights are not a safetensors file that a bundle may hold:"
_ADVICE = "Write them with safetensors, float, int8 or int64 tensors only, without metadata."

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Positive = Annotated[int, Field(ge=1, lt=2**53)]
TensorName = Annotated[str, StringConstraints(pattern=_TENSOR_NAME)]


class TensorEntry(Claim):
    """One tensor: dtype as safetensors writes it, shape, digest of its data bytes."""

    dtype: Literal["BF16", "F16", "F32", "F64", "I8", "I64"]
    shape: tuple[Positive, ...]
    digest: Digest

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return prod(self.shape) * _EXPONENT_BITS[self.dtype][0].itemsize


@dataclass(frozen=True)
class Weights:
    """All that was found in a safetensors file in one reading."""

    digest: str  # of the whole file
    tensors: dict[str, TensorEntry]  # in the order of the header
    largest: dict[str, float]  # absolute value of each tensor of floats; inf: not all are finite

    @property
    def nonfinite(self) -> list[str]:
        """Names of the tensors that hold an infinity or NaN, in the order of the header."""
        return [name for name, value in self.largest.items() if value == float("inf")]


@dataclass(frozen=True)
class Span:
    """One tensor's place: bytes `begin` to `end` of the whole file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


# Sees a tensor's name and place, where in the tensor a piece begins, and the piece, whose memory is
# used again afterwards. Nothing of it may be relied on before the whole file has been checked.
Watch = Callable[[str, Span, int, memoryview], None]


def _read_span(name: str, entry: Any, data_begin: int, size: int) -> Span | str:
    """The place of one tensor, or a line that says what is wrong with it."""
    if not re.fullmatch(_TENSOR_NAME, name):
        return f"{name[:200]!a}: a tensor's name has 1 to 200 of A-Z a-z 0-9 _ . -"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return f"{name}: expected exactly dtype, shape and data_offsets"
    dtype = entry["dtype"]
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _EXPONENT_BITS:
        return f"{name}: found dtype {ascii(dtype)[:40]}, expected one of {sorted(_EXPONENT_BITS)}"
    if not isinstance(shape, list) or not all(type(n) is int and 1 <= n < 2**53 for n in shape):
        return f"{name}: found shape {ascii(shape)[:80]}, expected whole numbers of at least 1"
    if len(shape) > 8:
        return f"{name}: found {len(shape)} dimensions, expected at most 8"
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(n) is int for n in offsets)
        or not 0 <= offsets[0] <= offsets[1] <= size - data_begin
    ):
        return (
            f"{name}: found data_offsets {ascii(offsets)[:80]}, "
            f"expected [begin, end] within the {size - data_begin} bytes of data"
        )
    begin, end = offsets
    expected = prod(shape) * _EXPONENT_BITS[dtype][0].itemsize
    if end - begin != expected:
        return f"{name}: found {end - begin} bytes, expected {expected} for {dtype} {shape}"
    return Span(dtype, tuple(shape), data_begin + begin, data_begin + end)


def _refuse(line: str) -> BundleError:
    return BundleError(f"{_OPENING}\n  - {line}\n{_ADVICE}")


def _read_table(raw: bytes, size: int) -> dict[str, Span]:
    """The checked header `raw` of a file of `size` bytes: every byte is accounted for."""
    if raw.count(b'"data_offsets"') > MAX_TENSORS:  # before any of them becomes an object
        raise _refuse(f"the header names more than {MAX_TENSORS} tensors")
    try:
        table = parse_json(raw)
    except ValueError as e:
        raise _refuse(f"the header is not JSON of the expected kind: {e}") from None
    if not isinstance(table, dict):
        raise _refuse(f"the header holds {type(table).__name__}, not an object")
    if len(table) > MAX_TENSORS + 1:
        raise _refuse(f"the header names {len(table)} tensors, expected at most {MAX_TENSORS}")
    # One spelling only, so that nothing can be written between the words.
    try:
        compact = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    except ValueError:
        raise _refuse("the header holds text that is not Unicode") from None
    if raw != compact + b" " * (-len(compact) % 8):
        raise _refuse("the header has other spacing or escapes than the safetensors library writes")
    data_begin = 8 + len(raw)
    lines = []
    metadata = table.pop("__metadata__", {})
    if metadata != {}:
        keys = sorted(metadata) if isinstance(metadata, dict) else metadata
        lines.append(f"__metadata__: found {ascii(keys)[:200]}, expected none (text could leave)")
    spans: dict[str, Span] = {}
    for name, entry in table.items():
        span = _read_span(name, entry, data_begin, size)
        if isinstance(span, str):
            lines.append(span)
        else:
            spans[name] = span
    raise_listed(BundleError, _OPENING, lines, _ADVICE)
    if not spans:
        raise _refuse("found no tensor, expected at least one")
    end = data_begin
    for name, span in sorted(spans.items(), key=lambda item: item[1].begin):
        if span.begin != end:
            kind = "overlaps the tensor before it" if span.begin < end else "leaves a gap before it"
            lines.append(f"{name}: starts at byte {span.begin}, expected {end}: {kind}")
        end = span.end
    if end != size:
        lines.append(f"{size - end} bytes after the last tensor, expected none")
    raise_listed(BundleError, _OPENING, lines, _ADVICE)
    return spans


def _fill(file: io.FileIO | io.BytesIO, view: memoryview) -> None:
    """Fill `view` from `file`; BundleError if it ends before."""
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise BundleError("The weights file became shorter while it was read.")
        done += count


def largest_bits(piece: memoryview, dtype: str) -> int:
    """Bits of the largest absolute value in `piece`, in whose order magnitudes are; 0 of whole
    numbers."""
    kind, exponent = _EXPONENT_BITS.get(dtype, (None, 0))
    if kind is None or not exponent:
        return 0
    no_sign = (1 << (8 * kind.itemsize - 1)) - 1
    bits = np.frombuffer(piece, kind)
    # The sign is the highest bit. Read as numbers without sign, those below zero are the largest;
    # with sign, those above. So no copy without signs is made, which would take four times as long.
    largest = [int(x.max()) for x in (bits, bits.view(f"<i{kind.itemsize}"))]
    return max(x & no_sign for x in largest)


def value_of(bits: int, dtype: str) -> float:
    """The number of these bits without a sign; infinity for a NaN too."""
    kind, exponent = _EXPONENT_BITS.get(dtype, (np.dtype("<u8"), 0))
    if not exponent:
        return 0.0
    if bits & exponent == exponent:
        return float("inf")
    if dtype == "BF16":
        return float(np.array(bits << 16, "<u4").view("<f4"))
    return float(np.array(bits, kind).view(f"<f{kind.itemsize}"))


class _Digest:
    """SHA-256 of pieces, on another core while the caller looks at them.

    A piece may be overwritten once the next one has been added, or `hexdigest` asked for.
    """

    def __init__(self, pool: ThreadPoolExecutor):
        self._pool = pool
        self._hash = hashlib.sha256()
        self._pending: Future[None] | None = None

    def update(self, piece: memoryview) -> None:
        self._wait()
        if len(piece) < _WORTH_A_THREAD:
            self._hash.update(piece)
        else:
            self._pending = self._pool.submit(self._hash.update, piece)

    def hexdigest(self) -> str:
        self._wait()
        return self._hash.hexdigest()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None


def _read_header(size: int, read: Callable[[memoryview], memoryview]) -> dict[str, Span]:
    """The tensors of a file of `size` bytes, by name, from the header that `read` gives."""
    if size < 8:
        raise _refuse(f"found {size} bytes, expected at least the 8 of the header's length")
    header_bytes = int.from_bytes(read(memoryview(bytearray(8))), "little")
    if header_bytes > min(MAX_HEADER_BYTES, size - 8):
        raise _refuse(
            f"found a header length of {header_bytes} bytes, expected at most "
            f"{min(MAX_HEADER_BYTES, size - 8)}"
        )
    return _read_table(bytes(read(memoryview(bytearray(header_bytes)))), size)


def _in_pieces(num_bytes: int) -> Iterator[tuple[int, int]]:
    """Begin and length of each piece of a tensor."""
    for at in range(0, num_bytes, _PIECE_BYTES):
        yield at, min(_PIECE_BYTES, num_bytes - at)


def read_weights(
    file: io.FileIO | io.BytesIO,
    size: int,
    watch: Watch | None = None,
    copy: BinaryIO | None = None,
) -> Weights:
    """Read a safetensors file of `size` bytes once, in pieces, from where `file` stands.

    Digests and largest values are those of the very bytes that `watch` sees: a file that is changed
    meanwhile cannot make them differ; and so are those written to `copy`. Memory: 2 MiB and the
    header.

    Raises:
        BundleError: the header is malformed, or any byte belongs to no tensor or to two.
    """
    with ThreadPoolExecutor(1) as pool:
        whole = _Digest(pool)

        def read(view: memoryview) -> memoryview:
            _fill(file, view)
            whole.update(view)
            if copy is not None:
                copy.write(view)
            return view

        spans = _read_header(size, read)
        buffers = itertools.cycle([memoryview(bytearray(_PIECE_BYTES)) for _ in range(2)])
        digests: dict[str, str] = {}
        largest: dict[str, float] = {}
        for name, span in sorted(spans.items(), key=lambda item: item[1].begin):
            own = hashlib.sha256()
            bits = 0
            for at, count in _in_pieces(span.end - span.begin):
                view = read(next(buffers)[:count])
                own.update(view)
                bits = max(bits, largest_bits(view, span.dtype))
                if watch is not None:
                    watch(name, span, at, view)
            digests[name] = "sha256:" + own.hexdigest()
            largest[name] = value_of(bits, span.dtype)
        digest = "sha256:" + whole.hexdigest()
    return Weights(
        digest=digest,
        tensors={
            name: TensorEntry(
                dtype=span.dtype,  # type: ignore[arg-type]  # one of the keys of _EXPONENT_BITS
                shape=span.shape,
                digest=digests[name],
            )
            for name, span in spans.items()
        },
        largest={name: largest[name] for name in spans},
    )


def watch_weights(file: io.FileIO, size: int, watch: Watch) -> None:
    """Let `watch` see the tensors of a file that was checked before: `read_weights` without
    digests."""

    def read(view: memoryview) -> memoryview:
        _fill(file, view)
        return view

    piece = memoryview(bytearray(_PIECE_BYTES))
    spans = _read_header(size, read)
    for name, span in sorted(spans.items(), key=lambda item: item[1].begin):
        for at, count in _in_pieces(span.end - span.begin):
            watch(name, span, at, read(piece[:count]))


def compare_tensors(
    found: Mapping[str, TensorEntry], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """One line for each tensor that is missing, extra or of another shape; empty if none is."""
    lines = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    lines += [f"extra: {name}" for name in sorted(found.keys() - expected.keys())]
    lines += [
        f"shape of {name}: found {list(found[name].shape)}, expected {list(expected[name])}"
        for name in sorted(found.keys() & expected.keys())
        if tuple(found[name].shape) != tuple(expected[name])
    ]
    return lines
