"""Matrices in oneDNN's own layout, by which AMD's processors multiply fastest.

MKL, which torch uses otherwise, reads a matrix at half of memory's speed there for 4 to 16 rows,
and is a seventh slower for hundreds. A row that is alone in its batch is faster still from panels.
A row's bits do not depend on how many others are multiplied beside it, which is tried for each
number of them. The layout cannot be looked into, so this is a copy. Source: ours.

n rows to multiply, P panels.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor, nn

from flexolmo.errors import ConfigError
from flexolmo.model import onednn
from flexolmo.model.onednn import multiply
from flexolmo.model.panels import (
    ENOUGH_NUMBERS,
    NUMBERS_TO_TRY,
    REFERENCE_ROWS,
    WIDTH,
    Layout,
    Products,
    by_panel,
    filled,
    gated_by_panel,
    in_panels,
)
from flexolmo.model.tiles import WORK_PER_THREAD

FEW_ROWS = 64  # up to which any number is multiplied as it is, from ROWS_STEP on
ROWS_STEP = 4  # in which larger numbers of rows go, so that few need be tried
MOST_ROWS = 512  # of a thread, above which only multiples are multiplied at once
MOST_TIMES = 4  # of that
LARGE_ROWS = 128  # the same by matrices of more than QUICK_NUMBERS, where each trial takes long
QUICK_NUMBERS = 2**22


@dataclass(frozen=True)
class Packed(Products):
    """Matrices packed, and in panels once a row is alone."""

    packed: Tensor  # [out of all,in] in oneDNN's layout
    weights: Sequence[Tensor]  # [out,in] each, as the matrices hold them

    @cached_property
    def panels(self) -> Tensor:
        """[P,in,WIDTH], filled up with 0; made for the first row that is alone."""
        with torch.inference_mode(False), torch.no_grad():
            return in_panels(torch.cat([*self.weights]).T)

    def times(self, x: Tensor, is_alone: bool = False) -> Tensor:
        n = len(x)
        width = len(self.packed)
        if is_alone:
            return by_panel(x, self.panels).transpose(0, 1).reshape(n, -1)[:, :width]
        rows = _rows(n, x.shape[1], width, torch.get_num_threads())
        if rows >= n:
            return multiply(filled(x, rows), self.packed)[:n]
        return torch.cat([self.times(part) for part in x.split(rows)])

    def gated(self, x: Tensor, is_alone: bool = False) -> Tensor:
        half = len(self.packed) // 2
        if is_alone and half % WIDTH == 0 and half <= WORK_PER_THREAD:
            return gated_by_panel(x, self.panels)
        return super().gated(x, is_alone)

    def erase(self) -> None:
        with torch.no_grad():
            for weight in self.weights:
                weight.fill_(math.nan)
        if "panels" in vars(self):
            self.panels.fill_(math.nan)
        op = torch.ops.mkldnn
        ctypes.memset(op.data_ptr(self.packed), 0xFF, op._nbytes(self.packed))  # bits of NaN


def pack(matrices: Sequence[nn.Linear]) -> Packed:
    """Copy matrices that read the same rows, packed side by side."""
    with torch.inference_mode(False), torch.no_grad():
        every = torch.cat([m.weight for m in matrices]).contiguous()  # [out of all,in]
        return Packed(onednn.pack(every), [m.weight for m in matrices])


def in_steps(num_rows: int) -> int:
    """Number of rows to multiply where there are `num_rows`."""
    if num_rows <= FEW_ROWS:
        return max(num_rows, ROWS_STEP)
    return -(-num_rows // ROWS_STEP) * ROWS_STEP


PACKED = Layout(pack, in_steps, fewest_rows=1, most_rows=MOST_ROWS)


@cache
def _rows(n: int, d_in: int, d_out: int, num_threads: int) -> int:
    """Number of rows to multiply at a time where there are n: as many, fewer, or more, of which
    some are idle."""
    most = num_threads * (MOST_ROWS if d_in * d_out <= QUICK_NUMBERS else LARGE_ROWS)
    rows = in_steps(n) if n <= most else min(n // most, MOST_TIMES) * most
    return rows if _keeps_bits(rows, d_in, d_out) else REFERENCE_ROWS


def _keeps_bits(n: int, d_in: int, d_out: int) -> bool:
    """True if each of n rows has the bits that it has among REFERENCE_ROWS, which must have them
    in whatever place. Found by trying. Raises ConfigError if these have not."""
    compared = 0
    with torch.inference_mode():
        while compared < ENOUGH_NUMBERS:
            generator = torch.Generator().manual_seed(compared)
            rows = torch.randn(REFERENCE_ROWS, d_in, generator=generator)
            some = torch.randn(min(NUMBERS_TO_TRY, d_in * d_out), generator=generator)
            some = some.repeat(-(-d_in * d_out // len(some)))
            packed = onednn.pack(some[: d_in * d_out].view(d_out, d_in))
            right = multiply(rows, packed)
            if not torch.equal(multiply(rows.flip(0), packed).flip(0), right):
                raise ConfigError(
                    f"On this machine, rows of a packed product of {REFERENCE_ROWS} x {d_in} with "
                    f"{d_in} x {d_out} depend on where they stand, so that switching an expert off "
                    "could not be exact. Use one thread."
                )
            at = torch.arange(n) % REFERENCE_ROWS
            if not torch.equal(multiply(rows[at], packed), right[at]):
                return False
            compared += n * d_out
    return True
