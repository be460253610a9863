"""The preparation of `prepare` cut into parts, done on one machine, under Slurm or on Ray.

The process that is asked, the *head*, writes a plan, has an executor do the parts that are missing,
and finishes when all are done; killed at any moment, or its parts, the next one goes on from there.
"""

import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from flexolmo.data import on_ray, on_slurm
from flexolmo.data.kept_work import (
    SLURM,
    hold_work,
    refuse_living_jobs,
    remove_if_refused,
    remove_work,
)
from flexolmo.data.parts import STAGES, check_done, lines_said, missing_parts
from flexolmo.data.plan import Plan, begin_plan, resume_plan
from flexolmo.data.prepare import Preparation, find_finished
from flexolmo.data.slurm import check_options
from flexolmo.errors import ConfigError, DataError
from flexolmo.files import explain_full_disk

_PACKAGES = {
    "local": ("datatrove", "pip install 'flexolmo[scale]'"),
    "ray": ("ray", "pip install ray, here and on every machine of its cluster"),
}


@dataclass(frozen=True)
class Execution:
    """Choices of who does the parts of a preparation, none of which changes its result."""

    executor: str = "local"  # or slurm, or ray
    tasks: int | None = None  # parts of a stage that is dealt out
    workers: int | None = None  # parts that are done at the same time
    slurm_options: Sequence[str] = ()  # for sbatch, such as partition=cpu
    waits: bool = True  # for the jobs of Slurm


def prepare_at_scale(
    task: Preparation,
    may_replace: bool = False,
    say: Callable[[str], object] = warnings.warn,
    execution: Execution | None = None,
) -> dict[str, Any] | None:
    """Prepare a set in parts; returns its card, or None where jobs were submitted, or are at work,
    and nobody waits for them.

    Args:
        task: the set, and how it is prepared.
        may_replace: whether another prepared set in its place is replaced instead of refused.
        say: told what `prepare_set` tells, at the end.
        execution: who does the parts; by default this machine, one at a time. The number of tasks
            is that of the run that was killed, if there was one; here, by default, that of workers.
    Raises:
        DataError: as `prepare_set`, or files of a killed run are not as its parts left them.
        ConfigError: a run that was killed had another number of tasks, or none was given.
        UnfinishedError: parts were not done, or jobs of another run are at work; what was done
            is kept.
        FlexOlmoError: another run is at work on this set.
    """
    chosen = execution or Execution()
    _check_executor(chosen.executor)
    options = check_options(chosen.slurm_options)
    mode = 0o700 if task.corpus.is_private else 0o777
    task.out.parent.mkdir(mode, parents=True, exist_ok=True)
    with hold_work(task.out) as directory:
        if chosen.executor != SLURM:
            refuse_living_jobs(directory)
        done = find_finished(task, may_replace)
        plan = resume_plan(directory, task, may_replace, chosen.executor)
        if done is not None and (plan is None or _is_left(plan, chosen)):
            remove_work(directory)
            return done
        if plan is not None and chosen.tasks not in (None, plan.tasks):
            raise ConfigError(
                f"A run of {plan.tasks} tasks was stopped here, and {chosen.tasks} were asked for. "
                f"Leave out --tasks to go on from there, or remove {directory} to begin anew."
            )
        tasks = plan.tasks if plan else _choose_tasks(chosen)
        with remove_if_refused(directory), explain_full_disk(task.out):
            if plan is None:
                plan = begin_plan(directory, task, tasks, may_replace, chosen.executor)
            if not _do_missing(plan, chosen, options):
                return None
            check_done(plan)
            for line in lines_said(plan):
                say(line)
            card = find_finished(task, may_replace=True)
            if card is None:
                raise DataError(f"{task.out} is not as it was written: run this again.")
        remove_work(directory)
        return card


def _is_left(plan: Plan, execution: Execution) -> bool:
    """True if a run lacks parts that nobody does, though the set is there."""
    if not missing_parts(plan):
        return False
    return execution.executor != SLURM or not on_slurm.has_jobs(plan)


def _choose_tasks(execution: Execution) -> int:
    if execution.tasks is not None:
        return execution.tasks
    if execution.executor == "local":
        return execution.workers or 1
    raise ConfigError(
        f"--executor {execution.executor} needs --tasks: the number of parts to cut the work into."
    )


def _check_executor(executor: str) -> None:
    """Refuse an executor that there is not, or of which this machine lacks something."""
    if executor not in (*_PACKAGES, SLURM):
        raise ConfigError(f"There is no executor {executor!r}: expected local, slurm or ray.")
    programs = ("sbatch", "squeue", "scancel") if executor == SLURM else ()
    lacking = [program for program in programs if shutil.which(program) is None]
    if lacking:
        raise ConfigError(
            f"--executor slurm needs {', '.join(lacking)}, not found here: give the command on a "
            "machine from which jobs are submitted."
        )
    if executor in _PACKAGES:
        package, how = _PACKAGES[executor]
        if find_spec(package) is None:
            raise ConfigError(
                f"--engine datatrove with --executor {executor} needs {package}: {how}."
            )


def _do_missing(plan: Plan, execution: Execution, options: Sequence[str]) -> bool:
    """Have the missing parts done; False where jobs do them and nobody waits."""
    if execution.executor == SLURM:
        on_slurm.submit_missing(plan, options, execution.workers)
        if execution.waits:
            on_slurm.wait_for_jobs(plan)
        return execution.waits or on_slurm.is_at_rest(plan)
    if execution.executor == "ray":
        with on_ray.open_ray():
            _do_stages(plan, partial(on_ray.do_parts, most=execution.workers))
    else:
        from flexolmo.data.on_datatrove import do_parts  # of an extra

        _do_stages(plan, partial(do_parts, workers=execution.workers or 1))
    return True


def _do_stages(plan: Plan, do_parts: Callable[[Plan, str, Sequence[int]], None]) -> None:
    """Do what is missing, stage after stage, up to one of which a part fails."""
    for stage in STAGES:
        parts = missing_parts(plan).get(stage)
        if parts:
            do_parts(plan, stage, parts)
        if stage in missing_parts(plan):
            return
