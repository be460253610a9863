"""Forecast of what a recipe takes on machines that need not be at hand, from memory to money.

Puts `count` (what a step does) and `rates` (how fast machines are) together. No text, no weights
and no directory but the anchor's config are read. See docs/guides/planning.md for the model.

W processes.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from flexolmo.errors import ConfigError
from flexolmo.model.shape import count_anchor, expert_shapes
from flexolmo.model.stock import DTYPES, DtypeName
from flexolmo.model.transformer import ModelConfig
from flexolmo.train.anchor import AnchorRecipe
from flexolmo.train.count import StepCount, count_step
from flexolmo.train.expert import ExpertRecipe
from flexolmo.train.rates import Machine, StepSeconds, time_step

# Largest error of forecasts of memory that benchmarks/plan.py found, as a part of the machine's.
MEMORY_ERROR = 0.2


@dataclass(frozen=True)
class Memory:
    """Memory of one process at its peak, in bytes, by what it is for."""

    weights: float  # of all parameters, this process's part
    optimizer: float
    gathered: float  # matrices that are whole while they are used
    step: float  # gradients, activations and what products are made from, at their highest
    anchor: float  # the loaded anchor, beside the copy that a single process trains with
    process: float  # Python, PyTorch, a GPU's context

    @property
    def total(self) -> float:
        return (
            self.weights + self.optimizer + self.gathered + self.step + self.anchor + self.process
        )


def find_memory(
    count: StepCount, machine: Machine, processes: int = 1, anchor_bytes: float = 0.0
) -> Memory:
    """Memory of one of `processes` that take the counted step; `anchor_bytes` are those of a loaded
    anchor beside the model."""
    gathered = 0.0
    if processes > 1:  # the head; the block in use, the next one, and gradients on their way
        part = 1 - 1 / processes
        gathered = part * (count.root_bytes + 2 * count.block_bytes + 2 * count.block_learnt_bytes)
        anchor_bytes = 0.0  # mapped from its file
    return Memory(
        weights=count.weight_bytes / processes,
        optimizer=count.state_bytes / processes,
        gathered=gathered,
        step=max(count.part_peak_bytes, count.update_peak_bytes),
        anchor=anchor_bytes,
        process=machine.process_bytes,
    )


@dataclass(frozen=True)
class Forecast:
    """Everything that a recipe will take."""

    machine: Machine
    processes: int  # each with a machine to itself
    dtype: DtypeName  # of the anchor's weights, and so of an expert's
    parameters: int  # of the anchor and what is trained beside it
    trained_parameters: int
    active_parameters: int  # that a token meets
    bundle_bytes: int | None  # None for an anchor
    tokens: int  # predicted over the whole run
    steps: int
    flops_a_token: float  # forward, back and in the optimizer
    step: StepSeconds
    memory: Memory
    price_an_hour: float | None = None  # of one machine; None: not given

    @property
    def seconds(self) -> float:
        """Time of the whole run."""
        return self.steps * self.step.total

    @property
    def tokens_a_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def cost(self) -> float | None:
        """Money, in the price's; None without a price."""
        if self.price_an_hour is None:
            return None
        return self.processes * self.seconds / 3600 * self.price_an_hour

    @property
    def fits(self) -> Literal["yes", "close", "no"] | None:
        """Answer to whether the memory suffices, "close" if it is within MEMORY_ERROR of the
        machine's; None if the machine's is not known."""
        room = self.machine.memory_bytes
        if room is None:
            return None
        if abs(self.memory.total - room) <= MEMORY_ERROR * room:
            return "close"
        return "yes" if self.memory.total < room else "no"

    def to_json(self) -> dict[str, Any]:
        """Everything, as a program reads it."""
        return {
            "machine": self.machine.model_dump(),
            "processes": self.processes,
            "dtype": self.dtype,
            "parameters": self.parameters,
            "trained_parameters": self.trained_parameters,
            "active_parameters": self.active_parameters,
            "bundle_bytes": self.bundle_bytes,
            "tokens": self.tokens,
            "steps": self.steps,
            "flops_a_token": self.flops_a_token,
            "flops": self.flops_a_token * self.tokens,
            "step_seconds": vars(self.step) | {"total": self.step.total},
            "tokens_a_second": self.tokens_a_second,
            "seconds": self.seconds,
            "memory_bytes": vars(self.memory) | {"total": self.memory.total},
            "fits": self.fits,
            "price_an_hour": self.price_an_hour,
            "cost": self.cost,
        }


def forecast(
    recipe: AnchorRecipe | ExpertRecipe,
    config: ModelConfig,
    machine: Machine,
    processes: int = 1,
    dtype: DtypeName = "float32",
    price_an_hour: float | None = None,
) -> Forecast:
    """Forecast of `recipe` in `processes`, each with a `machine` to itself.

    Args:
        config: of the anchor that is trained, or that an expert is trained beside.
        dtype: precision of the anchor's weights, and so of an expert's.
        price_an_hour: of one machine.

    Raises ConfigError as `count_step` and `time_step` do.
    """
    count = count_step(config, recipe, processes, dtype, machine.muon_dtype, machine.device)
    settings = recipe.train
    dense = count_anchor(config)
    if isinstance(recipe, ExpertRecipe):
        trained = trained_parameters(config, recipe)
        total = dense + trained
        active = total - replaced_parameters(config, recipe)
        bundle = bundle_bytes(config, recipe, dtype)
        anchor_bytes = DTYPES[dtype].itemsize * dense
    else:
        trained = dense
        total = dense
        active = dense
        bundle = None
        anchor_bytes = 0
    flops = count.part.flops * processes * settings.accumulate + count.update.flops
    return Forecast(
        machine=machine,
        processes=processes,
        dtype=dtype,
        parameters=total,
        trained_parameters=trained,
        active_parameters=active,
        bundle_bytes=bundle,
        tokens=settings.tokens,
        steps=settings.steps,
        flops_a_token=flops / (settings.batch_size * settings.seq_len),
        step=time_step(count, machine, settings.accumulate, processes),
        memory=find_memory(count, machine, processes, anchor_bytes),
        price_an_hour=price_an_hour,
    )


def trained_parameters(config: ModelConfig, recipe: ExpertRecipe) -> int:
    """Numbers of an expert that learn: all but the evidence router's table."""
    shapes = expert_shapes(config, recipe.shape(config), recipe.router)
    return sum(prod(s) for n, s in shapes.items() if not n.startswith("router."))


def replaced_parameters(config: ModelConfig, recipe: ExpertRecipe) -> int:
    """Numbers of the anchor that no token meets in training: an expert that is trained alone has
    whole matrices in their place."""
    if not recipe.is_alone:
        return 0
    as_wide = recipe.shape(config).model_copy(update={"d_ff": config.d_ff})
    shapes = expert_shapes(config, as_wide, recipe.router)
    return sum(prod(s) for n, s in shapes.items() if n.endswith(".weight"))


def bundle_bytes(config: ModelConfig, recipe: ExpertRecipe, dtype: DtypeName) -> int:
    """Bytes of the numbers in an expert's bundle, but for the table's list of word pairs."""
    shapes = expert_shapes(config, recipe.shape(config), recipe.router)
    total = 0
    for name, shape in shapes.items():
        itemsize = DTYPES[dtype].itemsize
        if name.startswith("router."):  # the table's levels
            itemsize = 1
        elif ".router." in name:
            itemsize = 4
        elif recipe.has_half_deltas and ".lora_" in name:
            itemsize = 2
        total += itemsize * prod(shape)
    return total


def parse_gpus(text: str) -> tuple[int, str]:
    """Number and name of "8xH100"; ConfigError for anything else."""
    count, sign, name = text.partition("x")
    if not sign or not count.isascii() or not count.isdigit() or int(count) < 1:
        raise ConfigError(f"--gpus {text!r} is not of the form NUMBERxNAME, such as 8xH100.")
    return int(count), name
