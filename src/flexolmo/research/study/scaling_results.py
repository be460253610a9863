"""A scaling study's results.json: its cells, lines through them, and an owner's cost by size.

A line says gap closed = a + b log10 N + c log10 T for one row, where N is the anchor's parameters
and T an expert's training tokens; it is fitted by least squares to the means over owners of every
cell, and its interval is that of one more cell. Source: ours.
"""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo.files import read_json, write_json
from flexolmo.model.shape import ExpertShape, count_anchor, expert_shapes
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.model.transformer import ModelConfig
from flexolmo.research.study.cost import dense_flops, training_flops
from flexolmo.research.study.results import describe_runs
from flexolmo.research.study.scaling import Cell, ScalingGraph, ScalingRecipe

KINDS = ("gap_closed", "mixed")
PAPER_TOKENS = 50e9  # of an expert. Source: paper §3.3.1
PAPER_ANCHOR = ModelConfig(  # Source: paper §3.2, of the released models
    vocab_size=100_352, d_model=4096, num_layers=32, num_heads=32, d_ff=11_008
)
PLANNED = {  # sizes for which cost is told besides those of the study
    "160M": ModelConfig(vocab_size=50_304, d_model=768, num_layers=12, num_heads=12, d_ff=2048),
    "1.5B": ModelConfig(vocab_size=100_352, d_model=2048, num_layers=16, num_heads=16, d_ff=8192),
    "7B": PAPER_ANCHOR,
}
PLANNED_RANKS = (8, 32, 128)
NUM_BIGRAMS = 65_536  # listed by an owner at these sizes: a guess, and 9 bytes each
PUBLIC_SHARE = 0.25  # of tokens that the anchor reads beside an expert of FFN: seen here
MIN_SPARE = 2  # cells beyond the line's three numbers that it takes to fit one
_CHANCE = 0.95  # of an interval


def write_scaling_results(graph: ScalingGraph, root: Path) -> Path:
    """Write results.json into `root` from whatever cells are finished; returns its path.

    cells: each with size, steps, seed, parameters, tokens, its tables, and the seconds of one
    owner's training by family. lines: by kind of text and row. predicted: each line at the paper's
    size. costs: bytes and FLOPs of an owner's expert by size, from shapes alone.
    """
    done = {cell: step for cell, step in graph.cells.items() if step.is_done(root)}
    cells = [
        {
            **cell._asdict(),
            "parameters": count_anchor(_config(graph.recipe, cell)),
            "tokens": graph.recipe.cell(cell).train.tokens,
            **read_json(step.directory(root) / "scores.json"),
            "seconds": {
                family: float(np.mean(seconds))
                for family, seconds in _seconds(step.inputs, root).items()
            },
        }
        for cell, step in done.items()
    ]
    lines = {kind: fit_lines(cells, kind) for kind in KINDS}
    results: dict[str, Any] = {
        "recipe": graph.recipe.model_dump(mode="json"),
        "cells_asked": len(graph.cells),
        "cells": cells,
        "lines": lines,
        "predicted": {
            "parameters": count_anchor(PAPER_ANCHOR),
            "tokens": PAPER_TOKENS,
            **{
                kind: {
                    row: predict(line, count_anchor(PAPER_ANCHOR), PAPER_TOKENS)
                    for row, line in found.items()
                }
                for kind, found in lines.items()
            },
        },
        "costs": owner_costs(),
        **describe_runs(graph.targets, root),
    }
    path = Path(root) / "results.json"
    write_json(path, results)
    return path


def _config(recipe: ScalingRecipe, cell: Cell) -> ModelConfig:
    return ModelConfig(vocab_size=recipe.study.vocab_size, **recipe.sizes[cell.size].model_dump())


def _seconds(inputs: Mapping[str, Any], root: Path) -> dict[str, list[float]]:
    """Seconds of each owner's training by family; of a cut, those of cutting and healing."""
    found: dict[str, list[float]] = {}
    for role, step in inputs.items():
        if role.startswith("cost."):
            found.setdefault(role.split(".")[1], []).append(step.result(root)["seconds"])
    return found


# --- lines ----------------------------------------------------------------------------------------


def fit_lines(cells: Sequence[Mapping[str, Any]], kind: str) -> dict[str, Any]:
    """The line of each row of `kind` that is in enough cells, of more than one N and one T."""
    found = {}
    for row in dict.fromkeys(r for c in cells for r in c[kind]):
        points = [c for c in cells if row in c[kind]]
        x = np.array([[1.0, *_place(c["parameters"], c["tokens"])] for c in points])
        if len(points) < x.shape[1] + MIN_SPARE or np.linalg.matrix_rank(x) < x.shape[1]:
            continue
        y = np.array([c[kind][row]["mean"] for c in points])
        weights, *_ = np.linalg.lstsq(x, y, rcond=None)
        spare = len(points) - x.shape[1]
        residual = float(np.sqrt(((y - x @ weights) ** 2).sum() / spare))
        found[row] = {
            "at": float(weights[0]),
            "per_tenfold_parameters": float(weights[1]),
            "per_tenfold_tokens": float(weights[2]),
            "residual": residual,
            "spare": spare,
            "covariance": np.linalg.inv(x.T @ x).tolist(),
        }
    return found


def predict(line: Mapping[str, Any], parameters: float, tokens: float) -> dict[str, float]:
    """Value of a line at one more cell, and that cell's 95 % interval by Student's t."""
    from scipy import stats  # takes half a second, which every study would wait

    x = np.array([1.0, *_place(parameters, tokens)])
    value = float(x @ [line["at"], line["per_tenfold_parameters"], line["per_tenfold_tokens"]])
    spread = line["residual"] * np.sqrt(1 + x @ np.array(line["covariance"]) @ x)
    half = float(stats.t.ppf((1 + _CHANCE) / 2, line["spare"]) * spread)
    return {"mean": value, "low": value - half, "high": value + half}


def _place(parameters: float, tokens: float) -> tuple[float, float]:
    """Tenfolds of a million parameters and of 100,000 tokens."""
    return float(np.log10(parameters / 1e6)), float(np.log10(tokens / 1e5))


# --- what an owner pays ---------------------------------------------------------------------------


def owner_costs() -> list[dict[str, Any]]:
    """Bytes of a bundle's weights in bfloat16 and training FLOPs a token, by size and kind."""
    found = []
    for size, config in PLANNED.items():
        D = config.d_model
        shapes = {
            "whole": ExpertShape(d_ff=config.d_ff, attention_rank=D, embedding_rank=D, head_rank=D),
            "ffn": ExpertShape(d_ff=config.d_ff),
            **{
                f"rank {r}": ExpertShape(
                    d_ff=config.d_ff, rank=r, attention_rank=r, embedding_rank=r, head_rank=r
                )
                for r in PLANNED_RANKS
            },
        }
        for kind, shape in shapes.items():
            flops = training_flops(config, shape, PUBLIC_SHARE if kind == "ffn" else 0.0)
            numbers = sum(
                prod(s)
                for name, s in expert_shapes(config, shape, EvidenceSettings()).items()
                if not name.startswith("router.")
            )
            found.append(
                {
                    "size": size,
                    "parameters": count_anchor(config),
                    "kind": kind,
                    "bytes": 2 * numbers + config.vocab_size + 9 * NUM_BIGRAMS,
                    "training_flops_per_token": flops,
                    "of_dense_training": flops / (3 * dense_flops(config)),
                }
            )
    return found
