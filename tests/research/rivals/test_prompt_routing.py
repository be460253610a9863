"""Prompt routing: who reads the prompt, who answers until then, and the two classifiers."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.errors import ConfigError, DataError
from flexolmo.research.rivals.baselines import (
    InstructRouter,
    TextClassifier,
    prompt_routing_weights,
)

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


@pytest.mark.parametrize(
    "answer, domain, is_clear",
    [
        ("code", "code", True),
        ("  NEWS.\n", "news", True),
        ("**Code**", "code", True),
        ("2", "code", True),
        ("3.", "news", True),
        ("1", "public", True),
        ("Public", "public", True),
        ("", "public", False),
        ("0", "public", False),
        ("4", "public", False),
        ("codes", "public", False),
        ("code or news", "public", False),
        ("2 or 3", "public", False),
        ("It is code.", "public", False),
    ],
)
def test_an_answer_counts_only_if_it_is_one_name_or_number(answer, domain, is_clear):
    router = InstructRouter(lambda prompt: answer, DOMAINS)
    found = router.probabilities(["x", "y"])
    assert found.tolist() == [[float(n == domain) for n in router.names]] * 2
    assert router.num_unclear == (0 if is_clear else 2)
    assert router.probabilities([]).shape == (0, 3)


def test_the_model_is_shown_every_domain_and_only_the_start_of_the_text():
    prompts = []

    def ask(prompt):
        prompts.append(prompt)
        return "news"

    InstructRouter(ask, DOMAINS, start_characters=5).probabilities(["abcdefgh"])
    assert "abcde" in prompts[0] and "abcdef" not in prompts[0]
    for i, (name, description) in enumerate(DOMAINS.items(), start=1):
        assert f"{i}. {name}: {description}" in prompts[0]


@pytest.mark.parametrize(
    "names", [["code", "news"], ["public", "code", "Code"], ["public", "2"]], ids=str
)
def test_domains_that_an_answer_could_confuse_are_refused(names):
    with pytest.raises(ConfigError, match="expected public among"):
        InstructRouter(lambda prompt: "", dict.fromkeys(names, ""))
