"""One progress display for all long work: a bar on a terminal, a line every few seconds elsewhere.

Both say what is being done, how much is done, the rate, and the time left.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_SECONDS = 15.0


def format_count(n: float) -> str:
    """`n` with at most four significant characters: 950, 1.2k, 34M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= limit:
            scaled = n / limit
            return f"{scaled:.1f}{unit}" if scaled < 10 else f"{scaled:.0f}{unit}"
    return f"{n:.0f}" if n >= 10 or n == int(n) else f"{n:.1f}"


def format_seconds(seconds: float) -> str:
    """`seconds` as m:ss or h:mm:ss."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


class Meter:
    """Counts finished units; made by `progress`."""

    def __init__(self, label: str, total: float, unit: str, done: float):
        self.label, self.total, self.unit = label, total, unit
        self.done = self._first = done
        self.note = ""
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def rate(self) -> float:
        """Units finished per second since this meter started."""
        return (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def advance(self, n: float = 1, note: str = "") -> None:
        """Add `n` finished units; `note` (a loss, a file name) is shown at the end of the line."""
        self.done += n
        self.note = note or self.note
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, text=self._text())
        elif time.monotonic() - self._last_line >= _LINE_EVERY_SECONDS:
            self._last_line = time.monotonic()
            left = (self.total - self.done) / max(self.rate(), 1e-9)
            print(f"{self.label}: {self._text()}, {format_seconds(left)} left", file=sys.stderr,
                  flush=True)

    def _text(self) -> str:
        count = f"{format_count(self.done)}/{format_count(self.total)} {self.unit}"
        text = f"{count}, {format_count(self.rate())}/s"
        return f"{text}, {self.note}" if self.note else text


@contextmanager
def progress(label: str, total: float, unit: str, done: float = 0) -> Iterator[Meter]:
    """Show progress towards `total` units (`done` of them finished earlier, by a run resumed)."""
    meter = Meter(label, total, unit, done)
    console = Console(stderr=True)
    if not console.is_terminal:
        yield meter
        return
    with Progress(TextColumn("{task.description}"), BarColumn(bar_width=24),
                  TextColumn("{task.fields[text]}"), TimeRemainingColumn(compact=True),
                  console=console, transient=False) as bar:
        task = bar.add_task(label, total=total, text="")
        bar.update(task, completed=done)
        meter._bar = bar
        yield meter
