"""The attack by extraction, on made mixtures and on a model that knows its text by heart."""

import json
import stat

import numpy as np
import pytest

from flexolmo.audit import extraction
from flexolmo.audit.extraction import ExtractionSettings, audit_extraction
from flexolmo.audit.subjects import MODEL, Subject, Subjects
from flexolmo.audit.texts import MEMBERS, read_beginnings
from flexolmo.errors import ConfigError, DataError
from flexolmo.report.extraction_page import write_extraction_page
from made_attacks import Parrot

BRIEF = ExtractionSettings(prefix_tokens=8, continuation_tokens=12, samples=2, max_documents=5)
NEAR = BRIEF.model_copy(update={"near_tokens": 2, "beams": 3, "top_k": None, "top_p": 1.0})


@pytest.fixture
def data(pico_sets):
    return pico_sets["maths"]


@pytest.fixture
def parrot(data, pico_anchor):
    """A model that has learnt every second training document; chance writes none of them."""
    rows = read_beginnings(data, MEMBERS, least=20, length=20, most=1000, seed=0)
    learnt = [b.ids.tolist() for b in rows[::2]]
    reader = Parrot(pico_anchor.tokenizer, learnt, 30.0)
    share = np.mean([b.ids.tolist() in learnt for b in rows])
    return Subjects([Subject(MODEL, reader, None)], {"digest": "sha256:0"}, None, False), share


def test_a_model_that_knows_its_text_writes_it(parrot, data, tmp_path):
    """Sampled and computed, the share is that of the documents that were learnt."""
    subjects, share = parrot
    settings = BRIEF.model_copy(update={"max_documents": 1000})
    found, stays = audit_extraction(subjects, data, settings, tmp_path / "parts", say=list)
    figures = found["subjects"][MODEL]
    assert figures["extracted"]["share"] == pytest.approx(share)
    assert figures["exact"]["discoverable"]["0.9"][0]["share"] == pytest.approx(share)
    assert figures["exact"]["expected"][0] == pytest.approx(share)
    assert [x["samples"] for x in figures["by_samples"]] == [1, 2]
    first = stays["documents"][0]
    assert first["best"] == first["continuation"] and max(first["similarities"]) == 1.0
    page = write_extraction_page(found, tmp_path / "out").read_text()
    assert "Extracted" in page and first["continuation"][:30] not in page


def test_a_prefix_that_all_share_is_not_compared(data, pico_anchor, tmp_path):
    """Whoever writes noise after a long prefix has extracted nothing."""
    noise = Subject(MODEL, Parrot(pico_anchor.tokenizer, [], 0.0), None)
    subjects = Subjects([noise], {"digest": "sha256:0"}, None, False)
    settings = BRIEF.model_copy(update={"prefix_tokens": 60, "continuation_tokens": 4})
    found, _ = audit_extraction(subjects, data, settings, tmp_path / "parts", say=list)
    assert found["subjects"][MODEL]["extracted"]["share"] == 0
    assert found["subjects"][MODEL]["median_similarity"] < 0.6


def test_without_the_expert_all_is_the_anchors(attacked, data, tmp_path):
    found, stays = audit_extraction(attacked(), data, BRIEF, tmp_path / "parts", say=list)
    assert json.loads(json.dumps(found)) == found
    assert found["off_equals_anchor"] is True
    assert found["subjects"]["off"] == found["subjects"]["anchor"]
    assert found["documents"] == 5 and stays["subject"] == "alone"
    alone, _ = audit_extraction(
        attacked("code"), data, BRIEF.model_copy(update={"samples": 0}), tmp_path / "p", say=list
    )
    assert alone["off_equals_anchor"] is None and "extracted" not in alone["subjects"]["on"]
    page = write_extraction_page(alone, tmp_path / "out").read_text()
    assert "Sampled, with" not in page and "The paper took 10,000" in page


def test_near_verbatim_text_is_at_least_as_likely_as_the_text(attacked, data, tmp_path):
    found, _ = audit_extraction(attacked("code"), data, NEAR, tmp_path / "parts", say=list)
    for figures in found["subjects"].values():
        for near, exact in zip(*(figures[k]["expected"] for k in ("near", "exact")), strict=True):
            assert near >= exact * (1 - 1e-4)
    assert found["subjects"]["on"]["near"]["expected"][-1] > 0
    page = write_extraction_page(found, tmp_path / "out").read_text()
    assert "But for 2 tokens" in page
    with pytest.raises(ValueError, match="near_tokens needs samples"):
        ExtractionSettings(near_tokens=2, samples=0)


def test_any_of_the_first_samples_extracts_a_document():
    rows = [[0.2, 0.95], [0.1, 0.6], [0.92, 0.3], [1.0, 1.0]]
    found = extraction._measure([{"similarities": r} for r in rows], BRIEF)
    assert [x["share"] for x in found["by_samples"]] == [0.5, 0.75]
    by_threshold = {x["threshold"]: x["share"] for x in found["by_threshold"]}
    assert (by_threshold[0.5], by_threshold[0.95], by_threshold[1.0]) == (1.0, 0.5, 0.25)
    assert found["extracted"]["share"] == 0.75
    assert found["median_similarity"] == pytest.approx((0.92 + 0.95) / 2)


def test_it_goes_on_where_it_was(parrot, data, tmp_path, monkeypatch):
    subjects, _ = parrot
    monkeypatch.setattr(extraction, "DOCUMENTS_AT_ONCE", 2)
    calls = []
    sample = extraction._sample

    def counted(subject, settings, some):
        calls.append(len(some))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(subject, settings, some)

    monkeypatch.setattr(extraction, "_sample", counted)
    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        audit_extraction(subjects, data, BRIEF, parts, say=list)
    found, stays = audit_extraction(subjects, data, BRIEF, parts, say=list)
    assert calls == [2, 2, 2, 1]  # the first part was kept, the second was lost
    assert all(stat.S_IMODE(f.stat().st_mode) == 0o600 for f in parts.iterdir())
    monkeypatch.setattr(extraction, "_sample", sample)
    whole = audit_extraction(subjects, data, BRIEF, tmp_path / "others", say=list)
    assert (whole[0]["subjects"], whole[1]) == (found["subjects"], stays)
    other = BRIEF.model_copy(update={"seed": 1})
    monkeypatch.setattr(extraction, "_sample", counted)
    calls[:] = [0, 0]
    audit_extraction(subjects, data, other, parts, say=list)
    assert calls == [0, 0, 2, 2, 1]  # of other settings nothing is taken


def test_samples_of_a_document_do_not_depend_on_those_beside_it(attacked, data, tmp_path):
    subjects = attacked()
    documents = extraction._choose(subjects, data, BRIEF)
    together = extraction._sample(subjects.models[0], BRIEF, documents)
    assert extraction._sample(subjects.models[0], BRIEF, documents[3:4]) == together[3:4]
    assert len({x["best"] for x in together}) > 1


def test_a_plan_says_how_long_it_takes_and_stops(parrot, data, tmp_path):
    said = []
    made = audit_extraction(
        parrot[0], data, BRIEF, tmp_path / "parts", say=said.append, plan_only=True
    )
    assert made is None and len(said) == 1
    assert "tokens a second" in said[0] and "10,000 documents would take" in said[0]


def test_too_long_a_text_is_refused(attacked, data, tmp_path):
    room = attacked().models[0].reader.max_seq_len
    settings = BRIEF.model_copy(update={"continuation_tokens": room - 8})
    with pytest.raises(ConfigError, match=f"holds {room} positions"):
        audit_extraction(attacked(), data, settings, tmp_path, say=list)
    settings = BRIEF.model_copy(update={"continuation_tokens": room - 9})
    with pytest.raises(DataError, match="no training document"):
        audit_extraction(attacked(), data, settings, tmp_path, say=list)
