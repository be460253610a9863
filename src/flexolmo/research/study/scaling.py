"""Scaling studies: anchors of several sizes and experts of several lengths of training, as steps.

A cell is one size of anchor and one number of an expert's steps. Each holds the rows that answer
what changes with size: the owner's own pair, our default and its cuts to a rank, an FFN alone, the
paper's recipe, BTM, and one mixture trained on all text together.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import Field, model_validator

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.config import Settings
from flexolmo.research.steps.step import Step
from flexolmo.research.study.recipe import (
    PAPER,
    LowRankRecipe,
    SeedSteps,
    StudyRecipe,
    describe_source,
)
from flexolmo.train.anchor import AnchorShape
from flexolmo.train.loop import TrainSettings

WARMUP_SHARE = 8  # of an expert's steps at most one in so many warms up
HEALING_SHARE = 4  # healing of a cut has one step of so many of the expert's


class Cell(NamedTuple):
    """One model of the grid."""

    size: str  # name of the anchor
    steps: int  # of an expert
    seed: int


class ScalingRecipe(Settings):
    """Everything that decides a scaling study."""

    expert_steps: tuple[int, ...] = Field(
        (20, 80, 320), min_length=1, description="Steps of an expert, ours or a rival's."
    )
    ranks: tuple[int, ...] = Field(
        (8, 32),
        description="Ranks that our expert is cut to, of all matrices alike; a size whose d_model "
        "is not larger goes without.",
    )
    sizes: dict[str, AnchorShape] = Field(
        {"3M": AnchorShape()}, min_length=1, description="Shapes of the anchors by name."
    )
    study: StudyRecipe = Field(
        StudyRecipe(), description="All else; a cell's anchor and steps replace its own."
    )

    @model_validator(mode="after")
    def _is_without_ablations(self) -> "ScalingRecipe":
        if self.study.has_ablations:
            raise ValueError("a scaling study has no ablations: give study.has_ablations=false")
        return self

    def cell(self, cell: Cell) -> StudyRecipe:
        """The study whose steps a cell takes its own from."""
        base = self.study
        return base.model_copy(
            update={
                "seeds": (cell.seed,),
                "anchor": base.anchor.model_copy(update={"model": self.sizes[cell.size]}),
                "train": _of_length(base.train, cell.steps),
            }
        )


@dataclass
class ScalingGraph:
    """The steps of a scaling study; those of the smallest anchors and shortest training first."""

    recipe: ScalingRecipe
    cells: dict[Cell, Step] = field(default_factory=dict)

    @property
    def targets(self) -> list[Step]:
        """Steps to ask for, to have everything."""
        return list(self.cells.values())


def build_scaling_graph(recipe: ScalingRecipe) -> ScalingGraph:
    """All steps of a scaling study. Text, and each anchor, are made once."""
    graph = ScalingGraph(recipe)
    source = describe_source(recipe.study)
    for seed in recipe.study.seeds:
        for size in recipe.sizes:
            for steps in recipe.expert_steps:
                cell = Cell(size, steps, seed)
                graph.cells[cell] = _score(recipe, cell, source)
    return graph


def _score(recipe: ScalingRecipe, cell: Cell, source: Mapping[str, Any]) -> Step:
    """The last step of a cell."""
    study, d_model = recipe.cell(cell), recipe.sizes[cell.size].d_model
    prefix = f"seed {cell.seed}, {cell.size}, {cell.steps} steps"
    made = SeedSteps(study, cell.seed, source, f"anchor of {cell.size}", prefix)
    default = made.experts("expert", study.default)
    families = {
        "default": default,
        "ffn": made.experts("FFN expert", study.default.model_copy(update={"scope": "ffn"})),
        "paper": made.experts("paper expert", PAPER),
    }
    for rank in recipe.ranks:
        if rank < d_model:
            cut = LowRankRecipe(
                rank=rank,
                attention_rank=rank,
                embedding_rank=rank,
                head_rank=rank,
                train=_of_length(study.low_rank.train, max(1, cell.steps // HEALING_SHARE)),
            )
            families[f"rank {rank}"] = made.compressed(f"cut to rank {rank},", default, cut)
            low = {f"{part}_rank": rank for part in ("attention", "embedding", "head")}
            families[f"trained at rank {rank}"] = made.experts(
                f"expert of rank {rank}", study.default.model_copy(update={"rank": rank, **low})
            )
    whole = _of_length(study.train, cell.steps * len(made.owners))
    together = made.step(
        "all together",
        "unrestricted",
        {"sets": made.owners, "top_k": study.top_k, "train": whole.model_dump(mode="json")},
    )
    reads = {"dense.public": made.read("anchor", "anchor", {})}
    reads |= {
        f"dense.{n}": made.read(f"dense {n}", "dense", {"model": d}) for n, d in made.dense.items()
    }
    reads["row.unrestricted_2x"] = made.read(
        "all together",
        "rival",
        {"model": together},
        sets=made.owners,
        top_k=study.top_k,
        splits=["heldout"],
    )
    reads["row.probabilities"] = made.read_probabilities(default)
    for name, experts in families.items():
        reads[f"row.{name}"] = made.read_mixture(
            name, experts, top_k=study.top_k, splits=["heldout"]
        )
    for n in made.owners:
        reads[f"pair.{n}"] = made.read(
            f"pair {n}", "mixture", {f"expert.{n}": default[n]}, on=[n, PUBLIC], splits=["heldout"]
        )
    costs = {f"cost.{f}.{n}": e for f, experts in families.items() for n, e in experts.items()}
    return Step(
        f"{made.prefix}: score",
        "scaling_score",
        {"owners": made.owners, "top_k": study.top_k},
        {**made.base, "windows": made.windows, **reads, **costs},
    )


def _of_length(train: TrainSettings, steps: int) -> TrainSettings:
    """The same training in another number of steps; short ones warm up for less."""
    warmup = min(train.warmup_steps, steps // WARMUP_SHARE)
    return train.model_copy(update={"steps": steps, "warmup_steps": warmup})
