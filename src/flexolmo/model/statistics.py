"""Token statistics of public text and of an owner's, for the router.

NumPy only. The public model, a bigram model that backs off, travels with the anchor. An owner's
table says of tokens and pairs that enough of its documents hold by how much they are likelier there
than in public text, in coarse steps; what it says of all others follows from the public model.

V vocabulary, n bigrams, N tokens.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from flexolmo.config import Settings
from flexolmo.errors import DataError

UNTOLD = -128  # level of a token that too few documents hold
MOST_LEVELS = 100  # that a level may be from 0
MOST_LISTED = 0.98  # of the probability after a token, that the pairs told of may have
LEAST_LEFT = 1e-4  # of it, over which the rest is spread
PUBLIC_DOCUMENTS = 3  # in which public text must hold a token or bigram to count as present
PUBLIC_STEPS = {"level_nats": 0.5, "smoothing": 0.001}  # of anchors' tables, in whatever release
OWNERS_CHOICE = ("epsilon", "delta")  # settings in which owners of one mixture may differ


class EvidenceSettings(Settings):
    """Settings of the evidence router: how text is summarised and evidence added up.

    Everyone who trains for one mixture must use the same, but for OWNERS_CHOICE. Source: ours.
    """

    is_strict: ClassVar[bool] = True  # taking an owner out takes out all of its influence

    kind: Literal["evidence"] = "evidence"
    version: Literal[3] = Field(
        3,
        description="Version of the arithmetic from tables to weights; experts "
        "trained under another version do not fit.",
    )
    switch_rate: float = Field(
        0.02, gt=0, lt=1, description="Chance, per token, that the text turns to another domain."
    )
    tempering: float = Field(
        0.35,
        gt=0,
        le=1,
        description="Factor on each token's evidence, as tokens of one text are not independent.",
    )
    clip_nats: float = Field(5.0, gt=0, description="Largest evidence one token may give, in nats.")
    min_weight: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Least weight at a token with which an expert is run there; one always is.",
    )
    min_documents: int = Field(
        20,
        ge=1,
        description="Source documents that a token or bigram must be in for an owner's bundle to "
        "tell of it: whole ones as their owner gave them, of which texts of the same words, or of "
        "one unit (data prepare --unit-field), count once. With epsilon this rules embedding and "
        "head alone, whose rows stay the anchor's for tokens of fewer documents.",
    )
    most_per_document: int = Field(
        10,
        ge=1,
        description="Times that a token or bigram counts in one source document, at most. With "
        "epsilon all count, for what a document weighs in all is bounded then.",
    )
    level_nats: float = Field(
        0.5,
        ge=0.1,
        le=5,
        description="Steps in which an owner's bundle tells of log-probabilities, in nats, so that "
        "no count can be worked out.",
    )
    smoothing: float = Field(
        0.001,
        gt=0,
        lt=1,
        description="Frequency of tokens that the bundle does not tell of, as a fraction of public "
        "text's.",
    )
    discount: float = Field(
        0.75,
        gt=0,
        lt=1,
        description="Amount taken from each bigram's count for bigrams never seen.",
    )
    public_order: float = Field(
        0.6,
        ge=0,
        le=1,
        description="Power of public text's preference for a pair, where the bundle tells of none: "
        "0 takes an owner's words as following one another by chance, 1 as in public text.",
    )
    epsilon: float | None = Field(
        None,
        gt=0,
        le=50,
        description="Differential privacy of the router's table: whether one source document is "
        "there changes the chance of any table by a factor of e^epsilon at most. None: no noise; "
        "what few documents hold is left out. It covers what the table tells, not the trained "
        "weights, nor which rows of embedding and head have moved, where min_documents rules. Each "
        "owner chooses its own. Another training or another router spends as much again.",
    )
    delta: float = Field(
        1e-6,
        ge=1e-12,
        le=1e-3,
        description="Chance with which that factor may be exceeded: well below one over the number "
        "of source documents. Each owner chooses its own.",
    )


def in_public_steps(settings: EvidenceSettings) -> EvidenceSettings:
    """`settings`, but with the steps in which an anchor's tables of public text are, whatever a
    mixture's owners agreed on."""
    return settings.model_copy(update=PUBLIC_STEPS)


@dataclass(frozen=True)
class BigramModel:
    """A back-off bigram model, as in an ARPA file; natural logarithms.

    log p(v | u) is `log_probs` where the bigram is listed, else backoff[u] + unigram[v].
    """

    unigram: np.ndarray  # float32 [V] log p(v)
    backoff: np.ndarray  # float32 [V] log of what the listed bigrams after u leave over
    keys: np.ndarray  # int64 [n] u * V + v, ascending
    log_probs: np.ndarray  # float32 [n]


@dataclass(frozen=True)
class OwnerTable:
    """Statistics that an owner's bundle tells of its text: log-probabilities over public text's, in
    steps of `level_nats`."""

    token_levels: np.ndarray  # int8 [V] of p(v); UNTOLD: too few documents hold it
    keys: np.ndarray  # int64 [n] u * V + v, ascending
    pair_levels: np.ndarray  # int8 [n] of p(v | u)

    @property
    def is_told(self) -> np.ndarray:
        """bool [V]: tokens that the table tells of."""
        return np.asarray(self.token_levels != UNTOLD)


@dataclass(frozen=True)
class Evidence:
    """An owner's log-probabilities over public text's, of all pairs; natural logarithms.

    Of a listed pair `pairs`; of any other, of tokens u and v, tokens[v] + contexts[u], less
    (1 - public_order) log p(v | u) / p(v) of public text.
    """

    tokens: np.ndarray  # float32 [V]
    contexts: np.ndarray  # float32 [V]
    pairs: np.ndarray  # float32 [n]


def fit_bigrams(tokens: np.ndarray, offsets: np.ndarray, vocab_size: int) -> BigramModel:
    """Counts of a public stream with absolute discounting.

    `offsets` [.] are where source documents start, and the end (`TokenSplit.source_offsets`).
    Tokens and bigrams in fewer than PUBLIC_DOCUMENTS of them count as absent. Frequencies get one
    pseudo-count each. Source: Ney, Essen and Kneser 1994; its use for routing is ours.
    """
    discount = EvidenceSettings().discount
    ids, document = read_stream(tokens, offsets, vocab_size)
    keys, counts, holders = _count(ids, document)
    common = holders >= PUBLIC_DOCUMENTS
    frequencies = np.ones(vocab_size)
    frequencies[keys[common]] += counts[common]
    frequencies /= frequencies.sum()

    pairs, counts, holders = _count(ids[:-1] * vocab_size + ids[1:], document[1:])
    after = np.bincount(pairs // vocab_size, weights=counts, minlength=vocab_size)  # [V]
    common = holders >= PUBLIC_DOCUMENTS
    pairs, counts = pairs[common], counts[common] - discount
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


def fit_table(
    tokens: np.ndarray, offsets: np.ndarray, public: BigramModel, settings: EvidenceSettings
) -> OwnerTable:
    """The table of an owner's stream, source documents at `offsets` as in `fit_bigrams`.

    It tells of what at least `min_documents` hold, each counting at most `most_per_document`
    times; any other token or pair might be another, for all that it says. A pair is of the document
    that its second token is of. Source: ours.
    """
    vocab_size = len(public.unigram)
    ids, document = read_stream(tokens, offsets, vocab_size)

    def told(keys: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, ...]:
        keys, counts, holders = _count(keys, where, settings.most_per_document)
        return keys, counts, holders >= settings.min_documents

    def levels(
        counts: np.ndarray, totals: np.ndarray | int, off: float, logs: np.ndarray
    ) -> np.ndarray:
        """Nearest levels, but none that counts of too few documents alone would have: the threshold
        itself must not tell the least counts."""
        steps = np.rint((np.log((counts - off) / totals) - logs) / settings.level_nats)
        least = np.log((settings.min_documents - off) / totals) - logs
        steps = np.maximum(steps, np.ceil(least / settings.level_nats + 0.5))
        return steps.clip(-MOST_LEVELS, MOST_LEVELS).astype(np.int8)

    keys, counts, is_told = told(ids, document)
    token_levels = np.full(vocab_size, UNTOLD, dtype=np.int8)
    shown = keys[is_told]
    logs = public.unigram[shown].astype(np.float64)
    token_levels[shown] = levels(counts[is_told], max(int(counts.sum()), 1), 0.0, logs)
    pairs, counts, is_told = told(ids[:-1] * vocab_size + ids[1:], document[1:])
    after = np.bincount(pairs // vocab_size, weights=counts, minlength=vocab_size)  # [V]
    pairs, counts = pairs[is_told], counts[is_told]
    pair_levels = levels(
        counts, after[pairs // vocab_size], settings.discount, log_probs(public, pairs)
    )
    return OwnerTable(token_levels, pairs, pair_levels)


def count_tokens(
    tokens: np.ndarray, offsets: np.ndarray, vocab_size: int, most_per_document: int
) -> np.ndarray:
    """Counts [V] of a stream's tokens as `fit_table` counts them, told of or not."""
    keys, counts, _ = _count(*read_stream(tokens, offsets, vocab_size), most_per_document)
    found = np.zeros(vocab_size, dtype=np.int64)
    found[keys] = counts
    return found


def log_probs(public: BigramModel, keys: np.ndarray) -> np.ndarray:
    """log p(v | u) of pairs [n], float64."""
    first, second = keys // len(public.unigram), keys % len(public.unigram)
    found = public.backoff[first].astype(np.float64) + public.unigram[second]
    if not len(public.keys):
        return found
    place = np.searchsorted(public.keys, keys).clip(max=len(public.keys) - 1)
    return np.where(public.keys[place] == keys, public.log_probs[place], found)


def weigh_evidence(table: OwnerTable, public: BigramModel, settings: EvidenceSettings) -> Evidence:
    """Evidence from a table, such that after any token the owner's probabilities, which are
    public's times exp(evidence), sum to at most 1, whatever a table without `table_problems`
    claims. Source: ours.

    A pair that is not listed has public's probability to the power of `public_order`, times what
    its token's level says, times what makes the sum right.
    """
    size, power = len(public.unigram), settings.public_order
    tokens = np.where(
        table.is_told, table.token_levels * settings.level_nats, np.log(settings.smoothing)
    )
    unigram = np.exp(public.unigram.astype(np.float64))
    own = unigram * np.exp(tokens)  # [V]
    backoff = public.backoff.astype(np.float64)

    def spread(keys: np.ndarray, logs: np.ndarray) -> np.ndarray:
        """Weights [n] of unlisted pairs in public text's order, before the sum is made right."""
        second = keys % size
        return np.asarray(own[second] * np.exp(power * (logs - public.unigram[second])))

    def after(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Sums [V] by first token."""
        return np.bincount(keys // size, values, size)

    total = np.exp(power * backoff) * (own.sum() - after(public.keys, own[public.keys % size]))
    total += after(public.keys, spread(public.keys, public.log_probs.astype(np.float64)))
    logs = log_probs(public, table.keys)
    pairs = table.pair_levels * settings.level_nats
    listed = after(table.keys, np.exp(logs + pairs))
    too_much = np.minimum(0.0, np.log(MOST_LISTED) - np.log(np.maximum(listed, 1e-300)))  # [V]
    pairs = pairs + too_much[table.keys // size]
    listed = np.minimum(listed, MOST_LISTED)
    total = np.maximum(total - after(table.keys, spread(table.keys, logs)), LEAST_LEFT)
    contexts = np.log(1.0 - listed) - np.log(total)
    return Evidence(*(x.astype(np.float32) for x in (tokens, contexts, pairs)))


def evidence_of_pairs(
    table: OwnerTable,
    evidence: Evidence,
    public: BigramModel,
    settings: EvidenceSettings,
    keys: np.ndarray,
) -> np.ndarray:
    """Evidence of the second token of pairs [n], float64 [n], not clipped."""
    size = len(public.unigram)
    first, second = keys // size, keys % size
    preference = log_probs(public, keys) - public.unigram[second]
    found = evidence.tokens[second].astype(np.float64) + evidence.contexts[first]
    found -= (1.0 - settings.public_order) * preference
    if not len(table.keys):
        return found
    place = np.searchsorted(table.keys, keys).clip(max=len(table.keys) - 1)
    return np.where(table.keys[place] == keys, evidence.pairs[place], found)


def are_bigram_keys(keys: np.ndarray, vocab_size: int) -> bool:
    """True if `keys` [n] are pairs of token ids, ascending, as a `BigramModel` has them."""
    return not len(keys) or bool(
        (keys[1:] > keys[:-1]).all() and keys[0] >= 0 and keys[-1] < vocab_size**2
    )


def table_problems(table: OwnerTable, public: BigramModel, settings: EvidenceSettings) -> list[str]:
    """A line for each way in which `table` is none that `fit_table` gives.

    Its probabilities, of all tokens and of the pairs after any token, sum to 1 or less but for
    what levels round up, one and a half at most. Source: ours.
    """
    size = len(public.unigram)
    if not are_bigram_keys(table.keys, size):
        return ["pairs are not ascending pairs of token ids"]
    lines = []
    levels = np.concatenate([table.token_levels[table.is_told], table.pair_levels])
    if len(levels) and (most := int(np.abs(levels.astype(np.int64)).max())) > MOST_LEVELS:
        lines.append(f"found a level of {most} from 0, expected at most {MOST_LEVELS}")
    untold = ~table.is_told[table.keys // size] | ~table.is_told[table.keys % size]
    if untold.any():
        key = int(table.keys[untold][0])
        lines.append(
            f"tells of token {key % size} after {key // size}, but not of both tokens alone"
        )
    most_sum = float(np.exp(1.5 * settings.level_nats)) + 1e-3
    with np.errstate(over="ignore"):
        own = np.exp(public.unigram + table.token_levels * settings.level_nats)
        probs = np.exp(log_probs(public, table.keys) + table.pair_levels * settings.level_nats)
    total = float(own[table.is_told].sum())
    if total > most_sum:
        lines.append(f"token probabilities sum to {total:g}, expected at most {most_sum:.2f}")
    sums = np.bincount(table.keys // size, probs, size)
    if sums.max(initial=0) > most_sum:
        worst = int(sums.argmax())
        lines.append(
            f"probabilities after token {worst} sum to {sums[worst]:g}, expected at most "
            f"{most_sum:.2f}"
        )
    return lines


def read_stream(
    tokens: np.ndarray, offsets: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [N] and the number of each one's source document [N]; DataError for an id outside."""
    ids = np.asarray(tokens, dtype=np.int64)
    if len(ids) and int(ids.max()) >= vocab_size:
        raise DataError(
            f"Token id {int(ids.max())} found, but the anchor's vocabulary has "
            f"{vocab_size}: prepare the set with the anchor's tokenizer."
        )
    return ids, np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def _count(
    keys: np.ndarray, document: np.ndarray, most: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct keys, how often each occurs, at most so often a document, and in how many; documents
    are in ascending order."""
    if not len(keys):
        return keys, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    order = keys.argsort(kind="stable")  # documents stay in their order
    keys, document = keys[order], document[order]
    is_first = np.concatenate([[True], keys[1:] != keys[:-1]])
    is_new = is_first | np.concatenate([[True], document[1:] != document[:-1]])
    starts = np.flatnonzero(is_new)  # of a key in a document
    counts = np.diff(np.append(starts, len(keys)))
    if most is not None:
        counts = np.minimum(counts, most)
    keys = keys[starts]
    starts = np.flatnonzero(is_first[starts])  # of a key
    return keys[starts], np.add.reduceat(counts, starts), np.diff(np.append(starts, len(keys)))
