"""A layer's mixture against a loop over tokens and experts in float64."""

import pytest
import torch

from flexolmo.model.deltas import LowRank
from flexolmo.model.moe import Mixture, MixtureModel
from flexolmo.model.router import PUBLIC, LinearSettings
from flexolmo.model.shape import FFN_PARTS
from flexolmo.model.statistics import EvidenceSettings

OWNERS = ["amber", "basalt", "cobalt"]
MASKS = [None, ("amber", "cobalt"), ()]
FFNS = {
    "whole": [{}, {"d_ff": 20}, {"d_ff": 70}],
    "low rank": [{"rank": 1}, {"rank": 5}, {"rank": 40}],
    "mixed": [{"rank": 3}, {"d_ff": 20}, {"rank": 2}],
}


def matrices(mixture, name):
    """gate, up and down of one expert in float64; of a low-rank one, W_public + B A."""
    found = []
    for part in FFN_PARTS:
        own, public = (getattr(mixture.expert(n), part) for n in (name, PUBLIC))
        found.append(
            public.weight.double() + own.lora_b.double() @ own.lora_a.double()
            if isinstance(own, LowRank)
            else own.weight.double()
        )
    return found


def loop_over_experts(mixture, names, h, weights):
    """sum_e w_e * down(silu(gate(h)) * up(h)), token by token."""
    out = torch.zeros_like(h, dtype=torch.float64)
    for e, name in enumerate(names):
        gate_proj, up_proj, down_proj = matrices(mixture, name)
        for b in range(h.shape[0]):
            for t in range(h.shape[1]):
                x = h[b, t].double()
                gate = gate_proj @ x
                hidden = gate / (1 + (-gate).exp()) * (up_proj @ x)
                out[b, t] += weights[b, t, e].double() * (down_proj @ hidden)
    return out


def capture(model):
    """Lists that fill with each layer's mixture input and output."""
    inputs, outputs = [], []

    def hook(_, args, out):
        inputs.append(args[0])
        outputs.append(out)

    for mixture in model.mixtures():
        mixture.register_forward_hook(hook)
    return inputs, outputs


@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("ffns", FFNS)
def test_a_layer_is_a_loop_over_its_experts(wild, router, top_k, ffns):
    shapes = {n: wild.shape(**s) for n, s in zip(OWNERS, FFNS[ffns], strict=True)}
    model, routing = wild.mixture(router, OWNERS, top_k, shapes), []
    inputs, outputs = capture(model)
    model(wild.ids(3, 10), active=model.expert_mask(MASKS), routing=routing)
    for i, mixture in enumerate(model.mixtures()):
        expected = loop_over_experts(mixture, model.expert_names, inputs[i], routing[i])
        torch.testing.assert_close(outputs[i].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_the_linear_router_reads_the_state_before_its_norm(wild, top_k):
    model, routing = wild.mixture(LinearSettings(), OWNERS, top_k), []
    inputs, _ = capture(model)
    mask = model.expert_mask(MASKS)
    model(wild.ids(3, 10), active=mask, routing=routing)
    for i, mixture in enumerate(model.mixtures()):
        rows = torch.cat([mixture.router.row(n).weight for n in model.expert_names]).double()
        bias = torch.tensor([0.0] + [mixture.router.bias(n).item() for n in OWNERS])
        bias = -torch.nn.functional.softplus(bias.double()) * torch.tensor([0, 1, 1, 1])
        z = (inputs[i].double() @ rows.T + bias).masked_fill(~mask[:, None], -torch.inf)
        weights = z.softmax(-1)
        if top_k is not None:
            kept = torch.zeros_like(weights).scatter(-1, z.topk(top_k).indices, 1)
            weights = weights * kept
        torch.testing.assert_close(routing[i].double(), weights, rtol=1e-4, atol=1e-6)
        if top_k == 1:
            assert (routing[i].sum(-1) < 0.99).any(), "the kept weights are not renormalised"


def test_the_evidence_router_decides_once_for_all_layers(wild):
    model, routing = wild.mixture(EvidenceSettings(), OWNERS, 2), []
    ids = wild.ids(2, 10)
    model(ids, routing=routing)
    assert len(routing) == len(model.layers)
    assert all(torch.equal(routing[0], r) for r in routing)
    assert all(m.router is None for m in model.mixtures())
    count = (routing[0] > 0).sum(-1)
    assert count.min() >= 1 and count.max() == 2


def test_router_logits_are_reported_by_layer_and_only_by_the_linear_router(wild, router):
    model, logits = wild.mixture(router, OWNERS), []
    model(wild.ids(2, 5), router_logits=logits)
    expected = 0 if isinstance(router, EvidenceSettings) else len(model.layers)
    assert [tuple(z.shape) for z in logits] == [(2, 5, 4)] * expected


def test_training_runs_every_expert_so_that_gradients_reach_it(wild):
    """Outside training an expert that no token picked is left out; the numbers are the same."""
    model = wild.mixture(EvidenceSettings(), OWNERS, 1)
    runs = []
    for name in model.expert_names:
        ffn = model.mixtures()[0].expert(name)
        ffn.read = lambda *args, name=name, read=ffn.read: runs.append(name) or read(*args)
    ids = wild.ids(1, 2)
    still = model(ids)
    assert len(runs) < len(model.expert_names)
    runs.clear()
    torch.testing.assert_close(model.train()(ids), still, rtol=0, atol=1e-5)
    assert sorted(runs) == sorted(model.expert_names)


def test_experts_are_public_first_then_by_name(wild, router):
    shapes = {"cobalt": wild.shape(8), "amber": wild.shape(rank=4)}
    model = MixtureModel(wild.anchor.config, shapes, router)
    assert model.expert_names == [PUBLIC, "amber", "cobalt"]
    for mixture in model.mixtures():
        assert list(mixture.experts.values()) == [mixture.expert(n) for n in model.expert_names]
    assert model.shapes == shapes and list(model.shapes) == ["amber", "cobalt"]


def test_a_mixture_without_weights_is_a_programming_error(wild):
    layer = Mixture({PUBLIC: wild.anchor.model.layers[0].mlp}, None, None)
    h = torch.zeros(1, 1, wild.anchor.config.d_model)
    with pytest.raises(AssertionError, match="weights"):
        layer(h, wild.anchor.model._context(torch.zeros(1, 1, dtype=torch.long), None, None, None))
