"""`flexolmo anchor`: make or import the public model everyone starts from."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from flexolmo.terminal import echo

app = typer.Typer(
    no_args_is_help=True,
    help="Train, import or inspect the anchor: the public model all owners share.",
)
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads. Another number gives slightly different floats."),
]
Device = Annotated[
    str, typer.Option(help="Device to train on: cpu, cuda, or one of several: cuda:1.")
]
Precision = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option(
        "--dtype", help="Precision of the weights. Default: as stock transformers runs it."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override one value of the recipe, for example --set train.steps=100. "
        "May be repeated.",
    ),
]


@app.command("train")
def train(
    data: Annotated[
        Path, typer.Option(help="The prepared public set (see flexolmo data prepare).")
    ],
    out: Annotated[Path, typer.Option(help="Directory for the anchor.")] = Path("anchor"),
    run: Annotated[
        Path | None, typer.Option(help="Directory for checkpoints and metrics. Default: OUT.run")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="TOML recipe, or one that comes with FlexOlmo: anchor, paper/anchor. What it "
            "leaves out has defaults."
        ),
    ] = None,
    overrides: Overrides = None,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Train a small anchor on public text. Resumes after a kill.

    Example: flexolmo anchor train --data prepared/public --out anchor

    By several processes, with torchrun: docs/guides/many_processes.md
    """
    from flexolmo.config import find_recipe, read_recipe
    from flexolmo.data.batches import open_set
    from flexolmo.data.tokenizer import load_tokenizer
    from flexolmo.model.checkpoint import save_anchor
    from flexolmo.model.parallel import processes
    from flexolmo.train.anchor import AnchorRecipe, train_anchor

    with processes(device) as own_device:
        settings = read_recipe(recipe and find_recipe(recipe), AnchorRecipe, overrides or ())
        made = train_anchor(
            open_set(data),
            load_tokenizer(data),
            settings,
            run or out.with_name(out.name + ".run"),
            threads,
            own_device,
        )
        save_anchor(made, out)
        echo(f"{out}: anchor {made.digest}")


@app.command("import")
def import_(
    checkpoint: Annotated[
        Path, typer.Argument(help="Directory of a stock Olmo2ForCausalLM checkpoint (safetensors).")
    ],
    data: Annotated[
        Path, typer.Option(help="A public set prepared with that checkpoint's tokenizer.")
    ],
    out: Annotated[Path, typer.Option(help="Directory for the anchor.")] = Path("anchor"),
    dtype: Precision = None,
    document_mask: Annotated[
        bool | None,
        typer.Option(help="Keep attention within a document. Default: off, as in stock."),
    ] = None,
) -> None:
    """Make an anchor from any stock OLMo 2 checkpoint.

    Example: flexolmo anchor import OLMo-2-1B/ --data prepared/public --out anchor
    """
    from flexolmo.data.batches import open_set
    from flexolmo.model.checkpoint import save_anchor
    from flexolmo.train.anchor import import_anchor

    made = import_anchor(checkpoint, open_set(data), dtype, document_mask)
    save_anchor(made, out)
    echo(f"{out}: anchor {made.digest}")


@app.command("sign")
def sign(
    anchor: Annotated[Path, typer.Argument(help="Directory of the anchor.")],
    key: Annotated[Path, typer.Option(help="The coordinator's private key.")],
) -> None:
    """Sign an anchor and each of its files, so that owners can tell it from another.

    Given the public key, owners check it when they train, with --trust-coordinator.

    Example: flexolmo anchor sign anchor --key coordinator.pem
    """
    from flexolmo.bundle.signing import read_private_key
    from flexolmo.model.checkpoint import sign_anchor

    echo(f"{anchor}: signed; digest {sign_anchor(anchor, read_private_key(key)).digest}")


@app.command("inspect")
def inspect(anchor: Annotated[Path, typer.Argument(help="Directory of an anchor.")]) -> None:
    """Check an anchor's digest and print what it is, as JSON."""
    import json

    from flexolmo.model.checkpoint import load_anchor

    found = load_anchor(anchor)
    echo(
        json.dumps(
            {
                "digest": found.digest,
                "config": found.config.model_dump(),
                "parameters": sum(p.numel() for p in found.model.parameters()),
                "public_bigrams": len(found.public.keys),
                "form_bigrams": [len(table.keys) for table in found.forms],
                "record": found.record,
            },
            indent=2,
        )
    )
