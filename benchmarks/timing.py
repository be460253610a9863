"""Timing of runs against one another and against the ceilings of the machine.

Runs go in turn, and ratios are medians of the paired ratios, so that a busy minute falls on all.
Within a round they are shuffled: one that always followed the same other would find the caches as
that leaves them. Ceilings, of fp32 matrix products and of memory, are two runs among them.
"""

import functools
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Callable[[], object]]  # prepares, untimed, and returns the work to time

LEAST_SECONDS = 6  # of a comparison
GEMM_WIDTH = 2048
STREAM_BYTES = 2**29  # more than a processor's cache keeps of them


def clock() -> float:
    """Seconds of this process, whatever else the machine does; on more threads, of the clock."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def time_run(run: Run) -> float:
    """Seconds of one run's work."""
    work = run()
    with torch.inference_mode():
        start = clock()
        work()
        return clock() - start


@functools.cache
def _numbers(count: int) -> Tensor:
    return torch.randn(count)


def _multiply() -> Tensor:
    a = _numbers(GEMM_WIDTH**2).view(GEMM_WIDTH, -1)
    return a @ a.T


def _stream() -> Tensor:
    return _numbers(STREAM_BYTES // 4).view(-1, 1024) @ _numbers(1024)


CEILINGS: dict[str, Run] = {"gemm": lambda: _multiply, "stream": lambda: _stream}


class Turns:
    """Seconds of each run in each round, after one round that is not counted."""

    def __init__(self, runs: Mapping[str, Run], rounds: int):
        """Short runs take up to five times `rounds`, within LEAST_SECONDS."""
        every = list((dict(runs) | CEILINGS).items())
        self.seconds: dict[str, list[float]] = {name: [] for name, _ in every}
        for _, run in every:
            time_run(run)
        shuffle = random.Random(0).shuffle
        end = time.monotonic() + LEAST_SECONDS
        done = 0
        while done < rounds or (done < 5 * rounds and time.monotonic() < end):
            shuffle(every)
            for name, run in every:
                self.seconds[name].append(time_run(run))
            done += 1

    def median(self, name: str) -> float:
        """Median seconds of one run."""
        return statistics.median(self.seconds[name])

    def ratio(self, over: str, under: str) -> float:
        """Median of the paired ratios of two runs' seconds."""
        pairs = zip(self.seconds[over], self.seconds[under], strict=True)
        return statistics.median(a / b for a, b in pairs)

    @property
    def flops_per_second(self) -> float:
        """Ceiling of fp32 matrix products."""
        return 2 * GEMM_WIDTH**3 / self.median("gemm")

    @property
    def bytes_per_second(self) -> float:
        """Ceiling of reading weights from memory: a matrix times a vector."""
        return STREAM_BYTES / self.median("stream")

    def record(self, **figures: Any) -> dict[str, Any]:
        """`figures`, with the ceilings and the median milliseconds of every run."""
        milliseconds = {n: 1000 * self.median(n) for n in self.seconds if n not in CEILINGS}
        return figures | {
            "rounds": len(self.seconds["gemm"]),
            "milliseconds": milliseconds,
            "gemm_gflops": self.flops_per_second / 1e9,
            "bandwidth_gb_per_second": self.bytes_per_second / 1e9,
        }


def fastest(runs: Mapping[str, Run]) -> str:
    """Name of the run that takes least time: the better of two, after one that is not counted."""

    def least(name: str) -> float:
        return min([time_run(runs[name]) for _ in range(3)][1:])

    return min(runs, key=least)
