"""A mixture that weighs what its experts predict, in place of what they compute.

Up to K experts read each token, as whole models, side by side: those that the evidence router finds
likely enough. Their next-token probabilities are mixed by how likely each has found the text so
far. Opting out stays strict: an expert's chance depends on the anchor, on its owner's table, and on
the enabled experts' own predictions. Source: ours; the posterior is that of Branch-Train-Merge
(arXiv 2208.03306), with the fixed share of Herbster and Warmuth 1998.

B texts, T positions, E experts, K lanes, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from flexolmo.config import Settings
from flexolmo.errors import ConfigError, PolicyError
from flexolmo.model.cache import Cache
from flexolmo.model.lanes import Lanes
from flexolmo.model.moe import MixtureModel
from flexolmo.model.panels import Panels
from flexolmo.model.router import EvidenceState, mixture_weights

NUMBERS_AT_ONCE = 1 << 25  # probabilities in memory, of all lanes together


Mix = Literal["states", "probabilities"]


class ProbabilitySettings(Settings):
    """Choices of mixing by probabilities; chosen on validation text, see LOG.md."""

    lanes: int = Field(4, ge=1, description="Experts that read a token at most, K.")
    min_weight: float = Field(
        0.05, gt=0, lt=1, description="Weight of the router from which on an expert reads."
    )
    temperature: float = Field(2.0, gt=0, description="Divisor of each token's log-likelihood.")
    switch_rate: float = Field(
        0.05, gt=0, lt=1, description="Share of all chance that is spread evenly after each token."
    )
    sharpness: float = Field(
        0.5, gt=0, description="Power of an expert's chance that weighs what it predicts."
    )


@dataclass
class _Reading:
    """State of B texts after their last tokens."""

    evidence: EvidenceState
    posterior: np.ndarray  # [E,B] float64, chance of each expert at the next token
    predicted: Tensor  # [B*K,V] log-probabilities of the next token, by lane
    readers: np.ndarray  # [B,K] who reads the last token in each lane; -1: nobody
    seats: "_Seats"

    def select(self, rows: Tensor) -> "_Reading":
        """The state of the texts `rows` [n]."""
        at = rows.numpy()
        lanes = self.predicted.view(len(self.readers), -1, self.predicted.shape[1])
        return _Reading(
            (self.evidence[0][rows], self.evidence[1][:, rows]),
            self.posterior[:, at],
            lanes[rows].flatten(0, 1),
            self.readers[at],
            self.seats.select(at),
        )


@dataclass
class LaneCache:
    """Everything needed to go on with B texts, in K lanes each."""

    inner: Cache
    lanes: int
    active: Tensor | None = None  # [B,E] expert mask; None: all
    reading: _Reading | None = None  # None: nothing is read yet

    def reserve(self, num_positions: int) -> None:
        """Take memory for so many positions of each text."""
        self.inner.reserve(num_positions)

    def select(self, rows: Tensor) -> "LaneCache":
        """The cache of the texts `rows` [n], in that order; any may come several times."""
        active = self.active
        if active is not None:
            active = active.expand(len(rows), -1) if len(active) == 1 else active[rows]
        if self.reading is None:
            return LaneCache(self.inner.select(rows), self.lanes, active)
        each = rows[:, None] * self.lanes + torch.arange(self.lanes)
        inner = self.inner.select(each.flatten())
        return LaneCache(inner, self.lanes, active, self.reading.select(rows))


class ProbabilityMixture(nn.Module):
    """A mixture that mixes probabilities; called as the mixture itself is."""

    def __init__(self, mixture: MixtureModel, settings: ProbabilitySettings | None = None):
        """Raises ConfigError for a mixture whose router decides in each layer anew."""
        super().__init__()
        if mixture.router is None:
            raise ConfigError(
                "Probabilities are mixed where one router decides for all layers (kind evidence); "
                f"this mixture's is of kind {mixture.settings.kind}."
            )
        self.mixture = mixture
        self.router = mixture.router
        self.settings = settings or ProbabilitySettings()
        self.config = mixture.config
        self.expert_names = mixture.expert_names

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.mixture.device

    def expert_mask(self, enabled: Iterable[Iterable[str] | None]) -> Tensor:
        """The mask of `MixtureModel.expert_mask`."""
        return self.mixture.expert_mask(enabled)

    def space_weights(self) -> None:
        """Lay matrices out, see `Transformer.space_weights`."""
        self.mixture.space_weights()

    def cut_panels(self) -> Panels:
        """Empty: lanes are read without panels."""
        return {}

    def new_cache(self) -> LaneCache:
        """An empty cache for one batch."""
        return LaneCache(self.mixture.new_cache(), self.settings.lanes)

    def forward(
        self,
        ids: Tensor,
        *,
        last: int | None = None,
        cache: LaneCache | None = None,
        is_token: Tensor | None = None,
        active: Tensor | None = None,
        panels: Panels | None = None,
        routing: list[Tensor] | None = None,
    ) -> Tensor:
        """Log-probabilities [B,T,V], float32, or of the `last` positions; arguments as for the
        mixture. `routing` receives the weights of predictions, [B,T,E]."""
        cache = self.new_cache() if cache is None else cache
        if active is not None:
            if cache.reading is not None:
                raise PolicyError(
                    "The experts that are on cannot change after a text's first tokens: begin "
                    "again with a new cache."
                )
            cache.active = active
        if cache.active is not None and len(cache.active) == 1 < len(ids):
            cache.active = cache.active.expand(len(ids), -1)
        B, T = ids.shape
        first = T - (T if last is None else min(last, T))
        piece = max(1, NUMBERS_AT_ONCE // (B * cache.lanes * self.config.vocab_size))
        found, weights = [], []
        for start in range(0, T, piece):
            here = None if is_token is None else is_token[:, start : start + piece]
            part = ids[:, start : start + piece]
            skipped = min(max(0, first - start), part.shape[1])
            said, weighed = self._read(part, here, cache, skipped)
            found.append(said)
            weights.append(weighed)
        if routing is not None:
            routing.append(torch.cat(weights, dim=1))
        return torch.cat(found, dim=1)

    def _read(
        self, ids: Tensor, is_token: Tensor | None, cache: LaneCache, skipped: int
    ) -> tuple[Tensor, Tensor]:
        """Read a piece of the texts on: log-probabilities [B,.,V] after all tokens but the first
        `skipped`, and the weights of predictions after all, [B,T,E]."""
        (B, T), K, E = ids.shape, cache.lanes, len(self.expert_names)
        past, active = cache.reading, cache.active
        ids = ids.cpu()
        real = np.ones((B, T), bool) if is_token is None else is_token.cpu().numpy()
        state = None if past is None else past.evidence
        evidence = self.router.read(ids.to(self.device), is_token, state)  # [S,T,B]
        logs, state = self.router(ids.to(self.device), is_token, active, state)
        routed = mixture_weights(logs, active, K, self.settings.min_weight).cpu().numpy()
        routed = np.where(real[..., None], routed, np.eye(E)[0])  # padding is read by public alone
        seats = _Seats(B, K) if past is None else past.seats.copy()
        chosen = seats.follow(routed)  # [B,K,T]
        lead = (chosen == routed.argmax(-1)[:, None]).argmax(1)  # [B,T]
        x, ctx = self.mixture.stream(
            ids.repeat_interleave(K, 0),
            cache=cache.inner,
            is_token=None if is_token is None else is_token.repeat_interleave(K, 0),
            active=None if active is None else active.repeat_interleave(K, 0),
            lanes=Lanes(
                torch.from_numpy(chosen.reshape(B * K, T)).to(self.device),
                torch.from_numpy(lead).to(self.device),
            ),
        )
        live = torch.from_numpy(np.flatnonzero(chosen >= 0))  # [n] of B*K*T
        logits = self.mixture.predict_at(x, ctx, live.to(self.device)).float()  # [n,V]
        norms = logits.logsumexp(-1, keepdim=True)  # [n,1]
        at = live % T
        seen = torch.zeros(B * K, T)  # log-probability of each token in each lane
        if past is not None:
            seen[:, 0] = past.predicted.gather(1, ids[:, :1].repeat_interleave(K, 0))[:, 0]
        goes_on = (at < T - 1).nonzero()[:, 0]
        lane, place = live[goes_on] // T, at[goes_on] + 1
        token = ids[lane // K, place].to(self.device)
        goes_on = goes_on.to(self.device)
        seen[lane, place] = (logits[goes_on, token] - norms[goes_on, 0]).cpu()
        is_end = (at == T - 1).nonzero()[:, 0]
        predicted = torch.zeros(B * K, logits.shape[1])
        is_last = is_end.to(self.device)
        predicted[live[is_end] // T] = (logits[is_last] - norms[is_last]).cpu()
        before = np.full((B, K), -1) if past is None else past.readers
        readers = np.concatenate([before[:, :, None], chosen[:, :, :-1]], axis=2)
        readers[:, :, 1:] = np.where(real[:, None, :-1], readers[:, :, 1:], -1)  # not of padding
        of_experts = torch.cat([evidence[:1], evidence[1 + len(self.router.forms) :]])
        chances = self._follow(  # [T,E,B]
            ids.numpy(),
            real,
            None if active is None else active.cpu().numpy(),
            of_experts.double().cpu().numpy(),
            seen.view(B, K, T).double().numpy(),
            readers,
            None if past is None else past.posterior,
        )
        cache.reading = _Reading(state, chances[-1], predicted, chosen[:, :, -1].copy(), seats)
        power = chances.transpose(2, 1, 0) ** self.settings.sharpness  # [B,E,T]
        weights = np.where(chosen >= 0, np.take_along_axis(power, chosen.clip(0), 1), 0.0)
        weights = weights / _sum_of(weights, 1)  # [B,K,T]
        by_expert = np.zeros((B, E + 1, T))
        np.put_along_axis(by_expert, chosen % (E + 1), weights, 1)
        weighed = torch.from_numpy(by_expert[:, :E]).float().transpose(1, 2)
        shares = torch.from_numpy(weights).float().flatten().log()[live].to(self.device)[:, None]
        asked = T - skipped
        found = torch.full((B * asked, logits.shape[1]), -torch.inf, device=self.device)
        for number in range(
            K if asked else 0
        ):  # one by one, so that a sum's order is that of lanes
            mine = ((live // T % K == number) & (at >= skipped)).nonzero()[:, 0]
            rows = (live[mine] // T // K * asked + at[mine] - skipped).to(self.device)
            mine = mine.to(self.device)
            found[rows] = found[rows].logaddexp(logits[mine] - norms[mine] + shares[mine])
        return found.view(B, asked, logits.shape[1]), weighed.to(self.device)

    def _follow(
        self,
        ids: np.ndarray,
        real: np.ndarray,
        active: np.ndarray | None,
        evidence: np.ndarray,
        seen: np.ndarray,
        readers: np.ndarray,
        posterior: np.ndarray | None,
    ) -> np.ndarray:
        """Chance of each expert at the token after each, [T,E,B] float64.

        Args:
            ids: tokens [B,T]; after an end of text all begins anew.
            real: False on padding, [B,T].
            active: experts that are on, [B,E]; None: all.
            evidence: of each expert's table at each token, [E,T,B]; public's is 0.
            seen: log-probability of each token in each lane, [B,K,T].
            readers: who gave it, [B,K,T]; -1: nobody.
            posterior: chances at the first token, [E,B]; None: the text begins.

        Of an expert that did not read, all that is known is its table: its likelihood is taken to
        be to that of the likeliest reader as its table's is to that reader's.
        """
        (B, K, T), E, choice = readers.shape, len(self.expert_names), self.settings
        on = np.ones((E, B), bool) if active is None else active.T
        prior = on / _sum_of(on, 0)  # [E,B]
        read = np.full((B, E + 1, T), -np.inf)
        for lane in range(K):  # nobody's to the last place, which is cut off
            np.put_along_axis(read, readers[:, lane, None] % (E + 1), seen[:, lane, None], 1)
        read = read[:, :E].transpose(2, 1, 0) / choice.temperature  # [T,E,B]
        table = self.router.settings.tempering * evidence.swapaxes(0, 1)  # [T,E,B]
        is_fresh = (ids == self.config.eos_token_id).T
        now, found = prior if posterior is None else posterior, np.empty((T, E, B))
        for t in range(T):
            has_read = np.isfinite(read[t]) & on
            best = np.where(has_read, now, -1.0).argmax(0)[None]  # [1,B]
            shift = np.take_along_axis(read[t] - table[t], best, 0)
            logs = np.where(has_read, read[t], table[t] + shift)
            is_known = real[:, t] & has_read.any(0)  # not the first of a text
            logs = np.where(is_known, np.where(on, logs, -np.inf), 0.0)
            chance = now * np.exp(logs - logs.max(0))
            moved = (1 - choice.switch_rate) * chance / _sum_of(chance, 0)
            moved = moved + choice.switch_rate * prior
            now = np.where(is_known, moved, now)
            now = np.where(real[:, t] & is_fresh[t], prior, now)
            found[t] = now
        return found


AnyMixture = MixtureModel | ProbabilityMixture


def arrange(model: MixtureModel, mix: Mix) -> AnyMixture:
    """The mixture as it is read where `mix` is what is mixed; ConfigError if it cannot be."""
    return ProbabilityMixture(model) if mix == "probabilities" else model


def _sum_of(parts: np.ndarray, axis: int) -> np.ndarray:
    """Sum over experts one by one, so that one of weight 0 and none at all give one sum."""
    return parts.cumsum(axis, dtype=np.float64).take([-1], axis)


class _Seats:
    """Lanes by expert: whoever reads on stays in its lane, and comes back to it."""

    def __init__(self, num_texts: int, num_lanes: int):
        self.readers = np.full((num_texts, num_lanes), -1)  # -1: nobody
        self.before = self.readers.copy()  # who read there last
        self.idle = np.zeros_like(self.readers)  # tokens since

    def select(self, rows: np.ndarray) -> "_Seats":
        """The seats of the texts `rows` [n]."""
        found = _Seats(0, 0)
        found.readers, found.before = self.readers[rows], self.before[rows]
        found.idle = self.idle[rows]
        return found

    def copy(self) -> "_Seats":
        return self.select(np.arange(len(self.readers)))

    def follow(self, routed: np.ndarray) -> np.ndarray:
        """Seat those that have a weight of `routed` [B,T,E] at each token; readers [B,K,T]."""
        B, T, _ = routed.shape
        found = np.empty((*self.readers.shape, T), dtype=np.int64)
        wanted = routed != 0
        for t in range(T):
            has_changed = True
            if t:
                has_changed = (wanted[:, t] != wanted[:, t - 1]).any(1)
            for text in np.flatnonzero(np.broadcast_to(has_changed, B)):
                self._seat(text, routed[text, t])
            found[:, :, t] = self.readers
            sits = self.readers >= 0
            self.before = np.where(sits, self.readers, self.before)
            self.idle = np.where(sits, 0, self.idle + 1)
        return found

    def _seat(self, text: np.intp, weights: np.ndarray) -> None:
        readers = self.readers[text]  # a view
        readers[(readers >= 0) & (weights[readers] == 0)] = -1
        for expert in np.argsort(-weights, kind="stable")[: (weights != 0).sum()]:
            if expert in readers:
                continue
            free = readers == -1
            own = free & (self.before[text] == expert)
            readers[own.argmax() if own.any() else np.where(free, self.idle[text], -1).argmax()] = (
                expert
            )
