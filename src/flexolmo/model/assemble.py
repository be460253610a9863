"""Anchor and expert tensors to a mixture in memory, and back.

The one place that says which tensors an expert consists of. Training makes a mixture of one
expert with it, merging a mixture of many.

V vocabulary, D d_model, F the expert's own FFN width, L layers.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.errors import MergeError
from flexolmo.model.checkpoint import Anchor
from flexolmo.model.deltas import DeltaEmbedding, DeltaLinear, LowRank
from flexolmo.model.moe import MixtureModel
from flexolmo.model.panels import Panels
from flexolmo.model.parallel import fill, place
from flexolmo.model.router import EvidenceRouter, LevelTable, LinearRouter, RouterSettings, slot
from flexolmo.model.shape import (
    ATTENTION_PARTS,
    BIGRAM_KEYS,
    BIGRAM_LEVELS,
    FFN_PARTS,
    TOKEN_LEVELS,
    expert_shapes,
    shape_of_tensors,
)
from flexolmo.model.statistics import EvidenceSettings, are_bigram_keys, in_public_steps
from flexolmo.model.transformer import Block, Linear
from flexolmo.model.untold_rows import move_untold_rows


def assemble_mixture(
    anchor: Anchor,
    experts: Mapping[str, Mapping[str, Tensor]],
    router: RouterSettings,
    *,
    top_k: int | None = None,
    takes_over: bool = False,
) -> MixtureModel:
    """A mixture of `anchor` and `experts` (tensors as in `expert_shapes`, by name), frozen.

    With `takes_over`, memory holds each matrix once: the anchor's are shared with it, and tensors
    are taken out of `experts` as they are copied.

    Everything inherited is a bit-for-bit copy of the anchor's, and all is on its device. Raises
    MergeError that lists missing, extra and misshapen tensors of every expert.
    """
    given = {name: _shapes_of(tensors) for name, tensors in experts.items()}
    lines = _find_misfits(anchor, given, router)
    for name, tensors in sorted(experts.items()):
        keys = tensors.get(BIGRAM_KEYS)
        if (
            keys is not None
            and keys.dim() == 1
            and not are_bigram_keys(keys.cpu().numpy(), anchor.config.vocab_size)
        ):
            lines.append(f"{name}: {BIGRAM_KEYS} are not ascending pairs of token ids")
    _refuse(lines)
    model = _frame(anchor, given, router, top_k, takes_over)
    with torch.no_grad():
        for name, tensors in experts.items():
            _copy_expert(model, name, tensors, takes_over)
            finish_expert(model, anchor, name)
    return model


def frame_mixture(
    anchor: Anchor,
    experts: Mapping[str, Mapping[str, tuple[int, ...]]],
    router: RouterSettings,
    *,
    top_k: int | None = None,
) -> MixtureModel:
    """A mixture that shares `anchor`'s matrices, with room for the tensors of `experts`, of which
    the shapes are given.

    What stands in that room means nothing until every one of `expert_tensors` has been copied in
    and `finish_expert` called. Raises MergeError as `assemble_mixture` does.
    """
    _refuse(_find_misfits(anchor, experts, router))
    return _frame(anchor, experts, router, top_k, is_shared=True)


def finish_expert(model: MixtureModel, anchor: Anchor, name: str) -> None:
    """Find what follows from an expert's table, if the router has one: evidence, and rows of the
    head at tokens that it does not tell of (see `untold_rows`)."""
    if isinstance(model.settings, EvidenceSettings):
        cast(EvidenceRouter, model.router).table(name).weigh(anchor.public, model.settings)
        move_untold_rows(model, name)


def _shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in tensors.items()}


def _find_misfits(
    anchor: Anchor, experts: Mapping[str, Mapping[str, tuple[int, ...]]], router: RouterSettings
) -> list[str]:
    """A line for each missing, extra and misshapen tensor of every expert."""
    lines: list[str] = []
    if PUBLIC in experts:
        lines.append(f"{PUBLIC}: this name is the anchor's own")
    for name, found in sorted(experts.items()):
        shape = shape_of_tensors(found, anchor.config)
        expected = expert_shapes(anchor.config, shape, router)
        lines += [f"{name}: missing {n}" for n in sorted(expected.keys() - found.keys())]
        lines += [f"{name}: extra {n}" for n in sorted(found.keys() - expected.keys())]
        lines += [
            f"{name}: shape of {n} is {list(found[n])}, expected {list(dims)}"
            for n, dims in expected.items()
            if n in found and found[n] != dims
        ]
        if not (shape.is_ffn_only or isinstance(router, EvidenceSettings)):
            lines.append(
                f"{name}: changes more than the FFN, which needs a router that decides "
                "once for all layers (kind evidence)"
            )
    return lines


def _refuse(lines: Sequence[str]) -> None:
    if lines:
        raise MergeError("Experts that do not fit the anchor:\n  " + "\n  ".join(lines))


def _frame(
    anchor: Anchor,
    experts: Mapping[str, Mapping[str, tuple[int, ...]]],
    router: RouterSettings,
    top_k: int | None,
    is_shared: bool,
) -> MixtureModel:
    """The mixture with all that is the anchor's, frozen."""
    with torch.device("meta"):  # memory comes once, in the precision that is used
        model = MixtureModel(
            anchor.config,
            {name: shape_of_tensors(found, anchor.config) for name, found in experts.items()},
            router,
            top_k=top_k,
            public_bigrams=len(anchor.public.keys),
            form_bigrams=[len(table.keys) for table in anchor.forms],
        )
    place(model, anchor.model.embed_tokens.weight)
    with torch.no_grad():
        _copy_anchor(model, anchor, is_shared)
    return model.requires_grad_(False).eval()


def anchor_matrix(anchor: Anchor, name: str) -> Tensor | None:
    """The anchor's matrix that an expert's `name` ("layers.0.q_proj", "lm_head") stands for."""
    *layer, part = name.split(".")
    if not layer:
        return cast(Tensor, getattr(anchor.model, part).weight)
    block = cast(Block, anchor.model.layers[int(layer[1])])
    for room, parts in ((block.mlp, FFN_PARTS), (block.self_attn, ATTENTION_PARTS)):
        if part in parts:
            return cast(Tensor, getattr(room, part).weight)
    return None


def expert_tensors(model: MixtureModel, name: str) -> dict[str, Tensor]:
    """The expert's tensors, as in `expert_shapes`; views, not copies."""
    found: dict[str, Tensor] = {}

    def add(key: str, own: nn.Module) -> None:
        if isinstance(own, LowRank):
            found[f"{key}.lora_a"], found[f"{key}.lora_b"] = own.lora_a, own.lora_b
        else:
            found[f"{key}.weight"] = cast(Linear, own).weight

    def add_delta(key: str, module: nn.Module) -> None:
        if isinstance(module, DeltaLinear | DeltaEmbedding) and name in module.deltas.places:
            add(key, module.deltas.of(name))

    for i, (block, mixture) in enumerate(zip(model.layers, model.mixtures(), strict=True)):
        for part in FFN_PARTS:
            add(f"layers.{i}.{part}", getattr(mixture.expert(name), part))
        for part in ATTENTION_PARTS:
            add_delta(f"layers.{i}.{part}", getattr(block.self_attn, part))
        if mixture.router is not None:
            found |= {
                f"layers.{i}.router.{part}": tensor
                for part, tensor in mixture.router.tensors(name).items()
            }
    add_delta("embed_tokens", model.embed_tokens)
    add_delta("lm_head", model.lm_head)
    if model.router is not None:
        table = model.router.table(name)
        found[TOKEN_LEVELS] = table.token_levels
        if len(table.bigram_keys):
            found[BIGRAM_KEYS] = table.bigram_keys
            found[BIGRAM_LEVELS] = table.bigram_levels
    return found


def erase_expert(model: MixtureModel, name: str, panels: Panels) -> None:
    """Overwrite all that `model` and `panels` hold of an expert. With it off no number changes;
    with it on none is a number any more."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    paths = {m: path for path, m in model.named_modules()}
    for path, tensor in tensors:
        if slot(name) in path.split("."):
            tensor.fill_(math.nan if tensor.is_floating_point() else 0)
    for key, own in panels.items():
        if slot(name) in paths[key[1] if isinstance(key, tuple) else key].split("."):
            own.erase()


def _copy_anchor(model: MixtureModel, anchor: Anchor, is_shared: bool) -> None:
    def put(target: Tensor, values: Tensor) -> None:
        if is_shared:
            target.data = values
        else:
            fill(target, values)

    source = anchor.model.state_dict()
    for name, target in model.state_dict(keep_vars=True).items():
        if not (".mlp." in name or ".deltas." in name or name.startswith("router.")):
            put(target, source[name])
    for i, mixture in enumerate(model.mixtures()):
        for part in FFN_PARTS:
            put(
                getattr(mixture.expert(PUBLIC), part).weight,
                source[f"layers.{i}.mlp.{part}.weight"],
            )
        if mixture.router is not None:
            mixture.router.float()  # routing is in float32 whatever the weights are
        if isinstance(mixture.router, LinearRouter):
            fill(mixture.router.row(PUBLIC).weight, anchor.router_rows[i][None])
    if model.router is not None:
        model.router.float()
        table, public = model.router.public, anchor.public
        for target, values in (
            (table.unigram, public.unigram),
            (table.backoff, public.backoff),
            (table.bigram_keys, public.keys),
            (table.bigram_log_probs, public.log_probs),
        ):
            target.copy_(torch.from_numpy(values))
        settings = in_public_steps(model.router.settings)
        for module, form in zip(model.router.forms, anchor.forms, strict=True):
            cast(LevelTable, module).fill(form)
            cast(LevelTable, module).weigh(public, settings)


def _copy_expert(
    model: MixtureModel, name: str, tensors: Mapping[str, Tensor], takes_over: bool
) -> None:
    for key, target in expert_tensors(model, name).items():
        fill(target, tensors[key])
        if takes_over:
            cast(dict[str, Tensor], tensors).pop(key)
