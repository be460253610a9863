"""Several models that read one text side by side, each in a lane of its own.

In every lane one whole expert reads a token, or none. Where none does, the lane takes the keys and
values of the lane that leads there, so that whoever reads on in it has the whole text before it,
at no cost. Source: ours.

B texts, K lanes of each, N = B*K rows of a batch, T positions, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lanes:
    """The expert that reads each token in each lane.

    A batch's rows are the lanes of its first text, then of its second, and so on.
    """

    chosen: Tensor  # [N,T] int64, number of the expert; -1: none
    lead: Tensor  # [B,T] int64, lane of each text that leads; somebody reads there

    @property
    def is_live(self) -> Tensor:
        """True where somebody reads, bool [N,T]."""
        return self.chosen >= 0

    def weights(self, num_experts: int, active: Tensor | None) -> Tensor:
        """Mixture weights [N,T,E] of 0 and 1, float32. `active` [N,E] must hold whoever reads."""
        found = torch.zeros(*self.chosen.shape, num_experts + 1, device=self.chosen.device)
        found.scatter_(-1, self.chosen[..., None] % (num_experts + 1), 1.0)  # -1 to the last
        found = found[..., :num_experts].contiguous()
        if active is not None:
            assert not bool((found * ~active[:, None]).any()), "an expert that is off would read"
        return found

    def fill(self, x: Tensor) -> Tensor:
        """Keys or values x [N,G,T,C], with the leader's where nobody reads."""
        N, G, T, C = x.shape
        B = len(self.lead)
        lanes = x.view(B, -1, G, T, C)
        at = self.lead.view(B, 1, 1, T, 1).expand(B, 1, G, T, C)
        live = self.is_live.view(B, -1, 1, T, 1)
        return torch.where(live, lanes, lanes.gather(1, at)).view(N, G, T, C)
