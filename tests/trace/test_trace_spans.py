"""Maximal spans, held against trying every pair of places in the text."""

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.errors import DataError
from flexolmo.trace.spans import Span, find_spans, maximal_spans, rank_by_bits, rank_spans
from flexolmo.trace.words import MAX_TEXT_TOKENS, Words, split_words
from made_traces import documents_of, made_index, places_of, slow_spans

WORDS = ["the", "cat", "sat", "on", "mat", "naïve", "12", "x1", "don't", "日本", "🙂", "e\u0301t"]
TEXT = st.lists(
    st.tuples(st.sampled_from(WORDS), st.sampled_from([" ", " ", ". ", "\n", "", "-"])),
    min_size=1,
    max_size=25,
).map(lambda parts: "".join(word + after for word, after in parts))


@pytest.fixture(scope="module")
def clinic(tmp_path_factory):
    """Made documents, a prepared set of them, and its index in several parts."""
    where = tmp_path_factory.mktemp("clinic")
    rng = random.Random(0)
    texts = [
        "".join(rng.choice(WORDS) + rng.choice([" ", " ", ". ", "\n", "", "-"]) for _ in range(30))
        for _ in range(20)
    ]
    index = made_index(where, texts, shard_tokens=400)
    assert len(index.shards) > 2
    return index


@given(TEXT, st.integers(1, 6), st.data())
@settings(max_examples=60)
def test_every_maximal_span_is_found_with_all_its_places(clinic, text, min_tokens, data):
    documents = documents_of(clinic)
    copied = data.draw(st.sampled_from(documents))[0]
    start = data.draw(st.integers(0, len(copied) - 1))
    text = text + clinic.tokenizer.decode(copied[start : start + data.draw(st.integers(1, 40))])
    words = split_words(text, clinic.tokenizer)
    found = find_spans(clinic, words, min_tokens, max_occurrences=10**6, context_tokens=3)
    ids = list(words.ids)
    truth = slow_spans(ids, list(words.cuts), [d for d, _ in documents], min_tokens)
    assert [(span.start, span.end) for span in found] == truth
    for span in found:
        run = ids[span.start : span.end]
        places = [
            (name, len(clinic.tokenizer.decode(document[:k]).encode()))
            for document, name in documents
            for k in places_of(run, document)
        ]
        assert span.count == len(places)
        assert sorted((o.document, o.position) for o in span.occurrences) == sorted(places)
        for o in span.occurrences:
            assert o.text == words.text[span.first : span.last]
            assert clinic.tokenizer.decode(run) == o.text


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=30),
    st.lists(st.lists(st.integers(1, 4), max_size=20), max_size=4),
    st.sets(st.integers(1, 29)),
    st.integers(1, 4),
)
def test_maximal_spans_are_those_of_all_pairs_of_cuts(ids, documents, inner, min_tokens):
    cuts = sorted({0, len(ids)} | {k for k in inner if k < len(ids)})

    def reach(start):
        ends = [e for e in range(start, len(ids) + 1)]
        return max(
            e for e in ends if e == start or any(places_of(ids[start:e], d) for d in documents)
        )

    assert list(maximal_spans(cuts, reach, min_tokens)) == slow_spans(
        ids, cuts, documents, min_tokens
    )


@given(TEXT)
def test_a_cut_never_divides_a_word_and_every_space_is_one(clinic, text):
    words = split_words(text, clinic.tokenizer)
    begins = [words.places[k][0] for k in words.cuts if k < len(words.ids)]
    assert begins == sorted(set(begins)), "a cut divides a character"
    for place in begins[1:]:
        left, right = text[place - 1], text[place]
        assert not (left.isalnum() and right.isalnum()), (text, place)
        assert right != "\u0301"
    # tokens that begin where a space does are always a place to cut
    for k, (first, end) in enumerate(words.places):
        if k and text[first] in " \n" and end > first:
            assert k in words.cuts


def test_the_rarest_and_longest_come_first():
    def made(bits, size):
        return Span("a", 0, size, 0, 1, bits=bits)

    common, rare, untold, longer = made(8.0, 9), made(40.0, 4), made(None, 10), made(None, 12)
    assert rank_by_bits([common, rare]) == [rare, common]
    assert rank_by_bits([common, untold, rare, longer]) == [longer, untold, common, rare]
    assert rank_by_bits([common, rare], keep=1) == [rare]
    assert rank_spans([common, longer, rare], lambda s: s.end == 4) == [rare, longer, common]


def test_the_bits_of_a_span_are_those_of_its_tokens_in_the_text(clinic):
    documents = [d for d, _ in documents_of(clinic)]
    counts = Counter(i for d in documents for i in d)
    total = counts.total()
    text = clinic.tokenizer.decode(documents[3][4:40])
    words = split_words(text, clinic.tokenizer)
    for span in find_spans(clinic, words):
        bits = [math.log2(total / counts[i]) for i in words.ids[span.start : span.end]]
        assert span.bits == pytest.approx(sum(bits))


def test_the_context_stays_within_the_document(clinic):
    document, _ = documents_of(clinic)[5]
    text = clinic.tokenizer.decode(document)
    words = split_words(text, clinic.tokenizer)
    (span,) = find_spans(clinic, words, context_tokens=1000)
    (found,) = span.occurrences
    assert (found.before, found.text, found.after) == ("", text, "")
    half = split_words(text[len(text) // 2 :], clinic.tokenizer)
    longest = max(find_spans(clinic, half, context_tokens=1000), key=lambda s: s.end - s.start)
    (found,) = longest.occurrences
    assert found.before + found.text + found.after == text
    assert found.position == len(found.before.encode())


def test_text_of_another_tokenizer_and_too_long_a_text_are_refused(clinic):
    with pytest.raises(DataError, match="another tokenizer"):
        find_spans(clinic, Words("x", [70_000], [(0, 1)], [0, 1]))
    with pytest.raises(DataError, match="at most"):
        split_words("9" * (MAX_TEXT_TOKENS + 1), clinic.tokenizer)


@pytest.mark.parametrize("text", ["", " ", "\x00\x1b[2J", "<script>", "\u202e", "🙂" * 20])
def test_any_text_can_be_asked(clinic, text):
    words = split_words(text, clinic.tokenizer)
    assert "".join(text[a:b] for a, b in dict.fromkeys(words.places)) == text
    assert find_spans(clinic, words) == []
