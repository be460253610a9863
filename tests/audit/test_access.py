"""Measures of access on made mixtures: what a switch does, and what it cannot hide."""

import json

import numpy as np
import pytest

from flexolmo.audit import access
from flexolmo.audit.access import audit_access
from flexolmo.errors import ConfigError
from flexolmo.evaluation.likelihood import read_windows
from flexolmo.report.access_page import write_access_page


@pytest.fixture(autouse=True)
def _few_documents(monkeypatch):
    monkeypatch.setattr(access, "LEAST_DOCUMENTS", 3)
    monkeypatch.setattr(access, "LEAST_TOKENS", 5)


@pytest.fixture
def mixture(house):
    return house.mixture(["code", "maths"])


@pytest.fixture
def sets(pico_sets):
    return {"maths": pico_sets["maths"]}


def test_a_report_has_every_measure_with_its_interval(mixture, sets, tmp_path):
    found = audit_access(mixture, sets)
    assert json.loads(json.dumps(found)) == found
    assert list(found["experts"]) == ["maths"]  # of code there is no set
    measures = found["experts"]["maths"]
    for figure in (*measures["distinguishability"].values(), *measures["membership"].values()):
        value = figure["auc"] if "auc" in figure else figure["share"]
        low, high = figure["interval"]
        assert 0 <= low <= value <= high <= 1
    page = write_access_page(found, tmp_path / "out").read_text()
    assert "maths" in page and "Utility gap" in page


def test_a_switch_that_does_nothing_is_told_by_nobody(mixture, sets, monkeypatch):
    """Where on and off answer alike, an observer is at chance and nothing is lost."""

    def read_with_all(model, windows, **options):
        return read_windows(model, windows, **options | {"enabled": ["code", "maths"]})

    monkeypatch.setattr(access, "read_windows", read_with_all)
    measures = audit_access(mixture, sets)["experts"]["maths"]
    told = measures["distinguishability"]
    assert told["plain"]["auc"] == told["calibrated"]["auc"] == told["trained"]["auc"] == 0.5
    assert told["recognised"]["share"] == 0.0
    assert measures["membership"]["on"] == measures["membership"]["off"]
    assert measures["utility_gap"]["gap"] == 0.0


def test_a_source_that_helps_is_told_and_missed(mixture, sets, monkeypatch):
    """An expert whose documents all become a nat a token likelier is told without fail."""

    def read_helped(model, windows, **options):
        reading = read_windows(model, windows, **options)
        if "maths" in options["enabled"]:
            for log_probs in reading.log_probs:
                log_probs += 1.0
            object.__setattr__(reading, "bits", reading.bits - reading.tokens / np.log(2))
        return reading

    before = audit_access(mixture, sets)["experts"]["maths"]
    monkeypatch.setattr(access, "read_windows", read_helped)
    after = audit_access(mixture, sets)["experts"]["maths"]
    assert after["distinguishability"]["calibrated"]["auc"] == 1.0
    assert after["distinguishability"]["recognised"]["share"] == 1.0
    assert after["utility_gap"]["off"] == before["utility_gap"]["off"]
    low, high = after["utility_gap"]["interval"]
    assert 0 < low <= after["utility_gap"]["gap"] <= high
    assert after["membership"]["off"] == before["membership"]["off"]


def test_alone_with_the_anchor_nothing_is_left_of_a_source_that_is_off(house, sets):
    measures = audit_access(house.mixture(["maths"]), sets)["experts"]["maths"]
    assert measures["membership"]["off"] == {"auc": 0.5, "interval": [0.5, 0.5]}


def test_the_gap_is_that_of_reading_the_same_documents(mixture, sets):
    found = audit_access(mixture, sets)
    length = found["run"]["config"]["seq_len"]
    windows = access._windows(sets["maths"], access.KINDS["unseen"], length, 500, 0)
    on = read_windows(mixture.model, windows, enabled=["code", "maths"]).bits_per_byte
    off = read_windows(mixture.model, windows, enabled=["code"]).bits_per_byte
    gap = found["experts"]["maths"]["utility_gap"]
    assert (gap["on"], gap["off"]) == (on, off)
    assert gap["gap"] == pytest.approx(1 - on / off)


def test_documents_are_read_once_each_from_their_beginning(sets):
    data = sets["maths"]
    windows = access._windows(data, ("train",), 10_000, 10_000, 0)
    split = data.splits["train"]
    firsts = np.flatnonzero(np.diff(split.sources, prepend=-1))
    long = [i for i in firsts if len(split.document(i)) >= access.LEAST_TOKENS]
    assert [list(ids[1:]) for ids, _ in windows] == [list(split.document(i)) for i in long]
    assert [size for _, size in windows] == [split.bytes[i] for i in long]
    some = access._windows(data, ("train",), 21, 3, 0)
    assert max(len(ids) for ids, _ in some) == 22
    assert len(some) == 3


def test_few_documents_are_said_and_not_measured(mixture, sets, tmp_path):
    found = audit_access(mixture, sets, max_documents=access.LEAST_DOCUMENTS - 1)
    assert found["experts"]["maths"]["too_few"] == access.LEAST_DOCUMENTS
    assert "fewer than 3" in write_access_page(found, tmp_path / "out").read_text()


def test_sets_of_nobody_are_refused_by_name(mixture, pico_sets):
    with pytest.raises(ConfigError, match="experts are code, maths"):
        audit_access(mixture, {"stories": pico_sets["maths"]})
