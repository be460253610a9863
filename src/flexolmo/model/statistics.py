"""Token statistics: what the anchor says of public text, and an owner's evidence against it.

NumPy only. The public statistics travel with the anchor; an owner computes its evidence table
from its own counts and these, in its own house.

V vocabulary, R clusters, n documents.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy.cluster.vq import kmeans2

from flexolmo.errors import DataError


class EvidenceSettings(BaseModel):
    """The evidence router: how token counts become a table, and how a text's evidence adds up.

    Everyone who trains for one mixture must use the same. Source: ours.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["evidence"] = "evidence"
    half_life_tokens: float = Field(
        128.0, gt=0, description="tokens after which evidence counts half")
    saturation_tokens: float = Field(
        16.0, gt=0, description="evidence of n tokens counts as n / (1 + n / this): tokens of "
        "one document are not independent")
    smoothing: float = Field(
        0.001, gt=0, description="public text mixed into each owner's frequencies, as a fraction "
        "of the owner's token count")
    clip_nats: float = Field(5.0, gt=0, description="largest evidence one token may give, in nats")
    min_documents: int = Field(
        3, ge=1, description="tokens in fewer of the owner's stored documents than this count as "
        "absent; a long text is stored as several, of up to 50 kB")


@dataclass(frozen=True)
class PublicStatistics:
    """Token counts of the public set, whole and by cluster."""

    token_counts: np.ndarray  # int64 [V]
    cluster_counts: np.ndarray  # int64 [R,V]

    @property
    def frequencies(self) -> np.ndarray:
        """Public token frequencies with one pseudo-count each, float64 [V]."""
        counts = self.token_counts + 1.0
        return counts / counts.sum()


def count_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Occurrences of each id in `tokens`, int64 [V]."""
    if len(tokens) and int(tokens.max()) >= vocab_size:
        raise DataError(f"Token id {int(tokens.max())} found, but the anchor's vocabulary has "
                        f"{vocab_size}: prepare the set with the anchor's tokenizer.")
    return np.bincount(tokens, minlength=vocab_size).astype(np.int64)


def describe_public(tokens: np.ndarray, vocab_size: int, num_clusters: int = 16,
                    piece_tokens: int = 1000, seed: int = 0) -> PublicStatistics:
    """Counts of the public stream, and of the clusters that k-means finds in its pieces.

    Public text is broad: one average speaks for none of its parts. Pieces of `piece_tokens`
    consecutive tokens are clustered by the square roots of their frequencies (Hellinger).
    Source: ours.
    """
    counts = count_tokens(tokens, vocab_size)
    num_pieces = len(tokens) // piece_tokens
    if num_pieces < 8 * num_clusters or num_clusters < 2:  # too little text to tell clusters apart
        return PublicStatistics(counts, counts[None])
    pieces = np.stack([
        np.bincount(tokens[i * piece_tokens:(i + 1) * piece_tokens], minlength=vocab_size)
        for i in range(num_pieces)
    ])  # [pieces,V]
    _, label = kmeans2(np.sqrt(pieces / piece_tokens), num_clusters, minit="++", iter=20, seed=seed)
    clusters = [pieces[label == k].sum(0) for k in range(num_clusters) if (label == k).any()]
    return PublicStatistics(counts, np.stack(clusters).astype(np.int64))


def count_documents_with(tokens: np.ndarray, offsets: np.ndarray, vocab_size: int) -> np.ndarray:
    """In how many documents each id occurs, int64 [V]; `offsets` [n+1] are document starts."""
    found = np.zeros(vocab_size, dtype=np.int64)
    for start, end in pairwise(offsets):
        found[np.unique(tokens[start:end])] += 1
    return found


def evidence_table(counts: np.ndarray, public: PublicStatistics, settings: EvidenceSettings,
                   eos_id: int) -> np.ndarray:
    """log p(v) - log p_public(v) in nats, clipped, float32 [V]; zero for the end-of-text token."""
    frequencies = public.frequencies
    total = max(float(counts.sum()), 1.0)
    own = (counts + settings.smoothing * total * frequencies) / (total * (1 + settings.smoothing))
    table = np.clip(np.log(own) - np.log(frequencies), -settings.clip_nats, settings.clip_nats)
    table[eos_id] = 0.0
    return table.astype(np.float32)


def owner_table(tokens: np.ndarray, offsets: np.ndarray, public: PublicStatistics,
                settings: EvidenceSettings, eos_id: int) -> np.ndarray:
    """An owner's evidence table, float32 [V], from its training stream."""
    vocab_size = len(public.token_counts)
    counts = count_tokens(tokens, vocab_size)
    shared = count_documents_with(tokens, offsets, vocab_size) >= settings.min_documents
    return evidence_table(np.where(shared, counts, 0), public, settings, eos_id)


def cluster_tables(public: PublicStatistics, settings: EvidenceSettings,
                   eos_id: int) -> np.ndarray:
    """The public clusters' evidence tables, float32 [R,V]."""
    return np.stack([evidence_table(c, public, settings, eos_id) for c in public.cluster_counts])
