"""Export and import of the checkpoint that stock transformers loads as `FlexOlmoForCausalLM`.

The stock router is linear and has no bias. A mixture with such a router is written exactly; any
other router is refit in closed form, and what that costs is measured. Narrow experts are padded
with zeros, low-rank ones written out as W + B A, which is exact; experts that change more than the
FFN are refused.

N tokens, D d_model, E experts, L layers, F the widest FFN.
"""

import math
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flexolmo.bundle.bundle import write_bundle
from flexolmo.bundle.manifest import PUBLIC, build_manifest
from flexolmo.bundle.serials import take_serial
from flexolmo.bundle.terms import Terms
from flexolmo.bundle.trust import ANY_SIGNER
from flexolmo.data.tokenizer import load_tokenizer
from flexolmo.errors import CheckpointError, MergeError
from flexolmo.files import LaterTensor, digest_file, save_tensors, write_directory_aside, write_json
from flexolmo.merge.mixture import LoadedMixture, build_mixture
from flexolmo.model.checkpoint import build_anchor, save_anchor
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import LinearSettings, slot
from flexolmo.model.shape import FFN_PARTS, ExpertShape, architecture_of
from flexolmo.model.statistics import BigramModel
from flexolmo.model.stock import (
    DtypeName,
    StockMixtureConfig,
    build_transformer,
    read_stock,
    stock_config,
    stock_name,
    write_stock,
)
from flexolmo.model.transformer import Linear
from flexolmo.runtime import run_record

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


def export_stock(
    mixture: LoadedMixture, model: MixtureModel, out: Path, about: dict[str, Any]
) -> None:
    """Write `model` (its router must be stock) to `out` for `FlexOlmoForCausalLM`.

    Experts get contiguous numbers: public is 0, the owners follow alphabetically; the names are
    in flexolmo.json beside the weights, and whether the mixture has a document mask, which stock
    does not apply.
    """
    if not is_stock_router(model):
        raise MergeError("Only a linear router without bias fits the stock format; refit it first.")
    refuse_more_than_ffn(model)
    names = model.expert_names
    tensors: dict[str, Tensor | LaterTensor] = {
        stock_name(k): v for k, v in model.state_dict().items() if ".mlp." not in k
    }
    D, dtype = model.config.d_model, model.embed_tokens.weight.dtype
    width = max([model.config.d_ff, *(s.d_ff for s in model.shapes.values())])
    width = math.ceil(width / 8) * 8  # stock's grouped products want rows of whole 16 bytes
    for i, rows in enumerate(router_rows(model)):
        prefix = f"model.layers.{i}.mlp."
        tensors[prefix + "gate.weight"] = rows.to(dtype)
        for e, name in enumerate(names):
            for part in FFN_PARTS:
                shape = (D, width) if part == "down_proj" else (width, D)
                make = partial(whole_ffn, model, name, i, part, width)
                tensors[f"{prefix}experts.{e}.{part}.weight"] = LaterTensor(dtype, shape, make)
    config = stock_config(
        mixture.model.config,
        dtype,
        architectures=["FlexOlmoForCausalLM"],
        model_type="flex_olmo",
        intermediate_size=width,
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


def import_stock(
    directory: Path,
    names: Sequence[str],
    out: Path,
    private_key: Path,
    *,
    owner: str,
    licence: str,
    terms: Terms,
    dtype: DtypeName | None = None,
) -> dict[str, Any]:
    """A mixture of ours from a stock FlexOlmo checkpoint; expert 0 becomes the public anchor.

    `names` are the other experts' names, in the checkpoint's order. Each is signed with the
    importer's key, for whom `owner` stands: the checkpoint itself carries no signature. Routing is
    in float32, the rest in the precision stock runs the checkpoint in, or in `dtype`.
    """
    stock, tensors = read_stock(directory, StockMixtureConfig, dtype)
    count = stock.experts
    if len(names) != count - 1 or len(set(names)) != len(names):
        raise CheckpointError(
            f"{directory} has {count} experts, the first of them public: give "
            f"{count - 1} different names, found {len(names)}: "
            f"{', '.join(names)}."
        )
    tokenizer = load_tokenizer(directory)
    config = stock.decoder.model_copy(update={"eos_token_id": tokenizer.eos_id})
    gates = [
        _take(tensors, f"model.layers.{i}.mlp.gate.weight", directory)
        for i in range(config.num_layers)
    ]  # [E,D] each
    if any(g.shape != (count, config.d_model) for g in gates):
        raise CheckpointError(f"{directory}: a router is not of shape {[count, config.d_model]}.")
    dense = {k: v for k, v in tensors.items() if ".mlp." not in k}
    experts: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for i in range(config.num_layers):
        for e in range(count):
            for part in FFN_PARTS:
                key = f"model.layers.{i}.mlp.experts.{e}.{part}.weight"
                w = _take(tensors, key, directory)
                if e == 0:
                    dense[f"model.layers.{i}.mlp.{part}.weight"] = w
                else:
                    experts[e][f"layers.{i}.{part}.weight"] = w
            if e > 0:
                experts[e][f"layers.{i}.router.weight"] = gates[i][e : e + 1].float().contiguous()
    model = build_transformer(config, dense, str(directory), is_mapped=True)
    even = np.full(config.vocab_size, -math.log(config.vocab_size), dtype=np.float32)
    nothing = BigramModel(
        even, np.zeros_like(even), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    )
    record = run_record({"imported_from": Path(directory).name}, 0, {})
    anchor = build_anchor(
        model, tokenizer, nothing, torch.stack([g[0].float() for g in gates]), record
    )
    router = LinearSettings(has_bias=False).model_dump(mode="json")
    source_digest = digest_file(Path(directory) / "config.json")
    left = sorted(k for k in tensors if ".mlp." in k)
    if left:
        raise CheckpointError(
            f"{directory} has tensors this format has no place for; left out, "
            f"the model would silently differ: {', '.join(left)}."
        )
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(out).resolve().parent) as temporary:
        aside = Path(temporary)
        save_anchor(anchor, aside / "anchor")
        bundles = []
        for name, expert in zip(names, experts[1:], strict=True):
            weights = aside / "expert.safetensors"
            save_tensors(weights, expert)
            expert.clear()
            manifest = build_manifest(
                weights,
                name=name,
                owner=owner,
                anchor_digest=anchor.digest,
                architecture=architecture_of(config, ExpertShape(d_ff=config.d_ff)),
                router_kind="linear",
                router_settings=router,
                recipe={"imported_from": Path(directory).name},
                tokens_seen=0,
                data_card_digest=source_digest,
                serial=take_serial(private_key, owner, name),
                licence=licence,
                terms=terms,
            )
            bundles.append(write_bundle(aside / f"{name}.bundle", weights, manifest, private_key))
        about = build_mixture(
            aside / "anchor", bundles, Path(out), ANY_SIGNER, top_k=stock.num_experts_per_tok
        )
    return about


def _take(tensors: dict[str, Tensor], name: str, directory: Path) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{directory} has no {name}.")
    return tensors.pop(name)
