"""A record of the newest bundle of each owner and name, so that no older one comes back. No torch.

Only what was seen can be recorded: a mixture in a new place, or a program's first load, begins
with none.
"""

from collections.abc import Mapping
from typing import Any

from flexolmo.bundle.facts import ExpertFacts

Seen = Mapping[str, Mapping[str, Mapping[str, Any]]]  # by name and owner: serial, bundle_digest


def seen_of(name: str, facts: ExpertFacts) -> Seen:
    """The record of one bundle."""
    newest = {"serial": facts.serial, "bundle_digest": facts.bundle_digest}
    return {name: {facts.owner: newest}}


def join_seen(*records: Seen) -> dict[str, dict[str, dict[str, Any]]]:
    """The highest serials of all `records`, in alphabetical order; of equal ones, the earlier."""
    joined: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        for name, owners in record.items():
            for owner, newest in owners.items():
                held = joined.setdefault(name, {}).get(owner)
                if held is None or newest["serial"] > held["serial"]:
                    joined[name][owner] = dict(newest)
    return {name: dict(sorted(joined[name].items())) for name in sorted(joined)}


def find_rollback(seen: Seen, name: str, facts: ExpertFacts) -> list[str]:
    """A line if the bundle is older than one seen of its owner and name, or another with its
    serial, whoever signed it."""
    newest = seen.get(name, {}).get(facts.owner)
    if newest is None or facts.serial > newest["serial"]:
        return []
    if facts.serial == newest["serial"] and facts.bundle_digest == newest["bundle_digest"]:
        return []
    return [
        f"{name}: serial {facts.serial} of {facts.owner}, whose serial {newest['serial']} was seen "
        f"before ({newest['bundle_digest']}, this is {facts.bundle_digest}). Ask the owner for the "
        f"newest; one that is to be used again is packed again, with --serial "
        f"{newest['serial'] + 1} or more"
    ]
