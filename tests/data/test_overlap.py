"""Overlap with public text, against counting span by span."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.data import overlap
from flexolmo.data.batches import TokenSet, TokenSplit
from flexolmo.data.overlap import measure_overlap, span_digests
from flexolmo.errors import DataError

EOS = 3
texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=5)


def make_set(documents, digest="sha256:t"):
    """A set with one training split of these documents, each its own source."""
    lengths = [len(d) + 1 for d in documents]
    split = TokenSplit(
        np.array([t for d in documents for t in (*d, EOS)], dtype=np.uint16),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.array(lengths),
        np.arange(len(documents)),
    )
    card = {"tokenizer": {"digest": digest, "eos_id": EOS, "vocab_size": 4}}
    return TokenSet(Path("made"), card, {"train": split})


def spans(document, k):
    return [tuple(document[i : i + k]) for i in range(len(document) - k + 1)]


@given(texts, texts, st.integers(1, 3))
def test_it_counts_what_counting_span_by_span_does(own, public, at_once):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("SHORT_TOKENS", 2), ("LONG_TOKENS", 4), ("TOKENS_AT_ONCE", at_once)):
            patch.setattr(overlap, name, value)
        found = measure_overlap(make_set(own), make_set(public))
    theirs = {k: {s for d in public for s in spans(d, k)} for k in (2, 4)}
    short = [s in theirs[2] for d in own for s in spans(d, 2)]
    assert found["short"] == (pytest.approx(np.mean(short)) if short else None)
    assert found["long"] == sum(any(s in theirs[4] for s in spans(d, 4)) for d in own)
    assert (found["short_tokens"], found["long_tokens"]) == (2, 4)


@given(texts, st.integers(1, 5))
def test_digests_are_those_of_their_tokens_alone(documents, k):
    split = make_set(documents).splits["train"]
    digests, places = span_digests(split.tokens, k, EOS)
    held = [tuple(split.tokens[p : p + k].tolist()) for p in places]
    assert held == [s for d in documents for s in spans(d, k)]
    assert len(set(digests.tolist())) == len(set(held))


def test_sets_of_two_tokenizers_are_not_compared():
    with pytest.raises(DataError, match="was prepared with the tokenizer"):
        measure_overlap(make_set([[1]]), make_set([[1]], "sha256:other"))


def test_prepared_sets_overlap_little_and_themselves_wholly(pico_sets):
    found = measure_overlap(pico_sets["maths"], pico_sets["maths"])
    assert (
        found["short"] == 1 and found["long"] == pico_sets["maths"].splits["train"].sources[-1] + 1
    )
    assert measure_overlap(pico_sets["maths"], pico_sets["public"])["long"] == 0
