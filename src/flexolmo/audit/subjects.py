"""Models as an attack meets them: an expert alone, its mixture with it on, off, and the anchor.

An anchor, or any other dense model, is one subject; a reference may be given beside it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flexolmo.audit.alone import AloneReader
from flexolmo.bundle.release import origin_of
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.data.batches import TokenSet
from flexolmo.errors import ConfigError, DataError
from flexolmo.files import digest_file, read_json, recover_missing
from flexolmo.inference.policy import choose_experts
from flexolmo.inference.reader import OwnReader, Reader, open_reader
from flexolmo.merge.index import ABOUT
from flexolmo.merge.mixture import load_mixture
from flexolmo.model.checkpoint import load_anchor
from flexolmo.model.probabilities import Mix, arrange
from flexolmo.train.expert import RECORDED, ExpertRecipe

ALONE = "alone"
ON = "on"
OFF = "off"
ANCHOR = "anchor"
MODEL = "model"


@dataclass(frozen=True)
class Subject:
    """A model under attack, and the one that it is held against."""

    name: str  # alone, on, off, anchor, or model
    reader: Reader
    reference: Reader | None


@dataclass(frozen=True)
class Subjects:
    """All models under one attack."""

    models: list[Subject]
    about: dict[str, Any]  # kind, expert, enabled, digest, origin (see bundle.release.origin_of)
    recipe: ExpertRecipe | None  # by which the expert was trained
    is_alone: bool  # whether without the expert nothing but the anchor is on

    @property
    def readers(self) -> list[Reader]:
        """Every model among subjects and references, once."""
        every = [r for s in self.models for r in (s.reader, s.reference) if r is not None]
        return list({id(r): r for r in every}.values())

    def check_set(self, token_set: TokenSet) -> None:
        """Raise DataError if the set has another tokenizer than the models."""
        for subject in self.models:
            token_set.check_tokenizer(subject.reader.tokenizer.digest, "the model")


def open_subjects(
    directory: Path,
    token_set: TokenSet,
    trusted: TrustedOwners | None = None,
    *,
    expert: str | None = None,
    without: Iterable[str] = (),
    only: Iterable[str] | None = None,
    reference: Path | None = None,
    mix: Mix = "states",
) -> Subjects:
    """The subjects in a model's directory, for the owner of `token_set`.

    Of a mixture: the owner's expert alone, past the router, against the anchor: whoever has the
    bundle can do so; on, with all chosen experts, against off: the same without the owner's; off
    against the anchor; and the anchor, loaded by itself. Of another model one subject, held against
    the model in `reference`, if given.

    Args:
        expert: name of the owner's expert; by default that of the set.
    Raises:
        ConfigError: the mixture has no such expert, or the option is not for this kind of model.
        DataError: the expert was trained on another set.
    """
    directory = Path(directory)
    recover_missing(directory)
    if not (directory / ABOUT).is_file():
        if expert is not None:
            raise ConfigError(f"{directory} holds no mixture, so it has no expert {expert}.")
        reader, about = open_reader(directory, trusted, without=without, only=only, mix=mix)
        other = None if reference is None else open_reader(reference, trusted)[0]
        return Subjects([Subject(MODEL, reader, other)], about, None, False)
    if reference is not None:
        raise ConfigError("A mixture is its own reference, with the expert off: leave it out.")
    mixture = load_mixture(directory, trusted)
    name = expert or token_set.name
    if name not in mixture.expert_names:
        raise ConfigError(
            f"{directory} has no expert {name}; it holds {', '.join(mixture.expert_names)}. Name "
            "the one that was trained on this set (--expert)."
        )
    trained_on = mixture.about["experts"][name]["data_card_digest"]
    if trained_on != token_set.commitment:
        raise DataError(
            f"Expert {name} was trained on the set of commitment {trained_on}; "
            f"{token_set.directory} has {token_set.commitment}. Attack it with the set it was "
            "trained on."
        )
    enabled = choose_experts(mixture.terms, without=without, only=only)
    model = arrange(mixture.model, mix)

    def reader_of(names: Iterable[str]) -> OwnReader:
        return OwnReader(model, mixture.tokenizer, sorted(names), terms=mixture.terms)

    anchor = OwnReader(load_anchor(directory / "anchor").model, mixture.tokenizer)
    off = reader_of(enabled - {name})
    models = [Subject(OFF, off, anchor), Subject(ANCHOR, anchor, None)]
    if name in enabled:
        alone = AloneReader(mixture.model, mixture.tokenizer, [name], terms=mixture.terms)
        models = [Subject(ALONE, alone, anchor), Subject(ON, reader_of(enabled), off), *models]
    manifest = read_json(directory / "experts" / f"{name}.bundle" / "manifest.json")
    about = {
        "kind": "mixture",
        "expert": name,
        "enabled": sorted(enabled),
        "digest": digest_file(directory / ABOUT),
        "origin": origin_of(
            mixture.facts[name].bundle_digest, mixture.about["anchor_digest"], manifest["recipe"]
        ),
    }
    return Subjects(models, about, _recipe_of(manifest), enabled <= {name})


def _recipe_of(manifest: dict[str, Any]) -> ExpertRecipe | None:
    """The recipe in an expert's manifest, which was checked; None if this release cannot read it,
    as of an imported expert. What was done after training, and the budget, are no settings."""
    settings = {k: v for k, v in manifest["recipe"].items() if k not in RECORDED}
    try:
        return ExpertRecipe.model_validate(settings)
    except ValidationError:
        return None
