"""A router by ridge regression: solved from the enabled owners' sums and no other's."""

from itertools import chain, combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.errors import MergeError
from flexolmo.model.hidden_statistics import HiddenSums, gather
from flexolmo.model.router import PUBLIC, DiscriminantSettings, LinearSettings
from flexolmo.research.rivals.fitted_routers import set_row_lengths, set_rows, solve_ridge

OWNERS = ("amber", "basalt", "cobalt")
SUBSETS = list(chain.from_iterable(combinations(OWNERS, n) for n in range(4)))
L, D = 2, 5


def made_states(seed, name):
    """States [L,N,D] of one owner's text, from its name alone; texts differ in length."""
    rng = np.random.default_rng([seed, *name.encode()])
    shift = rng.normal(size=(L, 1, D)) * 2
    return rng.normal(size=(L, 20 + 10 * len(name), D)) + shift


def made_sums(seed, names=(PUBLIC, *OWNERS)):
    sums = {}
    for name in names:
        x = torch.from_numpy(made_states(seed, name))
        sums[name] = HiddenSums(x.shape[1], x.sum(1), x.mT @ x)
    return sums


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("ridge", [1e-4, 0.5])
def test_rows_minimise_the_squared_error_of_whose_text_it_is(subset, ridge):
    """Against least squares on every state, each text's weighted to count alike."""
    names, found = [PUBLIC, *subset], solve_ridge(made_sums(0), subset, ridge)
    assert list(found) == names
    for i in range(L):
        parts = [made_states(0, n)[i] for n in names]
        scaled = np.concatenate([x / np.sqrt(len(x)) for x in parts])
        labels = np.concatenate(
            [
                np.full((len(x), 1), 1 / np.sqrt(len(x))) * np.eye(len(names))[e]
                for e, x in enumerate(parts)
            ]
        )
        damping = ridge * (scaled**2).sum(0).mean()
        expected = np.linalg.lstsq(
            np.concatenate([scaled, np.sqrt(damping) * np.eye(D)]),
            np.concatenate([labels, np.zeros((D, len(names)))]),
        )[0]
        for e, name in enumerate(names):
            np.testing.assert_allclose(found[name][i], expected[:, e], rtol=1e-4, atol=1e-6)


@given(subset=st.sampled_from(SUBSETS), order=st.permutations(OWNERS), seed=st.integers(0, 99))
@settings(derandomize=True, max_examples=60)
def test_solved_without_an_owner_is_never_having_had_it(subset, order, seed):
    """Bit for bit, in whatever order owners came and are named."""
    everyone = made_sums(seed, [*order, PUBLIC])
    found = solve_ridge(everyone, [n for n in order if n in subset])
    never = solve_ridge(made_sums(seed, (PUBLIC, *subset)))
    assert found.keys() == never.keys() == {PUBLIC, *subset}
    assert all(torch.equal(found[n], never[n]) for n in found)


def test_rows_kept_from_all_owners_hold_a_trace_of_them():
    """Why they must be solved again: dropping a row is not leaving."""
    all_rows, without = (solve_ridge(made_sums(0), names) for names in (OWNERS, OWNERS[1:]))
    assert not any(torch.equal(all_rows[n], without[n]) for n in without)


def test_an_owner_without_sums_is_refused():
    with pytest.raises(MergeError, match=r"No sums of granite.*amber, basalt, cobalt, public"):
        solve_ridge(made_sums(0), ["amber", "granite"])


def test_a_mixture_reads_solved_rows(wild):
    names = [PUBLIC, *OWNERS]
    sums = {n: gather(wild.anchor.model, [wild.ids(1, 40, i).numpy()]) for i, n in enumerate(names)}
    model = wild.mixture(LinearSettings(has_bias=False), OWNERS)
    rows = solve_ridge(sums)
    set_rows(model, rows, scale=3.0)
    for i, mixture in enumerate(model.mixtures()):
        for name in names:
            assert torch.equal(mixture.router.row(name).weight[0], 3.0 * rows[name][i])
    with pytest.raises(AssertionError, match="linear"):
        set_rows(wild.mixture(DiscriminantSettings(), OWNERS), rows)


def test_rows_are_brought_to_one_length(wild):
    model = wild.mixture(LinearSettings(), OWNERS)
    before = [m.router.row(n).weight.clone() for m in model.mixtures() for n in model.expert_names]
    set_row_lengths(model, 2.0)
    after = [m.router.row(n).weight for m in model.mixtures() for n in model.expert_names]
    for row, was in zip(after, before, strict=True):
        assert row.norm() == pytest.approx(2.0, rel=1e-5)
        torch.testing.assert_close(row / row.norm(), was / was.norm())
