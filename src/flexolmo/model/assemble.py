"""Anchor and expert tensors to a mixture in memory, and back.

The one place that says which tensors an expert consists of. Training makes a mixture of one
expert with it, merging a mixture of many.

V vocabulary, D d_model, F the expert's own FFN width, L layers.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from flexolmo.errors import MergeError
from flexolmo.model.checkpoint import FFN_PARTS, Anchor
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import PUBLIC, LinearSettings, RouterSettings
from flexolmo.model.statistics import EvidenceSettings, cluster_tables
from flexolmo.model.transformer import ModelConfig


def expert_shapes(config: ModelConfig, d_ff: int, router: RouterSettings
                  ) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an expert of width `d_ff`; exactly what a bundle holds."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(config.num_layers):
        shapes[f"layers.{i}.gate_proj.weight"] = (d_ff, config.d_model)
        shapes[f"layers.{i}.up_proj.weight"] = (d_ff, config.d_model)
        shapes[f"layers.{i}.down_proj.weight"] = (config.d_model, d_ff)
        if isinstance(router, LinearSettings):
            shapes[f"layers.{i}.router.weight"] = (1, config.d_model)
            if router.has_bias:
                shapes[f"layers.{i}.router.raw_bias"] = (1,)
    if isinstance(router, EvidenceSettings):
        shapes["router.evidence"] = (config.vocab_size,)
    return shapes


def assemble_mixture(anchor: Anchor, experts: Mapping[str, Mapping[str, Tensor]],
                     router: RouterSettings, *, top_k: int | None = None) -> MixtureModel:
    """A mixture of `anchor` and `experts` (tensors as in `expert_shapes`, by name), frozen.

    Everything inherited is a bit-for-bit copy of the anchor's. Raises MergeError that lists
    missing, extra and misshapen tensors of every expert.
    """
    config = anchor.config
    lines, widths = [], {}
    if PUBLIC in experts:
        lines.append(f"{PUBLIC}: this name is the anchor's own")
    for name, tensors in sorted(experts.items()):
        gate = tensors.get("layers.0.gate_proj.weight")
        widths[name] = config.d_ff if gate is None else int(gate.shape[0])
        expected = expert_shapes(config, widths[name], router)
        lines += [f"{name}: missing {n}" for n in sorted(expected.keys() - tensors.keys())]
        lines += [f"{name}: extra {n}" for n in sorted(tensors.keys() - expected.keys())]
        lines += [f"{name}: shape of {n} is {list(tensors[n].shape)}, expected {list(shape)}"
                  for n, shape in expected.items()
                  if n in tensors and tuple(tensors[n].shape) != shape]
    if lines:
        raise MergeError("Experts that do not fit the anchor:\n  " + "\n  ".join(lines))
    model = MixtureModel(config, widths, router, top_k=top_k,
                         num_clusters=len(anchor.public.cluster_counts))
    model.to(anchor.model.embed_tokens.weight.dtype)
    with torch.no_grad():
        _copy_anchor(model, anchor)
        for name, tensors in experts.items():
            _copy_expert(model, name, tensors)
    return model.requires_grad_(False).eval()


def expert_tensors(model: MixtureModel, name: str) -> dict[str, Tensor]:
    """The expert's tensors, as in `expert_shapes`; views, not copies."""
    found: dict[str, Tensor] = {}
    for i, mixture in enumerate(model.mixtures()):
        for part in FFN_PARTS:
            found[f"layers.{i}.{part}.weight"] = getattr(mixture.expert(name), part).weight
        if mixture.router is not None:
            found[f"layers.{i}.router.weight"] = mixture.router.row(name).weight
            bias = mixture.router.bias(name)
            if bias is not None:
                found[f"layers.{i}.router.raw_bias"] = bias
    if model.router is not None:
        found["router.evidence"] = model.router.table(name)
    return found


def _copy_anchor(model: MixtureModel, anchor: Anchor) -> None:
    source = anchor.model.state_dict()
    for name, target in model.state_dict(keep_vars=True).items():
        if ".mlp." not in name and not name.startswith("router."):
            target.copy_(source[name])
    for i, mixture in enumerate(model.mixtures()):
        for part in FFN_PARTS:
            getattr(mixture.expert(PUBLIC), part).weight.copy_(
                source[f"layers.{i}.mlp.{part}.weight"])
        if mixture.router is not None:
            mixture.router.float()  # routing is in float32 whatever the weights are
            mixture.router.row(PUBLIC).weight.copy_(anchor.router_rows[i][None])
    if model.router is not None:
        model.router.float()
        settings = model.router.settings
        tables = cluster_tables(anchor.public, settings, anchor.config.eos_token_id)
        model.router.public_clusters.copy_(torch.from_numpy(tables))


def _copy_expert(model: MixtureModel, name: str, tensors: Mapping[str, Tensor]) -> None:
    for key, target in expert_tensors(model, name).items():
        target.copy_(tensors[key])
