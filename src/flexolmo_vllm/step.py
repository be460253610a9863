"""One step of a mixture over tokens of many requests, whoever keeps their keys and values.

Experts, routers and deltas are those of `flexolmo.model`; only the products differ in that rows
need not keep their bits, so that tokens agree with our own engine's, and numbers to about 1e-6.

n tokens of a step, D d_model, E experts, H heads, G key-value heads, C head width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flexolmo.model.deltas import DeltaLinear
from flexolmo.model.moe import MixtureModel
from flexolmo.model.panels import Panels
from flexolmo.model.router import EvidenceRouter
from flexolmo.model.transformer import ForwardContext

# of layer, q [n,H,1,C], k and v [n,G,1,C]: values that the rows attend to, [n,1,H*C]
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass
class Routing:
    """Experts at each token of a step."""

    active: Tensor  # [n,E] bool
    logs: Tensor | None  # [n,E] log weights of an evidence router; None: layers have their own
    weights: Tensor | None = None  # [n,E] that these have given, their mean


@dataclass
class Step:
    """Tokens of a step; see `spans.Reads`."""

    ids: Tensor  # [n,1]
    positions: Tensor  # [n,1]
    active: Tensor  # [n,E]
    logs: Tensor | None  # [n,E]
    attention: Attention
    batch_rows: int | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `spans.Reads`."""
        return self.attention(layer, q, k, v)

    def follow(self, router: EvidenceRouter) -> Tensor:
        """See `spans.Reads`."""
        assert self.logs is not None, "requests have been followed"
        return self.logs[:, None]


def public_alone(model: MixtureModel, count: int) -> Routing:
    """The routing of so many tokens for which nothing is on."""
    active = model.expert_mask([()]).expand(count, -1)
    logs = torch.where(active, 0.0, -torch.inf)
    return Routing(active, None if model.router is None else logs)


def read_tokens(
    model: MixtureModel,
    ids: Tensor,
    positions: Tensor,
    routing: Routing,
    attention: Attention,
    panels: Panels | None = None,
) -> Tensor:
    """The residual stream after the last norm for ids [n] at positions [n], float32 [n,D]; where
    the output head depends on each token's weights of experts, with these behind it, [n,D+E].

    Says in `routing` what weights the layers' own routers have given. With `panels`, of
    `cut_panels`, products are faster.
    """
    step = Step(
        ids.long()[:, None],
        positions[:, None],
        routing.active,
        routing.logs,
        attention,
        batch_rows=len(ids) if panels else None,
    )
    seen: list[Tensor] | None = [] if model.router is None else None
    x, ctx = model.read_spans(step, panels, seen)
    if seen:
        routing.weights = torch.stack(seen).mean(0)[:, 0]
    x = x[:, 0].float()
    if not isinstance(model.lm_head, DeltaLinear):
        return x
    assert ctx.weights is not None, "a head with deltas has one routing for all layers"
    return torch.cat([x, ctx.weights[:, 0]], dim=1)


def predict(model: MixtureModel, read: Tensor, panels: Panels | None = None) -> Tensor:
    """Logits [.,V] after some of the tokens, from their rows of what `read_tokens` gave."""
    dtype = model.embed_tokens.weight.dtype
    d_model = model.config.d_model
    nothing = torch.empty(0)  # no layer is run
    ctx = ForwardContext(dtype, nothing, nothing, attention_bias=None, is_token=None)
    if panels:
        ctx.panels, ctx.batch_rows = panels, len(read)
    if read.shape[1] > d_model:
        ctx.weights = read[:, None, d_model:]  # [.,1,E]
    return model.predict_at(read[:, None, :d_model].to(dtype), ctx, slice(None))
