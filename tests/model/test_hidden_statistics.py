"""The discriminant router and the sums it comes from, against plain loops in float64."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexolmo.errors import DataError, MergeError
from flexolmo.model.assemble import assemble_mixture, expert_tensors
from flexolmo.model.hidden_statistics import (
    HiddenSums,
    discriminant_tensors,
    gather,
    mean_hidden_state,
)
from flexolmo.model.loss import language_model_loss
from flexolmo.model.router import (
    PUBLIC,
    DiscriminantRouter,
    DiscriminantSettings,
    LinearSettings,
    find_texts,
)
from flexolmo.model.statistics import EvidenceSettings

D, EOS, NAMES = 6, 4, [PUBLIC, "a", "b"]
OWNERS = ("amber", "basalt", "cobalt")
ROUTERS = {
    "states": DiscriminantSettings(tempering=0.4),
    "context": DiscriminantSettings(has_context=True, half_life_tokens=5.0),
}
FREQUENT = settings(
    derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
IDS = st.lists(st.integers(0, 9), min_size=24, max_size=24)


@pytest.fixture(params=ROUTERS)
def router(request):
    """The discriminant, of states alone and with context."""
    return ROUTERS[request.param]


def features_by_hand(ids, states, router):
    """What a row reads at each position, from the definition; ids [T], states [T][D]."""
    found = []
    for t in range(len(ids)):
        x = [float(v) for v in states[t]]
        if router.has_context:
            text = []  # positions of this text so far, from the last end on
            for s in range(t + 1):
                text = [] if ids[s] == EOS else [*text, s]
            halves = [
                0.5 ** ((len(text) - 1 - i) / router.half_life_tokens) for i in range(len(text))
            ]
            x += [
                sum(w * float(states[s][d]) for w, s in zip(halves, text, strict=True))
                / (sum(halves) or 1.0)
                for d in range(len(states[t]))
            ]
        found.append(x)
    return np.array(found)


def make_router(settings):
    module = DiscriminantRouter(settings, NAMES, D, layer=0)
    generator = torch.Generator().manual_seed(0)
    for buffer in module.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return module


def make_states(*shape):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(1))


@given(texts=st.lists(IDS, min_size=1, max_size=3), kind=st.sampled_from(sorted(ROUTERS)))
@FREQUENT
def test_logits_are_tempered_log_odds_of_state_and_running_mean(texts, kind):
    router, states = make_router(ROUTERS[kind]), make_states(len(texts), 24)
    found, _ = router(states, find_texts(torch.tensor(texts), None, EOS, ROUTERS[kind]), None)
    assert found.shape[-1] == 3 and not found[..., 0].any(), "public's logit is 0"
    for b, ids in enumerate(texts):
        x = features_by_hand(ids, states[b], ROUTERS[kind])
        for name, logits in zip(NAMES[1:], found.unbind(-1)[1:], strict=True):
            row = router.row(name)
            expected = ROUTERS[kind].tempering * (
                x @ row.weight[0].double().numpy() + row.offset.item()
            )
            expected[np.array(ids) == EOS] = 0.0
            np.testing.assert_allclose(logits[b].numpy(), expected, rtol=1e-4, atol=1e-5)


@given(
    texts=st.lists(IDS, min_size=2, max_size=2),
    cuts=st.sets(st.integers(1, 23), max_size=8),
    padding=st.lists(st.integers(0, 5), min_size=2, max_size=2),
    kind=st.sampled_from(sorted(ROUTERS)),
)
@FREQUENT
def test_read_in_pieces_and_behind_padding_is_read_at_once(texts, cuts, padding, kind):
    router, states = make_router(ROUTERS[kind]), make_states(2, 24)
    ids = torch.tensor(texts)
    is_token = torch.arange(24)[None] >= torch.tensor(padding)[:, None]
    state, pieces = None, []
    for a, b in pairwise([0, *sorted(cuts), 24]):
        texts_here = find_texts(ids[:, a:b], is_token[:, a:b], EOS, ROUTERS[kind])
        logits, state = router(states[:, a:b], texts_here, state)
        pieces.append(logits)
    found = torch.cat(pieces, dim=1)  # [B,T,E]
    for b, p in enumerate(padding):
        alone, last = router(
            states[b : b + 1, p:], find_texts(ids[b : b + 1, p:], None, EOS, ROUTERS[kind]), None
        )
        torch.testing.assert_close(found[b, p:], alone[0], rtol=1e-4, atol=1e-5)
        assert (state is None) == (last is None) == (not ROUTERS[kind].has_context)
        if state is not None:
            torch.testing.assert_close(state[b], last[0], rtol=1e-4, atol=1e-5)


def test_padding_alone_leaves_the_mean_as_it_was():
    settings, states = ROUTERS["context"], make_states(1, 5)
    router, ids = make_router(settings), torch.tensor([[1, 2, 3, EOS, EOS]])
    _, state = router(states[:, :3], find_texts(ids[:, :3], None, EOS, settings), None)
    padding = torch.zeros(1, 2, dtype=torch.bool)
    _, same = router(states[:, 3:], find_texts(ids[:, 3:], padding, EOS, settings), state)
    assert torch.equal(state, same)


def test_a_text_far_longer_than_the_half_life_stays_finite():
    settings = DiscriminantSettings(has_context=True, half_life_tokens=0.5)
    ids = torch.zeros(1, 1000, dtype=torch.long)
    logits, state = make_router(settings)(
        make_states(1, 1000), find_texts(ids, None, EOS, settings), None
    )
    assert torch.isfinite(logits).all() and torch.isfinite(state).all()


# --- in a model -----------------------------------------------------------------------------------


def test_a_model_routes_by_each_layers_own_states(wild, router):
    model, routing, inputs = wild.mixture(router, OWNERS, 2), [], []
    for mixture in model.mixtures():
        mixture.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    ids, eos = wild.ids(2, 20), wild.anchor.config.eos_token_id
    ids[0, [0, 7, 8]] = ids[1, 19] = eos
    mask = model.expert_mask([None, ("amber", "cobalt")])
    model(ids, active=mask, routing=routing)
    for i, h in enumerate(inputs):
        for b in range(2):
            x = features_by_hand([EOS if v == eos else -1 for v in ids[b]], h[b].tolist(), router)
            z = [np.zeros(20)]
            for name in OWNERS:
                row = model.mixtures()[i].router.row(name)
                z.append(
                    router.tempering * (x @ row.weight[0].double().numpy() + row.offset.item())
                )
            z = torch.tensor(np.stack(z, -1)).masked_fill((ids[b] == eos)[:, None], 0.0)
            weights = z.masked_fill(~mask[b], -math.inf).softmax(-1)
            best = weights.sort(dim=-1, descending=True, stable=True).indices[:, :2]
            kept = torch.zeros_like(weights).scatter(-1, best, 1)
            torch.testing.assert_close(routing[i][b].double(), weights * kept, rtol=1e-3, atol=1e-4)


@given(
    cuts=st.sets(st.integers(1, 23), max_size=6),
    seed=st.integers(0, 99),
    padding=st.lists(st.integers(0, 7), min_size=2, max_size=2),
)
@settings(FREQUENT, max_examples=15)
def test_cached_and_padded_is_whole(wild, router, cuts, seed, padding):
    model, ids = wild.mixture(router, OWNERS), wild.ids(2, 24, seed)
    is_token = torch.arange(24)[None] >= torch.tensor(padding)[:, None]
    cache, pieces = model.new_cache(), []
    for a, b in pairwise([0, *sorted(c for c in cuts if c >= max(padding)), 24]):
        pieces.append(model(ids[:, a:b], cache=cache, is_token=is_token[:, a:b]))
    found = torch.cat(pieces, dim=1)
    for b, p in enumerate(padding):
        torch.testing.assert_close(found[b, p:], model(ids[b : b + 1, p:])[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("off", OWNERS)
def test_what_a_disabled_expert_holds_changes_no_bit(wild, router, off):
    ids, found = wild.ids(2, 16), []
    others = [n for n in OWNERS if n != off]
    for scale in (1.0, 1e30, 3e38):
        experts = {n: wild.expert(router, i) for i, n in enumerate(OWNERS)}
        if scale > 1:
            experts[off] = {n: t.sign() * scale for n, t in experts[off].items()}
        model = assemble_mixture(wild.anchor, experts, router)
        found.append(model(ids, active=model.expert_mask([others, ()])))
    assert torch.isfinite(found[0]).all()
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(found[0][1], wild.anchor.model(ids)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_tensors_come_back_in_float32_and_nothing_of_it_learns(make_wild, router, dtype):
    wild = make_wild(dtype)
    expert = wild.expert(router, 3)
    model = assemble_mixture(wild.anchor, {"a": expert, "b": wild.expert(router, 4)}, router)
    found = expert_tensors(model, "a")
    assert found.keys() == expert.keys()
    for name, t in expert.items():
        assert found[name].dtype == (torch.float32 if "router" in name else dtype)
        assert torch.equal(found[name], t), name
        assert isinstance(found[name], torch.nn.Parameter) == ("router" not in name)
    assert torch.isfinite(language_model_loss(model, wild.ids(2, 9)))


def test_it_takes_ffns_alone(wild, router):
    with pytest.raises(MergeError, match="changes more than the FFN"):
        assemble_mixture(wild.anchor, {"a": wild.expert(router, 0, head_rank=2)}, router)
    for other in (LinearSettings(), EvidenceSettings()):
        with pytest.raises(MergeError, match=r"a: (extra|missing) .*router\."):
            assemble_mixture(wild.anchor, {"a": wild.expert(router, 0)}, other)


# --- sums -----------------------------------------------------------------------------------------


def states_of(model, ids):
    """What stands before each layer's FFN, [L][T] arrays [D]; ids [1,T]."""
    seen = []
    hooks = [
        b.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].numpy()))
        for b in model.layers
    ]
    model.hidden(ids)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("settings", [None, *ROUTERS.values()])
def test_sums_are_those_of_a_loop_over_tokens(wild, settings):
    model, eos = wild.anchor.model, wild.anchor.config.eos_token_id
    windows = [wild.ids(1, n, n).numpy()[0] for n in (5, 9, 1)] + [wild.ids(1, 7).numpy()]
    windows[0][2] = windows[1][0] = eos
    found = gather(model, windows, settings)
    R = 32 if settings is None else settings.num_features(32)
    count, total, gram = 0, np.zeros((2, R)), np.zeros((2, R, R))
    for window in map(np.atleast_2d, windows):
        ends = window[0] == eos
        for i, h in enumerate(states_of(model, torch.from_numpy(window))):
            x = (
                h.astype(float)
                if settings is None
                else features_by_hand(np.where(ends, EOS, -1), h, settings)
            )
            for t in range(len(ends)):
                if settings is None or not ends[t]:
                    count += i == 0
                    total[i] += x[t]
                    gram[i] += np.outer(x[t], x[t])
    assert found.count == count and found.total.dtype == torch.float64
    np.testing.assert_allclose(found.total.numpy(), total, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.gram.numpy(), gram, rtol=1e-4, atol=1e-3)
    assert not any(b.mlp._forward_pre_hooks for b in model.layers)


def test_sums_of_two_texts_are_the_sums_added(wild, router):
    one, two = [wild.ids(1, 8, 1).numpy()], [wild.ids(1, 8, 2).numpy()]
    parts = [gather(wild.anchor.model, text, router) for text in (one, two)]
    both = gather(wild.anchor.model, one + two, router)
    assert both.count == sum(p.count for p in parts)
    torch.testing.assert_close(both.gram, sum(p.gram for p in parts))


def test_no_text_at_all_is_refused(wild, router):
    nothing = np.full(4, wild.anchor.config.eos_token_id)
    for windows in ([], [nothing]):
        with pytest.raises(DataError, match="No token"):
            gather(wild.anchor.model, windows, router)


def made_sums(rng, count=200, layers=2, width=4, shift=0.0):
    x = rng.normal(size=(layers, count, width)) @ rng.normal(size=(width, width)) + shift
    x = torch.from_numpy(x)
    return HiddenSums(count, x.sum(1), x.mT @ x), x.numpy()


@pytest.mark.parametrize("shrinkage", [0.1, 1.0])
def test_a_row_is_the_log_odds_of_two_gaussians_with_publics_covariance(shrinkage):
    rng = np.random.default_rng(0)
    public, x = made_sums(rng)
    own, y = made_sums(rng, count=50, shift=1.5)
    settings = DiscriminantSettings(shrinkage=shrinkage)
    found = discriminant_tensors(own, public, settings)
    assert {n: tuple(t.shape) for n, t in found.items()} == {
        f"layers.{i}.router.{n}": s
        for i in range(2)
        for n, s in (("weight", (1, 4)), ("offset", (1,)))
    }
    for i in range(2):
        S = np.cov(x[i].T, bias=True)
        S = (1 - shrinkage) * S + shrinkage * np.diag(np.diag(S))

        def log_density(z, mean, S=S):
            return -(z - mean) @ np.linalg.inv(S) @ (z - mean) / 2

        for z in rng.normal(size=(9, 4)) * 3:
            wanted = log_density(z, y[i].mean(0)) - log_density(z, x[i].mean(0))
            got = (
                found[f"layers.{i}.router.weight"][0].double().numpy() @ z
                + found[f"layers.{i}.router.offset"].item()
            )
            assert got == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_text_like_publics_gets_a_row_of_nothing():
    public, _ = made_sums(np.random.default_rng(0))
    found = discriminant_tensors(public, public, DiscriminantSettings())
    assert not any(t.any() for t in found.values())


def test_the_mean_state_is_a_unit_vector_over_all_positions(wild):
    windows = [wild.ids(1, n, n).numpy() for n in (3, 9, 5)]
    states = torch.cat([wild.anchor.model.hidden(torch.from_numpy(w))[0] for w in windows])
    expected = states.double().mean(0)
    found = mean_hidden_state(wild.anchor.model, windows)
    torch.testing.assert_close(found.double(), expected / expected.norm(), rtol=1e-5, atol=1e-6)
