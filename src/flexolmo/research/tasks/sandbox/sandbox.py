"""Runs Python programs that a model wrote, shut away from this machine; knows nothing of tasks.

Each program gets a new interpreter in an empty directory, with the standard library and numpy
and nothing else, so that a score does not depend on what else is installed. Before the program
begins, the process gives up its privileges and asks the kernel (resource limits, seccomp,
Landlock) to refuse it the network, other processes, threads, and all files but Python's own and
those in its directory. Where it will not, nothing runs; only Landlock may be missing.

A program passes when its tests do, and those run outside its reach: in a second process, shut away
likewise, which asks the program for answers over a pipe, and judges plain values (`inside.py`). The
program never sees the tests, and nothing that it does to its own interpreter changes the verdict.
What a hostile program can still do: learn that a file exists (`stat`), though not what is in it;
use up its share of time, memory and disk; before Linux 6.2, empty Python's own files; without
Landlock (before 5.13, or switched off; `check_sandbox` says so), read and overwrite whatever this
user can. A hole in the kernel stays a hole: for programs meant to do harm, use a virtual machine.
"""

import functools
import importlib.util
import json
import math
import os
import platform
import re
import signal
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory, TemporaryFile

from flexolmo.errors import ConfigError
from flexolmo.progress import Meter
from flexolmo.research.tasks.sandbox import inside

PASSED, FAILED, TIMED_OUT, OUT_OF_MEMORY = "passed", "failed", "timed out", "out of memory"
_DETAIL_CHARACTERS = 300
_POLL_SECONDS = 0.02
_OPEN_FILES = 64
_FILE_ENTRY_BYTES = 4096  # what a file costs the disk, were it empty


@dataclass(frozen=True)
class Limits:
    """Limits of one program and, apart from it, of its tests."""

    wall_seconds: float = 10.0  # from the start of the interpreter
    cpu_seconds: float = 10.0  # rounded up to whole seconds
    memory_bytes: int = 1 << 30  # of address space; Python itself takes 40 MB, numpy 120 MB
    file_bytes: int = 1 << 20  # in one file; standard error counts as one
    directory_bytes: int = 16 << 20  # in all its files together, looked at every 20 ms


@dataclass(frozen=True)
class Outcome:
    """The end of a program."""

    passed: bool
    reason: str  # "passed", "failed", "timed out" or "out of memory"
    detail: str  # the end of what it wrote to standard error; empty if it passed


@dataclass(frozen=True)
class _Child:
    process: subprocess.Popen[bytes]
    work: Path  # the only directory it can write to


DEFAULT_LIMITS = Limits()

# Audit architecture, and the column below, of each machine we know. Source: linux/audit.h.
_MACHINES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}
_LAST_CALL = 469  # a number after this one is of a kernel newer than this list, or of x32
# The calls allowed, all others being refused: name, number on x86_64, number on aarch64 ("-": has
# none). They are what Python and numpy need to compute, to tell the time, and to read and write
# files where Landlock lets them. Source: Linux's syscall tables.
_ALLOWED_CALLS = """
    read 0 63  write 1 64  readv 19 65  writev 20 66  pread64 17 67  pwrite64 18 68  lseek 8 62
    open 2 -  openat 257 56  close 3 57  fsync 74 82  fdatasync 75 83  ftruncate 77 46
    sendfile 40 71  stat 4 -  lstat 6 -  fstat 5 80  newfstatat 262 79  statx 332 291
    statfs 137 43  fstatfs 138 44  access 21 -  faccessat 269 48  faccessat2 439 439
    readlink 89 -  readlinkat 267 78  getcwd 79 17  getdents 78 -  getdents64 217 61
    unlink 87 -  unlinkat 263 35  rename 82 -  renameat 264 38  renameat2 316 276
    mmap 9 222  munmap 11 215  mprotect 10 226  mremap 25 216  madvise 28 233  brk 12 214
    rt_sigaction 13 134  rt_sigprocmask 14 135  rt_sigreturn 15 139  sigaltstack 131 132
    restart_syscall 219 128  alarm 37 -  getitimer 36 102  setitimer 38 103
    nanosleep 35 101  clock_nanosleep 230 115  clock_gettime 228 113  clock_getres 229 114
    gettimeofday 96 169  time 201 -  times 100 153  getrusage 98 165  sysinfo 99 179  uname 63 160
    getrandom 318 278  futex 202 98  sched_yield 24 124  sched_getaffinity 204 123
    getpid 39 172  getppid 110 173  gettid 186 178  getuid 102 174  geteuid 107 175
    getgid 104 176  getegid 108 177  exit 60 93  exit_group 231 94
"""
# Landlock's rights. Source: linux/landlock.h.
_READ_FILE, _READ, _WRITE_FILE = 4, 4 | 8, 2  # read: files and the names in a directory
_CHANGE = _READ | _WRITE_FILE | 32 | 256 | 1 << 14  # and remove, make, truncate files
_PROBE = """
import numpy, os, socket
doors = []
for i, attempt in enumerate({attempts}):
    try:
        eval(attempt)
        doors.append(str(i))
    except (PermissionError, MemoryError):
        pass
if doors:
    raise SystemExit("open: " + " ".join(doors))
"""


def run_program(program: str, limits: Limits = DEFAULT_LIMITS, tests: str = "") -> Outcome:
    """Run `program` as `__main__`, without input or arguments, then `tests` of what it defined.

    The tests are a program of their own in which `_program.NAME` is the program's NAME. It passes
    if it runs to its end and no test fails. Standard output is thrown away. Strings hash alike in
    every run, the time zone is UTC. Raises ConfigError if this machine cannot shut programs away.
    Source: ours.
    """
    call_filter = _call_filter()
    with TemporaryFile() as errors_file, ExitStack() as stack:
        pipes = [*os.pipe(), *os.pipe()]
        asked, ask, answers, answer = pipes

        def start(text: str, stdin: int, stdout: int, ask: int | None) -> _Child:
            directory = Path(
                stack.enter_context(TemporaryDirectory(prefix="flexolmo-sandbox-"))
            ).resolve()
            work = _furnish(directory, text)
            plan = {
                "parent": os.getpid(),
                "filter": call_filter.hex(),
                "rights": _rights(directory),
                "limits": _resource_limits(limits),
                "directory": str(directory),
                "ask": ask,
            }
            process = subprocess.Popen(
                [sys.executable, "-PSBXutf8", "-c", _inside_source(), json.dumps(plan)],
                cwd=work,
                env=_environment(work),
                stdin=stdin,
                stdout=stdout,
                stderr=errors_file,
                pass_fds=() if ask is None else (ask,),
                start_new_session=True,
            )
            stack.callback(_end, process)
            return _Child(process, work)

        try:
            program_child = start(program, asked, answer, None)
            tests_child = start(tests, answers, subprocess.PIPE, ask)
        finally:
            for end in pipes:
                os.close(end)
        stopped = _watch([program_child, tests_child], limits)
        codes = [_end(child.process) for child in (program_child, tests_child)]
        confined = tests_child.process.stdout
        is_confined = confined is not None and confined.read() == inside.CONFINED
        errors_file.seek(max(0, errors_file.seek(0, os.SEEK_END) - 4 * _DETAIL_CHARACTERS))
        errors = errors_file.read(4 * _DETAIL_CHARACTERS).decode(errors="replace")
    return _judge(is_confined, stopped, codes, errors.strip())


def _end(process: subprocess.Popen[bytes]) -> int:
    """Kill the process and whatever it started; its exit code."""
    if process.returncode is None:  # not yet reaped: the number is still its
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def run_programs(
    programs: Sequence[str],
    limits: Limits = DEFAULT_LIMITS,
    processes: int = 1,
    meter: Meter | None = None,
    tests: Sequence[str] = (),
) -> list[Outcome]:
    """Run `programs`, at most `processes` at a time; their outcomes, in the order given.

    `tests` has one text for each program, or none. `meter` is advanced by one for each program.
    Raises ConfigError as `run_program` does.
    """
    texts = tests or [""] * len(programs)
    with ThreadPoolExecutor(processes) as pool:
        futures = [
            pool.submit(run_program, program, limits, text)
            for program, text in zip(programs, texts, strict=True)
        ]
        try:
            for future in as_completed(futures):
                future.result()
                if meter is not None:
                    meter.advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def check_sandbox() -> list[str]:
    """Try every forbidden act from inside: the protections that hold here, in words.

    Raises ConfigError if programs cannot be run, or would not be shut away. Where only Landlock
    is missing, the last entry says what is then not protected. Source: ours.
    """
    with NamedTemporaryFile(prefix="flexolmo-sandbox-") as outside:
        doors = {
            "no network (seccomp)": "socket.socket()",
            "no other process (seccomp)": "os.fork()",
            "no signals (seccomp)": "os.kill(os.getpid(), 0)",
            "bounded memory (rlimit)": f"bytearray({DEFAULT_LIMITS.memory_bytes})",
            "no reading but of Python and its directory (Landlock)": f"open({outside.name!r})",
            "no writing outside its directory (Landlock)": f"open({outside.name!r}, 'a')",
        }
        outcome = run_program(_PROBE.format(attempts=list(doors.values())))
    found = re.search(r"^open: ([\d ]+)$", outcome.detail, re.MULTILINE)
    if not outcome.passed and found is None:
        raise ConfigError(
            f"A program that imports numpy and tries the sandbox {outcome.reason}; "
            f"expected it to run to its end. Mend this first: {outcome.detail}"
        )
    is_open = {int(number) for number in found[1].split()} if found else set()
    holding = [words for i, words in enumerate(doors) if i not in is_open]
    if bad := [words for i, words in enumerate(doors) if i in is_open and "Landlock" not in words]:
        raise ConfigError(
            f"The sandbox does not hold; expected but not found: {', '.join(bad)}. "
            "Use a Linux machine whose kernel has seccomp filters."
        )
    if is_open:
        holding.append("files outside NOT protected: no Landlock in this kernel (Linux 5.13)")
    return holding


def _call_filter() -> bytes:
    """The seccomp program (classic BPF) for this machine; ConfigError if there is none.

    Another architecture's calls end the process; unknown numbers, x32 among them, do not exist.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _MACHINES:
        raise ConfigError(
            f"Programs cannot be shut away on {sys.platform} {machine}: expected "
            f"linux on {' or '.join(_MACHINES)}. Run these tasks on such a machine."
        )
    architecture, column = _MACHINES[machine]
    words = _ALLOWED_CALLS.split()
    numbers = [int(number) for number in words[column::3] if number != "-"]
    kill, missing, refuse, allow = 0x80000000, 0x50000 | 38, 0x50000 | 1, 0x7FFF0000
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (answer, 0, 0, kill),
        (load, 0, 0, 0),
        (at_least, 0, 1, _LAST_CALL + 1),
        (answer, 0, 0, missing),
    ]
    program += [(equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    program += [(answer, 0, 0, refuse), (answer, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *step) for step in program)


def _furnish(directory: Path, text: str) -> Path:
    """Put the text to run and numpy into `directory`; the empty directory to run it in."""
    (directory / "text.py").write_bytes(text.encode("utf-8", "surrogatepass"))
    (directory / "packages").mkdir()
    for package in _numpy_directories():
        (directory / "packages" / package.name).symlink_to(package)
    (directory / "work").mkdir()
    return directory / "work"


def _numpy_directories() -> list[Path]:
    found = importlib.util.find_spec("numpy")
    if found is None or found.origin is None:
        return []
    package = Path(found.origin).resolve().parent
    return [p for p in (package, package.with_name("numpy.libs")) if p.is_dir()]


def _rights(directory: Path) -> list[tuple[str, int]]:
    """Paths and the Landlock rights beneath each; everything else is closed."""
    python = [
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("platstdlib"),
        f"{sys.base_prefix}/lib",
        *map(str, _numpy_directories()),
    ]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
    rights = [(path, _READ) for path in (*python, *system) if os.path.isdir(path)]
    rights += [
        (path, _READ_FILE)
        for path in ("/etc/ld.so.cache", "/etc/ssl/openssl.cnf")
        if os.path.isfile(path)
    ]
    return [
        *rights,
        ("/dev/null", _READ_FILE | _WRITE_FILE),
        (str(directory), _READ),
        (str(directory / "work"), _CHANGE),
    ]


def _resource_limits(limits: Limits) -> dict[str, tuple[int, int]]:
    cpu_seconds = math.ceil(limits.cpu_seconds)  # then a signal, a second later the end
    return {
        "RLIMIT_CPU": (cpu_seconds, cpu_seconds + 1),
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_AS": (limits.memory_bytes, limits.memory_bytes),
        "RLIMIT_FSIZE": (limits.file_bytes, limits.file_bytes),
        "RLIMIT_NOFILE": (_OPEN_FILES, _OPEN_FILES),
    }


def _environment(work: Path) -> dict[str, str]:
    return {
        "HOME": str(work),
        "TMPDIR": str(work),
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": "0",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def _watch(children: Sequence[_Child], limits: Limits) -> str:
    """Wait until all ended, without reaping them, or a limit is reached; "" or which, in words."""
    deadline = time.monotonic() + limits.wall_seconds
    look = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while any(os.waitid(os.P_PID, child.process.pid, look) is None for child in children):
        if time.monotonic() > deadline:
            return TIMED_OUT
        if any(_used_bytes(child.work) > limits.directory_bytes for child in children):
            return f"wrote more than {limits.directory_bytes} bytes"
        time.sleep(_POLL_SECONDS)
    return ""


def _used_bytes(work: Path) -> int:
    used = 0
    for file in os.scandir(work):  # flat: it cannot make directories
        with suppress(FileNotFoundError):
            used += _FILE_ENTRY_BYTES + file.stat(follow_symlinks=False).st_size
    return used


def _judge(is_confined: bool, stopped: str, codes: Sequence[int], errors: str) -> Outcome:
    """The outcome, from the exit codes of the program and of its tests."""
    detail = errors[-_DETAIL_CHARACTERS:]
    if stopped == TIMED_OUT or -signal.SIGXCPU in codes:
        return Outcome(False, TIMED_OUT, detail)
    if not is_confined:
        raise ConfigError(
            f"A program was not run, because it could not be shut away: found "
            f"{detail!r}, expected a Linux kernel with seccomp filters. Run these "
            "tasks on such a machine."
        )
    if stopped:
        return Outcome(False, FAILED, stopped)
    of_program, of_tests = codes
    if of_tests == 0:
        return Outcome(True, PASSED, "")
    if errors.rpartition("\n")[2].partition(":")[0].endswith("MemoryError"):
        return Outcome(False, OUT_OF_MEMORY, detail)
    ended = signal.Signals(-of_program).name if of_program < 0 else f"exit code {of_program}"
    return Outcome(False, FAILED, detail or f"left early with {ended}")


@functools.cache
def _inside_source() -> str:
    return Path(inside.__file__).read_text(encoding="utf-8")
