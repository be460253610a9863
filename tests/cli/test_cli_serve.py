"""The server as a process, and its API keys on the command line."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from flexolmo.serving.keys import read_keys

# Everything of the command but the model and torch, for which a made engine stands.
PROGRAM = """
import sys, types
from pathlib import Path
from flexolmo.data.tokenizer import load_tokenizer
from made_engine import MadeEngine, made_facts

def open_engine(model, read_owners, settings, experts, verify):
    read_owners()
    names = ["notes"] if experts is None else experts
    made = MadeEngine(load_tokenizer(model / "anchor"), {n: made_facts(n) for n in names})
    if (model / "hold").exists():
        made.hold()
    return made

def replace(name, **content):
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module

def made_settings(memory_bytes):
    assert memory_bytes > 0
    return types.SimpleNamespace(memory_bytes=memory_bytes)

replace("flexolmo.inference.open_engine", open_engine=open_engine)
replace("flexolmo.inference.batching", EngineSettings=made_settings)
replace("flexolmo.runtime", leave_a_core=lambda: None)
from flexolmo.cli import main
main()
"""
POLICY = '@id("all") permit (principal, action, resource);'


@pytest.fixture
def place(tmp_path, pico_anchor):
    """A directory with a model's tokenizer, policies, trust and an API key."""
    pico_anchor.tokenizer.save(tmp_path / "model" / "anchor" / "tokenizer.json")
    (tmp_path / "model" / "mixture.json").write_text("{}")
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "all.cedar").write_text(POLICY)
    (tmp_path / "trust").mkdir()
    (tmp_path / "auth.toml").write_text('api_keys = "keys.json"\n')
    return tmp_path


@pytest.fixture
def key(works, place):
    """An API key of Alice's."""
    words = ["--subject", "alice", "--groups", "ward, clinic", "--roles", "doctor"]
    return works("serve", "key", "add", "--keys", place / "keys.json", *words).strip()


def options(place, *more):
    return [
        "serve",
        *("--model", place / "model", "--policy", place / "policies", "--audit", place / "audit"),
        *("--trust", place / "trust"),
        *more,
    ]


def run_program(*words, **more):
    """The command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        **more,
    )


class Process:
    """A server that has started, at `address`."""

    def __init__(self, place, *more):
        self.process = run_program(*options(place, "--port", 0, *more))
        self.lines = []
        while not any(line.get("event") == "Application startup complete." for line in self.lines):
            line = self.process.stderr.readline()
            assert line, f"it ended: {self.lines}"
            self.lines.append(json.loads(line))
        (host, port) = next(li["address"] for li in self.lines if li["event"] == "listening")
        self.address = f"http://{host}:{port}"

    def end(self, how=signal.SIGTERM):
        """Tell it to stop; the rest of its log, once it has."""
        self.process.send_signal(how)
        said = self.process.communicate(timeout=20)[1]
        return [json.loads(line) for line in said.splitlines()]


@pytest.fixture
def start(place):
    """`start(*options)`: a running server, killed at the end if it still is."""
    running = []

    def begin(*more):
        running.append(Process(place, *more))
        return running[-1]

    yield begin
    for server in running:
        server.process.kill()
        server.process.communicate()


def entries(place):
    files = sorted((place / "audit").glob("0*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_server_answers_by_key_and_stops_in_order(start, place, key):
    server = start("--auth", place / "auth.toml")
    ask = dict(json={"model": "model", "prompt": "x", "max_tokens": 100, "seed": 4})
    headers = {"Authorization": f"Bearer {key}"}
    reply = httpx.post(f"{server.address}/v1/completions", headers=headers, **ask)
    assert reply.json()["choices"][0]["text"] == "Grüße 🙂 from notes, seed 4."
    assert "server" not in reply.headers
    assert httpx.post(f"{server.address}/v1/completions", **ask).status_code == 401
    said = server.end()
    kinds = [entry["kind"] for entry in entries(place)]
    assert kinds == ["started", "decision", "finished", "stopped"]
    assert entries(place)[1]["fields"]["groups"] == ["clinic", "ward"]
    assert entries(place)[1]["fields"]["roles"] == ["doctor"]
    assert entries(place)[1]["fields"]["principal"] == "alice"
    assert not re.search("alice|Gr|flexolmo_[0-9a-f]", json.dumps([*server.lines, *said]))
    assert {line["route"] for line in said if line["event"] == "response"} == {"/v1/completions"}


def test_an_answer_under_way_is_told_that_the_server_stops(start, place, key):
    (place / "model" / "hold").touch()
    server = start("--auth", place / "auth.toml", "--drain-seconds", 0.5)
    body = {"model": "model", "prompt": "x", "stream": True}
    headers = {"Authorization": f"Bearer {key}"}
    address = f"{server.address}/v1/completions"
    with httpx.stream("POST", address, json=body, headers=headers, timeout=20) as reply:
        server.process.send_signal(signal.SIGTERM)
        text = reply.read().decode()
    assert '"code":"closing"' in text and text.endswith("data: [DONE]\n\n")
    server.process.wait(20)
    assert [e["kind"] for e in entries(place)][-2:] == ["finished", "stopped"]
    assert entries(place)[-2]["fields"]["reason"] == "closed"


def test_a_killed_server_leaves_a_log_that_the_next_one_goes_on_with(start, place, key):
    (place / "model" / "hold").touch()
    server = start("--auth", place / "auth.toml")
    body = {"model": "model", "prompt": "x", "stream": True}
    headers = {"Authorization": f"Bearer {key}"}
    with (
        pytest.raises(httpx.RemoteProtocolError),
        httpx.stream(
            "POST", f"{server.address}/v1/completions", json=body, headers=headers
        ) as reply,
    ):
        number = int(reply.headers["X-FlexOlmo-Entry"])
        server.process.kill()
        reply.read()
    server.process.wait()
    assert entries(place)[number]["kind"] == "decision"
    start("--auth", place / "auth.toml")
    assert [e["kind"] for e in entries(place)] == ["started", "decision", "started"]


def test_a_key_revoked_while_serving_is_refused_within_seconds(start, works, place, key):
    server = start("--auth", place / "auth.toml")
    headers = {"Authorization": f"Bearer {key}"}
    assert httpx.get(f"{server.address}/v1/models", headers=headers).is_success
    works("serve", "key", "revoke", "--keys", place / "keys.json", key.split("_")[1])
    until = time.monotonic() + 5
    while httpx.get(f"{server.address}/v1/models", headers=headers).status_code != 401:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_everybody_on_this_machine_is_let_in_where_that_was_asked_for(start, place):
    server = start("--no-auth", "--name", "mine", "--experts", "trials, papers")
    (model,) = httpx.get(f"{server.address}/v1/models").json()["data"]
    assert (model["id"], list(model["flexolmo"]["experts"])) == ("mine", ["papers", "trials"])
    elsewhere = httpx.get(f"{server.address}/v1/models", headers={"Host": "evil.example"})
    assert elsewhere.json()["error"]["code"] == "wrong_host"


@pytest.mark.parametrize(
    "more, words",
    [
        ([], "--auth FILE, which says who is let in, or --no-auth"),
        (["--no-auth", "--auth", "auth.toml"], "--no-auth"),
        (["--no-auth", "--host", "0.0.0.0"], "On 0.0.0.0 anybody could ask"),
        (["--no-auth", "--host", "::"], "anybody could ask"),
        (["--no-auth", "--host", "example.org"], "anybody could ask"),
        (["--auth", "missing.toml"], "missing.toml does not exist"),
        (["--no-auth", "--max-texts", 0], "max_texts"),
        (["--no-auth", "--port", 70_000], "port"),
        (["--no-auth", "--policy", "nowhere"], "policies in nowhere cannot be read"),
        (["--no-auth", "--engine-python", "python3"], "--engine-python is for --engine vllm"),
        (
            ["--no-auth", "--engine", "vllm", "--engine-python", "/nowhere/python"],
            "The engine cannot be started with /nowhere/python",
        ),
    ],
)
def test_what_cannot_be_served_is_said_before_the_model_is_read(run, place, more, words):
    code, _, err = run(*options(place, *more))
    assert code == 2 and words in err and "Traceback" not in err
    assert not (place / "audit").exists()


def test_what_is_missing_is_named(run):
    code, _, err = run("serve", "--no-auth")
    assert code == 2 and "--model, --policy and --audit" in err


def test_keys_are_listed_without_themselves(works, place, key):
    listed = works("serve", "key", "list", "--keys", place / "keys.json")
    number = key.split("_")[1]
    assert number in listed and "alice" in listed and key.split("_")[2][:20] not in listed
    works("serve", "key", "revoke", "--keys", place / "keys.json", number)
    assert read_keys(place / "keys.json")[number].revoked is not None


@pytest.mark.parametrize(
    "words, said",
    [
        (["add", "--subject", "a", "--expires", "tomorrow"], "is no day"),
        (["add", "--subject", "a", "--expires", "2020-01-01"], "would have expired"),
        (["add", "--subject", ""], "cannot name"),
        (["add", "--subject", "a", "--groups", "x,,y"], "empty name"),
        (["revoke", "0" * 12], "has no key"),
        (["list"], "cannot be read"),
    ],
)
def test_a_key_that_cannot_be_is_refused(run, tmp_path, words, said):
    verb, *rest = words
    code, _, err = run("serve", "key", verb, "--keys", tmp_path / "keys.json", *rest)
    assert code == 2 and said in err and "Traceback" not in err
    assert not (tmp_path / "keys.json").exists()


def test_an_address_that_is_taken_is_said(place):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = options(place, "--no-auth", "--port", taken.getsockname()[1])
        done = run_program(*words, stdout=subprocess.PIPE).communicate(timeout=20)
    assert "in use" in done[1] and "Traceback" not in done[1]


def test_help_has_examples(works):
    for words in (["serve"], ["serve", "key", "add"], ["serve", "key", "revoke"]):
        assert "Example: flexolmo serve" in works(*words, "--help")
