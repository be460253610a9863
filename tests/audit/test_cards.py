"""The two cards of a release report, against the schema of one and what the other asks for."""

import json
from pathlib import Path

import cyclonedx.schema
import jsonschema_rs
import pytest

from flexolmo.audit.cards import bill_of_materials, data_card
from flexolmo.audit.release import make_findings
from flexolmo.audit.results import read_results
from flexolmo.bundle.bundle import open_bundle
from made_reports import attack

SCHEMAS = Path(cyclonedx.schema.__file__).parent / "_res"


@pytest.fixture(scope="module")
def made(house, pico_sets, tmp_path_factory):
    """Manifest, findings and time of a report with results."""
    data = pico_sets["maths"]
    found = attack(house, data, tmp_path_factory.mktemp("cards"), licence="MIT OR LicenseRef-Own")
    bundle = open_bundle(found.bundle, None, allow_unknown_signer=True)
    results = [read_results(path) for path in found.results.values()]
    report = make_findings(bundle, data, results).report
    return bundle.manifest, report.findings, report.created


@pytest.fixture(scope="module")
def validator():
    """The published schema of CycloneDX 1.6, as its Python library carries it."""
    resources = {
        f"http://cyclonedx.org/schema/{name}.SNAPSHOT.schema.json": json.loads(
            (SCHEMAS / f"{name}.SNAPSHOT.schema.json").read_text()
        )
        for name in ("spdx", "jsf-0.82")
    }
    schema = json.loads((SCHEMAS / "bom-1.6.SNAPSHOT.schema.json").read_text())
    registry = jsonschema_rs.Registry(list(resources.items()))
    return jsonschema_rs.Draft7Validator(schema, registry=registry, validate_formats=True)


def test_the_bill_is_valid_and_has_a_model_card(made, validator):
    bill = bill_of_materials(*made)
    assert [e.message for e in validator.iter_errors(bill)] == []
    card = bill["metadata"]["component"]["modelCard"]
    metrics = card["quantitativeAnalysis"]["performanceMetrics"]
    assert len(metrics) == sum(len(x["rows"]) for x in made[1]["attacks"])
    assert all(float(m["value"]) >= 0 for m in metrics)
    refs = {bill["metadata"]["component"]["bom-ref"], *(c["bom-ref"] for c in bill["components"])}
    assert {d["ref"] for d in bill["dependencies"]} == refs


def test_a_card_with_something_unknown_would_not_be_valid(made, validator):
    bill = bill_of_materials(*made)
    bill["metadata"]["component"]["modelCard"]["invented"] = 1
    assert not validator.is_valid(bill)


def test_the_data_card_has_what_croissant_asks_for_and_nothing_of_the_text(made):
    card = data_card(*made)
    required = {"@context", "@type", "conformsTo", "name", "description", "url", "license"}
    required |= {"creator", "datePublished", "version"}
    assert required <= card.keys()
    assert card["conformsTo"] == "http://mlcommons.org/croissant/1.1"
    assert card["@type"] == "sc:Dataset" and card["distribution"] == [] == card["recordSet"]
    assert card["license"] == ["CC0-1.0"] and made[0].data_card_digest in card["url"]


def test_the_size_of_a_set_is_told_if_enough_documents_make_it_up(made):
    manifest, findings, created = made
    counts = {"documents": 430, "bytes": 8_600_000, "tokens": 2_900_000}
    changed = findings | {"text": findings["text"] | {"counts": counts}}
    told = data_card(manifest, changed, created)["description"]
    assert "about 430 documents and 8,600,000 bytes" in told


def test_what_fewer_documents_hold_is_told_as_such(made, validator):
    manifest, findings, created = made
    for documents, said in ((None, "no kind that patterns found"), (40, "IBAN, by a pattern,")):
        personal = {"IBAN": {"documents": documents, "matches": documents}}
        changed = findings | {"text": findings["text"] | {"personal": personal}}
        bill = bill_of_materials(manifest, changed, created)
        assert [e.message for e in validator.iter_errors(bill)] == []
        (line,) = bill["components"][1]["data"][0]["sensitiveData"]
        assert said in line and "in at least 20 documents" in line
        card = data_card(manifest, changed, created)
        assert line in card["rai:personalSensitiveInformation"]
