"""A layer's mixture against a loop over tokens and experts in float64."""

import pytest
import torch

from flexolmo.model.moe import Mixture, MixtureModel
from flexolmo.model.router import PUBLIC, LinearSettings
from flexolmo.model.statistics import EvidenceSettings

OWNERS = ["amber", "basalt", "cobalt"]
MASKS = [None, ("amber", "cobalt"), ()]


def loop_over_experts(mixture, h, weights):
    """sum_e w_e * down(silu(gate(h)) * up(h)), token by token."""
    out = torch.zeros_like(h, dtype=torch.float64)
    for b in range(h.shape[0]):
        for t in range(h.shape[1]):
            x = h[b, t].double()
            for e, expert in enumerate(mixture.experts.values()):
                gate = expert.gate_proj.weight.double() @ x
                hidden = gate / (1 + (-gate).exp()) * (expert.up_proj.weight.double() @ x)
                out[b, t] += weights[b, t, e].double() * (expert.down_proj.weight.double() @ hidden)
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
def test_a_layer_is_a_loop_over_its_experts(wild, router, top_k):
    model, routing = wild.mixture(router, OWNERS, top_k), []
    inputs, outputs = capture(model)
    model(wild.ids(3, 10), active=model.expert_mask(MASKS), routing=routing)
    for i, mixture in enumerate(model.mixtures()):
        expected = loop_over_experts(mixture, inputs[i], routing[i])
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
    assert ((routing[0] > 0).sum(-1) == 2).all()


def test_router_logits_are_reported_by_layer_and_only_by_the_linear_router(wild, router):
    model, logits = wild.mixture(router, OWNERS), []
    model(wild.ids(2, 5), router_logits=logits)
    expected = 0 if isinstance(router, EvidenceSettings) else len(model.layers)
    assert [tuple(z.shape) for z in logits] == [(2, 5, 4)] * expected


def test_training_runs_every_expert_so_that_gradients_reach_it(wild):
    """Outside training an expert that no token picked is left out; the numbers are the same."""
    model = wild.mixture(EvidenceSettings(), OWNERS, 1)
    runs = dict.fromkeys(model.expert_names, 0)

    def count(name):
        def hook(*_):
            runs[name] += 1
        return hook
    for name in model.expert_names:
        model.mixtures()[0].expert(name).register_forward_hook(count(name))
    ids = wild.ids(1, 2)
    still = model(ids)
    assert sum(runs.values()) < len(runs)
    assert torch.equal(model.train()(ids), still)
    assert min(runs.values()) >= 1


def test_experts_are_public_first_then_by_name(wild, router):
    model = MixtureModel(wild.anchor.config, {"cobalt": 8, "amber": 4}, router)
    assert model.expert_names == [PUBLIC, "amber", "cobalt"]
    for mixture in model.mixtures():
        assert list(mixture.experts.values()) == [mixture.expert(n) for n in model.expert_names]
    widths = [model.expert_width(n) for n in model.expert_names]
    assert widths == [wild.anchor.config.d_ff, 4, 8]


def test_a_mixture_without_weights_is_a_programming_error(wild):
    layer = Mixture({PUBLIC: wild.anchor.model.layers[0].mlp}, None, None)
    h = torch.zeros(1, 1, wild.anchor.config.d_model)
    with pytest.raises(AssertionError, match="weights"):
        layer(h, wild.anchor.model._context(torch.zeros(1, 1, dtype=torch.long), None, None, None))
