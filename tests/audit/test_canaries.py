"""Canaries: planted by fair coins, and found by whoever has learnt them."""

import json
import math
import stat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.audit.canaries import audit_canaries, exposures, measure_canaries, plant_canaries
from flexolmo.audit.subjects import MODEL, Subject, Subjects, open_subjects
from flexolmo.data.batches import open_set
from flexolmo.errors import DataError
from flexolmo.report.canaries_page import write_canaries_page
from made_attacks import Parrot, build_attacked


@pytest.fixture
def planted(pico_set_dirs, tmp_path):
    """The set with canaries, and the key to them."""
    plant_canaries(pico_set_dirs["maths"], tmp_path / "maths", tmp_path / "key", count=60, tokens=6)
    return open_set(tmp_path / "maths"), tmp_path / "key"


def test_a_coin_decides_of_each_and_the_key_says_how(planted):
    data, key = planted
    record = json.loads(key.read_text())
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    split = data.splits["train"]
    inside = {tuple(split.document(i)) for i in range(split.num_documents)}
    found = [tuple(ids) in inside for ids in record["ids"]]
    assert found == record["is_in"]
    assert 10 <= sum(found) <= 50  # odds of a false alarm below 1 in 10 million
    assert len(set(map(tuple, record["ids"]))) == 60


def test_coins_are_drawn_anew(pico_set_dirs, tmp_path):
    keys = []
    for name in ("a", "b"):
        plant_canaries(pico_set_dirs["maths"], tmp_path / name, tmp_path / f"{name}.key", count=60)
        keys.append(json.loads((tmp_path / f"{name}.key").read_text()))
    assert keys[0]["ids"] != keys[1]["ids"] and keys[0]["is_in"] != keys[1]["is_in"]
    with pytest.raises(DataError, match=r"a\.key exists"):
        plant_canaries(pico_set_dirs["maths"], tmp_path / "c", tmp_path / "a.key")
    with pytest.raises(DataError, match="at least 20"):
        plant_canaries(pico_set_dirs["maths"], tmp_path / "c", tmp_path / "c.key", count=19)


def test_a_model_that_has_learnt_them_gives_them_away(planted, pico_anchor, tmp_path):
    data, key = planted
    split = data.splits["train"]
    texts = [[data.eos_id, *split.document(i)] for i in range(split.num_documents)]
    reader = Parrot(pico_anchor.tokenizer, texts, 9.0)
    subjects = Subjects([Subject(MODEL, reader, None)], {"digest": "sha256:0"}, None, False)
    found = audit_canaries(subjects, data, key)
    figures = found["subjects"][MODEL]
    assert figures["exposure"]["mean"] == pytest.approx(figures["exposure"]["most"])
    assert figures["first"]["share"] == figures["membership"]["auc"] == 1.0
    assert figures["epsilon"]["epsilon"] > 1.5
    assert "Exposure" in write_canaries_page(found, tmp_path / "out").read_text()


def test_a_mixture_that_has_not_gives_nothing_away(planted, house, pico_sets, tmp_path):
    data, key = planted
    directory = build_attacked(house, data, tmp_path / "model")
    found = audit_canaries(open_subjects(directory, data, house.trusted), data, key)
    assert json.loads(json.dumps(found)) == found
    assert found["planted_in"] == pico_sets["maths"].commitment
    assert found["off_equals_anchor"] is True
    assert found["subjects"]["on"]["epsilon"]["epsilon"] < 1.0  # false with odds of 5 % at 0
    assert found["subjects"]["off"]["exposure"]["largest"] == 0.0
    with pytest.raises(DataError, match="of another set"):
        other = json.loads(key.read_text()) | {"recipe": "sha256:0"}
        (tmp_path / "other").write_text(json.dumps(other))
        audit_canaries(open_subjects(directory, data, house.trusted), data, tmp_path / "other")
    with pytest.raises(DataError, match="no key to canaries"):
        (tmp_path / "none").write_text("[]")
        audit_canaries(open_subjects(directory, data, house.trusted), data, tmp_path / "none")


@given(st.data())
def test_exposure_is_counted_by_rank(data):
    numbers = st.integers(0, 6)
    planted = data.draw(st.lists(numbers, min_size=1, max_size=8))
    others = data.draw(st.lists(numbers, min_size=1, max_size=8))
    found = exposures(np.array(planted, float), np.array(others, float))
    for x, exposure in zip(planted, found, strict=True):
        rank = 1 + sum(y >= x for y in others)
        assert exposure == pytest.approx(math.log2((len(others) + 1) / rank))


def test_exposure_by_chance_is_that_of_shuffled_canaries():
    """The mean of 20,000 is off by 0.05 with odds below 1 in 10 million."""
    rng = np.random.default_rng(0)
    is_in = np.zeros(40, dtype=bool)
    is_in[:20] = True
    means = []
    for _ in range(1000):
        x = measure_like(rng.permutation(40).astype(float), is_in)
        means.append(x.mean())
    scores = rng.permutation(40).astype(float)
    by_chance = measure_canaries(scores, is_in, 0.0, 0)["exposure"]["by_chance"]
    assert np.mean(means) == pytest.approx(by_chance, abs=0.05)


def measure_like(scores, is_in):
    return exposures(scores[is_in], scores[~is_in])
