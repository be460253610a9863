"""Signed checkpoints of the audit log: how many entries it has, and the root of their tree.

A checkpoint is a note as c2sp.org/tlog-checkpoint and c2sp.org/signed-note define it, with an ECDSA
signature (type 2) by a P-256 key. Whoever keeps one elsewhere can later show that nothing before it
was changed. Knows nothing of files.
"""

import base64
import re
from dataclasses import dataclass
from typing import cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from flexolmo.bundle.signing import encode_public, key_id
from flexolmo.bundle.strict import Claim
from flexolmo.bundle.tensors import Digest
from flexolmo.files import canonical_json
from flexolmo.serving.entries import digest_leaf
from flexolmo.serving.tree import Frontier

MAX_NOTE_BYTES = 1024
MAX_KEPT_BYTES = 8192  # a note and at most 64 hashes
NEW_ORIGIN = "flexolmo-audit-log/2/"  # kind of log, version of its format; then the log's name
ORIGIN_PATTERN = r"flexolmo-audit-log/[12]/[0-9a-f]{32}"
_NOTE = re.compile(
    rf"(?P<text>(?P<origin>{ORIGIN_PATTERN})\n"
    r"(?P<size>0|[1-9][0-9]{0,15})\n"
    r"(?P<root>[A-Za-z0-9+/]{43}=)\n"
    r"time (?P<time>[0-9T:.-]{26}Z)\n)\n"
    r"— (?P=origin) (?P<signature>[A-Za-z0-9+/]{1,200}={0,2})\n"
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose signature was verified, or that was just signed."""

    origin: str  # name of the log, given at random when it was made
    size: int  # entries
    root: bytes  # 32 bytes
    time: str  # in UTC, when it was signed
    note: str  # the whole, as it is sent


def load_key(public_pem: bytes) -> ec.EllipticCurvePublicKey:
    """The P-256 key in `public_pem`; SignatureError if there is none."""
    key_id(public_pem)  # refuses whatever else is there
    return cast(ec.EllipticCurvePublicKey, load_pem_public_key(public_pem))


def sign_checkpoint(
    origin: str, size: int, root: bytes, time: str, key: ec.EllipticCurvePrivateKey
) -> Checkpoint:
    """A checkpoint, signed."""
    text = f"{origin}\n{size}\n{base64.b64encode(root).decode()}\ntime {time}\n"
    signature = _hint(key.public_key()) + key.sign(text.encode(), ec.ECDSA(SHA256()))
    note = f"{text}\n— {origin} {base64.b64encode(signature).decode()}\n"
    return Checkpoint(origin, size, root, time, note)


def read_checkpoint(note: str, key: ec.EllipticCurvePublicKey) -> Checkpoint:
    """The checkpoint in `note`; ValueError unless `key` signed it."""
    found = _NOTE.fullmatch(note)
    if found is None:
        raise ValueError("it is no checkpoint of an audit log")
    signature = base64.b64decode(found["signature"])
    is_spelled_well = base64.b64encode(signature).decode() == found["signature"]
    try:
        if not is_spelled_well or signature[:4] != _hint(key):
            raise InvalidSignature
        key.verify(signature[4:], found["text"].encode(), ec.ECDSA(SHA256()))
    except InvalidSignature:
        raise ValueError("it was not signed with this log's key") from None
    root = base64.b64decode(found["root"])
    return Checkpoint(found["origin"], int(found["size"]), root, found["time"], note)


def _hint(key: ec.EllipticCurvePublicKey) -> bytes:
    """Four bytes by which a note's signature names its key. Source: c2sp.org/signed-note."""
    return bytes.fromhex(key_id(encode_public(key)).removeprefix("sha256:")[:8])


# --- as the log keeps them ----------------------------------------------------------------------


class _Kept(Claim):
    """A line of checkpoints.jsonl: a note, and the subtrees from which its tree can grow on."""

    checkpoint: str
    frontier: list[Digest]


def encode_kept(checkpoint: Checkpoint, tree: Frontier) -> bytes:
    """The line that keeps `checkpoint`, which was made of `tree`; without its newline."""
    frontier = [digest_leaf(h) for h in tree.hashes]
    return canonical_json({"checkpoint": checkpoint.note, "frontier": frontier})


def decode_kept(line: bytes, key: ec.EllipticCurvePublicKey) -> tuple[Checkpoint, Frontier]:
    """The checkpoint on a line, and its tree; ValueError unless they agree and `key` signed."""
    kept = _Kept.model_validate_json(line)
    if canonical_json(kept.model_dump()) != line:
        raise ValueError("it is not in canonical form")
    checkpoint = read_checkpoint(kept.checkpoint, key)
    hashes = [bytes.fromhex(h.removeprefix("sha256:")) for h in kept.frontier]
    tree = Frontier(checkpoint.size, hashes)
    if tree.root() != checkpoint.root:
        raise ValueError("its subtrees have another root than it states")
    return checkpoint, tree
