"""The worker of vLLM that tells the model which experts are on at each token."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from flexolmo_vllm.admission import enabled_by
from flexolmo_vllm.following import Follower, Part
from flexolmo_vllm.step import Routing


class FollowsRequests:
    """A runner's part that follows requests: a mixin over `GPUModelRunner`, first version."""

    requests: dict[str, Any]
    input_batch: Any
    query_start_loc: Any
    model: Any
    follower: Follower

    def load_model(self, *arguments: Any, **options: Any) -> None:
        """See vLLM's."""
        super().load_model(*arguments, **options)  # type: ignore[misc]
        self.follow_anew()

    def follow_anew(self) -> None:
        """Follow all requests from their first token, after the model has changed."""
        self.follower = Follower(self.model.mixture)

    def _init_model_kwargs(self, num_reqs: int | None = None) -> dict[str, Any]:
        options: dict[str, Any] = super()._init_model_kwargs(num_reqs)  # type: ignore[misc]
        self.parts: list[Part] = []
        self.routing: Routing | None = None
        if num_reqs != 0:
            self.parts = self._parts()
            self.follower.keep(self.requests)
            self.routing = Routing(self.follower.mask(self.parts), self.follower.follow(self.parts))
        return options | {"routing": self.routing}

    def _parts(self) -> list[Part]:
        """The tokens that the step reads, request by request as they stand in the batch."""
        batch = self.input_batch
        starts = batch.num_computed_tokens_cpu[: batch.num_reqs]
        counts = np.diff(self.query_start_loc.np[: batch.num_reqs + 1])
        known = self.model.mixture.expert_names[1:]
        return [
            Part(
                request,
                batch.token_ids_cpu[i, : start + count],
                int(start),
                enabled_by(self.requests[request].sampling_params.extra_args, known),
            )
            for i, (request, start, count) in enumerate(
                zip(batch.req_ids, starts, counts, strict=True)
            )
        ]

    def _model_forward(self, *arguments: Any, **options: Any) -> Any:
        found = super()._model_forward(*arguments, **options)  # type: ignore[misc]
        if self.routing is not None and self.routing.weights is not None:
            self.follower.count(self.parts, self.routing.weights)
        return found

    def _get_nans_in_logits(self, logits: Tensor | None) -> dict[str, int]:
        """Requests whose logits hold NaN or infinity where a token is chosen, with any count."""
        if logits is None:
            return {}
        are_numbers = logits.amax(-1).isfinite().tolist()
        names = self.input_batch.req_ids
        return {
            name: 1 for name, is_number in zip(names, are_numbers, strict=False) if not is_number
        }


class MixtureRunner(FollowsRequests, CPUModelRunner):
    """vLLM's runner on the CPU."""


class MixtureWorker(CPUWorker):
    """vLLM's worker on the CPU, with our runner."""

    def init_device(self) -> None:
        """See vLLM's."""
        super().init_device()
        self.model_runner = MixtureRunner(self.vllm_config, torch.device("cpu"))
