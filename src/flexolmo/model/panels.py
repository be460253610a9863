"""Matrices cut into panels of few columns, each a stretch of memory of its own.

A matrix that comes from memory is read at half of memory's speed where a product of few rows jumps
from line to line; panels are read from end to end. And a row's bits do not depend on how many
others are multiplied beside it, so nothing is filled up to tiles. A few dozen rows are multiplied
up to 1.7 times as fast; hundreds, or one alone, somewhat slower. Source: ours.

n rows to multiply, P panels.
"""

from collections.abc import Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexolmo.errors import ConfigError

WIDTH = 32  # columns of a panel, which the library multiplies by its fastest kernel
FEWEST_ROWS, MOST_ROWS = 2, 256  # of a batch that is read so
REFERENCE_ROWS = 16
ENOUGH_NUMBERS = 20_000  # to compare before rows count as keeping their bits
PANELS_TO_TRY = 64

Panels = Mapping[nn.Module, Tensor]  # [P,in,WIDTH] of a module's matrices that read the same rows


def can_cut(weight: Tensor) -> bool:
    """True if products with panels of this matrix are known to be faster."""
    return weight.is_cpu and weight.dtype == torch.float32


def cut_panels(weights: Sequence[Tensor]) -> Tensor:
    """Panels [P,in,WIDTH] of matrices [out,in] that read the same rows, each filled up with 0."""
    with torch.no_grad():
        filled = [F.pad(w, (0, 0, 0, -len(w) % WIDTH)) for w in weights]
        parts = [w.view(-1, WIDTH, w.shape[1]).transpose(1, 2) for w in filled]
        return torch.cat(parts).contiguous()


def panel_product(x: Tensor, panels: Tensor) -> Tensor:
    """Rows x [n,in] times every panel, [P,n,WIDTH]; each row's bits are its own."""
    n, kind = len(x), (*panels.shape[:2], x.dtype, x.device, torch.get_num_threads())
    if n > REFERENCE_ROWS and not _keeps_bits(n, *kind):
        return torch.cat([panel_product(rows, panels) for rows in x.split(REFERENCE_ROWS)], dim=1)
    rows = max(n, 1)
    while rows < REFERENCE_ROWS and not _keeps_bits(rows, *kind):
        rows += 1
    if rows > n:
        x = F.pad(x, (0, 0, 0, rows - n))
    return torch.bmm(x.expand(len(panels), *x.shape), panels)[:, :n]


def beside(found: Tensor) -> Tensor:
    """Columns of all panels beside each other: [n,P*WIDTH] from [P,n,WIDTH]."""
    return found.transpose(0, 1).reshape(found.shape[1], -1)


@cache
def _keeps_bits(
    n: int, count: int, d_in: int, dtype: torch.dtype, device: torch.device, num_threads: int
) -> bool:
    """True if each of n rows has the bits that it has among REFERENCE_ROWS, which must have them
    in whatever place. Found by trying. Raises ConfigError if these have not."""
    count = min(count, PANELS_TO_TRY)
    compared = 0
    with torch.inference_mode():
        while compared < ENOUGH_NUMBERS:
            generator = torch.Generator().manual_seed(compared)
            rows = torch.randn(REFERENCE_ROWS, d_in, generator=generator).to(device, dtype)
            panels = torch.randn(count, d_in, WIDTH, generator=generator).to(device, dtype)
            right = torch.bmm(rows.expand(count, -1, -1), panels)
            turned = torch.bmm(rows.flip(0).expand(count, -1, -1), panels).flip(1)
            if not torch.equal(turned, right):
                raise ConfigError(
                    f"On this machine, rows of a product of {REFERENCE_ROWS} x {d_in} with "
                    f"{d_in} x {WIDTH} ({dtype}, {num_threads} threads) depend on where they "
                    "stand, so that switching an expert off could not be exact. Use one thread."
                )
            at = torch.arange(n) % REFERENCE_ROWS
            if not torch.equal(torch.bmm(rows[at].expand(count, -1, -1), panels), right[:, at]):
                return False
            compared += n * count * WIDTH
    return True
