"""FlexOlmo's mixtures in vLLM: a plug-in, and a process that `flexolmo serve` starts.

Lives in vLLM's own environment, since vLLM pins versions of its own, and is written against one
minor version of it, as the classes it builds on are no public interface. Only vLLM's build for the
CPU was run. `flexolmo` itself imports nothing of this package.
"""

ARCHITECTURE = "FlexOlmoMixture"
LOAD_FORMAT = "flexolmo"
SCHEDULER = "flexolmo_vllm.scheduler.MixtureScheduler"
WORKER = "flexolmo_vllm.worker.MixtureWorker"


def register() -> None:
    """Make the mixture and its loader known to vLLM, which calls this in each of its processes."""
    from vllm import ModelRegistry
    from vllm.model_executor.model_loader import register_model_loader

    from flexolmo_vllm.model import MixtureForCausalLM, MixtureLoader

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MixtureForCausalLM)
        register_model_loader(LOAD_FORMAT)(MixtureLoader)
