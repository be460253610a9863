"""Two cards of a release report for other programs: a bill of materials and a data card.

The bill is CycloneDX 1.6 with its model card, the data card Croissant 1.1. Both are made from what
the report says, hold no text, and no digest of a file of the set, of which a guess could be tried.
"""

import uuid
from collections.abc import Mapping
from typing import Any

from flexolmo.bundle.manifest import Manifest

_NAMESPACE = uuid.UUID("6f2b8d8e-6a53-5c1e-9d6b-1a1f0c3b7e42")  # ours, of bills
_TERMS = """
arrayShape citeAs column containedIn equivalentProperty extract field fileProperty fileObject
fileSet format includes isArray isLiveDataset jsonPath key md5 parentField path recordSet references
regex repeated replace samplingRate separator source subField transform
""".split()  # noqa: SIM905
# The context of Croissant 1.1, as its specification has it.
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "description": {"@container": "@language"},
    "name": {"@container": "@language"},
    **{term: f"cr:{term}" for term in _TERMS},
}


def bill_of_materials(
    manifest: Manifest, findings: Mapping[str, Any], created: str
) -> dict[str, Any]:
    """The bundle, its anchor and its set as CycloneDX 1.6; the expert with a model card, whose
    metrics are the attacks' headlines."""
    m = manifest
    model_ref = f"expert/{m.name}"
    anchor_ref = "anchor"
    data_ref = f"set/{m.name}"
    digest = findings["bundle_digest"]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, digest)}",
        "version": 1,
        "metadata": {
            "timestamp": created,
            "tools": {
                "components": [
                    {"type": "library", "name": name, "version": version}
                    for name, version in sorted(m.software.items())
                ]
            },
            "component": {
                "type": "machine-learning-model",
                "bom-ref": model_ref,
                "name": m.name,
                "version": str(m.serial),
                "supplier": {"name": m.owner},
                "description": "Expert that is trained beside a frozen public model.",
                "licenses": [{"expression": m.licence}],
                "hashes": [_hash(m.weights_digest)],
                "modelCard": _model_card(m, findings, data_ref),
                "properties": [
                    {"name": "flexolmo:bundle_digest", "value": digest},
                    {"name": "flexolmo:terms", "value": m.terms.summary()},
                ],
            },
        },
        "components": [
            {
                "type": "machine-learning-model",
                "bom-ref": anchor_ref,
                "name": "anchor",
                "description": "Public model that the expert is used with, named by its digest.",
                "hashes": [_hash(m.anchor_digest)],
            },
            {
                "type": "data",
                "bom-ref": data_ref,
                "name": m.name,
                "description": "The owner's text, which stays with the owner.",
                "data": [
                    {
                        "type": "dataset",
                        "name": m.name,
                        "governance": {"owners": [{"organization": {"name": m.owner}}]},
                        "sensitiveData": _sensitive(findings),
                    }
                ],
                "properties": [{"name": "flexolmo:commitment", "value": m.data_card_digest}],
            },
        ],
        "dependencies": [
            {"ref": model_ref, "dependsOn": [anchor_ref, data_ref]},
            {"ref": anchor_ref},
            {"ref": data_ref},
        ],
    }


def _hash(digest: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest.removeprefix("sha256:")}


def _sensitive(findings: Mapping[str, Any]) -> list[str]:
    """A line for each kind of personal data that enough documents hold for it to be told."""
    found = findings["text"]["personal"]
    least = f"at least {findings['least_documents']} documents"
    kinds = [kind for kind, x in found.items() if x["documents"] is not None]
    told = [f"{kind}, by a pattern, in {least}" for kind in kinds]
    return told or [f"no kind that patterns found in {least}; what fewer hold is not told"]


def _model_card(m: Manifest, findings: Mapping[str, Any], data_ref: str) -> dict[str, Any]:
    metrics = []
    for attack in findings["attacks"]:
        for row in attack["rows"]:
            metric = {
                "type": f"{attack['audit']}: {row['measure']}",
                "value": f"{row['value']:.4g}",
                "slice": row["model"],
            }
            if row["low"] is not None:
                metric["confidenceInterval"] = {
                    "lowerBound": f"{row['low']:.4g}",
                    "upperBound": f"{row['high']:.4g}",
                }
            metrics.append(metric)
    a = m.architecture
    return {
        "modelParameters": {
            "approach": {"type": "self-supervised"},
            "task": "text generation",
            "architectureFamily": "transformer, mixture of experts",
            "modelArchitecture": f"FlexOlmo expert: {a.num_layers} layers, width {a.d_model}, FFN "
            f"of width {a.d_ff}",
            "datasets": [{"ref": data_ref}],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": metrics},
        "considerations": {
            "useCases": [f"Permitted: {name}" for name in m.terms.permitted],
            "technicalLimitations": [f"Prohibited: {name}" for name in m.terms.prohibited]
            + list(findings["outside"]),
            "ethicalConsiderations": [
                {"name": attack["question"], "mitigationStrategy": attack["verdict"]}
                for attack in findings["attacks"]
            ],
        },
    }


def data_card(manifest: Manifest, findings: Mapping[str, Any], created: str) -> dict[str, Any]:
    """Croissant 1.1 card of a set that is not given out: without files, and with no record."""
    m = manifest
    data = findings["data"]
    counts = findings["text"]["counts"]
    unit = "documents" if data["unit_field"] is None else f"units ({data['unit_field']})"
    size = f"fewer than {findings['least_documents']} {unit}"
    if counts["documents"] is not None:
        size = f"about {counts['documents']:,} {unit} and {counts['bytes']:,} bytes"
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": m.name,
        "description": (
            f"Text of {m.owner} on which the expert {m.name} was trained: {size}. The text stays "
            "with its owner; this card describes it and holds none of it."
        ),
        "url": f"urn:flexolmo:set:{m.data_card_digest}",
        "version": f"{m.serial}.0.0",
        "license": list(data["licences"]) or [m.licence],
        "creator": {"@type": "sc:Organization", "name": m.owner},
        "dateCreated": m.created[:10],
        "datePublished": created[:10],
        "isLiveDataset": False,
        "citeAs": f"{m.owner}: {m.name}, set {m.data_card_digest}",
        "conditionsOfAccess": "Not given out.",
        "rai:personalSensitiveInformation": f"Personal data: {'; '.join(_sensitive(findings))}.",
        "distribution": [],
        "recordSet": [],
    }
