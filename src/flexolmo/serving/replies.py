"""Bodies of replies, in the form that OpenAI's clients read, with what was decided about sources.

Shapes only; nothing in them says which source wrote which token.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from flexolmo.bundle.terms import Terms

Finish = Literal["stop", "length"]


class Reply(BaseModel):
    """Anything that is sent as JSON."""

    model_config = ConfigDict(extra="forbid")


class PromptDetails(Reply):
    """Part of a prompt's tokens."""

    cached_tokens: int


class UsageReply(Reply):
    """Tokens that a request used, all its texts together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class PlaceReply(Reply):
    """One place of training text, with the text around it."""

    document: str
    position: int
    before: str
    text: str
    after: str


class SpanReply(Reply):
    """Characters [first, last) of a text, which occur in a source's training text.

    What the source does not tell is null or empty.
    """

    source: str
    first: int
    last: int
    tokens: int
    bits: float | None
    count: int | None
    documents: list[str]
    places: list[PlaceReply]


class TraceReply(Reply):
    """Spans of one text, the least likely first; and sources that gave none, with the reason."""

    spans: list[SpanReply]
    untraced: dict[str, str]


class SourcesReply(Reply):
    """Decision about sources, and where it is logged."""

    decision: str
    entry: int
    model_digest: str
    enabled: list[str]
    refused: dict[str, list[str]]
    attributions: dict[str, str]
    shares: dict[str, float] | None = None
    traces: list[TraceReply] | None = None


class AnswerReply(Reply):
    """Fields of every reply with texts. What is told about the whole answer comes once, last."""

    id: str
    created: int
    model: str
    usage: UsageReply | None = None
    flexolmo: SourcesReply | None = None

    def encode(self) -> bytes:
        """The JSON that is sent, without what is told later or not at all."""
        unsaid = {name for name in ("usage", "flexolmo") if getattr(self, name) is None}
        return self.model_dump_json(exclude=unsaid).encode()


class CompletionLogprobs(Reply):
    """Log-probabilities of the tokens of a text, in nats."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Reply):
    """One text, or the next part of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None


class CompletionReply(AnswerReply):
    """Reply to a request to continue texts; in a stream, each of its parts."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class TokenReply(Reply):
    """One token and its log-probability, in nats."""

    token: str
    logprob: float
    bytes: list[int] | None


class ScoredTokenReply(TokenReply):
    """One token of an answer, and the likeliest in its place."""

    top_logprobs: list[TokenReply]


class ChatLogprobs(Reply):
    """Log-probabilities of an answer's tokens."""

    content: list[ScoredTokenReply]
    refusal: None = None


class MessageReply(Reply):
    """An answer in a chat."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Reply):
    """One answer."""

    index: int
    message: MessageReply
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatReply(AnswerReply):
    """Reply to a chat."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class Delta(Reply):
    """The next part of an answer."""

    content: str


class FirstDelta(Delta):
    """The beginning of an answer."""

    role: Literal["assistant"] = "assistant"


class ChatChunkChoice(Reply):
    """The next part of one answer."""

    index: int
    delta: FirstDelta | Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatChunkReply(AnswerReply):
    """One part of a streamed reply to a chat."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class ErrorDetail(Reply):
    """One error: for people, and for programs."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(Reply):
    """Reply to a request that is not served."""

    error: ErrorDetail


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Description of the responses that refuse a request."""
    return {status: {"model": ErrorReply} for status in statuses}


class ExpertReply(Reply):
    """One source that the model holds, and what its owner's terms allow."""

    owner: str
    licence: str
    terms: Terms
    barred: str | None  # reason why nobody may use it now; null: there is none


class ModelSourcesReply(Reply):
    """Sources of the model."""

    model_digest: str
    experts: dict[str, ExpertReply]


class ModelReply(Reply):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["flexolmo"] = "flexolmo"
    flexolmo: ModelSourcesReply


class ModelsReply(Reply):
    """All models: one."""

    object: Literal["list"] = "list"
    data: list[ModelReply]


class HealthReply(Reply):
    """State of the server."""

    problems: list[str]
