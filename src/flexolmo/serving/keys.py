"""API keys: made, listed and revoked; kept only as hashes.

A key is 256 random bits, which nobody can search for, so SHA-256 hides it: the slow hashes made for
passwords protect what people think up, and would only slow each request here.
"""

import datetime
import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import StringConstraints, ValidationError, model_validator

from flexolmo.bundle.strict import Claim, parse_json
from flexolmo.bundle.terms import Day
from flexolmo.errors import ConfigError, PolicyError
from flexolmo.files import lock_directory, write_json
from flexolmo.serving.policy import Principal
from flexolmo.serving.refusal import Refusal

PREFIX = "flexolmo_"  # by which people, and programs that look for leaked secrets, know a key
_KEY = re.compile(PREFIX + "([0-9a-f]{12})_[0-9a-f]{64}")
_MAX_FILE_BYTES = 16 << 20


class ApiKey(Claim):
    """One key, as it is kept, and whom it stands for."""

    id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12}$")]  # in the key; no secret
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]  # of the whole key
    subject: str
    groups: tuple[str, ...]
    roles: tuple[str, ...]
    created: Day
    expires: Day | None  # last day of use, in UTC
    revoked: Day | None

    @model_validator(mode="after")
    def _stand_for_somebody(self) -> "ApiKey":
        try:
            _ = self.principal
        except PolicyError as e:
            raise ValueError(str(e)) from None
        return self

    @property
    def principal(self) -> Principal:
        """The person or program that holds the key."""
        return Principal(self.subject, frozenset(self.groups), frozenset(self.roles))


class _KeyFile(Claim):
    format: Literal["flexolmo-keys"]
    format_version: Literal[1]
    keys: tuple[ApiKey, ...]


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_keys(path: Path) -> dict[str, ApiKey]:
    """Keys in the file `path`, by id.

    Raises:
        ConfigError: no such file, not one of keys, or one that others may change.
    """
    try:
        with open(path, "rb") as f:
            mode = stat.S_IMODE(os.fstat(f.fileno()).st_mode)
            data = f.read(_MAX_FILE_BYTES)
    except OSError as e:
        raise ConfigError(f"The keys {path} cannot be read: {e.strerror}.") from None
    if mode & 0o022:
        raise ConfigError(
            f"The keys {path} have mode {mode:04o}, so that others may add their own. If nobody "
            "has, make it 0600; else make new keys."
        )
    try:
        parse_json(data)  # refuses what could be read in two ways
        found = _KeyFile.model_validate_json(data)
    except ValueError as e:
        said = e.errors()[0]["msg"] if isinstance(e, ValidationError) else e
        raise ConfigError(f"{path} is not a file of API keys: {said}.") from None
    return {key.id: key for key in found.keys}


def find_key(keys: Mapping[str, ApiKey], text: str, today: datetime.date) -> ApiKey:
    """The key that somebody sent; Refusal unless it is one of `keys` that is in use `today`."""
    form = _KEY.fullmatch(text)
    found = keys.get(form[1]) if form else None
    if found is None or not hmac.compare_digest(found.sha256, _digest(text)):
        raise Refusal(401, "invalid_api_key", "This API key is not known here.")
    if found.revoked is not None:
        raise Refusal(401, "revoked_api_key", f"This API key was revoked on {found.revoked}.")
    if found.expires is not None and found.expires < today:
        raise Refusal(401, "expired_api_key", f"This API key expired on {found.expires}.")
    return found


def add_key(
    path: Path,
    subject: str,
    groups: Iterable[str] = (),
    roles: Iterable[str] = (),
    expires: datetime.date | None = None,
) -> str:
    """Make a key for `subject`, put its hash into the file `path`, and return the key itself, which
    is nowhere else.

    Raises:
        ConfigError: a name that cannot be judged, or a last day that is over.
    """
    today = _today()
    if expires is not None and expires < today:
        raise ConfigError(f"The key would have expired on {expires}; today is {today} (UTC).")
    number = secrets.token_hex(6)
    text = f"{PREFIX}{number}_{secrets.token_hex(32)}"
    try:
        key = ApiKey(
            id=number,
            sha256=_digest(text),
            subject=subject,
            groups=tuple(sorted(set(groups))),
            roles=tuple(sorted(set(roles))),
            created=today,
            expires=expires,
            revoked=None,
        )
    except ValidationError as e:
        raise ConfigError(e.errors()[0]["msg"].removeprefix("Value error, ")) from None
    with _change(path) as keys:
        keys[number] = key
    return text


def revoke_key(path: Path, number: str) -> ApiKey:
    """Mark the key of id `number` in the file `path` as revoked; ConfigError for an unknown one."""
    with _change(path) as keys:
        if number not in keys:
            raise ConfigError(f"{path} has no key {number!r}. Ids: flexolmo serve key list.")
        if keys[number].revoked is None:
            keys[number] = keys[number].model_copy(update={"revoked": _today()})
        return keys[number]


@contextmanager
def _change(path: Path) -> Iterator[dict[str, ApiKey]]:
    """Keys to change, written when done; one change at a time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_directory(path.parent, wait=True) as is_held:
        if not is_held:
            raise ConfigError(f"{path.parent} cannot be locked: keep the keys on a local disk.")
        keys = read_keys(path) if path.exists() else {}
        yield keys
        file = _KeyFile(format="flexolmo-keys", format_version=1, keys=tuple(keys.values()))
        write_json(path, file.model_dump(mode="json"), is_private=True)
