"""Identity: whoever asks, proven by an API key or by a token of the deployer's identity provider.

The settings are a TOML file; the files it names lie beside it:

    api_keys = "keys.json"                # made by: flexolmo serve key add

    [tokens]
    issuer = "https://login.example.org/realms/clinic"
    audience = "flexolmo"

Knows nothing of experts and policies.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from pydantic import Field, model_validator

from flexolmo.config import Settings, read_recipe
from flexolmo.serving.keys import PREFIX, ApiKey, find_key, read_keys
from flexolmo.serving.policy import Principal
from flexolmo.serving.refusal import Refusal
from flexolmo.serving.tokens import IssuerKeys, TokenSettings, read_token


class Identity(Protocol):
    """Proof of who asks."""

    @property
    def files(self) -> list[Path]:
        """Files after a change of which `reread` is due."""

    def reread(self) -> None:
        """Read the files again; ConfigError, and all stays as it was, if they do not hold up."""

    def refresh(self) -> None:
        """Fetch what comes from elsewhere, if it is time; ConfigError if that fails."""

    def identify(self, authorization: str | None) -> Principal:
        """The person who sent this header Authorization; Refusal (401, 503) unless proven."""


class NoIdentity:
    """Everybody is "local": for one machine's own user, on loopback."""

    files: ClassVar[list[Path]] = []

    def reread(self) -> None:
        """Nothing to read."""

    def refresh(self) -> None:
        """Nothing to fetch."""

    def identify(self, authorization: str | None) -> Principal:
        """The subject "local", in no group and with no role."""
        return Principal("local")


class AuthSettings(Settings):
    """Settings of `flexolmo serve --auth`."""

    api_keys: Path | None = Field(None, description="File of hashed API keys.")
    tokens: TokenSettings | None = Field(None, description="Tokens of an identity provider.")

    @model_validator(mode="after")
    def _let_somebody_in(self) -> "AuthSettings":
        if self.api_keys is None and self.tokens is None:
            raise ValueError("neither api_keys nor [tokens] is given, so that nobody could ask")
        return self


@dataclass(frozen=True)
class _Read:
    """All that was read at one time, so that no request is judged by half of it."""

    settings: AuthSettings
    keys: Mapping[str, ApiKey]
    issuer: IssuerKeys | None


def _read_files(path: Path, former: _Read | None) -> _Read:
    """The settings in `path` and the files they name; keys fetched for `former` are kept."""
    settings = read_recipe(path, AuthSettings)
    keys = read_keys(path.parent / settings.api_keys) if settings.api_keys else {}
    tokens, issuer = settings.tokens, None
    if former is not None and former.settings.tokens == tokens:
        issuer = former.issuer
    if tokens is not None and (issuer is None or tokens.key_file is not None):
        issuer = IssuerKeys(tokens, path.parent)
    return _Read(settings, keys, issuer)


class ProvenIdentity:
    """Identity by the settings in the file `path`; ConfigError if they do not hold up."""

    def __init__(self, path: Path):
        self._path = Path(path)
        self._read = _read_files(self._path, None)

    @property
    def files(self) -> list[Path]:
        """The settings, and the files that they name."""
        settings = self._read.settings
        named = [settings.api_keys, settings.tokens.key_file if settings.tokens else None]
        return [self._path, *(self._path.parent / name for name in named if name is not None)]

    def reread(self) -> None:
        """Read the files again; ConfigError, and all stays as it was, if they do not hold up."""
        self._read = _read_files(self._path, self._read)

    def refresh(self) -> None:
        """Fetch the issuer's keys if it is time; ConfigError if that fails."""
        if self._read.issuer is not None:
            self._read.issuer.refresh()

    def identify(self, authorization: str | None) -> Principal:
        """The person who sent this header Authorization; Refusal (401, 503) unless proven."""
        kind, _, text = (authorization or "").partition(" ")
        text = text.strip()
        if kind.lower() != "bearer" or not text:
            raise Refusal(
                401, "missing_credentials", "Send an API key or a token: Authorization: Bearer ..."
            )
        read = self._read
        if read.issuer is None or text.startswith(PREFIX):
            today = datetime.datetime.now(datetime.UTC).date()
            return find_key(read.keys, text, today).principal
        return read_token(text, read.issuer)
