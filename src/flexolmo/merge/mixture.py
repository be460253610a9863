"""A mixture on disk: the anchor, the bundles it was built from, and what was checked.

    model/mixture.json            digests, router, owners, terms
    model/anchor/                 the anchor, whole
    model/experts/NAME.bundle/    each owner's bundle, whole and still signed

Nothing is trained and nothing is rewritten, so adding and removing an owner is adding and removing
a directory, and any owner can check what the coordinator publishes. Source: §3.3.3, layout ours.
"""

import datetime
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from flexolmo.bundle.bundle import MAX_FILE_BYTES, WEIGHTS_FILE, Bundle, open_bundle
from flexolmo.bundle.manifest import Manifest, Name
from flexolmo.bundle.signing import TrustedOwners
from flexolmo.bundle.tensors import compare_tensors
from flexolmo.data.tokenizer import Tokenizer
from flexolmo.errors import MergeError, SignatureError
from flexolmo.files import digest_file, read_json, write_directory_aside, write_json
from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.checkpoint import Anchor, load_anchor
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import RouterSettings
from flexolmo.model.shape import BIGRAM_KEYS, architecture_of, expert_shapes, shape_of_tensors
from flexolmo.model.statistics import are_bigram_keys

ABOUT = "mixture.json"
_ROUTER: TypeAdapter[RouterSettings] = TypeAdapter(RouterSettings)
_NAME: TypeAdapter[str] = TypeAdapter(Name)
_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class LoadedMixture:
    """A mixture ready to run."""

    model: MixtureModel
    tokenizer: Tokenizer
    about: dict[str, Any]  # mixture.json

    @property
    def expert_names(self) -> list[str]:
        """Owners' experts, alphabetically; `public` is not among them."""
        return self.model.expert_names[1:]


def build_mixture(
    anchor_dir: Path,
    bundles: Sequence[Path],
    out: Path,
    trusted: TrustedOwners | None,
    *,
    top_k: int | None = None,
) -> dict[str, Any]:
    """Check `bundles` against the anchor and each other, and write the mixture to `out`.

    `top_k` experts (public included) are active per token; None: all enabled ones.

    Raises:
        BundleError, SignatureError: a bundle that does not hold up by itself.
        MergeError: bundles that do not fit the anchor or each other; lists every difference.
    """
    if top_k is not None and top_k < 1:
        raise MergeError(f"top_k is {top_k}: at least one expert must be active per token.")
    trusted = _require(trusted)
    anchor = load_anchor(anchor_dir)
    opened = [
        (Path(p), open_bundle(Path(p), trusted, trusted.allows_unknown, keep_tensors=True))
        for p in bundles
    ]
    _refuse_misfits(anchor, [b for _, b in opened])
    sources = {b.manifest.name: p for p, b in opened}
    experts = {b.manifest.name: _describe_expert(b) for _, b in opened}
    router = opened[0][1].manifest.router.settings if opened else {"kind": "evidence"}
    return _write(
        out,
        Path(anchor_dir),
        anchor,
        sources,
        experts,
        _ROUTER.validate_python(router).model_dump(mode="json"),
        top_k,
        trusted,
    )


def add_experts(
    model_dir: Path, bundles: Sequence[Path], trusted: TrustedOwners | None
) -> dict[str, Any]:
    """Add `bundles` to the mixture in `model_dir`, with every check of `build_mixture`."""
    about, trusted = read_about(model_dir), _require(trusted)
    anchor = _load_own_anchor(model_dir, about)
    held = {n: Path(model_dir) / "experts" / f"{n}.bundle" for n in about["experts"]}
    manifests = [_reopen(path, n, about, trusted).manifest for n, path in held.items()]
    opened = [
        (Path(p), open_bundle(Path(p), trusted, trusted.allows_unknown, keep_tensors=True))
        for p in bundles
    ]
    _refuse_misfits(anchor, [b for _, b in opened], manifests)
    sources = held | {b.manifest.name: p for p, b in opened}
    experts = about["experts"] | {b.manifest.name: _describe_expert(b) for _, b in opened}
    router = about["router"] if held or not opened else opened[0][1].manifest.router.settings
    return _write(
        Path(model_dir),
        Path(model_dir) / "anchor",
        anchor,
        sources,
        experts,
        _ROUTER.validate_python(router).model_dump(mode="json"),
        about["top_k"],
        trusted,
    )


def remove_experts(
    model_dir: Path, names: Iterable[str], trusted: TrustedOwners | None
) -> dict[str, Any]:
    """Remove owners' experts, files and all, from the mixture in `model_dir`.

    Signers of those who stay must be trusted; nothing is asked of those who go.
    """
    about, trusted = read_about(model_dir), _require(trusted)
    gone = set(names)
    _refuse_unknown(gone, about)
    kept = {n: e for n, e in about["experts"].items() if n not in gone}
    sources = {n: Path(model_dir) / "experts" / f"{n}.bundle" for n in kept}
    return _write(
        Path(model_dir),
        Path(model_dir) / "anchor",
        _load_own_anchor(model_dir, about),
        sources,
        kept,
        about["router"],
        about["top_k"],
        trusted,
    )


def load_mixture(
    model_dir: Path, trusted: TrustedOwners | None, experts: Iterable[str] | None = None
) -> LoadedMixture:
    """The mixture in `model_dir`, with all its experts or only those named.

    Their signers must be among `trusted`; ANY_SIGNER lets everybody in.

    Every bundle's signature and digests are checked again, and that it is the expert, for the
    anchor and router, that mixture.json says; an expert whose terms have expired since is refused
    by name. mixture.json itself is not signed: keep it as safe as the program.
    """
    about, trusted = read_about(model_dir), _require(trusted)
    anchor = _load_own_anchor(model_dir, about)
    chosen = set(about["experts"]) if experts is None else set(experts)
    _refuse_unknown(chosen, about)
    tensors, late = {}, []
    today = datetime.datetime.now(datetime.UTC).date()
    for name in sorted(chosen):
        path = Path(model_dir) / "experts" / f"{name}.bundle"
        bundle = _reopen(path, name, about, trusted, keep_tensors=True)
        manifest = bundle.manifest
        if manifest.terms.expires is not None and manifest.terms.expires < today:
            late.append(f"{name}: terms expired on {manifest.terms.expires}")
        tensors[name] = tensors_of(bundle)
    if late:
        raise MergeError(
            f"{model_dir} may not be used as it is:\n  "
            + "\n  ".join(late)
            + "\nRemove these experts (flexolmo mix remove) or ask their owners."
        )
    model = assemble_mixture(
        anchor, tensors, _ROUTER.validate_python(about["router"]), top_k=about["top_k"]
    )
    return LoadedMixture(model, anchor.tokenizer, about)


def read_about(model_dir: Path) -> dict[str, Any]:
    """What `mixture.json` says: anchor digest, router, top_k, and each expert's claims."""
    if not (Path(model_dir) / ABOUT).is_file():
        raise MergeError(
            f"{model_dir} is not a mixture: it has no {ABOUT}. Make one with flexolmo mix build."
        )
    about = read_json(Path(model_dir) / ABOUT, MergeError)
    if not isinstance(about, dict):
        raise MergeError(f"{model_dir}/{ABOUT} does not describe a mixture.")
    if about.get("format") != "flexolmo-mixture" or about.get("format_version") != 1:
        raise MergeError(
            f"{model_dir}/{ABOUT} is format {about.get('format')!r} version "
            f"{about.get('format_version')!r}; expected 'flexolmo-mixture' version 1."
        )
    missing = sorted({"anchor_digest", "router", "top_k", "experts"} - about.keys())
    if missing:
        raise MergeError(f"{model_dir}/{ABOUT} lacks {', '.join(missing)}.")
    try:
        _ROUTER.validate_python(about["router"])
        for name, entry in about["experts"].items():
            _NAME.validate_python(name)
            if set(entry["files"]) != set(MAX_FILE_BYTES):
                raise ValueError(f"{name}: found files {sorted(entry['files'])}")
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise MergeError(f"{model_dir}/{ABOUT} does not describe a mixture: {e}") from None
    return about


def _load_own_anchor(model_dir: Path, about: Mapping[str, Any]) -> Anchor:
    anchor = load_anchor(Path(model_dir) / "anchor")
    if anchor.digest != about["anchor_digest"]:
        raise MergeError(
            f"{model_dir}/anchor has digest {anchor.digest}, the mixture was built "
            f"on {about['anchor_digest']}. Build it again."
        )
    return anchor


def _describe_expert(bundle: Bundle) -> dict[str, Any]:
    m = bundle.manifest
    return {
        "owner": m.owner,
        "signer": bundle.signer,
        "key_id": bundle.key_id,
        "licence": m.licence,
        "terms": m.terms.model_dump(mode="json"),
        "architecture": m.architecture.model_dump(mode="json"),
        "tokens_seen": m.tokens_seen,
        "weights_bytes": bundle.weights_bytes,
        "data_card_digest": m.data_card_digest,
        "files": {name: bundle.digests[name] for name in sorted(MAX_FILE_BYTES)},
    }


def _refuse_misfits(
    anchor: Anchor, bundles: Sequence[Bundle], held: Sequence[Manifest] = ()
) -> None:
    manifests = [b.manifest for b in bundles]
    dtype = _DTYPES[anchor.model.embed_tokens.weight.dtype]
    lines: list[str] = []
    seen = {m.name for m in held}
    for b, m in zip(bundles, manifests, strict=True):
        if m.name in seen:
            lines.append(f"{m.name}: two experts have this name")
        seen.add(m.name)
        if m.anchor_digest != anchor.digest:
            lines.append(
                f"{m.name}: trained on anchor {m.anchor_digest}, this anchor is {anchor.digest}"
            )
            continue
        try:
            router = _ROUTER.validate_python(m.router.settings)
        except ValueError as e:
            lines.append(f"{m.name}: router settings are not understood: {e}")
            continue
        shape = shape_of_tensors({k: e.shape for k, e in m.tensors.items()}, anchor.config)
        claimed, found = m.architecture.model_dump(), architecture_of(anchor.config, shape)
        lines += [
            f"{m.name}: architecture claims {key} {claimed[key]}, found {found[key]}"
            for key in found
            if claimed[key] != found[key]
        ]
        expected = expert_shapes(anchor.config, shape, router)
        lines += [f"{m.name}: {line}" for line in compare_tensors(m.tensors, expected)]
        lines += [
            f"{m.name}: dtype of {key} is {entry.dtype}, expected {' or '.join(wanted)}"
            for key, entry in m.tensors.items()
            if entry.dtype not in (wanted := _dtypes_of(key, dtype))
        ]
        keys = m.tensors.get(BIGRAM_KEYS)
        if (
            keys is not None
            and keys.dtype == "I64"
            and not are_bigram_keys(
                np.frombuffer(b.tensors[BIGRAM_KEYS], "<i8"), anchor.config.vocab_size
            )
        ):
            lines.append(f"{m.name}: {BIGRAM_KEYS} are not ascending pairs of token ids")
    first = [*held, *manifests][0] if (held or manifests) else None
    for m in manifests:
        if first is not None and m.router != first.router:
            lines.append(
                f"{m.name}: router is {m.router.settings}, that of {first.name} is "
                f"{first.router.settings}"
            )
    if lines:
        raise MergeError(
            "These experts cannot be merged:\n  "
            + "\n  ".join(lines)
            + "\nAsk their owners to train again on this anchor with one router."
        )


def _dtypes_of(key: str, weights: str) -> list[str]:
    if key == BIGRAM_KEYS:
        return ["I64"]
    if "router." in key:
        return ["F32"]
    return list(dict.fromkeys([weights, "BF16"] if ".lora_" in key else [weights]))


def _require(trusted: TrustedOwners | None) -> TrustedOwners:
    if trusted is None:
        raise SignatureError(
            "Nobody was said to be trusted. Give --trust DIR, or set FLEXOLMO_TRUST to it: a "
            "directory with each trusted owner's public key as OWNER.pub. To look at a mixture "
            "whoever signed it, give --trust-any-signer. From Python: TrustedOwners.load(DIR), or "
            "ANY_SIGNER."
        )
    return trusted


def _refuse_unknown(names: set[str], about: Mapping[str, Any]) -> None:
    unknown = sorted(names - set(about["experts"]))
    if unknown:
        raise MergeError(
            f"No expert {', '.join(unknown)} here: the mixture holds "
            f"{', '.join(sorted(about['experts'])) or 'none'}."
        )


def tensors_of(bundle: Bundle) -> dict[str, Tensor]:
    """The tensors of a bundle opened with `keep_tensors`; they share its memory."""
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    return {
        name: torch.frombuffer(bundle.tensors[name], dtype=dtypes[entry.dtype]).reshape(entry.shape)
        for name, entry in bundle.manifest.tensors.items()
    }


def _reopen(
    path: Path,
    name: str,
    about: Mapping[str, Any],
    trusted: TrustedOwners,
    keep_tensors: bool = False,
) -> Bundle:
    """A bundle inside a mixture, byte for byte as once verified."""
    entry, wrong = about["experts"][name], []
    for file in sorted(MAX_FILE_BYTES.keys() - {WEIGHTS_FILE}):  # opening reads those, once
        try:
            if digest_file(path / file) != entry["files"][file]:
                wrong.append(f"{file}: changed since the mixture was built")
        except OSError as e:
            wrong.append(f"{file}: {e.strerror}")
    if not wrong:
        # the caller judges the terms
        found = open_bundle(
            path,
            trusted,
            trusted.allows_unknown,
            today=datetime.date.min,
            keep_tensors=keep_tensors,
        )
        manifest = found.manifest
        for claim, value, expected in (
            ("name", manifest.name, name),
            ("key", found.key_id, entry["key_id"]),
            ("anchor", manifest.anchor_digest, about["anchor_digest"]),
            (
                "router",
                _ROUTER.validate_python(manifest.router.settings),
                _ROUTER.validate_python(about["router"]),
            ),
        ):
            if value != expected:
                wrong.append(f"{claim}: found {value}, {ABOUT} says {expected}")
        if found.digests != entry["files"]:
            wrong.append(f"{WEIGHTS_FILE}: changed since the mixture was built")
        if not wrong:
            return found
    raise MergeError(
        f"{path} is not the bundle that was verified:\n  "
        + "\n  ".join(wrong)
        + "\nBuild the mixture again from the owner's bundle."
    )


def _write(
    out: Path,
    anchor_dir: Path,
    anchor: Anchor,
    sources: Mapping[str, Path],
    experts: Mapping[str, Any],
    router: Any,
    top_k: int | None,
    trusted: TrustedOwners,
) -> dict[str, Any]:
    about = {
        "format": "flexolmo-mixture",
        "format_version": 1,
        "anchor_digest": anchor.digest,
        "router": router,
        "top_k": top_k,
        "experts": {n: experts[n] for n in sorted(experts)},
    }
    with write_directory_aside(Path(out), ABOUT) as aside:
        _place(anchor_dir, aside / "anchor")
        (aside / "experts").mkdir()
        for name, source in sources.items():
            target = aside / "experts" / f"{name}.bundle"
            _place(source, target)
            _reopen(target, name, about, trusted)
        write_json(aside / ABOUT, about)
    return about


def _place(source: Path, target: Path) -> None:
    """Copy a directory of plain files; by hard link where the file system allows."""
    target.mkdir()
    for file in sorted(p for p in Path(source).iterdir() if p.is_file()):
        try:
            os.link(file.resolve(), target / file.name)
        except OSError:
            shutil.copyfile(file, target / file.name)
