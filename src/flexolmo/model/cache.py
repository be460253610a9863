"""Memory of the positions that a model has read, to go on from.

B batch, T positions, S positions read, G key-value heads, C head width, D d_model, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flexolmo.errors import PolicyError


@dataclass
class LayerCache:
    """Keys, values and router context that one layer keeps of earlier positions."""

    keys: Tensor | None = None  # [B,G,room,C], of which the cache's first positions are written
    values: Tensor | None = None  # [B,G,room,C]
    context: Tensor | None = None  # [B,D+1] what a discriminant router goes on from
    is_shared: bool = False  # whether keys and values are read by another cache too

    def append(self, k: Tensor, v: Tensor, start: int, room: int) -> tuple[Tensor, Tensor]:
        """Write keys and values [B,G,T,C] from position `start` on, in memory for at least `room`
        positions; return all so far, [B,G,start+T,C]."""
        end = start + k.shape[2]
        held = 0 if self.keys is None else self.keys.shape[2]
        if held < end or self.is_shared:
            size = max(end, room, 2 * held if held < end and start else 0)
            self.keys, self.values = (
                _with_room(old, new, start, size) for old, new in ((self.keys, k), (self.values, v))
            )
            self.is_shared = False
        assert self.keys is not None and self.values is not None
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v
        return self.keys[:, :, :end], self.values[:, :, :end]

    def select(self, rows: Tensor, length: int) -> "LayerCache":
        """The layer of the sequences `rows` [n], of which `length` positions are written."""
        keys, values = (
            None if x is None else _written_of(x, rows, length) for x in (self.keys, self.values)
        )
        context = None if self.context is None else _rows_of(self.context, rows)
        return LayerCache(keys, values, context, is_shared=keys is not None and self._is_one())

    def _is_one(self) -> bool:
        return self.keys is not None and len(self.keys) == 1


def _with_room(old: Tensor | None, new: Tensor, start: int, size: int) -> Tensor:
    """Memory for `size` positions of keys or values, the first `start` those of `old`."""
    found = new.new_empty(*new.shape[:2], size, new.shape[3])
    if old is not None:
        found[:, :, :start] = old[:, :, :start]
    return found


def _rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """Sequences `rows` [n] of x; the same memory if there is one to choose from."""
    return x.expand(len(rows), *x.shape[1:]) if len(x) == 1 else x[rows.to(x.device)]


def _written_of(x: Tensor, rows: Tensor, length: int) -> Tensor:
    """`_rows_of` keys or values, of which `length` positions are written. Copies have the same room
    behind these; shared memory is left by whoever goes on, so it is without."""
    if len(x) == 1:
        return _rows_of(x[:, :, :length], rows)
    found = x.new_empty(len(rows), *x.shape[1:])
    found[:, :, :length] = x[:, :, :length][rows.to(x.device)]
    return found


@dataclass
class Cache:
    """Everything needed to go on decoding a batch; keyed by nothing, so never shared."""

    layers: list[LayerCache]
    num_positions: int = 0
    room: int = 0  # positions for which memory is taken at once
    evidence: tuple[Tensor, Tensor] | None = None  # see router.EvidenceState
    is_token: Tensor | None = None  # [B,S] False on left padding; None: all are tokens
    document: Tensor | None = None  # [B,S] number of the document, under a document mask
    active: Tensor | None = None  # [B,E] expert mask of all positions; None: all loaded experts

    def reserve(self, num_positions: int) -> None:
        """Take memory for so many positions in all, when the next ones are read."""
        self.room = max(self.room, num_positions)

    def select(self, rows: Tensor) -> "Cache":
        """A cache of the sequences `rows` [n] of this one, in that order; any may come several
        times. What either reads on is not seen by the other."""

        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else _rows_of(x, rows)

        evidence = self.evidence
        if evidence is not None:
            evidence = (evidence[0][rows.to(evidence[0].device)], evidence[1][:, rows])
        return Cache(
            [layer.select(rows, self.num_positions) for layer in self.layers],
            self.num_positions,
            self.room,
            evidence,
            of(self.is_token),
            of(self.document),
            of(self.active),
        )

    def keep_mask(self, active: Tensor | None) -> Tensor | None:
        """The expert mask for the positions to come: that of the first ones, or `active` [B,E] if
        there are none. PolicyError if `active` is another, for a switched-off expert's keys and
        values would stay."""
        if self.num_positions == 0 and self.active is None:
            self.active = active
        elif active is not None and active is not self.active:
            first = torch.ones_like(active) if self.active is None else self.active
            if not torch.equal(active, first):
                raise PolicyError(
                    "The experts that are on changed after a cache's first positions, which other "
                    "experts have computed: begin again with a new cache."
                )
        return self.active
