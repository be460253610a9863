"""Checks of a bundle's experts against the anchor and each other, before anything is merged.

They ask of tensors and tables whether training can have made them. What an expert does to text is
measured by `flexolmo.evaluation.influence`. Source: §3.3.3; the checks ours.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, cast

import torch
from pydantic import TypeAdapter
from torch import Tensor

from flexolmo.bundle.bundle import Bundle
from flexolmo.bundle.manifest import Manifest
from flexolmo.bundle.tensors import compare_tensors
from flexolmo.files import digest_bytes
from flexolmo.model.assemble import anchor_matrix, assemble_mixture
from flexolmo.model.checkpoint import Anchor
from flexolmo.model.router import RouterSettings
from flexolmo.model.shape import (
    BIGRAM_KEYS,
    BIGRAM_LEVELS,
    TOKEN_LEVELS,
    architecture_of,
    expert_shapes,
    shape_of_tensors,
)
from flexolmo.model.statistics import OWNERS_CHOICE, EvidenceSettings, OwnerTable, table_problems

ROUTER: TypeAdapter[RouterSettings] = TypeAdapter(RouterSettings)
TABLE = {TOKEN_LEVELS, BIGRAM_KEYS, BIGRAM_LEVELS}
DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.int64: "I64",
}
MAX_WEIGHT = 10_000.0  # largest number an expert may hold; trained ones stay below 100


def tensors_of(bundle: Bundle) -> dict[str, Tensor]:
    """The tensors of a bundle opened with `keep_tensors`; they share its memory.

    Once `bundle.tensors` is cleared they alone hold it.
    """
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    return {
        name: torch.frombuffer(bundle.tensors[name], dtype=dtypes[entry.dtype]).reshape(entry.shape)
        for name, entry in bundle.manifest.tensors.items()
    }


def find_misfits(anchor: Anchor, bundle: Bundle) -> list[str]:
    """A line for each way in which a bundle opened with `keep_tensors` does not fit the anchor."""
    m = bundle.manifest
    if m.anchor_digest != anchor.digest:
        return [f"{m.name}: trained on anchor {m.anchor_digest}, this anchor is {anchor.digest}"]
    try:
        router = ROUTER.validate_python(m.router.settings)
    except ValueError as e:
        return [f"{m.name}: router settings are not understood: {e}"]
    shape = shape_of_tensors({k: e.shape for k, e in m.tensors.items()}, anchor.config)
    claimed = m.architecture.model_dump()
    found = architecture_of(anchor.config, shape)
    lines = [
        f"architecture claims {key} {claimed[key]}, found {found[key]}"
        for key in found
        if claimed[key] != found[key]
    ]
    lines += compare_tensors(m.tensors, expert_shapes(anchor.config, shape, router))
    dtype = DTYPES[anchor.model.embed_tokens.weight.dtype]
    lines += [
        f"dtype of {key} is {entry.dtype}, expected {' or '.join(wanted)}"
        for key, entry in m.tensors.items()
        if entry.dtype not in (wanted := _dtypes_of(key, dtype))
    ]
    if not lines:
        lines = _find_bad_numbers(anchor, tensors_of(bundle), router)
    return [f"{m.name}: {line}" for line in lines]


def _find_bad_numbers(
    anchor: Anchor, tensors: Mapping[str, Tensor], router: RouterSettings
) -> list[str]:
    """A line for each tensor of the right shape and dtype that no training gives."""
    lines = [
        f"{key} holds numbers of {largest:g}, expected at most {MAX_WEIGHT:g}"
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and (largest := _largest(tensor)) > MAX_WEIGHT
    ]
    if not isinstance(router, EvidenceSettings):
        return lines
    nothing = {
        BIGRAM_KEYS: torch.zeros(0, dtype=torch.long),
        BIGRAM_LEVELS: torch.zeros(0, dtype=torch.int8),
    }
    table = OwnerTable(
        *((nothing | dict(tensors))[k].numpy() for k in (TOKEN_LEVELS, BIGRAM_KEYS, BIGRAM_LEVELS))
    )
    lines += [f"router table: {line}" for line in table_problems(table, anchor.public, router)]
    if not (table.token_levels.any() or table.pair_levels.any()):
        lines.append("router table says what public's does, which tells no text from another")
    return lines + _find_told(anchor, tensors, torch.from_numpy(table.is_told))


def _find_told(anchor: Anchor, tensors: Mapping[str, Tensor], is_told: Tensor) -> list[str]:
    """A line for each matrix whose rows tell of tokens that the table, [V], does not tell of."""
    lines = []
    for part in ("embed_tokens", "lm_head"):
        rows = tensors.get(f"{part}.lora_b")  # zero at the start, [V,r]
        if (whole := tensors.get(f"{part}.weight")) is not None:
            base = anchor_matrix(anchor, part)
            rows = whole - cast(Tensor, base).detach().cpu()
        if rows is not None and (moved := int((rows[~is_told] != 0).any(1).sum())):
            lines.append(
                f"{part} differs from the anchor's at {moved} tokens that the router table does "
                "not tell of: they would show what the owner's documents hold. Train it again"
            )
    return lines


def _largest(tensor: Tensor) -> float:
    """Largest absolute value, found without a copy."""
    least, most = tensor.aminmax()
    return max(-float(least), float(most))


def find_unstable(anchor: Anchor, bundle: Bundle) -> list[str]:
    """A line if the expert, beside the anchor, gives no finite number for a fixed text.

    Empties the bundle's tensors.
    """
    router = ROUTER.validate_python(bundle.manifest.router.settings)
    if isinstance(router, EvidenceSettings):  # so that it is run at every token
        router = router.model_copy(update={"min_weight": 0.0})
    name = bundle.manifest.name
    tensors = tensors_of(bundle)
    bundle.tensors.clear()
    model = assemble_mixture(anchor, {name: tensors}, router, takes_over=True)
    length = min(64, anchor.config.max_seq_len)
    ids = torch.arange(length)[None] * 7919 % anchor.config.vocab_size  # [1,T]
    with torch.inference_mode():
        is_finite = bool(torch.isfinite(model(ids)).all())
    return [] if is_finite else [f"{name}: gives NaN or infinity for a plain text"]


def shared_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Router settings that all experts of a mixture must have in common."""
    return {k: v for k, v in settings.items() if k not in OWNERS_CHOICE}


def find_differences(
    anchor: Anchor, manifests: Sequence[Manifest], router: Any = None
) -> list[str]:
    """A line for each way in which experts do not go together: names, routers, equal tensors."""
    lines, seen = [], set()
    for m in manifests:
        if m.name in seen:
            lines.append(f"{m.name}: two experts have this name")
        seen.add(m.name)
        settings = shared_settings(m.router.settings)
        first = manifests[0].router
        others = shared_settings(first.settings)
        if m.router.kind != first.kind or settings != others:
            lines.append(f"{m.name}: router is {settings}, that of {manifests[0].name} is {others}")
        elif router is not None and ROUTER.validate_python(settings) != ROUTER.validate_python(
            router
        ):
            lines.append(f"{m.name}: router is {settings}, that of the mixture is {router}")
    holders: dict[str, dict[str, str]] = {}  # digest to the tensor's key, by expert
    for m in manifests:
        for key, entry in m.tensors.items():
            if prod(entry.shape) >= 8 and key not in TABLE:
                holders.setdefault(entry.digest, {})[m.name] = key
        if set(m.tensors) >= TABLE:  # small tables may have a part in common, but not all of it
            whole = " ".join(m.tensors[key].digest for key in sorted(TABLE))
            holders.setdefault(whole, {})[m.name] = TOKEN_LEVELS
    shared: dict[tuple[str, ...], set[str]] = {}  # tensors by the experts that hold them
    for digest, keys in holders.items():
        if len(keys) > 1 and digest not in _untrained(anchor, *next(iter(keys.items())), manifests):
            shared.setdefault(tuple(sorted(keys)), set()).update(keys.values())
    lines += [
        f"{', '.join(names)}: equal tensors ({', '.join(sorted(keys))}); with one of these experts "
        "off, another would still speak for it"
        for names, keys in shared.items()
    ]
    return lines


def _untrained(anchor: Anchor, name: str, key: str, manifests: Sequence[Manifest]) -> set[str]:
    """Digests that a tensor of several experts may well share: zeros, and the anchor's own."""
    entry = next(m.tensors[key] for m in manifests if m.name == name)
    width = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "I8": 1, "I64": 8}[entry.dtype]
    own = anchor_matrix(anchor, key.removesuffix(".weight")) if key.endswith(".weight") else None
    found = {digest_bytes(bytes(width * prod(entry.shape)))}
    if own is not None:
        data = own.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        found.add(digest_bytes(data))
    return found


def _dtypes_of(key: str, weights: str) -> list[str]:
    if key in (TOKEN_LEVELS, BIGRAM_LEVELS):
        return ["I8"]
    if key == BIGRAM_KEYS:
        return ["I64"]
    if "router." in key:
        return ["F32"]
    return list(dict.fromkeys([weights, "BF16"] if ".lora_" in key else [weights]))
