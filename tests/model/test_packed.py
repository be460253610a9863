"""Products with packed matrices: the numbers of the matrix, and rows that keep their bits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.errors import ConfigError
from flexolmo.model import packed
from flexolmo.model.onednn import IS_FASTER
from flexolmo.model.packed import pack
from made_layouts import linears, numbers_of
from made_threads import threads

pytestmark = pytest.mark.skipif(not IS_FASTER, reason="matrices are packed on AMD's processors")


@pytest.fixture
def tried_anew():
    """What was found by trying is forgotten, before and after."""
    packed._rows.cache_clear()
    yield
    packed._rows.cache_clear()


@given(
    widths=st.lists(st.sampled_from([1, 2, 5, 32, 40, 96]), min_size=1, max_size=3),
    d_in=st.sampled_from([1, 2, 33, 64, 300, 1376]),
    rows=st.one_of(st.integers(1, 70), st.sampled_from([127, 300, 512, 513, 1030, 2600])),
    num_threads=st.sampled_from([1, 2]),
    data=st.data(),
)
@settings(derandomize=True, max_examples=40, deadline=None)
def test_rows_have_the_matrices_products_and_keep_their_bits(widths, d_in, rows, num_threads, data):
    """However many are multiplied, at once or in parts."""
    draw = torch.Generator().manual_seed(rows)
    matrices = linears(widths, d_in, draw)
    x = torch.randn(rows, d_in, generator=draw)
    sizes = st.one_of(st.integers(1, 80), st.integers(500, 530))
    picked = torch.randint(rows, (data.draw(sizes),), generator=draw)
    with threads(num_threads), torch.no_grad():
        both = pack(matrices)
        found = both.times(x)
        assert torch.equal(both.times(x[picked]), found[picked])
        alone = both.times(x[:1], is_alone=True)
    torch.testing.assert_close(alone, found[:1], rtol=1e-4, atol=1e-4)
    right = (x.double() @ torch.cat([m.weight for m in matrices]).double().T).float()
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


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
    picked = torch.randint(rows, (1 + seed,), generator=draw)
    right = F.silu(x @ gate.weight.T) * (x @ up.weight.T)
    with threads(num_threads), torch.no_grad():
        both = pack(matrices)
        found = both.gated(x)
        assert torch.equal(both.gated(x[picked]), found[picked])
        alone = both.gated(x[:1], is_alone=True)
    torch.testing.assert_close(alone, found[:1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def test_no_rows_have_no_products():
    both = pack(linears([2, 5], 7, torch.Generator()))
    assert both.times(torch.ones(0, 7)).shape == (0, 7)


def test_a_row_that_is_alone_is_multiplied_alone(monkeypatch):
    both, seen, real = pack(linears([64, 64], 48, torch.Generator())), [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, w: seen.append(x.shape[1]) or real(x, w))
    both.times(torch.ones(1, 48), is_alone=True)
    both.gated(torch.ones(1, 48), is_alone=True)
    both.times(torch.ones(1, 48))
    assert seen == [1, 1]


def test_panels_are_made_for_a_row_that_is_alone():
    both = pack(linears([33, 5], 7, torch.Generator()))
    both.times(torch.ones(3, 7))
    assert "panels" not in vars(both)
    with torch.inference_mode():
        both.times(torch.ones(1, 7), is_alone=True)
    assert "panels" in vars(both) and not both.panels.is_inference()


def test_of_what_is_erased_no_number_is_left():
    """Nor of what stands between them in memory."""
    both = pack(linears([33, 5], 7, torch.Generator()))
    both.times(torch.ones(1, 7), is_alone=True)
    later = pack(linears([33, 5], 7, torch.Generator()))
    for own in (both, later):
        own.erase()
    assert later.times(torch.ones(1, 7), is_alone=True).isnan().all()
    assert all(numbers.isnan().all() for numbers in numbers_of(both))
    assert both.times(torch.zeros(5, 7)).isnan().all()


def test_a_library_whose_rows_know_their_place_is_refused(monkeypatch, tried_anew):
    both, real = pack(linears([33], 7, torch.Generator())), packed.multiply
    monkeypatch.setattr(packed, "multiply", lambda x, w: real(x, w) + torch.arange(len(x))[:, None])
    with pytest.raises(ConfigError, match="where they stand"):
        both.times(torch.ones(3, 7))


def test_rows_that_lose_their_bits_in_some_numbers_go_in_others(monkeypatch, tried_anew):
    both, real, seen = pack(linears([40], 9, torch.Generator())), packed.multiply, []

    def worse(x, w):
        seen.append(len(x))
        return real(x, w) + (1e-3 if len(x) not in (16, 20) else 0)

    monkeypatch.setattr(packed, "multiply", worse)
    for n, expected in ((20, [20]), (3, [16]), (35, [16, 16, 16])):
        both.times(torch.ones(n, 9))
        seen.clear()
        both.times(torch.ones(n, 9))
        assert seen == expected


def test_few_numbers_of_rows_are_tried(monkeypatch, tried_anew):
    tried = set()
    monkeypatch.setattr(packed, "_keeps_bits", lambda n, *kind: tried.add(n) or True)
    for n in range(5000):
        packed._rows(n, 64, 64, 1)
    assert len(tried) < 200 and max(tried) == 2048
    assert packed._rows(300, 64, 2**16, 1) == 300
    assert packed._rows(300, 65, 2**16, 1) == 256  # which would take long to try
    assert packed._rows(300, 65, 2**16, 4) == 300
