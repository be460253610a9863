"""Probability that sampling writes a given text, and the attempts that an attacker needs.

A text need not be sampled to know how likely it is to be sampled: one pass over it, with each next
token's probability as top-k, top-p and temperature change it, gives the product. Source:
(n,p)-discoverable extraction, arXiv 2410.19482.

T positions, V vocabulary, n documents.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexolmo.audit.intervals import share
from flexolmo.inference.sampling import Sampling

PROBABILITIES = (0.1, 0.5, 0.9, 0.99)  # p: chances of success
ATTEMPTS = tuple(10**i for i in range(10))  # n


def sampled_log_probs(logits: Tensor, targets: Tensor, sampling: Sampling) -> Tensor:
    """Log-probability, float64 [T], that `sampling` chooses each of `targets` from logits [T,V].

    Minus infinity for a token that it never chooses. What is kept is what
    `inference.decode.choose_tokens` keeps.
    """
    logits = logits.double()
    targets = targets[:, None]
    if sampling.temperature == 0:
        is_likeliest = logits.argmax(-1, keepdim=True) == targets
        return torch.zeros(len(logits)).double().where(is_likeliest[:, 0], -math.inf)
    chances = (logits / sampling.temperature).softmax(-1)
    vocab_size = logits.shape[1]
    top_k = min(sampling.top_k or vocab_size, vocab_size)
    own = chances.gather(1, targets)  # [T,1]
    ids = torch.arange(vocab_size)
    comes_before = (chances > own) | ((chances == own) & (ids < targets))  # ties by id
    is_kept = (comes_before.sum(-1) < top_k) & ((chances * comes_before).sum(-1) < sampling.top_p)
    likeliest = chances.topk(top_k).values
    before = likeliest.cumsum(-1) - likeliest
    total = (likeliest * (before < sampling.top_p)).sum(-1)
    return (own[:, 0] / total).log().where(is_kept, -math.inf)


def attempts_needed(log_probs: np.ndarray, p: float) -> np.ndarray:
    """Samples that an attacker must draw to see each text with probability `p`, float64 [n]:
    log(1 - p) / log(1 - p_z), at least 1; infinite for a text that is never sampled."""
    with np.errstate(divide="ignore"):
        return np.maximum(1.0, math.log1p(-p) / np.log1p(-np.exp(log_probs)))


def discoverable_curves(log_probs: np.ndarray) -> dict[str, Any]:
    """Share of texts that are (n,p)-discoverable, with intervals, by p and over n; and the share
    expected among `n` samples of each, which no sampling was needed for."""
    chances = np.exp(log_probs)
    with np.errstate(divide="ignore"):
        written = [-np.expm1(n * np.log1p(-chances)) for n in ATTEMPTS]
    return {
        "attempts": list(ATTEMPTS),
        "discoverable": {
            f"{p:g}": [share(attempts_needed(log_probs, p) <= n) for n in ATTEMPTS]
            for p in PROBABILITIES
        },
        "expected": [float(w.mean()) for w in written],
    }
