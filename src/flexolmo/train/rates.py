"""Speed of machines, and the time that a counted step takes on them.

A machine is a few rates: of matrix products by precision, of bytes that all other operations read
and write, and of bytes between processes. Those of GPUs are taken here from their data sheets, cut
to what one of them was measured to reach; `measure` finds those of the machine at hand.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field

from flexolmo.config import Settings, parse_settings
from flexolmo.errors import ConfigError
from flexolmo.files import read_json
from flexolmo.train.count import StepCount, Work

# Every machine there is lies within these bounds.
Rate = Annotated[float, Field(ge=1e3, le=1e21)]


class Machine(Settings):
    """Rates and memory of what one process of training has to itself."""

    model_config = ConfigDict(allow_inf_nan=False)

    name: str = Field(description="Name of the machine.")
    source: str = Field(description="Source of its rates.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Device that training uses on it.")
    threads: int = Field(1, ge=1, description="Processor's threads of a process.")
    float32_flops: Rate = Field(description="FLOPs a second of products in float32.")
    bfloat16_flops: Rate | None = Field(
        None, description="FLOPs a second of products in bfloat16; none: it has no such products."
    )
    moved_bytes: Rate = Field(description="Bytes a second that other operations read and write.")
    memory_bytes: float | None = Field(None, gt=0, description="Memory; none: not known.")
    process_bytes: float = Field(0.0, ge=0, description="Memory of a process beside its tensors.")
    link_bytes: Rate | None = Field(
        None, description="Bytes a second between processes; none: their time is left out."
    )
    per_node: int = Field(1, ge=1, description="Number of them in one computer.")

    @property
    def muon_dtype(self) -> torch.dtype:
        """Precision of Muon's products on it, as `muon.product_dtype` says there."""
        return torch.float32 if self.bfloat16_flops is None else torch.bfloat16


# From the data sheets of the SXM modules, of which training reaches a part. The parts are of one
# H100 that trained a 1B expert, not compiled (benchmarks/results/gpu.json): FLOPs over the seconds
# of product kernels in a profile, and bytes over all other seconds of the step. On A100, H200 and
# products in TF32 they are assumed; that of links was measured nowhere.
PRODUCT_PART = 0.75
MEMORY_PART = 0.7
LINK_PART = 0.8
_SOURCE = "data sheet, times the parts that training reached on one H100"


def _gpu(name: str, bf16: float, tf32: float, memory: float, size: float, link: float) -> Machine:
    """A GPU by its data sheet: TFLOP/s dense, TB/s, and GB/s each way between GPUs; `size` is the
    GB that PyTorch finds, which are more than the sheet's."""
    return Machine(
        name=name,
        source=_SOURCE,
        device="cuda",
        threads=4,  # assumed
        float32_flops=PRODUCT_PART * tf32 * 1e12,
        bfloat16_flops=PRODUCT_PART * bf16 * 1e12,
        moved_bytes=MEMORY_PART * memory * 1e12,
        memory_bytes=size * 1e9,
        process_bytes=2e9,  # CUDA's context, NCCL's buffers, the allocator's holes: assumed
        link_bytes=LINK_PART * link * 1e9,
        per_node=8,
    )


GPUS = {
    "A100": _gpu("A100", bf16=312, tf32=156, memory=2.04, size=85, link=300),  # 79.25 GiB
    "H100": _gpu("H100", bf16=989, tf32=495, memory=3.35, size=85, link=450),  # 79.1 GiB
    "H200": _gpu("H200", bf16=989, tf32=495, memory=4.8, size=150, link=450),  # 139.8 GiB
}
# Between computers, eight network cards of 400 Gb/s a computer, which a ring uses together.
NETWORK_BYTES = LINK_PART * 400e9


def find_machine(name: str) -> Machine:
    """A GPU of the table, by name; ConfigError lists those there are."""
    if name not in GPUS:
        raise ConfigError(f"GPU {name!r} is not in the table; it has {', '.join(GPUS)}.")
    return GPUS[name]


def read_machine(path: Path) -> Machine:
    """The machine that `flexolmo plan --measure` wrote to `path`."""
    found = read_json(path, ConfigError)
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not what flexolmo plan --measure writes.")
    return parse_settings(found, Machine, str(path))


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step, by what they are spent on."""

    products: float
    rest: float
    update: float
    waiting: float  # for other processes, beyond what products and rest hide

    @property
    def total(self) -> float:
        return self.products + self.rest + self.update + self.waiting


def time_step(
    count: StepCount, machine: Machine, accumulate: int = 1, processes: int = 1
) -> StepSeconds:
    """Seconds of a counted step.

    Products take FLOPs over their rate, all else bytes over theirs; nothing of the two overlaps.
    Of W processes each gathers the matrices of blocks twice a part, forward and back, and
    hands on the gradients of those that learn once; a GPU does that beside its own work.

    Raises ConfigError for products in bfloat16 on a machine that has none.
    """
    products = accumulate * _product_seconds(count.part, machine)
    rest = accumulate * count.part.moved_bytes / machine.moved_bytes
    update = _product_seconds(count.update, machine)
    update += count.update.moved_bytes / machine.moved_bytes
    waiting = 0.0
    if processes > 1 and machine.link_bytes is not None:
        rate = machine.link_bytes
        if processes > machine.per_node:
            rate = min(rate, NETWORK_BYTES)
        sent = (1 - 1 / processes) * (2 * count.weight_bytes + count.learnt_bytes)
        waiting = max(0.0, accumulate * sent / rate - products - rest)
    return StepSeconds(products, rest, update / processes, waiting)


def _product_seconds(work: Work, machine: Machine) -> float:
    seconds = work.float32_flops / machine.float32_flops
    if work.bfloat16_flops:
        if machine.bfloat16_flops is None:
            raise ConfigError(
                "This training makes products in bfloat16, which were not measured on "
                f"{machine.name}, as its processor imitates them. Plan with --set "
                "train.precision=float32, beside an anchor imported with --dtype float32."
            )
        seconds += work.bfloat16_flops / machine.bfloat16_flops
    return seconds
