"""Routers against plain double loops in float64."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexolmo.model.router import (
    PUBLIC,
    EvidenceRouter,
    LinearRouter,
    LinearSettings,
    mixture_weights,
)
from flexolmo.model.statistics import EvidenceSettings

NAMES = [PUBLIC, "a", "b"]
V, R, EOS = 20, 3, 4
FREQUENT = settings(deadline=None, derandomize=True, max_examples=40,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])


def make_evidence_router(**changes):
    generator = torch.Generator().manual_seed(0)
    router = EvidenceRouter(EvidenceSettings(**changes), NAMES, V, R, EOS)
    router.public_clusters.copy_(torch.randn(R, V, generator=generator))
    with torch.no_grad():
        for table in router.tables.values():
            table.copy_(torch.randn(V, generator=generator))
    return router


def loop_over_positions(router, ids):
    """The router's definition, word for word: {name: [T]} for one text, in Python floats."""
    settings = router.settings
    decay = 0.5 ** (1 / settings.half_life_tokens)
    tables = {n: router.table(n).tolist() for n in router.names[1:]}
    clusters = router.public_clusters.tolist()
    logits = {n: [] for n in NAMES}
    for t in range(len(ids)):
        count, owners, public = 0.0, dict.fromkeys(tables, 0.0), [0.0] * len(clusters)
        for s in range(t + 1):
            if EOS in ids[s:t + 1]:  # the end of a text lies between: forgotten
                continue
            share = decay ** (t - s)
            count += share
            for n in owners:
                owners[n] += share * tables[n][ids[s]]
            for r in range(len(public)):
                public[r] += share * clusters[r][ids[s]]
        scale = 1 / (1 + count / settings.saturation_tokens)
        for n in owners:
            logits[n].append(owners[n] * scale)
        mean = sum(math.exp(c * scale) for c in public) / len(public)
        logits[PUBLIC].append(math.log(mean))
    return logits


@given(texts=st.lists(st.lists(st.integers(0, V - 1), min_size=40, max_size=40), min_size=1,
                      max_size=3),
       half_life=st.sampled_from([1.0, 8.0, 128.0]), saturation=st.sampled_from([0.5, 16.0]))
@FREQUENT
def test_evidence_is_the_decayed_saturated_sum_since_the_text_began(texts, half_life, saturation):
    router = make_evidence_router(half_life_tokens=half_life, saturation_tokens=saturation)
    found, _ = router(torch.tensor(texts), None, None)
    for b, text in enumerate(texts):
        for name, expected in loop_over_positions(router, text).items():
            torch.testing.assert_close(found[NAMES.index(name)][b].double(),
                                       torch.tensor(expected, dtype=torch.float64),
                                       rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("end", [None, 100, 255, 256, 257])
def test_evidence_crosses_the_256_positions_read_at_a_time(end):
    router = make_evidence_router()
    ids = torch.randint(0, V, (1, 300), generator=torch.Generator().manual_seed(1))
    ids[ids == EOS] = 0
    if end is not None:
        ids[0, end] = EOS
    found, _ = router(ids, None, None)
    for name, expected in loop_over_positions(router, ids[0].tolist()).items():
        torch.testing.assert_close(found[NAMES.index(name)][0].double(),
                                   torch.tensor(expected, dtype=torch.float64),
                                   rtol=1e-5, atol=1e-5)


@given(ids=st.lists(st.integers(0, V - 1), min_size=600, max_size=600),
       cuts=st.sets(st.integers(1, 599), max_size=12))
@settings(FREQUENT, max_examples=25)
def test_evidence_read_in_any_pieces_is_evidence_read_at_once(ids, cuts):
    router = make_evidence_router(half_life_tokens=64.0)
    whole = torch.tensor([ids, ids[::-1]])
    whole[0, 100:] += whole[0, 100:] == EOS  # one row without an end from there on
    expected, last = router(whole, None, None)
    state, pieces, edges = None, [], [0, *sorted(cuts), 600]
    for a, b in pairwise(edges):
        logits, state = router(whole[:, a:b], None, state)
        pieces.append(logits)
    for e, wanted in enumerate(expected):
        torch.testing.assert_close(torch.cat([p[e] for p in pieces], dim=1), wanted,
                                   rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)


def test_padding_counts_as_nothing_read():
    router = make_evidence_router()
    text = torch.tensor([[1, 2, 3, 5]])
    alone, _ = router(text, None, None)
    for filler in (0, EOS):
        padded = torch.nn.functional.pad(text, (3, 0), value=filler)
        is_token = torch.tensor([[False] * 3 + [True] * 4])
        found, _ = router(padded, is_token, None)
        for a, b in zip(alone, found, strict=True):
            torch.testing.assert_close(b[:, 3:], a)
            assert (b[:, :3].abs() < 1e-6).all()


def test_an_empty_document_gives_no_evidence():
    found, _ = make_evidence_router()(torch.tensor([[1, 2, EOS, EOS, 3]]), None, None)
    for logit in found:
        assert (logit[0, 2:4].abs() < 1e-6).all()
        assert logit[0, 4].abs() > 1e-3


def test_evidence_has_nothing_to_train():
    assert not any(p.requires_grad for p in make_evidence_router().parameters())


def test_linear_logits_are_rows_against_the_state_less_a_softplus():
    torch.manual_seed(0)
    router = LinearRouter(LinearSettings(), NAMES, 8)
    router.bias("a").data.fill_(1.5)
    h = torch.randn(2, 3, 8)
    for name, found in zip(NAMES, router(h), strict=True):
        row = router.row(name).weight[0].double()
        raw = {"a": 1.5, "b": -2.0}.get(name)
        bias = 0.0 if raw is None else math.log1p(math.exp(raw))
        torch.testing.assert_close(found.double(), h.double() @ row - bias, rtol=1e-5, atol=1e-6)
    assert PUBLIC not in router.raw_bias
    assert not LinearRouter(LinearSettings(has_bias=False), NAMES, 8).raw_bias


@given(data=st.data(), experts=st.integers(1, 5), top_k=st.sampled_from([None, 1, 2, 4]))
@FREQUENT
def test_weights_are_a_softmax_over_the_enabled_then_top_k(data, experts, top_k):
    """With ties, which go to the first name."""
    z = data.draw(st.lists(st.lists(st.sampled_from([-3.0, -0.5, 0.0, 0.5, 40.0]),
                                    min_size=experts, max_size=experts), min_size=4, max_size=4))
    active = data.draw(st.lists(st.booleans(), min_size=experts, max_size=experts))
    active[0] = True
    logits = torch.tensor(z)[None]  # [1,4,E]
    found = mixture_weights(list(logits.unbind(-1)), torch.tensor([active]), top_k)
    for t in range(4):
        on = [e for e in range(experts) if active[e]]
        highest = max(z[t][e] for e in on)
        total = sum(math.exp(z[t][e] - highest) for e in on)
        best = sorted(on, key=lambda e: -z[t][e])[:top_k]
        for e in range(experts):
            wanted = math.exp(z[t][e] - highest) / total if e in best else 0.0
            assert found[0, t, e].item() == pytest.approx(wanted, rel=1e-6, abs=0)
