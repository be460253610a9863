"""Questions that a coordinator asks an owner's index, signed, and what the owner tells of a span.

A question names spans; the owner answers them one after another up to the first that occurs, and
no further, so that whoever looks for the longest span is told once that it occurs and not of each
of its parts. Knows nothing of networks, budgets or indexes.
"""

from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from pydantic import Field, StringConstraints

from flexolmo.bundle.signing import Envelope, read_statement, sign_statement
from flexolmo.bundle.strict import Claim
from flexolmo.bundle.tensors import Digest

Level = Literal["yes", "count", "document", "text"]
LEVELS: tuple[Level, ...] = ("yes", "count", "document", "text")

MAX_SPANS = 512  # of one question
MAX_SPAN_TOKENS = 4096
MAX_DOCUMENTS = 10  # told of one span
MAX_IDS = 100_000  # of all spans of one question
MAX_QUESTION_BYTES = 2 << 20
MAX_COUNT_BITS = 40  # of the number of places, told as a power of two
_PAYLOAD_TYPE = "application/vnd.flexolmo.trace-question+json"

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
TokenSpan = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**24)]], Field(min_length=1, max_length=MAX_SPAN_TOKENS)
]


class Question(Claim):
    """Spans, in ids of the anchor's tokenizer, each of which may occur in one source's text."""

    format: Literal["flexolmo-trace-question"]
    format_version: Literal[1]
    source: Name  # no other owner's service takes it
    number: Count  # microseconds since 1970, higher than that of any question before
    spans: Annotated[list[TokenSpan], Field(min_length=1, max_length=MAX_SPANS)]


class Place(Claim):
    """One place at which a span occurs, with the text around it."""

    document: str
    position: Count  # bytes of the document's text before the span
    before: str
    text: str
    after: str


class Found(Claim):
    """All that an owner tells of a span that occurs; None: not told at this owner's level."""

    at_least: Count | None  # places: the largest power of two that is not above their number
    documents: list[str] | None  # at most MAX_DOCUMENTS names
    places: list[Place] | None  # at most MAX_DOCUMENTS


class Answer(Claim):
    """Answer to a question: of the first `answered` spans the last may occur, the others do not."""

    answered: Count  # fewer than were asked: one was found, or the day's budget is spent
    found: Found | None


class Offer(Claim):
    """Rules of one owner's service, which everybody who reaches it can see."""

    source: Name
    tokenizer: Digest
    level: Level
    min_tokens: Count  # of a span


def sign_question(question: Question, key: EllipticCurvePrivateKey) -> bytes:
    """The bytes that are sent."""
    return sign_statement(question, _PAYLOAD_TYPE, [key])


def read_question(data: bytes) -> tuple[Question, Envelope]:
    """A question, and the envelope to verify before it is answered; BundleError if it is none."""
    return read_statement(data, _PAYLOAD_TYPE, Question, "The question")
