"""Steps under torchrun: one process says what is to be started, and all of them start it.

A step that is shared out runs in a child of every process, and these children are a group; any
other runs in a child of one process that has nothing to do. Only the first process knows the graph.
The words that it and the others leave each other, R a process and N counting its steps:

    R/N         an `Order`, as JSON
    R/N/stop    it is to be ended
    R/N/code    exit code with which it ended
    R/gone      R starts nothing more
    over        nothing more is to be started

An order names a directory of the study and no program: who reaches the port can have nothing run
that is not a step's.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field, ValidationError

from flexolmo.config import Settings
from flexolmo.errors import ConfigError, FlexOlmoError
from flexolmo.model.parallel import Meeting, meeting
from flexolmo.research.steps.jobs import Children, Job, Started, Workers, start_child, stop
from flexolmo.research.steps.step import job_of

_OVER = "over"
_LISTEN_SECONDS = 0.2
_LEAVE_SECONDS = 5.0  # that the first process waits for the others at the end


class Order(Settings):
    """One step, for one process to start."""

    step: str = Field(pattern=r"^\w+-[0-9a-f]{16}$", description="Name of its directory.")
    earlier: float = Field(description="Seconds spent on it before.")
    group: int | None = Field(description="Number of the group of its children; none: one child.")
    is_first: bool = Field(description="True for the child that tells of its progress.")


@contextmanager
def find_workers(count: int | None, root: Path, device: str) -> Iterator[Workers | None]:
    """Workers for the study in `root`: `count` children of this process (none: 2), or
    all that torchrun started.

    Under torchrun the first process has them all; the others do as it says, and have None once
    all is over. Raises ConfigError for a `count` there.
    """
    with meeting() as found:
        if found is None:
            yield Children(2 if count is None else count)
        elif count is not None:
            raise ConfigError(
                f"Found --processes {count} under torchrun, which has started {found.size}: these "
                "share out training, and take the other steps one each. Leave --processes out."
            )
        elif found.rank == 0:
            try:
                yield Crew(found)
            finally:
                _dismiss(found)
        else:
            _follow(found, Path(root).resolve() / "steps", device)
            yield None


def _dismiss(crew: Meeting) -> None:
    """Say that all is over, and wait a little for the others to have heard it."""
    crew.say(_OVER, "")
    until = time.monotonic() + _LEAVE_SECONDS
    others = [f"{rank}/gone" for rank in range(1, crew.size)]
    while time.monotonic() < until and any(crew.heard(key) is None for key in others):
        time.sleep(_LISTEN_SECONDS)


def _follow(crew: Meeting, steps: Path, device: str) -> None:
    """Start what the first process says, one step at a time, until it says that all is over."""
    number = 0
    while _goes_on(crew, _OVER):
        key = f"{crew.rank}/{number}"
        if (said := crew.heard(key)) is not None:
            number += 1
            _do(crew, key, _read_order(said), steps, device)
    crew.say(f"{crew.rank}/gone", "")


def _read_order(said: str) -> Order:
    try:
        return Order.model_validate_json(said)
    except ValidationError:
        raise FlexOlmoError(
            "Something other than a study reaches the port where torchrun's processes meet, and "
            "has left words there. Keep it out, and run the same command again."
        ) from None


def _do(crew: Meeting, key: str, order: Order, steps: Path, device: str) -> None:
    job = job_of(steps / order.step, order.earlier, device)
    child = start_child(job, _variables(crew, order), order.is_first)
    try:
        while child.poll() is None and _goes_on(crew, _OVER, f"{key}/stop"):
            pass
    finally:
        stop([child])
    crew.say(f"{key}/code", str(child.poll()))


def _variables(crew: Meeting, order: Order) -> dict[str, str]:
    return {} if order.group is None else crew.group(f"group {order.group}")


def _goes_on(crew: Meeting, *ends: str) -> bool:
    """Wait a moment; False once one of `ends` was said."""
    crew.show_life()
    time.sleep(_LISTEN_SECONDS)
    return all(crew.heard(end) is None for end in ends)


class Crew:
    """All processes at a meeting, led by the first; made by `find_workers`."""

    def __init__(self, found: Meeting):
        self._meeting = found
        self._given = [0] * found.size  # steps that each process was given so far
        self._groups = 0
        self._under_way: list[tuple[Sequence[int], Started]] = []

    def has_room(self, is_shared: bool) -> bool:
        """True if some process has nothing to do; for what all share out, all of them."""
        self._meeting.refuse_silence()
        idle = len(self._idle())
        return idle == self._meeting.size if is_shared else idle > 0

    def start(self, job: Job, is_shared: bool) -> Started:
        """Start the `job` of a step where there is room."""
        ranks = self._idle()[:1]
        group = None
        if is_shared:
            ranks = list(range(self._meeting.size))
            group = self._groups
            self._groups += 1
        parts = []
        for rank in ranks:
            order = Order(
                step=job.directory.name,
                earlier=float(job.arguments[1]),
                group=group,
                is_first=rank == ranks[0],
            )
            parts.append(self._start_at(rank, job, order))
        started = _Together(job, ranks, parts)
        self._under_way.append((ranks, started))
        return started

    def _idle(self) -> list[int]:
        self._under_way = [one for one in self._under_way if one[1].poll() is None]
        busy = {rank for ranks, _ in self._under_way for rank in ranks}
        return [rank for rank in range(self._meeting.size) if rank not in busy]

    def _start_at(self, rank: int, job: Job, order: Order) -> Started:
        if rank == self._meeting.rank:
            return start_child(job, _variables(self._meeting, order), order.is_first)
        key = f"{rank}/{self._given[rank]}"
        self._given[rank] += 1
        self._meeting.say(key, order.model_dump_json())
        return _Elsewhere(self._meeting, key)


class _Elsewhere:
    """A step in a child of another process."""

    def __init__(self, found: Meeting, key: str):
        self._meeting = found
        self._key = key

    def poll(self) -> int | None:
        code = self._meeting.heard(f"{self._key}/code")
        return None if code is None else int(code)

    def terminate(self) -> None:
        self._meeting.say(f"{self._key}/stop", "")

    def wait(self, timeout: float | None = None) -> int | None:
        """Return at once: the other process waits for it, or kills it."""
        return self.poll()

    def kill(self) -> None:
        pass


class _Together:
    """The children of one step, which end together: when one fails, the others are stopped."""

    def __init__(self, job: Job, ranks: Sequence[int], parts: Sequence[Started]):
        self._job = job
        self._ranks = ranks
        self._parts = parts
        self._failure: int | None = None  # exit code of the part that failed first
        self._is_stopped = False

    def poll(self) -> int | None:
        codes = [part.poll() for part in self._parts]
        if any(codes) and self._failure is None and not self._is_stopped:
            place = next(i for i, code in enumerate(codes) if code)
            self._failure = codes[place]
            if len(codes) > 1:
                stop(self._parts)
                self._tell(self._ranks[place])
        if None in codes:
            return None
        return self._failure or next(filter(None, codes), 0)

    def _tell(self, rank: int) -> None:
        said = f"Process {rank} was the first to end, with exit code {self._failure}.\n"
        with open(self._job.log, "a", encoding="utf-8") as log:
            log.write(said)

    def terminate(self) -> None:
        self._is_stopped = True
        for part in self._parts:
            part.terminate()

    def wait(self, timeout: float | None = None) -> int | None:
        for part in self._parts:
            part.wait(timeout)
        return self.poll()

    def kill(self) -> None:
        for part in self._parts:
            part.kill()
