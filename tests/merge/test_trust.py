"""Whom a mixture lets speak, and what nobody can put into it unnoticed."""

import builtins
import datetime
import io
import json
import os
import shutil
import threading
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexolmo.bundle import bundle as bundle_room
from flexolmo.bundle import verified
from flexolmo.bundle.bundle import MAX_FILE_BYTES, open_bundle
from flexolmo.bundle.signing import create_key, read_private_key
from flexolmo.bundle.trust import ANY_SIGNER, TrustedOwners
from flexolmo.errors import BundleError, CheckpointError, MergeError, PolicyError, SignatureError
from flexolmo.evaluation.scorer import Scorer
from flexolmo.inference import policy
from flexolmo.inference.generate import Sampling, generate
from flexolmo.inference.reader import open_reader
from flexolmo.merge import checks
from flexolmo.merge import mixture as room
from flexolmo.merge.index import read_about
from flexolmo.merge.mixture import add_experts, build_mixture, load_mixture, remove_experts
from flexolmo.model.checkpoint import check_anchor, load_anchor, sign_anchor
from flexolmo.model.statistics import UNTOLD, EvidenceSettings
from made_bundles import terms_until
from made_mixtures import NAMES, differ_in_router


def only(house, owner):
    """A trust store without the others."""
    return TrustedOwners.from_keys(
        {owner: house.keys[owner].with_name(f"{owner}.pub").read_bytes()}
    )


def edit(model, change):
    about = json.loads((model / "mixture.json").read_text())
    change(about)
    (model / "mixture.json").write_text(json.dumps(about))


def on(monkeypatch, module, *moment):
    """Let `module` take the moment for now."""
    now = datetime.datetime(*moment, tzinfo=datetime.UTC)
    fake = SimpleNamespace(
        UTC=datetime.UTC, date=datetime.date, datetime=SimpleNamespace(now=now.astimezone)
    )
    monkeypatch.setattr(module, "datetime", fake)


# --- signers ------------------------------------------------------------------------------------


def test_a_strangers_bundle_in_an_owners_place_is_refused(house, tmp_path):
    """mixture.json is brought in line, so that only the trust store can tell."""
    model = house.build(["amber", "zinc"], tmp_path / "m")
    create_key(tmp_path / "mallory")
    theirs = differ_in_router(
        house, tmp_path, "amber", "evidence", owner="Mallory", key=tmp_path / "mallory"
    )
    shutil.rmtree(model / "experts/amber.bundle")
    shutil.copytree(theirs, model / "experts/amber.bundle")
    forged = room._describe_expert(open_bundle(theirs, ANY_SIGNER, True))
    edit(model, lambda about: about["experts"].update(amber=forged))
    assert load_mixture(model, ANY_SIGNER).expert_names == ["amber", "zinc"]
    for change in (
        lambda: load_mixture(model, house.trusted),
        lambda: add_experts(model, house.bundles(["basalt"]), house.trusted),
        lambda: remove_experts(model, ["zinc"], house.trusted),
    ):
        with pytest.raises(SignatureError, match=r"amber\.bundle was refused.*unknown key"):
            change()


def test_a_key_taken_out_of_the_store_is_asked_for_at_every_load_and_change(house, tmp_path):
    model = house.build(["amber", "zinc"], tmp_path / "m")
    ann = only(house, "Ann")
    with pytest.raises(SignatureError, match=r"zinc\.bundle was refused"):
        load_mixture(model, ann)
    assert load_mixture(model, ann, experts=["amber"]).expert_names == ["amber"]
    with pytest.raises(SignatureError, match=r"zinc\.bundle was refused"):
        add_experts(model, house.bundles(["basalt"]), ann)
    remove_experts(model, ["zinc"], ann)
    add_experts(model, house.bundles(["basalt"]), ann)
    assert load_mixture(model, ann).expert_names == ["amber", "basalt"]
    for call in (load_mixture, lambda m, t: remove_experts(m, ["amber"], t)):
        with pytest.raises(SignatureError, match="Nobody was said to be trusted"):
            call(model, None)


# --- mixture.json -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "claim", ["owner", "licence", "terms", "created", "tokens_seen", "key_id", "more"]
)
def test_what_mixture_json_says_of_an_expert_must_be_what_its_owner_signed(house, tmp_path, claim):
    model = house.build(["amber", "zinc"], tmp_path / "m")
    edit(model, lambda about: about["experts"]["amber"].update({claim: "other"}))
    with pytest.raises(MergeError, match=rf"{claim}: found .*mixture\.json says 'other'"):
        load_mixture(model, house.trusted)
    with pytest.raises(MergeError, match=rf"{claim}: found .*mixture\.json says 'other'"):
        remove_experts(model, ["zinc"], house.trusted)


@pytest.mark.parametrize("value", [0, -1, "x", "2", [2], {}, True, 1.5])
def test_top_k_is_a_number_of_experts_or_nothing(house, tmp_path, value):
    model = house.build(["amber"], tmp_path / "m")
    edit(model, lambda about: about.update(top_k=value))
    with pytest.raises(MergeError, match=r"mixture\.json does not describe a mixture:\n  top_k: "):
        load_mixture(model, house.trusted)


@pytest.mark.parametrize(
    "change",
    [
        {"router": []},
        {"router": {"kind": "other"}},
        {"experts": []},
        {"experts": {"amber": 1}},
        {"experts": {"../x": {"files": {}}}},
        {"anchor_digest": 3},
        {"seen": {"amber": {"Ann": {}}}},
        {"extra": 1},
    ],
)
def test_a_malformed_mixture_json_is_refused_by_field(house, tmp_path, change):
    model = house.build(["amber"], tmp_path / "m")
    edit(model, lambda about: about.update(change))
    with pytest.raises(MergeError, match=rf"does not describe a mixture:\n  {next(iter(change))}"):
        load_mixture(model, house.trusted)


def test_a_directory_that_is_both_an_anchor_and_a_mixture_is_refused(house, tmp_path):
    model = house.build(["amber"], tmp_path / "m")
    for file in (model / "anchor").iterdir():
        shutil.copy(file, model)
    with pytest.raises(MergeError, match=r"both mixture\.json and anchor\.json"):
        load_mixture(model, house.trusted)
    with pytest.raises(CheckpointError, match="it is a mixture"):
        load_anchor(model)


# --- time ---------------------------------------------------------------------------------------


def test_expiry_is_asked_at_every_request(house, tmp_path, monkeypatch):
    bundle = differ_in_router(
        house, tmp_path, "amber", "evidence", terms=terms_until(datetime.date(2031, 5, 1))
    )
    build_mixture(house.anchor_dir, [bundle, house.bundle("zinc")], tmp_path / "m", house.trusted)
    loaded = load_mixture(tmp_path / "m", house.trusted)
    few = Sampling(max_new_tokens=1)
    on(monkeypatch, policy, 2031, 5, 1, 23, 59)
    assert generate(loaded, ["x"], sampling=few)
    on(monkeypatch, policy, 2031, 5, 2)
    with pytest.raises(PolicyError, match="amber: the owner's terms expired on 2031-05-01"):
        generate(loaded, ["x"], sampling=few)
    assert generate(loaded, ["x"], without=["amber"], sampling=few)


def test_nothing_is_added_beside_an_owner_whose_terms_expired(house, tmp_path, monkeypatch):
    bundle = differ_in_router(
        house, tmp_path, "amber", "evidence", terms=terms_until(datetime.date(2031, 5, 1))
    )
    build_mixture(house.anchor_dir, [bundle], tmp_path / "m", house.trusted)
    on(monkeypatch, room, 2031, 5, 2)
    with pytest.raises(MergeError, match="amber: the owner's terms expired on 2031-05-01"):
        add_experts(tmp_path / "m", house.bundles(["zinc"]), house.trusted)
    remove_experts(tmp_path / "m", ["amber"], house.trusted)
    add_experts(tmp_path / "m", house.bundles(["zinc"]), house.trusted)


def test_removing_through_a_link_leaves_no_second_copy(house, tmp_path):
    model = house.build(["amber", "zinc"], tmp_path / "real" / "m")
    (tmp_path / "link").symlink_to(model)
    remove_experts(tmp_path / "link", ["amber"], house.trusted)
    assert (tmp_path / "link").is_symlink()
    assert [p.name for p in (model / "experts").iterdir()] == ["zinc.bundle"]
    assert load_mixture(model, house.trusted).expert_names == ["zinc"]


def test_a_removed_owner_does_not_come_back_with_an_add_that_began_before(
    house, tmp_path, monkeypatch
):
    model, place, removals = house.build(["amber"], tmp_path / "m"), room.place_files, []

    def place_late(*arguments):
        if not removals:
            removals.append(
                threading.Thread(target=remove_experts, args=(model, ["amber"], house.trusted))
            )
            removals[0].start()
            removals[0].join(0.5)  # without a lock it is done by then
        place(*arguments)

    monkeypatch.setattr(room, "place_files", place_late)
    add_experts(model, house.bundles(["zinc"]), house.trusted)
    removals[0].join()
    assert sorted(read_about(model)["experts"]) == ["zinc"]


def test_expiry_is_asked_during_a_long_evaluation(house, tmp_path, monkeypatch):
    """At each text that a reader opened before begins."""
    bundle = differ_in_router(
        house, tmp_path, "amber", "evidence", terms=terms_until(datetime.date(2031, 5, 1))
    )
    build_mixture(house.anchor_dir, [bundle, house.bundle("zinc")], tmp_path / "m", house.trusted)
    reader, _ = open_reader(tmp_path / "m", house.trusted)
    without, _ = open_reader(tmp_path / "m", house.trusted, without=["amber"])
    texts = [((1, 2), (3, 4))]
    on(monkeypatch, policy, 2031, 5, 1, 23, 59)
    assert Scorer(reader).score_ids(texts)
    on(monkeypatch, policy, 2031, 5, 2)
    with pytest.raises(PolicyError, match="amber: the owner's terms expired on 2031-05-01"):
        Scorer(reader).score_ids(texts)
    assert Scorer(without).score_ids(texts)


def test_a_directory_that_cannot_be_locked_is_told(house, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(room, "lock_directory", lambda path, wait: nullcontext(False))
    house.build(["amber"], tmp_path / "m")
    assert f"{tmp_path} cannot be locked" in capsys.readouterr().err


# --- what an expert holds -----------------------------------------------------------------------


def test_equal_weights_under_two_names_are_refused(house, tmp_path):
    """Even one equal matrix, and whoever signed: with one name off the other would still speak."""
    tensors = house.tensors("amber", "evidence")
    key = next(k for k in tensors if k.endswith("down_proj.weight"))
    copy = house.write(tmp_path, "zinc", tensors, "evidence")
    part = house.write(
        tmp_path, "basalt", house.tensors("basalt", "evidence") | {key: tensors[key]}, "evidence"
    )
    for bundle, name in ((copy, "zinc"), (part, "basalt")):
        with pytest.raises(MergeError, match=rf"amber, {name}: equal tensors \(.*layers\.0"):
            build_mixture(
                house.anchor_dir, [house.bundle("amber"), bundle], tmp_path / "m", house.trusted
            )


def test_two_owners_may_leave_the_same_matrix_as_it_was(house, tmp_path):
    key = "layers.0.q_proj.lora_b"
    bundles = []
    for name in ("amber", "zinc"):
        tensors = house.tensors(name, "rich")
        tensors[key] = torch.zeros_like(tensors[key])
        bundles.append(house.write(tmp_path, name, tensors, "rich"))
    build_mixture(house.anchor_dir, bundles, tmp_path / "m", house.trusted)


@pytest.mark.parametrize("router", ["evidence", "linear"])
@pytest.mark.parametrize("key", ["layers.1.gate_proj.weight", "layers.0.down_proj.weight"])
def test_weights_out_of_range_are_refused_by_name(house, tmp_path, router, key):
    tensors = house.tensors("amber", router)
    tensors[key] = tensors[key].clone()
    tensors[key][0, 0] = 3e38
    bundle = house.write(tmp_path, "amber", tensors, router)
    with pytest.raises(MergeError, match=rf"amber: {key} holds numbers of 3e\+38, expected at mo"):
        build_mixture(house.anchor_dir, [bundle], tmp_path / "m", house.trusted)


def test_an_expert_that_could_give_no_finite_number_is_refused(house, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "MAX_WEIGHT", float("inf"))
    tensors = house.tensors("amber", "evidence")
    tensors["layers.1.down_proj.weight"] = torch.full_like(
        tensors["layers.1.down_proj.weight"], 3e38
    )
    bundles = [house.write(tmp_path, "amber", tensors, "evidence"), house.bundle("zinc")]
    with pytest.raises(MergeError, match=r"\n  amber: numbers so large that a text might give"):
        build_mixture(house.anchor_dir, bundles, tmp_path / "m", house.trusted)


@pytest.mark.parametrize("is_known", [True, False])
def test_experts_that_could_give_no_finite_number_together_are_refused(
    house, tmp_path, monkeypatch, is_known
):
    """Each alone gives none above 1e37: the one reads large numbers, the other makes them."""
    monkeypatch.setenv("FLEXOLMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(verified, "SMALLEST_BYTES", 1 if is_known else 1 << 40)
    bundles = [house.bundle("zinc", "rich")]
    for name, parts in (("amber", ["embed_tokens."]), ("basalt", ["gate", "up", "down"])):
        tensors = {
            n: t * (9000 / t.abs().max()) if "lora" in n and any(p in n for p in parts) else t
            for n, t in house.tensors(name, "rich").items()
        }
        bundles.append(house.write(tmp_path, name, tensors, "rich"))
    zinc, amber, basalt = bundles
    model = tmp_path / "m"
    for pair in ([zinc, basalt], [zinc, amber]):
        build_mixture(house.anchor_dir, pair, model, house.trusted)
    refused = pytest.raises(MergeError, match=r"\n  amber, basalt: numbers so large that a text mi")
    read = []
    real = bundle_room._read_weights
    monkeypatch.setattr(
        bundle_room, "_read_weights", lambda *a: read.append(a[1].subject) or real(*a)
    )
    with refused:
        add_experts(model, [basalt], house.trusted)
    assert ("amber.bundle" in read) != is_known
    with refused:
        build_mixture(house.anchor_dir, bundles, tmp_path / "n", house.trusted)
    assert load_mixture(model, house.trusted).expert_names == ["amber", "zinc"]


def test_an_expert_whose_largest_numbers_nobody_knows_is_not_taken_for_a_safe_one(house):
    found = open_bundle(house.bundle("amber"), house.trusted)
    assert checks.find_unstable(house.anchor, [found]) == []
    for largest in (None, {}):
        assert checks.find_unstable(house.anchor, [replace(found, largest=largest)])


def test_a_router_table_that_is_none_is_refused_by_name(house, tmp_path):
    good = house.tensors("amber", "evidence")
    tokens, pairs = good["router.token_levels"], good["router.bigram_levels"]
    zeros = {"router.token_levels": 0 * tokens, "router.bigram_levels": 0 * pairs}
    untold = tokens.clone()
    untold[good["router.bigram_keys"][0] % len(tokens)] = UNTOLD
    for number, (change, said) in enumerate(
        (
            ({"router.token_levels": torch.full_like(tokens, 20)}, "amber: router table: token pr"),
            ({"router.token_levels": torch.full_like(tokens, 127)}, "a level of 127 from 0"),
            ({"router.bigram_levels": pairs + 30}, r"probabilities after token \d+ sum to"),
            ({"router.token_levels": untold}, "but not of both tokens alone"),
            (zeros, "says what public's does"),
        )
    ):
        bundle = house.write(tmp_path / str(number), "amber", good | change, "evidence")
        with pytest.raises(MergeError, match=said):
            build_mixture(house.anchor_dir, [bundle], tmp_path / "m", house.trusted)


@pytest.mark.parametrize("part", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("rank", [2, 32])
def test_rows_of_tokens_that_the_table_does_not_tell_of_must_be_the_anchors(
    house, tmp_path, part, rank
):
    place = {"embed_tokens": "embedding_rank", "lm_head": "head_rank"}[part]
    tensors = house.wild.expert(EvidenceSettings(), 0, num_bigrams=0, **{place: rank})
    rows = tensors[f"{part}.weight" if rank == 32 else f"{part}.lora_b"]
    untold = torch.arange(len(rows)) % 5 == 0
    tensors["router.token_levels"][untold] = UNTOLD  # of 60, where 9 rows are the anchor's anyhow
    bundle = house.write(tmp_path / "bad", "amber", tensors, "evidence")
    with pytest.raises(MergeError, match=f"{part} differs from the anchor's at 51 tokens"):
        build_mixture(house.anchor_dir, [bundle], tmp_path / "m", house.trusted)
    rows[untold] = house.anchor.model.get_parameter(f"{part}.weight")[untold] if rank == 32 else 0.0
    bundle = house.write(tmp_path / "good", "amber", tensors, "evidence")
    build_mixture(house.anchor_dir, [bundle], tmp_path / "m", house.trusted)


# --- reads --------------------------------------------------------------------------------------


def test_building_opens_each_bundle_once(house, tmp_path, monkeypatch):
    opened = []

    def counted(original):
        def count(path, *arguments, **options):
            opened.append(path)
            return original(path, *arguments, **options)

        return count

    for name in ("open_bundle", "begin_bundle"):
        monkeypatch.setattr(room, name, counted(getattr(room, name)))
    bundles = house.bundles(["amber", "basalt", "zinc"])
    build_mixture(house.anchor_dir, bundles, tmp_path / "m", house.trusted)
    assert len(opened) == 3
    load_mixture(tmp_path / "m", house.trusted)
    assert len(opened) == 6


def test_each_file_of_a_bundle_is_opened_once_a_load(house, monkeypatch):
    model, opened = house.mixture_dir(NAMES), Counter()

    def counting(original):
        def call(path, *arguments, **options):
            opened[Path(str(path)).name] += 1
            return original(path, *arguments, **options)

        return call

    for module in (os, io, builtins):
        monkeypatch.setattr(module, "open", counting(module.open))
    load_mixture(model, house.trusted)
    monkeypatch.undo()
    assert {name: opened[name] for name in MAX_FILE_BYTES} == dict.fromkeys(
        MAX_FILE_BYTES, len(NAMES)
    )


@pytest.mark.parametrize("what", ["unsigned", "a stranger's", "too large"])
def test_nothing_large_is_copied_before_the_signer_is_known(house, tmp_path, monkeypatch, what):
    bundle = tmp_path / "amber.bundle"
    shutil.copytree(house.bundle("amber"), bundle)
    bundle.chmod(0o777)  # so that files are copied, not linked
    size = (bundle / "expert.safetensors").stat().st_size
    if what == "unsigned":
        os.truncate(bundle / "expert.safetensors", 1 << 30)
        (bundle / "signature.sig").write_bytes(b"{}")
    trusted = only(house, "Bob") if what == "a stranger's" else house.trusted
    limit = size - 1 if what == "too large" else None
    model = house.build(["zinc"], tmp_path / "m")

    read_weights = bundle_room._read_weights

    def read_held(files, *arguments):
        assert files.path.name == "zinc.bundle"  # of a trusted owner's, in the mixture already
        return read_weights(files, *arguments)

    def write(path, mode):
        raise AssertionError(f"{path} was written")

    monkeypatch.setattr(bundle_room, "_read_weights", read_held)
    monkeypatch.setattr(bundle_room, "open", write, raising=False)
    said = r"amber\.bundle was refused.*(not a signature|unknown key|\n.*expected at most)"
    with pytest.raises(BundleError, match=said):
        add_experts(model, [bundle], trusted, max_bytes=limit)


# --- the anchor ---------------------------------------------------------------------------------


def test_a_signed_anchor_is_told_from_any_other(house, owner_keys, tmp_path):
    anchor_dir, public = tmp_path / "anchor", owner_keys["Ann"].with_name("Ann.pub")
    shutil.copytree(house.anchor_dir, anchor_dir)
    anchor = load_anchor(anchor_dir)
    with pytest.raises(SignatureError, match=r"anchor\.sig cannot be read"):
        check_anchor(anchor, anchor_dir, coordinator=public)
    sign_anchor(anchor_dir, read_private_key(owner_keys["Ann"]))
    check_anchor(load_anchor(anchor_dir), anchor_dir, anchor.digest, public)
    with pytest.raises(SignatureError, match="not made with the coordinator's key"):
        check_anchor(anchor, anchor_dir, coordinator=owner_keys["Bob"].with_name("Bob.pub"))
    with pytest.raises(CheckpointError, match=r"expected sha256:7"):
        check_anchor(anchor, anchor_dir, "sha256:" + "7" * 64)
    (anchor_dir / "LICENSE").write_text("other")
    with pytest.raises(SignatureError, match="LICENSE: changed, missing or added"):
        check_anchor(anchor, anchor_dir, coordinator=public)
    (anchor_dir / "LICENSE").unlink()
    out = tmp_path / "m"
    build_mixture(anchor_dir, house.bundles(["amber"]), out, house.trusted)
    check_anchor(load_anchor(out / "anchor"), out / "anchor", coordinator=public)


def test_all_that_changes_behaviour_is_in_the_anchors_digest(house, tmp_path):
    shutil.copytree(house.anchor_dir, tmp_path / "anchor")
    config = tmp_path / "anchor" / "config.json"
    changed = json.loads(config.read_text()) | {"max_position_embeddings": 99}
    config.write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="was changed: its content has digest"):
        load_anchor(tmp_path / "anchor")
