"""Texts written again in forms: the same words in another shape."""

import json
import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.data.forms import FORMS, MIN_SENTENCES, sentences_of, write_form

WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=1, max_size=44)
SENTENCES = st.lists(WORDS.map(" ".join), max_size=12)


@given(SENTENCES, st.sampled_from([". ", ".\n", "?\n\n", "! "]), st.integers(1, 20))
def test_sentences_are_those_of_the_text_that_have_4_to_40_words(parts, pause, most):
    text = pause.join(parts)
    found = sentences_of(text, most)
    end = pause.strip()
    expected = [f"{p}{end}" for p in parts[:-1]] + parts[-1:]
    assert found == [p for p in expected if 4 <= len(p.split()) <= 40][:most]


@pytest.mark.parametrize("form", FORMS)
@given(parts=st.lists(WORDS.filter(lambda w: 4 <= len(w) <= 40), max_size=9), seed=st.integers())
def test_a_form_has_the_words_of_the_text_and_the_same_draw_gives_the_same(form, parts, seed):
    text = ". ".join(" ".join(p) for p in parts)
    found = write_form(form, text, Random(seed))
    assert found == write_form(form, text, Random(seed))
    assert (found is None) == (len(parts) < MIN_SENTENCES)
    if found is not None:
        words = set(re.findall(r"[a-z]+", found))
        # the first may be a subject line, which is cut; the last a question without an answer
        for sentence in parts[1:-1]:
            assert set(sentence[:4]) <= words


def test_forms_differ_from_each_other_and_from_the_text():
    sentences = [f"This is sentence number {i} of the text." for i in range(8)]
    text = " ".join(sentences)
    found = {form: write_form(form, text, Random(0)) for form in FORMS}
    assert len({text, *found.values()}) == len(FORMS) + 1
    rows = [json.loads(line) for line in found["record"].splitlines()]
    assert [row["id"] for row in rows] == list(range(8))
    assert all(sentence in found["record"] for sentence in sentences)
