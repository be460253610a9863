"""Products by oneDNN: numbers and gradients of torch's own, by every way that training takes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

from flexolmo.model import onednn
from flexolmo.model.onednn import linear, multiply

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture(scope="module", autouse=True)
def always():
    """On any processor, and however few numbers there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "IS_FASTER", True)
        patch.setattr(onednn, "MANY_PRODUCTS", 0)
        yield


def drawn(shape, width, by_columns, seed):
    """Inputs [*shape,width] and a matrix [5,width], that learn."""
    draw = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(*shape, width, generator=draw), torch.randn(5, width, generator=draw)
    weight = weight.T.contiguous().T if by_columns else weight
    return x.requires_grad_(), weight.requires_grad_()


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    width=st.integers(1, 70),
    by_columns=st.booleans(),
    learns=st.sampled_from([(True, True), (True, False), (False, True)]),
    seed=st.integers(0, 99),
)
@settings(derandomize=True, max_examples=60, deadline=None)
def test_products_and_gradients_are_those_of_torch(shape, width, by_columns, learns, seed):
    x, weight = given = drawn(shape, width, by_columns, seed)
    for tensor, does in zip(given, learns, strict=True):
        tensor.requires_grad_(does)
    found, right = linear(x, weight), F.linear(x, weight)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    out_grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed))
    learnt = [t for t in given if t.requires_grad]
    mine, theirs = (torch.autograd.grad(y, learnt, out_grad) for y in (found, right))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    if weight.requires_grad and width > 1:  # as the optimizer holds it
        assert mine[-1].stride() == weight.stride()


def test_the_input_of_a_matrix_that_does_not_learn_is_not_kept():
    x, weight = drawn((6,), 7, True, 0)
    for learns in (True, False):
        kept = linear(x, weight.requires_grad_(learns)).grad_fn.saved_tensors
        assert [t is None for t in kept] == [not learns, False]


@pytest.mark.parametrize("of_weight", [None, 0])
def test_gradients_of_each_example_are_those_of_torch(of_weight):
    x, weight = (t.detach() for t in drawn((4, 3), 7, True, 0))
    weights = weight if of_weight is None else torch.stack([weight + i for i in range(4)])

    def each(product):
        loss = grad(lambda w, x: product(x, w).square().sum())
        return vmap(loss, in_dims=(of_weight, 0))(weights, x)

    torch.testing.assert_close(each(linear), each(F.linear), rtol=1e-4, atol=1e-4)


def test_the_compiler_takes_it_whole():
    x, weight = drawn((6,), 7, True, 0)
    run = torch.compile(lambda x: torch.relu(linear(torch.relu(x), weight)), fullgraph=True)
    found = torch.autograd.grad(run(x).sum(), (x, weight))
    right = torch.autograd.grad(F.linear(torch.relu(x), weight).relu().sum(), (x, weight))
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def test_other_precisions_are_left_to_torch():
    x, weight = (t.detach() for t in drawn((6,), 7, False, 0))
    for dtype in (torch.float64, torch.bfloat16):
        given = (x.to(dtype), weight.to(dtype))
        assert torch.equal(linear(*given), F.linear(*given))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert torch.equal(linear(x, weight), multiply(x, weight))


def test_what_is_read_as_stock_reads_it_is_left_to_torch(make_wild, monkeypatch):
    wild = make_wild()
    model, seen, real = wild.anchor.model, [], onednn.multiply
    monkeypatch.setattr(onednn, "multiply", lambda *given: seen.append(given) or real(*given))
    monkeypatch.setattr(model, "in_tiles", False)
    ids = wild.ids(2, 9, 0)
    model.eval()(ids)
    assert not seen
    model.train()(ids)
    model.eval()
    assert seen
