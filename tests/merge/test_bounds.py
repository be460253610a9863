"""Bounds on what a model computes, held against every number of every operation of a real one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from flexolmo.merge.bounds import SAFE, Extremes, find_reach
from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.checkpoint import build_anchor
from flexolmo.model.router import DiscriminantSettings
from flexolmo.model.shape import shape_of_tensors
from flexolmo.model.statistics import EvidenceSettings
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


def extremes_of(tensors, config):
    return Extremes(
        shape_of_tensors({n: tuple(t.shape) for n, t in tensors.items()}, config),
        {n: float(t.abs().max()) if t.is_floating_point() else 0.0 for n, t in tensors.items()},
    )


def enlarge(tensors, scales):
    """Each tensor of floats times one of `scales`, in turn."""
    return {
        n: t * scales[i % len(scales)] if t.is_floating_point() else t
        for i, (n, t) in enumerate(tensors.items())
    }


KINDS = ROUTERS | {
    "discriminant": DiscriminantSettings(),
    "context": DiscriminantSettings(has_context=True, half_life_tokens=4.0),
}


@pytest.mark.parametrize("router", ["evidence", "linear", "rich", "discriminant", "context"])
@given(
    names=st.sampled_from([["amber"], ["basalt"], ["amber", "basalt", "zinc"]]),
    scales=st.lists(st.floats(0.1, 1e4), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
@settings(IN_SESSION, max_examples=4)
def test_nothing_that_a_model_computes_exceeds_the_bound(house, wild, router, names, scales, seed):
    anchor, kind = house.anchor, KINDS[router]
    tensors = {
        n: house.tensors(n, router) if router in ROUTERS else wild.expert(kind, sum(n.encode()))
        for n in names
    }
    tensors = {n: enlarge(t, scales) for n, t in tensors.items()}
    extremes = [extremes_of(t, anchor.config) for t in tensors.values()]
    bound = find_reach(anchor.config, anchor.largest, extremes, kind)
    if isinstance(kind, EvidenceSettings):
        kind = kind.model_copy(update={"min_weight": 0.0})
    model = assemble_mixture(anchor, tensors, kind)
    ids = torch.randint(0, anchor.config.vocab_size, (2, 9), generator=torch.manual_seed(seed))
    with torch.no_grad(), Watched() as watched:
        logits = model(ids, active=model.expert_mask([None, names[:1]]))
    assert torch.isfinite(logits).all() or bound >= SAFE
    assert 0 < watched.largest <= bound, watched.by
    assert bound < SAFE or max(scales) > 100


def test_a_number_of_any_tensor_out_of_all_proportion_passes_the_bound(house):
    config, anchor = house.anchor.config, house.anchor
    for router in ("rich", "linear"):
        kind, beside = ROUTERS[router], extremes_of(house.tensors("basalt", router), config)
        good = extremes_of(house.tensors("amber", router), config)

        def reach(one, anchor=anchor.largest, beside=beside, kind=kind):
            return find_reach(config, anchor, [beside, one], kind)

        assert reach(good) < SAFE
        for key in (n for n, t in good.largest.items() if t):
            value = 1e38 if key.endswith("raw_bias") else SAFE / 2  # which is multiplied
            assert reach(replace(good, largest=good.largest | {key: value})) > SAFE, key
        for key in good.largest:
            less = {n: t for n, t in good.largest.items() if n != key}
            assert not reach(replace(good, largest=less)) < SAFE, key
        for key in anchor.largest:
            assert reach(good, anchor.largest | {key: 1e38}) > SAFE, key


def test_of_several_experts_the_bound_is_that_of_the_largest_and_of_what_they_do_together(house):
    config, anchor = house.anchor.config, house.anchor
    small, other = (extremes_of(house.tensors(n, "rich"), config) for n in ("amber", "basalt"))

    def reach(*experts):
        return find_reach(config, anchor.largest, experts, ROUTERS["rich"])

    assert reach(small, small) == reach(small)
    assert reach() <= min(reach(small), reach(other))
    assert max(reach(small), reach(other)) <= reach(small, other) == reach(other, small)


def test_an_anchor_knows_its_largest_numbers(house):
    anchor = house.anchor
    assert anchor.largest == {n: float(t.abs().max()) for n, t in anchor.model.state_dict().items()}
    again = build_anchor(
        anchor.model, anchor.tokenizer, anchor.public, anchor.router_rows, {}, forms=anchor.forms
    )
    assert (again.digest, again.largest) == (anchor.digest, anchor.largest)
