"""`flexolmo generate` and `demo`: running what was built."""

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flexolmo.cli.trust import TrustAny, TrustDirectory, trusted_owners
from flexolmo.terminal import PlainConsole, echo

Without = Annotated[str | None, typer.Option(help="Experts to switch off, comma-separated.")]
Only = Annotated[
    str | None,
    typer.Option(help="Experts to use alone, comma-separated; an empty text is the anchor."),
]


def names_of(text: str | None) -> list[str]:
    """A comma-separated list."""
    return [n.strip() for n in (text or "").split(",") if n.strip()]


def switches(without: str | None, only: str | None) -> dict[str, Any]:
    """The two options as `choose_experts` takes them."""
    return {"without": names_of(without), "only": None if only is None else names_of(only)}


def generate(
    model: Annotated[Path, typer.Option(help="Directory of a mixture, or of an anchor.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    without: Without = None,
    only: Only = None,
    trust: TrustDirectory = None,
    trust_any_signer: TrustAny = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 200,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 is greedy: always the likeliest token.")
    ] = 0.8,
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

    sampling = parse_settings(
        {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
        },
        Sampling,
        "the command line",
    )
    chosen = switches(without, only)
    if (model / "anchor.json").exists():
        choose_experts([], **chosen)
        anchor = load_anchor(model)
        pieces = stream_ids(anchor.model, anchor.tokenizer, prompt, sampling, None)
    else:
        mixture = load_mixture(model, trusted_owners(trust, trust_any_signer))
        pieces = stream(mixture, prompt, sampling=sampling, **chosen)
    echo(prompt, end="")
    for piece in pieces:
        echo(piece, end="")
    echo()


def print_table(results: dict[str, Any]) -> None:
    """The table of bits per byte and the bars, for a terminal."""
    from rich.table import Table

    table = Table("bits per byte", *results["bits_per_byte"]["anchor"])
    for arrangement, row in results["bits_per_byte"].items():
        table.add_row(arrangement, *(f"{x:.3f}" for x in row.values()))
    console = PlainConsole()
    console.print(table)
    for bar in results["summary"]["bars"]:
        said = f"{'met' if bar['met'] else 'missed':<7} {bar['text']}: {bar['value']}"
        console.print(said, style="green" if bar["met"] else "red", soft_wrap=True)


def demo(
    out: Annotated[Path, typer.Option(help="Directory of the run.")] = Path("runs/demo"),
    sets: Annotated[
        str | None,
        typer.Option(
            help="Owners, comma-separated, or all for all seven (needs apt and npm; a source that "
            "cannot be had is skipped by name). Default: the recipe's."
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML recipe of the demo.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override one value, for example --set anchor.train.steps=100."),
    ] = None,
) -> None:
    """The whole story on real text: owners train apart, a coordinator merges, you switch.

    Fetches text, trains an anchor and each owner's expert in a process and directory of its own,
    merges the signed bundles, measures, and writes report.html. Run it again after a kill and it
    goes on where it was.
    """
    from flexolmo.config import read_recipe
    from flexolmo.research.demo.demo import DemoRecipe, default_recipe, run_demo

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the jobs are ended too
    settings = read_recipe(recipe or default_recipe(), DemoRecipe, overrides or ())
    results = run_demo(settings, out, sets)
    print_table(results)
    echo(f"Open {out / 'report.html'}; machines read results.json.")
