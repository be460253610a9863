"""A smaller expert from a large one: low rank by truncated SVD, narrow by pruning columns.

Works on the FFN, and by rank on what else the expert changes.

D d_model, W the new width, r rank.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexolmo.data.batches import TokenSet, training_batches
from flexolmo.errors import ConfigError
from flexolmo.model.assemble import anchor_matrix, expert_tensors
from flexolmo.model.checkpoint import Anchor
from flexolmo.model.moe import MixtureModel
from flexolmo.model.shape import ATTENTION_PARTS, FFN_PARTS
from flexolmo.model.transformer import FeedForward

PRUNING_WINDOWS = 32
LEAST_MOMENT = 1e-4  # of the mean one


def truncate(matrix: Tensor, rank: int, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A [r,in] and B [out,r] with B A the closest matrix of that rank (Eckart-Young).

    With `moments`, the mean of x x^T [in,in] over what the matrix reads, the closest in what it
    makes of that: E |(M - B A) x|^2 is least. The singular values are shared evenly between A and
    B. Source: Eckart-Young; weighing by inputs as in SVD-LLM (arXiv 2403.07378).
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ConfigError(f"Rank {rank} is not between 1 and {min(matrix.shape)}, the smaller side "
                          f"of a {matrix.shape[0]} x {matrix.shape[1]} matrix.")
    whole, back = matrix.double(), None
    if moments is not None:
        values, vectors = torch.linalg.eigh(moments.double())
        values = values.clamp(min=LEAST_MOMENT * float(values.mean()))  # or it has no inverse
        whole = whole @ (vectors * values.sqrt()) @ vectors.T
        back = (vectors * values.rsqrt()) @ vectors.T
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    root = s[:rank].sqrt()
    a = root[:, None] * v[:rank]
    return ((a if back is None else a @ back).to(matrix.dtype).contiguous(),
            (u[:, :rank] * root).to(matrix.dtype).contiguous())


def truncate_product(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """As `truncate` of B A, without writing the product out; a [r,in], b [out,r].

    Rows and columns beyond the product's own sides are zero, so that matrices of several shapes
    can have one rank.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    small_a, small_b = truncate(r_b @ r_a.T, min(rank, len(r_b), len(r_a)))
    return _widen((small_a @ q_a.T).to(a.dtype), (q_b @ small_b).to(b.dtype), rank)


def _widen(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    short = rank - len(a)
    return F.pad(a, (0, 0, 0, short)).contiguous(), F.pad(b, (0, short)).contiguous()


def compress_rank(anchor: Anchor, tensors: Mapping[str, Tensor], rank: int,
                  delta_rank: int | None = None, moments: Mapping[str, Tensor] | None = None
                  ) -> dict[str, Tensor]:
    """The expert with its FFN as a delta of `rank` to the anchor's.

    What it changes in attention, embedding and head is cut to `delta_rank` (none: left as it is).
    `moments` of the matrices' inputs, as `measure_moments` gives them, make it the better cut.
    Raises ConfigError if the FFN is not of the anchor's width, or of that rank or less already.
    """
    if rank < 1 or (delta_rank is not None and delta_rank < 1):
        raise ConfigError(f"Found rank {rank if rank < 1 else delta_rank}; ranks are 1 or more.")
    found = dict(tensors)
    for i, block in enumerate(anchor.model.layers):
        for part in FFN_PARTS:
            name, base = f"layers.{i}.{part}", getattr(block.mlp, part).weight
            whole = found.pop(f"{name}.weight", None)
            if whole is None:
                a, b = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
                if len(a) <= rank:
                    raise ConfigError(f"The expert's FFN is a delta of rank {len(a)} already: "
                                      f"give a rank below that, not {rank}.")
                found[f"{name}.lora_a"], found[f"{name}.lora_b"] = truncate_product(a, b, rank)
            elif whole.shape == base.shape:
                found[f"{name}.lora_a"], found[f"{name}.lora_b"] = truncate(
                    whole - base.cpu(), rank, None if moments is None else moments[name])
            else:
                raise ConfigError(f"The expert's FFN is {list(whole.shape)} in {name}, the "
                                  f"anchor's {list(base.shape)}: only an FFN of the anchor's "
                                  "width has a difference to cut. Give a width, not a rank.")
    if delta_rank is None:
        return found
    others = [f"layers.{i}.{part}" for i in range(anchor.config.num_layers)
              for part in ATTENTION_PARTS] + ["embed_tokens", "lm_head"]
    for name in others:
        whole, base = found.get(f"{name}.weight"), anchor_matrix(anchor, name)
        if whole is not None and base is not None and delta_rank < anchor.config.d_model:
            del found[f"{name}.weight"]
            found[f"{name}.lora_a"], found[f"{name}.lora_b"] = _widen(*truncate(
                whole - base.cpu(), min(delta_rank, *whole.shape), (moments or {}).get(name)),
                delta_rank)
        elif len(found.get(f"{name}.lora_a", ())) > delta_rank:
            found[f"{name}.lora_a"], found[f"{name}.lora_b"] = truncate_product(
                found[f"{name}.lora_a"], found[f"{name}.lora_b"], delta_rank)
    return found


def measure_moments(pair: MixtureModel, name: str, data: TokenSet) -> dict[str, Tensor]:
    """Mean of x x^T, float64 [in,in], over what each whole matrix of an expert reads of its owner's
    training text, but for the embedding, which reads none; keys as `layers.0.gate_proj`."""
    sums: dict[str, Tensor] = {}
    hooks, count = [], 0

    def watch(key: str) -> Callable[..., None]:
        def note(_module: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().cpu().flatten(0, -2).double()
            sums[key] = sums.get(key, torch.zeros(x.shape[1], x.shape[1]).double()) + x.T @ x
        return note

    readers: dict[str, nn.Module] = {"lm_head": pair.lm_head}
    for i, (block, mixture) in enumerate(zip(pair.layers, pair.mixtures(), strict=True)):
        for room, parts in ((mixture.expert(name), FFN_PARTS), (block.self_attn, ATTENTION_PARTS)):
            readers |= {f"layers.{i}.{part}": getattr(room, part) for part in parts}
    for key, module in readers.items():
        if f"{key}.weight" in expert_tensors(pair, name):
            hooks.append(module.register_forward_pre_hook(watch(key)))
    seq_len = min(256, pair.config.max_seq_len - 1, len(data.splits["train"].tokens) - 1)
    batches = training_batches(data, "train", 1, seq_len, seed=0)
    with torch.no_grad():
        for step in range(min(PRUNING_WINDOWS, batches.num_windows)):
            ids = np.ascontiguousarray(batches.batch(step)[:, :-1])
            pair(torch.from_numpy(ids))
            count += ids.size
    for hook in hooks:
        hook.remove()
    return {key: total / count for key, total in sums.items()}


def prune_width(anchor: Anchor, tensors: Mapping[str, Tensor], data: TokenSet, width: int
                ) -> dict[str, Tensor]:
    """The expert with the `width` columns of each layer's FFN that matter most to `data`.

    A column's importance is the mean of |activation| on training text, read with these FFNs in
    the anchor's frame, times the norm of its down row. Source: ours, after structured pruning.
    """
    if "layers.0.gate_proj.weight" not in tensors:
        raise ConfigError("The expert's FFN is a low-rank delta to the anchor's, which has no "
                          "columns of its own to leave out. Give a rank, not a width.")
    d_ff = len(tensors["layers.0.gate_proj.weight"])
    if not 1 <= width <= d_ff:
        raise ConfigError(f"Width {width} is not between 1 and {d_ff}, the FFN's own.")
    model = copy.deepcopy(anchor.model)
    sums = [torch.zeros(d_ff, dtype=torch.float64) for _ in model.layers]

    def watch(total: Tensor) -> Callable[..., None]:
        def add(_module: Any, args: tuple[Tensor]) -> None:  # returns nothing: it only looks
            total.add_(args[0].cpu().abs().double().sum((0, 1)))
        return add

    for i, block in enumerate(model.layers):
        ffn = cast(FeedForward, block.mlp)
        for part in FFN_PARTS:
            getattr(ffn, part).weight = torch.nn.Parameter(
                tensors[f"layers.{i}.{part}.weight"].to(model.device), requires_grad=False)
        ffn.down_proj.register_forward_pre_hook(watch(sums[i]))
    seq_len = min(256, anchor.config.max_seq_len - 1, len(data.splits["train"].tokens) - 1)
    batches = training_batches(data, "train", 1, seq_len, seed=0)
    with torch.no_grad():
        for step in range(min(PRUNING_WINDOWS, batches.num_windows)):
            model.hidden(torch.from_numpy(np.ascontiguousarray(batches.batch(step)[:, :-1])))
    found = dict(tensors)
    for i, total in enumerate(sums):
        down = tensors[f"layers.{i}.down_proj.weight"]  # [D,d_ff]
        order = (total * down.double().norm(dim=0)).argsort(descending=True, stable=True)
        kept = order[:width].sort().values  # [W]
        for part in FFN_PARTS:
            whole = tensors[f"layers.{i}.{part}.weight"]
            found[f"layers.{i}.{part}.weight"] = whole.index_select(
                1 if part == "down_proj" else 0, kept).contiguous()
    return found
