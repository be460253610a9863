"""Several processes at once, each in a directory of its own, with one display for all.

Every job is a process of its own, a `flexolmo` command unless it says otherwise, so that what
runs together shares nothing but the machine. Output goes to the job's log; the display reads what
the jobs say of their progress.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.progress import BarColumn, Progress, TaskID, TimeElapsedColumn

from flexolmo.data.workers import count_cores
from flexolmo.errors import FlexOlmoError
from flexolmo.files import parse_json
from flexolmo.numbers import format_seconds
from flexolmo.progress import PROGRESS_FILE
from flexolmo.terminal import PlainColumn, PlainConsole, echo

UNAVAILABLE = 3  # exit code of a job that could not get its text
_LINE_EVERY_SECONDS = 15.0
_POLL_SECONDS = 0.1
_STOP_SECONDS = 20.0  # a job told to stop has this long before it is killed


@dataclass(frozen=True)
class Job:
    """One command line of ours, without Python's name."""

    label: str
    arguments: tuple[str, ...]
    directory: Path  # where it runs; made if absent
    program: tuple[str, ...] = ("-m", "flexolmo")  # what Python runs

    @property
    def log(self) -> Path:
        """File that its output goes to."""
        return self.directory / "log" / f"{file_name(self.label)}.txt"

    def last_words(self, lines: int = 8) -> str:
        """End of what it printed."""
        printed = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "\n".join(printed[-lines:])


def file_name(label: str) -> str:
    """The label as a file's name."""
    return re.sub("[ /]", "-", label)


class JobFailed(FlexOlmoError):
    """Jobs ended with an error."""

    def __init__(self, message: str, codes: Mapping[Job, int]):
        super().__init__(message)
        self.codes = codes  # exit codes


class Started(Protocol):
    """A job that was started: a child, or something that answers as one."""

    def poll(self) -> int | None:
        """Exit code; still running: None."""

    def terminate(self) -> None:
        """Ask it to end."""

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for its end; subprocess.TimeoutExpired if that takes longer."""

    def kill(self) -> None:
        """Have it end at once."""


class Workers(Protocol):
    """Processes that run jobs."""

    def has_room(self, is_shared: bool) -> bool:
        """True if another job may be started: one that all share out, or one for one of them."""

    def start(self, job: Job, is_shared: bool) -> Started:
        """Start `job`."""


class Children:
    """Jobs as children of this process, up to `count` at a time; each is for one.

    They share out the processors by OMP_NUM_THREADS, unless that is set already: more threads than
    processors wait for one another.
    """

    def __init__(self, count: int):
        self._count = count
        threads = max(1, count_cores() // count)
        self._variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        self._running: list[Started] = []

    def has_room(self, is_shared: bool) -> bool:
        self._running = [child for child in self._running if child.poll() is None]
        return len(self._running) < self._count

    def start(self, job: Job, is_shared: bool) -> Started:
        self._running.append(start_child(job, self._variables))
        return self._running[-1]


@contextmanager
def running_jobs(done: int, total: int, workers: Workers) -> Iterator["RunningJobs"]:
    """Jobs to be started one by one; on the way out, those still running are stopped.

    The display counts those that end well, up to `total`, `done` of them done before; a failure is
    shown when it happens.
    """
    with ExitStack() as stack:
        running = RunningJobs(_Display(stack, done, total), workers)
        try:
            yield running
        finally:
            running.stop()


class RunningJobs:
    """The jobs under way, by label; made by `running_jobs`."""

    def __init__(self, display: "_Display", workers: Workers):
        self._display = display
        self._workers = workers
        self._running: dict[str, tuple[Job, Started, float]] = {}

    def start(self, job: Job, is_shared: bool = False) -> None:
        """Start `job` in a process of its own, or, shared out, in several."""
        started = self._workers.start(job, is_shared)
        self._running[job.label] = (job, started, time.monotonic())

    def seconds(self) -> dict[str, float]:
        """Seconds that each job under way has been running, by label."""
        now = time.monotonic()
        return {label: now - started for label, (_, _, started) in self._running.items()}

    def ended(self) -> list[tuple[Job, int, float]]:
        """Wait a moment; the jobs that ended since, each with exit code and seconds."""
        time.sleep(_POLL_SECONDS)
        found = []
        for label, (job, process, started) in list(self._running.items()):
            seconds = time.monotonic() - started
            self._display.update(job, seconds)
            code = process.poll()
            if code is None:
                continue
            del self._running[label]
            found.append((job, code, seconds))
            if code == 0:
                self._display.finish(job, seconds)
            else:
                self._display.fail(job, code)
        return found

    def stop(self) -> None:
        """End every job."""
        stop([started for _, started, _ in self._running.values()])


def stop(running: Collection[Started]) -> None:
    """End what is running: ask first, then kill those that stay."""
    for one in running:
        one.terminate()
    deadline = time.monotonic() + _STOP_SECONDS
    for one in running:
        try:
            one.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.kill()
            one.wait()


def start_child(
    job: Job, variables: Mapping[str, str] | None = None, is_first: bool = True
) -> "subprocess.Popen[bytes]":
    """Start `job` in a child, with `variables` beside those of this process.

    Of several children that share a job out the first begins its log and tells of its progress.
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **(variables or {}), "COLUMNS": "100"}
    state = _state_file(job)
    if is_first:
        job.log.write_bytes(b"")
        state.unlink(missing_ok=True)
        environment[PROGRESS_FILE] = str(state.resolve())
    else:
        environment.pop(PROGRESS_FILE, None)
    with open(job.log, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", *job.program, *job.arguments],
            cwd=job.directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            preexec_fn=_die_with_parent,
        )


def _die_with_parent() -> None:
    """Have Linux end this child if the parent is killed; do nothing on other systems."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _state_file(job: Job) -> Path:
    return job.log.with_suffix(".progress")


class _Display:
    """A bar per job on a terminal, a line per job every few seconds elsewhere."""

    def __init__(self, stack: ExitStack, done: int, total: int):
        console = PlainConsole(stderr=True)
        self._bar: Progress | None = None
        self._last: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        self._done, self._total, self._start = done, total, time.monotonic()
        if console.is_terminal:
            self._bar = stack.enter_context(
                Progress(
                    PlainColumn("{task.description}"),
                    BarColumn(bar_width=24),
                    PlainColumn("{task.fields[text]}"),
                    TimeElapsedColumn(),
                    console=console,
                )
            )
            self._all = self._bar.add_task(
                "all", total=total, completed=done, text=f"{done}/{total} done"
            )

    def update(self, job: Job, elapsed: float) -> None:
        state = self._read(job)
        text = f"{state['text']}, {format_seconds(state['seconds_left'])} left" if state else "..."
        if self._bar is not None:
            if job.label not in self._tasks:
                self._tasks[job.label] = self._bar.add_task(job.label, total=1.0, text="")
            task = self._tasks[job.label]
            share = state["done"] / max(state["total"], 1e-9) if state else 0.0
            self._bar.update(task, completed=share, text=text)
        elif elapsed - self._last.get(job.label, 0.0) >= _LINE_EVERY_SECONDS:
            self._last[job.label] = elapsed
            echo(f"{job.label}: {text}", err=True)

    def finish(self, job: Job, seconds: float) -> None:
        self._done += 1
        took = format_seconds(seconds)
        elapsed = format_seconds(time.monotonic() - self._start)
        counted = f"{self._done}/{self._total} done, {elapsed} elapsed"
        self._leave(job, f"{job.label}: done in {took} ({counted})")

    def fail(self, job: Job, code: int) -> None:
        said = f"{job.label} failed with exit code {code} (log: {job.log}):"
        self._leave(job, f"{said}\n{job.last_words()}")

    def _leave(self, job: Job, said: str) -> None:
        """Take the job's bar away and keep a line above the bars."""
        if self._bar is None:
            echo(said, err=True)
            return
        self._bar.remove_task(self._tasks.pop(job.label))
        self._bar.update(self._all, completed=self._done, text=f"{self._done}/{self._total} done")
        self._bar.console.print(said, highlight=False, soft_wrap=True)

    def _read(self, job: Job) -> dict[str, Any] | None:
        try:
            return parse_json(_state_file(job).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
