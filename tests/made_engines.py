"""Engines over mixtures in memory, and ears for what they say."""

import threading
from dataclasses import dataclass, field

from flexolmo.bundle.terms import Terms
from flexolmo.inference.batching import BatchEngine, EngineSettings
from flexolmo.inference.engine import (
    Ended,
    EngineRequest,
    ExpertFacts,
    ModelFacts,
    PromptRead,
    TokenWritten,
)
from flexolmo.inference.sampling import Sampling
from flexolmo.inference.stepping import EngineModel

SMALL = EngineSettings(memory_bytes=1 << 20, max_running=32, prompt_tokens=64)
PATIENCE = 120  # seconds, after which a test fails
TERMS = Terms.model_construct()


def facts_of(model, digest="model", digests=()):
    """Facts of a mixture; `digests` are of some experts' bundles."""
    experts = {
        n: ExpertFacts("Ann", "key", dict(digests).get(n, f"bundle of {n}"), 1, "MIT", TERMS)
        for n in model.expert_names[1:]
    }
    config = model.config
    return ModelFacts(digest, experts, config.max_seq_len, config.vocab_size, [config.eos_token_id])


def served(model, tokenizer, frame="frame", **facts):
    """A model for an engine."""
    return EngineModel(model, tokenizer, facts_of(model, **facts), frame)


def open_engine_on(model, tokenizer, settings=SMALL):
    return BatchEngine(lambda: served(model, tokenizer), settings)


def ask(ids, enabled=(), max_new_tokens=8, temperature=0.0, seed=0, **more):
    """A request, greedy unless it says otherwise."""
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, top_p=0.99
    )
    return EngineRequest(
        tuple(ids), frozenset(enabled), more.pop("model_digest", "model"), sampling, **more
    )


@dataclass
class Heard:
    """What was said of one request."""

    events: list = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    then: object = None  # called with every event

    def __call__(self, event):
        assert not self.over.is_set(), "an event after the last"
        self.events.append(event)
        if self.then is not None:
            self.then(event)
        if isinstance(event, Ended):
            self.over.set()

    @property
    def ended(self):
        """The last event, waited for."""
        assert self.over.wait(PATIENCE), "a request was left waiting"
        return self.events[-1]

    @property
    def tokens(self):
        return [e.token for e in self.events if isinstance(e, TokenWritten)]

    @property
    def all_but_cached(self):
        """All that was said, but how much of it another request had read."""
        e = self.ended
        last = (e.reason, e.prompt_tokens, e.written_tokens, e.shares, e.detail)
        assert all(isinstance(x, TokenWritten | PromptRead) for x in self.events[:-1])
        return [*self.events[:-1], last]


def hear(engine, request):
    """What an engine says of one request, to its end."""
    heard = Heard()
    engine.submit(request, heard)
    _ = heard.ended
    return heard
