"""A made Slurm: sbatch, squeue and scancel that keep a queue in a directory, and its one machine.

The queue is on the disk, so it outlives whoever submits. `Cluster.step` does one job that may
begin, in random order, in a process of its own: bash reads the submitted script, and what the
script starts is run by a fork of this process, which spares the imports.
"""

import json
import os
import random
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import typer.main

from flexolmo import cli

_SBATCH = """#!{python} -IS
import json, os, shutil, sys
spool = "{spool}"
options = dict(a[2:].partition("=")[::2] for a in sys.argv[1:] if a.startswith("--"))
(script,) = [a for a in sys.argv[1:] if not a.startswith("--")]
assert "parsable" in options, sys.argv
assert not any(name.startswith(("SLURM_CLUSTERS", "SCANCEL_")) for name in os.environ)
number = str(1000 + len(os.listdir(spool + "/jobs")))
if os.path.exists(spool + "/down-sbatch") and options["array"] == "0":
    sys.exit("sbatch: error: Batch job submission failed")
array = []
for run in options["array"].partition("%")[0].split(","):
    first, _, last = run.partition("-")
    array += range(int(first), int(last or first) + 1)
shutil.copy(script, spool + "/script-" + number)
job = dict(options=options, waiting=array, ended={{}}, script=spool + "/script-" + number)
json.dump(job, open(spool + "/aside", "w"))
os.replace(spool + "/aside", spool + "/jobs/" + number)
open(spool + "/queue-" + options["job-name"] + "-" + number, "w").write("PENDING (Priority)\\n")
print(number + ";here")
"""
_SQUEUE = """#!/bin/sh
[ -e '{spool}/down-squeue' ] && exit 1
[ -z "$SQUEUE_STATES" ] || exit 2
[ "$1 $2 $4" = "--all --noheader --format=%T (%r)" ] || exit 2
for job in '{spool}'/queue-"${{3#--name=}}"-*; do
    [ ! -e "$job" ] || cat "$job"
done
"""
_SCANCEL = """#!/bin/sh
case "$1" in --name=*) rm -f '{spool}'/queue-"${{1#--name=}}"-*; exit;; esac
for job in "$@"; do rm -f '{spool}'/queue-*-"$job"; done
"""
# Stands in for Python in the scripts: notes what it was asked for.
_PYTHON = """#!/bin/sh
printf '%s\\0' "$@" > "$MADE_SLURM_ASKED"
"""


class Cluster:
    """The made Slurm whose programs are in `bin`."""

    def __init__(self, directory: Path, seed: int = 0) -> None:
        self.spool = directory / "spool"
        self.bin = directory / "bin"
        (self.spool / "jobs").mkdir(parents=True)
        self.bin.mkdir()
        self.python = str(self.bin / "py thon $HOME 'x'")  # hard to quote
        programs = {"sbatch": _SBATCH, "squeue": _SQUEUE, "scancel": _SCANCEL}
        for name, text in {**programs, self.python: _PYTHON}.items():
            path = self.bin / name
            path.write_text(text.format(python=sys.executable, spool=self.spool))
            path.chmod(0o700)
        self.draw = random.Random(seed)
        self.faults: dict[tuple[str, int], str] = {}  # of the next try of a part
        self.late: list[list[str]] = []  # asked for, and not begun when Slurm gave them up
        typer.main.get_command(cli.app)  # built here, once, and not in every fork

    def jobs(self) -> dict[str, dict]:
        """Jobs that were submitted, by number."""
        return {f.name: json.loads(f.read_text()) for f in sorted((self.spool / "jobs").iterdir())}

    def queue(self) -> list[str]:
        """Numbers of the jobs that are in the queue."""
        return [f.name.rpartition("-")[2] for f in sorted(self.spool.glob("queue-*"))]

    def fail(self, program: str, is_down: bool = True) -> None:
        """Let a program find no controller, or find it again."""
        down = self.spool / f"down-{program}"
        down.touch() if is_down else down.unlink()

    def step(self, _seconds: float = 0) -> bool:
        """Do one part that may begin; False if there is none. A part may be `killed` when its work
        is done and its result is not, or `lost`: given up before it begins."""
        ready = []
        jobs = self.jobs()
        for number in self.queue():
            job = jobs[number]
            before = jobs.get(job["options"].get("dependency", "").removeprefix("afterok:"))
            if before is None or (not before["waiting"] and not any(before["ended"].values())):
                ready += [(number, part) for part in job["waiting"]]
            elif any(before["ended"].values()):
                assert job["options"]["kill-on-invalid-dep"] == "yes"
                job["ended"]["never"] = 1
                self._note(number, job)
        if not ready:
            return False
        number, part = self.draw.choice(ready)
        job = jobs[number]
        asked = self._ask_bash(job, part)
        fault = self.faults.pop((asked[-2], int(asked[-1])), None)
        if fault == "lost":
            self.late.append(asked)
            code = 1
        else:
            options = job["options"]
            log = Path(options["chdir"]) / options["output"].replace("%a", str(part))
            kill = os.sync if fault is None else lambda: os.kill(os.getpid(), signal.SIGKILL)
            code = self.run(asked, log, kill)
        job["waiting"].remove(part)
        job["ended"][str(part)] = code
        self._note(number, job)
        return True

    def run(self, asked: list[str], log: Path, sync: Callable[[], object] = int) -> int:
        """Run what a script asked for in a process of its own; its exit status."""
        assert asked[:3] == ["-P", "-m", "flexolmo"], asked  # -P: where it runs may be /tmp

        def main() -> None:
            os.sync = sync
            sys.argv = ["flexolmo", *asked[3:]]
            cli.main()

        return in_a_fork(main, log)

    def _ask_bash(self, job: dict, part: int) -> list[str]:
        asked = self.spool / "asked"
        environment = {
            **os.environ,
            "SLURM_ARRAY_TASK_ID": str(part),
            "MADE_SLURM_ASKED": str(asked),
        }
        subprocess.run(["bash", job["script"]], env=environment, check=True, cwd=self.spool)
        return os.fsdecode(asked.read_bytes()).split("\0")[:-1]

    def _note(self, number: str, job: dict) -> None:
        (self.spool / "jobs" / number).write_text(json.dumps(job))
        if not job["waiting"] or "never" in job["ended"]:
            (self.spool / f"queue-{job['options']['job-name']}-{number}").unlink()


def in_a_fork(do: Callable[[], object], log: Path) -> int:
    """Call `do` in a process of its own, which prints to the end of `log`; its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(start_fork(do, log), 0)[1])


def start_fork(do: Callable[[], object], log: Path) -> int:
    """Number of a process that calls `do` and prints to the end of `log`, started by the main
    thread: what torch leaves to a thread does not outlive a fork in another."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.stdout = sys.stderr = log.open("a", buffering=1)
            do()
            code = 0
        except SystemExit as e:
            code = int(e.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child
