"""Bounds on every number that a model can compute, from the largest numbers in its tensors.

They tell, without running a model or reading its weights again, that experts beside the anchor,
whichever of them are on, give no infinity and no NaN for any text at all.

D d_model, F the widest FFN, r rank.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

from flexolmo.model.router import DiscriminantSettings, LinearSettings, RouterSettings
from flexolmo.model.shape import ATTENTION_PARTS, FFN_PARTS, ExpertShape, expert_shapes
from flexolmo.model.transformer import ModelConfig

SAFE = 1e37  # float32 and bfloat16 reach 3.4e38; the rest is room for rounding


@dataclass(frozen=True)
class Extremes:
    """An expert's shape, and the largest absolute value of each of its tensors, by name."""

    shape: ExpertShape
    largest: Mapping[str, float]


def find_reach(
    config: ModelConfig,
    anchor: Mapping[str, float],
    experts: Sequence[Extremes],
    router: RouterSettings,
) -> float:
    """A number that nothing exceeds which the anchor and any of `experts` compute together for any
    text, in exact arithmetic; infinity or NaN if none is known.

    Only squares in norms and exponentials in SiLU may exceed it, and do no harm: where they
    overflow, the norm or the SiLU gives 0.

    Every sub-layer's output is normed, so that the residual stream stays within the embedding and
    the norms' own weights, whatever stands in the matrices; products of it are no more than width
    times largest number each. Experts' shares sum to at most 1, so that the largest number of all
    experts bounds their sum. Source: ours.

    Args:
        anchor: Largest absolute value of each of the anchor's tensors, by name.
        experts: Each with the largest values of all tensors of `expert_shapes`.
    """
    for e in experts:
        if expert_shapes(config, e.shape, router).keys() - e.largest.keys():
            return math.inf
    D = config.d_model
    F = max([config.d_ff, *(e.shape.d_ff for e in experts)])
    queries = config.num_heads * config.d_head
    keys = config.kv_heads * config.d_head
    reached = [*anchor.values(), *(value for e in experts for value in e.largest.values())]

    def most(name: str) -> float:
        """Largest number of the experts' tensors of this name."""
        return max((e.largest.get(name, 0.0) for e in experts), default=0.0)

    def multiply(x: float, width: int, key: str) -> float:
        """Largest number that the anchor's matrix for `key`, with the experts' in its place or
        added to it, gives for `width` numbers of at most `x`."""
        place, rank = _place_of(key)
        low = [width * e.largest.get(f"{key}.lora_a", 0.0) * x for e in experts]
        own = [
            width * e.largest.get(f"{key}.weight", 0.0) * x
            + getattr(e.shape, rank) * e.largest.get(f"{key}.lora_b", 0.0) * of_rank
            for e, of_rank in zip(experts, low, strict=True)
        ]
        y = width * anchor[f"{place}.weight"] * x + max(own, default=0.0)
        reached.extend([*low, y])
        return y

    def norm(place: str, width: int) -> float:
        """Largest number that a norm over `width` numbers gives."""
        return sqrt(width) * anchor[f"{place}.weight"]

    def route(x: float, key: str) -> float:
        """Largest number of a router that reads states of at most `x`."""
        if isinstance(router, LinearSettings):
            return D * most(f"{key}.weight") * x + most(f"{key}.raw_bias")
        if isinstance(router, DiscriminantSettings):
            tokens = 1 + router.half_life_tokens / math.log(2)  # that count in a sum of states
            logit = router.num_features(D) * most(f"{key}.weight") * x + most(f"{key}.offset")
            return max(tokens * x, logit)
        return 0.0  # reads no states, and clips its evidence

    x = multiply(1.0, 1, "embed_tokens")
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        multiply(x, D, f"{layer}.q_proj")
        multiply(x, D, f"{layer}.k_proj")
        q = 2 * norm(f"{layer}.self_attn.q_norm", queries)  # turned by rotary positions
        k = 2 * norm(f"{layer}.self_attn.k_norm", keys)
        reached.append(config.d_head * q * k)
        v = multiply(x, D, f"{layer}.v_proj")
        multiply(v, queries, f"{layer}.o_proj")
        x += norm(f"{layer}.post_attention_layernorm", D)
        reached.append(route(x, f"{layer}.router"))
        gate = multiply(x, D, f"{layer}.gate_proj")
        inner = gate * multiply(x, D, f"{layer}.up_proj")
        reached.append(inner)
        multiply(inner, F, f"{layer}.down_proj")
        x += norm(f"{layer}.post_feedforward_layernorm", D)
    logits = multiply(norm("norm", D), D, "lm_head")
    reached.append(3 * logits)  # of rows that move with others: two of the anchor's, less another
    return max([*reached, x])


def _place_of(key: str) -> tuple[str, str]:
    """Name of the anchor's matrix for an expert's matrix `key`, and of the rank of deltas to it."""
    layer, _, part = key.rpartition(".")
    if part in FFN_PARTS:
        return f"{layer}.mlp.{part}", "rank"
    if part in ATTENTION_PARTS:
        return f"{layer}.self_attn.{part}", "attention_rank"
    return part, {"embed_tokens": "embedding_rank", "lm_head": "head_rank"}[part]
