"""The loss of a language model, without all logits at once.

B batch, T positions, N = B*T, V vocabulary.
"""

from typing import Any, cast

import torch
from torch import Tensor

from flexolmo.model.onednn import linear
from flexolmo.model.transformer import Transformer

# Logits held at a time: as many as a processor's cache holds; on a GPU so many that the gradient
# of the head, which each chunk reads and writes whole, costs little beside the products.
CHUNK_NUMBERS = {"cpu": 2**21, "cuda": 2**28}


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy of logits sum_j u_j w_j^T, in pieces, so that [N,V] never exists.

    Each u_j [n,.] stands for all N positions or for `rows` of them, and its products are made for
    those alone. Gradients are found on the way forward. Source: ours.
    """

    @staticmethod
    def forward(
        ctx: Any, targets: Tensor, chunk: int, rows: list[Tensor | None], *factors: Tensor
    ) -> Tensor:
        ctx.grads = [
            torch.zeros_like(f) if needed else None
            for f, needed in zip(factors, ctx.needs_input_grad[3:], strict=True)
        ]
        dtype, device = factors[0].dtype, targets.device.type
        if not torch.amp.is_autocast_available(device):  # such as torch's meta device
            device = "cpu"
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            inputs = [u.to(dtype) for u in factors[::2]]
            matrices = [w.to(dtype) for w in factors[1::2]]
            total = targets.new_zeros((), dtype=torch.float32)
            pieces = [_pieces(at, len(targets), chunk) for at in rows]
            for wanted, *read in zip(targets.split(chunk), *pieces, strict=True):
                total += _chunk_loss(wanted[:, None], read, inputs, matrices, ctx.grads)
        return total

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # so that autograd takes them without a copy
        return (None, None, None, *(None if g is None else g.mul_(scale[0]) for g in grads))


Piece = tuple[slice, Tensor | None]


def _pieces(at: Tensor | None, num_rows: int, chunk: int) -> list[Piece]:
    """The part of a u_j that stands in each chunk, and its places there, int64; None: all of them.

    `at` are the ascending positions of u_j's rows among `num_rows`; None: it has a row for each.
    """
    starts = range(0, num_rows, chunk)
    if at is None:
        return [(slice(start, start + chunk), None) for start in starts]
    edges = torch.arange(0, num_rows + chunk, chunk, device=at.device)
    ends = torch.searchsorted(at, edges).tolist()  # a GPU is waited for once, not for each chunk
    spans = zip(starts, ends[:-1], ends[1:], strict=True)
    return [(slice(first, last), at[first:last] - start) for start, first, last in spans]


def _chunk_loss(
    wanted: Tensor,
    read: list[Piece],
    inputs: list[Tensor],
    matrices: list[Tensor],
    grads: list[Tensor | None],
) -> Tensor:
    """Loss of one chunk, whose targets are `wanted` [c,1]; its gradients are added to `grads`."""
    logits: Tensor | None = None  # [c,V]
    for u, w, (part, here) in zip(inputs, matrices, read, strict=True):
        if here is None:
            logits = linear(u[part], w) if logits is None else logits.addmm_(u[part], w.T)
        else:
            if logits is None:
                logits = u.new_zeros(len(wanted), len(w))
            logits.index_add_(0, here, linear(u[part], w))
    assert logits is not None
    log_probs = logits.log_softmax(-1, dtype=torch.float32)
    loss = -log_probs.gather(1, wanted).sum()
    if any(g is not None for g in grads):
        grad = log_probs.exp_()  # softmax, [c,V]
        grad.scatter_add_(1, wanted, grad.new_full(wanted.shape, -1.0))
        grad = grad.to(logits.dtype)
        for j, (part, here) in enumerate(read):
            own = grad if here is None else grad.index_select(0, here)  # [.,V]
            grad_u, grad_w = grads[2 * j], grads[2 * j + 1]
            if grad_u is not None:
                grad_u[part] = linear(own, matrices[j].T)
            if grad_w is not None and grad_w.dtype == own.dtype:
                grad_w.addmm_(own.T, inputs[j][part])
            elif grad_w is not None and grad_w.is_cpu:
                grad_w += own.T @ inputs[j][part]
            elif grad_w is not None:  # by columns, as the matrix lies: a GPU adds that faster
                grad_w += (inputs[j][part].T @ own).T
    return loss


def loss_chunk(vocab_size: int, device: str) -> int:
    """Positions that are held against the vocabulary at a time on such a device."""
    return max(128, CHUNK_NUMBERS.get(device, CHUNK_NUMBERS["cpu"]) // vocab_size)


def language_model_loss(
    model: Transformer, ids: Tensor, *, chunk: int | None = None, **options: Any
) -> Tensor:
    """Mean loss in nats per token of ids[:,1:] given what stands before; ids [B,T+1].

    `chunk` positions at a time are held against the vocabulary; none: see `loss_chunk`.
    """
    ids = ids.to(model.device)
    targets = ids[:, 1:].flatten()  # [N]
    x, ctx = model.stream(ids[:, :-1], **options)
    parts = model.lm_head.parts(x, ctx)
    if chunk is None:
        chunk = loss_chunk(model.config.vocab_size, model.device.type)
    factors = [f for u, w, _ in parts for f in (u, w)]
    rows = [at for _, _, at in parts]
    total = _ChunkedLoss.apply(targets, chunk, rows, *factors)  # type: ignore[no-untyped-call]
    return cast(Tensor, total) / len(targets)
