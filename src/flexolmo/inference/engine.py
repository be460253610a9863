"""The interface between a gateway, which decides, and an engine, which computes. No torch.

An engine runs one model for many requests at once, each with its own set of enabled experts. It
knows nothing of people, purposes, policies or HTTP; a gateway knows nothing of tensors.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from flexolmo.bundle.facts import Barred, ExpertFacts
from flexolmo.inference.sampling import Ending, Sampling

# Reasons for which an answer ends before it is whole: the request was cancelled, an expert it
# enabled was withdrawn, its time ran out, the engine closed, or the engine failed.
Interruption = Literal["cancelled", "withdrawn", "time", "closed", "failed"]


@dataclass(frozen=True)
class ModelFacts:
    """The model that an engine runs."""

    digest: str  # of mixture.json, or of whatever else names all that the model is made of
    experts: Mapping[str, ExpertFacts]  # by name; public text is not among them
    max_seq_len: int  # positions, prompt and answer together
    vocab_size: int
    start_ids: Sequence[int]  # that stand before every text
    # experts that belong to the model and are not in memory, since nobody may use them
    barred: Mapping[str, Barred] = field(default_factory=dict)

    def kept_from(self, former: "ModelFacts") -> set[str]:
        """Experts that `former` has too, with the very same bundle."""
        return {
            name
            for name, own in self.experts.items()
            if name in former.experts and former.experts[name].bundle_digest == own.bundle_digest
        }

    def tell_gone(self, gone: Collection[str]) -> str:
        """Words for people on experts of a former model that are not in this one as they were: the
        reasons why nobody may use them, and which were replaced or removed."""
        reasons = [self.barred[name].why for name in sorted(gone) if name in self.barred]
        others = sorted(set(gone) - self.barred.keys())
        if others:
            reasons.append(f"Replaced or removed: {', '.join(others)}.")
        return " ".join(reasons)


@dataclass(frozen=True)
class EngineRequest:
    """One text to continue, or, with no new tokens, to score."""

    ids: Sequence[int]  # start_ids included; at least one
    enabled: frozenset[str]  # experts that are on for this text alone
    model_digest: str  # of the model that `enabled` was decided for; another one refuses
    sampling: Sampling
    stops: Sequence[str] = ()  # the text ends once it holds one of these
    num_logprobs: int | None = None  # likeliest tokens to report beside the chosen one; None: none
    scores_prompt: bool = False  # True to report the log-probabilities of the prompt's tokens too
    writes: bool = True  # False: only the prompt is read
    deadline: float | None = None  # time.monotonic() after which it is ended


@dataclass(frozen=True)
class Scored:
    """Log-probability, in nats, of one token given all before it under the enabled experts."""

    token: int
    logprob: float
    likeliest: Mapping[int, float] = field(default_factory=dict)  # the asked number of tokens


@dataclass(frozen=True)
class PromptRead:
    """The prompt has been read; sent only if its scores were asked for."""

    scores: Sequence[Scored]  # of every id but the first


@dataclass(frozen=True)
class TokenWritten:
    """One token of the answer."""

    token: int
    score: Scored | None  # if log-probabilities were asked for


@dataclass(frozen=True)
class Ended:
    """The last event of every request."""

    reason: Ending | Interruption | Literal["scored"]
    prompt_tokens: int
    cached_tokens: int  # of the prompt, that another request with the same set had read
    written_tokens: int
    # Mean weight of each enabled expert, and of "public", over the tokens read and written: the
    # only thing that is told of routing.
    shares: Mapping[str, float]
    detail: str = ""  # for people: which expert was withdrawn, what failed


Event = PromptRead | TokenWritten | Ended


@dataclass(frozen=True)
class EngineStats:
    """Figures of an engine at one moment."""

    running: int  # requests in the batch
    waiting: int  # requests that wait for a place
    block_bytes: int  # memory for keys and values, as budgeted
    blocks: int
    free_blocks: int  # neither of a request nor of the prefix cache
    cached_blocks: int  # of the prefix cache, given up when memory is short
    prompt_tokens: int  # read so far
    cached_tokens: int  # of prompts, not read again
    written_tokens: int
    loaded_experts: Sequence[str]  # whose weights are in memory


class Request(Protocol):
    """A request under way."""

    def cancel(self) -> None:
        """End it soon, with an `Ended`; from any thread, any number of times."""


class Engine(Protocol):
    """One model, run for many requests. Every method may be called from any thread."""

    @property
    def facts(self) -> ModelFacts:
        """The model that new requests are run on; experts that were withdrawn are not in it."""

    @property
    def is_running(self) -> bool:
        """False while no request can begin, for the engine ended and is being started again."""

    def submit(self, request: EngineRequest, say: Callable[[Event], None]) -> Request:
        """Begin `request`; its events go to `say`, in order, on a thread of the engine's.

        Raises:
            BusyError: as many requests wait as may.
            ConfigError: a request that this model can never serve, such as one that is too long.
            PolicyError: an enabled expert that the model does not hold, or no longer; or another
                model than the request was decided for.
        """

    def reload(self) -> ModelFacts:
        """Read the model's directory again, and run new requests on what it holds now.

        Requests whose experts have gone or changed are ended as withdrawn before this returns; the
        others go on. If what is there does not hold up the old model stays, and the error of
        `load_mixture` is raised.
        """

    def withdraw(self, experts: Collection[str], why: str) -> int:
        """Stop using `experts` until a reload brings another bundle of theirs: requests that
        enabled one are ended, `why` as their detail. Returns their number; once it has returned no
        step runs on such an expert, and what was computed with one is forgotten.
        """

    def stats(self) -> EngineStats:
        """Figures now."""

    def close(self, seconds: float) -> None:
        """Take no more requests, let those under way end for so many seconds, then end them."""
