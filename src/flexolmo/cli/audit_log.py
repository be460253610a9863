"""Verbs of `flexolmo audit` that read the audit log of a server."""

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flexolmo.terminal import PlainConsole, echo

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

    from flexolmo.serving.checkpoint import Checkpoint

app = typer.Typer()
_PANEL = "The audit log of a server"

Log = Annotated[Path, typer.Argument(help="Directory of a server's audit log.")]
Key = Annotated[
    Path | None,
    typer.Option(
        help="Public key of the log, as you keep it; else the one in its directory is believed."
    ),
]


@app.command("verify", rich_help_panel=_PANEL)
def verify(
    log: Log,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="A checkpoint that was kept elsewhere; may be given several times."),
    ] = None,
    key: Key = None,
) -> None:
    """Find any entry of an audit log that was altered, removed, moved, put in or cut, and name it.

    Works while a server writes. Exits with 1 if something is wrong.

    Whoever has the log's directory and its key can write its history anew, but not so that it
    agrees with a checkpoint that was sent elsewhere before (`audit checkpoint`).

    Example: flexolmo audit verify audit --against yesterday.txt --key log.pub
    """
    from flexolmo.serving.audit_check import check_log, public_key

    signer = public_key(log, key)
    report = check_log(log, signer, [_read_checkpoint(path, signer) for path in against or []])
    for finding in report.findings:
        echo(finding)
    if report.num_findings:
        echo(f"{log} does not hold up. Found: {report.num_findings:,}.")
        raise typer.Exit(1)
    removed = f", {report.num_removed:,} of them removed and only their hashes left"
    hold = "entry holds" if report.num_entries == 1 else "entries hold"
    echo(f"{report.num_entries:,} {hold}{removed if report.num_removed else ''}.")
    if report.newest is not None:
        unsigned = report.num_entries - report.newest.size
        echo(
            f"The newest checkpoint, of {report.newest.time}, covers {report.newest.size:,}; "
            f"{unsigned:,} came after it, which are chained and not signed yet."
        )
    if key is None:
        echo("The key was taken from the log's own directory. Give --key to rely on yours.")


@app.command("checkpoint", rich_help_panel=_PANEL)
def checkpoint(log: Log, key: Key = None) -> None:
    """Print the newest checkpoint of an audit log, to be kept where its server cannot write.

    Example: flexolmo audit checkpoint audit > kept/$(date +%F).txt
    """
    from flexolmo.serving.audit_check import newest_checkpoint, public_key

    echo(newest_checkpoint(log, public_key(log, key)).note, end="")


@app.command("prove", rich_help_panel=_PANEL)
def prove(
    log: Log,
    number: Annotated[int | None, typer.Argument(help="Number of an entry.", min=0)] = None,
    since: Annotated[
        Path | None, typer.Option(help="An older checkpoint, in place of an entry.")
    ] = None,
    key: Key = None,
) -> None:
    """Print a proof, as JSON, that an entry is in the log; or that the log only grew since.

    Such a proof holds without the log: `audit verify-proof` needs it and the public key.

    Example: flexolmo audit prove audit 1207 > proof.json

    Since a checkpoint: flexolmo audit prove audit --since kept/2026-11-01.txt > grown.json
    """
    from flexolmo.errors import ConfigError
    from flexolmo.serving.audit_check import public_key
    from flexolmo.serving.audit_proof import prove_continuation, prove_entry

    signer = public_key(log, key)
    if number is not None and since is None:
        echo(prove_entry(log, number, signer).model_dump_json(indent=2))
    elif since is not None and number is None:
        older = _read_checkpoint(since, signer)
        echo(prove_continuation(log, older, signer).model_dump_json(indent=2))
    else:
        raise ConfigError("Give the number of an entry, or --since with a checkpoint.")


@app.command("verify-proof", rich_help_panel=_PANEL)
def verify_proof(
    proof: Annotated[Path, typer.Argument(help="File from flexolmo audit prove.")],
    key: Annotated[Path, typer.Option(help="Public key of the log, log.pem.pub.")],
) -> None:
    """Check a proof with nothing but the log's public key. Exits with 1 if it does not hold.

    Example: flexolmo audit verify-proof proof.json --key log.pem.pub
    """
    from flexolmo.serving.audit_check import public_key
    from flexolmo.serving.audit_proof import InclusionProof, read_proof

    found = read_proof(proof)
    try:
        echo(found.claim(public_key(proof.parent, key)))
    except ValueError as e:
        echo(f"{proof} proves nothing: {e}.")
        raise typer.Exit(1) from None
    if isinstance(found, InclusionProof):
        echo(found.entry)


@app.command("usage", rich_help_panel=_PANEL)
def usage(
    log: Log,
    first: Annotated[
        datetime.datetime, typer.Option("--from", formats=["%Y-%m-%d"], help="First day, in UTC.")
    ],
    last: Annotated[
        datetime.datetime, typer.Option("--to", formats=["%Y-%m-%d"], help="Last day, in UTC.")
    ],
    by: Annotated[
        Literal["owner", "principal"], typer.Option(help="Row for each owner, or each principal.")
    ] = "owner",
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    key: Key = None,
) -> None:
    """Sum up requests and tokens of a period, by owner or by principal.

    An owner's tokens are the owner's share of each request times its tokens, summed. Nothing finer
    than a request is ever written down. A row of few requests says much of these: see its number.

    Example: flexolmo audit usage audit --from 2026-11-01 --to 2026-11-30 --csv
    """
    import json
    from dataclasses import asdict

    from rich.table import Table

    from flexolmo.errors import ConfigError
    from flexolmo.numbers import format_number
    from flexolmo.serving.audit_check import public_key
    from flexolmo.serving.metering import measure_usage, usage_as_csv

    if as_csv and as_json:
        raise ConfigError("Give --csv or --json, not both.")
    rows = measure_usage(log, first.date(), last.date(), by, public_key(log, key))
    if as_csv:
        echo(usage_as_csv(rows), end="")
    elif as_json:
        found = {"from": f"{first.date()}", "to": f"{last.date()}", "by": by}
        echo(json.dumps(found | {"usage": [asdict(r) for r in rows]}, indent=2))
    else:
        table = Table(by, "requests", "prompt tokens", "written tokens", "tokens")
        for row in rows:
            counts = (row.requests, row.prompt_tokens, row.written_tokens, row.tokens)
            name = "(public text)" if row.name is None else row.name
            table.add_row(name, *(format_number(n, 0) for n in counts))
        PlainConsole().print(table)


@app.command("prune", rich_help_panel=_PANEL)
def prune(
    log: Log,
    before: Annotated[
        datetime.datetime,
        typer.Option(formats=["%Y-%m-%d"], help="First day, in UTC, of which entries are kept."),
    ],
    key: Key = None,
) -> None:
    """Remove entries of the days before a date; their hashes stay, so that the rest still verifies.

    Works while a server writes. Nothing is removed from a log that does not hold up.

    Example: flexolmo audit prune audit --before 2026-08-01
    """
    from flexolmo.serving.audit_check import public_key
    from flexolmo.serving.retention import remove_entries

    removed = remove_entries(log, before.date(), public_key(log, key))
    echo(f"Removed {removed:,} entries.")


def _read_checkpoint(path: Path, key: "ec.EllipticCurvePublicKey") -> "Checkpoint":
    """The checkpoint in the file `path`."""
    from flexolmo.errors import AuditError
    from flexolmo.files import read_bytes
    from flexolmo.serving.checkpoint import MAX_NOTE_BYTES, read_checkpoint

    try:
        note = read_bytes(path, MAX_NOTE_BYTES).decode(errors="replace")
        return read_checkpoint(note, key)
    except ValueError as e:
        raise AuditError(
            f"The checkpoint {path} cannot be used: {e}. If it is of this log, the log was "
            "replaced, or the key is another."
        ) from None
