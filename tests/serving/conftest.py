"""A gateway in front of a made engine, with real policies, audit log and HTTP around it."""

import json

import pytest
from starlette.testclient import TestClient

from flexolmo.data.tokenizer import load_tokenizer
from flexolmo.serving.app import create_app
from flexolmo.serving.audit_log import AuditLog
from flexolmo.serving.gateway import Gateway, Limits
from flexolmo.serving.identity import ProvenIdentity
from flexolmo.serving.keys import add_key
from flexolmo.serving.policy import Policies
from flexolmo.serving.prompts import TextModel
from made_engine import MadeEngine, made_facts

# Alice's clinic may use notes and trials; nobody may use secret; papers are for everybody.
POLICIES = """
@id("papers for all")
permit (principal, action == FlexOlmo::Action::"activate", resource == FlexOlmo::Expert::"papers");
@id("clinic")
permit (
    principal in FlexOlmo::Group::"clinic",
    action == FlexOlmo::Action::"activate",
    resource
)
when { [FlexOlmo::Expert::"notes", FlexOlmo::Expert::"trials"].contains(resource) };
"""


@pytest.fixture(scope="session")
def tokenizer(pico_anchor, tmp_path_factory):
    """The pico anchor's, as a server reads it."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    pico_anchor.tokenizer.save(path)
    return load_tokenizer(path)


@pytest.fixture
def experts():
    """Facts about four experts; the terms of trials are for research alone."""
    return {
        "notes": made_facts("notes", attribution="Notes of Ann's ward."),
        "papers": made_facts("papers", attribution="Papers of the library."),
        "secret": made_facts("secret"),
        "trials": made_facts("trials", permitted=("general-research",)),
    }


@pytest.fixture
def engine(tokenizer, experts):
    """An engine with those experts."""
    return MadeEngine(tokenizer, experts)


@pytest.fixture
def policy_dir(tmp_path):
    """A directory with POLICIES."""
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "all.cedar").write_text(POLICIES)
    return tmp_path / "policies"


@pytest.fixture
def auth(tmp_path):
    """Settings that let people with API keys in; see `keys`."""
    (tmp_path / "auth.toml").write_text('api_keys = "keys.json"\n')
    add_key(tmp_path / "keys.json", "nobody")
    return tmp_path / "auth.toml"


@pytest.fixture
def keys(auth):
    """API keys of Alice, who is of the clinic, and of Bob, who is not."""
    file = auth.with_name("keys.json")
    return {"alice": add_key(file, "alice", ["clinic"]), "bob": add_key(file, "bob")}


@pytest.fixture
def make_gateway(engine, tokenizer, policy_dir, auth, keys, tmp_path):
    """`make_gateway(**changes)`: a gateway of the model "made"."""
    logs = []

    def make(limits=None, **changes):
        usual = dict(
            name="made",
            engine=engine,
            texts=TextModel(engine.facts.digest, tokenizer, None),
            policies=Policies.load(policy_dir),
            identity=ProvenIdentity(auth),
            limits=Limits(**(limits or {})),
        )
        if "audit" not in changes:
            changes["audit"] = AuditLog.open(tmp_path / "audit")
            logs.append(changes["audit"])
        return Gateway(**usual | changes)

    yield make
    for log in logs:
        log.close()


@pytest.fixture
def entries(tmp_path):
    """`entries(kind)`: fields of all entries in the audit log, or of those of a kind, in order."""

    def read(kind=None):
        lines = [
            json.loads(line)
            for file in sorted((tmp_path / "audit").glob("*.jsonl"))
            if file.name[0].isdigit()
            for line in file.read_text().splitlines()
        ]
        return [e["fields"] | {"number": e["number"]} for e in lines if kind in (None, e["kind"])]

    return read


@pytest.fixture
def client(make_gateway):
    """A client of a running application, in this process; whole responses only."""
    with TestClient(create_app(make_gateway())) as client:
        yield client


@pytest.fixture
def alice(keys):
    """Headers by which Alice asks."""
    return {"Authorization": f"Bearer {keys['alice']}"}
