"""Rows of a product keep their bits, whatever is multiplied beside them."""

from itertools import product as product_of

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.errors import ConfigError
from flexolmo.model import tiles
from flexolmo.model.tiles import MAX_TILE_ROWS, columns, in_tiles, product, silu, spaced, tile_rows
from made_threads import threads

WIDTHS = st.sampled_from([1, 2, 3, 5, 8, 20, 32, 33, 70, 256])


@pytest.fixture(params=[1, 2])
def some_threads(request):
    with threads(request.param):
        yield request.param


@given(
    batch_rows=st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 257, 600])),
    widths=st.tuples(WIDTHS, WIDTHS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    is_turned=st.booleans(),
    data=st.data(),
)
@settings(derandomize=True, max_examples=80, deadline=None)
def check_rows_keep_their_bits(batch_rows, widths, dtype, is_turned, data):
    d_in, d_out = widths
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(batch_rows, d_in, generator=draw).to(dtype)
    weight = torch.randn(d_out, d_in, generator=draw).to(dtype)
    weight = weight.T.contiguous().T if is_turned else weight  # as a model's are laid out, or not
    count = data.draw(st.integers(1, batch_rows))
    rows = torch.randperm(batch_rows, generator=draw)[:count]
    whole = product(x, weight, batch_rows)
    assert torch.equal(product(x[rows], weight, batch_rows), whole[rows])
    torch.testing.assert_close(whole, x @ weight.T, rtol=1e-2, atol=1e-2)
    other = x.clone()  # what else is in the batch is another text, or overflows
    other[[i for i in range(batch_rows) if i not in rows.tolist()]] = float("inf")
    assert torch.equal(product(other, weight, batch_rows)[rows], whole[rows])


def test_rows_keep_their_bits(some_threads):
    check_rows_keep_their_bits()


@pytest.mark.parametrize(
    ("batch_rows", "d_in", "d_out", "dtype"),
    [
        (2, 16, 2, torch.float32),  # so few numbers that another order of sums shows in few
        (6, 3, 5, torch.float32),
        (4, 2, 8, torch.float32),
        (183, 130, 512, torch.bfloat16),  # rounded so far that it shows in few
        (55, 1024, 128, torch.bfloat16),
    ],
)
def test_rows_keep_their_bits_where_few_numbers_tell(batch_rows, d_in, d_out, dtype, some_threads):
    for seed in range(60):
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(batch_rows, d_in, generator=draw).to(dtype)
        weight = torch.randn(d_in, d_out, generator=draw).to(dtype).T
        rows = torch.randperm(batch_rows, generator=draw)[: 1 + seed % batch_rows]
        whole = product(x, weight, batch_rows)
        assert torch.equal(product(x[rows], weight, batch_rows), whole[rows])


@given(
    batch_rows=st.integers(2, 60),
    half=st.sampled_from([2, 4, 8, 16, 50]),
    d_out=st.sampled_from([5, 32, 48, 64, 96, 257]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
@settings(derandomize=True, max_examples=80, deadline=None)
def check_sums_keep_their_order(batch_rows, half, d_out, dtype, seed):
    """Sums of nothing but how they were rounded, which half precision does not hide."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch_rows, half, generator=draw).to(dtype)
    weight = torch.randn(half, d_out, generator=draw).to(dtype)
    x, weight = torch.cat([x, -x], 1), torch.cat([weight, weight]).T
    rows = torch.randperm(batch_rows, generator=draw)[: 1 + seed % batch_rows]
    whole = product(x, weight, batch_rows)
    assert torch.equal(product(x[rows], weight, batch_rows), whole[rows])


def test_sums_keep_their_order(some_threads):
    check_sums_keep_their_order()


@given(
    d_in=st.integers(1, 40),
    d_out=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    is_cut_short=st.booleans(),
)
@settings(derandomize=True, max_examples=40, deadline=None)
def test_what_stands_between_columns_is_never_used(d_in, d_out, dtype, is_cut_short):
    draw = torch.Generator().manual_seed(d_in)
    x = torch.randn(5, d_in, generator=draw).to(dtype)
    weight = torch.randn(d_in, d_out, generator=draw).to(dtype).T
    found = spaced(weight)
    step = found.stride(1)
    numbers = torch.full((d_in * step,), float("nan"), dtype=dtype)
    if is_cut_short:  # memory ends with the last number
        numbers = numbers[: (d_in - 1) * step + d_out].clone()
    place = numbers.as_strided((d_out, d_in), (1, step))
    place.copy_(weight)
    with torch.no_grad():
        assert torch.equal(product(x, place, 5), product(x, found, 5))
        if missing := tiles._missing_columns(place):
            is_shared = tiles._widened(place, missing).data_ptr() == place.data_ptr()
            assert is_shared != is_cut_short
    assert torch.equal(product(x, place, 5), product(x, weight, 5))


@given(
    batch_rows=st.sampled_from([1, 2, 7, 16, 33, 300]),
    d_in=WIDTHS,
    d_out=st.integers(1, 40),
    data=st.data(),
)
@settings(derandomize=True, max_examples=40, deadline=None)
def test_columns_keep_their_bits_when_others_are_left_out(batch_rows, d_in, d_out, data):
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(batch_rows, d_in, generator=draw)
    weight = torch.randn(d_out, d_in, generator=draw)
    kept = sorted(data.draw(st.sets(st.integers(0, d_out - 1), min_size=1)))
    whole = columns(x, weight, batch_rows)
    assert torch.equal(columns(x, weight[kept], batch_rows), whole[:, kept])
    right = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(whole, right, rtol=1e-5, atol=1e-4)


@given(
    shape=st.sampled_from([(1024, 3), (2048, 5), (4096, 1), (1000, 7)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    batch_rows=st.sampled_from([1, 5, 40]),
)
@settings(derandomize=True, max_examples=20, deadline=None)
def test_a_gap_between_columns_changes_no_number_and_rows_keep_their_bits(shape, dtype, batch_rows):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(shape[1], shape[0], generator=draw).to(dtype).T
    found = spaced(weight)
    assert torch.equal(found, weight)
    step = found.stride(1) * found.element_size()
    assert step % 4096 and found.stride(0) == 1
    x = torch.randn(batch_rows, shape[1], generator=draw).to(dtype)
    whole = product(x, found, batch_rows)
    torch.testing.assert_close(whole, x @ weight.T, rtol=1e-2, atol=1e-2)
    assert torch.equal(product(x[-2:], found, batch_rows), whole[-2:])


@given(
    width=st.sampled_from([1, 33, 64, 96, 704, 1376]),
    rows=st.integers(1, 200),
    num_threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
@settings(derandomize=True, max_examples=60, deadline=None)
def test_silu_keeps_its_bits_in_whatever_row(width, rows, num_threads, seed):
    x = 4 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    place = seed % rows
    with threads(num_threads), torch.inference_mode():
        assert torch.equal(silu(x[place:]), silu(x)[place:])
        assert torch.equal(silu(x[place : place + 1].clone()), silu(x)[place : place + 1])
        assert torch.equal(silu(torch.cat([x, x], 1)[:, :width]), silu(x))


@given(length=st.integers(1, 100), start=st.integers(0, 40), seed=st.integers(0, 99))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_silu_keeps_its_bits_wherever_a_number_stands(length, start, seed):
    x = 4 * torch.randn(200, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        assert torch.equal(silu(x[start : start + length].clone()), silu(x)[start : start + length])
    assert torch.equal(silu(x), silu(x.requires_grad_(True)).detach())
    torch.testing.assert_close(silu(x), torch.nn.functional.silu(x))


def test_a_tile_depends_on_the_shapes_alone_and_holds_any_group():
    for batch_rows in range(1, 700):
        for numbers, device in product_of((100, 10**7), ("cpu", "cuda")):
            tile = tile_rows(batch_rows, numbers, torch.device(device))
            assert 1 <= tile <= MAX_TILE_ROWS
            if numbers == 100:
                assert in_tiles(batch_rows, batch_rows, torch.device(device)) % tile == 0


def by_count(tiles_, weight):
    """A library whose products depend on the number of tiles."""
    return (tiles_ * (1 + 1e-2 * len(tiles_))).flatten(0, 1) @ weight


@pytest.fixture
def tried_anew():
    """What was found by trying is forgotten, before and after."""
    for found in (tiles.least_tiles, tiles._tiles_of):
        found.cache_clear()
    yield
    for found in (tiles.least_tiles, tiles._tiles_of):
        found.cache_clear()


def test_half_precision_that_loses_bits_is_multiplied_in_float32(monkeypatch, tried_anew):
    real = tiles._multiply
    monkeypatch.setattr(
        tiles, "_multiply", lambda x, w: (by_count if x.dtype == torch.bfloat16 else real)(x, w)
    )
    x, weight = torch.randn(100, 30).bfloat16(), torch.randn(40, 30).bfloat16()
    found = product(x, weight, 100)
    assert torch.equal(found, product(x.float(), weight.float(), 100).bfloat16())
    assert torch.equal(product(x[7:9], weight, 100), found[7:9])


def test_a_machine_on_which_rows_do_not_keep_their_bits_is_refused(monkeypatch):
    monkeypatch.setattr(tiles, "_multiply", by_count)
    with pytest.raises(ConfigError, match=r"depend on what is multiplied beside them.*one thread"):
        tiles.least_tiles.__wrapped__(8, None, 4, 5, 5, torch.float32, torch.device("cpu"), 1)
