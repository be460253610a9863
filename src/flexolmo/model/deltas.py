"""Owners' own matrices and deltas to the anchor's, each weighed by its owner's share.

An owner has a matrix of its own in place of the anchor's W [out,in], or a delta B A to it with
B [out,r] and A [r,in], named as in the LoRA paper (arXiv 2106.09685). Either is read only at the
positions that picked the owner; with an owner off what is left is the anchor's, bit for bit. Knows
experts only by their place in the mixture.

B batch, T positions, N = B*T, n positions that picked an expert, D d_model, V vocabulary, r rank.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexolmo.model.blend import Blend
from flexolmo.model.router import slot
from flexolmo.model.tiles import product, silu
from flexolmo.model.transformer import Embedding, FeedForward, ForwardContext, Linear, Part

Fill = Callable[[int], int] | None  # see `ForwardContext.fill`


@dataclass(frozen=True)
class Share:
    """One expert's part of a batch: the positions that picked it, and its weight at each."""

    weight: Tensor  # [n,1] in the model's dtype
    num_rows: int  # N
    rows: Tensor | None = None  # [n] of the N positions; None: all
    reads: Tensor | None = None  # [n or more] rows, with others to fill the last tile; None: all

    def pick(self, x: Tensor) -> Tensor:
        """The rows of x [N,...] that the expert reads."""
        return x if self.reads is None else x.index_select(0, self.reads)

    def pieces(self, most: int) -> "list[Share]":
        """The same in parts of at most so many rows, a multiple of those that `fill` counts in;
        whole if all positions picked the expert."""
        if self.rows is None or self.reads is None or len(self.rows) <= most:
            return [self]
        parts = zip(*(x.split(most) for x in (self.weight, self.rows, self.reads)), strict=True)
        return [Share(weight, self.num_rows, rows, reads) for weight, rows, reads in parts]

    def weigh(self, value: Tensor) -> Tensor:
        """weight * `value` [n,.], whose rows come of those picked."""
        return self.weight * value[: self.weight.shape[0]]

    def put(self, total: Tensor | None, value: Tensor) -> Tensor:
        """`total` [N,.] (None: nothing yet) + `value` [n,.] at the positions that picked the
        expert; no bit changes elsewhere. May write into `total`."""
        if self.rows is None:
            return value if total is None else total + value
        if total is None:  # -0 is what changes no number when added to it
            total = value.new_full((self.num_rows, value.shape[-1]), -0.0)
        return total.index_add_(0, self.rows, value.to(total.dtype))  # products may be in half

    def add(self, total: Tensor | None, value: Tensor) -> Tensor:
        """`put` of `weigh`."""
        return self.put(total, self.weigh(value))


def share_of(weight: Tensor, rows: Tensor, fill: Fill, dtype: torch.dtype) -> Share:
    """The share of an expert with `weight` [N], picked at positions `rows` [n]."""
    return _share(weight[rows].to(dtype)[:, None], rows, len(weight), fill)


def _share(weight: Tensor, rows: Tensor, num_rows: int, fill: Fill) -> Share:
    """The share of an expert with `weight` [n,1] at positions `rows` [n] of N."""
    if len(rows) == num_rows:
        return Share(weight, num_rows)
    reads = rows
    if fill is not None:
        reads = F.pad(rows, (0, fill(len(rows)) - len(rows)))
    return Share(weight, num_rows, rows, reads)


def shares_of(
    weights: Tensor, active: Tensor | None, fill: Fill, dtype: torch.dtype, is_dense: bool = False
) -> list[Share | None]:
    """Every expert's share from mixture weights [B,T,E] and mask [B,E]; None: it is not run.

    It is run if some position picked it; in training, with `fill` None, if it is on for some
    sequence, for all learn. With `is_dense`, all positions pick all, which need not be looked up.
    """
    weights = weights.flatten(0, 1).T  # [E,N]
    if is_dense:
        return [Share(w[:, None].to(dtype), len(w)) for w in weights]
    if fill is not None and weights.shape[1] == 1:  # one token, in a quarter of the time
        ones = weights.to(dtype).split(1)
        picks = weights[:, 0].tolist()  # NaN is seen, not passed over
        return [Share(w, 1) if pick != 0 else None for w, pick in zip(ones, picks, strict=True)]
    picked = weights != 0  # NaN is seen, not passed over
    counts: list[int] = picked.sum(1).tolist()
    chosen = weights[picked].to(dtype)[:, None].split(counts)  # expert by expert
    rows = picked.nonzero()[:, 1].split(counts)
    runs = [n > 0 for n in counts]
    if fill is None:
        runs = [True] * len(counts) if active is None else active.any(0).tolist()
    return [
        _share(*one, weights.shape[1], fill) if is_run else None
        for one, is_run in zip(zip(chosen, rows, strict=True), runs, strict=True)
    ]


class LowRank(nn.Module):
    """B A of one expert, zero at the start; laid out as a `Linear`."""

    def __init__(self, d_in: int, d_out: int, rank: int):
        super().__init__()
        self.lora_a = nn.Parameter(torch.zeros(d_in, rank).T)
        self.lora_b = nn.Parameter(torch.zeros(rank, d_out).T)


Matrix = Linear | Embedding


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

    def low(self, ctx: ForwardContext) -> list[tuple[Share, LowRank]]:
        """Deltas of the experts that are run, with their shares."""
        return [(s, m) for s, m in self._present(ctx) if isinstance(m, LowRank)]

    def whole(self, ctx: ForwardContext) -> list[tuple[Share, Linear]]:
        """Whole matrices of the experts that are run, with their shares."""
        return [(s, m) for s, m in self._present(ctx) if isinstance(m, Linear)]

    def rest(self, ctx: ForwardContext) -> Share | None:
        """Share left to the anchor's matrix, exactly 1 where whole matrices are off; None: the
        anchor's is not run. All of it if there are none."""
        places = tuple(
            p
            for n, p in self.places.items()
            if ctx.shares[p] is not None and isinstance(self.of(n), Linear)
        )
        if places not in ctx.rests:  # the same for most matrices
            assert ctx.weights is not None
            weights = ctx.weights.flatten(0, 1)  # [N,E]
            rest = torch.ones_like(weights[:, 0])
            for place in places:
                rest = rest - weights[:, place]
            # less is the rounding of weights that sum to 1
            rest = rest.where(rest > 4 * torch.finfo(rest.dtype).eps, rest.new_zeros(()))
            rows = rest.nonzero()[:, 0]
            found = None
            if len(rows) or ctx.batch_rows is None:  # as in `shares_of`
                found = share_of(rest, rows, ctx.fill, ctx.dtype)
            ctx.rests[places] = found
        return cast(Share | None, ctx.rests[places])

    def mix(
        self, x: Tensor, ctx: ForwardContext, base: Matrix, read: Callable[[Tensor, Matrix], Tensor]
    ) -> Tensor:
        """`read(x, .)` of the anchor's matrix and of owners' whole ones, by their shares."""
        whole = self.whole(ctx)
        if not whole:
            return read(x, base)
        if ctx.blend is not None:
            own_x, public_x = ctx.blend.split(x)
            return cast(Tensor, ctx.blend.join(read(own_x, whole[0][1]), read(public_x, base)))
        rest, y = self.rest(ctx), None
        if rest is not None:
            y = rest.add(y, read(rest.pick(x), base))
        for share, own in whole:
            y = share.add(y, read(share.pick(x), own))
        return cast(Tensor, y)

    def _present(self, ctx: ForwardContext) -> Iterator[tuple[Share, Linear | LowRank]]:
        assert ctx.shares is not None, "deltas need one routing for all layers"
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
        assert ctx is not None
        flat = x.flatten(0, 1)
        if ctx.blend is not None and (whole := self.deltas.whole(ctx)):
            y = ctx.blend.multiply(flat, whole[0][1].weight, self.weight)
        else:
            y = self.mix(flat, ctx, lambda u, m: Linear.read(m, u, ctx))
        return self.add_low(flat, y, ctx).view(*x.shape[:-1], -1)

    def versions(self) -> list[Linear]:
        return [self, *(m for m in self.deltas.children() if isinstance(m, Linear))]

    def mix(self, x: Tensor, ctx: ForwardContext, read: Callable[[Tensor, Any], Tensor]) -> Tensor:
        return self.deltas.mix(x, ctx, self, read)

    def add_low(self, x: Tensor, y: Tensor, ctx: ForwardContext) -> Tensor:
        for share, delta in self.deltas.low(ctx):
            low = product(share.pick(x), delta.lora_a, ctx.batch_rows)
            y = share.add(y, product(low, delta.lora_b, ctx.batch_rows))
        return y

    def parts(self, x: Tensor, ctx: ForwardContext) -> list[Part]:
        """Factors as in `Linear.parts`, of each expert at the positions that picked it alone."""
        flat = x.flatten(0, 1)
        found: list[Part] = [(flat, self.weight, None)]
        if whole := self.deltas.whole(ctx):
            rest = self.deltas.rest(ctx)
            both = [] if rest is None else [(rest, self.weight)]
            both += [(share, own.weight) for share, own in whole]
            found = [(share.weigh(share.pick(flat)), w, share.rows) for share, w in both]
        for share, delta in self.deltas.low(ctx):
            low = F.linear(share.pick(flat), delta.lora_a)
            found.append((share.weigh(low), delta.lora_b, share.rows))
        return sorted(found, key=lambda part: part[2] is not None)  # those of all rows first


class DeltaEmbedding(Embedding):
    """The anchor's embedding [V,D] with the whole matrices and deltas of owners."""

    def __init__(self, base: nn.Embedding, ranks: Mapping[str, int], names: Sequence[str]):
        """Arguments are those of `DeltaLinear`."""
        super().__init__(base.num_embeddings, base.embedding_dim)
        self.deltas = _Deltas((base.num_embeddings, base.embedding_dim), ranks, names)

    def forward(self, ids: Tensor, ctx: ForwardContext | None = None) -> Tensor:
        assert ctx is not None
        flat = ids.flatten()
        x = self.deltas.mix(flat, ctx, self, lambda u, m: F.embedding(u, m.weight))
        for share, delta in self.deltas.low(ctx):
            low = F.embedding(share.pick(flat), delta.lora_b)
            x = share.add(x, product(low, delta.lora_a.T, ctx.batch_rows))
        return x.view(*ids.shape, -1)


class LowRankFeedForward(nn.Module):
    """The anchor's FFN with a delta on each matrix: an expert at a fraction of the size.

    Source: FlexMoRE (arXiv 2602.08818).
    """

    def __init__(self, d_model: int, d_ff: int, rank: int):
        super().__init__()
        self.gate_proj = LowRank(d_model, d_ff, rank)
        self.up_proj = LowRank(d_model, d_ff, rank)
        self.down_proj = LowRank(d_ff, d_model, rank)


def blend_low_rank(
    h: Tensor, public: FeedForward, expert: LowRankFeedForward, blend: Blend
) -> Tensor:
    """Weighted sum of the outputs of `public` and of the expert that learns, for rows h [N,D].

    The anchor's gate and up products serve both. Source: ours.
    """
    own_h, _ = blend.split(h)
    own_gate, public_gate = blend.split(F.linear(h, public.gate_proj.weight))
    own_up, public_up = blend.split(F.linear(h, public.up_proj.weight))

    def add(base: Tensor, x: Tensor, delta: LowRank) -> Tensor:
        return base + F.linear(F.linear(x, delta.lora_a), delta.lora_b)

    inner = F.silu(add(own_gate, own_h, expert.gate_proj)) * add(own_up, own_h, expert.up_proj)
    own = add(F.linear(inner, public.down_proj.weight), inner, expert.down_proj)
    return blend.join(own, F.linear(F.silu(public_gate) * public_up, public.down_proj.weight))


def _union(shares: Sequence[Share], h: Tensor, fill: Fill) -> Share:
    """The share, of weight 1, of the rows of h [N,D] that any of `shares` picks."""
    if any(share.rows is None for share in shares):
        return Share(h.new_ones(len(h), 1), len(h))
    picked = torch.zeros(len(h), dtype=torch.bool, device=h.device)
    for share in shares:
        picked[share.rows] = True
    return share_of(picked, picked.nonzero()[:, 0], fill, h.dtype)


def mix_low_rank(
    h: Tensor,
    total: Tensor | None,
    public: FeedForward,
    share: Share | None,
    experts: Sequence[tuple[Share, LowRankFeedForward]],
    ctx: ForwardContext,
) -> Tensor:
    """`total` [N,D] + weighted sum of the outputs of `public` and `experts` for rows h [N,D].

    The anchor's gate and up products are computed once for all, and its down product once for the
    weighted sum, being linear. Source: ours.
    """
    batch_rows = ctx.batch_rows
    shares = [own for own, _ in experts]
    if share is not None:
        shares.append(share)
    union = _union(shares, h, ctx.fill)
    gate, up = public.gate_and_up(h, ctx)  # [N,F]
    inner: Tensor | None = None  # input of the down product, [N,F]
    if share is not None:
        inner = share.add(None, silu(share.pick(gate)) * share.pick(up))
    lows = []
    for own, expert in experts:
        x = own.pick(h)
        gate_low = product(x, expert.gate_proj.lora_a, batch_rows)  # [n,r]
        up_low = product(x, expert.up_proj.lora_a, batch_rows)  # [n,r]
        own_gate = own.pick(gate) + product(gate_low, expert.gate_proj.lora_b, batch_rows)
        own_up = own.pick(up) + product(up_low, expert.up_proj.lora_b, batch_rows)
        value = silu(own_gate) * own_up  # [n,F]
        lows.append(product(value, expert.down_proj.lora_a, batch_rows))  # [n,r]
        inner = own.add(inner, value)
    y = public.down_proj(cast(Tensor, inner), ctx)  # [N,D]
    total = union.put(total, y if union.rows is None else y.index_select(0, union.rows))
    for (own, expert), low in zip(experts, lows, strict=True):
        total = own.add(total, product(low, expert.down_proj.lora_b, batch_rows))
    return total
