"""The command line: one verb, one function. Errors are printed, not traced.

Heavy imports stand inside the verbs, so that `--help` answers at once.
"""

import sys
from typing import Annotated

import typer

from flexolmo.cli import anchor, audit, data, eval, expert, mix, policy, run, serve, trace
from flexolmo.cli.doctor import doctor
from flexolmo.cli.plan import plan
from flexolmo.cli.study import study
from flexolmo.errors import FlexOlmoError, ProofError, SourceUnavailable
from flexolmo.research.steps.jobs import UNAVAILABLE
from flexolmo.terminal import accept_any_character, echo

app = typer.Typer(
    name="flexolmo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Language models for flexible data use.

    Owners of text each train one expert beside a frozen public model (the anchor) and share only
    a signed bundle. A coordinator merges bundles into one mixture. Whoever runs it switches each
    source on or off, per request and completely.

    The whole story on real text, in about nine minutes:  flexolmo demo
    """,
)
app.add_typer(data.app, name="data")
app.add_typer(anchor.app, name="anchor")
app.add_typer(expert.app, name="expert")
app.add_typer(mix.app, name="mix")
app.add_typer(eval.app, name="eval")
app.add_typer(audit.app, name="audit")
app.add_typer(policy.app, name="policy")
app.add_typer(serve.app, name="serve")
app.add_typer(trace.app, name="trace")
app.command()(run.generate)
app.command()(run.demo)
app.command()(study)
app.command()(plan)
app.command()(doctor)


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        echo(version("flexolmo"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; exit 2 with a message when someone must act, 1 when a proof does not
    hold, 3 when a source cannot be had, 130 on Ctrl-C."""
    accept_any_character()
    try:
        app()
    except FlexOlmoError as e:
        echo(f"{type(e).__name__}: {e}", err=True)
        sys.exit({ProofError: 1, SourceUnavailable: UNAVAILABLE}.get(type(e), 2))
    except OSError as e:
        echo(f"{e.strerror or e}: {e.filename or 'no file named'}", err=True)
        sys.exit(2)
    except SystemExit as e:
        if e.code == 130:  # what typer makes of Ctrl-C
            echo("Stopped. Run the same command again to go on from the last checkpoint.", err=True)
        raise
