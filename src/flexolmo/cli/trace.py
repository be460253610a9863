"""`flexolmo trace`: index an owner's training text, look up where a text may come from, serve."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flexolmo.errors import ConfigError
from flexolmo.terminal import PlainConsole, echo

if TYPE_CHECKING:
    from flexolmo.trace.spans import Span

app = typer.Typer(
    no_args_is_help=True,
    help="Find where a text occurs word for word in owners' training text, at the owners'.",
)
_MAX_TEXT_BYTES = 1 << 20


@app.command("index")
def index(
    data: Annotated[Path, typer.Option(help="Prepared set, from flexolmo data prepare.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory of the index.")],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes. Default: one for each core.")
    ] = None,
    shard_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Tokens of one part. Larger ones answer faster and need more memory."
        ),
    ] = 1 << 24,
) -> None:
    """Index the training split of a prepared set. The index holds the text: it stays with you.

    A run that was killed is gone on with by the same command.

    Example: flexolmo trace index --data prepared/hospital -o hospital.index
    """
    from importlib.util import find_spec

    from flexolmo.data.workers import count_cores
    from flexolmo.trace.build import build_index

    if find_spec("pydivsufsort") is None:
        raise ConfigError("An index needs pydivsufsort, not here: pip install 'flexolmo[trace]'.")
    card = build_index(data, out, shard_tokens, workers or count_cores())
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    echo(
        f"{out}: {card.documents:,} documents of {card.name}, {card.bytes:,} bytes of text; the "
        f"index has {size:,} bytes, {size / max(card.bytes, 1):.2f} for each byte of text."
    )


@app.command("query")
def query(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="INDEX...", help="Directories of indexes, or NAME=URL of served."),
    ],
    text: Annotated[Path, typer.Option(help="File with the text to trace, UTF-8; -: the input.")],
    min_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the shortest span.")] = 8,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Spans to show, the least likely. Default: all.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Page to write, .html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    key: Annotated[
        Path | None, typer.Option(help="Your private key, which signs questions to NAME=URL.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The anchor, whose tokenizer reads the text for NAME=URL.")
    ] = None,
) -> None:
    """Mark every longest span of a text that occurs word for word in the training text of sources.

    The least likely spans come first: the longer and the rarer their words.

    Example: flexolmo trace query hospital.index --text answer.txt --html answer.html

    Served: flexolmo trace query hospital=https://trace.hospital.example --text answer.txt
    --key coordinator.pem --tokenizer model/anchor
    """
    import json
    from dataclasses import asdict

    from flexolmo.trace.spans import rank_by_bits

    if html is not None and html.suffix != ".html":
        raise ConfigError(f"--html {html}: a name that ends with .html was expected.")
    whole = _read_text(text)
    names: list[str] = []
    found: list[Span] = []
    for source in sources:
        name, spans = _trace(source, whole, min_tokens, key, tokenizer)
        names.append(name)
        found += spans
    ranked = rank_by_bits(found, keep)
    if html is not None:
        from flexolmo.report.trace_page import write_trace_page

        echo(write_trace_page(whole, ranked, names, html), err=True)
    if as_json:
        told = [asdict(span) | {"text": whole[span.first : span.last]} for span in ranked]
        echo(json.dumps({"sources": names, "spans": told}, indent=2))
    else:
        _print_spans(whole, ranked, min_tokens)


def _trace(
    source: str, text: str, min_tokens: int, key: Path | None, tokenizer: Path | None
) -> "tuple[str, Sequence[Span]]":
    """Name of a source, and its spans of `text`."""
    from flexolmo.trace.index import open_index
    from flexolmo.trace.spans import find_spans
    from flexolmo.trace.words import split_words

    name, is_named, url = source.partition("=")
    if not (is_named and "://" in url):
        index = open_index(Path(source))
        return index.name, find_spans(index, split_words(text, index.tokenizer), min_tokens)
    from flexolmo.bundle.signing import read_private_key
    from flexolmo.data.tokenizer import load_tokenizer
    from flexolmo.trace.remote import CutShortError, RemoteIndex

    if key is None or tokenizer is None:
        raise ConfigError(f"{source} is served: give --key and --tokenizer too.")
    reader = load_tokenizer(tokenizer)
    remote = RemoteIndex(name, url, read_private_key(key))
    least = remote.offer().min_tokens
    if least > min_tokens:
        echo(f"{name}: the owner answers for spans of at least {least} tokens", err=True)
    try:
        spans: Sequence[Span] = remote.find_spans(split_words(text, reader), reader.digest)
    except CutShortError as e:
        if not e.spans:
            raise
        spans = e.spans
        echo(f"{e} There may be more spans than these.", err=True)
    return name, [span for span in spans if span.end - span.start >= min_tokens]


def _read_text(path: Path) -> str:
    import sys

    from flexolmo.files import read_bytes

    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(_MAX_TEXT_BYTES + 1)
            if len(data) > _MAX_TEXT_BYTES:
                raise ValueError(f"expected at most {_MAX_TEXT_BYTES:,} bytes")
        else:
            data = read_bytes(path, _MAX_TEXT_BYTES)
        return data.decode()
    except ValueError as e:  # UnicodeDecodeError too
        raise ConfigError(f"The text {path} cannot be traced: {e}.") from None


def _print_spans(text: str, spans: "Sequence[Span]", min_tokens: int) -> None:
    from rich.table import Table

    if not spans:
        echo(f"No span of at least {min_tokens} tokens occurs in these sources.")
        return
    table = Table("source", "tokens", "bits", "places", "first place", "words")
    for span in spans:
        places = [f"{o.document}, byte {o.position:,}" for o in span.occurrences]
        table.add_row(
            span.source,
            str(span.end - span.start),
            "" if span.bits is None else f"{span.bits:.0f}",
            "" if span.count is None else f"{span.count:,}",
            next(iter([*places, *span.documents]), ""),
            text[span.first : span.last],
        )
    PlainConsole().print(table)


@app.command("serve")
def serve(
    index: Annotated[Path, typer.Argument(help="Directory of the index.")],
    clients: Annotated[
        Path, typer.Option(help="Directory of public keys of who may ask, one NAME.pub each.")
    ],
    audit: Annotated[Path, typer.Option(help="Directory of the audit log, of this service alone.")],
    level: Annotated[
        Literal["yes", "count", "document", "text"],
        typer.Option(
            help="Told of a span that occurs: yes (nothing more), count, document (names), text."
        ),
    ] = "yes",
    min_tokens: Annotated[
        int, typer.Option(help="Tokens of the shortest span that is answered for.")
    ] = 16,
    questions_per_day: Annotated[
        int, typer.Option(help="Spans that a client may ask about on a day.")
    ] = 20_000,
    finds_per_day: Annotated[
        int, typer.Option(help="Spans a day of which a client is told that they occur.")
    ] = 500,
    finds_in_all: Annotated[
        int, typer.Option(help="The same, for as long as the audit log is kept.")
    ] = 10_000,
    requests_per_minute: Annotated[
        int, typer.Option(help="Signed questions of a client, each of up to 512 spans.")
    ] = 120,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.")] = 8100,
    ssl_keyfile: Annotated[
        Path | None, typer.Option(help="Private key for TLS, PEM; else a proxy does TLS.")
    ] = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Certificates for TLS, PEM.")] = None,
) -> None:
    """Answer coordinators' signed questions about an index, as much as you allow and no more.

    It says first how much a day's answers can tell at most. docs/guides/tracing.md explains.

    Example: flexolmo trace serve hospital.index --clients clients --audit audit --level document
    """
    from flexolmo.cli.serve import require_packages

    require_packages()
    from flexolmo.config import parse_settings
    from flexolmo.serving.audit_log import AuditLog
    from flexolmo.serving.server import ServerSettings
    from flexolmo.serving.trace_app import run_trace_server
    from flexolmo.serving.trace_desk import Budget, TraceDesk, read_clients, read_spending
    from flexolmo.trace.index import open_index

    budget = parse_settings(
        {
            "min_tokens": min_tokens,
            "questions_per_day": questions_per_day,
            "finds_per_day": finds_per_day,
            "finds_in_all": finds_in_all,
            "requests_per_minute": requests_per_minute,
        },
        Budget,
        "the command line",
    )
    settings = parse_settings(
        {"host": host, "port": port, "ssl_keyfile": ssl_keyfile, "ssl_certfile": ssl_certfile},
        ServerSettings,
        "the command line",
    )
    opened = open_index(index)
    bits = budget.bits_per_day(level, opened.card.documents)
    told = "parts of the text itself" if level == "text" else f"at most {bits:,.0f} bits"
    echo(f"A day's answers tell each client {told} of {opened.name}.", err=True)
    keys = read_clients(clients)
    log = AuditLog.open(audit)
    try:
        desk = TraceDesk(opened, keys, level, budget, log, read_spending(audit))
        run_trace_server(desk, settings)
    finally:
        log.close()
