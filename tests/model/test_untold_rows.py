"""Rows of a head at tokens that its owner's table does not tell of, beside the anchor."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.model.assemble import assemble_mixture, expert_tensors
from flexolmo.model.shape import TOKEN_LEVELS
from flexolmo.model.statistics import UNTOLD, EvidenceSettings
from flexolmo.model.untold_rows import RAREST, find_untold_rows
from flexolmo.train.rows import hide_rows

ROUTER = EvidenceSettings()
IN_SESSION = settings(derandomize=True, max_examples=25)


def expert_of(wild, seed, rank, is_told):
    """Random tensors, whose table tells of the tokens `is_told` alone and lists no pair."""
    tensors = wild.expert(ROUTER, seed, embedding_rank=rank, head_rank=rank, num_bigrams=0)
    levels = torch.randint(
        -9, 9, is_told.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8
    )
    tensors[TOKEN_LEVELS] = levels.where(is_told, torch.tensor(UNTOLD, dtype=torch.int8))
    return tensors | hide_rows(wild.anchor, tensors)


def head_of(wild, tensors):
    """What the expert's head is, [V,D]: its matrix, or the anchor's and its delta."""
    if "lm_head.weight" in tensors:
        return tensors["lm_head.weight"].double()
    delta = tensors["lm_head.lora_b"].double() @ tensors["lm_head.lora_a"].double()
    return wild.anchor.model.lm_head.weight.double() + delta


@IN_SESSION
@given(seed=st.integers(0, 9), rank=st.sampled_from([3, 32]), told=st.floats(0.05, 0.95))
def test_they_all_move_by_the_mean_move_of_the_rarest_told_of(wild, seed, rank, told):
    """A plainer program, token by token. So no row shows whether its own token is in the text."""
    size = wild.anchor.config.vocab_size
    is_told = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < told
    tensors = expert_of(wild, seed, rank, is_told)
    model = assemble_mixture(wild.anchor, {"amber": tensors}, ROUTER)
    found = {n: t.detach() for n, t in expert_tensors(model, "amber").items()}
    assert all(torch.equal(found[n], t) for n, t in tensors.items() if "lm_head" not in n)

    base = wild.anchor.model.lm_head.weight.detach().double()
    before, after = head_of(wild, tensors), head_of(wild, found)
    frequency = {
        token: float(wild.anchor.public.unigram[token])
        + ROUTER.level_nats * int(tensors[TOKEN_LEVELS][token])
        for token in range(size)
        if is_told[token]
    }
    rarest = sorted(frequency, key=lambda token: frequency[token])
    rarest = rarest[: math.ceil(RAREST * len(rarest))]
    step = sum(before[token] - base[token] for token in rarest) / len(rarest)
    for token in range(size):
        expected = before[token] if is_told[token] else base[token] + step
        torch.testing.assert_close(after[token], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(after[is_told], before[is_told])
    assert step.abs().max() > 0.01


@IN_SESSION
@given(seed=st.integers(0, 9), rank=st.sampled_from([3, 32]))
def test_what_moved_goes_back_bit_for_bit(wild, seed, rank):
    is_told = torch.rand(
        wild.anchor.config.vocab_size, generator=torch.Generator().manual_seed(seed)
    ).ge(0.5)
    tensors = expert_of(wild, seed, rank, is_told)
    model = assemble_mixture(wild.anchor, {"amber": tensors}, ROUTER)
    rows = find_untold_rows(model, "amber")
    moved = rows.matrix.detach()
    back = rows.put_back(moved)
    assert torch.equal(back, tensors[rows.key]) and not torch.equal(back, moved)
    rows.move(back)
    assert torch.equal(back, moved)


@pytest.mark.parametrize("rank", [3, 32])
def test_where_no_row_has_moved_none_moves(wild, rank):
    """So an expert begins its training as the anchor, bit for bit."""
    is_told = torch.arange(wild.anchor.config.vocab_size) % 3 > 0
    tensors = expert_of(wild, 0, rank, is_told)
    tensors |= hide_rows(wild.anchor, tensors, torch.zeros_like(is_told))
    found = expert_tensors(assemble_mixture(wild.anchor, {"amber": tensors}, ROUTER), "amber")
    assert all(torch.equal(found[n], t) for n, t in tensors.items())


@pytest.mark.parametrize("what", ["a noised table", "nothing told of", "no head of its own"])
def test_nothing_moves_where_there_is_nothing_to_go_by(wild, what):
    size = wild.anchor.config.vocab_size
    is_told = torch.full((size,), what == "a noised table")
    tensors = expert_of(wild, 0, 32, is_told)
    if what == "no head of its own":
        tensors = wild.expert(ROUTER, 0)
    model = assemble_mixture(wild.anchor, {"amber": tensors}, ROUTER)
    assert find_untold_rows(model, "amber") is None
    found = expert_tensors(model, "amber")
    assert all(torch.equal(found[n], t) for n, t in tensors.items())


def test_anothers_expert_changes_none_of_them(wild):
    is_told = torch.arange(wild.anchor.config.vocab_size) % 3 > 0
    own, other = (expert_of(wild, seed, 32, is_told.roll(seed)) for seed in (0, 1))
    alone = assemble_mixture(wild.anchor, {"amber": own}, ROUTER)
    both = assemble_mixture(wild.anchor, {"amber": own, "zinc": other}, ROUTER)
    key = "lm_head.weight"
    assert torch.equal(expert_tensors(alone, "amber")[key], expert_tensors(both, "amber")[key])
