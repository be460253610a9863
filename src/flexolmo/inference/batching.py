"""Our own engine: many requests, each with its own experts on, read and written in one batch.

One thread runs the model, step by step. Before every step texts join and leave: whoever came first
joins first, once a place and memory for all that it may read and write are there, so nothing that
has begun is ever put back. A step reads one token of every answer under way, and of prompts no
more than so many tokens, so that a long prompt does not hold up answers. A text's numbers are, bit
for bit, the same whatever else the engine runs (see model.spans).
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from flexolmo.config import Settings
from flexolmo.errors import BusyError, ConfigError
from flexolmo.inference.admission import refuse_request
from flexolmo.inference.decode import choose_tokens
from flexolmo.inference.engine import (
    Ended,
    EngineRequest,
    EngineStats,
    Event,
    Interruption,
    ModelFacts,
    PromptRead,
    TokenWritten,
)
from flexolmo.inference.memory import Key, TextMemory
from flexolmo.inference.sampling import Ending
from flexolmo.inference.stepping import EngineModel, Read, Stepper
from flexolmo.inference.texts import Text, score
from flexolmo.model.spans import BLOCK, Span

T = TypeVar("T")
log = logging.getLogger(__name__)


class EngineSettings(Settings):
    """Sizes of an engine."""

    memory_bytes: int = Field(
        1 << 30, ge=1, description="Memory for keys and values, in bytes, taken at the start."
    )
    max_running: int = Field(64, ge=1, description="Requests that are read and written at once.")
    max_waiting: int = Field(256, ge=1, description="Requests that wait for a place, at most.")
    prompt_tokens: int = Field(
        8 * BLOCK,
        ge=BLOCK,
        description="Tokens of prompts that one step reads at most, beside one of every answer. "
        "More read a long prompt sooner, and let answers wait for longer meanwhile.",
    )


class BatchEngine:
    """An `engine.Engine`."""

    def __init__(
        self,
        load: Callable[[], EngineModel],
        settings: EngineSettings | None = None,
        device: torch.device | None = None,
    ):
        """`load` gives the model, now and at each reload. Raises what it raises, and ConfigError
        for a model that is not served, or too little memory."""
        self._load = load
        self._settings = settings or EngineSettings()
        self._device = device or torch.device("cpu")
        self._stepper = self._prepare(load())
        self._facts = self._stepper.facts
        self._memory = TextMemory(self._stepper.model, self._settings.memory_bytes)
        self._withdrawn: set[str] = set()
        self._prompt_tokens = self._cached_tokens = self._written_tokens = 0
        # of what follows, all but `_running` is shared between threads, and guarded
        self._changed = threading.Condition()
        self._waiting: deque[Text] = deque()
        self._running: list[Text] = []
        self._acts: deque[Callable[[], None]] = deque()
        self._is_closing = self._is_over = False
        self._reloading = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    # --- from any thread ------------------------------------------------------------------------

    @property
    def facts(self) -> ModelFacts:
        """See `Engine`; experts that were withdrawn are not among them."""
        return self._facts

    @property
    def is_running(self) -> bool:
        """See `Engine`."""
        return self._thread.is_alive()

    def submit(self, request: EngineRequest, say: Callable[[Event], None]) -> Text:
        """See `Engine`. `say` must be quick: the next step waits for it."""
        with self._changed:
            text = self._accept(request, say)
            if self._is_closing:
                raise BusyError("The engine is closing and takes no more requests.")
            if len(self._waiting) >= self._settings.max_waiting:
                raise BusyError(f"{len(self._waiting)} requests wait already. Ask again later.")
            self._waiting.append(text)
            self._changed.notify_all()
        return text

    def _accept(self, request: EngineRequest, say: Callable[[Event], None]) -> Text:
        """The text of a request; refuses what can never be served."""
        facts = self._facts
        refuse_request(request, facts)
        stepper = self._stepper
        text = Text(request, say, stepper.model, stepper.tokenizer, len(facts.start_ids))
        self._memory.refuse_larger(text.num_positions)
        return text

    def reload(self) -> ModelFacts:
        """See `Engine`. A text whose experts stay goes on with the new model, which computes the
        same bits for it; while that is read from disk both are in memory."""
        with self._reloading:
            stepper = self._prepare(self._load())
            return self._between_steps(lambda: self._take_up(stepper))

    def withdraw(self, experts: Collection[str], why: str) -> int:
        """See `Engine`. Weights of `experts` are overwritten in memory."""
        names = frozenset(experts)
        return self._between_steps(lambda: self._withdraw(names, why))

    def stats(self) -> EngineStats:
        """See `Engine`."""
        with self._changed:
            blocks = self._memory.blocks
            return EngineStats(
                running=len(self._running),
                waiting=len(self._waiting),
                block_bytes=blocks.count * self._memory.block_bytes,
                blocks=blocks.count,
                free_blocks=blocks.num_free,
                cached_blocks=blocks.num_cached,
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self._cached_tokens,
                written_tokens=self._written_tokens,
                loaded_experts=sorted(self._facts.experts),
            )

    def close(self, seconds: float) -> None:
        """See `Engine`; any number of times, but not from a request's `say`."""
        with self._changed:
            self._is_closing = True
            self._changed.wait_for(lambda: not (self._running or self._waiting), seconds)
        self._between_steps(self._end_all)
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._thread.join()

    def _prepare(self, loaded: EngineModel) -> Stepper:
        rows = self._settings.max_running + self._settings.prompt_tokens
        return Stepper(loaded, rows, self._device)

    def _between_steps(self, act: Callable[[], T]) -> T:
        """Have `act` run by the engine's thread before its next step; returns what that returns."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(act())
            except BaseException as e:
                done.set_exception(e)

        with self._changed:
            is_here = self._is_over or threading.current_thread() is self._thread
            if not is_here:
                self._acts.append(run)
                self._changed.notify_all()
        if is_here:
            run()
        return done.result()

    # --- on the engine's thread -----------------------------------------------------------------

    def _serve(self) -> None:
        with torch.inference_mode():
            while True:
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._acts or self._waiting or self._running or self._is_over
                    )
                    acts = list(self._acts)
                    self._acts.clear()
                    if self._is_over and not acts:
                        return
                for act in acts:
                    act()
                try:
                    self._turn()
                except Exception as e:  # a defect of ours, but nobody is left waiting
                    for text in self._texts():
                        self._fail(text, e)

    def _turn(self) -> None:
        """Let texts leave and join, then take one step."""
        now = time.monotonic()
        for text in self._texts():
            deadline = text.request.deadline
            if text.is_cancelled:
                self._end(text, "cancelled")
            elif deadline is not None and deadline <= now:
                self._end(text, "time", "The time for this request is over.")
        self._admit()
        room = self._settings.prompt_tokens
        parts = []
        for text in self._running:
            spans = self._stepper.spans(text, room)
            if not text.has_read_prompt:
                room -= sum(len(s.ids) for s in spans)
            if spans:
                parts.append((text, spans))
        if parts:
            self._step(parts)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._settings.max_running:
            text = self._waiting[0]
            if not self._memory.admit(text, self._key(text)):
                return
            self._cached_tokens += text.num_cached
            with self._changed:
                self._running.append(self._waiting.popleft())

    def _step(self, parts: Sequence[tuple[Text, list[Span]]]) -> None:
        """Read on in texts, and write a token of each whose prompt has been read. Where that fails,
        again text by text: only whoever makes it fail is ended."""
        try:
            reads, logits = self._stepper.read(parts, self._memory.store)
        except Exception as e:
            if len(parts) == 1:
                self._fail(parts[0][0], e)
            else:
                for part in parts:
                    self._step([part])
            return
        writers = []
        are_numbers = logits.amax(-1).isfinite().tolist()
        for read in reads:
            with self._failing(read.text):
                if not all(are_numbers[read.rows.start : read.rows.stop]):
                    raise ConfigError(
                        "The logits hold NaN or infinity: weights of the anchor, or of an expert "
                        "that is on, are damaged."
                    )
                if self._take_in(read, logits):
                    writers.append(read)
        self._write([r for r in writers if not r.text.is_over], logits)

    def _take_in(self, read: Read, logits: Tensor) -> bool:
        """Take note of what was read of a text; True if a token is to be written."""
        text = read.text
        is_prompt = not text.has_read_prompt
        before = text.progress.num_read
        text.take_in(read.spans, read.weights)
        if not is_prompt:
            return True
        self._prompt_tokens += text.progress.num_read - before
        if text.request.scores_prompt:
            text.score_prompt(logits[read.rows.start : read.rows.stop], before)
        if not text.has_read_prompt:
            return False
        self._memory.keep(text, self._key(text))
        if text.request.scores_prompt:
            self._say(text, PromptRead(text.scores))
        if text.answer is None:
            self._end(text, "scored")
        return text.answer is not None

    def _write(self, reads: Sequence[Read], logits: Tensor) -> None:
        """Choose the next token of each text by the last of its logits."""
        rows = [r.rows[-1] for r in reads]
        chosen = choose_tokens(
            logits if len(rows) == len(logits) else logits[rows],
            [r.text.request.sampling for r in reads],
            [r.text.draws for r in reads],
        )
        for read, row, token in zip(reads, rows, chosen, strict=True):
            text = read.text
            with self._failing(text):
                assert text.answer is not None
                ended = text.answer.write(token)
                if ended != "end_of_text":
                    self._written_tokens += 1
                    asked = text.request.num_logprobs
                    scored = None if asked is None else score(logits[row], token, asked)
                    self._say(text, TokenWritten(token, scored))
                if ended is not None:
                    self._end(text, ended)

    def _take_up(self, stepper: Stepper) -> ModelFacts:
        """Run the model of `stepper` from now on."""
        is_same_frame = stepper.frame == self._stepper.frame
        memory = self._memory
        if not is_same_frame:
            memory = TextMemory(stepper.model, self._settings.memory_bytes)
        stay = stepper.facts.kept_from(self._stepper.facts)
        self._withdrawn &= stay
        for name in self._withdrawn:
            stepper.erase(name)
        for text in self._texts():
            if gone := text.request.enabled - stay:
                self._end(text, "withdrawn", stepper.facts.tell_gone(gone))
            elif not is_same_frame:
                self._end(text, "withdrawn", "The public model, or the router, was replaced.")
            else:
                text.carry_over(self._stepper.model, stepper.model)
        memory.forget(lambda key: True)
        with self._changed:
            self._stepper, self._memory = stepper, memory
            self._facts = _without(stepper.facts, self._withdrawn)
        return self._facts

    def _withdraw(self, experts: Collection[str], why: str) -> int:
        known = frozenset(experts) & set(self._facts.experts)
        with self._changed:
            self._withdrawn |= known
            self._facts = _without(self._facts, known)
        ended = [t for t in self._texts() if t.request.enabled & known]
        for text in ended:
            self._end(text, "withdrawn", why)
        self._memory.forget(lambda key: bool(key[1] & known))
        for name in known:
            self._stepper.erase(name)
        return len(ended)

    def _end_all(self) -> None:
        for text in self._texts():
            self._end(text, "closed", "The engine was closed.")

    def _texts(self) -> list[Text]:
        """All that run or wait, first come first."""
        with self._changed:
            return [*self._running, *self._waiting]

    def _key(self, text: Text) -> Key:
        return (self._facts.digest, text.request.enabled)

    def _say(self, text: Text, event: Event) -> None:
        try:
            text.say(event)
        except Exception:  # whoever asked is at fault; the others go on
            log.exception("An event of a request was not taken.")
            text.cancel()

    def _end(
        self, text: Text, reason: Ending | Interruption | Literal["scored"], detail: str = ""
    ) -> None:
        if text.is_over:
            return
        text.is_over = True
        with self._changed:
            (self._running if text in self._running else self._waiting).remove(text)
            self._changed.notify_all()
        self._memory.release(text)
        self._say(
            text,
            Ended(
                reason,
                prompt_tokens=min(text.progress.num_read, len(text.ids)),
                cached_tokens=text.num_cached,
                written_tokens=len(text.answer.written) if text.answer else 0,
                shares=text.shares(self._stepper.model),
                detail=detail,
            ),
        )

    def _fail(self, text: Text, error: Exception) -> None:
        log.error("A request failed.", exc_info=error)
        self._end(text, "failed", f"The engine failed on this request: {error}")

    @contextmanager
    def _failing(self, text: Text) -> Iterator[None]:
        """End `text` if what is done for it fails."""
        try:
            yield
        except Exception as e:
            self._fail(text, e)


def _without(facts: ModelFacts, names: Collection[str]) -> ModelFacts:
    """`facts` less some experts."""
    return replace(facts, experts={n: f for n, f in facts.experts.items() if n not in names})
