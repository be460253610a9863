"""Jobs of Slurm that do the parts of a preparation, by way of sbatch, squeue and scancel.

All jobs of a run have one name, which no other run has. So Slurm itself says whether any of them
waits or works, also those that were submitted just before a kill. A script holds a path and the
name of a stage. Knows nothing of what a part does.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from flexolmo.errors import ConfigError, UnfinishedError

_OURS = {"array", "chdir", "dependency", "error", "job-name", "open-mode", "output", "parsable"}
_NO_USE = {"clusters", "test-only", "wait", "wrap"}
# settings of a user by which squeue and scancel would leave jobs out, and sbatch wait, or submit
# elsewhere
_OWN_SETTINGS = ("SQUEUE_", "SCANCEL_", "SBATCH_WAIT", "SBATCH_CLUSTERS", "SLURM_CLUSTERS")
_SECONDS = 60  # that an answer may take


def job_name(work: Path) -> str:
    """Name of all jobs that do parts in the directory `work`, whose own name no other has."""
    return f"flexolmo-{work.name}"


def find_jobs(name: str) -> list[str] | None:
    """State and reason of each of our jobs of this name that waits or works, such as
    `PENDING (Resources)`; None where Slurm does not say."""
    asked = _ask("squeue", "--all", "--noheader", f"--name={name}", "--format=%T (%r)")
    return asked.stdout.splitlines() if asked.returncode == 0 else None


def check_options(options: Sequence[str]) -> list[str]:
    """Options for sbatch, such as `partition=cpu`, as it takes them.

    Raises:
        ConfigError: not of that form, or one that we set.
    """
    for option in options:
        if not re.fullmatch(r"[a-z][a-z-]+(=.*)?", option, re.DOTALL):
            raise ConfigError(
                f"--slurm-option {option!r}: expected an option of sbatch without its dashes, such "
                "as partition=cpu or time=12:00:00."
            )
        given = option.partition("=")[0]  # which sbatch takes for any option that begins so
        if any(name.startswith(given) for name in _OURS | _NO_USE):
            raise ConfigError(
                f"--slurm-option {option}: the preparation sets this one itself, or cannot use it. "
                "Leave it out."
            )
    return [f"--{option}" for option in options]


def submit_parts(
    work: Path, arrays: Mapping[str, str], options: Sequence[str], most: int | None
) -> None:
    """Submit an array of jobs for each stage, which waits until all of the array before is done.

    Args:
        arrays: by stage, in order, the parts to do, such as 0-5,7.
        options: as `check_options` gives them.
        most: jobs of an array that work at the same time.
    Raises:
        UnfinishedError: sbatch cannot be run, or refuses; jobs submitted before are cancelled.
    """
    ids: list[str] = []
    for stage, parts in arrays.items():
        script = work / f"{stage}.sbatch"
        script.write_text(_script(work, stage), encoding="utf-8", errors="surrogateescape")
        waits = [f"--dependency=afterok:{ids[-1]}", "--kill-on-invalid-dep=yes"] if ids else []
        asked = _ask(
            "sbatch",
            *options,
            "--parsable",
            f"--job-name={job_name(work)}",
            f"--array={parts}" + (f"%{most}" if most else ""),
            f"--chdir={work}",
            f"--output={stage}-%a.log",  # under --chdir, for its own % would be filled in
            "--open-mode=append",
            *waits,
            str(script),
        )
        number = asked.stdout.strip().partition(";")[0]  # a cluster's name may follow
        if asked.returncode != 0 or not number.isdecimal():
            answer = asked.stderr.strip() or f"it answered {asked.stdout[:200]!r}"
            raise UnfinishedError(
                f"sbatch did not take the jobs of {stage}: {answer}. {_cancel_all(work)} Give the "
                "command again with other --slurm-option; for fewer --tasks, remove "
                f"{work.parent} first."
            )
        ids.append(number)


def _cancel_all(work: Path) -> str:
    """Cancel the jobs of this run; a sentence that says so, or how to."""
    name = job_name(work)
    if _ask("scancel", f"--name={name}").returncode == 0:
        return "Jobs of stages before were cancelled."
    return f"Jobs of stages before may be in the queue: `scancel --name={name}` ends them."


def _ask(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of Slurm; one that cannot be run, or does not answer, has failed."""
    plain = {name: v for name, v in os.environ.items() if not name.startswith(_OWN_SETTINGS)}
    try:
        return subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            env=plain,
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        return subprocess.CompletedProcess([program], 1, "", str(e))


def was_submitted(work: Path) -> bool:
    """True if jobs were submitted for parts in the directory `work`, or began to be."""
    return any(work.glob("*.sbatch"))


def _script(work: Path, stage: str) -> str:
    # -P: nothing is imported from where a job runs, which is /tmp where `work` cannot be entered
    command = [sys.executable, "-P", "-m", "flexolmo", "data", "part", str(work), stage]
    return f'#!/bin/bash\nexec {shlex.join(command)} "$SLURM_ARRAY_TASK_ID"\n'
