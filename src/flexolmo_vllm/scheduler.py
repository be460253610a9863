"""The scheduler of vLLM, with a prefix cache that no two sets of experts share."""

from collections.abc import Collection
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from flexolmo.errors import PolicyError
from flexolmo_vllm.admission import enabled_by, salt_of


class MixtureScheduler(Scheduler):
    """A scheduler that salts every request by model and experts, whatever salt came with it."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        told = self.vllm_config.model_config.hf_config.flexolmo
        self.use(told["digest"], told["experts"])
        self.damaged: set[str] = set()  # requests whose logits in the last step were no numbers
        self._clear_new_blocks()

    def _clear_new_blocks(self) -> None:
        """Have memory that a request is given filled with 0 before: attention multiplies what is
        behind a text's last token by 0, and damaged experts of others leave NaN there."""
        self.needs_kv_cache_zeroing = True
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            manager._record_new_block_ids = True

    def use(self, model_digest: str, known: Collection[str]) -> None:
        """Schedule requests to this model, of `known` experts, from now on."""
        self.model_digest = model_digest
        self.known = frozenset(known)

    def add_request(self, request: Request) -> None:
        """Take up a request. PolicyError, and it is not taken up, if it enables an unknown expert,
        or is of a kind whose tokens cannot be followed; whoever holds the engine then aborts it."""
        sampling = request.sampling_params
        if request.resumable or request.prompt_embeds is not None or sampling is None:
            raise PolicyError("A mixture takes prompts of token ids, whole, and continues them.")
        enabled = enabled_by(sampling.extra_args, self.known)
        request.cache_salt = salt_of(self.model_digest, enabled)
        request.block_hashes = []
        request.update_block_hashes()
        super().add_request(request)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """See vLLM's; takes note of damaged requests."""
        counts = model_runner_output.num_nans_in_logits or {}
        self.damaged = {request for request, count in counts.items() if count}
        return super().update_from_output(scheduler_output, model_runner_output)
