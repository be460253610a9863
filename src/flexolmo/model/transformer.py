"""The OLMo 2 decoder: the anchor, and the frozen frame around a mixture's experts.

Single-device and without paths. Norms act on the sub-layer's *output*: x = x + norm(f(x)).
Submodule names are those of the stock checkpoint, so a state dict maps one to one.
Knows experts only as "whatever stands in a layer's `mlp`".

B batch, T positions, S positions in cache and input together, N = B*T, D d_model, F d_ff,
H heads, G key-value heads, C head width, L layers, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from flexolmo.config import Settings
from flexolmo.errors import ConfigError
from flexolmo.model.cache import Cache, LayerCache
from flexolmo.model.gradients import GatedDown, Normalise
from flexolmo.model.onednn import IS_FASTER, linear
from flexolmo.model.packed import PACKED
from flexolmo.model.panels import IN_PANELS, Panels, can_cut
from flexolmo.model.spans import Reads
from flexolmo.model.tiles import in_tiles, product, silu, spaced

LAYOUT = PACKED if IS_FASTER else IN_PANELS
CHUNK_ROWS = LAYOUT.most_rows  # of tokens, on which a thread's FFN works at a time without learning
PIECE_NUMBERS = 2**16  # of a tensor, which the cache of a thread's processor holds


class ModelConfig(Settings):
    """The shape of a decoder."""

    vocab_size: int = Field(ge=2, description="Number of token ids, V.")
    d_model: int = Field(ge=2, description="Width of the residual stream, D.")
    num_layers: int = Field(ge=1, description="Number of blocks, L.")
    num_heads: int = Field(ge=1, description="Number of attention heads, H.")
    num_kv_heads: int | None = Field(
        None, description="Key-value heads, G; none: as many as heads."
    )
    d_ff: int = Field(ge=1, description="Width of the FFN, F.")
    max_seq_len: int = Field(4096, ge=2, description="Positions, in tokens (paper: 4,096).")
    rope_theta: float = Field(500_000.0, gt=0, description="Base of the rotary angles (paper).")
    norm_eps: float = Field(
        1e-6,
        ge=1e-12,
        description="Number added to the mean square in RMSNorm, which float32 must not lose.",
    )
    eos_token_id: int = Field(
        0, ge=0, description="Token that ends a document; also starts one and pads."
    )
    document_mask: bool = Field(
        False,
        description="True if attention stays within a document, which starts at an end of text.",
    )

    @model_validator(mode="after")
    def _shapes_agree(self) -> "ModelConfig":
        if self.d_model % self.num_heads:
            raise ValueError(
                f"d_model {self.d_model} is not a multiple of num_heads {self.num_heads}"
            )
        if (self.d_model // self.num_heads) % 2:
            raise ValueError("the width of one head must be even, for rotary positions")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}"
            )
        if self.eos_token_id >= self.vocab_size:
            raise ValueError(f"eos_token_id {self.eos_token_id} is outside the vocabulary")
        return self

    def refuse_longer(self, length: int, what: str) -> None:
        """Raises ConfigError if `what`, of `length` tokens, has more than the positions."""
        if length > self.max_seq_len:
            raise ConfigError(
                f"Found {length:,} tokens in {what}; the model has {self.max_seq_len:,} positions "
                "and has learnt nothing of what lies beyond. Give fewer."
            )

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def d_head(self) -> int:
        return self.d_model // self.num_heads


@dataclass
class ForwardContext:
    """Inputs of every layer beside the residual stream."""

    dtype: torch.dtype
    cos: Tensor  # [B or 1,1,T,C] float32, each angle's for both halves of a head
    sin: Tensor  # the same, of the first half with the opposite sign
    attention_bias: Tensor | None  # [B,1,T,S] additive; None: plain causal
    is_token: Tensor | None  # [B,T] False on left padding; None: all are tokens
    batch_rows: int | None = None  # N in evaluation, see tiles.product; None in training
    active: Tensor | None = None  # [B,E] per-sequence expert mask; None: all loaded experts
    weights: Tensor | None = None  # [B,T,E] when one routing decision serves every layer
    shares: Any = None  # the same by expert, see deltas.Share
    rests: dict[Any, Any] = field(default_factory=dict)  # see deltas._Deltas.rest
    groups: Any = None  # the same of a small batch, see groups.Groups
    panels: Panels | None = None  # of a batch in evaluation
    is_alone: bool = False  # True for a batch of one row, whose bits no other row can move
    blend: Any = None  # when one owner's expert learns beside the anchor, see blend.Blend
    texts: Any = None  # for discriminant routers, see router.Texts
    lanes: Any = None  # when several models read each text, see lanes.Lanes
    spans: Reads | None = None  # when a step reads spans of many texts
    cache: list[LayerCache] | None = None
    start: int = 0  # positions in the cache before these
    room: int = 0  # positions that the cache should hold in the end
    routing: list[Tensor] | None = None  # when a list: each layer appends its weights [B,T,E]
    router_logits: list[Tensor] | None = None  # when a list: layers append logits [B,T,E]

    @property
    def fill(self) -> Callable[[int], int] | None:
        """Function from the number of rows that picked an expert to the number that it reads, so
        that products need not fill them up; None in training."""
        if self.batch_rows is None:
            return None
        if self.panels:
            return LAYOUT.in_steps
        return partial(in_tiles, batch_rows=self.batch_rows, device=self.cos.device)


def copy_matrix(place: Tensor, values: Tensor) -> None:
    """Copy `values` into a tensor laid out as a `Linear`'s weight, or in any other way; seven times
    as fast as torch, which does not look for blocks when the target is the turned one."""
    if place.dim() == 2 and not place.is_contiguous():
        place.T.copy_(values.T)
    else:
        place.copy_(values)


class Linear(nn.Linear):
    """A matrix without bias; in a mixture one that owners may add to stands here.

    The numbers of a column stand together in memory, with which few rows multiply up to twice as
    fast.
    """

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)
        self.weight = nn.Parameter(torch.empty(d_in, d_out).T)

    def reset_parameters(self) -> None:
        """Leave the memory as it came: `initialise` draws it, or a file's numbers are copied."""

    def forward(self, x: Tensor, ctx: ForwardContext | None = None) -> Tensor:
        if ctx is None or ctx.batch_rows is None:
            return linear(x, self.weight) if self.training else F.linear(x, self.weight)
        return self.read(x.flatten(0, -2), ctx).view(*x.shape[:-1], self.weight.shape[0])

    def read(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Rows x [n,in] times the matrix, [n,out]."""
        if ctx.panels and (own := ctx.panels.get(self)) is not None:
            return own.times(x, ctx.is_alone)
        return product(x, self.weight, ctx.batch_rows)

    def versions(self) -> "list[Linear]":
        """This matrix and whole ones in its place, by owner."""
        return [self]

    def mix(self, x: Tensor, ctx: ForwardContext, read: Callable[[Tensor, Any], Tensor]) -> Tensor:
        """Products of rows x [n,in] by `read(x, .)` of each version, by their shares."""
        return read(x, self)

    def add_low(self, x: Tensor, y: Tensor, ctx: ForwardContext) -> Tensor:
        """y [n,out] + products of rows x [n,in] with low-rank deltas. May write into y."""
        return y

    def parts(self, x: Tensor, ctx: ForwardContext) -> "list[Part]":
        """Factors (u_j, w_j, rows) with `forward` = sum of u_j w_j^T at those rows."""
        return [(x.flatten(0, 1), self.weight, None)]


Part = tuple[Tensor, Tensor, Tensor | None]  # u [n,.], w [out,.], rows [n] of N, ascending


class Embedding(nn.Embedding):
    """A row per token id; in a mixture one that owners may add to stands here."""

    def reset_parameters(self) -> None:
        """Leave the memory as it came; drawing on the meta device would import torch's compiler."""

    def forward(self, ids: Tensor, ctx: ForwardContext | None = None) -> Tensor:
        return F.embedding(ids, self.weight)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm; in training with half as many passes over memory, and a third of it kept."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return cast(Tensor, Normalise.apply(x, self.weight, self.eps))  # type: ignore[no-untyped-call]
        return _in_pieces(self._as_stock, x.flatten(0, -2)).view(x.shape)

    def _as_stock(self, x: Tensor, place: Tensor | None = None) -> Tensor:
        """[n,D], in `place` if there is one."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        scale = torch.square(wide, out=place).mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        return torch.mul(wide, scale, out=place).mul_(self.weight).to(x.dtype)


def rows_at_once() -> int:
    """Number of tokens that an FFN reads at a time when nothing is learnt."""
    return CHUNK_ROWS * torch.get_num_threads()


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). A full expert is one of these per layer."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_proj = Linear(d_model, d_ff)
        self.up_proj = Linear(d_model, d_ff)
        self.down_proj = Linear(d_ff, d_model)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return self.read(x.flatten(0, 1), ctx).view_as(x)

    def read(self, x: Tensor, ctx: ForwardContext, weight: Tensor | None = None) -> Tensor:
        """FFN of rows x [n,D], of the first as many as there are in `weight` [.,1], times that.

        In evaluation, in pieces that a processor's cache holds, as the elementwise work would else
        wait for memory.
        """
        if ctx.batch_rows is None or not x.is_cpu or len(x) <= (most := rows_at_once()):
            return self._read(x, ctx, weight)
        found = [
            self._read(rows, ctx, None if weight is None else weight[start:][: len(rows)])
            for start, rows in zip(range(0, len(x), most), x.split(most), strict=True)
        ]
        return torch.cat(found)

    def _read(self, x: Tensor, ctx: ForwardContext, weight: Tensor | None) -> Tensor:
        if ctx.panels and self in ctx.panels:
            inner = ctx.panels[self].gated(x, ctx.is_alone)  # [n,F]
            return self.down_proj(inner if weight is None else weight * inner[: len(weight)], ctx)
        gate, up = self.gate_and_up(x, ctx)
        # a hook on `down_proj` sees nothing of it
        if self.training and ctx.batch_rows is None and weight is None:
            down = self.down_proj.weight.to(gate.dtype)
            return cast(Tensor, GatedDown.apply(gate, up, down))  # type: ignore[no-untyped-call]
        inner = F.silu(gate) * up if ctx.batch_rows is None else silu(gate).mul_(up)  # [n,F]
        if weight is not None:
            inner = weight * inner[: weight.shape[0]]
        return self.down_proj(inner, ctx)

    def gate_and_up(self, x: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """Both products of rows x [n,D], [n,F] each."""
        if ctx.panels and self in ctx.panels:
            gate, up = ctx.panels[self].times(x, ctx.is_alone).chunk(2, dim=1)
            return gate, up
        return self.gate_proj(x, ctx), self.up_proj(x, ctx)


class Attention(nn.Module):
    """Causal attention; RMSNorm over the full width of q and k before the heads are split."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, c = config.d_model, config.d_head
        self.d_head = c
        self.q_proj: Linear = Linear(d, config.num_heads * c)
        self.k_proj: Linear = Linear(d, config.kv_heads * c)
        self.v_proj: Linear = Linear(d, config.kv_heads * c)
        self.o_proj: Linear = Linear(config.num_heads * c, d)
        self.q_norm = RMSNorm(config.num_heads * c, eps=config.norm_eps)
        self.k_norm = RMSNorm(config.kv_heads * c, eps=config.norm_eps)

    def forward(self, x: Tensor, ctx: ForwardContext, layer: int) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self._project(x, ctx)
        parts = (self.q_norm(q), self.k_norm(k), v)
        if ctx.lanes is not None:
            B, T = ctx.lanes.chosen.shape
            parts = tuple(ctx.lanes.put(y) for y in parts)
        q, k, v = (
            y.view(B, T, -1, self.d_head).transpose(1, 2)  # [B,H,T,C], [B,G,T,C] twice
            for y in parts
        )
        q = _rotate(q, ctx)
        k = _rotate(k, ctx)
        if ctx.lanes is not None:
            k = ctx.lanes.fill(k)
            v = ctx.lanes.fill(v)
        if ctx.spans is not None:
            return self.o_proj(ctx.spans.attend(layer, q, k, v), ctx)  # [n,1,D]
        if ctx.cache is not None:
            k, v = ctx.cache[layer].append(k, v, ctx.start, ctx.room)  # [B,G,S,C]
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=ctx.attention_bias,
            is_causal=ctx.attention_bias is None and T > 1,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # [B,H,T,C]
        y = y.transpose(1, 2).reshape(B, T, -1)
        return self.o_proj(y if ctx.lanes is None else ctx.lanes.pick(y), ctx)  # [B,T,D]

    def _project(self, x: Tensor, ctx: ForwardContext) -> tuple[Tensor, ...]:
        matrices, panels = (self.q_proj, self.k_proj, self.v_proj), ctx.panels
        if not panels or (self, self.q_proj) not in panels:
            return tuple(m(x, ctx) for m in matrices)
        flat = x.flatten(0, 1)
        found = self.q_proj.mix(flat, ctx, lambda u, m: panels[self, m].times(u, ctx.is_alone))
        ends = accumulate((m.out_features for m in matrices), initial=0)
        parts = (found[:, start:end] for start, end in pairwise(ends))
        return tuple(m.add_low(flat, y, ctx) for m, y in zip(matrices, parts, strict=True))


def _rotate(x: Tensor, ctx: ForwardContext) -> Tensor:
    """Positions written into queries or keys x [B,.,T,C], in float32 as stock does."""

    def turn(x: Tensor, cos: Tensor, sin: Tensor, place: Tensor | None = None) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        crossed = torch.cat([second, first], dim=-1) * sin
        return torch.mul(x, cos, out=place).add_(crossed).to(x.dtype)

    return _in_pieces(turn, x, ctx.cos, ctx.sin)


def _in_pieces(work: Callable[..., Tensor], x: Tensor, *beside: Tensor) -> Tensor:
    """`work(x, *beside)`, of the shape of x and row by row; where nothing is learnt, in pieces that
    a processor's cache holds, each with its `place`. Each of `beside` has as many rows as x, or one
    for all."""
    if torch.is_grad_enabled() or not x.is_cpu or x.dtype != torch.float32:
        return work(x, *beside)
    most = PIECE_NUMBERS * torch.get_num_threads()
    if x.numel() <= most:
        return work(x, *beside)
    found = torch.empty_like(x)
    rows = max(1, most * len(x) // x.numel())
    for start in range(0, len(x), rows):
        own = (y if len(y) == 1 else y[start : start + rows] for y in (x, *beside))
        work(*own, place=found[start : start + rows])
    return found


class Block(nn.Module):
    """h = x + norm(attention(x)); y = h + norm(mlp(h)). Source: paper §3.2, OLMo 2."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp: nn.Module = FeedForward(config.d_model, config.d_ff)
        self.post_attention_layernorm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.d_model, eps=config.norm_eps)

    def forward(self, x: Tensor, ctx: ForwardContext, layer: int) -> Tensor:
        h = x + self.post_attention_layernorm(self.self_attn(x, ctx, layer))  # [B,T,D]
        return h + self.post_feedforward_layernorm(self.mlp(h, ctx))  # [B,T,D]


class Transformer(nn.Module):
    """Token ids in, logits out. With `FeedForward` in every layer it is the anchor."""

    in_tiles = True  # False: products as stock multiplies, with its bits, which depend on the batch

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens: Embedding = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.lm_head: Linear = Linear(config.d_model, config.vocab_size)
        self.run_block: Callable[..., Tensor] = Block.__call__  # in training

    @property
    def device(self) -> torch.device:
        """Device of the weights; inputs may be on any other."""
        return self.embed_tokens.weight.device

    def initialise(self, seed: int, copy: Callable[[Tensor, Tensor], None] = copy_matrix) -> None:
        """Draw matrices from a normal of deviation 0.02, each put in its place by `copy`, and set
        norms to 1. Source: OLMo 2."""
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            if p.dim() == 2:  # drawn row by row, whatever the layout of `p`
                drawn = torch.empty(p.shape)
                nn.init.trunc_normal_(drawn, std=0.02, a=-0.06, b=0.06, generator=generator)
                with torch.no_grad():
                    copy(p, drawn)
            else:
                nn.init.ones_(p)

    def space_weights(self) -> None:
        """Lay matrices out as reading is fastest, see `tiles.spaced`. Changes no number."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.weight.data = spaced(module.weight.data)

    def cut_panels(self) -> Panels:
        """Matrices for the option `panels`, laid out for it, with a second copy; empty where it
        would not help."""
        together: dict[Any, list[Linear]] = {}
        alone: dict[Any, list[Linear]] = {}
        tables = {m for e in self.modules() if isinstance(e, Embedding) for m in e.modules()}
        for module in self.modules():
            if isinstance(module, FeedForward):
                together[module] = [module.gate_proj, module.up_proj]
            elif isinstance(module, Attention):
                every = (m.versions() for m in (module.q_proj, module.k_proj, module.v_proj))
                together |= {(module, own[0]): [*own] for own in zip(*every, strict=True)}
            elif isinstance(module, Linear) and module not in tables:
                alone[module] = [module]
        for own in together.values():
            for m in own:
                del alone[m]
        found = (alone | together).items()
        return {key: LAYOUT.lay_out(own) for key, own in found if can_cut(own[0].weight)}

    def new_cache(self) -> Cache:
        """An empty cache for one batch."""
        return Cache([LayerCache() for _ in self.layers])

    def new_memory(self, num_positions: int) -> Tensor:
        """Memory for keys and values of spans, [L,2,G,P,C], taken at once, as the system would else
        find it page by page while texts are read."""
        c = self.config
        shape = (c.num_layers, 2, c.kv_heads, num_positions, c.d_head)
        return torch.empty(shape, dtype=self.embed_tokens.weight.dtype, device=self.device).zero_()

    def hidden(self, ids: Tensor, **options: Any) -> Tensor:
        """The residual stream after the last norm, [B,T,D]; options as for `forward`."""
        return self.stream(ids, **options)[0]

    def forward(self, ids: Tensor, *, last: int | None = None, **options: Any) -> Tensor:
        """Logits [B,T,V]; with `last`, only those of that many last positions, [B,last,V].

        ids [B,T]. Options: is_token [B,T] is False on left padding. active [B,E] switches the
        mixture's experts per sequence. With `panels`, of `cut_panels`, batches are read faster.
        With a cache, ids continue the positions it holds. The lists routing and
        router_logits, when given, receive each layer's mixture weights and router logits, both
        [B,T,E].
        """
        x, ctx = self.stream(ids, **options)
        if last is not None and last < x.shape[1]:
            x, ctx = x[:, -last:], self._at_last(ctx, len(x), last)
        return self.lm_head(x, ctx)

    def _at_last(self, ctx: ForwardContext, batch_size: int, count: int) -> ForwardContext:
        """The context of the last `count` positions alone."""
        return replace(ctx, batch_rows=ctx.batch_rows and batch_size * count)

    def stream(
        self,
        ids: Tensor,
        *,
        cache: Cache | None = None,
        is_token: Tensor | None = None,
        active: Tensor | None = None,
        panels: Panels | None = None,
        lanes: Any = None,
        routing: list[Tensor] | None = None,
        router_logits: list[Tensor] | None = None,
    ) -> tuple[Tensor, ForwardContext]:
        """The residual stream [B,T,D] after the last norm, and what the layers were given; options
        as in `forward`. With `lanes.Lanes`, of the n tokens that somebody reads, [1,n,D]."""

        def here(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(self.device)

        ids = ids.to(self.device)
        ctx = self._context(ids, cache, here(is_token), here(active), panels, lanes)
        ctx.routing, ctx.router_logits = routing, router_logits
        x = self._run(ids if lanes is None else lanes.pick(ids), ctx)
        if cache is not None:
            cache.num_positions += ids.shape[1]
        return x, ctx

    def read_spans(
        self, spans: Reads, panels: Panels | None, routing: list[Tensor] | None = None
    ) -> tuple[Tensor, ForwardContext]:
        """The residual stream [n,1,D] after the last norm, of the tokens of a step, and what the
        layers were given; `panels` and `routing` as in `forward`."""
        ctx = self._context_of(spans, panels)
        ctx.routing = routing
        return self._run(spans.ids, ctx), ctx

    def predict_at(self, x: Tensor, ctx: ForwardContext, rows: slice | Tensor) -> Tensor:
        """Logits [.,V] after `rows` of all that were read; x and ctx as `stream` with lanes, or
        `read_spans`, gives them."""
        return self.lm_head(x.flatten(0, 1)[rows][None], self._at(ctx, rows))[0]

    def _at(self, ctx: ForwardContext, rows: slice | Tensor) -> ForwardContext:
        """The context of some of the rows."""
        return ctx

    def _run(self, ids: Tensor, ctx: ForwardContext) -> Tensor:
        """The residual stream [B,T,D] after the last norm."""
        x = self.embed_tokens(ids, ctx)  # [B,T,D]
        for i, block in enumerate(self.layers):
            x = self.run_block(block, x, ctx, i) if self.training else block(x, ctx, i)
        return self.norm(x)

    def _context_of(self, spans: Reads, panels: Panels | None) -> ForwardContext:
        cos, sin = self._angles(spans.positions)
        return ForwardContext(
            self.embed_tokens.weight.dtype,
            cos,
            sin,
            attention_bias=None,
            is_token=None,
            batch_rows=spans.batch_rows,
            active=spans.active,
            panels=panels,
            spans=spans,
        )

    def _context(
        self,
        ids: Tensor,
        cache: Cache | None,
        is_token: Tensor | None,
        active: Tensor | None,
        panels: Panels | None = None,
        lanes: Any = None,
    ) -> ForwardContext:
        T = ids.shape[1]
        dtype = self.embed_tokens.weight.dtype
        past = 0 if cache is None else cache.num_positions
        seen = is_token  # [B,S]
        if cache is not None:
            active = cache.keep_mask(active)
            if is_token is not None or cache.is_token is not None:
                before, new = (
                    torch.ones(len(ids), length, dtype=torch.bool, device=ids.device)
                    if known is None
                    else known
                    for known, length in ((cache.is_token, past), (is_token, T))
                )
                seen = torch.cat([before, new], dim=1)
        if seen is not None and bool(seen.all()):
            seen = is_token = None
        longest = past + T if seen is None else int(seen.sum(1).max())
        self.config.refuse_longer(longest, "this text")
        if cache is not None:
            cache.is_token = seen
        positions = torch.arange(past, past + T, device=ids.device)[None]  # [1,T]
        if seen is not None:
            positions = (seen.cumsum(1) - 1).clamp(min=0)[:, past:]  # [B,T]
        document = self._documents(ids, cache, is_token) if self.config.document_mask else None
        bias: Tensor | None = None
        if seen is not None or document is not None or (past > 0 and T > 1):
            S = past + T
            visible = torch.ones(1, 1, T, S, dtype=torch.bool, device=ids.device).tril(past)
            if seen is not None:
                visible = visible & seen[:, None, None, :]  # [B,1,T,S]
            if document is not None:
                visible = visible & (document[:, None, past:, None] == document[:, None, None, :])
            # a padded position sees itself, so that its softmax has something to sum
            itself = torch.zeros(T, S, dtype=torch.bool, device=ids.device)
            itself[:, past:] = torch.eye(T, dtype=torch.bool, device=ids.device)
            bias = torch.zeros(visible.shape, dtype=dtype, device=ids.device)
            bias = bias.masked_fill(~(visible | itself), -math.inf)
        cos, sin = self._angles(positions)
        batch_rows = ids.numel() if self.in_tiles and not self.training else None
        reads_panels = batch_rows is not None and batch_rows >= LAYOUT.fewest_rows
        return ForwardContext(
            dtype,
            cos,
            sin,
            bias,
            is_token,
            batch_rows,
            active,
            panels=panels if reads_panels else None,
            is_alone=batch_rows == 1 and lanes is None,
            cache=None if cache is None else cache.layers,
            start=past,
            room=0 if cache is None else cache.room,
            lanes=lanes,
        )

    def _documents(
        self, ids: Tensor, cache: Cache | None, is_token: Tensor | None
    ) -> Tensor | None:
        """The number of each position's document, [B,S], which an end of text begins; None if
        every row holds one document alone. Kept in the cache."""
        begins = ids == self.config.eos_token_id
        if is_token is not None:
            begins = begins & is_token
        document = begins.cumsum(1)  # [B,T]
        if cache is not None:
            if cache.document is not None:
                document = torch.cat([cache.document, document + cache.document[:, -1:]], dim=1)
            cache.document = document
        return None if bool((document == document[:, :1]).all()) else document

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config.d_head
        exponents = torch.arange(0, c, 2, device=positions.device, dtype=torch.float32) / c
        inverse = 1.0 / (self.config.rope_theta**exponents)  # [C/2]
        angle = positions[:, None, :, None].float() * inverse  # [B or 1,1,T,C/2]
        cos = angle.cos()
        sin = angle.sin()
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
