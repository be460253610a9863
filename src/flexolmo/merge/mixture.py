"""A mixture on disk: the anchor, the bundles it was built from, and what was checked.

    model/mixture.json            digests, router, owners, terms
    model/anchor/                 the anchor, whole
    model/experts/NAME.bundle/    each owner's bundle, whole and still signed
    model/experts/NAME.report/    its release report, if the coordinator demanded one

Nothing is trained and nothing is rewritten, so adding and removing an owner is adding and removing
a directory, and any owner can check what the coordinator publishes. Source: §3.3.3, layout ours.
"""

import copy
import datetime
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from flexolmo.bundle.bundle import MAX_FILE_BYTES, Bundle, check_signer, open_bundle
from flexolmo.bundle.facts import Barred, ExpertFacts
from flexolmo.bundle.manifest import Manifest, Name
from flexolmo.bundle.release import (
    Release,
    check_release,
    demanded_values,
    place_of,
    refuse_excess,
    take_release,
)
from flexolmo.bundle.tensors import Digest
from flexolmo.bundle.terms import Terms
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.config import Settings
from flexolmo.data.tokenizer import Tokenizer
from flexolmo.errors import BundleError, CheckpointError, MergeError, RevokedError, SignatureError
from flexolmo.files import (
    lock_directory,
    read_json,
    recover_missing,
    write_directory_aside,
    write_json,
)
from flexolmo.merge.checks import (
    ROUTER,
    find_differences,
    find_misfits,
    find_unstable,
    shared_settings,
    tensors_of,
)
from flexolmo.merge.rollback import Seen, find_rollback, join_seen, seen_of
from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.checkpoint import Anchor, anchor_files, load_anchor
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import RouterSettings
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.terminal import echo

ABOUT = "mixture.json"
Demand = Literal["extraction", "membership_auc", "epsilon"]


class _Newest(Settings):
    """The newest bundle of one owner and name that a mixture ever held."""

    serial: Annotated[StrictInt, Field(ge=0)]
    bundle_digest: Digest


class _Expert(BaseModel):
    """Digests of a bundle's files; the other fields are compared with its manifest's."""

    model_config = ConfigDict(extra="allow")

    files: dict[
        Literal["expert.safetensors", "manifest.json", "signature.sig", "signer.pub"], Digest
    ]


class _Effect(Settings):
    change: float
    weight: float


class _Effects(Settings):
    public: _Effect
    forms: dict[str, _Effect]
    others: dict[Name, _Effect]


class _Influence(Settings):
    """Findings of `flexolmo.evaluation.influence`, and the limits that they were held to."""

    limits: dict[Literal["public", "claims", "forms", "others"], float]
    public_digest: Digest
    seed: int
    seq_len: int
    experts: dict[Name, _Effects]
    together: _Effects | None


class _Reported(Settings):
    """The release report that came with a bundle, and what `demanded_values` says of it."""

    report_digest: Digest
    values: dict[Demand, float | None]


class _Release(Settings):
    """Limits that release reports were held to."""

    limits: dict[Demand, float]
    experts: dict[Name, _Reported]


class _Index(Settings):
    """`mixture.json`. All that it says of an expert is read again from that expert's bundle."""

    format: Literal["flexolmo-mixture"]
    format_version: Literal[4]
    anchor_digest: Digest
    router: RouterSettings
    top_k: Annotated[StrictInt, Field(ge=1)] | None
    experts: dict[Name, _Expert]
    seen: dict[Name, dict[str, _Newest]]  # by name and owner, of those who were removed too
    influence: _Influence | None
    release: _Release | None = None  # absent in mixtures of before there were reports


@dataclass(frozen=True)
class LoadedMixture:
    """A mixture ready to run."""

    model: MixtureModel
    tokenizer: Tokenizer
    about: dict[str, Any]  # mixture.json
    facts: Mapping[str, ExpertFacts]  # by expert
    seen: Seen = field(default_factory=dict)  # for `load_mixture`, when the model is loaded again
    barred: Mapping[str, Barred] = field(default_factory=dict)  # experts that were not loaded

    @property
    def expert_names(self) -> list[str]:
        """Owners' experts, alphabetically; `public` is not among them."""
        return self.model.expert_names[1:]

    @property
    def terms(self) -> dict[str, Terms]:
        """Terms of use by expert."""
        return {name: facts.terms for name, facts in self.facts.items()}


# judges a mixture, and its newcomers by name, before it takes its place: raises MergeError, or
# gives what is kept of it as `influence`; see evaluation.influence.admission
Admission = Callable[[LoadedMixture, Sequence[str]], dict[str, Any]]


def build_mixture(
    anchor_dir: Path,
    bundles: Sequence[Path],
    out: Path,
    trusted: TrustedOwners | None,
    *,
    top_k: int | None = None,
    max_bytes: int | None = None,
    admission: Admission | None = None,
    demands: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Check `bundles` against the anchor and each other, and write the mixture to `out`.

    Args:
        top_k: Experts (public included) active per token; None: all enabled ones.
        max_bytes: A bundle with larger weights is refused before anything of them is read.
        admission: Asked last, of the whole mixture.
        demands: Limits, by measure of `bundle.release.DEMANDS`, that the release report beside
            each bundle must keep; the mixture keeps reports and limits.

    Raises:
        BundleError, SignatureError: a bundle that does not hold up by itself.
        MergeError: bundles that do not fit the anchor or each other, or whose reports are missing
            or above a limit; lists every difference.
    """
    if top_k is not None and top_k < 1:
        raise MergeError(f"top_k is {top_k}: at least one expert must be active per token.")
    trusted = _require(trusted)
    about: dict[str, Any] = {"top_k": top_k, "experts": {}, "influence": None}
    about["release"] = {"limits": dict(demands), "experts": {}} if demands else None
    with _hold(out):
        recover_missing(out)
        about["seen"] = read_about(out)["seen"] if (Path(out) / ABOUT).is_file() else {}
        sources = [Path(b) for b in bundles]
        return _write(Path(out), Path(anchor_dir), sources, about, trusted, max_bytes, admission)


def add_experts(
    model_dir: Path,
    bundles: Sequence[Path],
    trusted: TrustedOwners | None,
    *,
    max_bytes: int | None = None,
    admission: Admission | None = None,
    demands: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Add `bundles` to the mixture in `model_dir`, with every check of `build_mixture`.

    Those already in it must be trusted and within their terms. A bundle older than one that this
    mixture ever held of its owner and name is refused. A mixture that was built with `admission`
    needs it here. Demands that it keeps hold for `bundles` too, unless `demands` has others.
    """
    trusted = _require(trusted)
    model_dir = Path(model_dir)
    with _hold(model_dir):
        about, sources = read_about(model_dir), [Path(b) for b in bundles]
        if admission is None and about["influence"]:
            raise MergeError(
                f"{model_dir} keeps what its experts do to text that is not their owners', which "
                "must be measured again: give the prepared public set (--public)."
            )
        if demands:
            kept = about.get("release") or {"limits": {}, "experts": {}}
            about["release"] = kept | {"limits": kept["limits"] | demands}
        anchor = model_dir / "anchor"
        return _write(model_dir, anchor, sources, about, trusted, max_bytes, admission)


def remove_experts(
    model_dir: Path, names: Iterable[str], trusted: TrustedOwners | None
) -> dict[str, Any]:
    """Remove owners' experts, files and all, from the mixture in `model_dir`.

    Signers of those who stay must be trusted; nothing is asked of those who go. Serial and
    digest of what they signed stay in mixture.json, so that nothing older comes back.
    """
    trusted = _require(trusted)
    model_dir = Path(model_dir)
    gone = set(names)
    with _hold(model_dir):
        about = read_about(model_dir)
        _refuse_unknown(gone, about)
        experts = about["experts"]
        about["experts"] = {n: e for n, e in experts.items() if n not in gone}
        if found := about["influence"]:
            found["together"] = None
            found["experts"] = {
                n: x | {"others": {o: y for o, y in x["others"].items() if o not in gone}}
                for n, x in found["experts"].items()
                if n not in gone
            }
        if reported := about.get("release"):
            kept = {n: x for n, x in reported["experts"].items() if n not in gone}
            about["release"] = reported | {"experts": kept}
        return _write(model_dir, model_dir / "anchor", [], about, trusted)


def remove_revoked(model_dir: Path, trusted: TrustedOwners) -> dict[str, str]:
    """Remove the experts that their owners have revoked, as `remove_experts` does.

    Returns why, by name; `trusted` holds the revocation lists.
    """
    model_dir = Path(model_dir)
    gone: dict[str, str] = {}
    for name in read_about(model_dir)["experts"]:
        try:
            check_signer(model_dir / "experts" / f"{name}.bundle", trusted)
        except RevokedError as e:
            gone[name] = str(e)
    if gone:
        remove_experts(model_dir, gone, trusted)
    return gone


def rebuild_mixture(
    model_dir: Path, names: Iterable[str], out: Path, trusted: TrustedOwners | None
) -> dict[str, Any]:
    """Write to `out` the mixture that `model_dir` would be had no others than `names` ever been in
    it: its anchor, router and top_k, and their bundles, with every check of `build_mixture`.

    No file of another bundle is opened.
    """
    trusted = _require(trusted)
    model_dir = Path(model_dir)
    about = read_about(model_dir)
    kept = sorted(names)
    _refuse_unknown(set(kept), about)
    bundles = [model_dir / "experts" / f"{n}.bundle" for n in kept]
    new = about | {"experts": {}, "seen": {}, "influence": None, "release": None}
    with _hold(out):
        return _write(Path(out), model_dir / "anchor", bundles, new, trusted)


def load_mixture(
    model_dir: Path,
    trusted: TrustedOwners | None,
    experts: Iterable[str] | None = None,
    seen: Seen | None = None,
    *,
    leaves_out_barred: bool = False,
) -> LoadedMixture:
    """The mixture in `model_dir`, with all its experts or only those named.

    Their signers must be among `trusted`; ANY_SIGNER lets everybody in. Every bundle is checked
    again as when it was added, and that mixture.json says of it what its manifest says; an expert
    whose terms refuse today, or that is older than one in `seen` (of an earlier load), is refused
    by name. The choice of bundles and `top_k` are not signed: keep mixture.json as safe as the
    program.

    With `leaves_out_barred`, an expert whose owner has revoked it, or whose terms refuse today, is
    left out; `barred` of the result says why, also of those that `experts` does not name. Of such
    bundles the signature and all else but the weights are checked, which are not read; whatever
    does not hold up is refused as without.
    """
    trusted = _require(trusted)
    model_dir = Path(model_dir)
    about = read_about(model_dir)
    anchor = load_anchor(model_dir / "anchor")
    _refuse_other_anchor(model_dir, anchor, about)
    chosen = set(about["experts"]) if experts is None else set(experts)
    _refuse_unknown(chosen, about)
    today = datetime.datetime.now(datetime.UTC).date()
    barred = _find_barred(model_dir, about, chosen, trusted, today) if leaves_out_barred else {}
    opened = [
        _reopen(model_dir / "experts" / f"{n}.bundle", n, about, trusted, keep_tensors=True)
        for n in sorted(chosen - barred.keys())
    ]
    _refuse_late(model_dir, [b.manifest for b in opened], today)
    lines = [line for b in opened for line in find_rollback(seen or {}, b.manifest.name, b.facts)]
    lines += [line for bundle in opened for line in find_misfits(anchor, bundle)]
    _refuse(lines + find_differences(anchor, [b.manifest for b in opened], about["router"]))
    tensors = {b.manifest.name: tensors_of(b) for b in opened}
    for bundle in opened:
        bundle.tensors.clear()
    router = ROUTER.validate_python(about["router"])
    model = assemble_mixture(anchor, tensors, router, top_k=about["top_k"], takes_over=True)
    facts = {b.manifest.name: b.facts for b in opened}
    seen = join_seen(seen or {}, about["seen"])
    return LoadedMixture(model, anchor.tokenizer, about, facts, seen, barred)


def read_about(model_dir: Path) -> dict[str, Any]:
    """The content of `mixture.json`: anchor digest, router, top_k, and each expert's claims."""
    path = Path(model_dir) / ABOUT
    recover_missing(path.parent)
    if not path.is_file():
        raise MergeError(
            f"{model_dir} is not a mixture: it has no {ABOUT}. Make one with flexolmo mix build."
        )
    if (Path(model_dir) / "anchor.json").exists():
        raise MergeError(
            f"{model_dir} has both {ABOUT} and anchor.json, so it is not clear what it is. A "
            "mixture's own anchor is in its directory anchor/. Remove the one that was put there."
        )
    about = read_json(path, MergeError)
    if not isinstance(about, dict):
        raise MergeError(f"{path} does not describe a mixture.")
    if about.get("format") != "flexolmo-mixture" or about.get("format_version") != 4:
        raise MergeError(
            f"{path} is format {about.get('format')!r} version {about.get('format_version')!r}; "
            "expected 'flexolmo-mixture' version 4. Build it again, in another place, from "
            f"{model_dir}/anchor and the bundles in {model_dir}/experts."
        )
    try:
        _Index.model_validate(about)
    except ValidationError as e:
        lines = [
            f"{'.'.join(map(str, x['loc']))}: {x['msg']}, found {str(x['input'])[:100]!r}"
            for x in e.errors()
        ]
        raise MergeError(f"{path} does not describe a mixture:\n  " + "\n  ".join(lines)) from None
    return about


@contextmanager
def _hold(model_dir: Path) -> Iterator[None]:
    """One change of a mixture at a time: what was read of it stays true until it is written.

    The directory around it is locked, since its own is replaced.
    """
    around = Path(model_dir).resolve().parent
    around.mkdir(parents=True, exist_ok=True)
    with lock_directory(around, wait=True) as is_held:
        if not is_held:
            echo(f"{around} cannot be locked: let no other program change {model_dir}.", err=True)
        yield


def _refuse_other_anchor(model_dir: Path, anchor: Anchor, about: Mapping[str, Any]) -> None:
    if anchor.digest != about["anchor_digest"]:
        raise MergeError(
            f"{model_dir}/anchor has digest {anchor.digest}, the mixture was built "
            f"on {about['anchor_digest']}. Build it again."
        )


def _refuse_late(
    model_dir: Path, manifests: Sequence[Manifest], today: datetime.date | None = None
) -> None:
    """Refuse experts whose terms have not begun or have expired `today` (UTC; default: now)."""
    today = today or datetime.datetime.now(datetime.UTC).date()
    late = [f"{m.name}: {why}" for m in manifests for why in m.terms.refusals_of_day(today)]
    if late:
        raise MergeError(
            f"{model_dir} may not be used as it is:\n  "
            + "\n  ".join(late)
            + "\nRemove these experts (flexolmo mix remove) or ask their owners."
        )


def _describe_expert(bundle: Bundle) -> dict[str, Any]:
    m = bundle.manifest
    return {
        "owner": m.owner,
        "key_id": bundle.key_id,
        "serial": m.serial,
        "licence": m.licence,
        "terms": m.terms.model_dump(mode="json"),
        "created": m.created,
        "architecture": m.architecture.model_dump(mode="json"),
        "tokens_seen": m.tokens_seen,
        "weights_bytes": bundle.weights_bytes,
        "data_card_digest": m.data_card_digest,
        "files": {name: bundle.digests[name] for name in sorted(MAX_FILE_BYTES)},
    }


def _refuse(lines: Sequence[str]) -> None:
    if lines:
        raise MergeError(
            "These experts cannot be merged:\n  "
            + "\n  ".join(lines)
            + "\nAsk their owners for experts trained on this anchor with one router."
        )


def _refuse_unknown(names: set[str], about: Mapping[str, Any]) -> None:
    unknown = sorted(names - set(about["experts"]))
    if unknown:
        raise MergeError(
            f"No expert {', '.join(unknown)} here: the mixture holds "
            f"{', '.join(sorted(about['experts'])) or 'none'}."
        )


def _require(trusted: TrustedOwners | None) -> TrustedOwners:
    if trusted is None:
        raise SignatureError(
            "Nobody was said to be trusted. Give --trust DIR, or set FLEXOLMO_TRUST to it: a "
            "directory with each trusted owner's public key as OWNER.pub. To look at a mixture "
            "whoever signed it, give --trust-any-signer. From Python: TrustedOwners.load(DIR), or "
            "ANY_SIGNER."
        )
    return trusted


def _reopen(
    path: Path, name: str, about: Mapping[str, Any], trusted: TrustedOwners, **options: Any
) -> Bundle:
    """A bundle inside a mixture, byte for byte as once verified; the caller judges its terms."""
    entry = about["experts"][name]
    found = open_bundle(
        path, trusted, trusted.allows_unknown, judges_days=False, **options, expected=entry["files"]
    )
    _refuse_other_bundle(path, name, about, found)
    return found


def _find_barred(
    model_dir: Path,
    about: Mapping[str, Any],
    chosen: Collection[str],
    trusted: TrustedOwners,
    today: datetime.date,
) -> dict[str, Barred]:
    """Experts that their owners let nobody use `today`, or that are not `chosen`; no weights are
    read."""
    barred = {}
    for name in about["experts"]:
        path = model_dir / "experts" / f"{name}.bundle"
        found = check_signer(path, trusted, judges_revocation=False)
        bar = trusted.find_bar(name, found.facts, today)
        if name not in chosen:
            bar = bar or Barred(found.facts, f"{name} was not chosen to be loaded.")
        if bar is not None:
            _refuse_other_bundle(path, name, about, found)
            barred[name] = bar
    return barred


def _refuse_other_bundle(path: Path, name: str, about: Mapping[str, Any], found: Bundle) -> None:
    """Refuse a bundle of which mixture.json says something else than its manifest."""
    entry = about["experts"][name]
    claims = {"name": found.manifest.name, **_describe_expert(found)}
    wrong = [
        f"{key}: found {claims.get(key)!r}, {ABOUT} says {said!r}"
        for key, said in {**dict.fromkeys(claims), "name": name, **entry}.items()
        if claims.get(key) != said
    ]
    wrong += find_rollback(about["seen"], name, found.facts)
    if wrong:
        raise MergeError(
            f"{path} is not the bundle that was verified:\n  "
            + "\n  ".join(wrong)
            + "\nBuild the mixture again from the owner's bundle."
        )


# --- writing ------------------------------------------------------------------------------------


def _write(
    out: Path,
    anchor_dir: Path,
    bundles: Sequence[Path],
    about: Mapping[str, Any],
    trusted: TrustedOwners,
    max_bytes: int | None = None,
    admission: Admission | None = None,
) -> dict[str, Any]:
    """Write the mixture of `about` with `bundles` added; each file is read once, where it ends up.

    One expert's tensors at a time are in memory, but for `admission`, which is given all.
    """
    with write_directory_aside(out, ABOUT) as aside:
        with _naming(aside / "anchor", anchor_dir):
            _place(anchor_dir, aside / "anchor", anchor_files(anchor_dir))
            anchor = load_anchor(aside / "anchor")
        if "anchor_digest" in about:
            _refuse_other_anchor(out, anchor, about)
        (aside / "experts").mkdir()
        experts: dict[str, Any] = {}
        manifests: list[Manifest] = []
        lines: list[str] = []
        seen = about["seen"]
        release = copy.deepcopy(about.get("release"))
        reports: list[str] = []
        for name in about["experts"]:
            source, target = (d / "experts" / f"{name}.bundle" for d in (out, aside))
            with _naming(target, source):
                place, options = _link_or_copy(source, target, trusted)
                held = _reopen(place, name, about, trusted, **options)
                if release and name in release["experts"]:
                    digest = release["experts"][name]["report_digest"]
                    _carry_report(place_of(source), place_of(target), held, digest)
            experts[name] = about["experts"][name]
            seen = join_seen(seen, seen_of(name, held.facts))
            manifests.append(held.manifest)
        if bundles:
            _refuse_late(out, manifests)
        for source in bundles:
            target = aside / "incoming"
            with _naming(target, source):
                place, options = _link_or_copy(source, target, trusted, max_bytes)
                bundle = open_bundle(
                    place, trusted, trusted.allows_unknown, keep_tensors=True, **options
                )
            m = bundle.manifest
            misfits = find_rollback(seen, m.name, bundle.facts)
            misfits = misfits or find_misfits(anchor, bundle) or find_unstable(anchor, bundle)
            if release:
                report, problems = take_release(source, bundle, release["limits"])
                reports += problems
                if report is not None:
                    release["experts"][m.name] = _describe_report(report, m)
                    _place_report(report, aside / "experts" / f"{m.name}.report")
            if m.name in experts:
                misfits.append(f"{m.name}: two experts have this name")
            else:
                target.rename(aside / "experts" / f"{m.name}.bundle")
                experts[m.name] = _describe_expert(bundle)
                seen = join_seen(seen, seen_of(m.name, bundle.facts))
                manifests.append(m)
            lines += misfits
        _refuse(lines + find_differences(anchor, manifests, about.get("router")))
        refuse_excess(reports)
        default = about.get("router") or EvidenceSettings()
        router = shared_settings(manifests[0].router.settings) if manifests else default
        new = {
            "format": "flexolmo-mixture",
            "format_version": 4,
            "anchor_digest": anchor.digest,
            "router": ROUTER.validate_python(router).model_dump(mode="json"),
            "top_k": about["top_k"],
            "experts": {n: experts[n] for n in sorted(experts)},
            "seen": seen,
            "influence": about["influence"],
            "release": release,
        }
        write_json(aside / ABOUT, new)
        if admission is not None:
            newcomers = sorted(experts.keys() - about["experts"].keys())
            new["influence"] = admission(load_mixture(aside, trusted), newcomers)
            write_json(aside / ABOUT, new)
    return new


def _describe_report(report: Release, manifest: Manifest) -> dict[str, Any]:
    return {"report_digest": report.digest, "values": demanded_values(report, manifest)}


def _place_report(report: Release, target: Path) -> None:
    """Write the very bytes that were checked."""
    target.mkdir(exist_ok=True)
    for name, data in report.files.items():
        (target / name).write_bytes(data)


def _carry_report(source: Path, target: Path, bundle: Bundle, digest: str) -> None:
    """Take a report over from the mixture as it was, if it is the one that was taken in."""
    report = check_release(source, bundle)
    if report.digest != digest:
        raise MergeError(
            f"{source} is another report than {ABOUT} names: found {report.digest}, expected "
            f"{digest}. Put the one back that came with the bundle, or remove the expert."
        )
    _place_report(report, target)


@contextmanager
def _naming(target: Path, source: Path) -> Iterator[None]:
    """Let errors about `target`, made from `source`, name the source."""
    try:
        yield
    except (BundleError, CheckpointError, MergeError) as e:
        raise type(e)(str(e).replace(str(target), str(source))) from None


def _link_or_copy(
    source: Path, target: Path, trusted: TrustedOwners, max_bytes: int | None = None
) -> tuple[Path, dict[str, Any]]:
    """Begin to take a bundle in at `target`; where to open it, and with which options.

    It is then read once: where nobody but us can change its files, `target` has links to them and
    is opened, after a check of the signer; else `source` is, and copied as it is checked.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    names = sorted(MAX_FILE_BYTES)
    if all(_is_ours(path) for path in (source, *(source / name for name in names))):
        check_signer(source, trusted, max_bytes)
        try:
            for name in names:
                os.link(source / name, target / name, follow_symlinks=False)
            return target, {}
        except OSError:  # another file system, or one without hard links
            shutil.rmtree(target)
            target.mkdir()
    return source, {"copy_to": target, "max_bytes": max_bytes}


def _is_ours(path: Path) -> bool:
    """True for a file or directory, and no link, that nobody but us can change."""
    try:
        status = path.lstat()
    except OSError:
        return False
    is_plain = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    return is_plain and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _place(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy the plain files `names`; by hard link where nobody but us can change them.

    No link is followed: what it points to might not be meant for others.
    """
    target.mkdir()
    for name in names:
        try:
            fd = os.open(source / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as e:
            raise MergeError(
                f"{source / name} is a link, or cannot be read ({e.strerror}). Expected a plain "
                "file: put a copy of what it points to in its place."
            ) from None
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise MergeError(f"{source / name} is not a plain file.")
            if _is_ours(source / name) and _is_ours(source):
                try:
                    os.link(source / name, target / name, follow_symlinks=False)
                    continue
                except OSError:  # another file system, or one without hard links
                    pass
            with open(target / name, "xb") as copy:
                shutil.copyfileobj(file, copy, 1 << 20)
