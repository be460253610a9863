"""Bounds on what a model computes, held against every number of every operation of a real one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from flexolmo.merge.bounds import SAFE, find_reach
from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.checkpoint import build_anchor
from flexolmo.model.shape import shape_of_tensors
from made_mixtures import IN_SESSION, ROUTERS


class Watched(TorchDispatchMode):
    """Holds the largest number that any operation gave. Squares in norms and exponentials in SiLU,
    which give 0 where they overflow, and memory that is not filled yet do not count."""

    largest, by = 0.0, ""
    aside = ("exp_", "pow", "square", "mean", "add_", "empty", "empty_strided", "new_empty")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        for t in out if isinstance(out, tuple | list) else [out]:
            is_seen = (
                isinstance(t, torch.Tensor) and t.is_floating_point() and name not in self.aside
            )
            finite = t[t.isfinite()] if is_seen else torch.zeros(0)
            if finite.numel() and (most := float(finite.abs().max())) > self.largest:
                self.largest, self.by = most, name
        return out


def largest_of(tensors):
    return {n: float(t.abs().max()) if t.is_floating_point() else 0.0 for n, t in tensors.items()}


@pytest.mark.parametrize("router", ["evidence", "linear", "rich"])
@given(
    name=st.sampled_from(["amber", "basalt"]), scale=st.floats(0.1, 1e4), seed=st.integers(0, 99)
)
@settings(IN_SESSION, max_examples=4)
def test_nothing_that_a_model_computes_exceeds_the_bound(house, router, name, scale, seed):
    tensors = {
        n: t * scale if t.is_floating_point() else t for n, t in house.tensors(name, router).items()
    }
    anchor, kind = house.anchor, ROUTERS[router]
    shape = shape_of_tensors({n: tuple(t.shape) for n, t in tensors.items()}, anchor.config)
    bound = find_reach(anchor.config, anchor.largest, largest_of(tensors), shape, kind)
    if router == "evidence":
        kind = kind.model_copy(update={"min_weight": 0.0})
    model = assemble_mixture(anchor, {name: tensors}, kind)
    ids = torch.randint(0, anchor.config.vocab_size, (2, 9), generator=torch.manual_seed(seed))
    with torch.no_grad(), Watched() as watched:
        logits = model(ids)
    assert torch.isfinite(logits).all()
    assert 0 < watched.largest <= bound, watched.by
    assert bound < SAFE or scale > 100


def test_a_number_of_any_tensor_out_of_all_proportion_passes_the_bound(house):
    tensors = house.tensors("amber", "rich")
    config, anchor = house.anchor.config, house.anchor
    shape = shape_of_tensors({n: tuple(t.shape) for n, t in tensors.items()}, config)
    good = largest_of(tensors)
    assert find_reach(config, anchor.largest, good, shape, ROUTERS["rich"]) < SAFE
    for key in (n for n in good if not n.startswith("router.")):
        bad = good | {key: 1e38}
        assert find_reach(config, anchor.largest, bad, shape, ROUTERS["rich"]) > SAFE, key
    for key in anchor.largest:
        bad = anchor.largest | {key: 1e38}
        assert find_reach(config, bad, good, shape, ROUTERS["rich"]) > SAFE, key


def test_an_anchor_knows_its_largest_numbers(house):
    anchor = house.anchor
    assert anchor.largest == largest_of(anchor.model.state_dict())
    again = build_anchor(
        anchor.model, anchor.tokenizer, anchor.public, anchor.router_rows, {}, forms=anchor.forms
    )
    assert (again.digest, again.largest) == (anchor.digest, anchor.largest)
