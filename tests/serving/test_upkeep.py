"""What changes on disk is taken over or left; what ended is withdrawn, whatever else fails."""

import asyncio
import datetime
import os
from dataclasses import replace

import pytest

from flexolmo.bundle.facts import Barred
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.errors import BusyError, MergeError
from flexolmo.serving import upkeep as upkeep_room
from flexolmo.serving.answer import Answer
from flexolmo.serving.keys import revoke_key
from flexolmo.serving.policy import Principal
from flexolmo.serving.refusal import Refusal
from flexolmo.serving.requests import CompletionBody
from flexolmo.serving.upkeep import Sources, Upkeep, find_revoked, look_at, stamp
from made_engine import made_facts, with_expert
from made_server import MadeLog

ALICE = Principal("alice", frozenset({"clinic"}))
TODAY = datetime.datetime.now(datetime.UTC).date()
DAY = datetime.timedelta(days=1)


def enabled(gateway, **fields):
    """Experts that speak to Alice at present."""
    body = CompletionBody.model_validate({"model": "made", "prompt": "x"} | fields)

    async def work():
        answer: Answer = await gateway.begin(ALICE, body.ask())
        async for _ in answer.events():
            pass
        return list(answer.receipt.sources)

    return asyncio.run(work())


class MadeOwners:
    """Trusted owners who have revoked `revoked`, and trust all signers but those of `strangers`."""

    allows_unknown = False

    def __init__(self):
        self.revoked, self.strangers = {}, set()

    def find_revocation(self, name, facts):
        return self.revoked.get(name)

    def owner_of(self, key_id):
        return None if key_id in self.strangers else OWNERS[key_id]


OWNERS = {made_facts(n).key_id: f"Owner of {n}" for n in ("notes", "papers", "secret", "trials")}


@pytest.fixture
def owners():
    return MadeOwners()


@pytest.fixture
def trust(tmp_path):
    (tmp_path / "trust").mkdir()
    return tmp_path / "trust"


@pytest.fixture
def index(tmp_path):
    (tmp_path / "mixture.json").write_text("{}")
    return tmp_path / "mixture.json"


@pytest.fixture
def log():
    return MadeLog()


@pytest.fixture
def gateway(make_gateway, log):
    return make_gateway(audit=log)


@pytest.fixture
def upkeep_of(policy_dir, trust, index, owners, tokenizer):
    def make(gateway):
        sources = Sources(policy_dir, [index, trust], lambda: (tokenizer, None), lambda: owners)
        return Upkeep(gateway, sources, look_at(gateway.identity, sources))

    return make


@pytest.fixture
def upkeep(gateway, upkeep_of):
    return upkeep_of(gateway)


def failures(gateway):
    """What could not be taken over, and how often."""
    (found,) = gateway.metrics.upkeep_failures.collect()
    return {s.labels["what"]: s.value for s in found.samples if s.name.endswith("_total")}


def touch(path):
    """Change `path` as a writer would that replaces it."""
    aside = path.with_name("aside")
    aside.write_bytes(path.read_bytes() if path.exists() else b"")
    os.replace(aside, path)


def test_nothing_changed_is_nothing_done(upkeep, gateway, log, engine):
    before = gateway.policies, gateway.texts
    engine.next_facts = MergeError("asked to reload")
    for _ in range(3):
        upkeep.look()
    assert (gateway.policies, gateway.texts) == before and not log.entries
    assert not failures(gateway)


def test_changed_policies_count_from_the_next_request_on(upkeep, gateway, policy_dir, log):
    assert enabled(gateway) == ["notes", "papers"]
    (policy_dir / "no.cedar").write_text(
        '@id("no notes") forbid (principal, action, resource == FlexOlmo::Expert::"notes");'
    )
    assert enabled(gateway) == ["notes", "papers"]
    upkeep.look()
    assert enabled(gateway) == ["papers"]
    reloaded = [fields for kind, fields in log.entries if kind == "reloaded"]
    assert [r["policy_digest"] for r in reloaded] == [gateway.policies.digest]
    (policy_dir / "no.cedar").unlink()
    upkeep.look()
    assert enabled(gateway) == ["notes", "papers"]


def test_policies_that_cannot_be_used_leave_the_former_in_force(upkeep, gateway, policy_dir, log):
    (policy_dir / "no.cedar").write_text("permit everything;")
    upkeep.look()
    upkeep.look()
    assert failures(gateway) == {"policy": 1.0} and not log.entries
    assert enabled(gateway) == ["notes", "papers"]


def test_a_revoked_key_opens_nothing_after_the_next_look(upkeep, gateway, keys, auth):
    header = f"Bearer {keys['alice']}"
    assert gateway.identity.identify(header).subject == "alice"
    revoke_key(auth.with_name("keys.json"), keys["alice"].split("_")[1])
    upkeep.look()
    with pytest.raises(Refusal, match="revoked"):
        gateway.identity.identify(header)
    auth.write_text("[")
    upkeep.look()
    assert failures(gateway) == {"auth": 1.0}
    assert gateway.identity.identify(f"Bearer {keys['bob']}").subject == "bob"


def test_a_new_model_is_served_with_its_digest_and_logged(upkeep, gateway, engine, index, log):
    engine.next_facts = with_expert(engine.facts, "papers", None)
    touch(index)
    upkeep.look()
    assert enabled(gateway) == ["notes"] and gateway.problems() == []
    (kind, fields), *_ = log.entries
    assert kind == "reloaded" and fields["model_digest"] == engine.facts.digest
    assert "papers" not in fields["experts"]


def test_a_model_that_does_not_hold_up_leaves_the_former(upkeep, gateway, engine, index, log):
    engine.next_facts = MergeError("damaged")
    touch(index)
    upkeep.look()
    assert failures(gateway) == {"model": 1.0} and not log.entries
    assert enabled(gateway) == ["notes", "papers"]


def test_a_change_during_a_start_of_the_engine_is_taken_over_once_it_runs(
    upkeep, gateway, engine, owners, index, log
):
    new = with_expert(engine.facts, "papers", None)
    engine.next_facts = BusyError("it is being started again")
    owners.revoked = {"notes": "revoked"}
    touch(index)
    for _ in range(2):
        upkeep.look()
    assert "notes" not in engine.facts.experts, "what is revoked does not wait"
    engine.next_facts = new
    for _ in range(2):
        upkeep.look()
    assert [kind for kind, _ in log.entries] == ["revoked", "reloaded"]
    assert log.entries[1][1]["model_digest"] == new.digest == gateway.texts.digest
    assert not failures(gateway)


def test_an_engine_that_was_started_again_on_another_model_is_followed_and_logged(
    upkeep, gateway, engine, log
):
    why = "notes was revoked."
    barred = {"notes": Barred(engine.facts.experts["notes"], why)}
    engine.facts = replace(with_expert(engine.facts, "notes", None), barred=barred)
    engine.next_facts = MergeError("asked to reload")
    assert gateway.problems() == ["the model is being changed"]
    for _ in range(2):
        upkeep.look()
    assert gateway.problems() == [] and not failures(gateway)
    assert [kind for kind, _ in log.entries] == ["reloaded", "revoked"]
    assert log.entries[0][1]["model_digest"] == engine.facts.digest
    assert log.entries[1][1] == {"experts": ["notes"], "why": why}
    assert enabled(gateway) == ["papers"]


def test_an_engine_that_is_being_started_again_is_said_to_be(gateway, engine):
    engine.is_running = False
    assert gateway.problems() == ["the engine is being started again"]


def test_an_expert_that_a_new_model_leaves_out_is_logged_once_and_said(
    upkeep, gateway, engine, index, log
):
    why = "notes: the owner's terms expired on 2026-11-26."
    barred = {"notes": Barred(engine.facts.experts["notes"], why)}
    engine.next_facts = replace(with_expert(engine.facts, "notes", None), barred=barred)
    for _ in range(2):
        touch(index)
        upkeep.look()
    kinds = [kind for kind, _ in log.entries]
    assert kinds == ["reloaded", "revoked", "reloaded"]
    assert log.entries[1][1] == {"experts": ["notes"], "why": why}
    assert "notes" not in log.entries[0][1]["experts"]
    assert enabled(gateway) == ["papers"] and not failures(gateway)
    decision = [fields for kind, fields in log.entries if kind == "decision"][-1]
    assert decision["refused"]["notes"] == [why]


def test_one_that_was_withdrawn_is_not_logged_again_when_it_is_left_out(
    upkeep, engine, owners, trust, log
):
    why = "notes was revoked."
    barred = {"notes": Barred(engine.facts.experts["notes"], why)}
    engine.next_facts = replace(with_expert(engine.facts, "notes", None), barred=barred)
    owners.revoked = {"notes": "revoked"}
    touch(trust / "Ann.revoked.json")
    upkeep.look()
    assert [kind for kind, _ in log.entries] == ["revoked", "reloaded"]


def test_an_expert_is_loaded_once_its_terms_have_begun_and_only_then(
    make_gateway, upkeep_of, engine, log, index, monkeypatch
):
    whole, begins = engine.facts, TODAY + 2 * DAY
    waits = Barred(made_facts("notes", valid_from=begins), "not yet", begins)
    barred = {"notes": waits, "trials": Barred(made_facts("trials"), "revoked")}
    engine.facts = replace(with_expert(whole, "notes", None), barred=barred)
    engine.next_facts = MergeError("asked to reload")
    gateway = make_gateway(audit=log)
    upkeep = upkeep_of(gateway)

    def look(day):
        monkeypatch.setattr(upkeep_room, "_today", lambda: day)
        upkeep.look()
        return failures(gateway).get("model", 0)

    assert [look(TODAY), look(TODAY + DAY)] == [0, 0]
    # once a day if it fails, for reading a model takes long
    assert [look(begins), look(begins), look(begins + DAY), look(begins + DAY)] == [1, 1, 2, 2]
    engine.next_facts = whole
    assert look(begins + 2 * DAY) == 2
    assert "notes" in engine.facts.experts and log.entries[0][0] == "reloaded"


def test_a_revocation_takes_effect_even_if_no_model_without_the_expert_is_there(
    upkeep, gateway, engine, owners, trust, log
):
    engine.next_facts = MergeError("a revoked expert is in it")
    owners.revoked = {"notes": "revoked by its owner on 2026-11-27: consent withdrawn"}
    touch(trust / "Ann.revoked.json")
    upkeep.look()
    assert enabled(gateway) == ["papers"]
    (kind, fields), *_ = log.entries
    assert kind == "revoked" and fields["experts"] == ["notes"]
    assert "consent withdrawn" in fields["why"]
    upkeep.look()
    assert sum(kind == "revoked" for kind, _ in log.entries) == 1


def test_an_expert_whose_signer_is_trusted_no_more_is_withdrawn(
    upkeep, gateway, experts, owners, trust
):
    owners.strangers = {experts["papers"].key_id}
    touch(trust / "Ann.pub")
    upkeep.look()
    assert enabled(gateway) == ["notes"]


def test_terms_that_ended_withdraw_an_expert_and_those_to_come_do_not(
    make_gateway, engine, policy_dir, index, tokenizer, log
):
    engine.facts.experts["notes"] = made_facts("notes", valid_until=TODAY)
    engine.facts.experts["papers"] = made_facts("papers", valid_from=TODAY + DAY)
    gateway = make_gateway(audit=log)
    sources = Sources(policy_dir, [index], lambda: (tokenizer, None), MadeOwners)
    upkeep = Upkeep(gateway, sources, look_at(gateway.identity, sources))
    upkeep.look()
    assert "notes" in engine.facts.experts and enabled(gateway) == ["notes"]

    engine.facts.experts["notes"] = made_facts("notes", valid_until=TODAY - DAY)
    withdrawn = []
    engine.withdraw = lambda names, why: withdrawn.append((list(names), why))
    upkeep.look()
    why = f"notes: the owner's terms expired on {TODAY - DAY}."
    assert withdrawn == [(["notes"], why)]
    revoked = [fields for kind, fields in log.entries if kind == "revoked"]
    assert revoked == [{"experts": ["notes"], "why": why}]


def test_a_withdrawal_is_done_even_if_it_cannot_be_logged(
    upkeep, gateway, owners, trust, log, engine
):
    log.is_full = True
    owners.revoked = {"notes": "revoked"}
    touch(trust / "Ann.revoked.json")
    upkeep.look()
    assert "notes" not in engine.facts.experts and not gateway.can_audit
    log.is_full = False
    upkeep.look()
    assert gateway.can_audit


def test_a_log_without_room_is_tried_again_until_there_is_some(upkeep, gateway, log):
    log.is_full = True
    with pytest.raises(Refusal):
        enabled(gateway)
    upkeep.look()
    assert gateway.problems() == ["the audit log cannot be written"]
    log.is_full = False
    upkeep.look()
    assert gateway.problems() == []


def test_whatever_fails_the_rest_is_done(upkeep, gateway, engine, owners, trust, monkeypatch):
    monkeypatch.setattr(gateway.identity, "refresh", lambda: 1 / 0)
    owners.revoked = {"notes": "revoked"}
    touch(trust / "Ann.revoked.json")
    upkeep.look()
    assert failures(gateway) == {"issuer": 1.0} and "notes" not in engine.facts.experts


def test_a_stamp_changes_with_each_file(tmp_path):
    (tmp_path / "a").write_text("1")
    seen = [stamp([tmp_path, tmp_path / "none"])]
    (tmp_path / "b").write_text("1")
    seen.append(stamp([tmp_path, tmp_path / "none"]))
    touch(tmp_path / "a")
    seen.append(stamp([tmp_path, tmp_path / "none"]))
    (tmp_path / "b").unlink()
    seen.append(stamp([tmp_path, tmp_path / "none"]))
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
    assert stamp([tmp_path]) == stamp([tmp_path])


def test_owners_who_trust_nobody_leave_no_expert_in_use():
    experts = {"notes": made_facts("notes")}
    assert "not trusted" in find_revoked(TrustedOwners({}), experts)["notes"]
    assert find_revoked(TrustedOwners({}, allows_unknown=True), experts) == {}
