"""A graph of steps: each run once, in a process of its own, as soon as its inputs are there.

What is done is kept under ROOT/steps and never done again; change a setting, and that step and
all that depend on it are done anew, beside the old. A run that was cut off is started again with
the same call. Knows nothing of models; a step's kind says what it does.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from flexolmo.errors import ConfigError
from flexolmo.files import hold_lock
from flexolmo.research.steps.jobs import (
    Children,
    Job,
    JobFailed,
    RunningJobs,
    Workers,
    running_jobs,
)
from flexolmo.research.steps.step import Step, exit_on_sigterm, note_seconds, read_done

_NOTE_EVERY_SECONDS = 5.0


def order_steps(targets: Sequence[Step], root: Path) -> list[tuple[Step, bool]]:
    """The targets and all they need, inputs first, each piece of work once; and is it done?"""
    found: dict[str, Step] = {}
    labels: dict[str, str] = {}

    def visit(step: Step) -> None:
        if labels.setdefault(step.label, step.identity) != step.identity:
            raise ConfigError(
                f"Two different steps are labelled {step.label!r}; a label is for one."
            )
        if step.identity not in found:
            for needed in step.inputs.values():
                visit(needed)
            found[step.identity] = step

    for target in targets:
        visit(target)
    return [(step, step.is_done(root)) for step in found.values()]


def run_graph(
    targets: Sequence[Step],
    root: Path,
    workers: int | Workers,
    verify: bool = False,
    device: str = "cpu",
) -> list[str]:
    """Run whatever `targets` need and is not done; labels of what ran.

    `workers` is the number of steps that run at a time, or who runs them (see `steps.crew`).

    When a step fails, the steps that do not need it still run; then JobFailed lists what failed
    and what was not run for it. `verify` first reads every file of the steps done before.
    FlexOlmoError if one is damaged or another run is at work in `root`.
    """
    root = Path(root).resolve()
    workers = Children(workers) if isinstance(workers, int) else workers
    with hold_lock(root / "lock", wait=False), exit_on_sigterm():
        ordered = order_steps(targets, root)
        for step, is_done in ordered:
            if verify and is_done:
                step.result(root, verify=True)
        left = {step.identity: step for step, is_done in ordered if not is_done}
        urgency = _seconds_to_the_end([step for step, _ in ordered], root)
        done = len(ordered) - len(left)
        with running_jobs(done, len(ordered), workers) as running:
            tried = _run_all(left, urgency, root, workers, running, device)
    failed = {a.job: a.code for a in tried.values() if a.step.identity in left}
    if failed:
        lines = [
            f"{len(failed)} of {len(ordered)} steps failed:",
            *(f"  {job.label} (log: {job.log})" for job in failed),
        ]
        if not_run := [step.label for step in left.values() if step.label not in tried]:
            lines.append(f"Not run, for want of these: {', '.join(not_run)}.")
        raise JobFailed("\n".join(lines), failed)
    return list(tried)


@dataclass
class _Attempt:
    step: Step
    directory: Path  # of the step
    job: Job
    earlier: float  # seconds of the attempts before
    code: int = 0  # the job's exit code

    def note(self, seconds: float) -> None:
        note_seconds(self.directory, self.earlier + seconds)


def _run_all(
    left: dict[str, Step],
    urgency: dict[str, float],
    root: Path,
    workers: Workers,
    running: RunningJobs,
    device: str,
) -> dict[str, _Attempt]:
    """Run all of `left` that can be and take it out when done; attempts by label."""
    tried: dict[str, _Attempt] = {}
    noted = time.monotonic()
    try:
        while True:
            ready = [
                step
                for step in left.values()
                if step.label not in tried
                and not any(needed.identity in left for needed in step.inputs.values())
            ]
            ready.sort(key=lambda step: -urgency[step.identity])
            for step in ready:
                if not workers.has_room(step.is_shared):  # nor go less urgent ones before it
                    break
                job, earlier = step.prepare(root, device)
                tried[step.label] = _Attempt(step, step.directory(root), job, earlier)
                running.start(job, step.is_shared)
            if not running.seconds():
                return tried
            for job, code, seconds in running.ended():
                attempt = tried[job.label]
                attempt.code = code
                if code == 0:
                    attempt.step.finish(root, attempt.earlier + seconds)
                if code == 0 and attempt.step.is_done(root):
                    del left[attempt.step.identity]
                else:
                    attempt.note(seconds)
            if time.monotonic() - noted > _NOTE_EVERY_SECONDS:  # a kill loses no more than this
                noted = time.monotonic()
                for label, seconds in running.seconds().items():
                    tried[label].note(seconds)
    finally:
        for label, seconds in running.seconds().items():
            tried[label].note(seconds)


def _seconds_to_the_end(steps: Sequence[Step], root: Path) -> dict[str, float]:
    """Seconds of the longest chain from each step to the end, by identity.

    A step is taken to need what it expects, else the average of those of its kind so far.
    """
    seen = defaultdict[str, list[float]](list)
    for file in (root / "steps").glob("*/done.json"):
        kind = file.parent.name.rpartition("-")[0]
        seen[kind].append(read_done(file.parent).get("seconds", 0.0))
    typical = fmean(s for kind in seen.values() for s in kind) if seen else 1.0
    longest = {step.identity: 0.0 for step in steps}
    for step in reversed(steps):  # those that need it have had their turn
        needs = step.expected_seconds
        if needs is None:
            needs = fmean(seen[step.kind]) if step.kind in seen else typical
        longest[step.identity] += needs
        for needed in step.inputs.values():
            longest[needed.identity] = max(longest[needed.identity], longest[step.identity])
    return longest


def elapsed_seconds(steps: Sequence[Step], root: Path) -> float:
    """Seconds, on a clock on the wall, during which one or more of the finished `steps` ran."""
    finished = [read_done(step.directory(root)) for step in steps if step.is_done(root)]
    spans = sorted((done["ended"] - done["seconds"], done["ended"]) for done in finished)
    total, until = 0.0, 0.0
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
