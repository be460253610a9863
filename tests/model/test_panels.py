"""Products with panels: the numbers of the matrix, and rows that keep their bits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.errors import ConfigError
from flexolmo.model import panels
from flexolmo.model.panels import PANEL_ROWS, cut
from made_layouts import linears
from made_threads import threads


@pytest.fixture
def tried_anew():
    """What was found by trying is forgotten, before and after."""
    panels._rows.cache_clear()
    yield
    panels._rows.cache_clear()


@given(
    widths=st.lists(st.sampled_from([2, 5, 32, 40, 96]), min_size=1, max_size=3),
    d_in=st.sampled_from([1, 2, 33, 64, 300, 1376]),
    rows=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 192, 300])),
    num_threads=st.sampled_from([1, 2]),
    data=st.data(),
)
@settings(derandomize=True, max_examples=40, deadline=None)
def test_rows_have_the_matrices_products_and_keep_their_bits(widths, d_in, rows, num_threads, data):
    """However many are multiplied: from panels, with the matrix, or a part at a time."""
    draw = torch.Generator().manual_seed(rows)
    matrices = linears(widths, d_in, draw)
    weights = [m.weight.clone() for m in matrices]
    x = torch.randn(rows, d_in, generator=draw)
    sizes = st.one_of(st.integers(1, 20), st.integers(PANEL_ROWS, 2 * PANEL_ROWS))
    picked = torch.randint(rows, (data.draw(sizes),), generator=draw)
    with threads(num_threads), torch.no_grad():
        both = cut(matrices)
        found = both.times(x)
        assert torch.equal(both.times(x[picked]), found[picked])
    right = (x.double() @ torch.cat(weights).double().T).float()
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(m.weight, w) for m, w in zip(matrices, weights, strict=True))


@given(
    half=st.sampled_from([5, 32, 70, 96, 1056]),
    rows=st.integers(1, 150),
    num_threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
@settings(derandomize=True, max_examples=40, deadline=None)
def test_halves_are_gated_alike_for_few_rows_and_for_many(half, rows, num_threads, seed):
    draw = torch.Generator().manual_seed(seed)
    gate, up = matrices = linears([half, half], 64, draw)
    x = torch.randn(rows, 64, generator=draw)
    picked = torch.randint(rows, (1 + seed % (2 * PANEL_ROWS),), generator=draw)
    right = F.silu(x @ gate.weight.T) * (x @ up.weight.T)
    with threads(num_threads), torch.no_grad():
        both = cut(matrices)
        found = both.gated(x)
        assert torch.equal(both.gated(x[picked]), found[picked])
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def test_no_rows_have_no_products():
    both = cut(linears([2, 5], 7, torch.Generator()))
    assert both.times(torch.ones(0, 7)).shape == (0, 7)


def test_matrices_and_what_is_multiplied_are_one_memory():
    first, second = linears([3, 4], 6, torch.Generator())
    both = cut([first, second])
    second.weight.data[1, 2] = 9
    assert both.matrix[2, 4] == 9


def test_a_library_whose_rows_know_their_place_is_refused(monkeypatch, tried_anew):
    both, real = cut(linears([33], 7, torch.Generator())), torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, w: real(x, w) + torch.arange(x.shape[1])[:, None])
    with pytest.raises(ConfigError, match="where they stand"):
        both.times(torch.ones(3, 7))


def test_rows_that_lose_their_bits_in_some_numbers_are_multiplied_otherwise(
    monkeypatch, tried_anew
):
    """Alone, in large numbers, or wherever the matrix is multiplied itself."""
    both, real = cut(linears([40], 9, torch.Generator())), torch.bmm
    multiply, seen = panels._multiply, []

    def worse(x, w):
        return real(x, w) + (1e-3 if x.shape[1] < 5 or x.shape[1] > PANEL_ROWS else 0)

    def note(x, matrix, cut_matrix):
        seen.append(len(x))
        is_bad = PANEL_ROWS < len(x) < 60
        return multiply(x, matrix, cut_matrix) + (1e-3 if is_bad else 0)

    monkeypatch.setattr(torch, "bmm", worse)
    monkeypatch.setattr(panels, "_multiply", note)
    monkeypatch.setattr(panels, "MOST_ROWS", 512)
    x = torch.randn(514, 9)
    for n in (1, 2, 7, 20, 50, 70, 514):
        both.times(x[:n])
        seen.clear()
        torch.testing.assert_close(both.times(x[:n]), x[:n] @ both.matrix)
        if n == 50:
            assert seen == [PANEL_ROWS, 50 - PANEL_ROWS]
        if n == 70:
            assert seen == [72]
        if n == 514:
            assert seen == [512, 5]
