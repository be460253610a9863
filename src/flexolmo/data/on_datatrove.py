"""Parts of a preparation as datatrove tasks of this machine.

datatrove runs a part and keeps its log. Its own pool of processes waits for ever once the system
has killed one of them, so the processes are those of `workers`, which notice. Imports datatrove, of
the extra `scale`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from datatrove.executor.base import DistributedEnvVars, PipelineExecutor
from datatrove.utils.logging import logger

from flexolmo.data.parts import do_part
from flexolmo.data.plan import Plan
from flexolmo.data.workers import end_at_interrupt, open_workers
from flexolmo.progress import PROGRESS_FILE


def do_parts(plan: Plan, stage: str, parts: Sequence[int], workers: int) -> None:
    """Do parts of one stage in so many processes; the first of them shows its progress.

    Raises:
        FlexOlmoError: a part refused, as `do_part`.
        UnfinishedError: a process was killed.
    """
    with open_workers(min(workers, len(parts))) as run:
        for _ in run(partial(_do_part, plan.work, stage, plan.tasks, parts[0]), parts):
            pass


def _do_part(work: Path, stage: str, tasks: int, shown: int, part: int) -> None:
    logger.disable("datatrove")  # its lines would hide ours
    end_at_interrupt()  # a part is long, and is done again
    with _progress_in_file(None if part == shown else work / f"progress-{part}"):
        _Executor(work, stage, tasks).run_task(part)


class _Executor(PipelineExecutor):
    """One stage as a pipeline of datatrove, of which this process runs the tasks it is told."""

    def __init__(self, work: Path, stage: str, tasks: int) -> None:
        def step(_data: Any, rank: int, _world_size: int) -> None:
            do_part(work, stage, rank)

        # what is done is known from what parts write, not from datatrove's notes
        super().__init__([step], str(work / "logs" / stage), skip_completed=False)
        self._tasks = tasks

    def run(self) -> None:
        """Run all tasks."""
        for task in range(self._tasks):
            self.run_task(task)

    def run_task(self, task: int) -> None:
        """Run one task."""
        self._run_for_rank(task)

    @property
    def world_size(self) -> int:
        """Number of tasks."""
        return self._tasks

    def get_distributed_env(self, node_rank: int = -1) -> DistributedEnvVars:
        """Settings that datatrove puts in the environment of a task."""
        return DistributedEnvVars(
            datatrove_node_ips="localhost",
            datatrove_cpus_per_task="-1",
            datatrove_mem_per_cpu="-1",
            datatrove_gpus_on_node="-1",
            datatrove_executor="LOCAL",
        )


@contextmanager
def _progress_in_file(path: Path | None) -> Iterator[None]:
    """Write progress to the file `path`, if there is one, where it is not written to another."""
    is_ours = path is not None and PROGRESS_FILE not in os.environ
    if is_ours:
        os.environ[PROGRESS_FILE] = str(path)
    try:
        yield
    finally:
        if is_ours:
            del os.environ[PROGRESS_FILE]
