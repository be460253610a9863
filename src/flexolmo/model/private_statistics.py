"""An owner's table under differential privacy, which `router.epsilon` asks for.

NumPy only. What is protected is a source document of the prepared set: whether it is there changes
the chance of any table by a factor of e^epsilon at most, but for a chance of `delta`, whatever else
is known. Every document is a vector of length 1 over keys that public text alone decides; the sum
of these vectors gets Gaussian noise, once; all else is worked out from the noised sum. Texts of the
same words are one document. Noise is computed in floating point, whose last digits can tell of the
sum (Mironov 2012); they are never released, only levels of `level_nats` are.

V vocabulary, N tokens, n public pairs, m values, R log ratios.
"""

import math
import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from flexolmo.model.statistics import (
    MOST_LEVELS,
    MOST_LISTED,
    BigramModel,
    EvidenceSettings,
    OwnerTable,
    fit_table,
    log_probs,
    read_stream,
    weigh_evidence,
)

LEAST_PAIR = 1e-5  # share of public text that a pair must have to be a key
PAIR_WEIGHT = 0.3  # weight of pairs in a document's vector, that of tokens being 1
LEAST_TOTAL = 3.0  # sigmas of all tokens together, below which nothing can be told
SURE = 0.9  # chance that a pair is likelier, or rarer, than it follows from tokens, to be told of
LOG_RATIOS = np.arange(-20, 21) * 0.5  # [R] that values are weighed against, in nats
ROUNDS = 60  # in which the distribution of ratios is found
ROUNDING = 1e-9  # of a document's length, and of sigma, by which floating point may be off


def tabulate(
    tokens: np.ndarray,
    offsets: np.ndarray,
    public: BigramModel,
    settings: EvidenceSettings,
    draw: Callable[[int], np.ndarray] | None = None,
) -> OwnerTable:
    """The table that an owner's stream has under these settings: with an epsilon a noised one,
    another at every call; else that of `fit_table`.

    `draw` gives standard normal numbers, for tests; by default `draw_normals`.
    """
    if settings.epsilon is None:
        return fit_table(tokens, offsets, public, settings)
    exact = sum_documents(tokens, offsets, public)
    sigma = find_sigma(settings.epsilon, settings.delta)
    noised = exact + sigma * (draw or draw_normals)(len(exact))
    return read_noised(noised, sigma, public, settings)


def sum_documents(tokens: np.ndarray, offsets: np.ndarray, public: BigramModel) -> np.ndarray:
    """Sum [V+n] over source documents of their counts of keys, weighed and scaled to length 1.

    Keys are all tokens, and the pairs that make up at least LEAST_PAIR of public text. Weights are
    one over the root of a key's share of public text, which makes noise as large for a rare key as
    for a frequent one beside what public text leads to expect. Only pairs inside a document count,
    so a document that is added or removed moves the sum by its own vector: by 1, or, if it is
    empty, by 0. Source: ours.
    """
    vocab_size = len(public.unigram)
    ids, document = read_stream(tokens, offsets, vocab_size)
    pairs, weights, _ = _keys(public)
    size = len(weights)
    is_inside = document[1:] == document[:-1]
    found = (ids[:-1] * vocab_size + ids[1:])[is_inside]
    place = np.searchsorted(pairs, found)
    is_key = np.append(pairs, -1)[place] == found
    keys = np.concatenate([ids, vocab_size + place[is_key]])
    holders = np.concatenate([document, document[1:][is_inside][is_key]])
    both, counts = np.unique(holders * size + keys, return_counts=True)
    holders, keys = both // size, both % size
    values = counts * weights[keys]
    squares = np.bincount(holders, values**2)
    return np.bincount(keys, values / np.sqrt(squares[holders]), size)


def find_sigma(epsilon: float, delta: float) -> float:
    """Deviation of Gaussian noise that makes a sum of vectors of length 1 (epsilon, delta)-private.

    The least that does, but for rounding, which is always upwards. Source: Balle and Wang 2018
    (arXiv 1805.06530), theorem 8, for adding or removing one.
    """

    def is_enough(sigma: float) -> bool:
        middle = 0.5 / sigma
        shift = epsilon * sigma
        lost = _tail(shift - middle) - math.exp(epsilon) * _tail(shift + middle)
        return lost + 1e-15 <= delta  # more than rounding takes off

    high = 1.0
    while not is_enough(high):
        high *= 2.0
    low = high
    while is_enough(low):
        low /= 2.0
    while high - low > ROUNDING * high:
        middle = (low + high) / 2.0
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high * (1.0 + ROUNDING)


def draw_normals(count: int, read: Callable[[int], bytes] = os.urandom) -> np.ndarray:
    """Standard normal numbers [count] from the operating system's entropy, or from bytes that
    `read` gives.

    No seed gives them again, or who has it could take the noise off. Source: Box and Muller 1958.
    """
    words = np.frombuffer(read(16 * count), dtype=np.uint64).reshape(2, count)
    uniform = ((words >> np.uint64(11)) + 0.5) * 2.0**-53  # in (0, 1)
    return np.sqrt(-2.0 * np.log(uniform[0])) * np.cos(2.0 * np.pi * uniform[1])


def read_noised(
    noised: np.ndarray, sigma: float, public: BigramModel, settings: EvidenceSettings
) -> OwnerTable:
    """The table that follows from a noised sum [V+n] alone; `sigma` is the noise's deviation.

    It gives a level to every token, so that what noise hides counts as far as it can be known: the
    mean ratio to public text's probability, given the noised value and how ratios are distributed
    over all tokens. Pairs are held against what follows from their tokens, and listed where they
    are surely likelier or rarer, by a level at least. No pair is listed that is none of public
    text's keys. Where noise hides even how much text there is, all levels are 0. Source: ours; the
    distribution is that of Kiefer and Wolfowitz 1956.
    """
    size = len(public.unigram)
    pairs, weights, shares = _keys(public)
    nothing = np.zeros(0, dtype=np.int64)
    nothing_told = OwnerTable(np.zeros(size, np.int8), nothing, nothing.astype(np.int8))
    total = float((noised[:size] / weights[:size]).sum())  # its noise is of deviation sigma too
    if total < LEAST_TOTAL * sigma:
        return nothing_told
    expected = total * weights * shares  # [V+n] were it public text
    ratios, _ = _weigh_ratios(noised[:size], expected[:size], sigma)  # [V]
    ratios /= ratios @ shares[:size]
    levels = np.rint(np.log(ratios) / settings.level_nats).clip(-MOST_LEVELS, MOST_LEVELS)
    alone = replace(nothing_told, token_levels=levels.astype(np.int8))

    first = pairs // size
    second = pairs % size
    logs = log_probs(public, pairs)
    evidence = weigh_evidence(alone, public, settings)
    follows = evidence.tokens[second].astype(np.float64) + evidence.contexts[first]
    follows -= (1.0 - settings.public_order) * (logs - public.unigram[second])
    expected = expected[size:] * ratios[first] * np.exp(follows)  # [n]
    changes, sureness = _weigh_ratios(noised[size:], expected, sigma)
    changes = np.log(changes)
    is_listed = (sureness >= SURE) & (np.abs(changes) >= settings.level_nats)
    pairs, logs, first = pairs[is_listed], logs[is_listed], first[is_listed]
    found = (follows + changes)[is_listed]
    sums = np.bincount(first, np.exp(logs + found), size)  # [V]
    found -= np.log(np.maximum(sums / MOST_LISTED, 1.0))[first]
    pair_levels = np.rint(found / settings.level_nats).clip(-MOST_LEVELS, MOST_LEVELS)
    return OwnerTable(alone.token_levels, pairs, pair_levels.astype(np.int8))


def _keys(public: BigramModel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs [n] that are keys; weights and shares of public text [V+n] of all keys."""
    tokens = public.unigram.astype(np.float64)
    logs = tokens[public.keys // len(tokens)] + public.log_probs
    is_key = logs >= math.log(LEAST_PAIR)
    shares = np.exp(np.concatenate([tokens, logs[is_key]]))
    weights = 1.0 / np.sqrt(shares)
    weights[len(tokens) :] *= PAIR_WEIGHT
    return public.keys[is_key], weights, shares


def _weigh_ratios(
    values: np.ndarray, expected: np.ndarray, sigma: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean ratio to what is expected of each value [m], given its noise; and the chance that it is
    above 1, or below, whichever is larger.

    How ratios are distributed is found from the values themselves, by expectation maximisation.
    """
    ratios = np.exp(LOG_RATIOS)
    miss = (values[:, None] - expected[:, None] * ratios) / sigma  # [m,R]
    fit = -0.5 * miss**2
    fit = np.exp(fit - fit.max(1, keepdims=True))
    share = np.exp(-0.5 * (LOG_RATIOS / 1.5) ** 2)  # [R]
    share /= share.sum()
    for _ in range(ROUNDS):
        chance = fit * share
        chance /= chance.sum(1, keepdims=True)
        share = chance.mean(0) + 1e-9
        share /= share.sum()
    chance = fit * share
    chance /= chance.sum(1, keepdims=True)
    above = chance[:, LOG_RATIOS > 0].sum(1)
    below = chance[:, LOG_RATIOS < 0].sum(1)
    return chance @ ratios, np.maximum(above, below)


def _tail(x: float) -> float:
    """Chance that a standard normal number is above x."""
    return 0.5 * math.erfc(x / math.sqrt(2.0))
