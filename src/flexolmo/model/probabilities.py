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
from typing import Any, Literal, get_args

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
from flexolmo.model.router import EvidenceState, mixture_weights, sum_of
from flexolmo.model.transformer import ForwardContext

NUMBERS_AT_ONCE = 1 << 24  # logits in memory that nobody asked for

Mix = Literal["states", "probabilities"]


class ProbabilitySettings(Settings):
    """Choices of mixing by probabilities, made on validation text."""

    lanes: int = Field(4, ge=1, description="Experts that read a token at most, K.")
    min_weight: float = Field(
        0.04, gt=0, lt=1, description="Weight of the router from which on an expert reads."
    )
    private_min_weight: float = Field(
        0.02,
        gt=0,
        lt=1,
        description="The same of an expert whose table tells of every token, as one with noise "
        "does, which knows less of what is its own. Never above min_weight.",
    )
    temperature: float = Field(3.0, gt=0, description="Divisor of each token's log-likelihood.")
    switch_rate: float = Field(
        0.03, gt=0, lt=1, description="Share of all chance that is spread evenly after each token."
    )
    sharpness: float = Field(
        0.7, gt=0, description="Power of an expert's chance that weighs what it predicts."
    )


@dataclass
class _Reading:
    """State of B texts after their last tokens."""

    evidence: EvidenceState
    posterior: np.ndarray  # [E,B] float64, chance of each expert at the next token
    predicted: Tensor  # [B*K,V] log-probabilities of the next token, by lane
    readers: np.ndarray  # [B,K] who gave them; -1: nobody
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
class _Predictions:
    """Predictions in N lanes, after the tokens that somebody reads there."""

    seen: Tensor  # [N,T+1] log-probability of each token from the second on; 0 where nobody read
    end: Tensor  # [N,V] log-probabilities after the last token; 0 where nobody read
    asked: Tensor  # [m,V] log-probabilities, of the tokens asked for
    row: Tensor  # [m] lane of each
    at: Tensor  # [m] its number among the tokens asked for

    def mix(self, weights: Tensor) -> Tensor:
        """Log-probabilities [B,.,V], by the lanes' weights [B,K,.].

        Sums run lane by lane, and nothing here rounds otherwise for another number of rows.
        """
        B, K, T = weights.shape
        device = self.asked.device
        shares = weights.flatten(0, 1)[self.row, self.at].log().to(device)[:, None]
        best = self.asked.new_full((B * T, self.asked.shape[1]), -torch.inf)
        total = torch.zeros_like(best)
        mine = [(self.row % K == lane).nonzero()[:, 0] for lane in range(K)]
        rows = [(self.row[i] // K * T + self.at[i]).to(device) for i in mine]
        parts = [self.asked[i.to(device)] + shares[i.to(device)] for i in mine]
        for here, part in zip(rows, parts, strict=True):
            best[here] = best[here].maximum(part)
        for here, part in zip(rows, parts, strict=True):
            total[here] += (part - best[here]).exp()
        return (best + total.log()).view(B, T, -1)


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
        B, T = ids.shape
        K = cache.lanes
        ids = ids.cpu()
        real = torch.ones(B, T, dtype=torch.bool) if is_token is None else is_token.cpu()
        active = self._active(cache, active, B)
        past = cache.reading

        # who reads where, from the tables alone
        state = None if past is None else past.evidence
        here = ids.to(self.device), None if is_token is None else is_token.to(self.device)
        evidence = self.router.read(*here, state)  # [S,T,B]
        logs, state = self.router(*here, active, state)
        routed = mixture_weights(logs, active, K).cpu().numpy()
        least = np.minimum(routed.max(-1, keepdims=True), self._least_weights())
        routed = np.where(routed >= least, routed, 0.0)
        on_padding = np.eye(routed.shape[-1])[0]  # public alone
        routed = np.where(real[..., None].numpy(), routed, on_padding)
        seats = _Seats(B, K) if past is None else past.seats.copy()
        chosen = seats.follow(routed)  # [B,K,T]
        lead = (chosen == routed.argmax(-1)[:, None]).argmax(1)  # [B,T]
        lanes = Lanes(*(torch.from_numpy(x).to(self.device) for x in (chosen.reshape(-1, T), lead)))

        # what they predict
        x, ctx = self.mixture.stream(
            ids.repeat_interleave(K, 0),
            cache=cache.inner,
            is_token=None if is_token is None else is_token.repeat_interleave(K, 0),
            active=None if active is None else active.repeat_interleave(K, 0),
            lanes=lanes,
        )
        asked = T if last is None else min(last, T)
        said = self._predict(x, ctx, lanes, ids, T - asked)

        # whom to believe
        seen = said.seen  # [B*K,T+1], of the token after each
        before = np.full((B, K), -1)
        if past is not None:
            at = ids[:, :1].repeat_interleave(K, 0)
            seen[:, 0] = past.predicted.gather(1, at)[:, 0]
            before = past.readers
        readers = np.concatenate([before[:, :, None], chosen], axis=2)
        readers[:, :, 1:] = np.where(real[:, None].numpy(), chosen, -1)  # not of padding
        chances = self._follow(  # [T,E,B]
            ids.numpy(),
            real.numpy(),
            None if active is None else active.cpu().numpy(),
            torch.cat([evidence[:1], evidence[1 + len(self.router.forms) :]])
            .double()
            .cpu()
            .numpy(),
            seen[:, :-1].view(B, K, T).double().numpy(),
            readers[:, :, :-1],
            None if past is None else past.posterior,
        )
        cache.reading = _Reading(state, chances[-1], said.end, readers[:, :, -1], seats)
        power = chances.transpose(2, 1, 0) ** self.settings.sharpness  # [B,E,T]
        weights = np.where(chosen >= 0, np.take_along_axis(power, chosen.clip(0), 1), 0.0)
        weights = weights / sum_of(weights, 1)  # [B,K,T]
        if routing is not None:
            found = np.zeros((B, power.shape[1] + 1, T))
            np.put_along_axis(found, chosen % found.shape[1], weights, 1)  # nobody's to the last
            routing.append(torch.from_numpy(found[:, :-1]).float().transpose(1, 2).to(self.device))
        return said.mix(torch.from_numpy(weights)[:, :, T - asked :].float())

    def _least_weights(self) -> np.ndarray:
        """Weight of the router from which on each expert reads, float32 [E]."""
        least = self.settings.min_weight
        private = min(least, self.settings.private_min_weight)
        own = [private if self.router.table(n).tells_all else least for n in self.expert_names[1:]]
        return np.array([least, *own], dtype=np.float32)

    def _active(self, cache: LaneCache, active: Tensor | None, count: int) -> Tensor | None:
        """The expert mask of `count` texts, [B,E]; PolicyError if it is not that of their start."""
        if active is not None:
            before = cache.active
            if cache.reading is not None and not (before is not None and before.equal(active)):
                raise PolicyError(
                    "The experts that are on cannot change after a text's first tokens: begin "
                    "again with a new cache."
                )
            cache.active = active
        if cache.active is not None and len(cache.active) == 1 < count:
            cache.active = cache.active.expand(count, -1)
        return cache.active

    def _predict(
        self, x: Tensor, ctx: ForwardContext, lanes: Lanes, ids: Tensor, skipped: int
    ) -> "_Predictions":
        """Predictions after the tokens x [1,n,D] that lanes read, of ids [B,T]; whole after all but
        the first `skipped` tokens."""
        N, T = lanes.chosen.shape
        places = lanes.places.cpu()  # [n]
        row = places // T
        at = places % T
        after = torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], dim=1)  # [B,T]
        token = after[row // (N // len(ids)), at].to(self.device)[:, None]
        size = max(1, NUMBERS_AT_ONCE // self.config.vocab_size)
        seen = torch.zeros(N, T + 1)
        end = torch.zeros(N, self.config.vocab_size)
        kept = []
        for start in range(0, len(places), size):
            rows = slice(start, start + size)
            logits = self.mixture.predict_at(x, ctx, rows).float()  # [.,V]
            norms = logits.logsumexp(-1, keepdim=True)
            seen[row[rows], at[rows] + 1] = (logits.gather(1, token[rows]) - norms)[:, 0].cpu()
            is_end = at[rows] == T - 1
            end[row[rows][is_end]] = (logits[is_end] - norms[is_end]).cpu()
            is_asked = at[rows] >= skipped
            kept.append(logits[is_asked] - norms[is_asked])
        is_asked = at >= skipped
        return _Predictions(seen, end, torch.cat(kept), row[is_asked], at[is_asked] - skipped)

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
        B, K, T = readers.shape
        E, choice = len(self.expert_names), self.settings
        on = np.ones((E, B), bool) if active is None else active.T
        prior = on / sum_of(on, 0)  # [E,B]
        read = np.full((B, E + 1, T), -np.inf)
        for lane in range(K):  # nobody's to the last place, which is cut off
            np.put_along_axis(read, readers[:, lane, None] % (E + 1), seen[:, lane, None], 1)
        read = read[:, :E].transpose(2, 1, 0) / choice.temperature  # [T,E,B]
        table = self.router.settings.tempering * evidence.swapaxes(0, 1)  # [T,E,B]
        is_fresh = (ids == self.config.eos_token_id).T
        now = prior if posterior is None else posterior
        found = np.empty((T, E, B))
        for t in range(T):
            has_read = np.isfinite(read[t]) & on
            best = np.where(has_read, now, -1.0).argmax(0)[None]  # [1,B]
            shift = np.take_along_axis(read[t] - table[t], best, 0)
            logs = np.where(has_read, read[t], table[t] + shift)
            is_known = real[:, t] & has_read.any(0)  # not the first of a text
            logs = np.where(is_known, np.where(on, logs, -np.inf), 0.0)
            chance = now * np.exp(logs - logs.max(0))
            moved = (1 - choice.switch_rate) * chance / sum_of(chance, 0)
            moved = moved + choice.switch_rate * prior
            now = np.where(is_known, moved, now)
            now = np.where(real[:, t] & is_fresh[t], prior, now)
            found[t] = now
        return found


AnyMixture = MixtureModel | ProbabilityMixture


def arrange(model: MixtureModel, mix: Mix) -> AnyMixture:
    """The mixture as it is read where `mix` is what is mixed; ConfigError if it cannot be."""
    if mix not in get_args(Mix):
        raise ConfigError(f"mix {mix!r} is not known; {' and '.join(get_args(Mix))} are.")
    return ProbabilityMixture(model) if mix == "probabilities" else model


def about_mix(mix: Mix) -> dict[str, Any]:
    """Record of what is mixed, and how."""
    return {"of": mix} | (ProbabilitySettings().model_dump() if mix == "probabilities" else {})


class _Seats:
    """Lanes by expert: whoever reads on stays in its lane, and comes back to it."""

    def __init__(self, num_texts: int, num_lanes: int):
        self.readers = np.full((num_texts, num_lanes), -1)  # -1: nobody
        self.before = self.readers.copy()  # who read there last
        self.idle = np.zeros_like(self.readers)  # tokens since

    def select(self, rows: np.ndarray) -> "_Seats":
        """The seats of the texts `rows` [n]."""
        found = _Seats(*self.readers.shape)
        found.readers = self.readers[rows]
        found.before = self.before[rows]
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
            longest = np.where(free, self.idle[text], -1).argmax()
            lane = own.argmax() if own.any() else longest
            readers[lane] = expert
