"""`flexolmo generate` and `demo`: running what was built."""

import signal
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from flexolmo.cli.trust import TrustAny, TrustDirectory, trusted_owners
from flexolmo.errors import ConfigError
from flexolmo.inference.policy import parse_names
from flexolmo.terminal import PlainConsole, echo

Without = Annotated[str | None, typer.Option(help="Experts to switch off, comma-separated.")]
Only = Annotated[
    str | None,
    typer.Option(help="Experts to use alone, comma-separated; public alone is the anchor."),
]


MixOption = Annotated[
    str,
    typer.Option(
        "--mix",
        help="Outputs of the experts to mix: states, inside the model; or probabilities: up to "
        "four experts read side by side, which predicts better and takes two to four times as "
        "long.",
    ),
]


def parse_mix(given: str) -> Any:
    """The value of --mix, if there is one of that name; else ConfigError."""
    from flexolmo.model.probabilities import Mix

    if given not in get_args(Mix):
        raise ConfigError(f"--mix {given!r} is not known; {' and '.join(get_args(Mix))} are.")
    return given


def switches(without: str | None, only: str | None) -> dict[str, Any]:
    """The two options as `choose_experts` takes them; public is always on, so `only` may name it.

    Raises PolicyError for an empty name in either.
    """
    from flexolmo.bundle.manifest import PUBLIC

    return {
        "without": [] if without is None else parse_names(without, "--without"),
        "only": None if only is None else [n for n in parse_names(only, "--only") if n != PUBLIC],
    }


def generate(
    model: Annotated[
        Path, typer.Option(help="Directory of a mixture, an anchor, or a stock Hugging Face model.")
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from standard input.")],
    without: Without = None,
    only: Only = None,
    mix: MixOption = "states",
    trust: TrustDirectory = None,
    trust_any_signer: TrustAny = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 200,
    temperature: Annotated[
        float,
        typer.Option(min=0, help="Sampling temperature; 0 is greedy: always the likeliest token."),
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Choose among this many likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float,
        typer.Option(help="Choose among the likeliest tokens that together have this probability."),
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Random seed for sampling.")] = 0,
) -> None:
    """Continue a text, with any source switched off.

    On a terminal, control characters in the text appear as pictures; elsewhere they are written
    unchanged.

    Example: flexolmo generate --model model --without news --prompt "The minister said"
    """
    from flexolmo.config import parse_settings
    from flexolmo.inference.generate import stream_text
    from flexolmo.inference.reader import open_reader
    from flexolmo.inference.sampling import Sampling
    from flexolmo.runtime import keep_memory

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
    text = _read_prompt(prompt)
    keep_memory()
    reader, _ = open_reader(
        model,
        trusted_owners(trust, trust_any_signer),
        **switches(without, only),
        mix=parse_mix(mix),
    )
    notes: list[str] = []
    echo(text, end="")
    for piece in stream_text(reader, text, sampling, say=notes.append):
        echo(piece, end="")
    echo()
    for note in notes:
        echo(note, err=True)


def _read_prompt(prompt: str) -> str:
    """The prompt given as an argument, or on standard input; ConfigError if it is not UTF-8."""
    given = sys.stdin.buffer.read() if prompt == "-" else prompt.encode("utf-8", "surrogateescape")
    try:
        return given.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(
            f"The prompt is not UTF-8: byte 0x{given[e.start]:02x} at place {e.start}. Convert it, "
            "for example with iconv."
        ) from None


def print_table(results: dict[str, Any]) -> None:
    """The table of bits per byte and the bars, for a terminal."""
    from rich.table import Table

    sets = results["bits_per_byte"]["anchor"]
    table = Table("bits per byte", *sets)
    for arrangement, row in results["bits_per_byte"].items():
        table.add_row(arrangement, *(f"{row[s]:.3f}" if s in row else "" for s in sets))
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
