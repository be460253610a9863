"""Public text among an owner's own: how much, in which order, and after a kill the same."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexolmo.data.batches import training_batches
from flexolmo.errors import CheckpointError, ConfigError
from flexolmo.model.loss import language_model_loss
from flexolmo.train import expert as room
from flexolmo.train.expert import ExpertRecipe, train_expert
from flexolmo.train.loop import TrainSettings

IN_SESSION = settings(
    derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
BRIEF = TrainSettings(
    steps=6, batch_size=3, seq_len=16, warmup_steps=2, checkpoint_every_seconds=1e-9
)


def recipe_of(replay, seed=0, **train):
    return ExpertRecipe(
        seed=seed,
        replay=replay,
        attention_rank=2,
        embedding_rank=2,
        head_rank=2,
        train=BRIEF.model_copy(update=train),
    )


@given(
    percent=st.integers(1, 99),
    batch_size=st.integers(1, 9),
    steps=st.integers(1, 40),
    seed=st.integers(0, 5),
)
@IN_SESSION
def test_the_stated_fraction_is_public_and_own_sequences_keep_their_order(
    pico_sets, percent, batch_size, steps, seed
):
    recipe = recipe_of(percent / 100, seed, batch_size=batch_size)
    batch_of_step = room._batches(pico_sets["maths"], pico_sets["public"], recipe)
    own, public = (
        training_batches(pico_sets[n], "train", 1, 16, seed) for n in ("maths", "public")
    )
    rows = np.concatenate([batch_of_step(step) for step in range(steps)])
    counts = {"own": 0, "public": 0}
    for place, row in enumerate(rows):
        is_own = np.array_equal(row, own.batch(counts["own"])[0])
        is_public = np.array_equal(row, public.batch(counts["public"])[0])
        assert is_own != is_public, place
        counts["own" if is_own else "public"] += 1
        assert counts["public"] == int(Fraction(percent, 100) * (place + 1))


def test_without_replay_the_batches_are_the_owners_alone(pico_sets):
    batch_of_step = room._batches(pico_sets["maths"], pico_sets["public"], recipe_of(0.0))
    expected = training_batches(pico_sets["maths"], "train", 3, 16, 0)
    for step in range(5):
        assert np.array_equal(batch_of_step(step), expected.batch(step))


def test_a_batch_depends_on_its_step_alone(pico_sets):
    one, other = (
        room._batches(pico_sets["maths"], pico_sets["public"], recipe_of(0.3)) for _ in range(2)
    )
    forwards = [one(step) for step in range(7)]
    for step in reversed(range(7)):
        assert np.array_equal(other(step), forwards[step])


def test_replay_without_a_public_set_is_refused(pico_anchor, pico_sets):
    with pytest.raises(ConfigError, match=r"replay is 0\.3: give the prepared public set"):
        train_expert(pico_anchor, pico_sets["maths"], "maths", recipe_of(0.3))


def test_interrupted_is_uninterrupted(pico_anchor, pico_sets, tmp_path, monkeypatch):
    recipe, public = recipe_of(0.4), pico_sets["public"]
    whole = train_expert(pico_anchor, pico_sets["maths"], "maths", recipe, public=public)
    calls = []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return language_model_loss(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(room, "language_model_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            train_expert(pico_anchor, pico_sets["maths"], "maths", recipe, tmp_path, public=public)
    torch.manual_seed(99)
    again = train_expert(pico_anchor, pico_sets["maths"], "maths", recipe, tmp_path, public=public)
    assert all(torch.equal(t, again.tensors[n]) for n, t in whole.tensors.items())
    without = train_expert(pico_anchor, pico_sets["maths"], "maths", recipe_of(0.0))
    assert not torch.equal(whole.tensors["lm_head.lora_b"], without.tensors["lm_head.lora_b"])


def test_another_public_set_is_another_run(pico_anchor, pico_sets, tmp_path):
    recipe = recipe_of(0.4)
    first = train_expert(
        pico_anchor, pico_sets["maths"], "maths", recipe, tmp_path, public=pico_sets["public"]
    )
    assert first.record["data"]["public"] == pico_sets["public"].digest
    with pytest.raises(CheckpointError, match="another recipe"):
        train_expert(
            pico_anchor, pico_sets["maths"], "maths", recipe, tmp_path, public=pico_sets["news"]
        )


def test_a_public_set_that_is_not_replayed_is_not_recorded(pico_anchor, pico_sets):
    expert = train_expert(
        pico_anchor, pico_sets["maths"], "maths", recipe_of(0.0), public=pico_sets["public"]
    )
    assert set(expert.record["data"]) == {"maths", "anchor"}
