"""Revocation lists: an owner's signed word on which of their keys, bundles and experts are void.

A list only ever grows, and its number does too, so that an old one never passes for the newest. Who
must have signed a list that a coordinator holds is for `flexolmo.bundle.trust` to say.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from pydantic import Field, StringConstraints

from flexolmo.bundle.facts import ExpertFacts
from flexolmo.bundle.manifest import Count, Name, Owner, require_owner
from flexolmo.bundle.signing import Envelope, encode_public, key_id, read_statement, sign_statement
from flexolmo.bundle.strict import Claim, check_canonical, read_claims
from flexolmo.bundle.tensors import Digest, Positive
from flexolmo.bundle.terms import Day
from flexolmo.errors import BundleError, SignatureError
from flexolmo.files import canonical_json, hold_directory, read_bytes, write_bytes

SUFFIX = ".revoked.json"
MAX_LIST_BYTES = 1 << 20
_PAYLOAD_TYPE = "application/vnd.flexolmo.revocations+json"


class _Revocation(Claim):
    date: Day  # on which it was made; it counts for bundles of any day
    reason: Annotated[str, StringConstraints(min_length=1, max_length=1000)]

    def __str__(self) -> str:
        return f"revoked by its owner on {self.date}: {self.reason.rstrip('.')}"


class RevokedKey(_Revocation):
    """All that one key has signed or will sign."""

    kind: Literal["key"]
    key_id: Digest

    def concerns(self, name: str, facts: ExpertFacts) -> bool:
        """True for an expert that this withdraws."""
        return facts.key_id == self.key_id


class RevokedBundle(_Revocation):
    """One bundle, by the digest of its manifest.json."""

    kind: Literal["bundle"]
    bundle_digest: Digest

    def concerns(self, name: str, facts: ExpertFacts) -> bool:
        """True for an expert that this withdraws."""
        return facts.bundle_digest == self.bundle_digest


class RevokedExpert(_Revocation):
    """Every bundle of one expert up to a serial; 0: those of format version 3, which have none."""

    kind: Literal["expert"]
    name: Name
    up_to_serial: Count

    def concerns(self, name: str, facts: ExpertFacts) -> bool:
        """True for an expert that this withdraws."""
        return name == self.name and facts.serial <= self.up_to_serial


Revocation = RevokedKey | RevokedBundle | RevokedExpert


class RevocationList(Claim):
    """All that one owner has revoked, in the order in which it was."""

    format: Literal["flexolmo-revocations"]
    format_version: Literal[1]
    owner: Owner
    number: Positive
    revoked: Annotated[
        tuple[Annotated[Revocation, Field(discriminator="kind")], ...], Field(min_length=1)
    ]

    def find(self, name: str, facts: ExpertFacts) -> Revocation | None:
        """The first revocation that concerns the expert `name` of this owner, or None."""
        return next((r for r in self.revoked if r.concerns(name, facts)), None)

    def has_key(self, key_id: str) -> bool:
        """True if the key is revoked."""
        return any(isinstance(r, RevokedKey) and r.key_id == key_id for r in self.revoked)

    def follows(self, older: "RevocationList") -> bool:
        """True if this may take the place of `older`: a higher number, and nothing taken back."""
        return self.number > older.number and self.revoked[: len(older.revoked)] == older.revoked


def read_list(data: bytes, where: str) -> tuple[RevocationList, Envelope]:
    """The list in the file `where`, and the envelope to verify before it is believed; BundleError
    if it is none."""
    return read_statement(data, _PAYLOAD_TYPE, RevocationList, where)


def extend_list(
    path: Path,
    key: EllipticCurvePrivateKey,
    owner: str,
    revoked: Sequence[Mapping[str, Any]],
    signed_by: bytes | None = None,
) -> RevocationList:
    """Add `revoked` to the owner's list in the file `path`, which is begun if absent, and sign it.

    Args:
        revoked: Fields of each `Revocation`, as JSON values.
        signed_by: Public key, PEM, of the list as it stands. Default: that of `key`.

    Raises:
        ConfigError: no owner can be called so.
        BundleError: malformed fields, or a list of another owner.
        SignatureError: a list signed by another key, or one that revokes `key`.
    """
    require_owner(owner)
    with hold_directory(path.parent):
        number, before = 1, []
        if path.exists():
            old = _read_own(path, key, owner, signed_by)
            number, before = old.number + 1, old.model_dump(mode="json")["revoked"]
        claims = {
            "format": "flexolmo-revocations",
            "format_version": 1,
            "owner": owner,
            "number": number,
            "revoked": [*before, *map(dict, revoked)],
        }
        advice = "Nothing was written."
        try:
            payload = canonical_json(claims)
        except ValueError as e:
            raise BundleError(f"This list cannot be written as JSON: {e}. {advice}") from None
        check_canonical(claims, payload, "This list", advice)
        made = read_claims(payload, RevocationList, "This list", advice)
        data = sign_statement(made, _PAYLOAD_TYPE, [key])
        if len(data) > MAX_LIST_BYTES:
            raise BundleError(
                f"The list would have {len(data)} bytes, at most {MAX_LIST_BYTES} are read. Revoke "
                "an expert up to a serial, or a key, in place of single bundles."
            )
        write_bytes(path, data)
    return made


def _read_own(
    path: Path, key: EllipticCurvePrivateKey, owner: str, signed_by: bytes | None
) -> RevocationList:
    """The owner's list in the file `path`, which `key` is to sign after `signed_by`, or itself."""
    try:
        data = read_bytes(path, MAX_LIST_BYTES)
    except (OSError, ValueError) as e:
        raise BundleError(f"The list {path} cannot be read: {e}.") from None
    old, envelope = read_list(data, str(path))
    own = encode_public(key)
    signer = key_id(signed_by or own)
    if signer not in envelope.signatures:
        raise SignatureError(
            f"{path} is signed by {', '.join(envelope.signatures) or 'nobody'}, not by {signer}. "
            "Name the public key that signed it: --signed-by KEY.pub."
        )
    envelope.verify(signed_by or own)
    if old.owner != owner:
        raise BundleError(f"{path} is the list of {old.owner!r}, not of {owner!r}.")
    if old.has_key(key_id(own)):
        raise SignatureError(
            f"{path} revokes the key {key_id(own)}, which may sign no list after it. Sign with the "
            "key that took its place."
        )
    return old
