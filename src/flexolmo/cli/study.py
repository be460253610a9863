"""`flexolmo study`: the researcher's verb."""

from pathlib import Path
from typing import Annotated

import typer

from flexolmo.cli.anchor import Device, Overrides
from flexolmo.terminal import echo


def study(
    recipe: Annotated[
        str, typer.Option(help="mini (two cores), small (one GPU), or a TOML recipe of your own.")
    ] = "mini",
    out: Annotated[
        Path | None,
        typer.Option(help="Directory of the study; run again to go on. Default: runs/study-RECIPE"),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Steps to run at a time, one thread each.")
    ] = 2,
    device: Device = "cpu",
    dry_run: Annotated[
        bool, typer.Option(help="Only list the steps, and which of them are done.")
    ] = False,
    verify: Annotated[
        bool, typer.Option(help="First read every file of the steps done before.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Every method of the paper against ours, from one recipe: tables, figures, a page.

    The study is a graph of steps; each is kept by what it was made from and never done twice.
    Stop it as you like and run it again: it goes on where it was, inside a step too. Whenever it
    ends, results and page are written of the seeds that are finished.

    Examples:

        flexolmo study

        flexolmo study --set seeds=[0] --set has_ablations=false

        flexolmo study --recipe small --device cuda --set from_directory=corpora
    """
    from flexolmo.config import read_recipe
    from flexolmo.files import read_json
    from flexolmo.research.steps.graph import order_steps, run_graph
    from flexolmo.research.study.recipe import StudyRecipe, build_graph
    from flexolmo.research.study.results import write_results
    from flexolmo.research.study.study_page import write_page
    from flexolmo.runtime import choose_device

    shipped = Path(__file__).parents[1] / "recipes" / f"study_{recipe}.toml"
    path = shipped if shipped.is_file() else Path(recipe)
    settings = read_recipe(path, StudyRecipe, overrides or ())
    root = out or Path("runs") / f"study-{path.stem.removeprefix('study_')}"
    graph = build_graph(settings)
    if dry_run:
        steps = order_steps(graph.targets, root)
        for step, is_done in steps:
            echo(f"{'done' if is_done else '    '}  {step.label}")
        echo(f"{sum(done for _, done in steps)} of {len(steps)} steps are done")
        return
    choose_device(device)
    try:
        run_graph(graph.targets, root, processes, verify, device)
    finally:
        written = write_results(graph, root)
        page = write_page(read_json(written), root)
    echo(
        f"Open {page.with_suffix('.html')} (beside it: {page.name} for a code host, "
        f"{written.name} for machines)."
    )
