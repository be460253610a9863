"""Evidence tables and public statistics against plain counting."""

import math
import random
from collections import Counter

import numpy as np
import pytest

from flexolmo.errors import DataError
from flexolmo.model.statistics import (
    EvidenceSettings,
    PublicStatistics,
    cluster_tables,
    count_documents_with,
    describe_public,
    evidence_table,
    owner_table,
)

V, EOS = 12, 3


def make_stream(seed, num_documents=30, low=0, high=V - 2):
    """Tokens and document starts; ids below `high` but for the eos after each document."""
    rng = random.Random(seed)
    documents = [[rng.choice([v for v in range(low, high) if v != EOS])
                  for _ in range(rng.randint(1, 9))] for _ in range(num_documents)]
    tokens = np.array([v for d in documents for v in [*d, EOS]], dtype=np.uint16)
    offsets = np.cumsum([0] + [len(d) + 1 for d in documents]).astype(np.int64)
    return documents, tokens, offsets


def make_public(seed=0):
    _, tokens, _ = make_stream(seed, 100)
    counts = np.bincount(tokens, minlength=V)
    return PublicStatistics(counts, counts[None])


@pytest.mark.parametrize("settings", [
    EvidenceSettings(), EvidenceSettings(min_documents=1, smoothing=0.5, clip_nats=0.3),
    EvidenceSettings(min_documents=9)])
def test_an_owners_table_is_the_log_odds_of_its_shared_tokens(settings):
    public = make_public()
    documents, tokens, offsets = make_stream(1, 20)
    found = owner_table(tokens, offsets, public, settings, EOS)

    counts = Counter(int(t) for t in tokens)
    in_documents = Counter(v for d in documents for v in {*d, EOS})
    counts = {v: counts[v] for v in range(V) if in_documents[v] >= settings.min_documents}
    total = sum(counts.values())
    all_public = sum(int(c) + 1 for c in public.token_counts)
    for v in range(V):
        p_public = (int(public.token_counts[v]) + 1) / all_public
        own = (counts.get(v, 0) / total + settings.smoothing * p_public) / (1 + settings.smoothing)
        log_odds = math.log(own / p_public)
        wanted = 0.0 if v == EOS else max(-settings.clip_nats, min(settings.clip_nats, log_odds))
        assert found[v] == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    assert found.dtype == np.float32


def test_a_token_of_two_documents_looks_like_one_the_owner_never_used():
    """The table must not say that one or two documents hold a word."""
    public = make_public()
    plain = [[0, 1]] * 5
    tables = []
    for documents in ([*plain, [5, 5, 5], [5]], [*plain, [6, 6, 6], [6]]):
        tokens = np.array([v for d in documents for v in [*d, EOS]], dtype=np.uint16)
        offsets = np.cumsum([0] + [len(d) + 1 for d in documents])
        tables.append(owner_table(tokens, offsets, public, EvidenceSettings(), EOS))
    assert np.array_equal(*tables)


def test_an_owner_without_shared_tokens_gets_a_finite_table():
    public = make_public()
    table = owner_table(np.array([5, EOS]), np.array([0, 2]), public, EvidenceSettings(), EOS)
    assert np.isfinite(table).all()


def test_documents_with_a_token_are_counted_once_each():
    documents, tokens, offsets = make_stream(2)
    found = count_documents_with(tokens, offsets, V)
    assert found.tolist() == [sum(v in {*d, EOS} for d in documents) for v in range(V)]


def test_public_frequencies_give_every_token_a_share():
    frequencies = make_public().frequencies
    assert frequencies.sum() == pytest.approx(1)
    assert (frequencies > 0).all()


def test_clusters_part_public_text_of_two_kinds():
    kinds = [make_stream(seed, 400, *bounds)[1] for seed, bounds in ((0, (0, 5)), (1, (5, 10)))]
    pieces = [kind[i * 100:(i + 1) * 100] for i in range(15) for kind in kinds]
    stream = np.concatenate([*pieces, kinds[0][:50]])
    found = describe_public(stream, V, num_clusters=2, piece_tokens=100)
    assert np.array_equal(found.token_counts, np.bincount(stream, minlength=V))
    expected = {tuple(np.bincount(np.concatenate(pieces[k::2]), minlength=V)) for k in (0, 1)}
    assert {tuple(c) for c in found.cluster_counts} == expected
    tables = cluster_tables(found, EvidenceSettings(), EOS)
    for table, counts in zip(tables, found.cluster_counts, strict=True):
        assert np.array_equal(table, evidence_table(counts, found, EvidenceSettings(), EOS))
    again = describe_public(stream, V, num_clusters=2, piece_tokens=100)
    assert np.array_equal(found.cluster_counts, again.cluster_counts)


def test_too_little_public_text_is_one_cluster():
    _, stream, _ = make_stream(0, 30)
    found = describe_public(stream, V, num_clusters=2, piece_tokens=20)
    assert np.array_equal(found.cluster_counts, found.token_counts[None])
    table = cluster_tables(found, EvidenceSettings(), EOS)
    used = found.token_counts > 0
    assert np.abs(table[0, used]).max() < 0.2  # public text says nothing against itself


def test_the_pico_anchor_has_two_clusters(pico_anchor):
    assert len(pico_anchor.public.cluster_counts) == 2


def test_a_token_outside_the_vocabulary_is_refused():
    with pytest.raises(DataError, match=r"Token id 40.*has 12.*anchor's tokenizer"):
        owner_table(np.array([40, EOS]), np.array([0, 2]), make_public(), EvidenceSettings(), EOS)
