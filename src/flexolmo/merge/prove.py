"""Proof that a mixture with an expert off is, bit for bit, one that never held it.

The mixture is built anew from the other owners' bundles, the two are compared in memory and by what
they compute, and what was found is signed. Whoever has the mixture, with the expert or after its
removal, can check the certificate and repeat the comparison. Source: ours.
"""

import datetime
import os
import platform
import secrets
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from flexolmo.bundle.signing import key_id, read_private_key
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.errors import BundleError, CheckpointError, ConfigError, MergeError, ProofError
from flexolmo.files import digest_bytes
from flexolmo.merge.certificate import (
    WAYS_OF,
    Certificate,
    Findings,
    MixtureFacts,
    Plan,
    read_certificate,
    sign_certificate,
)
from flexolmo.merge.compare import (
    Compared,
    Kind,
    Sequences,
    claimed_sequences,
    compare_mixtures,
    draw_subsets,
    random_sequences,
    text_sequences,
)
from flexolmo.merge.index import read_about
from flexolmo.merge.lineage import (
    BundleFacts,
    anchor_facts,
    bundle_facts,
    find_unequal,
    trace_experts,
)
from flexolmo.merge.mixture import LoadedMixture, load_mixture, rebuild_mixture
from flexolmo.runtime import software_versions

MAX_TEXTS_BYTES = 16 << 20


@dataclass(frozen=True)
class Verified:
    """A certificate that holds for a mixture."""

    certificate: Certificate
    signer: str | None  # name in the trust store
    key_id: str
    is_removed: bool  # whether the mixture no longer holds the expert
    compared: Compared  # on this machine
    not_repeated: list[str]  # kinds of sequences
    has_same_logits: bool  # whether those of the others have the digests that it states


def prove_optout(
    model_dir: Path,
    name: str,
    out: Path,
    trusted: TrustedOwners | None,
    private_key: Path,
    *,
    most_subsets: int | None = 64,
    num_random: int = 8,
    seed: int | None = None,
    texts: Path | None = None,
    passphrase: str | None = None,
) -> Certificate:
    """Prove that the mixture in `model_dir` without expert `name` is one that never held it, and
    sign what was found into the file `out`.

    Holds two mixtures in memory, and computes on a processor.

    Args:
        most_subsets: Subsets of the other experts under which they are compared; None: all.
        num_random: Sequences of random tokens, and as many of those that the expert claims most.
        seed: Seed of subsets and sequences. Default: drawn, so that no bundle can be made for them.
        texts: File of texts to compare too, one a line, UTF-8.
        passphrase: See `read_private_key`.

    Raises:
        ProofError: a trace of the expert, or other experts whose bundles do not rule one out.
        BundleError, CheckpointError, MergeError: a mixture that does not hold up by itself.
    """
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists and is not overwritten. Remove it or choose another.")
    key = read_private_key(private_key, passphrase)
    given = _read_texts(texts)
    pair = _open_pair(Path(model_dir), name, trusted)
    if pair.bundle is None:
        raise ProofError(
            f"{model_dir} holds no expert {name}: it holds "
            f"{', '.join(pair.mixture.expert_names) or 'none'}. Give the mixture as it is with it."
        )
    plan = Plan(
        seed=secrets.randbelow(2**31) if seed is None else seed,
        most_subsets=most_subsets,
        num_random=num_random,
        texts_digest=None if given is None else given.digest,
    )
    findings = Findings(
        expert=name,
        bundle=pair.bundle,
        mixture=pair.facts,
        plan=plan,
        compared=_compare(pair, name, plan, given),
        software=software_versions(),
        machine={
            "platform": platform.platform(),
            "vector instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": str(torch.get_num_threads()),
        },
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    return sign_certificate(findings, key, Path(out))


def verify_optout(
    path: Path,
    model_dir: Path,
    trusted: TrustedOwners | None,
    *,
    signer: Path | None = None,
    texts: Path | None = None,
) -> Verified:
    """Check the certificate in the file `path` against the mixture in `model_dir`, which may hold
    the expert or not any more, and repeat the comparison on this machine.

    Args:
        signer: Public key (PEM file) that must have signed it. Default: any of `trusted`.
        texts: The file of texts that were compared; without it they are not compared again.

    Raises:
        ProofError: it does not hold; the message says why.
    """
    certificate, key = read_certificate(Path(path))
    said = certificate.findings
    name = _check_signer(path, key, trusted, signer)
    given = _read_texts(texts)
    if given is not None and given.digest != said.plan.texts_digest:
        raise ProofError(
            f"{texts} has digest {given.digest}, {path} speaks of texts with digest "
            f"{said.plan.texts_digest}. Give that file, or none."
        )
    other = f"{model_dir} is not the mixture that {path} speaks of"
    try:
        pair = _open_pair(Path(model_dir), said.expert, trusted)
    except (BundleError, CheckpointError, MergeError) as e:
        if trusted is None:  # nothing was asked of the mixture
            raise
        raise ProofError(f"{other}. {e}") from None
    lines = [*_differences(pair.facts, said.mixture)]
    if pair.bundle is not None:
        lines += _differences(pair.bundle, said.bundle, said.expert)
    _refuse(f"{other}:", lines)
    ways = WAYS_OF[certificate.format_version]
    compared = _compare(pair, said.expert, said.plan, given, ways)
    unknown = {"claimed"} if pair.bundle is None else set()
    unknown |= {"given"} if given is None else set()
    repeated = {kind: x for kind, x in said.compared.inputs.items() if kind not in unknown}
    expected = said.compared.model_copy(update={"inputs": repeated})
    _refuse(
        f"{path} does not state the comparisons that follow from its plan:",
        _differences(_without_results(compared), _without_results(expected)),
    )
    return Verified(
        certificate,
        name,
        key,
        is_removed=pair.bundle is None,
        compared=compared,
        not_repeated=sorted(said.compared.inputs.keys() - repeated.keys()),
        has_same_logits=compared.inputs == repeated,
    )


# --- steps --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Texts:
    digest: str  # of their file
    lines: list[str]


@dataclass(frozen=True)
class _Pair:
    """A mixture, and one that was built anew without the expert."""

    mixture: LoadedMixture
    never: LoadedMixture
    facts: MixtureFacts
    bundle: BundleFacts | None  # of the expert; None if the mixture does not hold it


def _open_pair(model_dir: Path, name: str, trusted: TrustedOwners | None) -> _Pair:
    """Build the mixture anew without expert `name`, then load it as it is.

    Raises ProofError unless both are the same in memory but for the expert.
    """
    about = read_about(model_dir)
    others = about["experts"].keys() - {name}
    beside = model_dir.resolve().parent  # where links will do instead of copies
    place = beside if os.access(beside, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".flexolmo-", dir=place) as around:
        out = Path(around) / "mixture"
        rebuild_mixture(model_dir, others, out, trusted)
        never = load_mixture(out, trusted)
        facts = MixtureFacts(
            anchor=anchor_facts(out / "anchor", never),
            experts=trace_experts(out, never),
            router=never.about["router"],
            top_k=never.about["top_k"],
            has_limits_of_influence=about["influence"] is not None,
        )
    mixture = load_mixture(model_dir, trusted)
    entries = {n: mixture.about["experts"].get(n) for n in others}
    if mixture.about != about or never.about["experts"] != entries:
        raise ProofError(f"{model_dir} was changed meanwhile. Begin again once it is at rest.")
    lines = find_unequal(mixture, never, beside=[name])
    _refuse(f"Beside {name}, memory does not hold what it does without it:", lines)
    bundle = bundle_facts(model_dir, about, name) if name in about["experts"] else None
    return _Pair(mixture, never, facts, bundle)


def _compare(
    pair: _Pair, name: str, plan: Plan, given: _Texts | None, ways: Collection[str] | None = None
) -> Compared:
    """Everything of `plan` that can be compared here, read in `ways`; default: in all."""
    model = pair.mixture.model
    inputs: dict[Kind, Sequences] = {"random": random_sequences(model, plan.num_random, plan.seed)}
    if pair.bundle is not None:
        claimed = claimed_sequences(model, name, plan.num_random, plan.seed)
        inputs |= {"claimed": claimed} if claimed else {}
    if given is not None:
        inputs["given"] = text_sequences(model, pair.mixture.tokenizer, given.lines)
    subsets = draw_subsets(sorted(pair.facts.experts), plan.most_subsets, plan.seed)
    return compare_mixtures(pair.mixture, pair.never, name, subsets, inputs, ways)


def _read_texts(path: Path | None) -> _Texts | None:
    """The texts in a file, one a line; ConfigError if there are none, or too many."""
    if path is None:
        return None
    with open(path, "rb") as f:
        data = f.read(MAX_TEXTS_BYTES + 1)
    try:
        lines = [line for line in data.decode().splitlines() if line.strip()]
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not a file of texts in UTF-8: {e}.") from None
    if not lines or len(data) > MAX_TEXTS_BYTES:
        raise ConfigError(
            f"{path}: found {len(lines)} texts in {len(data)} bytes or more; expected at least "
            f"one, a line each, in at most {MAX_TEXTS_BYTES} bytes."
        )
    return _Texts(digest_bytes(data), lines)


def _check_signer(
    path: Path, key: str, trusted: TrustedOwners | None, signer: Path | None
) -> str | None:
    """The trusted name of the key that signed the certificate; ProofError if it is not let in."""
    name = trusted.owner_of(key) if trusted else None
    if signer is not None:
        expected = key_id(Path(signer).read_bytes())
        if key != expected:
            raise ProofError(f"{path} is signed by the key {key}, {signer} is the key {expected}.")
    elif name is None and not (trusted and trusted.allows_unknown):
        raise ProofError(
            f"{path} is signed by the unknown key {key}. Say whose signature you trust: --signer "
            "KEY.pub, or --trust with a directory that holds it."
        )
    return name


def _without_results(compared: Compared) -> dict[str, Any]:
    """The part of it that follows from plan and mixture."""
    return compared.model_dump(
        exclude={"changed_positions": True, "inputs": {"__all__": {"logits"}}}
    )


def _differences(found: Any, said: Any, where: str = "") -> Iterator[str]:
    """A line for each value in which JSON values, or claims, differ."""
    if isinstance(found, BaseModel):
        yield from _differences(found.model_dump(), said.model_dump(), where)
    elif isinstance(found, dict) and isinstance(said, dict):
        for key in sorted(found.keys() | said.keys()):
            inner = f"{where}, {key}" if where else key
            yield from _differences(found.get(key, "none"), said.get(key, "none"), inner)
    elif found != said:
        yield f"{where}: found {str(found)[:200]}, the certificate says {str(said)[:200]}"


def _refuse(opening: str, lines: Iterable[str]) -> None:
    """ProofError if there is a line."""
    found = list(lines)
    if found:
        more = [f"and {len(found) - 20} more"] if len(found) > 20 else []
        raise ProofError("\n  ".join([opening, *found[:20], *more]))
