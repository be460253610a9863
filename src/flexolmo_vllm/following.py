"""Weights of experts along many requests, each with its own experts on, from token ids alone.

The evidence filter has a state for each request. A request may be read in parts, begin behind a
prefix that another one with the same experts has read, or be read again after it had to make room:
where its state is not at the first token to read, it is found again from the ids before.

n tokens of a step, E experts, S domains.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.model.moe import MixtureModel


@dataclass(frozen=True)
class Part:
    """Tokens of one request that a step reads."""

    request: str
    ids: np.ndarray  # [.] of the request up to and with those to read
    start: int  # place of the first of them
    enabled: frozenset[str]

    @property
    def num_tokens(self) -> int:
        """Tokens to read."""
        return len(self.ids) - self.start


@dataclass(frozen=True)
class Progress:
    """State of a request behind its first tokens."""

    position: int  # their number
    filtered: Tensor | None  # [S,1] float64, of the evidence filter
    counted: int  # tokens that `sums` is over; with a linear router those read here alone
    sums: np.ndarray  # [E] float64, of weights


class Follower:
    """States of all requests of one model."""

    def __init__(self, model: MixtureModel):
        self.model = model
        self.progress: dict[str, Progress] = {}
        self._masks: dict[frozenset[str], Tensor] = {}

    def mask(self, parts: Sequence[Part]) -> Tensor:
        """Experts that are on at each token of a step, bool [n,E]."""
        counts = torch.tensor([part.num_tokens for part in parts])
        return torch.stack([self._mask(p.enabled) for p in parts]).repeat_interleave(counts, 0)

    def follow(self, parts: Sequence[Part]) -> Tensor | None:
        """Log weights [n,E] at the tokens of a step, float32; None if layers have routers of their
        own."""
        if self.model.router is None:
            return None
        found: list[Tensor | None] = [None] * len(parts)
        ones = [i for i, part in enumerate(parts) if self._goes_on(part) and part.num_tokens == 1]
        others = [[i] for i in range(len(parts)) if i not in set(ones)]
        for group in [ones] * bool(ones) + others:
            logs = self._follow([parts[i] for i in group])  # [B,T,E]
            for i, own in zip(group, logs, strict=True):
                found[i] = own[-parts[i].num_tokens :]
        return torch.cat([own for own in found if own is not None])

    def count(self, parts: Sequence[Part], weights: Tensor) -> None:
        """Take note of `weights` [n,E] that the layers' own routers gave, their mean."""
        rows = weights.double().numpy()
        start = 0
        for part in parts:
            own = rows[start : start + part.num_tokens]
            start += part.num_tokens
            before = self.progress.get(part.request)
            counted, sums = (0, 0.0) if before is None else (before.counted, before.sums)
            self.progress[part.request] = Progress(
                len(part.ids), None, counted + len(own), sums + own.sum(0)
            )

    def shares(self, request: str, enabled: Collection[str]) -> dict[str, float]:
        """Mean weight of public text and of each of `enabled` over what was read of a request."""
        held = self.progress.get(request)
        names = (PUBLIC, *sorted(enabled))
        if held is None:
            return dict.fromkeys(names, 0.0)
        means = (held.sums / max(held.counted, 1)).tolist()
        by_name = dict(zip(self.model.expert_names, means, strict=True))
        return {name: by_name.get(name, 0.0) for name in names}

    def keep(self, requests: Collection[str]) -> None:
        """Forget all requests but these."""
        for gone in self.progress.keys() - set(requests):
            del self.progress[gone]

    def _mask(self, enabled: frozenset[str]) -> Tensor:
        """[E]"""
        if enabled not in self._masks:
            self._masks[enabled] = self.model.expert_mask([enabled])[0].cpu()
        return self._masks[enabled]

    def _goes_on(self, part: Part) -> bool:
        """True if the state of the request is at the first token to read."""
        held = self.progress.get(part.request)
        return held is not None and held.position == part.start > 0

    def _follow(self, parts: Sequence[Part]) -> Tensor:
        """Log weights [B,T,E] of parts that have one length, from the tokens that their states
        stand at."""
        router = self.model.router
        assert router is not None
        eos = router.eos_token_id
        known = [self.progress[p.request] if self._goes_on(p) else None for p in parts]
        starts = [0 if held is None else held.position for held in known]
        ids = np.stack([p.ids[start:] for p, start in zip(parts, starts, strict=True)], 1)  # [T,B]
        first = [p.ids[s - 1] if s else eos for p, s in zip(parts, starts, strict=True)]
        before = np.concatenate([np.array([first]), ids[:-1]])  # [T,B]
        evidence = router.evidence(_flat(before), _flat(ids))
        past = [held.filtered for held in known if held is not None and held.filtered is not None]
        active = torch.stack([self._mask(p.enabled) for p in parts])  # [B,E]
        logs, filtered = router.follow(
            router.likelihood(evidence).reshape(-1, *ids.shape),
            ids == eos,
            active,
            torch.cat(past, dim=1) if past else None,
        )
        weights = self.model.weigh(logs, active).double().sum(1).numpy()  # [B,E]
        for i, (part, held) in enumerate(zip(parts, known, strict=True)):
            sums = weights[i] if held is None else held.sums + weights[i]
            end = len(part.ids)
            self.progress[part.request] = Progress(end, filtered[:, i : i + 1], end, sums)
        return logs


def _flat(ids: np.ndarray) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64).reshape(-1))
