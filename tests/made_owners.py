"""Owners with several keys, what they sign beside bundles, and the directory that trusts them."""

import base64
import datetime
import json

from flexolmo.bundle.revocation import extend_list
from flexolmo.bundle.rotation import sign_rotation
from flexolmo.bundle.signing import create_key, encode_public, key_id, read_private_key

DAY = datetime.date(2026, 11, 22)  # on which made bundles were packed


def make_keys(directory, names="012"):
    """Private keys `directory`/NAME."""
    for name in names:
        create_key(directory / name)
    return directory


def public(key):
    return encode_public(read_private_key(key))


def id_of(key):
    return key_id(public(key))


def days(number):
    """`number` days after DAY."""
    return DAY + datetime.timedelta(days=number)


def rotate(trusted, old, new, day=DAY, owner="Ann", name="a"):
    """Put a rotation into the directory."""
    data = sign_rotation(read_private_key(old), read_private_key(new), owner, day)
    (trusted / f"{owner}.{name}.rotation.json").write_bytes(data)


def entry(kind, **fields):
    return {"kind": kind, "date": "2026-11-23", "reason": "A patient objected."} | fields


def revoke(directory, key, *entries, owner="Ann", signed_by=None):
    """Make the owner's list in the directory one longer; its path."""
    path = directory / f"{owner}.revoked.json"
    extend_list(path, read_private_key(key), owner, entries, signed_by)
    return path


def open_up(data):
    """Payload and signatures of a statement's file, as JSON values."""
    whole = json.loads(data)
    return json.loads(base64.b64decode(whole["payload"])), whole["signatures"]
