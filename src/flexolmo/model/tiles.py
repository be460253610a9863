"""Matrix products whose rows keep their bits, whatever other rows are multiplied beside them.

A library chooses by the number of rows how it sums, so a row may come out differently in its last
bits when a batch has other rows. Here rows are multiplied in tiles of equal height, which depends
on the shapes of the batch and the matrix alone, and the library is tried once for each such shape.
Any expert can then read just the positions that picked it. Source: ours; cf. He et al. 2025 on
batch-invariant kernels.

n rows to multiply, N rows of the whole batch.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from flexolmo.errors import ConfigError

WHOLE_ROWS = 8  # a batch of no more rows is one tile
MAX_TILE_ROWS = 64
SMALL_NUMBERS = 2**19  # of a matrix that a processor's cache holds, beside which low tiles are fast
MOST_TILES = 4  # that may be needed, with few threads, before the library's rows keep their bits


def tile_rows(batch_rows: int, numbers: int) -> int:
    """Height of a tile for a batch of N rows and a matrix of so many `numbers`."""
    if batch_rows <= WHOLE_ROWS:
        return batch_rows
    most = 16 if numbers <= SMALL_NUMBERS else MAX_TILE_ROWS
    return min(most, max(WHOLE_ROWS, 1 << (-(-batch_rows // 4) - 1).bit_length()))


def in_tiles(num_rows: int, batch_rows: int) -> int:
    """The least number of rows that is no less than `num_rows` and whole tiles of small matrices,
    which need not be filled up again."""
    tile = tile_rows(batch_rows, SMALL_NUMBERS)
    return -(-num_rows // tile) * tile


def product(x: Tensor, weight: Tensor, batch_rows: int | None) -> Tensor:
    """x [n,in] times `weight` [out,in] transposed, [n,out].

    Each row has the bits it has in every other call with the same `batch_rows`. With None, in
    training, rows are multiplied all at once and their last bits depend on n.
    """
    if batch_rows is None:
        return F.linear(x, weight)
    n, (d_out, d_in) = len(x), weight.shape
    if d_out == 1:  # else the library takes it for a vector, and sums by where a row stands
        return product(x, F.pad(weight.T, (0, 1)).T, batch_rows)[:, :1]
    tile = tile_rows(batch_rows, weight.numel())
    least = least_tiles(tile, d_in, d_out, x.dtype, x.device, torch.get_num_threads())
    count = max(-(-n // tile), least)
    if count * tile != n:
        x = F.pad(x, (0, 0, 0, count * tile - n))
    return _multiply(x.view(count, tile, d_in), weight.T.contiguous())[:n]


def _multiply(tiles: Tensor, weight: Tensor) -> Tensor:
    """Tiles [count,tile,in] times `weight` [in,out], all rows below each other."""
    count, _, d_in = tiles.shape
    if count == 1:
        return tiles[0] @ weight
    return torch.bmm(tiles, weight.expand(count, d_in, -1)).flatten(0, 1)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), bit for bit the same wherever a number stands; torch's own function rounds
    the last numbers of a tensor, which do not fill a vector register, in another way."""
    wide = x if x.dtype == torch.float64 else x.float()
    below = torch.exp(-wide) + 1 if torch.is_grad_enabled() else torch.neg(wide).exp_().add_(1)
    return (wide / below).to(x.dtype)


@cache
def least_tiles(
    tile: int, d_in: int, d_out: int, dtype: torch.dtype, device: torch.device, num_threads: int
) -> int:
    """Number of tiles from which on a row's bits depend neither on their number nor on its place.

    Found by trying; with several threads a library may cut one product up, but not many. Raises
    ConfigError if there is none on this machine.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(tile, d_in, generator=generator).to(device, dtype)
    weight = torch.randn(d_in, d_out, generator=generator).to(device, dtype)
    is_whole = tile < WHOLE_ROWS  # a batch of a single tile
    most = 1 if is_whole else max(MOST_TILES, 2 * num_threads)

    def bits(count: int, place: int, shift: int) -> Tensor:
        """The rows' products from tile number `place` of `count`, moved by `shift` within it."""
        x = torch.ones(count, tile, d_in, dtype=dtype, device=device)
        x[place] = rows.roll(shift, 0)
        return _multiply(x, weight)[place * tile :][:tile].roll(-shift, 0)

    with torch.inference_mode():
        right = bits(1 if is_whole else 2 * most, 0, 0)
        wrong = [
            count
            for count in range(1, most + 1)
            for place, shift in {(0, 1), (count - 1, tile // 2), (count // 2, tile - 1)}
            if not torch.equal(bits(count, place, shift), right)
        ]
    least = max(wrong, default=0) + 1
    if least > most:
        raise ConfigError(
            f"On this machine, products of {tile} rows with a matrix of {d_in} x {d_out} "
            f"({dtype}, {num_threads} threads) depend on what is multiplied beside them, so that "
            "switching an expert off could not be exact. Use one thread."
        )
    return least
