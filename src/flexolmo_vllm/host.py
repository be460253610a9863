"""Texts under way in vLLM, and what a gateway tells of them and hears; see `inference.messages`.

One thread steps vLLM's engine and does all that is asked between its steps, so that nothing which
was withdrawn is in a later one. Endings of texts are those of our own engine.
"""

import logging
import queue
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from vllm import RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from flexolmo.errors import ConfigError, FlexOlmoError, PolicyError
from flexolmo.inference.admission import refuse_request, room_behind
from flexolmo.inference.decode import Answer
from flexolmo.inference.engine import (
    Ended,
    EngineRequest,
    EngineStats,
    Event,
    Interruption,
    ModelFacts,
    PromptRead,
    Scored,
    TokenWritten,
)
from flexolmo.inference.messages import REQUEST, STATS, Line, write_error, write_event, write_facts
from flexolmo.inference.sampling import Ending, Sampling
from flexolmo.inference.stepping import EngineModel
from flexolmo_vllm.admission import EXPERTS
from flexolmo_vllm.model import MixtureForCausalLM
from flexolmo_vllm.scheduler import MixtureScheduler
from flexolmo_vllm.worker import MixtureRunner

_log = logging.getLogger(__name__)
Reason = Ending | Interruption | Literal["scored"]
DAMAGED = (
    "The engine failed on this request: The logits hold NaN or infinity: weights of the anchor, or "
    "of an expert that is on, are damaged."
)


@dataclass
class Text:
    """One text under way."""

    number: int  # the gateway's
    request: EngineRequest
    answer: Answer | None  # None: only the prompt is read
    id: str = ""  # vLLM's
    num_cached: int = 0


class Host:
    """An engine of vLLM's, for one gateway."""

    def __init__(self, engine: LLMEngine, line: Line):
        self._engine = engine
        self._line = line
        core = engine.engine_core.engine_core
        self._scheduler: MixtureScheduler = core.scheduler
        self._runner: MixtureRunner = core.model_executor.driver_worker.worker.model_runner
        self._model: MixtureForCausalLM = self._runner.model
        self._facts = self._model.served.facts
        self._withdrawn: set[str] = set()
        self._texts: dict[int, Text] = {}
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._written_tokens = 0
        self._inbox: queue.SimpleQueue[tuple[str, list[Any]]] = queue.SimpleQueue()

    def run(self) -> None:
        """Serve until the gateway is gone or says so. Raises what vLLM fails with, after all texts
        have been ended."""
        self._warm_up()
        self._line.send("opened", *self._told())
        threading.Thread(target=self._listen, name="gateway", daemon=True).start()
        try:
            while self._hear():
                self._end_late()
                if self._texts:
                    for output in self._engine.step():
                        self._take_in(output)
        except Exception as e:
            for text in list(self._texts.values()):
                self._end(text, "failed", f"The engine failed: {e}")
            raise

    def _listen(self) -> None:
        try:
            for message in self._line.messages():
                self._inbox.put(message)
        finally:
            self._inbox.put(("gone", []))

    def _hear(self) -> bool:
        """Do what the gateway has asked for, and wait for that if nothing is under way; False if it
        is gone."""
        while not self._inbox.empty() or not self._texts:
            word, values = self._inbox.get()
            if word == "gone":
                return False
            if word in ("submit", "cancel"):
                getattr(self, f"_{word}")(*values)
                continue
            call, *rest = values
            try:
                value = getattr(self, f"_{word}")(call, *rest)
            except FlexOlmoError as e:
                self._line.send("failed", call, *write_error(e))
                continue
            if word == "reload":  # answers when it has been read
                continue
            self._line.send("returned", call, value)
            if word == "close":
                return False
        return True

    # --- as the gateway asks --------------------------------------------------------------------

    def _submit(self, number: int, content: Mapping[str, Any]) -> None:
        request = REQUEST.validate_python(content)
        text = Text(number, request, None)
        try:
            refuse_request(request, self._facts)
            config = self._model.mixture.config
            if config.document_mask and config.eos_token_id in request.ids[1:]:
                raise ConfigError(
                    "The prompt holds an end of text. This model sees nothing of the text before "
                    "one, which vLLM cannot leave out: ask a server with the engine own."
                )
            if request.writes:
                num_start = len(self._facts.start_ids)
                room = room_behind(len(request.ids), self._facts.max_seq_len, num_start)
                tokenizer = self._model.served.tokenizer
                text.answer = Answer(tokenizer, request.sampling, request.stops, room)
            self._texts[number] = text
            text.id = self._engine.add_request(
                str(number),
                {"prompt_token_ids": list(request.ids)},
                parameters(request, 1 if text.answer is None else text.answer.most),
            )
        except PolicyError as e:  # withdrawn or replaced since the gateway asked for it
            self._end(text, "withdrawn", str(e))
        except Exception as e:
            _log.error("A request was not taken.", exc_info=e)
            self._end(text, "failed", f"The engine failed on this request: {e}")

    def _cancel(self, number: int) -> None:
        if number in self._texts:
            self._end(self._texts[number], "cancelled")

    def _withdraw(self, _: int, experts: Collection[str], why: str) -> int:
        """Number of texts that were ended."""
        known = frozenset(experts) & self._facts.experts.keys()
        self._withdrawn |= known
        ended = [t for t in self._texts.values() if t.request.enabled & known]
        for text in ended:
            self._end(text, "withdrawn", why)
        for name in known:
            self._model.erase(name)
        self._tell_scheduler(self._facts)
        return len(ended)

    def _reload(self, call: int) -> None:
        """Read the model anew on a thread of its own, which then has `_taken_up` called."""

        def read() -> None:
            try:
                self._inbox.put(("taken_up", [call, self._model.read_again()]))
            except Exception as e:
                self._line.send("failed", call, *write_error(e))

        threading.Thread(target=read, name="reload", daemon=True).start()

    def _taken_up(self, _: int, new: EngineModel) -> Any:
        """Run another model from now on. A text whose experts stay goes on with it."""
        old = self._model.served
        if new.model.config != old.model.config:
            raise ConfigError(
                "The model that is there by now has other sizes, for which vLLM has to be started "
                "again: start the server again. The former model is served on."
            )
        stay = new.facts.kept_from(old.facts)
        for text in list(self._texts.values()):
            if gone := text.request.enabled - stay:
                self._end(text, "withdrawn", new.facts.tell_gone(gone))
            elif new.frame != old.frame:
                self._end(text, "withdrawn", "The public model, or the router, was replaced.")
        self._model.take_up(new)
        self._runner.follow_anew()
        self._withdrawn &= stay
        for name in self._withdrawn:
            self._model.erase(name)
        self._tell_scheduler(new.facts)
        return self._told()

    def _told(self) -> list[Any]:
        """Facts of the model, and the record of the bundles that were seen."""
        return [write_facts(self._facts), self._model.served.seen]

    def _tell_scheduler(self, facts: ModelFacts) -> None:
        """Take requests to the model of `facts`, less what was withdrawn, from now on."""
        experts = {n: own for n, own in facts.experts.items() if n not in self._withdrawn}
        self._facts = replace(facts, experts=experts)
        self._scheduler.use(facts.digest, experts.keys())
        if not self._texts:  # else what others computed stays, under salts that nobody has any more
            self._engine.reset_prefix_cache()

    def _stats(self, _: int) -> Any:
        pool = self._scheduler.kv_cache_manager.block_pool
        idle = [block for block in pool.blocks if not block.ref_cnt and not block.is_null]
        cached = sum(block.block_hash is not None for block in idle)
        stats = EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._texts) - len(self._scheduler.running),
            block_bytes=self._engine.vllm_config.cache_config.kv_cache_memory_bytes or 0,
            blocks=len(pool.blocks) - 1,  # one is never given out
            free_blocks=len(idle) - cached,
            cached_blocks=cached,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            written_tokens=self._written_tokens,
            loaded_experts=sorted(self._facts.experts),
        )
        return STATS.dump_python(stats, mode="json")

    def _close(self, _: int) -> None:
        for text in list(self._texts.values()):
            self._end(text, "closed", "The engine was closed.")

    # --- as vLLM goes on ------------------------------------------------------------------------

    def _end_late(self) -> None:
        """End the texts whose time is over."""
        now = time.monotonic()
        for text in list(self._texts.values()):
            if text.request.deadline is not None and text.request.deadline <= now:
                self._end(text, "time", "The time for this request is over.")

    def _take_in(self, output: RequestOutput) -> None:
        """Take note of what a step did for one text."""
        text = self._texts.get(int(output.request_id))
        if text is None:
            return
        try:
            self._take_in_of(text, output)
        except Exception as e:  # the others go on
            _log.error("A request has failed.", exc_info=e)
            self._end(text, "failed", f"The engine failed on this request: {e}")

    def _take_in_of(self, text: Text, output: RequestOutput) -> None:
        if text.id in self._scheduler.damaged:
            self._end(text, "failed", DAMAGED)
            return
        request = text.request
        (written,) = output.outputs
        if text.answer is None or not text.answer.written:
            self._take_in_prompt(text, output)
        if text.answer is None:
            self._end(text, "scored")
            return
        logs = written.logprobs or [None] * len(written.token_ids)
        for token, found in zip(written.token_ids, logs, strict=True):
            ended = text.answer.write(token)
            if ended != "end_of_text":
                self._written_tokens += 1
                score = None if found is None else _score(token, found, request.num_logprobs)
                self._say(text, TokenWritten(token, score))
            if ended is not None:
                self._end(text, ended)
                return

    def _take_in_prompt(self, text: Text, output: RequestOutput) -> None:
        """Take note that the prompt has been read."""
        request = text.request
        text.num_cached = output.num_cached_tokens or 0
        self._prompt_tokens += len(request.ids) - text.num_cached
        self._cached_tokens += text.num_cached
        if request.scores_prompt:
            found = (output.prompt_logprobs or [])[1:]
            pairs = zip(request.ids[1:], found, strict=True)
            scores = [_score(token, logs, request.num_logprobs) for token, logs in pairs]
            self._say(text, PromptRead(scores))

    def _end(self, text: Text, reason: Reason, detail: str = "") -> None:
        """End a text, in vLLM too."""
        self._texts.pop(text.number, None)
        known = self._scheduler.requests.get(text.id)
        num_read = len(text.request.ids) if known is None else known.num_computed_tokens
        ended = Ended(
            reason,
            prompt_tokens=min(num_read, len(text.request.ids)) if text.id else 0,
            cached_tokens=text.num_cached,
            written_tokens=len(text.answer.written) if text.answer else 0,
            shares=self._runner.follower.shares(text.id, text.request.enabled),
            detail=detail,
        )
        self._engine.abort_request([str(text.number)])
        self._say(text, ended)

    def _say(self, text: Text, event: Event) -> None:
        with suppress(OSError):  # the gateway is gone, which `_hear` hears
            self._line.send("said", text.number, *write_event(event))

    def _warm_up(self) -> None:
        """Have vLLM compile what it does at the first request, so that nobody waits for it."""
        for temperature in (0.0, 1.0):
            sampling = Sampling(max_new_tokens=2, temperature=temperature, top_k=5)
            ids = [*self._facts.start_ids, 0]
            request = EngineRequest(ids, frozenset(), self._facts.digest, sampling, num_logprobs=2)
            self._engine.add_request("warm-up", {"prompt_token_ids": ids}, parameters(request, 2))
            while self._engine.has_unfinished_requests():
                self._engine.step()
        self._engine.reset_prefix_cache()


def parameters(request: EngineRequest, most: int) -> SamplingParams:
    """vLLM's parameters for a request that writes at most so many tokens; it ends them itself, as
    all else that ends a text is seen to here."""
    sampling = request.sampling
    return SamplingParams(
        max_tokens=most,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or 0,
        seed=sampling.seed,
        logprobs=request.num_logprobs,
        prompt_logprobs=(request.num_logprobs or 0) if request.scores_prompt else None,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={EXPERTS: sorted(request.enabled)},
    )


def _score(token: int, found: Mapping[int, Any], asked: int | None) -> Scored:
    """The score of a token by vLLM's log-probabilities, of it and of as many of the likeliest."""
    ranked = sorted(found.items(), key=lambda item: item[1].rank)
    likeliest = {i: float(own.logprob) for i, own in ranked[: asked or 0]}
    return Scored(token, float(found[token].logprob), likeliest)
