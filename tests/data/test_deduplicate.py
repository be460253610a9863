import random

import numpy as np
import pytest

from flexolmo.data.deduplicate import (
    Seen,
    fingerprint,
    hash_words,
    load_fingerprints,
    save_fingerprints,
)
from flexolmo.errors import DataError
from made_sets import made_text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("500", "-500"),
        ("x + y", "x - y"),
        ("for x in y:\n    a()\nb()", "for x in y:\n    a()\n    b()"),
        ("Total: 1.234", "Total: 1,234"),
        ("Polish", "polish"),
        ("+++", "---"),
    ],
)
def test_exact_is_exact_and_texts_of_the_same_words_share_a_hash(one, other):
    seen = Seen(near=None)
    seen.add(fingerprint(one))
    assert seen.find(fingerprint(one)) == 0
    assert seen.find(fingerprint(other)) is None
    assert (hash_words(one) == hash_words(other)) is (one != "+++")


@pytest.mark.parametrize("seed", range(5))
def test_a_few_changed_words_are_a_near_duplicate_and_other_text_is_not(seed):
    words = made_text(seed, 400).split()
    seen = Seen()
    seen.add(fingerprint(made_text(seed + 500, 400)))
    seen.add(fingerprint(" ".join(words)))
    rng = random.Random(seed)
    for place in rng.sample(range(400), 5):
        words[place] = "changed"
    changed = fingerprint(" ".join(words))
    assert seen.find_exact(changed) is None
    assert seen.find_near(changed) == seen.find(changed) == 1
    assert seen.find(fingerprint(made_text(seed + 1000, 400))) is None


def test_the_threshold_says_how_near_is_near():
    words = made_text(1, 400).split()
    kept = " ".join(words)
    words[100] = "changed"
    changed = fingerprint(" ".join(words))
    found = {}
    for near in (0.7, 0.95, 1.0):
        seen = Seen(near)
        seen.add(fingerprint(kept))
        found[near] = seen.find(changed)
    assert found == {0.7: 0, 0.95: 0, 1.0: None}


def test_fingerprints_are_the_same_in_every_version():
    signature = fingerprint("the quick brown fox jumps over the lazy dog").signature
    assert signature[:3].tolist() == GOLDEN


GOLDEN = [852761456, 152159992, 1310048548]


def test_saved_fingerprints_are_read_back(tmp_path):
    marks = [fingerprint(made_text(i)) for i in range(3)]
    save_fingerprints(tmp_path, marks)
    for mark, back in zip(marks, load_fingerprints(tmp_path), strict=True):
        assert mark.exact == back.exact and np.array_equal(mark.signature, back.signature)
    save_fingerprints(tmp_path, [])
    assert load_fingerprints(tmp_path) == []


def test_missing_or_misshapen_fingerprints_are_refused(tmp_path):
    with pytest.raises(DataError, match="no readable fingerprints"):
        load_fingerprints(tmp_path)
    np.save(tmp_path / "fingerprints_exact.npy", np.zeros((2, 32), np.uint8))
    np.save(tmp_path / "fingerprints_near.npy", np.zeros((2, 64), np.uint32))
    with pytest.raises(DataError, match="expected"):
        load_fingerprints(tmp_path)
