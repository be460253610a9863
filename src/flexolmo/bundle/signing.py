"""Keys, signatures over a bundle's files, and the owners a coordinator trusts.

Signatures are those of the `model-signing` package with an elliptic-curve key, offline. It
normally walks a directory; here it is handed the digests of bytes already in memory, so what was
checked is what gets used, no link is followed and no path is ignored. Knows nothing of manifests.
"""

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from flexolmo.bundle.manifest import check_owner
from flexolmo.bundle.strict import parse_json, raise_listed
from flexolmo.errors import SignatureError

_ADVICE_ALTERED = "Ask the owner to send the bundle again, or to sign it again."
_MAX_KEY_BYTES = 16 << 10


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


def create_key(private_path: Path) -> Path:
    """Write a new P-256 private key (PEM, mode 0600); return its public half, `<path>.pub`."""
    private_path = Path(private_path)
    public_path = private_path.with_name(private_path.name + ".pub")
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for path in (private_path, public_path):
        if os.path.lexists(path):
            raise SignatureError(f"{path} exists and is not overwritten. Choose another path.")
    try:
        private_path.parent.mkdir(parents=True, exist_ok=True)
        _write_new(private_path, private, 0o600)
        try:
            _write_new(public_path, _encode_public(key.public_key()), 0o644)
        except BaseException:
            private_path.unlink()
            raise
    except OSError as e:
        raise SignatureError(f"The key {private_path} cannot be written: {e}.") from None
    return public_path


def _encode_public(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(
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


def read_public_key(private_path: Path) -> bytes:
    """The PEM public half of the private key in the file `private_path`."""
    try:
        key = serialization.load_pem_private_key(Path(private_path).read_bytes(), None)
    except OSError as e:
        raise SignatureError(f"The private key {private_path} cannot be read: {e}.") from None
    except Exception:  # wrong format, a password, an unknown algorithm
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise SignatureError(
            f"{private_path} holds no private key of the expected kind: PEM, elliptic curve P-256, "
            "without a password. Make one with create_key."
        )
    return _encode_public(key.public_key())


# --- trusted owners ----------------------------------------------------------------------------


class TrustedOwners:
    """The owners a coordinator trusts: one public key each. An empty set trusts nobody.

    With `allows_unknown`, keys that it does not hold are let in too, under no owner's name.
    """

    def __init__(self, owner_by_key_id: Mapping[str, str], allows_unknown: bool = False):
        self._owner_by_key_id = dict(owner_by_key_id)
        self.allows_unknown = allows_unknown

    @classmethod
    def from_keys(cls, keys: Mapping[str, bytes]) -> "TrustedOwners":
        """Trust `keys`, owner's name to PEM public key; refuses a key that two owners share."""
        owner_by_key_id: dict[str, str] = {}
        lines = []
        for owner, pem in keys.items():
            try:
                check_owner(owner)
                found = key_id(pem)
            except (ValueError, SignatureError) as e:
                lines.append(f"{owner!r}: {e}")
                continue
            if found in owner_by_key_id:
                lines.append(f"{owner!r}: same key as {owner_by_key_id[found]!r}, expected its own")
            owner_by_key_id[found] = owner
        raise_listed(
            SignatureError,
            "The trusted owners cannot be loaded:",
            lines,
            "Each trusted owner needs one file <owner>.pub with that owner's public key.",
        )
        return cls(owner_by_key_id)

    @classmethod
    def load(cls, directory: Path) -> "TrustedOwners":
        """Trust every `<owner>.pub` in `directory`; anything else there is refused by name."""
        directory = Path(directory)
        keys: dict[str, bytes] = {}
        lines = []
        try:
            for path in sorted(directory.iterdir()):
                if path.name.startswith("."):
                    continue
                if path.suffix != ".pub" or not path.is_file():
                    lines.append(f"{path.name!r}: expected a file named <owner>.pub")
                elif path.stat().st_size > _MAX_KEY_BYTES:
                    lines.append(f"{path.name!r}: too long for a public key")
                else:
                    keys[path.name.removesuffix(".pub")] = path.read_bytes()
        except OSError as e:
            raise SignatureError(
                f"The trusted owners in {directory} cannot be read: {e}. "
                "Name a directory of <owner>.pub files."
            ) from None
        raise_listed(
            SignatureError,
            f"{directory} holds more than trusted owners:",
            lines,
            "Move the rest elsewhere, or rename it to <owner>.pub.",
        )
        return cls.from_keys(keys)

    def owner_of(self, key_id: str) -> str | None:
        """The name under which the key is trusted, or None."""
        return self._owner_by_key_id.get(key_id)

    def key_of(self, owner: str) -> str | None:
        """The key id trusted for `owner`, or None."""
        return next((k for k, o in self._owner_by_key_id.items() if o == owner), None)


ANY_SIGNER = TrustedOwners({}, allows_unknown=True)


# --- signatures --------------------------------------------------------------------------------


def _hashing_in_memory(name: str, digests: Mapping[str, str]) -> Any:
    """A model-signing hashing configuration that answers with `digests` and opens no file.

    Its attribute `was_asked` turns true when model-signing has accepted the signature itself.
    """
    # Imported late: it takes most of a second, and only signing and verifying need it.
    from model_signing import hashing, manifest
    from model_signing._hashing.hashing import Digest

    class HashingInMemory(hashing.Config):
        was_asked = False

        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> manifest.Manifest:
            self.was_asked = True
            items = [
                manifest.FileManifestItem(
                    path=Path(file),
                    digest=Digest("sha256", bytes.fromhex(digest.removeprefix("sha256:"))),
                )
                for file, digest in digests.items()
            ]
            method = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
            serialization_type = manifest.SerializationType.from_args(method)
            return manifest.Manifest(name, items, serialization_type)

    return HashingInMemory()


def _statement(name: str, digests: Mapping[str, str]) -> dict[str, Any]:
    """The in-toto statement that signs exactly these files. Source: model-signing 1.1."""
    hexes = {file: digests[file].removeprefix("sha256:") for file in sorted(digests)}
    root = hashlib.sha256(b"".join(bytes.fromhex(h) for h in hexes.values())).hexdigest()
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": root}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": [
                {"name": file, "algorithm": "sha256", "digest": h} for file, h in hexes.items()
            ],
        },
    }


def _signature_file(public_pem: bytes, payload: str, signature: str) -> bytes:
    """The only spelling of a signature file: all but the payload and the signature is fixed."""
    envelope = {
        "payload": payload,
        "payloadType": "application/vnd.in-toto+json",
        "signatures": [{"sig": signature, "keyid": ""}],
    }
    hint = hashlib.sha256(public_pem).hexdigest()
    whole = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": envelope,
    }
    return json.dumps(whole, separators=(",", ":")).encode()


def sign_files(name: str, digests: Mapping[str, str], private_key: Path) -> bytes:
    """A signature file over `digests` (file name to `sha256:...`), with `name` as its subject."""
    from model_signing import signing

    public_pem = read_public_key(private_key)
    with tempfile.TemporaryDirectory() as private_directory:
        out = Path(private_directory) / "signature.sig"
        try:
            config = signing.Config().use_elliptic_key_signer(private_key=private_key)
            config.set_hashing_config(_hashing_in_memory(name, digests)).sign(name, out)
            signature = out.read_bytes()
        except Exception as e:  # model-signing raises many kinds; all mean: not signed
            raise SignatureError(f"{name} cannot be signed with {private_key}: {e}.") from None
    verify_files(digests, signature, public_pem)
    return signature


def verify_files(digests: Mapping[str, str], signature: bytes, public_pem: bytes) -> str:
    """The signed subject name, if `signature` signs exactly `digests` under `public_pem`.

    `digests` name every file of the bundle but `signature.sig` itself.

    Raises:
        SignatureError: a malformed key or signature, a signature by another key, or files that
            are missing, extra or changed since signing, each named.
    """
    from model_signing import verifying

    try:
        canonical_pem = _encode_public(_load_public(public_pem))
    except ValueError as e:
        raise SignatureError(f"signer.pub is not a signer's key: {e}. {_ADVICE_ALTERED}") from None
    if canonical_pem != public_pem:
        raise SignatureError(f"signer.pub is not in plain PEM form. {_ADVICE_ALTERED}")
    payload = _decode_payload(signature, public_pem)
    hashing = _hashing_in_memory("", digests)
    failure = None
    with tempfile.TemporaryDirectory() as private_directory:
        key_path = Path(private_directory) / "signer.pub"
        signature_path = Path(private_directory) / "signature.sig"
        key_path.write_bytes(public_pem)
        signature_path.write_bytes(signature)
        try:
            config = verifying.Config().use_elliptic_key_verifier(public_key=key_path)
            config.set_hashing_config(hashing).verify(Path(private_directory), signature_path)
        except Exception as e:  # model-signing raises many kinds; all mean: not verified
            failure = e
    if not hashing.was_asked:
        raise SignatureError(
            "signature.sig is not a signature by the key in signer.pub: one of the two was "
            f"altered, or they belong to different bundles. {_ADVICE_ALTERED}"
        )
    # From here on the payload is known to be the signer's own words.
    try:
        statement = parse_json(payload)
        subject = str(statement["subject"][0]["name"])
        signed = {
            str(r["name"]): "sha256:" + str(r["digest"])
            for r in statement["predicate"]["resources"]
        }
    except (ValueError, KeyError, IndexError, TypeError):
        raise SignatureError(
            f"signature.sig signs something other than a list of files. {_ADVICE_ALTERED}"
        ) from None
    names = sorted(signed.keys() | digests.keys())
    lines = [
        f"{name}: found {digests.get(name, 'no such file')}, "
        f"expected {signed.get(name, 'no such file')} as signed"
        for name in names
        if signed.get(name) != digests.get(name)
    ]
    raise_listed(SignatureError, "Files differ from what was signed:", lines, _ADVICE_ALTERED)
    if failure is not None or statement != _statement(subject, digests):
        raise SignatureError(
            "signature.sig signs more than the bundle's files, or in another manner than this "
            f"format's. {_ADVICE_ALTERED}"
        )
    return subject


def _decode_payload(signature: bytes, public_pem: bytes) -> bytes:
    """The signed payload, not yet verified, if the signature file has its only spelling."""
    try:
        envelope = parse_json(signature)["dsseEnvelope"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        raw = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        expected = _signature_file(
            public_pem, base64.b64encode(payload).decode(), base64.b64encode(raw).decode()
        )
    except (ValueError, KeyError, IndexError, TypeError):
        expected, payload = b"", b""
    if signature != expected:
        raise SignatureError(
            "signature.sig is not a signature file of this format for the key in signer.pub: one "
            f"of the two was altered, or they belong to different bundles. {_ADVICE_ALTERED}"
        )
    return payload
