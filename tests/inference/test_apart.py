"""An engine in a process of its own: what is said on the line, and what becomes of both ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import PydanticSerializationError

import made_process
from flexolmo.bundle.facts import Barred
from flexolmo.errors import BusyError, ConfigError, FlexOlmoError, MergeError, PolicyError
from flexolmo.inference import apart
from flexolmo.inference.apart import ApartEngine, vllm_command
from flexolmo.inference.engine import Ended, ModelFacts, PromptRead, Scored, TokenWritten
from flexolmo.inference.messages import (
    REQUEST,
    Line,
    read_error,
    read_event,
    read_facts,
    write_error,
    write_event,
    write_facts,
)
from flexolmo.inference.opening import Opening
from made_engine import made_facts, said
from made_engines import Heard, ask, hear
from made_owners import DAY
from made_process import SEEN, SEEN_LATER, TOLD
from made_server import wait_until

NUMBERS = st.floats(allow_nan=False, max_value=0)
SCORES = st.builds(
    Scored, st.integers(0, 300), NUMBERS, st.dictionaries(st.integers(0, 300), NUMBERS, max_size=3)
)
EVENTS = st.one_of(
    st.builds(PromptRead, st.lists(SCORES, max_size=3)),
    st.builds(TokenWritten, st.integers(0, 300), st.none() | SCORES),
    st.builds(
        Ended,
        st.sampled_from(["stop", "withdrawn", "scored"]),
        *[st.integers(0, 9)] * 3,
        st.dictionaries(st.text(), st.floats(0, 1)),
        st.text(),
    ),
)


@given(EVENTS)
def test_an_event_arrives_as_it_was_sent(event):
    assert read_event(*json.loads(json.dumps(write_event(event)))) == event


def test_a_request_and_facts_arrive_as_they_were_sent():
    asked = ask([1, 2], ["b", "a"], stops=["x"], num_logprobs=3, deadline=2.5)
    found = REQUEST.validate_python(REQUEST.dump_python(asked, mode="json"))
    assert replace(found, ids=tuple(found.ids), stops=list(found.stops)) == asked
    facts = made_facts("trials", audience=("ward",), valid_until=DAY)
    barred = {"notes": Barred(made_facts("notes"), "It has not begun.", DAY)}
    made = ModelFacts("digest", {"trials": facts}, 256, 300, [0], barred)
    assert read_facts(write_facts(made)) == made


def test_an_error_arrives_as_it_was_sent_and_one_of_others_as_ours():
    found = read_error(*write_error(MergeError("two experts have this name")))
    assert type(found) is MergeError and str(found) == "two experts have this name"
    assert type(read_error("KeyError", "'x'")) is FlexOlmoError
    assert type(read_error("Path", "x")) is FlexOlmoError


@pytest.mark.parametrize("cut", [1, 10, 20])
def test_what_is_broken_off_is_no_message(cut):
    ours, theirs = socket.socketpair()
    theirs.sendall(b'["a", 1]\n' + b'["cancel", 12345678]\n'[:cut])
    theirs.close()
    assert list(Line(ours).messages()) == [("a", [1])]


@pytest.fixture
def model(tmp_path, pico_anchor):
    """A directory with a model's tokenizer."""
    pico_anchor.tokenizer.save(tmp_path / "model" / "anchor" / "tokenizer.json")
    return tmp_path / "model"


@pytest.fixture
def start(model, monkeypatch):
    """`start(how, **options)`: an engine whose process behaves so; closed in the end."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    opened = []

    def begin(how="serves", max_waiting=256, **options):
        command = [sys.executable, made_process.__file__, how]
        opening = Opening(model=model, trusts_any_signer=True, **options)
        opened.append(ApartEngine(command, opening, max_waiting))
        return opened[-1]

    yield begin
    for engine in opened:
        engine.close(0)


def request(engine, enabled=(), **more):
    return ask([0, 5], enabled, 100, model_digest=engine.facts.digest, **more)


def wait_for_another(engine, before):
    """Wait until a process other than the one `before` serves."""
    wait_until(lambda: engine.process_id != before and engine.is_running, seconds=60)
    assert engine.stats().blocks == 64


def text_of(heard, tokenizer):
    return tokenizer.decode(heard.tokens)


def test_answers_reloads_and_withdrawals_go_over_the_line(start, model, pico_anchor):
    engine = start(experts=("notes", "trials"))
    assert engine.facts.experts["notes"] == made_facts("notes")
    asked = request(engine, ["trials"], seed=4, num_logprobs=2, scores_prompt=True)
    heard = hear(engine, asked)
    assert text_of(heard, pico_anchor.tokenizer) == said(["trials"], 4)
    assert isinstance(heard.events[0], PromptRead) and heard.ended.reason == "end_of_text"
    assert engine.stats().written_tokens == len(heard.tokens)
    assert engine.withdraw(["notes", "unknown"], "Revoked.") == 0
    for facts in (engine.facts, engine.reload()):
        assert "notes" not in facts.experts
    assert engine.facts.experts.keys() == {"trials", "papers"}
    with pytest.raises(PolicyError):
        engine.submit(request(engine, ["notes"]), print)
    (model / "damaged").touch()
    with pytest.raises(MergeError, match="damaged"):
        engine.reload()
    assert engine.facts.experts.keys() == {"trials", "papers"}


def test_what_is_under_way_is_withdrawn_cancelled_or_closed(start):
    engine = start("holds")
    heard = [Heard(), Heard(), Heard()]
    names = ("notes", "trials", "trials")
    begun = [engine.submit(request(engine, [n]), h) for n, h in zip(names, heard, strict=True)]
    assert engine.withdraw(["notes"], "Revoked.") == 1
    assert (heard[0].ended.reason, heard[0].ended.detail) == ("withdrawn", "Revoked.")
    begun[1].cancel()
    assert heard[1].ended.reason == "cancelled"
    engine.close(0)
    assert heard[2].ended.reason == "closed"
    with pytest.raises(BusyError, match="closing"):
        engine.submit(request(engine), print)


def test_no_more_requests_are_taken_than_may_wait(start):
    engine = start("holds", max_running=1, max_waiting=1)
    for _ in range(2):
        engine.submit(request(engine), Heard())
    with pytest.raises(BusyError, match="2 requests are under way"):
        engine.submit(request(engine), print)


def test_a_process_that_dies_is_started_again_without_what_was_withdrawn(start, model):
    engine = start("holds")
    heard, before = Heard(), engine.process_id
    engine.reload()
    begun = engine.submit(request(engine, ["trials"]), heard)
    engine.withdraw(["notes"], "Revoked.")
    os.kill(before, signal.SIGKILL)
    assert (heard.ended.reason, heard.ended.detail) == ("failed", "The engine's process has ended.")
    with pytest.raises(BusyError, match="being started again"):
        engine.submit(request(engine, ["trials"]), print)
    assert not engine.is_running
    wait_for_another(engine, before)
    assert engine.facts.experts.keys() == {"trials"}
    assert json.loads((model / TOLD).read_text())["seen"] == SEEN | SEEN_LATER
    begun.cancel()  # says nothing to the new process, which ends if it does not know what to cancel
    assert engine.stats().blocks == 64


@pytest.mark.parametrize("how", ["breaks off", "babbles"])
def test_a_process_that_breaks_off_or_is_not_understood_is_started_again(start, how):
    engine, heard = start(how), Heard()
    before = engine.process_id
    engine.submit(request(engine), heard)
    assert heard.ended.reason == "failed"
    wait_for_another(engine, before)


@pytest.mark.parametrize("place", [socket, subprocess])
def test_a_start_that_this_machine_refuses_is_tried_again(start, monkeypatch, place):
    name = "socketpair" if place is socket else "Popen"
    monkeypatch.setattr(apart, "_START_SECONDS", 0.01)
    engine = start()
    known = getattr(place, name)
    refusals = iter([OSError(24, "Too many"), KeyError])

    def refuse(*args, **options):
        for error in refusals:
            raise error
        return known(*args, **options)

    before = engine.process_id
    monkeypatch.setattr(place, name, refuse)
    os.kill(before, signal.SIGKILL)
    wait_for_another(engine, before)
    assert next(refusals, None) is None


def test_a_process_that_does_nothing_is_killed_so_that_a_withdrawal_holds(start, monkeypatch):
    engine = start("does nothing")
    monkeypatch.setattr(apart, "_ANSWER_SECONDS", 0.1)
    heard, before = Heard(), engine.process_id
    engine.submit(request(engine, ["notes"]), heard)
    assert engine.stats().blocks == 0 and engine.process_id == before
    engine.withdraw(["notes"], "Revoked.")
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    assert heard.ended.reason in ("failed", "end_of_text")
    assert engine.facts.experts.keys() == {"trials"}


def test_a_process_that_reads_no_model_in_time_is_killed(start, monkeypatch):
    engine = start("does nothing")
    monkeypatch.setattr(apart, "_READ_SECONDS", 0.1)
    before = engine.process_id
    with pytest.raises(BusyError, match="did not read the model in time"):
        engine.reload()
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)


@pytest.mark.parametrize("how", ["does nothing", "reads nothing"])
def test_closing_ends_in_time_whatever_the_process_does(start, monkeypatch, how):
    monkeypatch.setattr(apart, "_STOP_SECONDS", 0.2)
    engine, heard = start(how), Heard()
    engine.submit(request(engine), heard)
    before = time.monotonic()
    engine.close(0.1)
    assert time.monotonic() - before < 10
    assert heard.ended.reason in ("closed", "end_of_text")
    with pytest.raises(ProcessLookupError):
        os.kill(engine.process_id, 0)


def test_closing_does_not_wait_for_a_process_that_starts(start, model):
    engine = start("starts slowly")
    first = engine.process_id
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: engine.process_id != first, seconds=60)
    before = time.monotonic()
    engine.close(0)
    assert time.monotonic() - before < 10


def test_a_start_that_takes_too_long_is_ended(start, monkeypatch):
    engine = start("starts slowly")
    monkeypatch.setattr(apart, "_READ_SECONDS", 0.1)
    monkeypatch.setattr(apart, "_START_SECONDS", 0.01)
    ids = {engine.process_id}
    os.kill(engine.process_id, signal.SIGKILL)

    def has_had_three():
        ids.add(engine.process_id)
        return len(ids) >= 3

    wait_until(has_had_three, seconds=60)


def test_a_process_that_takes_in_no_more_is_given_up(start, monkeypatch):
    monkeypatch.setattr(apart, "_ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(apart, "_STOP_SECONDS", 0.1)
    engine = start("reads nothing")
    before, heard = engine.process_id, []
    big = request(engine, stops=["x" * 100_000])
    with pytest.raises(BusyError, match="being started again"):
        for _ in range(100):
            heard.append(Heard())
            engine.submit(big, heard[-1])
    assert all(h.ended.reason == "failed" for h in heard[:-1])
    wait_until(lambda: engine.process_id != before, seconds=60)


def test_a_request_that_cannot_be_sent_leaves_nothing(start):
    engine = start("holds", max_running=1, max_waiting=0)
    with pytest.raises(PydanticSerializationError):
        engine.submit(request(engine, stops=[object()]), print)
    engine.submit(request(engine), Heard())


def test_a_process_that_is_gone_before_it_is_told_anything_says_why(model, monkeypatch):
    class Gone(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.wait()

    monkeypatch.setattr(subprocess, "Popen", Gone)
    with pytest.raises(ConfigError, match="ended with 3 before"):
        ApartEngine(["/bin/sh", "-c", "exit 3"], Opening(model=model, trusts_any_signer=True))


@pytest.mark.parametrize(
    "command, error, words",
    [
        ([sys.executable, made_process.__file__, "refuses"], MergeError, "not a mixture"),
        ([sys.executable, made_process.__file__, "ends"], ConfigError, "ended with 3 before"),
        ([sys.executable, made_process.__file__, "hangs up"], ConfigError, "ended with -9 before"),
        (["/nowhere/python", "-m", "x"], ConfigError, "cannot be started with /nowhere/python"),
        (vllm_command(Path(sys.executable)), ConfigError, "docs/guides/vllm.md"),
    ],
)
def test_a_process_that_cannot_serve_says_why(model, monkeypatch, command, error, words):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr(apart, "_STOP_SECONDS", 0.5)
    with pytest.raises(error, match=words):
        ApartEngine(command, Opening(model=model, trusts_any_signer=True))
