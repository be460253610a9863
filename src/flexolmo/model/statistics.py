"""Token statistics: back-off bigram models of public text and of an owner's, for the router.

NumPy only. The public model travels with the anchor; an owner fits its own on its own machines.

V vocabulary, n bigrams, N tokens.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from flexolmo.config import Settings
from flexolmo.errors import DataError


class EvidenceSettings(Settings):
    """Settings of the evidence router: how text is summarised and evidence added up.

    Everyone who trains for one mixture must use the same. Source: ours.
    """

    is_strict: ClassVar[bool] = True  # taking an owner out takes out all of its influence

    kind: Literal["evidence"] = "evidence"
    version: Literal[2] = Field(
        2,
        description="Version of the arithmetic from tables to weights; experts "
        "trained under another version do not fit.",
    )
    switch_rate: float = Field(
        0.01, gt=0, lt=1, description="Chance, per token, that the text turns to another domain."
    )
    tempering: float = Field(
        0.35,
        gt=0,
        le=1,
        description="Factor on each token's evidence, as tokens of one text are not independent.",
    )
    clip_nats: float = Field(5.0, gt=0, description="Largest evidence one token may give, in nats.")
    smoothing: float = Field(
        0.001,
        gt=0,
        description="Public text mixed into each owner's frequencies, as a fraction "
        "of the owner's token count.",
    )
    discount: float = Field(
        0.75,
        gt=0,
        lt=1,
        description="Amount taken from each bigram's count for bigrams never seen.",
    )
    min_weight: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Least weight at a token with which an expert is run there; one always is.",
    )
    min_documents: int = Field(
        3,
        ge=1,
        description="Source documents that a token or bigram must be in to count as present: "
        "whole ones as their owner gave them, of which texts of the same words count once.",
    )


@dataclass(frozen=True)
class BigramModel:
    """A back-off bigram model, as in an ARPA file; natural logarithms.

    log p(v | u) is `log_probs` where the bigram is listed, else backoff[u] + unigram[v].
    """

    unigram: np.ndarray  # float32 [V] log p(v)
    backoff: np.ndarray  # float32 [V] log of what the listed bigrams after u leave over
    keys: np.ndarray  # int64 [n] u * V + v, ascending
    log_probs: np.ndarray  # float32 [n]


def fit_bigrams(
    tokens: np.ndarray,
    offsets: np.ndarray,
    vocab_size: int,
    settings: EvidenceSettings,
    public: BigramModel | None = None,
) -> BigramModel:
    """Counts of a training stream with absolute discounting.

    `offsets` [.] are where source documents start, and the end (`TokenSplit.source_offsets`).
    Tokens and bigrams in fewer than `min_documents` of them count as absent, so that no single
    document's wording shows, however long it is. Without `public` (the public model itself),
    frequencies get one pseudo-count each. Source: Ney, Essen and Kneser 1994; its use for routing
    is ours.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    if len(ids) and int(ids.max()) >= vocab_size:
        raise DataError(
            f"Token id {int(ids.max())} found, but the anchor's vocabulary has "
            f"{vocab_size}: prepare the set with the anchor's tokenizer."
        )
    document = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))  # [N]
    keys, counts, common = _count(ids, document, settings.min_documents)
    frequencies = np.zeros(vocab_size)
    frequencies[keys[common]] = counts[common]
    if public is None:
        frequencies += 1.0
    else:
        prior = np.exp(public.unigram.astype(np.float64))
        frequencies += settings.smoothing * max(len(ids), 1) * prior
    frequencies /= frequencies.sum()

    pairs, counts, common = _count(
        ids[:-1] * vocab_size + ids[1:], document[:-1], settings.min_documents
    )
    after = np.bincount(pairs // vocab_size, weights=counts, minlength=vocab_size)  # [V]
    pairs, counts = pairs[common], counts[common] - settings.discount
    listed = np.bincount(pairs // vocab_size, weights=counts, minlength=vocab_size)
    left = 1.0 - listed / np.maximum(after, 1.0)  # [V]
    first, second = pairs // vocab_size, pairs % vocab_size
    probs = counts / after[first] + left[first] * frequencies[second]
    return BigramModel(
        np.log(frequencies).astype(np.float32),
        np.log(left).astype(np.float32),
        pairs,
        np.log(probs).astype(np.float32),
    )


def are_bigram_keys(keys: np.ndarray, vocab_size: int) -> bool:
    """True if `keys` [n] are pairs of token ids, ascending, as a `BigramModel` has them."""
    return not len(keys) or bool(
        (keys[1:] > keys[:-1]).all() and keys[0] >= 0 and keys[-1] < vocab_size**2
    )


def table_problems(model: BigramModel) -> list[str]:
    """A line for each way in which `model` is no table of log-probabilities.

    Values lie between -1000 and 0, and the probabilities of all tokens, after any token, sum to 1
    within 1e-3. Source: ours.
    """
    logs = (model.unigram, model.backoff, model.log_probs)
    outside = [
        float(values[~((values >= -1000) & (values <= 1e-3))][0])
        for values in logs
        if not bool(((values >= -1000) & (values <= 1e-3)).all())
    ]
    if outside:
        return [f"found the log-probability {outside[0]:g}, expected -1000 to 0"]
    unigram = np.exp(model.unigram.astype(np.float64))  # [V]
    vocab_size = len(unigram)
    first, second = model.keys // vocab_size, model.keys % vocab_size
    listed = np.exp(model.log_probs.astype(np.float64))
    sums = np.bincount(first, listed, vocab_size)  # [V] of listed bigrams
    unlisted = unigram.sum() - np.bincount(first, unigram[second], vocab_size)  # [V]
    sums += np.exp(model.backoff.astype(np.float64)) * unlisted
    lines = []
    if abs(unigram.sum() - 1) > 1e-3:
        lines.append(f"token probabilities sum to {unigram.sum():g}, expected 1")
    worst = int(np.abs(sums - 1).argmax())
    if abs(sums[worst] - 1) > 1e-3:
        lines.append(f"probabilities after token {worst} sum to {sums[worst]:g}, expected 1")
    return lines


def _count(
    keys: np.ndarray, document: np.ndarray, min_documents: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct keys, how often each occurs, and whether in at least so many documents."""
    if not len(keys):
        return keys, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)
    order = np.lexsort((document, keys))
    keys, document = keys[order], document[order]
    is_first = np.concatenate([[True], keys[1:] != keys[:-1]])
    is_new = is_first | np.concatenate([[True], document[1:] != document[:-1]])
    starts = np.flatnonzero(is_first)
    counts = np.diff(np.append(starts, len(keys)))
    return keys[starts], counts, np.add.reduceat(is_new.astype(np.int64), starts) >= min_documents
