"""Rival ways to use several owners' models: soup, BTM, BTX's first merge, prompt routing.

The rivals are made of dense models, each the anchor or the anchor trained on whole by one owner.
Mixtures of models are mixtures of their distributions, so the log-probability that each model gave
to the token that really came is all that is needed of it. Weights at a position come from earlier
tokens only. Knows no files, no tokenizer, and no FlexOlmo mixture.

E dense models, T predicted tokens of one window, n texts, K top_k.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp, softmax
from torch import Tensor

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.errors import ConfigError, DataError, MergeError

Tensors = Mapping[str, Tensor]


def soup(
    models: Mapping[str, Tensors], weights: Mapping[str, float] | None = None
) -> dict[str, Tensor]:
    """The weighted mean of models' tensors, in their own dtype; summed in float64.

    `weights` are normalised; without them every model counts the same. A model of weight 0 leaves
    no trace; the order of the models does not matter. Raises MergeError when models differ in
    names, shapes or dtypes, or the weights do not fit.

    Source: paper §4.3, "model soup"; Wortsman et al. 2022 (arXiv 2203.05482).
    """
    _check_same_form(models)
    weights = dict.fromkeys(models, 1.0) if weights is None else weights
    if set(weights) != set(models):
        raise MergeError(
            f"Soup weights are for {', '.join(sorted(weights)) or 'no model'}, the "
            f"models are {', '.join(sorted(models))}; give one weight for each."
        )
    total = sum(sorted(weights.values()))
    if not (0 < total < math.inf and min(weights.values()) >= 0):
        raise MergeError(
            f"Soup weights {dict(weights)} found; they must be finite, non-negative "
            "and sum to more than 0."
        )
    shares = {n: weights[n] / total for n in sorted(models) if weights[n] > 0}
    mixed = {}
    for name, like in next(iter(models.values())).items():
        mean = torch.zeros(like.shape, dtype=torch.float64, device=like.device)
        for model, share in shares.items():
            mean += share * models[model][name].double()
        mixed[name] = mean.to(like.dtype)
    return mixed


def average_shared(
    dense: Mapping[str, Tensors], anchor: Tensors
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """BTX before its training: the mean of all that is not FFN, and every model's own FFN.

    First, each tensor without ".mlp." in its name, averaged over anchor and dense models; second,
    the ".mlp." tensors under their full names, by model, the anchor's as "public". BTX goes on to
    train these on public data. Raises MergeError as `soup` does.

    Source: paper §4.3; Sukhbaatar et al. 2024 (arXiv 2403.07816), with the seed model as an expert.
    """
    if PUBLIC in dense:
        raise MergeError(f'A dense model is called "{PUBLIC}", which names the anchor; rename it.')
    models = {PUBLIC: anchor, **dense}
    _check_same_form(models)
    frame = soup(
        {m: {n: t for n, t in tensors.items() if ".mlp." not in n} for m, tensors in models.items()}
    )
    ffns = {m: {n: t for n, t in tensors.items() if ".mlp." in n} for m, tensors in models.items()}
    return frame, ffns


def _check_same_form(models: Mapping[str, Tensors]) -> None:
    """Refuse models that differ in names, shapes or dtypes from the first."""
    if not models:
        raise MergeError("No model found; merging needs at least one.")
    (first, reference), *others = models.items()
    found = []
    for model, tensors in others:
        found += [f"{model} lacks {n}" for n in sorted(reference.keys() - tensors.keys())]
        found += [f"{model} has {n} besides" for n in sorted(tensors.keys() - reference.keys())]
        for name in sorted(reference.keys() & tensors.keys()):
            here, there = tensors[name], reference[name]
            if (here.shape, here.dtype) != (there.shape, there.dtype):
                found.append(
                    f"{name} is {here.dtype} {list(here.shape)} in {model}, "
                    f"{there.dtype} {list(there.shape)} in {first}"
                )
    if found:
        raise MergeError(
            f"Models that differ in form from {first} cannot be averaged; train all "
            f"from the same anchor: {'; '.join(found)}."
        )


def likelihood_weights(log_likelihood: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(log_likelihood / temperature), [E]: the weights of a weighted soup.

    log_likelihood [E] is in nats, of text before all that the soup is to predict. Source: paper
    §4.3, which scores the test input itself: there, weights saw what they predict.
    """
    _require(temperature > 0, f"temperature {temperature}", "above 0")
    return softmax(_checked(log_likelihood) / temperature)


def btm_weights(
    log_probs: np.ndarray,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    switch_rate: float = 0.0,
) -> np.ndarray:
    """The posterior over models before each token, [E,T]; columns sum to 1.

    log_probs [E,T] in nats. The prior is uniform, the likelihood p^(1 / temperature). After every
    token a share `switch_rate` (0 to 1) of all mass is spread evenly over the models, so that text
    may change domain; 0 is plain BTM. With top_k, only a column's K heaviest models keep weight
    (ties to the first), but every model still reads every token, to be ready to come back.

    Source: Li et al. 2022 (arXiv 2208.03306); paper §4.3, which takes the loss over the whole test
    input instead. Switching is ours, from the fixed share of Herbster & Warmuth 1998: they share
    among the *other* experts, here among all, so their rate is switch_rate * (E - 1) / E.
    """
    _require(temperature > 0, f"temperature {temperature}", "above 0")
    _require(0 <= switch_rate <= 1, f"switch_rate {switch_rate}", "0 to 1")
    _require(top_k is None or top_k >= 1, f"top_k {top_k}", "1 or more")
    log_probs = _checked(log_probs)
    if switch_rate == 0:
        weights = softmax(_evidence(log_probs)[:, :-1] / temperature, axis=0)  # [E,T]
    else:
        E, T = log_probs.shape
        likelihood = np.exp((log_probs - log_probs.max(axis=0)) / temperature)  # [E,T], best is 1
        weights = np.empty((E, T))
        now = np.full(E, 1 / E)
        for t in range(T):
            weights[:, t] = now
            now = now * likelihood[:, t]
            now = (1 - switch_rate) * now / now.sum() + switch_rate / E
    if top_k is not None:
        dropped = np.argsort(-weights, axis=0, kind="stable")[top_k:]
        np.put_along_axis(weights, dropped, 0.0, axis=0)
        weights /= weights.sum(axis=0)
    assert np.isfinite(weights).all()
    return weights


def btm_prefix_weights(
    log_probs: np.ndarray, *, prefix_tokens: int, top_k: int, temperature: float = 1.0
) -> np.ndarray:
    """BTM whose members are chosen once, so that only K models need to go on; [E,T].

    All models read the first `prefix_tokens` tokens and answer by their posterior. The K likeliest
    (ties to the first) go on, with a posterior among themselves; the others have weight 0 from
    there on, and their log_probs [E,T] are not read from there on and may be NaN. With a prefix of
    0 the first K models are taken blindly. Source: ours; the BTM that can be held to a mixture's
    FLOPs, see `prefix_for_budget`.
    """
    _require(temperature > 0, f"temperature {temperature}", "above 0")
    _require(prefix_tokens >= 0, f"prefix_tokens {prefix_tokens}", "0 or more")
    _require(top_k >= 1, f"top_k {top_k}", "1 or more")
    evidence = _evidence(_checked(log_probs))  # [E,T+1]
    prefix = min(prefix_tokens, evidence.shape[1] - 1)
    left_out = np.argsort(-evidence[:, prefix], kind="stable")[top_k:]
    evidence[left_out, prefix:] = -np.inf
    weights = softmax(evidence[:, :-1] / temperature, axis=0)
    assert np.isfinite(weights).all()
    return weights


def prefix_for_budget(T: int, num_experts: int, top_k: int, budget: float) -> int | None:
    """The longest prefix, in tokens, at which `btm_prefix_weights` keeps to `budget`.

    The budget is the mean number of dense models run per token: (prefix * E + (T - prefix) * K)
    / T. None when even a prefix of 0 exceeds it. Source: ours.
    """
    costs = ((p, (p * num_experts + (T - p) * top_k) / T) for p in range(T, -1, -1))
    return next((p for p, cost in costs if cost <= budget), None)


def mix_log_probs(log_probs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """log of the sum over models of weight * probability, in nats, [T]; both arguments [E,T].

    Where a weight is 0 the log-probability is not read. Source: Gururangan et al. 2023 (arXiv
    2303.14177), c-BTM; the paper (§4.3) combines logits.
    """
    assert (weights >= 0).all()
    return logsumexp(_checked(log_probs), axis=0, b=weights)


def _evidence(log_probs: np.ndarray) -> np.ndarray:
    """Log-likelihood of the tokens before each position and, last, of all; [E,T+1]."""
    return np.pad(np.cumsum(log_probs, axis=1), ((0, 0), (1, 0)))


def _checked(log_probs: np.ndarray) -> np.ndarray:
    """`log_probs` in float64, asserted not to be losses, with a margin for rounding."""
    assert not (log_probs > 1e-3).any(), "log-probabilities are at most 0"
    return log_probs.astype(np.float64)


def _require(is_fit: bool, found: str, expected: str) -> None:
    if not is_fit:
        raise ConfigError(f"{found} found; expected {expected}.")


def prompt_routing_weights(
    probabilities: np.ndarray, T: int, prompt_tokens: int, public_index: int
) -> np.ndarray:
    """One model answers alone, [E,T] of 0 and 1: public during the prompt, then the likeliest.

    probabilities [E] are of the first `prompt_tokens` tokens alone; ties go to the first. Source:
    paper §4.3, "prompt routing".
    """
    weights = np.zeros((len(probabilities), T))
    weights[public_index, :prompt_tokens] = 1
    weights[np.argmax(probabilities), prompt_tokens:] = 1
    return weights


@dataclass
class TextClassifier:
    """Logistic regression on TF-IDF of words and characters, with equal weight for each domain.

    A coordinator may not see owners' text: fit it on what a coordinator may see, such as text
    sampled from each released dense expert, or proxy data. Source: ours.
    """

    names: list[str]
    pipeline: Any  # a fitted scikit-learn Pipeline

    @classmethod
    def fit(cls, texts_by_name: Mapping[str, Sequence[str]]) -> "TextClassifier":
        """Learn from texts about as long as the prompts to come; nothing is drawn at random.

        `names` keeps the mapping's order. DataError: fewer than two domains, or one without text.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline, make_union

        names = list(texts_by_name)
        empty = [n for n in names if not any(text.strip() for text in texts_by_name[n])]
        if empty or len(names) < 2:
            raise DataError(
                f"No text found for {', '.join(empty)}; give some, or leave it out."
                if empty
                else f"{len(names)} domain found, at least 2 are needed."
            )
        shared: dict[str, Any] = {"sublinear_tf": True, "max_features": 200_000}
        words = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2), **shared)
        characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), **shared)
        regression = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000)
        pipeline = make_pipeline(make_union(words, characters), regression)
        labels = [i for i, name in enumerate(names) for _ in texts_by_name[name]]
        return cls(names, pipeline.fit([t for n in names for t in texts_by_name[n]], labels))

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Probability of each domain, [n,E]; columns are in the order of `names`."""
        return self.pipeline.predict_proba(texts)
