"""Routers: how much each enabled expert says about the next token.

Two kinds. `evidence` (ours, the default) weighs experts by the evidence that the tokens read so
far give for each owner's domain over public text; it is a table of statistics, reads no hidden
state, and so no expert can change another's odds. `linear` is the paper's: a row per expert and
layer, read against the residual stream, with a negative bias. In both, an expert's logit depends
on the anchor and that expert's owner alone, which is what makes opting out exact.

Every number is computed expert by expert, in an order that does not change when others are
absent; so a disabled expert and one never merged give the same bits.

B batch, T positions, E experts, V vocabulary, R public clusters, K top_k.
"""

import math
from typing import Annotated, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from flexolmo.model.statistics import EvidenceSettings

PUBLIC = "public"
EvidenceState = tuple[Tensor, list[Tensor], Tensor]
FIRST_RAW_BIAS = -2.0  # b_i starts at -softplus(-2) = -0.13
_CHUNK = 256  # positions for which the decay matrix is written out


class LinearSettings(BaseModel):
    """One row a layer read against the residual stream, with a negative bias. Source: §3.3.2."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["linear"] = "linear"
    has_bias: bool = Field(True, description="negative bias on owners' experts (paper); the stock "
                                             "format has none")


RouterSettings = Annotated[EvidenceSettings | LinearSettings, Field(discriminator="kind")]


def slot(name: str) -> str:
    """The key of an expert in torch's dictionaries, whose own attributes (`training`, `values`)
    would otherwise be names no expert could have."""
    return f"expert_{name}"


class EvidenceRouter(nn.Module):
    """Log odds of each owner's domain against public text, from token frequencies.

    Let e_i[v] = log p_i(v) - log p_public(v) be owner i's table. With decay g per token and n the
    decayed count of tokens in the document so far, an owner's logit at position t is
    sum_s g^(t-s) e_i[token_s] / (1 + n/saturation): a naive Bayes posterior, tempered because
    neighbouring tokens repeat each other. Public text is broad, so it is described by R clusters
    with a table each, and its logit is their log-mean-exp. The end-of-text token clears the
    evidence. Source: ours.
    """

    def __init__(self, settings: EvidenceSettings, names: list[str], vocab_size: int,
                 num_clusters: int, eos_token_id: int):
        super().__init__()
        self.settings = settings
        self.names = names
        self.eos_token_id = eos_token_id
        self.public_clusters: Tensor
        self.register_buffer("public_clusters", torch.zeros(num_clusters, vocab_size))  # [R,V]
        self.tables = nn.ParameterDict({
            slot(n): nn.Parameter(torch.zeros(vocab_size), requires_grad=False)
            for n in names if n != PUBLIC
        })

    def table(self, name: str) -> nn.Parameter:
        """One owner's evidence table, [V]."""
        return self.tables[slot(name)]

    def forward(self, ids: Tensor, is_token: Tensor | None,
                past: EvidenceState | None) -> tuple[list[Tensor], EvidenceState]:
        """Logits [B,T] in float32, one for each of `names`, and what to hand to the next call.

        `past` is None, or the second result of the call that read the positions before: decayed
        sums of the clusters [B,R] and of each owner [B], and the decayed token count [B].
        """
        B, owners = len(ids), [self.table(n) for n in self.names if n != PUBLIC]
        if past is None:
            zeros = torch.zeros(B, device=ids.device)
            past = (torch.zeros(B, len(self.public_clusters), device=ids.device),
                    [zeros] * len(owners), zeros)
        cluster_sums, owner_sums, count = past
        pieces: list[list[Tensor]] = [[] for _ in self.names]
        for start in range(0, ids.shape[1], _CHUNK):
            part = ids[:, start:start + _CHUNK]  # [B,c]
            real = None if is_token is None else is_token[:, start:start + _CHUNK]
            matrix, carry = self._decay(part, real)  # [B,c,c], [B,c]
            seen = matrix.sum(-1) + count[:, None] * carry  # [B,c]
            scale = 1.0 / (1.0 + seen / self.settings.saturation_tokens)  # [B,c]
            evidence = self.public_clusters[:, part].permute(1, 2, 0)  # [B,c,R]
            total = torch.bmm(matrix, evidence) + cluster_sums[:, None] * carry[..., None]
            mean = (total * scale[..., None]).logsumexp(-1) - math.log(total.shape[-1])  # [B,c]
            pieces[0].append(mean)
            cluster_sums, count, past_sums, owner_sums = total[:, -1], seen[:, -1], owner_sums, []
            for table, before, out in zip(owners, past_sums, pieces[1:], strict=True):
                own = torch.bmm(matrix, table[part][..., None])[..., 0]  # [B,c]
                own = own + before[:, None] * carry
                owner_sums.append(own[:, -1])
                out.append(own * scale)
        return [torch.cat(p, dim=1) for p in pieces], (cluster_sums, owner_sums, count)

    def _decay(self, ids: Tensor, is_token: Tensor | None) -> tuple[Tensor, Tensor]:
        """What each token's evidence counts at each later position, and the past's share."""
        c = ids.shape[1]
        ends = ids == self.eos_token_id  # [B,c]
        counts = (~ends if is_token is None else ~ends & is_token).float()  # [B,c]
        segment = ends.cumsum(1)  # [B,c] how often the evidence was cleared
        t = torch.arange(c, device=ids.device)
        gap = t[:, None] - t[None]  # [c,c]
        decay = torch.exp2(-gap.clamp(min=0) / self.settings.half_life_tokens).tril()  # [c,c]
        same = segment[:, :, None] == segment[:, None, :]  # [B,c,c]
        matrix = decay * same * counts[:, None, :]  # [B,c,c]
        carry = torch.exp2(-(t + 1) / self.settings.half_life_tokens) * (segment == 0)  # [B,c]
        return matrix, carry


class LinearRouter(nn.Module):
    """Logits r_i . h + b_i with b_i <= 0, in float32; the public expert has no bias.

    The paper clamps a free parameter, min(b_i, 0); once positive it has no gradient and does
    nothing. We write b_i = -softplus(raw_i) instead. Source: §3.3.2; the bias's form is ours.
    """

    def __init__(self, settings: LinearSettings, names: list[str], d_model: int):
        super().__init__()
        self.names = names
        self.rows = nn.ModuleDict({slot(n): nn.Linear(d_model, 1, bias=False) for n in names})
        self.raw_bias = nn.ParameterDict({
            slot(n): nn.Parameter(torch.full((1,), FIRST_RAW_BIAS)) for n in names
            if n != PUBLIC and settings.has_bias
        })

    def row(self, name: str) -> nn.Linear:
        """The row of one expert; its weight is [1,D]."""
        return cast(nn.Linear, self.rows[slot(name)])

    def bias(self, name: str) -> nn.Parameter | None:
        """The free parameter [1] of one expert's bias, if it has one."""
        return self.raw_bias.get(slot(name))

    def forward(self, h: Tensor) -> list[Tensor]:
        """Logits [B,T], one for each of `names`; h [B,T,D]."""
        x = h.float()
        logits = []
        for name in self.names:
            logit = nn.functional.linear(x, self.row(name).weight.float())[..., 0]  # [B,T]
            raw = self.bias(name)
            if raw is not None:
                logit = logit - nn.functional.softplus(raw.float())
            logits.append(logit)
        return logits


def mixture_weights(logits: list[Tensor], active: Tensor | None, top_k: int | None) -> Tensor:
    """Softmax over the enabled experts, then top-k without renormalisation: [B,T,E] float32.

    `logits` holds one [B,T] per expert; `active` is [B,E] or None for all. Sums run expert by
    expert, and ties go to the first name, so leaving an expert out and never having had it give
    the same bits. Source: §3.2.
    """
    if active is not None:
        off = ~active[:, :, None]  # [B,E,1]
        logits = [z.masked_fill(off[:, e], -math.inf) for e, z in enumerate(logits)]
    top = logits[0]
    for z in logits[1:]:
        top = torch.maximum(top, z)
    parts = [torch.exp(z - top) for z in logits]
    total = parts[0]
    for p in parts[1:]:
        total = total + p
    weights = torch.stack([p / total for p in parts], dim=-1)  # [B,T,E]
    if top_k is not None and top_k < len(logits):
        order = torch.stack(logits, dim=-1).sort(dim=-1, descending=True, stable=True).indices
        keep = torch.zeros_like(weights, dtype=torch.bool)
        keep.scatter_(-1, order[..., :top_k], True)
        weights = weights * keep
    return weights
