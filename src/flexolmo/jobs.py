"""Several processes at once, each in a directory of its own, with one display for all.

Every job is a `flexolmo` command of its own, so that what runs together shares nothing but the
machine. Output goes to the job's log; the display reads what the jobs say of their progress.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from flexolmo.errors import FlexOlmoError
from flexolmo.progress import PROGRESS_FILE, format_seconds

UNAVAILABLE = 3  # exit code of a job that could not get its text
_LINE_EVERY_SECONDS = 15.0


@dataclass(frozen=True)
class Job:
    """One command line of ours, without the program's name."""

    label: str
    arguments: tuple[str, ...]
    directory: Path  # where it runs; made if absent

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.directory / "log" / f"{self.label.replace(' ', '-')}.txt"


class JobFailed(FlexOlmoError):
    """A job ended with an error; its last words are the message."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code  # the job's exit code


def run_jobs(jobs: Sequence[Job], processes: int) -> dict[str, float]:
    """Run `jobs`, at most `processes` at a time; seconds each took, by label.

    Raises JobFailed with the end of the log of the first that failed; the others are stopped.
    """
    waiting, seconds = list(jobs), dict[str, float]()
    running: dict[str, tuple[Job, subprocess.Popen, float]] = {}
    with ExitStack() as stack:
        display = _Display(stack, jobs)
        try:
            while waiting or running:
                while waiting and len(running) < processes:
                    job = waiting.pop(0)
                    running[job.label] = (job, _start(job), time.monotonic())
                time.sleep(0.2)
                for label, (job, process, started) in list(running.items()):
                    display.update(job, time.monotonic() - started)
                    if process.poll() is None:
                        continue
                    del running[label]
                    seconds[label] = time.monotonic() - started
                    if process.returncode != 0:
                        raise JobFailed(_last_words(job, process.returncode), process.returncode)
                    display.finish(job, seconds[label])
        finally:
            for _, process, _ in running.values():
                process.terminate()
            for _, process, _ in running.values():
                process.wait()
    return seconds


def _start(job: Job) -> subprocess.Popen:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    state = _state_file(job)
    state.unlink(missing_ok=True)
    environment = {**os.environ, PROGRESS_FILE: str(state.resolve()), "COLUMNS": "100"}
    with open(job.log, "wb") as log:
        return subprocess.Popen([sys.executable, "-P", "-m", "flexolmo", *job.arguments],
                                cwd=job.directory, stdin=subprocess.DEVNULL, stdout=log,
                                stderr=log, env=environment, preexec_fn=_die_with_parent)


def _die_with_parent() -> None:
    """On Linux, have the kernel end this child if the parent is killed; elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _state_file(job: Job) -> Path:
    return job.log.with_suffix(".progress")


def _last_words(job: Job, code: int) -> str:
    lines = job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "\n".join([f"{job.label} failed with exit code {code} (log: {job.log}):", *lines[-8:]])


class _Display:
    """A bar per job on a terminal, a line per job every few seconds elsewhere."""

    def __init__(self, stack: ExitStack, jobs: Sequence[Job]):
        console = Console(stderr=True)
        self._bar: Progress | None = None
        self._last: dict[str, float] = {}
        if console.is_terminal:
            self._bar = stack.enter_context(Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"), TimeElapsedColumn(), console=console))
            self._tasks = {j.label: self._bar.add_task(j.label, total=1.0, text="waiting",
                                                       start=False) for j in jobs}

    def update(self, job: Job, elapsed: float) -> None:
        state = self._read(job)
        text = f"{state['text']}, {format_seconds(state['seconds_left'])} left" if state else "..."
        if self._bar is not None:
            task = self._tasks[job.label]
            self._bar.start_task(task)
            share = state["done"] / max(state["total"], 1e-9) if state else 0.0
            self._bar.update(task, completed=share, text=text)
        elif elapsed - self._last.get(job.label, 0.0) >= _LINE_EVERY_SECONDS:
            self._last[job.label] = elapsed
            print(f"{job.label}: {text}", file=sys.stderr, flush=True)

    def finish(self, job: Job, seconds: float) -> None:
        if self._bar is not None:
            self._bar.update(self._tasks[job.label], completed=1.0, text="done")
            self._bar.stop_task(self._tasks[job.label])
        else:
            print(f"{job.label}: done in {format_seconds(seconds)}", file=sys.stderr, flush=True)

    def _read(self, job: Job) -> dict[str, Any] | None:
        try:
            return json.loads(_state_file(job).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
