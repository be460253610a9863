"""One request's way: decision, audit, engine, answer, audit.

The decision is on the disk before the engine hears of a request, and the end before an answer is
said to be whole; where the log cannot be written, nothing is served. Knows nothing of HTTP.
"""

import asyncio
import datetime
import functools
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any, ParamSpec, Protocol, TypeVar

from pydantic import Field, JsonValue

from flexolmo.bundle.facts import Barred, ExpertFacts
from flexolmo.bundle.terms import PurposeName
from flexolmo.config import Settings
from flexolmo.errors import AuditError, BusyError, ConfigError, PolicyError
from flexolmo.inference.engine import Engine, ModelFacts
from flexolmo.serving.answer import Answer, Receipt
from flexolmo.serving.entries import Kind
from flexolmo.serving.identity import Identity
from flexolmo.serving.metrics import Metrics
from flexolmo.serving.policy import Action, Decision, Policies, Principal, Wish
from flexolmo.serving.prompts import TextModel, prepare
from flexolmo.serving.refusal import Refusal
from flexolmo.serving.replies import TraceReply
from flexolmo.serving.requests import MAX_TEXTS, Ask
from flexolmo.serving.tracing import Tracer

_TRACE_SECONDS = 10.0
_NUM_THREADS = 32  # that wait for the log's disk, or turn prompts into tokens
_log = logging.getLogger(__name__)

Result = TypeVar("Result")
Given = ParamSpec("Given")


class Limits(Settings):
    """Limits of one server."""

    max_requests: int = Field(
        256, ge=1, le=100_000, description="Requests under way at once; others are told to wait."
    )
    max_body_bytes: int = Field(2 << 20, ge=1 << 10, le=1 << 30, description="Bytes of a body.")
    max_texts_each: int = Field(
        32,
        ge=1,
        le=100_000,
        description="Texts under way at once of one person, who is told to wait with more; a "
        "request of more texts has to be their only one.",
    )
    max_texts: int = Field(
        32, ge=1, le=MAX_TEXTS, description="Texts of one request: its prompts times n."
    )
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="Tokens of a prompt; by default as many as the model has room for."
    )
    max_seconds: float = Field(
        300, gt=0, le=86_400, description="Time from a decision to the end of its answer."
    )
    max_unsent: int = Field(
        10_000, ge=1, description="Tokens that are kept for a client that does not take them."
    )
    stall_seconds: float = Field(
        60, gt=0, le=3600, description="Time in which a client must send, or take, something."
    )


class Log(Protocol):
    """The audit log, as a gateway uses it."""

    def append(self, kind: Kind, fields: Mapping[str, JsonValue]) -> int:
        """Write an entry; its number, once it is on the disk. AuditError if it cannot be."""

    def close(self) -> None:
        """End the log in order; AuditError if that cannot be written."""


class Gateway:
    """All that stands between those who ask and an engine. Its coroutines belong to one loop."""

    def __init__(
        self,
        *,
        name: str,
        engine: Engine,
        texts: TextModel,
        policies: Policies,
        audit: Log,
        identity: Identity,
        limits: Limits,
        tells_shares: bool = False,
        tracer: Tracer | None = None,
    ):
        self.name = name  # of the model, as requests give it
        self.engine = engine
        self.texts = texts
        self.policies = policies
        self.audit = audit
        self.identity = identity
        self.limits = limits
        self.tells_shares = tells_shares
        self.tracer = tracer
        self.started = int(time.time())
        self.metrics = Metrics(engine.stats)
        self.can_audit = True  # the log's last entry could be written
        self.is_closing = False
        # by expert: digest of the model that holds it, and why it is not used any more
        self._withdrawn: dict[str, tuple[str, Barred]] = {}
        self.num_answers = 0  # requests under way
        self._texts_of: Counter[str] = Counter()  # under way, by who asks
        self._tasks: set[asyncio.Task[Any]] = set()
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "gateway")

    # --- a request ---

    async def begin(self, principal: Principal, ask: Ask) -> Answer:
        """Decide on `ask`, log the decision, and let the engine begin.

        Raises:
            Refusal: a request that is not served, and why.
        """
        task = self._keep(self._begin(principal, ask))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:  # whoever asked has gone: end in order what was begun
            task.add_done_callback(_leave)
            raise

    async def _begin(self, principal: Principal, ask: Ask) -> Answer:
        if self.is_closing:
            raise _closing()
        if self.num_answers >= self.limits.max_requests:
            raise _busy()
        own, most = self._texts_of[principal.subject], self.limits.max_texts_each
        if own and own + ask.num_texts > most:
            raise _has_enough(own, most)
        self._count(principal, 1, ask.num_texts)
        try:
            answer = await self._decide(principal, ask)
        except BaseException:
            self._count(principal, -1, -ask.num_texts)
            raise
        self._keep(self._see_to_end(answer, principal))
        receipt = answer.receipt
        if ask.wish.only and not receipt.sources:
            answer.give_up("refused")
            raise _forbidden(receipt)
        try:
            await self._in_thread(answer.submit, self.engine, self.metrics)
        except BusyError:
            answer.give_up("busy")
            raise _busy() from None
        except PolicyError:  # decided on the model as it was a moment ago
            answer.give_up("changed")
            raise _changing() from None
        except ConfigError as e:  # more than the engine has memory for
            answer.give_up("failed")
            raise Refusal(400, "invalid_prompt", str(e), field="prompt") from None
        except BaseException:
            answer.give_up("failed")
            raise
        for name in receipt.sources:
            self.metrics.uses.labels(name).inc()
        return answer

    async def _decide(self, principal: Principal, ask: Ask) -> Answer:
        """The answer to be, its decision logged."""
        facts, texts, limits = self.engine.facts, self.texts, self.limits
        if texts.digest != facts.digest:
            raise _changing()
        if ask.traces and self.tracer is None:
            raise Refusal(400, "no_tracing", "This server traces nothing.", field="trace")
        prepared = await self._in_thread(
            prepare, ask, facts, texts, limits.max_texts, limits.max_prompt_tokens
        )
        try:
            decision = await self._in_thread(self.decide, facts, principal, ask.purposes, ask.wish)
        except PolicyError as e:
            raise Refusal(400, "unknown_expert", str(e), field="experts") from None
        enabled = decision.enabled
        traced: frozenset[str] | None = None
        if ask.traces:
            traced = await self._in_thread(
                self.find_traceable, facts, principal, ask.purposes, enabled
            )
        asked = {name: v for name, v in decision.verdicts.items() if v.is_asked}
        refused = {n: list(v.reasons) for n, v in asked.items() if not v.is_enabled}
        identifier = secrets.token_hex(16)
        fields: dict[str, Any] = {
            "request_id": identifier,
            "principal": principal.subject,
            "groups": sorted(principal.groups),
            "roles": sorted(principal.roles),
            "purposes": sorted(ask.purposes),
            "asked": sorted(asked),
            "enabled": sorted(enabled),
            "refused": refused,
            "model_digest": facts.digest,
            "policy_digest": decision.policy_digest,
        }
        number = await self.append("decision", fields)
        sources = {name: facts.experts[name] for name in sorted(enabled)}
        receipt = Receipt(identifier, number, facts.digest, sources, refused, traced)
        deadline = time.monotonic() + limits.max_seconds
        requests = [replace(r, enabled=enabled, deadline=deadline) for r in prepared]
        num_start = len(facts.start_ids)
        return Answer(receipt, requests, texts.tokenizer, num_start, limits.max_unsent)

    def find_traceable(
        self,
        facts: ModelFacts,
        principal: Principal,
        purposes: frozenset[PurposeName],
        enabled: frozenset[str],
    ) -> frozenset[str]:
        """Experts of those `enabled` in whose training text an answer may be looked up now."""
        if self.tracer is None:
            return frozenset()
        wish = Wish(only=tuple(sorted(enabled & self.tracer.sources.keys())))
        return self.decide(facts, principal, purposes, wish, "trace").enabled

    def decide(
        self,
        facts: ModelFacts,
        principal: Principal,
        purposes: frozenset[PurposeName],
        wish: Wish,
        action: Action = "activate",
    ) -> Decision:
        """The decision that a request to the model of `facts` gets now; `Policies.decide`'s errors.

        Experts that nobody may use are among the verdicts, so that who asks hears why.
        """
        experts = self.experts(facts)
        reasons = {name: barred.why for name, barred in self.barred(facts).items()}
        now = datetime.datetime.now(datetime.UTC)
        return self.policies.decide(principal, purposes, wish, experts, now, reasons, action)

    def barred(self, facts: ModelFacts) -> dict[str, Barred]:
        """Experts of the model of `facts` that nobody may use now: those that were not loaded, and
        those that were withdrawn since."""
        now = self._withdrawn.items()
        withdrawn = {name: found for name, (digest, found) in now if digest == facts.digest}
        return {**facts.barred, **withdrawn}

    def experts(self, facts: ModelFacts) -> dict[str, ExpertFacts]:
        """All experts of the model of `facts`, with those that nobody may use."""
        barred = {name: found.facts for name, found in self.barred(facts).items()}
        return {**facts.experts, **barred}

    async def _see_to_end(self, answer: Answer, principal: Principal) -> None:
        """Log the end of an answer, then let its reader know."""
        refusal: Refusal | None = _closing()
        try:
            await answer.has_ended.wait()
            await self.append("finished", _describe_end(answer, principal))
            refusal = None
        except Refusal as e:
            refusal = e
        finally:
            self._count(principal, -1, -len(answer.requests))
            answer.close(refusal)

    def _count(self, principal: Principal, requests: int, texts: int) -> None:
        """Take note that so many more are under way."""
        self.num_answers += requests
        self._texts_of[principal.subject] += texts
        if not self._texts_of[principal.subject]:
            del self._texts_of[principal.subject]

    async def trace(self, answer: Answer, texts: Sequence[str]) -> list[TraceReply] | None:
        """Spans of each text in the sources that may be traced; None if nobody asked for them.

        What has not come after _TRACE_SECONDS is left out.
        """
        names = answer.receipt.traced
        if names is None or self.tracer is None:
            return None
        work = asyncio.get_running_loop().run_in_executor(
            self.tracer.threads, self.tracer.trace, texts, names, answer.tokenizer
        )
        try:
            return await asyncio.wait_for(work, _TRACE_SECONDS)
        except TimeoutError:
            late = {name: "It did not answer in time." for name in names}
            return [TraceReply(spans=[], untraced=late) for _ in texts]

    # --- what changes while serving ---

    def withdraw(self, experts: Mapping[str, str]) -> dict[str, str]:
        """Stop using `experts`, each for a reason given to people; from any thread.

        Another bundle of theirs may be used again. Returns those that were in use until now.
        """
        facts = self.engine.facts
        new = {name: why for name, why in experts.items() if name in facts.experts}
        for name, why in new.items():
            withdrawn = (facts.digest, Barred(facts.experts[name], why))
            self._withdrawn = {**self._withdrawn, name: withdrawn}  # others may be reading it
            self.engine.withdraw([name], why)
        return new

    async def append(self, kind: Kind, fields: Mapping[str, JsonValue]) -> int:
        """Write an entry of the audit log; its number. Refusal (503) if it cannot be written."""
        try:
            number = await self._in_thread(self.audit.append, kind, fields)
        except AuditError as e:
            self.note_audit_failure(e)
            raise Refusal(
                503,
                "audit_unavailable",
                "Nothing is served at present, since it could not be logged.",
                retry_seconds=10,
            ) from None
        self.can_audit = True
        return number

    def note_audit_failure(self, error: AuditError) -> None:
        """Say that the log cannot be written; the server is not ready until it can be."""
        self.can_audit = False
        self.metrics.audit_failures.inc()
        _log.error("the audit log cannot be written", extra={"detail": str(error)})

    # --- begin and end of serving ---

    async def start(self) -> None:
        """Log what is served from now on, and what is not; Refusal (503) if that cannot be."""
        await self.append("started", self.describe())
        for name, barred in self.engine.facts.barred.items():
            await self.append("revoked", note_barred(name, barred.why))

    async def drain(self, seconds: float) -> None:
        """Begin nothing more, and let what is under way end within so many seconds."""
        if not self.is_closing:
            self.is_closing = True
            await self._in_thread(self.engine.close, seconds)
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    async def stop(self) -> None:
        """End what is still under way at once, log that serving has stopped, and close the log."""
        await self.drain(0)
        with suppress(Refusal, AuditError):  # said already; the log shows it by a missing entry
            await self.append("stopped", {"why": "the server was told to stop"})
            await self._in_thread(self.audit.close)
        self._threads.shutdown()
        if self.tracer is not None:
            self.tracer.threads.shutdown(wait=False, cancel_futures=True)

    def describe(self) -> dict[str, JsonValue]:
        """Fields of an entry that says what is served."""
        facts = self.engine.facts
        return {
            "model_digest": facts.digest,
            "policy_digest": self.policies.digest,
            "experts": {name: expert.bundle_digest for name, expert in facts.experts.items()},
        }

    def problems(self) -> list[str]:
        """Reasons why requests would be refused at present; empty if the server is ready."""
        found = []
        if self.is_closing:
            found.append("the server is about to stop")
        if not self.can_audit:
            found.append("the audit log cannot be written")
        if not self.engine.is_running:
            found.append("the engine is being started again")
        if self.texts.digest != self.engine.facts.digest:
            found.append("the model is being changed")
        return found

    # --- plumbing ---

    def _keep(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """`work` as a task that goes on whoever waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _in_thread(
        self, function: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs
    ) -> Result:
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def note_barred(name: str, why: str) -> dict[str, JsonValue]:
    """Fields of the entry that an expert is not used from now on; says so in the server's log."""
    _log.warning("expert withdrawn", extra={"expert": name, "detail": why})
    return {"experts": [name], "why": why}


def _describe_end(answer: Answer, principal: Principal) -> dict[str, JsonValue]:
    """Fields of the entry that ends an answer's story."""
    usage = answer.usage()
    owners = {name: facts.owner for name, facts in answer.receipt.sources.items()}
    return {
        "decision": answer.receipt.entry,
        "principal": principal.subject,
        "reason": usage.reason,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "written_tokens": usage.written_tokens,
        "shares": dict[str, JsonValue](usage.shares),
        "owners": {name: owners[name] for name in usage.shares if name in owners},
    }


def _leave(begun: "asyncio.Task[Answer]") -> None:
    """End an answer that nobody waits for any more."""
    if not begun.cancelled() and begun.exception() is None:
        begun.result().leave()


# --- words --------------------------------------------------------------------------------------


def _busy() -> Refusal:
    return Refusal(429, "busy", "The server is busy. Ask again later.", retry_seconds=2)


def _has_enough(own: int, most: int) -> Refusal:
    message = f"You have texts under way: {own}, of at most {most} at once. Ask again later."
    return Refusal(429, "too_many_at_once", message, retry_seconds=2)


def _closing() -> Refusal:
    return Refusal(503, "closing", "The server is about to stop.", retry_seconds=5)


def _changing() -> Refusal:
    return Refusal(503, "model_changed", "The model is being changed. Ask again.", retry_seconds=1)


def _forbidden(receipt: Receipt) -> Refusal:
    reasons = "; ".join(f"{name}: {', '.join(why)}" for name, why in receipt.refused.items())
    return Refusal(
        403,
        "not_permitted",
        f"None of the sources asked for may be used. {reasons[:2000]}. (Decision "
        f"{receipt.decision}, entry {receipt.entry}.)",
        field="experts",
    )
