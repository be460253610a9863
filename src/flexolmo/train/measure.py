"""Rates of the processor at hand, fitted to steps of training that are counted and timed here."""

import gc
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls

from flexolmo.errors import ConfigError
from flexolmo.model.router import LinearSettings
from flexolmo.model.transformer import ModelConfig
from flexolmo.progress import progress
from flexolmo.runtime import set_up
from flexolmo.train.anchor import AnchorRecipe
from flexolmo.train.count import StepCount, StepProgram, count_step
from flexolmo.train.expert import ExpertRecipe
from flexolmo.train.loop import TrainSettings
from flexolmo.train.muon import product_dtype
from flexolmo.train.rates import Machine

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


def timed_recipes() -> dict[str, AnchorRecipe | ExpertRecipe]:
    """Trainings that are timed: an anchor with both optimizers, and the paper's expert; where the
    processor has products in bfloat16, an anchor with these too."""
    adamw = _TRAIN.model_copy(update={"optimizer": "adamw"})
    found: dict[str, AnchorRecipe | ExpertRecipe] = {
        "anchor, adamw": AnchorRecipe(train=adamw),
        "anchor, muon": AnchorRecipe(train=_TRAIN),
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
    recipes = timed_recipes().values()
    with progress("measuring this machine", len(SIZES) * len(recipes), "trainings") as meter:
        for size in SIZES.values():
            for recipe in recipes:
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
    found = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return 1024.0 * int(found[key].split()[0])
