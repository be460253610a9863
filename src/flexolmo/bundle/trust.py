"""Owners that a coordinator trusts: their keys, the days on which these count, and what is revoked.

A directory holds all of it. Every file is the coordinator's word by being there; rotations and
revocation lists are signed by the owner too. `docs/guides/keys.md` says how to keep one.

    OWNER.pub, OWNER.from-DATE.pub, OWNER.until-DATE.pub, OWNER.from-DATE.until-DATE.pub
    *.rotation.json       a new key of an owner, signed by the one before
    OWNER.revoked.json    the owner's newest revocation list
"""

import datetime
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from flexolmo.bundle import revocation, rotation
from flexolmo.bundle.facts import Barred, ExpertFacts
from flexolmo.bundle.manifest import check_owner
from flexolmo.bundle.revocation import MAX_LIST_BYTES, Revocation, RevocationList, read_list
from flexolmo.bundle.rotation import Rotation, read_rotation
from flexolmo.bundle.signing import MAX_KEY_BYTES, Envelope, key_id
from flexolmo.bundle.strict import raise_listed
from flexolmo.bundle.terms import read_date
from flexolmo.errors import BundleError, SignatureError
from flexolmo.files import read_bytes

_DATE = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
_KEY_FILE = re.compile(rf"(.+?)(?:\.from-({_DATE}))?(?:\.until-({_DATE}))?\.pub")


@dataclass(frozen=True)
class TrustedKey:
    """One public key of an owner, with the first and last day (UTC) on which it may sign."""

    owner: str
    public_pem: bytes
    valid_from: datetime.date | None = None
    valid_until: datetime.date | None = None

    def counts_on(self, day: datetime.date) -> bool:
        """True if what it signs on `day` counts."""
        return (self.valid_from is None or self.valid_from <= day) and (
            self.valid_until is None or day <= self.valid_until
        )

    def days(self) -> str:
        """The days on which it counts, for people."""
        return f"from {self.valid_from or 'ever'} until {self.valid_until or 'further notice'}"


class TrustedOwners:
    """The owners a coordinator trusts, by key id. An empty set trusts nobody.

    With `allows_unknown`, keys that it does not hold are let in too, under no owner's name.
    """

    def __init__(
        self,
        keys: Mapping[str, TrustedKey],
        lists: Iterable[RevocationList] = (),
        allows_unknown: bool = False,
    ):
        self._keys = dict(keys)
        self._lists = {held.owner: held for held in lists}
        self.allows_unknown = allows_unknown

    @classmethod
    def from_keys(cls, keys: Mapping[str, bytes]) -> "TrustedOwners":
        """Trust `keys`, owner's name to PEM public key; refuses a key that two owners share."""
        lines: list[str] = []
        found = _identify({owner: TrustedKey(owner, pem) for owner, pem in keys.items()}, lines)
        _refuse("The trusted owners", lines)
        return cls(found)

    @classmethod
    def load(cls, directory: Path) -> "TrustedOwners":
        """Trust what the files in `directory` say; anything else there is refused by name.

        Raises SignatureError, naming each file, for a key that is none or that two owners share, a
        rotation or list that no trusted key of its owner has signed, and two successors of a key.
        """
        directory = Path(directory)
        lines: list[str] = []
        keys: dict[str, TrustedKey] = {}
        rotations: dict[str, tuple[Rotation, Envelope]] = {}
        lists: dict[str, tuple[RevocationList, Envelope]] = {}
        try:
            names = sorted(p.name for p in directory.iterdir() if not p.name.startswith("."))
        except OSError as e:
            raise SignatureError(
                f"The trusted owners in {directory} cannot be read: {e}. "
                "Name a directory of <owner>.pub files."
            ) from None
        for name in names:
            path = directory / name
            try:
                if name.endswith(rotation.SUFFIX):
                    rotations[name] = read_rotation(read_bytes(path, MAX_KEY_BYTES), name)
                elif name.endswith(revocation.SUFFIX):
                    lists[name] = read_list(read_bytes(path, MAX_LIST_BYTES), name)
                else:
                    keys[name] = _read_key(path)
            except (BundleError, OSError, ValueError) as e:
                lines.append(f"{name!r}: {e}")
        found = _identify(keys, lines)
        _apply_rotations(found, rotations, lines)
        for name, (held, envelope) in lists.items():
            if name != f"{held.owner}{revocation.SUFFIX}":
                lines.append(f"{name!r}: it is the list of {held.owner!r}")
            elif not signers(TrustedOwners(found).keys_of(held.owner), envelope):
                lines.append(f"{name!r}: no key of {held.owner!r} that is here has signed it")
        _refuse(str(directory), lines)
        return cls(found, (held for held, _ in lists.values()))

    @property
    def owners(self) -> list[str]:
        """Names of all owners, alphabetically."""
        return sorted({key.owner for key in self._keys.values()})

    def owner_of(self, key_id: str) -> str | None:
        """The name under which the key is trusted, or None."""
        return self._keys[key_id].owner if key_id in self._keys else None

    def keys_of(self, owner: str) -> dict[str, TrustedKey]:
        """The keys trusted for `owner`, by key id."""
        return {name: key for name, key in self._keys.items() if key.owner == owner}

    def list_of(self, owner: str) -> RevocationList | None:
        """The owner's revocation list that is held, or None."""
        return self._lists.get(owner)

    def find_revocation(self, name: str, facts: ExpertFacts) -> Revocation | None:
        """The owner's revocation of the expert `name`, with reason and date, or None."""
        held = self._lists.get(facts.owner)
        return None if held is None else held.find(name, facts)

    def find_bar(self, name: str, facts: ExpertFacts, today: datetime.date) -> Barred | None:
        """The bar by which the owner lets nobody use the expert `name` `today` (UTC), or None."""
        revoked = self.find_revocation(name, facts)
        if revoked is not None:
            return Barred(facts, f"{name} was {revoked}.")
        days = facts.terms.refusals_of_day(today)
        if not days:
            return None
        begins = facts.terms.valid_from
        is_early = begins is not None and today < begins
        return Barred(facts, f"{name}: {', '.join(days)}.", begins if is_early else None)


ANY_SIGNER = TrustedOwners({}, allows_unknown=True)


def _refuse(what: str, lines: list[str]) -> None:
    raise_listed(
        SignatureError,
        f"{what} cannot be loaded:",
        lines,
        "Expected <owner>.pub with the public key of each owner, rotations and revocation lists "
        "that these keys have signed, and nothing else (docs/guides/keys.md).",
    )


def _read_key(path: Path) -> TrustedKey:
    named = _KEY_FILE.fullmatch(path.name)
    if named is None:
        raise ValueError("found a file of another name")
    owner, first, last = named.groups()
    days = [None if day is None else read_date(day) for day in (first, last)]
    return TrustedKey(owner, read_bytes(path, MAX_KEY_BYTES), *days)


def _identify(keys: Mapping[str, TrustedKey], lines: list[str]) -> dict[str, TrustedKey]:
    """`keys`, by where they are from, by key id; a line for each that cannot be trusted."""
    found: dict[str, TrustedKey] = {}
    for where, key in keys.items():
        try:
            check_owner(key.owner)
            name = key_id(key.public_pem)
        except (ValueError, SignatureError) as e:
            lines.append(f"{where!r}: {e}")
            continue
        if name in found:
            lines.append(f"{where!r}: same key as {found[name].owner!r}, expected its own")
        found[name] = key
    return found


def _apply_rotations(
    keys: dict[str, TrustedKey],
    rotations: Mapping[str, tuple[Rotation, Envelope]],
    lines: list[str],
) -> None:
    """Add to `keys` those that rotations bring, and end those that they replace."""
    left = dict(rotations)
    replaced: dict[str, str] = {}  # key id to the file that says so
    while ready := [n for n, (r, _) in left.items() if r.old_key_id in keys]:
        for where in ready:
            stated, envelope = left.pop(where)
            old = keys[stated.old_key_id]
            pem = stated.new_public_key.encode()
            try:
                envelope.verify(old.public_pem)
            except SignatureError as e:
                lines.append(f"{where!r}: {e}")
                continue
            if stated.owner != old.owner:
                lines.append(f"{where!r}: for {stated.owner!r}, by a key of {old.owner!r}")
            elif stated.old_key_id in replaced:
                other = replaced[stated.old_key_id]
                lines.append(f"{where!r}: the old key has another successor, by {other!r}")
            elif key_id(pem) in keys:
                lines.append(f"{where!r}: the new key is trusted already")
            else:
                replaced[stated.old_key_id] = where
                ends = min(old.valid_until or stated.valid_from, stated.valid_from)
                keys[stated.old_key_id] = replace(old, valid_until=ends)
                keys[key_id(pem)] = TrustedKey(old.owner, pem, stated.valid_from)
    lines += [f"{where!r}: its old key is not trusted here" for where in left]


def signers(keys: Mapping[str, TrustedKey], envelope: Envelope) -> dict[str, TrustedKey]:
    """The ones of `keys` that have signed the statement, by key id."""
    found = {}
    for name, key in keys.items():
        with suppress(SignatureError):
            envelope.verify(key.public_pem)
            found[name] = key
    return found


def load_owners(trust: Path | None, allows_unknown: bool) -> TrustedOwners | None:
    """The owners whose keys are in the directory `trust`, and with `allows_unknown` every other
    signer too; None if nobody is trusted."""
    if trust is None:
        return ANY_SIGNER if allows_unknown else None
    owners = TrustedOwners.load(trust)
    owners.allows_unknown = allows_unknown
    return owners
