"""What an owner has revoked is refused wherever a bundle is opened, and no list takes it back."""

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.bundle import revocation
from flexolmo.bundle.bundle import check_signer, inspect_bundle, open_bundle
from flexolmo.bundle.facts import ExpertFacts
from flexolmo.bundle.refresh import take_lists
from flexolmo.bundle.revocation import extend_list, read_list
from flexolmo.bundle.signing import read_private_key, sign_statement
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.errors import BundleError, RevokedError, SignatureError
from flexolmo.files import canonical_json
from made_bundles import DIGEST, TERMS
from made_owners import DAY, days, entry, id_of, make_keys, open_up, public, revoke, rotate

OTHER = "sha256:" + "0" * 64


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    """Private keys 0, 1 and 2 of nobody yet."""
    return make_keys(tmp_path_factory.mktemp("more"))


@pytest.fixture
def trusted_dir(keys, tmp_path):
    """A directory that trusts Ann's key, who signed `valid`."""
    directory = tmp_path / "trusted"
    directory.mkdir()
    (directory / "Ann.pub").write_bytes((keys / "Ann.pub").read_bytes())
    return directory


@pytest.fixture
def inbox(tmp_path):
    (tmp_path / "inbox").mkdir()
    return tmp_path / "inbox"


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["key", "bundle", "expert"])
def test_what_is_revoked_is_refused_with_reason_and_date(valid, trusted_dir, keys, kind):
    bundle = open_bundle(valid, TrustedOwners.load(trusted_dir))
    what = {
        "key": {"key_id": bundle.key_id},
        "bundle": {"bundle_digest": bundle.digests["manifest.json"]},
        "expert": {"name": "maths", "up_to_serial": 1},
    }[kind]
    revoke(trusted_dir, keys / "Ann", entry(kind, **what))
    trusted = TrustedOwners.load(trusted_dir)
    said = "maths of 'Ann', serial 1, was revoked by its owner on 2026-11-23: A patient objected"
    for attempt in (
        lambda: open_bundle(valid, trusted),
        lambda: open_bundle(valid, trusted, allow_unknown_signer=True),
        lambda: check_signer(valid, trusted),
    ):
        with pytest.raises(RevokedError, match=said):
            attempt()
    assert said in inspect_bundle(valid, trusted)["why_not"]
    assert str(trusted.find_revocation("maths", bundle.facts)) in said


def test_what_is_not_revoked_is_opened(valid, trusted_dir, keys, more):
    (trusted_dir / "Bob.pub").write_bytes((keys / "Bob.pub").read_bytes())
    revoke(
        trusted_dir,
        keys / "Ann",
        entry("key", key_id=id_of(more / "0")),
        entry("bundle", bundle_digest=DIGEST),
        entry("expert", name="maths", up_to_serial=0),
        entry("expert", name="poems", up_to_serial=9),
    )
    ann = id_of(keys / "Ann")  # which is not for Bob to revoke
    revoke(trusted_dir, keys / "Bob", entry("key", key_id=ann), owner="Bob")
    assert open_bundle(valid, TrustedOwners.load(trusted_dir)).signer == "Ann"


facts = st.builds(
    ExpertFacts,
    owner=st.sampled_from(["Ann", "Bob"]),
    key_id=st.sampled_from([DIGEST, OTHER]),
    bundle_digest=st.sampled_from([DIGEST, OTHER]),
    serial=st.integers(0, 4),
    licence=st.just("MIT"),
    terms=st.just(TERMS),
)
entries = st.one_of(
    st.builds(entry, st.just("key"), key_id=st.sampled_from([DIGEST, OTHER])),
    st.builds(entry, st.just("bundle"), bundle_digest=st.sampled_from([DIGEST, OTHER])),
    st.builds(
        entry,
        st.just("expert"),
        name=st.sampled_from(["maths", "news"]),
        up_to_serial=st.integers(0, 4),
    ),
)


@settings(max_examples=60)
@given(
    revoked=st.lists(entries, min_size=1, max_size=4),
    found=facts,
    name=st.sampled_from(["maths", "news"]),
)
def test_the_first_entry_that_concerns_an_expert_is_found(
    keys, tmp_path_factory, revoked, found, name
):
    here = tmp_path_factory.mktemp("list")
    made = extend_list(here / "l", read_private_key(keys / "Ann"), "Ann", revoked)
    concerns = [
        r.get("key_id") == found.key_id
        or r.get("bundle_digest") == found.bundle_digest
        or (r.get("name") == name and found.serial <= r["up_to_serial"])
        for r in revoked
    ]
    expected = concerns.index(True) if any(concerns) else None
    hit = TrustedOwners({}, [made]).find_revocation(name, found)
    if expected is None or found.owner != "Ann":
        assert hit is None
    else:
        assert hit == made.revoked[expected]
        assert str(hit) == "revoked by its owner on 2026-11-23: A patient objected"


# --- making a list ------------------------------------------------------------------------------


def test_a_list_says_what_was_asked_and_grows(keys, tmp_path):
    first, second = entry("key", key_id=DIGEST), entry("expert", name="maths", up_to_serial=2)
    path = revoke(tmp_path, keys / "Ann", first)
    revoke(tmp_path, keys / "Ann", second)
    stated, (signature,) = open_up(path.read_bytes())
    assert stated == {
        "format": "flexolmo-revocations",
        "format_version": 1,
        "owner": "Ann",
        "number": 2,
        "revoked": [first, second],
    }
    assert signature["keyid"] == id_of(keys / "Ann")


@pytest.mark.parametrize(
    "wrong",
    [
        entry("key"),
        entry("key", key_id="sha256:AB"),
        entry("key", key_id=DIGEST, reason=""),
        entry("key", key_id=DIGEST, reason="a\x1b[2J"),
        entry("key", key_id=DIGEST, reason="a\udcff"),
        entry("key", key_id=DIGEST, date="2026-2-30"),
        entry("expert", name="maths"),
        entry("expert", name="maths", up_to_serial=-1),
        entry("expert", name="maths", up_to_serial=True),
        entry("expert", name="../x", up_to_serial=1),
        entry("bundle", bundle_digest=DIGEST, key_id=DIGEST),
        entry("owner", name="Ann"),
    ],
)
def test_a_malformed_revocation_is_not_signed(keys, tmp_path, wrong):
    with pytest.raises(BundleError, match="This list"):
        revoke(tmp_path, keys / "Ann", wrong)
    with pytest.raises(BundleError, match="This list"):
        revoke(tmp_path, keys / "Ann")
    assert not list(tmp_path.iterdir())


def test_only_ones_own_list_is_made_longer(keys, more, tmp_path):
    path = revoke(tmp_path, keys / "Ann", entry("key", key_id=DIGEST))
    before = path.read_bytes()
    bob = read_private_key(keys / "Bob")
    more_of_it = [entry("key", key_id=OTHER)]
    with pytest.raises(SignatureError, match=r"is signed by .*, not by .*--signed-by KEY\.pub"):
        extend_list(path, bob, "Ann", more_of_it)
    with pytest.raises(BundleError, match="is the list of 'Ann', not of 'Bob'"):
        extend_list(path, read_private_key(keys / "Ann"), "Bob", more_of_it)
    assert path.read_bytes() == before
    made = extend_list(path, bob, "Ann", more_of_it, signed_by=public(keys / "Ann"))
    assert made.number == 2


def test_a_list_that_was_changed_is_not_made_longer(keys, tmp_path):
    path = revoke(tmp_path, keys / "Ann", entry("key", key_id=DIGEST))
    whole = json.loads(path.read_bytes())
    payload = base64.b64decode(whole["payload"]).replace(b"ab", b"cd")
    path.write_bytes(canonical_json(whole | {"payload": base64.b64encode(payload).decode()}))
    with pytest.raises(SignatureError, match="not signed by the key"):
        revoke(tmp_path, keys / "Ann", entry("key", key_id=OTHER))


def test_a_revoked_key_signs_no_list_after(keys, tmp_path):
    revoke(tmp_path, keys / "Ann", entry("key", key_id=id_of(keys / "Ann")))
    with pytest.raises(SignatureError, match="may sign no list after it"):
        revoke(tmp_path, keys / "Ann", entry("key", key_id=DIGEST))


def test_a_list_too_long_to_be_read_is_not_signed(keys, tmp_path, monkeypatch):
    monkeypatch.setattr(revocation, "MAX_LIST_BYTES", 1500)
    revoke(tmp_path, keys / "Ann", entry("key", key_id=DIGEST))
    with pytest.raises(BundleError, match="at most 1500 are read"):
        revoke(tmp_path, keys / "Ann", *[entry("key", key_id=DIGEST)] * 5)


# --- a directory that holds lists ---------------------------------------------------------------


def test_a_list_that_does_not_hold_up_refuses_the_directory(trusted_dir, keys, more):
    path = revoke(trusted_dir, more / "0", entry("key", key_id=DIGEST))
    with pytest.raises(SignatureError, match=r"Ann\.revoked\.json': no key of 'Ann' that is here"):
        TrustedOwners.load(trusted_dir)
    path.unlink()
    path = revoke(trusted_dir, keys / "Ann", entry("key", key_id=DIGEST))
    path.rename(trusted_dir / "Bob.revoked.json")
    with pytest.raises(SignatureError, match=r"Bob\.revoked\.json': it is the list of 'Ann'"):
        TrustedOwners.load(trusted_dir)


def test_a_list_stays_in_force_when_its_key_is_rotated_or_revoked(valid, trusted_dir, keys, more):
    ann = entry("key", key_id=id_of(keys / "Ann"))
    rotate(trusted_dir, keys / "Ann", more / "0", DAY)
    revoke(trusted_dir, keys / "Ann", ann)
    with pytest.raises(RevokedError):
        open_bundle(valid, TrustedOwners.load(trusted_dir))


# --- taking newer lists -------------------------------------------------------------------------


def test_a_newer_list_is_taken_and_an_older_one_never(trusted_dir, inbox, keys):
    lists = []
    for digest in (DIGEST, OTHER, DIGEST):
        path = revoke(inbox, keys / "Ann", entry("bundle", bundle_digest=digest))
        lists.append(path.read_bytes())
    held = trusted_dir / "Ann.revoked.json"
    for number, expected, said in (
        (2, 2, "number 2 of Ann was taken, 2 revocations"),
        (1, 2, "passed over, for number 1 of Ann is older than 2"),
        (2, 2, "number 2 of Ann is held already"),
        (3, 3, "number 3 of Ann was taken"),
        (1, 3, "is older than 3"),
    ):
        path.write_bytes(lists[number - 1])
        found = take_lists(trusted_dir, inbox)
        assert said in found.done[0] and not found.refused
        assert held.read_bytes() == lists[expected - 1]
    assert [p.name for p in trusted_dir.iterdir() if p.name.startswith(".")] == []


def refused(trusted_dir, inbox, said, today=None):
    """Check that the inbox's list is refused so, and nothing is changed."""
    before = {p.name: p.read_bytes() for p in trusted_dir.iterdir()}
    found = take_lists(trusted_dir, inbox, today)
    assert not found.done and len(found.refused) == 1 and said in found.refused[0], found
    assert {p.name: p.read_bytes() for p in trusted_dir.iterdir()} == before


def test_two_lists_of_one_number_do_not_follow_each_other(trusted_dir, inbox, keys):
    """Though the second holds all of the first: an owner signs each number once."""
    held = revoke(trusted_dir, keys / "Ann", entry("bundle", bundle_digest=DIGEST))
    made, _ = read_list(held.read_bytes(), "held")
    longer = made.model_copy(update={"revoked": made.revoked * 2})
    data = sign_statement(longer, revocation._PAYLOAD_TYPE, [read_private_key(keys / "Ann")])
    (inbox / "x.revoked.json").write_bytes(data)
    refused(trusted_dir, inbox, "number 1 of Ann does not go on from number 1")


@pytest.mark.parametrize("number", [1, 5])
def test_a_list_that_takes_something_back_is_refused(trusted_dir, inbox, keys, number):
    held = revoke(trusted_dir, keys / "Ann", entry("bundle", bundle_digest=DIGEST))
    made, _ = read_list(held.read_bytes(), "held")
    other = made.revoked[0].model_copy(update={"bundle_digest": OTHER})
    shorter = made.model_copy(update={"number": number, "revoked": (other,)})
    data = sign_statement(shorter, revocation._PAYLOAD_TYPE, [read_private_key(keys / "Ann")])
    (inbox / "x.revoked.json").write_bytes(data)
    refused(trusted_dir, inbox, f"number {number} of Ann does not go on from number 1")


def test_a_key_counts_for_new_lists_on_its_days_alone(trusted_dir, inbox, keys, more):
    rotate(trusted_dir, keys / "Ann", more / "0", days(0))
    revoke(inbox, keys / "Ann", entry("bundle", bundle_digest=DIGEST))
    refused(trusted_dir, inbox, "not signed by a key of theirs that counts today", days(1))
    assert take_lists(trusted_dir, inbox, days(0)).done
    revoke(inbox, more / "0", entry("bundle", bundle_digest=OTHER), signed_by=public(keys / "Ann"))
    refused(trusted_dir, inbox, "not signed by a key of theirs that counts today", days(-1))
    assert "number 2 of Ann was taken" in take_lists(trusted_dir, inbox, days(1)).done[0]


def test_a_revoked_key_cannot_replace_the_list_that_revoked_it(trusted_dir, inbox, keys, more):
    (trusted_dir / "Ann.from-2026-01-01.pub").write_bytes(public(more / "0"))
    held = revoke(trusted_dir, more / "0", entry("key", key_id=id_of(keys / "Ann")))
    made, _ = read_list(held.read_bytes(), "held")
    longer = made.model_copy(update={"number": 2, "revoked": made.revoked * 2})
    thief = read_private_key(keys / "Ann")
    for key, said in ((thief, "signed by a key that number 1 revokes"), (None, "")):
        key = key or read_private_key(more / "0")
        data = sign_statement(longer, revocation._PAYLOAD_TYPE, [key])
        (inbox / "x.revoked.json").write_bytes(data)
        if said:
            refused(trusted_dir, inbox, said)
    assert "number 2 of Ann was taken" in take_lists(trusted_dir, inbox).done[0]


def test_a_key_may_revoke_itself_with_its_last_list(valid, trusted_dir, inbox, keys):
    revoke(inbox, keys / "Ann", entry("key", key_id=id_of(keys / "Ann")))
    assert take_lists(trusted_dir, inbox).done
    with pytest.raises(RevokedError):
        open_bundle(valid, TrustedOwners.load(trusted_dir))


def test_one_bad_list_does_not_keep_out_the_others(trusted_dir, inbox, keys, more):
    good = revoke(inbox, keys / "Ann", entry("bundle", bundle_digest=DIGEST))
    revoke(inbox, more / "0", entry("bundle", bundle_digest=DIGEST), owner="Stranger")
    (inbox / "A.revoked.json").write_bytes(b"{}")
    (inbox / "B.revoked.json").symlink_to(good)
    (inbox / "C.revoked.json").mkdir()
    (inbox / "D.revoked.json").write_bytes(bytes(2 << 20))
    (inbox / "notes.txt").write_text("no list")
    found = take_lists(trusted_dir, inbox)
    assert [line.partition("inbox/")[2][0] for line in found.refused] == list("ABCD")
    assert len(found.done) == 2
    assert any("passed over, for Stranger is not trusted here" in line for line in found.done)
    assert TrustedOwners.load(trusted_dir).list_of("Ann").number == 1


def test_a_source_that_is_no_directory_is_refused(trusted_dir, tmp_path):
    with pytest.raises(SignatureError, match="cannot be read"):
        take_lists(trusted_dir, tmp_path / "none")
    with pytest.raises(SignatureError, match="cannot be read"):
        take_lists(tmp_path / "none", trusted_dir)
    assert not (tmp_path / "none").exists()
