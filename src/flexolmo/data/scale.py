"""The preparation of `prepare` as datatrove pipelines: on one machine, on Slurm, or on Ray.

datatrove deals out the tasks and notes which are done, so that a run killed at any moment goes on
from there; what is kept and what is written is decided by the functions of the small path alone,
and the result has the same bytes. Four stages, each of which waits for the one before: documents
are cleaned in many tasks, chosen in one, tokenized in many, and written in one. All tasks share
the file system of the result, beside which they keep their work.

Imports datatrove, of the extra `scale`.
"""

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

from flexolmo.data.corpus import Corpus
from flexolmo.data.pieces import PieceStore, Removed, batch_documents, clean_documents
from flexolmo.data.prepare import (
    MARKER,
    Preparation,
    choose_pieces,
    chosen_batches,
    find_finished,
    write_set,
)
from flexolmo.data.shards import Tokenized, tokenize_texts
from flexolmo.errors import ConfigError, DataError, FlexOlmoError
from flexolmo.files import hold_lock, read_json, write_aside, write_directory_aside, write_json
from flexolmo.progress import PROGRESS_FILE

Cluster = Literal["local", "slurm", "ray"]
_PLAN = "plan.json"
_SAID = "said.json"


def prepare_at_scale(
    task: Preparation,
    may_replace: bool = False,
    say: Callable[[str], object] = print,
    workers: int = 1,
    tasks: int | None = None,
    cluster: Cluster = "local",
    **options: Any,
) -> dict[str, Any] | None:
    """Prepare a set in tasks that datatrove runs; its card, or none where the tasks were only
    handed to a cluster.

    Args:
        task: what `plan_preparation` returns.
        say: told what `prepare_set` tells, at the end.
        workers: tasks that run at the same time.
        tasks: tasks of a stage that is dealt out; by default as many as workers.
        cluster: local runs them here and waits for their end; slurm submits them with `sbatch`;
            ray runs them on the cluster that `ray.init` found.
        options: of datatrove's executor of that cluster, such as `partition` and `time`.
    Raises:
        DataError: as `prepare_set`.
        ConfigError: the cluster cannot be reached.
    """
    work = work_directory(task.out)
    done = find_finished(task, may_replace)
    if done is not None:
        shutil.rmtree(work, ignore_errors=True)
        return done
    tasks = tasks or workers
    plan = {"recipe": task.recipe, "tasks": tasks}
    task.out.parent.mkdir(parents=True, exist_ok=True)
    if work.exists() and (
        not (work / _PLAN).is_file() or read_json(work / _PLAN, DataError) != plan
    ):
        shutil.rmtree(work)
    work.mkdir(mode=0o700, exist_ok=True)
    with _one_run(work / "lock"):
        write_json(work / _PLAN, plan)
        last = make_pipelines(task, tasks, workers, cluster, **options)
        try:
            last.run()
        except FileNotFoundError as e:
            if e.filename != "sbatch":
                raise
            raise ConfigError(
                "sbatch is not here: submit from a machine of the Slurm cluster, or take "
                "--executor local."
            ) from None
        if cluster == "slurm":
            return None
        for line in read_json(work / _SAID, DataError):
            say(line)
        card = find_finished(task, may_replace=True)
        if card is None:
            raise DataError(f"{task.out} was not written: see the logs in {work}/logs.")
    shutil.rmtree(work)
    return card


def work_directory(out: Path) -> Path:
    """Directory beside a set where its tasks keep their work."""
    return out.with_name(f".{out.name}.scale")


def make_pipelines(
    task: Preparation, tasks: int, workers: int, cluster: Cluster = "local", **options: Any
) -> PipelineExecutor:
    """The last of the four pipelines, which depends on those before; arguments as in
    `prepare_at_scale`."""
    work = work_directory(task.out)
    executor = {
        "local": LocalPipelineExecutor,
        "slurm": SlurmPipelineExecutor,
        "ray": RayPipelineExecutor,
    }[cluster]
    if cluster == "local":
        logger.disable("datatrove")  # its lines would hide ours
    if cluster == "slurm":
        options = {
            "env_command": f"export PATH={Path(sys.executable).parent}:$PATH",
            "qos": "",
            **options,
        }
    last: PipelineExecutor | None = None
    for stage, number in (
        (CleanStage, tasks),
        (ChooseStage, 1),
        (TokenizeStage, tasks),
        (WriteStage, 1),
    ):
        step = stage(task, work, tasks, is_quiet=cluster == "local")
        named = {"job_name": f"{task.corpus.name}-{step.name}"} if cluster == "slurm" else {}
        last = executor(
            pipeline=[step],
            tasks=number,
            workers=min(workers, number),
            logging_dir=str(work / "logs" / step.name),
            depends=last,
            **named,
            **options,
        )
    assert last is not None
    return last


class Stage(PipelineStep):
    """One stage of a preparation, of which each task does its part."""

    type = "flexolmo"

    def __init__(self, task: Preparation, work: Path, tasks: int, is_quiet: bool) -> None:
        super().__init__()
        self.job = _Job(task, work, tasks, is_quiet)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Do part `rank`. A task of a run that was killed may still be at work on it: wait."""
        work = self.job.work
        with (
            hold_lock(work / f"lock-{self.name}-{rank:05d}", wait=True),
            _one_shows_progress(work, rank),
        ):
            self.work_on(rank)
            os.sync()  # before the task is noted as done
        yield from ()

    def work_on(self, part: int) -> None:
        """Do part number `part`; doing it again gives the same files."""
        raise NotImplementedError


class CleanStage(Stage):
    """Cleans, cuts and fingerprints documents."""

    name = "clean"

    def work_on(self, part: int) -> None:
        task, work = self.job.task, self.job.work
        for left in work.glob(f"*-{part:05d}"):
            if not left.name.startswith("lock"):
                left.unlink()
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
        write_json(
            work / f"removed-{part:05d}.json",
            {
                "first_batches": first_batches,
                "documents": removed.documents,
                "bytes": removed.bytes,
                "found": removed.found,
                "replaced_characters": removed.replaced_characters,
                "noted": corpus.noted if lane == 0 else {},  # all lanes read all
            },
        )


class ChooseStage(Stage):
    """Drops repeats, splits, and learns the tokenizer where none was given."""

    name = "choose"

    def work_on(self, part: int) -> None:
        task, work = self.job.task, self.job.work
        for left in ("pieces", "signatures", "kept", "kept_signatures", "parents", "marks"):
            (work / left).unlink(missing_ok=True)
        removed, noted = _join_removed(work, self.job.tasks)
        task.corpus.noted.clear()
        task.corpus.noted.update(noted)
        said: list[str] = []
        choose_pieces(task, work, self.job.tasks, removed, said.append)
        write_json(work / _SAID, said)


class TokenizeStage(Stage):
    """Tokenizes the pieces that were chosen."""

    name = "tokenize"

    def work_on(self, part: int) -> None:
        work = self.job.work
        with write_aside(_tokens(work, part)) as aside, open(aside, "wb") as f:
            for number, places in enumerate(chosen_batches(work)):
                if number % self.job.tasks == part:
                    tokens, lengths, changed = tokenize_texts(work, places)
                    head = {"bytes": len(tokens), "lengths": lengths, "changed": changed}
                    f.write(json.dumps(head).encode() + b"\n" + tokens)


class WriteStage(Stage):
    """Writes the prepared set."""

    name = "write"

    def work_on(self, part: int) -> None:
        task, work = self.job.task, self.job.work
        if find_finished(task, may_replace=True) is None:
            said: list[str] = read_json(work / _SAID, DataError)
            is_private = task.corpus.is_private
            with (
                ExitStack() as files,
                write_directory_aside(task.out, MARKER, is_private=is_private) as aside,
            ):
                tokenized = _Replay(work, self.job.tasks, files)
                write_set(task, work, aside, tokenized, said.append)
            write_json(work / _SAID, said)
        for used in work.iterdir():  # no text stays where nobody waits for the end
            if used.is_file() and used.name not in (_SAID, _PLAN) and "lock" not in used.name:
                used.unlink()


class _Job:
    """All that the tasks of a stage share, shown in a few words where datatrove shows a step."""

    def __init__(self, task: Preparation, work: Path, tasks: int, is_quiet: bool) -> None:
        self.task = task
        self.work = work
        self.tasks = tasks
        self.is_quiet = is_quiet

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.is_quiet:
            logger.disable("datatrove")

    def __repr__(self) -> str:
        return f"{self.task.corpus.name} in {self.tasks} tasks"


def share_of(corpus: Corpus, part: int, parts: int) -> tuple[Corpus, int, int, int]:
    """The files that part `part` of `parts` reads, and which batches of their documents are its.

    Files are dealt out in neighbouring groups of about as many bytes. Where there are fewer files
    than parts, several parts (lanes) read the same group, and each takes every so-manieth batch.

    Returns:
        The files as a corpus, the number of their group, the lane, and lanes of that group.
    """
    groups = max(1, min(parts, len(corpus.files)))
    lanes = parts // groups
    group, lane = divmod(part, lanes)
    total = max(1, corpus.num_bytes)
    files = []
    before = 0
    for file, digest in corpus.files:
        if min(before * groups // total, groups - 1) == group:  # empty files may come last
            files.append((file, digest))
        before += file.stat().st_size
    return replace(corpus, files=files, noted=Counter()), group, lane, lanes


def _join_removed(work: Path, parts: int) -> tuple[Removed, Counter[str]]:
    """Losses of cleaning, and what reading noted, in all parts; reasons in order of reading."""
    found = [read_json(work / f"removed-{part:05d}.json", DataError) for part in range(parts)]
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
        self._files = [files.enter_context(path.open("rb")) for path in paths]
        self._next = 0  # number of the batch

    def __call__(self, _: Any, batches: Iterable[Any]) -> Iterator[Tokenized]:
        for _batch in batches:
            file = self._files[self._next % len(self._files)]
            self._next += 1
            head = json.loads(file.readline())
            changed = {int(number): text for number, text in head["changed"].items()}
            yield file.read(head["bytes"]), head["lengths"], changed


def _tokens(work: Path, part: int) -> Path:
    return work / f"tokens-{part:05d}"


@contextmanager
def _one_run(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; processes made from this one, which may outlive it, do not."""
    import fcntl  # not on every system that reads files

    with open(path, "a") as f:
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise FlexOlmoError(
                f"Another run is at work in {path.parent}. Wait for its end, or stop it: this one "
                "then goes on from there."
            ) from None
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
