"""Parts of a preparation as jobs of Slurm: submitted once, looked at until the queue is empty.

Jobs need nobody who waits for them. Knows nothing of what a part does.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from flexolmo.data.parts import (
    describe_missing,
    failed_parts,
    forget_failures,
    missing_parts,
    num_parts,
    parts_of,
    show_numbers,
)
from flexolmo.data.plan import Plan
from flexolmo.data.slurm import find_jobs, job_name, submit_parts, was_submitted
from flexolmo.errors import UnfinishedError
from flexolmo.progress import progress
from flexolmo.terminal import echo

_LOOK_EVERY_SECONDS = 15.0
_LOOKS_TO_BE_SURE = 5  # a file that another machine wrote may be seen a minute later


def submit_missing(plan: Plan, options: Sequence[str], most: int | None) -> None:
    """Submit the parts that are missing, unless jobs of this run are in the queue already.

    Args:
        options: for sbatch, as `check_options` gives them.
        most: jobs that work at the same time.
    Raises:
        UnfinishedError: Slurm does not answer, or refuses.
    """
    jobs = find_jobs(job_name(plan.work))
    if jobs is None:
        raise UnfinishedError(
            "Slurm (squeue) does not answer: give the command again when it does."
        )
    missing = missing_parts(plan)
    if jobs or not missing:
        return
    if was_submitted(plan.work):
        echo(f"{describe_missing(plan)}\nWhat is missing is submitted again.", err=True)
    forget_failures(plan)
    arrays = {stage: show_numbers(parts) for stage, parts in missing.items()}
    with _told_of_jobs(plan):
        submit_parts(plan.work, arrays, options, most)


def has_jobs(plan: Plan) -> bool:
    """True if Slurm says that jobs of this run are in the queue."""
    return bool(find_jobs(job_name(plan.work)))


def is_at_rest(plan: Plan) -> bool:
    """True if no job of this run is in the queue; else says what is done, and how to go on."""
    if find_jobs(job_name(plan.work)) == []:
        return True
    echo(_describe_waiting(plan), err=True)
    return False


def wait_for_jobs(plan: Plan) -> None:
    """Show progress until no job of this run is in the queue and what they wrote can be seen.

    A part that fails is told at once. Ctrl-C stops the waiting, not the jobs.
    """
    name = job_name(plan.work)
    total = num_parts(plan)
    done = total - sum(map(len, missing_parts(plan).values()))
    told: set[tuple[str, int]] = set()
    looks_at_no_job = 0
    label = f"{plan.task.corpus.name} on Slurm"
    with _told_of_jobs(plan), progress(label, total, "parts", done) as meter:
        while True:
            jobs = find_jobs(name)
            looks_at_no_job = looks_at_no_job + 1 if jobs == [] else 0
            missing = missing_parts(plan)
            now_done = total - sum(map(len, missing.values()))
            meter.advance(now_done - done, _describe(plan, missing, jobs))
            done = now_done
            for stage, part, reason in failed_parts(plan, missing):
                if (stage, part) not in told:
                    told.add((stage, part))
                    echo(f"Part {part} of {stage} failed: {reason}", err=True)
            if looks_at_no_job == _LOOKS_TO_BE_SURE or (looks_at_no_job and not missing):
                return
            time.sleep(_LOOK_EVERY_SECONDS)


@contextmanager
def _told_of_jobs(plan: Plan) -> Iterator[None]:
    """Say on Ctrl-C that the jobs go on, and how to look at them or end them."""
    try:
        yield
    except KeyboardInterrupt:
        echo(_describe_waiting(plan), err=True)
        raise


def _describe_waiting(plan: Plan) -> str:
    name = job_name(plan.work)
    state = _describe(plan, missing_parts(plan), find_jobs(name))
    return (
        f"{plan.task.corpus.name}: {state}. The jobs go on alone. Give the same command again to "
        f"look, and to finish; `scancel --name={name}` ends them."
    )


def _describe(plan: Plan, missing: Mapping[str, Sequence[int]], jobs: list[str] | None) -> str:
    """The first stage that lacks parts, how many it has, and the jobs in the queue by state."""
    stage, parts = next(iter(missing.items()), ("all", ()))
    total = parts_of(plan, stage) if parts else num_parts(plan)
    if jobs is None:
        queue = "squeue does not answer"
    else:
        queue = ", ".join(f"{n} {state}" for state, n in Counter(jobs).items()) or "no job"
    return f"{stage}: {total - len(parts)} of {total} parts done; in the queue: {queue}"
