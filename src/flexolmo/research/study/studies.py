"""The two kinds of studies by their recipe: of one size, and of how it grows."""

from collections.abc import Callable, Sequence
from pathlib import Path

from flexolmo.config import has_key, read_recipe
from flexolmo.files import read_json
from flexolmo.research.steps.step import Step
from flexolmo.research.study.recipe import StudyRecipe, build_graph
from flexolmo.research.study.results import write_results
from flexolmo.research.study.scaling import ScalingRecipe, build_scaling_graph
from flexolmo.research.study.scaling_page import write_scaling_page
from flexolmo.research.study.scaling_results import write_scaling_results
from flexolmo.research.study.study_page import write_page

Report = Callable[[Path], tuple[Path, Path]]  # of a root: results.json and page.md, written


def open_study(path: Path, overrides: Sequence[str]) -> tuple[list[Step], Report]:
    """The steps to ask for, and what writes results and page of those that are done.

    A recipe with `sizes` is of a scaling study. Raises ConfigError as `read_recipe` does.
    """
    if has_key(path, "sizes"):
        scaling = build_scaling_graph(read_recipe(path, ScalingRecipe, overrides))

        def report_growth(root: Path) -> tuple[Path, Path]:
            written = write_scaling_results(scaling, root)
            return written, write_scaling_page(read_json(written), root)

        return scaling.targets, report_growth
    graph = build_graph(read_recipe(path, StudyRecipe, overrides))

    def report(root: Path) -> tuple[Path, Path]:
        written = write_results(graph, root)
        return written, write_page(read_json(written), root)

    return graph.targets, report
