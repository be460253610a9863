"""The host of vLLM's engine around one that is made up: one request's mistake is its own. Needs
vLLM."""

import socket
from types import SimpleNamespace

import pytest

from flexolmo.inference.messages import Line, read_event
from flexolmo.inference.opening import Opening
from made_engines import ask
from made_vllm import needs_vllm

pytestmark = needs_vllm


@pytest.fixture
def ends():
    """Both ends of a line."""
    ours, theirs = socket.socketpair()
    return Line(ours), Line(theirs)


@pytest.fixture
def host(ends):
    """A host of requests 1 and 2, which only read their prompts."""
    from flexolmo_vllm.host import Host, Text

    runner = SimpleNamespace(
        model=SimpleNamespace(served=SimpleNamespace(facts=None)),
        follower=SimpleNamespace(shares=lambda request, enabled: {}),
    )
    worker = SimpleNamespace(worker=SimpleNamespace(model_runner=runner))
    core = SimpleNamespace(
        scheduler=SimpleNamespace(damaged=set(), requests={}),
        model_executor=SimpleNamespace(driver_worker=worker),
    )
    engine = SimpleNamespace(
        engine_core=SimpleNamespace(engine_core=core), abort_request=lambda names: None
    )
    host = Host(engine, ends[0])
    for number in (1, 2):
        host._texts[number] = Text(number, ask([0, 5], writes=False), None, id=str(number))
    return host


def output(number, outputs):
    return SimpleNamespace(request_id=str(number), outputs=outputs, num_cached_tokens=0)


def test_an_output_that_cannot_be_taken_in_ends_its_own_request_alone(host, ends):
    host._take_in(output(1, []))
    host._take_in(output(2, [SimpleNamespace(token_ids=[], logprobs=None)]))
    host._line.close()
    said = {number: read_event(*rest) for _, (number, *rest) in ends[1].messages()}
    assert {number: event.reason for number, event in said.items()} == {1: "failed", 2: "scored"}
    assert "The engine failed on this request" in said[1].detail


def test_a_gateway_that_is_gone_is_told_nothing(host, ends):
    ends[1].close()
    for number in (1, 2):
        host._take_in(output(number, [SimpleNamespace(token_ids=[], logprobs=None)]))
    assert not host._texts


def test_the_model_is_read_with_the_record_of_what_was_seen(monkeypatch):
    from flexolmo_vllm import model as room

    asked = []

    def reader(*arguments):
        asked.append(arguments)
        return lambda: SimpleNamespace(facts=SimpleNamespace(digest="d"))

    monkeypatch.setattr(room, "model_reader", reader)
    monkeypatch.setattr(room.MixtureForCausalLM, "__init__", lambda self: None)
    monkeypatch.setattr(room.MixtureForCausalLM, "__setattr__", object.__setattr__)
    monkeypatch.setattr(room.MixtureForCausalLM, "take_up", lambda self, served: None)
    seen = {"zinc": {"Bob": {"serial": 2, "bundle_digest": "b"}}}
    config = SimpleNamespace(hf_config=SimpleNamespace(flexolmo={"digest": "d"}))
    for record in (seen, {}):
        opening = Opening(model="model", trusts_any_signer=True, seen=record)
        extra = opening.model_dump(mode="json")
        loader = SimpleNamespace(load_config=SimpleNamespace(model_loader_extra_config=extra))
        room.MixtureLoader.load_weights(loader, room.MixtureForCausalLM(), config)
    assert [arguments[-1] for arguments in asked] == [seen, None]
