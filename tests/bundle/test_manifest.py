"""The manifest's gate, fed honest and hostile bytes."""

import datetime
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.bundle.manifest import (
    MAX_FREE_JSON_BYTES,
    MAX_MANIFEST_BYTES,
    build_manifest,
    check_owner,
    encode_manifest,
    read_manifest,
)
from flexolmo.bundle.terms import PURPOSES, make_terms
from flexolmo.errors import BundleError
from flexolmo.files import canonical_json

DIGEST = "sha256:" + "ab" * 32
WEIGHTS = (  # a safetensors file of one tensor, as the library writes it
    (72).to_bytes(8, "little")
    + b'{"layers.0.up":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}}'.ljust(72)
    + bytes(8)
)
_BYTES = (
    b'{"anchor_digest":"sha256:abababababababababababababababababababababababababababababababab",'
    b'"architecture":{"attention_rank":4,"d_ff":3,"d_model":2,"embedding_rank":0,"head_rank":0,'
    b'"num_bigrams":7,"num_layers":1,"rank":0},"created":"2026-11-22T04:30:00Z",'
    b'"data_card_digest":"sha256:ababababababababababababababababababababababababababababababab'
    b'ab","format_version":%d,"licence":"Apache-2.0 OR LicenseRef-Hospital","name":"maths",'
    b'"owner":"Universit\xc3\xa4tsklinik Jena","recipe":{"lr":0.0009,"steps":2000},'
    b'"router":{"kind":"linear","settings":{"has_bias":false}},%s"software":{"flexolmo":"0.1.0"},'
    b'"tensors":{"layers.0.up":{"digest":'
    b'"sha256:af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc",'
    b'"dtype":"BF16","shape":[2,2]}},"terms":{%s},"tokens_seen":123456,"weights_digest":'
    b'"sha256:ead39f0f655819199a101dbd4cdf4afe25e25ceeeef0bad43b56dbafd66b0413"}'
)
GOLDEN = _BYTES % (
    4,
    b'"serial":7,',
    b'"attribution":"After notes of the Universit\xc3\xa4tsklinik Jena.","audience":["clinic",'
    b'"https://jena.example/staff"],"permitted":["clinical-care","health-research"],'
    b'"prohibited":["commercial"],"text":"Research only.","valid_from":"2026-12-01",'
    b'"valid_until":"2027-06-30"',
)
GOLDEN_3 = _BYTES % (3, b"", b'"expires":"2027-06-30","text":"Research only."')


ARCHITECTURE = {
    "num_layers": 1,
    "d_model": 2,
    "d_ff": 3,
    "rank": 0,
    "attention_rank": 4,
    "embedding_rank": 0,
    "head_rank": 0,
    "num_bigrams": 7,
}


def make_manifest(**changes):
    claims = {
        "name": "maths",
        "owner": "Universitätsklinik Jena",
        "anchor_digest": DIGEST,
        "architecture": ARCHITECTURE,
        "router_kind": "linear",
        "router_settings": {"has_bias": False},
        "recipe": {"lr": 9e-4, "steps": 2000},
        "tokens_seen": 123456,
        "data_card_digest": DIGEST,
        "licence": "Apache-2.0 OR LicenseRef-Hospital",
        "serial": 7,
        "terms": make_terms(
            "Research only.",
            ["health-research", "clinical-care"],
            prohibited=["commercial"],
            audience=["https://jena.example/staff", "clinic"],
            valid_from=datetime.date(2026, 12, 1),
            valid_until=datetime.date(2027, 6, 30),
            attribution="After notes of the Universitätsklinik Jena.",
        ),
        "created": "2026-11-22T04:30:00Z",
        "software": {"flexolmo": "0.1.0"},
    }
    return build_manifest(WEIGHTS, **{**claims, **changes})


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


@settings(max_examples=60)
@given(recipe=st.dictionaries(st.text("abc", min_size=1), json_values, max_size=3))
def test_any_recipe_survives_a_round_trip(recipe):
    manifest = make_manifest(recipe=recipe)
    again = read_manifest(encode_manifest(manifest))
    assert again == manifest
    assert again.recipe == recipe


days = st.none() | st.dates()
groups = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,9}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cc", "Cs", "Cf"]), min_size=1, max_size=9)
terms = st.builds(
    dict,
    text=texts,
    permitted=st.sets(st.sampled_from(sorted(PURPOSES)), min_size=1),
    prohibited=st.sets(st.sampled_from(sorted(set(PURPOSES) - {"any"}))),
    audience=st.sets(groups, max_size=3),
    valid_from=days,
    valid_until=days,
    attribution=st.none() | texts,
).filter(
    lambda t: not (t["valid_from"] and t["valid_until"]) or t["valid_from"] <= t["valid_until"]
)


@settings(max_examples=60)
@given(terms=terms, serial=st.integers(1, 2**53 - 1))
def test_any_terms_and_serial_survive_a_round_trip(terms, serial):
    manifest = make_manifest(terms=make_terms(**terms), serial=serial)
    again = read_manifest(encode_manifest(manifest))
    assert again == manifest and again.serial == serial
    for name, value in terms.items():
        assert getattr(again.terms, name) == (
            tuple(sorted(value)) if isinstance(value, set) else value
        )


# --- version 3 ----------------------------------------------------------------------------------


@settings(max_examples=40)
@given(text=texts, expires=days)
def test_version_3_is_read_as_terms_for_any_purpose_and_never_written(text, expires):
    claims = json.loads(GOLDEN_3)
    claims["terms"] = {"text": text, "expires": expires and expires.isoformat()}
    manifest = read_manifest(canonical_json(claims))
    assert (manifest.format_version, manifest.serial) == (3, 0)
    assert manifest.terms == make_terms(text, ["any"], valid_until=expires)
    newer = make_manifest(terms=manifest.terms).model_dump()
    assert newer | {"format_version": 3, "serial": 0} == manifest.model_dump()
    with pytest.raises(BundleError, match="version 3 can be read, not written"):
        encode_manifest(manifest)


def test_version_3_keeps_its_licence_whatever_the_list_says():
    old = GOLDEN_3.replace(b"Apache-2.0 OR LicenseRef-Hospital", b"Nope-1.0")
    assert read_manifest(old).licence == "Nope-1.0"


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.replace(b'"format_version":3', b'"format_version":4'),
        lambda d: GOLDEN.replace(b'"format_version":4', b'"format_version":3'),
        lambda d: d.replace(b'"software"', b'"serial":0,"software"'),
        lambda d: d.replace(b'"expires":"2027-06-30",', b""),
        lambda d: d.replace(b'"expires":"2027-06-30"', b'"expires":"2027-6-30"'),
        lambda d: d.replace(b'{"expires":"2027-06-30","text":"Research only."}', b"[]"),
        lambda d: d.replace(b'"text":"Research only."', b'"text":""'),
        lambda d: d.replace(b'"text":"Research only."', b'"text":"x","valid_until":null'),
        lambda d: d.replace(b"Apache-2.0 OR LicenseRef-Hospital", b""),
        lambda d: d + b"\n",
    ],
)
def test_version_3_is_held_to_its_own_fields(change):
    assert read_manifest(GOLDEN_3).owner == "Universitätsklinik Jena"
    with pytest.raises(BundleError, match=r"manifest\.json"):
        read_manifest(change(GOLDEN_3))


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 1, 2, 5, "4", 4.0, 3.0, True, None, [4]])
def test_an_unknown_version_is_refused_before_anything_else(version):
    data = json.dumps({"format_version": version, "nonsense": 1}, indent=3).encode()
    with pytest.raises(BundleError, match=r"format_version.*expected 4") as e:
        read_manifest(data)
    assert "nonsense" not in str(e.value)


def test_missing_and_unknown_fields_are_all_named():
    claims = json.loads(encode_manifest(make_manifest()))
    del claims["licence"], claims["terms"]["valid_until"], claims["router"]["kind"]
    claims["text"] = "a secret"
    claims["architecture"]["heads"] = 2
    with pytest.raises(BundleError) as e:
        read_manifest(canonical_json(claims))
    for line in (
        "missing field: licence",
        "missing field: terms.valid_until",
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
        *((f"architecture/{k}", v) for k in ARCHITECTURE for v in (-1, "3", True, 3.0, None, ...)),
        ("router/kind", ""),
        ("router/settings", []),
        ("tensors", {}),
        ("tensors/a tensor", {"dtype": "F32", "shape": [1], "digest": DIGEST}),
        ("tensors/layers.0.up/dtype", "I16"),
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
        ("licence", "Nope-1.0"),
        *(("serial", v) for v in (0, -1, "7", True, 7.0, None, 2**53, ...)),
        ("terms/permitted", []),
        ("terms/permitted", ["any", "any"]),
        ("terms/permitted", ["education", "any"]),
        ("terms/permitted", ["nosuch"]),
        ("terms/permitted", "any"),
        ("terms/prohibited", ["any"]),
        ("terms/prohibited", None),
        ("terms/audience", ["b", "a"]),
        ("terms/audience", ["a b"]),
        ("terms/audience", [""]),
        ("terms/audience", [f"g{i:04}" for i in range(1001)]),
        ("terms/valid_from", "2027-07-01"),
        ("terms/attribution", ""),
        ("terms/attribution", ...),
        ("terms/expires", None),
        ("terms/text", ""),
        ("terms/valid_until", "tomorrow"),
        ("terms/valid_until", "2027-6-30"),
        ("terms/valid_until", "2027-02-30"),
        ("terms/valid_until", 0),
        ("terms/valid_until", "2027-06-30T00:00:00"),
        ("terms/valid_until", "1782777600"),
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
    "licence", ["MIT", "GPL-2.0-or-later", "LicenseRef-x", "MIT OR (ISC AND LicenseRef-St.Mary-2)"]
)
def test_spdx_expressions_are_accepted(licence):
    assert make_manifest(licence=licence).licence == licence


@pytest.mark.parametrize(
    "licence, said", [("gpl", "stands for GPL-1.0-or-later"), ("nosuch", "unknown: nosuch")]
)
def test_a_licence_is_packed_in_its_plain_spelling_alone(licence, said):
    with pytest.raises(BundleError, match=said):
        make_manifest(licence=licence)


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


@pytest.mark.parametrize("depth", [201, 1500, 5000, 100_000])
def test_a_manifest_nested_too_deeply_is_refused_by_name(depth):
    """Whatever Python's own limits, which differ between versions."""
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        deep = opening * depth + b"1" + closing * depth
        data = GOLDEN.replace(b'"recipe":{"lr":0.0009,', b'"recipe":{"deep":' + deep + b",")
        with pytest.raises(BundleError, match="more than 200 levels deep"):
            read_manifest(data)
