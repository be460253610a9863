"""Decisions: the experts that one request may use, and for every expert why, or why not.

An expert is on if it is asked for, if its owner's terms allow the use, and if the deployer's Cedar
policies permit it. Nothing is permitted by default, and whatever cannot be judged is off. No torch
and no network: a deployer's auditor reads this file.
"""

import datetime
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexolmo.bundle.terms import PURPOSES, PurposeName
from flexolmo.errors import PolicyError
from flexolmo.inference.engine import ExpertFacts
from flexolmo.inference.policy import choose_experts
from flexolmo.serving.rules import SCHEMA, cedarpy, read_rules

MAX_NAMES = 500  # groups and roles of one person
MAX_NAME_CHARACTERS = 256


@dataclass(frozen=True)
class Principal:
    """Whoever asks, as the gateway has proven.

    Raises:
        PolicyError: an empty name, one of over 256 or of unprintable characters, or over 500 names.
    """

    subject: str
    groups: frozenset[str] = frozenset()
    roles: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        names = [self.subject, *self.groups, *self.roles]
        if len(names) > 1 + MAX_NAMES:
            raise PolicyError(f"{len(names) - 1} groups and roles; at most {MAX_NAMES} are judged.")
        for name in names:
            if not (1 <= len(name) <= MAX_NAME_CHARACTERS and name.isprintable()):
                raise PolicyError(
                    f"{name[:MAX_NAME_CHARACTERS]!a} cannot name a person, a group or a role: "
                    f"expected 1 to {MAX_NAME_CHARACTERS} printable characters."
                )


@dataclass(frozen=True)
class Wish:
    """Experts that a request asks for: exactly `only`, or all but `without`."""

    only: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Yes or no to one expert."""

    expert: str
    is_asked: bool
    is_enabled: bool
    reasons: tuple[str, ...]  # every rule and term that decided, by name; for people


@dataclass(frozen=True)
class Decision:
    """Yes or no to every expert, for one request."""

    enabled: frozenset[str]
    verdicts: Mapping[str, Verdict]  # of every expert, alphabetically
    policy_digest: str
    decided: datetime.datetime  # UTC


@dataclass(frozen=True)
class Policies:
    """A deployer's policies, read and validated once."""

    digest: str  # of all that they were read from
    names: tuple[str, ...]  # of every policy, as reasons give them
    _parsed: cedarpy.PolicySet

    @classmethod
    def load(cls, directory: Path) -> "Policies":
        """The policies in `*.cedar` of `directory`; none permit nothing.

        Raises:
            PolicyError: policies that cannot be used, each with its file and line; see `read_rules`.
        """
        rules, digest = read_rules(directory)
        whole = {"staticPolicies": rules, "templates": {}, "templateLinks": []}
        return cls(digest, tuple(rules), cedarpy.PolicySet.from_json_str(json.dumps(whole)))

    def decide(
        self,
        principal: Principal,
        purposes: frozenset[PurposeName],
        wish: Wish,
        experts: Mapping[str, ExpertFacts],
        now: datetime.datetime,
    ) -> Decision:
        """The decision on one request at `now`, which has a time zone.

        Every stated purpose must be allowed and permitted; no purpose stated is the purpose "any".

        Raises:
            PolicyError: a wish for an unknown expert or for both `only` and `without`, an unknown
                purpose, or a time without a time zone: a typing error must not switch.
        """
        raise NotImplementedError
