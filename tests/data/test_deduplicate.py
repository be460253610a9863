import zlib

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from flexolmo.data import deduplicate
from flexolmo.data.deduplicate import hash_words, open_fingerprints, sketch, split_words
from flexolmo.data.prepared import EXACT_FILE, NEAR_FILE
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
def test_texts_of_the_same_words_share_a_hash(one, other):
    assert (hash_words(split_words(one)) == hash_words(split_words(other))) is (one != "+++")


def test_signatures_are_those_of_datasketch():
    """One text at a time and many at once; fewer than five words, none, and many blocks' worth."""
    texts = ["", "+ +", "one", "a b c d e", "a b c d e f", made_text(1, 900), "the cat sat " * 300]
    words = [split_words(text) for text in texts]
    for some, signature in zip(words, sketch(words), strict=True):
        last = max(1, len(some) - 4)
        shingles = {zlib.crc32(" ".join(some[i : i + 5]).encode()) for i in range(last)}
        plain = MinHash(num_perm=128, hashfunc=int, scheme="legacy")
        plain.update_batch(sorted(shingles))
        assert np.array_equal(signature, plain.hashvalues.astype(np.uint32))
        assert np.array_equal(signature, sketch([some])[0])
    assert sketch([]).shape == (0, 128)
    chosen = MinHashLSH(threshold=deduplicate.NEAR_DUPLICATE_JACCARD, num_perm=128)
    assert deduplicate.choose_bands(0.9) == (chosen.b, chosen.r)


def test_fingerprints_are_the_same_in_every_version():
    (signature,) = sketch([split_words("the quick brown fox jumps over the lazy dog")])
    assert signature[:3].tolist() == GOLDEN


GOLDEN = [852761456, 152159992, 1310048548]


@pytest.mark.parametrize("count", [3, 0])
def test_saved_fingerprints_are_read_back(tmp_path, count):
    signatures = sketch([split_words(made_text(i)) for i in range(count)])
    digests = np.arange(32 * count, dtype=np.uint8).reshape(count, 32)
    np.save(tmp_path / EXACT_FILE, digests)
    np.save(tmp_path / NEAR_FILE, signatures)
    exact, near = open_fingerprints(tmp_path)
    assert [len(exact), len(near)] == [count, count]
    assert exact.read(0, count).view(np.uint8).tobytes() == digests.tobytes()
    assert near.read(0, count).tobytes() == signatures.tobytes()


def test_missing_or_misshapen_fingerprints_are_refused(tmp_path):
    with pytest.raises(DataError, match="no readable fingerprints"):
        open_fingerprints(tmp_path)
    np.save(tmp_path / EXACT_FILE, np.zeros((2, 32), np.uint8))
    np.save(tmp_path / NEAR_FILE, np.zeros((2, 64), np.uint32))
    with pytest.raises(DataError, match="expected"):
        open_fingerprints(tmp_path)
