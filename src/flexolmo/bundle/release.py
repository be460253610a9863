"""The release report of a bundle: claims about what its expert may tell of the owner's text.

A directory NAME.report beside NAME.bundle, signed as a bundle is, by the same key. The report names
the digest of the bundle's manifest, and not the other way round: attacks are made on the signed
bundle, so its manifest is there before anything is known. To sign the bundle again with the
report's digest in it would make another bundle, whose digest no attack, no mixture and no
revocation knows. A mixture keeps the report beside the bundle and its digest in `mixture.json`.

    report.json        claims, canonical JSON, see `ReleaseReport`
    page.html          the same for people
    bom.json           bill of materials, CycloneDX
    data_card.json     card of the owner's set, Croissant
    signer.pub, signature.sig    as in a bundle, over all of these

All of it is the owner's word. Knows nothing of attacks.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from pydantic import AfterValidator, Field, JsonValue, ValidationError, model_validator

from flexolmo.bundle.bundle import MANIFEST_FILE, SIGNATURE_FILE, SIGNER_FILE, Bundle
from flexolmo.bundle.manifest import Count, Created, Manifest, Name, Owner
from flexolmo.bundle.signing import encode_public, read_signature, sign_files
from flexolmo.bundle.strict import Claim, check_canonical, parse_object, raise_listed, read_claims
from flexolmo.bundle.tensors import Digest, Positive
from flexolmo.errors import BundleError, FlexOlmoError, MergeError, SignatureError
from flexolmo.files import canonical_json, digest_bytes, read_bytes, write_directory_aside
from flexolmo.numbers import format_percent

REPORT_FILE = "report.json"
PAGE_FILE = "page.html"
BOM_FILE = "bom.json"
DATA_CARD_FILE = "data_card.json"
MAX_BYTES = {
    REPORT_FILE: 1 << 20,
    PAGE_FILE: 8 << 20,
    BOM_FILE: 1 << 20,
    DATA_CARD_FILE: 1 << 20,
    SIGNER_FILE: 4 << 10,
    SIGNATURE_FILE: 64 << 10,
}
MAX_FINDINGS_BYTES = 512 << 10  # of which recipe and router settings of a manifest have 128 << 10
ADVICE = "Ask the owner to send the report again, or to make it again: flexolmo audit report."
DEMANDS = {
    "extraction": "share of training documents that the model writes when given their beginnings, "
    "upper end of its interval",
    "membership_auc": "AUC of attacks that tell training documents from others, upper end of the "
    "highest interval",
    "epsilon": "epsilon of the differential privacy that the bundle states",
}
UP_TO_ONE = ("extraction", "membership_auc")  # of DEMANDS: no value is above 1
NO_PERCENT = ("membership_auc", "epsilon")
MISSING = {
    "extraction": "the report has no such attack, or one that sampled nothing",
    "membership_auc": "the report has no such attack, or one on too few documents",
    "epsilon": "the bundle states no guarantee, or none that training here can give",
}
LARGEST_DELTA = 1e-3  # that a recipe may ask for
EXAMPLE = "extraction<=0.2%,membership_auc<=0.55,epsilon<=8"

Measure = Literal["extraction", "membership_auc"]
Share = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, Field(gt=0, le=1e9)]


def _check_length(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if len(canonical_json(value)) > MAX_FINDINGS_BYTES:
        raise ValueError(f"longer than {MAX_FINDINGS_BYTES} bytes as JSON")
    return value


class Budget(Claim):
    """Guarantee of weights and table together, as `train.protect` writes it into a recipe.

    Other words than its own, or a delta that no recipe may ask for, are no guarantee. Whether the
    numbers fit one another is not looked at: all of it is the owner's word.
    """

    unit: Literal["document", "sequence", "unit"]
    neighbours: Literal["one unit added or removed"]
    epsilon: Annotated[float, Field(gt=0, le=1e6)]
    delta: Annotated[float, Field(gt=0, le=LARGEST_DELTA)]
    accountant: Literal["PRV (Opacus)"]
    sampling: Literal["Poisson, of windows drawn in secret"]  # "Poisson" alone proved too little
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    steps: Positive
    noise: Number  # of a step, in clipping norms
    clip_norm: Number
    table_noise: Number

    def summary(self) -> str:
        """Guarantee in a few words, for people."""
        return f"epsilon {self.epsilon:.3g}, delta {self.delta:g}, for each {self.unit}"


class Figure(Claim):
    """Result of the attack that found most, with its 95 % interval."""

    value: Share
    low: Share
    high: Share
    model: Literal["alone", "on"]  # attacked: the expert, or the mixture with it

    @model_validator(mode="after")
    def _check_order(self) -> "Figure":
        if not self.low <= self.value <= self.high:
            raise ValueError(f"low <= value <= high: {self.low}, {self.value}, {self.high} are not")
        return self


class ReleaseReport(Claim):
    """Claims of a release report. No field has a default."""

    format: Literal["flexolmo-release-report"]
    format_version: Literal[1]
    name: Name
    owner: Owner
    serial: Count
    bundle_digest: Digest  # of the bundle's manifest.json
    created: Created
    measures: dict[Measure, Figure]
    findings: Annotated[dict[str, JsonValue], AfterValidator(_check_length)]  # what the page shows


@dataclass(frozen=True)
class Release:
    """A release report that was signed, by whomever, as it stands."""

    report: ReleaseReport
    key_id: str
    digest: str  # of report.json
    files: Mapping[str, bytes] = field(repr=False)


def origin_of(bundle_digest: str, anchor_digest: str, recipe: Mapping[str, Any]) -> dict[str, str]:
    """The bundle that results of an attack are of, by its manifest's digest, anchor and recipe.

    The recipe's digest leaves out the budget, which depends on the number of units: experts that
    were trained alike on other text have the same.
    """
    plain = {k: v for k, v in recipe.items() if k != "budget"}
    return {
        "bundle": bundle_digest,
        "anchor": anchor_digest,
        "recipe": digest_bytes(canonical_json(plain)),
    }


def place_of(bundle: Path) -> Path:
    """Directory where the report of the bundle in directory `bundle` lies."""
    return bundle.with_name(f"{bundle.name.removesuffix('.bundle')}.report")


# --- written and read ---------------------------------------------------------------------------


def write_release(
    path: Path, report: ReleaseReport, shown: Mapping[str, bytes], key: EllipticCurvePrivateKey
) -> str:
    """Sign the report and the three files `shown` into the directory `path`; its digest.

    A report that is there is replaced; FlexOlmoError if something else is.
    """
    files = {
        REPORT_FILE: canonical_json(report.model_dump(mode="json")),
        **shown,
        SIGNER_FILE: encode_public(key),
    }
    digests = {name: digest_bytes(data) for name, data in files.items()}
    files[SIGNATURE_FILE] = sign_files(f"{report.name}.report", digests, key)
    with write_directory_aside(path, REPORT_FILE) as aside:
        for name, data in files.items():
            (aside / name).write_bytes(data)
        try:
            read_release(aside)
        except BundleError as e:
            raise type(e)(f"{path} was not written: {e}") from None
    return digests[REPORT_FILE]


def read_release(path: Path) -> Release:
    """The release report in directory `path`, if its files are those that were signed.

    Whether the signer is to be believed is the caller's to check, see `check_release`.

    Raises:
        SignatureError: a file that is not as signed, or a signature that does not hold.
        BundleError: not the files of a report, or claims that are unknown, missing or malformed.
    """
    path = Path(path)
    files = _read_files(path)
    try:
        signed = read_signature(files[SIGNATURE_FILE], files[SIGNER_FILE])
    except SignatureError as e:
        raise SignatureError(f"{path} was refused. {e}") from None
    found = {n: digest_bytes(data) for n, data in files.items() if n != SIGNATURE_FILE}
    raise_listed(
        SignatureError,
        f"{path} was refused: files differ from what was signed.",
        [
            f"{name}: found {found.get(name, 'no such file')}, expected "
            f"{signed.digests.get(name, 'no such file')} as signed"
            for name in sorted(found.keys() | signed.digests.keys())
            if found.get(name) != signed.digests.get(name)
        ],
        ADVICE,
    )
    try:
        value = parse_object(files[REPORT_FILE], REPORT_FILE, ADVICE)
        check_canonical(value, files[REPORT_FILE], REPORT_FILE, ADVICE)
        report = read_claims(files[REPORT_FILE], ReleaseReport, REPORT_FILE, ADVICE)
    except BundleError as e:
        raise BundleError(f"{path} was refused. {e}") from None
    if signed.subject != f"{report.name}.report":
        raise BundleError(
            f"{path} was refused: found the signed name {signed.subject!a}, expected "
            f"{report.name}.report. {ADVICE}"
        )
    return Release(report, signed.key_id, found[REPORT_FILE], files)


def _read_files(path: Path) -> dict[str, bytes]:
    """The bytes of each file of a report; BundleError if there are others, or one is missing."""
    try:
        names = set(os.listdir(path))
    except OSError as e:
        raise BundleError(
            f"{path} cannot be opened as a directory ({e.strerror}). Name a report's directory."
        ) from None
    lines = [f"missing: {name}" for name in sorted(MAX_BYTES.keys() - names)]
    lines += [f"extra: {name!a}" for name in sorted(names - MAX_BYTES.keys())]
    files = {}
    for name in sorted(names & MAX_BYTES.keys()):
        try:
            files[name] = read_bytes(path / name, MAX_BYTES[name], follows_links=False)
        except (OSError, ValueError) as e:
            lines.append(f"{name}: {e}")
    raise_listed(BundleError, f"{path} was refused: not the files of a report.", lines, ADVICE)
    return files


def check_release(path: Path, bundle: Bundle) -> Release:
    """The release report in directory `path`, if it is of `bundle` and signed by the same key.

    Raises as `read_release`, and:
        SignatureError: signed by another key.
        BundleError: a report of another bundle, or one that calls this one by another name, owner
            or serial than its manifest does.
    """
    found = read_release(path)
    if found.key_id != bundle.key_id:
        raise SignatureError(
            f"{path} was refused: found a signature by the key {found.key_id}, expected one by "
            f"{bundle.key_id}, which signed the bundle. {ADVICE}"
        )
    r = found.report
    m = bundle.manifest
    digest = bundle.digests[MANIFEST_FILE]
    if (r.bundle_digest, r.name, r.owner, r.serial) != (digest, m.name, m.owner, m.serial):
        raise BundleError(
            f"{path} was refused: it is the report of {r.name} of {r.owner}, serial {r.serial}, "
            f"bundle {r.bundle_digest}; this bundle is {m.name} of {m.owner}, serial {m.serial}, "
            f"{digest}. {ADVICE}"
        )
    return found


# --- demands of a coordinator -------------------------------------------------------------------


def stated_budget(manifest: Manifest) -> Budget | None:
    """The guarantee that the manifest states; None if training was not private, or if anything is
    missing in what is stated, or malformed."""
    if manifest.recipe.get("privacy") is None:
        return None
    try:
        return Budget.model_validate(manifest.recipe.get("budget"))
    except ValidationError:
        return None


def stated_epsilon(manifest: Manifest) -> float | None:
    """Epsilon of `stated_budget`; None: no guarantee."""
    budget = stated_budget(manifest)
    return None if budget is None else budget.epsilon


def demanded_values(release: Release, manifest: Manifest) -> dict[str, float | None]:
    """The value of each of DEMANDS that a limit is held against: the upper end of the interval, for
    what an attack may find with more text or luck; None if there is none."""
    measures = release.report.measures
    return {
        "extraction": measures["extraction"].high if "extraction" in measures else None,
        "membership_auc": measures["membership_auc"].high if "membership_auc" in measures else None,
        "epsilon": stated_epsilon(manifest),
    }


def find_excess(
    name: str, values: Mapping[str, float | None], limits: Mapping[str, float]
) -> list[str]:
    """A line for each demand that the expert's values do not meet: what was found, and what was
    demanded."""
    lines = []
    for demand, limit in limits.items():
        value = values[demand]
        shown = show_value(demand, limit)
        if value is None:
            lines.append(f"{name}: {demand}: {MISSING[demand]}, demanded is at most {shown}")
        elif not value <= limit:
            end = "" if demand == "epsilon" else ", the upper end of its interval"
            lines.append(
                f"{name}: {demand} is {show_value(demand, value)}{end}, demanded is at most {shown}"
            )
    return lines


def refuse_excess(lines: Sequence[str]) -> None:
    """Raise MergeError if there is a line of `find_excess` or `take_release`."""
    if lines:
        raise MergeError(
            "Not within the limits that are demanded of release reports:\n  "
            + "\n  ".join(lines)
            + "\nNothing was changed. Ask the owner for a report (flexolmo audit report), to lie "
            "beside the bundle as NAME.report; for attacks on more documents, which narrow an "
            "interval; or for an expert that tells less (private training, fewer passes)."
        )


def show_value(demand: str, value: float) -> str:
    """A value of one of DEMANDS for people."""
    return format_percent(value, 2) if demand == "extraction" else f"{value:.4g}"


def take_release(
    bundle_path: Path, bundle: Bundle, limits: Mapping[str, float]
) -> tuple[Release | None, list[str]]:
    """The release report beside a bundle that was opened, and a line for each way in which it does
    not meet `limits`; no report is one."""
    name = bundle.manifest.name
    path = place_of(bundle_path)
    if not os.path.lexists(path):
        return None, [f"{name}: found no release report at {path}"]
    try:
        release = check_release(path, bundle)
    except FlexOlmoError as e:
        return None, [f"{name}: {e}"]
    return release, find_excess(name, demanded_values(release, bundle.manifest), limits)
