"""Matrices that read the same rows, side by side in memory, and products of few or many rows.

A row's bits do not depend on how many others are multiplied beside it, so nothing is filled up to
tiles: a library sums in the same order for two rows or a hundred, which is tried for each number of
them. Few rows wait for the matrix, which comes from memory at half of memory's speed where a
product jumps from line to line; so there is a copy in panels of few columns, each a stretch of
memory of its own, which are read from end to end. Many are shared out to the threads: a product of
its own for each is faster than one for all, and sums in the order of a single thread. Source: ours.

n rows to multiply, P panels.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexolmo.errors import ConfigError
from flexolmo.model.tiles import WORK_PER_THREAD, silu, spaced

WIDTH = 32  # columns of a panel, which the library multiplies by its fastest kernel
PANEL_ROWS = 32  # above which one thread multiplies faster with the matrix than with its panels
MOST_ROWS = 128  # multiplied at once by a thread; more are not faster
FEWEST_ROWS = 2  # of a batch that is read from panels; a single row is read faster without
THREAD_ROWS = 64  # for each of several threads, from which on all may read the whole matrix
ROWS_STEP = 8  # of a thread, where panels are not read, so that few numbers of rows need be tried
REFERENCE_ROWS = 16
ENOUGH_NUMBERS = 20_000  # to compare before rows count as keeping their bits
NUMBERS_TO_TRY = 2**16 + 1  # that differ
COLUMNS_TO_TRY = 64 * WIDTH  # in panels


class Products(ABC):
    """Products with matrices [out,in] that read the same rows, side by side."""

    @abstractmethod
    def times(self, x: Tensor, is_alone: bool = False) -> Tensor:
        """Products [n,out of all] of rows x [n,in], without gradients; each row's bits are its own.
        A row that is alone in its batch has no company to keep them in, and may have others."""

    def gated(self, x: Tensor, is_alone: bool = False) -> Tensor:
        """silu of the first half of `times`, times the other half, [n,out of all / 2]."""
        gate, up = self.times(x, is_alone).chunk(2, dim=1)
        return silu(gate).mul_(up)

    @abstractmethod
    def erase(self) -> None:
        """Overwrite all numbers with NaN."""


@dataclass(frozen=True)
class Cut(Products):
    """Matrices in panels, and as they are."""

    matrix: Tensor  # [in,out of all], the memory of the matrices themselves
    panels: Tensor  # [P,in,WIDTH] a copy, filled up with 0

    def times(self, x: Tensor, is_alone: bool = False) -> Tensor:
        n = x.shape[0]
        rows = self._rows(n)
        if rows == n:
            return _multiply(x, self.matrix, self.panels)
        if rows > n:
            return _multiply(filled(x, rows), self.matrix, self.panels)[:n]
        parts = x.split(rows)
        if torch.is_grad_enabled():
            return torch.cat([self.times(part) for part in parts])
        found = x.new_empty(n, self.matrix.shape[1])
        for part, place in zip(parts, found.split(rows), strict=True):
            if len(part) > most_in_panels() and self._rows(len(part)) == len(part):
                _share_out(part, self.matrix, place)  # which spares a copy
            else:
                place.copy_(self.times(part))
        return found

    def gated(self, x: Tensor, is_alone: bool = False) -> Tensor:
        n = x.shape[0]
        rows = self._rows(n)
        half = self.matrix.shape[1] // 2
        if not n <= rows <= most_in_panels() or half % WIDTH or half > WORK_PER_THREAD:
            return super().gated(x)
        return gated_by_panel(filled(x, rows), self.panels)[:n]

    def erase(self) -> None:
        self.matrix.fill_(math.nan)
        self.panels.fill_(math.nan)

    def _rows(self, n: int) -> int:
        return _rows(n, *self.matrix.shape, self.matrix.stride(0), torch.get_num_threads())


# Of matrices that read the same rows: those of a module, or of an attention with the first of them
Panels = Mapping[nn.Module | tuple[nn.Module, nn.Module], Products]


@dataclass(frozen=True)
class Layout:
    """A way to lay out matrices that is fast on some processors."""

    lay_out: Callable[[Sequence[nn.Linear]], Products]
    in_steps: Callable[[int], int]  # number of rows to multiply where there are so many
    fewest_rows: int  # of a batch, from which on it is faster
    most_rows: int  # multiplied at once by a thread


def most_in_panels() -> int:
    """Number of rows up to which products are faster with panels, which threads share."""
    num_threads = torch.get_num_threads()
    return PANEL_ROWS if num_threads == 1 else THREAD_ROWS * num_threads - 1


def in_steps(num_rows: int) -> int:
    """Number of rows to multiply where there are `num_rows`: as many, or, without panels, the next
    number that all threads share evenly."""
    step = torch.get_num_threads() * ROWS_STEP
    return num_rows if num_rows <= most_in_panels() else -(-num_rows // step) * step


def can_cut(weight: Tensor) -> bool:
    """True if products with this matrix may be had so."""
    return weight.is_cpu and weight.dtype == torch.float32


def cut(matrices: Sequence[nn.Linear]) -> Cut:
    """Lay out matrices that read the same rows side by side; they stay where they are put."""
    with torch.no_grad():
        every = spaced(torch.cat([m.weight.T for m in matrices], dim=1).T)  # [out of all,in]
        for m, part in zip(matrices, every.split([m.out_features for m in matrices]), strict=True):
            m.weight.data = part
        return Cut(every.T, in_panels(every.T))


IN_PANELS = Layout(cut, in_steps, FEWEST_ROWS, MOST_ROWS)


def in_panels(matrix: Tensor) -> Tensor:
    """Panels [P,in,WIDTH] of a matrix [in,out]."""
    wide = F.pad(matrix, (0, -matrix.shape[1] % WIDTH))
    return wide.view(len(matrix), -1, WIDTH).transpose(0, 1).contiguous()


def _multiply(x: Tensor, matrix: Tensor, panels: Tensor) -> Tensor:
    n = x.shape[0]
    if n > most_in_panels():
        return _share_out(x, matrix)
    beside = by_panel(x, panels).transpose(0, 1).reshape(n, -1)
    width = matrix.shape[1]
    return beside if width == beside.shape[1] else beside[:, :width]


def filled(x: Tensor, rows: int) -> Tensor:
    """x [n,in] with rows of 0 below, [rows,in]."""
    n, d_in = x.shape
    return x if rows == n else torch.cat([x, x.new_zeros(rows - n, d_in)])  # faster than `pad`


def gated_by_panel(x: Tensor, panels: Tensor) -> Tensor:
    """silu of rows x [n,in] times the first half of the panels, times x times the other half, of
    whole panels each, [n,out / 2]."""
    gate, up = by_panel(x, panels).chunk(2)
    return silu(gate).mul_(up).transpose(0, 1).reshape(len(x), -1)


def by_panel(x: Tensor, panels: Tensor) -> Tensor:
    """Products [P,n,WIDTH] of rows x [n,in] with panels [P,in,WIDTH]."""
    return torch.bmm(x.expand(panels.shape[0], -1, -1), panels)


def _share_out(x: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """Products [n,out] of rows x [n,in], in even parts for the threads."""
    n, d_in = x.shape
    parts = torch.get_num_threads()
    if parts == 1 or n % parts:
        return torch.mm(x, matrix, out=out)
    place = None if out is None else out.view(parts, -1, out.shape[1])
    found = torch.bmm(x.view(parts, -1, d_in), matrix.expand(parts, -1, -1), out=place)
    return found.flatten(0, 1) if out is None else out


@cache
def _rows(n: int, *kind: int) -> int:
    """Number of rows to multiply at a time where there are n: as many, fewer, or more, of which
    some are idle. `kind` as for `_keeps_bits`."""
    *_, num_threads = kind
    if n > num_threads * MOST_ROWS:
        return num_threads * MOST_ROWS
    if n > most_in_panels():
        likely = [in_steps(n), most_in_panels()]
    else:
        likely = [*range(max(n, 1), REFERENCE_ROWS)] or [n]
    return next((rows for rows in likely if _keeps_bits(rows, *kind)), REFERENCE_ROWS)


def _keeps_bits(n: int, d_in: int, d_out: int, step: int, num_threads: int) -> bool:
    """True if each of n rows has the bits that it has among REFERENCE_ROWS, which must have them
    in whatever place. Found by trying, with rows of the matrix that begin `step` numbers apart.
    Raises ConfigError if these have not."""
    if n <= most_in_panels():
        d_out = min(-(-d_out // WIDTH) * WIDTH, COLUMNS_TO_TRY)  # whole panels, all read alike
        step = d_out
    compared = 0
    with torch.inference_mode():
        while compared < ENOUGH_NUMBERS:
            generator = torch.Generator().manual_seed(compared)
            rows = torch.randn(REFERENCE_ROWS, d_in, generator=generator)
            some = torch.randn(min(NUMBERS_TO_TRY, d_in * step), generator=generator)
            some = some.repeat(-(-d_in * step // len(some)))
            matrix = some[: d_in * step].view(d_in, step)[:, :d_out]
            panels = in_panels(matrix)
            right = _multiply(rows, matrix, panels)
            if not torch.equal(_multiply(rows.flip(0), matrix, panels).flip(0), right):
                raise ConfigError(
                    f"On this machine, rows of a product of {REFERENCE_ROWS} x {d_in} with "
                    f"{d_in} x {d_out} ({num_threads} threads) depend on where they stand, so "
                    "that switching an expert off could not be exact. Use one thread."
                )
            at = torch.arange(n) % REFERENCE_ROWS
            if not torch.equal(_multiply(rows[at], matrix, panels), right[at]):
                return False
            if n > most_in_panels():
                place = rows.new_empty(n, d_out)
                if not torch.equal(_share_out(rows[at], matrix, place), right[at]):
                    return False
            compared += n * d_out
    return True
