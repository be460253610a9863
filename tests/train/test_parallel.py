"""Two processes equal one."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from flexolmo.errors import CheckpointError, ConfigError
from flexolmo.model import parallel
from flexolmo.model.checkpoint import load_anchor
from flexolmo.research.rivals.proxy import save_proxy, select_proxy
from flexolmo.train.anchor import AnchorRecipe, AnchorShape, train_anchor
from flexolmo.train.expert import ExpertRecipe, load_expert, save_expert, train_expert
from made_processes import (
    GENTLE,
    RECIPES,
    SHAPES,
    STEPS,
    do_step,
    in_two_processes,
    losses_of,
    matrices,
    moved_head,
    recipe_of,
    square,
)

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this build of torch has no gloo, by which processes talk",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, pico_anchor, pico_anchor_dir, pico_sets, pico_set_dirs):
    """What steps of a study are given: text, an anchor, experts and a proxy."""
    here = tmp_path_factory.mktemp("inputs")
    (here / "corpus" / "prepared").mkdir(parents=True)
    for name, directory in pico_set_dirs.items():
        (here / "corpus" / "prepared" / name).symlink_to(directory)
    (here / "anchor").mkdir()
    (here / "anchor" / "anchor").symlink_to(pico_anchor_dir)
    brief = GENTLE.model_copy(update={"steps": 1, "warmup_steps": 0})
    for kind in ("evidence", "linear"):
        recipe = ExpertRecipe(scope="ffn", router={"kind": kind}, train=brief)
        made = train_expert(pico_anchor, pico_sets["maths"], "maths", recipe)
        (here / f"{kind} maths").mkdir()
        save_expert(made, here / f"{kind} maths" / "expert")
    (here / "proxy maths").mkdir()
    proxy = select_proxy(pico_sets["maths"], pico_sets["public"], tokens=200)
    save_proxy(proxy, here / "proxy maths" / "proxy.json")
    return here


@pytest.fixture(scope="module")
def two(tmp_path_factory, pico_anchor, pico_anchor_dir, pico_sets, pico_set_dirs, inputs):
    """What two processes found, what they printed, and where; one start for all tests."""
    here = tmp_path_factory.mktemp("two")
    (here / "inputs").symlink_to(inputs)
    losses_of(pico_anchor, pico_sets, "whole", here / "stopped", stop_after=2)
    printed = in_two_processes(here, pico_anchor_dir, pico_set_dirs)
    assert (here / "found1.json").exists(), printed
    found = [json.loads((here / f"found{rank}.json").read_text()) for rank in range(2)]
    return found, printed, here


@pytest.mark.parametrize("kind", RECIPES)
def test_losses_are_those_of_one_process(two, kind, pico_anchor, pico_sets, tmp_path):
    found, _, _ = two
    expected, numbers = losses_of(pico_anchor, pico_sets, kind, tmp_path)
    assert len(expected) == GENTLE.steps
    held = []
    for one in found:
        losses, own = one["losses"][kind]
        assert losses == pytest.approx(expected, rel=1e-5)
        held.append(own)
    assert sum(held) == numbers  # each number is held once
    assert max(held) < 0.52 * numbers or kind == "low rank"


@pytest.mark.parametrize("kind", STEPS)
def test_steps_of_a_study_are_those_of_one_process(two, kind, inputs, tmp_path):
    found, _, here = two
    expected = do_step(kind, tmp_path, inputs)
    assert found[0]["steps"][kind] == pytest.approx(expected, rel=1e-5)
    assert kind not in found[1]["steps"]  # the first alone goes on
    files = [p.relative_to(tmp_path) for p in tmp_path.rglob("*.safetensors")]
    for file in files:
        mine, theirs = load_file(here / kind / file), load_file(tmp_path / file)
        assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in theirs.items()}
    assert len(files) == 2  # the checkpoint, and what the step leaves


def test_one_process_ends_in_a_group_what_several_began(two, pico_anchor, pico_sets):
    _, _, here = two
    with parallel.processes("cpu", in_group=True):
        losses, numbers = losses_of(pico_anchor, pico_sets, "whole", here / "two 0")
    assert len(losses) == GENTLE.steps and numbers > 0


def test_a_step_that_goes_wrong_is_seen(pico_anchor, pico_sets, tmp_path):
    """The tolerance is far below what another order of the data does."""
    expected, _ = losses_of(pico_anchor, pico_sets, "whole", tmp_path / "a")
    other = pico_sets | {"maths": pico_sets["news"]}
    assert losses_of(pico_anchor, other, "whole", tmp_path / "b")[0] != pytest.approx(
        expected, rel=1e-3
    )


def test_two_processes_go_on_from_what_one_has_done(two, pico_anchor, pico_sets, tmp_path):
    found, _, _ = two
    expected, _ = losses_of(pico_anchor, pico_sets, "whole", tmp_path)
    for one in found:
        assert one["resumed"][0] == pytest.approx(expected, rel=1e-5)


def test_one_process_alone_does_not_take_over_what_several_began(two, pico_anchor, pico_sets):
    _, _, here = two
    with pytest.raises(CheckpointError, match="go on under torchrun"):
        losses_of(pico_anchor, pico_sets, "whole", here / "two 0")


def test_processes_that_see_different_directories_do_not_train(two):
    for one in two[0]:
        assert "between 0 and 4 steps" in one["apart"]


def test_matrices_are_whole_where_they_are_worked_on(two):
    found, _, _ = two
    for i, shape in enumerate(SHAPES):
        parts = [torch.tensor(one["moved"][i]).view(shape[0], -1, shape[2]) for one in found]
        torch.testing.assert_close(torch.cat(parts, dim=1), square(matrices(shape)))


def test_rows_of_a_head_move_in_several_processes_as_in_one(two, pico_anchor, pico_sets):
    for i, kind in enumerate(("whole", "low rank")):
        expected = torch.tensor(moved_head(pico_anchor, pico_sets, kind))
        for one in two[0]:
            torch.testing.assert_close(torch.tensor(one["heads"][i]), expected)


def test_what_is_put_into_parts_comes_out_whole(two):
    assert [one["is round"] for one in two[0]] == [True, True]


def test_what_several_processes_cannot_do_is_refused(two):
    for one in two[0]:
        uneven, private, noised, homeless = one["refused"]
        assert "make batch_size a multiple of 4" in uneven
        assert "run it without torchrun" in private
        assert private == noised
        assert "without a directory" in homeless


def test_only_the_first_process_prints_and_each_error_comes_once(two):
    _, ((out, err), (silent, other)), here = two
    assert "a word of this process" in out
    assert out.count(f"{here / 'anchor'}: anchor sha256:") == 1
    assert out.count("expert maths is trained") == 1
    assert silent == ""
    both = err + other
    assert both.count("A batch of 3 sequences") == 1
    assert "Traceback" not in both


def test_a_process_that_dies_ends_all_with_one_message(two):
    _, ((_, err), (_, other)), here = two
    assert json.loads((here / "survivor.json").read_text()) == [0, 2, False]
    assert err.count("One of the 2 processes ended") == 1
    assert "One of the 2" not in other
    assert not (here / "dying" / "expert.json").exists()


def test_a_meeting_that_unpickles_is_refused(monkeypatch):
    for name in (*parallel.VARIABLES, "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "167cb18f")
    with pytest.raises(ConfigError, match="--rdzv-backend static"), parallel.processes("cpu"):
        pass


def test_a_process_group_of_somebody_else_is_none_of_ours():
    """As vLLM opens one; whoever loads a mixture there is one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert not parallel.are_several()
        assert parallel.count() == 1
    finally:
        dist.destroy_process_group()


def test_the_command_line_writes_the_anchor_and_the_expert_of_one_process(
    two, pico_anchor, pico_sets, tmp_path
):
    found, _, here = two
    assert [[one["anchor"], one["expert"], one["bad"]] for one in found] == [[0, 0, 2]] * 2
    shape = AnchorShape(d_model=32, num_layers=2, num_heads=4, d_ff=48, max_seq_len=64)
    recipe = AnchorRecipe(model=shape, train=GENTLE)
    expected = train_anchor(pico_sets["public"], pico_anchor.tokenizer, recipe).model.state_dict()
    made = load_anchor(here / "anchor").model.state_dict()
    own = train_expert(pico_anchor, pico_sets["maths"], "maths", recipe_of("whole"), tmp_path)
    trained = load_expert(here / "expert")
    assert trained.architecture == own.architecture
    assert trained.data_card_digest == own.data_card_digest
    assert trained.record["processes"] == 2
    for mine, theirs in ((made, expected), (trained.tensors, own.tensors)):
        assert mine.keys() == theirs.keys()
        for name, values in theirs.items():
            torch.testing.assert_close(mine[name], values, rtol=1e-3, atol=1e-4, msg=name)
    modes = {p.name: oct(p.stat().st_mode & 0o777) for p in Path(here / "expert").iterdir()}
    assert set(modes.values()) == {"0o600"}
