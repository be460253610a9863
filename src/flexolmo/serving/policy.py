"""Decisions: the experts that one request may use, and for every expert why, or why not.

An expert is on if it is asked for, if its owner's terms allow the use, and if the deployer's Cedar
policies permit it. Nothing is permitted by default, and whatever cannot be judged is off. No torch
and no network: a deployer's auditor reads this file.
"""

import datetime
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cedarpy

from flexolmo.bundle.facts import ExpertFacts
from flexolmo.bundle.terms import PURPOSES, PurposeName
from flexolmo.errors import PolicyError
from flexolmo.inference.policy import choose_experts
from flexolmo.serving.rules import SCHEMA, read_rules

Action = Literal["activate", "trace"]
MAX_NAMES = 500  # groups and roles of one person
MAX_NAME_CHARACTERS = 256


@dataclass(frozen=True)
class Principal:
    """Person or program that asks, as the gateway has proven.

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
    _parsed: cedarpy.PolicySet  # in the same order: Cedar calls them policy0, policy1 and so on

    @classmethod
    def load(cls, directory: Path) -> "Policies":
        """The policies in `*.cedar` of `directory`; where there are none, nothing is permitted.

        Raises:
            PolicyError: policies that cannot be used, each with its file and line.
        """
        rules, digest = read_rules(directory)
        return cls(digest, tuple(rules), cedarpy.PolicySet.from_str("\n".join(rules.values())))

    def decide(
        self,
        principal: Principal,
        purposes: frozenset[PurposeName],
        wish: Wish,
        experts: Mapping[str, ExpertFacts],
        now: datetime.datetime,
        barred: Mapping[str, str] | None = None,
        action: Action = "activate",
    ) -> Decision:
        """The decision on one request at `now`, which has a time zone.

        Every stated purpose must be allowed and permitted; no purpose stated is the purpose "any".

        Args:
            barred: Experts that nobody may use, and why.

        Raises:
            PolicyError: a wish for an unknown expert or for both `only` and `without`, an unknown
                purpose, or a time without a time zone: a typing error must not switch.
        """
        unknown = sorted(purposes - set(PURPOSES))
        if unknown:
            raise PolicyError(f"No purpose {', '.join(unknown)}: there are {', '.join(PURPOSES)}.")
        if now.tzinfo is None:
            raise PolicyError(f"The time {now} has no time zone, by which terms and policies go.")
        now = now.astimezone(datetime.UTC)
        asked = choose_experts(list(experts), only=wish.only, without=wish.without)
        around = _PURPOSES.with_added_json_str(json.dumps([_user(principal)]), SCHEMA)
        verdicts = {}
        for name in sorted(experts):
            if name not in asked:
                verdict = Verdict(name, False, False, ("the request does not ask for it",))
            elif barred and name in barred:
                verdict = Verdict(name, True, False, (barred[name],))
            else:
                verdict = self._judge(name, experts[name], principal, purposes, now, around, action)
            verdicts[name] = verdict
        enabled = frozenset(name for name, verdict in verdicts.items() if verdict.is_enabled)
        return Decision(enabled, verdicts, self.digest, now)

    def _judge(
        self,
        name: str,
        facts: ExpertFacts,
        principal: Principal,
        purposes: frozenset[PurposeName],
        now: datetime.datetime,
        around: cedarpy.Entities,
        action: Action,
    ) -> Verdict:
        """Yes or no to an expert that is asked for; whatever fails on the way is a no."""
        permits = ["the owner's terms allow it"]
        refusals = []
        try:
            refusals += facts.terms.refusals(purposes, principal.groups, now.date())
            entities = around.with_added_json_str(json.dumps([_expert(name, facts)]), SCHEMA)
            for purpose in sorted(purposes) or ["any"]:
                request = _request(principal.subject, action, name, purpose, now)
                answer = cedarpy.is_authorized(request, self._parsed, entities, SCHEMA)
                is_permitted, reasons = self._explain(answer)
                found = permits if is_permitted else refusals
                found += [f"for {purpose}: {reason}" for reason in reasons]
        except Exception as e:
            refusals.append(f"it cannot be judged: {e}")
        return Verdict(name, True, not refusals, tuple(refusals or permits))

    def _explain(self, answer: cedarpy.AuthzResult) -> tuple[bool, list[str]]:
        """Yes or no of Cedar, and each policy that decided or failed; a no has a reason always.

        Cedar passes over a policy that fails, even one that forbids; here its failure is a no.
        """
        failed = "^error while evaluating policy `(policy[0-9]+)`"
        errors = [
            re.sub(failed, lambda found: f"{self._name(found[1])} fails", error)
            for error in answer.diagnostics.errors
        ]
        rules = sorted(self._name(rule) for rule in answer.diagnostics.reasons)
        if answer.allowed and not errors:
            return True, [f"permitted by {rule}" for rule in rules]
        forbids = [] if answer.allowed else [f"forbidden by {rule}" for rule in rules]
        return False, errors + forbids or ["no policy permits it"]

    def _name(self, rule: str) -> str:
        """Our name of the policy that Cedar calls `rule`."""
        return self.names[int(rule.removeprefix("policy"))]


# --- as Cedar takes them -------------------------------------------------------------------------
# Names are values of JSON here and never part of Cedar text, so that none can be read as syntax.


def _reference(kind: str, name: str) -> dict[str, str]:
    return {"type": f"FlexOlmo::{kind}", "id": name}


def _references(kind: str, names: Iterable[str]) -> list[dict[str, str]]:
    return [_reference(kind, name) for name in sorted(names)]


def _moment(text: str) -> dict[str, Any]:
    return {"__extn": {"fn": "datetime", "arg": text}}


def _purpose(name: PurposeName) -> dict[str, Any]:
    within = PURPOSES[name].within
    parents = [] if within is None else [_reference("Purpose", within)]
    return {"uid": _reference("Purpose", name), "attrs": {}, "parents": parents}


def _user(principal: Principal) -> dict[str, Any]:
    parents = _references("Group", principal.groups) + _references("Role", principal.roles)
    return {"uid": _reference("User", principal.subject), "attrs": {}, "parents": parents}


def _expert(name: str, facts: ExpertFacts) -> dict[str, Any]:
    terms: dict[str, Any] = {
        "permitted": _references("Purpose", facts.terms.permitted),
        "prohibited": _references("Purpose", facts.terms.prohibited),
        "audience": _references("Group", facts.terms.audience),
    }
    if facts.terms.valid_from is not None:
        terms["valid_from"] = _moment(facts.terms.valid_from.isoformat())
    if facts.terms.valid_until is not None:
        terms["valid_until"] = _moment(facts.terms.valid_until.isoformat())
    if facts.terms.attribution is not None:
        terms["attribution"] = facts.terms.attribution
    attributes = {"owner": facts.owner, "licence": facts.licence, "serial": facts.serial}
    return {
        "uid": _reference("Expert", name),
        "attrs": {**attributes, "terms": terms},
        "parents": [],
    }


def _request(
    subject: str, action: Action, expert: str, purpose: str, now: datetime.datetime
) -> dict[str, Any]:
    time = now.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"
    return {
        "principal": _reference("User", subject),
        "action": _reference("Action", action),
        "resource": _reference("Expert", expert),
        "context": {"purpose": _reference("Purpose", purpose), "time": _moment(time)},
    }


_PURPOSES = cedarpy.Entities.from_json_str(json.dumps([_purpose(n) for n in PURPOSES]), SCHEMA)
