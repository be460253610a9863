"""FLOPs from shapes, against counting the matrices of real models."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.deltas import LowRank
from flexolmo.model.shape import ExpertShape
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.model.transformer import ModelConfig, Transformer
from flexolmo.research.study.cost import (
    delta_flops,
    dense_flops,
    expert_flops,
    ffn_flops,
    frame_flops,
    mixture_flops,
)


def count(model: nn.Module) -> int:
    """Two FLOPs for each number in a matrix that a token passes; embeddings are looked up."""
    total = 0
    for name, part in model.named_modules():
        looked_up = name.startswith("embed_tokens")
        if isinstance(part, nn.Linear):
            total += 0 if looked_up else 2 * part.weight.numel()
        elif isinstance(part, LowRank):
            total += 2 * (part.lora_a.numel() + (0 if looked_up else part.lora_b.numel()))
    return total


@given(
    d=st.integers(1, 4),
    layers=st.integers(1, 3),
    d_ff=st.integers(1, 40),
    kv=st.sampled_from([1, 2]),
)
def test_a_dense_model_costs_its_matrices(d, layers, d_ff, kv):
    config = ModelConfig(
        vocab_size=50, d_model=8 * d, num_layers=layers, num_heads=2, num_kv_heads=kv, d_ff=d_ff
    )
    assert dense_flops(config) == count(Transformer(config))
    assert dense_flops(config) == frame_flops(config) + ffn_flops(config)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"d_ff": 20},
        {"rank": 3},
        {"head_rank": 4},
        {"embedding_rank": 2},
        {"rank": 2, "attention_rank": 3, "embedding_rank": 4, "head_rank": 5},
        {"attention_rank": 32, "embedding_rank": 32, "head_rank": 32},
        {"rank": 2, "attention_rank": 3, "head_rank": 32},
    ],
)
def test_a_mixture_with_all_active_costs_all_its_matrices(wild, sizes):
    router = EvidenceSettings()
    experts = {n: wild.expert(router, i, **sizes) for i, n in enumerate("ab")}
    model = assemble_mixture(wild.anchor, experts, router)
    shapes = [model.shapes[n] for n in "ab"]
    assert mixture_flops(wild.anchor.config, shapes, [1.0, 1.0]) == count(model)


def test_an_expert_costs_only_where_it_runs(wild):
    config = wild.anchor.config
    whole, low = ExpertShape(d_ff=config.d_ff), ExpertShape(d_ff=config.d_ff, rank=2)
    frame = frame_flops(config)
    assert mixture_flops(config, [whole], [0.0]) == dense_flops(config)
    assert mixture_flops(config, [whole], [0.25], public=0.5) == (
        frame + 0.5 * ffn_flops(config) + 0.25 * expert_flops(config, whole)
    )
    # a low-rank expert cannot run without the anchor's products
    assert mixture_flops(config, [low], [1.0], public=0.0) == (
        frame + ffn_flops(config) + expert_flops(config, low)
    )


def test_a_token_of_one_whole_expert_costs_a_dense_model(wild):
    """The anchor's matrices do not run beside it; beside an expert that needs them they do."""
    config = wild.anchor.config
    whole = ExpertShape(d_ff=config.d_ff, attention_rank=32, embedding_rank=32, head_rank=32)
    low = ExpertShape(d_ff=config.d_ff, attention_rank=2, head_rank=32)
    one = dense_flops(config)
    assert mixture_flops(config, [whole, whole], [1.0, 0.0], public=0.0) == one
    assert mixture_flops(config, [whole, whole], [0.5, 0.75], public=0.25) == 1.5 * one
    assert mixture_flops(config, [whole, low], [0.0, 1.0], public=0.0) == (
        one + delta_flops(config, low.model_copy(update={"head_rank": 0}))
    )


def test_a_narrow_expert_costs_its_width(wild):
    config = wild.anchor.config
    half = ExpertShape(d_ff=config.d_ff // 2)
    assert 2 * expert_flops(config, half) == ffn_flops(config)
