"""The time, memory and bytes that training an expert will take, told before it begins.

A few steps are timed here, with the owner's anchor, text and settings, and fewer where each takes
long; nothing is kept of them.
"""

import resource
import statistics
import time
from contextlib import suppress
from itertools import pairwise
from typing import Any, cast

import torch

from flexolmo.data.batches import TokenSet
from flexolmo.files import size_of_tensors
from flexolmo.model.assemble import expert_tensors
from flexolmo.model.checkpoint import Anchor
from flexolmo.model.parallel import refuse_several
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.runtime import set_up
from flexolmo.train.blocks import arrange_blocks
from flexolmo.train.expert import ExpertRecipe, pack_tensors, prepare_training
from flexolmo.train.loop import Losses, train
from flexolmo.train.protect import state_budget, tokens_of_a_reading

TIMED_STEPS = 5  # at most, and one before them, which is slower
TIMED_SECONDS = 30.0  # after which no other step is begun


class _EnoughTimedError(Exception):
    """No other step need be timed."""


def plan_training(
    anchor: Anchor,
    data: TokenSet,
    name: str,
    recipe: ExpertRecipe,
    num_threads: int | None = None,
    public: TokenSet | None = None,
) -> dict[str, Any]:
    """Needs of `train_expert` called with the same arguments.

    Returns:
        seconds: estimate on this machine, from the median step; without writing checkpoints.
        step_seconds: that median; of the first step if that alone took TIMED_SECONDS.
        memory_bytes: peak of this process so far (on a GPU, of torch's memory there).
        weights_bytes: size of the bundle's weights, exact.
        parameters: numbers that learn.
        steps, tokens: optimizer steps, and tokens predicted over all of them; of private training
            in the mean.
        own_tokens: tokens of the owner's training text.
        passes: times that text is read.
        budget: guarantee of private training (`state_budget`); None of any other.
    """
    refuse_several("A plan")
    set_up(recipe.seed, num_threads)
    started = time.monotonic()
    pair, parameters, loss_of_step, private = prepare_training(anchor, data, name, recipe, public)
    arrange_blocks(pair, recipe.blocks, name)
    preparation = time.monotonic() - started
    begun: list[float] = []

    def timed_loss(step: int) -> Losses:
        begun.append(time.monotonic())
        if begun[-1] - begun[0] > TIMED_SECONDS:
            raise _EnoughTimedError
        return loss_of_step(step)

    few = recipe.train.model_copy(update={"steps": TIMED_STEPS + 1, "warmup_steps": 0})
    with suppress(_EnoughTimedError):
        train(parameters, timed_loss, few, None, f"plan of {name}", {}, {}, private)
        begun.append(time.monotonic())
    steps = [end - start for start, end in pairwise(begun)]
    median = statistics.median(steps[1:] or steps)
    settings, own = recipe.train, len(data.splits["train"].tokens)
    tokens = settings.tokens
    own_tokens = tokens * (1 - recipe.replay)
    once = (own - 1) // settings.seq_len * settings.seq_len
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if pair.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(pair.device)
    budget = None
    if private is not None and recipe.privacy is not None:
        router = cast(EvidenceSettings, recipe.router)
        budget = state_budget(private, recipe.privacy, settings, router)
        a_step = private.rate * tokens_of_a_reading(data, recipe.privacy, settings)
        tokens = own_tokens = round(settings.steps * a_step)
        once = own
    return {
        "seconds": preparation + settings.steps * median,
        "step_seconds": median,
        "memory_bytes": memory,
        "weights_bytes": size_of_tensors(pack_tensors(expert_tensors(pair, name), recipe)),
        "parameters": sum(p.numel() for p in parameters.values()),
        "steps": settings.steps,
        "tokens": tokens,
        "own_tokens": own,
        "budget": budget,
        "passes": own_tokens / once,
    }
