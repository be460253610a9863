"""An answer under way: what was decided about it, and the engine's events on their way to a reader.

The engine speaks on threads of its own, the reader lives in an event loop; between them is a queue
with a bound. A reader who leaves, or does not keep up, ends the request.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import get_args

from flexolmo.bundle.facts import ExpertFacts
from flexolmo.data.tokenizer import Tokenizer
from flexolmo.inference.engine import (
    Ended,
    Engine,
    EngineRequest,
    Event,
    Interruption,
    Request,
    TokenWritten,
)
from flexolmo.serving.metrics import Metrics
from flexolmo.serving.refusal import Refusal


@dataclass(frozen=True)
class Receipt:
    """Decision on one request, and the number of its entry in the audit log."""

    decision: str
    entry: int
    model_digest: str
    sources: Mapping[str, ExpertFacts]  # the enabled experts
    refused: Mapping[str, Sequence[str]]  # experts that were asked for, and why they are off
    traced: frozenset[str] | None = None  # enabled experts to trace the answer in; None: no wish

    @property
    def attributions(self) -> dict[str, str]:
        """Credit that whoever passes the answer on owes its sources, by expert."""
        said = {name: facts.terms.attribution for name, facts in self.sources.items()}
        return {name: text for name, text in said.items() if text is not None}


@dataclass(frozen=True)
class Usage:
    """Use by one request, all its texts together."""

    reason: str  # for which it ended; several with commas, if its texts ended differently
    prompt_tokens: int  # of every text, also where several have one prompt
    cached_tokens: int  # of these
    written_tokens: int
    shares: Mapping[str, float]  # mean weight of each enabled expert, and of "public"


class Answer:
    """The answer to one request: a text for each of its prompts, and each of its n."""

    def __init__(
        self,
        receipt: Receipt,
        requests: Sequence[EngineRequest],
        tokenizer: Tokenizer,
        num_start: int,
        max_unsent: int,
    ):
        self.receipt = receipt
        self.requests = requests
        self.tokenizer = tokenizer  # of the model that the requests are for
        self.num_start = num_start  # ids before every prompt that are not of it
        self.endings: dict[int, Ended] = {}  # by text
        self.has_ended = asyncio.Event()  # every text that was begun has
        self.failure: str | None = None  # reason of an answer that was given up
        self._max_unsent = max_unsent
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._refusal: Refusal | None = None
        self._begun: list[Request] = []
        self._num_expected = len(requests)
        self._is_cancelled = False
        self._cut: set[int] = set()  # texts of which the reader does not get all

    # --- for the gateway ---

    def submit(self, engine: Engine, metrics: Metrics) -> None:
        """Let `engine` begin every text, from any thread; errors of its `submit`."""
        for number, request in enumerate(self.requests):
            self._begun.append(engine.submit(request, self._listener(number, metrics)))
            if self._is_cancelled:
                self._begun[-1].cancel()

    def give_up(self, why: str) -> None:
        """End the texts that were begun and expect no others."""
        self.failure = why
        self._num_expected = len(self._begun)
        self.leave()
        self._notice_end()

    def close(self, refusal: Refusal | None) -> None:
        """Tell the reader that there is no more; `refusal`: and that it does not count."""
        self._refusal = refusal
        self._queue.put_nowait(None)

    def usage(self) -> Usage:
        """Use by the texts that have ended. Shares are means over tokens read and written."""
        ended = list(self.endings.values())
        tokens = [e.prompt_tokens + e.written_tokens for e in ended]
        names = sorted({name for e in ended for name in e.shares})
        totals = {
            name: sum(e.shares.get(name, 0.0) * t for e, t in zip(ended, tokens, strict=True))
            for name in names
        }
        return Usage(
            reason=self.failure or ", ".join(sorted({e.reason for e in ended})),
            prompt_tokens=sum(e.prompt_tokens for e in ended),
            cached_tokens=sum(e.cached_tokens for e in ended),
            written_tokens=sum(e.written_tokens for e in ended),
            shares={n: min(1.0, total / max(1, sum(tokens))) for n, total in totals.items()},
        )

    # --- for the reader ---

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Number of a text, and what happened to it, until all are whole and that is logged.

        Raises:
            Refusal: the end of the answer could not be logged.
        """
        while (item := await self._queue.get()) is not None:
            yield item
        if self._refusal is not None:
            raise self._refusal

    def leave(self) -> None:
        """End the request because nobody reads on; nothing happens if it has ended."""
        self._is_cancelled = True
        for request in list(self._begun):
            request.cancel()

    # --- for the engine ---

    def _listener(self, number: int, metrics: Metrics) -> Callable[[Event], None]:
        """The function that the engine calls, on its thread, with each event of a text."""
        last: float | None = None
        begun = time.monotonic()

        def hear(event: Event) -> None:
            nonlocal last
            now = time.monotonic()
            if isinstance(event, TokenWritten):
                if last is None:
                    metrics.first_token.observe(now - begun)
                else:
                    metrics.next_token.observe(now - last)
                last = now
            elif isinstance(event, Ended):
                metrics.endings.labels(event.reason).inc()
            with suppress(RuntimeError):  # the loop is closed: the server has stopped
                self._loop.call_soon_threadsafe(self._take, number, event)

        return hear

    def _take(self, number: int, event: Event) -> None:
        if isinstance(event, Ended):
            if number in self._cut and event.reason not in get_args(Interruption):
                event = replace(event, reason="cancelled")  # the engine was quicker than that
            self.endings[number] = event
        elif self._is_cancelled:
            self._cut.add(number)
            return
        self._queue.put_nowait((number, event))
        if self._queue.qsize() > self._max_unsent and not self._is_cancelled:
            self.leave()
        self._notice_end()

    def _notice_end(self) -> None:
        if len(self.endings) >= self._num_expected:
            self.has_ended.set()
