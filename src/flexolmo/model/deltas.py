"""What owners change of the anchor's matrices, each weighed by its owner's share.

An owner has a matrix of its own in place of the anchor's W [out,in], or a delta B A to it with
B [out,r] and A [r,in], named as in the LoRA paper (arXiv 2106.09685). With an owner off neither is
read at all, so that what is left is the anchor's, bit for bit. Knows experts only by their place
in the mixture.

B batch, T positions, D d_model, V vocabulary, r rank.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexolmo.model.router import slot
from flexolmo.model.transformer import Embedding, ForwardContext, Linear


@dataclass(frozen=True)
class Share:
    """What one expert has to say at each position, and for which sequences it is on.

    With `rows`, the expert reads only the positions that picked it ([B,T,.] becomes [picked,.]).
    """

    weight: Tensor  # [B,T,1] in the model's dtype
    enabled: Tensor | None  # [B,1,1]; None: on for every sequence
    rows: tuple[Tensor, ...] | None = None  # places in [B,T]; None: all

    def pick(self, x: Tensor) -> Tensor:
        """What the expert reads of `x` [B,T,.]."""
        return x if self.rows is None else x[self.rows]

    def add(self, total: Tensor, value: Tensor) -> Tensor:
        """`total` + weight * `value`; unchanged, bit for bit, where the expert is off."""
        if self.rows is not None:
            return total.index_put(self.rows, self.weight[self.rows] * value, accumulate=True)
        return self._where_on(torch.addcmul(total, self.weight, value), total)

    def add_delta(self, total: Tensor, low: Tensor, lora_b: Tensor) -> Tensor:
        """`total` + weight * `low` @ B^T; unchanged, bit for bit, where the expert is off."""
        more = F.linear(self.pick(self.weight) * low, lora_b)
        if self.rows is not None:
            return total.index_put(self.rows, more, accumulate=True)
        return self._where_on(total + more, total)

    def weigh(self, value: Tensor) -> Tensor:
        """weight * `value` [B,T,.]; zero where nothing was read."""
        if self.rows is None:
            return self.weight * value
        found = value.new_zeros(*self.weight.shape[:-1], value.shape[-1])
        return found.index_put(self.rows, self.weight[self.rows] * value)

    def at_last_position(self) -> "Share":
        """The same for the last position alone, all of whose sequences it reads."""
        return Share(self.weight[:, -1:], self.enabled)

    def at(self, part: slice) -> "Share":
        """The same for some of the positions."""
        return Share(self.weight[:, part], self.enabled)

    def _where_on(self, new: Tensor, old: Tensor) -> Tensor:
        return new if self.enabled is None else torch.where(self.enabled, new, old)


def shares_of(weights: Tensor, active: Tensor | None, dtype: torch.dtype, *, keep_all: bool,
              is_sparse: bool) -> list[Share | None]:
    """Every expert's share from mixture weights [B,T,E] and mask [B,E]; None: it has nothing to do.

    An expert is left out if it is off for the whole batch or, unless `keep_all`, if no token
    picked it.
    """
    found: list[Share | None] = []
    for e in range(weights.shape[-1]):
        enabled = None if active is None else active[:, e, None, None]  # [B,1,1]
        if enabled is not None and bool(enabled.all()):
            enabled = None
        weight = weights[..., e:e + 1].to(dtype)
        rows = weight[..., 0].nonzero(as_tuple=True) if is_sparse else None
        idle = ((enabled is not None and not bool(enabled.any()))
                or (not keep_all and not bool((weight > 0).any()))
                or (rows is not None and not len(rows[0])))
        found.append(None if idle else Share(weight, enabled, rows))
    return found


class LowRank(nn.Module):
    """B A of one expert, zero at the start."""

    def __init__(self, d_in: int, d_out: int, rank: int):
        super().__init__()
        self.lora_a = nn.Parameter(torch.zeros(rank, d_in))
        self.lora_b = nn.Parameter(torch.zeros(d_out, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_a), self.lora_b)

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """`total` + B A x in one pass over the sum."""
        low = F.linear(x, self.lora_a).flatten(0, -2)  # [N,r]
        return torch.addmm(total.flatten(0, -2), low, self.lora_b.T).view_as(total)


class _Deltas(nn.Module):
    """What owners have of one matrix [out,in], by expert: all of it, or a delta."""

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
        """Deltas of the experts that have something to say, with their shares."""
        return [(s, m) for s, m in self._present(ctx) if isinstance(m, LowRank)]

    def whole(self, ctx: ForwardContext | None) -> list[tuple[Share, Linear]]:
        """Whole matrices of the experts that have something to say, with their shares."""
        return [(s, m) for s, m in self._present(ctx) if isinstance(m, Linear)]

    def rest(self, ctx: ForwardContext | None) -> Share | None:
        """What whole matrices leave to the anchor's, exactly 1 where they are off; None: all."""
        whole = self.whole(ctx)
        if not whole:
            return None
        assert ctx is not None and ctx.weights is not None
        rest = torch.ones_like(ctx.weights[..., :1])  # [B,T,1] float32
        for name, place in self.places.items():
            if ctx.shares[place] is not None and isinstance(self.of(name), Linear):
                rest = rest - ctx.weights[..., place:place + 1]
        # less is the rounding of weights that sum to 1
        rest = rest.where(rest > 4 * torch.finfo(rest.dtype).eps, rest.new_zeros(()))
        rows = None if whole[0][0].rows is None else rest[..., 0].nonzero(as_tuple=True)
        return Share(rest.to(whole[0][0].weight.dtype), None, rows)

    def mix(self, x: Tensor, ctx: ForwardContext | None, weight: Tensor,
            read: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`read(x, .)` of the anchor's `weight` and of owners' whole matrices, by their shares."""
        if (rest := self.rest(ctx)) is None:
            return read(x, weight)
        y = rest.weigh(read(rest.pick(x), weight))
        for share, own in self.whole(ctx):
            y = share.add(y, read(share.pick(x), own.weight))
        return y

    def _present(self, ctx: ForwardContext | None) -> Iterator[tuple[Share, Linear | LowRank]]:
        assert ctx is not None and ctx.shares is not None, "deltas need one routing for all layers"
        for name, place in self.places.items():
            share = ctx.shares[place]
            if share is not None:
                yield share, self.of(name)


class DeltaLinear(Linear):
    """A matrix of the anchor's, and what owners have in its place or add to it."""

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
        """As in `Linear`; sequences for which an expert is off get zeros of it."""
        rest = self.deltas.rest(ctx)
        found = [x if rest is None else rest.weight * x, self.weight]
        for share, own in self.deltas.whole(ctx):
            found += [_where_on(share, share.weight * x), own.weight]
        for share, delta in self.deltas.low(ctx):
            found += [_where_on(share, share.weight * F.linear(x, delta.lora_a)), delta.lora_b]
        return found


def _where_on(share: Share, value: Tensor) -> Tensor:
    """`value`, zero where the expert is off; not by a product, as it may be infinite there."""
    if share.enabled is None:
        return value
    return torch.where(share.enabled, value, value.new_zeros(()))


class DeltaEmbedding(Embedding):
    """The anchor's embedding [V,D], and what owners have in its place or add to it."""

    def __init__(self, base: nn.Embedding, ranks: Mapping[str, int], names: Sequence[str]):
        """As for `DeltaLinear`."""
        super().__init__(base.num_embeddings, base.embedding_dim)
        self.deltas = _Deltas((base.num_embeddings, base.embedding_dim), ranks, names)

    def forward(self, ids: Tensor, ctx: ForwardContext | None = None) -> Tensor:
        x = self.deltas.mix(ids, ctx, self.weight, F.embedding)
        for share, delta in self.deltas.low(ctx):
            x = share.add_delta(x, F.embedding(share.pick(ids), delta.lora_b), delta.lora_a.T)
        return x


class LowRankFeedForward(nn.Module):
    """The anchor's FFN with a delta on each matrix: an expert at a fraction of the size.

    Run fused: the anchor's gate and up products are computed once for all such experts, and its
    down product once for their weighted sum, being linear. Source: FlexMoRE (arXiv 2602.08818);
    the fusion is ours.
    """

    def __init__(self, d_model: int, d_ff: int, rank: int):
        super().__init__()
        self.gate_proj = LowRank(d_model, d_ff, rank)
        self.up_proj = LowRank(d_model, d_ff, rank)
        self.down_proj = LowRank(d_ff, d_model, rank)

    def inner(self, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        """What the down products read, [B,T,F]; gate and up [B,T,F] are the anchor's."""
        gate, up = self.gate_proj.add_to(gate, x), self.up_proj.add_to(up, x)
        if torch.is_grad_enabled():
            return F.silu(gate) * up
        return F.silu(gate, inplace=True).mul_(up)
