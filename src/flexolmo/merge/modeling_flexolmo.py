# FlexOlmo, under the Apache License, version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""A FlexOlmo mixture as transformers loads it with `trust_remote_code=True`.

`flexolmo mix export --code` puts this file, as it is, beside the weights. It needs torch and
transformers alone. Any mixture runs: each kind of router, experts whole and of low rank, of the FFN
alone or of attention, embedding and output head too. `experts=` of `generate` and of a call names
who may take part; whoever is not named changes no number. OLMo 2's own parts are transformers'.

B batch, T positions, S positions in cache and input together, N = B*T, n positions that picked an
expert, D hidden_size, V vocabulary, E experts, "public" first, L layers, R features of a router's
row, Z domains: public, its other forms, then the other experts.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.olmo2.configuration_olmo2 import Olmo2Config
from transformers.models.olmo2.modeling_olmo2 import (
    Olmo2Attention,
    Olmo2DecoderLayer,
    Olmo2Model,
    Olmo2PreTrainedModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple

PUBLIC = "public"
Experts = Iterable[str] | Sequence[Iterable[str]] | Tensor


def slot(name: str) -> str:
    """An expert's key among torch's modules, whose own attributes no name must meet."""
    return f"expert_{name}"


class FlexOlmoMixtureConfig(Olmo2Config):
    """The anchor's configuration, as OLMo 2's, and what stands beside the anchor."""

    model_type = "flex_olmo_mixture"
    base_model_tp_plan = {}  # noqa: RUF012
    base_model_pp_plan = {}  # noqa: RUF012

    experts: dict | None = None  # type: ignore[type-arg]  # sizes of owners' experts, by name
    router: dict | None = None  # type: ignore[type-arg]  # its kind and settings
    experts_per_token: int | None = None  # None: all that are on
    end_of_text_id: int = 0  # token at which another text begins, whatever ends an answer
    document_mask: bool = False  # True: attention stays within a text

    @property
    def expert_names(self) -> list[str]:
        """Names of all experts, "public" first."""
        return [PUBLIC, *sorted(self.experts or {})]

    def ranks(self, part: str) -> dict[str, int]:
        """Ranks, by name, of the experts that have a `part` ("attention", "head") of their own."""
        every = {n: s[f"{part}_rank"] for n, s in (self.experts or {}).items()}
        return {n: rank for n, rank in every.items() if rank}


# Who takes part where


@dataclass(frozen=True)
class Share:
    """The positions that picked an expert, and its weight there."""

    rows: Tensor  # [n] of N
    weight: Tensor  # [n,1] in the model's dtype

    def put(self, total: Tensor, value: Tensor) -> None:
        """Add weight * `value` [n,.] to `total` [N,.] at the positions that picked the expert."""
        total.index_add_(0, self.rows, self.weight * value)


def share_of(weight: Tensor, dtype: torch.dtype) -> Share | None:
    """The share of an expert of `weight` [N]; None if no position picked it, so that its numbers,
    which may even be none, are not read."""
    rows = weight.nonzero()[:, 0]
    return Share(rows, weight[rows, None].to(dtype)) if len(rows) else None


def total_of(parts: Tensor, dim: int) -> Tensor:
    """Sum, one by one, so that an expert of weight 0 and none at all give one sum; `dim` stays."""
    return parts.cumsum(dim).narrow(dim, -1, 1)


def mixture_weights(
    logits: Tensor, active: Tensor, top_k: int | None, least: float | None = None
) -> Tensor:
    """Softmax of logits [B,T,E] over the experts that are on by `active` [B,E], then top-k.

    With `least`, weights below it, but for the largest, become 0, and the rest sum to 1 again.
    """
    logits = logits.masked_fill(~active[:, None], -math.inf)
    parts = torch.exp(logits - logits.amax(-1, keepdim=True))
    weights = parts / total_of(parts, -1)
    if top_k is not None and top_k < logits.shape[-1]:
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        keep = torch.zeros_like(weights, dtype=torch.bool)
        weights = weights * keep.scatter_(-1, order[..., :top_k], True)
    if least is not None:
        largest = weights.amax(-1, keepdim=True).clamp(max=least)
        weights = weights.where(weights >= largest, weights.new_zeros(()))
        weights = weights / total_of(weights, -1)
    return weights


@dataclass
class Reading:
    """Facts of a step's tokens, beside the residual stream."""

    ids: Tensor  # [B,T]; -1 on padding
    active: Tensor  # [B,E] True where an expert is on
    past: "RouterState"
    weights: Tensor | None = None  # [B,T,E] where one router decides for all layers
    shares: Sequence[Share | None] = ()  # the same, by expert
    decay: Tensor | None = None  # [B,T,1+T] counts of states in a text's mean, see `decay_of`
    sums: Sequence[Tensor] = ()  # of states, [B,T,D+1] by layer


class RouterState(DynamicLayer):
    """A last layer of the cache: tokens, who was on, and what the router knew after each token.

    Its keys are [B,1,S,1+E], its values [B,1,S,.]; so it is cropped, and follows beams, as others.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take both as they are, each of its own type."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    @property
    def ids(self) -> Tensor | None:
        """Tokens read before, [B,S-T]; -1 on padding; None: a text begins."""
        return None if self.keys is None else self.keys[:, 0, :, 0]

    @property
    def active(self) -> Tensor | None:
        """Experts that are on, [B,E]."""
        return None if self.keys is None else self.keys[:, 0, -1, 1:].bool()

    @property
    def last(self) -> Tensor | None:
        """State after the last token, [B,.]."""
        return None if self.values is None else self.values[:, 0, -1]

    def keep(self, reading: Reading, after: Tensor | None) -> None:
        """Take in the tokens of a step, and the states [B,T,.] after them, if there are any."""
        ids = reading.ids[..., None]  # [B,T,1]
        active = reading.active[:, None].expand(-1, ids.shape[1], -1)
        values = ids[..., :0] if after is None else after
        self.update(torch.cat([ids, active.long()], dim=-1)[:, None], values[:, None])


# Routers


class PairTable(nn.Module):
    """Statistics of one text, by token and by pair of tokens; of public text log-probabilities, of
    another evidence over public text."""

    def __init__(self, vocab_size: int, num_pairs: int):
        super().__init__()
        self.tokens: Tensor
        self.contexts: Tensor
        self.keys: Tensor
        self.pairs: Tensor
        self.register_buffer("tokens", torch.zeros(vocab_size))  # [V] of a token
        self.register_buffer("contexts", torch.zeros(vocab_size))  # [V] of the token before
        self.register_buffer("keys", torch.zeros(num_pairs, dtype=torch.long))  # before * V + id
        self.register_buffer("pairs", torch.zeros(num_pairs))  # of pairs listed in `keys`

    def forward(self, before: Tensor, ids: Tensor, order: Tensor | float = 0.0) -> Tensor:
        """Numbers of tokens `ids` that stand after `before`; `order` is taken off where a pair is
        not listed."""
        found = self.contexts[before] + self.tokens[ids] - order
        if not len(self.keys):
            return found
        pairs = before * len(self.tokens) + ids
        place = torch.searchsorted(self.keys, pairs).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[place] == pairs, self.pairs[place], found)


class EvidenceRouter(nn.Module):
    """Chance that each token to come is of each domain, from statistics of the tokens so far.

    A text stays in its domain from one token to the next, or turns to any that is on. It begins
    anew after an end of text.
    """

    def __init__(self, config: FlexOlmoMixtureConfig):
        super().__init__()
        settings = config.router or {}
        sizes = config.experts or {}
        size = config.vocab_size
        self.settings = settings
        self.end_of_text_id = config.end_of_text_id
        self.public = PairTable(size, settings["public_pairs"])
        self.forms = nn.ModuleList(PairTable(size, n) for n in settings["form_pairs"])
        self.tables = nn.ModuleDict(
            {slot(n): PairTable(size, sizes[n]["num_bigrams"]) for n in config.expert_names[1:]}
        )

    def evidence(self, before: Tensor, ids: Tensor) -> Tensor:
        """Evidence of all domains at tokens `ids` [B,T] that stand after `before`, [B,T,Z]."""
        preference = self.public(before, ids) - self.public.tokens[ids]
        order = (1.0 - self.settings["public_order"]) * preference
        tables = [*self.forms, *self.tables.values()]
        found = [torch.zeros_like(order), *(table(before, ids, order) for table in tables)]
        limit = self.settings["clip_nats"]
        return torch.stack(found, dim=-1).clamp(-limit, limit)

    def forward(self, reading: Reading) -> tuple[Tensor, Tensor]:
        """Log weights [B,T,E] in float32, and chances [B,T,Z] after each token, in float64."""
        if self.public.tokens.dtype != torch.float32:
            raise ValueError(
                "Routing is in float32. To load a checkpoint in another precision, give dtype to "
                "from_pretrained."
            )
        is_token = reading.ids >= 0  # [B,T]
        earlier = reading.past.ids
        first = torch.full_like(reading.ids[:, :1], -1) if earlier is None else earlier[:, -1:]
        before = torch.cat([first, reading.ids[:, :-1]], dim=1)
        before = before.where(before >= 0, self.end_of_text_id)
        evidence = self.evidence(before, reading.ids.clamp(min=0)) * self.settings["tempering"]
        num_public = 1 + len(self.forms)
        on = reading.active.cpu()
        on = torch.cat([on[:, :1].expand(-1, num_public), on[:, 1:]], dim=1)  # [B,Z]
        # dropped, not multiplied by 0: a table that is off may hold NaN
        likelihood = torch.where(on[:, None], evidence.cpu().double().exp(), 0.0)
        prior = on.double() / total_of(on.double(), -1)
        pull = self.settings["switch_rate"] * prior
        is_end = ((reading.ids == self.end_of_text_id) & is_token).cpu()
        is_padding = ~is_token.cpu()
        chance = prior if reading.past.last is None else reading.past.last.cpu()
        found = []
        for t in range(likelihood.shape[1]):
            seen = chance * likelihood[:, t]
            moved = (1.0 - self.settings["switch_rate"]) * seen + pull * total_of(seen, -1)
            moved = moved / total_of(moved, -1)
            chance = torch.where(is_padding[:, t, None], chance, moved)
            chance = torch.where(is_end[:, t, None], prior, chance)
            found.append(chance)
        chances = torch.stack(found, dim=1)
        public = total_of(chances[..., :num_public], -1)
        weights = torch.cat([public, chances[..., num_public:]], dim=-1)
        return weights.log().float().to(reading.ids.device), chances


class LayerRouter(nn.ModuleDict):
    """One row of an expert, read against the residual stream of one layer, in float32."""

    def __init__(self, config: FlexOlmoMixtureConfig):
        settings = config.router or {}
        size = config.hidden_size * (2 if settings.get("half_life_tokens") else 1)
        super().__init__({slot(n): nn.Linear(size, 1) for n in config.expert_names})
        self.settings = settings
        self.end_of_text_id = config.end_of_text_id

    def forward(self, h: Tensor, reading: Reading, layer: int) -> Tensor:
        """Logits [B,T,E] of h [B,T,D]."""
        x = h.float()
        if reading.decay is not None:  # the mean of the text's states, beside each
            width = x.shape[-1] + 1
            earlier = x.new_zeros(len(x), width)
            if reading.past.last is not None:
                earlier = reading.past.last[:, layer * width : (layer + 1) * width]
            counted = torch.cat([earlier[:, None], F.pad(x, (0, 1), value=1.0)], dim=1)
            sums = reading.decay @ counted  # [B,T,D+1]
            reading.sums = [*reading.sums, sums]
            x = torch.cat([x, sums[..., :-1] / sums[..., -1:].clamp(min=1.0)], dim=-1)
        # one by one, as a row of several may round by how many there are
        logits = torch.cat([row(x) for row in self.values()], dim=-1)  # [B,T,E]
        if self.settings["kind"] == "discriminant":
            is_end = reading.ids == self.end_of_text_id
            logits = (self.settings["tempering"] * logits).masked_fill(is_end[..., None], 0.0)
        return logits


def decay_of(ids: Tensor, end_of_text_id: int, half_life_tokens: float) -> Tensor:
    """Count [B,T,1+T] of the state handed over, then of each position's, in the mean of its text at
    each of ids [B,T]; padding and ends of texts count nothing."""
    is_end = ids == end_of_text_id
    counts = (ids >= 0) & ~is_end
    age = counts.cumsum(1)  # tokens so far
    text = is_end.cumsum(1)  # texts so far
    gap = age[:, :, None] - F.pad(age, (1, 0))[:, None]  # [B,T,1+T] tokens between
    is_past = (gap >= 0) & F.pad(counts, (1, 0), value=True)[:, None]
    reaches = is_past & (text[:, :, None] == F.pad(text, (1, 0))[:, None])
    return torch.where(reaches, 0.5 ** (gap / half_life_tokens), 0.0)


# Experts


class LowRank(nn.Module):
    """A difference B A to the anchor's matrix."""

    def __init__(self, d_in: int, d_out: int, rank: int):
        super().__init__()
        self.lora_a = nn.Parameter(torch.zeros(rank, d_in))
        self.lora_b = nn.Parameter(torch.zeros(d_out, rank))

    def forward(self, x: Tensor) -> Tensor:
        """The difference that it makes to rows x [.,in]."""
        return F.linear(F.linear(x, self.lora_a), self.lora_b)


def matrix_of(d_in: int, d_out: int, rank: int) -> nn.Module:
    """A matrix of an owner's own, or a difference of lower `rank` than the anchor's (0: whole)."""
    if rank and rank < d_in:
        return LowRank(d_in, d_out, rank)
    return nn.Linear(d_in, d_out, bias=False)


class FeedForward(nn.Module):
    """SwiGLU of one expert, which may be differences to the anchor's."""

    def __init__(self, d_model: int, d_ff: int, rank: int = 0):
        super().__init__()
        self.gate_proj = matrix_of(d_model, d_ff, rank)
        self.up_proj = matrix_of(d_model, d_ff, rank)
        self.down_proj = matrix_of(d_ff, d_model, rank)

    def forward(self, x: Tensor, public: "FeedForward") -> Tensor:
        """Output of rows x [n,D]."""

        def read(part: str, x: Tensor) -> Tensor:
            own = getattr(self, part)
            if isinstance(own, LowRank):
                return cast(Tensor, getattr(public, part)(x) + own(x))
            return cast(Tensor, own(x))

        return read("down_proj", F.silu(read("gate_proj", x)) * read("up_proj", x))


class Mixture(nn.Module):
    """Experts of one layer, summed by weight, in place of the FFN."""

    def __init__(self, config: FlexOlmoMixtureConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.top_k = config.experts_per_token
        sizes = {PUBLIC: {"d_ff": config.intermediate_size, "rank": 0}, **(config.experts or {})}
        self.experts = nn.ModuleDict()
        for name in config.expert_names:
            own = sizes[name]
            self.experts[slot(name)] = FeedForward(config.hidden_size, own["d_ff"], own["rank"])
        is_own = (config.router or {})["kind"] != "evidence"
        self.router = LayerRouter(config) if is_own else None

    def forward(self, h: Tensor, reading: Reading) -> Tensor:
        """Output of h [B,T,D]."""
        shares = reading.shares
        if self.router is not None:
            logits = self.router(h, reading, self.layer)
            weights = mixture_weights(logits, reading.active, self.top_k).flatten(0, 1)
            shares = [share_of(w, h.dtype) for w in weights.T]
        rows = h.flatten(0, 1)
        total = torch.zeros_like(rows)
        public = self.experts[slot(PUBLIC)]
        for share, expert in zip(shares, self.experts.values(), strict=True):
            if share is not None:
                share.put(total, expert(rows[share.rows], public))
        return total.view_as(h)


class MixedMatrix(nn.Module):
    """A matrix [out,in] of the anchor's, of an embedding too, with owners' own: whole ones in its
    place, or differences to it."""

    def __init__(
        self, base: nn.Linear | nn.Embedding, ranks: dict[str, int], config: FlexOlmoMixtureConfig
    ):
        super().__init__()
        self.weight = base.weight
        d_out, d_in = base.weight.shape
        self.deltas = nn.ModuleDict({slot(n): matrix_of(d_in, d_out, r) for n, r in ranks.items()})
        self.places = [config.expert_names.index(n) for n in ranks]
        self.is_embedding = isinstance(base, nn.Embedding)

    def _read(self, x: Tensor, own: nn.Module) -> Tensor:
        """Rows x [n,in], or ids [n], by the anchor's matrix or an owner's."""
        if self.is_embedding:
            if isinstance(own, LowRank):
                return F.linear(F.embedding(x, own.lora_b), own.lora_a.T)
            return F.embedding(x, cast(Tensor, own.weight))
        # of the anchor's, `own` is this module
        return cast(Tensor, F.linear(x, self.weight) if own is self else own(x))

    def forward(self, x: Tensor, reading: "Reading") -> Tensor:
        """Output of x [B,T,in], or ids [B,T], by share."""
        assert reading.weights is not None, "one router decides for all layers"
        weights = reading.weights.flatten(0, 1)  # [N,E]
        rest = torch.ones_like(weights[:, 0])  # left to the anchor's matrix
        found: list[tuple[Share, nn.Module]] = []
        for place, own in zip(self.places, self.deltas.values(), strict=True):
            share = reading.shares[place]
            if share is None:
                continue
            found.append((share, own))
            if not isinstance(own, LowRank):
                rest = rest - weights[:, place]
        # less is the rounding of weights that sum to 1
        rest = rest.where(rest > 4 * torch.finfo(rest.dtype).eps, rest.new_zeros(()))
        anchors = share_of(rest, self.weight.dtype)
        if anchors is not None:
            found.insert(0, (anchors, self))
        flat = x.flatten(0, 1)  # [N,.]
        total: Tensor | None = None
        for share, own in found:
            value = self._read(flat[share.rows], own)
            if total is None:
                total = value.new_zeros(len(flat), value.shape[-1])
            share.put(total, value)
        assert total is not None, "somebody reads each token"
        return total.view(*x.shape[:2], -1)


# The decoder


def times(matrix: nn.Module, x: Tensor, reading: Reading) -> Tensor:
    """x [B,T,in], or ids [B,T], read by a matrix that owners may have their own of, [B,T,out]."""
    return cast(Tensor, matrix(x, reading) if isinstance(matrix, MixedMatrix) else matrix(x))


class MixtureAttention(Olmo2Attention):
    """OLMo 2's attention, in whose matrices owners may have a part."""

    def __init__(self, config: FlexOlmoMixtureConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if ranks := config.ranks("attention"):
            for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(self, part, MixedMatrix(getattr(self, part), ranks, config))

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        reading: Reading,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Output [B,T,D] for hidden_states [B,T,D], and attention's weights if asked for."""
        query = self.q_norm(times(self.q_proj, hidden_states, reading))
        key = self.k_norm(times(self.k_proj, hidden_states, reading))
        value = times(self.v_proj, hidden_states, reading)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (y.view(shape).transpose(1, 2) for y in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, cast(int, self.layer_idx))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        y, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        y = y.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return times(self.o_proj, y, reading), weights


class MixtureLayer(Olmo2DecoderLayer):
    """OLMo 2's layer with a mixture in place of its FFN."""

    def __init__(self, config: FlexOlmoMixtureConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = MixtureAttention(config, layer_idx)
        self.mlp = Mixture(config, layer_idx)  # type: ignore[assignment]

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, reading: Reading, **kwargs: Any
    ) -> Tensor:
        """The residual stream [B,T,D] after the layer."""
        y, _ = self.self_attn(hidden_states, reading=reading, **kwargs)
        h = hidden_states + self.post_attention_layernorm(y)
        return h + self.post_feedforward_layernorm(self.mlp(h, reading))


class FlexOlmoMixtureModel(Olmo2Model):
    """The decoder without its head; called by `FlexOlmoMixtureForCausalLM` alone."""

    config_class = FlexOlmoMixtureConfig

    def __init__(self, config: FlexOlmoMixtureConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            MixtureLayer(config, i) for i in range(config.num_hidden_layers)
        )
        if ranks := config.ranks("embedding"):
            self.embed_tokens = MixedMatrix(  # type: ignore[assignment]
                self.embed_tokens, ranks, config
            )
        self.post_init()  # type: ignore[no-untyped-call]


class FlexOlmoMixtureForCausalLM(Olmo2PreTrainedModel, GenerationMixin):
    """A mixture with a language model's head."""

    config_class = FlexOlmoMixtureConfig
    _keep_in_fp32_modules_strict = [r"(?:^|\.)router\."]  # noqa: RUF012
    _no_split_modules = ["MixtureLayer"]  # noqa: RUF012
    _supports_flash_attn = False  # it would pass over the mask of texts
    _can_compile_fullgraph = False

    def __init__(self, config: FlexOlmoMixtureConfig):
        super().__init__(config)
        self.model = FlexOlmoMixtureModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if ranks := config.ranks("head"):
            self.lm_head = MixedMatrix(self.lm_head, ranks, config)
        is_evidence = (config.router or {})["kind"] == "evidence"
        self.router = EvidenceRouter(config) if is_evidence else None
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def expert_names(self) -> list[str]:
        """Names that `experts` may hold; "public" takes part whether it is named or not."""
        return self.config.expert_names

    def expert_mask(self, experts: Experts | None, batch_size: int) -> Tensor:
        """Experts that are on, [B,E]: by names, the same for all texts or a list for each.

        None: all. ValueError for a name that this checkpoint does not hold, and for a mask that is
        none of this method's.
        """
        names = self.expert_names
        if isinstance(experts, Tensor):
            shape = [batch_size, len(names)]
            if (
                experts.dtype != torch.bool
                or list(experts.shape) != shape
                or not experts[:, 0].all()
            ):
                raise ValueError(
                    f"experts is {experts.dtype} {list(experts.shape)}; expected names, or bool "
                    f"{shape} with True for {PUBLIC}, which comes first."
                )
            return experts.to(self.device)
        if isinstance(experts, str):
            raise ValueError(f"experts is {experts!r}; expected a list of names: [{experts!r}].")
        given = list[Any](names if experts is None else experts)
        if all(isinstance(one, str) for one in given):
            given = [given] * batch_size
        if len(given) != batch_size:
            raise ValueError(f"experts has {len(given)} lists of names for {batch_size} texts.")
        if any(one is None or isinstance(one, str) for one in given):
            raise ValueError(
                "experts mixes names and lists; expected names, or a list for each text."
            )
        every = [set(chosen) for chosen in given]
        unknown = sorted(set().union(*every) - set(names))
        if unknown:
            raise ValueError(
                f"Unknown expert {', '.join(unknown)}: this checkpoint holds "
                f"{', '.join(names[1:]) or 'no owner'}."
            )
        on = [[n == PUBLIC or n in chosen for n in names] for chosen in every]
        return torch.tensor(on, dtype=torch.bool, device=self.device)

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        experts: Experts | None = None,
        **kwargs: Any,
    ) -> Any:
        """Text, as `GenerationMixin.generate` writes it, with `experts` on; see `expert_mask`."""
        if experts is not None:
            given = kwargs.get("input_ids") if inputs is None else inputs
            kwargs["experts"] = self.expert_mask(experts, 1 if given is None else len(given))
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        experts: Experts | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B,T,V] after input_ids [B,T], with `experts` on; see `expert_mask`.

        With a cache, who is on is what it was at a text's first tokens, and cannot change.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("A mixture reads input_ids; inputs_embeds do not say what to route.")
        if use_cache is None:
            use_cache = self.config.use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        reading, is_token = self._read(input_ids, attention_mask, past_key_values, experts)
        if position_ids is None:
            position_ids = (is_token.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        after = None
        if self.router is not None:
            logs, after = self.router(reading)
            least = self.router.settings["min_weight"]
            top_k = self.config.experts_per_token
            reading.weights = mixture_weights(logs, reading.active, top_k, least)
            reading.shares = self._shares(reading.weights)
        embedded = times(self.model.embed_tokens, input_ids, reading)
        outputs = self.model(
            inputs_embeds=embedded,
            attention_mask=self._mask(embedded, is_token, reading, past_key_values),
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            reading=reading,
            **kwargs,
        )
        if past_key_values is not None:
            if reading.sums:
                after = torch.cat(list(reading.sums), dim=-1)
            reading.past.keep(reading, after)
            if not any(layer is reading.past for layer in past_key_values.layers):
                past_key_values.layers.append(reading.past)
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = hidden[:, kept]
        if reading.weights is not None:
            reading.weights = reading.weights[:, kept]
            reading.shares = self._shares(reading.weights)
        logits = times(self.lm_head, hidden, reading)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _read(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        experts: Experts | None,
    ) -> tuple[Reading, Tensor]:
        """Facts of a step's tokens, and which positions so far hold one, [B,S]."""
        layers = [] if cache is None else cache.layers
        found = [layer for layer in layers if isinstance(layer, RouterState)]
        past = found[0] if found else RouterState()  # type: ignore[no-untyped-call]
        if cache is not None and cache.is_compileable:
            raise ValueError("A mixture needs a cache that grows: leave cache_implementation out.")
        if cache is not None and cache.get_seq_length() and past.ids is None:
            raise ValueError("This cache was filled by another model; begin with an empty one.")
        earlier = ids[:, :0] if past.ids is None else past.ids
        length = earlier.shape[1] + ids.shape[1]
        is_token = torch.cat([earlier >= 0, torch.ones_like(ids, dtype=torch.bool)], dim=1)
        if attention_mask is not None:
            if attention_mask.shape != (len(ids), length):
                raise ValueError(
                    f"attention_mask has shape {list(attention_mask.shape)}; expected "
                    f"{[len(ids), length]}: a number for each token, those in the cache included."
                )
            is_token = attention_mask.bool()
        active = past.active
        if active is None or experts is not None:
            active = self.expert_mask(experts, len(ids))
        if past.active is not None and not torch.equal(active, past.active):
            raise ValueError(
                "The experts that are on cannot change after a text's first tokens: begin again "
                "with a new cache."
            )
        reading = Reading(ids.where(is_token[:, -ids.shape[1] :], -1), active, past)
        settings = self.config.router or {}
        if half_life := settings.get("half_life_tokens"):
            reading.decay = decay_of(reading.ids, self.config.end_of_text_id, half_life)
        return reading, is_token

    def _shares(self, weights: Tensor) -> list[Share | None]:
        """Shares, by expert, of weights [B,T,E]."""
        return [share_of(w, self.lm_head.weight.dtype) for w in weights.flatten(0, 1).T]

    def _mask(
        self, embedded: Tensor, is_token: Tensor, reading: Reading, cache: Cache | None
    ) -> Tensor | None:
        """Mask for attention: [B,S] of padding, or [B,1,T,S] where texts do not see each other."""
        padding = None if bool(is_token.all()) else is_token
        if not self.config.document_mask:
            return padding
        earlier = reading.past.ids
        ids = reading.ids if earlier is None else torch.cat([earlier, reading.ids], dim=1)
        text = (ids == self.config.end_of_text_id).cumsum(1)  # [B,S]
        if bool((text == text[:, :1]).all()):
            return padding
        return cast(
            Tensor,
            create_causal_mask(
                config=self.config,
                inputs_embeds=embedded,
                attention_mask=padding,
                past_key_values=cache,
                and_mask_function=lambda b, h, q, k: text[b, q] == text[b, k],
            ),
        )
