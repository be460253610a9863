"""The engine on a mixture's directory: its facts, its answers, and what a reload takes up."""

import shutil

import pytest

from flexolmo.errors import MergeError, PolicyError
from flexolmo.files import digest_file
from flexolmo.inference.decode import continue_ids
from flexolmo.inference.open_engine import open_engine
from flexolmo.inference.reader import OwnReader
from flexolmo.inference.sampling import Sampling
from flexolmo.merge.mixture import build_mixture, load_mixture, remove_experts
from made_engines import SMALL, ask, hear
from made_mixtures import NAMES

PROMPT = [5, 9, 2, 7, 11, 3]


@pytest.fixture
def model(house, tmp_path):
    """A mixture's directory, to be changed."""
    shutil.copytree(house.mixture_dir(NAMES), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def engine(house, model):
    engine = open_engine(model, lambda: house.trusted, SMALL)
    yield engine
    engine.close(0)


def test_facts_are_those_of_the_mixture_and_its_bundles(engine, house, model):
    mixture = load_mixture(model, house.trusted)
    assert engine.facts.experts == mixture.facts
    assert engine.facts.digest == digest_file(model / "mixture.json")
    assert engine.facts.start_ids == [mixture.model.config.eos_token_id]


@pytest.mark.parametrize("enabled", [(), ("amber",), ("basalt", "zinc"), NAMES])
def test_an_answer_is_that_of_a_model_of_its_experts_alone(engine, house, model, enabled):
    alone = load_mixture(model, house.trusted, experts=enabled)
    reader = OwnReader(alone.model, alone.tokenizer)
    greedy = Sampling(max_new_tokens=12, temperature=0)
    (expected,) = continue_ids(reader, [PROMPT], greedy)
    ids = [*reader.start, *PROMPT]
    asked = ask(ids, enabled, max_new_tokens=12, model_digest=engine.facts.digest)
    assert hear(engine, asked).tokens == expected


def test_a_reload_takes_up_what_is_there(engine, house, model):
    remove_experts(model, ["zinc"], house.trusted)
    facts = engine.reload()
    assert set(facts.experts) == {"amber", "basalt"}
    assert facts.digest == engine.facts.digest == digest_file(model / "mixture.json")
    with pytest.raises(PolicyError):
        engine.submit(ask([0, 1], ["zinc"], model_digest=facts.digest), print)


def test_a_reload_takes_no_other_bundle_of_a_serial_it_has_seen(engine, house, model, tmp_path):
    facts = engine.facts
    tensors = house.tensors("amber", "evidence")
    tensors["layers.0.up_proj.weight"] = tensors["layers.0.up_proj.weight"] * 1.01
    twin = house.write(tmp_path, "amber", tensors, "evidence")
    shutil.rmtree(model)
    build_mixture(house.anchor_dir, [twin], model, house.trusted)
    with pytest.raises(MergeError, match="serial 1"):
        engine.reload()
    assert engine.facts == facts
