"""One progress display for all long work: a bar on a terminal, a line every few seconds elsewhere.

Both say what is being done, how much is done, the rate, and the time left.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, Progress, TimeRemainingColumn

from flexolmo.numbers import format_count, format_seconds
from flexolmo.terminal import PlainColumn, PlainConsole, echo

_LINE_EVERY_SECONDS = 15.0
# A parent process that shows the progress of several children names a file here, one for each;
# the child then writes its state there and prints nothing.
PROGRESS_FILE = "FLEXOLMO_PROGRESS_FILE"


class Meter:
    """Counts finished units; made by `progress`."""

    def __init__(self, label: str, total: float, unit: str, done: float):
        self.label, self.total, self.unit = label, total, unit
        self.done = self._first = done
        self.note = ""
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._file = os.environ.get(PROGRESS_FILE)

    def rate(self) -> float:
        """Units finished per second since this meter started."""
        return (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def advance(self, n: float = 1, note: str = "") -> None:
        """Add `n` finished units; `note` (a loss, a file name) is shown at the end of the line."""
        self.done += n
        self.note = note or self.note
        if self._file is not None:
            if time.monotonic() - self._last_line >= 0.5 or self.done >= self.total:
                self._last_line = time.monotonic()
                self._report(self._file)
        elif self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, text=self.describe())
        elif time.monotonic() - self._last_line >= _LINE_EVERY_SECONDS:
            self._last_line = time.monotonic()
            echo(
                f"{self.label}: {self.describe()}, {format_seconds(self.seconds_left())} left",
                err=True,
            )

    def _report(self, path: str) -> None:
        state = {
            "label": self.label,
            "done": self.done,
            "total": self.total,
            "text": self.describe(),
            "seconds_left": self.seconds_left(),
        }
        aside = Path(f"{path}.new")
        aside.write_text(json.dumps(state), encoding="utf-8")
        aside.replace(path)

    def seconds_left(self) -> float:
        """Seconds to the end at the rate so far."""
        return (self.total - self.done) / max(self.rate(), 1e-9)

    def describe(self) -> str:
        """Count, rate and note, in words."""
        count = f"{format_count(self.done)}/{format_count(self.total)} {self.unit}"
        text = f"{count}, {format_count(self.rate())}/s"
        return f"{text}, {self.note}" if self.note else text


@contextmanager
def progress(label: str, total: float, unit: str, done: float = 0) -> Iterator[Meter]:
    """Show progress towards `total` units (`done` of them finished earlier, by a run resumed)."""
    meter = Meter(label, total, unit, done)
    console = PlainConsole(stderr=True)
    if not console.is_terminal or PROGRESS_FILE in os.environ:
        yield meter
        return
    with Progress(
        PlainColumn("{task.description}"),
        BarColumn(bar_width=24),
        PlainColumn("{task.fields[text]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=False,
    ) as bar:
        task = bar.add_task(label, total=total, text="")
        bar.update(task, completed=done)
        meter._bar = bar
        yield meter
