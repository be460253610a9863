"""Checks of a bundle's experts against the anchor and each other, before anything is merged.

They ask of tensors and tables whether training can have made them. What an expert does to text is
measured by `flexolmo.evaluation.influence`. Source: §3.3.3; the checks ours.
"""

from collections.abc import Collection, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from pydantic import TypeAdapter
from torch import Tensor

from flexolmo.bundle.bundle import Bundle
from flexolmo.bundle.manifest import Manifest
from flexolmo.bundle.tensors import Span, Watch, compare_tensors
from flexolmo.errors import MergeError
from flexolmo.merge.bounds import SAFE, Extremes, find_reach
from flexolmo.model.assemble import anchor_matrix, expert_tensors
from flexolmo.model.checkpoint import Anchor, digest_data
from flexolmo.model.moe import MixtureModel
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
from flexolmo.model.transformer import copy_matrix

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
DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}
MAX_WEIGHT = 10_000.0  # largest number an expert may hold; trained ones stay below 100


def tensors_of(bundle: Bundle) -> dict[str, Tensor]:
    """The tensors of a bundle opened with `keep_tensors`; they share its memory.

    Once `bundle.tensors` is cleared they alone hold it.
    """
    return {
        name: torch.frombuffer(bundle.tensors[name], dtype=DTYPE_OF[entry.dtype]).reshape(
            entry.shape
        )
        for name, entry in bundle.manifest.tensors.items()
    }


class SeenWeights:
    """Everything that the checks need of an expert's numbers beside the largest: its router's
    table, and tokens at which its embedding and head differ from the anchor's. Watches while a
    bundle is opened, and hands what it sees on to `then`.
    """

    def __init__(self, anchor: Anchor, then: Watch | None = None):
        self.table: dict[str, Tensor] = {}
        self.moved: dict[str, Tensor] = {}  # [V] True where a row differs, by part
        self._anchor = anchor
        self._then = then

    def __call__(self, name: str, span: Span, at: int, piece: memoryview) -> None:
        if name in TABLE:
            if at == 0:
                self.table[name] = torch.empty(span.shape, dtype=DTYPE_OF[span.dtype])
            kept = self.table[name].reshape(-1).view(torch.uint8)
            kept[at : at + len(piece)] = torch.frombuffer(piece, dtype=torch.uint8)
        part, _, kind = name.partition(".")
        if part in ("embed_tokens", "lm_head") and kind in ("weight", "lora_b"):
            self._compare(part, span, at, torch.frombuffer(piece, dtype=DTYPE_OF[span.dtype]))
        if self._then is not None:
            self._then(name, span, at, piece)

    def _compare(self, part: str, span: Span, at: int, numbers: Tensor) -> None:
        """Mark the rows of the matrix [V,.] in which these of its `numbers` are new."""
        base = cast(Tensor, anchor_matrix(self._anchor, part)).detach()
        width = span.shape[-1]
        if span.shape[0] != len(base):  # refused for its shape
            return
        moved = self.moved.setdefault(part, torch.zeros(len(base), dtype=torch.bool))
        begin = at // numbers.element_size()
        if span.shape == base.shape:
            first = begin // width
            last = (begin + len(numbers) - 1) // width
            rows = base[first : last + 1].cpu().reshape(-1)
            is_new = numbers != rows[begin - first * width :][: len(numbers)]
        else:
            is_new = numbers != 0  # of a delta
        moved[(begin + is_new.nonzero()[:, 0]) // width] = True


class ExpertFiller:
    """Copies an expert's tensors into a mixture while a bundle is opened, one whole tensor after
    the other. Of a bundle that is then refused, what it filled is worth nothing."""

    def __init__(self, model: MixtureModel, name: str):
        self._places = expert_tensors(model, name)
        self._tensor = torch.empty(0)

    def __call__(self, name: str, span: Span, at: int, piece: memoryview) -> None:
        if at == 0:
            self._tensor = torch.empty(span.shape, dtype=DTYPE_OF[span.dtype])
        data = self._tensor.reshape(-1).view(torch.uint8)
        data[at : at + len(piece)] = torch.frombuffer(piece, dtype=torch.uint8)
        place = self._places.get(name)
        is_whole = at + len(piece) == span.end - span.begin
        if is_whole and place is not None and place.shape == self._tensor.shape:
            with torch.no_grad():
                copy_matrix(place, self._tensor)
            self._tensor = torch.empty(0)


def map_expert(model: MixtureModel, name: str, weights: Path) -> None:
    """Let an expert's matrices in `model` stay in its verified file `weights`; of all else, which
    is small, a copy is made. Raises MergeError if the file is not whole any more."""
    try:
        with safetensors.safe_open(weights, framework="pt") as file:
            for key, place in expert_tensors(model, name).items():
                tensor = file.get_tensor(key)
                if place.dim() == 2 and place.dtype == tensor.dtype:
                    place.data = tensor
                else:
                    with torch.no_grad():
                        place.copy_(tensor)
    except (OSError, ValueError, safetensors.SafetensorError) as e:
        raise MergeError(
            f"The weights of {name} changed while they were read: {e}. Begin again at rest."
        ) from None


def find_misfits(anchor: Anchor, bundle: Bundle, seen: SeenWeights | None = None) -> list[str]:
    """A line for each way in which a bundle does not fit the anchor: by its manifest, and, if its
    weights were `seen`, by its numbers."""
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
    if not lines and seen is not None and bundle.largest is not None:
        lines = _find_bad_numbers(anchor, bundle.largest, seen, router)
    return [f"{m.name}: {line}" for line in lines]


def _find_bad_numbers(
    anchor: Anchor, largest: Mapping[str, float], seen: SeenWeights, router: RouterSettings
) -> list[str]:
    """A line for each tensor of the right shape and dtype that no training gives."""
    lines = [
        f"{key} holds numbers of {value:g}, expected at most {MAX_WEIGHT:g}"
        for key, value in largest.items()
        if value > MAX_WEIGHT
    ]
    if not isinstance(router, EvidenceSettings):
        return lines
    nothing = {
        BIGRAM_KEYS: torch.zeros(0, dtype=torch.long),
        BIGRAM_LEVELS: torch.zeros(0, dtype=torch.int8),
    }
    table = OwnerTable(
        *((nothing | seen.table)[k].numpy() for k in (TOKEN_LEVELS, BIGRAM_KEYS, BIGRAM_LEVELS))
    )
    lines += [f"router table: {line}" for line in table_problems(table, anchor.public, router)]
    if not (table.token_levels.any() or table.pair_levels.any()):
        lines.append("router table says what public's does, which tells no text from another")
    return lines + _find_told(seen, torch.from_numpy(table.is_told))


def _find_told(seen: SeenWeights, is_told: Tensor) -> list[str]:
    """A line for each matrix whose rows tell of tokens that the table, [V], does not tell of."""
    return [
        f"{part} differs from the anchor's at {count} tokens that the router table does "
        "not tell of: they would show what the owner's documents hold. Train it again"
        for part, moved in seen.moved.items()
        if (count := int((moved & ~is_told).sum()))
    ]


def find_unstable(anchor: Anchor, bundles: Sequence[Bundle]) -> list[str]:
    """A line if some text might give infinity or NaN when these experts are on beside the anchor,
    some of them or all, for how large the numbers are that they hold. No text is read."""
    if not bundles:
        return []
    router = ROUTER.validate_python(bundles[0].manifest.router.settings)
    extremes = {b.manifest.name: _extremes_of(anchor, b) for b in bundles}

    def reach(names: Collection[str]) -> float:
        chosen = [extremes[name] for name in names]
        return find_reach(anchor.config, anchor.largest, chosen, router)

    whole = reach(extremes)
    if whole < SAFE:
        return []
    alone = [name for name in extremes if not reach([name]) < SAFE]
    together = [name for name in extremes if reach(extremes.keys() - {name}) < whole]
    return [
        f"{', '.join(alone or together or extremes)}: numbers so large that a text might give "
        f"infinity or NaN: up to {whole:.0e}, expected less than {SAFE:.0e}"
    ]


def _extremes_of(anchor: Anchor, bundle: Bundle) -> Extremes:
    shapes = {name: entry.shape for name, entry in bundle.manifest.tensors.items()}
    return Extremes(shape_of_tensors(shapes, anchor.config), bundle.largest or {})


def shared_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Router settings that all experts of a mixture must have in common."""
    return {k: v for k, v in settings.items() if k not in OWNERS_CHOICE}


def find_differences(
    anchor: Anchor, manifests: Sequence[Manifest], router: Any = None
) -> list[str]:
    """A line for each way in which experts do not go together: names, routers, equal tensors."""
    lines: list[str] = []
    seen: set[str] = set()
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
    own = anchor_matrix(anchor, key.removesuffix(".weight")) if key.endswith(".weight") else None
    nothing = torch.zeros(1, dtype=DTYPE_OF[entry.dtype]).expand(entry.shape)
    return {digest_data(t) for t in (nothing, own) if t is not None}


def _dtypes_of(key: str, weights: str) -> list[str]:
    if key in (TOKEN_LEVELS, BIGRAM_LEVELS):
        return ["I8"]
    if key == BIGRAM_KEYS:
        return ["I64"]
    if "router." in key:
        return ["F32"]
    return list(dict.fromkeys([weights, "BF16"] if ".lora_" in key else [weights]))
