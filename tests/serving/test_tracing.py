"""`trace: true`: spans of enabled sources that may be traced, and of no other."""

import json
import time

import numpy as np
import pytest
from starlette.testclient import TestClient

from flexolmo.errors import BusyError
from flexolmo.serving import gateway as gateway_module
from flexolmo.serving import tracing
from flexolmo.serving.app import create_app
from flexolmo.serving.policy import Policies
from flexolmo.serving.tracing import Tracer, limit_span
from flexolmo.trace.questions import LEVELS
from flexolmo.trace.spans import find_spans
from flexolmo.trace.words import split_words
from made_sets import made_text
from made_traces import CLINIC_POLICY, TRACE_POLICY, Named, documents_of, made_index


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Text that every answer of the made engine is in."""
    said = "Grüße 🙂 from notes+papers, seed 4. Grüße 🙂 from papers, seed 4."
    texts = [f"{said} {made_text(n)}" for n in range(12)]
    return made_index(tmp_path_factory.mktemp("papers"), texts)


@pytest.fixture
def looked(monkeypatch):
    """Directories of the indexes that were looked into."""
    found = []

    def look(index, *args, **kwargs):
        found.append(index.name_here)
        return find_spans(index, *args, **kwargs)

    monkeypatch.setattr(tracing, "find_spans", look)
    return found


@pytest.fixture
def ask(make_gateway, index, policy_dir, keys, looked):
    """Ask a server that traces papers, notes and secret, as somebody."""
    (policy_dir / "trace.cedar").write_text(TRACE_POLICY + CLINIC_POLICY)
    sources = {name: Named(index, name) for name in ("papers", "notes", "secret")}
    gateway = make_gateway(tracer=Tracer(sources, "document"), policies=Policies.load(policy_dir))
    with TestClient(create_app(gateway)) as client:

        def post(who, path="/v1/completions", **more):
            body = {"model": "made", "prompt": "x", "max_tokens": 100, "seed": 4, "trace": True}
            headers = {"Authorization": f"Bearer {keys[who]}"}
            return client.post(path, headers=headers, json=body | more)

        post.gateway = gateway
        yield post


def traces_of(reply):
    assert reply.status_code == 200, reply.text
    return reply.json()["flexolmo"]["traces"]


def test_spans_of_enabled_sources_are_told_with_their_places_in_the_answer(ask, looked):
    reply = ask("alice")
    (trace,) = traces_of(reply)
    text = reply.json()["choices"][0]["text"]
    assert {span["source"] for span in trace["spans"]} == {"notes", "papers"}
    assert sorted(looked) == ["notes", "papers"]
    assert trace["untraced"] == {}
    for span in trace["spans"]:
        assert len(text[span["first"] : span["last"]]) > 10
        assert span["documents"] and span["places"] == [] and span["bits"] is None


@pytest.mark.parametrize(
    ("who", "choice", "expected"),
    [
        ("alice", {"without": ["notes"]}, ["papers"]),
        ("alice", {"only": ["notes"]}, ["notes"]),
        ("alice", {"without": ["notes", "papers"]}, []),
        ("bob", None, ["papers"]),  # may not use notes
        ("alice", {"only": ["trials", "papers"]}, ["papers"]),  # no index
    ],
)
def test_a_source_that_is_off_is_never_asked_nor_shown(ask, looked, who, choice, expected):
    reply = ask(who, **({"experts": choice} if choice else {}))
    (trace,) = traces_of(reply)
    assert sorted(looked) == expected
    assert {span["source"] for span in trace["spans"]} <= set(expected)


def test_a_source_that_is_on_and_may_not_be_traced_is_not_asked(ask, looked, policy_dir):
    (policy_dir / "trace.cedar").write_text(TRACE_POLICY)
    ask.gateway.policies = Policies.load(policy_dir)
    reply = ask("alice")
    traces_of(reply)
    assert "notes" in reply.json()["flexolmo"]["enabled"]
    assert looked == ["papers"]


def test_nothing_is_looked_up_unless_the_request_wants_it(ask, looked):
    for wish in (False, None):
        assert ask("alice", trace=wish).json()["flexolmo"]["traces"] is None
    assert looked == []


def test_a_stream_ends_with_the_trace_of_all_its_texts(ask):
    whole = traces_of(ask("alice", n=2))
    assert len(whole) == 2
    reply = ask("alice", n=2, stream=True)
    lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
    said = [json.loads(line)["flexolmo"] for line in lines if "flexolmo" in json.loads(line)]
    assert [one["traces"] for one in said] == [whole]


def test_a_server_without_indexes_refuses_to_trace(client, alice):
    body = {"model": "made", "prompt": "x", "trace": True}
    reply = client.post("/v1/completions", headers=alice, json=body)
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "no_tracing"


def test_an_answer_comes_without_the_trace_of_a_source_that_fails_or_is_slow(
    ask, monkeypatch, index
):
    def fail(index, *args, **kwargs):
        if index.name_here == "notes":
            raise BusyError("spent")
        return find_spans(index, *args, **kwargs)

    monkeypatch.setattr(tracing, "find_spans", fail)
    (trace,) = traces_of(ask("alice"))
    assert trace["untraced"] == {"notes": "spent"}
    assert {span["source"] for span in trace["spans"]} == {"papers"}
    monkeypatch.setattr(gateway_module, "_TRACE_SECONDS", 0.05)
    monkeypatch.setattr(tracing, "find_spans", lambda *_, **__: time.sleep(0.5) or [])
    (trace,) = traces_of(ask("alice"))
    assert trace["spans"] == [] and set(trace["untraced"]) == {"notes", "papers"}


def test_spans_are_ranked_by_their_rarity_in_public_text_whatever_is_told(index):
    (long, _), (short, _) = documents_of(index)[:2]
    rare = next(i for i in short[45:55] if i not in long[40:80])
    decode = index.tokenizer.decode
    text = f"{decode(long[40:80])} -- {decode(short[40:60])}"
    sources = {"papers": Named(index, "papers"), "notes": Named(index, "notes")}
    bits = np.ones(index.tokenizer.vocab_size)
    order = []
    for bits[rare] in (1.0, 1000.0):
        tracer = Tracer(sources, "yes", bits)
        (trace,) = tracer.trace([text], sources, index.tokenizer)
        assert {s.bits for s in trace.spans} == {None} and len(trace.spans) >= 4
        order.append([decode([rare]) in text[s.first : s.last] for s in trace.spans])
    assert not any(order[0][:2]) and all(order[1][:2])


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_hides_what_it_does_not_allow(index, level):
    document, _ = documents_of(index)[0]
    words = split_words(index.tokenizer.decode(document[:30]), index.tokenizer)
    span = limit_span(find_spans(index, words)[0], level)
    told = [span.count is not None, bool(span.documents), bool(span.occurrences)]
    assert told == [LEVELS.index(level) >= rank for rank in (1, 2, 3)]
    assert (span.bits is not None) == (level == "text")
