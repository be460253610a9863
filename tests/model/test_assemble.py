"""What an expert consists of, and what a mixture takes from the anchor and from owners."""

import pytest
import torch

from flexolmo.errors import FlexOlmoError, MergeError
from flexolmo.model.assemble import assemble_mixture, expert_shapes, expert_tensors
from flexolmo.model.router import PUBLIC, LinearSettings
from flexolmo.model.statistics import EvidenceSettings, cluster_tables


def test_everything_inherited_is_the_anchors_bit_for_bit(wild, router):
    model = wild.mixture(router, ["a", "b"])
    found, anchor = model.state_dict(), wild.anchor.model.state_dict()
    for name, t in anchor.items():
        inherited = name.replace(".mlp.", f".mlp.experts.expert_{PUBLIC}.")
        assert torch.equal(found.pop(inherited), t), name
    for i, mixture in enumerate(model.mixtures()):
        if isinstance(router, LinearSettings):
            row = found.pop(f"layers.{i}.mlp.router.rows.expert_{PUBLIC}.weight")
            assert torch.equal(row[0], wild.anchor.router_rows[i])
            assert mixture.router.row(PUBLIC).weight.dtype == torch.float32
    if isinstance(router, EvidenceSettings):
        tables = cluster_tables(wild.anchor.public, router, wild.anchor.config.eos_token_id)
        assert torch.equal(found.pop("router.public_clusters"), torch.from_numpy(tables))
    assert found, "the rest is the experts'"
    assert all("expert_a" in n or "expert_b" in n for n in found)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_experts_tensors_come_back_as_they_went_in(make_wild, router, dtype):
    wild = make_wild(dtype)
    expert = wild.expert(router, 3, d_ff=20)
    found = expert_tensors(assemble_mixture(wild.anchor, {"a": expert}, router), "a")
    assert found.keys() == expert.keys() == expert_shapes(wild.anchor.config, 20, router).keys()
    for name, t in expert.items():
        assert found[name].dtype == (torch.float32 if "router" in name else dtype)
        assert torch.equal(found[name], t), name


def test_a_mixture_shares_no_memory_with_its_parts(wild, router):
    expert = wild.expert(router, 0)
    model = assemble_mixture(wild.anchor, {"a": expert}, router)
    given = {t.data_ptr() for t in (*expert.values(), *wild.anchor.model.state_dict().values(),
                                    wild.anchor.router_rows)}
    assert not given & {t.data_ptr() for t in model.state_dict().values()}


def test_every_misfit_of_every_expert_is_listed(wild, router):
    good, bad, strange = (wild.expert(router, i) for i in range(3))
    del bad["layers.1.down_proj.weight"]
    bad["layers.9.up_proj.weight"] = torch.zeros(1)
    strange["layers.0.up_proj.weight"] = torch.zeros(48, 31)
    with pytest.raises(MergeError) as e:
        assemble_mixture(wild.anchor, {"good": good, "bad": bad, "strange": strange}, router)
    lines = [line.strip() for line in str(e.value).splitlines()[1:]]
    assert lines == ["bad: missing layers.1.down_proj.weight",
                     "bad: extra layers.9.up_proj.weight",
                     "strange: shape of layers.0.up_proj.weight is [48, 31], expected [48, 32]"]


def test_an_expert_of_another_router_is_refused(wild):
    evidence, linear = EvidenceSettings(), LinearSettings()
    for its, ours in ((evidence, linear), (linear, evidence),
                      (linear, LinearSettings(has_bias=False))):
        with pytest.raises(MergeError, match=r"router\.(weight|evidence|raw_bias)"):
            assemble_mixture(wild.anchor, {"a": wild.expert(its, 0)}, ours)


def test_no_owner_may_take_the_public_experts_place(wild, router):
    with pytest.raises(FlexOlmoError, match="public"):
        assemble_mixture(wild.anchor, {PUBLIC: wild.expert(router, 0)}, router)


@pytest.mark.parametrize("name", ["training", "values", "type", "half"])
def test_an_expert_may_have_any_name_that_a_bundle_may(wild, router, name):
    assert wild.mixture(router, [name]).expert_names == [PUBLIC, name]
