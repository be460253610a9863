"""A directory of trusted owners: keys with days, rotations, and what is refused by name."""

import datetime
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.bundle import rotation
from flexolmo.bundle.bundle import open_bundle, write_bundle
from flexolmo.bundle.manifest import encode_manifest
from flexolmo.bundle.rotation import sign_rotation
from flexolmo.bundle.signing import key_id, read_private_key, sign_statement
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.errors import ConfigError, SignatureError
from flexolmo.files import canonical_json
from made_bundles import make_manifest, make_weights, sign_as
from made_owners import DAY, days, id_of, make_keys, open_up, public, revoke, rotate


@pytest.fixture(scope="module")
def owner(tmp_path_factory):
    """Private keys 0, 1, 2 and 3 of one owner."""
    return make_keys(tmp_path_factory.mktemp("owner"), "0123")


@pytest.fixture
def trusted_dir(owner, tmp_path):
    """A directory that trusts key 0 as Ann's."""
    directory = tmp_path / "trusted"
    directory.mkdir()
    (directory / "Ann.pub").write_bytes(public(owner / "0"))
    return directory


def bundle_by(key, path, created=DAY):
    weights = make_weights()
    manifest = make_manifest(weights, created=f"{created}T23:59:59Z")
    path.mkdir(exist_ok=True)
    return write_bundle(path / "maths.bundle", weights, manifest, key)


# --- keys ---------------------------------------------------------------------------------------


def test_trusted_owners_are_the_pub_files_of_a_directory(owner, tmp_path):
    (tmp_path / "Ann & Co.pub").write_bytes(public(owner / "0"))
    (tmp_path / ".hidden").write_text("ignored")
    trusted = TrustedOwners.load(tmp_path)
    assert trusted.owner_of(id_of(owner / "0")) == "Ann & Co"
    assert list(trusted.keys_of("Ann & Co")) == [id_of(owner / "0")]
    assert trusted.owners == ["Ann & Co"]
    assert trusted.owner_of(id_of(owner / "1")) is None
    assert trusted.keys_of("Ann") == {} and trusted.list_of("Ann") is None


def test_a_trust_directory_with_anything_else_is_refused_by_name(owner, trusted_dir, tmp_path):
    (trusted_dir / "bob.pem").write_bytes(public(owner / "1"))
    (trusted_dir / "dir.pub").mkdir()
    (trusted_dir / "long.pub").write_bytes(bytes(1 << 20))
    os.mkfifo(trusted_dir / "pipe.pub")
    (trusted_dir / "x.rotation.json").write_text("{}")
    (trusted_dir / "x.revoked.json").write_text("{}")
    (trusted_dir / "day.from-2026-02-30.pub").write_bytes(public(owner / "2"))
    with pytest.raises(SignatureError) as e:
        TrustedOwners.load(trusted_dir)
    for name in (
        *("'bob.pem': found a file of another", "'dir.pub': ", "'long.pub': ", "'pipe.pub': "),
        *("'x.rotation.json': ", "'x.revoked.json': ", "'day.from-2026-02-30.pub': "),
    ):
        assert name in str(e.value)
    assert "Ann" not in str(e.value)
    with pytest.raises(SignatureError, match="cannot be read"):
        TrustedOwners.load(tmp_path / "none")


def test_bad_trusted_keys_are_all_named(owner):
    ann = public(owner / "0")
    with pytest.raises(SignatureError) as e:
        TrustedOwners.from_keys(
            {"ann": ann, "eve": ann, "bob": (owner / "1").read_bytes(), "a/b": ann, "nil": b""}
        )
    for line in ("'eve': same key as 'ann'", "'bob': ", "a private key", "'a/b': ", "'nil': "):
        assert line in str(e.value)
    assert "BEGIN" not in str(e.value)


@settings(max_examples=25)
@given(
    first=st.none() | st.integers(-2, 2),
    last=st.none() | st.integers(-2, 2),
    packed=st.integers(-3, 3),
)
def test_a_key_counts_for_what_was_packed_on_its_days(owner, tmp_path_factory, first, last, packed):
    here = tmp_path_factory.mktemp("days")
    name = "Ann"
    name += "" if first is None else f".from-{days(first)}"
    name += "" if last is None else f".until-{days(last)}"
    (here / f"{name}.pub").write_bytes(public(owner / "0"))
    trusted = TrustedOwners.load(here)
    bundle = bundle_by(owner / "0", here, days(packed))
    lowest = -9 if first is None else first
    highest = 9 if last is None else last
    if lowest <= packed <= highest:
        assert open_bundle(bundle, trusted).signer == "Ann"
    else:
        with pytest.raises(SignatureError, match=rf"packed at {days(packed)}.* which counts for"):
            open_bundle(bundle, trusted)


def test_an_owner_may_have_several_keys(owner, trusted_dir, tmp_path):
    (trusted_dir / f"Ann.from-{days(1)}.pub").write_bytes(public(owner / "1"))
    trusted = TrustedOwners.load(trusted_dir)
    assert set(trusted.keys_of("Ann")) == {id_of(owner / "0"), id_of(owner / "1")}
    open_bundle(bundle_by(owner / "0", tmp_path / "a"), trusted)
    open_bundle(bundle_by(owner / "1", tmp_path / "b", days(1)), trusted)
    weights = make_weights()
    forged = sign_as(tmp_path / "f", encode_manifest(make_manifest(weights)), weights, owner / "2")
    with pytest.raises(SignatureError, match=r"claims to be by 'Ann', whose trusted key is .* or "):
        open_bundle(forged, trusted, allow_unknown_signer=True)


# --- rotation -----------------------------------------------------------------------------------


def test_a_rotation_ends_the_old_key_and_begins_the_new_one(owner, trusted_dir, tmp_path):
    rotate(trusted_dir, owner / "0", owner / "1", days(1), name="z")
    rotate(trusted_dir, owner / "1", owner / "2", days(3), name="a")  # read before the first
    trusted = TrustedOwners.load(trusted_dir)
    spans = {
        name: (key.valid_from, key.valid_until) for name, key in trusted.keys_of("Ann").items()
    }
    assert spans == {
        id_of(owner / "0"): (None, days(1)),
        id_of(owner / "1"): (days(1), days(3)),
        id_of(owner / "2"): (days(3), None),
    }
    for key, packed, counts in (("0", 1, True), ("0", 2, False), ("1", 0, False), ("1", 3, True)):
        bundle = bundle_by(owner / key, tmp_path / f"{key}{packed}", days(packed))
        if counts:
            assert open_bundle(bundle, trusted).signer == "Ann"
        else:
            with pytest.raises(SignatureError, match="which counts for 'Ann' from "):
                open_bundle(bundle, trusted)


def test_a_rotation_does_not_lengthen_an_old_keys_days(owner, tmp_path):
    (tmp_path / f"Ann.until-{days(0)}.pub").write_bytes(public(owner / "0"))
    rotate(tmp_path, owner / "0", owner / "1", days(5))
    keys = TrustedOwners.load(tmp_path).keys_of("Ann")
    assert keys[id_of(owner / "0")].valid_until == days(0)


@pytest.mark.parametrize(
    "old, new, who, said",
    [
        ("1", "2", "Ann", "its old key is not trusted here"),
        ("0", "1", "Bob", "for 'Bob', by a key of 'Ann'"),
        ("0", "3", "Ann", "the new key is trusted already"),
    ],
)
def test_a_rotation_that_does_not_go_on_from_a_trusted_key_is_refused(
    owner, trusted_dir, old, new, who, said
):
    (trusted_dir / "Cid.pub").write_bytes(public(owner / "3"))
    rotate(trusted_dir, owner / old, owner / new, owner=who)
    with pytest.raises(SignatureError, match=rf"rotation\.json': {said}"):
        TrustedOwners.load(trusted_dir)


def test_two_successors_of_one_key_are_refused(owner, trusted_dir):
    rotate(trusted_dir, owner / "0", owner / "1", name="a")
    rotate(trusted_dir, owner / "0", owner / "2", name="b")
    with pytest.raises(SignatureError, match=r"Ann\.b.*has another successor, by 'Ann\.a\."):
        TrustedOwners.load(trusted_dir)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rotation_is_signed_by_both_keys(owner, trusted_dir, missing):
    """By the old one, or anybody could be made the successor; by the new one, or another's key
    could be claimed."""
    keys = [read_private_key(owner / "0"), read_private_key(owner / "1")]
    whole = sign_rotation(*keys, "Ann", DAY)
    stated, _ = rotation.read_rotation(whole, "whole")
    del keys[missing]
    (trusted_dir / "Ann.rotation.json").write_bytes(
        sign_statement(stated, rotation._PAYLOAD_TYPE, keys)
    )
    with pytest.raises(SignatureError, match="It is not signed by the key"):
        TrustedOwners.load(trusted_dir)
    (trusted_dir / "Ann.rotation.json").write_bytes(whole)
    assert len(TrustedOwners.load(trusted_dir).keys_of("Ann")) == 2


@settings(max_examples=60)
@given(data=st.data())
def test_a_changed_byte_of_a_statement_is_refused(owner, tmp_path_factory, data):
    here = tmp_path_factory.mktemp("flip")
    (here / "Ann.pub").write_bytes(public(owner / "0"))
    rotate(here, owner / "0", owner / "1")
    revoke(here, owner / "0", {"kind": "key", "key_id": id_of(owner / "2"), "date": "2026-11-22",
                               "reason": "Lost."})  # fmt: skip
    file = here / data.draw(st.sampled_from(["Ann.a.rotation.json", "Ann.revoked.json"]))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, 2**20)) % len(content)  # a signature's length is never the same
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    with pytest.raises(SignatureError) as e:
        TrustedOwners.load(here)
    assert file.name in str(e.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w["signatures"].insert(0, {"keyid": "\x1b[2J", "sig": ""}),
        lambda w: w["signatures"].append(dict(w["signatures"][0])),
        lambda w: w["signatures"].reverse(),
        lambda w: w["signatures"][0].update(note="text"),
        lambda w: w["signatures"].clear(),
        lambda w: w.update(note="text"),
        lambda w: w.update(payload=w["payload"] + "\n"),
        lambda w: w.update(payloadType="application/vnd.flexolmo.revocations+json"),
        lambda w: w.update(signatures={}),
    ],
)
def test_a_statement_has_one_spelling_only(owner, trusted_dir, change):
    rotate(trusted_dir, owner / "0", owner / "1")
    (file,) = trusted_dir.glob("*.rotation.json")
    whole = json.loads(file.read_bytes())
    change(whole)
    file.write_bytes(canonical_json(whole))
    with pytest.raises(SignatureError, match=r"Ann\.a\.rotation\.json'") as e:
        TrustedOwners.load(trusted_dir)
    assert "\x1b" not in str(e.value)


def test_a_rotation_says_what_was_asked(owner):
    data = sign_rotation(*(read_private_key(owner / n) for n in "01"), "Ann", DAY)
    stated, signatures = open_up(data)
    assert stated == {
        "format": "flexolmo-rotation",
        "format_version": 1,
        "owner": "Ann",
        "old_key_id": id_of(owner / "0"),
        "new_public_key": public(owner / "1").decode(),
        "valid_from": "2026-11-22",
    }
    assert {s["keyid"] for s in signatures} == {id_of(owner / "0"), id_of(owner / "1")}


def test_a_rotation_to_itself_or_of_no_owner_is_not_made(owner):
    keys = [read_private_key(owner / n) for n in "01"]
    with pytest.raises(ConfigError, match="are the same"):
        sign_rotation(keys[0], keys[0], "Ann", DAY)
    with pytest.raises(ConfigError, match="owner"):
        sign_rotation(*keys, "a/b", DAY)


def test_the_day_of_a_bundle_is_that_of_its_packing_not_of_reading(owner, trusted_dir, tmp_path):
    rotate(trusted_dir, owner / "0", owner / "1", days(1))
    bundle = bundle_by(owner / "0", tmp_path / "b")
    later = datetime.date(2040, 1, 1)
    found = open_bundle(bundle, TrustedOwners.load(trusted_dir), today=later)
    assert found.key_id == key_id(public(owner / "0"))
