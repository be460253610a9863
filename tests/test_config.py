"""Recipes: what is read, what is refused, and what the refusal says."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flexolmo
from flexolmo.audit.summary import Source
from flexolmo.config import find_recipe, parse_settings, read_recipe
from flexolmo.errors import ConfigError
from flexolmo.inference.sampling import Sampling
from flexolmo.research.demo.demo import DemoRecipe
from flexolmo.research.study.recipe import StudyRecipe
from flexolmo.research.study.scaling import ScalingRecipe
from flexolmo.train.anchor import AnchorRecipe
from flexolmo.train.expert import ExpertRecipe

RECIPES = Path(flexolmo.__file__).parent / "recipes"
SCHEMA = {
    "demo": DemoRecipe,
    "anchor": AnchorRecipe,
    "expert": ExpertRecipe,
    "study": StudyRecipe,
    "study_scaling": ScalingRecipe,
}


def write(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(schema, path=None, *overrides):
    with pytest.raises(ConfigError) as caught:
        read_recipe(path, schema, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_is_one(path):
    recipe = read_recipe(path, SCHEMA.get(path.stem) or SCHEMA[path.stem.split("_")[0]])
    assert type(recipe).model_validate(recipe.model_dump(mode="json")) == recipe


def test_the_shipped_recipes_are_all_tested_and_the_demos_is_among_them():
    assert flexolmo.research.demo.demo.default_recipe() in RECIPES.glob("*.toml")
    assert {"demo"} <= {p.stem for p in RECIPES.glob("*.toml")}


def test_a_recipe_that_is_shipped_goes_by_its_name_and_another_by_its_path(tmp_path):
    assert read_recipe(find_recipe("expert_private"), ExpertRecipe).privacy is not None
    assert find_recipe("paper/expert") == RECIPES / "paper" / "expert.toml"
    assert find_recipe("expert.toml") == Path("expert.toml")
    own = write(tmp_path, "seed = 3")
    assert find_recipe(own) == own
    with pytest.raises(ConfigError, match=r"expert_privat is neither.*expert_private,.*paper/anch"):
        find_recipe("expert_privat")


def test_a_bad_value_from_the_command_line_is_not_blamed_on_the_file_alone(tmp_path):
    own = write(tmp_path, "seed = 3")
    told = refusal(ExpertRecipe, own, "privacy.epsilon=1", "train.steps=0")
    assert told.startswith(f"In {own}, with privacy.epsilon=1, train.steps=0 from the command line")
    assert refusal(ExpertRecipe, write(tmp_path, "sed = 3")).startswith(f"In {own}:")


@given(st.lists(st.sampled_from(["code", "", 3, True]), max_size=4))
def test_each_bad_item_of_a_list_is_told_once_and_nothing_of_the_list_beside_it(items):
    """A list without items is told too, and a list of good ones is read."""
    bad = [i for i, item in enumerate(items) if not (isinstance(item, str) and item)]
    try:
        parse_settings({"languages": items}, Source, "a test")
    except ConfigError as e:
        told = [line.partition(": ")[0].strip() for line in str(e).splitlines()[1:]]
        assert told == ([f"languages.{i}" for i in bad] if items else ["languages"])
    else:
        assert items and not bad


def test_no_recipe_is_all_defaults():
    assert read_recipe(None, ExpertRecipe) == ExpertRecipe()


def test_sections_nest_and_overrides_win(tmp_path):
    path = write(
        tmp_path,
        "seed = 3\nscope = 'ffn'\n[train]\nsteps = 50\nbatch_size = 2\n[router]\nkind = 'linear'\n",
    )
    recipe = read_recipe(path, ExpertRecipe, ["train.steps=60", "router.has_bias = false"])
    assert (recipe.seed, recipe.train.steps, recipe.train.batch_size) == (3, 60, 2)
    assert recipe.router.kind == "linear" and recipe.router.has_bias is False
    again = read_recipe(path, ExpertRecipe, ["seed=1", "seed=2"])
    assert again.seed == 2  # the last one


@pytest.mark.parametrize(
    "text, value",
    [
        ("router.kind=linear", "linear"),
        ('router.kind="linear"', "linear"),
        ("router.kind = 'linear'", "linear"),
    ],
)
def test_a_bare_word_is_a_text(text, value):
    assert read_recipe(None, ExpertRecipe, ["scope=ffn", text]).router.kind == value


def test_lists_and_deep_sections_can_be_overridden():
    recipe = read_recipe(
        RECIPES / "demo.toml",
        DemoRecipe,
        ['sets=["code"]', "anchor.train.steps=9", "anchor.train.warmup_steps=1"],
    )
    assert recipe.sets == ("code",) and recipe.anchor.train.steps == 9
    assert (
        recipe.anchor.model.d_model
        == read_recipe(RECIPES / "demo.toml", DemoRecipe).anchor.model.d_model
    )


def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path):
    said = refusal(ExpertRecipe, write(tmp_path, "[train]\nsteps = 5\nlearning_rat = 1.0\n"))
    assert "train.learning_rat: unknown key. Did you mean train.learning_rate?" in said
    assert str(tmp_path / "recipe.toml") in said


def test_an_unknown_key_like_no_other_is_refused_with_all_there_are():
    said = refusal(Sampling, None, "xyzzy=1")
    assert "xyzzy: unknown key. Known keys: max_new_tokens, temperature, top_k" in said


def test_every_problem_is_listed(tmp_path):
    said = refusal(
        ExpertRecipe,
        write(tmp_path, "seed = -1\nseeed = 1\n[train]\nsteps = 'many'\nbatch_size = 0\n"),
    )
    for part in (
        "seed: ",
        "seeed: unknown key. Did you mean seed?",
        "train.steps: ",
        "found 'many'",
        "train.batch_size: ",
    ):
        assert part in said


def test_settings_that_contradict_each_other_are_refused():
    """Without the whole section's values, which say nothing new."""
    said = refusal(ExpertRecipe, None, "train.steps=5")
    assert said.endswith("\n  train: warmup_steps 20 exceeds steps 5.")
    said = refusal(ExpertRecipe, None, "rank=5", "width=8")
    assert "\n  an FFN is of a width of its own" in said and "found" not in said


@pytest.mark.parametrize("text", ["seed = ", "seed 1", "[train", "seed = 1\nseed = 2", "\x00"])
def test_bad_toml_is_refused_by_its_path(tmp_path, text):
    said = refusal(ExpertRecipe, write(tmp_path, text))
    assert "not readable TOML" in said and "recipe.toml" in said


def test_what_is_no_text_file_is_refused(tmp_path):
    (tmp_path / "recipe.toml").write_bytes(b"\xff\xfe")
    assert "not readable TOML" in refusal(ExpertRecipe, tmp_path / "recipe.toml")
    assert "not readable TOML" in refusal(ExpertRecipe, tmp_path)
    assert "does not exist" in refusal(ExpertRecipe, tmp_path / "absent.toml")


@pytest.mark.parametrize("text", ["train.steps", "=5", "", "   =1"])
def test_an_override_without_key_or_value_is_refused(text):
    assert "not of the form section.key=value" in refusal(ExpertRecipe, None, text)


def test_an_override_below_a_value_is_refused():
    assert "seed is a value, not a section" in refusal(ExpertRecipe, None, "seed=1", "seed.x=2")


def test_settings_say_where_they_came_from():
    with pytest.raises(ConfigError, match=r"^In the kitchen:\n  seed: "):
        parse_settings({"seed": "x"}, Sampling, "the kitchen")


@pytest.mark.parametrize("schema", [AnchorRecipe, ExpertRecipe])
def test_what_a_recipe_leaves_out_has_defaults(schema):
    """As `--recipe`'s help promises."""
    recipe = read_recipe(None, schema, ["train.batch_size=4"])
    assert recipe.train == schema().train.model_copy(update={"batch_size": 4})


def test_an_unknown_key_of_the_router_is_refused_with_the_nearest_one():
    said = refusal(ExpertRecipe, None, "router.kind=evidence", "router.clip_nat=3")
    assert "Did you mean router.clip_nats?" in said
