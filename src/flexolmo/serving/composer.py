"""An answer's events, composed into one reply or into the parts of a stream.

What is told about an answer as a whole comes last, once its end is in the audit log.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace

from flexolmo.inference.engine import Ended, EngineRequest, PromptRead, Scored, TokenWritten
from flexolmo.serving import replies
from flexolmo.serving.answer import Answer
from flexolmo.serving.forms import Decode, Form, Part
from flexolmo.serving.refusal import Refusal
from flexolmo.serving.replies import AnswerReply, Finish, Reply
from flexolmo.serving.text import Piece, TextStream

_FINISHES: dict[str, Finish] = {
    "end_of_text": "stop",
    "stop": "stop",
    "max_new_tokens": "length",
    "positions": "length",
    "scored": "length",
}


class _Text:
    """One text of an answer: its prompt, if that is echoed, and what is written after it."""

    def __init__(self, number: int, request: EngineRequest, decode: Decode, num_start: int):
        self._number = number
        self._request = request
        self._decode = decode
        self._num_start = num_start
        self._stream = TextStream(decode, request.stops, before=request.ids)
        self._num_echoed = 0  # characters

    def echo(self, scores: Sequence[Scored]) -> Part:
        """The prompt, without the ids that stand before every text."""
        stream = TextStream(self._decode)
        pieces = []
        for place, token in enumerate(self._request.ids):
            if place >= self._num_start:
                score = scores[place - 1] if scores and place > 0 else None
                pieces.append(stream.add(TokenWritten(token, score)))
        part = self._part([*pieces, stream.end()])
        self._num_echoed = len(part.text)
        return part

    def add(self, event: TokenWritten) -> Part:
        """The text that one token brings out."""
        return self._part([self._stream.add(event)])

    def end(self, finish: Finish) -> Part:
        """The rest of the text."""
        return replace(self._part([self._stream.end()]), finish=finish)

    def _part(self, pieces: Sequence[Piece]) -> Part:
        tokens = [
            replace(shown, offset=self._num_echoed + shown.offset)
            for piece in pieces
            for shown in piece.tokens
        ]
        text = "".join(piece.text for piece in pieces)
        has_scores = self._request.num_logprobs is not None
        return Part(self._number, text, tokens if has_scores else None)


Trace = Callable[[Sequence[str]], Awaitable[list[replies.TraceReply] | None]]


class Composer:
    """Replies to one request, in the `form` that it came in."""

    def __init__(
        self,
        answer: Answer,
        form: Form,
        *,
        model: str,
        echoes: bool,
        tells_shares: bool,
        trace: Trace | None = None,
    ):
        self._answer = answer
        self._form = form
        self._echoes = echoes
        self._tells_shares = tells_shares
        self._trace = trace
        self._written = [""] * len(answer.requests)  # every text, as far as it was sent
        self._texts = [
            _Text(number, request, answer.tokenizer.decode, answer.num_start)
            for number, request in enumerate(answer.requests)
        ]
        self._head = {
            "id": f"{form.prefix}-{answer.receipt.decision}",
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self) -> AnswerReply:
        """The whole reply; Refusal if the answer was interrupted or its end could not be logged."""
        found: dict[int, list[Part]] = {text: [] for text in range(len(self._texts))}
        async for part in self._parts():
            found[part.number].append(part)
        end = await self._end()
        return self._form.reply([_join(parts) for parts in found.values()], self._head | end)

    async def chunks(self, includes_usage: bool) -> AsyncIterator[AnswerReply]:
        """The parts of a stream; Refusal as in `whole`, after all that was written until then."""
        if self._form.has_opening:
            for number in range(len(self._texts)):
                yield self._form.chunk([Part(number, "", None, is_first=True)], self._head)
        held: list[Part] = []  # the end of a text, which may be the end of all
        async for part in self._parts():
            if held:
                yield self._form.chunk(held, self._head)
            held = [part] if part.finish else []
            if not held:
                yield self._form.chunk([part], self._head)
        end = await self._end()
        if includes_usage:
            yield self._form.chunk(held, self._head)
            yield self._form.chunk([], self._head | end)
        else:
            yield self._form.chunk(held, self._head | {"flexolmo": end["flexolmo"]})

    async def _parts(self) -> AsyncIterator[Part]:
        """Parts of all texts as they come, remembered for the trace."""
        async for part in self._parts_as_they_come():
            self._written[part.number] += part.text
            yield part

    async def _parts_as_they_come(self) -> AsyncIterator[Part]:
        """Parts of all texts; an interruption is told once its end is logged too."""
        if self._echoes and not self._answer.requests[0].scores_prompt:
            for text in self._texts:
                yield text.echo(())
        interruption: Ended | None = None
        async for number, event in self._answer.events():
            text = self._texts[number]
            if interruption is not None:
                continue
            if isinstance(event, PromptRead):
                yield text.echo(event.scores)
            elif isinstance(event, TokenWritten):
                part = text.add(event)
                if part.text or part.tokens:
                    yield part
            elif event.reason in _FINISHES:
                yield text.end(_FINISHES[event.reason])
            else:
                interruption = event
                self._answer.leave()
        if interruption is not None:
            raise _explain(interruption)

    async def _end(self) -> dict[str, Reply]:
        """Fields that tell of the answer as a whole."""
        traces = None if self._trace is None else await self._trace(self._written)
        usage, receipt = self._answer.usage(), self._answer.receipt
        return {
            "usage": replies.UsageReply(
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.written_tokens,
                total_tokens=usage.prompt_tokens + usage.written_tokens,
                prompt_tokens_details=replies.PromptDetails(cached_tokens=usage.cached_tokens),
            ),
            "flexolmo": replies.SourcesReply(
                decision=receipt.decision,
                entry=receipt.entry,
                model_digest=receipt.model_digest,
                enabled=list(receipt.sources),
                refused={name: list(reasons) for name, reasons in receipt.refused.items()},
                attributions=receipt.attributions,
                shares=dict(usage.shares) if self._tells_shares else None,
                traces=traces,
            ),
        }


def _join(parts: Sequence[Part]) -> Part:
    """All parts of one text as one."""
    tokens = [shown for part in parts for shown in part.tokens or ()]
    return replace(
        parts[-1],
        text="".join(part.text for part in parts),
        tokens=None if parts[-1].tokens is None else tokens,
    )


def _explain(interruption: Ended) -> Refusal:
    """The refusal for an answer that ended before it was whole."""
    detail = f" {interruption.detail}" if interruption.detail else ""
    match interruption.reason:
        case "withdrawn":
            message = f"A source of this answer was withdrawn.{detail} Ask again without it."
            return Refusal(503, "source_withdrawn", message)
        case "time":
            return Refusal(503, "time_limit", "The answer took longer than this server allows.")
        case "closed":
            message = "The server was stopped before the answer was whole."
            return Refusal(503, "closing", message, retry_seconds=5)
        case "cancelled":
            message = "The answer was taken more slowly than it was written."
            return Refusal(503, "too_slow", message)
        case _:
            return Refusal(500, "engine_failed", "The engine failed; its log says how.")
