"""Cost of a model: multiply-adds a token of a forward pass, from shapes alone.

One multiply-add is two FLOPs. Counted are the matrices a token passes through; left out, as is
the custom, are attention scores, norms and look-ups, which are the same for all the methods
compared. Source: ours, after the 2ND of Kaplan et al. 2020.

D d_model, F d_ff, V vocabulary.
"""

from collections.abc import Iterable

from flexolmo.model.shape import ExpertShape
from flexolmo.model.transformer import ModelConfig


def training_flops(config: ModelConfig, shape: ExpertShape, public: float = 0.0) -> float:
    """FLOPs a token of training such an expert, where the anchor reads the fraction `public` of
    tokens beside it: forward, gradients of all that is read, and those of the expert's matrices."""
    return 2 * mixture_flops(config, [shape], [1.0], public) + expert_flops(config, shape)


def frame_flops(config: ModelConfig) -> int:
    """Forward FLOPs a token of all but the FFNs: attention's matrices and the head."""
    return _attention_flops(config) + _head_flops(config)


def _attention_flops(config: ModelConfig) -> int:
    D, c = config.d_model, config.d_head
    return 4 * config.num_layers * D * c * (config.num_heads + config.kv_heads)


def _head_flops(config: ModelConfig) -> int:
    return 2 * config.d_model * config.vocab_size


def ffn_flops(config: ModelConfig, d_ff: int | None = None) -> int:
    """Forward FLOPs a token of one FFN in every layer."""
    return 2 * config.num_layers * 3 * config.d_model * (d_ff or config.d_ff)


def dense_flops(config: ModelConfig) -> int:
    """Forward FLOPs a token of the anchor, or of any dense model of its size."""
    return frame_flops(config) + ffn_flops(config)


def delta_flops(config: ModelConfig, shape: ExpertShape) -> int:
    """Forward FLOPs a token of what one expert changes in attention, embedding and head."""
    D, V, c = config.d_model, config.vocab_size, config.d_head
    heads, kv = config.num_heads * c, config.kv_heads * c
    attention = 4 * config.num_layers * shape.attention_rank * (2 * D + heads + kv)
    embedding = 2 * shape.embedding_rank * D
    head = 2 * shape.head_rank * (D + V)
    return (
        (_attention_flops(config) if shape.attention_rank >= D else attention)
        + (0 if shape.embedding_rank >= D else embedding)
        + (_head_flops(config) if shape.head_rank >= D else head)
    )


def expert_flops(config: ModelConfig, shape: ExpertShape) -> int:
    """Forward FLOPs a token that an active expert adds to the frame.

    A low-rank FFN shares the anchor's three products, counted with the anchor's.
    """
    low = 2 * config.num_layers * shape.rank * 3 * (config.d_model + config.d_ff)
    return delta_flops(config, shape) + (low if shape.rank else ffn_flops(config, shape.d_ff))


def models_flops(
    config: ModelConfig, shapes: Iterable[ExpertShape], active: Iterable[float], public: float
) -> float:
    """Forward FLOPs a token where experts run as whole models, each on these fractions of tokens,
    and the anchor on the fraction `public`."""
    each = zip(shapes, active, strict=True)
    return public * dense_flops(config) + sum(
        a * mixture_flops(config, [s], [1.0], 0.0) for s, a in each
    )


def mixture_flops(
    config: ModelConfig, shapes: Iterable[ExpertShape], active: Iterable[float], public: float = 1.0
) -> float:
    """Forward FLOPs a token of a mixture whose experts are active on these fractions of tokens.

    `public` is the fraction on which the anchor is. Each of the anchor's matrices runs where it is
    or an expert that has none of its own in that place.
    """
    D, experts = config.d_model, list(zip(shapes, active, strict=True))

    def base(ranks: list[int]) -> float:
        without = [a for (_, a), r in zip(experts, ranks, strict=True) if r < D]
        return 1.0 if len(without) == len(experts) else min(1.0, public + sum(without))

    shared = max(public, min(1.0, sum(a for s, a in experts if s.rank)))
    return (
        base([s.attention_rank for s, _ in experts]) * _attention_flops(config)
        + base([s.head_rank for s, _ in experts]) * _head_flops(config)
        + shared * ffn_flops(config)
        + sum(a * expert_flops(config, s) for s, a in experts)
    )
