"""The preparation of `prepare` as datatrove pipelines, on one machine.

datatrove deals out the tasks and notes which are done, so that a run killed at any moment goes on
from there; what is kept and what is written is decided by the functions of the small path alone,
and the result has the same bytes. Four stages, each of which waits for the one before: documents
are cleaned in many tasks, chosen in one, tokenized in many, and written in one.

Imports datatrove, of the extra `scale`; nothing is unpickled from a file.
"""

import fcntl
import json
import os
import secrets
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

from flexolmo.data.corpus import Corpus
from flexolmo.data.kept_work import hold_work, remove_at_end, remove_work
from flexolmo.data.pieces import (
    PieceStore,
    Removed,
    batch_documents,
    clean_documents,
    remove_pieces,
)
from flexolmo.data.prepare import (
    MARKER,
    Preparation,
    choose_pieces,
    chosen_batches,
    find_finished,
    remove_choice,
    write_set,
)
from flexolmo.data.shards import Tokenized, tokenize_texts
from flexolmo.errors import ConfigError, DataError
from flexolmo.files import explain_full_disk, read_json, write_directory_aside, write_json
from flexolmo.progress import PROGRESS_FILE

_PLAN = "plan.json"


def prepare_at_scale(
    task: Preparation,
    may_replace: bool = False,
    say: Callable[[str], object] = warnings.warn,
    workers: int = 1,
    tasks: int | None = None,
) -> dict[str, Any]:
    """Prepare a set in tasks that datatrove runs; returns its card.

    Args:
        task: the set, and how it is prepared.
        may_replace: whether another prepared set in its place is replaced instead of refused.
        say: told what `prepare_set` tells, at the end.
        workers: tasks that run at the same time.
        tasks: tasks of a stage that is dealt out; by default as many as the run that was killed
            had, else as many as workers.
    Raises:
        DataError: as `prepare_set`, or files of a killed run are not as its tasks left them.
        ConfigError: a run that was killed had another number of tasks.
        FlexOlmoError: another run is at work on this set.
    """
    mode = 0o700 if task.corpus.is_private else 0o777
    task.out.parent.mkdir(mode, parents=True, exist_ok=True)
    with hold_work(task.out) as directory:
        plan = _read_plan(directory, task)
        if plan is not None and tasks not in (None, plan["tasks"]):
            raise ConfigError(
                f"A run of {plan['tasks']} tasks was stopped here, and {tasks} were asked for. "
                f"Leave out --tasks to go on from there, or remove {directory} to begin anew."
            )
        with remove_at_end(directory), explain_full_disk(task.out):
            done = find_finished(task, may_replace)
            if done is not None:
                return done
            if plan is None:
                plan = _begin(directory, task, tasks or workers)
            work = directory / plan["work"]
            make_pipelines(task, work, plan["tasks"], workers).run()
            for stage in (ChooseStage, WriteStage):
                for line in read_json(_result(work, stage.name, 0), DataError):
                    say(line)
            card = find_finished(task, may_replace=True)
            if card is None:
                raise DataError(f"{task.out} is not as it was written: run this again.")
            return card


def _read_plan(directory: Path, task: Preparation) -> dict[str, Any] | None:
    """The plan that a killed run of the same task noted in `directory`, if any."""
    if not (directory / _PLAN).is_file():
        return None
    plan: dict[str, Any] = read_json(directory / _PLAN, DataError)
    return plan if plan["recipe"] == task.recipe else None


def _begin(directory: Path, task: Preparation, tasks: int) -> dict[str, Any]:
    """Begin anew. Processes of a killed run may still write to its work: ours has another name."""
    remove_work(directory)
    name = secrets.token_hex(8)
    plan = {"recipe": task.recipe, "tasks": tasks, "work": name}
    directory.mkdir(mode=0o700)
    (directory / name).mkdir(mode=0o700)
    write_json(directory / _PLAN, plan)
    return plan


def make_pipelines(
    task: Preparation, work: Path, tasks: int, workers: int
) -> LocalPipelineExecutor:
    """The last of the four pipelines, which depends on those before; arguments as in
    `prepare_at_scale`."""
    logger.disable("datatrove")  # its lines would hide ours
    last = None
    for stage, number in (
        (CleanStage, tasks),
        (ChooseStage, 1),
        (TokenizeStage, tasks),
        (WriteStage, 1),
    ):
        last = LocalPipelineExecutor(
            pipeline=[stage(task, work, tasks)],
            tasks=number,
            workers=min(workers, number),
            logging_dir=str(work / "logs" / stage.name),
            depends=last,
        )
    return last


class Stage(PipelineStep):
    """One stage of a preparation, of which each task does its part."""

    name: str
    type = "flexolmo"

    def __init__(self, task: Preparation, work: Path, tasks: int) -> None:
        super().__init__()
        self.job = _Job(task, work, tasks)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Do part `rank`, but for one that is done. A task of a run that was killed may still be at
        work on it: wait."""
        work = self.job.work
        with _hold_part(work / f"lock-{self.name}-{rank:05d}"), _one_shows_progress(work, rank):
            result = _result(work, self.name, rank)
            if not result.exists():
                found = self.work_on(rank)
                os.sync()  # the files are there before the result, which says that they are
                write_json(result, found)
        yield from ()

    def work_on(self, part: int) -> Any:
        """Do part number `part`; doing it again gives the same files. Returns JSON for the stages
        after this."""
        raise NotImplementedError


class CleanStage(Stage):
    """Cleans, cuts and fingerprints documents."""

    name = "clean"

    def work_on(self, part: int) -> dict[str, Any]:
        task, work = self.job.task, self.job.work
        remove_pieces(work, part)  # of a run that was killed
        store = PieceStore(work, part)
        corpus, group, lane, lanes = share_of(task.corpus, part, self.job.tasks)
        removed = Removed()
        first_batches: dict[str, int] = {}
        for number, documents in enumerate(batch_documents(corpus.read())):
            if number % lanes != lane:
                continue
            cleaned = clean_documents(task.settings, documents)
            store.add((group << 40) + number, cleaned)
            removed.add(cleaned.removed)
            for reason in cleaned.removed.documents:
                first_batches.setdefault(reason, (group << 40) + number)
        return {
            "written": store.counts,
            "first_batches": first_batches,
            "documents": removed.documents,
            "bytes": removed.bytes,
            "found": removed.found,
            "replaced_characters": removed.replaced_characters,
            "noted": corpus.noted if lane == 0 else {},  # all lanes read all
        }


class ChooseStage(Stage):
    """Drops repeats, splits, and learns the tokenizer where none was given."""

    name = "choose"

    def work_on(self, part: int) -> list[str]:
        task, work = self.job.task, self.job.work
        remove_choice(work)
        removed, noted = _join_removed(work, self.job.tasks)
        task.corpus.noted.clear()
        task.corpus.noted.update(noted)
        said: list[str] = []
        choose_pieces(task, work, self.job.tasks, removed, said.append)
        return said


class TokenizeStage(Stage):
    """Tokenizes the pieces that were chosen."""

    name = "tokenize"

    def work_on(self, part: int) -> int:
        work = self.job.work
        with open(_tokens(work, part), "wb") as f:
            for number, places in enumerate(chosen_batches(work)):
                if number % self.job.tasks == part:
                    found = tokenize_texts(work, places)
                    head = {
                        "bytes": len(found.tokens),
                        "lengths": found.lengths,
                        "changed": found.changed,
                    }
                    f.write(json.dumps(head).encode() + b"\n" + found.tokens)
            return f.tell()


class WriteStage(Stage):
    """Writes the prepared set."""

    name = "write"

    def work_on(self, part: int) -> list[str]:
        task, work = self.job.task, self.job.work
        said: list[str] = []
        is_private = task.corpus.is_private
        with (
            ExitStack() as files,
            write_directory_aside(task.out, MARKER, is_private=is_private) as aside,
        ):
            write_set(task, work, aside, _Replay(work, self.job.tasks, files), said.append)
        return said


class _Job:
    """All that the tasks of a stage share, shown in a few words where datatrove shows a step."""

    def __init__(self, task: Preparation, work: Path, tasks: int) -> None:
        self.task = task
        self.work = work
        self.tasks = tasks

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        logger.disable("datatrove")

    def __repr__(self) -> str:
        return f"{self.task.corpus.name} in {self.tasks} tasks"


def share_of(corpus: Corpus, part: int, parts: int) -> tuple[Corpus, int, int, int]:
    """The files that part `part` of `parts` reads, and which batches of their documents are its.

    Files are dealt out in neighbouring groups of about as many bytes. Where there are fewer files
    than parts, several parts (lanes) read the same group and take its batches in turn.

    Returns:
        The files as a corpus, the number of their group, the lane, and lanes of that group.
    """
    groups = max(1, min(parts, len(corpus.files)))
    lane, group = divmod(part, groups)
    lanes = len(range(group, parts, groups))
    total = max(1, corpus.num_bytes)
    files = []
    before = 0
    for file, digest in corpus.files:
        if min(before * groups // total, groups - 1) == group:  # empty files may come last
            files.append((file, digest))
        before += file.stat().st_size
    return replace(corpus, files=files, noted=Counter()), group, lane, lanes


def _join_removed(work: Path, parts: int) -> tuple[Removed, Counter[str]]:
    """Losses of cleaning, and what reading noted, in all parts; reasons in order of reading.

    Raises:
        DataError: files of a part are missing, or not as long as its task wrote them.
    """
    found = [read_json(_result(work, CleanStage.name, part), DataError) for part in range(parts)]
    for part, one in enumerate(found):
        _check_written(work, part, PieceStore(work, part, is_read_only=True).counts, one["written"])
    first_batches = [(batch, r) for one in found for r, batch in one["first_batches"].items()]
    removed = Removed()
    for _, reason in sorted(first_batches, key=lambda pair: pair[0]):
        removed.documents[reason] = 0
        removed.bytes[reason] = 0
    noted = Counter[str]()
    for one in found:
        counts = Removed(found=one["found"], replaced_characters=one["replaced_characters"])
        counts.documents.update(one["documents"])
        counts.bytes.update(one["bytes"])
        removed.add(counts)
        noted.update(one["noted"])
    return removed, noted


class _Replay:
    """Stands in for the processes of `write_set`: tokens that the tasks wrote, in order."""

    def __init__(self, work: Path, parts: int, files: ExitStack) -> None:
        paths = [_tokens(work, part) for part in range(parts)]
        for part, path in enumerate(paths):
            expected = read_json(_result(work, TokenizeStage.name, part), DataError)
            _check_written(work, part, path.stat().st_size if path.exists() else None, expected)
        self._files = [files.enter_context(path.open("rb")) for path in paths]
        self._next = 0  # number of the batch

    def __call__(self, _: Any, batches: Iterable[Any]) -> Iterator[Tokenized]:
        for _batch in batches:
            file = self._files[self._next % len(self._files)]
            self._next += 1
            head = json.loads(file.readline())
            changed = {int(number): text for number, text in head["changed"].items()}
            yield Tokenized(file.read(head["bytes"]), head["lengths"], changed)


def _tokens(work: Path, part: int) -> Path:
    return work / f"tokens-{part:05d}"


def _result(work: Path, stage: str, part: int) -> Path:
    """The file that says that a task is done, written after all others of that task."""
    return work / f"done-{stage}-{part:05d}.json"


def _check_written(work: Path, part: int, found: Any, expected: Any) -> None:
    if found != expected:
        raise DataError(
            f"{work}: part {part} is not as its task left it: found {found}, expected {expected}. "
            "The work is removed: run this again to begin anew."
        )


@contextmanager
def _hold_part(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; wait for another who holds it. Its directory is not made, as
    `files.hold_lock` would, for the work of a killed run may be removed while its tasks end."""
    with open(path, "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


@contextmanager
def _one_shows_progress(work: Path, rank: int) -> Iterator[None]:
    """Let task 0 alone show its progress; the others write theirs to files."""
    is_ours = rank > 0 and PROGRESS_FILE not in os.environ
    if is_ours:
        os.environ[PROGRESS_FILE] = str(work / f"progress-{rank}")
    try:
        yield
    finally:
        if is_ours:
            del os.environ[PROGRESS_FILE]
