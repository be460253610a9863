"""The process: threads, seeds, and what a result must say about where it came from."""

import os
import platform
import random
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexolmo.errors import ConfigError


def set_up(seed: int, num_threads: int | None = None) -> None:
    """Seed every generator we use and set torch's threads (none: leave torch's choice)."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def choose_device(name: str) -> torch.device:
    """The device that `name` ("cpu", "cuda", "cuda:1") says, made torch's own; on a GPU, matrix
    products are then in TF32. ConfigError if it is not there."""
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise NotImplementedError("it is neither cpu nor cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ConfigError(
            f"Device {name!r} cannot be used here: {str(e).splitlines()[0]}. Use cpu"
            f"{', or cuda' if torch.cuda.is_available() else ''}."
        ) from None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        if device.index is not None:
            torch.cuda.set_device(device)
    return device


def software_versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in ("flexolmo", "torch", "numpy", "safetensors", "tokenizers", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def source_commit() -> str | None:
    """Commit of the checkout this package runs from, with "+changes"; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *args],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def run_record(config: dict[str, Any], seed: int, data: dict[str, str]) -> dict[str, Any]:
    """Record saved beside every result: config, seed, data digests, commit, versions, machine."""
    return {
        "config": config,
        "seed": seed,
        "data": data,
        "commit": source_commit(),
        "software": software_versions(),
        "machine": {
            "cpu_count": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "platform": platform.platform(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
            "matmul_precision": torch.get_float32_matmul_precision(),
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
