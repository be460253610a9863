"""The mixture as vLLM runs it: our own modules, on vLLM's attention and its memory for keys.

Bundles are read and checked by `load_mixture`, as everywhere else; nothing is exported. Experts,
routers and deltas are those of `flexolmo.model`; only the products differ in that rows need not
keep their bits, so that tokens agree with our own engine's, and numbers to about 1e-6.

n tokens of a step, D d_model, E experts, H heads, G key-value heads, C head width, V vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from flexolmo.errors import ConfigError
from flexolmo.inference.open_engine import model_reader
from flexolmo.inference.opening import Opening
from flexolmo.inference.stepping import EngineModel, refuse_unserved
from flexolmo.model.assemble import erase_expert
from flexolmo.model.deltas import DeltaLinear
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import EvidenceRouter
from flexolmo.model.transformer import ForwardContext
from flexolmo_vllm.admission import refuse_unsafe


@dataclass
class Step:
    """Tokens of one step of vLLM's; see `spans.Reads`."""

    ids: Tensor  # [n,1]
    positions: Tensor  # [n,1]
    active: Tensor  # [n,E]
    logs: Tensor | None  # [n,E] log weights of an evidence router
    attention: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    batch_rows: int | None = None
    routing: list[Tensor] = field(default_factory=list)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `spans.Reads`."""
        return self.attention(layer, q, k, v)

    def follow(self, router: EvidenceRouter) -> Tensor:
        """See `spans.Reads`."""
        assert self.logs is not None, "the worker follows requests"
        return self.logs[:, None]


@dataclass
class Routing:
    """Experts at each token of a step, as the worker gives them."""

    active: Tensor  # [n,E]
    logs: Tensor | None  # [n,E]
    weights: Tensor | None = None  # [n,E] found by the layers' own routers, their mean


class MixtureForCausalLM(nn.Module):
    """A mixture behind vLLM's interface of models.

    The residual stream that `forward` gives has each token's weights of experts behind it, where
    the output head depends on them.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        """Raises ConfigError where requests' experts would not be kept apart."""
        super().__init__()
        refuse_unsafe(vllm_config)
        config = vllm_config.model_config.hf_config
        self.head_size: int = config.head_dim  # in memory: C, or more, filled up with 0
        d_head = config.hidden_size // config.num_attention_heads
        self.attention = nn.ModuleList(
            Attention(
                config.num_attention_heads,
                self.head_size,
                scale=d_head**-0.5,
                num_kv_heads=config.num_key_value_heads,
                cache_config=vllm_config.cache_config,
                prefix=f"layers.{i}.attn",
            )
            for i in range(config.num_hidden_layers)
        )
        self.served: EngineModel
        self.read_again: Callable[[], EngineModel]

    @property
    def mixture(self) -> MixtureModel:
        """The model that is run."""
        model = self.served.model
        assert isinstance(model, MixtureModel)
        return model

    def take_up(self, served: EngineModel) -> None:
        """Run `served` from now on; ConfigError for a model that is not served here."""
        refuse_unserved(served.model)
        served.model.space_weights()
        self.served = served

    def erase(self, name: str) -> None:
        """Overwrite what is in memory of an expert."""
        erase_expert(self.mixture, name, {})

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Part of vLLM's interface; refuses, since an embedding depends on a request's experts."""
        raise ConfigError("A mixture reads token ids alone.")

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """The residual stream after the last norm for ids [n], float32 [n,D] or [n,D+E].

        `routing` None, of a step that vLLM makes up to warm up, enables nothing.
        """
        model = self.mixture
        if routing is None:
            routing = self._public_alone(len(input_ids))
        step = Step(
            input_ids.long()[:, None],
            positions[:, None],
            routing.active,
            routing.logs,
            self._attend,
        )
        seen: list[Tensor] | None = [] if model.router is None else None
        x, ctx = model.read_spans(step, None, seen)
        if seen:
            routing.weights = torch.stack(seen).mean(0)[:, 0]
        x = x[:, 0].float()
        if not isinstance(model.lm_head, DeltaLinear):
            return x
        assert ctx.weights is not None
        return torch.cat([x, ctx.weights[:, 0]], dim=1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [.,V] after some of the tokens, from their rows of what `forward` gave."""
        model = self.mixture
        dtype = model.embed_tokens.weight.dtype
        x, weights = hidden_states.split(
            [model.config.d_model, hidden_states.shape[1] - model.config.d_model], dim=1
        )
        nothing = torch.empty(0)
        ctx = ForwardContext(dtype, nothing, nothing, attention_bias=None, is_token=None)
        if weights.shape[1]:
            ctx.weights = weights[:, None]  # [.,1,E]
        return model.predict_at(x.to(dtype)[:, None], ctx, slice(None))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Part of vLLM's interface; refuses, since a mixture is read by `MixtureLoader` alone."""
        raise ConfigError("A mixture's bundles are checked as they are read: load_format flexolmo.")

    def _public_alone(self, count: int) -> Routing:
        model = self.mixture
        active = model.expert_mask([()]).expand(count, -1)
        logs = torch.where(active, 0.0, -torch.inf)
        return Routing(active, None if model.router is None else logs)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, _, _, width = q.shape
        more = (0, self.head_size - width)
        rows = [F.pad(x[:, :, 0], more).flatten(1) for x in (q, k, v)]
        found = self.attention[layer](*rows).view(n, -1, self.head_size)  # [n,H,.]
        return found[..., :width].reshape(n, 1, -1)


class MixtureLoader(BaseModelLoader):
    """A loader of mixtures. `model_loader_extra_config` has the fields of `Opening`."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Do nothing: mixtures are on this machine."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Read the mixture, with every check of `load_mixture`."""
        assert isinstance(model, MixtureForCausalLM)
        opening = Opening.model_validate(self.load_config.model_loader_extra_config)
        model.read_again = model_reader(opening.model, opening.read_owners, opening.experts)
        served = model.read_again()
        told = model_config.hf_config.flexolmo
        if served.facts.digest != told["digest"]:
            raise ConfigError(f"{opening.model} changed while it was read. Start again.")
        model.take_up(served)
