"""Spans of many texts, read side by side in one step, and memory for what each text has read.

A span is a block of a prompt or one token of an answer. Attention and router compute each span by
itself, in a shape that depends on its own text alone; everything else keeps the bits of a row
whatever rows stand beside it. So a text's numbers depend on no other text, nor on when its spans
are read. Source: ours.

n tokens of a step, each a row; E experts, H heads, G key-value heads, C head width, P positions in
memory, S positions that a text has read, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from flexolmo.model.router import EvidenceRouter, EvidenceState

BLOCK = 32  # positions of a prompt that are read in one piece


class Reads(Protocol):
    """Tokens that one step of a model reads, each a row, and memory for their keys and values."""

    ids: Tensor  # [n,1]
    positions: Tensor  # [n,1]
    active: Tensor  # [n,E] bool, experts that are on for each token's text

    @property
    def batch_rows(self) -> int | None:
        """Rows that any step may have, by which products keep their bits; None: they need not."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Values that the rows attend to, [n,1,H*C], from q [n,H,1,C] and from k and v [n,G,1,C],
        which are put into memory."""

    def follow(self, router: EvidenceRouter) -> Tensor:
        """Log weights [n,1,E] by an evidence router."""


@dataclass(eq=False)
class Span:
    """Consecutive tokens of one text: a block of its prompt, a prompt's end, or one token."""

    ids: Sequence[int]
    start: int  # position of the first of them in the text
    place: int  # in memory, of the text's first position
    active: Tensor  # [E] bool, experts that are on for the text
    evidence: EvidenceState | None = None  # that the router goes on from; None: a new text
    before: "Span | None" = None  # that ends where this one starts, in the same step
    document: int = 0  # first position that is seen from the one before the span
    row: int = 0  # of the step, of the first token
    after: EvidenceState | None = None  # as `evidence`, once the span has been read


class Spans:
    """Tokens that one step reads: those of `spans`, each a row."""

    def __init__(self, spans: Sequence[Span], memory: Tensor, batch_rows: int, eos: int | None):
        """`memory` [L,2,G,P,C] of keys and values; `batch_rows` is as many rows as any step may
        have, one number for all steps; an id `eos` starts a document, which sees none before it."""
        # those of which the router reads several at once first
        self.spans = sorted(spans, key=lambda s: not _is_one(s))
        self.num_ones = sum(map(_is_one, spans))
        self.memory = memory
        self.batch_rows = batch_rows
        self.lengths = [len(s.ids) for s in self.spans]
        positions: list[int] = []
        places: list[int] = []
        for span in self.spans:
            span.row = len(positions)
            own = range(span.start, span.start + len(span.ids))
            positions += own
            places += [span.place + p for p in own]
        device = memory.device
        self.ids = torch.tensor([i for s in self.spans for i in s.ids], device=device)[:, None]
        self.positions = torch.tensor(positions, device=device)[:, None]  # [n,1]
        self.places = torch.tensor(places, device=device)  # [n] in memory
        active = torch.stack([s.active for s in self.spans])
        self.active = active.repeat_interleave(torch.tensor(self.lengths), 0).to(device)  # [n,E]
        # of every layer, keys and values [1,G,S,C] of what each span sees
        pages = memory.flatten(0, 1)[:, None]
        self._seen = [
            pages.narrow(3, s.place + s.document, s.start + len(s.ids) - s.document).unbind()
            for s in self.spans
        ]
        self._masks = [self._mask(s, eos) if len(s.ids) > 1 else None for s in self.spans]

    def _mask(self, span: Span, eos: int | None) -> Tensor:
        """Bias [T,S] of a span's attention to the positions from its document's start on."""
        first, firsts = span.document, []
        for position, token in enumerate(span.ids, span.start):
            first = position if token == eos else first
            firsts.append(first)
        end = span.start + len(span.ids)
        key = torch.arange(span.document, end)
        is_seen = key <= torch.arange(span.start, end)[:, None]
        is_seen &= key >= torch.tensor(firsts)[:, None]
        bias = torch.zeros(is_seen.shape, dtype=self.memory.dtype)
        return bias.masked_fill_(~is_seen, -torch.inf).to(self.memory.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Values that the rows attend to, [n,1,H*C], from q [n,H,1,C] and from k and v [n,G,1,C],
        which are put into memory."""
        keys, values = self.memory[layer, :, None]  # [1,G,P,C] each
        keys.index_copy_(2, self.places, k.transpose(0, 2))
        values.index_copy_(2, self.places, v.transpose(0, 2))
        H, G = q.shape[1], k.shape[1]
        found = []
        for own, seen, mask in zip(q.split(self.lengths), self._seen, self._masks, strict=True):
            # of one token, heads that share keys stand as positions do: so these are read once
            own = own.view(1, G, H // G, -1) if mask is None else own.transpose(0, 2)  # [1,H,T,C]
            seen_keys, seen_values = seen[2 * layer], seen[2 * layer + 1]
            y = F.scaled_dot_product_attention(
                own, seen_keys, seen_values, attn_mask=mask, enable_gqa=own.shape[1] != G
            )
            found.append(y.reshape(1, -1) if mask is None else y[0].transpose(0, 1).flatten(1))
        return torch.cat(found)[:, None]

    def follow(self, router: EvidenceRouter) -> Tensor:
        """Log weights [n,1,E] by an evidence router; says of every span what is `after` it."""
        ids = self.ids[:, 0]
        before = ids.roll(1)  # a span stands behind the one before it
        start = ids.new_tensor([router.eos_token_id])
        firsts = [s for s in self.spans if s.before is None]
        ends = [start if s.evidence is None else s.evidence[0] for s in firsts]
        before[[s.row for s in firsts]] = torch.cat(ends)
        likelihood = router.likelihood(router.evidence(before, ids))  # [S,n]
        is_fresh = (ids == router.eos_token_id).cpu().numpy()
        ones = self.spans[: self.num_ones]
        found = []
        for spans in [ones] * bool(ones) + [[s] for s in self.spans[self.num_ones :]]:
            length = len(spans[0].ids)
            rows = slice(spans[0].row, spans[0].row + len(spans) * length)
            past = [s.before.after if s.before else s.evidence for s in spans]
            known = [p[1] for p in past if p is not None]
            logs, weights = router.follow(
                likelihood[:, rows].reshape(len(likelihood), length, len(spans)),
                is_fresh[rows].reshape(length, len(spans)),
                self.active[rows][::length],
                torch.cat(known, dim=1) if known else None,
            )
            last = ids[rows][length - 1 :: length]
            for i, span in enumerate(spans):
                span.after = (last[i : i + 1], weights[:, i : i + 1])
            found.append(logs.flatten(0, 1))
        return torch.cat(found)[:, None].to(ids.device)


def _is_one(span: Span) -> bool:
    """True for a token that goes on with a text of earlier steps."""
    return len(span.ids) == 1 and span.evidence is not None
