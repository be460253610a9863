"""Parts of a preparation as tasks of Ray, which is installed apart.

A task is sent a path, the name of a stage and a number. Knows nothing of what a part does.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexolmo.data.parts import do_part, forget_failures, has_failed, note_failure
from flexolmo.data.plan import Plan
from flexolmo.errors import UnfinishedError
from flexolmo.progress import progress


@contextmanager
def open_ray() -> Iterator[None]:
    """Be connected to the cluster of $RAY_ADDRESS, or that of this machine, which is started where
    there is none; nothing is reported to Ray's makers.

    Raises:
        UnfinishedError: it can be neither reached nor started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        ray.init(log_to_driver=False, include_dashboard=False)
    except Exception as e:  # of no kind of its own, when a machine is slow to start
        raise UnfinishedError(f"Ray cannot be reached or started: {e}") from None
    try:
        yield
    finally:
        ray.shutdown()


def do_parts(plan: Plan, stage: str, parts: Sequence[int], most: int | None) -> None:
    """Do parts of one stage, at most so many at the same time; a part that fails notes why.

    `open_ray` is around it.
    """
    import ray

    forget_failures(plan)
    send = ray.remote(num_cpus=1)(_do_part).remote
    waiting = deque(parts)
    running: dict[Any, int] = {}  # number of the part by its task
    with progress(f"{plan.task.corpus.name}: {stage}", len(parts), "parts") as meter:
        while waiting or running:
            while waiting and len(running) < (most or len(parts)):
                part = waiting.popleft()
                running[send(str(plan.work), stage, part)] = part
            ended, _ = ray.wait(list(running), num_returns=1)
            for task in ended:
                part = running.pop(task)
                try:
                    ray.get(task)
                except ray.exceptions.RayError as e:
                    if not has_failed(plan.work, stage, part):  # it was killed, or never begun
                        reason = str(e).strip().rpartition("\n")[2]
                        note_failure(plan.work, stage, part, UnfinishedError(reason))
                meter.advance()


def _do_part(work: str, stage: str, part: int) -> None:
    do_part(Path(work), stage, part)
