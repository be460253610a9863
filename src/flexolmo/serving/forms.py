"""The two forms of a reply: a continued text, and a message of a chat."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flexolmo.serving import replies
from flexolmo.serving.replies import AnswerReply, Finish
from flexolmo.serving.text import Shown

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Part:
    """A piece of one text, or all of it."""

    number: int
    text: str
    tokens: Sequence[Shown] | None  # None: no log-probabilities were asked for
    finish: Finish | None = None  # of the last piece
    is_first: bool = False


class Form(Protocol):
    """A way to write parts of texts as a reply; `head` are the fields that all replies have."""

    prefix: str  # of a reply's id
    has_opening: bool  # a stream begins with an empty first part of each text

    def reply(self, parts: Sequence[Part], head: Mapping[str, Any]) -> AnswerReply:
        """The whole answer: one part for each text."""

    def chunk(self, parts: Sequence[Part], head: Mapping[str, Any]) -> AnswerReply:
        """The next of a stream."""


class CompletionForm:
    """Continued texts, whose log-probabilities lie in lists beside each other."""

    prefix = "cmpl"
    has_opening = False

    def __init__(self, decode: Decode):
        self._decode = decode

    def reply(self, parts: Sequence[Part], head: Mapping[str, Any]) -> AnswerReply:
        """The whole answer: one part for each text."""
        choices = [
            replies.CompletionChoice(
                index=part.number,
                text=part.text,
                logprobs=None if part.tokens is None else self._logprobs(part.tokens),
                finish_reason=part.finish,
            )
            for part in parts
        ]
        return replies.CompletionReply(choices=choices, **head)

    chunk = reply

    def _logprobs(self, tokens: Sequence[Shown]) -> replies.CompletionLogprobs:
        scores = [shown.event.score for shown in tokens]
        likeliest: list[dict[str, float] | None] = []
        for score in scores:
            found: dict[str, float] = {}
            for token, logprob in score.likeliest.items() if score else ():
                text = self._decode([token])  # several may be parts of characters, shown alike
                found[text] = max(logprob, found.get(text, logprob))
            likeliest.append(found if score else None)
        return replies.CompletionLogprobs(
            tokens=[self._decode([shown.event.token]) for shown in tokens],
            token_logprobs=[score.logprob if score else None for score in scores],
            top_logprobs=likeliest,
            text_offset=[shown.offset for shown in tokens],
        )


class ChatForm:
    """Messages of a chat, whose log-probabilities lie in one list."""

    prefix = "chatcmpl"
    has_opening = True

    def __init__(self, decode: Decode):
        self._decode = decode

    def reply(self, parts: Sequence[Part], head: Mapping[str, Any]) -> AnswerReply:
        """The whole answer: one part for each text."""
        choices = [
            replies.ChatChoice(
                index=part.number,
                message=replies.MessageReply(content=part.text),
                logprobs=self._logprobs(part.tokens),
                finish_reason=part.finish or "stop",
            )
            for part in parts
        ]
        return replies.ChatReply(choices=choices, **head)

    def chunk(self, parts: Sequence[Part], head: Mapping[str, Any]) -> AnswerReply:
        """The next of a stream."""
        choices = [
            replies.ChatChunkChoice(
                index=part.number,
                delta=(replies.FirstDelta if part.is_first else replies.Delta)(content=part.text),
                logprobs=self._logprobs(part.tokens),
                finish_reason=part.finish,
            )
            for part in parts
        ]
        return replies.ChatChunkReply(choices=choices, **head)

    def _logprobs(self, tokens: Sequence[Shown] | None) -> replies.ChatLogprobs | None:
        if tokens is None:
            return None
        content = []
        for event in (shown.event for shown in tokens):
            if event.score is not None:
                likeliest = event.score.likeliest.items()
                content.append(
                    replies.ScoredTokenReply(
                        **self._token(event.token, event.score.logprob),
                        top_logprobs=[
                            replies.TokenReply(**self._token(*pair)) for pair in likeliest
                        ],
                    )
                )
        return replies.ChatLogprobs(content=content)

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._decode([token])
        is_whole = "\ufffd" not in text  # else it is a part of a character
        return {
            "token": text,
            "logprob": logprob,
            "bytes": list(text.encode()) if is_whole else None,
        }
