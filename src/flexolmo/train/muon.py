"""Muon as torch has it, with matrices of one shape orthogonalised together.

Its state and names are those of `torch.optim.Muon`, which tests hold it against.

n matrices of one shape [a,b].
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexolmo.model.parallel import at_owners, count, local

BATCH_NUMBERS = 2**18  # of matrices orthogonalised together, which a processor's cache holds


def product_dtype(device: torch.device) -> torch.dtype:
    """Precision of the orthogonalisation: bfloat16 as in torch, float32 on processors that have
    no products in it and imitate them, several times slower than in float32."""
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        if not any(has.get(name, False) for name in ("amx_bf16", "avx512_bf16")):
            return torch.float32
    return torch.bfloat16


def orthogonalise(x: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Matrices x [n,a,b] with their singular values brought near 1, by Newton-Schulz iteration.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
    """
    x = x / x.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    first, second, third = coefficients
    single = len(x) == 1
    if single:
        x = x[0]
    add_product = torch.addmm if single else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        update = add_product(gram, gram, gram, beta=second, alpha=third)
        x = add_product(x, update, x, beta=first)
    if single:
        x = x[None]
    return x.mT if is_tall else x


class Muon(torch.optim.Muon):
    """torch.optim.Muon, faster for many small matrices."""

    dtype: torch.dtype | None = None  # of its products; none: as the device is best at

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step; parameters without a gradient stay."""
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape, p.device].append(p)
            for (shape, device), found in alike.items():
                size = max(1, BATCH_NUMBERS // shape.numel()) * count()
                dtype = self.dtype or product_dtype(device)
                for start in range(0, len(found), size):
                    self._move(found[start : start + size], group, dtype)

    def _move(self, parameters: list[Tensor], group: dict[str, Any], dtype: torch.dtype) -> None:
        """Move `parameters` of one shape by a step in products of this `dtype`."""
        grads = [local(p.grad) for p in parameters if p.grad is not None]
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [local(self.state[p]["momentum_buffer"]) for p in parameters]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, momenta, group["momentum"])
        stacked = torch.stack([x.to(dtype) for x in ahead])  # [n,a,b], or the rows held here

        def turn(x: Tensor) -> Tensor:
            return orthogonalise(x, group["ns_coefficients"], group["ns_steps"], group["eps"])

        rows, columns = parameters[0].shape
        moves = at_owners(stacked, rows, turn)
        held = [local(p) for p in parameters]
        rate = group["lr"] * max(1.0, rows / columns) ** 0.5
        if group["weight_decay"]:
            torch._foreach_mul_(held, 1 - group["lr"] * group["weight_decay"])
        for p, move in zip(held, moves, strict=True):
            p.add_(move, alpha=-rate)
