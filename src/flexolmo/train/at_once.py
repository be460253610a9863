"""Gradients of many units of private training at once, each by itself: what a GPU is fast at.

One unit at a time leaves a GPU waiting for its host. Here a group of units goes through the model
together, and the gradient of each comes back apart from the others (`torch.func`).

All groups are of one size, filled up with units that hold nothing, and all units of one shape: so
products are made in the same way whoever is read, and no unit moves another's gradient by rounding.

G units of a group, w windows, T positions.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexolmo.errors import ConfigError
from flexolmo.model.moe import MixtureModel
from flexolmo.model.transformer import RMSNorm
from flexolmo.train.dp_sgd import PrivateSteps
from flexolmo.train.loop import TrainSettings

GPU_UNITS = 16
# What a group may hold on a GPU, in numbers, each four bytes and each kept a few times over.
GPU_LOGITS = 2**28
GPU_GRADIENTS = 2**30


def choose_group(
    model: MixtureModel,
    settings: TrainSettings,
    num_windows: int,
    num_learnt: int,
    asked: int | None,
) -> int:
    """Units whose gradients are found at once: as many as are `asked` for; with None, one on a
    processor, and on a GPU up to GPU_UNITS, as logits of `num_windows` windows and gradients of
    `num_learnt` numbers leave room.

    Raises:
        ConfigError: several are asked for of a model that reads them one at a time alone.
    """
    obstacle = None
    if not model.trains_alone:
        obstacle = "the expert is trained beside the anchor (beside_anchor)"
    elif model.config.document_mask:
        obstacle = "the anchor's attention stays within a document (document_mask)"
    elif settings.recompute:
        obstacle = "blocks are computed again on the way back (train.recompute)"
    if asked is None:
        if obstacle is not None or model.device.type != "cuda":
            return 1
        logits = num_windows * settings.seq_len * model.config.vocab_size
        return max(1, min(GPU_UNITS, GPU_LOGITS // logits, GPU_GRADIENTS // num_learnt))
    if asked > 1 and obstacle is not None:
        raise ConfigError(
            f"privacy.units_at_once is {asked}, but {obstacle}, and then units are read one at a "
            "time: leave units_at_once out."
        )
    return asked


def in_groups(
    windows_of_step: Callable[[int], Iterator[np.ndarray]],
    size: int,
    num_windows: int,
    settings: TrainSettings,
    private: PrivateSteps,
    model: MixtureModel,
    parameters: Mapping[str, nn.Parameter],
) -> Callable[[int], Iterator[Tensor]]:
    """Function from a step to the losses of the units that it reads, in nats per token. They need
    no backward pass: `private` is given the gradients as they are found.

    `windows_of_step` gives each unit's windows, int64 [w,T+1]; w and T are `num_windows` and
    `settings.seq_len` at most.
    """
    path_of = {id(p): path for path, p in model.named_parameters()}
    paths = {name: path_of[id(p)] for name, p in parameters.items()}

    def loss_of(learnt: dict[str, Tensor], ids: Tensor, weight: Tensor) -> Tensor:
        logits = functional_call(model, learnt, (ids[:, :-1],))  # [w,T,V]
        log_probs = logits.log_softmax(-1, dtype=torch.float32)
        nats = -log_probs.gather(-1, ids[:, 1:, None])[..., 0]  # [w,T]
        return (weight * nats).sum()

    each = vmap(grad_and_value(loss_of), in_dims=(None, 0, 0))

    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eval()  # as stock computes it, of operations that vmap knows

    def losses(step: int) -> Iterator[Tensor]:
        units = windows_of_step(step)
        while group := list(islice(units, size)):
            ids, weights = fill_up(group, size, num_windows, settings.seq_len)
            learnt = {paths[n]: p.detach() for n, p in parameters.items()}
            with sdpa_kernel(SDPBackend.MATH):  # others run once for each unit
                grads, found = each(
                    learnt,
                    torch.from_numpy(ids).to(model.device),
                    torch.from_numpy(weights).to(model.device),
                )
            private.add_each({n: grads[path] for n, path in paths.items()})
            yield from found[: len(group)]

    return losses


def fill_up(
    units: list[np.ndarray], size: int, num_windows: int, seq_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Windows of all units as ids int64 [size,w,T+1], and the weight of each target in its unit's
    loss, float32 [size,w,T]: zero where there is none."""
    ids = np.zeros((size, num_windows, seq_len + 1), dtype=np.int64)
    weights = np.zeros((size, num_windows, seq_len), dtype=np.float32)
    for i, unit in enumerate(units):
        count, length = unit.shape
        ids[i, :count, :length] = unit
        weights[i, :count, : length - 1] = 1.0 / (count * (length - 1))
    return ids, weights
