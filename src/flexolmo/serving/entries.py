"""Entries of the audit log: what each kind may say, and its only spelling.

Every kind has a closed list of fields, none of which has room for a prompt or an answer. The norm
is `docs/reference/audit_log.md`. Knows nothing of files or keys.
"""

import datetime
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    model_validator,
)

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.bundle.strict import Claim
from flexolmo.bundle.tensors import Digest
from flexolmo.errors import AuditError
from flexolmo.files import canonical_json

Kind = Literal["started", "decision", "finished", "revoked", "reloaded", "stopped", "traced"]
MAX_ENTRY_BYTES = 1 << 20
NOTHING_BEFORE = "sha256:" + "0" * 64  # `previous` of entry 0

_MAX_REASON_CHARACTERS = 1000


def _shorten(text: Any) -> Any:
    """Cut a reason that quotes long terms, so that no owner's terms can stop the log."""
    return text[:_MAX_REASON_CHARACTERS] if isinstance(text, str) else text


Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Reason = Annotated[str, BeforeValidator(_shorten)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Share = Annotated[float, Field(ge=0, le=1.001, allow_inf_nan=False)]  # 1 and what rounding adds
UtcTime = Annotated[
    str, StringConstraints(pattern=r"^[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}\.[0-9]{6}Z$")
]


# --- fields of each kind ------------------------------------------------------------------------


class Loaded(Claim):
    """Fields of `started` and `reloaded`: what is served from now on."""

    model_digest: Digest
    policy_digest: Digest
    experts: dict[Name, Digest]  # by name, the digest of the bundle's manifest


class Decision(Claim):
    """Fields of `decision`: who may use which expert for one request, and why not.

    Written before the first token leaves.
    """

    request_id: Name  # random, so that nobody can guess an entry from its hash
    principal: Name
    groups: list[Name]
    roles: list[Name]
    purposes: list[Name]
    asked: list[Name]  # experts
    enabled: list[Name]  # experts
    refused: dict[Name, list[Reason]]  # by expert; a reason is cut to 1,000 characters
    model_digest: Digest
    policy_digest: Digest


class Finished(Claim):
    """Fields of `finished`: what one request used, all its answers together.

    Principal and owners are said again, so that usage can still be counted when the decision's
    entry has been removed.
    """

    decision: Count  # number of its entry
    principal: Name
    reason: Name  # for which it ended
    prompt_tokens: Count
    cached_tokens: Count  # of the prompt
    written_tokens: Count
    shares: dict[Name, Share]  # mean weight of each enabled expert and of "public"
    owners: dict[Name, Name]  # by expert, of all in `shares` but "public"

    @model_validator(mode="after")
    def _name_every_owner(self) -> "Finished":
        if self.owners.keys() != self.shares.keys() - {PUBLIC}:
            raise ValueError(f"owners must be given of the experts in shares, but of {PUBLIC!r}")
        return self


class Revoked(Claim):
    """Fields of `revoked`: experts on which no step runs after this entry."""

    experts: list[Name]
    why: Reason


class Stopped(Claim):
    """Fields of `stopped`."""

    why: Reason


class Traced(Claim):
    """Fields of `traced`: a question to an index of training text, before its answer leaves."""

    client: Digest  # key id of whoever asked
    index: Digest
    question: Digest  # of the signed bytes; the signature is random, so no guess can be tried
    number: Count  # of the question, which only rises
    level: Name  # of what is told of a span that occurs
    questions: Count  # spans that were answered for
    found: bool  # the last of them occurs


FIELDS: Mapping[Kind, type[Claim]] = {
    "started": Loaded,
    "decision": Decision,
    "finished": Finished,
    "revoked": Revoked,
    "reloaded": Loaded,
    "stopped": Stopped,
    "traced": Traced,
}


def check_fields(kind: Kind, fields: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """`fields` as they are written; AuditError names each that does not belong into a `kind`."""
    try:
        checked = FIELDS[kind].model_validate(dict(fields)).model_dump(mode="json")
        num_bytes = len(canonical_json(checked))
    except ValidationError as e:
        wrong = "; ".join(f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors())
        raise AuditError(f"An entry {kind!r} cannot hold these fields: {wrong}.") from None
    except UnicodeEncodeError:
        raise AuditError(f"An entry {kind!r} cannot hold text that is not Unicode.") from None
    if num_bytes > MAX_ENTRY_BYTES - 1000:  # room for the rest of the entry
        raise AuditError(
            f"An entry {kind!r} of {num_bytes:,} bytes is longer than {MAX_ENTRY_BYTES:,}."
        )
    return checked


# --- the entry ----------------------------------------------------------------------------------


class Entry(Claim):
    """One line of the log."""

    number: Count
    time: UtcTime
    kind: Kind
    fields: dict[str, JsonValue]
    previous: Digest  # of the line before

    def encode(self) -> bytes:
        """The line, without the newline that ends it."""
        return canonical_json(dict(self))

    @classmethod
    def decode(cls, line: bytes) -> "Entry":
        """The entry on a line; ValueError unless in its only spelling."""
        entry = cls.model_validate_json(line)
        if entry.encode() != line:
            raise ValueError("not in canonical form")
        return entry


def digest_leaf(leaf: bytes) -> str:
    """A leaf hash of the tree as the next entry's `previous` writes it."""
    return "sha256:" + leaf.hex()


def utc_now() -> str:
    """The time as entries and checkpoints write it: UTC, to the microsecond."""
    now = datetime.datetime.now(datetime.UTC)
    return now.isoformat(timespec="microseconds").replace("+00:00", "Z")
