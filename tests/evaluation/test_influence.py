"""Experts that take other people's text, and those that do not."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.bundle.limits import parse_limits
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.data.batches import evaluation_windows
from flexolmo.data.forms import FORMS
from flexolmo.errors import ConfigError, DataError, MergeError
from flexolmo.evaluation import influence as room
from flexolmo.evaluation.influence import (
    EXAMPLE,
    MEASURES,
    admission,
    check_bundles,
    form_windows,
    refuse_excess,
    values_of,
    worst,
)
from flexolmo.evaluation.likelihood import read_windows
from flexolmo.files import read_json, write_json
from flexolmo.inference import own_text
from flexolmo.inference.own_text import own_windows
from flexolmo.merge.index import read_about
from flexolmo.merge.mixture import add_experts, build_mixture, load_mixture, remove_experts
from flexolmo.model.assemble import anchor_matrix
from flexolmo.model.shape import (
    BIGRAM_KEYS,
    BIGRAM_LEVELS,
    TOKEN_LEVELS,
    architecture_of,
    shape_of_tensors,
)
from flexolmo.model.statistics import EvidenceSettings, fit_table
from flexolmo.train.expert import ExpertRecipe, pack_expert, train_expert
from flexolmo.train.loop import TrainSettings
from made_bundles import TERMS
from made_mixtures import tree

ROUTER = EvidenceSettings(min_documents=3)
BRIEF = TrainSettings(steps=40, batch_size=4, seq_len=32, warmup_steps=2, learning_rate=0.01)
LIMITS = {"public": 0.02, "forms": 0.03, "others": 0.03, "claims": 0.2}


@pytest.fixture(scope="module", autouse=True)
def less_text():
    """A fraction of the text, for speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "PUBLIC_BYTES", 3000)
        patch.setattr(room, "FORM_BYTES", 300)
        patch.setattr(room, "OWN_SEQUENCES", 12)
        patch.setattr(room, "OWN_TOKENS", 24)
        yield


@pytest.fixture(scope="module")
def town(pico_anchor, pico_anchor_dir, pico_sets, owner_keys, tmp_path_factory):
    """Bundles of two honest owners and of hostile ones, by name."""
    where = tmp_path_factory.mktemp("town")
    recipe = ExpertRecipe(router=ROUTER, train=BRIEF)
    experts = {
        name: train_expert(pico_anchor, pico_sets[name], name, recipe) for name in ("maths", "news")
    }
    config, public = pico_anchor.config, pico_anchor.public

    def table(name: str, min_documents: int) -> dict[str, torch.Tensor]:
        split = pico_sets[name].splits["train"]
        settings = ROUTER.model_copy(update={"min_documents": min_documents})
        found = fit_table(split.tokens, split.source_offsets, public, settings)
        parts = (found.token_levels, found.keys, found.pair_levels)
        keys = (TOKEN_LEVELS, BIGRAM_KEYS, BIGRAM_LEVELS)
        return {k: torch.from_numpy(t) for k, t in zip(keys, parts, strict=True)}

    def noise(table: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
        """An expert of that table which knows nothing."""
        generator = torch.Generator().manual_seed(len(table[BIGRAM_KEYS]))
        is_told = (table[TOKEN_LEVELS] != -128)[:, None]
        found = dict(table)
        for key, own in experts["news"].tensors.items():
            if key not in table:
                base = anchor_matrix(pico_anchor, key.removesuffix(".weight"))
                drawn = torch.randn(own.shape, generator=generator) * base.std() * scale
                held = key.startswith(("embed_tokens", "lm_head"))
                found[key] = base.detach() + (drawn.where(is_told, 0.0) if held else drawn)
        return found

    news = {k: v for k, v in experts["news"].tensors.items() if "router." in k}
    hostile = {
        "everything": noise(table("public", 1), 1.0),
        "rival": noise(table("news", 2), 1.0),
        "huge": noise(table("public", 3), 1000.0),
        "copy": noise(news | {TOKEN_LEVELS: news[TOKEN_LEVELS].clone()}, 1.0),
    }
    copied = hostile["copy"][TOKEN_LEVELS]  # one level apart, so that its digest is another
    copied[(copied > -100).nonzero()[0]] -= 1

    def pack(name: str, tensors: dict[str, torch.Tensor]):
        shape = shape_of_tensors({k: tuple(t.shape) for k, t in tensors.items()}, config)
        like = experts["news"]
        return pack_expert(
            replace(like, name=name, tensors=tensors, architecture=architecture_of(config, shape)),
            where / f"{name}.bundle",
            owner_keys["Ann"],
            owner="Ann",
            licence="MIT",
            terms=TERMS,
        )

    everyone = {name: e.tensors for name, e in experts.items()} | hostile
    bundles = {name: pack(name, tensors) for name, tensors in everyone.items()}
    keys = TrustedOwners.from_keys({"Ann": (owner_keys["Ann"].parent / "Ann.pub").read_bytes()})
    return SimpleNamespace(
        bundles=bundles, anchor=pico_anchor_dir, trusted=keys, public=pico_sets["public"]
    )


@pytest.fixture(scope="module")
def honest(town):
    return check_bundles(
        [town.bundles["maths"], town.bundles["news"]],
        town.public,
        town.trusted,
        anchor_dir=town.anchor,
        seed=5,
    )


@pytest.fixture(scope="module")
def village(town, tmp_path_factory):
    """A mixture of the honest two, with limits; do not change it in place."""
    out = tmp_path_factory.mktemp("village") / "model"
    bundles = [town.bundles["maths"], town.bundles["news"]]
    judge = admission(town.public, LIMITS, seed=5)
    build_mixture(town.anchor, bundles, out, town.trusted, admission=judge)
    return out


# --- measuring ----------------------------------------------------------------------------------


def test_every_expert_is_measured_on_every_text(honest, town):
    assert honest["newcomers"] == ["maths", "news"]
    assert honest["public_digest"] == town.public.digest
    for name, found in honest["experts"].items():
        assert set(found) == {"public", "forms", "others"}
        assert len(found["forms"]) > 8 and found["forms"].keys() <= FORMS.keys()
        assert found["others"].keys() == {"maths", "news"} - {name}
        assert 0 < found["public"]["weight"] < 0.1
    assert json.loads(json.dumps(honest)) == honest


def test_measures_are_those_of_reading_by_hand(town, village, honest):
    mixture = load_mixture(village, town.trusted)
    near = partial(pytest.approx, abs=1e-7)  # texts that are read together round otherwise

    def bits(windows, on):
        return read_windows(mixture.model, windows, enabled=on).bits_per_byte

    sizes = room.OWN_SEQUENCES, room.OWN_TOKENS
    written = own_windows(mixture, *sizes, seed=5, names=["maths", "news"])["news"]
    found = honest["experts"]["maths"]["others"]["news"]
    pair = read_windows(mixture.model, written, enabled=["maths", "news"])
    assert found["change"] == near(pair.bits_per_byte / bits(written, ["news"]) - 1)
    assert found["weight"] == near(pair.routing[0][1])
    plain = list(evaluation_windows(town.public, "validation", 256, room.PUBLIC_BYTES))
    found = honest["experts"]["maths"]["public"]
    with_it = read_windows(mixture.model, plain, enabled=["maths"])
    assert found["change"] == near(with_it.bits_per_byte / bits(plain, []) - 1)
    assert found["weight"] == near(with_it.routing[0][1])
    together = honest["together"]["public"]["change"]
    assert together == near(bits(plain, None) / bits(plain, []) - 1)
    for form, windows in form_windows(town.public, mixture.tokenizer, 256, 5).items():
        texts = [mixture.tokenizer.decode(ids[1:].tolist()) for ids, _ in windows]
        assert [size for _, size in windows] == [len(text.encode()) for text in texts]
        assert all(ids[0] == mixture.tokenizer.eos_id for ids, _ in windows)
        change = bits(windows, ["news"]) / bits(windows, []) - 1
        assert honest["experts"]["news"]["forms"][form]["change"] == near(change)


def test_forms_are_of_text_that_nobody_trained_on(town, village):
    tokenizer = load_mixture(village, town.trusted).tokenizer
    split = town.public.splits["validation"]
    documents = [tokenizer.decode(split.document(i).tolist()) for i in range(split.num_documents)]
    for ids, _ in form_windows(town.public, tokenizer, 256, 0)["lines"]:
        lines = tokenizer.decode(ids[1:].tolist()).split("\n")
        assert any(all(line in text for line in lines if line) for text in documents)


def test_the_seed_decides_what_is_written(town, monkeypatch):
    monkeypatch.setattr(room, "PUBLIC_BYTES", 300)
    monkeypatch.setattr(room, "OWN_SEQUENCES", 2)
    bundles = [town.bundles["maths"], town.bundles["news"]]
    drawn = [
        check_bundles(bundles, town.public, town.trusted, anchor_dir=town.anchor) for _ in range(2)
    ]
    assert drawn[0]["seed"] != drawn[1]["seed"]
    others = [found["experts"]["maths"]["others"]["news"]["change"] for found in drawn]
    assert others[0] != others[1]


def test_an_expert_writes_its_own_text_and_leaves_the_model_as_it_was(town, village):
    mixture = load_mixture(village, town.trusted)
    ids = torch.arange(1, 60)[None]
    before = mixture.model(ids)
    written = own_windows(mixture, sequences=8, tokens=120)
    assert torch.equal(mixture.model(ids), before)
    for name in mixture.expert_names:
        bits = {
            n: read_windows(mixture.model, written[name], enabled=[n]).bits_per_byte
            for n in mixture.expert_names
        }
        assert min(bits, key=bits.__getitem__) == name


def test_a_router_is_put_back_when_writing_fails(town, village, monkeypatch):
    mixture = load_mixture(village, town.trusted)
    router = mixture.model.router

    def fail(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(own_text, "continue_ids", fail)
    with pytest.raises(RuntimeError):
        own_windows(mixture, sequences=1, tokens=4)
    assert mixture.model.router is router is not None


def test_an_expert_of_no_finite_number_is_refused_by_name(town, village):
    mixture = load_mixture(village, town.trusted)
    head = mixture.model.lm_head.deltas.of("news").weight
    head.fill_(math.nan)
    with pytest.raises(MergeError, match="news: gives NaN"):
        own_windows(mixture, sequences=2, tokens=4)


def test_a_text_whose_bits_are_no_number_is_refused(town, monkeypatch):
    def broken(*args, **options):
        found = read_windows(*args, **options)
        found.log_probs[-1][:] = math.nan
        return found

    monkeypatch.setattr(room, "read_windows", broken)
    with pytest.raises(MergeError, match=r"With .+ on, text of .+ has NaN or infinity"):
        check_bundles([town.bundles["news"]], town.public, town.trusted, anchor_dir=town.anchor)


def test_what_cannot_be_measured_is_no_zero(town, tmp_path):
    found = {"forms": {}, "others": {}, "public": {"change": 0.0, "weight": 0.0}}
    assert worst(found, "forms") == worst(found, "others") == (None, "")
    assert values_of(found)["forms"] == "–"
    influence = {"experts": {"x": found}}
    refuse_excess(influence, {"others": 0.0, "public": 0.0}, ["x"])  # there is no other
    with pytest.raises(MergeError, match="x: forms could not be measured"):
        refuse_excess(influence, {"forms": 0.9}, ["x"])
    nothing = replace(town.public.splits["validation"], bytes=np.zeros(0), offsets=np.zeros(1))
    empty = replace(town.public, splits=town.public.splits | {"validation": nothing})
    with pytest.raises(DataError, match="no text in its validation split"):
        check_bundles([town.bundles["news"]], empty, town.trusted, anchor_dir=town.anchor)


# --- limits -------------------------------------------------------------------------------------


@given(
    st.dictionaries(
        st.sampled_from(sorted(MEASURES)), st.integers(0, 10_000).map(lambda n: n / 100), min_size=1
    )
)
def test_limits_are_read_in_percent_and_as_numbers(limits):
    percent = ",".join(f" {k} <= {v}%" for k, v in limits.items())
    assert parse_limits(percent, MEASURES, EXAMPLE) == {k: v / 100 for k, v in limits.items()}
    assert (
        parse_limits(",".join(f"{k}<={v}" for k, v in limits.items()), MEASURES, EXAMPLE) == limits
    )


@pytest.mark.parametrize(
    "text", ["", "public", "public<1%", "public<=-1%", "public<=1%,public<=2%", "all<=1%"]
)
def test_what_is_no_limit_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"is not a limit.*public<=1%,forms"):
        parse_limits(text, MEASURES, EXAMPLE)


@pytest.mark.parametrize(
    "name, measures",
    [("everything", ("public", "forms")), ("huge", ("claims",)), ("rival", ("others",))],
)
def test_a_hostile_expert_is_refused_and_nothing_has_changed(
    town, village, tmp_path, name, measures
):
    before = tree(village)
    judge = admission(town.public, {measure: LIMITS[measure] for measure in measures})
    with pytest.raises(MergeError) as added:
        add_experts(village, [town.bundles[name]], town.trusted, admission=judge)
    assert tree(village) == before
    bundles = [town.bundles[n] for n in ("maths", "news", name)]
    with pytest.raises(MergeError) as built:
        build_mixture(town.anchor, bundles, tmp_path / "m", town.trusted, admission=judge)
    assert not list(tmp_path.iterdir())
    for refused in (added, built):
        assert all(f"  {name}: {measure}" in str(refused.value) for measure in measures)


def test_several_alike_do_not_hide_one_another(town):
    bundles = [town.bundles[n] for n in ("news", "rival", "copy")]
    found = check_bundles(bundles, town.public, town.trusted, anchor_dir=town.anchor, seed=0)
    for name in ("rival", "copy"):
        assert found["experts"][name]["others"]["news"]["change"] > 0.1
    together = found["together"]["others"]["news"]["change"]
    assert together > found["experts"]["rival"]["others"]["news"]["change"]


def test_who_is_within_may_not_take_a_newcomers_text(town, tmp_path):
    """A hostile expert that came first, when there was nobody to harm."""
    judge = admission(town.public, {"others": 0.03})
    out = tmp_path / "m"
    build_mixture(town.anchor, [town.bundles["rival"]], out, town.trusted, admission=judge)
    with pytest.raises(MergeError, match=r"  rival: others \(news\) is"):
        add_experts(out, [town.bundles["news"]], town.trusted, admission=judge)


def test_who_is_within_is_judged_on_newcomers_text_alone():
    def effects(public, **others):
        effect = {name: {"change": x, "weight": 0.0} for name, x in others.items()}
        return {"public": {"change": public, "weight": 0.0}, "forms": {}, "others": effect}

    limits = {"public": 0.1, "others": 0.1}
    within = {"experts": {"old": effects(0.9, older=0.9, new=0.05), "new": effects(0.0, old=0.0)}}
    refuse_excess(within, limits, ["new"])
    within["experts"]["old"]["others"]["new"]["change"] = 0.2
    with pytest.raises(MergeError, match=r"  old: others \(new\) is 20") as refused:
        refuse_excess(within, limits, ["new"])
    assert "older" not in str(refused.value) and "public" not in str(refused.value)


def test_a_check_is_what_adding_would_measure(town, village, tmp_path):
    """With the mixture's own number of experts, and all that a mixture keeps."""
    before = tree(village)
    judge = admission(town.public, {}, seed=3)
    pair = [town.bundles["maths"], town.bundles["news"]]
    build_mixture(town.anchor, pair, tmp_path / "m", town.trusted, top_k=1, admission=judge)
    options = {"model_dir": tmp_path / "m", "seed": 3}
    found = check_bundles([town.bundles["rival"]], town.public, town.trusted, **options)
    assert found.pop("newcomers") == ["rival"]
    add_experts(tmp_path / "m", [town.bundles["rival"]], town.trusted, admission=judge)
    assert read_about(tmp_path / "m")["influence"] == found
    assert tree(village) == before
    with pytest.raises(MergeError, match="two experts have this name"):
        check_bundles([town.bundles["rival"]], town.public, town.trusted, **options)


def test_a_mixture_keeps_its_limits_and_what_was_measured(town, village, honest, tmp_path):
    kept = read_about(village)["influence"]
    assert kept["limits"] == LIMITS and kept["experts"] == honest["experts"]
    shutil.copytree(village, tmp_path / "m")
    remove_experts(tmp_path / "m", ["news"], town.trusted)
    left = read_about(tmp_path / "m")["influence"]
    assert left["limits"] == LIMITS and left["experts"].keys() == {"maths"}
    assert left["experts"]["maths"]["others"] == {} and left["together"] is None
    with pytest.raises(MergeError, match=r"must be measured again.*--public"):
        add_experts(tmp_path / "m", [town.bundles["news"]], town.trusted)
    judge = admission(town.public, LIMITS, seed=5)
    add_experts(tmp_path / "m", [town.bundles["news"]], town.trusted, admission=judge)
    assert read_about(tmp_path / "m")["influence"] == kept


@pytest.mark.parametrize(
    "path, value",
    [(("limits", "bogus"), 0.1), (("experts", "maths"), {}), (("seed",), "x"), (("more",), 1)],
)
def test_an_influence_that_is_malformed_is_refused(village, tmp_path, path, value):
    shutil.copytree(village, tmp_path / "m")
    about = read_json(tmp_path / "m" / "mixture.json")
    place = about["influence"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    write_json(tmp_path / "m" / "mixture.json", about)
    with pytest.raises(MergeError, match=rf"does not describe a mixture:\n  influence.{path[0]}"):
        read_about(tmp_path / "m")
