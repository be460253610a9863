"""Rows of a small batch sorted by the expert that reads them, so that a layer's experts share all
work but their products. Source: ours.

N rows of the batch, E experts, R rows to read, D d_model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """The rows that each expert reads, one expert after the other: owners' first, public's last."""

    reads: Tensor  # [R] of the N rows
    weight: Tensor  # [R,1] of the expert at that row, in the model's dtype
    sizes: Sequence[int]  # rows that each of E experts reads
    places: Sequence[Tensor]  # [N] each: of the row's first expert among R, its second and so on
    has_gaps: bool  # True if a row has fewer experts than another, and stands at R instead

    def sum(self, values: Tensor) -> Tensor:
        """Sum [N,D] over its experts of every row's values [R,D]."""
        if self.has_gaps:  # -0 is what changes no number when added to it
            values = torch.cat([values, values.new_full((1, values.shape[1]), -0.0)])
        first, *others = self.places
        total = values.index_select(0, first)
        for place in others:
            total += values.index_select(0, place)
        return total


def groups_of(weights: Tensor, dtype: torch.dtype) -> Groups:
    """Groups from mixture weights [B,T,E], of the public expert first, on a processor; an expert
    of weight 0 does not read."""
    table = np.roll(weights.flatten(0, 1).T.numpy(), -1, axis=0)  # [E,N]
    num_experts, num_rows = table.shape
    expert, row = np.nonzero(table)  # by expert, then by row; NaN is seen, not passed over
    by_row = row.argsort(kind="stable")
    per_row = np.bincount(row, minlength=num_rows)
    most = int(per_row.max(initial=1))
    has_gaps = len(row) < most * num_rows
    places = np.full((num_rows, most), len(row))
    places[np.arange(most) < per_row[:, None]] = by_row
    return Groups(
        torch.from_numpy(row),
        torch.from_numpy(table[expert, row])[:, None].to(dtype),
        np.bincount(expert, minlength=num_experts).tolist(),
        torch.from_numpy(places.T.copy()).unbind(),
        has_gaps,
    )
