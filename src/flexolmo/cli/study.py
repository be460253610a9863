"""`flexolmo study`: the researcher's verb."""

from pathlib import Path
from typing import Annotated

import typer

from flexolmo.cli.anchor import Device, Overrides
from flexolmo.terminal import echo


def study(
    recipe: Annotated[
        str,
        typer.Option(
            help="mini (two cores), small (one GPU), scaling (anchors of several sizes, two "
            "cores), or a TOML recipe of your own."
        ),
    ] = "mini",
    out: Annotated[
        Path | None,
        typer.Option(help="Directory of the study; run again to go on. Default: runs/study-RECIPE"),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps to run at a time, one thread each; not under torchrun.",
            show_default="2",
        ),
    ] = None,
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

    A recipe with sizes asks how gain and cost grow: see --recipe scaling.

    The study is a graph of steps; each is kept by what it was made from and never done twice.
    Stop it as you like and run it again: it goes on where it was, inside a step too. Whenever it
    ends, results and page are written of the seeds that are finished.

    Examples:

        flexolmo study

        flexolmo study --set seeds=[0] --set has_ablations=false

        flexolmo study --recipe small --device cuda --set from_directory=corpora

        flexolmo study --recipe scaling --set 'expert_steps=[20, 80]'

    By several processes, with torchrun: docs/guides/many_processes.md
    """
    from flexolmo.research.steps.crew import find_workers
    from flexolmo.research.steps.graph import order_steps, run_graph
    from flexolmo.research.study.studies import open_study
    from flexolmo.runtime import choose_device

    shipped = Path(__file__).parents[1] / "recipes" / f"study_{recipe}.toml"
    path = shipped if shipped.is_file() else Path(recipe)
    root = out or Path("runs") / f"study-{path.stem.removeprefix('study_')}"
    with find_workers(processes, root, device) as workers:
        if workers is None:
            return
        targets, report = open_study(path, overrides or ())
        if dry_run:
            steps = order_steps(targets, root)
            for step, is_done in steps:
                echo(f"{'done' if is_done else '    '}  {step.label}")
            echo(f"{sum(done for _, done in steps)} of {len(steps)} steps are done")
            return
        choose_device(device)
        try:
            run_graph(targets, root, workers, verify, device)
        finally:
            written, page = report(root)
        echo(
            f"Open {page.with_suffix('.html')} (beside it: {page.name} for a code host, "
            f"{written.name} for machines)."
        )
