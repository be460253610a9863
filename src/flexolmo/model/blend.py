"""Training of one owner's expert beside the anchor: which positions each of the two reads.

The router gives most of an owner's text to the owner alone, and an expert may be trained without
the anchor altogether. So the expert reads all positions, and what both say is put together only at
those where the anchor has weight too; gradients go the same way back, with nothing as long as the
batch in between. Source: ours.

N positions of a batch, n positions at which the anchor's matrix is read.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from flexolmo.model.onednn import linear

MOST_IDLE = 1 / 16  # of positions that the expert may read in vain, as picking others costs as much


@dataclass(frozen=True)
class Blend:
    """The two experts' rows of a batch, and their weights."""

    own_weight: Tensor  # [N,1] of the expert that learns
    own_rows: Tensor | None  # [.] that it reads; None: all
    public_weight: Tensor  # [n,1]
    public_rows: Tensor  # [n] that the anchor's matrices read
    is_alone: bool = False  # True: the expert reads all, with a weight of 1, and the anchor nothing

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of x [N,.] that the expert reads, and those that the anchor does."""
        if self.is_alone:
            return x, x[:0]
        return cast(tuple[Tensor, Tensor], _Split.apply(x, self.own_rows, self.public_rows))  # type: ignore[no-untyped-call]

    def multiply(self, x: Tensor, own: Tensor, public: Tensor) -> Tensor:
        """`join` of the products of `split` with matrices [out,in], [N,out]; no gradient of the
        anchor's."""
        if self.is_alone:
            return linear(x, own)
        kept = (self.own_weight, self.own_rows, self.public_weight, self.public_rows)
        return cast(Tensor, _Multiply.apply(x, own, public, *kept))  # type: ignore[no-untyped-call]

    def join(self, own: Tensor, public: Tensor) -> Tensor:
        """Weighted sum [N,.] of what the two say at the rows of `split`."""
        if self.is_alone:
            return own
        kept = (self.own_weight, self.own_rows, self.public_weight, self.public_rows)
        return cast(Tensor, _Join.apply(own, public, *kept))  # type: ignore[no-untyped-call]


def blend_of(weights: Tensor, dtype: torch.dtype) -> Blend:
    """The blend for weights [B,T,2] of the anchor and the expert that learns."""
    public, own = weights.flatten(0, 1).unbind(-1)  # [N] each
    own_rows: Tensor | None = own.nonzero()[:, 0]
    public_rows = public.nonzero()[:, 0]
    if own_rows is not None and len(own_rows) >= (1 - MOST_IDLE) * len(own):
        own_rows = None
    public_weight = public.index_select(0, public_rows)[:, None].to(dtype)
    return Blend(own[:, None].to(dtype), own_rows, public_weight, public_rows)


def alone(num_rows: int, dtype: torch.dtype, device: torch.device) -> Blend:
    """The blend of an expert that reads all positions, and an anchor that reads none."""
    own = torch.ones(num_rows, 1, dtype=dtype, device=device)
    nothing = torch.empty(0, dtype=torch.long, device=device)
    return Blend(own, None, own[:0], nothing, is_alone=True)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, own_rows: Tensor | None, public_rows: Tensor) -> Any:
        ctx.save_for_backward(own_rows, public_rows)
        ctx.num_rows = len(x)
        own = x.view_as(x) if own_rows is None else x.index_select(0, own_rows)
        return own, x.index_select(0, public_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        own_rows, public_rows = ctx.saved_tensors
        own, public = grads
        if own_rows is not None:
            own = _put(own, own_rows, ctx.num_rows)
        return own.index_add(0, public_rows, public), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        own: Tensor,
        public: Tensor,
        own_weight: Tensor,
        own_rows: Tensor | None,
        public_weight: Tensor,
        public_rows: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(own_weight, own_rows, public_weight, public_rows)
        if own_rows is not None:
            own = _put(own, own_rows, len(own_weight))
        # where the anchor has no weight, the expert has all of it
        mine = own_weight.index_select(0, public_rows).to(own.dtype)
        both = mine * own.index_select(0, public_rows) + public_weight.to(own.dtype) * public
        return own.index_copy(0, public_rows, both)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        own_weight, own_rows, public_weight, public_rows = ctx.saved_tensors
        (grad,) = grads
        at_public = grad.index_select(0, public_rows)
        mine = own_weight.index_select(0, public_rows).to(grad.dtype)
        own = grad.index_copy(0, public_rows, mine * at_public)
        if own_rows is not None:
            own = own.index_select(0, own_rows)
        return own, public_weight.to(grad.dtype) * at_public, None, None, None, None


class _Multiply(torch.autograd.Function):
    """Product whose results and gradients are changed in place at the anchor's rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        own: Tensor,
        public: Tensor,
        own_weight: Tensor,
        own_rows: Tensor | None,
        public_weight: Tensor,
        public_rows: Tensor,
    ) -> Tensor:
        ctx.dtypes = (x.dtype, own.dtype)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            own = own.to(dtype)
            public = public.to(dtype)
        mine = own_weight.index_select(0, public_rows).to(x.dtype)
        public_weight = public_weight.to(x.dtype)
        ctx.save_for_backward(x, own, public, mine, own_rows, public_weight, public_rows)
        y = linear(_pick(x, own_rows), own)
        if own_rows is not None:
            y = _put(y, own_rows, len(x))
        said = linear(x.index_select(0, public_rows), public)
        both = mine * y.index_select(0, public_rows) + public_weight * said
        return y.index_copy_(0, public_rows, both)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, own, public, mine, own_rows, public_weight, public_rows = ctx.saved_tensors
        (grad,) = grads
        at_public = grad.index_select(0, public_rows)
        at_own = _pick(grad.index_copy(0, public_rows, mine * at_public), own_rows)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(at_own, own.T)
            if own_rows is not None:
                grad_x = _put(grad_x, own_rows, len(x))
            grad_x = grad_x.index_add_(0, public_rows, linear(public_weight * at_public, public.T))
            grad_x = grad_x.to(ctx.dtypes[0])
        grad_own = (at_own.T @ _pick(x, own_rows)).to(ctx.dtypes[1])
        return grad_x, grad_own, None, None, None, None, None


def _pick(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _put(x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """x [.,.] at `rows` of a tensor of `num_rows`, zero elsewhere."""
    return x.new_zeros(num_rows, x.shape[-1]).index_copy(0, rows, x)
