"""An expert read by itself, past the router of its mixture.

A mixture's router sends the expert what its table recognises, and keeps the rest from it. Whoever
has the bundle need not ask the router.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from flexolmo.inference.reader import OwnReader
from flexolmo.model.moe import MixtureModel


@dataclass
class AloneReader(OwnReader):
    """A reader of a mixture in which one expert, the only one of `enabled`, reads every token."""

    def read(self, ids: Tensor, state: Any, *, is_token: Tensor | None = None, last: int) -> Tensor:
        model = cast(MixtureModel, self.model)
        routers = [m.router for m in model.mixtures()] if model.router is None else [model.router]
        hooks = [r.register_forward_hook(self._choose) for r in routers if r is not None]
        try:
            return super().read(ids, state, is_token=is_token, last=last)
        finally:
            for hook in hooks:
                hook.remove()

    def _choose(self, router: nn.Module, given: Any, said: Any) -> Any:
        """The router's result with all weight on the expert; its state as it was."""
        (name,) = cast(list[str], self.enabled)
        logits = said[0] if isinstance(said, tuple) else said  # [B,T,E]
        chosen = torch.full_like(logits, -torch.inf)
        chosen[..., cast(MixtureModel, self.model).expert_names.index(name)] = 0.0
        return (chosen, *said[1:]) if isinstance(said, tuple) else chosen
