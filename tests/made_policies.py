"""Facts about experts and Cedar policies, for the tests of all that decides."""

import datetime
from pathlib import Path
from typing import Any

from flexolmo.bundle.facts import ExpertFacts
from flexolmo.bundle.terms import Terms
from flexolmo.serving.policy import Policies

NOON = datetime.datetime(2026, 11, 30, 12, tzinfo=datetime.UTC)
PERMIT_ALL = '@id("all") permit (principal, action, resource);'


def facts(owner: str = "Ann", serial: int = 1, licence: str = "MIT", **terms: Any) -> ExpertFacts:
    """An expert of `owner` under terms that allow everything but what `terms` change."""
    free = {
        "text": "For tests.",
        "permitted": ("any",),
        "prohibited": (),
        "audience": (),
        "valid_from": None,
        "valid_until": None,
        "attribution": None,
    }
    digest = "sha256:" + "ab" * 32
    return ExpertFacts(owner, digest, digest, serial, licence, Terms(**free | terms))


def write_policies(directory: Path, *policies: str) -> Path:
    """A directory with one file for each text."""
    directory.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(policies):
        (directory / f"p{i}.cedar").write_text(text, encoding="utf-8")
    return directory


def load_policies(directory: Path, *policies: str) -> Policies:
    """`policies`, loaded from a directory of their own."""
    return Policies.load(write_policies(directory, *policies))
