"""Routers: the weight of each enabled expert at every token.

Three kinds. `evidence` (ours, the default) follows, token by token, whose domain the text is in,
from bigram statistics of each owner's text and of public's; it reads no hidden state, so what one
expert computes cannot change how another is weighed. `linear` is the paper's: a row per expert and
layer, read against the residual stream, with a negative bias. `discriminant` has such rows in
closed form, from statistics of the anchor's own states. In all, an expert's row or table depends
on the anchor and that expert's owner alone, which is what makes opting out exact.

Every number is computed expert by expert, in an order that does not change when others are
absent; so a disabled expert and one never merged give the same bits.

B batch, T positions, D d_model, R features that a row reads, E experts, V vocabulary, n bigrams,
K top_k.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.config import Settings
from flexolmo.model.statistics import BigramModel, EvidenceSettings, OwnerTable, weigh_evidence
from flexolmo.model.tiles import COLUMNS, REGISTERS_BYTES, columns

EvidenceState = tuple[Tensor, Tensor]
MAX_NATS = 300.0  # by which the filter's weights may grow or shrink before they are scaled
LONG_TEXT = 32  # tokens that the filter reads in blocks
FEW_TEXTS = 4  # of which a processor reads blocks faster than tokens


class LinearSettings(Settings):
    """One row a layer read against the residual stream, with a negative bias. Source: §3.3.2."""

    is_strict: ClassVar[bool] = True  # of rows as owners send them; not once tuned jointly

    kind: Literal["linear"] = "linear"
    has_bias: bool = Field(
        True, description="Negative bias on owners' experts (paper); the stock format has none."
    )
    bias_form: Literal["softplus", "clamp"] = Field(
        "softplus",
        description="Form that keeps b_i negative: -softplus(raw) (ours), or min(raw, 0) "
        "(paper), which has no gradient once raw is positive.",
    )


class DiscriminantSettings(Settings):
    """Gaussian discriminant: each layer tests whether a state lies nearer to the mean of an owner's
    text or of public text, under the covariance of public text. Source: ours.
    """

    is_strict: ClassVar[bool] = True

    kind: Literal["discriminant"] = "discriminant"
    tempering: float = Field(
        0.7,
        gt=0,
        le=1,
        description="Factor on each token's log odds, as states of one text are not independent.",
    )
    shrinkage: float = Field(
        0.1, gt=0, le=1, description="Weight of the covariance's diagonal over the whole of it."
    )
    has_context: bool = Field(
        False, description="True to read also the decayed mean of the text's states so far."
    )
    half_life_tokens: float = Field(
        32.0, gt=0, description="Tokens after which a state counts half in that mean."
    )

    def num_features(self, d_model: int) -> int:
        """Length R of a row."""
        return 2 * d_model if self.has_context else d_model


RouterSettings = Annotated[
    EvidenceSettings | LinearSettings | DiscriminantSettings, Field(discriminator="kind")
]


def first_raw_bias(settings: LinearSettings) -> Tensor:
    """The bias's free parameter [1] before training: b_i = -softplus(-2) = -0.13, or 0."""
    return torch.tensor([0.0 if settings.bias_form == "clamp" else -2.0])


def slot(name: str) -> str:
    """The key of an expert in torch's dictionaries, whose own attributes (`training`, `values`)
    would otherwise be names no expert could have."""
    return f"expert_{name}"


class BigramTable(nn.Module):
    """Public text's back-off bigram model; see `statistics.BigramModel`."""

    def __init__(self, vocab_size: int, num_bigrams: int):
        super().__init__()
        self.unigram: Tensor
        self.backoff: Tensor
        self.bigram_keys: Tensor
        self.bigram_log_probs: Tensor
        self.register_buffer("unigram", torch.zeros(vocab_size))  # [V]
        self.register_buffer("backoff", torch.zeros(vocab_size))  # [V]
        self.register_buffer("bigram_keys", torch.zeros(num_bigrams, dtype=torch.long))  # [n]
        self.register_buffer("bigram_log_probs", torch.zeros(num_bigrams))  # [n]

    def forward(self, before: Tensor, ids: Tensor, pairs: Tensor) -> Tensor:
        """log p(id | id before it), float32 [n], of ids [n]; `pairs` [n] are before * V + id."""
        backed_off = self.backoff.index_select(0, before) + self.unigram.index_select(0, ids)
        if not len(self.bigram_keys):
            return backed_off
        place = torch.searchsorted(self.bigram_keys, pairs).clamp_(max=len(self.bigram_keys) - 1)
        is_listed = self.bigram_keys.index_select(0, place) == pairs
        return torch.where(is_listed, self.bigram_log_probs.index_select(0, place), backed_off)


class LevelTable(nn.Module):
    """One owner's token and pair statistics; see `statistics.OwnerTable` and `.Evidence`."""

    def __init__(self, vocab_size: int, num_bigrams: int):
        super().__init__()
        self.token_levels: Tensor
        self.bigram_keys: Tensor
        self.bigram_levels: Tensor
        self.tokens: Tensor
        self.contexts: Tensor
        self.pairs: Tensor
        self.tells_all = False  # of every token, as a table with noise does
        # as a bundle holds them
        self.register_buffer("token_levels", torch.zeros(vocab_size, dtype=torch.int8))  # [V]
        self.register_buffer("bigram_keys", torch.zeros(num_bigrams, dtype=torch.long))  # [n]
        self.register_buffer("bigram_levels", torch.zeros(num_bigrams, dtype=torch.int8))  # [n]
        # what follows from them
        self.register_buffer("tokens", torch.zeros(vocab_size), persistent=False)  # [V]
        self.register_buffer("contexts", torch.zeros(vocab_size), persistent=False)  # [V]
        self.register_buffer("pairs", torch.zeros(num_bigrams), persistent=False)  # [n]

    @property
    def table(self) -> OwnerTable:
        """The table that the bundle holds."""
        parts = (self.token_levels, self.bigram_keys, self.bigram_levels)
        return OwnerTable(*(t.cpu().numpy() for t in parts))

    def fill(self, table: OwnerTable) -> None:
        """Take the numbers of a table of this size."""
        parts = (self.token_levels, self.bigram_keys, self.bigram_levels)
        for target, values in zip(parts, vars(table).values(), strict=True):
            target.copy_(torch.from_numpy(values))

    def weigh(self, public: BigramModel, settings: EvidenceSettings) -> None:
        """Find the evidence that follows from the levels."""
        self.tells_all = bool(self.table.is_told.all())
        for name, values in vars(weigh_evidence(self.table, public, settings)).items():
            getattr(self, name).copy_(torch.from_numpy(values))

    def forward(self, before: Tensor, ids: Tensor, pairs: Tensor, order: Tensor) -> Tensor:
        """Log-probability over public text's, float32 [n], of ids [n]; `pairs` [n] are
        before * V + id, `order` [n] what public text's preference for the pair takes off."""
        found = self.contexts.index_select(0, before) + self.tokens.index_select(0, ids) - order
        keys = self.bigram_keys
        if not keys.shape[0]:
            return found
        place = torch.searchsorted(keys, pairs).clamp_(max=keys.shape[0] - 1)
        is_listed = keys.index_select(0, place) == pairs
        return torch.where(is_listed, self.pairs.index_select(0, place), found)


class EvidenceRouter(nn.Module):
    """Posterior over domains, from statistics of each owner's text and of public's.

    A hidden Markov model over the enabled experts: from one token to the next the text stays in
    its domain with chance 1 - switch_rate, else turns to any, with equal chance. An owner's
    evidence at a token is its log-probability over public's, clipped and tempered; over the
    vocabulary its exponentials, weighed by public's probabilities, sum to 1, so that nobody can
    claim every token. An expert's weight is its chance, given the tokens so far, at the token to
    come. The end-of-text token starts afresh. Only the enabled experts take part, and each one's
    evidence depends on its owner and the anchor alone. Source: ours; the filter is the fixed share
    of Herbster and Warmuth 1998.

    Public is several domains where the anchor has tables of public text in other forms, fitted as
    an owner's. Their chances are added up: an owner must beat them together, so that a form
    which its text has does not stand for its subject.

    S domains: public, its forms, then the other experts.
    """

    def __init__(
        self,
        settings: EvidenceSettings,
        names: list[str],
        vocab_size: int,
        num_bigrams: Mapping[str, int],
        eos_token_id: int,
        form_bigrams: Sequence[int] = (),
    ):
        """`num_bigrams` by expert, "public" included; `form_bigrams` of each table of forms."""
        super().__init__()
        self.settings = settings
        self.names = names
        self.vocab_size = vocab_size
        self.eos_token_id = eos_token_id
        self.public = BigramTable(vocab_size, num_bigrams[PUBLIC])
        self.forms = nn.ModuleList(LevelTable(vocab_size, n) for n in form_bigrams)
        self.tables = nn.ModuleDict(
            {slot(n): LevelTable(vocab_size, num_bigrams[n]) for n in names if n != PUBLIC}
        )

    @property
    def domains(self) -> list[str]:
        """Names of the S domains; those of public's forms, which begin with a space, are no
        expert's."""
        forms = [f" form {i}" for i in range(len(self.forms))]
        return [self.names[0], *forms, *self.names[1:]]

    def table(self, name: str) -> LevelTable:
        """The statistics of one owner's text."""
        return cast(LevelTable, self.tables[slot(name)])

    def evidence(self, before: Tensor, ids: Tensor) -> Tensor:
        """Every domain's evidence at tokens `ids` [n] that stand after `before` [n], clipped,
        float32 [S,n]."""
        pairs = before * self.vocab_size + ids
        preference = self.public(before, ids, pairs) - self.public.unigram.index_select(0, ids)
        order = (1.0 - self.settings.public_order) * preference
        tables = [*self.forms, *(self.table(n) for n in self.names[1:])]
        found = [table(before, ids, pairs, order) for table in tables]
        limit = self.settings.clip_nats
        return torch.stack([torch.zeros_like(order), *found]).clamp_(-limit, limit)

    def forward(
        self,
        ids: Tensor,
        is_token: Tensor | None,
        active: Tensor | None,
        past: EvidenceState | None,
    ) -> tuple[Tensor, EvidenceState]:
        """Log weights [B,T,E] in float32, in the order of `names`, and what to hand to the next
        call.

        `past` is None, or the second result of the call that read the positions before: the last
        ids [B] and the domains' weights at the next token, [S,B] float64 on the CPU.
        """
        is_fresh = ids == self.eos_token_id
        logs, weights = self.follow(
            self.likelihood(self.read(ids, is_token, past)),
            (is_fresh if is_token is None else is_token & is_fresh).T.cpu().numpy(),
            active,
            None if past is None else past[1],
            None if is_token is None else ~is_token.T.cpu().numpy(),
        )
        end = ids[:, -1]
        if is_token is not None:
            end = torch.where(is_token[:, -1], end, self._first(ids, past)[:, 0])
        return logs.to(ids.device), (end, weights)

    def likelihood(self, evidence: Tensor) -> np.ndarray:
        """Every domain's likelihood over public text's by its `evidence` [S,...], float64."""
        return (self.settings.tempering * evidence).double().exp_().cpu().numpy()

    def follow(
        self,
        likelihood: np.ndarray,
        fresh: np.ndarray,
        active: Tensor | None,
        past: Tensor | None,
        padding: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log weights [B,T,E] and domains' weights [S,B] at the token to come, on the CPU, from the
        `likelihood` [S,T,B] of tokens, and from such weights `past` before the first; `fresh` and
        `padding` [T,B] say which tokens end a text, and which are none."""
        B = likelihood.shape[2]
        likelihood = likelihood.swapaxes(0, 1)  # [T,S,B]
        on = np.ones((len(self.names), B)) if active is None else active.T.double().cpu().numpy()
        num_public = 1 + len(self.forms)
        on = np.concatenate([on[:1]] * num_public + [on[1:]])  # [S,B]
        # dropped, not multiplied by 0: a table that is off may hold NaN
        likelihood = np.where(on > 0, likelihood, 0.0)
        prior = on / sum_of(on, 0)  # [S,B]
        first = prior if past is None else past.numpy()
        found = self._filter(likelihood, prior, first, fresh, padding)
        public = sum_of(found[:, :num_public], 1)
        weights = np.concatenate([public, found[:, num_public:]], axis=1)  # [T,E,B]
        with np.errstate(divide="ignore"):
            logs = torch.from_numpy(np.log(weights)).float().permute(2, 0, 1)
        return logs, torch.from_numpy(found[-1])

    def read(self, ids: Tensor, is_token: Tensor | None, past: EvidenceState | None) -> Tensor:
        """Every domain's evidence at each token of ids [B,T], clipped, float32 [S,T,B]."""
        B, T = ids.shape
        before = torch.cat([self._first(ids, past), ids[:, :-1]], dim=1)  # [B,T]
        if is_token is not None:  # what stands before the first token is not the padding's id
            before[:, 1:] = torch.where(is_token[:, :-1], before[:, 1:], before[:, :1])
        return self.evidence(before.T.flatten(), ids.T.flatten()).view(-1, T, B)

    def _first(self, ids: Tensor, past: EvidenceState | None) -> Tensor:
        """The id before each text's first, [B,1]."""
        if past is None:
            return torch.full_like(ids[:, :1], self.eos_token_id)
        return past[0][:, None]

    def _filter(
        self,
        likelihood: np.ndarray,
        prior: np.ndarray,
        first: np.ndarray,
        fresh: np.ndarray,
        padding: np.ndarray | None,
    ) -> np.ndarray:
        """Weights at the token after each, [T,S,B] float64, from likelihoods [T,S,B], prior and
        first weights [S,B]; `fresh` and `padding` [T,B] say where the prior, or nothing, follows.

        Long texts are read in blocks at once. A block's weights are linear in those before it, but
        for scale: each is read from every domain alone, which gives the weights before all blocks,
        and then from these. Blocks depend on B and T alone, as a sum's order must.
        """
        T, S, B = likelihood.shape
        most = self.settings.tempering * self.settings.clip_nats  # nats by which one token scales
        period = max(1, int(MAX_NATS / most))
        size = min(math.isqrt(T), period) if T >= LONG_TEXT and B <= FEW_TEXTS else T
        count = -(-T // size)
        if count * size > T:
            padding = np.zeros_like(fresh) if padding is None else padding
            rest = ((0, count * size - T), (0, 0))
            likelihood = np.pad(likelihood, (*rest, (0, 0)))
            fresh = np.pad(fresh, rest)
            padding = np.pad(padding, rest, constant_values=True)
        # of all blocks, [size,count,...]
        likelihood = likelihood.reshape(count, size, S, B).swapaxes(0, 1)
        fresh = fresh.reshape(count, size, 1, B).swapaxes(0, 1)
        has_fresh = np.asarray(fresh.any((1, 2, 3)))
        if padding is not None:
            padding = padding.reshape(count, size, 1, B).swapaxes(0, 1)
        pull = self.settings.switch_rate * prior

        def read(t: int, weights: np.ndarray) -> np.ndarray:
            """Weights [count,...,S,B] after token t of all blocks, from those before."""

            def here(x: np.ndarray) -> np.ndarray:
                return x[t][:, None] if weights.ndim == 4 else x[t]

            seen = weights * here(likelihood)
            moved = (1.0 - self.settings.switch_rate) * seen + pull * sum_of(seen, -2)
            if padding is not None:
                moved = np.where(here(padding), weights, moved)
            return np.where(here(fresh), prior, moved) if has_fresh[t] else moved

        weights = first[None]
        if count > 1:
            alone = np.eye(S)[None, :, :, None]  # a domain alone before each block, [count,S,S,B]
            for t in range(size):
                alone = read(t, alone)
            forgets = np.asarray(fresh.any(0))  # [count,1,B] what stood before the block
            starts = [first]
            for block, forgot in zip(alone[:-1], forgets[:-1], strict=True):
                after = sum_of(block * starts[-1][:, None], 0)[0]
                after = np.where(forgot, block[0], after)
                starts.append(after / sum_of(after, 0))
            weights = np.stack(starts)
        found = np.empty((count, size, S, B))
        for t in range(size):
            weights = read(t, weights)
            if t % period == period - 1:
                weights = weights / sum_of(weights, -2)
            found[:, t] = weights
        every = found.reshape(count * size, S, B)[:T]
        return every / sum_of(every, 1)


def sum_of(parts: np.ndarray, axis: int) -> np.ndarray:
    """`_sum` of an array: one by one, so that experts of weight 0 and none at all give one sum."""
    return parts.cumsum(axis).take([-1], axis)


def _sum(parts: Tensor, dim: int) -> Tensor:
    """Sum over experts one by one, so that an expert of weight 0 and none at all give one sum;
    `dim` stays. A processor's running sum goes one by one, and is one call; a GPU's does not."""
    if parts.device.type == "cpu":
        return parts.cumsum(dim).narrow(dim, -1, 1)
    total, *rest = parts.split(1, dim)
    for part in rest:
        total = total + part
    return total


class LinearRouter(nn.Module):
    """Logits r_i . h + b_i with b_i <= 0, in float32; the public expert has no bias.

    The paper clamps a free parameter, min(b_i, 0); once positive it has no gradient and does
    nothing. By default we write b_i = -softplus(raw_i). Source: §3.3.2; that form is ours.
    """

    def __init__(self, settings: LinearSettings, names: list[str], d_model: int):
        super().__init__()
        self.settings = settings
        self.names = names
        self._memory: tuple[Tensor, Tensor | None] | None = None  # see `lay_out`
        self._places: list[int] = []
        self.rows = nn.ModuleDict({slot(n): nn.Linear(d_model, 1, bias=False) for n in names})
        self.raw_bias = nn.ParameterDict(
            {
                slot(n): nn.Parameter(first_raw_bias(settings))
                for n in names
                if n != PUBLIC and settings.has_bias
            }
        )

    def row(self, name: str) -> nn.Linear:
        """The row of one expert; its weight is [1,D]."""
        return cast(nn.Linear, self.rows[slot(name)])

    def bias(self, name: str) -> nn.Parameter | None:
        """The free parameter [1] of one expert's bias, if it has one."""
        return self.raw_bias.get(slot(name))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of one owner's row in this layer, as a bundle holds them."""
        raw = self.bias(name)
        return {"weight": self.row(name).weight} | ({} if raw is None else {"raw_bias": raw})

    @torch.no_grad()
    def lay_out(self) -> None:
        """Put all rows in one memory, as a processor multiplies them, and all biases, where this
        spares copies. Changes no number."""
        rows, free = self._together()
        if not rows.is_cpu or len(rows) > COLUMNS:
            return
        columns = F.pad(rows, (0, 0, 0, COLUMNS - len(rows))).T.contiguous()
        for row, own in zip(self.rows.values(), columns.split(1, dim=1), strict=False):
            row.weight.data = own.T
        if free is not None:
            for raw, one in zip(self.raw_bias.values(), free.split(1), strict=False):
                raw.data = one
        self._memory = columns.T, free
        self._places = self._where()

    def _where(self) -> list[int]:
        """Addresses of all parameters."""
        every = [*(row.weight for row in self.rows.values()), *self.raw_bias.values()]
        return [p.data_ptr() for p in every]

    def _laid_out(self) -> tuple[Tensor, Tensor | None] | None:
        """Rows [COLUMNS,D] and free parameters, with 0 behind those of experts; None if they are
        not laid out, a parameter has another memory since, or rows are to have gradients."""
        if self._memory is not None and self._places != self._where():
            self._memory = None
        return None if torch.is_grad_enabled() else self._memory

    def _apply(self, *arguments: Any, **options: Any) -> "LinearRouter":
        self._memory = None  # parameters move
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_memory": None}  # a copy has other memory

    def _together(self) -> tuple[Tensor, Tensor | None]:
        """A copy of rows [E,D] and of free parameters, which are filled up, as the library rounds
        the last of many in another way."""
        rows = torch.cat([self.row(n).weight for n in self.names])
        if not self.raw_bias:
            return rows, None
        free = torch.cat([self.raw_bias[slot(n)] for n in self.names[1:]])
        return rows, F.pad(free, (0, -len(free) % (REGISTERS_BYTES // free.element_size())))

    def forward(self, h: Tensor, batch_rows: int | None) -> Tensor:
        """Logits [B,T,E], in the order of `names`; h [B,T,D], batch_rows as in `product`."""
        x = h.float().flatten(0, 1)
        num_experts = len(self.names)
        laid_out = None if batch_rows is None else self._laid_out()
        rows, free = laid_out or self._together()
        logits = columns(x, rows.float(), batch_rows)[:, :num_experts]  # [N,E]
        if free is not None:
            free = free.float()
            bias = free.clamp(max=0) if self.settings.bias_form == "clamp" else -F.softplus(free)
            logits = logits + F.pad(bias[: num_experts - 1], (1, 0))
        return logits.view(*h.shape[:-1], -1)


class DiscriminantRow(nn.Module):
    """One expert's row of one layer: log odds over public, untempered."""

    def __init__(self, num_features: int):
        super().__init__()
        self.weight: Tensor
        self.offset: Tensor
        self.register_buffer("weight", torch.zeros(1, num_features))  # [1,R]
        self.register_buffer("offset", torch.zeros(1))  # [1]


class DiscriminantRouter(nn.Module):
    """Log odds of each owner's text over public text, from one layer's states, in float32.

    Public text's logit is 0. At an end-of-text token all are, for nothing is known of the text to
    come. Nothing is learned: see `hidden_statistics.discriminant_tensors`.
    """

    def __init__(self, settings: DiscriminantSettings, names: list[str], d_model: int, layer: int):
        """`layer` is the place of this router's state in a cache."""
        super().__init__()
        self.settings = settings
        self.names = names
        self.layer = layer
        self.rows = nn.ModuleDict(
            {slot(n): DiscriminantRow(settings.num_features(d_model)) for n in names if n != PUBLIC}
        )

    def row(self, name: str) -> DiscriminantRow:
        """The row of one owner's expert; public has none."""
        return cast(DiscriminantRow, self.rows[slot(name)])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of one owner's row in this layer, as a bundle holds them."""
        row = self.row(name)
        return {"weight": row.weight, "offset": row.offset}

    def forward(
        self, h: Tensor, texts: "Texts", past: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [B,T,E], in the order of `names`, and what to hand to the next call as `past`.

        h [B,T,D]; `past` is what the call that read the positions before gave.
        """
        x, state = texts.features(h, past)
        logits = []
        for name in self.names:
            logit = x.new_zeros(x.shape[:2])
            if name != PUBLIC:
                row = self.row(name)
                logit = F.linear(x, row.weight)[..., 0] + row.offset  # [B,T]
                logit = (self.settings.tempering * logit).masked_fill(texts.is_end, 0.0)
            logits.append(logit)
        return torch.stack(logits, dim=-1), state


@dataclass(frozen=True)
class Texts:
    """Ends of texts among the positions of one call, and weights of states along a text."""

    is_end: Tensor  # [B,T] end-of-text tokens
    decay: Tensor | None  # [B,T,1+T] what the state handed over, then each position, counts

    def features(self, h: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Features for rows, float32 [B,T,R], and the state [B,D+1] at the last position.

        With a decay, a position's own state and the mean of the text's states up to it.
        """
        x = h.float()
        if self.decay is None:
            return x, None
        if past is None:
            past = x.new_zeros(len(x), x.shape[2] + 1)
        counted = torch.cat([past[:, None], F.pad(x, (0, 1), value=1.0)], dim=1)  # [B,1+T,D+1]
        sums = self.decay @ counted  # [B,T,D+1]
        mean = sums[..., :-1] / sums[..., -1:].clamp(min=1.0)  # a text's last token counts 1
        return torch.cat([x, mean], dim=-1), sums[:, -1]


def find_texts(
    ids: Tensor, is_token: Tensor | None, eos_token_id: int, settings: DiscriminantSettings
) -> Texts:
    """Ends and decay of the texts in ids [B,T], the same for the routers of all layers.

    A state's count halves every `half_life_tokens` tokens. Padding counts nothing; at an
    end-of-text token all before it is forgotten, and it counts nothing itself.
    """
    is_token = torch.ones_like(ids, dtype=torch.bool) if is_token is None else is_token
    is_end = (ids == eos_token_id) & is_token  # [B,T]
    if not settings.has_context:
        return Texts(is_end, None)
    counts = is_token & ~is_end
    age = counts.cumsum(1)  # tokens so far
    text = is_end.cumsum(1)  # texts so far
    gap = age[:, :, None] - F.pad(age, (1, 0))[:, None]  # [B,T,1+T] tokens between
    is_past = (gap >= 0) & F.pad(counts, (1, 0), value=True)[:, None]  # what counts adds to age
    reaches = is_past & (text[:, :, None] == F.pad(text, (1, 0))[:, None])
    return Texts(is_end, torch.where(reaches, 0.5 ** (gap / settings.half_life_tokens), 0.0))


def mixture_weights(
    logits: Tensor,
    active: Tensor | None,
    top_k: int | None,
    min_weight: float = 0.0,
    renormalise: bool = False,
) -> Tensor:
    """Softmax of logits [B,T,E] over the enabled experts, then top-k: [B,T,E] float32.

    A weight below `min_weight` becomes 0, unless it is the largest. With `renormalise` what is left
    sums to 1 again (ours); the paper leaves it.

    `active` is [B,E] or None for all. Sums run expert by expert, and ties go to the first name, so
    leaving an expert out and never having had it give the same bits. Source: §3.2.
    """
    if active is not None:
        logits = logits.masked_fill(~active[:, None], -math.inf)
    parts = torch.exp(logits - logits.amax(-1, keepdim=True))
    weights = parts / _sum(parts, -1)
    if top_k is not None and top_k < logits.shape[-1]:
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        keep = torch.zeros_like(weights, dtype=torch.bool)
        keep.scatter_(-1, order[..., :top_k], True)
        weights = weights * keep
    if min_weight > 0:
        largest = weights.amax(-1, keepdim=True).clamp(max=min_weight)
        weights = weights.where(weights >= largest, weights.new_zeros(()))
    return weights / _sum(weights, -1) if renormalise else weights
