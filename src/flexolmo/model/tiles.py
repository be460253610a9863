"""Matrix products whose rows keep their bits, whatever other rows are multiplied beside them.

A library chooses by the number of rows how it sums, so a row may come out differently in its last
bits when a batch has other rows. Here rows are multiplied in tiles of equal height, which depends
on the shapes of the batch and the matrix alone, and the library is tried once for each such shape.
Any expert can then read just the positions that picked it. Source: ours; cf. He et al. 2025 on
batch-invariant kernels.

n rows to multiply, N rows of the whole batch.
"""

import math
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from flexolmo.errors import ConfigError

MAX_TILE_ROWS = 64
LOW_ROWS = 16  # of a product, below which its rows' bits depend on their number
# Numbers of a matrix. One that a processor's cache holds is fast in low tiles; one that comes from
# memory for every tile takes few.
SMALL_NUMBERS = 2**19
LARGE_NUMBERS = 2**21
STEP_BYTES = 4096  # columns so far apart, or a multiple, fall on the same lines of a cache
LINE_BYTES = 64
COLUMNS = 16  # multiplied together where columns are to keep their bits
REGISTERS_BYTES = 128  # of a number each, which the library fills at a time
WORK_PER_THREAD = 2**15  # numbers below which the library uses fewer threads
CPU = torch.device("cpu")
ENOUGH_NUMBERS = 20_000  # to compare before rows count as keeping their bits
ENOUGH_ROWS = 2048  # numbers of a tile's rows
MOST_TILES = 4  # that may be needed, with few threads, before the library's rows keep their bits


@cache
def is_amd() -> bool:
    """True on an AMD processor, whose products the library computes by other ways than Intel's."""
    return "AMD" in str(torch.cpu.get_capabilities().get("cpu_name"))


def tile_rows(batch_rows: int, numbers: int, device: torch.device = CPU) -> int:
    """Height of a tile for a batch of N rows and a matrix of so many `numbers`."""
    part, most = 4, 16 if numbers <= SMALL_NUMBERS else MAX_TILE_ROWS
    if numbers > LARGE_NUMBERS or device.type != "cpu":  # a GPU waits for memory, not for products
        part, most = 1, MAX_TILE_ROWS
    return min(most, 1 << (-(-batch_rows // part) - 1).bit_length())


def in_tiles(num_rows: int, batch_rows: int, device: torch.device = CPU) -> int:
    """The least number of rows that is no less than `num_rows` and whole tiles of small matrices,
    which need not be filled up again."""
    tile = tile_rows(batch_rows, SMALL_NUMBERS, device)
    return -(-num_rows // tile) * tile


def product(x: Tensor, weight: Tensor, batch_rows: int | None) -> Tensor:
    """x [n,in] times `weight` [out,in] transposed, [n,out].

    Each row has the bits it has in every other call with the same `batch_rows`. With None, in
    training, rows are multiplied all at once and their last bits depend on n.
    """
    if batch_rows is None:
        return F.linear(x, weight)
    n = x.shape[0]
    if missing := _missing_columns(weight):
        return product(x, _widened(weight, missing), batch_rows)[:, : weight.shape[0]]
    d_out, d_in = weight.shape
    if weight.stride(0) != 1:
        weight = weight.T.contiguous().T
    kind = (d_in, d_out, weight.stride(1), x.dtype, x.device, torch.get_num_threads())
    tile, least = _tiles_of(batch_rows, *kind)
    if not least:
        return product(x.float(), weight.float(), batch_rows).to(x.dtype)
    if n == tile and least == 1:
        return x @ weight.T
    count = max(-(-n // tile), least)
    if count * tile != n:
        x = F.pad(x, (0, 0, 0, count * tile - n))
    if tile >= LOW_ROWS and _is_whole(count, tile, least, *kind):
        return (x @ weight.T)[:n]
    return _multiply(x.view(count, tile, d_in), weight.T)[:n]


@lru_cache(maxsize=4096)
def _tiles_of(
    batch_rows: int,
    d_in: int,
    d_out: int,
    step: int,
    dtype: torch.dtype,
    device: torch.device,
    num_threads: int,
) -> tuple[int, int]:
    """Height of a tile for a batch of so many rows, and the least number of tiles; 0 where rows
    keep their bits in float32 alone, on a processor. The other arguments are those of
    `least_tiles`."""
    tile = tile_rows(batch_rows, d_out * d_in, device)
    all_tiles = -(-batch_rows // tile)
    in_all = all_tiles if all_tiles <= max(MOST_TILES, 2 * num_threads) else None
    try:
        return tile, least_tiles(tile, in_all, d_in, d_out, step, dtype, device, num_threads)
    except ConfigError:
        if dtype not in (torch.bfloat16, torch.float16) or device.type != "cpu":
            raise
        return tile, 0


def columns(x: Tensor, weight: Tensor, batch_rows: int | None) -> Tensor:
    """x [N,in], all rows of a batch, times `weight` [out,in] transposed, [N,out]; a column has the
    same bits whatever other rows `weight` has."""
    if batch_rows is None:
        return F.linear(x, weight)
    d_out, d_in = weight.shape
    tile = tile_rows(batch_rows, COLUMNS * d_in)
    if not (x.is_cpu and columns_keep_bits(tile, d_in, x.dtype, torch.get_num_threads())):
        return torch.cat([product(x, row, batch_rows) for row in weight.split(1)], dim=1)
    if missing := -d_out % COLUMNS:
        weight = F.pad(weight, (0, 0, 0, missing))
    blocks = [product(x, block, batch_rows) for block in weight.split(COLUMNS)]
    return blocks[0][:, :d_out] if len(blocks) == 1 else torch.cat(blocks, dim=1)[:, :d_out]


def _multiply(tiles: Tensor, weight: Tensor) -> Tensor:
    """Tiles [count,tile,in] times `weight` [in,out], all rows below each other."""
    count, _, d_in = tiles.shape
    if count == 1:
        return tiles[0] @ weight
    return torch.bmm(tiles, weight.expand(count, d_in, -1)).flatten(0, 1)


def _missing_columns(weight: Tensor) -> int:
    """Columns that `weight` [out,in] lacks to be multiplied so that rows keep their bits: products
    whose rows do not start on lines of a cache are summed by where they start, on AMD's processors;
    and a single column is taken for a vector, and summed by where a row stands."""
    d_out = weight.shape[0]
    return -d_out % (LINE_BYTES // weight.element_size()) if weight.is_cpu else int(d_out == 1)


def _widened(weight: Tensor, missing: int) -> Tensor:
    """`weight` [out,in] with `missing` more columns, of any numbers: those that stand between its
    own, or a copy with 0."""
    d_out, d_in = weight.shape
    wide = d_out + missing
    end = weight.storage_offset() + (d_in - 1) * weight.stride(1) + wide
    is_held = end * weight.element_size() <= weight.untyped_storage().nbytes()
    if _is_spaced(weight) and is_held and not torch.is_grad_enabled():
        return weight.as_strided((wide, d_in), weight.stride())
    return F.pad(weight.T, (0, missing)).T


def _is_spaced(weight: Tensor) -> bool:
    """True if `weight` [out,in] lies by columns, each on lines of its own."""
    width = weight.shape[0] * weight.element_size()
    step = weight.stride(1) * weight.element_size()
    return weight.stride(0) == 1 and step >= width and step % LINE_BYTES == 0


def spaced(weight: Tensor) -> Tensor:
    """`weight` [out,in] by columns, each on lines of a processor's cache of its own, with a gap
    between them where all would start on the same few lines. Low tiles multiply up to twice as
    fast.
    """
    size = weight.element_size()
    if not weight.is_cpu or (_is_spaced(weight) and weight.stride(1) * size % STEP_BYTES):
        return weight
    d_out, d_in = weight.shape
    line = LINE_BYTES // size
    step = -(-d_out // line) * line
    if step * size % STEP_BYTES == 0:
        step += line
    columns = weight.new_zeros(d_in, step)[:, :d_out]
    return columns.copy_(weight.T).T


def silu(x: Tensor) -> Tensor:
    """x [n,.] times its sigmoid, bit for bit the same in whatever row. The library's own function
    rounds the last numbers, which do not fill a vector register, in another way."""
    threads = torch.get_num_threads()
    if _rows_fill_registers(x.shape[-1], x.dtype, x.device, threads):
        is_shared = x.is_cpu and x.numel() > WORK_PER_THREAD
        if is_shared and len(x) % threads:  # a row apart, so that threads have whole ones
            return torch.cat([F.silu(x[:-1]), F.silu(x[-1:])])
        return F.silu(x)
    wide = x if x.dtype == torch.float64 else x.float()
    below = torch.exp(-wide) + 1 if torch.is_grad_enabled() else torch.neg(wide).exp_().add_(1)
    return (wide / below).to(x.dtype)


@cache
def _rows_fill_registers(
    width: int, dtype: torch.dtype, device: torch.device, num_threads: int
) -> bool:
    """True if `F.silu` of rows so wide, which threads have as many of each, keeps their bits, by
    the way that work is cut up for threads and registers, and by trying."""
    is_even = num_threads <= 2 and width * dtype.itemsize % REGISTERS_BYTES == 0
    if device.type == "cpu" and not (is_even and width <= WORK_PER_THREAD):
        return False
    row = torch.randn(1, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    one = F.silu(row)
    most = 2 * num_threads * -(-WORK_PER_THREAD // width)
    return all(torch.equal(F.silu(row.repeat(n, 1)), one.expand(n, -1)) for n in (2, 4, most))


@cache
def columns_keep_bits(tile: int, d_in: int, dtype: torch.dtype, num_threads: int) -> bool:
    """True if a product's columns have the same bits wherever they stand among COLUMNS, and
    whatever the others are. Found by trying."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(tile, d_in, generator=generator).to(dtype)
    weight = torch.randn(d_in, COLUMNS, generator=generator).to(dtype)
    with torch.inference_mode():
        right = rows @ weight
        for place in range(COLUMNS):
            alone = torch.ones_like(weight)
            alone[:, place] = weight[:, 0]
            moved = rows @ weight.roll(place, 1)
            if not (
                torch.equal((rows @ alone)[:, place], right[:, 0])
                and torch.equal(moved.roll(-place, 1), right)
            ):
                return False
    return True


@cache
def _is_whole(
    count: int,
    tile: int,
    least: int,
    d_in: int,
    d_out: int,
    step: int,
    dtype: torch.dtype,
    device: torch.device,
    num_threads: int,
) -> bool:
    """True if so many tiles in one product, which is faster, have the bits that they have as tiles,
    whatever the other rows are. Found by trying; the other arguments are those of `least_tiles`."""
    if dtype not in (torch.float32, torch.float64) or tile * d_out < ENOUGH_ROWS or d_in < 32:
        return False  # too few numbers, or too rough, to tell another order of sums
    rows, weight = _to_try(0, (tile, d_in), d_out, step, dtype, device)
    with torch.inference_mode():
        right = _multiply(rows.expand(least + 1, -1, -1), weight)[:tile]
        x = rows.repeat(count, 1)
        found = (x @ weight).view(count, tile, d_out)
        if not torch.equal(found, right.expand_as(found)):
            return False
        x.view(count, tile, d_in)[:, 1::2] = math.inf
        found = (x @ weight).view(count, tile, d_out)[:, ::2]
        return torch.equal(found, right[::2].expand_as(found))


def _to_try(
    seed: int,
    shape: tuple[int, ...],
    d_out: int,
    step: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Random rows [...,in] and a matrix [in,out] whose rows begin `step` numbers apart. Every other
    row's products sum to nothing, so that what is left of them is how they were rounded, which
    tells another order of sums where half precision would hide it."""
    generator = torch.Generator(device).manual_seed(seed)
    *_, d_in = shape
    half = d_in // 2
    rows = torch.randn(shape, generator=generator, device=device).to(dtype)
    room = max(step, d_out)
    weight = torch.randn(d_in, room, generator=generator, device=device).to(dtype)
    weight[half : 2 * half] = weight[:half]
    cancelled = rows.view(-1, d_in)[1::2]
    cancelled[:, half : 2 * half] = -cancelled[:, :half]
    cancelled[:, 2 * half :] = 0
    return rows, weight[:, :d_out]


@cache
def least_tiles(
    tile: int,
    in_all: int | None,
    d_in: int,
    d_out: int,
    step: int,
    dtype: torch.dtype,
    device: torch.device,
    num_threads: int,
) -> int:
    """Number of tiles from which on a row's bits depend neither on their number nor on its place.

    Found by trying, with columns that begin `step` numbers apart; with several threads a library
    may cut one product up, but not many. A batch has `in_all` tiles, or more than are tried.
    Raises ConfigError if there is no such number on this machine.
    """
    most = in_all or max(MOST_TILES, 2 * num_threads)
    tiles = in_all or 2 * most
    if tiles * tile == 1:
        return 1  # a row by itself
    wrong: set[int] = set()
    compared = 0
    with torch.inference_mode():
        while compared < ENOUGH_NUMBERS:
            x, weight = _to_try(compared, (tiles, tile, d_in), d_out, step, dtype, device)
            right = _multiply(x, weight).view(tiles, tile, d_out)
            for count in range(1, most + 1):
                shift = count % tile  # within each tile
                expected = right.roll(shift, 1).flatten(0, 1)
                for place in {0, (tiles - count) // 2, tiles - count}:
                    found = _multiply(x[place : place + count].roll(shift, 1), weight)
                    if not torch.equal(found, expected[place * tile : (place + count) * tile]):
                        wrong.add(count)
                    compared += found.numel()
    least = max(wrong, default=0) + 1
    if least > most:
        raise ConfigError(
            f"On this machine, products of {tile} rows with a matrix of {d_in} x {d_out} "
            f"({dtype}, {num_threads} threads) depend on what is multiplied beside them, so that "
            "switching an expert off could not be exact. Use one thread."
        )
    return least
