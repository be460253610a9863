"""Facts of an expert that decide who may use it. No torch."""

import datetime
from dataclasses import dataclass

from flexolmo.bundle.manifest import Manifest
from flexolmo.bundle.terms import Terms


@dataclass(frozen=True)
class ExpertFacts:
    """One expert as its bundle states it."""

    owner: str
    key_id: str  # of the key that signed the bundle
    bundle_digest: str  # of its manifest.json
    serial: int  # 0: a bundle of format version 3, which had none
    licence: str
    terms: Terms


@dataclass(frozen=True)
class Barred:
    """An expert that nobody may use at present, though its bundle holds up."""

    facts: ExpertFacts
    why: str  # for people
    until: datetime.date | None = None  # first day of its terms, if it waits for that alone


def facts_of(manifest: Manifest, key_id: str, bundle_digest: str) -> ExpertFacts:
    """The facts of a bundle with this manifest, signed by this key."""
    m = manifest
    return ExpertFacts(m.owner, key_id, bundle_digest, m.serial, m.licence, m.terms)
