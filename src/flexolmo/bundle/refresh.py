"""Newer revocation lists from elsewhere, taken into a directory of trusted owners.

Where they come from need not be trusted: each counts by its signature alone.
"""

import datetime
from dataclasses import dataclass, field
from pathlib import Path

from flexolmo.bundle.revocation import MAX_LIST_BYTES, SUFFIX, read_list
from flexolmo.bundle.trust import TrustedOwners, signers
from flexolmo.errors import BundleError, SignatureError
from flexolmo.files import hold_directory, read_bytes, write_bytes


@dataclass(frozen=True)
class Refreshed:
    """A line for each list: what was done, and what was refused."""

    done: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def take_lists(directory: Path, source: Path, today: datetime.date | None = None) -> Refreshed:
    """Put the lists in `source`, files *.revoked.json, into `directory` where they are newer.

    A list is taken if a key of its owner has signed it that counts `today` (UTC; default: now) and
    that the list held so far does not revoke, if its number is higher, and if it takes nothing
    back. Lists of owners whom nobody trusts here are passed over, older ones too.

    Raises:
        SignatureError: `directory` does not hold up, or `source` is no directory.
    """
    directory = Path(directory)
    TrustedOwners.load(directory)  # holds up, and is there
    today = today or datetime.datetime.now(datetime.UTC).date()
    try:
        paths = sorted(p for p in Path(source).iterdir() if p.name.endswith(SUFFIX))
    except OSError as e:
        raise SignatureError(f"The lists in {source} cannot be read: {e}.") from None
    found = Refreshed()
    with hold_directory(directory):
        for path in paths:
            try:
                found.done.append(f"{path}: {_take(directory, path, today)}")
            except (BundleError, OSError, ValueError) as e:
                found.refused.append(f"{path}: {e}")
    return found


def _take(directory: Path, path: Path, today: datetime.date) -> str:
    """Take one list if it is newer; what was done, or an error."""
    data = read_bytes(path, MAX_LIST_BYTES, follows_links=False)
    new, envelope = read_list(data, path.name)
    trusted = TrustedOwners.load(directory)
    keys = trusted.keys_of(new.owner)
    if not keys:
        return f"passed over, for {new.owner} is not trusted here"
    held = trusted.list_of(new.owner)
    if held == new:
        return f"number {new.number} of {new.owner} is held already"
    counting = {name: key for name, key in keys.items() if key.counts_on(today)}
    by = signers(counting, envelope).keys()
    if not by:
        raise SignatureError(
            f"number {new.number} of {new.owner} is not signed by a key of theirs that counts "
            f"today; found {', '.join(sorted(envelope.signatures)) or 'none'}. If it is a new key "
            "of theirs, put their rotation, or the key, among the trusted owners first."
        )
    if held is not None and all(held.has_key(name) for name in by):
        raise SignatureError(
            f"number {new.number} of {new.owner} is signed by a key that number {held.number} "
            "revokes."
        )
    if held is not None and new.number < held.number:
        return f"passed over, for number {new.number} of {new.owner} is older than {held.number}"
    if held is not None and not new.follows(held):
        raise SignatureError(
            f"number {new.number} of {new.owner} does not go on from number {held.number}, which "
            "is held: what was revoked stays so. Ask the owner."
        )
    write_bytes(directory / f"{new.owner}{SUFFIX}", data)
    return f"number {new.number} of {new.owner} was taken, {len(new.revoked)} revocations"
