"""The mixture as vLLM runs it: our own modules, on vLLM's attention and its memory for keys.

Bundles are read and checked by `load_mixture`, as everywhere else; nothing is exported.

n tokens of a step, D d_model, E experts, H heads, G key-value heads, C head width, V vocabulary.
"""

from collections.abc import Callable, Iterable
from typing import Any

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
from flexolmo.model.moe import MixtureModel
from flexolmo.model.panels import Panels
from flexolmo_vllm.admission import refuse_unsafe
from flexolmo_vllm.step import Routing, predict, public_alone, read_tokens


class MixtureForCausalLM(nn.Module):
    """A mixture behind vLLM's interface of models."""

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
        self.panels: Panels
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
        self.panels = served.model.cut_panels()

    def erase(self, name: str) -> None:
        """Overwrite what is in memory of an expert."""
        erase_expert(self.mixture, name, self.panels)

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
        """The residual stream, as `read_tokens` gives it. `routing` is the worker's; a step that
        vLLM makes up has none, and then nothing is on."""
        routing = routing or public_alone(self.mixture, len(input_ids))
        return read_tokens(self.mixture, input_ids, positions, routing, self._attend, self.panels)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [.,V] after some of the tokens, from their rows of what `forward` gave."""
        return predict(self.mixture, hidden_states, self.panels)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Part of vLLM's interface; refuses, since a mixture is read by `MixtureLoader` alone."""
        raise ConfigError("A mixture's bundles are checked as they are read: load_format flexolmo.")

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
        model.read_again = model_reader(
            opening.model,
            opening.read_owners,
            opening.experts,
            opening.verify,
            opening.seen or None,
        )
        served = model.read_again()
        told = model_config.hf_config.flexolmo
        if served.facts.digest != told["digest"]:
            raise ConfigError(f"{opening.model} changed while it was read. Start again.")
        model.take_up(served)
