"""An expert with the discriminant router, from its owner's house to the mixture; and one whose
router is changed after training."""

import pytest
import torch

from flexolmo.bundle.trust import TrustedOwners
from flexolmo.data.batches import embedding_windows
from flexolmo.errors import ConfigError
from flexolmo.merge.mixture import build_mixture, load_mixture
from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.hidden_statistics import discriminant_tensors, gather
from flexolmo.model.router import DiscriminantSettings, LinearSettings
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.train.expert import (
    ExpertRecipe,
    load_expert,
    pack_expert,
    reroute_expert,
    save_expert,
    train_expert,
)
from flexolmo.train.first_router import start_router
from flexolmo.train.loop import TrainSettings
from made_bundles import TERMS

CONTEXT = DiscriminantSettings(has_context=True)
TRAIN = TrainSettings(steps=2, batch_size=2, seq_len=16, warmup_steps=1)
OWN_WINDOWS, PUBLIC_WINDOWS = 4, 12


@pytest.fixture(scope="module", autouse=True)
def few_windows():
    """Made sets tell themselves apart by a few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexolmo.data.batches.EMBEDDING_WINDOWS", OWN_WINDOWS)
        patch.setattr("flexolmo.train.first_router.PUBLIC_WINDOWS", PUBLIC_WINDOWS)
        yield


def make_recipe(router):
    return ExpertRecipe(scope="ffn", router=router, train=TRAIN)


@pytest.fixture(scope="module")
def linear_expert(pico_anchor, pico_sets):
    return train_expert(pico_anchor, pico_sets["maths"], "maths", make_recipe(LinearSettings()))


@pytest.mark.parametrize("router", [DiscriminantSettings(), CONTEXT])
def test_an_owners_row_is_from_the_anchor_its_text_and_public_text(pico_anchor, pico_sets, router):
    config = pico_anchor.config
    found = start_router(pico_anchor, pico_sets["maths"], router, pico_sets["public"])
    expected = discriminant_tensors(
        *(
            gather(
                pico_anchor.model,
                embedding_windows(pico_sets[n], config.max_seq_len, count),
                router,
            )
            for n, count in (("maths", OWN_WINDOWS), ("public", PUBLIC_WINDOWS))
        ),
        router,
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in found)


def test_without_public_text_there_is_no_discriminant(pico_anchor, pico_sets):
    with pytest.raises(ConfigError, match="give the prepared public set"):
        train_expert(pico_anchor, pico_sets["maths"], "maths", make_recipe(CONTEXT))


def test_training_leaves_the_row_as_it_was_made(pico_anchor, pico_sets):
    start = start_router(pico_anchor, pico_sets["maths"], CONTEXT, pico_sets["public"])
    made = train_expert(
        pico_anchor, pico_sets["maths"], "maths", make_recipe(CONTEXT), public=pico_sets["public"]
    )
    assert all(torch.equal(made.tensors[n], t) for n, t in start.items())
    ffn = made.tensors["layers.0.gate_proj.weight"]
    assert not torch.equal(ffn, pico_anchor.model.layers[0].mlp.gate_proj.weight)


def test_the_row_tells_the_owners_text_from_public_text(pico_anchor, pico_sets):
    """Made sets have words of their own, so that this is easy."""
    config = pico_anchor.config
    experts = {}
    for name in ("maths", "news"):
        plain = train_expert(pico_anchor, pico_sets[name], name, make_recipe(LinearSettings()))
        experts[name] = reroute_expert(
            plain, pico_anchor, pico_sets[name], CONTEXT, pico_sets["public"]
        ).tensors
    model = assemble_mixture(pico_anchor, experts, CONTEXT)
    for name in ("public", "maths", "news"):
        routing = []
        for window in embedding_windows(pico_sets[name], config.max_seq_len, 4):
            model(torch.from_numpy(window), routing=routing)
        mean = torch.cat([r.flatten(0, 1) for r in routing]).mean(0)
        assert model.expert_names[int(mean.argmax())] == name
        assert mean.max() > 0.5


@pytest.mark.parametrize("router", [CONTEXT, EvidenceSettings(), LinearSettings(has_bias=False)])
def test_a_rerouted_expert_is_the_expert_with_another_router(
    linear_expert, pico_anchor, pico_sets, router, tmp_path
):
    made = reroute_expert(
        linear_expert, pico_anchor, pico_sets["maths"], router, pico_sets["public"]
    )
    for name, t in linear_expert.tensors.items():
        if "router." not in name:
            assert torch.equal(made.tensors[name], t)
    assemble_mixture(pico_anchor, {"maths": made.tensors}, router)
    assert made.record["router_before"] == LinearSettings().model_dump()
    save_expert(made, tmp_path)
    again = load_expert(tmp_path)
    assert (again.router, again.architecture) == (router, made.architecture)
    assert again.tensors.keys() == made.tensors.keys()
    assert linear_expert.record["config"]["router"]["kind"] == "linear", "the old one is as it was"


def test_an_expert_beyond_the_ffn_keeps_a_router_that_decides_once(pico_anchor, pico_sets):
    recipe = ExpertRecipe(train=TRAIN)
    expert = train_expert(pico_anchor, pico_sets["maths"], "maths", recipe)
    with pytest.raises(ConfigError, match=r"maths changes more than the FFN.*not discriminant"):
        reroute_expert(expert, pico_anchor, pico_sets["maths"], CONTEXT, pico_sets["public"])


def test_it_travels_in_a_bundle_like_any_other(
    linear_expert, pico_anchor, pico_anchor_dir, pico_sets, owner_keys, tmp_path
):
    made = reroute_expert(
        linear_expert, pico_anchor, pico_sets["maths"], CONTEXT, pico_sets["public"]
    )
    bundle = pack_expert(
        made, tmp_path / "maths.bundle", owner_keys["Ann"], owner="Ann", licence="MIT", terms=TERMS
    )
    trusted = TrustedOwners.from_keys({"Ann": owner_keys["Ann"].with_suffix(".pub").read_bytes()})
    build_mixture(pico_anchor_dir, [bundle], tmp_path / "model", trusted)
    loaded = load_mixture(tmp_path / "model", trusted)
    assert loaded.model.settings == CONTEXT
    ids = torch.from_numpy(
        next(embedding_windows(pico_sets["maths"], pico_anchor.config.max_seq_len))
    )
    expected = assemble_mixture(pico_anchor, {"maths": made.tensors}, CONTEXT)
    assert torch.equal(loaded.model(ids), expected(ids))
