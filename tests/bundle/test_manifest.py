"""The manifest's gate and the safetensors table, both fed honest and hostile bytes."""

import datetime
import json
import struct

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.bundle.manifest import (
    MAX_FREE_JSON_BYTES,
    MAX_HEADER_BYTES,
    MAX_MANIFEST_BYTES,
    build_manifest,
    check_owner,
    compare_tensors,
    describe_tensors,
    encode_manifest,
    find_nonfinite,
    read_manifest,
)
from flexolmo.errors import BundleError
from flexolmo.files import canonical_json, digest_bytes

DIGEST = "sha256:" + "ab" * 32
WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
LIBRARY_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
GOLDEN = (
    b'{"anchor_digest":"sha256:abababababababababababababababababababababababababababababababab",'
    b'"architecture":{"d_ff":3,"d_model":2,"num_layers":1},"created":"2026-11-22T04:30:00Z",'
    b'"data_card_digest":"sha256:ababababababababababababababababababababababababababababababab'
    b'ab","format_version":1,"licence":"Apache-2.0 OR LicenseRef-Hospital","name":"maths",'
    b'"owner":"Universit\xc3\xa4tsklinik Jena","recipe":{"lr":0.0009,"steps":2000},'
    b'"router":{"kind":"linear","settings":{"has_bias":false}},"software":{"flexolmo":"0.1.0"},'
    b'"tensors":{"layers.0.up":{"digest":'
    b'"sha256:af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc",'
    b'"dtype":"BF16","shape":[2,2]}},"terms":{"expires":"2027-06-30",'
    b'"text":"Research only."},"tokens_seen":123456,"weights_digest":'
    b'"sha256:ead39f0f655819199a101dbd4cdf4afe25e25ceeeef0bad43b56dbafd66b0413"}'
)


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


def make_raw(header, data=b"", pad=True):
    """A file with this header, well formed or not."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":"))
    raw = text if isinstance(text, bytes) else text.encode()
    raw += b" " * (-len(raw) % 8) if pad else b""
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def make_manifest(weights=None, **changes):
    claims = {
        "name": "maths",
        "owner": "Universitätsklinik Jena",
        "anchor_digest": DIGEST,
        "num_layers": 1,
        "d_model": 2,
        "d_ff": 3,
        "router_kind": "linear",
        "router_settings": {"has_bias": False},
        "recipe": {"lr": 9e-4, "steps": 2000},
        "tokens_seen": 123456,
        "data_card_digest": DIGEST,
        "licence": "Apache-2.0 OR LicenseRef-Hospital",
        "terms_text": "Research only.",
        "terms_expire": datetime.date(2027, 6, 30),
        "created": "2026-11-22T04:30:00Z",
        "software": {"flexolmo": "0.1.0"},
    }
    return build_manifest(weights or make_weights(), **{**claims, **changes})


def change_claims(path, value):
    """The golden claims with one value set (or deleted, if `value` is `...`), canonical."""
    claims = json.loads(encode_manifest(make_manifest()))
    *parents, last = path.split("/")
    inner = claims
    for key in parents:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return canonical_json(claims)


# --- manifest ----------------------------------------------------------------------------------


def test_canonical_bytes_are_golden():
    assert encode_manifest(make_manifest()) == GOLDEN
    assert read_manifest(GOLDEN) == make_manifest()


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cc", "Cs", "Cf"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(categories=["L", "N"])), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(recipe=st.dictionaries(st.text("abc", min_size=1), json_values, max_size=3))
def test_any_recipe_survives_a_round_trip(recipe):
    manifest = make_manifest(recipe=recipe)
    again = read_manifest(encode_manifest(manifest))
    assert again == manifest
    assert again.recipe == recipe


@pytest.mark.parametrize("version", [0, 2, "1", 1.0, True, None, [1]])
def test_an_unknown_version_is_refused_before_anything_else(version):
    data = json.dumps({"format_version": version, "nonsense": 1}, indent=3).encode()
    with pytest.raises(BundleError, match=r"format_version.*expected 1") as e:
        read_manifest(data)
    assert "nonsense" not in str(e.value)


def test_missing_and_unknown_fields_are_all_named():
    claims = json.loads(encode_manifest(make_manifest()))
    del claims["licence"], claims["terms"]["expires"], claims["router"]["kind"]
    claims["text"] = "a secret"
    claims["architecture"]["heads"] = 2
    with pytest.raises(BundleError) as e:
        read_manifest(canonical_json(claims))
    for line in (
        "missing field: licence",
        "missing field: terms.expires",
        "missing field: router.kind",
        "unknown field: text",
        "unknown field: architecture.heads",
    ):
        assert line in str(e.value)


@pytest.mark.parametrize(
    "path, value",
    [
        ("name", "Maths"),
        ("name", "a" * 65),
        ("name", "maths\n"),
        ("name", "public"),
        ("name", "anchor"),
        ("owner", ""),
        ("owner", " Jena"),
        ("owner", "a/b"),
        ("owner", "..."),
        ("owner", "a\u200bb"),
        ("owner", "e\u0301"),
        ("owner", "x" * 101),
        ("anchor_digest", "sha256:AB"),
        ("anchor_digest", "md5:" + "ab" * 32),
        ("architecture/d_ff", 0),
        ("architecture/d_ff", "3"),
        ("architecture/d_ff", True),
        ("architecture/d_ff", 3.0),
        ("router/kind", ""),
        ("router/settings", []),
        ("tensors", {}),
        ("tensors/a tensor", {"dtype": "F32", "shape": [1], "digest": DIGEST}),
        ("tensors/layers.0.up/dtype", "I8"),
        ("tensors/layers.0.up/shape", [0]),
        ("tensors/layers.0.up/shape", [2, -2]),
        ("weights_digest", None),
        ("recipe", "text"),
        ("recipe", {"corpus": "x" * MAX_FREE_JSON_BYTES}),
        ("tokens_seen", -1),
        ("tokens_seen", 1e9),
        ("data_card_digest", ""),
        ("licence", ""),
        ("licence", "do what you like"),
        ("licence", "MIT AND"),
        ("licence", "(MIT"),
        ("licence", "MIT)"),
        ("licence", "AND MIT"),
        ("licence", "MIT & BSD"),
        ("terms/text", ""),
        ("terms/expires", "tomorrow"),
        ("terms/expires", "2027-6-30"),
        ("terms/expires", "2027-02-30"),
        ("terms/expires", 0),
        ("terms/expires", "2027-06-30T00:00:00"),
        ("terms/expires", "1782777600"),
        ("created", "2026-11-22"),
        ("created", "2026-11-22T04:30:00+01:00"),
        ("created", "2026-13-22T04:30:00Z"),
        ("software", {}),
        ("software", {"torch": 2}),
    ],
)
def test_a_malformed_field_is_refused_by_name(path, value):
    with pytest.raises(BundleError) as e:
        read_manifest(change_claims(path, value))
    assert path.split("/")[0] in str(e.value)


@pytest.mark.parametrize(
    "licence",
    ["MIT", "GPL-2.0+", "LicenseRef-x", "(MIT OR Apache-2.0) AND GPL-2.0-only WITH Classpath-2.0"],
)
def test_spdx_expressions_are_accepted(licence):
    assert make_manifest(licence=licence).licence == licence


@pytest.mark.parametrize("text", ["\x1b[2Jhello", "a\u202eb", "\x00", "\x7f"])
def test_characters_that_fool_a_terminal_are_refused(text):
    with pytest.raises(BundleError, match=r"terms\.text.*control characters"):
        read_manifest(change_claims("terms/text", text))
    with pytest.raises(BundleError, match="control characters"):
        make_manifest(recipe={text: 1})


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d + b"\n",
        lambda d: b" " + d,
        lambda d: d.replace(b'":', b'": ', 1),
        lambda d: d.replace(b"0.0009", b"9e-4"),
        lambda d: d.replace(b"2000", b"2E3"),
        lambda d: d.replace(b"0.0009", b"1e999"),
        lambda d: d.replace(b"0.0009", b"NaN"),
        lambda d: d.replace("ä".encode(), b"\\u00e4"),
        lambda d: d.replace(b'"name":"maths"', b'"name":"maths","name":"maths"'),
        lambda d: d.replace("ä".encode(), b"\xff"),
        lambda d: d[:-1],
        lambda d: b"",
        lambda d: b"[]",
        lambda d: b"[" * 100_000,
        lambda d: b"\xef\xbb\xbf" + d,
        lambda d: d + b" " * MAX_MANIFEST_BYTES,
        lambda d: d.replace(b"Research only.", b"\\ud800"),
    ],
)
def test_bytes_that_are_not_canonical_are_refused(change):
    with pytest.raises(BundleError, match=r"manifest\.json"):
        read_manifest(change(encode_manifest(make_manifest())))


def test_a_recipe_that_json_cannot_hold_is_refused():
    for value in (float("nan"), object(), b"bytes"):
        with pytest.raises(BundleError, match="cannot be written as JSON"):
            make_manifest(recipe={"lr": value})


def test_a_manifest_is_frozen():
    with pytest.raises(ValueError):
        make_manifest().name = "other"  # type: ignore[misc]


def test_the_defaults_name_time_and_software():
    manifest = make_manifest(created=None, software=None)
    assert {"flexolmo", "torch"} <= manifest.software.keys()
    assert manifest.created.endswith("Z")


def test_owner_names_in_many_scripts_are_accepted():
    for owner in ("Ålesund sjukehus", "東京大学", "O'Neil & Co. (2)"):
        assert check_owner(owner) == owner


# --- tensor table ------------------------------------------------------------------------------


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


@settings(max_examples=80, deadline=None)
@given(table=tables())
def test_any_table_the_library_writes_is_described_as_it_is(table):
    found = describe_tensors(make_weights(table))
    assert {n: (e.dtype, list(e.shape), e.digest) for n, e in found.items()} == {
        name: (dtype, shape, digest_bytes(data)) for name, (dtype, shape, data) in table.items()
    }


@settings(max_examples=300, deadline=None)
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


def test_every_malformed_tensor_is_named_at_once():
    table = {"a": entry("U8"), "b": entry(shape=[7]), "c": entry()}
    with pytest.raises(BundleError, match=r"(?s)a: found dtype.*b: found 4 bytes"):
        describe_tensors(make_raw(table, bytes(4)))


def test_empty_metadata_is_accepted():
    assert "a" in describe_tensors(make_raw({"__metadata__": {}, "a": entry()}, bytes(4)))


@pytest.mark.parametrize("dtype", sorted(WIDTHS))
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
