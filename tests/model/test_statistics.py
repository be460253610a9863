"""Token statistics against plain counting in Python."""

import math
import random
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.errors import DataError
from flexolmo.model.statistics import (
    LEAST_LEFT,
    MOST_LISTED,
    PUBLIC_DOCUMENTS,
    UNTOLD,
    EvidenceSettings,
    OwnerTable,
    fit_bigrams,
    fit_table,
    table_problems,
    weigh_evidence,
)

V, EOS = 12, 3
PLENTY = settings(derandomize=True, max_examples=60)
DOCUMENTS = st.lists(
    st.lists(st.integers(0, V - 3), min_size=0, max_size=9), min_size=0, max_size=30
)
SETTINGS = st.builds(
    EvidenceSettings,
    smoothing=st.sampled_from([1e-3, 0.5]),
    discount=st.sampled_from([0.1, 0.75]),
    min_documents=st.integers(1, 4),
    most_per_document=st.sampled_from([1, 2, 10]),
    level_nats=st.sampled_from([0.1, 0.5, 2.0]),
    public_order=st.sampled_from([0.0, 0.6, 1.0]),
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


PUBLIC = fit_bigrams(*stream_of(make_documents(0, 100)), V)


def fit(documents, **changes):
    return fit_table(*stream_of(documents), PUBLIC, EvidenceSettings(**changes))


def write_out(model):
    """p(v | u) as a matrix [u][v] of Python floats."""
    found = [
        [math.exp(float(model.backoff[u]) + float(model.unigram[v])) for v in range(V)]
        for u in range(V)
    ]
    for key, log_prob in zip(model.keys.tolist(), model.log_probs.tolist(), strict=True):
        found[key // V][key % V] = math.exp(log_prob)
    return found


def count_by_hand(documents, most=None):
    """Counts of tokens and pairs and how many documents hold each, document by document."""
    stream = [(v, i) for i, d in enumerate(documents) for v in [*d, EOS]]
    tokens, pairs = defaultdict(Counter), defaultdict(Counter)
    for v, i in stream:
        tokens[v][i] += 1
    for (u, _), (v, i) in pairwise(stream):
        pairs[u, v][i] += 1  # a pair across two documents is the second one's
    return [
        {k: (sum(min(c, most or c) for c in n.values()), len(n)) for k, n in found.items()}
        for found in (tokens, pairs)
    ]


@given(documents=DOCUMENTS)
@PLENTY
def test_a_bigram_model_is_discounted_counts_that_back_off(documents):
    model = fit_bigrams(*stream_of(documents), V)
    tokens, pairs = count_by_hand(documents)
    enough, discount = PUBLIC_DOCUMENTS, EvidenceSettings().discount
    counts = [1.0 + (tokens[v][0] if tokens.get(v, (0, 0))[1] >= enough else 0) for v in range(V)]
    unigram = [c / sum(counts) for c in counts]
    for u, row in enumerate(write_out(model)):
        after = sum(n for (first, _), (n, _) in pairs.items() if first == u)
        listed = {v: n for (f, v), (n, held) in pairs.items() if f == u and held >= enough}
        left = 1.0 - sum(n - discount for n in listed.values()) / after if after else 1.0
        expected = [
            left * unigram[v] + ((listed[v] - discount) / after if v in listed else 0.0)
            for v in range(V)
        ]
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-7)
        assert sum(row) == pytest.approx(1.0, rel=1e-5)
    assert model.keys.tolist() == sorted(u * V + v for (u, v), n in pairs.items() if n[1] >= enough)


def check_level(level, count, total, public_log, settings, less=0.0):
    """The nearest, unless that would hold counts of too few documents alone: then the least whose
    lower end does not."""
    step = settings.level_nats
    exact = (math.log((count - less) / total) - public_log) / step
    least = (math.log((settings.min_documents - less) / total) - public_log) / step + 0.5
    assert level >= least - 1e-3
    assert abs(level - exact) <= 0.5 + 1e-3 or (exact - 0.5 < level < least + 1 + 1e-3)


@given(documents=DOCUMENTS, settings=SETTINGS)
@PLENTY
def test_a_table_is_coarse_logs_of_what_enough_documents_hold(documents, settings):
    table = fit_table(*stream_of(documents), PUBLIC, settings)
    tokens, pairs = count_by_hand(documents, settings.most_per_document)
    public = write_out(PUBLIC)
    total = sum(n for n, _ in tokens.values())
    for v in range(V):
        n, holders = tokens.get(v, (0, 0))
        if holders < settings.min_documents:
            assert table.token_levels[v] == UNTOLD
        else:
            public_log = float(PUBLIC.unigram[v])
            check_level(table.token_levels[v], n, total, public_log, settings)
    assert table.keys.tolist() == sorted(
        u * V + v for (u, v), (_, holders) in pairs.items() if holders >= settings.min_documents
    )
    for key, level in zip(table.keys.tolist(), table.pair_levels.tolist(), strict=True):
        u, v = divmod(key, V)
        after = sum(n for (first, _), (n, _) in pairs.items() if first == u)
        less = settings.discount
        check_level(level, pairs[u, v][0], after, math.log(public[u][v]), settings, less)
    assert table_problems(table, PUBLIC, settings) == []


def matrix_of(table, settings):
    """The evidence of every token v after every token u, [u,v], from the definition."""
    public, order = np.array(write_out(PUBLIC)), settings.public_order
    unigram = np.exp(PUBLIC.unigram.astype(float))
    tokens = np.where(
        table.is_told, table.token_levels * settings.level_nats, math.log(settings.smoothing)
    )
    found = np.zeros((V, V))
    listed = dict(zip(table.keys.tolist(), table.pair_levels.tolist(), strict=True))
    for u in range(V):
        own = {v: listed[u * V + v] * settings.level_nats for v in range(V) if u * V + v in listed}
        mass = sum(public[u, v] * math.exp(e) for v, e in own.items())
        scale = min(1.0, MOST_LISTED / mass) if mass else 1.0
        free = {
            v: unigram[v] * math.exp(tokens[v]) * (public[u, v] / unigram[v]) ** order
            for v in range(V)
            if v not in own
        }
        norm = (1 - mass * scale) / max(sum(free.values()), LEAST_LEFT)
        for v in range(V):
            p = free[v] * norm if v in free else public[u, v] * math.exp(own[v]) * scale
            found[u, v] = math.log(p / public[u, v])
    return found, public


LEVELS = st.integers(-30, 30)
TABLES = st.builds(
    lambda tokens, pairs: OwnerTable(
        np.array(tokens, dtype=np.int8),
        np.array(sorted(pairs), dtype=np.int64),
        np.array([pairs[k] for k in sorted(pairs)], dtype=np.int8),
    ),
    st.lists(st.one_of(LEVELS, st.just(UNTOLD)), min_size=V, max_size=V),
    st.dictionaries(st.integers(0, V * V - 1), LEVELS, max_size=V * V),
)


@given(table=TABLES, settings=SETTINGS)
@PLENTY
def test_whatever_a_table_claims_its_probabilities_sum_to_one(table, settings):
    """So over public text no owner gains more than it gives up."""
    found = weigh_evidence(table, PUBLIC, settings)
    expected, public = matrix_of(table, settings)
    listed = dict(zip(table.keys.tolist(), found.pairs.tolist(), strict=True))
    for u in range(V):
        for v in range(V):
            preference = math.log(public[u, v]) - float(PUBLIC.unigram[v])
            evidence = listed.get(
                u * V + v,
                float(found.tokens[v])
                + float(found.contexts[u])
                - (1 - settings.public_order) * preference,
            )
            assert evidence == pytest.approx(expected[u, v], rel=2e-3, abs=2e-3)
        assert (public[u] * np.exp(expected[u])).sum() <= 1 + 1e-6


def test_a_claim_of_every_token_is_worth_nothing():
    everything = OwnerTable(np.full(V, 60, np.int8), np.zeros(0, np.int64), np.zeros(0, np.int8))
    found = weigh_evidence(everything, PUBLIC, EvidenceSettings(public_order=1.0))
    sums = found.tokens[None] + found.contexts[:, None]
    np.testing.assert_allclose(sums, 0.0, atol=1e-4)


@given(data=st.data(), holders=st.integers(1, 4))
@PLENTY
def test_too_few_documents_wording_does_not_show(data, holders):
    """One rare word for another leaves the same table; in one document more, it would not."""
    documents = [d or [0] for d in data.draw(DOCUMENTS)] + [[0, 1]] * 5
    places = data.draw(
        st.lists(
            st.integers(0, len(documents) - 1), min_size=holders, max_size=holders, unique=True
        )
    )
    tables = []
    for word in (V - 2, V - 1):
        found = [
            [*d[:1], word, word, *d[1:]] if i in places else d for i, d in enumerate(documents)
        ]
        tables.append(fit(found, min_documents=holders + 1))
    for one, other in zip(vars(tables[0]).values(), vars(tables[1]).values(), strict=True):
        assert np.array_equal(one, other)
    assert not set(tables[0].keys.tolist()) & {u * V + w for u in range(V) for w in (V - 2, V - 1)}
    shown = fit(found, min_documents=holders)
    assert shown.token_levels[V - 1] != UNTOLD
    assert (V - 1) * V + V - 1 in shown.keys.tolist()


@given(documents=DOCUMENTS, extra=st.integers(11, 300))
@PLENTY
def test_one_document_counts_so_often_at_most(documents, extra):
    """However often a document repeats a word, it counts as ten times."""
    documents = [*documents, *[[0, 1, 2]] * 5]
    often = [[*d, *[5] * 10] if i == 0 else d for i, d in enumerate(documents)]
    more = [[*d, *[5] * extra] if i == 0 else d for i, d in enumerate(documents)]
    if 5 not in documents[0]:
        one, other = (fit(d, min_documents=1) for d in (often, more))
        assert np.array_equal(one.token_levels, other.token_levels)


def test_a_level_leaves_many_counts_also_at_the_threshold():
    """Whatever the total: else a token in just enough documents would show its count."""
    for filler in range(1, 60):
        documents = [[5, *[0] * filler]] * 20 + [[0] * filler] * 40
        table = fit(documents)
        total, step = 20 + 60 * (filler and min(filler, 10)) + 60, 0.5
        level = int(table.token_levels[5])
        most = total * math.exp(float(PUBLIC.unigram[5]) + (level + 0.5) * step)
        assert most >= 20 * math.exp(step) - 1, "counts from 20 up to this have that level"


def test_a_record_stored_in_pieces_counts_its_first_word_once():
    """A pair with the end before it is of the document that begins, not of the one before."""
    pieces = [[5, 0, EOS, 5, 1]] * 10 + [[0, 1]] * 30
    table = fit(pieces)
    assert EOS * V + 5 not in table.keys.tolist() and table.token_levels[5] == UNTOLD
    assert table_problems(table, PUBLIC, EvidenceSettings()) == []


@pytest.mark.parametrize("tokens", [[], [5], [EOS]])
def test_an_empty_or_one_token_stream_tells_of_nothing(tokens):
    offsets = np.array([0, len(tokens)] if tokens else [0])
    ids = np.array(tokens, dtype=np.uint16)
    table = fit_table(ids, offsets, PUBLIC, EvidenceSettings())
    assert not table.is_told.any() and not len(table.keys)
    assert table_problems(table, PUBLIC, EvidenceSettings()) == []
    alone = fit_bigrams(ids, offsets, V)
    np.testing.assert_allclose(alone.unigram, -math.log(V), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"token_levels": np.full(V, 101, np.int8)}, "level of 101 from 0"),
        ({"token_levels": np.full(V, 6, np.int8)}, "token probabilities sum to 20"),
        ({"token_levels": np.full(V, UNTOLD, np.int8)}, "but not of both tokens alone"),
        ({"keys": np.array([9, 2]), "pair_levels": np.zeros(2, np.int8)}, "not ascending"),
        (
            {"keys": np.arange(12, 24), "pair_levels": np.full(12, 4, np.int8)},
            "after token 1 sum to 7.3",
        ),
    ],
)
def test_a_table_that_no_text_gives_is_named(change, said):
    good = {
        "token_levels": np.zeros(V, np.int8),
        "keys": np.array([3, 14]),
        "pair_levels": np.array([0, -3], np.int8),
    }
    settings = EvidenceSettings()
    assert table_problems(OwnerTable(**good), PUBLIC, settings) == []
    (line, *_) = table_problems(OwnerTable(**good | change), PUBLIC, settings)
    assert said in line


def test_the_pico_anchor_holds_the_model_of_its_public_text(pico_anchor, pico_sets):
    split, size = pico_sets["public"].splits["train"], pico_anchor.config.vocab_size
    again = fit_bigrams(split.tokens, split.source_offsets, size)
    for name, values in vars(pico_anchor.public).items():
        assert np.array_equal(values, getattr(again, name)), name
    assert len(again.keys) > 100


def test_a_token_outside_the_vocabulary_is_refused():
    with pytest.raises(DataError, match=r"Token id 40.*has 12.*anchor's tokenizer"):
        fit_table(np.array([40, EOS]), np.array([0, 2]), PUBLIC, EvidenceSettings())
