"""A noised table in an owner's house: drawn once for a run, kept, and told of in the bundle."""

import stat

import numpy as np
import pytest
import safetensors.torch
import torch

from flexolmo.bundle.bundle import open_bundle
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.errors import CheckpointError, ConfigError
from flexolmo.merge.index import read_about
from flexolmo.merge.mixture import add_experts, build_mixture, load_mixture
from flexolmo.model.statistics import EvidenceSettings, count_tokens
from flexolmo.train import loop
from flexolmo.train.expert import (
    ExpertRecipe,
    load_expert,
    pack_expert,
    reroute_expert,
    save_expert,
    train_expert,
)
from flexolmo.train.first_router import NOISED_TABLE, start_router
from flexolmo.train.loop import TrainSettings
from flexolmo.train.rows import moved_rows
from flexolmo.train.shrink import compress_expert
from made_bundles import TERMS

LEVELS = "router.token_levels"


def recipe_of(epsilon, steps=3, **changes):
    router = EvidenceSettings(epsilon=epsilon, **{"level_nats": 0.1, "min_documents": 5} | changes)
    return ExpertRecipe(
        router=router,
        train=TrainSettings(
            steps=steps, batch_size=2, seq_len=16, warmup_steps=1, checkpoint_every_seconds=1e-9
        ),
    )


@pytest.fixture(scope="module")
def recipe():
    return recipe_of(8.0)


@pytest.fixture(scope="module")
def expert(pico_anchor, pico_sets, recipe):
    return train_expert(pico_anchor, pico_sets["maths"], "maths", recipe)


def test_a_resumed_training_keeps_its_table(pico_anchor, pico_sets, recipe, tmp_path, monkeypatch):
    """Cut off before its first step, then in the middle, then run once more when it is done."""
    data, run = pico_sets["maths"], tmp_path / "run"

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "compute_gradients", stop)
        with pytest.raises(KeyboardInterrupt):
            train_expert(pico_anchor, data, "maths", recipe, run)
    kept = run / NOISED_TABLE
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    first = safetensors.torch.load_file(kept)[LEVELS]
    with monkeypatch.context() as patch:
        real = loop.compute_gradients
        steps = []
        patch.setattr(
            loop,
            "compute_gradients",
            lambda *args: stop() if len(steps) == 2 else (steps.append(0), real(*args))[1],
        )
        with pytest.raises(KeyboardInterrupt):
            train_expert(pico_anchor, data, "maths", recipe, run)
    for _ in range(2):
        made = train_expert(pico_anchor, data, "maths", recipe, run)
        assert torch.equal(made.tensors[LEVELS], first)


def test_two_runs_of_one_seed_have_two_tables(pico_anchor, pico_sets, recipe, expert):
    again = train_expert(pico_anchor, pico_sets["maths"], "maths", recipe)
    assert not torch.equal(again.tensors[LEVELS], expert.tensors[LEVELS])


def test_the_kept_table_of_something_else_is_refused(pico_anchor, pico_sets, recipe, tmp_path):
    start_router(pico_anchor, pico_sets["maths"], recipe.router, run_dir=tmp_path)
    kept = (tmp_path / NOISED_TABLE).read_bytes()
    for data, router in (("news", recipe.router), ("maths", recipe_of(4.0).router)):
        with pytest.raises(CheckpointError, match="Give this run a directory of its own"):
            start_router(pico_anchor, pico_sets[data], router, run_dir=tmp_path)
    assert (tmp_path / NOISED_TABLE).read_bytes() == kept
    (tmp_path / NOISED_TABLE).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="holds no table"):
        start_router(pico_anchor, pico_sets["maths"], recipe.router, run_dir=tmp_path)


def test_without_an_epsilon_nothing_is_kept(pico_anchor, pico_sets, tmp_path):
    start_router(pico_anchor, pico_sets["maths"], EvidenceSettings(), run_dir=tmp_path)
    assert not any(tmp_path.iterdir())


def test_noise_that_hides_everything_is_refused(pico_anchor, pico_sets):
    coarse = EvidenceSettings(epsilon=0.01, level_nats=5.0)
    with pytest.raises(ConfigError, match=r"epsilon 0\.01 hides all that the 36 source documents"):
        start_router(pico_anchor, pico_sets["maths"], coarse)


def test_a_start_that_is_refused_draws_no_second_table(pico_anchor, pico_sets, tmp_path):
    """Or the table that is let through would be the luckiest of many."""
    coarse = EvidenceSettings(epsilon=0.01, level_nats=5.0)
    drawn = []
    for _ in range(2):
        with pytest.raises(ConfigError, match="hides all"):
            start_router(pico_anchor, pico_sets["maths"], coarse, run_dir=tmp_path)
        drawn.append((tmp_path / NOISED_TABLE).read_bytes())
    assert drawn[0] == drawn[1]


def test_a_run_whose_table_was_lost_does_not_go_on_with_another(
    pico_anchor, pico_sets, recipe, tmp_path
):
    train_expert(pico_anchor, pico_sets["maths"], "maths", recipe, tmp_path)
    (tmp_path / NOISED_TABLE).unlink()
    with pytest.raises(CheckpointError, match="belongs to a run with another recipe"):
        train_expert(pico_anchor, pico_sets["maths"], "maths", recipe, tmp_path)


def test_a_cut_moves_no_row_that_was_not_moved(pico_anchor, pico_sets, expert):
    cut = compress_expert(pico_anchor, expert, rank=3, delta_rank=3)
    closed = ~moved_rows(pico_anchor, expert.tensors)
    assert closed.any()
    for part in ("embed_tokens.lora_b", "lm_head.lora_b"):
        assert not cut.tensors[part][closed].any() and cut.tensors[part][~closed].any()


def held_by(data, size, least):
    split = data.splits["train"]
    return torch.from_numpy(count_tokens(split.tokens, split.source_offsets, size, 1) >= least)


def test_rows_of_rare_tokens_stay_the_anchors_though_all_are_told_of(
    pico_anchor, pico_sets, expert
):
    data = pico_sets["maths"]
    assert (expert.tensors[LEVELS] != -128).all()
    enough = held_by(data, len(expert.tensors[LEVELS]), 5)
    base = pico_anchor.model.embed_tokens.weight
    moved = ((expert.tensors["embed_tokens.weight"] - base) != 0).any(1)
    assert moved.any() and not (moved & ~enough).any()
    # and go back to them under a router for which they are too rare
    again = reroute_expert(expert, pico_anchor, data, recipe_of(8.0, min_documents=20).router)
    left = ((again.tensors["embed_tokens.weight"] - base) != 0).any(1)
    assert torch.equal(left, moved & held_by(data, len(enough), 20)) and (moved & ~left).any()


def test_owners_of_one_mixture_choose_their_own_epsilon(
    pico_anchor, pico_anchor_dir, pico_sets, owner_keys, trust_dir, expert, tmp_path
):
    """A bundle says what it is private to; the mixture's router says nothing of it."""
    save_expert(expert, tmp_path / "run")
    news = train_expert(pico_anchor, pico_sets["news"], "news", recipe_of(None))
    another = recipe_of(20.0, delta=1e-5).model_copy(update={"seed": 1})
    third = train_expert(pico_anchor, pico_sets["news"], "third", another)
    bundles = [
        pack_expert(
            made,
            tmp_path / f"{made.name}.bundle",
            owner_keys["Ann"],
            owner="Ann",
            licence="MIT",
            terms=TERMS,
        )
        for made in (load_expert(tmp_path / "run"), news, third)
    ]
    trusted = TrustedOwners.load(trust_dir)
    claims = [open_bundle(b, trusted).manifest.router.settings for b in bundles]
    assert [(c["epsilon"], c["delta"]) for c in claims] == [(8.0, 1e-6), (None, 1e-6), (20.0, 1e-5)]
    build_mixture(pico_anchor_dir, bundles[:2], tmp_path / "m", trusted)
    add_experts(tmp_path / "m", bundles[2:], trusted)
    router = read_about(tmp_path / "m")["router"]
    assert (router["epsilon"], router["delta"]) == (None, 1e-6)
    mixture = load_mixture(tmp_path / "m", trusted)
    assert mixture.expert_names == ["maths", "news", "third"]
    table = mixture.model.router.table("maths").table
    np.testing.assert_array_equal(table.token_levels, expert.tensors[LEVELS].numpy())
