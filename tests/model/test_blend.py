"""The anchor and one learning expert, each read where it has weight."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.model.blend import blend_of


def make_weights(num_rows, public, owner, seed):
    """Weights [1,N,2] of which a fraction `public` is the anchor's alone, and `owner` the
    owner's."""
    g = torch.Generator().manual_seed(seed)
    own = torch.rand(num_rows, generator=g, dtype=torch.float64) * 0.8 + 0.1
    kind = torch.rand(num_rows, generator=g)
    own[kind < public] = 0.0
    own[kind > 1 - owner] = 1.0
    return torch.stack([1 - own, own], dim=-1)[None]


@given(
    num_rows=st.integers(1, 40),
    public=st.sampled_from([0.0, 0.03, 0.4, 1.0]),
    owner=st.sampled_from([0.0, 0.5, 0.9]),
    seed=st.integers(0, 99),
)
def test_a_blend_is_the_weighted_sum_and_so_are_its_gradients(num_rows, public, owner, seed):
    weights = make_weights(num_rows, public, owner, seed)
    g = torch.Generator().manual_seed(seed)
    x, a, b, out = (
        torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True)
        for s in ((num_rows, 3), (4, 3), (4, 3), (num_rows, 4))
    )
    blend = blend_of(weights, torch.float64)
    own_x, public_x = blend.split(x)
    found = blend.join(own_x @ a.T, public_x @ b.T)
    at_once = blend.multiply(x, a, b.detach())
    expected = weights[0, :, 1:] * (x @ a.T) + weights[0, :, :1] * (x @ b.T)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(at_once, expected)
    for one, other in zip(
        *(
            torch.autograd.grad((y * out.detach()).sum(), (x, a), retain_graph=True)
            for y in (at_once, expected)
        ),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    for one, other in zip(
        *(torch.autograd.grad((y * out.detach()).sum(), (x, a, b)) for y in (found, expected)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_each_reads_where_it_has_weight_alone():
    """The expert reads a few positions in vain where picking others would cost more."""
    for public, most in ((0.0, 0), (0.5, 0), (0.02, 100 / 16)):
        weights = make_weights(100, public, 0.9 - public, 3)
        blend = blend_of(weights, torch.float32)
        own_x, public_x = blend.split(torch.ones(100, 1))
        assert len(public_x) == (weights[..., 0] > 0).sum()
        assert 0 <= len(own_x) - (weights[..., 1] > 0).sum() <= most
