"""Rotations: a new key of an owner, stated and signed by the old key and the new one."""

import datetime
from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from pydantic import StringConstraints

from flexolmo.bundle.manifest import Owner, require_owner
from flexolmo.bundle.signing import Envelope, encode_public, key_id, read_statement, sign_statement
from flexolmo.bundle.strict import Claim
from flexolmo.bundle.tensors import Digest
from flexolmo.bundle.terms import Day
from flexolmo.errors import ConfigError

SUFFIX = ".rotation.json"
_PAYLOAD_TYPE = "application/vnd.flexolmo.rotation+json"


class Rotation(Claim):
    """One key of an owner taking the place of another; on `valid_from` both count."""

    format: Literal["flexolmo-rotation"]
    format_version: Literal[1]
    owner: Owner
    old_key_id: Digest
    new_public_key: Annotated[str, StringConstraints(max_length=4096)]  # PEM
    valid_from: Day


def sign_rotation(
    old: EllipticCurvePrivateKey,
    new: EllipticCurvePrivateKey,
    owner: str,
    valid_from: datetime.date,
) -> bytes:
    """The file that states that `new` takes the place of `old` for `owner`.

    The new key signs too: nobody can claim a key that they do not hold.
    """
    require_owner(owner)
    old_id = key_id(encode_public(old))
    new_pem = encode_public(new)
    if old_id == key_id(new_pem):
        raise ConfigError("Old and new key are the same. Make a new one with flexolmo expert key.")
    stated = Rotation(
        format="flexolmo-rotation",
        format_version=1,
        owner=owner,
        old_key_id=old_id,
        new_public_key=new_pem.decode(),
        valid_from=valid_from,
    )
    return sign_statement(stated, _PAYLOAD_TYPE, [old, new])


def read_rotation(data: bytes, where: str) -> tuple[Rotation, Envelope]:
    """The rotation in the file `where`, signed by its new key, and the envelope to verify with the
    old one before it is believed; BundleError if it is none."""
    stated, envelope = read_statement(data, _PAYLOAD_TYPE, Rotation, where)
    envelope.verify(stated.new_public_key.encode())
    return stated, envelope
