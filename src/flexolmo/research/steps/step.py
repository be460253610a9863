"""A step of a study: its identity, what it leaves on disk, and the process that does it.

    ROOT/steps/KIND-DIGEST/   the files that the step wrote, and
        step.json   written first: label, kind, version, settings, inputs, identity
        done.json   written last: identity, seconds, end, metrics, run record, digest of every file
        log/        what it printed, and the seconds spent on it so far

What a step does is a function, its kind, registered with `step_kind`. A step is known by its
kind, the kind's version, its settings and its inputs' identities; ask for the same work under two
labels and it is the same step. Knows nothing of models, nor of what runs when.
"""

import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from flexolmo.errors import ConfigError, FlexOlmoError
from flexolmo.files import (
    canonical_json,
    digest_bytes,
    digest_file,
    explain_full_disk,
    hold_lock,
    parse_json,
    read_json,
    write_json,
)
from flexolmo.research.steps.jobs import Job
from flexolmo.terminal import echo

_OURS = {"step.json", "done.json", "log"}  # in a step's directory; all else is its output
_CHILD = """import os, sys
os.environ["OMP_NUM_THREADS"] = "1"
import {module}
from flexolmo.research.steps.step import work
work(sys.argv[1], float(sys.argv[2]), sys.argv[3])"""


@dataclass(frozen=True)
class StepContext:
    """Everything that a kind's function is given."""

    label: str  # for people
    settings: dict[str, Any]
    inputs: dict[str, Path]  # role: finished directory of that input; read only
    out: Path  # where to write; holds what an attempt that was cut off left
    device: str = "cpu"  # where models are to run

    def metrics(self, role: str) -> dict[str, Any]:
        """The metrics of an input."""
        return read_json(self.inputs[role] / "done.json")["metrics"]


Run = Callable[[StepContext], Mapping[str, Any] | None]  # returns metrics: JSON without NaN


@dataclass(frozen=True)
class _Kind:
    run: Run
    version: int
    is_shared: bool


_KINDS: dict[str, _Kind] = {}


def step_kind(name: str, version: int, is_shared: bool = False) -> Callable[[Run], Run]:
    """Register a function as the kind `name`; with a new `version`, old results are stale.

    It runs in a process that imports its module by name, in the step's directory, with one thread
    and every generator seeded with the setting `seed` (none: 0). One that `is_shared` runs in all
    processes that torchrun started, as one of `model.parallel`; what the first returns counts.
    """

    def register(run: Run) -> Run:
        known = _KINDS.get(name)
        if not re.fullmatch(r"\w+", name) or (known and known.run.__module__ != run.__module__):
            raise ConfigError(
                f"Kind {name!r} of {run.__module__}: expected a name of letters, "
                "digits and _ that no other module uses."
            )
        _KINDS[name] = _Kind(run, version, is_shared)
        return run

    return register


@dataclass(frozen=True, eq=False)
class Step:
    """A piece of work and what it needs. Settings are plain JSON; a path in them is absolute."""

    label: str  # for people; no part of the identity
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, "Step"] = field(default_factory=dict)  # role: step
    expected_seconds: float | None = None  # for the order of steps; no part of the identity

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ConfigError(
                f"Step {self.label}: kind {self.kind!r} is unknown; known: "
                f"{', '.join(sorted(_KINDS)) or 'none'}."
            )
        try:  # a copy, just as the step's own process will read it
            settings = parse_json(canonical_json(dict(self.settings)))
        except (TypeError, ValueError, RecursionError) as e:
            raise ConfigError(f"Step {self.label}: settings are not plain JSON: {e}.") from None
        object.__setattr__(self, "settings", settings)
        object.__setattr__(self, "inputs", dict(self.inputs))

    @cached_property
    def about(self) -> dict[str, Any]:
        """Kind, version, settings, and each input's kind and identity, which decide the step."""
        return {
            "kind": self.kind,
            "version": _KINDS[self.kind].version,
            "settings": self.settings,
            "inputs": {
                role: {"kind": step.kind, "identity": step.identity}
                for role, step in self.inputs.items()
            },
        }

    @cached_property
    def identity(self) -> str:
        """64 hex digits that name the work; equal for equal work, whatever its label."""
        return identify(self.about)

    @property
    def is_shared(self) -> bool:
        """True if several processes share the step out, where there are several."""
        return _KINDS[self.kind].is_shared

    def directory(self, root: Path) -> Path:
        """Directory of its results, present or future."""
        return Path(root) / "steps" / directory_name(self.kind, self.identity)

    def is_done(self, root: Path) -> bool:
        """True if all of it was done in `root` at some time."""
        return read_done(self.directory(root)).get("identity") == self.identity

    def result(self, root: Path, verify: bool = False) -> dict[str, Any]:
        """Read done.json: metrics, seconds, run, outputs; FlexOlmoError if not done or damaged.

        A file with the size and time noted there is taken as unchanged; `verify` reads them all.
        """
        if not self.is_done(root):
            raise FlexOlmoError(
                f"Step {self.label} is not done: expected its done.json in "
                f"{self.directory(root)}. Run the study first."
            )
        return _check_outputs(self.directory(root), self.results_root(root), verify)

    def results_root(self, root: Path) -> Path:
        """Directory that the names of its outputs start from."""
        return self.directory(root)

    def prepare(self, root: Path, device: str = "cpu") -> tuple[Job, float]:
        """Write step.json; the job that does the step, and the seconds spent on it before.

        The device is no part of the step: what one has done, the other takes as it is.
        """
        earlier = self.begin(root)
        return job_of(self.directory(root), earlier, device), earlier

    def begin(self, root: Path) -> float:
        """Write step.json; the seconds spent on the step before."""
        directory = self.directory(root)
        write_json(
            directory / "step.json", {"label": self.label, **self.about, "identity": self.identity}
        )
        spent = directory / "log" / "seconds.json"
        return float(read_json(spent)) if spent.exists() else 0.0

    def finish(self, root: Path, seconds: float) -> None:
        """Act on its job's success, after `seconds` in all; here the job itself wrote done.json."""


def job_of(directory: Path, earlier: float, device: str) -> Job:
    """The job that does the step described in `directory`, `earlier` seconds in."""
    about = read_json(directory / "step.json")
    code = _CHILD.format(module=_KINDS[about["kind"]].run.__module__)
    return Job(about["label"], (str(directory), str(earlier), device), directory, ("-c", code))


def identify(about: dict[str, Any]) -> str:
    """The identity of the step that `about` describes."""
    inputs = {role: step["identity"] for role, step in about["inputs"].items()}
    content = [about["kind"], about["version"], about["settings"], inputs]
    return digest_bytes(canonical_json(content)).removeprefix("sha256:")


def directory_name(kind: str, identity: str) -> str:
    """The name of a step's directory."""
    return f"{kind}-{identity[:16]}"


def read_done(directory: Path) -> dict[str, Any]:
    """The content of `done.json`; empty if absent or malformed."""
    try:
        done = read_json(directory / "done.json")
    except FlexOlmoError:
        return {}
    return done if isinstance(done, dict) else {}


def _check_outputs(directory: Path, outputs: Path, verify: bool = False) -> dict[str, Any]:
    """A finished step's done.json; FlexOlmoError unless its files in `outputs` are as it says."""
    done = read_done(directory)
    wrong = [] if done else ["done.json: missing or malformed"]
    for name, said in done.get("outputs", {}).items():
        file = outputs / name
        if not file.is_file():
            wrong.append(f"{name}: missing")
        elif (size := file.stat().st_size) != said["bytes"]:
            wrong.append(f"{name}: {size} bytes, expected {said['bytes']}")
        elif (verify or file.stat().st_mtime_ns != said["mtime_ns"]) and digest_file(file) != said[
            "digest"
        ]:
            wrong.append(f"{name}: not the content that was written")
    if wrong:
        raise FlexOlmoError(
            f"{directory} is not as its step left it:\n  "
            + "\n  ".join(wrong)
            + "\nRemove the directory and run again to have it made anew."
        )
    return done


def note_seconds(directory: Path, seconds: float) -> None:
    """Keep what an unfinished step cost so far, for the attempt that resumes it."""
    write_json(directory / "log" / "seconds.json", seconds)


def work(directory: str, earlier: float, device: str = "cpu") -> None:
    """Do the step described in `directory`, `earlier` seconds in; a child's whole program."""
    try:
        with exit_on_sigterm(), _taking_part(Path(directory), device) as own_device:
            _do_step(Path(directory), earlier, own_device)
    except FlexOlmoError as e:
        echo(f"{type(e).__name__}: {e}", err=True)
        sys.exit(2)


@contextmanager
def _taking_part(directory: Path, device: str) -> Iterator[str]:
    """Be the process that does a step, or one of those that share it out; yields its device.

    What several processes began is ended by a group, if only of one, as its rounding is theirs.
    """
    kind = _KINDS.get(read_json(directory / "step.json")["kind"])
    # of which an attempt may hold that is still ending because its parent was killed
    lock = hold_lock(directory / "log" / "lock", wait=True)
    if kind is None or not kind.is_shared:
        with lock:
            yield device
        return
    from flexolmo.model.parallel import are_several, count, is_first, processes

    mark = directory / "log" / "processes.json"
    with processes(device, in_group=mark.exists()) as own_device, ExitStack() as stack:
        if is_first():
            stack.enter_context(lock)
        if is_first() and are_several():
            write_json(mark, count())
        yield str(own_device)


def _do_step(directory: Path, earlier: float, device: str) -> None:
    from flexolmo.runtime import run_record, set_up

    start = time.monotonic()
    about = read_json(directory / "step.json")
    kind, settings = _KINDS.get(about["kind"]), about["settings"]
    if kind is None or kind.version != about["version"]:
        raise FlexOlmoError(
            f"The code changed during the run: version {about['version']} of kind "
            f"{about['kind']!r} is gone. Start the study again."
        )
    is_done = read_done(directory).get("identity") == about["identity"]
    keeps_memory = True
    if kind.is_shared:
        from flexolmo.model.parallel import agree, are_several, first_goes_on

        is_done = agree(is_done)
        keeps_memory = not are_several()
    if is_done:
        return
    inputs = {
        role: directory.parent / directory_name(step["kind"], step["identity"])
        for role, step in about["inputs"].items()
    }
    read = {role: _check_outputs(path, path)["outputs"] for role, path in inputs.items()}
    seed = settings.get("seed", 0)
    set_up(seed, num_threads=1, keeps_memory=keeps_memory)
    run = run_record(
        settings,
        seed,
        {
            role: digest_bytes(
                canonical_json({name: said["digest"] for name, said in files.items()})
            )
            for role, files in read.items()
        },
    )
    context = StepContext(about["label"], settings, inputs, directory, device)
    with explain_full_disk(directory / "done.json"):
        metrics = dict(kind.run(context) or {})
    if kind.is_shared:
        first_goes_on()
    files = [
        file for file in directory.rglob("*") if file.relative_to(directory).parts[0] not in _OURS
    ]
    write_done(
        directory,
        identity=about["identity"],
        seconds=earlier + time.monotonic() - start,
        outputs=describe_files(files, directory),
        metrics=metrics,
        run=run | {"device": device},
    )


def describe_files(paths: Iterable[Path], root: Path) -> dict[str, Any]:
    """Digest, size and time of every file of `paths`, by its path in `root`."""
    return {
        str(file.relative_to(root)): {
            "digest": digest_file(file),
            "bytes": file.stat().st_size,
            "mtime_ns": file.stat().st_mtime_ns,
        }
        for file in sorted(paths)
        if file.is_file()
    }


def write_done(directory: Path, **done: Any) -> None:
    """Write done.json, the last act of a step, with the time of its end."""
    write_json(directory / "done.json", done | {"ended": time.time()})


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Make SIGTERM unwind the stack as Ctrl-C does, so that children are ended too; unless it
    already does something."""
    is_main = threading.current_thread() is threading.main_thread()  # which alone may say what
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
