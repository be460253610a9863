"""Routers against plain double loops in float64."""

import copy
import math
from itertools import combinations, pairwise, product
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.router import (
    PUBLIC,
    DiscriminantSettings,
    EvidenceRouter,
    LinearRouter,
    LinearSettings,
    mixture_weights,
)
from flexolmo.model.statistics import EvidenceSettings

NAMES = [PUBLIC, "a", "b"]
V, EOS = 20, 4
BIGRAMS = {PUBLIC: 90, "a": 150, "b": 0, "c": 1}
FREQUENT = settings(
    derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXTS = st.lists(st.lists(st.integers(0, V - 1), min_size=40, max_size=40), min_size=1, max_size=3)


FORMS = st.sampled_from([(), (40,), (0, 60)])  # bigrams of tables of public text in other forms


def make_evidence_router(names=NAMES, forms=(), **changes):
    """With random tables, each drawn from its expert's name, or form's number, alone."""
    router = EvidenceRouter(EvidenceSettings(**changes), names, V, BIGRAMS, EOS, forms)
    sizes = {n: BIGRAMS[n] for n in names} | {str(i): n for i, n in enumerate(forms)}
    for name, size in sizes.items():
        generator = torch.Generator().manual_seed(ord(name[0]))
        table = table_of(router, name)
        keys = torch.randperm(V * V, generator=generator)[:size].msort()
        table.bigram_keys.copy_(keys)
        if name == PUBLIC:
            table.unigram.copy_(torch.randn(V, generator=generator).log_softmax(0))
            table.backoff.copy_(-torch.rand(V, generator=generator))
            table.bigram_log_probs.copy_(-3 * torch.rand(len(keys), generator=generator))
            continue
        for part in (table.tokens, table.contexts, table.pairs):
            part.copy_(2 * torch.randn(part.shape, generator=generator))
    return router


def table_of(router, name):
    """The table of an expert, or of a form by its number."""
    if name == PUBLIC:
        return router.public
    return router.forms[int(name)] if name.isdigit() else router.table(name)


def log_prob(table, before, token):
    """log p(token | before) of public text, in Python floats."""
    listed = dict(zip(table.bigram_keys.tolist(), table.bigram_log_probs.tolist(), strict=True))
    backed_off = table.backoff[before].item() + table.unigram[token].item()
    return listed.get(before * V + token, backed_off)


def evidence(router, name, before, token):
    """What a token says for an owner, in nats over public text, in Python floats."""
    if name == PUBLIC:
        return 0.0
    table = table_of(router, name)
    listed = dict(zip(table.bigram_keys.tolist(), table.pairs.tolist(), strict=True))
    preference = log_prob(router.public, before, token) - router.public.unigram[token].item()
    order = (1 - router.settings.public_order) * preference
    free = table.tokens[token].item() + table.contexts[before].item() - order
    return listed.get(before * V + token, free)


def domains(router):
    """Public, its forms by number, the owners."""
    return [PUBLIC, *map(str, range(len(router.forms))), *router.names[1:]]


def add_up(router, weights):
    """Weights of experts from those of domains: public's is that of its family."""
    family = 1 + len(router.forms)
    return [sum(weights[:family]), *weights[family:]]


def likelihoods(router, before, token):
    """What a token says for each domain, over public's."""
    s, found = router.settings, []
    for name in domains(router):
        gap = evidence(router, name, before, token)
        found.append(math.exp(s.tempering * min(max(gap, -s.clip_nats), s.clip_nats)))
    return found


def loop_over_tokens(router, ids, on=None):
    """The filter's definition: weights [T][E] of one text, in Python floats."""
    rate = router.settings.switch_rate
    on = [True] * len(router.names) if on is None else on
    on = [True] * len(router.forms) + list(on)
    prior = [x / sum(on) for x in on]
    weights, before, found = prior, EOS, []
    for token in ids:
        seen = [w * x for w, x in zip(weights, likelihoods(router, before, token), strict=True)]
        weights = (
            prior
            if token == EOS
            else [(1 - rate) * x / sum(seen) + rate * p for x, p in zip(seen, prior, strict=True)]
        )
        before = token
        found.append(add_up(router, weights))
    return found


def weights_of(router, ids, active=None, is_token=None):
    """[B,T,E] float64, all positions at once."""
    logs, _ = router(torch.tensor(ids), is_token, active, None)
    return logs.double().exp()


@given(
    texts=TEXTS,
    switch_rate=st.sampled_from([1e-4, 0.003, 0.5]),
    tempering=st.sampled_from([0.35, 1.0]),
    clip_nats=st.sampled_from([0.5, 5.0]),
    on=st.tuples(st.booleans(), st.booleans()),
    forms=FORMS,
)
@FREQUENT
def test_evidence_is_a_filter_over_domains(texts, switch_rate, tempering, clip_nats, on, forms):
    router = make_evidence_router(
        forms=forms, switch_rate=switch_rate, tempering=tempering, clip_nats=clip_nats
    )
    active = torch.tensor([[True, *on]] * len(texts))
    found = weights_of(router, texts, active)
    for b, text in enumerate(texts):
        expected = torch.tensor(loop_over_tokens(router, text, [True, *on]), dtype=torch.float64)
        torch.testing.assert_close(found[b], expected, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(
        found.sum(-1), torch.ones(len(texts), 40).double(), rtol=0, atol=1e-6
    )


@given(
    ids=st.lists(st.sampled_from([v for v in range(V) if v != EOS]), min_size=1, max_size=4),
    rate=st.sampled_from([0.003, 0.2, 0.9]),
    names=st.sampled_from([NAMES, [PUBLIC, "a"]]),
    forms=st.sampled_from([(), (40,)]),
)
@settings(FREQUENT, max_examples=15)
def test_evidence_is_the_sum_over_all_ways_to_switch(ids, rate, names, forms):
    """P(domain of the token to come | tokens), from every sequence of domains there could be."""
    router = make_evidence_router(names, forms, switch_rate=rate)
    E = len(domains(router))
    odds = [0.0] * E
    for path in product(range(E), repeat=len(ids) + 1):
        chance, before = 1 / E, EOS
        for token, here, after in zip(ids, path[:-1], path[1:], strict=True):
            chance *= likelihoods(router, before, token)[here]
            chance *= (1 - rate) * (here == after) + rate / E
            before = token
        odds[path[-1]] += chance
    expected = torch.tensor(add_up(router, odds), dtype=torch.float64) / sum(odds)
    torch.testing.assert_close(weights_of(router, [ids])[0, -1], expected, rtol=1e-5, atol=1e-9)


@given(
    ids=st.lists(st.integers(0, V - 1), min_size=60, max_size=60),
    cuts=st.sets(st.integers(1, 59), max_size=12),
    active=st.sampled_from([None, [[True, True, False], [True, False, True]]]),
    forms=FORMS,
)
@settings(FREQUENT, max_examples=25)
def test_evidence_read_in_any_pieces_is_evidence_read_at_once(ids, cuts, active, forms):
    router, active = make_evidence_router(forms=forms), active and torch.tensor(active)
    whole = torch.tensor([ids, ids[::-1]])
    expected, last = router(whole, None, active, None)
    state, pieces, edges = None, [], [0, *sorted(cuts), 60]
    for a, b in pairwise(edges):
        logs, state = router(whole[:, a:b], None, active, state)
        pieces.append(logs)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(state[0], last[0])
    torch.testing.assert_close(state[1], last[1], rtol=1e-9, atol=1e-15)


@given(
    texts=TEXTS,
    padding=st.lists(st.integers(0, 6), min_size=3, max_size=3),
    filler=st.sampled_from([0, EOS, V - 1]),
)
@FREQUENT
def test_evidence_takes_no_notice_of_left_padding(texts, padding, filler):
    """Neither of how much there is nor of what id it has, also for the tokens that follow."""
    router, width = make_evidence_router(), 46
    padding = padding[: len(texts)]
    rows = [[filler] * p + t + [7] * (width - p - 40) for p, t in zip(padding, texts, strict=True)]
    is_token = torch.arange(width)[None] >= torch.tensor(padding)[:, None]
    logs, state = router(torch.tensor(rows), is_token, None, None)
    after, _ = router(torch.tensor([[3]] * len(rows)), None, None, state)
    for b, p in enumerate(padding):
        alone, alone_state = router(torch.tensor([rows[b][p:]]), None, None, None)
        torch.testing.assert_close(logs[b, p:], alone[0])
        assert (logs[b, :p] == math.log(1 / 3)).all() or not p
        wanted, _ = router(torch.tensor([[3]]), None, None, alone_state)
        torch.testing.assert_close(after[b], wanted[0])


def test_padding_alone_leaves_evidence_as_it_was():
    router = make_evidence_router()
    _, state = router(torch.tensor([[1, 2, 3]]), None, None, None)
    _, same = router(torch.tensor([[9, 9]]), torch.tensor([[False, False]]), None, state)
    _, empty = router(torch.tensor([[9, 9]]), torch.tensor([[False, False]]), None, None)
    assert all(torch.equal(a, b) for a, b in zip(state, same, strict=True))
    assert empty[0].item() == EOS
    torch.testing.assert_close(empty[1], torch.full((3, 1), 1 / 3).double())


@given(
    before=st.lists(st.integers(0, V - 1), max_size=20),
    text=st.lists(st.integers(0, V - 1), min_size=1, max_size=20),
)
@FREQUENT
def test_after_the_end_of_a_text_evidence_starts_afresh(before, text):
    router = make_evidence_router()
    found = weights_of(router, [[*before, EOS, *text]])[0, len(before) :]
    torch.testing.assert_close(found[0], torch.full((3,), 1 / 3).double())
    torch.testing.assert_close(found[1:], weights_of(router, [text])[0])


@given(texts=TEXTS, data=st.data(), forms=FORMS)
@FREQUENT
def test_a_disabled_domain_gives_the_bits_of_one_never_merged(texts, data, forms):
    names = [PUBLIC, "a", "b", "c"]
    merged, ids = make_evidence_router(names, forms), torch.tensor(texts)
    subsets = [list(s) for n in range(4) for s in combinations("abc", n)]
    masks = data.draw(st.lists(st.sampled_from(subsets), min_size=len(texts), max_size=len(texts)))
    active = torch.tensor([[n == PUBLIC or n in m for n in names] for m in masks])
    found, _ = merged(ids, None, active, None)
    weights = mixture_weights(found, active, None, min_weight=0.05)
    for b, mask in enumerate(masks):
        never = make_evidence_router([PUBLIC, *mask], forms)
        expected, _ = never(ids, None, None, None)
        own = mixture_weights(expected, None, None, min_weight=0.05)
        for i, name in enumerate([PUBLIC, *mask]):
            assert torch.equal(found[b, :, names.index(name)], expected[b, :, i])
            assert torch.equal(weights[b, :, names.index(name)], own[b, :, i])
        off = [names.index(n) for n in names if n not in (PUBLIC, *mask)]
        assert (weights[b][:, off] == 0).all()


def test_a_form_of_public_text_counts_as_public_and_only_there():
    """A form's table that says what an owner's does takes from it, not from public."""
    plain, formed = make_evidence_router(), make_evidence_router(forms=(BIGRAMS["a"],))
    for part in ("tokens", "contexts", "pairs", "bigram_keys"):
        getattr(formed.forms[0], part).copy_(getattr(formed.table("a"), part))
    ids = torch.randint(0, V, (1, 300), generator=torch.Generator().manual_seed(0))
    ids[ids == EOS] = 0
    texts = ids.tolist()
    before, after = weights_of(plain, texts)[0], weights_of(formed, texts)[0]
    torch.testing.assert_close(after.sum(-1), torch.ones(300).double(), rtol=0, atol=1e-6)
    assert (after[:, 0] >= after[:, 1]).all()  # the form has the very weight of the owner
    assert after[:, 1].mean() < 0.8 * before[:, 1].mean()


def test_the_order_in_which_owners_came_changes_no_weight(wild):
    experts = {n: wild.expert(EvidenceSettings(), i) for i, n in enumerate("cab")}
    ids, routings = wild.ids(2, 30), []
    for names in ("cab", "abc", "bca"):
        model = assemble_mixture(wild.anchor, {n: experts[n] for n in names}, EvidenceSettings())
        routing = []
        model(ids, routing=routing)
        routings.append(routing[0])
    assert torch.equal(routings[0], routings[1]) and torch.equal(routings[0], routings[2])


def test_evidence_has_nothing_to_train():
    assert not list(make_evidence_router().parameters())


def test_linear_logits_are_rows_against_the_state_less_a_softplus():
    torch.manual_seed(0)
    router = LinearRouter(LinearSettings(), NAMES, 8)
    router.bias("a").data.fill_(1.5)
    h = torch.randn(2, 3, 8)
    for name, found in zip(NAMES, router(h, 6).unbind(-1), strict=True):
        row = router.row(name).weight[0].double()
        raw = {"a": 1.5, "b": -2.0}.get(name)
        bias = 0.0 if raw is None else math.log1p(math.exp(raw))
        torch.testing.assert_close(found.double(), h.double() @ row - bias, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(router(h, 6), router(h, None))
    assert PUBLIC not in router.raw_bias
    assert not LinearRouter(LinearSettings(has_bias=False), NAMES, 8).raw_bias


@pytest.mark.parametrize("bias", [{}, {"has_bias": False}, {"bias_form": "clamp"}])
def test_a_router_laid_out_says_the_same_and_follows_its_parameters(bias):
    torch.manual_seed(0)
    router, h = LinearRouter(LinearSettings(**bias), NAMES, 40), torch.randn(2, 3, 40)
    with torch.inference_mode():
        before = router(h, 6)
        router.lay_out()
        assert torch.equal(router(h, 6), before)
        assert router._laid_out() is not None
        for name in NAMES:
            router.row(name).weight.mul_(2.0)
        for raw in router.raw_bias.values():
            raw.sub_(3.0)
        anew = LinearRouter(LinearSettings(**bias), NAMES, 40)
        anew.load_state_dict(router.state_dict())
        assert torch.equal(router(h, 6), anew(h, 6))
        assert not torch.equal(router(h, 6), before)
        again = copy.deepcopy(router)
        assert again._memory is None and torch.equal(again(h, 6), anew(h, 6))
        router.row("b").weight.data = torch.zeros(1, 40)
        anew.row("b").weight.zero_()
        assert torch.equal(router(h, 6), anew(h, 6))
        assert router._memory is None
        again.lay_out()
        assert again.double()._memory is None
    router.lay_out()
    router(h, 6).sum().backward()
    assert all(row.weight.grad.any() for row in router.rows.values())


@given(data=st.data(), experts=st.integers(1, 5), top_k=st.sampled_from([None, 1, 2, 4]))
@FREQUENT
def test_weights_are_a_softmax_over_the_enabled_then_top_k(data, experts, top_k):
    """With ties, which go to the first name."""
    z = data.draw(
        st.lists(
            st.lists(
                st.sampled_from([-3.0, -0.5, 0.0, 0.5, 40.0]), min_size=experts, max_size=experts
            ),
            min_size=4,
            max_size=4,
        )
    )
    active = data.draw(st.lists(st.booleans(), min_size=experts, max_size=experts))
    active[0] = True
    logits = torch.tensor(z)[None]  # [1,4,E]
    found = mixture_weights(logits, torch.tensor([active]), top_k)
    for t in range(4):
        on = [e for e in range(experts) if active[e]]
        highest = max(z[t][e] for e in on)
        total = sum(math.exp(z[t][e] - highest) for e in on)
        best = sorted(on, key=lambda e: -z[t][e])[:top_k]
        for e in range(experts):
            wanted = math.exp(z[t][e] - highest) / total if e in best else 0.0
            assert found[0, t, e].item() == pytest.approx(wanted, rel=1e-6, abs=0)


@given(
    data=st.data(),
    experts=st.integers(1, 6),
    top_k=st.sampled_from([None, 1, 3]),
    min_weight=st.sampled_from([0.0, 0.05, 0.3, 0.9]),
)
@FREQUENT
def test_a_small_weight_is_none_but_the_largest_stays(data, experts, top_k, min_weight):
    """Just as if a mask had been laid over the weights; and all that is left is as it was."""
    draw = data.draw(st.lists(st.floats(-6, 6), min_size=7 * experts, max_size=7 * experts))
    logits = torch.tensor(draw).view(1, 7, experts)
    active = torch.tensor(
        [[True, *data.draw(st.lists(st.booleans(), min_size=experts - 1, max_size=experts - 1))]]
    )
    plain = mixture_weights(logits, active, top_k)
    found = mixture_weights(logits, active, top_k, min_weight)
    keep = (plain >= min_weight) | (plain == plain.amax(-1, keepdim=True))
    assert torch.equal(found, plain * keep)
    assert ((found > 0).sum(-1) >= 1).all()


def test_every_routers_page_row_says_what_its_settings_say():
    """docs/decisions/routers.md, the table: the kind first, whether opting out is strict last."""
    page = (Path(__file__).parents[2] / "docs" / "decisions" / "routers.md").read_text()
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| `")]
    said = {
        (row[0].split("`")[1], row[-1].strip().startswith("yes")) for row in rows if len(row) == 5
    }
    assert said == {
        (kind().kind, kind.is_strict)
        for kind in (EvidenceSettings, LinearSettings, DiscriminantSettings)
    }
