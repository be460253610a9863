"""Write an expert bundle; open one only after every check.

A bundle is a directory of four files, each read once. The three small ones come first: nothing of
the weights is read before the signature holds, the signer is trusted and the manifest is valid.
Then the weights are read in pieces. Digests are computed of the pieces, and tensors are made of
those same pieces in memory of our own, so what was checked is what is used, whatever happens to the
file meanwhile. (A memory map would show later changes, and end the process if the file were cut
short.) Weights that were verified before, and are still the same file, are not hashed again. Knows
nothing of anchors: whether the expert fits one is decided at merge.
"""

import datetime
import hashlib
import io
import mmap
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from flexolmo.bundle.facts import ExpertFacts, facts_of
from flexolmo.bundle.manifest import MAX_MANIFEST_BYTES, Manifest, encode_manifest, read_manifest
from flexolmo.bundle.signing import (
    ADVICE_ALTERED,
    Signed,
    encode_public,
    read_private_key,
    read_signature,
    sign_files,
)
from flexolmo.bundle.strict import raise_listed
from flexolmo.bundle.tensors import (
    MAX_HEADER_BYTES,
    Span,
    Watch,
    Weights,
    compare_tensors,
    read_weights,
    watch_weights,
)
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.bundle.verified import Identity, is_ours, is_ours_alone, wait_until_past
from flexolmo.errors import BundleError, RevokedError, SignatureError
from flexolmo.files import (
    digest_bytes,
    digest_file,
    path_of_open,
    read_bytes,
    write_directory_aside,
)

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
class VerifiedWeights:
    """Findings about a file of weights that nobody else can change, when it was last read whole."""

    identity: Identity  # before it was read and after
    largest: Mapping[str, float]  # absolute value of each tensor


@dataclass(frozen=True)
class Bundle:
    """A bundle that passed every check that it was opened with."""

    manifest: Manifest
    signer: str | None  # name in the trust store; None if unknown and let in on request
    key_id: str
    digests: Mapping[str, str]  # of each of the four files, as verified
    weights_bytes: int  # size of expert.safetensors
    # Verified bytes of each tensor, little-endian, with dtype and shape in `manifest.tensors`;
    # empty unless opened with `keep_tensors`.
    tensors: dict[str, mmap.mmap] = field(repr=False, default_factory=dict)
    # Largest absolute value of each tensor; None if only the signer was checked.
    largest: Mapping[str, float] | None = None
    # The weights where they end up; None if they changed meanwhile, or others could change them
    # unseen.
    verified: VerifiedWeights | None = None

    @property
    def facts(self) -> ExpertFacts:
        """The facts that decide who may use it."""
        return facts_of(self.manifest, self.key_id, self.digests[MANIFEST_FILE])


def open_bundle(
    path: Path,
    trusted: TrustedOwners | None,
    allow_unknown_signer: bool = False,
    today: datetime.date | None = None,
    *,
    keep_tensors: bool = False,
    watch: Watch | None = None,
    max_bytes: int | None = None,
    expected: Mapping[str, str] | None = None,
    copy_to: Path | None = None,
    known: VerifiedWeights | None = None,
    judges_days: bool = True,
) -> Bundle:
    """The bundle in directory `path`, after every check of docs/bundle_format.md, in its order.

    Args:
        allow_unknown_signer: Let in a key that `trusted` does not hold, but never one that claims
            to be an owner it does hold.
        today: Date that is held against the terms. Default: now, in UTC.
        keep_tensors: Hand out the tensors' bytes too, in as much memory. Without it a bundle of
            any size is checked in a few MiB.
        watch: Sees the weights in pieces; with `keep_tensors`, nothing else does.
        max_bytes: Refuse larger weights, before anything of them is read.
        expected: Digest of each file as verified before. The small ones are compared before
            anything else is asked of them, the weights as with what was signed.
        copy_to: Empty directory that gets the four files: the very bytes that are checked. Nothing
            is written before all checks but those of the weights have passed.
        known: Weights that passed every check before with this very manifest. They are not checked
            again, and read only if asked to be watched; not with `copy_to`.
        judges_days: False leaves it to the caller whether today is within the terms.

    Raises:
        SignatureError: wrong signature, unknown signer, a trusted signer under another name or on
            a day on which its key did not count, or a file that is not as `expected`.
        RevokedError: the owner has revoked the key, the bundle, or the expert up to its serial.
        BundleError: any other refusal.
    """
    with _open_files(Path(path), max_bytes) as files:
        _compare_small(files, expected)
        day = (today or _today()) if judges_days else None
        begun = Begun(files, *_check_signer(files, trusted, allow_unknown_signer))
        kept = _Kept()
        bundle = begun.read(kept if keep_tensors else watch, known, copy_to=copy_to, day=day)
        return replace(bundle, tensors=kept.data)


@contextmanager
def begin_bundle(
    path: Path, trusted: TrustedOwners, *, expected: Mapping[str, str] | None = None
) -> Iterator["Begun"]:
    """A bundle after every check but those of its weights and its days, with its weights open to
    be read; arguments, order and errors are those of `open_bundle`."""
    with _open_files(Path(path), None) as files:
        _compare_small(files, expected)
        yield Begun(files, *_check_signer(files, trusted, trusted.allows_unknown))


def check_signer(
    path: Path,
    trusted: TrustedOwners,
    max_bytes: int | None = None,
    *,
    expected: Mapping[str, str] | None = None,
    judges_revocation: bool = True,
) -> Bundle:
    """The bundle in directory `path`, without tensors, after every check but those of its weights,
    of which only the size is asked, and of days.

    Comes before a mixture takes a bundle in by links, or leaves one out; arguments, order and
    errors are those of `open_bundle`.

    Args:
        judges_revocation: False leaves it to the caller whether the owner has revoked it.
    """
    with _open_files(Path(path), max_bytes) as files:
        _compare_small(files, expected)
        checked = _check_signer(files, trusted, trusted.allows_unknown, judges_revocation)
        return Begun(files, *checked).bundle


def write_bundle(
    path: Path,
    weights: bytes | Path,
    manifest: Manifest,
    private_key: Path,
    today: datetime.date | None = None,
    passphrase: str | None = None,
) -> Path:
    """Pack and sign a bundle at `path` (`<name>.bundle`, must not exist); return `path`.

    `weights` is a safetensors file, or its bytes. A file is moved into the bundle, if it is on the
    same file system, and is to be nobody else's.

    It is opened with every check before it gets its name; a kill at any moment leaves nothing at
    `path`. For `passphrase` see `read_private_key`.

    Raises:
        BundleError: the weights do not match the manifest, hold an infinity or NaN, or the terms
            have expired; or `path` exists or cannot be written.
    """
    path = Path(path)
    if path.name != f"{manifest.name}.bundle":
        raise BundleError(f"{path}: expected the directory name {manifest.name}.bundle.")
    if os.path.lexists(path):
        raise BundleError(f"{path} exists and is not overwritten. Remove it or choose another.")
    key = read_private_key(private_key, passphrase)
    files = {MANIFEST_FILE: encode_manifest(manifest), SIGNER_FILE: encode_public(key)}
    digests = {name: digest_bytes(data) for name, data in files.items()}
    if isinstance(weights, bytes):
        digests[WEIGHTS_FILE] = digest_bytes(weights)
    else:
        digests[WEIGHTS_FILE] = digest_file(weights)
    files[SIGNATURE_FILE] = sign_files(path.name, digests, key)
    owner = TrustedOwners.from_keys({manifest.owner: files[SIGNER_FILE]})
    day = today or _today()
    day = max(day, manifest.terms.valid_from or day)  # terms may begin later
    try:
        with write_directory_aside(path, MANIFEST_FILE) as aside:
            for name, data in files.items():
                (aside / name).write_bytes(data)
            if isinstance(weights, Path):
                shutil.move(weights, aside / WEIGHTS_FILE)
            else:
                (aside / WEIGHTS_FILE).write_bytes(weights)
            try:
                open_bundle(aside, owner, today=day)
            except BundleError as e:
                found = str(e).replace(f"{aside} was refused", "it would be refused")
                raise type(e)(f"{path} was not written: {found}") from None
    except OSError as e:
        raise BundleError(f"{path} cannot be written: {e}.") from None
    return path


def subject_of(digests: Mapping[str, str]) -> str:
    """Words that say in the record of verified files which weights of which manifest they are."""
    return f"weights {digests[WEIGHTS_FILE]} of the manifest {digests[MANIFEST_FILE]}"


def digest_of(bundle: str) -> str:
    """Digest by which a bundle is known, of its manifest.json, for one named by its directory; a
    text that is no directory comes back as it is."""
    path = Path(bundle)
    if not path.is_dir():
        return bundle
    try:
        return digest_bytes(read_bytes(path / MANIFEST_FILE, MAX_MANIFEST_BYTES))
    except (OSError, ValueError) as e:
        raise BundleError(f"{path} is no bundle: {e}.") from None


def inspect_bundle(
    path: Path,
    trusted: TrustedOwners | None = None,
    today: datetime.date | None = None,
    *,
    max_bytes: int | None = None,
) -> dict[str, Any]:
    """Everything a bundle claims, for display only; never raises for a bad bundle.

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
        with _open_files(Path(path), max_bytes) as files:
            report["file_bytes"] = files.sizes
            report["claims"] = _read_claims(files.small.get(MANIFEST_FILE, b""))
            signed = _check_signature(files)
            report["key_id"] = signed.key_id
            report["signer"] = trusted.owner_of(signed.key_id) if trusted else None
            begun = Begun(files, *_check_signer(files, trusted, False))
            begun.read(day=today or _today())
    except BundleError as e:
        report["why_not"] = str(e)
    else:
        report["verified"] = True
    return report


# --- files -------------------------------------------------------------------------------------


@dataclass
class _Files:
    """The files of a bundle in directory `path`, opened once, without following links."""

    path: Path
    sizes: dict[str, int] = field(default_factory=dict)
    small: dict[str, bytes] = field(default_factory=dict)  # all but the weights
    weights: list[io.FileIO] = field(default_factory=list)  # one, or none if there is a problem
    problems: list[str] = field(default_factory=list)


def _read_claims(data: bytes) -> dict[str, Any] | None:
    try:
        return read_manifest(data).model_dump(mode="json")
    except BundleError:
        return None


@contextmanager
def _open_files(path: Path, max_bytes: int | None) -> Iterator[_Files]:
    """The files that a bundle should have, and in `problems` a line for everything amiss."""
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as e:
        raise BundleError(
            f"{path} cannot be opened as a directory ({e.strerror}). Name a bundle's directory."
        ) from None
    files = _Files(path)
    limits = dict(MAX_FILE_BYTES)
    if max_bytes is not None:
        limits[WEIGHTS_FILE] = min(max_bytes, limits[WEIGHTS_FILE])
    try:
        found = set(os.listdir(directory))
        files.problems = [f"missing: {name}" for name in sorted(limits.keys() - found)]
        files.problems += [f"extra: {name!a}" for name in sorted(found - limits.keys())]
        for name in sorted(found & limits.keys()):
            problem = _open_file(files, directory, name, limits[name])
            if problem is not None:
                files.problems.append(problem)
        yield files
    finally:
        os.close(directory)
        for f in files.weights:
            f.close()


def _open_file(files: _Files, directory: int, name: str, max_bytes: int) -> str | None:
    """Open one plain file, and read it unless it is the weights; a line if that cannot be."""
    try:
        # O_NONBLOCK: opening a pipe must not wait for a writer.
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except OSError:
        return f"{name}: found a link or something unreadable, expected a plain file"
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        return f"{name}: found something other than a plain file"
    f = io.FileIO(fd)
    files.sizes[name] = status.st_size
    if name == WEIGHTS_FILE and status.st_size <= max_bytes:
        files.weights.append(f)
        return None
    with f:
        if status.st_size > max_bytes:
            return f"{name}: found {status.st_size} bytes, expected at most {max_bytes}"
        try:
            data = f.read(status.st_size + 1)
        except OSError as e:
            return f"{name}: cannot be read ({e.strerror})"
    if len(data) != status.st_size:
        return f"{name}: changed its size while it was read; expected a file at rest"
    files.small[name] = data
    return None


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()


# --- checks ------------------------------------------------------------------------------------


def _compare_digests(
    files: _Files, found: Mapping[str, str], expected: Mapping[str, str], once: str = "signed"
) -> None:
    """SignatureError for each file in either that has not the same digest in both."""
    raise_listed(
        SignatureError,
        f"{files.path} was refused: files differ from what was {once}.",
        [
            f"{name}: found {found.get(name, 'no such file')}, "
            f"expected {expected.get(name, 'no such file')} as {once}"
            for name in sorted(found.keys() | expected.keys())
            if found.get(name) != expected.get(name)
        ],
        ADVICE_ALTERED,
    )


def _compare_small(files: _Files, expected: Mapping[str, str] | None) -> None:
    """Hold the small files against digests that were verified before, if there are any."""
    if expected is not None and not files.problems:
        found = {name: digest_bytes(data) for name, data in files.small.items()}
        _compare_digests(files, {**expected, **found}, expected, "verified before")


def _check_signature(files: _Files) -> Signed:
    """Check that all files are there and the small ones as signed; returns what was signed."""
    raise_listed(
        BundleError,
        f"{files.path} was refused: not the files of a bundle.",
        files.problems,
        f"Expected exactly {', '.join(sorted(MAX_FILE_BYTES))}. Ask the owner to send it again.",
    )
    try:
        signed = read_signature(files.small[SIGNATURE_FILE], files.small[SIGNER_FILE])
    except SignatureError as e:
        raise SignatureError(f"{files.path} was refused. {e}") from None
    found = {name: digest_bytes(files.small[name]) for name in (MANIFEST_FILE, SIGNER_FILE)}
    # The weights are compared when they are read, last of all.
    found[WEIGHTS_FILE] = signed.digests.get(WEIGHTS_FILE, "a file")
    _compare_digests(files, found, signed.digests)
    return signed


def _check_signer(
    files: _Files,
    trusted: TrustedOwners | None,
    allow_unknown_signer: bool,
    judges_revocation: bool = True,
) -> tuple[Signed, str | None, Manifest]:
    """Every check that needs no byte of the weights, in order; with the signer's trusted name."""
    path = files.path
    signed = _check_signature(files)
    signer = trusted.owner_of(signed.key_id) if trusted else None
    if signer is None and not allow_unknown_signer:
        raise SignatureError(
            f"{path} was refused: found a signature by the unknown key {signed.key_id}, expected "
            "one by a trusted owner. If you know from the owner that this is their key, put "
            "signer.pub among the trusted owners as <owner>.pub."
        )
    try:
        manifest = read_manifest(files.small[MANIFEST_FILE])
    except BundleError as e:
        raise BundleError(f"{path} was refused. {e}") from None
    if signer is not None and signer != manifest.owner:
        raise SignatureError(
            f"{path} was refused: manifest.json names the owner {manifest.owner!r}, but the "
            f"signing key is trusted as {signer!r}. Ask {signer!r} which is right."
        )
    if trusted is not None:
        _check_standing(path, trusted, manifest, signed, judges_revocation)
    size = files.sizes[WEIGHTS_FILE]
    room = 8 + MAX_HEADER_BYTES + sum(entry.num_bytes for entry in manifest.tensors.values())
    if size > room:  # altered for certain, and perhaps too large to read in vain
        raise SignatureError(
            f"{path} was refused: {WEIGHTS_FILE} has {size} bytes, the tensors in "
            f"{MANIFEST_FILE} take at most {room}. {ADVICE_ALTERED}"
        )
    return signed, signer, manifest


def _check_standing(
    path: Path, trusted: TrustedOwners, manifest: Manifest, signed: Signed, judges_revocation: bool
) -> None:
    """Check that the key is the owner's, if one is known, that it counted on the day of packing,
    and, if that is for us to judge, that the owner has not revoked the bundle."""
    keys = trusted.keys_of(manifest.owner)
    if not keys:
        return
    if signed.key_id not in keys:
        raise SignatureError(
            f"{path} was refused: it claims to be by {manifest.owner!r}, whose trusted key is "
            f"{' or '.join(keys)}, but found a signature by {signed.key_id}. Ask that owner."
        )
    key = keys[signed.key_id]
    if not key.counts_on(datetime.date.fromisoformat(manifest.created[:10])):
        raise SignatureError(
            f"{path} was refused: it was packed at {manifest.created} and signed by "
            f"{signed.key_id}, which counts for {manifest.owner!r} {key.days()}. Ask that owner to "
            "pack it again with a key that counts."
        )
    if not judges_revocation:
        return
    facts = facts_of(manifest, signed.key_id, signed.digests[MANIFEST_FILE])
    revoked = trusted.find_revocation(manifest.name, facts)
    if revoked is not None:
        raise RevokedError(
            f"{path} was refused: {manifest.name} of {manifest.owner!r}, serial {manifest.serial}, "
            f"was {revoked}. Ask the owner for a newer one."
        )


@dataclass(frozen=True)
class Begun:
    """A bundle of which all has been checked but the weights."""

    _files: _Files
    _signed: Signed
    _signer: str | None
    _manifest: Manifest

    @property
    def weights(self) -> Path | None:
        """A path to the very file of weights that is read, whatever is in the bundle by now; None
        where the system has none."""
        (file,) = self._files.weights
        return path_of_open(file.fileno())

    def is_ours_alone(self) -> bool:
        """True if nobody but us can change the weights (`flexolmo.bundle.verified`)."""
        (file,) = self._files.weights
        found = {WEIGHTS_FILE: Identity.of(file.fileno())}
        return wait_until_past(found) and is_ours_alone(file.fileno())

    @property
    def bundle(self) -> Bundle:
        """The bundle, without anything of its weights."""
        small = self._files.small
        sizes = self._files.sizes
        return Bundle(
            self._manifest,
            self._signer,
            self._signed.key_id,
            {**self._signed.digests, SIGNATURE_FILE: digest_bytes(small[SIGNATURE_FILE])},
            sizes[WEIGHTS_FILE],
        )

    def read(
        self,
        watch: Watch | None = None,
        known: VerifiedWeights | None = None,
        *,
        copy_to: Path | None = None,
        day: datetime.date | None = None,
    ) -> Bundle:
        """The bundle after every other check; to be called once. Arguments and errors are those of
        `open_bundle`; without a `day` the caller judges the terms."""
        files = self._files
        manifest = self._manifest
        (file,) = files.weights
        identity = Identity.of(file.fileno())
        is_alone = known is not None or self.is_ours_alone()
        weights = None
        if known is None:
            weights = self._check_weights(watch, copy_to)
            largest: Mapping[str, float] = weights.largest
        else:
            largest = known.largest
            if known.identity == identity and watch is not None:
                watch_weights(file, files.sizes[WEIGHTS_FILE], watch)
        lines = []
        if self._signed.subject != f"{manifest.name}.bundle":
            lines.append(
                f"{SIGNATURE_FILE}: found the name {self._signed.subject!a}, "
                f"expected {manifest.name}.bundle"
            )
        lines += _find_content_problems(manifest, weights, day)
        raise_listed(
            BundleError,
            f"{files.path} was refused: its content is not what manifest.json claims, or cannot be "
            "used.",
            lines,
            f"Ask the owner ({manifest.owner}) for a new bundle.",
        )
        is_same = identity == Identity.of(file.fileno())
        if known is not None and not (is_same and known.identity == identity):
            raise BundleError(
                f"{files.path} changed while it was read. Open it once it is at rest."
            )
        if copy_to is not None:
            identity = Identity.of(copy_to / WEIGHTS_FILE)
            is_alone = is_ours(os.lstat(copy_to / WEIGHTS_FILE))  # we made it
        verified = VerifiedWeights(identity, largest) if is_same and is_alone else None
        return replace(self.bundle, largest=largest, verified=verified)

    def _check_weights(self, watch: Watch | None, copy_to: Path | None) -> Weights:
        """The weights if they are those that were signed; all files go to `copy_to` too."""
        if copy_to is None:
            return _read_weights(self._files, self._signed, watch, None)
        for name, data in self._files.small.items():
            (copy_to / name).write_bytes(data)
        with open(copy_to / WEIGHTS_FILE, "xb") as copy:
            return _read_weights(self._files, self._signed, watch, copy)


class _Kept:
    """The tensors of a bundle in memory, each of which goes back to the system when let go."""

    def __init__(self) -> None:
        self.data: dict[str, mmap.mmap] = {}

    def __call__(self, name: str, span: Span, at: int, piece: memoryview) -> None:
        if at == 0:
            self.data[name] = mmap.mmap(-1, span.end - span.begin)
        self.data[name][at : at + len(piece)] = piece


def _read_weights(
    files: _Files, signed: Signed, watch: Watch | None, copy: BinaryIO | None
) -> Weights:
    """The weights, read once, if they are those that were signed."""
    (file,) = files.weights
    try:
        weights = read_weights(file, files.sizes[WEIGHTS_FILE], watch, copy)
    except BundleError as e:
        file.seek(0)
        digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        _compare_digests(files, {**signed.digests, WEIGHTS_FILE: digest}, signed.digests)
        raise BundleError(f"{files.path} was refused, {WEIGHTS_FILE}: {e}") from None
    _compare_digests(files, {**signed.digests, WEIGHTS_FILE: weights.digest}, signed.digests)
    return weights


def _find_content_problems(
    manifest: Manifest, weights: Weights | None, today: datetime.date | None
) -> list[str]:
    """A line for each way in which the weights, if read, differ from the manifest or cannot be
    used, `today` if that is for us to judge."""
    days = [] if today is None else manifest.terms.refusals_of_day(today)
    late = [f"{why}, today is {today}" for why in days]
    if weights is None:
        return late
    lines = []
    if weights.digest != manifest.weights_digest:
        lines.append(
            f"{WEIGHTS_FILE}: found digest {weights.digest}, expected {manifest.weights_digest}"
        )
    found = weights.tensors
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
    lines += [f"not finite: {name} holds an infinity or NaN" for name in weights.nonfinite]
    return lines + late
