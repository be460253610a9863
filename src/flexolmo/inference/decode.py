"""The one loop that writes: token by token, for a batch of texts, from any reader.

Knows nothing of experts, prompts as text, or files: a reader and its state say who speaks.

B batch, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from flexolmo.config import Settings
from flexolmo.errors import ConfigError
from flexolmo.inference.reader import Reader, pad_left, spread

FEW_TOKENS = 256  # that hold a nucleus, most of the time
Ending = Literal["end_of_text", "stop", "max_new_tokens", "positions"]


class Sampling(Settings):
    """Settings for the choice of the next token."""

    max_new_tokens: int = Field(200, ge=1, description="Tokens to write at most.")
    temperature: float = Field(
        0.8, ge=0, description="Sampling temperature; 0 is greedy: always the likeliest token."
    )
    top_k: int | None = Field(None, ge=1, description="Choose among this many likeliest tokens.")
    top_p: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Choose among the likeliest tokens that together have this probability.",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**62,
        description="Random seed for sampling; text number i of a batch samples with seed + i.",
    )


@dataclass(frozen=True)
class Request:
    """One text to continue."""

    ids: Sequence[int]  # at least one, to be read before anything is written
    sampling: Sampling
    stops: Sequence[str] = ()  # the text ends once it holds one of these


@dataclass(frozen=True)
class Step:
    """One token of one text."""

    text: int  # the request's number
    token: int | None  # None: the end-of-text token, which stands for no text
    ended: Ending | None  # the reason why this text gets no more tokens


def requests_for(
    reader: Reader, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[Request]:
    """Requests to continue `prompts` (ids without the reader's start), seeded one by one."""
    return [
        Request(
            [*reader.start, *ids] or [reader.tokenizer.eos_id],
            sampling.model_copy(update={"seed": sampling.seed + i}),
        )
        for i, ids in enumerate(prompts)
    ]


def decode(
    reader: Reader,
    requests: Sequence[Request],
    *,
    state: Any = None,
    held_tokens: int = 0,
    choose: Callable[[Tensor, Sequence[int]], Sequence[int]] | None = None,
) -> Iterator[Step]:
    """Yield the tokens of all texts as they are chosen; a text that has ended leaves the batch.

    Args:
        state: the reader's state of as many texts, to go on from; by default a new one. It
            belongs to this call from now on.
        held_tokens: tokens that `state` holds of each text.
        choose: picks a token id for each row of logits [B,V], float32 on the CPU, given the
            numbers of the rows' requests; by default `choose_token` under each request's sampling.
    Raises:
        ConfigError: a text fills the model's positions before anything is written.
    """
    texts = [_Text(reader, request, held_tokens) for request in requests]
    draws = [torch.Generator().manual_seed(r.sampling.seed) for r in requests]

    def sample(logits: Tensor, numbers: Sequence[int]) -> list[int]:
        return [
            choose_token(row, requests[i].sampling, draws[i])
            for row, i in zip(logits, numbers, strict=True)
        ]

    choose = choose or sample
    live = list(range(len(requests)))  # the texts in the batch
    over: set[int] = set()
    ids, is_token = pad_left([r.ids for r in requests])  # [B,T]
    if state is None:
        state = spread(reader.new_state(), len(requests))
    state.reserve(held_tokens + ids.shape[1] + max((t.most for t in texts), default=0))
    while len(over) < len(requests):
        with torch.inference_mode():  # left before each yield, for it would hold for the caller
            logits = reader.read(ids, state, is_token=is_token, last=1)[:, 0].cpu()  # [B,V]
            chosen = list(choose(logits, live))
        for i, token in zip(live, chosen, strict=True):
            if i in over:  # in the batch of a reader that cannot let it go
                continue
            ended = texts[i].write(token)
            if ended is not None:
                over.add(i)
            yield Step(i, None if ended == "end_of_text" else token, ended)
        going = [place for place, i in enumerate(live) if i not in over]
        if reader.shares_prefixes and 0 < len(going) < len(live):
            with torch.inference_mode():
                state = state.select(torch.tensor(going))
            live, chosen = [live[place] for place in going], [chosen[place] for place in going]
        ids, is_token = torch.tensor(chosen)[:, None], None  # [B,1]


class _Text:
    """One text while it is written, and the conditions that end it."""

    def __init__(self, reader: Reader, request: Request, held_tokens: int):
        """ConfigError if the request leaves no room for a token."""
        room = reader.max_seq_len - held_tokens - len(request.ids)
        if room < 1:
            own, start = held_tokens + len(request.ids), len(reader.start)
            raise ConfigError(
                f"A prompt has {own - start} tokens; this model holds {reader.max_seq_len} "
                "positions, prompt and continuation together: give at most "
                f"{reader.max_seq_len - start - 1} tokens of prompt."
            )
        self.tokenizer = reader.tokenizer
        self.stops = [s for s in request.stops if s]
        self.stop_tokens = max((len(s.encode()) for s in self.stops), default=0) + 4
        asked = request.sampling.max_new_tokens
        self.most = min(room, asked)
        self.last: Ending = "positions" if room < asked else "max_new_tokens"
        self.written: list[int] = []

    def write(self, token: int) -> Ending | None:
        """Add a token; the reason why it is the last, if it is."""
        if token == self.tokenizer.eos_id:
            return "end_of_text"
        self.written.append(token)
        if self.stops:
            tail = self.tokenizer.decode(self.written[-self.stop_tokens :])
            if any(stop in tail for stop in self.stops):
                return "stop"
        return self.last if len(self.written) == self.most else None


def out_of_positions(reader: Reader, request: Request) -> str:
    """The message for a text that the model's last position has ended."""
    room = reader.max_seq_len - len(request.ids)
    return (
        f"The text ends after {room} of the {request.sampling.max_new_tokens} tokens asked for: "
        f"with the prompt's {len(request.ids) - len(reader.start)} it fills this model's "
        f"{reader.max_seq_len} positions."
    )


def choose_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from logits [V], under temperature and then under both top-k and top-p."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = ((logits - logits.max()) / sampling.temperature).softmax(-1)
    ranked, order = _likeliest(probabilities, sampling)
    keep = ranked.cumsum(-1) - ranked < sampling.top_p  # the first always stays
    if sampling.top_k is not None:
        keep[sampling.top_k :] = False
    # as many numbers are drawn whatever is kept, so that a seed's text depends on no shortcut
    weights = F.pad(ranked * keep, (0, len(logits) - len(ranked)))  # [V]
    return int(order[torch.multinomial(weights, 1, generator=generator)])


def _likeliest(probabilities: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The beginning of `probabilities` [V] in descending order, ties by id, with their ids: as
    much as top-k and top-p can keep. Most of a large vocabulary is not sorted."""
    size = min(sampling.top_k or FEW_TOKENS, len(probabilities))
    top = probabilities.topk(size).values
    if sampling.top_k is None and float(top.sum()) < sampling.top_p + 1e-3:
        return probabilities.sort(descending=True, stable=True)
    ids = (probabilities >= top[-1]).nonzero()[:, 0]
    ranked, places = probabilities[ids].sort(descending=True, stable=True)
    return ranked, ids[places]


def text_before(text: str, stops: Sequence[str]) -> str:
    """The part of `text` before the first of `stops`."""
    found = [text.find(stop) for stop in stops if stop in text]
    return text[: min(found, default=len(text))]


def continue_ids(
    reader: Reader, prompts: Sequence[Sequence[int]], sampling: Sampling, **options: Any
) -> list[list[int]]:
    """The continuations of `prompts`, as ids without start and end; options as for `decode`."""
    written: list[list[int]] = [[] for _ in prompts]
    for step in decode(reader, requests_for(reader, prompts, sampling), **options):
        if step.token is not None:
            written[step.text].append(step.token)
    return written
