"""No token without a decision on the disk, no end without one, and nobody's slot left taken."""

import asyncio
import json
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest

from flexolmo.bundle.facts import Barred
from flexolmo.bundle.terms import PURPOSES
from flexolmo.errors import AuditError, BusyError, ConfigError
from flexolmo.inference.engine import Ended, TokenWritten
from flexolmo.serving.composer import Composer
from flexolmo.serving.forms import CompletionForm
from flexolmo.serving.policy import Principal
from flexolmo.serving.prompts import TextModel
from flexolmo.serving.refusal import Refusal
from flexolmo.serving.requests import CompletionBody
from made_engine import made_facts, said, with_expert
from made_server import MadeLog, wait_until

ALICE = Principal("alice", frozenset({"clinic"}), frozenset({"nurse", "doctor"}))
BOB = Principal("bob")


def ask(**fields):
    """A request to continue "Hello"."""
    usual = {"model": "made", "prompt": "Hello", "max_tokens": 100, "seed": 1}
    return CompletionBody.model_validate(usual | fields).ask()


async def read(gateway, who=ALICE, **fields):
    """The texts of the reply, with all that is said about them."""
    wanted = ask(**fields)
    answer = await gateway.begin(who, wanted)
    form = CompletionForm(answer.tokenizer.decode)
    return await Composer(
        answer, form, model="made", echoes=wanted.echoes, tells_shares=True
    ).whole()


def refusal_of(gateway, who=ALICE, **fields):
    """The refusal that a request gets."""

    async def work():
        with pytest.raises(Refusal) as caught:
            await read(gateway, who, **fields)
        while gateway.num_answers:  # their end is logged after the refusal is told
            await asyncio.sleep(0.001)
        return caught.value

    return asyncio.run(asyncio.wait_for(work(), 10))


# --- decisions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "who, purpose, wish, enabled",
    [
        (ALICE, None, None, "notes papers"),
        (ALICE, "health-research", None, "notes papers trials"),
        (ALICE, ["health-research", "commercial"], None, "notes papers"),
        (BOB, "health-research", None, "papers"),
        (ALICE, None, {"without": ["notes"]}, "papers"),
        (ALICE, None, {"only": ["notes", "secret"]}, "notes"),
        (ALICE, None, {"only": []}, ""),
    ],
)
def test_the_engine_is_given_what_is_asked_for_and_allowed_and_permitted(
    make_gateway, engine, entries, who, purpose, wish, enabled
):
    reply = asyncio.run(read(make_gateway(), who, purpose=purpose, experts=wish))
    names = enabled.split()
    assert [set(request.enabled) for request in engine.seen] == [set(names)]
    assert reply.choices[0].text == said(names, 1) and reply.flexolmo.enabled == names
    (decision,) = entries("decision")
    assert decision["enabled"] == names and decision["principal"] == who.subject
    assert decision["groups"] == sorted(who.groups) and decision["roles"] == sorted(who.roles)
    assert decision["request_id"] == reply.flexolmo.decision
    assert decision["number"] == reply.flexolmo.entry
    assert set(decision["refused"]) == set(decision["asked"]) - set(names)
    assert decision["refused"] == reply.flexolmo.refused and all(decision["refused"].values())
    assert decision["model_digest"] == engine.facts.digest == reply.flexolmo.model_digest
    assert decision["purposes"] == sorted([purpose] if isinstance(purpose, str) else purpose or [])
    assert "Hello" not in json.dumps(entries()) and "Grüße" not in json.dumps(entries())


def test_the_end_of_an_answer_is_logged_with_what_it_used(make_gateway, entries):
    reply = asyncio.run(read(make_gateway(), n=2))
    (decision,), (finished,) = entries("decision"), entries("finished")
    assert finished["decision"] == decision["number"] and finished["principal"] == "alice"
    assert finished["reason"] == "end_of_text"
    assert finished["written_tokens"] == reply.usage.completion_tokens > 60
    assert finished["prompt_tokens"] == reply.usage.prompt_tokens == 12
    assert finished["shares"] == pytest.approx(dict.fromkeys(["notes", "papers", "public"], 1 / 3))
    assert finished["shares"] == reply.flexolmo.shares
    assert finished["owners"] == {"notes": "Owner of notes", "papers": "Owner of papers"}
    assert reply.flexolmo.attributions == {
        "notes": "Notes of Ann's ward.",
        "papers": "Papers of the library.",
    }


def test_an_unknown_expert_is_an_error_and_nothing_begins(make_gateway, engine, entries):
    refusal = refusal_of(make_gateway(), experts={"only": ["note"]})
    assert (refusal.status, refusal.code, refusal.field) == (400, "unknown_expert", "experts")
    assert not engine.seen and not entries()


def test_where_all_that_is_named_is_refused_nothing_else_speaks_for_it(
    make_gateway, engine, entries
):
    gateway = make_gateway()
    refusal = refusal_of(gateway, experts={"only": ["secret", "trials"]})
    assert (refusal.status, refusal.code) == (403, "not_permitted")
    assert "no policy permits it" in str(refusal) and "general-research" in str(refusal)
    assert not engine.seen and gateway.num_answers == 0
    assert entries("decision")[0]["enabled"] == []
    assert entries("finished")[0]["reason"] == "refused"


# --- the log comes first ------------------------------------------------------------------------


def test_a_decision_is_on_the_disk_before_the_engine_hears_of_it(make_gateway, engine, entries):
    found = []
    submit = engine.submit
    engine.submit = lambda *args: found.append(entries("decision")) or submit(*args)
    asyncio.run(read(make_gateway()))
    assert [[e["enabled"] for e in es] for es in found] == [[["notes", "papers"]]]


def test_an_end_is_on_the_disk_before_the_reader_hears_of_it(make_gateway):
    log = MadeLog()
    gateway = make_gateway(audit=log)
    held = threading.Event()
    log.before = lambda kind: kind == "finished" and held.wait()

    async def work():
        answer = await gateway.begin(ALICE, ask())
        events = answer.events()
        while not isinstance((await anext(events))[1], Ended):
            pass
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(events), 0.1)
        held.set()

    asyncio.run(work())


def test_if_a_decision_cannot_be_logged_nothing_is_served(make_gateway, engine):
    log = MadeLog()
    gateway = make_gateway(audit=log)
    log.is_full = True
    refusal = refusal_of(gateway)
    assert (refusal.status, refusal.code) == (503, "audit_unavailable")
    assert refusal.retry_seconds and not engine.seen and gateway.num_answers == 0
    assert gateway.problems() == ["the audit log cannot be written"]
    log.is_full = False
    asyncio.run(read(gateway))
    assert gateway.problems() == []


def test_if_an_end_cannot_be_logged_the_answer_does_not_count(make_gateway):
    log = MadeLog()
    gateway = make_gateway(audit=log)
    log.before = lambda kind: setattr(log, "is_full", kind == "finished")
    assert refusal_of(gateway).code == "audit_unavailable"
    assert gateway.num_answers == 0


def test_a_log_that_fails_in_another_way_lets_nothing_through_either(make_gateway, engine):
    log = MadeLog()
    log.append = lambda kind, fields: 1 / 0
    gateway = make_gateway(audit=log)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(read(gateway))
    assert not engine.seen and gateway.num_answers == 0


# --- ends that come early -----------------------------------------------------------------------


def test_a_reader_who_leaves_frees_the_engine_and_the_end_is_logged(make_gateway, engine, entries):
    gateway = make_gateway()
    engine.hold()

    async def work():
        answer = await gateway.begin(ALICE, ask(n=3))
        engine.let(2)
        await anext(answer.events())
        answer.leave()
        answer.leave()
        await asyncio.wait_for(answer.has_ended.wait(), 5)
        await gateway.drain(1)

    asyncio.run(work())
    assert entries("finished")[0]["reason"] == "cancelled" and gateway.num_answers == 0
    assert engine.stats().running == 0


def test_whoever_leaves_before_the_answer_begins_leaves_nothing_behind(make_gateway, engine):
    log = MadeLog()
    gateway = make_gateway(audit=log)
    deciding, held = threading.Event(), threading.Event()
    log.before = lambda kind: kind == "decision" and (deciding.set(), held.wait())
    engine.hold()

    async def work():
        task = asyncio.create_task(gateway.begin(ALICE, ask()))
        await asyncio.to_thread(deciding.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        held.set()
        while gateway.num_answers:
            await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(work(), 10))
    assert [kind for kind, _ in log.entries] == ["decision", "finished"]
    assert log.entries[1][1]["reason"] == "cancelled" and engine.stats().running == 0


@pytest.mark.parametrize("is_quick", [False, True])
def test_what_a_reader_does_not_take_is_bounded(make_gateway, engine, entries, is_quick):
    """An engine that has written everything before it hears of that makes no answer whole."""
    gateway = make_gateway(limits={"max_unsent": 5})
    engine.hold()

    async def work():
        answer = await gateway.begin(ALICE, ask())
        if is_quick:
            engine.free()
            wait_until(lambda: engine.stats().running == 0)
        while not answer.endings:
            await asyncio.sleep(0.005)
            if not is_quick:
                engine.let(1)
        return [event async for _, event in answer.events()]

    events = asyncio.run(asyncio.wait_for(work(), 10))
    assert sum(isinstance(event, TokenWritten) for event in events) == 6
    assert events[-1].reason == "cancelled" == entries("finished")[0]["reason"]


def test_an_answer_ends_when_its_time_is_over(make_gateway, engine, entries):
    engine.hold()
    refusal = refusal_of(make_gateway(limits={"max_seconds": 0.05}))
    assert (refusal.status, refusal.code) == (503, "time_limit")
    assert entries("finished")[0]["reason"] == "time"


def test_an_expert_that_is_withdrawn_ends_its_answers_and_enters_no_other(
    make_gateway, engine, entries
):
    gateway = make_gateway()
    engine.hold()

    async def work():
        withdrawn = asyncio.create_task(read(gateway))
        other = asyncio.create_task(read(gateway, BOB))
        while len(engine.seen) < 2:
            await asyncio.sleep(0.005)
        assert gateway.withdraw({"notes": "It was revoked."}) == {"notes": "It was revoked."}
        assert gateway.withdraw({"notes": "again", "unknown": ""}) == {}
        engine.free()
        with pytest.raises(Refusal, match=r"withdrawn\. It was revoked\.") as caught:
            await withdrawn
        assert (caught.value.status, caught.value.code) == (503, "source_withdrawn")
        assert (await other).choices[0].text == said(["papers"], 1)
        reply = await read(gateway)
        assert reply.flexolmo.enabled == ["papers"]
        assert reply.flexolmo.refused["notes"] == ["It was revoked."]

    asyncio.run(work())
    assert Counter(e["reason"] for e in entries("finished")) == {"withdrawn": 1, "end_of_text": 2}
    assert refusal_of(gateway, experts={"only": ["notes"]}).status == 403
    # Another bundle of the same name is another matter.
    engine.next_facts = with_expert(engine.facts, "notes", made_facts("notes of a later day"))
    facts = engine.reload()
    gateway.texts = TextModel(facts.digest, gateway.texts.tokenizer, None)
    assert asyncio.run(read(gateway)).flexolmo.enabled == ["notes", "papers"]


def test_an_expert_that_was_not_loaded_is_named_with_the_reason_wherever_it_is_asked_for(
    make_gateway, engine, entries, caplog
):
    why = "notes was revoked by its owner on 2026-11-23: A patient objected."
    facts = with_expert(engine.facts, "notes", None)
    engine.facts = replace(facts, barred={"notes": Barred(engine.facts.experts["notes"], why)})
    gateway = make_gateway(texts=TextModel(facts.digest, engine.tokenizer, None))

    async def work():
        await gateway.start()
        return await read(gateway)

    reply = asyncio.run(work())
    assert reply.flexolmo.enabled == ["papers"] and reply.flexolmo.refused["notes"] == [why]
    assert why in str(refusal_of(gateway, experts={"only": ["notes"]}))
    assert asyncio.run(read(gateway, experts={"without": ["notes"]})).flexolmo.enabled == ["papers"]
    (started,) = entries("started")
    assert started["experts"].keys() == {"papers", "secret", "trials"}
    assert [(e["number"], e["experts"], e["why"]) for e in entries("revoked")] == [
        (started["number"] + 1, ["notes"], why)
    ]
    (said,) = [r for r in caplog.records if r.getMessage() == "expert withdrawn"]
    assert (said.expert, said.detail) == ("notes", why)
    assert not any("notes" in request.enabled for request in engine.seen)


# --- limits -------------------------------------------------------------------------------------


def test_more_requests_than_may_be_are_told_to_wait(make_gateway, engine):
    gateway = make_gateway(limits={"max_requests": 2})
    engine.hold()

    async def work():
        tasks = [asyncio.create_task(read(gateway)) for _ in range(2)]
        while len(engine.seen) < 2:
            await asyncio.sleep(0.005)
        with pytest.raises(Refusal) as caught:
            await gateway.begin(ALICE, ask())
        assert (caught.value.status, caught.value.code) == (429, "busy")
        assert caught.value.retry_seconds
        engine.free()
        await asyncio.gather(*tasks)
        await read(gateway)

    asyncio.run(work())


def test_one_person_cannot_take_the_places_of_others(make_gateway, engine, entries):
    gateway = make_gateway(limits={"max_texts_each": 5})
    engine.hold()

    async def work():
        greedy = [asyncio.create_task(read(gateway, n=2)) for _ in range(20)]
        while sum(task.done() for task in greedy) < 18:
            await asyncio.sleep(0.005)
        refused = [task.exception() for task in greedy if task.done()]
        assert {(r.status, r.code) for r in refused} == {(429, "too_many_at_once")}
        assert all(
            r.retry_seconds and "texts under way: 4, of at most 5" in str(r) for r in refused
        )
        last = asyncio.create_task(read(gateway))  # the fifth has room
        others = [asyncio.create_task(read(gateway, BOB)) for _ in range(5)]
        while len(engine.seen) < 10:
            await asyncio.sleep(0.005)
        with pytest.raises(Refusal, match="under way: 5, of at most 5"):
            await gateway.begin(BOB, ask())
        engine.free()
        for reply in await asyncio.gather(*others):
            assert reply.choices[0].text == said(["papers"], 1)
        await asyncio.gather(last, *(task for task in greedy if not task.done()))

    asyncio.run(asyncio.wait_for(work(), 20))
    assert len(entries("decision")) == 8  # of those refused there is none


def test_however_a_request_ends_its_texts_count_no_more(make_gateway, engine):
    gateway = make_gateway(limits={"max_texts_each": 2, "max_texts": 3, "max_seconds": 5})
    submit = engine.submit

    async def leave():
        answer = await gateway.begin(ALICE, ask(n=2))
        answer.leave()
        await answer.has_ended.wait()
        while gateway.num_answers:
            await asyncio.sleep(0.001)

    for _ in range(2):
        assert len(asyncio.run(read(gateway, n=2)).choices) == 2
        asyncio.run(leave())
        assert refusal_of(gateway, n=2, experts={"only": ["secret"]}).code == "not_permitted"
        assert refusal_of(gateway, n=2, experts={"only": ["note"]}).code == "unknown_expert"
        assert refusal_of(gateway, n=4).code == "too_many_texts"
        for error, status in ((BusyError("full"), 429), (ConfigError("too long"), 400)):
            engine.submit = lambda *_, error=error: (_ for _ in ()).throw(error)
            assert refusal_of(gateway, n=2).status == status
        engine.submit = submit
        append = gateway.audit.append
        gateway.audit.append = lambda *_: (_ for _ in ()).throw(AuditError("full"))
        assert refusal_of(gateway, n=2).code == "audit_unavailable"
        gateway.audit.append = append


def test_a_request_of_more_texts_than_one_person_has_must_be_their_only_one(make_gateway, engine):
    gateway = make_gateway(limits={"max_texts_each": 2, "max_texts": 3})
    assert len(asyncio.run(read(gateway, n=3)).choices) == 3
    engine.hold()

    async def work():
        task = asyncio.create_task(read(gateway))
        while len(engine.seen) < 4:
            await asyncio.sleep(0.005)
        with pytest.raises(Refusal, match="under way: 1, of at most 2"):
            await gateway.begin(ALICE, ask(n=3))
        engine.free()
        await task

    asyncio.run(asyncio.wait_for(work(), 10))


def test_an_engine_without_room_for_all_texts_serves_none_of_them(make_gateway, engine, entries):
    engine.max_requests = 2
    engine.hold()
    gateway = make_gateway()
    assert refusal_of(gateway, n=3).status == 429
    assert entries("finished")[0]["reason"] == "busy" and gateway.num_answers == 0
    wait_until(lambda: engine.stats().running == 0)


def test_a_request_that_the_engine_can_never_serve_is_said_to_be_wrong(
    make_gateway, engine, entries
):
    def refuse(*_):
        raise ConfigError("It needs more memory than there is.")

    engine.submit = refuse
    refusal = refusal_of(make_gateway())
    assert (refusal.status, str(refusal)) == (400, "It needs more memory than there is.")
    assert entries("finished")[0]["reason"] == "failed"


def test_a_model_that_changes_in_between_is_asked_nothing(make_gateway, engine, entries):
    gateway = make_gateway()
    submit = engine.submit

    def change_first(*args):
        engine.next_facts = with_expert(engine.facts, "papers", None)
        engine.reload()
        return submit(*args)

    engine.submit = change_first
    assert refusal_of(gateway).code == "model_changed"
    assert entries("finished")[0]["reason"] == "changed"
    engine.submit = submit
    assert refusal_of(gateway).code == "model_changed"  # its tokenizer is not known yet
    assert gateway.problems() == ["the model is being changed"] and len(entries()) == 2


@pytest.mark.parametrize(
    "fields, code",
    [
        ({"n": 65}, "too_many_texts"),
        ({"prompt": ["a"] * 33, "n": 2}, "too_many_texts"),
        ({"prompt": "x" * 300}, "context_length_exceeded"),
        ({"prompt": [1] * 256}, "context_length_exceeded"),
        ({"prompt": [300]}, "invalid_prompt"),
    ],
)
def test_prompts_that_cannot_be_served_are_refused_before_any_decision(
    make_gateway, engine, entries, fields, code
):
    refusal = refusal_of(make_gateway(), **fields)
    assert (refusal.status, refusal.code) == (400, code)
    assert not engine.seen and not entries()


def test_a_deployer_may_allow_shorter_prompts_than_the_model(make_gateway):
    gateway = make_gateway(limits={"max_prompt_tokens": 6})
    asyncio.run(read(gateway, prompt=[1, 2, 3, 4, 5]))
    assert refusal_of(gateway, prompt=[1, 2, 3, 4, 5, 6]).code == "context_length_exceeded"


def test_every_text_has_a_seed_of_its_own(make_gateway, engine):
    gateway = make_gateway()
    asyncio.run(read(gateway, prompt=["a", "b"], n=2, seed=7))
    asyncio.run(read(gateway, n=2, seed=-1))
    assert [r.sampling.seed for r in engine.seen] == [7, 8, 9, 10, 2**62 - 1, 0]
    asyncio.run(read(gateway, seed=None))
    asyncio.run(read(gateway, seed=None))
    assert engine.seen[-1].sampling.seed != engine.seen[-2].sampling.seed


# --- many at once, and the end ------------------------------------------------------------------


def test_many_at_once_get_each_their_own_answer_and_two_entries(make_gateway, entries):
    gateway = make_gateway()
    purposes = [None, "health-research", "commercial", *PURPOSES]

    async def one(number):
        who = (ALICE, BOB)[number % 2]
        reply = await read(gateway, who, purpose=purposes[number % len(purposes)], seed=number)
        assert reply.choices[0].text == said(reply.flexolmo.enabled, number)
        return reply.flexolmo

    async def work():
        return await asyncio.gather(*(one(number) for number in range(64)))

    told = asyncio.run(work())
    decisions = {e["number"]: e for e in entries("decision")}
    assert len(decisions) == 64 and gateway.num_answers == 0
    for receipt in told:
        assert decisions[receipt.entry]["enabled"] == receipt.enabled
        assert decisions[receipt.entry]["request_id"] == receipt.decision
    assert sorted(e["decision"] for e in entries("finished")) == sorted(decisions)


def test_what_is_under_way_may_end_and_nothing_new_begins(make_gateway, engine, entries):
    gateway = make_gateway()
    engine.hold()

    async def work():
        await gateway.start()
        tasks = [asyncio.create_task(read(gateway)) for _ in range(2)]
        while len(engine.seen) < 2:
            await asyncio.sleep(0.005)
        begun = time.monotonic()
        draining = asyncio.create_task(gateway.drain(0.2))
        await asyncio.sleep(0.05)
        with pytest.raises(Refusal) as caught:
            await gateway.begin(ALICE, ask())
        assert (caught.value.status, caught.value.code) == (503, "closing")
        assert gateway.problems() == ["the server is about to stop"]
        await draining
        assert time.monotonic() - begun < 2
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [r.code for r in results] == ["closing", "closing"]
        await gateway.stop()

    asyncio.run(work())
    assert len(entries("started")) == len(entries("stopped")) == 1
    assert entries("started")[0]["experts"].keys() == engine.facts.experts.keys()
    assert [e["reason"] for e in entries("finished")] == ["closed", "closed"]
