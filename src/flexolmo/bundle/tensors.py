"""The tensor table of a safetensors file: what is in the weights, told from bytes alone.

The bytes may be hostile: each must belong to exactly one tensor, and no text may ride along. Knows
nothing of the rest of a manifest, nor which tensors an expert should have, and builds no array but
to look for infinities.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, StringConstraints

from flexolmo.bundle.strict import Claim, parse_json, raise_listed
from flexolmo.errors import BundleError

MAX_HEADER_BYTES = 16 << 20
# Bits of the exponent: a float is infinite or NaN exactly when all of them are set. Whole numbers
# (I64) have none.
_EXPONENT_BITS: dict[str, tuple[np.dtype[Any], int]] = {
    "BF16": (np.dtype("<u2"), 0x7F80),
    "F16": (np.dtype("<u2"), 0x7C00),
    "F32": (np.dtype("<u4"), 0x7F80_0000),
    "F64": (np.dtype("<u8"), 0x7FF0_0000_0000_0000),
    "I64": (np.dtype("<u8"), 0),
}
_TENSOR_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}$"
_FINITE_CHUNK = 1 << 20

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Positive = Annotated[int, Field(ge=1, lt=2**53)]
TensorName = Annotated[str, StringConstraints(pattern=_TENSOR_NAME)]


class TensorEntry(Claim):
    """One tensor: dtype as safetensors writes it, shape, digest of its data bytes."""

    dtype: Literal["BF16", "F16", "F32", "F64", "I64"]
    shape: tuple[Positive, ...]
    digest: Digest


@dataclass(frozen=True)
class _Span:
    """One tensor's place: bytes `begin` to `end` of the whole file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _read_span(name: str, entry: Any, data_begin: int, size: int) -> _Span | str:
    """The place of one tensor, or a line that says what is wrong with it."""
    if not re.fullmatch(_TENSOR_NAME, name):
        return f"{name[:200]!a}: a tensor's name has 1 to 200 of A-Z a-z 0-9 _ . -"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return f"{name}: expected exactly dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
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
    return _Span(dtype, tuple(shape), data_begin + begin, data_begin + end)


def _read_table(weights: bytes) -> dict[str, _Span]:
    """The checked header of a safetensors file: every byte of the file is accounted for."""
    opening = "The weights are not a safetensors file that a bundle may hold:"
    advice = "Write them with safetensors, float or int64 tensors only, without metadata."

    def refuse(line: str) -> BundleError:
        return BundleError(f"{opening}\n  - {line}\n{advice}")

    if len(weights) < 8:
        raise refuse(f"found {len(weights)} bytes, expected at least the 8 of the header's length")
    header_bytes = int.from_bytes(weights[:8], "little")
    data_begin = 8 + header_bytes
    if header_bytes > MAX_HEADER_BYTES or data_begin > len(weights):
        raise refuse(
            f"found a header length of {header_bytes} bytes, expected at most "
            f"{min(MAX_HEADER_BYTES, len(weights) - 8)}"
        )
    raw = weights[8:data_begin]
    try:
        table = parse_json(raw)
    except ValueError as e:
        raise refuse(f"the header is not JSON of the expected kind: {e}") from None
    if not isinstance(table, dict):
        raise refuse(f"the header holds {type(table).__name__}, not an object")
    # One spelling only, so that nothing can be written between the words.
    try:
        compact = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise refuse("the header holds text that is not Unicode") from None
    if raw != compact + b" " * (-len(compact) % 8):
        raise refuse("the header has other spacing or escapes than the safetensors library writes")
    lines = []
    metadata = table.pop("__metadata__", {})
    if metadata != {}:
        keys = sorted(metadata) if isinstance(metadata, dict) else metadata
        lines.append(f"__metadata__: found {ascii(keys)[:200]}, expected none (text could leave)")
    spans: dict[str, _Span] = {}
    for name, entry in table.items():
        span = _read_span(name, entry, data_begin, len(weights))
        if isinstance(span, str):
            lines.append(span)
        else:
            spans[name] = span
    raise_listed(BundleError, opening, lines, advice)
    if not spans:
        raise refuse("found no tensor, expected at least one")
    end = data_begin
    for name, span in sorted(spans.items(), key=lambda item: item[1].begin):
        if span.begin != end:
            kind = "overlaps the tensor before it" if span.begin < end else "leaves a gap before it"
            lines.append(f"{name}: starts at byte {span.begin}, expected {end}: {kind}")
        end = span.end
    if end != len(weights):
        lines.append(f"{len(weights) - end} bytes after the last tensor, expected none")
    raise_listed(BundleError, opening, lines, advice)
    return spans


def describe_tensors(weights: bytes) -> dict[str, TensorEntry]:
    """Every tensor of a safetensors file by name, in the file's order; no array is built.

    Raises:
        BundleError: the header is malformed, or any byte belongs to no tensor or to two.
    """
    view = memoryview(weights)
    return {
        name: TensorEntry(
            dtype=span.dtype,  # type: ignore[arg-type]  # one of the keys of _EXPONENT_BITS
            shape=span.shape,
            digest="sha256:" + hashlib.sha256(view[span.begin : span.end]).hexdigest(),
        )
        for name, span in _read_table(weights).items()
    }


def find_nonfinite(weights: bytes) -> list[str]:
    """Names of the tensors that hold an infinity or NaN, in the file's order."""
    names = []
    for name, span in _read_table(weights).items():
        dtype, mask = _EXPONENT_BITS[span.dtype]
        if not mask:
            continue
        bits = np.frombuffer(weights, dtype=dtype, count=prod(span.shape), offset=span.begin)
        for i in range(0, len(bits), _FINITE_CHUNK):  # in pieces: no second copy of the weights
            if np.any((bits[i : i + _FINITE_CHUNK] & mask) == mask):
                names.append(name)
                break
    return names


def read_integers(weights: bytes, name: str) -> np.ndarray:
    """The I64 tensor `name` of a safetensors file, as a flat array."""
    span = _read_table(weights)[name]
    return np.frombuffer(weights, dtype="<i8", count=prod(span.shape), offset=span.begin)


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
