"""Bounds on every number that a model can compute, from the largest numbers in its tensors.

They tell, without running a model or reading its weights again, that an expert beside the anchor
gives no infinity and no NaN for any text at all. Where they do not tell, a text must be tried.

D d_model, F the wider of the two FFNs, r rank.
"""

import math
from collections.abc import Mapping
from math import sqrt

from flexolmo.model.router import LinearSettings, RouterSettings
from flexolmo.model.shape import ATTENTION_PARTS, FFN_PARTS, ExpertShape
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.model.transformer import ModelConfig

SAFE = 1e37  # float32 and bfloat16 reach 3.4e38; the rest is room for rounding


def find_reach(
    config: ModelConfig,
    anchor: Mapping[str, float],
    expert: Mapping[str, float],
    shape: ExpertShape,
    router: RouterSettings,
) -> float:
    """A number that the anchor and the expert together never exceed, whatever the text, in exact
    arithmetic; infinity if none is known. Squares in norms and exponentials in SiLU may, and give 0
    where they overflow.

    Every sub-layer's output is normed, so that the residual stream stays within the embedding and
    the norms' own weights, whatever stands in the matrices; what they make of it is no more than
    width times largest number each. Source: ours.

    Args:
        anchor: Largest absolute value of each of the anchor's tensors, by name.
        expert: The same of the expert's, as in `expert_shapes`.
    """
    if not isinstance(router, EvidenceSettings | LinearSettings):
        return math.inf
    D, F = config.d_model, max(config.d_ff, shape.d_ff)
    queries, keys = config.num_heads * config.d_head, config.kv_heads * config.d_head

    def largest(key: str, place: str, rank: int) -> float:
        """Largest number of the anchor's matrix and the expert's, however they are summed."""
        low = rank * expert.get(f"{key}.lora_a", 0.0) * expert.get(f"{key}.lora_b", 0.0)
        return anchor[f"{place}.weight"] + expert.get(f"{key}.weight", 0.0) + low

    def normed(place: str, width: int) -> float:
        """Largest number that a norm over `width` numbers gives."""
        return sqrt(width) * anchor[f"{place}.weight"]

    x = largest("embed_tokens", "embed_tokens", shape.embedding_rank)
    reached = [x]
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        attention = {
            part: largest(f"{layer}.{part}", f"{layer}.self_attn.{part}", shape.attention_rank)
            for part in ATTENTION_PARTS
        }
        ffn = {
            part: largest(f"{layer}.{part}", f"{layer}.mlp.{part}", shape.rank)
            for part in FFN_PARTS
        }
        q, k = (
            2 * normed(f"{layer}.self_attn.{name}_norm", width)  # turned by rotary positions
            for name, width in (("q", queries), ("k", keys))
        )
        v = D * attention["v_proj"] * x
        reached += [D * attention["q_proj"] * x, D * attention["k_proj"] * x, config.d_head * q * k]
        reached += [v, queries * attention["o_proj"] * v]
        x += normed(f"{layer}.post_attention_layernorm", D)
        inner = (D * ffn["gate_proj"] * x) * (D * ffn["up_proj"] * x)
        reached += [inner, F * ffn["down_proj"] * inner]
        reached.append(D * expert.get(f"{layer}.router.weight", 0.0) * x)
        x += normed(f"{layer}.post_feedforward_layernorm", D)
    reached += [x, D * largest("lm_head", "lm_head", shape.head_rank) * normed("norm", D)]
    inside = max(expert.values(), default=0.0) * max(D, F)  # of A x, before B
    is_low_rank = any(".lora_" in key for key in expert)
    return max(reached) * max(1.0, inside if is_low_rank else 1.0)
