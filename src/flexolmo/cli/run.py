"""`flexolmo generate`, `eval` and `demo`: running what was built."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer


def _names(text: str | None) -> list[str]:
    return [n.strip() for n in (text or "").split(",") if n.strip()]


def generate(
    model: Annotated[Path, typer.Option(help="Directory of a mixture, or of an anchor.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    without: Annotated[str | None, typer.Option(
        help="Experts to switch off, comma-separated.")] = None,
    only: Annotated[str | None, typer.Option(
        help="Experts to use alone, comma-separated; an empty text is the anchor.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 200,
    temperature: Annotated[float, typer.Option(
        min=0, help="0 is greedy: always the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Keep this many likeliest.")] = None,
    top_p: Annotated[float, typer.Option(help="Keep this probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Continue a text, with any source switched off.

    Example: flexolmo generate --model model --without news --prompt "The minister said"
    """
    from flexolmo.config import parse_settings
    from flexolmo.inference.generate import Sampling, stream, stream_ids
    from flexolmo.inference.policy import choose_experts
    from flexolmo.merge.mixture import load_mixture
    from flexolmo.model.checkpoint import load_anchor

    sampling = parse_settings({"max_new_tokens": max_new_tokens, "temperature": temperature,
                               "top_k": top_k, "top_p": top_p, "seed": seed}, Sampling,
                              "the command line")
    alone = None if only is None else _names(only)
    if (model / "anchor.json").exists():
        choose_experts([], without=_names(without), only=alone)
        anchor = load_anchor(model)
        pieces = stream_ids(anchor.model, anchor.tokenizer, prompt, sampling, None)
    else:
        pieces = stream(load_mixture(model), prompt, without=_names(without), only=alone,
                        sampling=sampling)
    typer.echo(prompt, nl=False)
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()


def evaluate(
    model: Annotated[Path, typer.Argument(help="Directory of a mixture.")],
    data: Annotated[list[Path], typer.Option(
        help="A prepared set; may be repeated. One named as an expert is that owner's own.")],
    out: Annotated[Path, typer.Option(help="Directory for JSON and figures.")] = Path("eval"),
    split: Annotated[str, typer.Option(
        help="heldout to report, validation to choose settings by.")] = "heldout",
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens read at once.")] = 256,
    max_bytes: Annotated[int | None, typer.Option(
        min=1, help="Read at most this much text of each set. Default: all.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Bits per byte of the anchor, each expert with it, the mixture, and without each owner.

    Example: flexolmo eval model --data prepared/public --data prepared/math --out eval
    """
    from flexolmo.data.batches import open_set
    from flexolmo.drawing import save_figure
    from flexolmo.errors import ConfigError
    from flexolmo.evaluation.likelihood import evaluate_mixture
    from flexolmo.files import write_json
    from flexolmo.merge.mixture import load_mixture
    from flexolmo.plots import plot_bits_per_byte, plot_optout_matrix, plot_routing
    from flexolmo.runtime import run_record, set_up

    if split not in ("heldout", "validation"):
        raise ConfigError(f"Split {split!r} is not known; heldout and validation are.")
    set_up(0, threads)
    mixture = load_mixture(model)
    opened = [open_set(d, mixture.tokenizer.digest) for d in data]
    sets = {s.name: s for s in opened}
    if len(sets) < len(opened):
        raise ConfigError(f"Sets need different names, found {', '.join(s.name for s in opened)}.")
    results = evaluate_mixture(mixture, sets, split, seq_len=seq_len, max_bytes=max_bytes)
    digests = {name: s.digest for name, s in sets.items()}
    config = {"split": split, "seq_len": seq_len, "max_bytes": max_bytes,
              "router": mixture.about["router"], "top_k": mixture.about["top_k"]}
    results["run"] = run_record(config, 0, {**digests, "anchor": mixture.about["anchor_digest"]})
    write_json(out / "results.json", results)
    for name, figure in (("bits_per_byte", plot_bits_per_byte(results)),
                         ("optout", plot_optout_matrix(results)),
                         ("routing", plot_routing(results))):
        save_figure(figure, out / f"{name}.png")
    print_table(results)
    typer.echo(f"{out / 'results.json'} and figures beside it")


def print_table(results) -> None:
    """The table of bits per byte and the bars, for a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("bits per byte", *results["bits_per_byte"]["anchor"])
    for arrangement, row in results["bits_per_byte"].items():
        table.add_row(arrangement, *(f"{x:.3f}" for x in row.values()))
    console = Console()
    console.print(table)
    for bar in results["summary"]["bars"]:
        mark = "[green]met[/green]    " if bar["met"] else "[red]missed[/red] "
        console.print(f"{mark} {bar['text']}: {bar['value']}", soft_wrap=True)


def demo(
    out: Annotated[Path, typer.Option(help="Directory of the run.")] = Path("runs/demo"),
    sets: Annotated[str | None, typer.Option(
        help="Owners, comma-separated, or all for all seven (needs apt and npm; a source that "
        "cannot be had is skipped by name). Default: the recipe's.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML recipe of the demo.")] = None,
    overrides: Annotated[list[str] | None, typer.Option(
        "--set", help="Override one value, for example --set anchor.train.steps=100.")] = None,
) -> None:
    """The whole story on real text: owners train apart, a coordinator merges, you switch.

    Fetches text, trains an anchor and each owner's expert in a process and directory of its own,
    merges the signed bundles, measures, and writes report.html. Run it again after a kill and it
    goes on where it was.
    """
    from flexolmo.config import read_recipe
    from flexolmo.demo import DemoRecipe, default_recipe, run_demo

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the jobs are ended too
    settings = read_recipe(recipe or default_recipe(), DemoRecipe, overrides or ())
    results = run_demo(settings, out, sets)
    print_table(results)
    typer.echo(f"Open {out / 'report.html'} (or report.png); machines read results.json.")
