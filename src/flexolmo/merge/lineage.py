"""The lineage of a mixture's numbers: the signed files that they come from, and what their owners
say they were made of.

Knows nothing of running a model.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from flexolmo.bundle.bundle import MANIFEST_FILE
from flexolmo.bundle.manifest import Manifest, read_manifest
from flexolmo.bundle.strict import Claim
from flexolmo.bundle.tensors import Digest, Positive
from flexolmo.errors import ProofError
from flexolmo.files import digest_bytes, digest_file
from flexolmo.merge.checks import DTYPES
from flexolmo.merge.mixture import LoadedMixture
from flexolmo.model.assemble import expert_tensors
from flexolmo.model.checkpoint import anchor_files, digest_data
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import DiscriminantSettings, slot
from flexolmo.model.untold_rows import find_untold_rows
from flexolmo.train.expert import ExpertRecipe

STATED = {"beside_anchor", "replay", "router", "scope"}  # that say what an expert was made of


class AnchorFacts(Claim):
    """The public anchor, and how many of the mixture's numbers are its own."""

    digest: Digest
    files: dict[str, Digest]
    tensors: Positive
    numbers: Positive
    vocab_size: Positive


class BundleFacts(Claim):
    """An owner's bundle, and how many numbers it holds."""

    owner: str
    key_id: Digest
    files: dict[str, Digest]
    tensors: Positive
    numbers: Positive


class Lineage(BundleFacts):
    """A bundle, and what it says the expert was made of beside its owner's own text."""

    anchor_digest: Digest
    training: Literal["alone", "beside the anchor"]
    has_read_public_text: bool


def anchor_facts(directory: Path, mixture: LoadedMixture) -> AnchorFacts:
    """The anchor in `directory`, from which `mixture` was loaded."""
    own = tensors_beside(mixture.model, mixture.expert_names)
    return AnchorFacts(
        digest=mixture.about["anchor_digest"],
        files={name: digest_file(directory / name) for name in sorted(anchor_files(directory))},
        tensors=len(own),
        numbers=sum(t.numel() for t in own.values()),
        vocab_size=mixture.model.config.vocab_size,
    )


def bundle_facts(model_dir: Path, about: Mapping[str, Any], name: str) -> BundleFacts:
    """The bundle of expert `name` in the mixture of which `about` is the mixture.json."""
    return BundleFacts(**_claims(_read_manifest(model_dir, about, name), about["experts"][name]))


def trace_experts(model_dir: Path, mixture: LoadedMixture) -> dict[str, Lineage]:
    """Lineage of every expert of `mixture`, loaded from `model_dir`, by name.

    Each expert's tensors in memory are held against the digests that its owner signed.

    Raises:
        ProofError: numbers that no owner signed, or experts whose bundles do not say that they, and
            their part of the router, were made without other owners.
    """
    found: dict[str, Lineage] = {}
    lines: list[str] = []
    for name in mixture.expert_names:
        manifest = _read_manifest(model_dir, mixture.about, name)
        problems = [*_find_unsigned(mixture.model, manifest), *_find_unexplained(manifest.recipe)]
        lines += [f"{name}: {problem}" for problem in problems]
        if not problems:
            recipe = _parse_recipe(manifest.recipe)
            found[name] = Lineage(
                **_claims(manifest, mixture.about["experts"][name]),
                anchor_digest=manifest.anchor_digest,
                training="alone" if recipe.is_alone else "beside the anchor",
                has_read_public_text=bool(recipe.replay)
                or isinstance(recipe.router, DiscriminantSettings),
            )
    if lines:
        raise ProofError(
            "There can be no certificate, for these experts may depend on other owners:\n  "
            + "\n  ".join(lines)
        )
    return found


def find_unequal(
    mixture: LoadedMixture, other: LoadedMixture, beside: Iterable[str]
) -> Iterator[str]:
    """A line for each tensor and setting in memory that is not, bit for bit, the same in both,
    beside those of the experts named."""
    beside = list(beside)
    one, two = (tensors_beside(m.model, beside) for m in (mixture, other))
    for key in sorted(one.keys() | two.keys()):
        if key not in one or key not in two:
            yield f"{key}: in one of the two alone"
        elif not has_same_bits(one[key], two[key]):
            yield f"{key}: other numbers"
    for key in ("config", "settings", "top_k"):
        found, expected = (getattr(m.model, key) for m in (mixture, other))
        if found != expected:
            yield f"{key}: {found} and {expected}"


def tensors_beside(model: MixtureModel, names: Iterable[str]) -> dict[str, Tensor]:
    """Every parameter and buffer of `model`, kept in files or not, but those of experts `names`."""
    slots = {slot(name) for name in names}
    every = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {key: t for key, t in every.items() if slots.isdisjoint(key.split("."))}


def has_same_bits(a: Tensor, b: Tensor) -> bool:
    """True if dtype, shape and every bit agree: -0 differs from 0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bytes_of(a), bytes_of(b))


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of `tensor`, one row after the other, uint8 [.]."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)


def _read_manifest(model_dir: Path, about: Mapping[str, Any], name: str) -> Manifest:
    """The manifest that was verified when the mixture was loaded."""
    path = model_dir / "experts" / f"{name}.bundle" / MANIFEST_FILE
    data = path.read_bytes()
    if digest_bytes(data) != about["experts"][name]["files"][MANIFEST_FILE]:
        raise ProofError(f"{path} was changed while it was read. Begin again once it is at rest.")
    return read_manifest(data)


def _claims(manifest: Manifest, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of BundleFacts; `entry` is that of mixture.json."""
    return {
        "owner": manifest.owner,
        "key_id": entry["key_id"],
        "files": entry["files"],
        "tensors": len(manifest.tensors),
        "numbers": sum(prod(e.shape) for e in manifest.tensors.values()),
    }


def _find_unsigned(model: MixtureModel, manifest: Manifest) -> Iterator[str]:
    """A line for each tensor of the expert in memory that is not the one its owner signed, or does
    not follow from it and the anchor."""
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    untold = find_untold_rows(model, manifest.name)
    for key, tensor in expert_tensors(model, manifest.name).items():
        entry = manifest.tensors[key]
        moving = untold if untold is not None and untold.key == key else None
        held = tensor.detach()
        if moving is not None:
            held = moving.put_back(held)
        signed = held.to(dtypes[entry.dtype])  # a mixture may have widened it
        is_signed = digest_data(signed) == entry.digest
        again = signed.to(tensor.dtype)
        if moving is not None:
            moving.move(again)
        if not (is_signed and has_same_bits(again, tensor)):
            yield f"{key} in memory is not what its owner signed"


def _find_unexplained(recipe: Mapping[str, Any]) -> Iterator[str]:
    """A line if the recipe of a bundle does not say that its expert was trained on its own."""
    if "imported_from" in recipe:
        yield (
            "it was imported from a stock checkpoint, whose router, and perhaps more, was tuned on "
            "all its experts together"
        )
        return
    unsaid = STATED - recipe.keys()
    try:
        _parse_recipe(recipe)
    except ValidationError:
        unsaid = STATED
    if unsaid:
        yield "its bundle does not say how it was trained, as flexolmo expert train does"


def _parse_recipe(recipe: Mapping[str, Any]) -> ExpertRecipe:
    """The recipe of a bundle; it may also say how the expert was made smaller."""
    return ExpertRecipe.model_validate(
        {k: v for k, v in recipe.items() if k not in ("compressed", "healed")}
    )
