"""Steps of training under differential privacy: who is read, what is clipped, and the noise.

A step reads each unit with the same chance, apart from all others (Poisson sampling); the gradient
of each one read is found by itself and scaled to a norm of at most C; their sum gets Gaussian
noise; all else, optimizers too, follows from that. Source: Abadi et al. 2016 (arXiv 1607.00133).

Units go through the model one at a time, so the gradient of each is exact for every kind of
module, and memory does not grow with the batch. For a stretch of T tokens and a matrix of
a x b < T^2 numbers this is also less work than finding the norm alone (ghost clipping). A GPU
takes groups of them (`train.at_once`).

Sampling, places of windows and noise follow from a key of the run that the operating system draws.
It is kept beside the checkpoint until the run ends, so that a run that is killed and goes on takes
the very steps that it would have taken: a step done twice tells no more than once. Other settings,
text or anchor give other noise, and so does another directory: who draws until he likes what comes
out has spent a budget each time.
"""

import hashlib
import hmac
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor, nn

from flexolmo.errors import CheckpointError
from flexolmo.files import write_bytes
from flexolmo.model.private_statistics import draw_normals

KEY_FILE = "noise.key"
KEY_BYTES = 32
ROUNDING = 1e-4  # of a norm, by which float32 may be off


class PrivateSteps:
    """Sampling, clipping and noise of one run; `open` it before its first step."""

    def __init__(self, num_units: int, rate: float, noise: float, clip_norm: float):
        """`rate` is the chance of a unit to be read in a step; `noise` is in clipping norms."""
        self.num_units = num_units
        self.rate = rate
        self.noise = noise
        self.clip_norm = clip_norm
        self.units_at_once = 1  # whose gradients are found together
        self.most_windows = 1  # that a step reads of a unit
        self.closed: dict[str, Tensor] = {}  # rows, int64, of a parameter that stay as they are
        self._key = b""
        self._sums: dict[str, Tensor] = {}

    def open(self, run_dir: Path | None, identity: str, is_begun: bool) -> None:
        """Read the key of the run in `run_dir`, or draw one.

        Raises:
            CheckpointError: a run that has begun lacks its key.
        """
        key = os.urandom(KEY_BYTES)
        path = None if run_dir is None else Path(run_dir) / KEY_FILE
        if path is not None and path.exists():
            key = path.read_bytes()
        elif path is not None and not is_begun:
            write_bytes(path, key, is_private=True)
        elif path is not None:
            key = b""
        if len(key) != KEY_BYTES:
            raise CheckpointError(
                f"{path} is missing or damaged, so the noise of the steps taken cannot be told "
                "from that of steps to come. Train again, in a directory of its own."
            )
        self._key = hmac.digest(key, identity.encode(), hashlib.sha256)

    def choose(self, step: int) -> np.ndarray:
        """Numbers of the units that `step` reads, ascending int64."""
        drawn = np.frombuffer(self._stream(step, "units")(8 * self.num_units), dtype=np.uint64)
        return np.flatnonzero((drawn >> np.uint64(11)) * 2.0**-53 < self.rate)

    def draw(self, step: int, unit: int, count: int) -> np.ndarray:
        """Random numbers, uint64 [count], for what `step` reads of one unit.

        They are secret like the sample: were they to follow from a seed and the unit's number, one
        unit less would give all after it other windows, and noise would have to cover these too.
        """
        return np.frombuffer(self._stream(step, f"unit {unit}")(8 * count), dtype=np.uint64)

    @torch.no_grad()
    def add(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take one unit's gradient out of `parameters`, clipped, into the step's sum."""
        found = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        grads = list(found.values())
        self._close(found)
        norm = nn.utils.get_total_norm(grads)
        if not self._sums:
            self._sums = {n: torch.zeros_like(p) for n, p in parameters.items()}
        if norm.isfinite():  # else it counts as none, or one unit would decide of all
            torch._foreach_mul_(grads, self._clipping(norm))
            torch._foreach_add_([self._sums[n] for n in found], grads)
        for p in parameters.values():
            p.grad = None

    @torch.no_grad()
    def add_each(self, grads: Mapping[str, Tensor]) -> None:
        """Take the gradients of a group of units, [G,...] by parameter, each clipped by itself,
        into the step's sum. Writes into `grads`."""
        for name in self.closed.keys() & grads.keys():
            grads[name].index_fill_(1, self.closed[name], 0.0)
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in grads.values()])
        norm = torch.linalg.vector_norm(norms, dim=0)  # [G]
        factor = self._clipping(norm)
        lost = norm.isfinite().logical_not().nonzero()[:, 0]  # which count as none, as in `add`
        if not self._sums:
            self._sums = {n: torch.zeros_like(g[0]) for n, g in grads.items()}
        for name, g in grads.items():
            if len(lost):
                g.index_fill_(0, lost, 0.0)
            # no product of matrices, which a GPU makes in TF32: off by more than ROUNDING
            self._sums[name] += g.mul_(factor.view(-1, *[1] * (g.dim() - 1))).sum(0)

    def _clipping(self, norm: Tensor) -> Tensor:
        """Factor that brings a gradient of this norm to at most the clipping norm."""
        return (self.clip_norm * (1 - ROUNDING) / norm).nan_to_num(0.0).clamp(max=1.0)

    @torch.no_grad()
    def finish(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Leave the step's gradient in `parameters`: the noised sum over the mean number of units,
        whoever was read."""
        read = self._stream(step, "noise")
        for name, p in parameters.items():
            drawn = torch.from_numpy(draw_normals(p.numel(), read)).view(p.shape)
            # laid out as `p` is, which fused optimizers take for granted
            total = torch.empty_like(p).copy_(drawn).mul_(self.noise * self.clip_norm)
            if self._sums:
                total += self._sums[name]
            p.grad = total / (self.rate * self.num_units)
        self._close({n: p.grad for n, p in parameters.items() if p.grad is not None})
        self._sums = {}

    def close(self, run_dir: Path | None) -> None:
        """Forget the key, with which noise could be taken off again: the run has ended."""
        self._key = b""
        if run_dir is not None:
            (Path(run_dir) / KEY_FILE).unlink(missing_ok=True)

    def _close(self, grads: Mapping[str, Tensor]) -> None:
        """Clear the rows that do not learn, of a unit's gradients or the noised ones."""
        for name in self.closed.keys() & grads.keys():
            grads[name].index_fill_(0, self.closed[name], 0.0)

    def _stream(self, step: int, use: str) -> Callable[[int], bytes]:
        """Random bytes for one use in one step, as many as are asked for."""
        key = hmac.digest(self._key, f"{use} {step}".encode(), hashlib.sha256)
        cipher = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
        return lambda count: cipher.update(bytes(count))
