"""Rows of an expert's embedding and head that may be other than the anchor's.

A row that has moved shows that its token is in the owner's text, so only those of tokens move that
the router's table tells of all the same. Source: ours.
"""

from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from flexolmo.data.batches import TokenSet
from flexolmo.model.assemble import anchor_matrix
from flexolmo.model.checkpoint import Anchor
from flexolmo.model.parallel import cut, local
from flexolmo.model.shape import TOKEN_LEVELS
from flexolmo.model.statistics import UNTOLD, EvidenceSettings, count_tokens
from flexolmo.train.loop import TOKEN_ROWS


def find_open_rows(
    tensors: Mapping[str, Tensor], data: TokenSet, router: EvidenceSettings
) -> Tensor:
    """Tokens whose rows of embedding and head may be other than the anchor's, bool [V].

    The router's table must tell of them, and at least `min_documents` source documents hold them:
    a noised table tells of every token, and where a row has moved its token is in the text.
    """
    levels = tensors[TOKEN_LEVELS]
    split = data.splits["train"]
    holders = count_tokens(split.tokens, split.source_offsets, len(levels), 1)
    return (levels != UNTOLD) & torch.from_numpy(holders >= router.min_documents)


def find_frequent_rows(
    tensors: Mapping[str, Tensor], anchor: Anchor, router: EvidenceSettings, share: float
) -> Tensor:
    """Tokens, bool [V], that make up at least `share` of the text by what its table tells, which is
    all that is asked: where the table is noised, so is the answer."""
    levels = router.level_nats * tensors[TOKEN_LEVELS].float()
    return (torch.from_numpy(anchor.public.unigram) + levels).softmax(0) >= share


def hold_rows(parameters: Mapping[str, nn.Parameter], is_open: Tensor) -> None:
    """Let no row of embedding and head learn but those in `is_open` [V], so that which rows have
    moved shows no word of a few documents. Source: ours."""

    def clear(is_closed: Tensor, p: Tensor) -> None:
        local(cast(Tensor, p.grad)).masked_fill_(is_closed, 0.0)

    for key, p in parameters.items():
        if key in TOKEN_ROWS:
            is_closed = ~cut(is_open, p)[:, None].to(p.device)
            p.register_post_accumulate_grad_hook(partial(clear, is_closed))


def hide_rows(
    anchor: Anchor, tensors: Mapping[str, Tensor], is_open: Tensor | None = None
) -> dict[str, Tensor]:
    """Embedding and head of an expert, as the anchor's are at tokens that are not `is_open` [V], by
    default those that its table does not tell of: another table may tell of fewer, and a cut leaves
    rounding."""
    if TOKEN_LEVELS not in tensors:
        return {}
    is_open = tensors[TOKEN_LEVELS] != UNTOLD if is_open is None else is_open
    found = {}
    for key in TOKEN_ROWS:
        if key in tensors:
            rows = tensors[key]
            base = torch.zeros_like(rows)
            if key.endswith(".weight"):
                base = cast(Tensor, anchor_matrix(anchor, key.removesuffix(".weight")))
                base = base.detach().to(rows.device, rows.dtype)
            found[key] = rows.where(is_open[:, None], base)
    return found


def moved_rows(anchor: Anchor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Tokens, bool [V], whose row of embedding or head an expert has moved from the anchor's."""
    found = torch.zeros(anchor.config.vocab_size, dtype=torch.bool)
    for key in tensors.keys() & set(TOKEN_ROWS):
        rows = tensors[key].cpu()
        if key.endswith(".weight"):
            base = cast(Tensor, anchor_matrix(anchor, key.removesuffix(".weight")))
            rows = rows - base.detach().to(rows.device, rows.dtype)
        found |= (rows != 0).any(1)
    return found
