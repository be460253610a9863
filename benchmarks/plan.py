"""Forecasts of `flexolmo plan` against what training takes, at sizes it was not fitted on.

Each size in turn is left out: rates are fitted to the others, by the very steps that `plan
--measure` takes, and the one left out is predicted: its steps of `anchor train` and `expert train`
on texts of their own, and the peak memory of a process, alone and as one of two under torchrun;
of two, also the seconds of a step, of the first one's own work, which plans for processors tell
without what it waits for the other.

    .venv/bin/python benchmarks/plan.py [--sizes 2M,5M,14M,30M] [--out benchmarks/results/plan.json]

B batch, T positions.
"""

import argparse
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import shapes
import torch
import training

from flexolmo.files import write_json
from flexolmo.model.loss import language_model_loss
from flexolmo.model.parallel import count, fill, place, processes
from flexolmo.model.router import LinearSettings
from flexolmo.model.transformer import Transformer
from flexolmo.progress import progress
from flexolmo.runtime import set_up, software_versions, source_commit
from flexolmo.train.anchor import AnchorRecipe
from flexolmo.train.count import count_step
from flexolmo.train.expert import ExpertRecipe, prepare_training
from flexolmo.train.forecast import find_memory
from flexolmo.train.loop import TrainSettings, in_parts
from flexolmo.train.measure import (
    SIZES,
    fit_machine,
    resident_bytes,
    shape_of,
    time_program,
    timed_recipes,
)
from flexolmo.train.rates import GPUS, time_step

RESULTS = Path(__file__).parent / "results" / "plan.json"
ALL_SIZES = SIZES | {"30M": (512, 8, 8, 1408)}
ROUNDS = 3
KINDS = ("anchor", "expert", "expert of FFN", "expert, low rank")


def recipe_of(kind: str) -> AnchorRecipe | ExpertRecipe:
    """A training by our defaults, or the paper's for an expert of FFN."""
    train = TrainSettings(steps=1000, batch_size=8, seq_len=256, compile="off")
    adamw = train.model_copy(update={"optimizer": "adamw"})
    ranks = {f"{part}rank": 16 for part in ("", "attention_", "embedding_", "head_")}
    return {
        "anchor": AnchorRecipe(train=train),
        "expert": ExpertRecipe(train=train),
        "expert of FFN": ExpertRecipe(scope="ffn", router=LinearSettings(), train=adamw),
        "expert, low rank": ExpertRecipe(train=train, **ranks),
    }[kind]


def make_step(size: str, kind: str) -> Callable[[], object]:
    """A step of that training, as the commands take it."""
    recipe = recipe_of(kind)
    config = shape_of(*ALL_SIZES[size])
    if isinstance(recipe, ExpertRecipe):
        name = f"plan {size}"
        width, layers, heads, d_ff = ALL_SIZES[size]
        shapes.SIZES[name] = shapes.Size(width, layers, heads, d_ff, config.vocab_size)
        anchor = shapes.make_anchor(name)
        text = training.owner_text(anchor)
        model, parameters, losses, _ = prepare_training(anchor, text, "a", recipe, None)
        return training.step_of(model, parameters, losses, recipe.train)
    with torch.device("meta"):
        model = Transformer(config)
    place(model, torch.empty(0))
    model.initialise(0, fill)
    B, T = recipe.train.batch_size, recipe.train.seq_len
    ids = torch.randint(1, config.vocab_size, (B, T + 1)).numpy()
    losses = in_parts(lambda step: ids, lambda x: language_model_loss(model, x), recipe.train)
    return training.step_of(model.train(), dict(model.named_parameters()), losses, recipe.train)


def time_steps(size: str, kind: str) -> float:
    """Median seconds of a step, after one that is not counted."""
    return median_seconds(make_step(size, kind))


def median_seconds(step: Callable[[], object]) -> float:
    """Median seconds of a step, after one that is not counted."""
    seconds = []
    for _ in range(ROUNDS + 1):
        start = training.now()
        step()
        seconds.append(training.now() - start)
    return statistics.median(seconds[1:])


def tell_process(size: str, kind: str) -> None:
    """Print the bytes of this process before the model is made, and at its highest in two steps,
    then the seconds of one; the first process alone prints."""
    with processes("cpu"):
        set_up(0, 1, keeps_memory=count() == 1)
        tiny = make_step("2M", "anchor")
        tiny()
        del tiny
        gc.collect()
        before = resident_bytes("VmRSS")
        step = make_step(size, kind)
        for _ in range(2):
            step()
        most = resident_bytes("VmHWM")
        print(json.dumps([before, most, median_seconds(step)]))


def run_processes(size: str, kind: str, num_processes: int) -> list[float]:
    """Output of `tell_process`, in processes of their own."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = str(held.getsockname()[1])
    running = []
    for rank in range(num_processes):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
        variables |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_processes))
        variables |= {"MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, __file__, "--memory", kind, "--sizes", size]
        environment = os.environ | (variables if num_processes > 1 else {})
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
    told = [p.communicate()[0] for p in running]
    return json.loads(told[0].splitlines()[-1])


def measure(sizes: list[str], kinds: Sequence[str], numbers: list[int]) -> dict[str, Any]:
    """Predicted over measured of every size and kind, with what both are; `numbers` of processes
    are run for their memory."""
    found: dict[str, Any] = {"time": {}, "memory": {}, "time_of_two": {}}
    runs = len(sizes) * (1 + (1 + len(numbers)) * len(kinds))
    with progress("plan", runs, "runs") as meter:
        timed = {}
        for size in sizes:
            timed[size] = [
                time_program(shape_of(*ALL_SIZES[size]), r) for r in timed_recipes().values()
            ]
            meter.advance(note=f"rates, {size}")
        for size in sizes:
            machine = fit_machine([t for s in sizes if s != size for t in timed[s]])
            for kind in kinds:
                recipe = recipe_of(kind)
                counted = count_step(shape_of(*ALL_SIZES[size]), recipe)
                told = time_step(counted, machine).total
                taken = time_steps(size, kind)
                found["time"][f"{size}, {kind}"] = compare(told, taken)
                meter.advance(note=f"time, {size}, {kind}")
                for many in numbers:
                    counted = count_step(shape_of(*ALL_SIZES[size]), recipe, many)
                    before, most, taken = run_processes(size, kind, many)
                    alone = GPUS["H100"].model_copy(update={"process_bytes": before})
                    beside = 0.0
                    if isinstance(recipe, ExpertRecipe):  # loaded, and in both cases in memory
                        beside = counted.weight_bytes - counted.learnt_bytes
                    memory = find_memory(counted, alone, many)
                    name = f"{size}, {kind}, {many} process{'es' if many > 1 else ''}"
                    found["memory"][name] = compare(memory.total + beside, most)
                    found["memory"][name]["before"] = before
                    if many > 1:
                        told = time_step(counted, machine, processes=many).total
                        found["time_of_two"][f"{size}, {kind}"] = compare(told, taken)
                    meter.advance(note=f"memory, {name}")
    for part in ("time", "memory", "time_of_two"):
        if ratios := [x["ratio"] for x in found[part].values()]:
            found[f"{part}_ratios"] = {"least": min(ratios), "most": max(ratios)}
    return found


def compare(told: float, taken: float) -> dict[str, float]:
    """Both, and predicted over measured."""
    return {"predicted": told, "measured": taken, "ratio": round(told / taken, 3)}


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default=",".join(ALL_SIZES))
    parser.add_argument("--kind", action="append", choices=KINDS, help="One of them. Default: all.")
    parser.add_argument("--processes", default="1,2", help="Numbers of processes, for memory.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.memory:
        tell_process(asked.sizes, asked.memory)
        return
    set_up(0, 1)
    numbers = [int(x) for x in asked.processes.split(",")]
    found = measure(asked.sizes.split(","), asked.kind or KINDS, numbers)
    about = {"commit": source_commit(), "load": os.getloadavg()[0], "software": software_versions()}
    write_json(asked.out, found | about)
    print(json.dumps({k: v for k, v in found.items() if "ratios" in k}, indent=2))


if __name__ == "__main__":
    main()
