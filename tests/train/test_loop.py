"""The training loop: its rates, its checkpoints, and what it refuses."""

import inspect
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from itertools import pairwise

import pytest
import safetensors
import torch
from pydantic import ValidationError
from torch import nn

from flexolmo import files
from flexolmo.errors import CheckpointError
from flexolmo.train import loop
from flexolmo.train.loop import CHECKPOINT, TrainSettings, build_optimizers, rate_fraction, train

BASE = TrainSettings(steps=12, batch_size=2, seq_len=4, warmup_steps=3)
KINDS = ["adamw", "muon"]


def make_toy():
    """Parameters of several shapes by name, and a loss that depends on the step alone."""
    g = torch.Generator().manual_seed(0)
    shapes = {
        "embed": (5, 4),
        "layers.0.up": (6, 4),
        "layers.0.down": (3, 6),
        "layers.0.row": (1, 4),
        "layers.0.bias": (1,),
    }
    parameters = {n: nn.Parameter(torch.randn(s, generator=g)) for n, s in shapes.items()}

    def loss_of_step(step):
        g = torch.Generator().manual_seed(100 + step)
        x = torch.randn(8, 5, generator=g) @ parameters["embed"]
        y = torch.tanh(x @ parameters["layers.0.up"].T) @ parameters["layers.0.down"].T
        gate = torch.sigmoid(x @ parameters["layers.0.row"].T + parameters["layers.0.bias"])
        return (gate * y - torch.randn(8, 3, generator=g)).square().mean()

    return parameters, loss_of_step


def run_toy(settings, run_dir, identity=None, spoil=None):
    """Train the toy; `spoil(step)` may raise. Parameters and result."""
    parameters, loss_of_step = make_toy()

    def loss(step):
        if spoil:
            spoil(step)
        return loss_of_step(step)

    result = train(parameters, loss, settings, run_dir, "toy", identity or {"seed": 0}, {})
    return parameters, result


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- rates and optimizers -----------------------------------------------------------------------


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
    s = TrainSettings(steps=110, warmup_steps=10, final_rate=0.1)
    rates = [rate_fraction(step, s) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert 0.1 <= rates[-1] < 0.101
    assert rate_fraction(110, s) == pytest.approx(0.1)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (5, 5), (5, 4), (7, 0)])
def test_the_rate_is_positive_and_at_most_one_for_any_length(steps, warmup):
    s = TrainSettings(steps=steps, warmup_steps=warmup)
    rates = [rate_fraction(step, s) for step in range(steps)]
    assert max(rates) == 1.0
    assert min(rates) > 0


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValidationError, match="warmup_steps 20 exceeds steps 7"):
        TrainSettings(steps=7)


def test_every_parameter_is_in_one_optimizer():
    parameters, _ = make_toy()
    for kind, matrices in (("adamw", set()), ("muon", {"layers.0.up", "layers.0.down"})):
        built = build_optimizers(parameters, BASE.model_copy(update={"optimizer": kind}))
        names = {id(p): n for n, p in parameters.items()}
        held = [
            (type(o).__name__, names[id(p)])
            for o, _ in built
            for g in o.param_groups
            for p in g["params"]
        ]
        assert sorted(n for _, n in held) == sorted(parameters)
        assert {n for o, n in held if o == "Muon"} == matrices


def test_the_first_step_of_adamw_has_the_size_of_the_warm_up_rate():
    s = TrainSettings(steps=4, warmup_steps=4, optimizer="adamw", learning_rate=0.4)
    before, _ = make_toy()
    seen = {}

    def look(step):
        if step == 1:
            seen.update({n: p.detach().clone() for n, p in live.items()})

    live, loss = make_toy()
    train(live, lambda step: (look(step), loss(step))[1], s, None, "toy", {}, {})
    move = (seen["layers.0.up"] - before["layers.0.up"]).abs()
    torch.testing.assert_close(move, torch.full_like(move, 0.1), rtol=1e-3, atol=0)


def test_large_gradients_are_clipped_together(monkeypatch):
    norms = []
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: norms.append(
            torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm()
        ),
    )
    settings = BASE.model_copy(update={"optimizer": "adamw", "grad_clip": 0.01})
    run_toy(settings, None)
    torch.testing.assert_close(torch.stack(norms), torch.full((12,), 0.01), rtol=1e-3, atol=0)


# --- interruption -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("every", [1, 3])
def test_interrupted_is_uninterrupted(tmp_path, monkeypatch, kind, every):
    """Whether or not steps were lost since the checkpoint, and however often it is killed."""
    settings = BASE.model_copy(update={"optimizer": kind, "checkpoint_every_seconds": 1e-9})
    expected, whole = run_toy(settings, None)
    save = loop._save
    monkeypatch.setattr(
        loop,
        "_save",
        lambda path, parameters, optimizers, result, identity: (
            save(path, parameters, optimizers, result, identity)
            if len(result.losses_nats) % every == 0
            else None
        ),
    )
    rng = random.Random(every)
    first, second = sorted(rng.sample(range(every + 1, 12), 2))
    ran = []
    for kill_at in (first, second, None):

        def spoil(step, kill_at=kill_at):
            ran.append(step)
            if step == kill_at:
                raise KeyboardInterrupt

        try:
            parameters, result = run_toy(settings, tmp_path, spoil=spoil)
        except KeyboardInterrupt:
            continue
    assert ran.count(0) == 1, "it did go on from a checkpoint"
    assert len(ran) > 12
    assert same(parameters, expected)
    assert result.losses_nats == whole.losses_nats
    assert json.loads((tmp_path / "metrics.json").read_text())["loss_nats"] == whole.losses_nats


def test_a_finished_run_is_not_trained_again(tmp_path):
    expected, whole = run_toy(BASE, tmp_path)

    def spoil(step):
        raise AssertionError("no step is left")

    parameters, result = run_toy(BASE, tmp_path, spoil=spoil)
    assert same(parameters, expected)
    assert (result.losses_nats, result.seconds, result.tokens) == (
        whole.losses_nats,
        whole.seconds,
        12 * 2 * 4,
    )


def test_a_killed_process_goes_on_bit_for_bit(tmp_path):
    """SIGKILL at whatever moment, in the middle of a write perhaps."""
    settings = TrainSettings(
        steps=40, batch_size=2, seq_len=4, warmup_steps=3, checkpoint_every_seconds=1e-9
    )
    expected, whole = run_toy(settings, None)
    imports = "import time\nimport torch\nfrom pathlib import Path\nfrom torch import nn\n"
    code = (
        imports
        + inspect.getsource(make_toy)
        + textwrap.dedent(f"""
        from flexolmo.train.loop import TrainSettings, train
        torch.set_num_threads(1)
        parameters, loss = make_toy()
        train(parameters, lambda step: (time.sleep(0.02), loss(step))[1],
              TrainSettings.model_validate_json('''{settings.model_dump_json()}'''),
              Path({str(tmp_path)!r}), "toy", {{"seed": 0}}, {{}})
    """)
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / CHECKPOINT).exists():
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(0.1)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    finally:
        child.kill()
    ran = []
    parameters, result = run_toy(settings, tmp_path, spoil=ran.append)
    assert 0 < ran[0] < 40
    assert same(parameters, expected)
    assert result.losses_nats == whole.losses_nats


def test_a_failed_write_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    settings = BASE.model_copy(update={"checkpoint_every_seconds": 1e-9})

    def stop(step):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_toy(settings, tmp_path, spoil=stop)
    before = (tmp_path / CHECKPOINT).read_bytes()

    def half_a_tensor(tensor):
        yield b"half"
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(files, "pieces_of", half_a_tensor)
        with pytest.raises(OSError, match="disk full"):
            run_toy(settings, tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {CHECKPOINT, "run.json"}, "nothing half-written"
    expected, _ = run_toy(settings, None)
    assert same(run_toy(settings, tmp_path)[0], expected)


# --- refusals -----------------------------------------------------------------------------------


def test_a_directory_of_another_run_is_refused_and_left_alone(tmp_path):
    run_toy(BASE, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="anchor, data, device or number"):
        run_toy(BASE, tmp_path, {"seed": 1})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("spoil", [lambda d: d[:-7], lambda d: b"", lambda d: b"x" * 90])
def test_a_spoilt_checkpoint_is_refused_in_words(tmp_path, spoil):
    run_toy(BASE, tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CheckpointError, match="Remove it to start"):
        run_toy(BASE, tmp_path)


def test_a_loss_that_is_no_number_stops_the_run_and_is_not_kept(tmp_path):
    settings = BASE.model_copy(update={"checkpoint_every_seconds": 1e-9})
    parameters, loss_of_step = make_toy()
    with pytest.raises(CheckpointError, match="toy: at step 4 the loss is nan"):
        train(
            parameters,
            lambda s: loss_of_step(s) * (float("nan") if s == 4 else 1),
            settings,
            tmp_path,
            "toy",
            {"seed": 0},
            {},
        )
    with safetensors.safe_open(tmp_path / CHECKPOINT, framework="pt") as f:
        tensors = [f.get_tensor(n) for n in f.keys()]  # noqa: SIM118
        assert len(json.loads(f.metadata()["state"])["losses_nats"]) == 4
    assert all(torch.isfinite(t).all() for t in tensors)


def test_parameters_are_named_not_numbered():
    """So that a checkpoint does not depend on the order parameters are listed in."""
    parameters, _ = make_toy()
    backwards = dict(reversed(parameters.items()))
    for given in (parameters, backwards):
        ((adam, _),) = build_optimizers(given, BASE.model_copy(update={"optimizer": "adamw"}))
        for p in given.values():
            p.grad = torch.ones_like(p)
        adam.step()
        names = loop._optimizer_tensors(given, [(adam, 1.0)])
        assert {n.split(".exp_avg")[0].removesuffix(".step") for n in names} == {
            f"optimizer.{n}" for n in parameters
        }
