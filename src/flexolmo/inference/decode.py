"""The one loop that writes: token by token, for a batch of texts, from any reader.

Knows nothing of experts, prompts as text, or files: a reader and its state say who speaks.

B batch, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from flexolmo.data.tokenizer import Tokenizer
from flexolmo.errors import ConfigError
from flexolmo.inference.admission import room_behind
from flexolmo.inference.reader import Reader, pad_left, spread
from flexolmo.inference.sampling import Ending, Sampling


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
            numbers of the rows' requests; by default `choose_tokens` under each request's sampling.
    Raises:
        ConfigError: a text fills the model's positions before anything is written.
    """
    texts = []
    for r in requests:
        room = room_behind(held_tokens + len(r.ids), reader.max_seq_len, len(reader.start))
        texts.append(Answer(reader.tokenizer, r.sampling, r.stops, room))
    draws = [torch.Generator().manual_seed(r.sampling.seed) for r in requests]

    def sample(logits: Tensor, numbers: Sequence[int]) -> list[int]:
        return choose_tokens(
            logits, [requests[i].sampling for i in numbers], [draws[i] for i in numbers]
        )

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


class Answer:
    """One text while it is written, and the conditions that end it."""

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling, stops: Sequence[str], room: int):
        """`room` is the number of positions behind the prompt."""
        self.tokenizer = tokenizer
        self.stops = [s for s in stops if s]
        self.stop_tokens = max((len(s.encode()) for s in self.stops), default=0) + 4
        asked = sampling.max_new_tokens
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


def choose_tokens(
    logits: Tensor, samplings: Sequence[Sampling], draws: Sequence[torch.Generator]
) -> list[int]:
    """A token id for each row of logits [B,V] under its own sampling and draws.

    Draws from all tokens until one comes that top-k and top-p keep. Of these a rejected token and
    all that are less likely are none, so they are left out of the next draw, and few draws do;
    what is kept is drawn as if it had been cut first, but nothing is sorted. Raises ConfigError for
    logits that are not numbers. Source: ours.
    """
    found = torch.from_numpy(logits.numpy().argmax(-1))  # ten times as fast as torch's
    rows = torch.tensor([i for i, s in enumerate(samplings) if s.temperature > 0])
    if not len(rows):
        return found.tolist()

    def of_rows(values: Callable[[Sampling], float]) -> Tensor:
        return torch.tensor([values(samplings[i]) for i in rows.tolist()], dtype=torch.double)

    vocab_size = logits.shape[1]
    logits = logits[rows].double()
    scaled = (logits - logits.amax(-1, keepdim=True)) / of_rows(lambda s: s.temperature)[:, None]
    chances = scaled.softmax(-1)  # [B,V], of which the unlikely become 0
    if not chances.isfinite().all():
        raise ConfigError(
            "The model's logits hold NaN or infinity, so there is no token to choose: its weights "
            "are damaged, or one of its experts' are. Switch experts off one by one to find it."
        )
    top_p = of_rows(lambda s: s.top_p)
    top_k = of_rows(lambda s: min(s.top_k or vocab_size, vocab_size)).long()
    most = int(top_k.where(top_k < vocab_size, 1).max())
    if most > 1 or bool((top_k == 1).any()):  # else most draws would be rejected
        least = chances.topk(most).values.gather(1, top_k[:, None].clamp(max=most) - 1)
        chances = chances.where((chances >= least) | (top_k > most)[:, None], 0.0)
    ids = torch.arange(vocab_size)
    while len(rows):
        sums = chances.cumsum(-1)
        numbers = torch.cat(
            [torch.rand(1, 1, dtype=torch.double, generator=draws[i]) for i in rows.tolist()]
        )
        drawn = torch.searchsorted(sums, numbers * sums[:, -1:], right=True)  # [B,1]
        drawn = drawn.clamp(max=vocab_size - 1)
        chance = chances.gather(1, drawn)
        before = (chances > chance) | ((chances == chance) & (ids < drawn))  # ties by id
        likelier = chances * before
        is_kept = (likelier.sum(-1) < top_p) & (before.sum(-1) < top_k)
        found[rows[is_kept]] = drawn[is_kept, 0]
        again = ~is_kept
        rows, chances = rows[again], likelier[again]
        top_p, top_k = top_p[again], top_k[again]
    return cast(list[int], found.tolist())


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
