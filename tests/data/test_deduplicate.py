import random
import zlib

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from flexolmo.data import deduplicate
from flexolmo.data.deduplicate import (
    Fingerprints,
    Index,
    Seen,
    hash_words,
    load_fingerprints,
    save_fingerprints,
    sketch,
    split_words,
)
from flexolmo.errors import DataError
from made_sets import made_text


def fingerprint(*texts):
    """Fingerprints of some texts."""
    exact = [
        np.frombuffer(deduplicate.hashlib.sha256(t.encode()).digest(), np.uint8) for t in texts
    ]
    return Fingerprints(np.array(exact), sketch([split_words(text) for text in texts]))


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
    seen = Seen(sketch([[one]]), near=None)
    seen.add(one.encode(), 0)
    assert seen.find_exact(one.encode()) == 0 and seen.find_near(0) is None
    assert seen.find_exact(other.encode()) is None
    assert (hash_words(split_words(one)) == hash_words(split_words(other))) is (one != "+++")


@pytest.mark.parametrize("seed", range(5))
def test_a_few_changed_words_are_a_near_duplicate_and_other_text_is_not(seed):
    words = made_text(seed, 400).split()
    texts = [made_text(seed + 500, 400), " ".join(words)]
    rng = random.Random(seed)
    for place in rng.sample(range(400), 5):
        words[place] = "changed"
    texts += [" ".join(words), made_text(seed + 1000, 400), texts[1]]
    marks = fingerprint(*texts)
    index = Index(Fingerprints(marks.exact[:2], marks.signatures[:2]))
    assert index.find(marks).tolist() == [True, True, True, False, True]
    seen = Seen(marks.signatures, near=0.7)
    for number in (0, 1):
        assert seen.find_near(number) is None
        seen.add(texts[number].encode(), number)
    assert seen.find_exact(texts[2].encode()) is None
    assert [seen.find_near(number) for number in (2, 3, 4)] == [1, None, 1]


def test_an_empty_set_repeats_nothing():
    nothing = Fingerprints(np.zeros((0, 32), np.uint8), np.zeros((0, 128), np.uint32))
    marks = fingerprint("some words", "others")
    assert Index(nothing).find(marks).tolist() == [False, False]
    assert Index(marks).find(nothing).tolist() == []


@pytest.mark.parametrize("near", [0.3, 0.7, 0.9])
def test_what_is_near_is_what_datasketch_finds(near):
    """Of families of texts that differ in few or many words, some of more than a block's hashes."""
    rng = random.Random(3)
    texts = []
    for family in range(12):
        words = made_text(family, 40 * (family + 1)).split()
        for _ in range(8):
            for _ in range(family % 5 + 1):
                words[rng.randrange(len(words))] = f"w{rng.randrange(10**6)}"
            texts.append(" ".join(words))
    signatures = sketch([split_words(text) for text in texts])
    seen = Seen(signatures, near)
    index = MinHashLSH(threshold=min(near, 0.7), num_perm=128)
    kept = []
    for number in range(len(texts)):
        other = MinHash(num_perm=128, hashvalues=signatures[number], scheme="legacy")
        candidates = index.query(other)
        expected = {c for c in candidates if np.mean(signatures[c] == signatures[number]) >= near}
        found = seen.find_near(number)
        assert found in expected if expected else found is None
        if found is None:
            kept.append(number)
            index.insert(number, other)
            seen.add(str(number).encode(), number)
    assert 12 <= len(kept) < len(texts)
    if near == 0.7:
        some = Fingerprints(np.zeros((len(kept), 32), np.uint8), signatures[kept])
        asked = Fingerprints(np.ones((len(texts), 32), np.uint8), signatures)
        assert Index(some).find(asked).all()


def test_the_threshold_says_how_near_is_near():
    words = made_text(1, 400).split()
    kept = " ".join(words)
    words[100] = "changed"
    signatures = fingerprint(kept, " ".join(words)).signatures
    found = {}
    for near in (0.7, 0.95, 1.0):
        seen = Seen(signatures, near)
        seen.add(b"", 0)
        found[near] = seen.find_near(1)
    assert found == {0.7: 0, 0.95: 0, 1.0: None}


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
    assert deduplicate._choose_bands(0.9) == (chosen.b, chosen.r)


def test_fingerprints_are_the_same_in_every_version():
    (signature,) = fingerprint("the quick brown fox jumps over the lazy dog").signatures
    assert signature[:3].tolist() == GOLDEN


GOLDEN = [852761456, 152159992, 1310048548]


def test_saved_fingerprints_are_read_back(tmp_path):
    marks = fingerprint(*(made_text(i) for i in range(3)))
    order = np.array([2, 0])
    save_fingerprints(tmp_path, marks.exact[order], marks.signatures, order)
    back = load_fingerprints(tmp_path)
    assert np.array_equal(back.exact, marks.exact[order])
    assert np.array_equal(back.signatures, marks.signatures[order])
    save_fingerprints(tmp_path, marks.exact[:0], marks.signatures, order[:0])
    assert load_fingerprints(tmp_path).signatures.shape == (0, 128)


def test_missing_or_misshapen_fingerprints_are_refused(tmp_path):
    with pytest.raises(DataError, match="no readable fingerprints"):
        load_fingerprints(tmp_path)
    np.save(tmp_path / "fingerprints_exact.npy", np.zeros((2, 32), np.uint8))
    np.save(tmp_path / "fingerprints_near.npy", np.zeros((2, 64), np.uint32))
    with pytest.raises(DataError, match="expected"):
        load_fingerprints(tmp_path)
