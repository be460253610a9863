"""The engine: every request is served as if alone, on a model of its experts alone."""

import threading
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.inference.batching import EngineSettings
from flexolmo.inference.engine import Ended
from flexolmo.model.assemble import erase_expert
from flexolmo.model.router import LinearSettings
from flexolmo.model.spans import BLOCK
from flexolmo.model.statistics import EvidenceSettings
from made_engines import SMALL, Heard, ask, hear, open_engine_on
from made_layouts import numbers_of
from made_mixtures import IN_SESSION, NAMES

ROUTERS = {"evidence": EvidenceSettings(), "linear": LinearSettings(), "rich": EvidenceSettings()}
SETS = [(), ("amber",), ("basalt", "zinc"), NAMES]
# of which a step has as many rows at most, but of prompts more or less
WIDTHS = [(64, 32), (32, 64), (2, 94)]


@contextmanager
def running(model, tokenizer, settings=SMALL):
    """An engine over one model, closed in the end."""
    engine = open_engine_on(model, tokenizer, settings)
    try:
        yield engine
    finally:
        engine.close(0)


@pytest.fixture(scope="module")
def mixtures(make_wild):
    """`mixtures(router, names, dtype, is_masked)`: a mixture of its own, made once."""

    @cache
    def wild(dtype, is_masked):
        return make_wild(dtype, document_mask=is_masked)

    @cache
    def get(router, names, dtype=torch.float32, is_masked=False):
        here = wild(dtype, is_masked)
        shapes = None
        if router == "rich":
            every = here.rich_shapes(ROUTERS[router], NAMES)
            shapes = {n: every[n] for n in names}
        top_k = 2 if router == "linear" else None
        return here.mixture(ROUTERS[router], list(names), top_k, shapes)

    get.wild = wild
    return get


@pytest.fixture(scope="module")
def tokenizer(pico_anchor):
    return pico_anchor.tokenizer


REQUESTS = st.fixed_dictionaries(
    {
        "text": st.integers(0, 2),  # of which texts begin alike
        "length": st.one_of(
            st.integers(1, 100), st.sampled_from([BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 1])
        ),
        "enabled": st.sampled_from(SETS),
        "max_new_tokens": st.integers(1, 12),
        "temperature": st.sampled_from([0.0, 1.2]),
        "num_logprobs": st.sampled_from([None, 0, 3]),
        "scores_prompt": st.booleans(),
        "writes": st.sampled_from([True, True, True, False]),
        "seed": st.integers(0, 3),
        "joins": st.integers(0, 25),  # once so many events were said
    }
)
SCHEDULES = st.fixed_dictionaries(
    {
        "router": st.sampled_from(sorted(ROUTERS)),
        "dtype": st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
        "is_masked": st.sampled_from([False, False, True]),
        "width": st.sampled_from(WIDTHS),
        "blocks": st.sampled_from([8, 20, 200]),
        "requests": st.lists(REQUESTS, min_size=2, max_size=9),
    }
)


def request_of(wild, case):
    """The engine's request."""
    more = dict(case)
    ids = wild.ids(1, 110, seed=more.pop("text"), eos_every=40)[0].tolist()
    return ask(ids[: more.pop("length")], **{k: v for k, v in more.items() if k != "joins"})


def settings_of(model, width, blocks):
    one = model.new_memory(BLOCK)
    return EngineSettings(
        memory_bytes=blocks * one.numel() * one.element_size(),
        max_running=width[0],
        prompt_tokens=width[1],
    )


def crowd(engine, requests, joins):
    """What is said of requests, each of which joins once so many events of others were said, or
    once nobody else is served."""
    todo = sorted(range(len(requests)), key=lambda i: joins[i])
    heard = [Heard() for _ in requests]
    lock, said, live = threading.RLock(), 0, 0

    def bring():
        nonlocal live
        while todo and (joins[todo[0]] <= said or live == 0):
            number = todo.pop(0)
            live += 1
            engine.submit(requests[number], heard[number])

    def then(event):
        nonlocal said, live
        with lock:
            said += 1
            live -= isinstance(event, Ended)
            bring()

    for one in heard:
        one.then = then
    with lock:
        bring()
    for one in heard:
        _ = one.ended
    return heard


@given(case=SCHEDULES)
@IN_SESSION.__class__(IN_SESSION, max_examples=40)
def test_whoever_else_is_served_every_bit_is_that_of_a_model_of_its_experts_alone(
    mixtures, tokenizer, case
):
    """Tokens, log-probabilities, shares and endings, by `==`; with prompts in one step or in many,
    found or not, and texts that join while others are written."""
    router, dtype, is_masked = case["router"], case["dtype"], case["is_masked"]
    wild = mixtures.wild(dtype, is_masked)
    requests = [request_of(wild, r) for r in case["requests"]]
    model = mixtures(router, NAMES, dtype, is_masked)
    with running(model, tokenizer, settings_of(model, case["width"], case["blocks"])) as engine:
        heard = crowd(engine, requests, [r["joins"] for r in case["requests"]])
        stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.free_blocks + stats.cached_blocks == stats.blocks
    for request, h in zip(requests, heard, strict=True):
        assert h.all_but_cached == alone_of(mixtures, tokenizer, case, request)


def alone_of(mixtures, tokenizer, case, request):
    """What an engine says of the request over a model of its experts alone."""
    names = tuple(sorted(request.enabled))
    model = mixtures(case["router"], names, case["dtype"], case["is_masked"])
    with running(model, tokenizer, settings_of(model, WIDTHS[1], 200)) as engine:
        return hear(engine, request).all_but_cached


def test_a_damaged_expert_ends_only_whoever_has_it_on(mixtures, tokenizer):
    wild = mixtures.wild(torch.float32, False)
    ids = wild.ids(1, 40, seed=1)[0].tolist()
    model = wild.mixture(ROUTERS["evidence"], ["amber", "zinc"], None)
    erase_expert(model, "zinc", {})
    requests = [ask(ids, on) for on in [("amber",), ("amber", "zinc"), ()]]
    with running(model, tokenizer) as engine:
        heard = crowd(engine, requests, [0, 0, 0])
    assert [h.ended.reason for h in heard] == ["max_new_tokens", "failed", "max_new_tokens"]
    assert "damaged" in heard[1].ended.detail
    case = {"router": "evidence", "dtype": torch.float32, "is_masked": False}
    for request, h in [(requests[0], heard[0]), (requests[2], heard[2])]:
        assert h.all_but_cached == alone_of(mixtures, tokenizer, case, request)


def test_no_number_of_a_withdrawn_expert_stays_in_memory(mixtures, tokenizer):
    wild = mixtures.wild(torch.float32, False)
    with running(wild.mixture(ROUTERS["linear"], list(NAMES), 2), tokenizer) as engine:
        stepper = engine._stepper
        layer = stepper.model.mixtures()[0]
        stepper.model.cut_panels()  # moves the matrices, but not those that the engine reads
        engine.withdraw(["zinc"], "revoked")
        for name in ("zinc", "amber"):
            expert = layer.expert(name)
            held = [t for m in (expert, expert.down_proj) for t in numbers_of(stepper.panels[m])]
            for numbers in (*held, *expert.parameters()):
                is_gone = numbers.isnan()
                assert bool(is_gone.any()) == bool(is_gone.all()) == (name == "zinc")
