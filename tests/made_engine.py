"""A deterministic engine without a model, for tests of what stands in front of one.

An answer says which experts were on and which seed it was drawn with, so that every answer shows
whether it is the right one.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from flexolmo.bundle.facts import ExpertFacts
from flexolmo.bundle.terms import Terms
from flexolmo.data.tokenizer import Tokenizer
from flexolmo.errors import BusyError, ConfigError, PolicyError
from flexolmo.files import digest_bytes
from flexolmo.inference.engine import (
    Ended,
    EngineRequest,
    EngineStats,
    Event,
    ModelFacts,
    PromptRead,
    Scored,
    TokenWritten,
)


def made_facts(name: str, **terms) -> ExpertFacts:
    """Facts about an expert `name` that may be used for anything, but for changes of its terms."""
    usual = dict(
        text="Terms.",
        permitted=("any",),
        prohibited=(),
        audience=(),
        valid_from=None,
        valid_until=None,
        attribution=None,
    )
    digest = digest_bytes(name.encode())
    return ExpertFacts(f"Owner of {name}", digest, digest, 1, "CC0-1.0", Terms(**usual | terms))


def said(enabled: Collection[str], seed: int) -> str:
    """The answer that `MadeEngine` writes, if nothing ends it before."""
    return f"Grüße 🙂 from {'+'.join(sorted(enabled)) or 'nobody'}, seed {seed}."


class MadeEngine:
    """See the module. `hold()` stops every answer before its next token, `let(n)` frees so many."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        experts: Mapping[str, ExpertFacts],
        max_seq_len: int = 256,
        max_requests: int = 100,
    ):
        self.tokenizer = tokenizer
        self.max_requests = max_requests
        digest = digest_bytes(repr(sorted(experts)).encode())
        self.facts = ModelFacts(
            digest, experts, max_seq_len, tokenizer.vocab_size, [tokenizer.eos_id]
        )
        self._model = self.facts  # with those that are withdrawn
        self.next_facts = self.facts  # after a reload, or an error that it raises
        self.is_running = True
        self.seen: list[EngineRequest] = []
        self.texts: list[_Text] = []
        self.written = 0
        self._withdrawn: set[str] = set()
        self._lock = threading.RLock()
        self._tokens: threading.Semaphore | None = None

    def hold(self) -> None:
        self._tokens = threading.Semaphore(0)

    def let(self, tokens: int) -> None:
        self._tokens.release(tokens)

    def free(self) -> None:
        held, self._tokens = self._tokens, None
        held.release(10_000)

    def wait_for_token(self, text: "_Text") -> None:
        held = self._tokens
        while held is not None and not text.has_ended() and not held.acquire(timeout=0.005):
            held = self._tokens

    # --- the interface ---

    def submit(self, request: EngineRequest, say: Callable[[Event], None]) -> "_Text":
        with self._lock:
            self.seen.append(request)
            if request.model_digest != self.facts.digest:
                raise PolicyError("another model")
            if not request.enabled <= self.facts.experts.keys():
                raise PolicyError("an expert is gone")
            if len(request.ids) + request.writes > self.facts.max_seq_len:
                raise ConfigError("too long")
            self.texts = [text for text in self.texts if text.is_alive()]
            if len(self.texts) >= self.max_requests:
                raise BusyError("full")
            text = _Text(self, request, say)
            self.texts.append(text)
            text.start()
            return text

    def reload(self) -> ModelFacts:
        if isinstance(self.next_facts, Exception):
            raise self.next_facts
        with self._lock:
            before, after = self._model.experts, self.next_facts.experts
            kept = {name for name in before if after.get(name) == before[name]}
            self._end(before.keys() - kept, "replaced")
            self._withdrawn &= kept
            self._model = self.next_facts
            self.facts = without(self._model, self._withdrawn)
        return self.facts

    def withdraw(self, experts: Collection[str], why: str) -> int:
        with self._lock:
            self._withdrawn |= set(experts)
            self.facts = without(self.facts, experts)
            return self._end(experts, why)

    def _end(self, experts: Collection[str], why: str) -> int:
        ended = [t for t in self.texts if t.request.enabled & set(experts)]
        for text in ended:
            text.ending = text.ending or ("withdrawn", why)
        return len(ended)

    def stats(self) -> EngineStats:
        running = sum(text.is_alive() for text in self.texts)
        return EngineStats(running, 0, 1 << 20, 64, 60, 0, 0, 0, self.written, [])

    def close(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for text in self.texts:
            text.join(max(0.0, until - time.monotonic()))
            text.ending = text.ending or ("closed", "")


class _Text(threading.Thread):
    """One answer under way."""

    def __init__(self, engine: MadeEngine, request: EngineRequest, say: Callable[[Event], None]):
        super().__init__(daemon=True)
        self.engine = engine
        self.request = request
        self.say = say
        self.ending: tuple[str, str] | None = None

    def has_ended(self) -> bool:
        deadline = self.request.deadline
        if deadline is not None and time.monotonic() > deadline:
            self.ending = self.ending or ("time", "")
        return self.ending is not None

    def cancel(self) -> None:
        self.ending = self.ending or ("cancelled", "")

    def run(self) -> None:
        request, written = self.request, 0
        if request.scores_prompt:
            self.say(PromptRead([self.score(token) for token in request.ids[1:]]))
        reason = "scored"
        if request.writes:
            text = said(request.enabled, request.sampling.seed)
            ids = self.engine.tokenizer.encode(text)
            reason = "end_of_text"
            for number, token in enumerate(ids):
                if number >= request.sampling.max_new_tokens:
                    reason = "max_new_tokens"
                    break
                self.engine.wait_for_token(self)
                if self.has_ended():
                    break
                has_scores = request.num_logprobs is not None
                self.say(TokenWritten(token, self.score(token) if has_scores else None))
                written += 1
                self.engine.written += 1
                so_far = self.engine.tokenizer.decode(ids[:written])
                if any(stop in so_far for stop in request.stops):
                    reason = "stop"
                    break
        reason, detail = self.ending or (reason, "")
        names = [*sorted(request.enabled), "public"]
        shares = dict.fromkeys(names, 1 / len(names))
        self.say(Ended(reason, len(request.ids), 0, written, shares, detail))

    def score(self, token: int) -> Scored:
        others = range(token, token + (self.request.num_logprobs or 0))
        vocab_size = self.engine.facts.vocab_size
        return Scored(token, -token / 100, {t % vocab_size: -t / 100 for t in others})


def without(facts: ModelFacts, names: Collection[str]) -> ModelFacts:
    """The same model, of which some experts are not used."""
    return replace(facts, experts={n: e for n, e in facts.experts.items() if n not in names})


def with_expert(facts: ModelFacts, name: str, expert: ExpertFacts | None) -> ModelFacts:
    """The model with `name` added or replaced, or taken out."""
    experts = {n: e for n, e in facts.experts.items() if n != name}
    if expert is not None:
        experts[name] = expert
    digest = digest_bytes(repr(sorted((n, e.bundle_digest) for n, e in experts.items())).encode())
    return replace(facts, digest=digest, experts=experts)
