"""The gateway in front of vLLM: an owner revokes while others are served. Needs vLLM."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from made_owners import entry, revoke
from made_policies import PERMIT_ALL, write_policies
from made_server import read_stream, serving, wait_until
from made_vllm import NAMES, needs_vllm

pytestmark = needs_vllm
SETS = [
    (),
    ("zinc",),
    ("amber",),
    ("amber", "zinc"),
    ("coral", "flint"),
    NAMES,
    ("flint",),
    ("basalt",),
]
NUM_TOKENS = 300
WHY = "zinc was revoked by its owner on 2026-11-23: A patient objected."


def test_a_revocation_under_load_ends_what_used_the_expert_and_harms_nobody_else(
    house, tmp_path, monkeypatch
):
    httpx = pytest.importorskip("httpx")
    from flexolmo.bundle.trust import TrustedOwners
    from flexolmo.inference.apart import ApartEngine, vllm_command
    from flexolmo.inference.opening import Opening
    from flexolmo.serving import app as app_room
    from flexolmo.serving.audit_log import AuditLog
    from flexolmo.serving.console import Trail
    from flexolmo.serving.gateway import Gateway, Limits
    from flexolmo.serving.identity import NoIdentity
    from flexolmo.serving.policy import Policies
    from flexolmo.serving.prompts import TextModel
    from flexolmo.serving.upkeep import Sources, Upkeep, look_at

    model = shutil.copytree(house.mixture_dir(NAMES), tmp_path / "model")
    trust = tmp_path / "trust"
    trust.mkdir()
    for owner, key in house.keys.items():
        shutil.copy(f"{key}.pub", trust / f"{owner}.pub")
    policies = write_policies(tmp_path / "policies", PERMIT_ALL)
    tokenizer, identity = house.anchor.tokenizer, NoIdentity()
    sources = Sources(
        policies,
        [model / "mixture.json", trust],
        lambda: (tokenizer, None),
        lambda: TrustedOwners.load(trust),
    )
    seen = look_at(identity, sources)
    engine = ApartEngine(
        vllm_command(None), Opening(model=model, trust=trust, memory_bytes=32 << 20)
    )
    gateway = Gateway(
        name="m",
        engine=engine,
        texts=TextModel(engine.facts.digest, tokenizer, None),
        policies=Policies.load(policies),
        audit=Trail(AuditLog.open(tmp_path / "audit")),
        identity=identity,
        limits=Limits(),
    )
    monkeypatch.setattr(app_room, "LOOK_SECONDS", 0.05)
    jobs = [(f"{i} and the", SETS[i % len(SETS)]) for i in range(16)]
    all_write = Barrier(len(jobs) + 1, timeout=60)

    def body(prompt, names, **more):
        return {"model": "m", "prompt": prompt, "temperature": 0, "max_tokens": NUM_TOKENS} | {
            "experts": {"only": list(names)}, **more,
        }  # fmt: skip

    def stream(client, prompt, names, has_begun=None):
        asked = body(prompt, names, stream=True)
        return read_stream(client, has_begun, url="/v1/completions", json=asked)

    app = app_room.create_app(gateway, Upkeep(gateway, sources, seen))
    with (
        serving(app) as address,
        httpx.Client(base_url=address, timeout=120) as client,
        ThreadPoolExecutor(len(jobs)) as pool,
    ):
        before = [stream(client, *job).text for job in jobs]
        under_way = [pool.submit(stream, client, *job, all_write.wait) for job in jobs]
        all_write.wait()
        revoke(trust, house.keys["Bob"], entry("expert", name="zinc", up_to_serial=1), owner="Bob")
        found = [answer.result() for answer in under_way]
        wait_until(lambda: "zinc" not in engine.facts.experts)
        refused = client.post("/v1/completions", json=body("x", ["zinc"])).json()
        later = client.post("/v1/completions", json=body(*jobs[2])).json()
    assert refused["error"]["code"] == "not_permitted" and WHY in refused["error"]["message"]
    assert later["choices"][0]["text"] == before[2]
    for (_, names), expected, answer in zip(jobs, before, found, strict=True):
        if "zinc" in names:
            assert answer.code == "source_withdrawn" and WHY in answer.message
            text = answer.text.rstrip("\ufffd")
            assert expected.startswith(text) and len(answer.text) < len(expected)
        else:
            assert answer.code is None and answer.text == expected
