"""Products by oneDNN, which on AMD's processors is faster than MKL, torch's choice there too.

Source: ours.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from flexolmo.model.tiles import is_amd

IS_FASTER = is_amd() and torch.backends.mkldnn.is_available()
MANY_PRODUCTS = 2**24  # of numbers, below which calling costs more than multiplying saves


def pack(weight: Tensor) -> Tensor:
    """A copy of `weight` [out,in] in oneDNN's own layout."""
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return found


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x [...,in] times `weight` [out,in], packed or not, transposed: [...,out]. No gradients."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return found


# an operator of its own, as torch's compiler takes the weights of oneDNN's for constants
@torch.library.custom_op("flexolmo::multiply", mutates_args=())
def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    return multiply(x, weight)


@_multiply.register_fake
def _of_shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear`, by the library that is fastest."""
    # compiled for any number of rows, as each side of such a bound would be a program of its own
    is_large = torch.compiler.is_compiling() or x.numel() * weight.shape[0] >= MANY_PRODUCTS
    if IS_FASTER and is_large:
        is_plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
        if is_plain and not torch.is_autocast_enabled("cpu"):
            return cast(Tensor, _Linear.apply(x, weight))  # type: ignore[no-untyped-call]
    return F.linear(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return cast(Tensor, (_multiply if torch.compiler.is_compiling() else multiply)(x, weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, weight = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        grad_x = linear(grad, weight.T) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:  # laid out as the matrix
            rows = x.flatten(0, -2)
            grad = grad.flatten(0, -2)
            by_columns = weight.stride(0) == 1
            grad_weight = (rows.T @ grad).T if by_columns else grad.T @ rows
        return grad_x, grad_weight

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor) -> Any:
        """All in one product, but where each has a matrix of its own."""
        of_x, of_weight = in_dims
        if of_weight is not None:
            return torch.vmap(F.linear, in_dims)(x, weight), 0
        assert of_x is not None
        return linear(x.movedim(of_x, 0), weight), 0
