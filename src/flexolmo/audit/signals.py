"""Signals of membership, token by token, from the predictions of a model and of its reference.

Knows nothing of documents, experts or files.

T positions, V vocabulary.
"""

import math
import zlib
from dataclasses import dataclass

from torch import Tensor

LOWEST = 0.2  # share of the tokens that Min-K%++ takes


@dataclass(frozen=True)
class Signals:
    """Signals at each token of a text, float64 [T]."""

    log_prob: Tensor  # nats
    surprise: Tensor  # log_prob in deviations of the prediction: (log p(x) - mean) / deviation
    ratio: Tensor | None  # log_prob less the reference's, in nats; None without a reference
    information: Tensor | None  # InfoRMIA in nats; None without a reference


def signals_of(log_probs: Tensor, reference: Tensor | None, targets: Tensor) -> Signals:
    """Signals at `targets` [T], by the log-probabilities [T,V] of the model and of the reference.

    With p the model's and q the reference's prediction of the next token: InfoRMIA is
    log p(x)/q(x) + KL(q || p), the gain of information at x over its mean for a text that the
    reference would write. Min-K%++ normalises log p(x) by mean and deviation of log p under p.
    Source: arXiv 2510.05582, with the vocabulary as population; arXiv 2404.02936, equation 3.
    """
    own = _pick(log_probs, targets)
    chances = log_probs.exp()
    mean = (chances * log_probs).sum(-1)
    deviation = (chances * (log_probs - mean[:, None]) ** 2).sum(-1).sqrt()
    surprise = (own - mean) / deviation.clamp(min=1e-6)  # of a certain prediction nearly none
    if reference is None:
        return Signals(own.double(), surprise.double(), None, None)
    ratio = (own - _pick(reference, targets)).double()
    divergence = (reference.exp() * (reference - log_probs)).sum(-1)
    return Signals(own.double(), surprise.double(), ratio, ratio + divergence.double())


def scores_of(signals: Signals, text: str) -> dict[str, float]:
    """Scores of a document by attack, each higher for a document that is rather a member.

    loss: mean log-probability. zlib: log-probability over the bytes that zlib makes of the text
    (arXiv 2012.07805). min_k: mean of the lowest fifth of Min-K%++. ratio: mean log-probability
    less the reference's. informia: mean of InfoRMIA.
    """
    lowest = max(1, math.ceil(LOWEST * len(signals.surprise)))
    found = {
        "loss": float(signals.log_prob.mean()),
        "zlib": float(signals.log_prob.sum()) / len(zlib.compress(text.encode())),
        "min_k": float(signals.surprise.sort().values[:lowest].mean()),
    }
    if signals.ratio is not None and signals.information is not None:
        found["ratio"] = float(signals.ratio.mean())
        found["informia"] = float(signals.information.mean())
    return found


def _pick(log_probs: Tensor, targets: Tensor) -> Tensor:
    """The log-probability [T] of each target."""
    return log_probs.gather(-1, targets[:, None])[:, 0]
