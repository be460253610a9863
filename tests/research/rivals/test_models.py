"""Rivals: what they start from, that training changes what it should, reading back."""

import numpy as np
import pytest
import torch

from flexolmo.model.checkpoint import load_anchor
from flexolmo.model.loss import language_model_loss
from flexolmo.research.rivals.baselines import average_shared
from flexolmo.research.rivals.models import (
    Reading,
    btx_start,
    load_dense,
    load_reading,
    load_rival,
    rival_mixture,
    save_model,
    train_dense,
    train_rival,
)
from flexolmo.train.loop import TrainSettings

BRIEF = TrainSettings(steps=3, batch_size=2, seq_len=32, warmup_steps=1)
IDS = torch.arange(24)[None] % 300


@pytest.fixture
def fresh(pico_anchor_dir):
    """An anchor of this test's own: training changes it in place."""
    return load_anchor(pico_anchor_dir)


def test_an_upcycled_mixture_says_what_the_anchor_says(fresh):
    model = rival_mixture(fresh, ["a", "b"], top_k=3, seed=0).eval()
    with torch.no_grad():
        assert torch.allclose(model(IDS), fresh.model(IDS), atol=1e-4)


def test_btx_starts_from_the_mean_and_each_models_own_ffn(fresh):
    base = {n: t.clone() for n, t in fresh.model.state_dict().items()}
    dense = {n: {k: t + s for k, t in base.items()} for n, s in (("a", 0.1), ("b", 0.4))}
    model = btx_start(fresh, dense, top_k=2, seed=0)
    frame, _ = average_shared(dense, base)
    state = model.state_dict()
    for name, tensor in frame.items():
        if ".mlp." not in name:
            assert torch.equal(state[name], tensor)
    ours = model.mixtures()[1].expert("b").state_dict()
    assert torch.equal(ours["up_proj.weight"], dense["b"]["layers.1.mlp.up_proj.weight"])


def test_a_dense_expert_and_a_rival_learn_and_come_back_from_disk(
    fresh, pico_sets, tmp_path, pico_anchor
):
    model = train_dense(fresh, pico_sets["maths"], BRIEF, 0, tmp_path / "dense")
    save_model(model, tmp_path / "dense.safetensors")
    back = load_dense(pico_anchor, tmp_path / "dense.safetensors")
    with torch.no_grad():
        assert torch.equal(model(IDS), back(IDS))
        assert not torch.allclose(back(IDS), pico_anchor.model(IDS))

    rival = rival_mixture(pico_anchor, ["maths", "news"], top_k=2, seed=0)
    before = {n: t.clone() for n, t in rival.state_dict().items()}
    train_rival(rival, [pico_sets["maths"], pico_sets["news"]], BRIEF, 0, tmp_path / "moe", "moe")
    moved = {n for n, t in rival.state_dict().items() if not torch.equal(t, before[n])}
    assert {
        "embed_tokens.weight",
        "layers.0.mlp.router.rows.expert_news.weight",
        "layers.1.mlp.experts.expert_public.up_proj.weight",
    } <= moved
    save_model(rival, tmp_path / "moe.safetensors")
    again = load_rival(pico_anchor, ["maths", "news"], 2, tmp_path / "moe.safetensors")
    with torch.no_grad():
        assert torch.equal(rival(IDS), again(IDS))


def test_a_rival_has_the_same_gradient_in_bfloat16_but_for_rounding(pico_anchor):
    found = []
    for is_half in (False, True):
        rival = rival_mixture(pico_anchor, ["maths", "news"], top_k=2, seed=0)
        rival.requires_grad_(True).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            loss = language_model_loss(rival, IDS)
        loss.backward()
        grads = [p.grad for p in rival.parameters() if p.grad is not None]
        found.append(torch.cat([g.flatten() for g in grads]))
    exact, half = found
    assert 0 < (half - exact).norm() < 0.05 * exact.norm()


def test_a_reading_comes_back_window_by_window(tmp_path):
    rows = {"a": [np.float32([-1, -2]), np.float32([-3])], "b": [np.float32([-4, -5, -6])]}
    windows = {n: [(np.zeros(len(r) + 1, dtype=np.int64), 1) for r in rs] for n, rs in rows.items()}
    Reading(rows).save(tmp_path / "r.npz")
    back = load_reading(tmp_path / "r.npz", windows).log_probs
    assert all(np.array_equal(x, y) for n in rows for x, y in zip(rows[n], back[n], strict=True))
