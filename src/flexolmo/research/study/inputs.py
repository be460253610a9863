"""Reading a step's inputs: the anchor, a set, models, a mixture of experts."""

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.data.batches import TokenSet, embedding_windows, open_set
from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.checkpoint import Anchor, load_anchor
from flexolmo.model.hidden_statistics import mean_hidden_state
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import LinearSettings, RouterSettings, first_raw_bias
from flexolmo.research.rivals.fitted_routers import set_row_lengths
from flexolmo.research.rivals.models import load_dense
from flexolmo.research.steps.step import StepContext
from flexolmo.research.study.embedder import embed_set
from flexolmo.runtime import choose_device
from flexolmo.train.expert import load_expert


def anchor_of(step: StepContext) -> Anchor:
    """The input anchor, on the step's device."""
    found = load_anchor(step.inputs["anchor"] / "anchor")
    found.model.to(choose_device(step.device))
    return found


def set_of(step: StepContext, name: str) -> TokenSet:
    """A prepared set of the input corpus."""
    return open_set(step.inputs["corpus"] / "prepared" / name)


def dense_states(step: StepContext, base: Anchor) -> dict[str, dict[str, Tensor]]:
    """State dicts of the inputs dense.SET, by set."""
    return {
        n: load_dense(base, step.inputs[f"dense.{n}"] / "model.safetensors").state_dict()
        for n in step.settings["sets"]
    }


def first_rows(step: StepContext, base: Anchor, data: TokenSet) -> Tensor:
    """First rows [L,D] of one set's expert. Settings, rows: random | per_layer | minilm."""
    kind, L, D = step.settings["rows"], base.config.num_layers, base.config.d_model
    if kind == "random":
        seed = step.settings["seed"] * 1000 + sum(data.name.encode())
        row = torch.randn(D, generator=torch.Generator().manual_seed(seed))
        return (row / row.norm()).repeat(L, 1)
    if kind == "per_layer":
        sums = [torch.zeros(D) for _ in range(L)]

        def watch(total: Tensor) -> Any:
            def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                total.add_(args[0].sum((0, 1)).cpu())

            return add

        hooks = [
            cast(nn.Module, block.mlp).register_forward_pre_hook(watch(total))
            for block, total in zip(base.model.layers, sums, strict=True)
        ]
        mean_hidden_state(base.model, embedding_windows(data, base.config.max_seq_len))
        for hook in hooks:
            hook.remove()
        return torch.stack([s / s.norm() for s in sums])
    return embed_set(data, base.config, step.inputs["embedder"]).repeat(L, 1)


def with_rows(step: StepContext, base: Anchor) -> Anchor:
    """The anchor with public's rows made as the setting `rows` says for all experts."""
    if step.settings.get("rows") is None:
        return base
    return dataclasses.replace(base, router_rows=first_rows(step, base, set_of(step, PUBLIC)))


def mixture_of(step: StepContext, top_k: int | None) -> MixtureModel:
    """The mixture of the inputs expert.SET."""
    base = with_rows(step, anchor_of(step))
    experts = {
        role.removeprefix("expert."): load_expert(path / "expert")
        for role, path in step.inputs.items()
        if role.startswith("expert.")
    }
    router: RouterSettings = next(iter(experts.values())).router
    tensors = {n: e.tensors for n, e in experts.items()}
    if isinstance(router, LinearSettings) and step.settings.get("no_bias"):
        for found in tensors.values():
            for key in [k for k in found if k.endswith("raw_bias")]:
                zero = router.model_copy(update={"bias_form": "clamp"})
                found[key] = first_raw_bias(zero)
        router = router.model_copy(update={"bias_form": "clamp"})
    model = assemble_mixture(base, tensors, router, top_k=top_k)
    if length := step.settings.get("row_length"):  # one for all rows, which were learned apart
        set_row_lengths(model, length)
    return model
