"""An owner's text under a privacy budget: which units a step reads, and with how much noise.

Puts together the units of a set (`data.units`), the budget (`train.budget`) and the steps that keep
to it (`train.dp_sgd`). Knows nothing of models.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from flexolmo.data.batches import TokenSet
from flexolmo.data.units import read_unit, unit_offsets
from flexolmo.errors import ConfigError
from flexolmo.model.private_statistics import find_sigma
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.train.budget import PrivacySettings, find_noise, spent_epsilon
from flexolmo.train.dp_sgd import PrivateSteps
from flexolmo.train.loop import TrainSettings


def protect(
    data: TokenSet, privacy: PrivacySettings, settings: TrainSettings, router: EvidenceSettings
) -> PrivateSteps:
    """Sampling and noise with which training keeps to the budget, `router`'s table included.

    Raises:
        ConfigError: more units in a step than there are, a delta that tells of one outright, or a
            budget that leaves nothing.
    """
    count = len(unit_offsets(data, privacy.unit, settings.seq_len)) - 1
    if settings.batch_size > count:
        raise ConfigError(
            f"{data.directory} has {count:,} units ({privacy.unit}) to train on, and a step would "
            f"read {settings.batch_size:,} in the mean (train.batch_size). Give it fewer, a sixth "
            f"of the units say: --set train.batch_size={max(1, count // 6)}."
        )
    if privacy.delta * count >= 1:
        raise ConfigError(
            f"privacy.delta {privacy.delta:g} allows that one of the {count:,} units of "
            f"{data.directory} is told of outright; give less than {1 / count:.1g}."
        )
    rate = settings.batch_size / count
    noise = find_noise(privacy, rate, settings.steps, _table_noise(router))
    private = PrivateSteps(count, rate, noise, privacy.clip_norm)
    private.most_windows = 1 if privacy.unit == "sequence" else privacy.windows
    return private


def state_budget(
    private: PrivateSteps,
    privacy: PrivacySettings,
    settings: TrainSettings,
    router: EvidenceSettings,
) -> dict[str, Any]:
    """All that the guarantee rests on, for the bundle: what is protected, epsilon and delta of
    table and weights together, and the numbers from which anybody can work it out again."""
    table = _table_noise(router)
    return {
        "unit": privacy.unit,
        "neighbours": "one unit added or removed",
        "epsilon": spent_epsilon(privacy.delta, private.noise, private.rate, settings.steps, table),
        "delta": privacy.delta,
        "accountant": "PRV (Opacus)",
        "sampling": "Poisson, of windows drawn in secret",
        "sampling_rate": private.rate,
        "steps": settings.steps,
        "noise": private.noise,
        "clip_norm": private.clip_norm,
        "table_noise": table,
    }


def tokens_of_a_reading(data: TokenSet, privacy: PrivacySettings, settings: TrainSettings) -> int:
    """Tokens predicted by a step that reads every unit of the set."""
    sizes = np.diff(unit_offsets(data, privacy.unit, settings.seq_len))  # [n]
    windows = np.minimum(-(-sizes // settings.seq_len), privacy.windows)
    return int(np.where(sizes <= settings.seq_len, sizes, windows * settings.seq_len).sum())


def windows_of_units(
    data: TokenSet, privacy: PrivacySettings, settings: TrainSettings, private: PrivateSteps
) -> Callable[[int], Iterator[np.ndarray]]:
    """Function from a step to the windows of each unit that it reads, int64 [w,T+1]."""
    tokens = data.splits["train"].tokens
    offsets = unit_offsets(data, privacy.unit, settings.seq_len)

    def windows(step: int) -> Iterator[np.ndarray]:
        for unit in private.choose(step).tolist():
            text = tokens[offsets[unit] : offsets[unit + 1]]
            drawn = private.draw(step, unit, privacy.windows)
            yield read_unit(text, data.eos_id, settings.seq_len, drawn)

    return windows


def in_units(
    windows_of_step: Callable[[int], Iterator[np.ndarray]], loss_of: Callable[[Tensor], Tensor]
) -> Callable[[int], Iterator[Tensor]]:
    """Function from a step to the losses of the units that it reads, one at a time, in nats per
    token; `loss_of` is the loss of windows [w,T+1]."""

    def losses(step: int) -> Iterator[Tensor]:
        for ids in windows_of_step(step):
            yield loss_of(torch.from_numpy(ids))

    return losses


def _table_noise(router: EvidenceSettings) -> float:
    """Deviation of the noise in a private expert's table."""
    return find_sigma(cast(float, router.epsilon), router.delta)
