"""A private expert from training to bundle: what is refused, what is stated, what stays at home."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from flexolmo.bundle.bundle import open_bundle
from flexolmo.bundle.release import LARGEST_DELTA, stated_epsilon
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.cli.expert import print_plan
from flexolmo.data.units import read_unit, unit_offsets
from flexolmo.errors import CheckpointError, ConfigError
from flexolmo.merge.mixture import build_mixture, load_mixture
from flexolmo.model.assemble import anchor_matrix
from flexolmo.model.private_statistics import find_sigma
from flexolmo.model.shape import TOKEN_LEVELS
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.train.budget import PrivacySettings, spent_epsilon
from flexolmo.train.expert import (
    ExpertRecipe,
    pack_expert,
    prepare_training,
    reroute_expert,
    save_expert,
    start_expert,
    train_expert,
)
from flexolmo.train.loop import TrainSettings
from flexolmo.train.plan import plan_training
from flexolmo.train.protect import state_budget, tokens_of_a_reading
from flexolmo.train.rows import find_frequent_rows, moved_rows
from flexolmo.train.shrink import compress_expert, curvature_of, heal_expert
from made_bundles import TERMS

PRIVATE = {"privacy": {"epsilon": 8.0}, "router": {"kind": "evidence", "epsilon": 2.0}}


def recipe_of(**changes):
    return ExpertRecipe(
        privacy=PrivacySettings(epsilon=8.0, row_share=0.002, windows=2),
        router=EvidenceSettings(epsilon=4.0, level_nats=0.1),
        train=TrainSettings(
            steps=3, batch_size=4, seq_len=16, warmup_steps=1, checkpoint_every_seconds=1e-9
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("private") / "run"


@pytest.fixture(scope="module")
def expert(pico_anchor, pico_sets, run_dir):
    made = train_expert(pico_anchor, pico_sets["maths"], "maths", recipe_of(), run_dir)
    save_expert(made, run_dir)
    return made


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"router": {"kind": "evidence", "epsilon": None}},
            r"router\.epsilon is None.* such as router\.epsilon=2",
        ),
        ({"router": {"kind": "evidence", "epsilon": 8.0}}, r"router\.epsilon is 8\.0"),
        ({"router": {"kind": "linear"}, "scope": "ffn"}, "kind linear begins with exact means"),
        ({"width": 20}, "a width is cut by reading the text"),
        ({"replay": 0.5}, "set replay=0"),
        ({"train": {"steps": 30, "accumulate": 2}}, r"set train\.accumulate=1"),
        ({"train": {"steps": 30, "compile": "on"}}, r"leave train\.compile out"),
        ({"privacy": {"epsilon": 0.0}}, "epsilon"),
        ({"privacy": {"epsilon": 8.0, "unit": "patient"}}, "unit"),
    ],
)
def test_what_would_be_read_outside_the_budget_is_refused(wrong, said):
    with pytest.raises(ValidationError, match=said):
        ExpertRecipe.model_validate(PRIVATE | wrong)
    ExpertRecipe.model_validate(PRIVATE)


def test_a_set_of_too_few_units_is_refused(pico_anchor, pico_sets):
    train = TrainSettings(steps=3, batch_size=100, seq_len=16, warmup_steps=1)
    many = recipe_of().model_copy(update={"train": train})
    with pytest.raises(ConfigError, match=r"has 36 units \(document\).*100 in.*batch_size=6"):
        train_expert(pico_anchor, pico_sets["maths"], "maths", many)
    lax = PrivacySettings(epsilon=8.0, delta=1e-3, unit="sequence")
    train = TrainSettings(steps=3, batch_size=4, seq_len=2, warmup_steps=1)
    small = recipe_of().model_copy(update={"privacy": lax, "train": train})
    with pytest.raises(ConfigError, match=r"privacy\.delta 0\.001 allows"):
        train_expert(pico_anchor, pico_sets["maths"], "maths", small)


def test_the_bundle_states_one_budget_and_no_loss(
    pico_anchor_dir, expert, run_dir, owner_keys, trust_dir, tmp_path
):
    bundle = pack_expert(
        expert,
        tmp_path / "maths.bundle",
        owner_keys["Ann"],
        owner="Ann",
        licence="MIT",
        terms=TERMS,
    )
    trusted = TrustedOwners.load(trust_dir)
    manifest = open_bundle(bundle, trusted).manifest
    stated = manifest.recipe["budget"]
    assert stated["unit"] == "document" and stated["neighbours"] == "one unit added or removed"
    table = find_sigma(4.0, 1e-6)
    assert (stated["delta"], stated["table_noise"], stated["steps"]) == (1e-6, table, 3)
    assert stated["sampling_rate"] == 4 / 36 and stated["clip_norm"] == 0.1
    assert stated["epsilon"] == spent_epsilon(1e-6, stated["noise"], 4 / 36, 3, table) <= 8.0
    assert manifest.recipe["privacy"]["epsilon"] == 8.0
    assert stated_epsilon(manifest) == stated["epsilon"]
    assert manifest.recipe["router"]["epsilon"] == manifest.router.settings["epsilon"] == 4.0
    assert manifest.tokens_seen == 3 * 4 * 2 * 16  # whoever was read
    losses = json.loads((run_dir / "metrics.json").read_text())["loss_nats"]
    assert len(losses) == 3 and any(losses)  # a step may draw nobody: of 100 runs, in four
    told = (bundle / "manifest.json").read_text()
    assert "loss_nats" not in told and not any(str(x)[:6] in told for x in losses if x)
    build_mixture(pico_anchor_dir, [bundle], tmp_path / "m", trusted)
    assert load_mixture(tmp_path / "m", trusted).expert_names == ["maths"]


def test_rows_learn_that_the_noised_table_says_are_frequent(pico_anchor, pico_sets, expert):
    """Whatever the text holds: the same table opens the same rows for another owner's text."""
    recipe = recipe_of()
    is_open = find_frequent_rows(expert.tensors, pico_anchor, recipe.router, 0.002)
    assert 0 < is_open.sum() < len(is_open)
    assert torch.equal(moved_rows(pico_anchor, expert.tensors), is_open)
    start = {
        n: t if n.startswith("router.") else anchor_matrix(pico_anchor, n.removesuffix(".weight"))
        for n, t in expert.tensors.items()
    }
    other = prepare_training(pico_anchor, pico_sets["news"], "maths", recipe, None, start)[3]
    for rows in other.closed.values():
        assert torch.equal(rows, (~is_open).nonzero()[:, 0])


def test_first_values_from_elsewhere_are_refused(pico_anchor, pico_sets, expert):
    with pytest.raises(ConfigError, match="starts from the anchor"):
        train_expert(
            pico_anchor, pico_sets["maths"], "maths", recipe_of(), start=dict(expert.tensors)
        )


def test_nothing_more_is_read_of_a_private_experts_text(pico_anchor, pico_sets, expert):
    data = pico_sets["maths"]
    with pytest.raises(ConfigError, match="its budget is spent: healing"):
        heal_expert(pico_anchor, expert, data, 2)
    with pytest.raises(ConfigError, match="its budget is spent: another table"):
        reroute_expert(expert, pico_anchor, data, EvidenceSettings())
    for how in ({"rank": 3, "data": data}, {"width": 20, "data": data}):
        with pytest.raises(ConfigError, match="its budget is spent: choosing"):
            compress_expert(pico_anchor, expert, **how)
    with pytest.raises(ConfigError, match="its budget is spent: choosing"):
        compress_expert(
            pico_anchor, expert, rank=3, curvature=curvature_of(pico_anchor, expert, data)
        )
    cut = compress_expert(pico_anchor, expert, rank=3, delta_rank=3)
    assert cut.record["budget"] == expert.record["budget"]


def test_a_finished_run_is_not_trained_further(pico_anchor, pico_sets, expert, run_dir):
    again = train_expert(pico_anchor, pico_sets["maths"], "maths", recipe_of(), run_dir)
    assert all(torch.equal(t, expert.tensors[n]) for n, t in again.tensors.items())


def test_a_run_that_sampled_otherwise_does_not_go_on(pico_anchor, pico_sets, tmp_path, monkeypatch):
    """Or its bundle would state a guarantee that the steps before did not keep."""
    given = (pico_anchor, pico_sets["maths"], "maths", recipe_of(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            "flexolmo.train.expert.state_budget",
            lambda *asked: state_budget(*asked) | {"sampling": "Poisson"},
        )
        train_expert(*given)
    with pytest.raises(CheckpointError, match="another recipe"):
        train_expert(*given)


def test_a_recipe_may_ask_for_no_delta_that_is_no_guarantee():
    (most,) = [m.le for m in PrivacySettings.model_fields["delta"].metadata if hasattr(m, "le")]
    assert most == LARGEST_DELTA


def test_sequences_are_protected_by_the_table_too(pico_anchor, pico_sets, monkeypatch):
    """The table's sum holds a vector of length 1 for each unit, so it moves by 1 with any."""
    from flexolmo.train import first_router as module

    seen = []
    real = module.tabulate
    monkeypatch.setattr(
        module, "tabulate", lambda t, offsets, *a: (seen.append(offsets), real(t, offsets, *a))[1]
    )
    recipe = recipe_of().model_copy(
        update={"privacy": PrivacySettings(epsilon=8.0, unit="sequence")}
    )
    start_expert(pico_anchor, pico_sets["maths"], recipe)
    assert seen[0].tolist() == unit_offsets(pico_sets["maths"], "sequence", 16).tolist()


@pytest.mark.parametrize(
    ("unit", "length"), [("document", 16), ("document", 256), ("sequence", 16)]
)
def test_tokens_of_a_reading_are_those_of_all_windows(pico_sets, unit, length):
    data = pico_sets["maths"]
    privacy = PrivacySettings(epsilon=8.0, unit=unit, windows=3)
    tokens, offsets = data.splits["train"].tokens, unit_offsets(data, unit, length)
    drawn = np.arange(3, dtype=np.uint64)
    read = [
        read_unit(tokens[start:end], data.eos_id, length, drawn)[:, 1:].size
        for start, end in pairwise(offsets)
    ]
    assert (unit, length) == ("document", 16) or len(set(read)) > 1
    settings = recipe_of().train.model_copy(update={"seq_len": length})
    assert tokens_of_a_reading(data, privacy, settings) == sum(read)


def test_a_plan_tells_the_guarantee_that_training_then_states(
    pico_anchor, pico_sets, expert, capsys
):
    plan = plan_training(pico_anchor, pico_sets["maths"], "maths", recipe_of())
    assert plan["steps"] == 3 and plan["step_seconds"] > 0
    once = tokens_of_a_reading(pico_sets["maths"], recipe_of().privacy, recipe_of().train)
    assert plan["tokens"] == round(3 * 4 / 36 * once) <= expert.record["tokens"]
    assert plan["passes"] == plan["tokens"] / plan["own_tokens"]
    assert TOKEN_LEVELS not in plan
    assert plan["budget"] == expert.record["budget"]
    print_plan("maths", plan)
    told = capsys.readouterr().out
    assert f"{plan['budget']['noise']:.2f} clipping norms; it reads 11\u00a0% of all" in told
    epsilon = plan["budget"]["epsilon"]
    assert 7 < epsilon <= 8 and f"epsilon {epsilon:.3g}, delta 1e-06, for each document" in told
