"""`flexolmo audit canaries` and `relearning`: attacks for which something is trained."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flexolmo.cli.audit_attacks import Data, Expert, Model, Seed, open_attack
from flexolmo.cli.run import Without
from flexolmo.cli.trust import TrustAny, TrustDirectory
from flexolmo.terminal import PlainConsole, echo

app = typer.Typer()
canaries_app = typer.Typer(
    no_args_is_help=True, help="Plant random documents before training, and look for them after."
)
app.add_typer(canaries_app, name="canaries")
Key = Annotated[Path, typer.Option(help="File that says which canaries were planted.")]


@canaries_app.command("plant")
def plant(
    data: Annotated[Path, typer.Option(help="The prepared set, which stays as it is.")],
    out: Annotated[Path, typer.Option(help="Directory of the prepared set with canaries.")],
    key: Key,
    count: Annotated[
        int, typer.Option(min=20, help="Canaries; a coin plants each, or keeps it to compare with.")
    ] = 400,
    tokens: Annotated[int, typer.Option(min=4, help="Random tokens of a canary.")] = 32,
) -> None:
    """Copy a prepared set, with canaries planted among its training documents.

    Train on the copy as you would on the set, then measure. The text of a canary is noise; an
    expert that is to be shipped is trained without.

    Example: flexolmo audit canaries plant --data prepared/code --out prepared/planted --key key
    """
    from flexolmo.audit.canaries import plant_canaries

    made = plant_canaries(data, out, key, count=count, tokens=tokens)
    echo(f"{out}: {made['planted']} of {made['canaries']} canaries planted. {key} says which.")


@canaries_app.command("measure")
def measure(
    model: Model,
    data: Annotated[Path, typer.Option(help="The prepared set with canaries.")],
    key: Key,
    out: Annotated[Path, typer.Option(help="Directory for canaries.json and page.html.")],
    expert: Expert = None,
    delta: Annotated[
        float, typer.Option(min=0, max=1, help="Delta of the privacy that is tested.")
    ] = 1e-6,
    seed: Seed = 0,
    trust: TrustDirectory = None,
    trust_any_signer: TrustAny = False,
) -> None:
    """Measure how well planted canaries are found, and the least epsilon that this proves.

    Example: flexolmo audit canaries measure --model model --data prepared/planted --key key
    --out canaries
    """
    from flexolmo.audit.canaries import audit_canaries
    from flexolmo.files import write_json
    from flexolmo.report.canaries_page import write_canaries_page
    from flexolmo.runtime import set_up

    set_up(seed)
    subjects, token_set = open_attack(
        model, data, trust, trust_any_signer, expert, None, None, None, "states"
    )
    found = audit_canaries(subjects, token_set, key, delta=delta, seed=seed)
    write_json(out / "canaries.json", found, is_private=True)
    page = write_canaries_page(found, out)
    print_canaries(found)
    echo(f"{page}, with canaries.json beside it")


@app.command("relearning")
def relearning(
    model: Annotated[Path, typer.Option(help="Directory of a mixture with your expert.")],
    data: Data,
    public: Annotated[Path, typer.Option(help="The prepared public set.")],
    out: Annotated[Path, typer.Option(help="Directory for relearning.json and page.html.")],
    expert: Expert = None,
    without: Without = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 40,
    every: Annotated[int, typer.Option(min=1, help="Steps between two readings.")] = 10,
    batch_size: Annotated[int, typer.Option(min=2, help="Sequences in a step.")] = 4,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    max_documents: Annotated[int, typer.Option(min=1, help="Documents to read at most.")] = 200,
    seed: Seed = 0,
    trust: TrustDirectory = None,
    trust_any_signer: TrustAny = False,
) -> None:
    """Try to bring back what an expert that is off knew, by a little training on other text.

    The mixture with your expert off and the bare anchor are trained alike, on public text and on
    your validation text, which no expert was trained on. Nothing that is trained here is kept.

    Example: flexolmo audit relearning --model model --data prepared/code --public prepared/public
    --out relearning
    """
    from flexolmo.audit.relearning import RelearningSettings, audit_relearning
    from flexolmo.config import parse_settings
    from flexolmo.data.batches import open_set
    from flexolmo.files import write_json
    from flexolmo.report.relearning_page import write_relearning_page
    from flexolmo.runtime import set_up

    settings = parse_settings(
        {
            "steps": steps,
            "every": every,
            "batch_size": batch_size,
            "seq_len": seq_len,
            "learning_rate": learning_rate,
            "max_documents": max_documents,
            "seed": seed,
        },
        RelearningSettings,
        "the command line",
    )
    set_up(seed)
    subjects, token_set = open_attack(
        model, data, trust, trust_any_signer, expert, without, None, None, "states"
    )
    found = audit_relearning(subjects, token_set, open_set(public), settings)
    write_json(out / "relearning.json", found, is_private=True)
    page = write_relearning_page(found, out)
    extra = found["extra"]
    low, high = extra["interval"]
    echo(
        f"The mixture gains {extra['bits_per_byte']:+.4f} bits per byte more than the anchor "
        f"({low:+.4f} to {high:+.4f})."
    )
    if found["is_same"] is not None:
        said = "reads" if found["is_same"] else "does NOT read"
        echo(f"Control: at every step the mixture {said} as the anchor does, to the bit.")
    echo(f"{page}, with relearning.json beside it")


def print_canaries(found: dict[str, Any]) -> None:
    """The figures of `audit_canaries` as a table, for a terminal."""
    from rich.table import Table

    from flexolmo.audit.results import SUBJECTS

    echo(f"{found['planted']:,} of {found['canaries']:,} canaries were planted.")
    table = Table("model", "exposure, mean", "by chance", "AUC", "epsilon, at least")
    for name, x in found["subjects"].items():
        exposure = x["exposure"]
        table.add_row(
            SUBJECTS[name],
            f"{exposure['mean']:.2f}",
            f"{exposure['by_chance']:.2f}",
            f"{x['membership']['auc']:.3f}",
            f"{x['epsilon']['epsilon']:.2f}",
        )
    PlainConsole().print(table)
