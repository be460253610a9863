"""Entries of an audit log, for tests."""

from flexolmo.files import digest_bytes

MODEL = digest_bytes(b"model")
POLICY = digest_bytes(b"policy")


def decision(principal="alice", **changes):
    """Fields of a decision: amber is on, birch refused."""
    fields = {
        "request_id": "5f0c6f0e-8a3e-4b7e-9d50-0f3c7f1f5b1a",
        "principal": principal,
        "groups": ["clinic"],
        "roles": ["doctor"],
        "purposes": ["health-research"],
        "asked": ["amber", "birch"],
        "enabled": ["amber"],
        "refused": {"birch": ["the owner's terms expired on 2026-10-31"]},
        "model_digest": MODEL,
        "policy_digest": POLICY,
    }
    return fields | changes


def finished(number, principal="alice", **changes):
    """Fields of what ended the request of decision `number`."""
    fields = {
        "decision": number,
        "principal": principal,
        "reason": "stop",
        "prompt_tokens": 30,
        "cached_tokens": 10,
        "written_tokens": 70,
        "shares": {"amber": 0.25, "public": 0.75},
        "owners": {"amber": "Ann"},
    }
    return fields | changes


def fill(log, count):
    """Append `count` short entries."""
    for i in range(count):
        log.append("stopped", {"why": f"reason {i}"})
