"""Repeats found on disk are those that a plain search in memory finds."""

import random
from collections import defaultdict
from hashlib import sha256

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from flexolmo.data import rows
from flexolmo.data.deduplicate import SIGNATURE
from flexolmo.data.documents import Document
from flexolmo.data.pieces import PieceStore, clean_documents, sort_pieces
from flexolmo.data.repeats import find_repeats, mark_those_in
from flexolmo.data.rows import Rows
from flexolmo.data.settings import PrepareSettings
from made_sets import made_text

WORDS = made_text(1, 400).split()


@pytest.fixture(params=[1 << 22, 3000])
def _memory(request, monkeypatch):
    monkeypatch.setattr(rows, "BYTES_AT_ONCE", request.param)


def _pieces(directory, texts, units=None):
    """Pieces, signatures, and the number of each text in the order of pieces."""
    directory.mkdir()
    store = PieceStore(directory)
    documents = [Document(t, "s", None, units and units[i]) for i, t in enumerate(texts)]
    store.add(0, clean_documents(PrepareSettings(), documents))
    pieces, signatures = sort_pieces(directory, 1)
    return pieces, signatures, pieces.read(0, len(pieces))["place"].tolist()


def _fingerprints(directory, texts):
    """Of another set, in the order of `texts`."""
    pieces, signatures, order = _pieces(directory, texts)
    back = np.argsort(order)
    exact = Rows("S32", directory / "exact")
    exact.append(pieces.read(0, len(pieces))["exact"][back])
    near = Rows(SIGNATURE, directory / "near")
    near.append(signatures.take(back))
    return exact, near


def _find(directory, texts, near, units=None, marks=None):
    """By number of a text that is dropped, the reason and the text it repeats."""
    pieces, signatures, order = _pieces(directory, texts, units)
    held = np.zeros(len(texts), dtype=np.uint8) if marks is None else marks[order]
    found = find_repeats(pieces, signatures, held, ["held"], near, units is not None, directory)
    return {
        order[repeat.number]: (repeat.reason, None if repeat.same is None else order[repeat.same])
        for _, repeats in found
        for repeat in repeats
    }


def _families():
    """Texts that differ in few or many words, some of more than a block's hashes."""
    rng = random.Random(3)
    texts = []
    for family in range(12):
        words = made_text(family, 40 * (family + 1)).split()
        for _ in range(8):
            for _ in range(family % 5 + 1):
                words[rng.randrange(len(words))] = f"w{rng.randrange(10**6)}"
            texts.append(" ".join(words))
    return texts


@pytest.mark.parametrize("near", [0.3, 0.7, 0.9])
def test_what_is_near_is_what_datasketch_finds(tmp_path, near, _memory):
    texts = _families()
    dropped = _find(tmp_path / "a", texts, near)
    _, signatures, order = _pieces(tmp_path / "b", texts)
    index = MinHashLSH(threshold=min(near, 0.7), num_perm=128)
    hashes = dict(zip(order, signatures.read(0, len(texts)), strict=True))
    for number in order:
        other = MinHash(num_perm=128, hashvalues=hashes[number], scheme="legacy")
        candidates = index.query(other)
        alike = {c for c in candidates if np.mean(hashes[c] == hashes[number]) >= near}
        if alike:
            assert dropped.pop(number) == ("near duplicate", min(alike))
        else:
            index.insert(number, other)
    assert not dropped


@pytest.mark.parametrize("has_units", [False, True])
def test_the_first_of_equal_texts_and_of_equal_words_is_kept(tmp_path, has_units, _memory):
    """In the order of hashes; a text that is held already neither stays nor stands for others."""
    rng = random.Random(5)
    texts = [rng.choice([str.lower, str.upper])(f"word {rng.randrange(40)}") for _ in range(200)]
    units = [str(rng.randrange(5)) for _ in texts] if has_units else None
    marks = np.array([text.startswith("word 7") for text in texts], dtype=np.uint8)
    dropped = _find(tmp_path / "a", texts, None, units, marks)

    def key(i):
        words = sha256(texts[i].lower().encode()).digest()
        parent = sha256(units[i].encode()).digest() if units else words
        return parent, sha256(texts[i].encode()).digest(), i

    first = {}
    of_words = defaultdict(list)
    for i in sorted(range(200), key=key):
        expected = None
        others = of_words[texts[i].lower()]
        if marks[i]:
            expected = ("held", None)
        elif texts[i] in first:
            expected = ("exact duplicate", first[texts[i]])
        elif units and others and units[others[0]] != units[i]:
            expected = ("same words in another unit", others[0])
        else:
            first[texts[i]] = i
            others.append(i)
        assert dropped.get(i) == expected
    reasons = {reason for reason, _ in dropped.values()}
    assert ("same words in another unit" in reasons) is has_units


@pytest.mark.parametrize("seed", range(3))
def test_texts_that_another_set_has_or_nearly_are_marked(tmp_path, seed, _memory):
    rng = random.Random(seed)
    base = [made_text(seed + 500, 400), made_text(seed, 400)]
    words = base[1].split()
    for place in rng.sample(range(400), 5):
        words[place] = "changed"
    texts = [*base, " ".join(words), made_text(seed + 1000, 400), "tiny", "tiny"]
    own = _pieces(tmp_path / "own", texts)
    marks = np.zeros(len(texts), dtype=np.uint8)
    marks[own[2].index(0)] = 9
    other = _fingerprints(tmp_path / "other", [*base, *(made_text(i) for i in range(30))])
    mark_those_in(own[:2], other, marks, 2, tmp_path)
    assert [int(marks[own[2].index(i)]) for i in range(len(texts))] == [9, 2, 2, 0, 0, 0]
    nothing = _fingerprints(tmp_path / "nothing", [])
    before = marks.copy()
    mark_those_in(own[:2], nothing, marks, 3, tmp_path)
    mark_those_in(_no_pieces(tmp_path), other, marks[:0], 3, tmp_path)
    assert np.array_equal(before, marks)


def _no_pieces(directory):
    """Pieces and signatures of a set without texts."""
    return _pieces(directory / "none", [])[:2]


def test_the_threshold_says_how_near_is_near(tmp_path):
    changed = [*WORDS[:100], "changed", *WORDS[101:]]
    texts = [" ".join(WORDS), " ".join(changed)]
    for near, count in ((0.7, 1), (0.95, 1), (1.0, 0)):
        assert len(_find(tmp_path / str(near), texts, near)) == count
