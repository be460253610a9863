"""Ways to run the blocks in training: all give the same numbers, but for rounding."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from packaging.version import Version
from torch import nn

from flexolmo.errors import ConfigError
from flexolmo.model.loss import language_model_loss
from flexolmo.model.router import LinearSettings
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.model.transformer import Transformer
from flexolmo.train import blocks
from flexolmo.train.blocks import arrange_blocks
from flexolmo.train.expert import ExpertRecipe, prepare_training, start_expert, train_expert
from flexolmo.train.loop import TrainSettings, compute_gradients

BRIEF = TrainSettings(
    steps=6, batch_size=4, seq_len=16, warmup_steps=2, compile="off", grad_clip=1e9
)
SCOPES = {
    "all": {"scope": "all"},
    "deltas": {"scope": "all", "attention_rank": 3, "embedding_rank": 2, "head_rank": 4},
    "ffn": {"scope": "ffn"},
    "low rank": {"scope": "ffn", "rank": 3},
    "paper": {"scope": "ffn", "router": LinearSettings()},
}


@pytest.fixture
def anchor(pico_anchor, device):
    """`pico_anchor` on the device that is tested."""
    return replace(pico_anchor, model=copy.deepcopy(pico_anchor.model).to(device))


@pytest.fixture
def prepare(anchor, pico_sets):
    """The pair, its parameters, and their gradients and loss at a step, under some settings."""

    def run(scope, step=0, anchor=anchor, **changes):
        recipe = ExpertRecipe(
            beside_anchor=True, train=BRIEF.model_copy(update=changes), **SCOPES[scope]
        )
        data = pico_sets["maths"]
        first = start_expert(anchor, data, recipe)
        g = torch.Generator().manual_seed(7)
        for n, t in first.items():
            if not n.startswith("router."):
                first[n] = t + 0.05 * torch.randn(t.shape, generator=g)
        pair, parameters, losses, _ = prepare_training(anchor, data, "maths", recipe, None, first)
        arrange_blocks(pair, recipe.train, "test")
        nats, _ = compute_gradients(parameters, losses, step, recipe.train)
        return pair, nats, {n: p.grad.clone() for n, p in parameters.items()}

    return run


def close(found, expected, rtol=1e-4):
    assert found.keys() == expected.keys()
    for n, value in found.items():
        bound = rtol * expected[n].abs().max().item()
        torch.testing.assert_close(value, expected[n], rtol=rtol, atol=bound + 1e-9, msg=n)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_loss_and_its_gradients_are_those_of_the_mixture_as_it_will_be_read(
    prepare, pico_sets, scope
):
    pair, nats, gradients = prepare(scope)
    ids = torch.from_numpy(
        np.stack([pico_sets["maths"].splits["train"].tokens[:17].astype(np.int64)] * 2)
    )
    pair.zero_grad()
    language_model_loss(pair.train(), ids).backward()
    trained = {n: p.grad.clone() for n, p in pair.named_parameters() if p.grad is not None}
    assert len(trained) == len(gradients)
    pair.zero_grad()
    loss = language_model_loss(pair.eval(), ids)
    loss.backward()
    close(trained, {n: p.grad for n, p in pair.named_parameters() if p.grad is not None})
    torch.testing.assert_close(loss, language_model_loss(pair.train(), ids), rtol=1e-5, atol=1e-6)
    assert np.isfinite(nats)


@pytest.mark.parametrize("scope", ["all", "low rank", "paper"])
@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"accumulate": 4}, {"recompute": True}])
def test_parts_and_recomputing_give_the_same_step(prepare, scope, changes):
    _, nats, expected = prepare(scope)
    _, found_nats, found = prepare(scope, **changes)
    assert found_nats == pytest.approx(nats, rel=1e-6)
    close(found, expected)


@pytest.mark.parametrize("scope", ["all", "low rank", "paper"])
def test_bfloat16_is_for_products_alone(prepare, scope):
    _, nats, expected = prepare(scope)
    pair, found_nats, found = prepare(scope, precision="bfloat16")
    assert found_nats != nats
    assert found_nats == pytest.approx(nats, rel=0.02)
    assert {p.dtype for p in pair.parameters()} == {torch.float32}
    least = 1e-3 * nn.utils.get_total_norm(expected.values())  # of a bias may be all rounding
    for n, g in found.items():
        assert g.dtype == torch.float32
        assert (g - expected[n]).norm() < 0.1 * expected[n].norm().clamp(min=least), n


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="batch_size 4 cannot be read in 3 equal parts"):
        TrainSettings(steps=30, batch_size=4, accumulate=3)


# --- compiling ----------------------------------------------------------------------------------


needs_compiling = pytest.mark.skipif(
    Version(torch.__version__) < blocks.COMPILES_FROM, reason="compiled from a newer torch on"
)


@pytest.fixture
def deep_anchor(anchor):
    """The anchor with its two layers twice over: a program for each of four would show."""
    model = Transformer(anchor.config.model_copy(update={"num_layers": 4}))
    weights = anchor.model.state_dict()
    again = {
        n.replace(f"layers.{i}.", f"layers.{i + 2}."): t
        for i in range(2)
        for n, t in weights.items()
        if f"layers.{i}." in n
    }
    model.load_state_dict(weights | again)
    rows = anchor.router_rows.repeat(2, 1)
    return replace(anchor, model=model.to(anchor.model.device), router_rows=rows)


@needs_compiling
@pytest.mark.parametrize("scope", SCOPES)
def test_compiled_blocks_give_the_same_step_and_are_compiled_once(
    prepare, scope, deep_anchor, monkeypatch
):
    """One program for all layers, and one more if the first has nothing to hand back. Without the
    C++ compiler, which takes long."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda run, **options: compile_(run, backend="aot_eager", **options)
    )
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters
    counted.clear()
    for step in range(3):
        _, nats, expected = prepare(scope, step, deep_anchor)
        _, found_nats, found = prepare(scope, step, deep_anchor, compile="on")
        assert found_nats == pytest.approx(nats, rel=1e-5)
        close(found, expected, rtol=1e-3)
    assert counted["stats"]["unique_graphs"] == (1 if scope in ("all", "deltas") else 2)
    assert not counted["graph_break"]


@needs_compiling
def test_a_run_is_compiled_if_it_is_long_enough_and_there_is_a_compiler(
    pico_anchor, monkeypatch, capsys
):
    model = Transformer(pico_anchor.config)
    long = BRIEF.model_copy(update={"compile": "auto", "steps": 10**9})
    assert not arrange_blocks(model, BRIEF.model_copy(update={"compile": "auto"}), "short")
    assert capsys.readouterr().err == ""
    assert arrange_blocks(model, long, "long")
    assert "long: blocks are compiled, as the run would take about" in capsys.readouterr().err
    monkeypatch.setattr(blocks.shutil, "which", lambda name: None)
    assert not arrange_blocks(model, long, "long")
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        arrange_blocks(model, long.model_copy(update={"compile": "on"}), "long")
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    assert not arrange_blocks(model, long, "long")
    with pytest.raises(ConfigError, match=r"torch is 2\.12\.1.*install 2\.13 or newer"):
        arrange_blocks(model, long.model_copy(update={"compile": "on"}), "long")


@needs_compiling
def test_compiled_and_not_are_runs_of_their_own(pico_anchor, pico_sets, monkeypatch, tmp_path):
    """As their digits differ, neither is resumed as the other; auto is what it comes to."""
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)
    recipe = ExpertRecipe(train=BRIEF, router=EvidenceSettings())

    def train(how):
        settings = {"train": BRIEF.model_copy(update={"compile": how})}
        data = pico_sets["maths"]
        return train_expert(
            pico_anchor, data, "maths", recipe.model_copy(update=settings), tmp_path, 1
        )

    assert train("off").record["is_compiled"] is False
    assert train("auto").record["is_compiled"] is False
    with pytest.raises(Exception, match="belongs to a run with another"):
        train("on")
