"""Rows of a product keep their bits, whatever is multiplied beside them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.errors import ConfigError
from flexolmo.model import tiles
from flexolmo.model.tiles import MAX_TILE_ROWS, WHOLE_ROWS, in_tiles, product, silu, tile_rows

WIDTHS = st.sampled_from([1, 2, 3, 5, 8, 20, 32, 33, 70, 256])


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


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


def test_rows_keep_their_bits(threads):
    check_rows_keep_their_bits()


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
        for numbers in (100, 10**7):
            tile = tile_rows(batch_rows, numbers)
            assert 1 <= tile <= MAX_TILE_ROWS
            assert tile == batch_rows or batch_rows > WHOLE_ROWS
            if numbers == 100:
                assert in_tiles(batch_rows, batch_rows) % tile == 0


def test_a_machine_on_which_rows_do_not_keep_their_bits_is_refused(monkeypatch):
    def by_count(tiles_, weight):
        return (tiles_ * (1 + 1e-3 * len(tiles_))).flatten(0, 1) @ weight

    monkeypatch.setattr(tiles, "_multiply", by_count)
    with pytest.raises(ConfigError, match=r"depend on what is multiplied beside them.*one thread"):
        tiles.least_tiles.__wrapped__(8, 4, 5, torch.float32, torch.device("cpu"), 1)
