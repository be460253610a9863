"""The owner's desk: who may ask an index of the owner's text, how much, and what each is told.

Every question is in the audit log, on the disk, before its answer leaves, and the log alone says
what each client has spent: a server that was killed forgets nothing. Words of a question are not
written down.

The bound. A client learns from a day's answers no more than which of its questions had a yes, at
most `finds_per_day` of `questions_per_day`, and with each yes what the level adds. Whatever the
client asks, there are at most 2**`bits_per_day` such days. So a text that the client could guess
with probability p is guessed after d days with probability at most p * 2**(d * bits_per_day), and
never more often than what `finds_in_all` allows.
"""

import datetime
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

from pydantic import Field, JsonValue

from flexolmo.bundle.signing import MAX_KEY_BYTES, key_id
from flexolmo.config import Settings
from flexolmo.errors import AuditError, BundleError, ConfigError
from flexolmo.files import digest_bytes
from flexolmo.serving.audit_check import check_log, public_key
from flexolmo.serving.entries import Entry, Kind, Traced
from flexolmo.serving.refusal import Refusal
from flexolmo.serving.segments import CHECKPOINTS
from flexolmo.trace.index import Index
from flexolmo.trace.questions import (
    LEVELS,
    MAX_COUNT_BITS,
    MAX_DOCUMENTS,
    Answer,
    Found,
    Level,
    Offer,
    Place,
    Question,
    read_question,
)
from flexolmo.trace.spans import CONTEXT_TOKENS

_CLOCK_SECONDS = 300  # by which the clocks of client and owner may differ


class Budget(Settings):
    """Limits for each client."""

    min_tokens: int = Field(
        16, ge=4, le=1024, description="Tokens that a span must have to be answered for."
    )
    questions_per_day: int = Field(
        20_000, ge=1, le=10**9, description="Spans that are answered for on a day, in UTC."
    )
    finds_per_day: int = Field(
        500, ge=1, le=10**6, description="Spans a day of which it is told that they occur."
    )
    finds_in_all: int = Field(
        10_000, ge=1, le=10**9, description="The same, over all days that the audit log has."
    )
    requests_per_minute: int = Field(
        120, ge=1, le=10**6, description="Signed questions, of many spans each."
    )

    def bits_per_day(self, level: Level, documents: int) -> float:
        """Most that a day's answers about an index of so many documents tell, in bits.

        Infinite at the level `text`, at which an owner gives text away.
        """
        if level == "text":
            return math.inf
        n, k = self.questions_per_day, min(self.finds_per_day, self.questions_per_day)
        ways = 1
        total = 1  # ways in which at most k of n questions can have a yes
        for i in range(1, k + 1):
            ways = ways * (n - i + 1) // i
            total += ways
        with_each = 0.0
        if level in ("count", "document"):
            with_each += math.log2(MAX_COUNT_BITS)
        if level == "document":
            with_each += MAX_DOCUMENTS * math.log2(documents + 1)
        return math.log2(total) + k * with_each


class Log(Protocol):
    """The audit log, as a desk uses it."""

    def append(self, kind: Kind, fields: Mapping[str, JsonValue]) -> int:
        """Write an entry; its number once it is on the disk."""


@dataclass
class Spent:
    """Spending of one client so far."""

    day: str = ""  # of the last question, as 2026-01-31
    questions: int = 0  # on that day
    finds: int = 0  # on that day
    finds_in_all: int = 0
    number: int = -1  # of the last question
    times: deque[float] = field(default_factory=deque)  # of the last minute's questions

    def add(self, day: str, traced: Traced) -> None:
        """Count one question."""
        if day != self.day:
            self.day, self.questions, self.finds = day, 0, 0
        self.questions += traced.questions
        self.finds += traced.found
        self.finds_in_all += traced.found
        self.number = max(self.number, traced.number)


class TraceDesk:
    """Answers from one index. Every method may be called from any thread.

    Args:
        clients: Public keys (PEM) of coordinators who may ask, by key id.
        spent: Spending of each by the log, see `read_spending`.
        now: Seconds since 1970.
    """

    def __init__(
        self,
        index: Index,
        clients: Mapping[str, bytes],
        level: Level,
        budget: Budget,
        log: Log,
        spent: Mapping[str, Spent],
        now: Callable[[], float] = time.time,
    ):
        self._index = index
        self._clients = clients
        self._level = level
        self._budget = budget
        self._log = log
        self._spent = {name: spent.get(name, Spent()) for name in clients}
        self._now = now
        self._lock = threading.Lock()  # what is spent is known before the next question

    def offer(self) -> Offer:
        """The rules, for everybody to see."""
        return Offer(
            source=self._index.name,
            tokenizer=self._index.card.tokenizer,
            level=self._level,
            min_tokens=self._budget.min_tokens,
        )

    def answer(self, data: bytes) -> Answer:
        """The answer to a signed question, once it is in the log.

        Raises:
            Refusal: not a question, not by a client's key, for another owner, an old one again, of
                spans that are too short, or more than the budget allows; 503: no log.
        """
        question, client = self._authenticate(data)
        for span in question.spans:
            if len(span) < self._budget.min_tokens:
                message = f"A span has at least {self._budget.min_tokens} tokens here."
                raise Refusal(400, "span_too_short", message, field="spans")
        with self._lock:
            spent = self._spent[client]
            day, left = self._allow(question, spent)
            answered, found = self._search(question.spans[:left])
            traced = Traced(
                client=client,
                index=self._index.card.recipe,
                question=digest_bytes(data),
                number=question.number,
                level=self._level,
                questions=answered,
                found=found is not None,
            )
            try:
                self._log.append("traced", traced.model_dump())
            except AuditError:
                message = "The audit log cannot be written, so nothing is answered."
                raise Refusal(503, "no_audit_log", message) from None
            spent.add(day, traced)
        return Answer(answered=answered, found=None if found is None else self._tell(found))

    def _authenticate(self, data: bytes) -> tuple[Question, str]:
        """The question in `data`, and the key id of the client whose word it is."""
        try:
            question, envelope = read_question(data)
        except BundleError:
            message = "The body is no signed question in its only spelling."
            raise Refusal(400, "no_question", message) from None
        names = list(envelope.signatures)
        if len(names) != 1 or names[0] not in self._clients:
            raise Refusal(401, "unknown_client", "The question is signed by no client's key.")
        try:
            envelope.verify(self._clients[names[0]])
        except BundleError:
            raise Refusal(401, "wrong_signature", "The signature does not hold.") from None
        if question.source != self._index.name:
            raise Refusal(403, "another_source", "The question is for another source.")
        return question, names[0]

    def _allow(self, question: Question, spent: Spent) -> tuple[str, int]:
        """The day, and how many spans may be answered for now, at least one."""
        budget = self._budget
        now = self._now()
        day = datetime.datetime.fromtimestamp(now, datetime.UTC).date().isoformat()
        is_fresh = abs(question.number / 1e6 - now) <= _CLOCK_SECONDS
        if not is_fresh or question.number <= spent.number:
            message = "The question was sent before, or is signed with a clock that is wrong."
            raise Refusal(409, "not_fresh", message, field="number")
        while spent.times and spent.times[0] <= now - 60:
            spent.times.popleft()
        if len(spent.times) >= budget.requests_per_minute:
            raise Refusal(429, "too_fast", "Too many questions a minute.", retry_seconds=60)
        is_same_day = day == spent.day
        questions = budget.questions_per_day - (spent.questions if is_same_day else 0)
        finds = budget.finds_per_day - (spent.finds if is_same_day else 0)
        if spent.finds_in_all >= budget.finds_in_all:
            raise Refusal(429, "all_spent", "All finds that this owner allows are spent.")
        if questions <= 0 or finds <= 0 or day < spent.day:
            message = "The budget of questions for today is spent."
            raise Refusal(429, "day_spent", message, retry_seconds=3600)
        spent.times.append(now)
        return day, questions

    def _search(self, spans: list[list[int]]) -> tuple[int, list[int] | None]:
        """Number of `spans` that were looked for, and the last of them if it occurs."""
        for number, span in enumerate(spans, 1):
            if self._index.occurs(span):
                return number, span
        return len(spans), None

    def _tell(self, span: list[int]) -> Found:
        """All that the level allows to be told of a span that occurs."""
        pattern = self._index.encode(span)
        rank = LEVELS.index(self._level)
        at_least = None
        if rank >= 1:
            count = min(self._index.count(pattern), 1 << (MAX_COUNT_BITS - 1))
            at_least = 1 << (count.bit_length() - 1)
        found = []
        if rank >= 2:
            found = list(islice(self._index.find(pattern, CONTEXT_TOKENS), MAX_DOCUMENTS))
        return Found(
            at_least=at_least,
            documents=list(dict.fromkeys(o.document for o in found)) if rank >= 2 else None,
            places=[Place(**asdict(o)) for o in found] if rank >= 3 else None,
        )


def read_spending(audit: Path) -> dict[str, Spent]:
    """Spending of each client by the audit log in `audit`, by key id; none if there is no log.

    Raises:
        AuditError: the log does not hold up, so nobody knows what was spent.
    """
    spent: dict[str, Spent] = {}

    def count(entry: Entry) -> None:
        if entry.kind == "traced":
            traced = Traced.model_validate(entry.fields)
            spent.setdefault(traced.client, Spent()).add(entry.time[:10], traced)

    if not (Path(audit) / CHECKPOINTS).exists():
        return {}
    report = check_log(audit, public_key(audit), see=count)
    if report.num_findings:
        raise AuditError(
            f"What clients have spent cannot be told from {audit}, which does not hold up: "
            f"{report.findings[0]} See all with flexolmo audit verify."
        )
    return spent


def read_clients(directory: Path) -> dict[str, bytes]:
    """Public keys of the clients in `directory`, its files NAME.pub, by key id.

    Raises:
        ConfigError: no such directory, none in it, or a file that is no key.
    """
    paths = sorted(Path(directory).glob("*.pub"))
    if not paths:
        raise ConfigError(
            f"{directory} has no client's key: put each coordinator's public key there as NAME.pub."
        )
    found = {}
    for path in paths:
        with open(path, "rb") as f:
            pem = f.read(MAX_KEY_BYTES)
        try:
            found[key_id(pem)] = pem
        except BundleError as e:
            raise ConfigError(f"{path}: {e}") from None
    return found
