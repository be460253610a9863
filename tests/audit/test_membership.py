"""The attack on membership, on made mixtures and on models that know their text by heart."""

import json
import math

import numpy as np
import pytest
import torch

from flexolmo.audit import membership
from flexolmo.audit.membership import _measure, audit_membership
from flexolmo.audit.reading import read_logits
from flexolmo.audit.subjects import MODEL, Subject, Subjects
from flexolmo.audit.texts import MEMBERS, OTHERS, read_beginnings
from flexolmo.errors import DataError
from flexolmo.inference.reader import OwnReader
from flexolmo.report.membership_page import write_membership_page
from made_attacks import Parrot


@pytest.fixture
def data(pico_sets):
    return pico_sets["maths"]


def parrot_of(data, tokenizer, splits, sureness=9.0):
    rows = read_beginnings(data, splits, least=1, length=256, most=1000, seed=0)
    return Parrot(tokenizer, [b.ids.tolist() for b in rows], sureness)


def test_without_the_expert_nothing_is_found_that_the_anchor_does_not_say(attacked, data):
    found, stays = audit_membership(attacked(), data)
    assert json.loads(json.dumps(found)) == found
    assert found["off_equals_anchor"] is True
    off, anchor = found["subjects"]["off"], found["subjects"]["anchor"]
    assert {attack: off[attack] for attack in anchor} == anchor
    assert off["informia"]["auc"] == off["ratio"]["auc"] == 0.5
    assert found["subjects"]["on"]["loss"] != anchor["loss"]
    counts = found["documents"]
    assert 0.9 * counts["in_training_split"] < counts["members"] <= counts["in_training_split"]
    assert stays["notice"] and len(stays["worst"]) == membership.WORST_DOCUMENTS
    first = found["subjects"][stays["subject"]]
    assert first[stays["attack"]]["auc"] == max(x["auc"] for x in first.values())


def test_with_others_on_there_is_no_such_control(attacked, data, tmp_path):
    found, _ = audit_membership(attacked("code"), data)
    assert found["off_equals_anchor"] is None
    assert found["subjects"]["off"]["loss"] != found["subjects"]["anchor"]["loss"]
    assert "Control" not in write_membership_page(found, tmp_path / "out").read_text()


def test_a_model_that_knows_its_text_is_found_out(data, pico_anchor, tmp_path):
    """The control of the attack itself; what it is surest of is what was learnt."""
    reader = parrot_of(data, pico_anchor.tokenizer, MEMBERS)
    reference = OwnReader(pico_anchor.model, pico_anchor.tokenizer)
    subject = Subject(MODEL, reader, reference)
    subjects = Subjects([subject], {"digest": "sha256:0"}, None, False)
    found, stays = audit_membership(subjects, data)
    for figures in found["subjects"][MODEL].values():
        assert figures["auc"] > 0.99
        assert figures["caught"]["0.01"]["share"] > 0.9
    worst = stays["worst"][0]
    text = pico_anchor.tokenizer.decode(data.splits["train"].document(worst["document"]).tolist())
    assert text.startswith(worst["begins"]) and worst["above_others"] == 1.0
    scores = [x["score"] for x in stays["worst"]]
    assert scores == sorted(scores, reverse=True)
    page = write_membership_page(found, tmp_path / "out")
    assert "InfoRMIA" in page.read_text() and page.with_suffix(".md").is_file()
    assert worst["begins"][:40] not in page.read_text()


def test_a_model_that_knows_the_others_finds_no_member(data, pico_anchor):
    reader = parrot_of(data, pico_anchor.tokenizer, OTHERS)
    subjects = Subjects([Subject(MODEL, reader, None)], {"digest": "sha256:0"}, None, False)
    found, _ = audit_membership(subjects, data)
    assert set(found["subjects"][MODEL]) == {"loss", "zlib", "min_k"}
    assert found["subjects"][MODEL]["loss"]["auc"] < 0.01


def test_a_document_is_read_with_its_own_predictions(attacked, data):
    """Batched and padded, as alone without padding."""
    reader = attacked().models[1].reader  # the mixture, as it is
    rows = [b.ids for b in read_beginnings(data, MEMBERS, least=5, length=90, most=9, seed=0)]
    rows[0] = rows[0][:7]
    found = {place: said for place, said in read_logits([reader, reader], rows)}
    assert sorted(found) == list(range(len(rows)))
    for place, ids in enumerate(rows):
        alone = reader.model(torch.from_numpy(ids[None, :-1])).float()[0]
        for said in found[place]:
            assert said.shape == alone.shape
            np.testing.assert_allclose(said, alone, atol=1e-4)


def test_a_batch_holds_no_more_logits_than_its_bound(attacked, data, monkeypatch):
    """Also where its longest text is many times its shortest."""
    reader = attacked().models[1].reader
    most = 4 * 90 * reader.tokenizer.vocab_size
    monkeypatch.setattr("flexolmo.audit.reading.NUMBERS_AT_ONCE", most)
    said = []
    read = OwnReader.read
    monkeypatch.setattr(OwnReader, "read", lambda *a, **k: said.append(read(*a, **k)) or said[-1])
    (long,) = read_beginnings(data, MEMBERS, least=90, length=90, most=1, seed=0)
    rows = [long.ids[:2]] * 20 + [long.ids] * 6 + [long.ids[:40]] * 6
    assert len(list(read_logits([reader], rows))) == len(rows)
    assert max(x.numel() for x in said) <= most
    assert len(said) < len(rows) / 2


def test_scores_that_are_no_numbers_are_refused():
    scores = np.array([1.0, 2.0, 3.0, math.nan])
    for members, others in ((scores, scores[:3]), (scores[:3], scores)):
        with pytest.raises(DataError, match="score is NaN or infinite"):
            _measure(members, others, seed=0)


def test_a_set_without_other_documents_is_refused(attacked, data, monkeypatch):
    monkeypatch.setattr(membership, "LEAST_TOKENS", 100_000)
    with pytest.raises(DataError, match="no training document read by training"):
        audit_membership(attacked(), data, max_tokens=200_000 // 2)
