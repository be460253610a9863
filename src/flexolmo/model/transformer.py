"""The OLMo 2 decoder: the anchor, and the frozen frame around a mixture's experts.

Single-device and without paths. Norms act on the sub-layer's *output*: x = x + norm(f(x)).
Submodule names are those of the stock checkpoint, so a state dict maps one to one.
Knows experts only as "whatever stands in a layer's `mlp`".

B batch, T positions, S positions in cache and input together, N = B*T, D d_model, F d_ff,
H heads, G key-value heads, C head width, L layers, V vocabulary.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn


class ModelConfig(BaseModel):
    """The shape of a decoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(ge=2, description="token ids, V")
    d_model: int = Field(ge=2, description="width of the residual stream, D")
    num_layers: int = Field(ge=1, description="blocks, L")
    num_heads: int = Field(ge=1, description="attention heads, H")
    num_kv_heads: int | None = Field(None, description="key-value heads, G; none: as many as heads")
    d_ff: int = Field(ge=1, description="width of the FFN, F")
    max_seq_len: int = Field(4096, ge=2, description="positions, in tokens (paper: 4,096)")
    rope_theta: float = Field(500_000.0, gt=0, description="base of the rotary angles (paper)")
    norm_eps: float = Field(1e-6, gt=0, description="added to the mean square in RMSNorm")
    eos_token_id: int = Field(0, ge=0, description="ends a document; also starts one and pads")

    @model_validator(mode="after")
    def _shapes_agree(self) -> "ModelConfig":
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of num_heads "
                             f"{self.num_heads}")
        if (self.d_model // self.num_heads) % 2:
            raise ValueError("the width of one head must be even, for rotary positions")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads "
                             f"{self.kv_heads}")
        if self.eos_token_id >= self.vocab_size:
            raise ValueError(f"eos_token_id {self.eos_token_id} is outside the vocabulary")
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def d_head(self) -> int:
        return self.d_model // self.num_heads


@dataclass
class LayerCache:
    """What one layer keeps of the positions it has seen."""

    keys: Tensor | None = None  # [B,G,S,C]
    values: Tensor | None = None  # [B,G,S,C]


@dataclass
class ForwardContext:
    """What a forward pass hands to every layer beside the residual stream."""

    cos: Tensor  # [B or 1,1,T,C]
    sin: Tensor  # [B or 1,1,T,C]
    attention_bias: Tensor | None  # [B,1,T,S] additive; None: plain causal
    is_token: Tensor | None  # [B,T] False on left padding; None: all are tokens
    active: Tensor | None = None  # [B,E] per-sequence expert mask; None: all loaded experts
    weights: Tensor | None = None  # [B,T,E] when one routing decision serves every layer
    cache: list[LayerCache] | None = None
    routing: list[Tensor] | None = None  # when a list: each layer appends its weights [B,T,E]
    router_logits: list[Tensor] | None = None  # when a list: layers append logits [B,T,E]


@dataclass
class Cache:
    """Everything needed to go on decoding a batch; keyed by nothing, so never shared."""

    layers: list[LayerCache]
    evidence: tuple[Tensor, list[Tensor], Tensor] | None = None  # see router.EvidenceState
    is_token: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))  # [B,S]

    @property
    def num_positions(self) -> int:
        return 0 if self.layers[0].keys is None else self.layers[0].keys.shape[2]


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). An expert is one of these per layer."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor, ctx: ForwardContext | None = None) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # [..., D]


class Attention(nn.Module):
    """Causal attention; RMSNorm over the full width of q and k before the heads are split."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, c = config.d_model, config.d_head
        self.d_head = c
        self.q_proj = nn.Linear(d, config.num_heads * c, bias=False)
        self.k_proj = nn.Linear(d, config.kv_heads * c, bias=False)
        self.v_proj = nn.Linear(d, config.kv_heads * c, bias=False)
        self.o_proj = nn.Linear(config.num_heads * c, d, bias=False)
        self.q_norm = nn.RMSNorm(config.num_heads * c, eps=config.norm_eps)
        self.k_norm = nn.RMSNorm(config.kv_heads * c, eps=config.norm_eps)

    def forward(self, x: Tensor, ctx: ForwardContext, layer: int) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x)).view(B, T, -1, self.d_head).transpose(1, 2)  # [B,H,T,C]
        k = self.k_norm(self.k_proj(x)).view(B, T, -1, self.d_head).transpose(1, 2)  # [B,G,T,C]
        v = self.v_proj(x).view(B, T, -1, self.d_head).transpose(1, 2)  # [B,G,T,C]
        q, k = _rotate(q, ctx), _rotate(k, ctx)
        if ctx.cache is not None:
            past = ctx.cache[layer]
            if past.keys is not None and past.values is not None:
                k = torch.cat([past.keys, k], dim=2)  # [B,G,S,C]
                v = torch.cat([past.values, v], dim=2)
            past.keys, past.values = k, v
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=ctx.attention_bias, is_causal=ctx.attention_bias is None and T > 1,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # [B,H,T,C]
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # [B,T,D]


def _rotate(x: Tensor, ctx: ForwardContext) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * ctx.cos + torch.cat([-second, first], dim=-1) * ctx.sin


class Block(nn.Module):
    """h = x + norm(attention(x)); y = h + norm(mlp(h)). Source: paper §3.2, OLMo 2."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp: nn.Module = FeedForward(config.d_model, config.d_ff)
        self.post_attention_layernorm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.post_feedforward_layernorm = nn.RMSNorm(config.d_model, eps=config.norm_eps)

    def forward(self, x: Tensor, ctx: ForwardContext, layer: int) -> Tensor:
        h = x + self.post_attention_layernorm(self.self_attn(x, ctx, layer))  # [B,T,D]
        return h + self.post_feedforward_layernorm(self.mlp(h, ctx))  # [B,T,D]


class Transformer(nn.Module):
    """Token ids in, logits out. With `FeedForward` in every layer it is the anchor."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def initialise(self, seed: int) -> None:
        """Draw matrices from a normal of deviation 0.02 and set norms to 1. Source: OLMo 2."""
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.trunc_normal_(p, std=0.02, a=-0.06, b=0.06, generator=generator)
            else:
                nn.init.ones_(p)

    def new_cache(self) -> Cache:
        """An empty cache for one batch."""
        return Cache([LayerCache() for _ in self.layers])

    def hidden(
        self,
        ids: Tensor,
        *,
        cache: Cache | None = None,
        is_token: Tensor | None = None,
        active: Tensor | None = None,
        routing: list[Tensor] | None = None,
        router_logits: list[Tensor] | None = None,
    ) -> Tensor:
        """The residual stream after the last norm, [B,T,D].

        ids [B,T]. is_token [B,T] is False on left padding. active [B,E] switches the mixture's
        experts per sequence. With a cache, ids continue the positions it holds. The lists, when
        given, receive each layer's mixture weights and router logits, both [B,T,E].
        """
        ctx = self._context(ids, cache, is_token, active)
        ctx.routing, ctx.router_logits = routing, router_logits
        x = self.embed_tokens(ids)  # [B,T,D]
        for i, block in enumerate(self.layers):
            x = block(x, ctx, i)
        return self.norm(x)

    def forward(self, ids: Tensor, **options) -> Tensor:
        """Logits [B,T,V]; options as for `hidden`."""
        return self.lm_head(self.hidden(ids, **options))

    def _context(self, ids: Tensor, cache: Cache | None, is_token: Tensor | None,
                 active: Tensor | None) -> ForwardContext:
        T = ids.shape[1]
        dtype = self.embed_tokens.weight.dtype
        past = 0 if cache is None else cache.num_positions
        bias: Tensor | None = None
        seen: Tensor | None
        positions = torch.arange(past, past + T, device=ids.device)[None]  # [1,T]
        if cache is not None:
            new = torch.ones_like(ids, dtype=torch.bool) if is_token is None else is_token
            seen = new if past == 0 else torch.cat([cache.is_token, new], dim=1)  # [B,S]
            cache.is_token = seen
            if not bool(seen.all()):
                positions = (seen.cumsum(1) - 1).clamp(min=0)[:, past:]  # [B,T]
            else:
                is_token = None
        else:
            seen = is_token
            if seen is not None:
                positions = (seen.cumsum(1) - 1).clamp(min=0)
        if (seen is not None and not bool(seen.all())) or (past > 0 and T > 1):
            S = past + T
            causal = torch.ones(T, S, dtype=torch.bool, device=ids.device).tril(past)
            visible = causal if seen is None else causal & seen[:, None, None, :]  # [B,1,T,S]
            # a padded position sees itself, so that its softmax has something to sum
            itself = torch.zeros(T, S, dtype=torch.bool, device=ids.device)
            itself[:, past:] = torch.eye(T, dtype=torch.bool, device=ids.device)
            bias = torch.zeros(visible.shape, dtype=dtype, device=ids.device)
            bias = bias.masked_fill(~(visible | itself), -math.inf)
            bias = bias if bias.dim() == 4 else bias[None, None]
        cos, sin = self._angles(positions, dtype)
        return ForwardContext(cos, sin, bias, is_token, active,
                              cache=None if cache is None else cache.layers)

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        c = self.config.d_head
        exponents = torch.arange(0, c, 2, device=positions.device, dtype=torch.float32) / c
        inverse = 1.0 / (self.config.rope_theta**exponents)  # [C/2]
        angle = positions[:, None, :, None].float() * inverse  # [B or 1,1,T,C/2]
        angle = torch.cat([angle, angle], dim=-1)  # [B or 1,1,T,C]
        return angle.cos().to(dtype), angle.sin().to(dtype)


class _ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy over a head, in pieces, so that [N,V] never exists. Source: ours."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        N = h.shape[0]
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        grad_h = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        grad_w = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, N, chunk):
            part = slice(start, start + chunk)
            logits = (h[part] @ weight.T).float()  # [n,V]
            log_z = logits.logsumexp(-1, keepdim=True)
            picked = logits.gather(1, targets[part, None])
            total += (log_z - picked).sum()
            if grad_h is not None or grad_w is not None:
                grad = logits.sub_(log_z).exp_()  # softmax, [n,V]
                grad.scatter_add_(1, targets[part, None], grad.new_full((len(grad), 1), -1.0))
                grad = (grad / N).to(h.dtype)
                if grad_h is not None:
                    torch.mm(grad, weight, out=grad_h[part])
                if grad_w is not None:
                    grad_w.addmm_(grad.T, h[part])
        ctx.save_for_backward(grad_h, grad_w)
        return total / N

    @staticmethod
    def backward(ctx, *grads):
        grad_h, grad_w = ctx.saved_tensors
        scale = grads[0]
        return (None if grad_h is None else grad_h * scale,
                None if grad_w is None else grad_w * scale, None, None)


def language_model_loss(model: Transformer, ids: Tensor, *, chunk: int = 1024, **options) -> Tensor:
    """Mean loss in nats per token of ids[:,1:] given what stands before; ids [B,T+1]."""
    h = model.hidden(ids[:, :-1], **options)
    return _ChunkedLoss.apply(h.flatten(0, 1), model.lm_head.weight, ids[:, 1:].flatten(), chunk)
