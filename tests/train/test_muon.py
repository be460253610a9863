"""Muon against torch's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flexolmo.train import muon
from flexolmo.train.muon import Muon, orthogonalise

SETTINGS = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1, "adjust_lr_fn": "original"}
# one shape often, one once, tall, wide, one whose columns lie together
SHAPES = [(12, 8), (6, 6), (12, 8), (5, 16), (12, 8), (9, 4)]


def make_matrices(seed=0):
    g = torch.Generator().manual_seed(seed)
    found = [nn.Parameter(torch.randn(s, generator=g)) for s in SHAPES]
    found[-1] = nn.Parameter(found[-1].detach().T.contiguous().T)
    return found


def run(kind, steps=4):
    matrices = make_matrices()
    optimizer = kind(matrices, **SETTINGS)
    for step in range(steps):
        for p, grad in zip(matrices, make_matrices(1 + step), strict=True):
            p.grad = grad.detach()
        matrices[1].grad = None if step == 2 else matrices[1].grad
        optimizer.step()
    return matrices, [optimizer.state[p] for p in matrices]


@pytest.mark.parametrize("batch", [1, 200, 2**18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_and_state_are_those_of_torch(monkeypatch, dtype, batch):
    """But for bfloat16's rounding, in which torch orthogonalises."""
    monkeypatch.setattr(muon, "product_dtype", lambda device: dtype)
    monkeypatch.setattr(muon, "BATCH_NUMBERS", batch)
    (found, state), (expected, state_there) = run(Muon), run(torch.optim.Muon)
    for p, q, before in zip(found, expected, make_matrices(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)
        assert (q - before).abs().max() > 0.01
    for mine, theirs in zip(state, state_there, strict=True):
        assert mine.keys() == theirs.keys() == {"momentum_buffer"}
        torch.testing.assert_close(mine["momentum_buffer"], theirs["momentum_buffer"])


@given(
    rows=st.integers(2, 12),
    columns=st.integers(2, 12),
    count=st.integers(1, 3),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
)
def test_directions_are_kept_and_lengths_made_equal(rows, columns, count, seed, scale):
    """In float64: U f(S) V^T for the polynomial f, whatever the scale and the batch."""
    g = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(count, rows, columns, generator=g, dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    expected = u * s[:, None] @ v
    found = orthogonalise(x, (3.4445, -4.775, 2.0315), 5, 1e-7)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("has", "dtype"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_f": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_products_are_in_half_precision_where_the_processor_has_it(monkeypatch, has, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert muon.product_dtype(torch.device("cpu")) == dtype
    assert muon.product_dtype(torch.device("cuda")) == torch.bfloat16
