"""The plan of a preparation in parts: all that a process on any machine needs to do one of them.

It lies as JSON beside the work of the parts, so nothing is pickled and nothing is sent but a path,
the name of a stage and a number. Knows nothing of what a part does.
"""

import json
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexolmo.data.corpus import Corpus
from flexolmo.data.formats import ReadSettings
from flexolmo.data.kept_work import PLAN, check_ours, remove_work
from flexolmo.data.prepare import Preparation
from flexolmo.data.prepared import TOKENIZER_FILE
from flexolmo.data.settings import PrepareSettings
from flexolmo.data.tokenizer import load_tokenizer
from flexolmo.errors import DataError, UnfinishedError
from flexolmo.files import read_json, write_bytes

FORMAT = "flexolmo-parts-1"


@dataclass(frozen=True)
class Plan:
    """A preparation cut into parts."""

    task: Preparation
    sizes: list[int]  # bytes of each file of the corpus, by which files are dealt out
    tasks: int  # parts of a stage that is dealt out
    may_replace: bool  # another prepared set in its place
    work: Path  # directory of the files of all parts, with a name that no other run has


def begin_plan(
    directory: Path, task: Preparation, tasks: int, may_replace: bool, executor: str
) -> Plan:
    """Begin anew in `directory`, which is removed first.

    Processes of a killed run may still write to its work: ours has another name.

    Raises:
        FlexOlmoError: jobs of another run are at work there.
    """
    remove_work(directory)
    work = directory / secrets.token_hex(8)
    directory.mkdir(mode=0o700)
    work.mkdir(mode=0o700)
    if task.tokenizer is not None:
        task.tokenizer.save(work / TOKENIZER_FILE)
    written = {
        "format": FORMAT,
        "recipe": task.recipe,
        "work": work.name,
        "tasks": tasks,
        "has_tokenizer": task.tokenizer is not None,
        "settings": task.settings.model_dump(),
        **_describe_run(task, [file.stat().st_size for file, _ in task.corpus.files]),
        "may_replace": may_replace,
        "executor": executor,
    }
    _write(directory, written)
    return _make_plan(directory, written)


def resume_plan(
    directory: Path, task: Preparation, may_replace: bool, executor: str
) -> Plan | None:
    """The plan that a killed run of the same task left in `directory`, if any; noted as ours, with
    our paths: what it names may have been moved since."""
    if not (directory / PLAN).is_file():
        return None
    written = read_json(directory / PLAN, DataError)
    if written.get("format") != FORMAT or written["recipe"] != task.recipe:
        return None
    sizes = [size for _, _, size in written["corpus"]["files"]]
    run = {**_describe_run(task, sizes), "may_replace": may_replace, "executor": executor}
    _write(directory, {**written, **run})
    return read_plan(directory / written["work"])


def read_plan(work: Path) -> Plan:
    """The plan of the run whose parts keep their files in `work`.

    Raises:
        UnfinishedError: that run is over, or another was begun in its place.
        DataError: a public set, another set or the tokenizer is not the one it was begun with.
        FlexOlmoError: the directory is not one that we made.
    """
    directory = work.parent
    check_ours(directory)
    written = read_json(directory / PLAN, DataError) if (directory / PLAN).is_file() else {}
    if written.get("work") != work.name or written["format"] != FORMAT:
        raise UnfinishedError(
            f"{work} is not the work of a run that goes on: it was finished, refused or begun anew "
            "since this part was asked for. Nothing is left to do here."
        )
    plan = _make_plan(directory, written)
    if plan.task.recipe != written["recipe"]:
        raise DataError(
            f"{plan.task.out}: the public set, a set it is kept apart from, or the tokenizer has "
            "changed since this preparation was begun. Give the command again to begin anew."
        )
    return plan


def _describe_run(task: Preparation, sizes: list[int]) -> dict[str, Any]:
    """Paths of all that is read and written, and what else is not in the recipe."""
    corpus = task.corpus
    files = zip(corpus.files, sizes, strict=True)
    return {
        "out": str(task.out.absolute()),
        "public": str(task.public.absolute()) if task.public else None,
        "disjoint_from": [str(other.absolute()) for other in task.disjoint_from],
        "corpus": {
            "card": corpus.card,
            "files": [[str(file.absolute()), digest, size] for (file, digest), size in files],
            "settings": asdict(corpus.settings),
            "source": corpus.source,
            "not_read": corpus.not_read,
        },
    }


def _make_plan(directory: Path, written: dict[str, Any]) -> Plan:
    work = directory / written["work"]
    corpus = written["corpus"]
    task = Preparation(
        Corpus(
            corpus["card"],
            [(Path(file), digest) for file, digest, _ in corpus["files"]],
            ReadSettings(**corpus["settings"]),
            corpus["source"],
            corpus["not_read"],
        ),
        Path(written["out"]),
        load_tokenizer(work) if written["has_tokenizer"] else None,
        Path(written["public"]) if written["public"] else None,
        tuple(map(Path, written["disjoint_from"])),
        PrepareSettings(**written["settings"]),
    )
    sizes = [size for _, _, size in corpus["files"]]
    return Plan(task, sizes, written["tasks"], written["may_replace"], work)


def _write(directory: Path, written: dict[str, Any]) -> None:
    """Write the plan; in ASCII, for names of files need not be Unicode."""
    write_bytes(directory / PLAN, json.dumps(written, indent=1).encode())
