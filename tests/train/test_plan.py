"""What training will take is told before it, and told right."""

import json

import pytest
import torch
from typer.testing import CliRunner

from flexolmo.cli import app
from flexolmo.model.router import LinearSettings
from flexolmo.train.expert import ExpertRecipe, pack_expert, train_expert
from flexolmo.train.loop import TrainSettings
from flexolmo.train.plan import plan_training
from made_bundles import TERMS

TRAIN = TrainSettings(steps=40, batch_size=2, seq_len=16, warmup_steps=3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank": 3, "has_half_deltas": True, "attention_rank": 2},
        {"scope": "ffn", "width": 20, "router": LinearSettings()},
    ],
)
def test_a_bundle_is_of_the_size_that_was_told(
    pico_anchor, pico_sets, owner_keys, tmp_path, changes
):
    recipe, maths = ExpertRecipe(train=TRAIN, **changes), pico_sets["maths"]
    before = {n: t.clone() for n, t in pico_anchor.model.state_dict().items()}
    told = plan_training(pico_anchor, maths, "maths", recipe)
    after = pico_anchor.model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
    expert = train_expert(pico_anchor, maths, "maths", recipe)
    bundle = pack_expert(
        expert,
        tmp_path / "maths.bundle",
        owner_keys["Ann"],
        owner="Ann",
        licence="MIT",
        terms=TERMS,
    )
    assert told["weights_bytes"] == max(f.stat().st_size for f in bundle.iterdir())
    assert told["tokens"] == expert.record["tokens"] == 40 * 2 * 16
    windows = (told["own_tokens"] - 1) // 16
    assert told["passes"] == pytest.approx(80 / windows)
    assert 0 < told["step_seconds"] * 40 <= told["seconds"]
    assert told["memory_bytes"] > told["weights_bytes"]


@pytest.mark.parametrize(
    ("begun", "step"),
    [
        ([11.0, 20.0, 22.0, 24.0, 25.0, 33.0, 35.0], 2.0),  # the first, of 9 seconds, is left out
        ([11.0, 12.0, 28.0, 45.0], 16.5),  # no other is begun after half a minute
        ([11.0, 111.0], 100.0),
    ],
)
def test_the_time_is_that_of_the_median_step(pico_anchor, pico_sets, monkeypatch, begun, step):
    clock, taken = iter([0.0, 10.0, *begun]), []

    class Clock:
        @staticmethod
        def monotonic():
            taken.append(next(clock))
            return taken[-1]

    monkeypatch.setattr("flexolmo.train.plan.time", Clock)
    told = plan_training(pico_anchor, pico_sets["maths"], "maths", ExpertRecipe(train=TRAIN))
    assert len(taken) == 2 + len(begun)
    assert told["step_seconds"] == step and told["seconds"] == 10.0 + 40 * step


def test_a_plan_is_printed_and_leaves_nothing(
    pico_anchor_dir, pico_set_dirs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command = ["expert", "train", "--anchor", pico_anchor_dir, "--data", pico_set_dirs["maths"]]
    command += ["--name", "maths", "--set", "train.seq_len=16", "--plan"]
    shown = CliRunner().invoke(app, [*map(str, command)])
    assert shown.exit_code == 0 and "bytes of weights" in shown.stdout
    told = json.loads(CliRunner().invoke(app, [*map(str, command), "--json"]).stdout)
    assert f"{told['weights_bytes']:,} bytes of weights" in shown.stdout
    assert not list(tmp_path.iterdir())
