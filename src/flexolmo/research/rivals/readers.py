"""Rivals over several models as readers: BTM, and a model that each text's start chooses.

They say what `merge.baselines` says of whole texts, but as the text comes.

B batch, T positions, E models, V vocabulary, P tokens of a prompt.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexolmo.inference.reader import Reader

# --- BTM ------------------------------------------------------------------------------------------


@dataclass
class _BtmState:
    states: list[Any]
    weights: Tensor  # [E,B] float64, logarithms, up to a constant
    last: Tensor | None = None  # [E,B,V] log-probabilities of the next token

    def reserve(self, num_positions: int) -> None:
        for state in self.states:
            state.reserve(num_positions)

    def select(self, rows: Tensor) -> "_BtmState":
        return _BtmState(
            [s.select(rows) for s in self.states],
            self.weights[:, rows],
            None if self.last is None else self.last[:, rows],
        )


@dataclass
class BtmReader:
    """Branch-Train-Merge over dense models: the posterior given the text so far mixes what they
    say of the next token. Source: see `merge.baselines.btm_weights`."""

    readers: Sequence[Reader]
    temperature: float = 1.0
    switch_rate: float = 0.0  # 0 to below 1
    shares_prefixes: bool = True
    kept_tokens: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.switch_rate < 1 and self.temperature > 0
        self.tokenizer = self.readers[0].tokenizer
        self.max_seq_len = min(r.max_seq_len for r in self.readers)
        self.start = self.readers[0].start

    def new_state(self) -> Any:
        return _BtmState(
            [r.new_state() for r in self.readers],
            torch.zeros(len(self.readers), 1, dtype=torch.float64),
        )

    def read(self, ids: Tensor, state: Any, *, is_token: Tensor | None = None, last: int) -> Tensor:
        B, T = ids.shape
        real = torch.ones_like(ids, dtype=torch.bool) if is_token is None else is_token
        # where the word on each token was said: 0 is before this call, then its positions
        place = torch.arange(T) * torch.cat([real[:, :1], real[:, :-1]], dim=1)  # [B,T]
        rows, seen, ends = torch.arange(B)[:, None], [], []
        for e, reader in enumerate(self.readers):
            said = reader.read(ids, state.states[e], is_token=is_token, last=T)
            said = said.log_softmax(-1).cpu()  # [B,T,V]
            first = torch.zeros_like(said[:, :1]) if state.last is None else state.last[e][:, None]
            here = torch.cat([first, said], dim=1)[rows, place, ids]  # [B,T]
            seen.append(here.double() * real)
            ends.append(said[:, -last:].clone())  # else all of `said` would stay
        weights = self._weigh(state.weights, torch.stack(seen) / self.temperature, real)  # [E,B,T]
        said = torch.stack(ends)  # [E,B,last,V]
        state.weights, state.last = weights[:, :, -1], said[:, :, -1].clone()
        shares = weights[:, :, -last:].log_softmax(0)
        return (said + shares[..., None].float()).logsumexp(0)

    def _weigh(self, before: Tensor, seen: Tensor, real: Tensor) -> Tensor:
        """Weights [E,B,T] after each token, from those before and the evidence [E,B,T]."""
        if self.switch_rate == 0:
            return before[:, :, None] + seen.cumsum(-1)
        stay = math.log1p(-self.switch_rate)
        move = math.log(self.switch_rate / len(self.readers))
        found, now = [], before
        for t in range(seen.shape[-1]):
            moved = (now + seen[:, :, t]).log_softmax(0) + stay
            now = torch.where(real[:, t], moved.logaddexp(torch.full_like(moved, move)), now)
            found.append(now)
        return torch.stack(found, dim=-1)


# --- a model for each text ------------------------------------------------------------------------


@dataclass
class _Group:
    reader: Reader
    rows: list[int]  # of the batch
    state: Any


@dataclass
class _ChosenState:
    """Each row's ids, as long as nothing is chosen, or a place in a group."""

    opening: Any  # the opening's state of the rows that wait, in their order
    waiting: dict[int, list[int]]  # ids read so far
    groups: list[_Group] = field(default_factory=list)

    def reserve(self, num_positions: int) -> None:
        for state in (self.opening, *(g.state for g in self.groups)):
            if state is not None:
                state.reserve(num_positions)

    def select(self, rows: Tensor) -> "_ChosenState":
        chosen = rows.tolist()

        def places(of: Sequence[int]) -> tuple[list[int], Tensor]:
            """Rows of the new batch that are among `of`, and their places in it."""
            here = [i for i, row in enumerate(chosen) if row in of]
            return here, torch.tensor([of.index(chosen[i]) for i in here], dtype=torch.long)

        here, at = places(list(self.waiting))
        found = _ChosenState(
            self.opening.select(at) if here else None,
            {i: list(self.waiting[chosen[i]]) for i in here},
        )
        for g in self.groups:
            here, at = places(g.rows)
            if here:
                found.groups.append(_Group(g.reader, here, g.state.select(at)))
        return found


@dataclass
class PromptReader:
    """One model for each text, chosen by its first P tokens; `opening` predicts before.

    Of a text that is cut, these tokens stay. Where a text begins with examples, it is they that
    choose. `choose` is given the ids of the start and the prompt, and is asked again for the same
    ids: let it remember. Source: paper §4.3, prompt routing and weighted soup.
    """

    opening: Reader
    choose: Callable[[tuple[int, ...]], Reader]
    prompt_tokens: int
    shares_prefixes: bool = True

    def __post_init__(self) -> None:
        self.tokenizer = self.opening.tokenizer
        self.max_seq_len = self.opening.max_seq_len
        self.start = self.opening.start
        self.kept_tokens = len(self.start) + self.prompt_tokens

    def new_state(self) -> Any:
        return _ChosenState(self.opening.new_state(), {0: []})

    def read(self, ids: Tensor, state: Any, *, is_token: Tensor | None = None, last: int) -> Tensor:
        real = torch.ones_like(ids, dtype=torch.bool) if is_token is None else is_token
        parts: list[tuple[list[int], Tensor]] = []  # rows, and what is said of their ends
        for g in state.groups:
            parts.append((g.rows, _read(g.reader, ids[g.rows], g.state, real[g.rows], last)))
        if state.waiting:
            parts += self._read_waiting(ids, state, real, last)
        said = parts[0][1].new_empty(len(ids), last, parts[0][1].shape[-1])
        for rows, of in parts:  # later ones go over earlier ones
            said[rows, last - of.shape[1] :] = of
        return said

    def _read_waiting(
        self, ids: Tensor, state: Any, real: Tensor, last: int
    ) -> list[tuple[list[int], Tensor]]:
        """Read on in the texts of which nothing is chosen, and choose where the prompt is whole."""
        needed = len(self.start) + self.prompt_tokens
        waiting = list(state.waiting)
        for row in waiting:
            state.waiting[row] += ids[row][real[row]].tolist()
        spoken = {row: len(state.waiting[row]) - needed + 1 for row in waiting}  # by the chosen one
        parts = []
        opened = [row for row in waiting if spoken[row] < last]
        if opened:
            if len(opened) < len(waiting):
                state.opening = state.opening.select(
                    torch.tensor([waiting.index(r) for r in opened])
                )
            parts.append(
                (opened, _read(self.opening, ids[opened], state.opening, real[opened], last))
            )
        groups: dict[int, _Group] = {}
        for row in [row for row in waiting if spoken[row] > 0]:
            reader = self.choose(tuple(state.waiting[row][:needed]))
            groups.setdefault(id(reader), _Group(reader, [], None)).rows.append(row)
        for g in groups.values():
            texts = [state.waiting.pop(row) for row in g.rows]
            longest = max(map(len, texts))
            whole = torch.tensor([[0] * (longest - len(t)) + t for t in texts])
            is_real = torch.arange(longest) >= longest - torch.tensor([[len(t)] for t in texts])
            g.state = g.reader.new_state().select(torch.zeros(len(texts), dtype=torch.long))
            end = min(last, max(spoken[row] for row in g.rows))
            said = _read(g.reader, whole, g.state, is_real, end)
            parts += [
                ([row], said[j : j + 1, -min(last, spoken[row]) :]) for j, row in enumerate(g.rows)
            ]
            state.groups.append(g)
        still = [i for i, row in enumerate(opened) if row in state.waiting]
        if still and len(still) < len(opened):
            state.opening = state.opening.select(torch.tensor(still))
        return parts


def _read(reader: Reader, ids: Tensor, state: Any, real: Tensor, last: int) -> Tensor:
    return reader.read(ids, state, is_token=None if bool(real.all()) else real, last=last)


def log_likelihood(reader: Reader, ids: Sequence[int]) -> float:
    """Nats of ids after the first, each given those before; 0 if there are none."""
    if len(ids) < 2:
        return 0.0
    state = reader.new_state().select(torch.zeros(1, dtype=torch.long))
    with torch.inference_mode():
        said = reader.read(torch.tensor([ids[:-1]]), state, last=len(ids) - 1).log_softmax(-1)
    return float(said[0].cpu().double().gather(-1, torch.tensor(ids[1:])[:, None]).sum())
