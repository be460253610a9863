"""Terms of use that an owner signs: for what, by whom, until when, and with which credit.

A closed vocabulary of purposes, so that a request's stated purpose and an owner's permission mean
the same. Judges by terms alone; knows nothing of policies, tokens or servers. No torch: an owner's
lawyer and a deployer's auditor read this file.
"""

import datetime
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from flexolmo.bundle.strict import Claim
from flexolmo.errors import ConfigError

PurposeName = Literal[
    "any",
    "clinical-care",
    "commercial",
    "education",
    "general-research",
    "health-research",
    "methods-research",
    "non-commercial",
    "population-research",
    "public-information",
    "training",
]


@dataclass(frozen=True)
class Purpose:
    """One purpose of the vocabulary."""

    meaning: str  # as people are shown it
    source: str  # code and name in the vocabulary that it is taken from, or "ours"
    within: PurposeName | None  # the wider purpose that a permission for it includes this one


PURPOSES: dict[PurposeName, Purpose] = {
    "any": Purpose("Any purpose whatever.", "DUO:0000004, no restriction", None),
    "clinical-care": Purpose(
        "Care of patients: diagnosis, treatment and its documentation.",
        "DUO:0000043, clinical care use",
        "any",
    ),
    "commercial": Purpose(
        "Use meant for, or directed towards, commercial advantage or payment.",
        "CC REL, CommercialUse, as an ODRL action",
        "any",
    ),
    "education": Purpose("Teaching and learning at an institution of education.", "ours", "any"),
    "general-research": Purpose(
        "Research of any kind, health and biomedicine included.",
        "DUO:0000042, general research use",
        "any",
    ),
    "health-research": Purpose(
        "Research on health, medicine or biomedicine.",
        "DUO:0000006, health or medical or biomedical research",
        "general-research",
    ),
    "methods-research": Purpose(
        "Development of methods, software or algorithms.",
        "DUO:0000015, which prohibits general methods research",
        "general-research",
    ),
    "non-commercial": Purpose(
        "Use without commercial advantage or payment.",
        "DUO:0000046, non-commercial use only",
        "any",
    ),
    "population-research": Purpose(
        "Research on the origin or ancestry of populations.",
        "DUO:0000011, population origins or ancestry research",
        "general-research",
    ),
    "public-information": Purpose(
        "Answers to the general public, such as those of a library or an authority.", "ours", "any"
    ),
    "training": Purpose("Use of answers to train, tune or distil another model.", "ours", "any"),
}


def purposes_around(name: PurposeName) -> list[PurposeName]:
    """`name` and every wider purpose that includes it, narrowest first."""
    found = [name]
    while (wider := PURPOSES[found[-1]].within) is not None:
        found.append(wider)
    return found


def read_date(value: Any) -> Any:
    """A date as it is or as text like 2026-01-31; ValueError for anything else."""
    if isinstance(value, datetime.date):
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
        return datetime.date.fromisoformat(value)
    raise ValueError("a date like 2026-01-31, or null")  # pydantic's own also takes Unix seconds


def _in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    if list(names) != sorted(set(names)):
        raise ValueError("names in alphabetical order, each once")
    return names


Day = Annotated[datetime.date, BeforeValidator(read_date)]
PurposeNames = Annotated[tuple[PurposeName, ...], AfterValidator(_in_order)]
GroupName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}$")]
GroupNames = Annotated[tuple[GroupName, ...], Field(max_length=1000), AfterValidator(_in_order)]


class Terms(Claim):
    """Terms of use of one expert. The text is the contract; the fields are what a server enforces.

    Days are in UTC. `audience` names groups of people, one of which whoever asks must be in; empty:
    anybody. A permitted purpose permits those within it. A prohibited one comes before any
    permission, and prohibits those within it and those that include it. `attribution` is what an
    answer must say of its source.
    """

    text: Annotated[str, StringConstraints(min_length=1, max_length=20_000)]
    permitted: Annotated[PurposeNames, Field(min_length=1)]
    prohibited: PurposeNames
    audience: GroupNames
    valid_from: Day | None
    valid_until: Day | None  # last day of use
    attribution: Annotated[str, StringConstraints(min_length=1, max_length=1000)] | None

    @model_validator(mode="after")
    def _leave_something(self) -> "Terms":
        if self.valid_from and self.valid_until and self.valid_from > self.valid_until:
            raise ValueError("valid_from is after valid_until, so that no day of use is left")
        if "any" in self.prohibited:
            raise ValueError("'any' is prohibited, so that no use is left")
        return self

    def summary(self) -> str:
        """All but the text, for people, in one sentence without a full stop."""
        parts = [f"permitted: {', '.join(self.permitted)}"]
        if self.prohibited:
            parts.append(f"prohibited: {', '.join(self.prohibited)}")
        if self.audience:
            parts.append(f"only for {', '.join(self.audience)}")
        if self.valid_from is not None:
            parts.append(f"from {self.valid_from}")
        if self.valid_until is not None:
            parts.append(f"until {self.valid_until}")
        if self.attribution is not None:
            parts.append(f"to be credited: {self.attribution}")
        return "; ".join(parts)

    def refusals(
        self, purposes: Collection[PurposeName], groups: Collection[str], today: datetime.date
    ) -> list[str]:
        """Reasons why these terms refuse a use for all of `purposes` by a member of `groups`
        `today` (UTC), one sentence each; empty if they allow it. No purpose stated is the purpose
        "any".
        """
        found = self.refusals_of_day(today)
        for name in sorted(purposes) or ["any"]:
            around = purposes_around(name)
            wider = [n for n in around if n in self.prohibited]
            within = [n for n in self.prohibited if name in purposes_around(n)]
            if wider:
                found.append(f"the owner's terms prohibit {wider[0]}")
            elif not any(n in self.permitted for n in around):
                found.append(
                    f"the owner's terms permit {', '.join(self.permitted)}, not {name}"
                    + ("" if purposes else ", which stands for no purpose stated")
                )
            elif within:
                found.append(f"the owner's terms prohibit {within[0]}, which {name} includes")
        if self.audience and not set(self.audience) & set(groups):
            found.append(f"the owner's terms are for {', '.join(self.audience)} alone")
        return found

    def refusals_of_day(self, today: datetime.date) -> list[str]:
        """Reasons why these terms refuse any use `today` (UTC); empty if they allow some."""
        found = []
        if self.valid_from is not None and today < self.valid_from:
            found.append(f"the owner's terms begin on {self.valid_from}")
        if self.valid_until is not None and today > self.valid_until:
            found.append(f"the owner's terms expired on {self.valid_until}")
        return found


def make_terms(
    text: str,
    permitted: Iterable[str],
    *,
    prohibited: Iterable[str] = (),
    audience: Iterable[str] = (),
    valid_from: datetime.date | None = None,
    valid_until: datetime.date | None = None,
    attribution: str | None = None,
) -> Terms:
    """Terms of these names, brought into order; ConfigError names what no terms can hold."""
    try:
        return Terms.model_validate(
            {
                "text": text,
                "permitted": tuple(sorted(set(permitted))),
                "prohibited": tuple(sorted(set(prohibited))),
                "audience": tuple(sorted(set(audience))),
                "valid_from": valid_from,
                "valid_until": valid_until,
                "attribution": attribution,
            }
        )
    except ValidationError as e:
        lines = [
            f"{' '.join(str(p) for p in x['loc'][:1])}: found {x['input']!a:.100}: {x['msg']}"
            for x in e.errors()
        ]
        raise ConfigError(
            "These are no terms of use:\n  "
            + "\n  ".join(lines)
            + "\nThe purposes and their meanings: flexolmo expert purposes."
        ) from None
