"""Experts that take other people's text, and those that do not, before a mixture's door."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.bundle.signing import TrustedOwners
from flexolmo.data.forms import FORMS
from flexolmo.errors import ConfigError, MergeError
from flexolmo.evaluation import influence as room
from flexolmo.evaluation.influence import (
    MEASURES,
    admission,
    check_bundles,
    find_excess,
    parse_limits,
    worst,
)
from flexolmo.evaluation.likelihood import read_windows
from flexolmo.inference.own_text import own_windows
from flexolmo.merge.mixture import (
    add_experts,
    build_mixture,
    load_mixture,
    read_about,
    remove_experts,
)
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
from made_mixtures import tree

ROUTER = EvidenceSettings(min_documents=3)
BRIEF = TrainSettings(steps=40, batch_size=4, seq_len=32, warmup_steps=2, learning_rate=0.01)
LIMITS = {"public": 0.01, "forms": 0.03, "others": 0.03, "claims": 0.2}


@pytest.fixture(scope="module", autouse=True)
def less_text():
    """A fraction of the text, for speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "PUBLIC_BYTES", 6000)
        patch.setattr(room, "FORM_BYTES", 600)
        patch.setattr(room, "OWN_TOKENS", 80)
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
        generator = torch.Generator().manual_seed(0)
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
            terms="For tests.",
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
        town.anchor, [town.bundles["maths"], town.bundles["news"]], town.public, town.trusted
    )


@pytest.fixture(scope="module")
def village(town, tmp_path_factory):
    """A mixture of the honest two, with limits; do not change it in place."""
    out = tmp_path_factory.mktemp("village") / "model"
    bundles = [town.bundles["maths"], town.bundles["news"]]
    judge = admission(town.public, LIMITS)
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
    windows = own_windows(mixture, tokens=80)["news"]
    both = read_windows(mixture.model, windows)
    alone = read_windows(mixture.model, windows, enabled=["news"])
    found = honest["experts"]["maths"]["others"]["news"]
    assert found["change"] == pytest.approx(both.bits_per_byte / alone.bits_per_byte - 1)
    assert found["weight"] == pytest.approx(both.routing[0][1])


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


def test_the_worst_text_stands_for_all_and_nan_for_the_worst():
    found = {"others": {"a": {"change": 0.5}, "b": {"change": math.nan}, "c": {"change": 2.0}}}
    value, where = worst(found, "others")
    assert math.isnan(value) and where == " (b)"
    assert worst({"others": {}}, "others") == (0.0, "")
    assert find_excess({"experts": {"x": found}}, {"others": 99.0}, ["x"])
    assert not find_excess({"experts": {"x": found}}, {"others": 99.0}, [])


# --- limits -------------------------------------------------------------------------------------


@given(
    st.dictionaries(
        st.sampled_from(sorted(MEASURES)), st.integers(0, 10_000).map(lambda n: n / 100), min_size=1
    )
)
def test_limits_are_read_in_percent_and_as_numbers(limits):
    percent = ",".join(f" {k} <= {v}%" for k, v in limits.items())
    assert parse_limits(percent) == {k: v / 100 for k, v in limits.items()}
    assert parse_limits(",".join(f"{k}<={v}" for k, v in limits.items())) == limits


@pytest.mark.parametrize(
    "text", ["", "public", "public<1%", "public<=-1%", "public<=1%,public<=2%", "all<=1%"]
)
def test_what_is_no_limit_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"is no limit.*public<=1%,claims<=5%"):
        parse_limits(text)


@pytest.mark.parametrize(
    "name, measure",
    [("everything", "public"), ("huge", "claims"), ("rival", "others"), ("copy", "others")],
)
def test_a_hostile_expert_is_refused_and_nothing_has_changed(
    town, village, tmp_path, name, measure
):
    before = tree(village)
    judge = admission(town.public, {measure: LIMITS[measure]})
    with pytest.raises(MergeError, match=rf"above the limits:\n  {name}: {measure}"):
        add_experts(village, [town.bundles[name]], town.trusted, admission=judge)
    assert tree(village) == before
    bundles = [town.bundles[n] for n in ("maths", "news", name)]
    with pytest.raises(MergeError, match=rf"  {name}: {measure}"):
        build_mixture(town.anchor, bundles, tmp_path / "m", town.trusted, admission=judge)
    assert not (tmp_path / "m").exists()


def test_a_mixture_keeps_its_limits_and_what_was_measured(town, village, honest, tmp_path):
    kept = read_about(village)["influence"]
    assert kept["limits"] == LIMITS and kept["experts"] == honest["experts"]
    shutil.copytree(village, tmp_path / "m")
    remove_experts(tmp_path / "m", ["news"], town.trusted)
    left = read_about(tmp_path / "m")["influence"]
    assert left["limits"] == LIMITS and left["experts"].keys() == {"maths"}
    assert left["experts"]["maths"]["others"] == {}
    with pytest.raises(MergeError, match=r"must be measured again.*--public"):
        add_experts(tmp_path / "m", [town.bundles["news"]], town.trusted)
    judge = admission(town.public, LIMITS)
    add_experts(tmp_path / "m", [town.bundles["news"]], town.trusted, admission=judge)
    assert read_about(tmp_path / "m")["influence"] == kept


def test_only_newcomers_are_judged(town, village, tmp_path):
    """Those within were judged when they came: what a newcomer writes accuses none of them."""
    shutil.copytree(village, tmp_path / "m")
    found = check_bundles(
        town.anchor, [town.bundles["rival"]], town.public, town.trusted, model_dir=village
    )
    assert found["newcomers"] == ["rival"]
    assert worst(found["experts"]["maths"], "others")[0] > LIMITS["others"]
    lax = admission(town.public, {"others": 0.9})
    add_experts(tmp_path / "m", [town.bundles["rival"]], town.trusted, admission=lax)
    strict = admission(town.public, {"others": 0.03})
    remove_experts(tmp_path / "m", ["news"], town.trusted)
    add_experts(tmp_path / "m", [town.bundles["news"]], town.trusted, admission=strict)
