"""Expectations: a table of requests and of the experts that policies must give to each.

A deployer keeps one beside the policies and has it tested at every change.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, Field

from flexolmo.bundle.facts import ExpertFacts
from flexolmo.bundle.terms import PurposeName
from flexolmo.config import Settings, parse_settings
from flexolmo.errors import ConfigError, PolicyError
from flexolmo.files import read_bytes
from flexolmo.inference.policy import choose_experts
from flexolmo.serving.facts import read_facts
from flexolmo.serving.policy import Policies, Principal, Wish

MAX_FILE_BYTES = 4 << 20


class Case(Settings):
    """One request, and the experts that must be on for it; every other one must be off."""

    name: str  # for people
    subject: str = Field(alias="as")
    groups: frozenset[str] = frozenset()
    roles: frozenset[str] = frozenset()
    purposes: frozenset[PurposeName] = frozenset()
    at: AwareDatetime  # given always: an expectation that goes by today's date would fail one day
    only: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    on: frozenset[str]


class Expectations(Settings):
    """A table of cases, and what they are tried on; paths are relative to the file's directory."""

    policies: Path
    model: Path  # a mixture's directory, or a file of facts about its experts
    cases: Annotated[list[Case], Field(min_length=1)]


def try_expectations(file: Path) -> dict[str, list[str]]:
    """The differences from what the table in `file` (TOML) expects, by the name of each case.

    Returns:
        For each case, in order, a line for every expert that is on or off against expectation.

    Raises:
        ConfigError: not such a table, or two cases of one name.
        PolicyError: policies or facts that cannot be used, or an expert or purpose that is unknown.
    """
    file = Path(file)
    table = _read(file)
    policies = Policies.load(file.parent / table.policies)
    experts = read_facts(file.parent / table.model)
    return {case.name: _differences(case, policies, experts) for case in table.cases}


def _read(file: Path) -> Expectations:
    try:
        values = tomllib.loads(read_bytes(file, MAX_FILE_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{file} cannot be read as TOML: {e}.") from None
    table = parse_settings(values, Expectations, str(file))
    names = [case.name for case in table.cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"In {file}: two cases have the name {', '.join(map(repr, twice))}.")
    return table


def _differences(case: Case, policies: Policies, experts: Mapping[str, ExpertFacts]) -> list[str]:
    try:
        choose_experts(list(experts), only=case.on)  # refuses names that there are not
        decision = policies.decide(
            Principal(case.subject, case.groups, case.roles),
            case.purposes,
            Wish(case.only, case.without),
            experts,
            case.at,
        )
    except PolicyError as e:
        raise PolicyError(f"Case {case.name!r}: {e}") from None
    return [
        f"{name}: expected {'on' if name in case.on else 'off'}, "
        f"found {'on' if verdict.is_enabled else 'off'}: {'; '.join(verdict.reasons)}"
        for name, verdict in decision.verdicts.items()
        if verdict.is_enabled != (name in case.on)
    ]
