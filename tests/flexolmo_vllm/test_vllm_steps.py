"""Steps of vLLM's, tried without it: requests read in parts, side by side, each with its own
experts, against the same texts read whole by a model of these experts alone."""

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.model.assemble import erase_expert
from flexolmo.model.router import LinearSettings
from flexolmo.model.statistics import EvidenceSettings
from flexolmo_vllm.following import Follower, Part
from flexolmo_vllm.step import Routing, predict, public_alone, read_tokens
from made_mixtures import IN_SESSION

NAMES = ("amber", "basalt", "zinc")
SETS = [(), ("amber",), ("basalt", "zinc"), NAMES]
ROUTERS = {"evidence": EvidenceSettings(), "linear": LinearSettings(), "rich": EvidenceSettings()}


@pytest.fixture(scope="module")
def mixtures(wild):
    """`mixtures(kind, names)`: a mixture made once, of unequal widths, or of all removable parts
    whole and low-rank in turn."""

    @cache
    def get(kind, names=NAMES):
        shapes = wild.rich_shapes(ROUTERS[kind], NAMES) if kind == "rich" else None
        return wild.mixture(
            ROUTERS[kind],
            list(names),
            2 if kind == "linear" else None,
            shapes and {n: shapes[n] for n in names},
        )

    return get


class Runner:
    """Does what vLLM does: reads parts of requests, with keys and values of each apart."""

    def __init__(self, model, panels=None):
        self.model, self.follower, self.panels = model, Follower(model), panels
        self.kept = {}  # of each request and layer, keys and values

    def read(self, parts):
        """Logits [.,V] after the tokens of each part."""
        routing = Routing(self.follower.mask(parts), self.follower.follow(parts))
        ids = torch.from_numpy(np.concatenate([p.ids[p.start :] for p in parts]))
        positions = torch.cat([torch.arange(p.start, len(p.ids)) for p in parts])
        rows = read_tokens(
            self.model, ids, positions, routing, lambda *x: self.attend(parts, *x), self.panels
        )
        if routing.weights is not None:
            self.follower.count(parts, routing.weights)
        return predict(self.model, rows, self.panels).split([p.num_tokens for p in parts])

    def attend(self, parts, layer, q, k, v):
        sizes = [p.num_tokens for p in parts]
        found = []
        for part, *own in zip(parts, *(x[:, :, 0].split(sizes) for x in (q, k, v)), strict=True):
            q_own, *new = own  # [T,H,C], [T,G,C] twice
            for which, x in enumerate(new):
                before = self.kept.get((part.request, layer, which), x[:0])[: part.start]
                self.kept[part.request, layer, which] = torch.cat([before, x])
            keys, values = (self.kept[part.request, layer, i].transpose(0, 1) for i in (0, 1))
            seen = torch.arange(len(part.ids)) <= torch.arange(part.start, len(part.ids))[:, None]
            y = F.scaled_dot_product_attention(
                q_own.transpose(0, 1)[None],
                keys[None],
                values[None],
                attn_mask=seen,
                enable_gqa=True,
            )[0]
            found.append(y.transpose(0, 1).flatten(1))
        return torch.cat(found)[:, None]


PLANS = st.lists(
    st.tuples(st.sampled_from(SETS), st.lists(st.integers(1, 40), min_size=1, max_size=5)),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("kind", ROUTERS)
@IN_SESSION
@given(PLANS, st.integers(0, 3), st.sampled_from([None, 0.0, 0.5]), st.booleans())
def test_requests_side_by_side_are_read_as_if_each_alone(
    mixtures, wild, kind, plans, seed, puts_back, has_panels
):
    model = mixtures(kind)
    runner = Runner(model, model.cut_panels() if has_panels else None)
    texts = [wild.ids(1, sum(sizes), seed=10 * seed + i)[0] for i, (_, sizes) in enumerate(plans)]
    read = [[] for _ in plans]  # logits
    starts = [0] * len(plans)
    for turn in range(max(len(sizes) for _, sizes in plans)):
        numbers = [i for i, (_, sizes) in enumerate(plans) if turn < len(sizes)]
        if puts_back is not None and turn == 1 and 0 in numbers:
            # vLLM takes memory from a request, which is read again, behind what is still cached
            starts[0] = int(puts_back * starts[0])
            read[0] = []
        parts = []
        for i in numbers:
            enabled, sizes = plans[i]
            end = sum(sizes[: turn + 1])
            parts.append(Part(str(i), texts[i][:end].numpy(), starts[i], frozenset(enabled)))
        for i, part, logits in zip(numbers, parts, runner.read(parts), strict=True):
            read[i].append(logits)
            starts[i] = len(part.ids)
    for i, (enabled, _) in enumerate(plans):
        alone = mixtures(kind, enabled)
        routing = []
        expected = alone(texts[i][None], routing=routing)[0]
        found = torch.cat(read[i])
        torch.testing.assert_close(found, expected[-len(found) :], rtol=0, atol=2e-4)
        if not (
            puts_back is not None and i == 0 and kind == "linear"
        ):  # counts what it reads twice, twice
            means = torch.stack(routing).mean(0)[0].double().mean(0)
            shares = runner.follower.shares(str(i), enabled)
            assert shares == pytest.approx(
                dict(zip(alone.expert_names, means.tolist(), strict=True)), abs=1e-5
            )


def test_a_state_is_found_again_behind_a_prefix_that_another_has_read(mixtures, wild):
    model = mixtures("evidence")
    ids, enabled = wild.ids(1, 90)[0].numpy(), frozenset({"amber", "zinc"})
    whole, late = Follower(model), Follower(model)
    expected = whole.follow([Part("a", ids, 0, enabled)])
    found = late.follow([Part("b", ids, 64, enabled)])
    assert torch.equal(found, expected[64:])
    assert late.shares("b", enabled) == whole.shares("a", enabled)


def test_an_expert_of_nan_that_is_off_changes_no_bit(mixtures, wild):
    for kind in ROUTERS:
        model = wild.mixture(
            ROUTERS[kind],
            list(NAMES),
            shapes=wild.rich_shapes(ROUTERS[kind], NAMES) if kind == "rich" else None,
        )
        parts = [
            Part(str(i), wild.ids(1, 30, seed=i)[0].numpy(), 0, frozenset(s))
            for i, s in enumerate([(), ("amber",), ("amber", "basalt")])
        ]
        panels = model.cut_panels()
        before = Runner(model, panels).read(parts)
        erase_expert(model, "zinc", panels)
        assert all(map(torch.equal, before, Runner(model, panels).read(parts)))
        broken = [Part("3", parts[0].ids, 0, frozenset({"zinc"}))]
        assert Runner(model, panels).read(broken)[0].isnan().any()


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_step_that_nobody_asked_for_enables_nothing(mixtures, wild, kind):
    model, ids = mixtures(kind), wild.ids(1, 5)[0]
    parts = [Part("0", ids.numpy(), 0, frozenset())]
    runner = Runner(model)
    routing = public_alone(model, 5)
    rows = read_tokens(model, ids, torch.arange(5), routing, lambda *x: runner.attend(parts, *x))
    expected = mixtures(kind, ())(ids[None])[0]
    torch.testing.assert_close(predict(model, rows), expected, rtol=0, atol=2e-4)


def test_what_is_over_is_forgotten(mixtures, wild):
    follower = Follower(mixtures("evidence"))
    ids = wild.ids(1, 8)[0].numpy()
    follower.follow([Part(name, ids, 0, frozenset()) for name in "ab"])
    follower.keep("b")
    assert follower.progress.keys() == {"b"}
    assert follower.shares("a", ["amber"]) == {"public": 0.0, "amber": 0.0}
