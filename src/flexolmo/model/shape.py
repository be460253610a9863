"""The shape of an expert: which tensors an owner's module holds, and how large they are.

A matrix is either whole (`weight` [out,in], in place of the anchor's of that name) or a delta B A
to it: `lora_b` [out,r], `lora_a` [r,in] (arXiv 2106.09685). Plain arithmetic, without torch.

V vocabulary, D d_model, F d_ff, L layers, r rank.
"""

from collections.abc import Mapping
from math import prod

from pydantic import Field

from flexolmo.config import Settings
from flexolmo.model.router import DiscriminantSettings, LinearSettings, RouterSettings
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.model.transformer import ModelConfig

FFN_PARTS = ("gate_proj", "up_proj", "down_proj")
TOKEN_LEVELS, BIGRAM_LEVELS = "router.token_levels", "router.bigram_levels"
BIGRAM_KEYS = "router.bigram_keys"
ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")


class ExpertShape(Settings):
    """Sizes of an expert, per layer and outside the layers. Source: FFN §3.2; the rest ours."""

    d_ff: int = Field(ge=1, description="Width of the FFN; the anchor's width for a low-rank one.")
    rank: int = Field(
        0,
        ge=0,
        description="Rank of the FFN's deltas to the anchor's; 0: whole matrices of its own.",
    )
    attention_rank: int = Field(
        0, ge=0, description="Rank of deltas to attention; 0: none; d_model: whole matrices."
    )
    embedding_rank: int = Field(0, ge=0, description="Rank of deltas to the embedding, likewise.")
    head_rank: int = Field(0, ge=0, description="Rank of deltas to the output head, likewise.")
    num_bigrams: int = Field(0, ge=0, description="Bigrams listed for the evidence router.")

    @property
    def is_ffn_only(self) -> bool:
        """True if it changes nothing but the FFN, as in the paper and the stock format."""
        return not (self.attention_rank or self.embedding_rank or self.head_rank)


def expert_shapes(
    config: ModelConfig, shape: ExpertShape, router: RouterSettings
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of such an expert; exactly what a bundle holds."""
    D, V, F = config.d_model, config.vocab_size, shape.d_ff
    heads, kv = config.num_heads * config.d_head, config.kv_heads * config.d_head
    matrices = {
        "gate_proj": (F, D),
        "up_proj": (F, D),
        "down_proj": (D, F),
        "q_proj": (heads, D),
        "k_proj": (kv, D),
        "v_proj": (kv, D),
        "o_proj": (D, heads),
    }
    found: dict[str, tuple[int, ...]] = {}

    def add(name: str, matrix: tuple[int, int], rank: int, is_whole: bool) -> None:
        if is_whole:
            found[f"{name}.weight"] = matrix
        elif rank:
            found[f"{name}.lora_a"] = (rank, matrix[1])
            found[f"{name}.lora_b"] = (matrix[0], rank)

    for i in range(config.num_layers):
        for part in FFN_PARTS:
            add(f"layers.{i}.{part}", matrices[part], shape.rank, not shape.rank)
        for part in ATTENTION_PARTS:
            add(
                f"layers.{i}.{part}",
                matrices[part],
                shape.attention_rank,
                shape.attention_rank >= D,
            )
        if isinstance(router, LinearSettings):
            found[f"layers.{i}.router.weight"] = (1, D)
            if router.has_bias:
                found[f"layers.{i}.router.raw_bias"] = (1,)
        if isinstance(router, DiscriminantSettings):
            found[f"layers.{i}.router.weight"] = (1, router.num_features(D))
            found[f"layers.{i}.router.offset"] = (1,)
    add("embed_tokens", (V, D), shape.embedding_rank, shape.embedding_rank >= D)
    add("lm_head", (V, D), shape.head_rank, shape.head_rank >= D)
    if isinstance(router, EvidenceSettings):
        found[TOKEN_LEVELS] = (V,)
        if shape.num_bigrams:
            found[BIGRAM_KEYS] = found[BIGRAM_LEVELS] = (shape.num_bigrams,)
    return found


def shape_of_tensors(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> ExpertShape:
    """The shape that tensors of these names and shapes claim; `expert_shapes` then says what
    should be there."""

    def rank(name: str) -> int:
        if f"{name}.weight" in shapes:
            return config.d_model
        return int((shapes.get(f"{name}.lora_a") or (0,))[0])

    whole = shapes.get("layers.0.gate_proj.weight")
    return ExpertShape(
        d_ff=int(whole[0]) if whole else config.d_ff,
        rank=0 if whole is not None else rank("layers.0.gate_proj"),
        attention_rank=rank("layers.0.q_proj"),
        embedding_rank=rank("embed_tokens"),
        head_rank=rank("lm_head"),
        num_bigrams=int((shapes.get(BIGRAM_KEYS) or (0,))[0]),
    )


def architecture_of(config: ModelConfig, shape: ExpertShape) -> dict[str, int]:
    """Sizes of an expert as a bundle's manifest states them."""
    return {"num_layers": config.num_layers, "d_model": config.d_model, **shape.model_dump()}


def count_parameters(config: ModelConfig, shape: ExpertShape, router: RouterSettings) -> int:
    """Numbers in an expert of this shape."""
    return sum(prod(s) for s in expert_shapes(config, shape, router).values())


def count_anchor(config: ModelConfig) -> int:
    """Numbers in the anchor, or in any dense model of its size."""
    D = config.d_model
    heads = config.num_heads * config.d_head
    kv = config.kv_heads * config.d_head
    attention = 2 * D * (heads + kv) + heads + kv  # with the norms of queries and keys
    block = attention + 3 * D * config.d_ff + 2 * D
    return config.num_layers * block + 2 * config.vocab_size * D + D
