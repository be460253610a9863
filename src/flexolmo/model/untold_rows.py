"""Rows of an expert's output head at tokens that its router's table does not tell of.

In a bundle they are the anchor's: a row that had moved would show that its token is in the owner's
text. Read so, they lack what training teaches the rows of all rare tokens, and the expert takes
such tokens for several times as likely as they are. So beside the anchor they all move alike, by
the mean move of the rarest tokens told of. That follows from the bundle and the anchor, and tells
nothing that these do not. Source: ours.

V vocabulary, D d_model, r rank.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from flexolmo.model.deltas import DeltaLinear, LowRank
from flexolmo.model.moe import MixtureModel
from flexolmo.model.parallel import count, cut, local, mean
from flexolmo.model.statistics import UNTOLD, EvidenceSettings

RAREST = 0.2  # of the tokens told of: chosen on validation text, where 0.1 to 0.4 do as well
ROWS_AT_ONCE = 4096  # in memory a second time


@dataclass(frozen=True)
class UntoldRows:
    """The rows of one expert's head that move with others."""

    key: str  # of the matrix, as in `expert_shapes`
    matrix: Tensor  # [V,D], or B of a delta [V,r]; of several processes each one's part
    base: Tensor | None  # [V,D] the anchor's; None: rows of a delta begin with 0
    is_untold: Tensor  # bool [V]
    is_rarest: Tensor  # bool [V] tokens whose mean move is theirs

    def move(self, rows: Tensor) -> None:
        """Put the untold rows in their place in `rows`, of which `matrix` is one, or a copy of it.

        Of several processes all must ask for it.
        """
        own, base = local(rows), None if self.base is None else local(self.base)
        total = torch.zeros(own.shape[1], dtype=torch.float64, device=own.device)
        for ids in self._places(self.is_rarest):
            total += own[ids].sum(0, dtype=torch.float64)
            if base is not None:
                total -= base[ids].sum(0, dtype=torch.float64)
        step = (mean(total) * count() / int(self.is_rarest.sum())).to(own.dtype)
        for ids in self._places(self.is_untold):
            own[ids] = step if base is None else base[ids] + step

    def put_back(self, rows: Tensor) -> Tensor:
        """A copy of `rows` with them as they are in the bundle."""
        found = rows.clone()
        for ids in self._places(self.is_untold):
            found[ids] = 0.0 if self.base is None else self.base[ids]
        return found

    def _places(self, chosen: Tensor) -> tuple[Tensor, ...]:
        """Places of the `chosen` [V] among the rows that this process holds, some at a time."""
        return cut(chosen, self.matrix).nonzero()[:, 0].to(self.matrix.device).split(ROWS_AT_ONCE)


def find_untold_rows(model: MixtureModel, name: str) -> UntoldRows | None:
    """The rows of expert `name` that move, its table being in `model`; None if there are none."""
    head, router = model.lm_head, model.router
    if router is None or not isinstance(head, DeltaLinear) or name not in head.deltas.places:
        return None
    levels = router.table(name).token_levels.cpu()
    told = (levels != UNTOLD).nonzero()[:, 0]
    if len(told) in (0, len(levels)):  # all, where the table is noised
        return None
    settings = cast(EvidenceSettings, model.settings)
    logs = router.public.unigram.cpu()[told].double() + settings.level_nats * levels[told]
    rarest = told[logs.argsort(stable=True)[: math.ceil(RAREST * len(told))]]
    is_rarest = torch.zeros(len(levels), dtype=torch.bool)
    is_rarest[rarest] = True
    own = head.deltas.of(name)
    is_low = isinstance(own, LowRank)
    return UntoldRows(
        "lm_head.lora_b" if is_low else "lm_head.weight",
        cast(LowRank, own).lora_b if is_low else cast(Tensor, own.weight),
        None if is_low else head.weight,
        levels == UNTOLD,
        is_rarest,
    )


@torch.no_grad()
def move_untold_rows(model: MixtureModel, name: str) -> None:
    """Move such rows of expert `name`, whose tensors `model` holds as they are in its bundle."""
    rows = find_untold_rows(model, name)
    if rows is not None:
        rows.move(rows.matrix)
