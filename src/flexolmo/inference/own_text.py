"""Text that a mixture writes by itself, one expert at a time, to fit and measure a router on.

A coordinator holds no owner's text; what an expert writes stands in for it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from flexolmo.errors import MergeError
from flexolmo.inference.decode import continue_ids
from flexolmo.inference.reader import OwnReader
from flexolmo.inference.sampling import Sampling
from flexolmo.merge.mixture import LoadedMixture
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import EvidenceRouter
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.progress import progress


def own_windows(
    mixture: LoadedMixture,
    sequences: int = 16,
    tokens: int = 192,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> dict[str, list[tuple[np.ndarray, int]]]:
    """Windows of text by each expert, (ids, bytes) as `evaluation_windows` gives; without `names`,
    by all of them, public included.

    An expert writes alone, whatever the router would say, and so samples its owner's domain. Each
    window holds one text of `tokens` tokens with no end. MergeError for an expert whose numbers are
    not finite. Source: ours.
    """
    eos = mixture.tokenizer.eos_id
    speechless = [*mixture.tokenizer.controls]  # special tokens, which stand for no text
    generator = torch.Generator().manual_seed(seed)
    names = mixture.model.expert_names if names is None else names
    windows: dict[str, list[tuple[np.ndarray, int]]] = {}
    with progress("write", len(names) * sequences * tokens, "tok") as meter:

        def draw(logits: Tensor, _: Sequence[int]) -> list[int]:
            meter.advance(len(logits))
            logits[:, mixture.tokenizer.vocab_size :] = -math.inf
            logits[:, speechless] = -math.inf
            if not torch.isfinite(logits.amax(-1)).all():
                raise MergeError(f"{meter.note}: gives NaN or infinity for text that it writes.")
            return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].tolist()

        for name in names:
            meter.note = name
            with _alone(mixture.model, name):
                reader = OwnReader(mixture.model, mixture.tokenizer)
                sampling = Sampling(max_new_tokens=tokens)
                texts = continue_ids(reader, [[]] * sequences, sampling, choose=draw)
            windows[name] = [
                (np.array([eos, *ids], dtype=np.int64), len(mixture.tokenizer.decode(ids).encode()))
                for ids in texts
            ]
    return windows


class _Alone(nn.Module):
    """Stands for a router: one expert has all the weight."""

    settings = EvidenceSettings()

    def __init__(self, place: int, count: int):
        super().__init__()
        self.log_weights = torch.full((count,), -math.inf)
        self.log_weights[place] = 0.0

    def forward(self, ids: Tensor, _: Any, __: Any, past: Any) -> tuple[Tensor, Any]:
        return self.log_weights.to(ids.device).expand(*ids.shape, -1), past


@contextmanager
def _alone(model: MixtureModel, name: str) -> Iterator[None]:
    """Let one expert speak at every token, public included, while the context lasts."""
    held = model.router, [m.router for m in model.mixtures()]
    place = model.expert_names.index(name)
    model.router = cast(EvidenceRouter, _Alone(place, len(model.expert_names)))
    for mixture in model.mixtures():
        mixture.router = None
    try:
        yield
    finally:
        model.router = held[0]
        for mixture, router in zip(model.mixtures(), held[1], strict=True):
            mixture.router = router
