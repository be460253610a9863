"""Ways to run a model's blocks while it learns: compiled or not, kept or computed again.

Compiling changes the last digits, so what is decided here is part of a run's identity, and is
decided by the run's size alone, never by a clock: a run that is resumed decides the same.
"""

import shutil
from dataclasses import replace
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flexolmo.errors import ConfigError
from flexolmo.model.parallel import are_several, run_block
from flexolmo.model.transformer import Block, ForwardContext, Transformer
from flexolmo.terminal import echo
from flexolmo.train.loop import TrainSettings

# Compiling takes 20 to 60 seconds, once a run, and saves a fifth to a third of each step: a run
# that would take this long without is sure to be shorter with it.
PAYS_AFTER_SECONDS = 600.0
# With torch 2.11 a compiled step's gradients were found more than a thousandth off.
COMPILES_FROM = Version("2.13")
FLOPS_A_SECOND = {"cpu": 50e9, "cuda": 20e12}  # of a processor's thread, or a GPU


def arrange_blocks(model: Transformer, settings: TrainSettings, label: str) -> bool:
    """Have the blocks of `model` run as `settings` say, while it trains; whether compiled.

    Says so, and why, when it compiles. Raises ConfigError if that is asked for and cannot be.
    """
    obstacle = _obstacle(model)
    is_compiled = settings.compile == "on"
    if settings.compile == "auto":
        seconds = _estimate_seconds(model, settings)
        is_compiled = seconds >= PAYS_AFTER_SECONDS and obstacle is None
        if is_compiled:
            echo(
                f"{label}: blocks are compiled, as the run would take about {seconds / 60:.0f} "
                "minutes without; the first step takes up to a minute. "
                "train.compile=off keeps the digits of a run without.",
                err=True,
            )
    if is_compiled and obstacle is not None:
        raise ConfigError(f"train.compile is on, but {obstacle}, or set train.compile=off.")
    run: Any = _run_compiled(torch.compile(_run_block)) if is_compiled else run_block

    def run_again(block: Block, x: Tensor, ctx: ForwardContext, layer: int) -> Tensor:
        found: Tensor = checkpoint(run, block, x, ctx, layer, use_reentrant=False)
        return found

    model.run_block = run_again if settings.recompute else run
    return is_compiled


def _run_compiled(compiled: Any) -> Any:
    """`compiled`, told beforehand what differs from step to step, so that it is made once: for all
    layers, and once more for a first one that nothing before it asks a gradient of."""

    def run(block: Block, x: Tensor, ctx: ForwardContext, layer: int) -> Tensor:
        if ctx.blend is not None:
            for rows in (ctx.blend.public_rows, ctx.blend.public_weight, ctx.blend.own_rows):
                if rows is not None:
                    torch._dynamo.maybe_mark_dynamic(rows, 0)
        if ctx.router_logits is None:
            found: Tensor = compiled(block, x, ctx, layer)
            return found
        logits: list[Tensor] = []  # one that grows would differ from layer to layer
        found = compiled(block, x, replace(ctx, router_logits=logits), layer)
        ctx.router_logits += logits
        return found

    return run


def _run_block(block: Block, x: Tensor, ctx: ForwardContext, layer: int) -> Tensor:
    return block.forward(x, ctx, layer)


def _estimate_seconds(model: Transformer, settings: TrainSettings) -> float:
    """Seconds of the run without compiling, from six FLOPs a number and token."""
    c = model.config
    attention = 2 * c.d_model * (c.num_heads + c.kv_heads) * c.d_head
    layer = attention + 3 * c.d_model * c.d_ff
    numbers = c.num_layers * layer + c.vocab_size * c.d_model
    device = model.device.type
    units = torch.get_num_threads() if device == "cpu" else 1
    return 6.0 * numbers * settings.tokens / (FLOPS_A_SECOND[device] * units)


def _obstacle(model: Transformer) -> str | None:
    """Reason why nothing can be compiled here, and what to do; None: it can."""
    if are_several():
        return "blocks held in parts by several processes are not compiled: run it without torchrun"
    if Version(torch.__version__) < COMPILES_FROM:
        return f"torch is {torch.__version__}: install {COMPILES_FROM} or newer"
    if model.device.type == "cpu" and not any(shutil.which(c) for c in ("g++", "clang++")):
        return "there is no C++ compiler (g++ or clang++ in PATH): install one"
    return None
