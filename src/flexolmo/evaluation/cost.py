"""What a model costs: multiply-adds a token of a forward pass, from shapes alone.

One multiply-add is two FLOPs. Counted are the matrices a token passes through; left out, as is
the custom, are attention scores, norms and look-ups, which are the same for all the methods
compared. Source: ours, after the 2ND of Kaplan et al. 2020.

D d_model, F d_ff, V vocabulary, L layers.
"""

from collections.abc import Iterable

from flexolmo.model.shape import ExpertShape
from flexolmo.model.transformer import ModelConfig


def frame_flops(config: ModelConfig) -> int:
    """Forward FLOPs a token of what all methods share: attention's matrices and the head."""
    D, c = config.d_model, config.d_head
    attention = 2 * D * config.num_heads * c + 2 * D * config.kv_heads * c
    return 2 * (config.num_layers * attention + D * config.vocab_size)


def ffn_flops(config: ModelConfig, d_ff: int | None = None) -> int:
    """Forward FLOPs a token of one FFN in every layer."""
    return 2 * config.num_layers * 3 * config.d_model * (d_ff or config.d_ff)


def dense_flops(config: ModelConfig) -> int:
    """Forward FLOPs a token of the anchor, or of any dense model of its size."""
    return frame_flops(config) + ffn_flops(config)


def delta_flops(config: ModelConfig, shape: ExpertShape) -> int:
    """Forward FLOPs a token of one expert's deltas to attention, embedding and head."""
    D, V, c = config.d_model, config.vocab_size, config.d_head
    heads, kv = config.num_heads * c, config.kv_heads * c
    attention = 2 * (D + heads) + 2 * (D + kv)
    return 2 * (config.num_layers * shape.attention_rank * attention
                + shape.embedding_rank * D + shape.head_rank * (D + V))


def expert_flops(config: ModelConfig, shape: ExpertShape) -> int:
    """Forward FLOPs a token that an active expert adds to the frame.

    A low-rank FFN shares the anchor's three products, counted with the anchor's.
    """
    low = 2 * config.num_layers * shape.rank * 3 * (config.d_model + config.d_ff)
    return delta_flops(config, shape) + (low if shape.rank else ffn_flops(config, shape.d_ff))


def mixture_flops(config: ModelConfig, shapes: Iterable[ExpertShape],
                  active: Iterable[float], public: float = 1.0) -> float:
    """Forward FLOPs a token of a mixture whose experts are active on these fractions of tokens.

    `public` is the fraction on which the anchor's FFN runs. If any low-rank expert is active, the
    anchor's products run too.
    """
    shapes, active = list(shapes), list(active)
    low = [a for s, a in zip(shapes, active, strict=True) if s.rank]
    shared = max([public, min(1.0, sum(low))])
    return frame_flops(config) + shared * ffn_flops(config) + sum(
        a * expert_flops(config, s) for s, a in zip(shapes, active, strict=True))
