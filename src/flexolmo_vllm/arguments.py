"""Arguments that start vLLM on a mixture's directory as it is; nothing is exported."""

import os
from pathlib import Path
from typing import Any

from flexolmo.files import digest_file, read_json, write_json
from flexolmo.inference.opening import Opening
from flexolmo.merge.index import ABOUT, read_about
from flexolmo_vllm import ARCHITECTURE, LOAD_FORMAT, SCHEDULER, WORKER

BLOCK = 32  # positions of a block of memory, which the CPU's attention takes in 32
# One process, whose requests come from us alone; numbers of every step are looked at; nothing is
# told to anybody.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def engine_arguments(opening: Opening, config_dir: Path) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs`, or `LLM`, for the mixture of `opening`.

    Writes the config.json that vLLM reads to `config_dir`, and sets ENVIRONMENT, so call it before
    vLLM is imported. The weights are read, and checked against it, when the engine starts. Raises
    what `read_about` raises.
    """
    os.environ.update(ENVIRONMENT)
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    about = read_about(opening.model)
    config = read_json(opening.model / "anchor" / "config.json")
    d_head = config["hidden_size"] // config["num_attention_heads"]
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    # one position more, for vLLM writes a token behind a text that is only scored
    positions = config["max_position_embeddings"] + 1
    write_json(
        config_dir / "config.json",
        config
        | {
            "architectures": [ARCHITECTURE],
            "model_type": "olmo2",
            "head_dim": min((size for size in sizes if size >= d_head), default=d_head),
            "max_position_embeddings": positions,
            "flexolmo": {
                "digest": digest_file(opening.model / ABOUT),
                "experts": sorted(about["experts"]),
            },
        },
    )
    return {
        "model": str(config_dir),
        "skip_tokenizer_init": True,
        "load_format": LOAD_FORMAT,
        "model_loader_extra_config": opening.model_dump(mode="json"),
        "scheduler_cls": SCHEDULER,
        "worker_cls": WORKER,
        "distributed_executor_backend": "uni",
        "enforce_eager": True,
        "async_scheduling": False,
        "dtype": config.get("dtype") or "float32",
        "max_model_len": positions,
        "max_logprobs": -1,
        "block_size": BLOCK,
        "kv_cache_memory_bytes": opening.memory_bytes,
        "max_num_seqs": opening.max_running,
        "max_num_batched_tokens": opening.step_tokens,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "disable_log_stats": True,
        "seed": 0,
    }
