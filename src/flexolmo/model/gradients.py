"""Gradients of a layer's parts written by hand, which keep less memory for the way back.
Source: ours.

n rows, D d_model, F d_ff.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexolmo.model.onednn import linear


class Normalise(torch.autograd.Function):
    """x [...,D] over the root of its mean square, times a weight [D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = (length.square() / x.shape[-1] + eps).rsqrt()  # [...,1]
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        (grad,) = grads
        wide = x.to(scale.dtype)
        weighed = grad * weight
        along = (weighed * wide).sum(-1, keepdim=True) * scale.pow(3) / -x.shape[-1]  # [...,1]
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = ((grad * wide).mul_(scale)).flatten(0, -2).sum(0)
        return weighed.mul_(scale).addcmul_(wide, along).to(x.dtype), grad_weight, None


class GatedDown(torch.autograd.Function):
    """silu(gate) * up, [n,F] each, times a matrix [D,F]: [n,D], with the bits of its three steps.

    Keeps two tensors as wide as the FFN for the way back, where the three steps would keep four.
    Gradients have none of their own.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return linear(F.silu(gate).mul_(up), down)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, down = ctx.saved_tensors
        (grad,) = grads
        inner_grad = linear(grad, down.T)  # [n,F]
        gate_grad = torch.ops.aten.silu_backward(inner_grad * up, gate)
        opened = F.silu(gate)
        up_grad = inner_grad.mul_(opened)
        down_grad = None
        if ctx.needs_input_grad[2]:  # laid out as the matrix
            inner = opened.mul_(up)
            by_columns = down.stride(0) == 1
            down_grad = (inner.T @ grad).T if by_columns else grad.T @ inner
        return gate_grad, up_grad, down_grad
