"""Rules that keep experts apart in vLLM: which are on for a request, and where vLLM may run us.

Knows nothing of tensors, and of vLLM only the names of settings, so that it is tested without it.
"""

import multiprocessing
from collections.abc import Collection, Mapping
from typing import Any

from flexolmo.errors import ConfigError, PolicyError
from flexolmo.files import canonical_json, digest_bytes
from flexolmo_vllm import LOAD_FORMAT, SCHEDULER, WORKER

EXPERTS = "experts"  # the one key of a request's extra arguments


def enabled_by(arguments: Mapping[str, Any] | None, known: Collection[str]) -> frozenset[str]:
    """The experts that a request's extra arguments enable; without any, none.

    Raises PolicyError for a name that is not `known`, and for any other argument: both would
    otherwise seem to have been followed.
    """
    arguments = arguments or {}
    if other := sorted(map(str, arguments.keys() - {EXPERTS})):
        raise PolicyError(
            f"Found the extra argument {', '.join(other)}; a mixture takes {EXPERTS} alone."
        )
    names = arguments.get(EXPERTS, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PolicyError(f"{EXPERTS} is {names!r}; expected a list of names.")
    if unknown := sorted(set(names) - set(known)):
        raise PolicyError(
            f"Unknown expert {', '.join(unknown)}: the model holds "
            f"{', '.join(sorted(known)) or 'none'}."
        )
    return frozenset(names)


def salt_of(model_digest: str, enabled: Collection[str]) -> str:
    """The salt of a request's prefix cache: what one set of experts computed on one model is found
    by requests of the same set on the same model alone."""
    return digest_bytes(canonical_json({"model": model_digest, EXPERTS: sorted(enabled)}))


def refuse_unsafe(config: Any) -> None:
    """Raise ConfigError, with every reason, if vLLM's `config` would mix up requests' experts.

    Args:
        config: vLLM's `VllmConfig`.
    """
    parallel = config.parallel_config
    found = {
        f"scheduler_cls is not {SCHEDULER}": _name(config.scheduler_config.scheduler_cls)
        != SCHEDULER,
        f"worker_cls is not {WORKER}": _name(parallel.worker_cls) != WORKER,
        f"load_format is not {LOAD_FORMAT}": config.load_config.load_format != LOAD_FORMAT,
        "enforce_eager is off": not config.model_config.enforce_eager,
        "async_scheduling is on": bool(config.scheduler_config.async_scheduling),
        "speculative decoding is on": config.speculative_config is not None,
        "return_routed_experts is on": bool(config.aux_output_config.enable_return_routed_experts),
        "prompts may be given as embeddings": bool(config.model_config.enable_prompt_embeds),
        "keys and values go to other processes": config.kv_transfer_config is not None,
        "LoRA is on": config.lora_config is not None,
        "quantization is on": config.model_config.quantization is not None,
        "the model is spread over processes": any(
            size > 1
            for size in (
                parallel.tensor_parallel_size,
                parallel.pipeline_parallel_size,
                parallel.data_parallel_size,
            )
        ),
        "vLLM's engine has a process of its own, apart from who asks it": (
            multiprocessing.parent_process() is not None
        ),
        "the device is not the CPU": config.device_config.device_type != "cpu",
    }
    if reasons := [reason for reason, is_so in found.items() if is_so]:
        raise ConfigError(
            "A mixture does not run in vLLM like this:\n  "
            + "\n  ".join(reasons)
            + "\nStart it with flexolmo serve --engine vllm, or with the arguments that "
            "flexolmo_vllm.arguments.engine_arguments gives."
        )


def _name(found: Any) -> str:
    """The name of a class that is given by name or as itself, or not at all."""
    if isinstance(found, type):
        return f"{found.__module__}.{found.__qualname__}"
    return str(found)
