"""JSON Web Tokens of one identity provider: whose keys they are checked with, and whom they name.

Public keys of the issuer come by OpenID Connect Discovery, from the address of its JWKS (RFC 7517),
or from such a file. They are fetched by `refresh`, never while somebody waits, so that an issuer
that hangs holds nobody up. Source: RFC 7519, RFC 8725.
"""

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jwt
from pydantic import Field, model_validator

from flexolmo.config import Settings
from flexolmo.errors import ConfigError, PolicyError
from flexolmo.files import parse_json
from flexolmo.serving.policy import Principal
from flexolmo.serving.refusal import Refusal

# Signatures by a private key alone: with HMAC, whoever knows the public key could sign.
Algorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
]
MAX_TOKEN_CHARACTERS = 16 << 10
MAX_DOCUMENT_BYTES = 1 << 20
_DISCOVERY = "/.well-known/openid-configuration"
_TIMEOUT_SECONDS = 5.0
_RENEW_SECONDS = 300.0  # while all is well
_RETRY_SECONDS = 10.0  # after a failure, or for a key that is not known
_STALE_SECONDS = 3600.0  # after which keys that cannot be fetched again no longer count


class TokenSettings(Settings):
    """Tokens that are accepted."""

    issuer: str = Field(description="Issuer of tokens, exactly as their iss says it.")
    audience: str = Field(min_length=1, description="Name of this server in a token's aud.")
    jwks: str | None = Field(
        None,
        description="Address, or file, of the issuer's public keys; by default found by OpenID "
        "Connect Discovery.",
    )
    algorithms: tuple[Algorithm, ...] = Field(
        ("RS256", "PS256", "ES256", "EdDSA"),
        min_length=1,
        description="Algorithms of signatures that are accepted.",
    )
    subject_claim: str = Field("sub", description="Claim that names the person.")
    groups_claim: str = Field(
        "groups", description="Claim that lists groups; a dot leads into an object."
    )
    roles_claim: str = Field("roles", description="Claim that lists roles, likewise.")
    leeway_seconds: int = Field(
        30, ge=0, le=300, description="Difference of clocks that is overlooked."
    )

    @property
    def key_file(self) -> str | None:
        """The file with the issuer's keys; None: they are fetched."""
        return None if self.jwks is None or "://" in self.jwks else self.jwks

    @model_validator(mode="after")
    def _check_addresses(self) -> "TokenSettings":
        if self.key_file is None:
            _check_address(self.jwks or self.issuer)
        return self


def _check_address(text: str) -> str:
    """`text` unchanged; ValueError unless nobody on the way can change what is fetched from it."""
    address = urllib.parse.urlsplit(text)
    is_here = address.hostname in ("localhost", "127.0.0.1", "::1")
    if address.scheme != "https" and not (address.scheme == "http" and is_here):
        raise ValueError(f"expected an address that begins with https://, found {text[:200]!r}")
    return text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _fetch_json(address: str) -> Any:
    """The JSON object at `address`; OSError or ValueError if it cannot be had."""
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        with opener.open(_check_address(address), timeout=_TIMEOUT_SECONDS) as answer:
            data = answer.read(MAX_DOCUMENT_BYTES + 1)
    except http.client.HTTPException as e:
        raise ValueError(f"{address} answers with {type(e).__name__}") from None
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"{address} answers with over {MAX_DOCUMENT_BYTES:,} bytes")
    found = parse_json(data)
    if not isinstance(found, dict):
        raise ValueError(f"{address} answers with something other than a JSON object")
    return found


class IssuerKeys:
    """Public keys of an issuer, by which its tokens are checked.

    A file named by `settings` is read at once, from `directory` if its path is relative.
    """

    def __init__(self, settings: TokenSettings, directory: Path):
        self.settings = settings
        self._keys: list[jwt.PyJWK] = []
        self._fetched = self._next = self._last_try = -float("inf")  # on the monotonic clock
        if settings.key_file is not None:
            path = directory / settings.key_file
            try:
                self._keys = jwt.PyJWKSet.from_dict(parse_json(path.read_bytes())).keys
            except (OSError, ValueError, AttributeError, jwt.PyJWTError) as e:
                raise ConfigError(f"{path} is not a readable JWKS of public keys: {e}.") from None
            self._fetched = self._next = float("inf")

    def refresh(self) -> None:
        """Fetch the keys if it is time; ConfigError, and the former keys stay, if that fails."""
        now = time.monotonic()
        if now < self._next:
            return
        self._last_try = now
        self._next = now + _RETRY_SECONDS
        try:
            self._keys = jwt.PyJWKSet.from_dict(_fetch_json(self._find_address())).keys
        except (OSError, ValueError, jwt.PyJWTError) as e:
            raise ConfigError(
                f"The keys of the issuer {self.settings.issuer} cannot be fetched: {e}."
            ) from None
        self._fetched = now
        self._next = now + _RENEW_SECONDS

    def _find_address(self) -> str:
        """Address of the JWKS. Source: OpenID Connect Discovery 1.0, section 4."""
        if self.settings.jwks is not None:
            return self.settings.jwks
        issuer = self.settings.issuer
        document = _fetch_json(issuer.rstrip("/") + _DISCOVERY)
        if document.get("issuer") != issuer:
            raise ValueError(f"it calls itself {str(document.get('issuer'))[:200]!r}")
        return str(document.get("jwks_uri"))

    def find(self, number: Any, algorithm: str) -> jwt.PyJWK:
        """The key of id `number` for `algorithm`; no id is the only key's, if there is just one.

        Raises:
            Refusal: no such key (401), or none that is fresh enough (503).
        """
        if time.monotonic() - self._fetched > _STALE_SECONDS:
            raise Refusal(
                503,
                "issuer_unavailable",
                "Tokens cannot be checked at present: their issuer cannot be reached.",
                retry_seconds=round(_RETRY_SECONDS),
            )
        keys = self._keys
        for key in keys:
            is_named = key.key_id == number if number is not None else len(keys) == 1
            if is_named and key.algorithm_name == algorithm and key.public_key_use != "enc":
                return key
        self._next = min(self._next, self._last_try + _RETRY_SECONDS)
        raise Refusal(401, "invalid_token", "The token's key is not known as one of its issuer's.")


_WORDS: list[tuple[type[jwt.PyJWTError], str]] = [
    (jwt.ExpiredSignatureError, "The token has expired."),
    (jwt.ImmatureSignatureError, "The token is not valid yet."),
    (jwt.InvalidAudienceError, "The token is not for this server."),
    (jwt.InvalidIssuerError, "The token is of another issuer."),
    (jwt.MissingRequiredClaimError, "The token lacks one of exp, iss, aud and the subject."),
]


def read_token(text: str, keys: IssuerKeys) -> Principal:
    """The person that the token `text` names; Refusal unless everything about it holds up."""
    settings = keys.settings
    try:
        if len(text) > MAX_TOKEN_CHARACTERS:
            raise ValueError
        header = jwt.get_unverified_header(text)
    except Exception:  # whatever the parser raises on hostile text, it is no token
        raise Refusal(401, "invalid_token", "This is neither an API key nor a token.") from None
    algorithm = header.get("alg")
    if algorithm not in settings.algorithms:
        raise Refusal(401, "invalid_token", "The token's algorithm is not accepted.")
    key = keys.find(header.get("kid"), algorithm)
    try:
        claims = jwt.decode(
            text,
            key,
            algorithms=[algorithm],
            audience=settings.audience,
            issuer=settings.issuer,
            leeway=settings.leeway_seconds,
            options={
                "require": ["exp", "iss", "aud", settings.subject_claim],
                "enforce_minimum_key_length": True,
            },
        )
    except Exception as e:  # likewise: what does not hold up lets nobody in
        words = next((w for kind, w in _WORDS if isinstance(e, kind)), "The token is not genuine.")
        raise Refusal(401, "invalid_token", words) from None
    try:
        return Principal(
            str(claims[settings.subject_claim]),
            _read_names(claims, settings.groups_claim),
            _read_names(claims, settings.roles_claim),
        )
    except PolicyError as e:
        raise Refusal(401, "invalid_token", f"The token names nobody to judge: {e}") from None


def _read_names(claims: Mapping[str, Any], claim: str) -> frozenset[str]:
    """Names that a claim lists; none if it is absent. A claim's own name may hold dots."""
    found: Any = claims.get(claim)
    if claim not in claims:
        found = claims
        for part in claim.split("."):
            found = found.get(part) if isinstance(found, dict) else None
    if found is None:
        return frozenset()
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PolicyError(f"its claim {claim} is no list of names.")
    return frozenset(names)
