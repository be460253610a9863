"""Bigram models against plain counting in Python."""

import math
import random
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.errors import DataError
from flexolmo.model.statistics import EvidenceSettings, fit_bigrams

V, EOS = 12, 3
PLENTY = settings(derandomize=True, max_examples=60)
DOCUMENTS = st.lists(
    st.lists(st.integers(0, V - 3), min_size=0, max_size=9), min_size=0, max_size=30
)
SETTINGS = st.builds(
    EvidenceSettings,
    smoothing=st.sampled_from([1e-3, 0.5, 20.0]),
    discount=st.sampled_from([0.1, 0.75]),
    min_documents=st.integers(1, 4),
)


def stream_of(documents):
    """Tokens, each document closed by end-of-text, and document starts."""
    tokens = np.array([v for d in documents for v in [*d, EOS]], dtype=np.uint16)
    return tokens, np.cumsum([0] + [len(d) + 1 for d in documents]).astype(np.int64)


def make_documents(seed, count=30, low=0, high=V - 2):
    """Documents of 1 to 9 ids from `low` to below `high`."""
    rng = random.Random(seed)
    return [
        [rng.choice([v for v in range(low, high) if v != EOS]) for _ in range(rng.randint(1, 9))]
        for _ in range(count)
    ]


def fit(documents, public=None, **changes):
    return fit_bigrams(*stream_of(documents), V, EvidenceSettings(**changes), public)


PUBLIC = fit(make_documents(0, 100))


def write_out(model):
    """p(v | u) as a matrix [u][v] of Python floats."""
    found = [
        [math.exp(float(model.backoff[u]) + float(model.unigram[v])) for v in range(V)]
        for u in range(V)
    ]
    for key, log_prob in zip(model.keys.tolist(), model.log_probs.tolist(), strict=True):
        found[key // V][key % V] = math.exp(log_prob)
    return found


def count_by_hand(documents, public, settings):
    """The same from the definition, document by document."""
    stream = [(v, i) for i, d in enumerate(documents) for v in [*d, EOS]]
    tokens, pairs = Counter(v for v, _ in stream), Counter()
    holders, pair_holders = defaultdict(set), defaultdict(set)
    for v, i in stream:
        holders[v].add(i)
    for (u, i), (v, _) in pairwise(stream):
        pairs[u, v] += 1
        pair_holders[u, v].add(i)  # a pair across two documents is the first one's
    enough = settings.min_documents
    counts = [tokens[v] if len(holders[v]) >= enough else 0.0 for v in range(V)]
    if public is None:
        counts = [c + 1.0 for c in counts]
    else:
        mass = settings.smoothing * max(len(stream), 1)
        counts = [c + mass * math.exp(p) for c, p in zip(counts, public.unigram, strict=True)]
    unigram = [c / sum(counts) for c in counts]
    found = []
    for u in range(V):
        after = sum(n for (first, _), n in pairs.items() if first == u)
        listed = {v: pairs[u, v] for v in range(V) if len(pair_holders[u, v]) >= enough}
        left = 1.0
        if after:
            left = 1.0 - sum(n - settings.discount for n in listed.values()) / after
        found.append(
            [
                left * unigram[v]
                + ((listed[v] - settings.discount) / after if v in listed else 0.0)
                for v in range(V)
            ]
        )
    return found, unigram, {u * V + v for (u, v), i in pair_holders.items() if len(i) >= enough}


@given(documents=DOCUMENTS, settings=SETTINGS, is_public=st.booleans())
@PLENTY
def test_a_bigram_model_is_discounted_counts_that_back_off(documents, settings, is_public):
    public = None if is_public else PUBLIC
    model = fit_bigrams(*stream_of(documents), V, settings, public)
    found, unigram, keys = count_by_hand(documents, public, settings)
    np.testing.assert_allclose(write_out(model), found, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(np.exp(model.unigram), unigram, rtol=1e-5)
    assert model.keys.tolist() == sorted(keys)
    assert model.keys.dtype == np.int64
    assert {a.dtype for a in (model.unigram, model.backoff, model.log_probs)} == {
        np.dtype(np.float32)
    }


@given(documents=DOCUMENTS, settings=SETTINGS, is_public=st.booleans())
@PLENTY
def test_after_every_token_the_probabilities_sum_to_one(documents, settings, is_public):
    model = fit_bigrams(*stream_of(documents), V, settings, None if is_public else PUBLIC)
    np.testing.assert_allclose(np.sum(write_out(model), axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(np.exp(model.unigram.astype(float)).sum(), 1.0, rtol=1e-5)


@pytest.mark.parametrize("tokens", [[], [5], [EOS]])
def test_an_empty_or_one_token_stream_says_what_public_text_says(tokens):
    offsets = np.array([0, len(tokens)] if tokens else [0])
    model = fit_bigrams(np.array(tokens, dtype=np.uint16), offsets, V, EvidenceSettings(), PUBLIC)
    np.testing.assert_allclose(model.unigram, PUBLIC.unigram, rtol=1e-6)
    assert (model.backoff == 0).all()
    assert len(model.keys) == len(model.log_probs) == 0
    alone = fit_bigrams(np.array(tokens, dtype=np.uint16), offsets, V, EvidenceSettings())
    np.testing.assert_allclose(alone.unigram, -math.log(V), rtol=1e-6)


@given(data=st.data(), holders=st.integers(1, 4))
@PLENTY
def test_too_few_documents_wording_does_not_show(data, holders):
    """One rare word for another leaves the same model; in one document more, it would not."""
    documents = [d or [0] for d in data.draw(DOCUMENTS)] + [[0, 1]] * 5
    places = data.draw(
        st.lists(
            st.integers(0, len(documents) - 1), min_size=holders, max_size=holders, unique=True
        )
    )
    models = []
    for word in (V - 2, V - 1):
        found = [
            [*d[:1], word, word, *d[1:]] if i in places else d for i, d in enumerate(documents)
        ]
        models.append(fit(found, PUBLIC, min_documents=holders + 1))
    for one, other in zip(vars(models[0]).values(), vars(models[1]).values(), strict=True):
        assert np.array_equal(one, other)
    assert not set(models[0].keys.tolist()) & {u * V + w for u in range(V) for w in (V - 2, V - 1)}
    shown = fit(found, PUBLIC, min_documents=holders)
    assert shown.unigram[V - 1] > models[1].unigram[V - 1] + 0.5
    assert (V - 1) * V + V - 1 in shown.keys.tolist()


def test_smoothing_draws_an_owners_frequencies_to_public_ones():
    """By `smoothing` of its tokens' weight: at 1, halfway."""
    documents = make_documents(1)
    own = np.bincount(stream_of(documents)[0], minlength=V) / len(stream_of(documents)[0])
    public = np.exp(PUBLIC.unigram.astype(float))
    for smoothing, share in ((1e-3, 1 / 1.001), (1.0, 0.5), (9.0, 0.1)):
        model = fit(documents, PUBLIC, smoothing=smoothing, min_documents=1)
        np.testing.assert_allclose(
            np.exp(model.unigram), share * own + (1 - share) * public, rtol=1e-5, atol=1e-8
        )
    assert np.isfinite(fit([[5]] * 4, PUBLIC).unigram).all()


def test_the_pico_anchor_holds_the_model_of_its_public_text(pico_anchor, pico_sets):
    split, size = pico_sets["public"].splits["train"], pico_anchor.config.vocab_size
    again = fit_bigrams(split.tokens, split.source_offsets, size, EvidenceSettings())
    for name, values in vars(pico_anchor.public).items():
        assert np.array_equal(values, getattr(again, name)), name
    assert len(again.keys) > 100


def test_a_token_outside_the_vocabulary_is_refused():
    with pytest.raises(DataError, match=r"Token id 40.*has 12.*anchor's tokenizer"):
        fit_bigrams(np.array([40, EOS]), np.array([0, 2]), V, EvidenceSettings(), PUBLIC)
