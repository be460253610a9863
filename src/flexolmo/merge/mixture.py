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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexolmo.bundle.bundle import (
    MAX_FILE_BYTES,
    WEIGHTS_FILE,
    Begun,
    Bundle,
    begin_bundle,
    check_signer,
    open_bundle,
)
from flexolmo.bundle.facts import Barred, ExpertFacts
from flexolmo.bundle.manifest import Manifest
from flexolmo.bundle.release import (
    Release,
    check_release,
    demanded_values,
    place_of,
    refuse_excess,
    take_release,
)
from flexolmo.bundle.terms import Terms
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.bundle.verified import Identities, Identity, VerifiedFiles, are_ours_alone, identify
from flexolmo.data.tokenizer import Tokenizer
from flexolmo.errors import BundleError, CheckpointError, MergeError, RevokedError, SignatureError
from flexolmo.files import lock_directory, recover_missing, write_directory_aside, write_json
from flexolmo.merge.checks import (
    ROUTER,
    ExpertFiller,
    SeenWeights,
    find_differences,
    find_misfits,
    find_unstable,
    map_expert,
    shared_settings,
)
from flexolmo.merge.index import ABOUT, read_about
from flexolmo.merge.known import (
    are_same,
    find_again,
    find_anchor,
    find_known,
    open_anchor,
    remember_anchor,
    remember_bundle,
    remember_moved,
)
from flexolmo.merge.placing import link_or_copy, place_files
from flexolmo.merge.rollback import Seen, find_rollback, join_seen, seen_of
from flexolmo.model.assemble import finish_expert, frame_mixture
from flexolmo.model.checkpoint import Anchor
from flexolmo.model.moe import MixtureModel
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.terminal import echo


@dataclass(frozen=True)
class LoadedMixture:
    """A mixture ready to run."""

    model: MixtureModel
    tokenizer: Tokenizer
    about: dict[str, Any]  # mixture.json
    facts: Mapping[str, ExpertFacts]  # by expert
    seen: Seen = field(default_factory=dict)  # for `load_mixture`, when the model is loaded again
    barred: Mapping[str, Barred] = field(default_factory=dict)  # experts that were not loaded
    # Files that the model stays in, as they were when they were verified; None: changed even then.
    mapped: Mapping[Path, Identity | None] = field(default_factory=dict)

    @property
    def expert_names(self) -> list[str]:
        """Owners' experts, alphabetically; `public` is not among them."""
        return self.model.expert_names[1:]

    def refuse_changed_files(self) -> None:
        """Raises MergeError if a file that the model is mapped from has changed since it was
        verified; what was made of the model meanwhile is then worth nothing."""
        changed = [str(p) for p, x in self.mapped.items() if not p.exists() or Identity.of(p) != x]
        if changed:
            raise MergeError(
                f"Changed while the mixture was read: {', '.join(changed)}. Begin again at rest."
            )

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
    verify: bool = False,
) -> dict[str, Any]:
    """Check `bundles` against the anchor and each other, and write the mixture to `out`.

    Args:
        top_k: Experts (public included) active per token; None: all enabled ones.
        max_bytes: A bundle with larger weights is refused before anything of them is read.
        admission: Asked last, of the whole mixture.
        demands: Limits, by measure of `bundle.release.DEMANDS`, that the release report beside
            each bundle must keep; the mixture keeps reports and limits.
        verify: Hash the anchor too if the user's record says that it was verified before
            (`flexolmo.bundle.verified`).

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
        record = VerifiedFiles.of_user(verify)
        change = _Change(Path(out), Path(anchor_dir), sources, trusted, record, max_bytes)
        return _write(change, about, admission)


def add_experts(
    model_dir: Path,
    bundles: Sequence[Path],
    trusted: TrustedOwners | None,
    *,
    max_bytes: int | None = None,
    admission: Admission | None = None,
    demands: Mapping[str, float] | None = None,
    verify: bool = False,
) -> dict[str, Any]:
    """Add `bundles` to the mixture in `model_dir`, with every check of `build_mixture`.

    Those already in it must be trusted and within their terms. A bundle older than one that this
    mixture ever held of its owner and name is refused. A mixture that was built with `admission`
    needs it here. Demands that it keeps hold for `bundles` too, unless `demands` has others. With
    `verify` those already in it are hashed again whatever the user's record
    says.
    """
    trusted = _require(trusted)
    model_dir = Path(model_dir)
    with _hold(model_dir):
        about = read_about(model_dir)
        sources = [Path(b) for b in bundles]
        if admission is None and about["influence"]:
            raise MergeError(
                f"{model_dir} keeps what its experts do to text that is not their owners', which "
                "must be measured again: give the prepared public set (--public)."
            )
        if demands:
            kept = about.get("release") or {"limits": {}, "experts": {}}
            about["release"] = kept | {"limits": kept["limits"] | demands}
        record = VerifiedFiles.of_user(verify)
        change = _Change(model_dir, model_dir / "anchor", sources, trusted, record, max_bytes)
        return _write(change, about, admission)


def remove_experts(
    model_dir: Path, names: Iterable[str], trusted: TrustedOwners | None, *, verify: bool = False
) -> dict[str, Any]:
    """Remove owners' experts, files and all, from the mixture in `model_dir`.

    Signers of those who stay must be trusted; nothing is asked of those who go. Serial and
    digest of what they signed stay in mixture.json, so that nothing older comes back. With `verify`
    those who stay are hashed again whatever the user's record says.
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
        record = VerifiedFiles.of_user(verify)
        return _write(_Change(model_dir, model_dir / "anchor", [], trusted, record), about)


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
        return _write(_Change(Path(out), model_dir / "anchor", bundles, trusted), new)


def load_mixture(
    model_dir: Path,
    trusted: TrustedOwners | None,
    experts: Iterable[str] | None = None,
    seen: Seen | None = None,
    *,
    leaves_out_barred: bool = False,
    is_mapped: bool = False,
    verify: bool = False,
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

    Weights that the user's record says were verified, and that have not changed since, are read but
    not hashed again, unless `verify` asks for it (`flexolmo.bundle.verified`). Of experts that are
    not named no weight is read.

    With `is_mapped` weights stay in their files and take no memory but the page cache: to be
    exported, where speed and the last bit do not matter. Whoever can change the files can stop the
    program, and spoil what it computes until `refuse_changed_files` is asked; files that others
    than the user can change are loaded all the same.
    """
    return _load(
        Path(model_dir),
        _require(trusted),
        experts,
        seen,
        leaves_out_barred,
        VerifiedFiles.of_user(verify),
        is_mapped,
    )


def _load(
    model_dir: Path,
    trusted: TrustedOwners,
    experts: Iterable[str] | None = None,
    seen: Seen | None = None,
    leaves_out_barred: bool = False,
    record: VerifiedFiles | None = None,
    is_mapped: bool = False,
) -> LoadedMixture:
    """`load_mixture`, by the statements in `record` if there is one."""
    about = read_about(model_dir)
    found, verified = find_anchor(model_dir / "anchor", record)
    is_alone = verified is not None or are_ours_alone(model_dir / "anchor", found)
    anchor = open_anchor(model_dir / "anchor", found, verified, is_mapped=is_mapped and is_alone)
    if verified is None and is_alone:
        remember_anchor(model_dir / "anchor", anchor, found, record)
    _refuse_other_anchor(model_dir, anchor, about)
    chosen = set(about["experts"]) if experts is None else set(experts)
    _refuse_unknown(chosen, about)
    today = datetime.datetime.now(datetime.UTC).date()
    barred = _find_barred(model_dir, about, chosen, trusted, today) if leaves_out_barred else {}
    paths = {n: model_dir / "experts" / f"{n}.bundle" for n in sorted(chosen - barred.keys())}
    router = ROUTER.validate_python(about["router"])
    mapped: dict[Path, Identity | None] = {}
    if is_mapped and is_alone:
        mapped = {model_dir / "anchor" / n: x for n, x in found.items()}
    with ExitStack() as stack:
        begun: dict[str, Begun] = {}
        for name, path in paths.items():
            files = about["experts"][name]["files"]
            begun[name] = stack.enter_context(begin_bundle(path, trusted, expected=files))
            _refuse_other_bundle(path, name, about, begun[name].bundle)
        bundles = {name: x.bundle for name, x in begun.items()}
        manifests = [bundle.manifest for bundle in bundles.values()]
        _refuse_late(model_dir, manifests, today)
        lines = [x for n, b in bundles.items() for x in find_rollback(seen or {}, n, b.facts)]
        lines += [line for bundle in bundles.values() for line in find_misfits(anchor, bundle)]
        _refuse(lines + find_differences(anchor, manifests, about["router"]))
        shapes = {m.name: {k: e.shape for k, e in m.tensors.items()} for m in manifests}
        model = frame_mixture(anchor, shapes, router, top_k=about["top_k"])
        for name, path in paths.items():
            known = find_known(path, about["experts"][name]["files"], record)
            stays = is_mapped and (known is not None or begun[name].is_ours_alone())
            weights = begun[name].weights if stays else None
            filler = ExpertFiller(model, name) if weights is None else None
            seen_weights = SeenWeights(anchor, filler)
            bundle = begun[name].read(seen_weights if known is None else filler, known)
            _refuse(find_misfits(anchor, bundle, seen_weights if known is None else None))
            if weights is not None:
                map_expert(model, name, weights)
                mapped[path / WEIGHTS_FILE] = bundle.verified.identity if bundle.verified else None
            finish_expert(model, anchor, name)
            if known is None:
                remember_bundle(path, bundle, record)
    facts = {name: bundle.facts for name, bundle in bundles.items()}
    seen = join_seen(seen or {}, about["seen"])
    return LoadedMixture(model, anchor.tokenizer, about, facts, seen, barred, mapped)


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


@dataclass(frozen=True)
class _Change:
    """A mixture to write at `out`, of an anchor, of what is there, and of more bundles."""

    out: Path
    anchor_dir: Path
    bundles: Sequence[Path]
    trusted: TrustedOwners
    record: VerifiedFiles | None = None
    max_bytes: int | None = None


def _write(
    change: _Change, about: Mapping[str, Any], admission: Admission | None = None
) -> dict[str, Any]:
    """Write the mixture of `about` with `bundles` added; each file is read once, where it ends up,
    or not at all if it was verified before.

    Weights pass through in pieces, but for `admission`, which is given the whole mixture.
    """
    out, trusted, record = change.out, change.trusted, change.record
    with _remembering(change) as verified, write_directory_aside(out, ABOUT) as aside:
        opened = verified.bundles
        with _naming(aside / "anchor", change.anchor_dir):
            anchor = _place_anchor(change, aside / "anchor", verified)
        if "anchor_digest" in about:
            _refuse_other_anchor(out, anchor, about)
        (aside / "experts").mkdir()
        experts: dict[str, Any] = {}
        lines: list[str] = []
        seen = about["seen"]
        release = copy.deepcopy(about.get("release"))
        reports: list[str] = []
        for name, entry in about["experts"].items():
            source = out / "experts" / f"{name}.bundle"
            target = aside / "experts" / f"{name}.bundle"
            with _naming(target, source):
                known = find_known(source, entry["files"], record)
                place, options = link_or_copy(source, target)
                known = find_again(known, target)
                opened[name] = _reopen(place, name, about, trusted, known=known, **options)
                if release and name in release["experts"]:
                    digest = release["experts"][name]["report_digest"]
                    _carry_report(place_of(source), place_of(target), opened[name], digest)
            experts[name] = entry
            seen = join_seen(seen, seen_of(name, opened[name].facts))
        if change.bundles:
            _refuse_late(out, [b.manifest for b in opened.values()])
        manifests = [bundle.manifest for bundle in opened.values()]
        for source in change.bundles:
            target = aside / "incoming"
            watch = SeenWeights(anchor)
            with _naming(target, source):
                check_signer(source, trusted, change.max_bytes)  # before its weights are touched
                place, options = link_or_copy(source, target, change.max_bytes)
                bundle = open_bundle(place, trusted, trusted.allows_unknown, watch=watch, **options)
            m = bundle.manifest
            misfits = find_rollback(seen, m.name, bundle.facts) or find_misfits(
                anchor, bundle, watch
            )
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
                if not misfits:
                    opened[m.name] = bundle
            manifests.append(m)
            lines += misfits
        _refuse(lines + find_differences(anchor, manifests, about.get("router")))
        if change.bundles:
            _refuse(find_unstable(anchor, list(opened.values())))
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
            new["influence"] = admission(_load(aside, trusted), newcomers)
            write_json(aside / ABOUT, new)
    return new


@dataclass
class _Verified:
    """Bundles and the anchor that passed every check while a mixture was written."""

    bundles: dict[str, Bundle] = field(default_factory=dict)
    anchor: Anchor | None = None  # if nobody but us can change its files
    anchor_files: Identities = field(default_factory=dict)


@contextmanager
def _remembering(change: _Change) -> Iterator[_Verified]:
    """Yield what is to be filled in, and keep it in the record however the change ends: where the
    old mixture stays, links to its files have come and gone."""
    verified = _Verified()
    try:
        yield verified
    finally:
        if change.record is not None:
            for name, bundle in verified.bundles.items():
                path = change.out / "experts" / f"{name}.bundle"
                remember_moved(path, bundle, change.record)
            if verified.anchor is not None:
                for directory in {change.out / "anchor", change.anchor_dir}:
                    files = verified.anchor_files
                    remember_anchor(directory, verified.anchor, files, change.record)


def _place_anchor(change: _Change, target: Path, verified: _Verified) -> Anchor:
    """Put the anchor at `target`, and open it there, mapped."""
    found, before = find_anchor(change.anchor_dir, change.record)
    place_files(change.anchor_dir, target, found)
    placed = identify(target, found)
    is_linked = are_same(placed, found)
    before = before if is_linked else None
    is_alone = before is not None or are_ours_alone(target, placed)
    anchor = open_anchor(target, placed, before, is_mapped=is_alone)
    if is_alone:
        verified.anchor = anchor
        verified.anchor_files = placed
    return anchor


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
