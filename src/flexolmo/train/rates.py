"""Speed of machines, and the time that a counted step takes on them.

A machine is a few rates: of matrix products by precision, of bytes that all other operations read
and write, and of bytes between processes. This machine's are fitted to steps that are timed; those
of GPUs are taken from their data sheets and one published run.
"""

import gc
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from scipy.optimize import nnls

from flexolmo.config import Settings, parse_settings
from flexolmo.errors import ConfigError
from flexolmo.files import read_json
from flexolmo.model.router import LinearSettings
from flexolmo.model.transformer import ModelConfig
from flexolmo.progress import progress
from flexolmo.runtime import set_up
from flexolmo.train.anchor import AnchorRecipe
from flexolmo.train.count import StepCount, StepProgram, Work, count_step
from flexolmo.train.expert import ExpertRecipe
from flexolmo.train.loop import TrainSettings
from flexolmo.train.muon import product_dtype

# Between what no machine is slower than, and what none is faster than.
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


# From the data sheets of the SXM modules, of which training reaches a part: MEMORY_PART of the
# bandwidth, and as much of the products' peak as makes the model give what torchtitan published of
# Llama 3.1 8B on eight H100 (of 2.4 TB/s) with FSDP2, not compiled: 5,762 tokens a second and GPU
# (benchmarks/llama3_h100_202412_torchtitan.md in its repository). No GPU was measured by us.
PRODUCT_PART = 0.64
MEMORY_PART = 0.9
LINK_PART = 0.8
_SOURCE = "data sheet, times the part that one published run reached; not measured by us"


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


# --- this machine -------------------------------------------------------------------------------

# Width, layers, heads and FFN of the decoders that are timed: 2, 5 and 14 million parameters.
SIZES = {"2M": (128, 4, 2, 352), "5M": (256, 4, 4, 704), "14M": (384, 6, 6, 1024)}
_VOCAB_SIZE = 4096
_TRAIN = TrainSettings(steps=1000, batch_size=8, seq_len=256, compile="off")
TIMED_STEPS = 3


@dataclass(frozen=True)
class Timed:
    """A step that was counted and timed."""

    count: StepCount
    seconds: float


def shape_of(width: int, layers: int, heads: int, d_ff: int) -> ModelConfig:
    """A decoder of the sizes that are timed."""
    return ModelConfig(
        vocab_size=_VOCAB_SIZE,
        d_model=width,
        num_layers=layers,
        num_heads=heads,
        d_ff=d_ff,
        max_seq_len=2048,
    )


def kinds(train: TrainSettings = _TRAIN) -> dict[str, AnchorRecipe | ExpertRecipe]:
    """Trainings that are timed: all that is matrices, with both optimizers, and the paper's."""
    adamw = train.model_copy(update={"optimizer": "adamw"})
    found: dict[str, AnchorRecipe | ExpertRecipe] = {
        "anchor, adamw": AnchorRecipe(train=adamw),
        "anchor, muon": AnchorRecipe(train=train),
        "expert of FFN": ExpertRecipe(scope="ffn", router=LinearSettings(), train=adamw),
    }
    if product_dtype(torch.device("cpu")) == torch.bfloat16:
        half = adamw.model_copy(update={"precision": "bfloat16"})
        found["anchor, bfloat16"] = AnchorRecipe(train=half)
    return found


def measure_machine(num_threads: int | None = None) -> Machine:
    """This machine's processor, by steps of three small sizes: about a minute on one core.

    They are too small to tell anything of a GPU, on which starting an operation takes longer.
    """
    set_up(0, num_threads)
    first = _TRAIN.model_copy(update={"batch_size": 1, "seq_len": 16})
    time_program(shape_of(*SIZES["2M"]), AnchorRecipe(train=first))  # loads libraries
    process_bytes = resident_bytes("VmRSS")
    timed = []
    with progress("measuring this machine", len(SIZES) * len(kinds()), "trainings") as meter:
        for size in SIZES.values():
            for recipe in kinds().values():
                timed.append(time_program(shape_of(*size), recipe))
                meter.advance()
    return fit_machine(timed).model_copy(update={"process_bytes": process_bytes})


def time_program(config: ModelConfig, recipe: AnchorRecipe | ExpertRecipe) -> Timed:
    """Median of a few steps taken here, after one that is not counted."""
    program = StepProgram(config, recipe)
    program.model.initialise(0)
    rows = recipe.train.batch_size // recipe.train.accumulate
    seconds = []
    for _ in range(TIMED_STEPS + 1):
        start = _clock()
        for _ in range(recipe.train.accumulate):
            program.read(rows)
        program.update()
        seconds.append(_clock() - start)
    del program
    gc.collect()
    return Timed(count_step(config, recipe), statistics.median(seconds[1:]))


def _clock() -> float:
    """Seconds of this process on one thread, whatever else the machine does; else of the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def fit_machine(timed: Sequence[Timed]) -> Machine:
    """The machine whose rates explain the seconds best, by least squares of relative errors.

    Raises ConfigError if they explain nothing, as on a machine that was busy with other work.
    """
    works = [t.count.part + t.count.update for t in timed]
    columns = ("float32_flops", "bfloat16_flops", "moved_bytes")
    seconds = np.array([t.seconds for t in timed])
    work = np.array([[getattr(w, c) for c in columns] for w in works])
    scale = np.maximum(work.max(0), 1.0)
    found, _ = nnls(work / scale / seconds[:, None], np.ones(len(seconds)))
    is_timed = work.max(0) > 0  # none may be in bfloat16
    if not (found[is_timed] > 0).all():
        raise ConfigError(
            "Steps that were timed here do not tell products from other work: was the machine "
            "busy? Measure again when it is idle."
        )
    rates = {c: s / x for c, s, x in zip(columns, scale, found, strict=True) if x}
    errors = work @ (found / scale) / seconds - 1
    threads = torch.get_num_threads()
    return Machine(
        name=f"this machine (cpu, threads: {threads})",
        source=f"{len(timed)} trainings timed here, told within {abs(errors).max():.0%}",
        threads=threads,
        memory_bytes=float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
        **rates,
    )


def resident_bytes(key: str) -> float:
    """Resident memory of this process now (VmRSS) or at its highest (VmHWM); Linux only, else 0."""
    path = Path("/proc/self/status")
    if not path.exists():
        return 0.0
    found: Mapping[str, str] = dict(
        line.split(":", 1) for line in path.read_text().splitlines() if ":" in line
    )
    return 1024.0 * int(found[key].split()[0])
