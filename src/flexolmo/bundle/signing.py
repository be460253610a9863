"""Keys, signatures over a bundle's files, and signed statements.

Signatures over files are those of the `model-signing` package with an elliptic-curve key; a test
holds that each accepts the other's. That package reads the signed files itself, from a directory;
here the signature is checked alone, so that nothing large is read before, and digests of bytes
already read are compared with it. Knows nothing of manifests.
"""

import base64
import getpass
import hashlib
import json
import os
import re
import shlex
import stat
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from flexolmo.bundle.strict import (
    Claim,
    Claims,
    check_canonical,
    parse_json,
    parse_object,
    read_claims,
)
from flexolmo.errors import SignatureError
from flexolmo.files import canonical_json, explain_full_disk

ADVICE_ALTERED = "Ask the owner to send the bundle again, or to sign it again."
PASSPHRASE_VARIABLE = "FLEXOLMO_KEY_PASSPHRASE"
MAX_KEY_BYTES = 16 << 10
_PAYLOAD_TYPE = "application/vnd.in-toto+json"


# --- keys --------------------------------------------------------------------------------------


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write `data` to `path`, whole or not at all; FileExistsError if anything is there."""
    fd, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fchmod(fd, mode)
            os.fsync(fd)
        os.link(aside, path)  # unlike a rename, a link never replaces
    finally:
        os.unlink(aside)


def create_key(private_path: Path, passphrase: str | None = None) -> Path:
    """Write a new P-256 private key (PEM, mode 0600); return its public half, `<path>.pub`.

    With a `passphrase` the private key is encrypted.
    """
    private_path = Path(private_path)
    public_path = private_path.with_name(private_path.name + ".pub")
    key = ec.generate_private_key(ec.SECP256R1())
    protection: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        if not passphrase:
            raise SignatureError("The passphrase is empty. Give one, or make a key without any.")
        protection = serialization.BestAvailableEncryption(passphrase.encode())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection
    )
    for path in (private_path, public_path):
        if os.path.lexists(path):
            raise SignatureError(f"{path} exists and is not overwritten. Choose another path.")
    try:
        private_path.parent.mkdir(parents=True, exist_ok=True)
        with explain_full_disk(private_path):
            _write_new(private_path, private, 0o600)
        try:
            with explain_full_disk(public_path):
                _write_new(public_path, encode_public(key), 0o644)
        except BaseException:
            private_path.unlink()
            raise
    except OSError as e:
        raise SignatureError(f"The key {private_path} cannot be written: {e}.") from None
    return public_path


def encode_public(key: ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) -> bytes:
    """The PEM form of a key's public half."""
    public = key.public_key() if isinstance(key, ec.EllipticCurvePrivateKey) else key
    return public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _load_public(pem: bytes) -> ec.EllipticCurvePublicKey:
    """The P-256 key in `pem`; ValueError says what else was found."""
    if b"PRIVATE KEY" in pem:
        raise ValueError("found a private key, expected a public one; keep private keys private")
    try:
        key = serialization.load_pem_public_key(pem)
    except Exception:  # whatever the parser raises on hostile bytes, it is not a key
        raise ValueError("found no PEM public key") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise ValueError("found a public key of another kind, expected elliptic curve P-256")
    return key


def key_id(public_pem: bytes) -> str:
    """`sha256:` and 64 hex digits of the key's DER SubjectPublicKeyInfo: the key's name."""
    try:
        key = _load_public(public_pem)
    except ValueError as e:
        raise SignatureError(f"The public key cannot be read: {e}. Ask the owner.") from None
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return "sha256:" + hashlib.sha256(der).hexdigest()


def read_private_key(path: Path, passphrase: str | None = None) -> ec.EllipticCurvePrivateKey:
    """The private key in the file `path`, which nobody but its owner may be able to read.

    An encrypted key takes `passphrase`, else the environment variable FLEXOLMO_KEY_PASSPHRASE,
    else it is asked for if there is a terminal.
    """
    try:
        with open(path, "rb") as f:
            mode = stat.S_IMODE(os.fstat(f.fileno()).st_mode)
            pem = f.read(MAX_KEY_BYTES)
    except OSError as e:
        raise SignatureError(f"The private key {path} cannot be read: {e}.") from None
    if mode & 0o077:
        raise SignatureError(
            f"The private key {path} has mode {mode:04o}: others may read or change it. If nobody "
            f"has, run chmod 600 {shlex.quote(str(path))}; else make a new key."
        )
    try:
        key = serialization.load_pem_private_key(pem, None)
    except TypeError:  # it is encrypted
        key = _decrypt(path, pem, passphrase)
    except Exception:  # wrong format, an unknown algorithm
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise SignatureError(
            f"{path} holds no private key of the expected kind: PEM, elliptic curve P-256. "
            "Make one with flexolmo expert key."
        )
    return key


def _decrypt(path: Path, pem: bytes, passphrase: str | None) -> Any:
    if passphrase is None:
        passphrase = os.environ.get(PASSPHRASE_VARIABLE)
    if passphrase is None and sys.stdin.isatty():
        passphrase = getpass.getpass(f"Passphrase of {path}: ")
    if not passphrase:
        raise SignatureError(
            f"The private key {path} has a passphrase, and none was given. Run this on a terminal, "
            f"give --passphrase-file, or set {PASSPHRASE_VARIABLE}."
        )
    try:
        return serialization.load_pem_private_key(pem, passphrase.encode())
    except ValueError:
        raise SignatureError(f"The passphrase given does not open the key {path}.") from None


# --- signatures --------------------------------------------------------------------------------


def _statement(name: str, digests: Mapping[str, str]) -> dict[str, Any]:
    """The in-toto statement that signs exactly these files. Source: model-signing 1.1."""
    raw = {file: bytes.fromhex(digests[file].removeprefix("sha256:")) for file in sorted(digests)}
    root = hashlib.sha256(b"".join(raw.values())).hexdigest()
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": root}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": [
                {"name": file, "algorithm": "sha256", "digest": h.hex()} for file, h in raw.items()
            ],
        },
    }


def _signature_file(public_pem: bytes, payload: str, signature: str) -> bytes:
    """The only spelling of a signature file: all but the payload and the signature is fixed."""
    envelope = {
        "payload": payload,
        "payloadType": _PAYLOAD_TYPE,
        "signatures": [{"sig": signature, "keyid": ""}],
    }
    hint = hashlib.sha256(public_pem).hexdigest()
    whole = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": envelope,
    }
    return json.dumps(whole, separators=(",", ":")).encode()


def _sign(payload: bytes, payload_type: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.sign(_signed_bytes(payload, payload_type), ec.ECDSA(SHA256()))


def _signed_bytes(payload: bytes, payload_type: str) -> bytes:
    """The bytes that are signed for `payload`. Source: DSSE v1, pre-authentication encoding."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def sign_files(name: str, digests: Mapping[str, str], key: ec.EllipticCurvePrivateKey) -> bytes:
    """A signature file over `digests` (file name to `sha256:...`), with `name` as its subject."""
    payload = json.dumps(_statement(name, digests)).encode()
    signature = _sign(payload, _PAYLOAD_TYPE, key)
    return _signature_file(
        encode_public(key), base64.b64encode(payload).decode(), base64.b64encode(signature).decode()
    )


@dataclass(frozen=True)
class Signed:
    """All that a valid signature says: its subject, the key, and the digest of each file."""

    subject: str
    key_id: str
    digests: Mapping[str, str]


def read_signature(signature: bytes, public_pem: bytes) -> Signed:
    """The claims of the signature file `signature`, if made with the key `public_pem`.

    Whether the files have the signed digests is the caller's to check.

    Raises:
        SignatureError: a malformed key or signature, or a signature by another key.
    """
    try:
        key = _load_public(public_pem)
    except ValueError as e:
        raise SignatureError(f"signer.pub is not a signer's key: {e}. {ADVICE_ALTERED}") from None
    if encode_public(key) != public_pem:
        raise SignatureError(f"signer.pub is not in plain PEM form. {ADVICE_ALTERED}")
    payload, proof = _decode_signature(signature, public_pem)
    try:
        key.verify(proof, _signed_bytes(payload, _PAYLOAD_TYPE), ec.ECDSA(SHA256()))
    except InvalidSignature:
        raise SignatureError(
            "signature.sig is not a signature by the key in signer.pub: one of the two was "
            f"altered, or they belong to different bundles. {ADVICE_ALTERED}"
        ) from None
    # From here on the payload is known to be the signer's own words.
    try:
        statement = parse_json(payload)
        subject = str(statement["subject"][0]["name"])
        resources = statement["predicate"]["resources"]
        digests = {str(r["name"]): "sha256:" + str(r["digest"]) for r in resources}
        # Compared as text: Python holds 0 and 0.0 for equal to false.
        is_exact = canonical_json(statement) == canonical_json(_statement(subject, digests))
    except (ValueError, KeyError, IndexError, TypeError):
        raise SignatureError(
            f"signature.sig signs something other than a list of files. {ADVICE_ALTERED}"
        ) from None
    if not is_exact:
        raise SignatureError(
            "signature.sig signs more than the bundle's files, or in another manner than this "
            f"format's. {ADVICE_ALTERED}"
        )
    return Signed(subject, key_id(public_pem), digests)


def _decode_signature(signature: bytes, public_pem: bytes) -> tuple[bytes, bytes]:
    """Payload and its signature, not yet verified, if the file has its only spelling."""
    try:
        envelope = parse_json(signature)["dsseEnvelope"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        raw = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        expected = _signature_file(
            public_pem, base64.b64encode(payload).decode(), base64.b64encode(raw).decode()
        )
    except (ValueError, KeyError, IndexError, TypeError):
        payload = raw = expected = b""
    if signature != expected:
        raise SignatureError(
            "signature.sig is not a signature file of this format for the key in signer.pub: one "
            f"of the two was altered, or they belong to different bundles. {ADVICE_ALTERED}"
        )
    return payload, raw


# --- statements --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Envelope:
    """A signed statement as it was read; nobody's word before `verify` has returned."""

    payload: bytes
    payload_type: str
    signatures: Mapping[str, bytes]  # by key id

    def verify(self, public_pem: bytes) -> None:
        """SignatureError unless this key has signed the payload, as one of its type."""
        name = key_id(public_pem)
        try:
            _load_public(public_pem).verify(
                self.signatures[name],
                _signed_bytes(self.payload, self.payload_type),
                ec.ECDSA(SHA256()),
            )
        except (KeyError, InvalidSignature):
            raise SignatureError(f"It is not signed by the key {name}.") from None


def sign_statement(
    claims: Claim, payload_type: str, keys: Sequence[ec.EllipticCurvePrivateKey]
) -> bytes:
    """One file that states `claims`, signed by each key. Source: DSSE v1, envelope."""
    payload = canonical_json(claims.model_dump(mode="json"))
    signatures = {key_id(encode_public(key)): _sign(payload, payload_type, key) for key in keys}
    return _envelope(payload, payload_type, signatures)


def _envelope(payload: bytes, payload_type: str, signatures: Mapping[str, bytes]) -> bytes:
    """The only spelling of a statement's file."""
    return canonical_json(
        {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": payload_type,
            "signatures": [
                {"keyid": name, "sig": base64.b64encode(sig).decode()}
                for name, sig in sorted(signatures.items())
            ],
        }
    )


def read_statement(
    data: bytes, payload_type: str, kind: type[Claims], where: str
) -> tuple[Claims, Envelope]:
    """The claims in a statement's file, and the envelope to verify before they are believed.

    BundleError if the bytes of `where` are none of this type in its only spelling.
    """
    advice = "Ask the owner for it again."
    try:
        whole = parse_json(data)
        payload = base64.b64decode(whole["payload"], validate=True)
        signatures = {
            str(s["keyid"]): base64.b64decode(s["sig"], validate=True) for s in whole["signatures"]
        }
        is_exact = _envelope(payload, payload_type, signatures) == data and all(
            re.fullmatch(r"sha256:[0-9a-f]{64}", name) for name in signatures
        )
    except (ValueError, KeyError, TypeError):
        is_exact = False
    if not is_exact:
        raise SignatureError(f"{where} is no signed statement of type {payload_type}. {advice}")
    check_canonical(parse_object(payload, where, advice), payload, where, advice)
    return read_claims(payload, kind, where, advice), Envelope(payload, payload_type, signatures)
