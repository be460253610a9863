"""The console: a page for people, and the three things that it asks beside completions.

Which sources may take part and why, whoever's own decisions in the audit log, and proofs of them.
"""

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping
from importlib import resources
from typing import cast

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import JsonValue

from flexolmo.bundle.terms import PURPOSES, PurposeName, Terms
from flexolmo.errors import AuditError
from flexolmo.serving.audit_check import public_key
from flexolmo.serving.audit_log import AuditLog
from flexolmo.serving.audit_proof import InclusionProof, prove_entry
from flexolmo.serving.entries import Kind, utc_now
from flexolmo.serving.gateway import Gateway
from flexolmo.serving.policy import Principal, Wish
from flexolmo.serving.refusal import Refusal
from flexolmo.serving.replies import Reply, errors

FILES = {
    "index.html": "text/html; charset=utf-8",
    "console.css": "text/css; charset=utf-8",
    "console.js": "text/javascript; charset=utf-8",
    "elements.js": "text/javascript; charset=utf-8",
    "proof.js": "text/javascript; charset=utf-8",
    "trace.js": "text/javascript; charset=utf-8",
}
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PURPOSE_PARAMETER = {
    "parameters": [
        {
            "name": "purpose",
            "in": "query",
            "description": "Purposes of the use; may be repeated.",
            "schema": {"type": "array", "items": {"enum": list(PURPOSES)}},
        }
    ]
}
MOST_ENTRIES = 20  # that are kept in mind of one person
MOST_PEOPLE = 1000


class PrincipalReply(Reply):
    """The person or program that asks."""

    subject: str
    groups: list[str]
    roles: list[str]


class PurposeReply(Reply):
    """One purpose of the vocabulary."""

    name: PurposeName
    meaning: str
    source: str


class SourceReply(Reply):
    """One source, and whether it may take part for this person and purpose."""

    name: str
    owner: str
    licence: str
    serial: int
    terms: Terms
    is_enabled: bool
    is_traceable: bool  # answers may be looked up in its training text
    reasons: list[str]


class SourcesExplained(Reply):
    """All sources, as the policy judges them."""

    model: str
    model_digest: str
    policy_digest: str
    principal: PrincipalReply
    purposes: list[PurposeReply]
    sources: list[SourceReply]


class EntryReply(Reply):
    """One decision in the audit log."""

    number: int
    time: str
    fields: dict[str, JsonValue]


class EntriesReply(Reply):
    """Decisions on somebody's own requests since the server started, newest first."""

    entries: list[EntryReply]


class ProofReply(Reply):
    """Proof that an entry is in the log, and the key that signed the log's head."""

    proof: InclusionProof
    public_key: str


class Trail:
    """The audit log, and the newest decisions on each person's requests since it was opened.

    A gateway writes to it as to the log.
    """

    def __init__(self, log: AuditLog):
        self._log = log
        self._lock = threading.Lock()
        self._newest: OrderedDict[str, deque[EntryReply]] = OrderedDict()  # by subject

    def append(self, kind: Kind, fields: Mapping[str, JsonValue]) -> int:
        """Write an entry of the log, as `AuditLog.append` does; keep a decision in mind."""
        number = self._log.append(kind, fields)
        if kind == "decision":
            entry = EntryReply(number=number, time=utc_now(), fields=dict(fields))
            subject = str(fields["principal"])
            with self._lock:
                self._newest.setdefault(subject, deque(maxlen=MOST_ENTRIES)).append(entry)
                self._newest.move_to_end(subject)
                while len(self._newest) > MOST_PEOPLE:
                    self._newest.popitem(last=False)
        return number

    def close(self) -> None:
        """End the log in order, as `AuditLog.close` does."""
        self._log.close()

    def of(self, subject: str) -> list[EntryReply]:
        """Decisions on the person's requests, newest first."""
        with self._lock:
            return list(reversed(self._newest.get(subject, ())))

    def prove(self, number: int) -> ProofReply:
        """Proof that an entry is in the log, under a head signed at the latest now."""
        key = public_key(self._log.directory)
        self._log.checkpoint()
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        return ProofReply(proof=prove_entry(self._log.directory, number, key), public_key=pem)


def add_console(app: FastAPI, gateway: Gateway, trail: Trail) -> None:
    """Add the page under /console/, and what it asks under /v1."""
    proving = asyncio.Lock()  # one at a time: each reads the whole log

    @app.get("/console/", include_in_schema=False)
    @app.get("/console/{name}", include_in_schema=False)
    async def console(name: str = "index.html") -> Response:
        if name not in FILES:
            raise Refusal(404, "not_found", "The console has no such file.")
        data = resources.files("flexolmo.serving").joinpath("console", name).read_bytes()
        headers = {"Content-Security-Policy": CONTENT_POLICY}
        return Response(data, headers=headers, media_type=FILES[name])

    @app.get("/", include_in_schema=False)
    async def home() -> Response:
        return RedirectResponse("console/")

    @app.get("/v1/sources", responses=errors(400, 401, 503), openapi_extra=_PURPOSE_PARAMETER)
    async def sources(request: Request) -> SourcesExplained:
        """Sources that may take part for whoever asks and these purposes, and why not others."""
        principal = gateway.identity.identify(request.headers.get("authorization"))
        purposes = frozenset(request.query_params.getlist("purpose"))
        if unknown := sorted(purposes - PURPOSES.keys()):
            message = f"Unknown purpose {unknown[0][:100]!r}: known are {', '.join(PURPOSES)}."
            raise Refusal(400, "unknown_purpose", message, field="purpose")
        return explain_sources(gateway, principal, cast(frozenset[PurposeName], purposes))

    @app.get("/v1/decisions", responses=errors(401, 503))
    async def decisions(request: Request) -> EntriesReply:
        """Decisions on requests of whoever asks, since the server started, newest first."""
        principal = gateway.identity.identify(request.headers.get("authorization"))
        return EntriesReply(entries=trail.of(principal.subject))

    @app.get("/v1/decisions/{number}/proof", responses=errors(401, 404, 503))
    async def proof(number: str, request: Request) -> ProofReply:
        """Proof that such a decision is in the audit log."""
        principal = gateway.identity.identify(request.headers.get("authorization"))
        found = [e.number for e in trail.of(principal.subject) if str(e.number) == number]
        if not found:
            raise Refusal(404, "entry_not_found", "None of your decisions has this number.")
        async with proving:
            try:
                return await asyncio.to_thread(trail.prove, found[0])
            except AuditError as e:
                raise Refusal(503, "audit_unavailable", str(e)) from None


def explain_sources(
    gateway: Gateway, principal: Principal, purposes: frozenset[PurposeName]
) -> SourcesExplained:
    """All sources as the policy judges them now for `principal` and `purposes`."""
    facts = gateway.engine.facts
    decision = gateway.decide(facts, principal, purposes, Wish())
    traced = gateway.find_traceable(facts, principal, purposes, decision.enabled)
    return SourcesExplained(
        model=gateway.name,
        model_digest=facts.digest,
        policy_digest=decision.policy_digest,
        principal=PrincipalReply(
            subject=principal.subject,
            groups=sorted(principal.groups),
            roles=sorted(principal.roles),
        ),
        purposes=[
            PurposeReply(name=name, meaning=p.meaning, source=p.source)
            for name, p in PURPOSES.items()
        ],
        sources=[
            SourceReply(
                name=name,
                owner=expert.owner,
                licence=expert.licence,
                serial=expert.serial,
                terms=expert.terms,
                is_enabled=name in decision.enabled,
                is_traceable=name in traced,
                reasons=list(decision.verdicts[name].reasons),
            )
            for name, expert in sorted(gateway.experts(facts).items())
        ],
    )
