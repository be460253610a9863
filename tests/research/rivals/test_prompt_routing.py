"""Prompt routing: who reads the prompt, who answers until then, and the classifier."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.errors import DataError
from flexolmo.research.rivals.baselines import TextClassifier, prompt_routing_weights

FREQUENT = settings(derandomize=True, max_examples=60)


@FREQUENT
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=5),
    st.integers(1, 12),
    st.integers(0, 15),
    st.data(),
)
def test_public_answers_until_the_prompt_is_read(probabilities, T, prompt, data):
    public = data.draw(st.integers(0, len(probabilities) - 1))
    weights = prompt_routing_weights(np.array(probabilities), T, prompt, public)
    best = probabilities.index(max(probabilities))
    for i in range(len(probabilities)):
        for t in range(T):
            assert weights[i, t] == (i == (public if t < prompt else best))


DOMAINS = {"public": "general prose", "code": "programs", "news": "newspaper articles"}
WORDS = {
    "common": "the of and to in that it was for on with",
    "public": "time year people way day man thing woman life child world school",
    "code": "def return self import class lambda yield assert = ( ) : [ ]",
    "news": "minister vote court budget strike police mayor border report union",
}


def made_texts(name, count, seed, length=25):
    """`count` texts; half of the words stand in every domain."""
    rng = random.Random(f"{name} {seed}")
    return [
        " ".join(
            rng.choice(WORDS[name if rng.random() < 0.5 else "common"].split())
            for _ in range(length)
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("names", [["public", "code"], ["news", "public", "code"]], ids=len)
def test_the_text_classifier_tells_domains_apart_in_the_order_given(names):
    classifier = TextClassifier.fit({n: made_texts(n, 20, 0) for n in names})
    assert classifier.names == names
    for i, name in enumerate(names):
        found = classifier.probabilities(made_texts(name, 20, 1))
        assert found.shape == (20, len(names))
        np.testing.assert_allclose(found.sum(1), 1)
        assert (found.argmax(1) == i).mean() > 0.9


def test_fitting_twice_gives_the_same_and_a_text_is_judged_by_itself():
    texts = {n: made_texts(n, 10, 0) for n in DOMAINS}
    asked = [made_texts(n, 1, 2)[0] for n in DOMAINS]
    classifier, again = TextClassifier.fit(texts), TextClassifier.fit(texts)
    first = classifier.probabilities(asked)
    assert (first == again.probabilities(asked)).all()
    alone = np.concatenate([classifier.probabilities([t]) for t in asked])
    np.testing.assert_allclose(alone, first, rtol=1e-12)


def test_a_domain_with_more_texts_is_not_likelier_for_that():
    classifier = TextClassifier.fit(
        {"public": made_texts("public", 60, 0), "news": made_texts("news", 6, 0)}
    )
    assert classifier.probabilities(["zzz"])[0, 0] < 0.75  # 60 of 66 would be 0.91


@pytest.mark.parametrize(
    "texts",
    [{}, {"a": ["b c"]}, {"a": ["b c"], "empty": []}, {"a": ["b c"], "empty": [" \n"]}],
    ids=str,
)
def test_too_little_to_learn_from_is_refused(texts):
    with pytest.raises(DataError, match="found"):
        TextClassifier.fit(texts)
