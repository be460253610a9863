"""A smaller expert: the best of its rank, the columns that matter, and nothing else changed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.data.batches import training_batches
from flexolmo.errors import ConfigError
from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.shape import shape_of_tensors
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.train.compress import (
    Curvature,
    compress_rank,
    measure_curvature,
    prune_width,
    truncate,
    truncate_product,
)

ROUTER = EvidenceSettings()
IN_SESSION = settings(derandomize=True, max_examples=60)
WHOLE = {"attention_rank": 32, "embedding_rank": 32, "head_rank": 32}
RICH = {"attention_rank": 5, "embedding_rank": 6, "head_rank": 4}


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shape_of(wild, tensors):
    return shape_of_tensors({n: tuple(t.shape) for n, t in tensors.items()}, wild.anchor.config)


# --- low rank -----------------------------------------------------------------------------------


@given(out=st.integers(1, 12), inner=st.integers(1, 12), data=st.data(), seed=st.integers(0, 99))
@IN_SESSION
def test_a_truncated_matrix_is_the_closest_of_its_rank(out, inner, data, seed):
    """The error is that of the singular values left out, which no matrix of that rank beats."""
    matrix = draw(seed, out, inner)
    rank = data.draw(st.integers(1, min(out, inner)))
    a, b = truncate(matrix, rank)
    assert a.shape == (rank, inner) and b.shape == (out, rank)
    values = torch.linalg.svdvals(matrix)
    least = values[rank:].square().sum().sqrt()
    torch.testing.assert_close((matrix - b @ a).norm(), least, rtol=1e-6, atol=1e-9)
    other = draw(seed + 1, out, rank) @ torch.linalg.pinv(draw(seed + 1, out, rank)) @ matrix
    assert (matrix - other).norm() >= least - 1e-9
    torch.testing.assert_close(a.square().sum(1), b.square().sum(0))  # shared evenly


@given(out=st.integers(1, 12), inner=st.integers(1, 12), data=st.data(), seed=st.integers(0, 99))
@IN_SESSION
def test_with_moments_it_is_the_closest_on_what_the_matrix_reads(out, inner, data, seed):
    """The error over the inputs is that of the singular values of M X left out."""
    matrix, inputs = draw(seed, out, inner), draw(seed + 7, inner, 50) * draw(seed + 8, inner, 1)
    rank = data.draw(st.integers(1, min(out, inner)))
    a, b = truncate(matrix, rank, Curvature(inputs @ inputs.T / 50))
    values = torch.linalg.svdvals(matrix @ inputs)
    least = values[rank:].square().sum().sqrt()
    error = ((matrix - b @ a) @ inputs).norm()
    assert error <= least + 0.05 * values.square().sum().sqrt()  # tiny moments are lifted
    plain = truncate(matrix, rank)
    assert error <= ((matrix - plain[1] @ plain[0]) @ inputs).norm() + 0.05 * values.norm()


@given(
    out=st.integers(2, 8),
    inner=st.integers(2, 8),
    data=st.data(),
    seed=st.integers(0, 99),
    is_diagonal=st.booleans(),
)
@IN_SESSION
def test_with_both_sides_known_no_matrix_of_that_rank_costs_less(
    out, inner, data, seed, is_diagonal
):
    """The cost of the difference is that of the least singular values, and no other's is less."""
    matrix, rank = draw(seed, out, inner), data.draw(st.integers(1, min(out, inner)))
    inputs, outputs = draw(seed + 1, inner, 40), draw(seed + 2, out, 40)
    A, G = inputs @ inputs.T, outputs @ outputs.T
    G = torch.diag(G.diagonal()) if is_diagonal else G

    def cost(other):
        return float(torch.trace(G @ (matrix - other) @ A @ (matrix - other).T))

    a, b = truncate(matrix, rank, Curvature(A, G.diagonal() if is_diagonal else G))
    best = cost(b @ a)
    roots = [torch.linalg.cholesky(m) for m in (G, A)]
    least = torch.linalg.svdvals(roots[0].T @ matrix @ roots[1])[rank:].square().sum()
    assert best == pytest.approx(float(least), rel=1e-6, abs=1e-6)
    for other in (
        truncate(matrix, rank),
        truncate(matrix, rank, Curvature(A)),
        (a + 0.01 * draw(seed + 3, *a.shape), b),
    ):
        assert cost(other[1] @ other[0]) >= best - 1e-6
    torch.testing.assert_close(a.square().sum(1), b.square().sum(0))


def test_curvature_is_what_a_small_change_costs(wild, pico_sets, as_shipped):
    """Inputs and outputs against hand-made sums of x x^T and of gradients, layer by layer."""
    expert, data = wild.expert(ROUTER, 0, **WHOLE), pico_sets["maths"]
    pair = assemble_mixture(wild.anchor, {"maths": expert}, ROUTER)
    found = measure_curvature(pair, "maths", data)
    assert found.keys() == {n.removesuffix(".weight") for n in expert if n.endswith(".weight")}
    batches = training_batches(data, "train", 1, 256, seed=0)
    windows = [torch.from_numpy(batches.batch(i)) for i in range(min(64, batches.num_windows))]
    head, head_input, count = torch.zeros(300), torch.zeros(32, 32), 0
    for ids in windows:
        logits, states = pair(ids[:, :-1])[0], pair.hidden(ids[:, :-1])[0]
        wrong = logits.softmax(-1) - torch.nn.functional.one_hot(ids[0, 1:], 300)
        head += wrong.square().sum(0)
        head_input += states.T @ states
        count += len(logits)
    torch.testing.assert_close(
        found["lm_head"].outputs, (head / count).double(), rtol=1e-4, atol=1e-7
    )
    torch.testing.assert_close(
        found["lm_head"].inputs, (head_input / count).double(), rtol=1e-4, atol=1e-5
    )
    assert found["embed_tokens"].inputs is None
    assert found["embed_tokens"].outputs.shape == (32, 32)
    for i in range(2):
        q, k, v, o = (found[f"layers.{i}.{part}_proj"] for part in "qkvo")
        assert torch.equal(q.inputs, k.inputs) and torch.equal(q.inputs, v.inputs)
        assert not torch.equal(q.inputs, o.inputs) and v.outputs.shape == (16, 16)
        gate, up = (found[f"layers.{i}.{part}_proj"] for part in ("gate", "up"))
        assert torch.equal(gate.inputs, up.inputs) and gate.outputs.shape == (48, 48)
    assert not any(p.grad is not None for p in pair.parameters())
    assert not any(m._forward_hooks for m in pair.modules())


def test_curvature_is_of_whole_matrices_only(wild, pico_sets):
    sizes = {"attention_rank": 32, "embedding_rank": 2, "head_rank": 4}
    pair = assemble_mixture(wild.anchor, {"maths": wild.expert(ROUTER, 0, **sizes)}, ROUTER)
    assert measure_curvature(pair, "maths", pico_sets["maths"]).keys() == {
        f"layers.{i}.{part}_proj"
        for i in range(2)
        for part in ("gate", "up", "down", "q", "k", "v", "o")
    }


@given(out=st.integers(1, 12), inner=st.integers(1, 12), seed=st.integers(0, 99))
@IN_SESSION
def test_full_rank_is_exact(out, inner, seed):
    matrix = draw(seed, out, inner)
    a, b = truncate(matrix, min(out, inner))
    torch.testing.assert_close(b @ a, matrix)


@given(
    out=st.integers(1, 12),
    inner=st.integers(1, 12),
    old=st.integers(1, 15),
    data=st.data(),
    seed=st.integers(0, 99),
)
@IN_SESSION
def test_truncating_a_product_is_truncating_what_it_multiplies_to(out, inner, old, data, seed):
    """Also of a rank above the sides, where the rest is zero."""
    a, b = draw(seed, old, inner), draw(seed + 1, out, old)
    rank = data.draw(st.integers(1, old))
    new_a, new_b = truncate_product(a, b, rank)
    assert new_a.shape == (rank, inner) and new_b.shape == (out, rank)
    wanted_a, wanted_b = truncate(b @ a, min(rank, out, inner))
    torch.testing.assert_close(new_b @ new_a, wanted_b @ wanted_a, rtol=1e-6, atol=1e-7)
    if rank == old:
        torch.testing.assert_close(new_b @ new_a, b @ a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_has_the_matrixs_own_dtype_and_memory_of_its_own(dtype):
    matrix = draw(0, 6, 5).to(dtype)
    factors = (*truncate(matrix, 3), *truncate_product(matrix[:4], matrix.T[:, :4], 3))
    for t in factors:
        assert t.dtype == dtype and t.is_contiguous()
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size()


@pytest.mark.parametrize("rank", [0, -1, 6, 100])
def test_a_rank_no_matrix_of_that_shape_has_is_refused(rank):
    with pytest.raises(ConfigError, match=f"Rank {rank} is not between 1 and 5.* 7 x 5 matrix"):
        truncate(torch.ones(7, 5), rank)


def test_at_full_rank_the_compressed_experts_text_is_the_experts(wild):
    expert = wild.expert(ROUTER, 0, **RICH)
    small = compress_rank(wild.anchor, expert, 32)
    pairs = [assemble_mixture(wild.anchor, {"a": t}, ROUTER) for t in (expert, small)]
    ids = wild.ids(2, 20)
    torch.testing.assert_close(pairs[1](ids), pairs[0](ids), rtol=0, atol=1e-4)
    assert shape_of(wild, small) == shape_of(wild, expert).model_copy(update={"rank": 32})


def test_every_ffn_matrix_is_cut_as_a_difference_to_the_anchors(wild):
    expert, state = wild.expert(ROUTER, 0, **RICH), wild.anchor.model.state_dict()
    small = compress_rank(wild.anchor, expert, 3)
    for i in range(2):
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"layers.{i}.{part}"
            a, b = truncate(expert[f"{name}.weight"] - state[f"layers.{i}.mlp.{part}.weight"], 3)
            assert torch.equal(small[f"{name}.lora_a"], a)
            assert torch.equal(small[f"{name}.lora_b"], b)
    changed = {n for n in expert if n not in small}
    assert changed == {n for n in expert if n.endswith("_proj.weight")}
    assert all(small[n] is expert[n] for n in expert if n not in changed), "the rest is kept"


@pytest.mark.parametrize("delta_rank", [1, 4, 5, 9])
def test_deltas_are_cut_to_their_own_rank(wild, delta_rank):
    expert = wild.expert(ROUTER, 0, **RICH)
    small = compress_rank(wild.anchor, expert, 3, delta_rank)
    assert shape_of(wild, small).model_dump() == shape_of(wild, expert).model_dump() | {
        "rank": 3,
        **{k: min(v, delta_rank) for k, v in RICH.items()},
    }
    for name in ("layers.1.v_proj", "embed_tokens", "lm_head"):
        a, b = expert[f"{name}.lora_a"], expert[f"{name}.lora_b"]
        found = small[f"{name}.lora_b"] @ small[f"{name}.lora_a"]
        values = torch.linalg.svdvals((b @ a).double())
        left = values[delta_rank:].square().sum().sqrt()
        torch.testing.assert_close((b @ a - found).double().norm(), left, rtol=1e-4, atol=1e-4)
    assemble_mixture(wild.anchor, {"a": small}, ROUTER)


def test_a_rank_above_a_matrixs_side_still_makes_one_expert(wild):
    """Keys and values have 16 rows here, queries 32; all of attention has one rank."""
    expert = wild.expert(ROUTER, 0, attention_rank=30)
    small = compress_rank(wild.anchor, expert, 3, 20)
    name = "layers.0.v_proj"
    torch.testing.assert_close(
        small[f"{name}.lora_b"] @ small[f"{name}.lora_a"],
        expert[f"{name}.lora_b"] @ expert[f"{name}.lora_a"],
    )
    assert shape_of(wild, small).attention_rank == 20
    assemble_mixture(wild.anchor, {"a": small}, ROUTER)


@pytest.mark.parametrize("delta_rank", [1, 4, 20, 31])
def test_whole_matrices_are_cut_as_differences_to_the_anchors(wild, delta_rank):
    """Keys and values have 16 rows here, which is all the rank they can have."""
    expert, state = wild.expert(ROUTER, 0, **WHOLE), wild.anchor.model.state_dict()
    small = compress_rank(wild.anchor, expert, 3, delta_rank)
    assert shape_of(wild, small).model_dump() == shape_of(wild, expert).model_dump() | {
        "rank": 3,
        **dict.fromkeys(WHOLE, delta_rank),
    }
    for name, key in (
        ("layers.1.v_proj", "layers.1.self_attn.v_proj"),
        ("lm_head", "lm_head"),
        ("embed_tokens", "embed_tokens"),
    ):
        difference = expert[f"{name}.weight"] - state[f"{key}.weight"]
        found = small[f"{name}.lora_b"] @ small[f"{name}.lora_a"]
        left = torch.linalg.svdvals(difference.double())[delta_rank:].square().sum().sqrt()
        torch.testing.assert_close((difference - found).double().norm(), left, rtol=1e-4, atol=1e-4)
    assemble_mixture(wild.anchor, {"a": small}, ROUTER)


def test_whole_matrices_stay_whole_when_no_rank_would_cut_them(wild):
    expert = wild.expert(ROUTER, 0, **WHOLE)
    for delta_rank in (None, 32, 40):
        small = compress_rank(wild.anchor, expert, 3, delta_rank)
        kept = {
            n
            for n in expert
            if n.partition(".")[0] != "router"
            and "gate" not in n
            and "up" not in n
            and "down" not in n
        }
        assert len(kept) == 10 and all(small[n] is expert[n] for n in kept)


def test_a_low_rank_expert_is_cut_further_and_never_grown(wild):
    expert = wild.expert(ROUTER, 0, rank=6)
    small = compress_rank(wild.anchor, expert, 2)
    for i in range(2):
        name = f"layers.{i}.down_proj"
        wanted = truncate(expert[f"{name}.lora_b"] @ expert[f"{name}.lora_a"], 2)
        torch.testing.assert_close(
            small[f"{name}.lora_b"] @ small[f"{name}.lora_a"],
            wanted[1] @ wanted[0],
            rtol=1e-4,
            atol=1e-5,
        )
    for rank in (6, 7):
        with pytest.raises(ConfigError, match=f"of rank 6 already: give a rank below .*{rank}"):
            compress_rank(wild.anchor, expert, rank)


def test_what_cannot_be_cut_is_refused(wild):
    narrow = wild.expert(ROUTER, 0, 20)
    with pytest.raises(ConfigError, match=r"\[20, 32\] .*anchor's \[48, 32\].*Give a width"):
        compress_rank(wild.anchor, narrow, 2)
    whole = wild.expert(ROUTER, 0)
    with pytest.raises(ConfigError, match="Rank 33 is not between 1 and 32"):
        compress_rank(wild.anchor, whole, 33)
    for ranks in ((0, None), (2, 0)):
        with pytest.raises(ConfigError, match="Found rank 0; ranks are 1 or more"):
            compress_rank(wild.anchor, whole, *ranks)


# --- width --------------------------------------------------------------------------------------


def test_at_full_width_nothing_is_left_out(wild, pico_sets):
    expert = wild.expert(ROUTER, 0, **RICH)
    kept = prune_width(wild.anchor, expert, pico_sets["maths"], 48)
    assert kept.keys() == expert.keys()
    assert all(torch.equal(t, expert[n]) for n, t in kept.items())


@pytest.mark.parametrize("d_ff", [48, 20, 70])
@pytest.mark.parametrize("width", [1, 7, 19])
def test_the_columns_that_matter_most_are_kept_as_they_were(
    wild, pico_sets, d_ff, width, as_shipped
):
    """The importance of columns is computed here layer by layer, without hooks."""
    expert, data = wild.expert(ROUTER, 0, d_ff), pico_sets["maths"]
    small = prune_width(wild.anchor, expert, data, width)
    batches = training_batches(data, "train", 1, 256, seed=0)
    windows = [
        torch.from_numpy(batches.batch(i))[:, :-1] for i in range(min(32, batches.num_windows))
    ]
    model, ctx_of = wild.anchor.model, wild.anchor.model._context
    sums = [torch.zeros(d_ff, dtype=torch.float64) for _ in range(2)]
    for window in windows:
        ctx = ctx_of(window, None, None, None)
        x = model.embed_tokens(window)
        for i, block in enumerate(model.layers):
            gate, up, down = (expert[f"layers.{i}.{p}_proj.weight"] for p in ("gate", "up", "down"))
            h = x + block.post_attention_layernorm(block.self_attn(x, ctx, i))
            inner = torch.nn.functional.silu(h @ gate.T) * (h @ up.T)
            sums[i] += inner.abs().double().sum((0, 1))
            x = h + block.post_feedforward_layernorm(inner @ down.T)
    for i in range(2):
        gate, up, down = (expert[f"layers.{i}.{p}_proj.weight"] for p in ("gate", "up", "down"))
        matters = sums[i] * down.double().norm(dim=0)
        kept = sorted(matters.argsort(descending=True)[:width].tolist())
        assert torch.equal(small[f"layers.{i}.gate_proj.weight"], gate[kept])
        assert torch.equal(small[f"layers.{i}.up_proj.weight"], up[kept])
        assert torch.equal(small[f"layers.{i}.down_proj.weight"], down[:, kept])
        h = torch.randn(5, 32)
        wanted = (torch.nn.functional.silu(h @ gate.T) * (h @ up.T))[:, kept]
        found = torch.nn.functional.silu(h @ small[f"layers.{i}.gate_proj.weight"].T) * (
            h @ small[f"layers.{i}.up_proj.weight"].T
        )
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert all(small[n] is t for n, t in expert.items() if "_proj.weight" not in n)


def test_pruning_leaves_the_anchor_and_the_expert_alone(wild, pico_sets):
    expert = wild.expert(ROUTER, 0)
    before = {n: t.clone() for n, t in (expert | wild.anchor.model.state_dict()).items()}
    small = prune_width(wild.anchor, expert, pico_sets["maths"], 5)
    assert all(
        torch.equal(t, before[n]) for n, t in (expert | wild.anchor.model.state_dict()).items()
    )
    assert not any(m._forward_pre_hooks for m in wild.anchor.model.modules())
    assert shape_of(wild, small).d_ff == 5
    assemble_mixture(wild.anchor, {"a": small}, ROUTER)


@pytest.mark.parametrize("width", [0, 21])
def test_a_width_that_the_ffn_does_not_have_is_refused(wild, pico_sets, width):
    with pytest.raises(ConfigError, match=f"Width {width} is not between 1 and 20"):
        prune_width(wild.anchor, wild.expert(ROUTER, 0, 20), pico_sets["maths"], width)


def test_a_low_rank_ffn_has_no_columns_to_leave_out(wild, pico_sets):
    with pytest.raises(ConfigError, match=r"low-rank delta .* Give a rank, not a width"):
        prune_width(wild.anchor, wild.expert(ROUTER, 0, rank=3), pico_sets["maths"], 5)
