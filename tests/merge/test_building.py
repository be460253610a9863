"""Building a mixture: what it holds, and every bundle that is refused."""

import datetime
import io
import os
import shutil
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.bundle.signing import create_key
from flexolmo.bundle.trust import ANY_SIGNER, TrustedOwners
from flexolmo.errors import BundleError, FlexOlmoError, MergeError, SignatureError
from flexolmo.merge import mixture as room
from flexolmo.merge.checks import ROUTER
from flexolmo.merge.index import read_about
from flexolmo.merge.mixture import add_experts, build_mixture, load_mixture, remove_experts
from flexolmo.model.assemble import assemble_mixture, frame_mixture
from made_bundles import TERMS, terms_until
from made_mixtures import IN_SESSION, NAMES, ROUTERS, differ_in_router, flip, tree

# --- building -----------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["evidence", "linear", "rich"])
@given(order=st.permutations(NAMES))
@IN_SESSION
def test_the_order_of_bundles_changes_no_byte_and_no_logit(house, tmp_path_factory, router, order):
    out = tmp_path_factory.mktemp("order") / "m"
    build_mixture(house.anchor_dir, house.bundles(order, router), out, house.trusted)
    assert tree(out) == tree(house.mixture_dir(NAMES, router))
    ids = house.wild.ids(2, 10)
    assert torch.equal(
        load_mixture(out, house.trusted).model(ids), house.mixture(NAMES, router).model(ids)
    )


def test_a_mixture_holds_the_anchor_and_every_bundle_whole(house):
    found = tree(house.mixture_dir(NAMES))
    expected = {f"anchor/{n}": data for n, data in tree(house.anchor_dir).items()}
    for name in NAMES:
        expected |= {
            f"experts/{name}.bundle/{n}": data for n, data in tree(house.bundle(name)).items()
        }
    assert found.pop("mixture.json")
    assert found == expected


def test_mixture_json_says_who_gave_what_under_which_terms(house):
    about = read_about(house.mixture_dir(NAMES))
    assert list(about["experts"]) == sorted(NAMES)
    assert about["anchor_digest"] == house.anchor.digest
    assert about["router"]["kind"] == "evidence"
    zinc = about["experts"]["zinc"]
    assert (zinc["owner"], zinc["licence"]) == ("Bob", "MIT")
    assert zinc["terms"] == TERMS.model_dump(mode="json")
    assert zinc["serial"] == 1


def test_a_mixture_of_no_owner_is_the_anchor(house, tmp_path):
    build_mixture(house.anchor_dir, [], tmp_path / "m", house.trusted)
    loaded = load_mixture(tmp_path / "m", house.trusted)
    ids = house.wild.ids(2, 9)
    assert loaded.expert_names == []
    assert torch.equal(loaded.model(ids), house.anchor.model(ids))


def test_top_k_is_kept_and_used(house):
    ids = house.wild.ids(2, 12)
    routing = []
    loaded = house.mixture(NAMES, "linear", top_k=2)
    loaded.model(ids, routing=routing)
    assert loaded.about["top_k"] == 2
    assert all(((w > 0).sum(-1) == 2).all() for w in routing)


# --- refusals -----------------------------------------------------------------------------------


def refused(house, tmp_path, bundles, error, trusted=None, **options):
    """The message of the refusal, which must leave nothing behind."""
    out = tmp_path / "refused"
    with pytest.raises(error) as caught:
        build_mixture(house.anchor_dir, bundles, out, trusted or house.trusted, **options)
    assert not out.exists()
    assert not list(tmp_path.glob(".refused*"))
    return str(caught.value)


def test_a_bundle_for_another_anchor_is_refused_with_both_digests(house, tmp_path):
    other = "sha256:" + "7" * 64
    bad = differ_in_router(house, tmp_path, "amber", "evidence", anchor_digest=other)
    said = refused(house, tmp_path, [bad, house.bundle("zinc")], MergeError)
    assert "amber" in said and other in said and house.anchor.digest in said
    assert "zinc" not in said


def test_a_changed_bundle_is_refused_by_its_path(house, tmp_path):
    bad = tmp_path / "amber.bundle"
    shutil.copytree(house.bundle("amber"), bad)
    flip(bad / "expert.safetensors", 0.5, 1)
    said = refused(house, tmp_path, [house.bundle("zinc"), bad], SignatureError)
    assert str(bad) in said and "expert.safetensors" in said


def test_an_unknown_signer_is_refused_unless_told_to_trust(house, tmp_path):
    create_key(tmp_path / "mallory")
    bundle = differ_in_router(
        house, tmp_path, "amber", "evidence", owner="Mallory", key=tmp_path / "mallory"
    )
    for trusted in (house.trusted, TrustedOwners({})):
        assert "unknown key" in refused(house, tmp_path, [bundle], SignatureError, trusted)
    with pytest.raises(SignatureError, match=r"Nobody was said to be trusted.*--trust DIR"):
        build_mixture(house.anchor_dir, [bundle], tmp_path / "m", None)
    about = build_mixture(house.anchor_dir, [bundle], tmp_path / "m", ANY_SIGNER)
    assert about["experts"]["amber"]["owner"] == "Mallory"
    assert load_mixture(tmp_path / "m", ANY_SIGNER).expert_names == ["amber"]
    with pytest.raises(SignatureError, match=r"amber\.bundle was refused.*unknown key"):
        load_mixture(tmp_path / "m", house.trusted)


def test_trusting_any_signer_lets_nobody_speak_for_a_trusted_owner(house, tmp_path):
    create_key(tmp_path / "mallory")
    bundle = differ_in_router(
        house, tmp_path, "amber", "evidence", owner="Ann", key=tmp_path / "mallory"
    )
    anybody = house.trusted
    anybody.allows_unknown = True
    said = refused(house, tmp_path, [bundle], SignatureError, anybody)
    assert "'Ann'" in said


def test_missing_extra_and_misshapen_tensors_are_listed_together(house, tmp_path):
    tensors = house.tensors("amber", "linear")
    del tensors["layers.1.up_proj.weight"]
    tensors["layers.9.gate_proj.weight"] = torch.ones(2, 2)
    tensors["layers.0.down_proj.weight"] = torch.ones(3, 5)
    bad = house.write(tmp_path, "amber", tensors, "linear")
    said = refused(house, tmp_path, [bad, house.bundle("zinc", "linear")], MergeError)
    for line in (
        "amber: missing: layers.1.up_proj.weight",
        "amber: extra: layers.9.gate_proj.weight",
        "amber: shape of layers.0.down_proj.weight: found [3, 5], expected [32, ",
    ):
        assert line in said
    assert "zinc" not in said


RICH = {"rank": 3, "attention_rank": 2, "embedding_rank": 4, "head_rank": 5}


@pytest.mark.parametrize(
    "claim",
    [
        "num_layers",
        "d_model",
        "d_ff",
        "rank",
        "attention_rank",
        "embedding_rank",
        "head_rank",
        "num_bigrams",
    ],
)
@pytest.mark.parametrize("sizes", [{}, RICH], ids=["an FFN", "all parts"])
def test_an_architecture_that_the_tensors_do_not_have_is_refused(house, tmp_path, claim, sizes):
    tensors = house.wild.expert(ROUTERS["evidence"], 0, **sizes)
    true = house.architecture(tensors)
    bad = house.write(
        tmp_path, "amber", tensors, "evidence", architecture=true | {claim: true[claim] + 1}
    )
    said = refused(house, tmp_path, [bad], MergeError)
    assert f"amber: architecture claims {claim} {true[claim] + 1}, found {true[claim]}\n" in said
    assert said.count("amber:") == 1
    good = house.write(tmp_path / "good", "amber", tensors, "evidence")
    build_mixture(house.anchor_dir, [good], tmp_path / "m", house.trusted)


def test_tensors_of_an_architecture_that_is_not_the_anchors_are_refused(house, tmp_path):
    """Consistent with its own claim, but no expert for this anchor."""
    tensors = house.wild.expert(ROUTERS["evidence"], 0, **RICH)
    tensors["layers.0.q_proj.lora_a"] = torch.ones(2, 31)
    tensors["layers.1.v_proj.lora_b"] = torch.ones(32, 2)  # it has fewer key-value heads
    tensors["embed_tokens.lora_b"] = torch.ones(299, 4)
    bad = house.write(tmp_path, "amber", tensors, "evidence")
    said = refused(house, tmp_path, [bad], MergeError)
    for line in (
        "amber: shape of layers.0.q_proj.lora_a: found [2, 31], expected [2, 32]",
        "amber: shape of layers.1.v_proj.lora_b: found [32, 2], expected [16, 2]",
        "amber: shape of embed_tokens.lora_b: found [299, 4], expected [300, 4]",
    ):
        assert line in said


def test_deltas_may_be_half_as_long_and_nothing_else_may(house, tmp_path):
    tensors = house.wild.expert(ROUTERS["evidence"], 0, **RICH | {"attention_rank": 32})
    half = {n: t.bfloat16() if ".lora_" in n else t for n, t in tensors.items()}
    bundle = house.write(tmp_path, "amber", half, "evidence")
    build_mixture(house.anchor_dir, [bundle], tmp_path / "m", house.trusted)
    widened = {n: t.float() if ".lora_" in n else t for n, t in half.items()}
    ids = house.wild.ids(2, 12)
    expected = assemble_mixture(house.wild.anchor, {"amber": widened}, ROUTERS["evidence"])
    assert torch.equal(load_mixture(tmp_path / "m", house.trusted).model(ids), expected(ids))
    for name, right in (("layers.0.q_proj.weight", "F32"), ("router.token_levels", "I8")):
        bad = house.write(
            tmp_path / name, "amber", half | {name: half[name].bfloat16()}, "evidence"
        )
        said = refused(house, tmp_path, [bad], MergeError)
        assert f"amber: dtype of {name} is BF16, expected {right}" in said


@pytest.mark.parametrize(
    "place, key",
    [(0, -1), (-1, 300**2), (-1, 0), (1, None)],
    ids=["below", "above", "descending", "twice"],
)
def test_bigrams_out_of_order_or_of_no_token_are_refused(house, tmp_path, place, key):
    tensors = house.wild.expert(ROUTERS["evidence"], 0)
    keys = tensors["router.bigram_keys"]
    keys[place] = keys[0] if key is None else key
    bad = house.write(tmp_path, "amber", tensors, "evidence")
    said = refused(house, tmp_path, [bad], MergeError)
    assert "amber: router table: pairs are not ascending pairs of token ids" in said


def test_experts_of_every_shape_come_through_the_bundle_as_they_were(house, tmp_path):
    wild, router = house.wild, ROUTERS["evidence"]
    experts = {
        "amber": wild.expert(router, 0, **RICH),
        "basalt": wild.expert(router, 1, 20),
        "copper": wild.expert(router, 3, attention_rank=32, embedding_rank=32, head_rank=32),
        "zinc": wild.expert(router, 2, **{k: v for k, v in RICH.items() if k != "rank"}),
    }
    bundles = [house.write(tmp_path, n, t, "evidence") for n, t in experts.items()]
    about = build_mixture(house.anchor_dir, bundles, tmp_path / "m", house.trusted)
    assert {n: e["architecture"] for n, e in about["experts"].items()} == {
        n: house.architecture(t) for n, t in experts.items()
    }
    found = load_mixture(tmp_path / "m", house.trusted).model
    expected = assemble_mixture(wild.anchor, experts, router)
    ids = wild.ids(2, 12)
    assert torch.equal(found(ids), expected(ids))
    remove_experts(tmp_path / "m", ["zinc"], house.trusted)
    del experts["zinc"]
    assert torch.equal(
        load_mixture(tmp_path / "m", house.trusted).model(ids),
        assemble_mixture(wild.anchor, experts, router)(ids),
    )


def test_two_experts_of_one_name_are_refused(house, tmp_path):
    again = differ_in_router(house, tmp_path, "amber", "evidence")
    said = refused(
        house, tmp_path, [house.bundle("amber"), house.bundle("zinc"), again], MergeError
    )
    assert "amber: two experts have this name" in said
    with pytest.raises(MergeError, match="amber: two experts"):
        add_experts(house.build(["amber"], tmp_path / "m"), [again], house.trusted)


def test_experts_with_different_routers_are_refused(house, tmp_path):
    said = refused(
        house, tmp_path, [house.bundle("amber"), house.bundle("zinc", "linear")], MergeError
    )
    assert "zinc: router is" in said and "linear" in said and "evidence" in said
    sharper = house.write(
        tmp_path,
        "zinc",
        house.tensors("zinc", "evidence"),
        "evidence",
        router_settings=ROUTER.validate_python({"kind": "evidence", "clip_nats": 9.0}).model_dump(
            mode="json"
        ),
    )
    said = refused(house, tmp_path, [house.bundle("amber"), sharper], MergeError)
    assert "9.0" in said and "5.0" in said


def test_every_problem_of_every_bundle_is_listed_at_once(house, tmp_path):
    other = "sha256:" + "7" * 64
    tensors = house.tensors("basalt", "evidence")
    del tensors["router.token_levels"]
    bundles = [
        house.bundle("amber"),
        house.write(tmp_path, "basalt", tensors, "evidence"),
        differ_in_router(house, tmp_path, "cobalt", "evidence", anchor_digest=other),
        house.bundle("zinc", "linear"),
        differ_in_router(house, tmp_path, "amber", "evidence"),
    ]
    said = refused(house, tmp_path, bundles, MergeError)
    for part in (
        "amber: two experts",
        "basalt: missing: router.token_levels",
        f"cobalt: trained on anchor {other}",
        "zinc: router is",
    ):
        assert part in said


def test_expired_terms_are_refused_at_the_door(house, tmp_path):
    last = datetime.date(2020, 2, 29)
    bad = differ_in_router(
        house, tmp_path, "amber", "evidence", terms=terms_until(last), today=last
    )
    said = refused(house, tmp_path, [bad], BundleError)
    assert "expired on 2020-02-29" in said


def test_a_router_this_release_does_not_know_is_refused(house, tmp_path):
    bad = differ_in_router(
        house,
        tmp_path,
        "amber",
        "evidence",
        router_kind="oracle",
        router_settings={"kind": "oracle"},
    )
    assert "amber: router settings are not understood" in refused(
        house, tmp_path, [bad], MergeError
    )


@pytest.mark.parametrize("owners", [("Ann",), ()])
def test_each_owner_must_be_trusted(house, tmp_path, owners):
    trusted = TrustedOwners.from_keys(
        {o: house.keys[o].with_name(f"{o}.pub").read_bytes() for o in owners}
    )
    with pytest.raises(SignatureError, match="unknown key"):
        build_mixture(house.anchor_dir, house.bundles(NAMES), tmp_path / "m", trusted)


def test_weights_that_overflow_in_the_anchors_dtype_are_refused(house, tmp_path):
    tensors = {n: t.double() for n, t in house.tensors("amber", "evidence").items()}
    tensors["layers.0.gate_proj.weight"][0, 0] = 1e300
    refused(house, tmp_path, [house.write(tmp_path, "amber", tensors, "evidence")], FlexOlmoError)


def test_a_top_k_below_one_is_refused(house, tmp_path):
    refused(house, tmp_path, house.bundles(["amber"]), FlexOlmoError, top_k=0)


def test_a_directory_that_is_no_mixture_is_not_overwritten(house, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("ten years of work")
    with pytest.raises(FlexOlmoError, match="thesis"):
        build_mixture(
            house.anchor_dir, house.bundles(["amber"]), tmp_path / "thesis", house.trusted
        )
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "ten years of work"


def test_no_link_is_followed_and_nothing_but_the_anchor_is_published(house, tmp_path):
    """A link named LICENSE to a private key must not put the key into the model."""
    anchor = tmp_path / "anchor"
    shutil.copytree(house.anchor_dir, anchor)
    (anchor / "notes.txt").write_text("draft")
    (anchor / ".env").write_text("secret")
    build_mixture(anchor, house.bundles(["amber"]), tmp_path / "m", house.trusted)
    assert tree(tmp_path / "m" / "anchor") == tree(house.anchor_dir)
    (tmp_path / "key.pem").write_text("secret")
    (anchor / "LICENSE").symlink_to("../key.pem")
    with pytest.raises(MergeError, match=r"anchor/LICENSE is a link"):
        build_mixture(anchor, house.bundles(["amber"]), tmp_path / "m2", house.trusted)
    assert not (tmp_path / "m2").exists()


@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_each_bundle_is_read_once_whether_linked_or_copied(house, tmp_path, monkeypatch, mode):
    """Also when an expert is added, and when the mixture is loaded."""
    read = Counter[str]()
    made = [house.bundle(name) for name in NAMES]

    class Counted(io.FileIO):
        def readinto(self, buffer):
            count = super().readinto(buffer)
            read[str(os.fstat(self.fileno()).st_ino)] += count
            return count

    monkeypatch.setattr("flexolmo.bundle.bundle.io.FileIO", Counted)
    monkeypatch.setattr(shutil, "copyfileobj", lambda *_: pytest.fail("copied without a check"))
    bundles = [shutil.copytree(bundle, tmp_path / bundle.name) for bundle in made]
    for bundle in bundles:
        bundle.chmod(mode)
    sizes = [(bundle / "expert.safetensors").stat().st_size for bundle in bundles]

    def once():
        found = sorted(count for count in read.values() if count)
        read.clear()
        return found

    out = tmp_path / "m"
    build_mixture(house.anchor_dir, bundles[:-1], out, house.trusted)
    assert once() == sorted(sizes[:-1])
    add_experts(out, bundles[-1:], house.trusted)
    assert once() == sorted(sizes)
    load_mixture(out, house.trusted)
    assert once() == sorted(sizes)
    assert tree(out) == tree(house.mixture_dir(NAMES))
    copies = [out / "experts" / bundle.name / "expert.safetensors" for bundle in bundles]
    linked = [c.samefile(b / c.name) for c, b in zip(copies, bundles, strict=True)]
    assert linked == [mode == 0o755] * len(NAMES)


def test_a_mixture_in_memory_holds_each_tensor_once(house, tmp_path, monkeypatch):
    """Of what the bundles and the anchor brought, nothing is left besides the mixture."""
    handed, directory = [], house.mixture_dir(NAMES, "rich")

    def frame(anchor, *args, **options):
        handed.append(anchor)
        return frame_mixture(anchor, *args, **options)

    monkeypatch.setattr(room, "frame_mixture", frame)
    found = load_mixture(directory, house.trusted)
    (anchor,) = handed
    own = {p.data_ptr() for p in found.model.parameters()}
    assert {p.data_ptr() for p in anchor.model.parameters()} <= own
    q_proj = anchor.model.layers[0].self_attn.q_proj.weight
    assert q_proj.T.is_contiguous()  # as in a model that was made, not loaded
    expected = house.mixture(NAMES, "rich").model.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in found.model.state_dict().items())


def test_files_that_others_may_change_are_copied_not_linked(house, tmp_path):
    anchor = tmp_path / "anchor"
    shutil.copytree(house.anchor_dir, anchor)
    weights = "model.safetensors"
    for mode, is_linked in ((0o755, True), (0o777, False)):
        anchor.chmod(mode)
        out = tmp_path / f"m{mode}"
        build_mixture(anchor, house.bundles(["amber"]), out, house.trusted)
        assert (out / "anchor" / weights).samefile(anchor / weights) == is_linked
