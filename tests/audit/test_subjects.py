"""Models as attacks meet them, and which documents an expert has read."""

import numpy as np
import pytest

from flexolmo.audit.subjects import open_subjects
from flexolmo.audit.texts import read_members, tokens_read
from flexolmo.data.batches import training_batches
from flexolmo.errors import ConfigError, DataError, PolicyError
from flexolmo.train.budget import PrivacySettings
from flexolmo.train.expert import RECORDED, ExpertRecipe
from flexolmo.train.loop import TrainSettings
from made_attacks import WHOLE, build_attacked


def test_a_mixture_is_attacked_with_the_expert_on_and_off(attacked):
    subjects = attacked("code")
    alone, on, off, anchor = subjects.models
    assert (alone.name, alone.reader.enabled) == ("alone", ["maths"])
    assert alone.reference is anchor.reader
    assert (on.name, on.reader.enabled) == ("on", ["code", "maths"])
    assert on.reference is off.reader and off.reader.enabled == ["code"]
    assert off.reference is anchor.reader and anchor.reference is None
    assert anchor.reader.enabled is None and not subjects.is_alone
    assert attacked(only=["maths"]).is_alone


def test_an_expert_that_is_switched_off_is_attacked_as_it_is(attacked):
    subjects = attacked("code", without=["maths"])
    assert [s.name for s in subjects.models] == ["off", "anchor"]
    with pytest.raises(PolicyError):
        attacked("code", without=["nobody"])


@pytest.mark.parametrize("key", RECORDED)
def test_what_was_done_after_training_hides_no_recipe(house, pico_sets, tmp_path, key):
    data = pico_sets["maths"]
    mixture = build_attacked(house, data, tmp_path / "model", recorded={key: [{"rank": 4}]})
    assert open_subjects(mixture, data, house.trusted).recipe == WHOLE


def test_a_dense_model_is_held_against_another(house, pico_sets, pico_anchor_dir):
    data = pico_sets["maths"]
    subjects = open_subjects(house.anchor_dir, data, reference=pico_anchor_dir)
    assert [s.name for s in subjects.models] == ["model"]
    assert subjects.models[0].reference is not None and subjects.recipe is None
    with pytest.raises(ConfigError, match="no mixture"):
        open_subjects(house.anchor_dir, data, expert="maths")


def test_what_does_not_belong_together_is_refused(house, pico_sets, attacked, pico_anchor_dir):
    with pytest.raises(DataError, match="Attack it with the set"):
        open_subjects(house.mixture_dir(["maths"]), pico_sets["maths"], house.trusted)
    with pytest.raises(ConfigError, match="has no expert news; it holds maths"):
        open_subjects(house.mixture_dir(["maths"]), pico_sets["news"], house.trusted)
    with pytest.raises(ConfigError, match="its own reference"):
        attacked(reference=pico_anchor_dir)


@pytest.mark.parametrize("replay", [0.0, 0.5])
def test_tokens_that_training_read_are_those_of_its_batches(pico_sets, replay):
    data = pico_sets["maths"]
    train = TrainSettings(steps=3, batch_size=2, seq_len=16, warmup_steps=1)
    recipe = ExpertRecipe(train=train, seed=5, replay=replay)
    found = tokens_read(data, recipe)
    own = 6 if replay == 0 else 3
    batches = training_batches(data, "train", 1, 16, 5)
    for place in range(own):
        start = int(batches.windows(place)[0]) * 16
        assert found[start + 1 : start + 17].all()
    assert found.sum() == own * 16
    long = recipe.model_copy(update={"train": TrainSettings(steps=5000, batch_size=2, seq_len=16)})
    assert tokens_read(data, long).sum() == (len(found) - 1) // 16 * 16


def test_members_are_documents_that_training_read_whole(pico_sets):
    data = pico_sets["maths"]
    train = TrainSettings(steps=30, batch_size=2, seq_len=64, warmup_steps=1)
    recipe = ExpertRecipe(train=train)
    is_read = tokens_read(data, recipe)
    found = read_members(data, recipe, least=20, length=20, most=1000, seed=0)
    split = data.splits["train"]
    for i in range(split.num_documents):
        whole = is_read[split.offsets[i] : split.offsets[i] + 20].all()
        assert (i in {b.index for b in found}) == (whole and len(split.document(i)) >= 20)
    assert 0 < len(found) < split.num_documents
    private = recipe.model_copy(update={"privacy": PrivacySettings(epsilon=8)})
    every = read_members(data, private, least=20, length=20, most=1000, seed=0)
    assert len(every) == sum(len(split.document(i)) >= 20 for i in range(split.num_documents))
    some = read_members(data, recipe, least=20, length=20, most=2, seed=1)
    assert len(some) == 2 and {b.index for b in some} <= {b.index for b in found}
    for b in some:
        assert b.ids[0] == data.eos_id
        assert np.array_equal(b.ids[1:], split.document(b.index)[:20])
