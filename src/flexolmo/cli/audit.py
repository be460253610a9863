"""`flexolmo audit`: attacks on what leaves an owner's house."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flexolmo.terminal import PlainConsole, echo

app = typer.Typer(no_args_is_help=True, help="Attack what leaves your house, before others can.")


@app.command("statistics")
def statistics(
    expert: Annotated[
        Path, typer.Argument(help="A bundle, NAME.bundle, or the run of `expert train`.")
    ],
    anchor: Annotated[Path, typer.Option(help="Directory of the anchor it was trained beside.")],
    data: Annotated[Path, typer.Option(help="The prepared set it was trained on.")],
    out: Annotated[
        Path | None, typer.Option(help="File for the results as JSON, for you alone.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of drawn text and of intervals.")] = 0,
) -> None:
    """Attack what an expert tells of its text besides what it learnt.

    Four attacks on its table of token statistics and on its embedding and head: how often a token
    occurs, which rare tokens occur, which words of one document can be spelled, and which documents
    it was trained on. Each comes with its 95 % interval.

    Example: flexolmo audit statistics outbox/code.bundle --anchor anchor --data prepared/code
    """
    from flexolmo.audit.statistics import audit_statistics, open_expert
    from flexolmo.data.batches import open_set
    from flexolmo.files import write_json
    from flexolmo.model.checkpoint import load_anchor
    from flexolmo.runtime import set_up

    set_up(seed, None)
    base = load_anchor(anchor)
    found = audit_statistics(base, open_expert(expert), open_set(data, base.tokenizer.digest), seed)
    if out is not None:
        write_json(out, found, is_private=True)
    print_audit(found)
    if out is not None:
        echo(str(out))


def print_audit(found: dict[str, Any]) -> None:
    """The results of `audit_statistics` as a table, for a terminal."""
    from rich.table import Table

    from flexolmo.audit.statistics import rows_of

    tokens = found["tokens"]
    echo(
        f"Expert {found['expert']}: its table tells of {tokens['told']:,} tokens and "
        f"{tokens['pairs']:,} pairs, each in at least {found['min_documents']} of "
        f"{found['documents']:,} documents."
    )
    table = Table("attack", "found", "95 % interval", "by chance")
    for row in rows_of(found):
        table.add_row(*row)
    PlainConsole().print(table)
