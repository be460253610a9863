"""Kinds for tests: tiny, and telling what they did in the file that RAN names."""

import os
import sys
import time
from pathlib import Path
from types import ModuleType

from flexolmo.errors import DataError
from flexolmo.progress import progress
from flexolmo.research.steps.step import StepContext, step_kind

if "pytest" not in sys.modules:  # a step's own process, which is spared the import of torch
    runtime = ModuleType("flexolmo.runtime")
    runtime.set_up = lambda seed, **_: None
    runtime.run_record = lambda config, seed, data: {"config": config, "seed": seed, "data": data}
    sys.modules["flexolmo.runtime"] = runtime


def tell(text):
    with open(os.environ["RAN"], "a") as f:
        f.write(text + "\n")


@step_kind("add", version=1)
def add(step: StepContext):
    """n plus whatever its inputs come to."""
    tell(step.label)
    total = step.settings["n"] + sum(step.metrics(role)["value"] for role in step.inputs)
    (step.out / "deep").mkdir(exist_ok=True)
    (step.out / "deep" / "value.txt").write_text(str(total))
    return {"value": total}


@step_kind("subtract", version=1)
def subtract(step: StepContext):
    """n minus its inputs, which it takes from their files; roles a to z in turn change sign."""
    tell(step.label)
    total = step.settings["n"]
    for i, (_, path) in enumerate(sorted(step.inputs.items())):
        total += (-1) ** (i + 1) * int((path / "deep" / "value.txt").read_text())
    (step.out / "deep").mkdir(exist_ok=True)
    (step.out / "deep" / "value.txt").write_text(str(total))
    return {"value": total}


@step_kind("count", version=1)
def count(step: StepContext):
    """Count to n, with a checkpoint at every number; killed on the way if told to be."""
    at = step.out / "at"
    first = int(at.read_text()) if at.exists() else 0
    tell(f"{step.label} from {first}")
    with progress("count", step.settings["n"], "numbers", first) as meter:
        for i in range(first, step.settings["n"]):
            time.sleep(0.02)
            at.write_text(str(i + 1))
            meter.advance()
            if i + 1 == step.settings.get("die_at"):
                os.kill(os.getpid(), 9)


@step_kind("hang", version=1)
def hang(step: StepContext):
    tell(step.label)
    (step.out / "begun").touch()
    time.sleep(60)


@step_kind("meet", version=1)
def meet(step: StepContext):
    """Wait until the other has begun too; the two share a place beside the file RAN."""
    place = Path(os.environ["RAN"]).parent
    (place / f"met-{step.settings['me']}").touch()
    deadline = time.monotonic() + 20
    while not (place / f"met-{step.settings['other']}").exists():
        assert time.monotonic() < deadline, "the other never came"
        time.sleep(0.01)


@step_kind("refuse", version=1)
def refuse(step: StepContext):
    print(*(f"line {i}" for i in range(20)), sep="\n", flush=True)
    raise DataError("this text will not do")


@step_kind("vanish", version=1)
def vanish(step: StepContext):
    os._exit(0)


@step_kind("describe", version=1)
def describe(step: StepContext):
    (step.out / "empty").touch()
    return {"cwd": str(Path.cwd()), "threads": os.environ["OMP_NUM_THREADS"], "label": step.label}
