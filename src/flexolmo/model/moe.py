"""The mixture: the anchor's decoder with several experts in place of each FFN.

Experts go by name: `public` is the anchor's own FFN, the others are owners'. Knows neither files
nor owners' rights; the caller says which experts are active for each sequence.

A disabled expert leaves no trace: its router logit is dropped before the softmax, its FFN never
sees the sequence (not run at all if no sequence of the batch enables it), and every product keeps
the shape it would have had if the expert had never been merged.

B batch, T positions, D d_model, E experts.
"""

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from flexolmo.errors import PolicyError
from flexolmo.model.router import (
    PUBLIC,
    EvidenceRouter,
    LinearRouter,
    LinearSettings,
    RouterSettings,
    mixture_weights,
    slot,
)
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.model.transformer import (
    Cache,
    FeedForward,
    ForwardContext,
    ModelConfig,
    Transformer,
)


class Mixture(nn.Module):
    """Experts of one layer, summed by weight; stands where the FFN stood."""

    def __init__(self, experts: Mapping[str, nn.Module], router: LinearRouter | None,
                 top_k: int | None):
        super().__init__()
        self.experts = nn.ModuleDict({slot(n): e for n, e in experts.items()})
        self.router = router
        self.top_k = top_k

    def expert(self, name: str) -> FeedForward:
        """One expert's FFN."""
        return cast(FeedForward, self.experts[slot(name)])

    def forward(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        weights = ctx.weights  # [B,T,E]
        if self.router is not None:
            logits = self.router(h)
            weights = mixture_weights(logits, ctx.active, self.top_k)
            if ctx.router_logits is not None:
                ctx.router_logits.append(torch.stack(logits, dim=-1))
        assert weights is not None, "a mixture needs weights from its model or its layer"
        if ctx.routing is not None:
            ctx.routing.append(weights.detach())
        mixed = torch.zeros_like(h)  # starts at +0, so that adding a zero changes no bit
        for e, expert in enumerate(self.experts.values()):
            x, weight = h, weights[..., e:e + 1].to(h.dtype)
            if ctx.active is not None:
                enabled = ctx.active[:, e]  # [B]
                if not bool(enabled.any()):
                    continue
                if not bool(enabled.all()):
                    x = torch.where(enabled[:, None, None], h, h.new_zeros(()))
            if not self.training and not bool((weight > 0).any()):
                continue  # no token picked it
            mixed = torch.addcmul(mixed, weight, expert(x, ctx))  # [B,T,D]
        return mixed


class MixtureModel(Transformer):
    """The anchor's frame with a `Mixture` in every layer, and one router.

    `expert_names` starts with "public"; the rest are in alphabetical order, so the order in which
    owners came does not matter.
    """

    def __init__(self, config: ModelConfig, experts: Mapping[str, int], router: RouterSettings,
                 *, top_k: int | None = None, num_clusters: int = 1):
        """`experts` maps each owner's expert to its FFN width (the anchor's width is implied)."""
        super().__init__(config)
        self.expert_names = [PUBLIC, *sorted(experts)]
        self.settings = router
        self.top_k = top_k
        self.router: EvidenceRouter | None = None
        if isinstance(router, EvidenceSettings):
            self.router = EvidenceRouter(router, self.expert_names, config.vocab_size,
                                         num_clusters, config.eos_token_id)
        widths = {PUBLIC: config.d_ff, **experts}
        for block in self.layers:
            ffns = {n: FeedForward(config.d_model, widths[n]) for n in self.expert_names}
            own = (LinearRouter(router, self.expert_names, config.d_model)
                   if isinstance(router, LinearSettings) else None)
            block.mlp = Mixture(ffns, own, top_k)

    def expert_width(self, name: str) -> int:
        """FFN width F of one expert."""
        return self.mixtures()[0].expert(name).gate_proj.out_features

    def mixtures(self) -> list[Mixture]:
        """The mixture of every layer, from the first."""
        return [cast(Mixture, block.mlp) for block in self.layers]

    def expert_mask(self, enabled: Iterable[Iterable[str] | None]) -> Tensor:
        """[B,E] from one set of owners' names per sequence; None enables all, public always is.

        Raises PolicyError for a name this mixture does not hold.
        """
        rows = []
        for names in enabled:
            chosen = set(self.expert_names) if names is None else {PUBLIC, *names}
            unknown = sorted(chosen - set(self.expert_names))
            if unknown:
                raise PolicyError(f"Unknown expert {', '.join(unknown)}: this mixture holds "
                                  f"{', '.join(self.expert_names[1:]) or 'no owner'}.")
            rows.append([n in chosen for n in self.expert_names])
        return torch.tensor(rows, dtype=torch.bool, device=self.embed_tokens.weight.device)

    def _context(self, ids: Tensor, cache: Cache | None, is_token: Tensor | None,
                 active: Tensor | None) -> ForwardContext:
        ctx = super()._context(ids, cache, is_token, active)
        if self.router is not None:
            logits, evidence = self.router(ids, ctx.is_token, cache and cache.evidence)
            if cache is not None:
                cache.evidence = evidence
            ctx.weights = mixture_weights(logits, active, self.top_k)
        return ctx
