"""`flexolmo plan`: what a recipe takes, on machines that need not be at hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexolmo.cli.anchor import Overrides, Threads
from flexolmo.terminal import PlainConsole, echo

if TYPE_CHECKING:
    from flexolmo.model.stock import DtypeName
    from flexolmo.model.transformer import ModelConfig
    from flexolmo.train.anchor import AnchorRecipe
    from flexolmo.train.expert import ExpertRecipe
    from flexolmo.train.forecast import Forecast
    from flexolmo.train.rates import Machine


def plan(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="TOML recipe of anchor train or expert train, or one that comes with FlexOlmo: "
            "paper/anchor, paper/expert, paper/expert_low_rank, anchor, expert, expert_paper, "
            "expert_private."
        ),
    ] = None,
    anchor: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the anchor, or of a stock OLMo 2 checkpoint, that an expert is "
            "trained beside. Of it only config.json is read.",
            show_default="for paper/ recipes, the paper's 7B",
        ),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=2, help="Tokens of the vocabulary, for an anchor's recipe.")
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(help="GPUs to plan for, of the table: A100, H100, H200. Example: 8xH100"),
    ] = None,
    machine: Annotated[
        Path | None,
        typer.Option(help="Machine to plan for, by the file that --measure wrote on it."),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes of torchrun, each with a --machine to itself.")
    ] = 1,
    price: Annotated[
        float | None, typer.Option(min=0, help="Price of one GPU or machine an hour, for the cost.")
    ] = None,
    overrides: Overrides = None,
    write: Annotated[
        Path | None,
        typer.Option(
            help="Directory to write into: the recipe, and files that start it by torchrun, under "
            "Slurm and on Kubernetes."
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the expert in these files.")] = "expert",
    measure: Annotated[
        Path | None,
        typer.Option(
            help="Measure this machine's processor, in one to five minutes, and write what is "
            "found here. GPUs are not measured: use flexolmo expert train --plan on them."
        ),
    ] = None,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what a training will take: size, memory, FLOPs, time, money. Trains nothing.

    No text and no weights are needed, and none of the machines. How it is worked out, and how far
    to trust it: docs/guides/planning.md. To time a few steps on your own text instead, give --plan
    to expert train.

    The paper's expert: flexolmo plan paper/expert --gpus 8xH100 --price 2.50

    Yours, here: flexolmo plan --measure here.json

    then: flexolmo plan expert --anchor anchor --machine here.json

    Files to start it: flexolmo plan paper/expert --gpus 16xH100 --set train.accumulate=64
    --write launch
    """
    import json
    import math

    from flexolmo.bundle.manifest import require_name
    from flexolmo.errors import ConfigError
    from flexolmo.train.launch import refuse_taken

    require_name(name)
    if measure is not None and (gpus is not None or machine is not None):
        raise ConfigError("--measure plans for this machine: leave out --gpus and --machine.")
    if write is not None:
        refuse_taken(write)
    if price is not None and not math.isfinite(price):
        raise ConfigError(f"--price {price} is not a number of money.")
    if recipe is None:
        if measure is None:
            raise ConfigError("Name a recipe, such as paper/expert, or a TOML file.")
        _measure(measure, threads)
        return
    settings, path = _read(recipe, overrides or ())
    config, dtype = _shape(settings, path, anchor, vocab_size)
    from flexolmo.train.forecast import forecast

    if measure is not None:
        from flexolmo.train.count import count_step

        count_step(config, settings, processes, dtype)  # refuses before time is spent
        machine = _measure(measure, threads)
    chosen, count = _choose_machine(gpus, machine, processes)
    told = forecast(settings, config, chosen, count, dtype, price)
    if as_json:
        echo(json.dumps(told.to_json(), indent=2))
    else:
        print_forecast(recipe, told)
    if write is not None:
        _write(write, settings, told, name, as_json)


def _measure(path: Path, threads: int | None) -> Path:
    """Measure this machine, and write it to `path`."""
    from flexolmo.errors import ConfigError
    from flexolmo.files import write_json
    from flexolmo.train.measure import measure_machine

    if path.exists():
        raise ConfigError(f"{path} is there already; give another --measure.")
    found = measure_machine(threads)
    write_json(path, found.model_dump())
    echo(f"{path}: {found.name}; {found.source}")
    return path


def _choose_machine(gpus: str | None, path: Path | None, processes: int) -> "tuple[Machine, int]":
    from flexolmo.errors import ConfigError
    from flexolmo.train.forecast import parse_gpus
    from flexolmo.train.rates import find_machine, read_machine

    if (gpus is None) == (path is None):
        raise ConfigError(
            "Say on what, in one way: --gpus 8xH100, or --machine FILE, which --measure FILE "
            "writes on that machine."
        )
    if path is not None:
        count = processes
        found = read_machine(path)
    elif processes != 1:
        raise ConfigError("--processes goes with --machine: of --gpus each has one process.")
    else:
        count, name = parse_gpus(gpus or "")
        found = find_machine(name)
    if count > found.per_node and count % found.per_node:
        raise ConfigError(
            f"Found {count} of {found.name}, which do not fill computers of {found.per_node}: give "
            "a multiple."
        )
    return found, count


def _read(
    recipe: str, overrides: "list[str] | tuple[()]"
) -> "tuple[AnchorRecipe | ExpertRecipe, Path]":
    from flexolmo.config import find_recipe, has_key, read_recipe
    from flexolmo.train.anchor import AnchorRecipe
    from flexolmo.train.expert import ExpertRecipe

    path = find_recipe(recipe)
    if has_key(path, "model"):
        return read_recipe(path, AnchorRecipe, overrides), path
    return read_recipe(path, ExpertRecipe, overrides), path


def _shape(
    settings: "AnchorRecipe | ExpertRecipe", path: Path, anchor: Path | None, vocab_size: int | None
) -> "tuple[ModelConfig, DtypeName]":
    """The decoder, and the precision of its weights."""
    from flexolmo.config import RECIPES, parse_settings
    from flexolmo.errors import ConfigError
    from flexolmo.model.stock import StockConfig, read_stock_config
    from flexolmo.model.transformer import ModelConfig
    from flexolmo.train.anchor import AnchorRecipe

    papers = RECIPES / "paper"
    is_paper = path.parent == papers
    papers_anchor = papers / "olmo2_7b"
    if isinstance(settings, AnchorRecipe):
        if anchor is not None:
            raise ConfigError("--anchor is for an expert's recipe; this one is an anchor's.")
        if vocab_size is None and is_paper:
            vocab_size = read_stock_config(papers_anchor, StockConfig).vocab_size
        if vocab_size is None:
            raise ConfigError("An anchor's vocabulary is its tokenizer's: give --vocab-size.")
        values = settings.model.model_dump() | {"vocab_size": vocab_size}
        return parse_settings(values, ModelConfig, str(path)), "float32"
    if vocab_size is not None:
        raise ConfigError("--vocab-size is for an anchor's recipe; this one is an expert's.")
    if anchor is None and not is_paper:
        raise ConfigError(
            "Say beside which anchor: --anchor DIRECTORY, of which config.json is read."
        )
    if anchor is not None and not (anchor / "config.json").exists():
        raise ConfigError(
            f"{anchor} has no config.json: give --anchor the directory of an anchor, or of a stock "
            "OLMo 2 checkpoint."
        )
    stock = read_stock_config(anchor or papers_anchor, StockConfig)
    return stock.decoder, stock.dtype or stock.torch_dtype or "float32"


def _write(
    directory: Path,
    settings: "AnchorRecipe | ExpertRecipe",
    told: "Forecast",
    name: str,
    is_quiet: bool,
) -> None:
    from flexolmo.train.expert import ExpertRecipe
    from flexolmo.train.launch import Launch, write_launch

    nodes = max(1, told.processes // told.machine.per_node)
    launch = Launch(
        recipe=settings.model_dump(mode="json", exclude_none=True),
        is_expert=isinstance(settings, ExpertRecipe),
        nodes=nodes,
        per_node=told.processes // nodes,
        device=told.machine.device,
        threads=told.machine.threads,
        hours=told.seconds / 3600,
        name=name,
    )
    written = write_launch(directory, launch)
    if not is_quiet:
        echo(f"Written: {', '.join(map(str, written))}")


def print_forecast(recipe: str, told: "Forecast") -> None:
    """A forecast as a table, for a terminal."""
    from rich.table import Table

    many = f"{told.processes} x " if told.processes > 1 else ""
    table = Table("", f"{recipe} on {many}{told.machine.name} would take")
    for about, value in (*_size_rows(told), *_time_rows(told)):
        table.add_row(about, value)
    table.add_row("rates", told.machine.source)
    PlainConsole().print(table)
    verdict = {
        "no": "It does not fit.",
        "close": "It may not fit: memory is told within 20 %.",
    }.get(told.fits or "")
    if verdict is not None:
        echo(
            f"{verdict} Compute blocks again on the way back (--set train.recompute=true), read "
            "the batch in more parts (--set train.accumulate=N), or take more machines."
        )


def _size_rows(told: "Forecast") -> Iterator[tuple[str, str]]:
    """Rows of the table on what is kept: parameters, the bundle and memory."""
    from flexolmo.numbers import format_parameters

    trained = format_parameters(told.trained_parameters)
    active = format_parameters(told.active_parameters)
    whole = format_parameters(told.parameters)
    yield "parameters", f"{whole}, of which {trained} learn; {active} work on a token"
    if told.bundle_bytes is not None:
        yield "bundle", f"{_size(told.bundle_bytes)} of weights"
    memory = told.memory
    need = _size(memory.total)
    room = told.machine.memory_bytes
    if room is not None and told.fits is not None:
        answer = {"yes": "fits", "close": "close", "no": "does not fit"}[told.fits]
        need += f" of {_size(room)}: {answer}"
    yield "memory of each", need
    parts = {
        "weights": memory.weights,
        "optimizer": memory.optimizer,
        "gathered": memory.gathered,
        "gradients and activations": memory.step,
        "the anchor as loaded": memory.anchor,
        "the process": memory.process,
    }
    yield "", "; ".join(f"{k} {_size(v)}" for k, v in parts.items() if v)


def _time_rows(told: "Forecast") -> Iterator[tuple[str, str]]:
    """Rows of the table on what is spent: FLOPs, time and money."""
    from flexolmo.numbers import format_duration, format_number, format_percent

    flops = told.flops_a_token
    yield "FLOPs", f"{_power(flops)} a token, {_power(flops * told.tokens)} in all"
    step = told.step
    yield "tokens", f"{told.tokens:,} in {told.steps:,} steps of {step.total:.3g} s"
    shares = {
        "products": step.products / step.total,
        "other work": step.rest / step.total,
        "optimizer": step.update / step.total,
        "waiting for others": step.waiting / step.total,
    }
    yield "", "; ".join(f"{k} {format_percent(v, 0)}" for k, v in shares.items() if v > 0.005)
    if told.processes > 1 and told.machine.link_bytes is None:
        yield "", "waiting for others is not known, and left out"
    yield "tokens a second", format_number(told.tokens_a_second, 0)
    days = told.seconds / 86400
    shown = f" ({format_number(days, 1)} days)" if days >= 2 else ""
    yield "time", format_duration(told.seconds) + shown
    if told.cost is not None:
        yield "cost", f"{format_number(told.cost, 2)} at {told.price_an_hour:.2f} an hour each"


def _power(count: float) -> str:
    """`count` with three digits, as 2.84e21."""
    return f"{count:.3g}".replace("e+", "e")


def _size(size_bytes: float) -> str:
    if size_bytes >= 1e9:
        return f"{size_bytes / 1e9:.3g} GB"
    return f"{size_bytes / 1e6:.3g} MB"
