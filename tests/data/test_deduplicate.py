import random

import numpy as np
import pytest

from flexolmo.data.deduplicate import Seen, fingerprint, load_fingerprints, save_fingerprints
from flexolmo.errors import DataError
from made_sets import made_text


def test_case_spacing_and_punctuation_do_not_matter():
    assert fingerprint("Hello,  big\nWorld!").exact == fingerprint("hello big world").exact
    assert fingerprint("hello big world").exact != fingerprint("hello big words").exact


@pytest.mark.parametrize("seed", range(5))
def test_a_few_changed_words_are_a_near_duplicate_and_other_text_is_not(seed):
    words = made_text(seed, 400).split()
    seen = Seen()
    seen.add(fingerprint(" ".join(words)))
    rng = random.Random(seed)
    for place in rng.sample(range(400), 5):
        words[place] = "changed"
    assert seen.has_near(fingerprint(" ".join(words)))
    assert not seen.has_exact(fingerprint(" ".join(words)))
    assert not seen.has(fingerprint(made_text(seed + 1000, 400)))


def test_text_without_words_has_a_fingerprint():
    assert fingerprint("+++").exact != fingerprint("---").exact


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
