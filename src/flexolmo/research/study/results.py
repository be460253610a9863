"""A study's results.json, from the seeds that are done."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from flexolmo.files import read_json, write_json
from flexolmo.research.steps.graph import order_steps
from flexolmo.research.steps.step import Step
from flexolmo.research.study.recipe import Graph

ARTEFACTS = ("gap_closed", "mixed")
_NO_TRAINING = ("corpus", "rerouted", "uncoordinated")
_SHARED = ("corpus", "windows", "anchor", "embedder")  # every method starts from these
_ROLES = {  # what the steps that read a method are called, where not by its own name
    "own_pair": ("pair.default.", "pair_on_mixed."),
    "dume": ("dume.",),
    "btm": ("dense.",),
    "btm_switching": ("dense.",),
    "btm_equal_flops": ("dense.",),
    "soup_weighted": ("soup_weighted.",),
    "soup_weighted_equal_flops": ("soup_weighted.",),
    "prompt_routing": ("dense.", "samples."),
}


def write_results(graph: Graph, root: Path) -> Path:
    """Write results.json into `root` from whatever seeds are finished; returns its path.

    gap_closed and mixed: {method: {mean, spread, seeds, sets, flops_per_token, strict_opt_out}},
    where `seeds` holds one mean a seed and `sets` the mean over seeds. seeds: every seed's own
    tables, by number. cost: seconds and tokens of every kind of step. cost_by_method: of all steps
    a method needs beyond anchor and text, a mean over seeds; what several share counts in each.
    """
    scores = {
        seed: read_json(step.directory(root) / "scores.json")
        for seed, step in graph.scores.items()
        if step.is_done(root)
    }
    results: dict[str, Any] = {
        "recipe": graph.recipe.model_dump(mode="json"),
        "seeds_done": sorted(scores),
        **{kind: _over_seeds([scores[s][kind] for s in sorted(scores)]) for kind in ARTEFACTS},
        "seeds": {str(seed): found for seed, found in scores.items()},
        "cost": _cost(graph, root),
        "cost_by_method": _cost_by_method(graph, root, sorted(scores)),
    }
    if graph.ablations is not None and graph.ablations.is_done(root):
        results["ablations"] = read_json(graph.ablations.directory(root) / "ablations.json")
    if (strongest := graph.strongest_paper) is not None and strongest.is_done(root):
        results["strongest_paper"] = read_json(strongest.directory(root) / "strongest.json")
    results |= describe_runs(graph.targets, root)
    path = Path(root) / "results.json"
    write_json(path, results)
    return path


def describe_runs(targets: Sequence[Step], root: Path) -> dict[str, Any]:
    """Commits, and the last software and machine, of the steps that are done."""
    runs = [step.result(root)["run"] for step, is_done in order_steps(targets, root) if is_done]
    return {
        "commits": sorted({str(r["commit"]) for r in runs}),
        "software": runs[-1]["software"] if runs else None,
        "machine": runs[-1]["machine"] if runs else None,
    }


def _over_seeds(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = {}
    for method in tables[0] if tables else ():
        rows = [t[method] for t in tables]
        means = [r["mean"] for r in rows]
        found[method] = {
            "mean": fmean(means),
            "spread": stdev(means) if len(means) > 1 else None,
            "seeds": means,
            "sets": {n: fmean(r["sets"][n] for r in rows) for n in rows[0]["sets"]},
            "flops_per_token": fmean(r["flops_per_token"] for r in rows),
            "strict_opt_out": rows[0]["strict_opt_out"],
        }
    return found


def _cost(graph: Graph, root: Path) -> dict[str, Any]:
    """Steps done, their seconds on one thread and tokens trained on, by kind of step."""
    found: dict[str, Any] = {}
    for step, is_done in order_steps(graph.targets, root):
        if is_done:
            done = step.result(root)
            entry = found.setdefault(step.kind, {"steps": 0, "seconds": 0.0, "tokens": 0})
            entry["steps"] += 1
            entry["seconds"] = round(entry["seconds"] + done["seconds"], 1)
            entry["tokens"] += _tokens(step, done)
    return found


def _tokens(step: Step, done: Mapping[str, Any]) -> int:
    """Tokens trained on in a step."""
    return 0 if step.kind in _NO_TRAINING else done["metrics"].get("tokens", 0)


def _cost_by_method(graph: Graph, root: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Seconds of training and of reading on one thread, and tokens by kind of step, by method."""
    found: dict[str, Any] = {}
    for seed in seeds:
        inputs = graph.scores[seed].inputs
        for method in read_json(graph.scores[seed].directory(root) / "scores.json")["gap_closed"]:
            names = _ROLES.get(method, (method,))
            steps = [
                s
                for role, s in inputs.items()
                if role == method or any(role.startswith(n) for n in names if n.endswith("."))
            ]
            entry = found.setdefault(
                method, {"training_seconds": 0.0, "reading_seconds": 0.0, "tokens": {}}
            )
            for step, _ in order_steps(steps, root):
                if step.kind in _SHARED:
                    continue
                done = step.result(root)
                what = "reading" if step.kind.startswith("read") else "training"
                entry[f"{what}_seconds"] += done["seconds"] / len(seeds)
                if tokens := _tokens(step, done):
                    entry["tokens"][step.kind] = entry["tokens"].get(step.kind, 0) + tokens / len(
                        seeds
                    )
    return found
