"""Linear algebra of compression: low rank by truncated SVD, narrow FFNs by pruning columns.

Knows tensors and text; records and training are in `train.shrink`.

D d_model, W the new width, r rank.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

PRUNING_WINDOWS = 32  # windows of text that columns are weighed on
CURVATURE_WINDOWS = 64  # windows of text that second moments are taken over
LEAST_MOMENT = 1e-4  # smallest second moment, as a fraction of their mean


@dataclass(frozen=True)
class Curvature:
    """Cost of changing one matrix, as second moments over an owner's text.

    To second order, and if the two are independent, a change E of the matrix costs
    trace(outputs E inputs E^T) / 2. None stands for the identity. Source: K-FAC (arXiv
    1503.05671), with the text's own next tokens in place of drawn ones (the empirical Fisher):
    one pass less, and the cut was good enough.
    """

    inputs: Tensor | None = None  # [in,in] of the matrix's inputs
    outputs: Tensor | None = None  # [out,out], or [out], of the loss's gradient by its outputs


def truncate(
    matrix: Tensor, rank: int, curvature: Curvature | None = None
) -> tuple[Tensor, Tensor]:
    """Factors A [r,in] and B [out,r] of the closest, or cheapest, matrix B A of that rank.

    Without `curvature` the closest (Eckart-Young), with it the one whose difference costs the loss
    least. Each of the r directions is shared evenly between A and B. Source: weighing by inputs as
    in SVD-LLM (arXiv 2403.07378); by both sides ours.
    """
    _check_rank(rank, matrix.shape)
    curvature = curvature or Curvature()
    read, unread = _root(curvature.inputs)
    made, unmade = _root(curvature.outputs)
    u, s, v = torch.linalg.svd(made(read(matrix.double().T).T), full_matrices=False)
    a = unread((s[:rank, None] * v[:rank]).T).T
    b = unmade(u[:, :rank])
    balance = (b.norm(dim=0) / a.norm(dim=1).clamp(min=1e-300)).sqrt()
    return (
        (balance[:, None] * a).to(matrix.dtype).contiguous(),
        (b / balance.clamp(min=1e-300)).to(matrix.dtype).contiguous(),
    )


def _check_rank(rank: int, shape: Sequence[int]) -> None:
    if not 1 <= rank <= min(shape):
        raise ConfigError(
            f"Rank {rank} is not between 1 and {min(shape)}, the smaller side of a "
            f"{shape[0]} x {shape[1]} matrix."
        )


def _root(moments: Tensor | None) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Products with the symmetric root of `moments` and with its inverse, for [n,.] tensors."""
    if moments is None:
        return (lambda x: x), (lambda x: x)
    values = moments.double()
    vectors: Tensor | None = None
    if moments.dim() == 2:
        values, vectors = torch.linalg.eigh(values)
    least = LEAST_MOMENT * float(values.mean())  # or it has no inverse
    root = values.clamp(min=least or 1.0).sqrt()[:, None]

    def times(factor: Tensor) -> Callable[[Tensor], Tensor]:
        def product(x: Tensor) -> Tensor:
            return factor * x if vectors is None else vectors @ (factor * (vectors.T @ x))

        return product

    return times(root), times(1 / root)


def truncate_product(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of `truncate`, for the product B A of b [out,r] and a [r,in], never written out.

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


def compress_rank(
    anchor: Anchor,
    tensors: Mapping[str, Tensor],
    rank: int,
    delta_ranks: int | Mapping[str, int] | None = None,
    curvature: Mapping[str, Curvature] | None = None,
) -> dict[str, Tensor]:
    """Cut the expert's FFN to a delta of `rank` to the anchor's; all its tensors come back.

    What it changes in attention, embedding and head is cut to `delta_ranks`: one number, or by
    `attention_rank`, `embedding_rank`, `head_rank`; what is not named is left as it is.
    `curvature`, as `measure_curvature` gives it, makes the better cut.
    Raises ConfigError if the FFN is not of the anchor's width, or of that rank or less already.
    """
    groups = {
        "embedding_rank": ["embed_tokens"],
        "head_rank": ["lm_head"],
        "attention_rank": [
            f"layers.{i}.{part}"
            for i in range(anchor.config.num_layers)
            for part in ATTENTION_PARTS
        ],
    }
    if not isinstance(delta_ranks, Mapping):
        delta_ranks = {} if delta_ranks is None else dict.fromkeys(groups, delta_ranks)
    if (least := min([rank, *delta_ranks.values()])) < 1:
        raise ConfigError(f"Found rank {least}; ranks are 1 or more.")
    if unknown := sorted(set(delta_ranks) - set(groups)):
        raise ConfigError(f"Found ranks of {', '.join(unknown)}; expected {', '.join(groups)}.")
    found = dict(tensors)
    curvature = curvature or {}

    def cut(name: str, rank: int) -> None:
        base = cast(Tensor, anchor_matrix(anchor, name)).cpu()
        difference = found.pop(f"{name}.weight") - base
        known = curvature.get(name)
        if name == "embed_tokens":  # a row is what it makes of a token
            b, a = truncate(difference.T, min(rank, *base.shape), known)
            a, b = a.T, b.T
        else:
            a, b = truncate(difference, min(rank, *base.shape), known)
        found[f"{name}.lora_a"], found[f"{name}.lora_b"] = _widen(a, b, rank)

    def cut_again(name: str, rank: int) -> None:
        found[f"{name}.lora_a"], found[f"{name}.lora_b"] = truncate_product(
            found[f"{name}.lora_a"], found[f"{name}.lora_b"], rank
        )

    for i, block in enumerate(anchor.model.layers):
        for part in FFN_PARTS:
            name = f"layers.{i}.{part}"
            shape = getattr(block.mlp, part).weight.shape
            whole = found.get(f"{name}.weight")
            if whole is not None and whole.shape != shape:
                raise ConfigError(
                    f"The expert's FFN is {list(whole.shape)} in {name}, the "
                    f"anchor's {list(shape)}: only an FFN of the anchor's "
                    "width has a difference to cut. Give a width, not a rank."
                )
            if whole is not None:
                _check_rank(rank, shape)
                cut(name, rank)
            elif (old := len(found[f"{name}.lora_a"])) <= rank:
                raise ConfigError(
                    f"The expert's FFN is a delta of rank {old} already: "
                    f"give a rank below that, not {rank}."
                )
            else:
                cut_again(name, rank)
    for group, delta_rank in delta_ranks.items():
        for name in groups[group]:
            if f"{name}.weight" in found and delta_rank < anchor.config.d_model:
                cut(name, delta_rank)
            elif len(found.get(f"{name}.lora_a", ())) > delta_rank:
                cut_again(name, delta_rank)
    return found


def measure_curvature(pair: MixtureModel, name: str, data: TokenSet) -> dict[str, Curvature]:
    """The curvature of each whole matrix of an expert, float64, on its owner's training text.

    Keys as `layers.0.gate_proj`. The embedding has outputs alone (weighing its rows by how often
    they are read cut no better), the head their diagonal. In attention, embedding and head the
    gradient is by the mixture's outputs, of which the expert has its share.
    """
    own = expert_tensors(pair, name)
    readers: dict[str, nn.Module] = {"lm_head": pair.lm_head}
    for i, (block, mixture) in enumerate(zip(pair.layers, pair.mixtures(), strict=True)):
        for room, parts in ((mixture.expert(name), FFN_PARTS), (block.self_attn, ATTENTION_PARTS)):
            readers |= {f"layers.{i}.{part}": getattr(room, part) for part in parts}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def add(sums: dict[str, Tensor], key: str, x: Tensor, is_diagonal: bool = False) -> None:
        x = x.detach().flatten(0, -2).double()  # [N,.]
        more = (x.square().sum(0) if is_diagonal else x.T @ x).cpu()  # all would fill a GPU
        sums[key] = sums[key].add_(more) if key in sums else more

    def watch(key: str) -> Callable[..., None]:
        def note(_module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
            add(inputs, key, args[0])
            out.register_hook(lambda grad: add(outputs, key, grad, key == "lm_head"))

        return note

    def watch_embedding(_module: Any, _args: Any, out: Tensor) -> Tensor:
        out = out.detach().requires_grad_(True)  # all that follows has gradients, no matrix has
        out.register_hook(lambda grad: add(outputs, "embed_tokens", grad))
        return out

    hooks = [
        module.register_forward_hook(watch(key))
        for key, module in readers.items()
        if f"{key}.weight" in own
    ]
    hooks.append(pair.embed_tokens.register_forward_hook(watch_embedding))
    seq_len = min(256, pair.config.max_seq_len - 1, len(data.splits["train"].tokens) - 1)
    batches = training_batches(data, "train", 1, seq_len, seed=0)
    count = 0
    for step in range(min(CURVATURE_WINDOWS, batches.num_windows)):
        ids = torch.from_numpy(batches.batch(step)).to(pair.device)
        logits = pair(ids[:, :-1]).flatten(0, 1).float()
        F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
        count += len(logits)
    for hook in hooks:
        hook.remove()
    keys = [k for k in (*readers, "embed_tokens") if f"{k}.weight" in own]
    return {
        k: Curvature(inputs[k] / count if k in inputs else None, outputs[k] / count) for k in keys
    }


def prune_width(
    anchor: Anchor, tensors: Mapping[str, Tensor], data: TokenSet, width: int
) -> dict[str, Tensor]:
    """Cut the expert's FFNs to the `width` columns that matter most to `data`.

    A column's importance is the mean of |activation| on training text, read with these FFNs in
    the anchor's frame, times the norm of its down row. Source: ours, after structured pruning.
    """
    if "layers.0.gate_proj.weight" not in tensors:
        raise ConfigError(
            "The expert's FFN is a low-rank delta to the anchor's, which has no "
            "columns of its own to leave out. Give a rank, not a width."
        )
    d_ff = len(tensors["layers.0.gate_proj.weight"])
    if not 1 <= width <= d_ff:
        raise ConfigError(f"Width {width} is not between 1 and {d_ff}, the FFN's own.")
    model = copy.deepcopy(anchor.model).eval()  # in training hooks on `down_proj` see nothing
    sums = [torch.zeros(d_ff, dtype=torch.float64) for _ in model.layers]

    def watch(total: Tensor) -> Callable[..., None]:
        def add(_module: Any, args: tuple[Tensor]) -> None:  # returns nothing: it only looks
            total.add_(args[0].cpu().abs().double().flatten(0, -2).sum(0))

        return add

    for i, block in enumerate(model.layers):
        ffn = cast(FeedForward, block.mlp)
        for part in FFN_PARTS:
            getattr(ffn, part).weight = torch.nn.Parameter(
                tensors[f"layers.{i}.{part}.weight"].to(model.device), requires_grad=False
            )
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
                1 if part == "down_proj" else 0, kept
            ).contiguous()
    return found
