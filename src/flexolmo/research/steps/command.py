"""Steps that are a `flexolmo` command line, run in the directory its user would run it in.

The files that a command makes lie where its user would have them; ROOT/steps/LABEL holds the
record alone. Asked for with other settings or inputs, a step replaces what it made before.
"""

import os
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexolmo.errors import FlexOlmoError
from flexolmo.files import read_json, write_bytes
from flexolmo.research.steps.jobs import Job, file_name
from flexolmo.research.steps.step import (
    Step,
    StepContext,
    describe_files,
    read_done,
    step_kind,
    write_done,
)


@step_kind("command", version=1)
def _refuse(step: StepContext) -> None:
    raise FlexOlmoError(f"{step.label} is a command line; only a CommandStep runs it.")


@dataclass(frozen=True, eq=False)
class CommandStep(Step):
    """A command line. Its inputs are CommandSteps too; make one with `command_step`."""

    def directory(self, root: Path) -> Path:
        """Directory of its record."""
        return Path(root) / "steps" / file_name(self.label)

    def results_root(self, root: Path) -> Path:
        """Directory that the names of its outputs start from."""
        return Path(root)

    def is_done(self, root: Path) -> bool:
        """True if all of it was done, and after all that it needs."""
        done = read_done(self.directory(root))
        return done.get("identity") == self.identity and all(
            step.is_done(root) and read_done(step.directory(root))["ended"] <= done["ended"]
            for step in self.inputs.values()
        )

    def prepare(self, root: Path, device: str = "cpu") -> tuple[Job, float]:
        """Clear what must not be there, write its files; the job, and the seconds spent before."""
        for needed in self.inputs.values():
            needed.result(root)
        record, settings = self.directory(root), self.settings
        is_new = not _has_begun(record, self.identity)
        if is_new:  # in this order: only with all of the old gone does step.json name the new
            shutil.rmtree(record, ignore_errors=True)
        if is_new or not settings["is_resumable"]:
            for path in self._made(root):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        directory = Path(root) / settings["directory"]
        for name, text in settings["files"].items():
            write_bytes(directory / name, text.encode())
        return Job(self.label, tuple(settings["arguments"]), directory), self.begin(root)

    def finish(self, root: Path, seconds: float) -> None:
        """Write done.json with the digests of what the command made."""
        made = (f for path in self._made(root) for f in (path, *path.rglob("*")))
        outputs = describe_files(made, root)
        write_done(self.directory(root), identity=self.identity, seconds=seconds, outputs=outputs)
        (self.directory(root) / "log" / "seconds.json").unlink(missing_ok=True)

    def _made(self, root: Path) -> list[Path]:
        directory = Path(root) / self.settings["directory"]
        return [Path(os.path.normpath(directory / name)) for name in self.settings["makes"]]


def command_step(
    label: str,
    directory: str,
    command: str,
    *,
    makes: Iterable[str],
    after: Iterable[Step] = (),
    files: Mapping[str, str] | None = None,
    is_resumable: bool = False,
    seconds: float | None = None,
) -> CommandStep:
    """The step that runs `command` in `directory` of the root, `after` others.

    Args:
        command: The command line as a shell reads it, without `flexolmo`.
        makes: Files and directories that it makes, as seen from `directory`.
        files: Files to write there first, by name.
        is_resumable: Run again after a kill, the command goes on from what is there. Else what an
            attempt left is removed before the next.
        seconds: About how long it takes, so that of several steps the longest may go first.
    """
    settings: dict[str, Any] = {
        "directory": directory,
        "arguments": shlex.split(command),
        "makes": list(makes),
        "files": dict(files or {}),
        "is_resumable": is_resumable,
    }
    inputs = {step.label: step for step in after}
    return CommandStep(label, "command", settings, inputs, seconds)


def _has_begun(record: Path, identity: str) -> bool:
    """True if the step begun last in `record` is the one of this identity."""
    file = record / "step.json"
    return file.exists() and read_json(file).get("identity") == identity
