"""The tensor table of a safetensors file, fed honest and hostile bytes."""

import io
import json
import struct
import time

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.bundle import tensors as room
from flexolmo.bundle.manifest import MAX_MANIFEST_BYTES
from flexolmo.bundle.tensors import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    compare_tensors,
    read_weights,
    watch_weights,
)
from flexolmo.errors import BundleError
from flexolmo.files import digest_bytes

WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8}
FLOATS = [n for n in WIDTHS if n != "I64"]
LIBRARY_NAMES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
}


def make_weights(tensors=None):
    """A safetensors file of `name: (dtype, shape, data)`, by the library itself."""
    tensors = tensors or {"layers.0.up": ("BF16", [2, 2], bytes(8))}
    arrays = {  # named, so that they outlive the call: the library is handed raw addresses
        name: np.frombuffer(data, "u1") for name, (_, _, data) in tensors.items()
    }
    specs = {
        name: safetensors.TensorSpec(
            dtype=LIBRARY_NAMES[dtype],
            shape=shape,
            data_ptr=arrays[name].ctypes.data,
            data_len=len(data),
        )
        for name, (dtype, shape, data) in tensors.items()
    }
    return bytes(safetensors.serialize(specs))


def describe_tensors(weights):
    return read_weights(io.BytesIO(weights), len(weights)).tensors


def find_nonfinite(weights):
    return read_weights(io.BytesIO(weights), len(weights)).nonfinite


def make_raw(header, data=b"", pad=True):
    """A file with this header, well formed or not."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":"))
    raw = text if isinstance(text, bytes) else text.encode()
    raw += b" " * (-len(raw) % 8) if pad else b""
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@st.composite
def tables(draw):
    names = draw(
        st.lists(st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True), min_size=1,
                 max_size=6, unique=True)
    )  # fmt: skip
    table = {}
    for name in names:
        dtype = draw(st.sampled_from(sorted(WIDTHS)))
        shape = draw(st.lists(st.integers(1, 4), max_size=3))
        count = int(np.prod(shape, dtype=int))
        seed = draw(st.integers(0, 255))
        table[name] = (dtype, shape, bytes([seed]) * (count * WIDTHS[dtype]))
    return table


@settings(max_examples=80)
@given(table=tables())
def test_any_table_the_library_writes_is_described_as_it_is(table):
    found = describe_tensors(make_weights(table))
    assert {n: (e.dtype, list(e.shape), e.digest) for n, e in found.items()} == {
        name: (dtype, shape, digest_bytes(data)) for name, (dtype, shape, data) in table.items()
    }


@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_as_the_library_reads_it(data):
    weights = bytearray(make_weights(data.draw(tables())))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(weights), 200) - 1))
        weights[at] = data.draw(st.integers(0, 255) | st.sampled_from(b'{}[]",:0123456789 '))
    weights = weights[: data.draw(st.integers(0, len(weights)) | st.just(len(weights)))]
    try:
        found = describe_tensors(bytes(weights))
    except BundleError:
        return
    theirs = dict(safetensors.deserialize(bytes(weights)))
    assert found.keys() == theirs.keys()
    assert all(list(e.shape) == theirs[n]["shape"] for n, e in found.items())
    assert all(e.digest == digest_bytes(bytes(theirs[n]["data"])) for n, e in found.items())


@pytest.mark.parametrize(
    "weights, message",
    [
        (b"", "found 0 bytes"),
        (bytes(7), "found 7 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "header length"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + bytes(MAX_HEADER_BYTES + 1), "header length"),
        (struct.pack("<Q", 9) + b"{}      ", "header length"),
        (make_raw(b"\x80\x04K\x01."), "not JSON"),
        (make_raw(b"[" * 5000), "not JSON"),
        (make_raw([]), "holds list"),
        (make_raw({}), "no tensor"),
        (make_raw(b'{"a":1,"a":1}'), "'a' appears twice"),
        (make_raw(b'{ "a":1}'), "other spacing"),
        (make_raw(b'{"a":"\\ud800"}'), "not Unicode"),
        (make_raw({"a": entry()}, bytes(4), pad=False), "other spacing"),
        (make_raw({"__metadata__": {"secret": "text"}, "a": entry()}, bytes(4)), "__metadata__"),
        (make_raw({"__metadata__": ["x"], "a": entry()}, bytes(4)), "__metadata__"),
        (make_raw({"a b": entry()}, bytes(4)), "a tensor's name"),
        (make_raw({"a\n": entry()}, bytes(4)), "a tensor's name"),
        (make_raw({"": entry()}, bytes(4)), "a tensor's name"),
        (make_raw({"a": {**entry(), "note": "x"}}, bytes(4)), "exactly dtype, shape"),
        (make_raw({"a": 3}), "exactly dtype, shape"),
        (make_raw({"a": entry("I32")}, bytes(4)), "dtype 'I32'"),
        (make_raw({"a": entry(["F32"])}, bytes(4)), "dtype"),
        (make_raw({"a": entry(shape=[-1])}, bytes(4)), "shape"),
        (make_raw({"a": entry(shape=[0], offsets=[0, 0])}), "shape"),
        (make_raw({"a": entry(shape=[True])}, bytes(4)), "shape"),
        (make_raw({"a": entry(shape=[1.0])}, bytes(4)), "shape"),
        (make_raw({"a": entry(shape=[1] * 9)}, bytes(4)), "9 dimensions"),
        (make_raw({"a": entry(offsets=[0, 5])}, bytes(4)), "data_offsets"),
        (make_raw({"a": entry(offsets=[-4, 0])}, bytes(4)), "data_offsets"),
        (make_raw({"a": entry(offsets=[4, 0])}, bytes(4)), "data_offsets"),
        (make_raw({"a": entry(offsets=[4])}, bytes(4)), "data_offsets"),
        (make_raw({"a": entry(shape=[2])}, bytes(4)), "found 4 bytes, expected 8"),
        (make_raw({"a": entry(shape=[2**52] * 8)}, bytes(4)), "found 4 bytes"),
        (make_raw({"a": entry(), "b": entry()}, bytes(4)), "overlaps"),
        (make_raw({"a": entry(), "b": entry(offsets=[8, 12])}, bytes(12)), "gap"),
        (make_raw({"a": entry(offsets=[4, 8])}, bytes(8)), "gap"),
        (make_raw({"a": entry()}, bytes(5)), "1 bytes after the last tensor"),
    ],
)
def test_a_malformed_safetensors_file_is_refused(weights, message):
    with pytest.raises(BundleError, match=message):
        describe_tensors(weights)


@pytest.mark.parametrize("count", [37_001, 100_000])
def test_a_header_of_too_many_tensors_is_refused_at_once(count):
    table = {f"{i:x}": entry(offsets=(4 * i, 4 * i + 4)) for i in range(count)}
    weights = make_raw(table, bytes(4 * count))
    started = time.process_time()
    with pytest.raises(BundleError, match="more than 37000 tensors"):
        describe_tensors(weights)
    assert time.process_time() - started < 2  # was 22 s
    few = make_raw({f"{i:x}": {} for i in range(37_002)})
    with pytest.raises(BundleError, match="37002 tensors, expected at most 37000"):
        describe_tensors(few)


def test_a_manifest_has_no_room_for_more_tensors_than_a_header_may_name():
    smallest = len(f'"aaa":{{"digest":"sha256:{"0" * 64}","dtype":"F32","shape":[]}},')
    assert MAX_MANIFEST_BYTES // smallest < MAX_TENSORS


def test_weights_are_read_once_and_in_pieces(tmp_path):
    class Counting(io.FileIO):
        total = largest = 0

        def readinto(self, view):
            self.largest = max(self.largest, len(view))
            count = super().readinto(view)
            self.total += count
            return count

    path = tmp_path / "w"
    path.write_bytes(make_weights({"a": ("F32", [1 << 20], bytes(4 << 20))}))
    size = path.stat().st_size
    seen = []
    with Counting(path) as f:
        found = read_weights(f, size, lambda *given: seen.append((*given[:3], len(given[3]))))
    assert (f.total, f.largest) == (size, 1 << 20)
    assert found.digest == digest_bytes(path.read_bytes())
    with Counting(path) as f:
        watch_weights(f, size, lambda *given: seen.append((*given[:3], len(given[3]))))
    assert (f.total, f.largest) == (size, 1 << 20)
    assert [(name, at, count) for name, _, at, count in seen] == [
        ("a", at << 20, 1 << 20) for at in [0, 1, 2, 3] * 2
    ]


@settings(max_examples=40)
@given(table=tables(), pieces=st.sampled_from([8, 64, 1 << 20]))
def test_pieces_are_the_tensors_whatever_their_size(table, pieces):
    """Hashed on another core while the next piece is read, and also where nothing is hashed."""
    weights, seen = make_weights(table), {}

    def watch(name, span, at, piece):
        assert at == len(seen.setdefault(name, b"")) and len(piece) <= pieces
        assert (span.dtype, list(span.shape)) == table[name][:2]
        seen[name] += bytes(piece)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_PIECE_BYTES", pieces)
        patch.setattr(room, "_WORTH_A_THREAD", 16)
        copy = io.BytesIO()
        found = read_weights(io.BytesIO(weights), len(weights), watch, copy)
        once = dict(seen)
        seen.clear()
        watch_weights(io.BytesIO(weights), len(weights), watch)
    assert seen == once == {name: data for name, (_, _, data) in table.items()}
    assert found.digest == digest_bytes(weights) and copy.getvalue() == weights


@pytest.mark.parametrize("dtype", FLOATS)
@given(values=st.lists(st.floats(-6e4, 6e4), min_size=1, max_size=20))
@settings(max_examples=20)
def test_the_largest_absolute_value_is_found(dtype, values):
    array = np.array(values, "<f4")
    if dtype == "BF16":
        data = (array.view("<u4") >> 16).astype("<u2")
        expected = np.abs((data.astype("<u4") << 16).view("<f4")).max()
    else:
        data = array.astype(f"<f{WIDTHS[dtype]}")
        expected = np.abs(data).max()
    weights = make_weights({"a": (dtype, [len(values)], data.tobytes())})
    assert read_weights(io.BytesIO(weights), len(weights)).largest == {"a": float(expected)}


def test_every_malformed_tensor_is_named_at_once():
    table = {"a": entry("U8"), "b": entry(shape=[7]), "c": entry()}
    with pytest.raises(BundleError, match=r"(?s)a: found dtype.*b: found 4 bytes"):
        describe_tensors(make_raw(table, bytes(4)))


def test_empty_metadata_is_accepted():
    assert "a" in describe_tensors(make_raw({"__metadata__": {}, "a": entry()}, bytes(4)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_one_value_that_is_not_finite_is_found(dtype, value):
    def encode(array):
        if dtype == "BF16":
            return (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        return array.astype(f"<f{WIDTHS[dtype]}").tobytes()

    good = np.array([0.0, -1.0, 3e4, 1e-7, -3e4])
    bad = good.copy()
    bad[3] = value
    weights = make_weights({"g": (dtype, [5], encode(good)), "b": (dtype, [5], encode(bad))})
    assert find_nonfinite(weights) == ["b"]


def test_the_largest_finite_value_is_finite():
    data = np.array([np.finfo(np.float16).max, np.finfo(np.float16).min], "<f2").tobytes()
    assert find_nonfinite(make_weights({"a": ("F16", [2], data)})) == []


def test_a_value_that_is_not_finite_is_found_in_the_last_piece():
    values = np.zeros((1 << 20) + 3, "<f2")
    values[-1] = np.inf
    assert find_nonfinite(make_weights({"a": ("F16", [len(values)], values.tobytes())})) == ["a"]


def test_compared_tensors_list_every_difference():
    found = describe_tensors(make_weights({n: ("F16", [2, 1], bytes(4)) for n in "abc"}))
    assert compare_tensors(found, {"a": (2, 1), "b": (1, 2), "d": (1,)}) == [
        "missing: d",
        "extra: c",
        "shape of b: found [2, 1], expected [1, 2]",
    ]
    assert compare_tensors(found, dict.fromkeys("abc", (2, 1))) == []


def test_whole_numbers_are_all_finite():
    """Also those whose bits would be an infinity or NaN of another dtype."""
    values = np.array([0, -1, 2**63 - 1, -(2**63), 0x7FF0000000000000], dtype="<i8")
    weights = make_weights({"a": ("I64", [5], values.tobytes())})
    assert find_nonfinite(weights) == []
    assert describe_tensors(weights)["a"].dtype == "I64"
