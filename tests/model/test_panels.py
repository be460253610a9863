"""Products with panels: the numbers of the matrix, and rows that keep their bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.errors import ConfigError
from flexolmo.model import panels
from flexolmo.model.panels import WIDTH, beside, cut_panels, panel_product


@given(
    widths=st.lists(st.sampled_from([1, 5, 32, 40, 96]), min_size=1, max_size=3),
    d_in=st.sampled_from([1, 2, 33, 64, 300]),
    rows=st.integers(1, 70),
    threads=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
@settings(derandomize=True, max_examples=60, deadline=None)
def test_rows_have_the_matrices_products_and_keep_their_bits(
    widths, d_in, rows, threads, dtype, data
):
    draw = torch.Generator().manual_seed(rows)
    weights = [torch.randn(w, d_in, generator=draw).to(dtype) for w in widths]
    x = torch.randn(rows, d_in, generator=draw).to(dtype)
    picked = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=20)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cut = cut_panels(weights)
        found = panel_product(x, cut)
        assert torch.equal(panel_product(x[picked], cut), found[:, picked])
    finally:
        torch.set_num_threads(before)
    counts = [-(-w // WIDTH) for w in widths]
    for weight, part in zip(weights, found.split(counts), strict=True):
        right = (x.double() @ weight.double().T).to(dtype)
        columns = beside(part)
        torch.testing.assert_close(columns[:, : len(weight)], right, rtol=1e-4, atol=1e-4)
        assert not columns[:, len(weight) :].any(), "what fills a panel up is 0"


def test_no_rows_have_no_products():
    assert panel_product(torch.ones(0, 7), torch.ones(2, 7, WIDTH)).shape == (2, 0, WIDTH)


def test_a_library_whose_rows_know_their_place_is_refused(monkeypatch):
    real = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, w: real(x, w) + torch.arange(x.shape[1])[:, None])
    panels._keeps_bits.cache_clear()
    try:
        with pytest.raises(ConfigError, match="where they stand"):
            panel_product(torch.ones(3, 7), torch.ones(2, 7, WIDTH))
    finally:
        panels._keeps_bits.cache_clear()


def test_rows_that_lose_their_bits_alone_or_in_large_numbers_are_multiplied_otherwise(monkeypatch):
    real = torch.bmm

    def worse(x, w):
        return real(x, w) + (1e-3 if x.shape[1] < 3 or x.shape[1] > 20 else 0)

    monkeypatch.setattr(torch, "bmm", worse)
    panels._keeps_bits.cache_clear()
    try:
        x, cut = torch.randn(50, 9), torch.randn(2, 9, WIDTH)
        for rows in (x[:1], x[:2], x[:7], x):
            torch.testing.assert_close(panel_product(rows, cut), torch.matmul(rows, cut))
    finally:
        panels._keeps_bits.cache_clear()
