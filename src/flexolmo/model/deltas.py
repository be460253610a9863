"""Owners' own matrices and deltas to the anchor's, each weighed by its owner's share.

An owner has a matrix of its own in place of the anchor's W [out,in], or a delta B A to it with
B [out,r] and A [r,in], named as in the LoRA paper (arXiv 2106.09685). With an owner off neither is
read at all, so that what is left is the anchor's, bit for bit. Knows experts only by their place
in the mixture.

B batch, T positions, D d_model, V vocabulary, r rank.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexolmo.model.router import slot
from flexolmo.model.transformer import Embedding, FeedForward, ForwardContext, Linear, pieces

PIECE_NUMBERS = 131072  # activations of one expert worked on at a time when nothing is learnt


@dataclass(frozen=True)
class Share:
    """Weight of one expert at each position, and the sequences for which it is on.

    Positions are those of [B,T,.], or all N = B*T of them as rows [N,.] or as columns [.,N]. With
    `rows`, the expert reads only the positions that picked it.
    """

    weight: Tensor  # [B,T,1], [N,1] or [1,N], in the model's dtype
    enabled: Tensor | None  # of the same shape; None: on for every sequence
    rows: tuple[Any, ...] | None = None  # where in such a tensor; None: all

    def pick(self, x: Tensor) -> Tensor:
        """Positions of `x` that the expert reads; [B,T,.], [N,.] or [.,N]."""
        return x if self.rows is None else x[self.rows]

    def add(self, total: Tensor, value: Tensor) -> Tensor:
        """`total` + weight * `value`; unchanged, bit for bit, where the expert is off."""
        if self.rows is not None:
            return self._scatter(total, self.pick(self.weight) * value)
        return self._where_on(torch.addcmul(total, self.weight, value), total)

    def add_delta(self, total: Tensor, low: Tensor, lora_b: Tensor) -> Tensor:
        """`total` + weight * `low` @ B^T; unchanged, bit for bit, where the expert is off."""
        more = F.linear(self.pick(self.weight) * low, lora_b)
        if self.rows is not None:
            return self._scatter(total, more)
        return self._where_on(total + more, total)

    def weigh(self, value: Tensor) -> Tensor:
        """weight * `value` [B,T,.]; zero where nothing was read."""
        if self.rows is None:
            return self.weight * value
        nothing = value.new_zeros(*self.weight.shape[:-1], value.shape[-1])
        return self._scatter(nothing, self.pick(self.weight) * value)

    def at_last(self, count: int) -> "Share | None":
        """Share of the last `count` positions of [B,T,.]; None if it reads none of them."""
        last = self._turned(lambda x: x[:, -count:])
        if self.rows is None:
            return last
        skipped = self.weight.shape[1] - count
        here = self.rows[1] >= skipped
        rows = (self.rows[0][here], self.rows[1][here] - skipped)
        return replace(last, rows=rows) if len(rows[0]) else None

    def by_row(self) -> "Share":
        """The share of [B,T,.] with every position as a row."""
        return self._turned(lambda x: x.flatten(0, 1))

    def at_rows(self, part: slice) -> "Share":
        """The share of some of the rows [N,.]."""
        return self._turned(lambda x: x[part])

    def by_column(self) -> "Share":
        """The share of [B,T,.] with every position as a column."""
        rows = self.rows and (slice(None), self.rows[0] * self.weight.shape[1] + self.rows[1])
        return replace(self._turned(lambda x: x.reshape(1, -1).contiguous()), rows=rows)

    def at_columns(self, part: slice) -> "Share":
        """The share of some of the columns [.,N]; all of them if only some positions are read."""
        return self if self.rows else self._turned(lambda x: x[:, part])

    def _turned(self, turn: Callable[[Tensor], Tensor]) -> "Share":
        return Share(turn(self.weight), None if self.enabled is None else turn(self.enabled))

    def _scatter(self, total: Tensor, value: Tensor) -> Tensor:
        total = total.clone()
        total[self.rows] += value
        return total

    def _where_on(self, new: Tensor, old: Tensor) -> Tensor:
        return new if self.enabled is None else torch.where(self.enabled, new, old)


def shares_of(
    weights: Tensor, active: Tensor | None, dtype: torch.dtype, *, keep_all: bool, is_sparse: bool
) -> list[Share | None]:
    """Every expert's share from mixture weights [B,T,E] and mask [B,E]; None: it is not run.

    An expert is left out if it is off for the whole batch or, unless `keep_all`, if no token
    picked it.
    """
    found: list[Share | None] = []
    for e in range(weights.shape[-1]):
        weight = weights[..., e : e + 1].to(dtype)
        enabled = None if active is None else active[:, e, None, None].expand_as(weight)
        if enabled is not None and bool(enabled.all()):
            enabled = None
        rows = weight[..., 0].nonzero(as_tuple=True) if is_sparse else None
        idle = (
            (enabled is not None and not bool(enabled.any()))
            or (not keep_all and not bool((weight > 0).any()))
            or (rows is not None and not len(rows[0]))
        )
        found.append(None if idle else Share(weight, enabled, rows))
    return found


class LowRank(nn.Module):
    """B A of one expert, zero at the start."""

    def __init__(self, d_in: int, d_out: int, rank: int):
        super().__init__()
        self.lora_a = nn.Parameter(torch.zeros(rank, d_in))
        self.lora_b = nn.Parameter(torch.zeros(d_out, rank))


class _Deltas(nn.Module):
    """Owners' versions of one matrix [out,in], by expert: a whole matrix, or a delta."""

    def __init__(self, shape: tuple[int, int], ranks: Mapping[str, int], names: Sequence[str]):
        super().__init__()
        d_out, d_in = shape
        for name, rank in ranks.items():
            own = Linear(d_in, d_out) if rank >= d_in else LowRank(d_in, d_out, rank)
            self.add_module(slot(name), own)
        self.places = {n: names.index(n) for n in ranks}

    def of(self, name: str) -> Linear | LowRank:
        return cast(Linear | LowRank, getattr(self, slot(name)))

    def low(self, ctx: ForwardContext | None) -> list[tuple[Share, LowRank]]:
        """Deltas of the experts that are run, with their shares."""
        return [(s, m) for s, m in self._present(ctx) if isinstance(m, LowRank)]

    def whole(self, ctx: ForwardContext | None) -> list[tuple[Share, Linear]]:
        """Whole matrices of the experts that are run, with their shares."""
        return [(s, m) for s, m in self._present(ctx) if isinstance(m, Linear)]

    def rest(self, ctx: ForwardContext | None) -> Share | None:
        """Share left to the anchor's matrix, exactly 1 where whole matrices are off; None: all."""
        assert ctx is not None and ctx.shares is not None, "deltas need one routing for all layers"
        places = tuple(
            p
            for n, p in self.places.items()
            if ctx.shares[p] is not None and isinstance(self.of(n), Linear)
        )
        if not places:
            return None
        if places not in ctx.rests:  # the same for most matrices
            assert ctx.weights is not None
            rest, one = torch.ones_like(ctx.weights[..., :1]), ctx.shares[places[0]]  # [B,T,1]
            for place in places:
                rest = rest - ctx.weights[..., place : place + 1]
            # less is the rounding of weights that sum to 1
            rest = rest.where(rest > 4 * torch.finfo(rest.dtype).eps, rest.new_zeros(()))
            rows = None if one.rows is None else rest[..., 0].nonzero(as_tuple=True)
            ctx.rests[places] = Share(rest.to(one.weight.dtype), None, rows)
        return cast(Share, ctx.rests[places])

    def mix(
        self,
        x: Tensor,
        ctx: ForwardContext | None,
        weight: Tensor,
        read: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """`read(x, .)` of the anchor's `weight` and of owners' whole matrices, by their shares."""
        if (rest := self.rest(ctx)) is None:
            return read(x, weight)
        y = rest.weigh(read(rest.pick(x), weight))
        for share, own in self.whole(ctx):
            y = share.add(y, read(share.pick(x), own.weight))
        return y

    def _present(self, ctx: ForwardContext | None) -> Iterator[tuple[Share, Linear | LowRank]]:
        assert ctx is not None
        for name, place in self.places.items():
            share = ctx.shares[place]
            if share is not None:
                yield share, self.of(name)


class DeltaLinear(Linear):
    """A matrix of the anchor's with the whole matrices and deltas of owners."""

    def __init__(self, base: nn.Linear, ranks: Mapping[str, int], names: Sequence[str]):
        """`ranks` maps each expert that changes it to its rank, whole from in_features on;
        `names` are all experts."""
        super().__init__(base.in_features, base.out_features)
        self.deltas = _Deltas((base.out_features, base.in_features), ranks, names)

    def forward(self, x: Tensor, ctx: ForwardContext | None = None) -> Tensor:
        y = self.deltas.mix(x, ctx, self.weight, F.linear)
        for share, delta in self.deltas.low(ctx):
            y = share.add_delta(y, F.linear(share.pick(x), delta.lora_a), delta.lora_b)
        return y

    def parts(self, x: Tensor, ctx: ForwardContext) -> list[Tensor]:
        """Factors as in `Linear.parts`; zeros for sequences that have the expert off.

        If some have it off, what is not finite in its matrix counts as 0: theirs is 0 times it.
        """
        rest = self.deltas.rest(ctx)
        found = [x if rest is None else rest.weight * x, self.weight]
        for share, own in self.deltas.whole(ctx):
            found += [_where_on(share, share.weight * x), _finite(share, own.weight)]
        for share, delta in self.deltas.low(ctx):
            low = F.linear(x, delta.lora_a)
            found += [_where_on(share, share.weight * low), _finite(share, delta.lora_b)]
        return found


def _where_on(share: Share, value: Tensor) -> Tensor:
    """`value`, zero where the expert is off; not by a product, as it may be infinite there."""
    if share.enabled is None:
        return value
    return torch.where(share.enabled, value, value.new_zeros(()))


def _finite(share: Share, matrix: Tensor) -> Tensor:
    """`matrix`, without NaN and infinities if the expert is off for some sequences."""
    if share.enabled is None:
        return matrix
    return torch.where(matrix.isfinite(), matrix, matrix.new_zeros(()))


class DeltaEmbedding(Embedding):
    """The anchor's embedding [V,D] with the whole matrices and deltas of owners."""

    def __init__(self, base: nn.Embedding, ranks: Mapping[str, int], names: Sequence[str]):
        """Arguments are those of `DeltaLinear`."""
        super().__init__(base.num_embeddings, base.embedding_dim)
        self.deltas = _Deltas((base.num_embeddings, base.embedding_dim), ranks, names)

    def forward(self, ids: Tensor, ctx: ForwardContext | None = None) -> Tensor:
        x = self.deltas.mix(ids, ctx, self.weight, F.embedding)
        for share, delta in self.deltas.low(ctx):
            x = share.add_delta(x, F.embedding(share.pick(ids), delta.lora_b), delta.lora_a.T)
        return x


class LowRankFeedForward(nn.Module):
    """The anchor's FFN with a delta on each matrix: an expert at a fraction of the size.

    Source: FlexMoRE (arXiv 2602.08818).
    """

    def __init__(self, d_model: int, d_ff: int, rank: int):
        super().__init__()
        self.gate_proj = LowRank(d_model, d_ff, rank)
        self.up_proj = LowRank(d_model, d_ff, rank)
        self.down_proj = LowRank(d_ff, d_model, rank)

    def read(self, x: Tensor) -> Tensor:
        """A x of the gate's and the up matrix's deltas, [2r,n] from [..., D]."""
        both = torch.cat([self.gate_proj.lora_a, self.up_proj.lora_a])
        return both @ x.flatten(0, -2).T

    def inner(self, low: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        """Inner activations [F,n]; `low` [2r,n] is from `read`, gate and up [F,n] the anchor's."""
        low_gate, low_up = low.chunk(2)
        gate = torch.addmm(gate, self.gate_proj.lora_b, low_gate)
        up = torch.addmm(up, self.up_proj.lora_b, low_up)
        if torch.is_grad_enabled():
            return F.silu(gate) * up
        return F.silu(gate, inplace=True).mul_(up)


def mix_low_rank(
    h: Tensor,
    public: FeedForward,
    share: Share | None,
    experts: Sequence[tuple[Share, LowRankFeedForward]],
) -> Tensor:
    """Weighted sum of the outputs of `public` (None: no share) and `experts` for h [..., D].

    The anchor's gate and up products are computed once for all, and its down product once for the
    weighted sum, being linear. Experts work in columns, one for each position, because thin
    matrices multiply up to twice as fast so, and in pieces that fit a processor's cache.
    Source: ours.
    """
    gate = public.gate_proj(h)  # [...,F]
    up = public.up_proj(h)  # [...,F]
    inner = torch.zeros_like(gate)  # input of the down product
    if share is not None:
        inner = share.add(inner, F.silu(share.pick(gate)) * share.pick(up))
    lows: list[list[Tensor]] = [[] for _ in experts]
    if experts:
        columns = [
            (own.by_column(), expert, expert.read(own.pick(h)))  # reads [2r,N or picked]
            for own, expert in experts
        ]
        flat = [x.flatten(0, -2) for x in (inner, gate, up)]  # [N,F] each
        sums = []
        for part in _column_pieces(flat[0], experts):
            total, g, u = (x[part].T.contiguous() for x in flat)  # [F,n] each
            for (column, expert, read), low in zip(columns, lows, strict=True):
                here = column.at_columns(part)
                value = expert.inner(read[:, part], here.pick(g), here.pick(u))
                low.append(expert.down_proj.lora_a @ value)  # [r,n]
                total = here.add(total, value)
            sums.append(total.T)
        inner = torch.cat(sums).view_as(inner)
    y = public.down_proj(inner)  # [...,D]
    for (own, expert), low in zip(experts, lows, strict=True):
        found = torch.cat(low, dim=1).T  # [N or picked,r]
        y = own.add_delta(
            y, found if own.rows else found.reshape(*h.shape[:-1], -1), expert.down_proj.lora_b
        )
    return y


def _column_pieces(x: Tensor, experts: Sequence[tuple[Share, nn.Module]]) -> list[slice]:
    if torch.is_grad_enabled() or not x.is_cpu or any(share.rows for share, _ in experts):
        return [slice(None)]
    return pieces(len(x), max(16, PIECE_NUMBERS // x.shape[1]))
