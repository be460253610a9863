"""Several models that read one text side by side, each in a lane of its own.

In every lane one whole expert reads a token, or none. Where none does, the lane takes the keys and
values of the lane that leads there, so that whoever reads on in it has the whole text before it;
nothing but attention is computed there. Source: ours.

B texts, K lanes of each, N = B*K rows of a batch, T positions, n of all N*T that somebody reads,
E experts.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from flexolmo.errors import PolicyError


@dataclass(frozen=True)
class Lanes:
    """The expert that reads each token in each lane.

    A batch's rows are the lanes of its first text, then of its second, and so on.
    """

    chosen: Tensor  # [N,T] int64, number of the expert; -1: none
    lead: Tensor  # [B,T] int64, lane of each text that leads; somebody reads there

    @cached_property
    def places(self) -> Tensor:
        """Positions [n] of all N*T that somebody reads, ascending."""
        return (self.chosen.flatten() >= 0).nonzero()[:, 0]

    def weights(self, num_experts: int, active: Tensor | None) -> Tensor:
        """Mixture weights [1,n,E] of 0 and 1, float32; PolicyError if an expert reads that is off
        by `active` [N,E]."""
        readers = self.chosen.flatten()[self.places]  # [n]
        if active is not None:
            rows = self.places // self.chosen.shape[1]
            if not bool(active[rows, readers].all()):
                raise PolicyError("An expert that is off would read: this is a defect, report it.")
        return F.one_hot(readers, num_experts).float()[None]

    def pick(self, x: Tensor) -> Tensor:
        """The rows of x [N,T,...] that somebody reads, [1,n,...]."""
        return x.flatten(0, 1)[self.places][None]

    def put(self, x: Tensor) -> Tensor:
        """Rows x [1,n,F] at their positions, [N,T,F], zeros elsewhere."""
        N, T = self.chosen.shape
        return x.new_zeros(N * T, x.shape[-1]).index_copy(0, self.places, x[0]).view(N, T, -1)

    def fill(self, x: Tensor) -> Tensor:
        """Keys or values x [N,G,T,C], with the leader's where nobody reads."""
        N, G, T, C = x.shape
        B = len(self.lead)
        lanes = x.view(B, -1, G, T, C)
        at = self.lead.view(B, 1, 1, T, 1).expand(B, 1, G, T, C)
        is_read = (self.chosen >= 0).view(B, -1, 1, T, 1)
        return torch.where(is_read, lanes, lanes.gather(1, at)).view(N, G, T, C)
