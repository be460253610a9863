"""The process: threads, seeds, and what a result must say about where it came from."""

import ctypes
import os
import platform
import random
import resource
import subprocess
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexolmo.errors import ConfigError

# Numbers of glibc's and Linux's headers.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_MMAP_MAX = -4
_HUGE_PAGES = 14
_PAGE_BYTES = 4096


def set_up(seed: int, num_threads: int | None = None, *, keeps_memory: bool = True) -> None:
    """Seed every generator we use, set torch's threads (none: leave torch's choice), and see
    `keep_memory`; or, where little memory matters more than time, `give_memory_back`."""
    if keeps_memory:
        keep_memory()
    else:
        give_memory_back()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def leave_a_core() -> None:
    """Have torch leave one core to what else this process does, as a server's HTTP, if there are
    two or more; unless OMP_NUM_THREADS says how many threads it takes."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))


@cache
def keep_memory(room_bytes: int = 2**33) -> bool:
    """Have this process keep the memory that it frees, in large pages; whether it does.

    Each step of training asks for the same memory again, and what the system hands out in pages of
    4 KB costs a fifth of a step. Linux with glibc only. `room_bytes` of addresses are set aside,
    which take no memory until they are used; where addresses are limited nothing is done. Source:
    mallopt(3), madvise(2).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return False
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.sbrk.argtypes = [ctypes.c_ssize_t]
    for function in (libc.malloc, libc.sbrk):
        function.restype = ctypes.c_void_p
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    start = -(-libc.sbrk(0) // _PAGE_BYTES) * _PAGE_BYTES
    libc.free(libc.malloc(room_bytes))  # grows the heap, which it now stays
    size = libc.sbrk(0) - start
    return size > 0 and libc.madvise(start, size, _HUGE_PAGES) == 0


def give_memory_back() -> None:
    """Have this process give the memory of tensors back to the system at once, which costs time:
    matrices of many sizes that come and go leave holes else. glibc only. Source: mallopt(3)."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)


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
    packages = ("flexolmo", "torch", "numpy", "safetensors", "tokenizers", "transformers")
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


@cache
def source_commit() -> str | None:
    """Commit of the checkout this package runs from, with "+changes", when this process first asked
    for it; None outside a checkout."""
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
