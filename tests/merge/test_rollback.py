"""No older bundle comes back, whoever signed it, and what is revoked is taken out."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.bundle.facts import ExpertFacts
from flexolmo.bundle.terms import make_terms
from flexolmo.bundle.trust import ANY_SIGNER, TrustedOwners
from flexolmo.errors import MergeError, RevokedError, SignatureError
from flexolmo.files import canonical_json
from flexolmo.merge.index import read_about
from flexolmo.merge.mixture import (
    add_experts,
    build_mixture,
    load_mixture,
    remove_experts,
    remove_revoked,
)
from flexolmo.merge.rollback import find_rollback, join_seen, seen_of
from made_bundles import TERMS, sign_as
from made_mixtures import differ_in_router, tree
from made_owners import entry, revoke

facts = st.builds(
    ExpertFacts,
    owner=st.sampled_from(["Ann", "Bob"]),
    key_id=st.just("k"),
    bundle_digest=st.sampled_from(["sha256:a", "sha256:b"]),
    serial=st.integers(0, 3),
    licence=st.just("MIT"),
    terms=st.just(TERMS),
)
arrivals = st.lists(st.tuples(st.sampled_from(["maths", "news"]), facts), max_size=8)


@pytest.fixture(scope="module")
def versions(house, tmp_path_factory):
    """Bundles of amber by serial, and another with serial 2."""
    here = tmp_path_factory.mktemp("versions")
    made = [("1", 1), ("2", 2), ("2b", 2), ("3", 3)]
    return {
        label: differ_in_router(
            house, here / label, "amber", "evidence", serial=serial, tokens_seen=i
        )
        for i, (label, serial) in enumerate(made)
    }


# --- the record ---------------------------------------------------------------------------------


@given(arrivals, st.tuples(st.sampled_from(["maths", "news"]), facts))
def test_only_a_higher_serial_or_the_same_bundle_goes_in(seen, new):
    record = {}
    for name, found in seen:
        if not find_rollback(record, name, found):
            record = join_seen(record, seen_of(name, found))
    name, found = new
    before = [f for n, f in seen if n == name and f.owner == found.owner]
    highest = max((f.serial for f in before), default=-1)
    first = next((f for f in before if f.serial == highest), None)
    is_new = found.serial > highest
    is_same = found.serial == highest and found.bundle_digest == first.bundle_digest
    assert (not find_rollback(record, name, found)) == (is_new or is_same)


@given(arrivals, arrivals)
def test_records_joined_hold_the_highest_of_each(first, second):
    records = [join_seen(*(seen_of(n, f) for n, f in part)) for part in (first, second)]
    joined = join_seen(*records)
    assert join_seen(joined, *records) == joined
    assert list(joined) == sorted(joined)
    for name, found in first + second:
        assert joined[name][found.owner]["serial"] >= found.serial
    assert {(n, o) for n in joined for o in joined[n]} == {(n, f.owner) for n, f in first + second}


# --- mixtures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["add", "build over"])
def test_an_older_or_a_twin_bundle_of_a_removed_owner_does_not_come_back(
    house, versions, tmp_path, how
):
    model = tmp_path / "m"

    def put(label):
        if how == "add":
            return add_experts(model, [versions[label]], house.trusted)
        return build_mixture(house.anchor_dir, [versions[label]], model, house.trusted)

    build_mixture(house.anchor_dir, [versions["2"]], model, house.trusted)
    remove_experts(model, ["amber"], house.trusted)
    add_experts(model, house.bundles(["zinc"]), house.trusted)  # the record outlives other changes
    before = tree(model)
    for label, serial in (("1", 1), ("2b", 2)):
        said = rf"amber: serial {serial} of Ann, whose serial 2 was seen before .*--serial 3 or"
        with pytest.raises(MergeError, match=said):
            put(label)
    assert tree(model) == before
    put("2")
    remove_experts(model, ["amber"], house.trusted)
    assert put("3")["seen"]["amber"]["Ann"]["serial"] == 3


def in_version_3(bundle, path, key):
    """The bundle as it would have been signed in format version 3."""
    claims = json.loads((bundle / "manifest.json").read_bytes())
    del claims["serial"]
    claims |= {"format_version": 3, "terms": {"text": "Old terms.", "expires": None}}
    weights = (bundle / "expert.safetensors").read_bytes()
    return sign_as(path, canonical_json(claims), weights, key, subject="amber.bundle")


def test_a_bundle_of_format_version_3_is_merged_and_replaces_nothing(house, versions, tmp_path):
    old, other = (
        in_version_3(versions[label], tmp_path / label, house.keys["Ann"]) for label in ("1", "2")
    )
    model = tmp_path / "m"
    build_mixture(house.anchor_dir, [old], model, house.trusted)
    found = load_mixture(model, house.trusted).facts["amber"]
    assert (found.serial, found.terms) == (0, make_terms("Old terms.", ["any"]))
    remove_experts(model, ["amber"], house.trusted)
    with pytest.raises(MergeError, match="amber: serial 0 of Ann, whose serial 0 was seen before"):
        add_experts(model, [other], house.trusted)
    add_experts(model, [versions["1"]], house.trusted)
    remove_experts(model, ["amber"], house.trusted)
    with pytest.raises(MergeError, match="amber: serial 0 of Ann, whose serial 1 was seen before"):
        add_experts(model, [old], house.trusted)


def test_another_owner_may_take_a_name_and_the_first_is_remembered(house, versions, tmp_path):
    model = tmp_path / "m"
    build_mixture(house.anchor_dir, [versions["2"]], model, house.trusted)
    remove_experts(model, ["amber"], house.trusted)
    bobs = differ_in_router(
        house, tmp_path, "amber", "evidence", owner="Bob", key=house.keys["Bob"]
    )
    about = add_experts(model, [bobs], house.trusted)
    assert {o: x["serial"] for o, x in about["seen"]["amber"].items()} == {"Ann": 2, "Bob": 1}
    remove_experts(model, ["amber"], house.trusted)
    with pytest.raises(MergeError, match="serial 1 of Ann"):
        add_experts(model, [versions["1"]], house.trusted)


def test_a_model_is_not_loaded_again_with_an_older_expert(house, versions, tmp_path):
    """Though all of it was put back, mixture.json too, by somebody who can write there."""
    model = tmp_path / "m"
    for label in ("1", "3"):
        build_mixture(house.anchor_dir, [versions[label]], tmp_path / label, house.trusted)
    shutil.copytree(tmp_path / "3", model)
    loaded = load_mixture(model, house.trusted)
    assert load_mixture(model, house.trusted, seen=loaded.seen).seen == loaded.seen
    shutil.rmtree(model)
    build_mixture(house.anchor_dir, house.bundles(["zinc"]), model, house.trusted)
    loaded = load_mixture(model, house.trusted, seen=loaded.seen)  # amber is not in it
    assert sorted(loaded.seen) == ["amber", "zinc"]
    shutil.rmtree(model)
    shutil.copytree(tmp_path / "1", model)
    with pytest.raises(MergeError, match="amber: serial 1 of Ann, whose serial 3"):
        load_mixture(model, house.trusted, seen=loaded.seen)
    assert load_mixture(model, house.trusted).expert_names == ["amber"]


def test_a_mixture_whose_record_is_above_its_bundle_is_refused(house, versions, tmp_path):
    model = tmp_path / "m"
    build_mixture(house.anchor_dir, [versions["1"]], model, house.trusted)
    about = read_about(model)
    about["seen"]["amber"]["Ann"]["serial"] = 2
    (model / "mixture.json").write_text(json.dumps(about))
    with pytest.raises(MergeError, match="amber: serial 1 of Ann, whose serial 2"):
        load_mixture(model, house.trusted)


def test_a_loaded_mixture_says_who_decides_on_each_expert(house, versions, tmp_path):
    build_mixture(house.anchor_dir, [versions["3"]], tmp_path / "m", house.trusted)
    loaded = load_mixture(tmp_path / "m", house.trusted)
    entry = read_about(tmp_path / "m")["experts"]["amber"]
    assert loaded.facts["amber"] == ExpertFacts(
        owner="Ann",
        key_id=entry["key_id"],
        bundle_digest=entry["files"]["manifest.json"],
        serial=3,
        licence="MIT",
        terms=TERMS,
    )
    assert loaded.terms == {"amber": TERMS}


# --- revocation ---------------------------------------------------------------------------------


def test_what_is_revoked_is_not_loaded_added_or_built_and_is_removed(
    house, trust_dir, versions, tmp_path
):
    trusted = shutil.copytree(trust_dir, tmp_path / "trusted")
    model = tmp_path / "m"
    bundles = [versions["2"], *house.bundles(["zinc"])]
    build_mixture(house.anchor_dir, bundles, model, TrustedOwners.load(trusted))
    revoke(trusted, house.keys["Ann"], entry("expert", name="amber", up_to_serial=2))
    now = TrustedOwners.load(trusted)
    for attempt in (
        lambda: load_mixture(model, now),
        lambda: load_mixture(model, now, ["amber"]),
        lambda: add_experts(model, [], now),
        lambda: build_mixture(house.anchor_dir, bundles, tmp_path / "new", now),
    ):
        with pytest.raises(RevokedError, match="amber of 'Ann', serial 2, was revoked by its ow"):
            attempt()
    assert load_mixture(model, now, ["zinc"]).expert_names == ["zinc"]
    gone = remove_revoked(model, now)
    assert list(gone) == ["amber"] and "A patient objected" in gone["amber"]
    assert load_mixture(model, now).expert_names == ["zinc"]
    assert remove_revoked(model, now) == {}
    add_experts(model, [versions["3"]], now)
    assert load_mixture(model, now).expert_names == ["amber", "zinc"]


def test_an_untrusted_signer_is_no_revocation(house, tmp_path):
    model = house.build(["amber"], tmp_path / "m")
    with pytest.raises(SignatureError, match="unknown key"):
        remove_revoked(model, TrustedOwners.from_keys({}))
    assert remove_revoked(model, ANY_SIGNER) == {}
