"""Export of the checkpoint that stock transformers loads as `FlexOlmoForCausalLM`.

The stock router is linear and has no bias. A mixture with such a router is written exactly; any
other router is refit in closed form, and what that costs is measured. Narrow experts are padded
with zeros, low-rank ones written out as W + B A, which is exact; experts that change more than the
FFN are refused.

N tokens, D d_model, E experts, L layers, F the widest FFN.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.errors import MergeError
from flexolmo.files import LaterTensor, write_directory_aside, write_json
from flexolmo.merge.mixture import LoadedMixture
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import LinearSettings, slot
from flexolmo.model.shape import FFN_PARTS
from flexolmo.model.stock import expert_name, gate_name, stock_config, stock_name, write_stock
from flexolmo.model.transformer import Linear

LARGEST_LOG_ODDS = 6.0  # refit targets are held within this, so that certainty is not chased


def is_stock_router(model: MixtureModel) -> bool:
    """True if the stock format can hold this router exactly."""
    return isinstance(model.settings, LinearSettings) and not model.settings.has_bias


def refuse_more_than_ffn(model: MixtureModel) -> None:
    """Raises MergeError, naming them, if experts change what the stock format has no place for."""
    more = [n for n, shape in model.shapes.items() if not shape.is_ffn_only]
    if more:
        raise MergeError(
            f"The stock format has room for experts' FFNs alone, but {', '.join(more)} also "
            "change attention, embedding or output head. Export it with its code (--code), leave "
            "these out (flexolmo mix remove), or ask their owners for an expert trained with "
            "--scope ffn."
        )


def whole_ffn(
    model: MixtureModel, name: str, layer: int, part: str, width: int | None = None
) -> Tensor:
    """A matrix of one expert's FFN, a low-rank expert's written out as W + B A, with zeros up to
    an FFN of `width`."""
    mixture = model.mixtures()[layer]
    matrix = getattr(mixture.expert(name), part)
    whole: Tensor = (
        matrix.weight
        if isinstance(matrix, Linear)
        else getattr(mixture.expert(PUBLIC), part).weight + matrix.lora_b @ matrix.lora_a
    )
    inner = 1 if part == "down_proj" else 0  # the dimension of size F
    if width is None or width == whole.shape[inner]:
        return whole
    short = width - whole.shape[inner]
    return F.pad(whole, (0, short) if inner else (0, 0, 0, short))


def refit_router(
    model: MixtureModel, windows: Iterable[tuple[np.ndarray, int]], ridge: float = 1e-3
) -> list[Tensor]:
    """Rows of the stock router closest to this model's own, one [E,D] a layer, float32.

    Least squares from each layer's residual stream to the log weights of the mixture's router,
    less their mean over experts (which a softmax ignores); the ridge is a fraction of the mean
    squared feature. Solved in float64. Source: ours, after DUME (arXiv 2603.29765).
    """
    D, E = model.config.d_model, len(model.expert_names)
    gram = [torch.zeros(D, D, dtype=torch.float64) for _ in model.layers]
    cross = [torch.zeros(D, E, dtype=torch.float64) for _ in model.layers]
    seen: list[Tensor] = []
    hooks = [
        m.register_forward_pre_hook(lambda _m, args: seen.append(args[0])) for m in model.mixtures()
    ]
    try:
        with torch.inference_mode():
            for ids, _ in windows:
                seen.clear()
                routing: list[Tensor] = []
                model.hidden(torch.from_numpy(ids)[None, :-1], routing=routing)
                for i, (h, w) in enumerate(zip(seen, routing, strict=True)):
                    x, y = (t.cpu().flatten(0, 1).double() for t in (h, w))  # [N,D], [N,E]
                    y = y.clamp(min=math.exp(-2 * LARGEST_LOG_ODDS)).log()
                    y = (y - y.mean(-1, keepdim=True)).clamp(-LARGEST_LOG_ODDS, LARGEST_LOG_ODDS)
                    gram[i] += x.T @ x
                    cross[i] += x.T @ y
    finally:
        for hook in hooks:
            hook.remove()
    rows = []
    for g, c in zip(gram, cross, strict=True):
        g = g + ridge * g.diagonal().mean() * torch.eye(D, dtype=torch.float64)
        rows.append(torch.linalg.solve(g, c).T.float().contiguous())
    return rows


def with_stock_router(model: MixtureModel, rows: Sequence[Tensor]) -> MixtureModel:
    """A mixture of the experts of `model`, sharing their matrices, under a linear router without
    bias that has these `rows`, [E,D] a layer.

    Attention reaches over documents, as in stock, which has no document mask.
    """
    refuse_more_than_ffn(model)
    config = model.config.model_copy(update={"document_mask": False})
    with torch.device("meta"):  # the matrices are those of `model` itself
        stock = MixtureModel(
            config, model.shapes, LinearSettings(has_bias=False), top_k=model.top_k
        )
    kept = {
        k: v
        for k, v in model.state_dict().items()
        if not k.startswith("router.") and ".mlp.router." not in k
    }
    for i, layer_rows in enumerate(rows):
        for e, name in enumerate(model.expert_names):
            kept[f"layers.{i}.mlp.router.rows.{slot(name)}.weight"] = layer_rows[e][None]
    stock.load_state_dict(kept, assign=True)
    return stock.requires_grad_(False).eval()


def router_rows(model: MixtureModel) -> list[Tensor]:
    """A linear router's rows, [E,D] a layer."""
    found = []
    for mixture in model.mixtures():
        assert mixture.router is not None
        found.append(torch.cat([mixture.router.row(n).weight for n in model.expert_names]))
    return found


def stock_width(model: MixtureModel) -> int:
    """Width F of every FFN of `model` in the stock format, which narrower ones are padded to."""
    width = max([model.config.d_ff, *(s.d_ff for s in model.shapes.values())])
    return math.ceil(width / 8) * 8  # stock's grouped products want rows of whole 16 bytes


def stock_tensors(model: MixtureModel) -> dict[str, Tensor | LaterTensor]:
    """Tensors of `model`, whose router must be stock, by stock names; experts' matrices are made
    when they are written.

    Experts get contiguous numbers: public is 0, the owners follow alphabetically. Works on torch's
    meta device too, for names and shapes. Raises MergeError for what the format has no place for.
    """
    if not is_stock_router(model):
        raise MergeError("Only a linear router without bias fits the stock format; refit it first.")
    refuse_more_than_ffn(model)
    tensors: dict[str, Tensor | LaterTensor] = {
        stock_name(k): v for k, v in model.state_dict().items() if ".mlp." not in k
    }
    D, dtype = model.config.d_model, model.embed_tokens.weight.dtype
    width = stock_width(model)
    for i, rows in enumerate(router_rows(model)):
        tensors[gate_name(i)] = rows.to(dtype)
        for e, name in enumerate(model.expert_names):
            for part in FFN_PARTS:
                shape = (D, width) if part == "down_proj" else (width, D)
                make = partial(whole_ffn, model, name, i, part, width)
                tensors[expert_name(i, e, part)] = LaterTensor(dtype, shape, make)
    return tensors


def export_stock(
    mixture: LoadedMixture, model: MixtureModel, out: Path, about: dict[str, Any]
) -> None:
    """Write `model` (its router must be stock) to `out` for `FlexOlmoForCausalLM`.

    The experts' names, in the order of their numbers, are in flexolmo.json beside the weights, and
    whether the mixture has a document mask, which stock does not apply.
    """
    tensors = stock_tensors(model)
    names = model.expert_names
    config = stock_config(
        mixture.model.config,
        model.embed_tokens.weight.dtype,
        architectures=["FlexOlmoForCausalLM"],
        model_type="flex_olmo",
        intermediate_size=stock_width(model),
        num_experts=len(names),
        num_experts_per_tok=min(model.top_k or len(names), len(names)),
        norm_topk_prob=False,
        output_router_logits=False,
        router_aux_loss_coef=0.01,
    )
    with write_directory_aside(out, "flexolmo.json") as aside:
        write_stock(aside, config, tensors, mixture.tokenizer)
        write_json(
            aside / "flexolmo.json",
            {"experts": names, "document_mask": mixture.model.config.document_mask, **about},
        )
        mixture.refuse_changed_files()
