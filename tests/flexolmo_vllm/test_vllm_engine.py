"""The engine on vLLM, in its own process, against our own engine. Needs vLLM.

The tests go on from one another, for a start takes many seconds: first all that harms nobody, then
what is withdrawn, and a process that dies.
"""

import os
import shutil
import signal
import time

import pytest

from flexolmo.errors import BusyError, ConfigError, PolicyError
from flexolmo.inference.apart import ApartEngine, vllm_command
from flexolmo.inference.batching import EngineSettings
from flexolmo.inference.engine import PromptRead, TokenWritten
from flexolmo.inference.open_engine import open_engine
from flexolmo.inference.opening import Opening
from flexolmo.merge.mixture import remove_experts
from made_engines import Heard, ask, hear
from made_vllm import EOS, SETS, build_rich, needs_vllm, prompts

pytestmark = needs_vllm
SMALL = EngineSettings(memory_bytes=16 << 20, max_running=32)
LONG = [EOS, *range(1, 130)]


@pytest.fixture(scope="module")
def model(house, tmp_path_factory):
    """A mixture of all removable parts, to be changed."""
    return build_rich(house, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def engine(model, trust_dir):
    """The mixture on vLLM."""
    opening = Opening(model=model, trust=trust_dir, memory_bytes=32 << 20)
    engine = ApartEngine(vllm_command(None), opening)
    yield engine
    engine.close(0)


@pytest.fixture(scope="module")
def alone(house, model, tmp_path_factory):
    """`alone(names)`: our own engine on these experts alone."""
    opened = {}
    kept = shutil.copytree(model, tmp_path_factory.mktemp("alone") / "model")

    def get(names):
        if names not in opened:
            opened[names] = open_engine(kept, lambda: house.trusted, SMALL, experts=names)
        return opened[names]

    yield get
    for engine in opened.values():
        engine.close(0)


def scores_of(heard):
    """Scores of prompt and answer."""
    found = []
    for event in heard.events:
        if isinstance(event, PromptRead):
            found += event.scores
        elif isinstance(event, TokenWritten) and event.score is not None:
            found.append(event.score)
    return found


def hold_equal(found, expected):
    """Assert that two engines say the same of a request: the same tokens, numbers within 1e-3."""
    end, other = found.ended, expected.ended
    assert found.tokens == expected.tokens
    assert (end.reason, end.prompt_tokens, end.written_tokens) == (
        other.reason,
        other.prompt_tokens,
        other.written_tokens,
    )
    assert end.shares == pytest.approx(other.shares, abs=1e-3)
    pairs = list(zip(scores_of(found), scores_of(expected), strict=True))
    assert [a.token for a, _ in pairs] == [b.token for _, b in pairs]
    assert all(abs(a.logprob - b.logprob) < 1e-3 for a, b in pairs)
    assert all(dict(a.likeliest) == pytest.approx(dict(b.likeliest), abs=1e-3) for a, b in pairs)


def test_mixed_requests_are_answered_as_by_our_own_engine_on_their_experts_alone(engine, alone):
    chosen = SETS[::3]
    assert len(chosen) >= 8
    jobs = [(p, chosen[i % len(chosen)]) for i, p in enumerate(prompts(44))]
    digest = engine.facts.digest
    found = []
    for i, (prompt, names) in enumerate(jobs):
        more = {"num_logprobs": 3, "scores_prompt": i % 4 == 0}
        found.append(Heard())
        engine.submit(ask(prompt, names, 24, model_digest=digest, **more), found[-1])
    for i, ((prompt, names), heard) in enumerate(zip(jobs, found, strict=True)):
        more = {"num_logprobs": 3, "scores_prompt": i % 4 == 0}
        own = alone(names)
        asked = ask(prompt, names, 24, model_digest=own.facts.digest, **more)
        hold_equal(heard, hear(own, asked))


def test_no_set_reads_what_another_has_computed(engine):
    digest = engine.facts.digest
    for is_again in (False, True):
        for names in SETS:
            cached = hear(engine, ask(LONG, names, 2, model_digest=digest)).ended.cached_tokens
            assert cached >= 96 if is_again else cached == 0, names
    assert engine.stats().cached_blocks > 0


def test_texts_are_scored_without_writing(engine, alone):
    own = alone(("coral",))
    more = {"writes": False, "scores_prompt": True, "num_logprobs": 1}
    longest = [EOS, *(1 + i % 299 for i in range(engine.facts.max_seq_len - 1))]
    for prompt in (LONG, longest):
        found = hear(engine, ask(prompt, ["coral"], model_digest=engine.facts.digest, **more))
        hold_equal(found, hear(own, ask(prompt, ["coral"], model_digest=own.facts.digest, **more)))
        assert found.ended.reason == "scored"


@pytest.mark.parametrize("most", [3, 200])
def test_texts_end_as_in_our_own_engine(engine, alone, most):
    """At a stop word, an end of text, or as many tokens as were asked for or are free."""
    own = alone(("zinc",))
    for prompt in [*prompts(6, seed=3), [EOS, *(7 for _ in range(500))]]:
        for stops in ((), ("e",)):
            more = {"stops": stops, "max_new_tokens": most}
            found = hear(engine, ask(prompt, ["zinc"], model_digest=engine.facts.digest, **more))
            expected = hear(own, ask(prompt, ["zinc"], model_digest=own.facts.digest, **more))
            assert found.tokens == expected.tokens
            assert found.ended.reason == expected.ended.reason


def test_seeds_settle_what_is_drawn(engine):
    def draw(seed):
        asked = {"temperature": 1.0, "seed": seed, "model_digest": engine.facts.digest}
        return hear(engine, ask(LONG, ["amber"], 16, **asked)).tokens

    assert draw(1) == draw(1) != draw(2)


def test_what_cannot_be_served_is_refused(engine):
    digest = engine.facts.digest
    for request, error in [
        (ask([EOS], ["gold"], model_digest=digest), PolicyError),
        (ask([EOS], model_digest="another"), PolicyError),
        (ask([300], model_digest=digest), ConfigError),
        (ask([EOS] * 512, model_digest=digest), ConfigError),
    ]:
        with pytest.raises(error):
            engine.submit(request, print)


def test_a_request_is_cancelled_or_runs_out_of_time(engine):
    digest = engine.facts.digest
    heard = Heard()
    begun = engine.submit(ask(LONG, ["amber"], 350, model_digest=digest), heard)
    begun.cancel()
    assert heard.ended.reason == "cancelled"
    late = ask(LONG, [], 350, model_digest=digest, deadline=time.monotonic() + 0.05)
    assert hear(engine, late).ended.reason == "time"
    assert engine.stats().running == 0


def test_what_is_withdrawn_ends_and_harms_nobody_else(engine):
    digest = engine.facts.digest
    others = [
        ask(LONG, names, 12, model_digest=digest, num_logprobs=1) for names in (["amber"], [])
    ]
    before = [hear(engine, request) for request in others]
    heard = Heard()
    engine.submit(ask(LONG, ["amber", "zinc"], 350, model_digest=digest), heard)
    while not heard.tokens:
        time.sleep(0.01)
    assert engine.withdraw(["zinc"], "A patient objected.") == 1
    assert (heard.ended.reason, heard.ended.detail) == ("withdrawn", "A patient objected.")
    with pytest.raises(PolicyError, match="zinc is not served, or no longer"):
        engine.submit(ask(LONG, ["zinc"], model_digest=digest), print)
    for request, expected in zip(others, before, strict=True):  # zinc's weights are NaN by now
        hold_equal(hear(engine, request), expected)


def test_a_reload_takes_up_what_is_there_and_lets_others_go_on(engine, model, house):
    heard, ended = Heard(), Heard()
    digest = engine.facts.digest
    engine.submit(ask(LONG, ["amber"], 350, model_digest=digest), heard)
    engine.submit(ask(LONG, ["amber", "basalt"], 350, model_digest=digest), ended)
    while not heard.tokens or not ended.tokens:
        time.sleep(0.01)
    remove_experts(model, ["basalt"], house.trusted)
    facts = engine.reload()
    assert set(facts.experts) == {"amber", "coral", "flint"}  # zinc is withdrawn still
    assert facts.digest == engine.facts.digest != digest
    assert ended.ended.reason == "withdrawn" and "basalt" in ended.ended.detail
    assert heard.ended.reason in ("max_new_tokens", "end_of_text")
    again = hear(engine, ask(LONG, ["amber"], 350, model_digest=facts.digest))
    assert again.tokens == heard.tokens


def test_a_process_that_dies_is_started_again_without_what_was_withdrawn(engine):
    heard = Heard()
    engine.submit(ask(LONG, ["amber"], 350, model_digest=engine.facts.digest), heard)
    before = engine.process_id
    os.kill(before, signal.SIGKILL)
    assert heard.ended.reason in ("failed", "max_new_tokens")
    until = time.monotonic() + 120
    while True:
        try:
            found = hear(engine, ask(LONG, ["amber"], 4, model_digest=engine.facts.digest))
            if found.ended.reason != "failed":
                break
        except BusyError:
            assert time.monotonic() < until
        time.sleep(0.2)
    assert engine.process_id != before and len(found.tokens) == 4
    assert set(engine.facts.experts) == {"amber", "coral", "flint"}
