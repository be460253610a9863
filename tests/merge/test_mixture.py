"""A mixture on disk: what adding and removing leave, what loading checks."""

import datetime
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.errors import BundleError, CheckpointError, FlexOlmoError, MergeError, SignatureError
from flexolmo.merge import mixture as room
from flexolmo.merge.index import read_about
from flexolmo.merge.mixture import add_experts, build_mixture, load_mixture, remove_experts
from flexolmo.model.checkpoint import save_anchor
from made_bundles import terms_until
from made_mixtures import IN_SESSION, NAMES, differ_in_router, flip, tree

# --- adding and removing ------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["evidence", "linear", "rich"])
def test_adding_is_building_with_all(house, tmp_path, router):
    model = house.build(["basalt"], tmp_path / "m", router)
    about = add_experts(model, house.bundles(["zinc", "amber"], router), house.trusted)
    assert about == read_about(model)
    assert tree(model) == tree(house.mixture_dir(NAMES, router))


def test_removing_is_building_without(house, tmp_path):
    model = house.build(NAMES, tmp_path / "m", top_k=2)
    remove_experts(model, ["amber", "zinc"], house.trusted)
    found, expected = tree(model), tree(house.mixture_dir(["basalt"], top_k=2))
    about, never = (json.loads(files.pop("mixture.json")) for files in (found, expected))
    assert sorted(about["seen"]) == sorted(NAMES) and list(never["seen"]) == ["basalt"]
    assert about | {"seen": never["seen"]} == never and found == expected
    assert sorted(p.name for p in (model / "experts").iterdir()) == ["basalt.bundle"]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]  # nothing left aside


@given(steps=st.lists(st.sets(st.sampled_from(NAMES), max_size=3), min_size=1, max_size=3))
@IN_SESSION
def test_only_the_final_set_of_owners_matters(house, tmp_path_factory, steps):
    """Any way of adding and removing ends where building would have."""
    model = tmp_path_factory.mktemp("walk") / "m"
    build_mixture(house.anchor_dir, [], model, house.trusted)
    held = set()
    for wanted in steps:
        if held - wanted:
            remove_experts(model, held - wanted, house.trusted)
        if wanted - held:
            add_experts(model, house.bundles(sorted(wanted - held)), house.trusted)
        held = wanted
    found, expected = tree(model), tree(house.mixture_dir(sorted(held)))
    about, never = (json.loads(files.pop("mixture.json")) for files in (found, expected))
    assert set(about["seen"]) == held.union(*steps)
    assert about | {"seen": never["seen"]} == never and found == expected


def test_adding_to_a_mixture_of_no_owner_is_building_byte_for_byte(house, tmp_path):
    build_mixture(house.anchor_dir, [], tmp_path / "m", house.trusted)
    add_experts(tmp_path / "m", house.bundles(["amber"]), house.trusted)
    assert tree(tmp_path / "m") == tree(house.mixture_dir(["amber"]))


def test_adding_checks_as_building_does(house, tmp_path):
    model = house.build(["amber"], tmp_path / "m")
    before = tree(model)
    other = differ_in_router(
        house, tmp_path, "basalt", "evidence", anchor_digest="sha256:" + "7" * 64
    )
    for bundles, trusted, error in (
        ([house.bundle("zinc")], None, SignatureError),
        ([house.bundle("zinc", "linear")], house.trusted, MergeError),
        ([other], house.trusted, MergeError),
        ([house.bundle("zinc"), house.bundle("zinc")], house.trusted, MergeError),
    ):
        with pytest.raises(error):
            add_experts(model, bundles, trusted)
    assert tree(model) == before


def test_adding_to_a_mixture_that_was_changed_is_refused(house, tmp_path):
    model = house.build(["amber"], tmp_path / "m")
    flip(model / "experts/amber.bundle/expert.safetensors", 0.9, 4)
    with pytest.raises(SignatureError, match=r"amber\.bundle.*\n.*expert\.safetensors: found"):
        add_experts(model, house.bundles(["zinc"]), house.trusted)
    with pytest.raises(SignatureError, match=r"amber\.bundle"):
        model2 = house.build(["amber", "zinc"], tmp_path / "m2")
        flip(model2 / "experts/amber.bundle/expert.safetensors", 0.9, 4)
        remove_experts(model2, ["zinc"], house.trusted)


def test_removing_what_is_not_there_is_refused(house, tmp_path):
    model = house.build(["amber"], tmp_path / "m")
    with pytest.raises(MergeError, match=r"No expert nickel, zinc here: the mixture holds amber"):
        remove_experts(model, ["zinc", "amber", "nickel"], house.trusted)
    assert load_mixture(model, house.trusted).expert_names == ["amber"]


@pytest.mark.parametrize("change", ["add", "remove"])
def test_a_replaced_anchor_cannot_be_made_the_mixtures_own(house, make_wild, tmp_path, change):
    model = house.build(["amber", "zinc"], tmp_path / "m")
    other = make_wild(rope_theta=10_000.0).anchor
    shutil.rmtree(model / "anchor")
    save_anchor(other, model / "anchor")
    with pytest.raises(MergeError, match="the mixture was built"):
        load_mixture(model, house.trusted)
    with pytest.raises(FlexOlmoError):
        if change == "remove":
            remove_experts(model, ["zinc"], house.trusted)
        else:
            add_experts(model, [], house.trusted)
    with pytest.raises(MergeError, match="the mixture was built"):
        load_mixture(model, house.trusted)


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("how", ["exception", "kill"])
def test_a_stop_while_writing_leaves_the_old_mixture_whole(house, tmp_path, monkeypatch, how, call):
    """Stopped while the anchor (1) or a bundle (2, 3) is put in place."""
    model = house.build(["amber"], tmp_path / "m")
    before, calls = tree(model), []
    originals = {name: getattr(room, name) for name in ("place_files", "link_or_copy")}

    def stopping(original):
        def stop(source, target, *arguments):
            calls.append(target)
            if len(calls) == call:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt
            return original(source, target, *arguments)

        return stop

    bundles = house.bundles(["zinc"])
    if how == "exception":
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            for name, original in originals.items():
                patch.setattr(room, name, stopping(original))
            add_experts(model, bundles, house.trusted)
        assert [p.name for p in tmp_path.iterdir()] == ["m"]
    else:
        child = os.fork()
        if child == 0:
            try:
                for name, original in originals.items():
                    setattr(room, name, stopping(original))
                add_experts(model, bundles, house.trusted)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert tree(model) == before
    add_experts(model, bundles, house.trusted)
    assert tree(model) == tree(house.mixture_dir(["amber", "zinc"]))


# --- loading ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def breakable(house, tmp_path_factory):
    """A mixture that tests change and mend."""
    return house.build(["amber", "zinc"], tmp_path_factory.mktemp("breakable") / "m")


@given(
    name=st.sampled_from(["amber", "zinc"]),
    place=st.floats(0, 1),
    change=st.integers(1, 255),
    file=st.sampled_from(["expert.safetensors", "manifest.json", "signer.pub", "signature.sig"]),
)
@settings(IN_SESSION, max_examples=40)
def test_a_flipped_byte_in_any_file_of_a_bundle_is_refused_by_name(
    house, breakable, name, file, place, change
):
    path = breakable / "experts" / f"{name}.bundle" / file
    old = flip(path, place, change)
    try:
        with pytest.raises((MergeError, SignatureError)) as caught:
            load_mixture(breakable, house.trusted)
        assert f"{name}.bundle" in str(caught.value)
        assert f"{file}: " in str(caught.value)
        assert load_mixture(
            breakable, house.trusted, experts={"amber", "zinc"} - {name}
        ).expert_names
    finally:
        path.write_bytes(old)


@given(
    place=st.floats(0, 1),
    change=st.integers(1, 255),
    file=st.sampled_from(
        [
            "model.safetensors",
            "public.safetensors",
            "tokenizer.json",
            "config.json",
            "anchor.json",
            "tokenizer_config.json",
        ]
    ),
)
@settings(IN_SESSION, max_examples=60)
def test_a_flipped_byte_in_the_anchor_is_refused_or_changes_nothing_that_is_used(
    breakable, house, file, place, change
):
    """Some bytes mean nothing to us: a file's metadata, the record, how text may be padded."""
    path = breakable / "anchor" / file
    old = flip(path, place, change)
    try:
        loaded = load_mixture(breakable, house.trusted)
    except FlexOlmoError as e:
        assert str(breakable / "anchor") in str(e)
    else:
        whole = house.mixture(["amber", "zinc"])
        assert loaded.tokenizer.digest == whole.tokenizer.digest
        ours, theirs = (m.model.config.model_dump(exclude={"max_seq_len"}) for m in (loaded, whole))
        assert ours == theirs
        theirs = whole.model.state_dict()
        assert all(torch.equal(t, theirs[n]) for n, t in loaded.model.state_dict().items())
    finally:
        path.write_bytes(old)


@pytest.mark.parametrize("file", ["model.safetensors", "public.safetensors"])
@given(place=st.floats(0.3, 1), change=st.integers(1, 255))
@settings(IN_SESSION, max_examples=10)
def test_a_flipped_byte_in_the_anchors_tensors_is_refused(house, breakable, file, place, change):
    path = breakable / "anchor" / file
    old = flip(path, place, change)
    try:
        with pytest.raises(CheckpointError, match="was changed: its content has digest"):
            load_mixture(breakable, house.trusted)
    finally:
        path.write_bytes(old)


@pytest.mark.parametrize("router", ["evidence", "linear", "rich"])
@pytest.mark.parametrize("chosen", [(), ("basalt",), ("amber", "zinc"), NAMES])
def test_loading_some_experts_is_having_built_without_the_others(house, router, chosen):
    some = load_mixture(house.mixture_dir(NAMES, router), house.trusted, experts=chosen)
    built = house.mixture(chosen, router)
    assert some.expert_names == built.expert_names == sorted(chosen)
    ids = house.wild.ids(2, 12)
    assert torch.equal(some.model(ids), built.model(ids))
    whole = house.mixture(NAMES, router).model
    masked = whole(ids, active=whole.expert_mask([chosen, chosen]))
    assert torch.equal(some.model(ids), masked)


def test_loading_an_unknown_expert_is_refused(house):
    with pytest.raises(MergeError, match=r"No expert nickel here: the mixture holds amber, bas"):
        load_mixture(house.mixture_dir(NAMES), house.trusted, experts=["amber", "nickel"])


def test_a_bundle_that_is_gone_is_missed_by_name(house, tmp_path):
    model = house.build(["amber", "zinc"], tmp_path / "m")
    (model / "experts/zinc.bundle/manifest.json").unlink()
    with pytest.raises(BundleError, match=r"zinc\.bundle.*\n.*missing: manifest\.json"):
        load_mixture(model, house.trusted)
    shutil.rmtree(model / "experts/zinc.bundle")
    with pytest.raises(BundleError, match=r"zinc\.bundle"):
        load_mixture(model, house.trusted)


def test_bundles_swapped_for_each_other_are_refused(house, tmp_path):
    """Each is whole and well signed, and in the wrong place."""
    model = house.build(["amber", "zinc"], tmp_path / "m")
    experts = model / "experts"
    (experts / "amber.bundle").rename(tmp_path / "a")
    (experts / "zinc.bundle").rename(experts / "amber.bundle")
    (tmp_path / "a").rename(experts / "zinc.bundle")
    with pytest.raises(BundleError, match=r"amber\.bundle.*\n.*expected .* as verified before"):
        load_mixture(model, house.trusted)


def test_an_expert_is_loaded_on_the_days_of_its_terms_alone(house, tmp_path, monkeypatch):
    last = datetime.date(2031, 5, 1)
    terms = terms_until(last).model_copy(update={"valid_from": datetime.date(2026, 1, 1)})
    bundle = differ_in_router(house, tmp_path, "amber", "evidence", terms=terms)
    build_mixture(house.anchor_dir, [bundle, house.bundle("zinc")], tmp_path / "m", house.trusted)

    def on(*moment):
        now = datetime.datetime(*moment, tzinfo=datetime.UTC)
        fake = SimpleNamespace(
            UTC=datetime.UTC, date=datetime.date, datetime=SimpleNamespace(now=now.astimezone)
        )
        monkeypatch.setattr(room, "datetime", fake)
        return tmp_path / "m"

    with pytest.raises(MergeError, match="amber: the owner's terms begin on 2026-01-01"):
        load_mixture(on(2025, 12, 31, 23, 59), house.trusted)
    assert load_mixture(on(2031, 5, 1, 23, 59), house.trusted).expert_names == ["amber", "zinc"]
    with pytest.raises(
        MergeError, match=r"amber: the owner's terms expired on 2031-05-01"
    ) as caught:
        load_mixture(on(2031, 5, 2), house.trusted)
    assert "zinc" not in str(caught.value) and "mix remove" in str(caught.value)
    assert load_mixture(on(2031, 5, 2), house.trusted, experts=["zinc"]).expert_names == ["zinc"]
    remove_experts(tmp_path / "m", ["amber"], house.trusted)
    assert load_mixture(on(2031, 5, 2), house.trusted).expert_names == ["zinc"]


@pytest.mark.parametrize("change", [{"format": "x"}, {"format_version": 1}, {"format_version": 3}])
def test_a_mixture_of_another_format_is_refused(house, tmp_path, change):
    model = house.build(["amber"], tmp_path / "m")
    about = json.loads((model / "mixture.json").read_text())
    (model / "mixture.json").write_text(json.dumps(about | change))
    with pytest.raises(MergeError, match="expected 'flexolmo-mixture' version 4"):
        load_mixture(model, house.trusted)


def test_a_mixture_of_the_format_before_is_built_again_elsewhere(house, tmp_path):
    old = house.build(["amber"], tmp_path / "old")
    about = json.loads((old / "mixture.json").read_text())
    (old / "mixture.json").write_text(json.dumps(about | {"format_version": 3}))
    bundles = [old / "experts" / "amber.bundle"]
    with pytest.raises(MergeError, match="Build it again, in another place"):
        build_mixture(old / "anchor", bundles, old, house.trusted)
    build_mixture(old / "anchor", bundles, tmp_path / "new", house.trusted)
    assert tree(tmp_path / "new") == tree(house.mixture_dir(["amber"]))


@pytest.mark.parametrize("text", ["", "{", "\x00", "[]"])
def test_a_mixture_json_that_is_none_is_refused(house, tmp_path, text):
    model = house.build(["amber"], tmp_path / "m")
    (model / "mixture.json").write_text(text)
    with pytest.raises(MergeError, match=r"mixture\.json"):
        load_mixture(model, house.trusted)


def test_a_directory_without_a_mixture_is_named(house, tmp_path):
    with pytest.raises(MergeError, match=r"mixture\.json"):
        load_mixture(tmp_path, house.trusted)
