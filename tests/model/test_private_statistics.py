"""The noised table: what one document can move, how much noise that takes, what follows from it."""

import inspect
import math
import random

import dp_accounting
import numpy as np
import opendp.prelude as dp
import pytest
import torch
from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from flexolmo.errors import DataError
from flexolmo.model import private_statistics as room
from flexolmo.model.private_statistics import (
    LEAST_PAIR,
    draw_normals,
    find_sigma,
    read_noised,
    sum_documents,
    tabulate,
)
from flexolmo.model.statistics import (
    BigramModel,
    EvidenceSettings,
    fit_bigrams,
    fit_table,
    table_problems,
)

V = 12
PLENTY = settings(derandomize=True, max_examples=60, deadline=None)
DOCUMENT = st.lists(st.integers(0, V - 1), max_size=8) | st.builds(
    lambda ids, times: ids * times, st.lists(st.integers(0, V - 1), max_size=2), st.integers(0, 400)
)
DOCUMENTS = st.lists(DOCUMENT, max_size=8)
EPSILONS = st.floats(math.log(0.01), math.log(50)).map(math.exp)
DELTAS = st.floats(math.log(1e-10), math.log(1e-3)).map(math.exp)


def stream_of(documents):
    """Tokens and document starts; no end-of-text, so that nothing but `offsets` parts documents."""
    tokens = np.array([v for d in documents for v in d], dtype=np.uint16)
    return tokens, np.cumsum([0, *map(len, documents)]).astype(np.int64)


def draw_documents(seed, count, favoured=0):
    rng = random.Random(seed)
    favour = [1 + 6 * (v == favoured) for v in range(V)]
    return [rng.choices(range(V), favour, k=rng.randint(5, 30)) for _ in range(count)]


PUBLIC = fit_bigrams(*stream_of(draw_documents(0, 200)), V)


def sum_of(documents, public=PUBLIC):
    return sum_documents(*stream_of(documents), public)


# --- what one document can move -----------------------------------------------------------------


@given(documents=DOCUMENTS, new=DOCUMENT, place=st.integers(0, 8))
@PLENTY
def test_one_document_more_moves_the_sum_by_one(documents, new, place):
    """Wherever it stands and however long or repetitive it is; an empty one moves nothing."""
    more = [*documents[:place], new, *documents[place:]]
    moved = np.linalg.norm(sum_of(more) - sum_of(documents))
    assert moved == pytest.approx(1.0 if new else 0.0, abs=room.ROUNDING / 10)
    # and by its own vector, whatever the others are
    np.testing.assert_allclose(sum_of(more) - sum_of(documents), sum_of([new]), atol=1e-9)


def test_keys_and_weights_are_of_public_text_alone():
    """A pair that public text lacks is no key, nor is one that is rare there."""
    found = sum_of([[0, 0, 5, 3, 7]])
    shares = np.exp(PUBLIC.unigram[PUBLIC.keys // V].astype(float) + PUBLIC.log_probs)
    assert len(found) == V + (shares >= LEAST_PAIR).sum()
    empty = np.zeros(0)
    alone = BigramModel(PUBLIC.unigram, PUBLIC.backoff, empty.astype(int), empty)
    assert len(sum_of([[0, 0, 5]], alone)) == V
    by_hand = np.array([2.0, 1.0]) / np.sqrt(np.exp(PUBLIC.unigram[[0, 5]].astype(float)))
    np.testing.assert_allclose(
        sum_of([[0, 0, 5]], alone)[[0, 5]], by_hand / np.linalg.norm(by_hand), rtol=1e-6
    )
    with pytest.raises(DataError, match="vocabulary has 12"):
        sum_of([[V]])


# --- how much noise that takes ------------------------------------------------------------------


def lost_by_integral(epsilon, sigma):
    """delta of N(0, sigma^2) against N(1, sigma^2), from the definition: of max(0, p - e^eps q)."""
    most = 0.5 - epsilon * sigma**2  # where p is e^eps q; p is larger below
    x = np.linspace(min(most, 0.0) - 40 * sigma, most, 400_001)
    p = np.exp(-0.5 * (x / sigma) ** 2)
    q = np.exp(epsilon - 0.5 * ((x - 1.0) / sigma) ** 2)
    return np.trapezoid(p - q, x) / (sigma * math.sqrt(2 * math.pi))


@given(epsilon=EPSILONS, delta=DELTAS)
@PLENTY
def test_noise_is_enough_by_the_definition_and_hardly_more(epsilon, delta):
    sigma = find_sigma(epsilon, delta)
    assert lost_by_integral(epsilon, sigma) <= delta * (1 + 1e-4)
    assert lost_by_integral(epsilon, sigma * 0.999) > delta


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 1.0, 2.0, 8.0, 50.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-6, 1e-3])
def test_two_other_libraries_find_the_same_noise_enough(epsilon, delta):
    sigma = find_sigma(epsilon, delta)
    exact = GaussianPrivacyLoss(sigma)  # Google's, in closed form
    assert exact.get_delta_for_epsilon(epsilon) <= delta * (1 + 1e-9)
    assert GaussianPrivacyLoss(sigma * 0.9999).get_delta_for_epsilon(epsilon) > delta
    accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=epsilon / 1e4)
    accountant.compose(dp_accounting.GaussianDpEvent(sigma))
    assert epsilon * 0.999 <= accountant.get_epsilon(delta) <= epsilon * 1.001
    # OpenDP's passes through zero-concentrated privacy, which is never less
    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T=float, nan=False)), dp.l2_distance(T=float)
    bound = dp.c.make_zCDP_to_approxDP(dp.m.make_gaussian(*space, scale=sigma)).map(1.0)
    assert epsilon * (1 - 1e-6) <= bound.epsilon(delta) <= 1.3 * epsilon + 0.01


# --- where noise comes from ---------------------------------------------------------------------


def test_noise_is_normal_and_no_seed_gives_it_again():
    """Fails by chance once in a million runs."""
    drawn = []
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        drawn.append(draw_normals(100_000))
    assert not (drawn[0] == drawn[1]).any()
    both = np.concatenate(drawn)
    assert np.isfinite(both).all()
    assert kstest(both, "norm").pvalue > 1e-6 / 2
    assert kstest(both**2, "chi2", args=(1,)).pvalue > 1e-6 / 2


def test_tables_of_one_text_differ():
    """Fails by chance once in 10^7 runs: a level is the same in two tables with a chance of about
    0.4, and has to be in all three, for all 12 tokens."""
    documents = stream_of(draw_documents(1, 200, 4))
    asked = EvidenceSettings(epsilon=1.0, level_nats=0.1)
    tables = {tabulate(*documents, PUBLIC, asked).token_levels.tobytes() for _ in range(3)}
    assert len(tables) > 1


# --- what follows from the noised sum -----------------------------------------------------------


def test_nothing_but_the_noised_sum_reaches_the_table():
    """Two texts whose noised sums are one have one table, however many documents each has."""
    assert list(inspect.signature(read_noised).parameters) == [
        "noised",
        "sigma",
        "public",
        "settings",
    ]
    asked = EvidenceSettings(epsilon=2.0)
    sigma = find_sigma(asked.epsilon, asked.delta)
    few, many = (draw_documents(1, 40, 4), draw_documents(2, 300, 7))
    target = sum_of(few) + sigma * np.random.default_rng(0).standard_normal(len(sum_of(few)))
    tables = [
        tabulate(*stream_of(found), PUBLIC, asked, lambda n, s=exact: (target - s) / sigma)
        for found, exact in ((few, sum_of(few)), (many, sum_of(many)))
    ]
    for part in ("token_levels", "keys", "pair_levels"):
        np.testing.assert_array_equal(*(getattr(t, part) for t in tables))


@given(
    documents=DOCUMENTS,
    seed=st.integers(0, 5),
    asked=st.builds(
        EvidenceSettings,
        epsilon=EPSILONS,
        level_nats=st.sampled_from([0.1, 0.5, 5.0]),
        public_order=st.sampled_from([0.0, 0.6, 1.0]),
    ),
    scale=st.sampled_from([0.0, 1.0, 1e3]),
)
@PLENTY
def test_a_noised_table_is_one_that_a_coordinator_admits(documents, seed, asked, scale):
    """Whatever the text and the noise; it tells of every token."""
    noise = np.random.default_rng(seed)
    table = tabulate(
        *stream_of(documents), PUBLIC, asked, lambda n: scale * noise.standard_normal(n)
    )
    assert table.is_told.all()
    assert table_problems(table, PUBLIC, asked) == []


def test_little_noise_leaves_what_the_text_says():
    """Of documents of about one length, levels are those of the exact table."""
    documents = stream_of(draw_documents(1, 3000, 4))
    asked = EvidenceSettings(epsilon=50.0, min_documents=1, most_per_document=1000)
    noised = tabulate(*documents, PUBLIC, asked, np.random.default_rng(0).standard_normal)
    exact = fit_table(*documents, PUBLIC, asked)
    assert np.abs(noised.token_levels - exact.token_levels).max() <= 1
    assert noised.token_levels[4] > 0 > noised.token_levels[0]


def test_much_noise_leaves_public_text():
    """Nothing is then told: all levels are 0 and no pair is listed. That noise alone looks like
    text has a chance of 1 in 700, and of 1 in 10^5 twice or more in 20."""
    documents = stream_of(draw_documents(1, 20, 4))
    asked = EvidenceSettings(epsilon=0.01)
    noise = np.random.default_rng(0)
    tables = [tabulate(*documents, PUBLIC, asked, noise.standard_normal) for _ in range(20)]
    assert sum(bool(t.token_levels.any() or len(t.keys)) for t in tables) <= 1


def test_without_an_epsilon_there_is_no_noise():
    documents = stream_of(draw_documents(1, 40))
    asked = EvidenceSettings(min_documents=3)
    one, other = tabulate(*documents, PUBLIC, asked), fit_table(*documents, PUBLIC, asked)
    for part in ("token_levels", "keys", "pair_levels"):
        np.testing.assert_array_equal(getattr(one, part), getattr(other, part))
