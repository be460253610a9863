"""The signed certificate that a mixture with an expert off is one that never held it.

A JSON file of three parts: `certificate`, what was found and what that means in plain words;
`signature` over its canonical bytes, in the form of a bundle's; and `signer`, the public key.
The words follow from the findings, so that nobody can sign others.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field, JsonValue, ValidationError

from flexolmo.bundle.manifest import Name
from flexolmo.bundle.signing import encode_public, read_signature, sign_files
from flexolmo.bundle.strict import Claim, parse_json
from flexolmo.bundle.tensors import Digest, Positive
from flexolmo.errors import ProofError, SignatureError
from flexolmo.files import canonical_json, digest_bytes, write_json
from flexolmo.merge.compare import WAYS, Compared, Kind
from flexolmo.merge.lineage import AnchorFacts, BundleFacts, Lineage
from flexolmo.numbers import format_percent

MAX_CERTIFICATE_BYTES = 64 << 20
# Ways to read that certificates of each format version compare; they differ in nothing else.
WAYS_OF = {1: [way for way in WAYS if way != "states, as served"], 2: list(WAYS)}
_SUBJECT = "opt-out certificate"
_FILE = "certificate.json"


class Plan(Claim):
    """The choice of what is compared, from which subsets and inputs follow."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    most_subsets: Positive | None  # None: all
    num_random: Annotated[int, Field(ge=1, le=100_000)]
    texts_digest: Digest | None  # of the file of given texts


class MixtureFacts(Claim):
    """Everything that the mixture without the expert is made of."""

    anchor: AnchorFacts
    experts: dict[Name, Lineage]
    router: dict[str, JsonValue]
    top_k: Positive | None
    has_limits_of_influence: bool


class Findings(Claim):
    """Everything that a certificate states, but for its words."""

    expert: Name
    bundle: BundleFacts
    mixture: MixtureFacts
    plan: Plan
    compared: Compared
    software: dict[str, str]
    machine: dict[str, str]
    created: str


class Words(Claim):
    """The findings for people, a sentence or a few at a time."""

    proven: list[str]
    declared: list[str]
    not_covered: list[str]


class Certificate(Claim):
    """The part of the file that is signed."""

    format: Literal["flexolmo-optout-certificate"]
    format_version: Literal[1, 2]
    findings: Findings
    words: Words


# --- words --------------------------------------------------------------------------------------


def write_words(found: Findings) -> Words:
    """The words that follow from findings."""
    return Words(proven=_proven(found), declared=_declared(found), not_covered=_not_covered(found))


def _proven(found: Findings) -> list[str]:
    name, compared = found.expert, found.compared
    anchor, others = found.mixture.anchor, found.mixture.experts
    kinds: dict[Kind, str] = {
        "random": "of random tokens",
        "claimed": f"of the tokens that {name} claims most",
        "given": "of given texts",
    }
    inputs = [
        f"{compared.inputs[kind].sequences:,} sequences {of}"
        for kind, of in kinds.items()
        if kind in compared.inputs
    ]
    lines = [
        f"The expert {name} is the one that {found.bundle.owner} signed with the key "
        f"{found.bundle.key_id}; the digest of its manifest is "
        f"{found.bundle.files['manifest.json']}.",
        "A mixture was built anew from the public anchor and the signed bundles of the other "
        f"experts ({', '.join(sorted(others)) or 'none'}). No file of {name} was opened for it. "
        "The digest of every file that it was built from is in this certificate, with the router's "
        "settings.",
        f"With {name} switched off, the whole mixture computed what the one built without it did: "
        f"after each of {compared.positions:,} positions, all {anchor.vocab_size:,} numbers that "
        "say what comes next had the same bits. So they had once more in batches beside texts for "
        f"which {name} was on.",
        f"Compared were {' and '.join(inputs)} ({compared.tokens:,} tokens), under "
        f"{len(compared.subsets):,} of {1 << len(others):,} possible choices of the other experts, "
        f"read in {len(compared.ways)} ways ({'; '.join(compared.ways)}), many tokens at once and "
        f"one by one from a cache. Numbers were {compared.dtype}.",
        f"In memory both mixtures held the same numbers, bit for bit, but for those of {name}: the "
        f"public anchor's ({anchor.numbers:,}) and the other experts' "
        f"({sum(x.numbers for x in others.values()):,}). The latter, each owner's part of the "
        "router included, were what their owners had signed: nothing was tuned after merging.",
        f"The public anchor was not made from this bundle of {name}, which names its digest.",
    ]
    if compared.changed_positions is not None:
        share = format_percent(compared.changed_positions / compared.positions)
        lines.append(
            f"As a control {name} was switched on: the numbers changed after {share} of the "
            "positions."
        )
    return lines


def _declared(found: Findings) -> list[str]:
    return [
        f"{x.owner}, by signature: the expert {name} was trained {x.training}, from the public "
        f"anchor and {x.owner}'s own text{' and public text' if x.has_read_public_text else ''}. "
        "The training was not repeated."
        for name, x in sorted(found.mixture.experts.items())
    ]


def _not_covered(found: Findings) -> list[str]:
    name, owner, mixture = found.expert, found.bundle.owner, found.mixture
    lines = [
        "Inputs, and choices of the other experts, that were not compared. For them there is no "
        "measurement, only that the numbers in memory are the same and that the program is written "
        "to leave out an expert that is off.",
        "Other machines and other versions of the software, until the comparison is repeated there "
        "(flexolmo mix verify-optout).",
        f"The operation of a server: that {name} is indeed switched off for a request.",
        f"Answers that were given while {name} was on, and models that were trained on them.",
        f"Copies of the bundle of {name} elsewhere, and the one in this mixture's directory until "
        "it is removed (flexolmo mix remove).",
        f"The public anchor's text: whatever of {owner}'s was in public text, the anchor may know.",
        "The other owners' text, and the truth of what they declare: an expert whose owner used "
        f"{owner}'s text, or answers of {name}, may have learnt from them.",
        f"Choices that may have been made with {name} in view: of the experts in the mixture, of "
        f"the router's settings, and of top_k ({mixture.top_k or 'none'}).",
        "Routers that were tuned on several owners' experts together. A mixture that was imported "
        "with such a router is given no certificate.",
        f"Side channels, such as the time that an answer takes while {name} is in memory.",
    ]
    if mixture.has_limits_of_influence:
        lines.append(
            "Admission: this mixture keeps limits of influence, and other experts may have been "
            f"admitted or refused for what they did to text that {name} wrote."
        )
    return lines


# --- file ---------------------------------------------------------------------------------------


def sign_certificate(
    findings: Findings, key: ec.EllipticCurvePrivateKey, path: Path
) -> Certificate:
    """Write the certificate of `findings` to `path`, signed with `key`."""
    certificate = Certificate(
        format="flexolmo-optout-certificate",
        format_version=2,
        findings=findings,
        words=write_words(findings),
    )
    value = certificate.model_dump(mode="json")
    signature = sign_files(_SUBJECT, {_FILE: digest_bytes(canonical_json(value))}, key)
    whole = {
        "certificate": value,
        "signature": json.loads(signature),
        "signer": encode_public(key).decode(),
    }
    write_json(path, whole)
    return certificate


def read_certificate(path: Path) -> tuple[Certificate, str]:
    """The certificate in the file `path` and the id of the key that signed it.

    Whether that key is trusted is the caller's to check.

    Raises:
        ProofError: no certificate, one that was altered, or words that are not those that follow
            from its findings.
    """
    with open(path, "rb") as f:
        data = f.read(MAX_CERTIFICATE_BYTES + 1)
    advice = "Ask whoever gave it to you to send it again."
    try:
        if len(data) > MAX_CERTIFICATE_BYTES:
            raise ValueError(f"it has more than {MAX_CERTIFICATE_BYTES} bytes")
        whole = parse_json(data)
        value, signature, signer = (whole[k] for k in ("certificate", "signature", "signer"))
        proof = json.dumps(signature, separators=(",", ":")).encode()
        signed = read_signature(proof, signer.encode())
        found = {_FILE: digest_bytes(canonical_json(value))}
        if len(whole) > 3 or signed.subject != _SUBJECT or signed.digests != found:
            raise ValueError("its content is not what was signed")
        certificate = Certificate.model_validate_json(canonical_json(value))
    except ValidationError as e:
        lines = [f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors()[:20]]
        raise ProofError(
            "\n  ".join([f"{path} is no certificate of format version 1 or 2. {advice}", *lines])
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, SignatureError) as e:
        raise ProofError(f"{path} is no certificate, or was altered: {e}. {advice}") from None
    if certificate.words != write_words(certificate.findings):
        raise ProofError(f"{path} says in words what does not follow from its findings. {advice}")
    return certificate, signed.key_id
