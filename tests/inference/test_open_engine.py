"""The engine on a mixture's directory: its facts, its answers, and what a reload takes up."""

import shutil

import pytest

from flexolmo.bundle.trust import TrustedOwners
from flexolmo.errors import BundleError, MergeError, PolicyError
from flexolmo.files import digest_file
from flexolmo.inference.decode import continue_ids
from flexolmo.inference.open_engine import model_reader, open_engine
from flexolmo.inference.reader import OwnReader
from flexolmo.inference.sampling import Sampling
from flexolmo.merge.mixture import build_mixture, load_mixture, remove_experts
from flexolmo.model.assemble import expert_tensors
from made_engines import SMALL, ask, hear
from made_mixtures import NAMES
from made_owners import entry, revoke

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


def test_a_reader_takes_nothing_older_than_another_has_seen(house, model):
    seen = model_reader(model, lambda: house.trusted)().seen
    served = model_reader(model, lambda: house.trusted, seen=seen)()
    assert served.facts.experts.keys() == set(NAMES) and served.seen == seen
    seen["zinc"]["Bob"]["serial"] += 1
    with pytest.raises(MergeError, match="zinc: serial 1"):
        model_reader(model, lambda: house.trusted, seen=seen)()


@pytest.fixture
def trust(house, tmp_path):
    """Directory of trusted owners, in which Bob may revoke."""
    (tmp_path / "trust").mkdir()
    for owner, key in house.keys.items():
        shutil.copy(f"{key}.pub", tmp_path / "trust" / f"{owner}.pub")
    return tmp_path / "trust"


def revoke_zinc(house, trust):
    revoke(trust, house.keys["Bob"], entry("expert", name="zinc", up_to_serial=1), owner="Bob")


def is_without_zinc(engine, house):
    """True if the engine's answers are those of a model that never held zinc."""
    never = house.mixture(("amber", "basalt"))
    reader = OwnReader(never.model, never.tokenizer)
    (expected,) = continue_ids(reader, [PROMPT], Sampling(max_new_tokens=12, temperature=0))
    ids, digest = [*reader.start, *PROMPT], engine.facts.digest
    asked = ask(ids, ["amber", "basalt"], max_new_tokens=12, model_digest=digest)
    with pytest.raises(PolicyError, match="zinc is not served"):
        engine.submit(ask(ids, ["zinc"], model_digest=digest), print)
    return hear(engine, asked).tokens == expected


def test_an_engine_starts_and_reloads_without_an_expert_that_is_revoked(house, model, trust):
    whole = open_engine(model, lambda: TrustedOwners.load(trust), SMALL)
    revoke_zinc(house, trust)
    started = open_engine(model, lambda: TrustedOwners.load(trust), SMALL)
    facts = whole.reload()
    assert facts == started.facts and set(facts.experts) == {"amber", "basalt"}
    assert facts.barred["zinc"].why.startswith("zinc was revoked by its owner on 2026-11-23")
    assert facts.barred["zinc"].facts == load_mixture(model, house.trusted).facts["zinc"]
    for engine in (whole, started):
        assert is_without_zinc(engine, house)
        assert engine.stats().loaded_experts == ["amber", "basalt"]
        engine.close(0)


def test_who_is_gone_after_a_reload_is_told_with_the_reason_if_there_is_one(
    engine, house, model, trust
):
    former = engine.facts
    engine.close(0)
    remove_experts(model, ["basalt"], house.trusted)
    revoke_zinc(house, trust)
    facts = model_reader(model, lambda: TrustedOwners.load(trust))().facts
    assert facts.kept_from(former) == {"amber"}
    told = facts.tell_gone({"zinc", "basalt"})
    assert told.startswith("zinc was revoked by its owner on 2026-11-23: ")
    assert told.endswith(" Replaced or removed: basalt.")
    assert facts.tell_gone({"basalt"}) == "Replaced or removed: basalt."


def test_an_expert_that_is_withdrawn_and_then_left_out_stays_out(house, model, trust):
    engine = open_engine(model, lambda: TrustedOwners.load(trust), SMALL)
    engine.withdraw(["zinc"], "revoked")
    revoke_zinc(house, trust)
    engine.reload()
    assert is_without_zinc(engine, house)
    engine.close(0)


def test_what_does_not_hold_up_opens_no_engine_though_another_expert_is_revoked(
    house, model, trust
):
    revoke_zinc(house, trust)
    (model / "experts/amber.bundle/manifest.json").unlink()
    with pytest.raises(BundleError, match="amber"):
        open_engine(model, lambda: TrustedOwners.load(trust), SMALL)


def test_an_engine_of_some_experts_holds_no_others(house, model):
    engine = open_engine(model, lambda: house.trusted, SMALL, experts=["amber", "basalt"])
    assert is_without_zinc(engine, house)
    assert engine.stats().loaded_experts == ["amber", "basalt"]
    assert engine.facts.barred["zinc"].why == "zinc was not chosen to be loaded."
    remove_experts(model, ["basalt"], house.trusted)
    facts = engine.reload()
    assert (set(facts.experts), set(facts.barred)) == ({"amber"}, {"zinc"})
    engine.close(0)
    with pytest.raises(MergeError, match="No expert ambre here"):
        open_engine(model, lambda: house.trusted, SMALL, experts=["ambre"])


def test_nothing_of_a_withdrawn_expert_stays_in_memory(engine):
    prompt, digest = [0, *range(5, 45)], engine.facts.digest
    cached = []
    for enabled in (["amber"], ["amber", "zinc"]):
        hear(engine, ask(prompt, enabled, model_digest=digest))
        cached.append(engine.stats().cached_blocks)
    assert 0 < cached[0] < cached[1]
    engine.withdraw(["zinc"], "revoked")
    assert engine.stats().cached_blocks == cached[0]
    for tensor in expert_tensors(engine._stepper.model, "zinc").values():
        assert (tensor.isnan() if tensor.is_floating_point() else tensor == 0).all()
