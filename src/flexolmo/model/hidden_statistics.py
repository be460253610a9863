"""Sums over a text's hidden states, and the routers that follow from them in closed form.

What a router reads is the residual stream before each layer's FFN. Sums of it add: an owner takes
its own on its own machines, from the anchor and its text alone.

L layers, R features that a row reads, N tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from flexolmo.errors import DataError
from flexolmo.model.router import DiscriminantSettings, find_texts
from flexolmo.model.transformer import Transformer


def mean_hidden_state(model: Transformer, windows: Iterable[np.ndarray]) -> Tensor:
    """Mean of the last hidden state over token windows, scaled to unit length, float32 [D].

    Stands for the paper's domain embedding (§3.3.2, table 3 row "public hidden state").
    """
    total = torch.zeros(model.config.d_model)
    with torch.no_grad():
        for ids in windows:
            h = model.hidden(torch.from_numpy(np.atleast_2d(ids)))
            total += h.float().sum((0, 1)).cpu()
    return total / total.norm().clamp(min=1e-12)


@dataclass(frozen=True)
class HiddenSums:
    """Sums over the tokens of a text, float64."""

    count: int  # tokens
    total: Tensor  # [L,R] of x
    gram: Tensor  # [L,R,R] of x x^T


def gather(
    model: Transformer, windows: Iterable[np.ndarray], router: DiscriminantSettings | None = None
) -> HiddenSums:
    """The sums over `windows` (ids [T] or [1,T]) of what each layer's router reads in `model`.

    With `router`, what its rows read, end-of-text tokens left out; else the states as they are.
    Raises DataError if not one token is left.
    """
    L, R = len(model.layers), model.config.d_model
    R = R if router is None else router.num_features(R)
    count, seen = 0, list[Tensor]()
    total, gram = (torch.zeros(L, *size, dtype=torch.float64) for size in ((R,), (R, R)))
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        for block in model.layers
        if isinstance(block.mlp, nn.Module)
    ]
    try:
        with torch.inference_mode():
            for window in windows:
                ids = torch.from_numpy(np.atleast_2d(window)).to(model.device)
                keep = torch.ones_like(ids, dtype=torch.bool)  # [1,T]
                seen.clear()
                model.hidden(ids)
                for i, x in enumerate(seen):
                    if router is not None:
                        texts = find_texts(ids, None, model.config.eos_token_id, router)
                        x, keep = texts.features(x, None)[0], ~texts.is_end
                    x = x.cpu()[keep.cpu()].double()  # [N,R]
                    total[i] += x.sum(0)
                    gram[i] += x.T @ x
                count += int(keep.sum())
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise DataError("No token was found to take hidden states of: prepare a larger set.")
    return HiddenSums(count, total, gram)


def discriminant_tensors(
    own: HiddenSums, public: HiddenSums, router: DiscriminantSettings
) -> dict[str, Tensor]:
    """An owner's part of a discriminant router, by name, float32.

    Per layer the log odds that a state is of a Gaussian around the owner's mean rather than
    public's, both with public's covariance S: row S^-1 (m - m_public), offset its product with
    -(m + m_public) / 2. S is drawn towards its diagonal by `shrinkage`.
    """
    mean, base = own.total / own.count, public.total / public.count  # [L,R]
    covariance = public.gram / public.count - base[:, :, None] * base[:, None]  # [L,R,R]
    diagonal = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
    covariance = torch.lerp(covariance, diagonal, router.shrinkage)
    rows = torch.linalg.solve(covariance, mean - base)  # [L,R]
    offsets = -(rows * (mean + base)).sum(-1) / 2  # [L]
    tensors = {}
    for i, (row, offset) in enumerate(zip(rows.float(), offsets.float(), strict=True)):
        tensors[f"layers.{i}.router.weight"] = row[None].clone()
        tensors[f"layers.{i}.router.offset"] = offset[None].clone()
    return tensors
