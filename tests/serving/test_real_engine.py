"""Faults of a server whose engine, model, audit log and HTTP are the real ones.

Every answer is held against the one that a model of its experts alone gives.
"""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import combinations
from threading import Barrier

import httpx
import pytest

from flexolmo.bundle.trust import TrustedOwners
from flexolmo.inference.batching import EngineSettings
from flexolmo.inference.decode import continue_ids
from flexolmo.inference.engine import TokenWritten
from flexolmo.inference.open_engine import open_engine
from flexolmo.inference.reader import OwnReader
from flexolmo.inference.sampling import Sampling
from flexolmo.inference.stepping import Stepper
from flexolmo.serving import app as app_room
from flexolmo.serving.app import create_app
from flexolmo.serving.audit_check import check_log, public_key
from flexolmo.serving.audit_log import AuditLog
from flexolmo.serving.console import Trail
from flexolmo.serving.gateway import Gateway, Limits
from flexolmo.serving.identity import NoIdentity
from flexolmo.serving.policy import Policies
from flexolmo.serving.prompts import TextModel
from flexolmo.serving.text import TextStream
from flexolmo.serving.upkeep import Sources, Upkeep, look_at
from made_disks import file_size_limit
from made_mixtures import NAMES
from made_owners import entry, revoke
from made_policies import PERMIT_ALL, write_policies
from made_server import read_stream, serving, wait_until

SETTINGS = EngineSettings(memory_bytes=16 << 20, max_running=32, prompt_tokens=64)
SETS = [c for n in range(len(NAMES) + 1) for c in combinations(NAMES, n)]
NUM_TOKENS = 50
WHY = "zinc was revoked by its owner on 2026-11-23: A patient objected."


class Place:
    """A mixture, its trusted owners and an audit log, on disk."""

    def __init__(self, house, where):
        self.house, self.model, self.audit = house, where / "model", where / "audit"
        shutil.copytree(house.mixture_dir(NAMES), self.model)
        self.trust = where / "trust"
        self.trust.mkdir()
        for owner, key in house.keys.items():
            shutil.copy(f"{key}.pub", self.trust / f"{owner}.pub")
        self.policies = write_policies(where / "policies", PERMIT_ALL)

    @contextmanager
    def serve(self):
        """A client of a server on all of this, which looks for changes often."""
        tokenizer = self.house.anchor.tokenizer
        sources = Sources(
            self.policies,
            [self.model / "mixture.json", self.trust],
            lambda: (tokenizer, None),
            lambda: TrustedOwners.load(self.trust),
        )
        identity = NoIdentity()
        seen = look_at(identity, sources)
        engine = open_engine(self.model, sources.read_owners, SETTINGS)
        gateway = Gateway(
            name="m",
            engine=engine,
            texts=TextModel(engine.facts.digest, tokenizer, None),
            policies=Policies.load(self.policies),
            audit=Trail(AuditLog.open(self.audit)),
            identity=identity,
            limits=Limits(),
        )
        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(40) as self.pool:
            patch.setattr(app_room, "LOOK_SECONDS", 0.05)
            app = create_app(gateway, Upkeep(gateway, sources, seen))
            with serving(app) as address, httpx.Client(base_url=address, timeout=30) as self.client:
                yield self
                (found,) = gateway.metrics.upkeep_failures.collect()
                self.failures = {s.labels.get("what") for s in found.samples if s.value}

    def ask(self, number, wish, **more):
        body = {"model": "m", "prompt": prompt_of(number), "temperature": 0, "experts": wish}
        return {"url": "/v1/completions", "json": body | {"max_tokens": NUM_TOKENS} | more}

    def complete(self, number, enabled, **more):
        return self.client.post(**self.ask(number, {"only": list(enabled)}, **more))

    def stream(self, number, enabled, has_begun=None):
        asked = self.ask(number, {"only": list(enabled)}, stream=True)
        return read_stream(self.client, has_begun, **asked)

    def alone(self, number, enabled):
        """The text that a model of these experts alone writes."""
        mixture = self.house.mixture(enabled)
        reader = OwnReader(mixture.model, mixture.tokenizer)
        prompt = mixture.tokenizer.encode(prompt_of(number))
        greedy = Sampling(max_new_tokens=NUM_TOKENS, temperature=0)
        (ids,) = continue_ids(reader, [prompt], greedy)
        text = TextStream(mixture.tokenizer.decode, (), prompt)
        pieces = [*(text.add(TokenWritten(i, None)) for i in ids), text.end()]
        return "".join(piece.text for piece in pieces)

    def entries(self, kind=None):
        """Fields of the log's entries, with their number; the log must verify."""
        found = []
        report = check_log(self.audit, public_key(self.audit), see=found.append)
        assert not report.findings and report.num_findings == 0
        return [e.fields | {"number": e.number} for e in found if kind in (None, e.kind)]


def prompt_of(number):
    return f"{number} and the"


@pytest.fixture
def place(house, tmp_path):
    return Place(house, tmp_path)


@pytest.fixture
def events(monkeypatch):
    """What happened, in order: the experts of each step, and each entry before it is written."""
    found = []
    read, append = Stepper.read, Trail.append

    def noting_read(self, parts, memory):
        found.append(frozenset().union(*(text.request.enabled for text, _ in parts)))
        time.sleep(0.01)  # so that no answer is whole before the server looks
        return read(self, parts, memory)

    def noting_append(self, kind, fields):
        found.append(kind)
        return append(self, kind, fields)

    monkeypatch.setattr(Stepper, "read", noting_read)
    monkeypatch.setattr(Trail, "append", noting_append)
    return found


def test_a_revocation_under_load_ends_what_used_the_expert_and_harms_nobody_else(
    place, house, events
):
    jobs = [(number, SETS[number % len(SETS)]) for number in range(16)]
    all_write = Barrier(len(jobs) + 1, timeout=30)
    with place.serve():
        answers = [place.pool.submit(place.stream, *job, all_write.wait) for job in jobs]
        all_write.wait()
        revoke(
            place.trust,
            house.keys["Bob"],
            entry("expert", name="zinc", up_to_serial=1),
            owner="Bob",
        )
        found = [answer.result() for answer in answers]
        wait_until(lambda: "reloaded" in events)
        later = place.client.post(**place.ask(50, {"without": ["amber"]})).json()
        assert place.complete(51, ["zinc"]).json()["error"]["code"] == "not_permitted"
        assert place.client.get("/readyz").json() == {"problems": []}
    for (number, enabled), (text, told, code, message) in zip(jobs, found, strict=True):
        expected = place.alone(number, enabled)
        if "zinc" in enabled:
            assert code == "source_withdrawn" and WHY in message and told is None
            assert expected.startswith(text.rstrip("\ufffd")) and len(text) < len(expected)
        else:
            assert code is None and text == expected and told["enabled"] == list(enabled)
    assert later["choices"][0]["text"] == place.alone(50, ("basalt",))
    assert later["flexolmo"]["refused"] == {"zinc": [WHY]}
    revoked = events.index("revoked")
    before, after = (
        [e for e in part if isinstance(e, frozenset)]
        for part in (events[:revoked], events[revoked:])
    )
    assert any("zinc" in step for step in before) and after
    assert not any("zinc" in step for step in after)
    (said,) = place.entries("revoked")
    assert (said["experts"], said["why"]) == (["zinc"], WHY)
    decisions = place.entries("decision")
    assert sum("zinc" in d["enabled"] for d in decisions) == sum("zinc" in e for _, e in jobs)
    assert not any("zinc" in d["enabled"] for d in decisions if d["number"] > said["number"])
    ends = {e["decision"]: e["reason"] for e in place.entries("finished")}
    assert ends.keys() == {d["number"] for d in decisions}
    assert {ends[d["number"]] for d in decisions if "zinc" in d["enabled"]} == {"withdrawn"}
    assert place.failures == set()


def test_a_server_starts_again_without_what_was_revoked(place, house):
    revoke(
        place.trust, house.keys["Bob"], entry("expert", name="zinc", up_to_serial=1), owner="Bob"
    )
    with place.serve():
        reply = place.client.post(**place.ask(1, None)).json()
        (model,) = place.client.get("/v1/models").json()["data"]
    assert reply["choices"][0]["text"] == place.alone(1, ("amber", "basalt"))
    assert reply["flexolmo"]["refused"] == {"zinc": [WHY]}
    assert model["flexolmo"]["experts"]["zinc"]["barred"] == WHY
    (started,), (revoked,) = place.entries("started"), place.entries("revoked")
    assert started["experts"].keys() == {"amber", "basalt"}
    assert (revoked["experts"], revoked["why"]) == (["zinc"], WHY)
    assert place.failures == set()


@pytest.mark.usefixtures("events")
def test_with_a_full_disk_nothing_is_served_and_afterwards_all_is(place):
    jobs = [(number, SETS[number % len(SETS)]) for number in range(8)]
    with place.serve():
        before = place.complete(30, ["amber"], max_tokens=5)
        assert before.is_success
        all_write = Barrier(len(jobs) + 1, timeout=30)
        under_way = [place.pool.submit(place.stream, *job, all_write.wait) for job in jobs]
        all_write.wait()
        (segment,) = place.audit.glob("0*.jsonl")
        with file_size_limit(segment.stat().st_size + 40):  # room for part of an entry
            cut = [answer.result() for answer in under_way]
            refused = [place.complete(n, SETS[n % 8], max_tokens=5) for n in range(4)]
            problems = place.client.get("/readyz")
            assert place.client.get("/healthz").is_success
        wait_until(lambda: place.client.get("/readyz").is_success)
        after = [place.pool.submit(place.stream, *job) for job in jobs]
        after = [answer.result() for answer in after]
    alone = [place.alone(*job) for job in jobs]
    for expected, (text, told, code, _) in zip(alone, cut, strict=True):
        assert code == "audit_unavailable" and told is None  # its end could not be logged
        assert expected.startswith(text.rstrip("\ufffd"))
    for reply in refused:
        assert reply.status_code == 503 and "X-FlexOlmo-Entry" not in reply.headers
        assert reply.json()["error"]["code"] == "audit_unavailable"
        assert int(reply.headers["Retry-After"]) > 0
    assert problems.status_code == 503
    assert problems.json()["problems"] == ["the audit log cannot be written"]
    for (_, enabled), expected, (text, told, code, _) in zip(jobs, alone, after, strict=True):
        assert code is None and text == expected and told["enabled"] == list(enabled)
    decisions = {d["number"]: d for d in place.entries("decision")}
    assert len(decisions) == 1 + 2 * len(jobs)  # of those refused there is none
    finished = {e["decision"] for e in place.entries("finished")}
    whole = {answer.told["entry"] for answer in after}
    assert finished == whole | {before.json()["flexolmo"]["entry"]}
