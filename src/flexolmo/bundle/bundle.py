"""Write an expert bundle; open one only after every check.

A bundle is a directory of four files. Each is read once, the bytes read are checked, and only
those bytes are handed out, so nothing can change between check and use. Knows nothing of anchors:
whether the expert fits one is decided at merge.
"""

import datetime
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexolmo.bundle.manifest import MAX_MANIFEST_BYTES, Manifest, encode_manifest, read_manifest
from flexolmo.bundle.signing import TrustedOwners, key_id, read_public_key, sign_files, verify_files
from flexolmo.bundle.strict import raise_listed
from flexolmo.bundle.tensors import TensorEntry, compare_tensors, describe_tensors, find_nonfinite
from flexolmo.errors import BundleError, SignatureError
from flexolmo.files import digest_bytes, write_directory_aside

WEIGHTS_FILE = "expert.safetensors"
MANIFEST_FILE = "manifest.json"
SIGNER_FILE = "signer.pub"
SIGNATURE_FILE = "signature.sig"
# The most bytes read of each file. The paper's 7B expert has 8.7 GB of weights in bfloat16.
MAX_FILE_BYTES = {
    WEIGHTS_FILE: 32 << 30,
    MANIFEST_FILE: MAX_MANIFEST_BYTES,
    SIGNER_FILE: 4 << 10,
    SIGNATURE_FILE: 64 << 10,
}


@dataclass(frozen=True)
class Bundle:
    """A bundle that passed every check.

    `weights` are the verified bytes of a safetensors file; `signer` is the owner's name in the
    trust store, None if the signer is unknown and was let in on request.
    """

    manifest: Manifest
    weights: bytes = field(repr=False)
    signer: str | None
    key_id: str
    digests: Mapping[str, str]  # of each of the four files, as verified


def open_bundle(
    path: Path,
    trusted: TrustedOwners | None,
    allow_unknown_signer: bool = False,
    today: datetime.date | None = None,
) -> Bundle:
    """The bundle in directory `path`, after every check of docs/bundle_format.md, in its order.

    `allow_unknown_signer` lets in a key that `trusted` does not hold, never one that claims to
    be an owner it does hold. `today` (default: now, UTC) is held against the terms.

    Raises:
        SignatureError: wrong signature, unknown signer, or a trusted signer under another name.
        BundleError: any other refusal.
    """
    files, problems = _read_files(path)
    raise_listed(
        BundleError,
        f"{path} was refused: not the files of a bundle.",
        problems,
        f"Expected exactly {', '.join(sorted(MAX_FILE_BYTES))}. Ask the owner to send it again.",
    )
    signed = _check_signature(path, files)
    return _check(path, files, signed, trusted, allow_unknown_signer, today or _today())


def write_bundle(
    path: Path,
    weights: bytes,
    manifest: Manifest,
    private_key: Path,
    today: datetime.date | None = None,
) -> Path:
    """Pack and sign a bundle at `path` (`<name>.bundle`, must not exist); return `path`.

    What was written is opened again with every check before it gets its name; a kill at any
    moment leaves nothing at `path`.

    Raises:
        BundleError: the weights do not match the manifest, hold an infinity or NaN, or the terms
            have expired; or `path` exists or cannot be written.
    """
    path = Path(path)
    if path.name != f"{manifest.name}.bundle":
        raise BundleError(f"{path}: expected the directory name {manifest.name}.bundle.")
    if os.path.lexists(path):
        raise BundleError(f"{path} exists and is not overwritten. Remove it or choose another.")
    today = today or _today()
    public_pem = read_public_key(private_key)
    files = {
        WEIGHTS_FILE: weights,
        MANIFEST_FILE: encode_manifest(manifest),
        SIGNER_FILE: public_pem,
    }
    digests = _digest_files(files)
    raise_listed(
        BundleError,
        f"{path} was not written: the expert does not match its manifest.",
        _find_content_problems(
            read_manifest(files[MANIFEST_FILE]), weights, digests[WEIGHTS_FILE], today
        ),
        "Pack the expert again from its training result.",
    )
    files[SIGNATURE_FILE] = sign_files(path.name, digests, private_key)
    owner = TrustedOwners.from_keys({manifest.owner: public_pem})
    try:
        with write_directory_aside(path, MANIFEST_FILE) as aside:
            for name, data in files.items():
                (aside / name).write_bytes(data)
            open_bundle(aside, owner, today=today)
    except OSError as e:
        raise BundleError(f"{path} cannot be written: {e}.") from None
    return path


def inspect_bundle(
    path: Path, trusted: TrustedOwners | None = None, today: datetime.date | None = None
) -> dict[str, Any]:
    """What a bundle claims, for display only; never raises for a bad bundle.

    Returns:
        `path`; `verified` (True only if `open_bundle` would accept it); `why_not` (None if
        verified); `signer` (trusted name or None); `key_id` (None unless the signature holds);
        `file_bytes` (size by name); `claims` (the manifest as JSON values, None if unreadable,
        unproven unless verified).
    """
    report: dict[str, Any] = {
        "path": str(path),
        "verified": False,
        "why_not": None,
        "signer": None,
        "key_id": None,
        "file_bytes": {},
        "claims": None,
    }
    try:
        files, problems = _read_files(path)
        report["file_bytes"] = {name: len(data) for name, data in files.items()}
        if MANIFEST_FILE in files:
            report["claims"] = _read_claims(files[MANIFEST_FILE])
        raise_listed(
            BundleError, "Not the files of a bundle:", problems, "Ask the owner to send it again."
        )
        signed = _check_signature(path, files)
        report["key_id"] = signed.key_id
        report["signer"] = trusted.owner_of(signed.key_id) if trusted else None
        _check(path, files, signed, trusted, False, today or _today())
    except BundleError as e:
        report["why_not"] = str(e)
    else:
        report["verified"] = True
    return report


# --- checks ------------------------------------------------------------------------------------


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()


def _digest_files(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: digest_bytes(data) for name, data in files.items() if name != SIGNATURE_FILE}


def _read_claims(data: bytes) -> dict[str, Any] | None:
    try:
        return read_manifest(data).model_dump(mode="json")
    except BundleError:
        return None


def _read_files(path: Path) -> tuple[dict[str, bytes], list[str]]:
    """The bytes of each file that a bundle should have, and a line for everything amiss."""
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as e:
        raise BundleError(
            f"{path} cannot be opened as a directory ({e.strerror}). Name a bundle's directory."
        ) from None
    try:
        found = set(os.listdir(directory))
        lines = [f"missing: {name}" for name in sorted(MAX_FILE_BYTES.keys() - found)]
        lines += [f"extra: {name!a}" for name in sorted(found - MAX_FILE_BYTES.keys())]
        files = {}
        for name in sorted(found & MAX_FILE_BYTES.keys()):
            content = _read_file(directory, name, MAX_FILE_BYTES[name])
            if isinstance(content, str):
                lines.append(content)
            else:
                files[name] = content
        return files, lines
    finally:
        os.close(directory)


def _read_file(directory: int, name: str, max_bytes: int) -> bytes | str:
    """All bytes of one plain file, or a line that says why not. Never follows a link."""
    try:
        # O_NONBLOCK: opening a pipe must not wait for a writer.
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except OSError:
        return f"{name}: found a link or something unreadable, expected a plain file"
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        return f"{name}: found something other than a plain file"
    with os.fdopen(fd, "rb") as f:
        if status.st_size > max_bytes:
            return f"{name}: found {status.st_size} bytes, expected at most {max_bytes}"
        try:
            data = f.read(status.st_size + 1)
        except OSError as e:
            return f"{name}: cannot be read ({e.strerror})"
    if len(data) != status.st_size:
        return f"{name}: changed its size while it was read; expected a file at rest"
    return data


@dataclass(frozen=True)
class _Signed:
    """What a valid signature proves: the signed name, the key, the digests of the files."""

    subject: str
    key_id: str
    digests: Mapping[str, str]


def _check_signature(path: Path, files: Mapping[str, bytes]) -> _Signed:
    digests = _digest_files(files)
    try:
        subject = verify_files(digests, files[SIGNATURE_FILE], files[SIGNER_FILE])
    except SignatureError as e:
        raise SignatureError(f"{path} was refused. {e}") from None
    return _Signed(subject, key_id(files[SIGNER_FILE]), digests)


def _check(
    path: Path,
    files: Mapping[str, bytes],
    signed: _Signed,
    trusted: TrustedOwners | None,
    allow_unknown_signer: bool,
    today: datetime.date,
) -> Bundle:
    """Every check after listing and signature, in order; `files` holds exactly the four."""
    signer = trusted.owner_of(signed.key_id) if trusted else None
    if signer is None and not allow_unknown_signer:
        raise SignatureError(
            f"{path} was refused: found a signature by the unknown key {signed.key_id}, expected "
            "one by a trusted owner. If you know from the owner that this is their key, put "
            "signer.pub among the trusted owners as <owner>.pub."
        )
    try:
        manifest = read_manifest(files[MANIFEST_FILE])
    except BundleError as e:
        raise BundleError(f"{path} was refused. {e}") from None
    if signer is not None and signer != manifest.owner:
        raise SignatureError(
            f"{path} was refused: manifest.json names the owner {manifest.owner!r}, but the "
            f"signing key is trusted as {signer!r}. Ask {signer!r} which is right."
        )
    claimed_key_id = trusted.key_of(manifest.owner) if trusted else None
    if signer is None and claimed_key_id is not None:
        raise SignatureError(
            f"{path} was refused: it claims to be by {manifest.owner!r}, whose trusted key is "
            f"{claimed_key_id}, but found a signature by {signed.key_id}. Ask that owner."
        )
    lines = []
    if signed.subject != f"{manifest.name}.bundle":
        lines.append(
            f"{SIGNATURE_FILE}: found the name {signed.subject!a}, expected {manifest.name}.bundle"
        )
    try:
        lines += _find_content_problems(
            manifest, files[WEIGHTS_FILE], signed.digests[WEIGHTS_FILE], today
        )
    except BundleError as e:
        raise BundleError(f"{path} was refused, {WEIGHTS_FILE}: {e}") from None
    raise_listed(
        BundleError,
        f"{path} was refused: its content is not what manifest.json claims, or cannot be used.",
        lines,
        f"Ask the owner ({manifest.owner}) for a new bundle.",
    )
    return Bundle(
        manifest,
        files[WEIGHTS_FILE],
        signer,
        signed.key_id,
        {**signed.digests, SIGNATURE_FILE: digest_bytes(files[SIGNATURE_FILE])},
    )


def _find_content_problems(
    manifest: Manifest, weights: bytes, weights_digest: str, today: datetime.date
) -> list[str]:
    """A line for each way in which the weights differ from the manifest or cannot be used."""
    lines = []
    if weights_digest != manifest.weights_digest:
        lines.append(
            f"{WEIGHTS_FILE}: found digest {weights_digest}, expected {manifest.weights_digest}"
        )
    found: Mapping[str, TensorEntry] = describe_tensors(weights)
    expected = manifest.tensors
    lines += compare_tensors(found, {name: entry.shape for name, entry in expected.items()})
    for name in sorted(found.keys() & expected.keys()):
        if found[name].dtype != expected[name].dtype:
            lines.append(
                f"dtype of {name}: found {found[name].dtype}, expected {expected[name].dtype}"
            )
        if found[name].digest != expected[name].digest:
            lines.append(
                f"data of {name}: found {found[name].digest}, expected {expected[name].digest}"
            )
    lines += [f"not finite: {name} holds an infinity or NaN" for name in find_nonfinite(weights)]
    expires = manifest.terms.expires
    if expires is not None and today > expires:
        lines.append(f"terms: expired on {expires}, found today to be {today}")
    return lines
