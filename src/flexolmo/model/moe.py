"""The mixture: the anchor's decoder with several experts in place of each FFN.

Experts go by name: `public` is the anchor's own FFN, the others are owners'. Knows neither files
nor owners' rights; the caller says which experts are active for each sequence.

A disabled expert changes no bit: its router logit is dropped before the softmax, so no position
of the sequence picks it; and products are computed in tiles or with panels, whose rows keep their
bits whatever else is in the batch.

B batch, T positions, D d_model, E experts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.errors import PolicyError
from flexolmo.model.blend import Blend, alone, blend_of
from flexolmo.model.cache import Cache
from flexolmo.model.deltas import (
    DeltaEmbedding,
    DeltaLinear,
    LowRank,
    LowRankFeedForward,
    Share,
    blend_low_rank,
    mix_low_rank,
    shares_of,
)
from flexolmo.model.groups import Groups, groups_of
from flexolmo.model.lanes import Lanes
from flexolmo.model.panels import Panels
from flexolmo.model.router import (
    DiscriminantRouter,
    DiscriminantSettings,
    EvidenceRouter,
    LinearRouter,
    LinearSettings,
    RouterSettings,
    find_texts,
    mixture_weights,
    slot,
)
from flexolmo.model.shape import ATTENTION_PARTS, ExpertShape
from flexolmo.model.spans import Reads
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.model.tiles import spaced
from flexolmo.model.transformer import (
    FeedForward,
    ForwardContext,
    ModelConfig,
    Transformer,
    rows_at_once,
)

GROUPED_ROWS = 256  # read at once, up to which experts share all work but their products


class Mixture(nn.Module):
    """Experts of one layer, summed by weight; stands where the FFN stood.

    The anchor's FFN is computed once, for itself and for all low-rank experts.
    """

    def __init__(
        self,
        experts: Mapping[str, nn.Module],
        router: LinearRouter | DiscriminantRouter | None,
        top_k: int | None,
    ):
        super().__init__()
        self.experts = nn.ModuleDict({slot(n): e for n, e in experts.items()})
        self.router = router
        self.top_k = top_k
        self.is_even = len({_width(e) for e in experts.values()}) == 1

    def expert(self, name: str) -> nn.Module:
        """One expert's FFN: a `FeedForward`, or a `LowRankFeedForward`."""
        return self.experts[slot(name)]

    def forward(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        weights, shares, groups = ctx.weights, ctx.shares, ctx.groups  # [B,T,E]
        if self.router is not None:
            logits = self._logits(self.router, h, ctx)
            weights = mixture_weights(logits, ctx.active, self.top_k)
            learns_all = self.training and self.top_k is None and ctx.active is None
            groups = self.group(weights, ctx)
            if groups is None:
                shares = shares_of(weights, ctx.active, ctx.fill, h.dtype, learns_all)
            if ctx.router_logits is not None:
                ctx.router_logits.append(logits)
        assert weights is not None, "a mixture needs weights from its model or its layer"
        if ctx.routing is not None:
            ctx.routing.append(weights.detach())
        if ctx.blend is not None:
            return self._blend(h.flatten(0, 1), ctx).view_as(h)
        if groups is not None:
            return self._mix_groups(h.flatten(0, 1), groups, ctx).view_as(h)
        return self._mix(h.flatten(0, 1), shares, ctx).view_as(h)

    def group(self, weights: Tensor, ctx: ForwardContext) -> Groups | None:
        """Groups of a small batch from its weights [B,T,E], where experts are whole, of one width
        and in panels."""
        is_small = 1 < weights.shape[:2].numel() <= GROUPED_ROWS
        return groups_of(weights, ctx.dtype) if ctx.panels and self.is_even and is_small else None

    def _logits(
        self, router: LinearRouter | DiscriminantRouter, h: Tensor, ctx: ForwardContext
    ) -> Tensor:
        """[B,T,E]"""
        if isinstance(router, LinearRouter):
            return cast(Tensor, router(h, ctx.batch_rows))
        memory = None if ctx.cache is None else ctx.cache[router.layer]
        logits, context = router(h, ctx.texts, memory and memory.context)
        if memory is not None:
            memory.context = context
        return logits

    def _blend(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        """The same for the anchor and the one expert that learns beside it."""
        blend: Blend = ctx.blend
        public, own = cast(tuple[FeedForward, nn.Module], tuple(self.experts.values()))
        if isinstance(own, LowRankFeedForward):
            return blend_low_rank(h, public, own, blend)
        own_h, public_h = blend.split(h)
        return blend.join(cast(FeedForward, own).read(own_h, ctx), public.read(public_h, ctx))

    def _mix_groups(self, h: Tensor, groups: Groups, ctx: ForwardContext) -> Tensor:
        """`_mix`, bit for bit, of whole experts of one width in panels."""
        panels = cast(Panels, ctx.panels)
        public, *owners = cast(list[FeedForward], [*self.experts.values()])
        read = [(e, n) for e, n in zip([*owners, public], groups.sizes, strict=True) if n]
        sizes = [n for _, n in read]
        rows = h.index_select(0, groups.reads).split(sizes)
        inner = [panels[e].gated(x) for (e, _), x in zip(read, rows, strict=True)]  # [n,F]
        own = len(groups.reads) - groups.sizes[-1]
        if groups.sizes[-1]:
            inner[-1] = groups.weight[own:] * inner[-1]
        values = torch.cat(
            [panels[e.down_proj].times(x) for (e, _), x in zip(read, inner, strict=True)]
        )
        values[:own] *= groups.weight[:own]
        return groups.sum(values)

    def _mix(self, h: Tensor, shares: Sequence[Share | None], ctx: ForwardContext) -> Tensor:
        """Weighted sum of the outputs for rows h [N,D]."""
        public = cast(FeedForward, self.expert(PUBLIC))
        mixed, low_rank = None, []
        most = rows_at_once() if ctx.panels else len(h)  # of an expert, which a cache holds
        for share, expert in zip(shares[1:], [*self.experts.values()][1:], strict=True):
            if share and isinstance(expert, LowRankFeedForward):
                low_rank.append((share, expert))
            elif share:
                whole = cast(FeedForward, expert)
                for part in share.pieces(most):
                    mixed = part.add(mixed, whole.read(part.pick(h), ctx))
        share = shares[0]
        if low_rank:
            mixed = mix_low_rank(h, mixed, public, share, low_rank, ctx)
        elif share:
            for part in share.pieces(most):
                mixed = part.put(mixed, public.read(part.pick(h), ctx, part.weight))
        return cast(Tensor, mixed)


class MixtureModel(Transformer):
    """The anchor's frame with a `Mixture` in every layer, and one router.

    `expert_names` starts with "public"; the rest are in alphabetical order, so the order in which
    owners came does not matter. An expert reads only the positions that picked it.
    """

    def __init__(
        self,
        config: ModelConfig,
        experts: Mapping[str, ExpertShape],
        router: RouterSettings,
        *,
        top_k: int | None = None,
        public_bigrams: int = 0,
        form_bigrams: Sequence[int] = (),
    ):
        """`experts` maps each owner's expert to its shape; `public_bigrams` and `form_bigrams` are
        the anchor's."""
        super().__init__(config)
        self.trains_alone = False  # True: in training the last expert reads every token, alone
        self.expert_names = [PUBLIC, *sorted(experts)]
        self.shapes = {n: experts[n] for n in self.expert_names[1:]}
        self.settings = router
        self.top_k = top_k
        self.router: EvidenceRouter | None = None
        if isinstance(router, EvidenceSettings):
            sizes = {PUBLIC: public_bigrams} | {n: s.num_bigrams for n, s in self.shapes.items()}
            self.router = EvidenceRouter(
                router,
                self.expert_names,
                config.vocab_size,
                sizes,
                config.eos_token_id,
                form_bigrams,
            )
        for i, block in enumerate(self.layers):
            ffns: dict[str, nn.Module] = {PUBLIC: cast(nn.Module, block.mlp)}
            ffns |= {n: _feed_forward(config, shape) for n, shape in self.shapes.items()}
            own: LinearRouter | DiscriminantRouter | None = None
            if isinstance(router, LinearSettings):
                own = LinearRouter(router, self.expert_names, config.d_model)
            elif isinstance(router, DiscriminantSettings):
                own = DiscriminantRouter(router, self.expert_names, config.d_model, i)
            block.mlp = Mixture(ffns, own, top_k)
        self._add_deltas()

    def _add_deltas(self) -> None:
        def ranks(part: str) -> dict[str, int]:
            return {n: rank for n, s in self.shapes.items() if (rank := getattr(s, part))}

        if attention := ranks("attention_rank"):
            for block in self.layers:
                for part in ATTENTION_PARTS:
                    base = getattr(block.self_attn, part)
                    setattr(block.self_attn, part, DeltaLinear(base, attention, self.expert_names))
        if embedding := ranks("embedding_rank"):
            self.embed_tokens = DeltaEmbedding(self.embed_tokens, embedding, self.expert_names)
        if head := ranks("head_rank"):
            self.lm_head = DeltaLinear(self.lm_head, head, self.expert_names)

    def mixtures(self) -> list[Mixture]:
        """The mixture of every layer, from the first."""
        return [cast(Mixture, block.mlp) for block in self.layers]

    def space_weights(self) -> None:
        super().space_weights()
        for mixture in self.mixtures():
            if isinstance(mixture.router, LinearRouter):
                mixture.router.lay_out()
        for module in self.modules():
            if isinstance(module, LowRank):
                for p in module.parameters():
                    p.data = spaced(p.data)

    def expert_mask(self, enabled: Iterable[Iterable[str] | None]) -> Tensor:
        """[B,E] from one set of owners' names per sequence; None enables all, public always is.

        Raises PolicyError for a name this mixture does not hold.
        """
        rows = []
        for names in enabled:
            chosen = set(self.expert_names) if names is None else {PUBLIC, *names}
            unknown = sorted(chosen - set(self.expert_names))
            if unknown:
                raise PolicyError(
                    f"Unknown expert {', '.join(unknown)}: this mixture holds "
                    f"{', '.join(self.expert_names[1:]) or 'no owner'}."
                )
            rows.append([n in chosen for n in self.expert_names])
        return torch.tensor(rows, dtype=torch.bool, device=self.device)

    def _context(
        self,
        ids: Tensor,
        cache: Cache | None,
        is_token: Tensor | None,
        active: Tensor | None,
        panels: Panels | None = None,
        lanes: Lanes | None = None,
    ) -> ForwardContext:
        ctx = super()._context(ids, cache, is_token, active, panels, lanes)
        active = ctx.active  # the cache may hold it
        if lanes is not None:
            assert self.router is not None, "lanes need a router that decides once for all layers"
            ctx.weights = lanes.weights(len(self.expert_names), active)
            ctx.shares = shares_of(ctx.weights, active, ctx.fill, ctx.dtype)
        elif self.router is not None:
            if self.training and self.trains_alone:
                last = torch.eye(len(self.expert_names), device=self.device)[-1]
                ctx.weights = last.expand(*ids.shape, -1)
            else:
                logits, evidence = self.router(ids, ctx.is_token, active, cache and cache.evidence)
                if cache is not None:
                    cache.evidence = evidence
                ctx.weights = self.weigh(logits, active)
            self._share(ctx, ctx.weights)
            is_pair = len(self.expert_names) == 2 and active is None and ctx.is_token is None
            if self.training and is_pair:
                ctx.blend = (
                    alone(ids.numel(), ctx.dtype, self.device)
                    if self.trains_alone
                    else blend_of(ctx.weights, ctx.dtype)
                )
                if ctx.blend.own_rows is None:
                    ctx.shares[1] = Share(ctx.blend.own_weight, ids.numel())
        if isinstance(self.settings, DiscriminantSettings):
            ctx.texts = find_texts(ids, ctx.is_token, self.config.eos_token_id, self.settings)
        return ctx

    def _context_of(self, spans: Reads, panels: Panels | None) -> ForwardContext:
        ctx = super()._context_of(spans, panels)
        if self.router is not None:
            ctx.weights = self.weigh(spans.follow(self.router), ctx.active)
            self._share(ctx, ctx.weights)
        return ctx

    def weigh(self, logits: Tensor, active: Tensor | None) -> Tensor:
        """Mixture weights [B,T,E] for all layers, from log weights of an evidence router."""
        assert self.router is not None
        least = self.router.settings.min_weight
        return mixture_weights(logits, active, self.top_k, least, renormalise=True)

    def _share(self, ctx: ForwardContext, weights: Tensor) -> None:
        """Tell the layers who reads what."""
        ctx.shares = shares_of(weights, ctx.active, ctx.fill, ctx.dtype)
        ctx.groups = self.mixtures()[0].group(weights, ctx)

    def _at(self, ctx: ForwardContext, rows: slice | Tensor) -> ForwardContext:
        if ctx.weights is None:
            return ctx
        weights = ctx.weights.flatten(0, 1)[rows][None]  # [1,.,E]
        shares = shares_of(weights, None, ctx.fill, ctx.dtype)
        return replace(ctx, weights=weights, shares=shares, rests={})

    def _at_last(self, ctx: ForwardContext, batch_size: int, count: int) -> ForwardContext:
        ctx = super()._at_last(ctx, batch_size, count)
        if ctx.weights is None:
            return ctx
        weights = ctx.weights[:, -count:]
        shares = shares_of(weights, ctx.active, ctx.fill, ctx.dtype)
        return replace(ctx, weights=weights, shares=shares, rests={})


def _width(expert: nn.Module) -> int | None:
    return expert.down_proj.in_features if isinstance(expert, FeedForward) else None


def _feed_forward(config: ModelConfig, shape: ExpertShape) -> nn.Module:
    if shape.rank:
        return LowRankFeedForward(config.d_model, config.d_ff, shape.rank)
    return FeedForward(config.d_model, shape.d_ff)
