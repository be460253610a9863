"""Runs Python programs that a model wrote, shut away from this machine; knows nothing of tasks.

Each program gets a new interpreter in an empty directory, with the standard library and numpy
and nothing else, so that a score does not depend on what else is installed. Before the program
begins, the process gives up its privileges and asks the kernel (resource limits, seccomp,
Landlock) to refuse it the network, other processes, threads, and all files but Python's own and
those in its directory. Where it will not, nothing runs; only Landlock may be missing.

A program passes when it runs to its end, where a secret is told: 32 bytes which until then lie
unread in a file without a name, so that leaving early or printing words proves nothing. What a
hostile program can still do: pass without being right, by finding the two open files among its
own and copying one to the other; learn that a file exists (`stat`), though not what is in it;
use up its share of time, memory and disk; with a kernel before 6.12, signal other processes of
this user through `fcntl`; before 6.2, empty Python's own files; without Landlock (before 5.13,
or switched off; `check_sandbox` says so), read and overwrite whatever this user can. A hole in
the kernel stays a hole: for programs meant to do harm, use a virtual machine.
"""

import functools
import importlib.util
import inspect
import json
import math
import os
import platform
import re
import secrets
import signal
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory, TemporaryFile
from typing import Any

from flexolmo.errors import ConfigError
from flexolmo.progress import Meter

PASSED, FAILED, TIMED_OUT, OUT_OF_MEMORY = "passed", "failed", "timed out", "out of memory"
_CONFINED = b"confined\n"
_DETAIL_CHARACTERS = 300
_POLL_SECONDS = 0.02
_OPEN_FILES = 64
_FILE_ENTRY_BYTES = 4096  # what a file costs the disk, were it empty


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    wall_seconds: float = 10.0  # from the start of the interpreter
    cpu_seconds: float = 10.0  # rounded up to whole seconds
    memory_bytes: int = 1 << 30  # of address space; Python itself takes 40 MB, numpy 120 MB
    file_bytes: int = 1 << 20  # in one file; standard error counts as one
    directory_bytes: int = 16 << 20  # in all its files together, looked at every 20 ms


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    passed: bool
    reason: str  # "passed", "failed", "timed out" or "out of memory"
    detail: str  # the end of what it wrote to standard error; empty if it passed


DEFAULT_LIMITS = Limits()

# Audit architecture, and the column below, of each machine we know. Source: linux/audit.h.
_MACHINES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}
_LAST_CALL = 469  # a number after this one is of a kernel newer than this list, or of x32
# The calls refused: name, number on x86_64, number on aarch64 ("-": has none). What else needs
# a privilege (reboot, ...) is refused by having none. Source: Linux's syscall tables.
_REFUSED_CALLS = """
    socket 41 198  connect 42 203  bind 49 200  listen 50 201  accept 43 202  accept4 288 242
    sendto 44 206  sendmsg 46 211  sendmmsg 307 269
    fork 57 -  vfork 58 -  clone 56 220  clone3 435 435  execve 59 221  execveat 322 281
    kill 62 129  tkill 200 130  tgkill 234 131  rt_sigqueueinfo 129 138  rt_tgsigqueueinfo 297 240
    pidfd_open 434 434  pidfd_send_signal 424 424  pidfd_getfd 438 438  ptrace 101 117
    process_vm_readv 310 270  process_vm_writev 311 271  process_madvise 440 440  kcmp 312 272
    prlimit64 302 261  setpriority 141 140  ioprio_set 251 30  migrate_pages 256 238
    move_pages 279 239  sched_setparam 142 118  sched_setscheduler 144 119
    sched_setaffinity 203 122  sched_setattr 314 274  setpgid 109 154  setsid 112 157
    shmget 29 194  shmat 30 196  shmctl 31 195  semget 64 190  semop 65 193  semctl 66 191
    semtimedop 220 192  msgget 68 186  msgsnd 69 189  msgrcv 70 188  msgctl 71 187  mq_open 240 180
    chmod 90 -  fchmod 91 52  fchmodat 268 53  fchmodat2 452 452  chown 92 -  fchown 93 55
    lchown 94 -  fchownat 260 54  setxattr 188 5  lsetxattr 189 6  fsetxattr 190 7
    removexattr 197 14  lremovexattr 198 15  fremovexattr 199 16  setxattrat 463 463
    removexattrat 466 466  file_setattr 469 469  utime 132 -  utimes 235 -  futimesat 261 -
    utimensat 280 88  truncate 76 45  mkdir 83 -  mkdirat 258 34  link 86 -  linkat 265 37
    symlink 88 -  symlinkat 266 36  mknod 133 -  mknodat 259 33
    unshare 272 97  setns 308 268  prctl 157 167  bpf 321 280  perf_event_open 298 241
    io_uring_setup 425 425  io_uring_enter 426 426  io_uring_register 427 427  userfaultfd 323 282
    keyctl 250 219  add_key 248 217  request_key 249 218  mount 165 40  umount2 166 39
    pivot_root 155 41  chroot 161 51  open_tree 428 428  move_mount 429 429  fsopen 430 430
    kexec_load 246 104  kexec_file_load 320 294  init_module 175 105  finit_module 313 273
    open_by_handle_at 304 265  fanotify_init 300 262
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


def run_program(program: str, limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """Run `program` as `__main__`, without input or arguments; whether it ran to its end.

    Standard output is thrown away. Strings hash alike in every run, the time zone is UTC. Raises
    ConfigError if this machine cannot shut the program away. Source: ours.
    """
    call_filter, secret = _call_filter(), secrets.token_bytes(32)
    with (
        TemporaryDirectory(prefix="flexolmo-sandbox-") as name,
        TemporaryFile() as secret_file,
        TemporaryFile() as errors_file,
    ):
        secret_file.write(secret)
        secret_file.seek(0)
        directory = Path(name).resolve()
        work = _furnish(directory, program)
        plan = {
            "parent": os.getpid(),
            "filter": call_filter.hex(),
            "rights": _rights(directory),
            "limits": _resource_limits(limits),
            "directory": str(directory),
        }
        with subprocess.Popen(
            [sys.executable, "-PSBXutf8", "-c", _child_source(), json.dumps(plan)],
            cwd=work,
            env=_environment(work),
            stdin=secret_file,
            stdout=subprocess.PIPE,
            stderr=errors_file,
            start_new_session=True,
        ) as process:
            try:
                stopped = _watch(process.pid, work, limits)
            finally:
                os.killpg(process.pid, signal.SIGKILL)  # not yet reaped: the number is still its
                process.wait()
            said = process.stdout.read(256) if process.stdout else b""
        errors_file.seek(max(0, errors_file.seek(0, os.SEEK_END) - 4 * _DETAIL_CHARACTERS))
        errors = errors_file.read(4 * _DETAIL_CHARACTERS).decode(errors="replace")
    return _judge(said, secret, stopped, process.returncode, errors.strip())


def run_programs(
    programs: Sequence[str],
    limits: Limits = DEFAULT_LIMITS,
    processes: int = 1,
    meter: Meter | None = None,
) -> list[Outcome]:
    """Run `programs`, at most `processes` at a time; their outcomes, in the order given.

    `meter` is advanced by one for each. Raises ConfigError as `run_program` does.
    """
    with ThreadPoolExecutor(processes) as pool:
        futures = [pool.submit(run_program, program, limits) for program in programs]
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
    """Try every door from inside: the protections that hold here, in words.

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
    words = _REFUSED_CALLS.split()
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
    program += [(answer, 0, 0, allow), (answer, 0, 0, refuse)]
    return b"".join(struct.pack("HBBI", *step) for step in program)


def _furnish(directory: Path, program: str) -> Path:
    """Put the program and numpy into `directory`; the empty directory to run it in."""
    (directory / "program.py").write_bytes(program.encode("utf-8", "surrogatepass"))
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


def _watch(pid: int, work: Path, limits: Limits) -> str:
    """Wait until it ends, without reaping it, or reaches a limit; "" or which limit, in words."""
    deadline = time.monotonic() + limits.wall_seconds
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            return TIMED_OUT
        if _used_bytes(work) > limits.directory_bytes:
            return f"wrote more than {limits.directory_bytes} bytes"
        time.sleep(_POLL_SECONDS)
    return ""


def _used_bytes(work: Path) -> int:
    used = 0
    for file in os.scandir(work):  # flat: it cannot make directories
        with suppress(FileNotFoundError):
            used += _FILE_ENTRY_BYTES + file.stat(follow_symlinks=False).st_size
    return used


def _judge(said: bytes, secret: bytes, stopped: str, code: int, errors: str) -> Outcome:
    detail = errors[-_DETAIL_CHARACTERS:]
    if stopped == TIMED_OUT or code == -signal.SIGXCPU:
        return Outcome(False, TIMED_OUT, detail)
    if not said.startswith(_CONFINED):
        raise ConfigError(
            f"A program was not run, because it could not be shut away: found "
            f"{detail!r}, expected a Linux kernel with seccomp filters. Run these "
            "tasks on such a machine."
        )
    if stopped:
        return Outcome(False, FAILED, stopped)
    if said == _CONFINED + secret and code == 0:
        return Outcome(True, PASSED, "")
    if errors.rpartition("\n")[2].partition(":")[0].endswith("MemoryError"):
        return Outcome(False, OUT_OF_MEMORY, detail)
    ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return Outcome(False, FAILED, detail or f"left early with {ended}")


@functools.cache
def _child_source() -> str:
    return f"{inspect.getsource(_child)}\n_child()\n"


def _child() -> None:
    """What the new interpreter does: shut the doors, run the program, tell the secret.

    Only its source goes there, so that nothing of ours can be imported beside the program.
    """
    import builtins
    import ctypes
    import errno
    import json
    import os
    import resource
    import struct
    import sys
    from os import _exit, read, write
    from types import ModuleType

    def call(function: "Any", *arguments: "bytes | int") -> int:
        answer = function(*(a if isinstance(a, bytes) else ctypes.c_long(a) for a in arguments))
        if answer < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return answer

    plan = json.loads(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)
    call(libc.prctl, 1, 9, 0, 0, 0)  # be killed when the parent ends
    if os.getppid() != plan["parent"]:
        _exit(1)
    secret, result, null = os.dup(0), os.dup(1), os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    for name, limit in plan["limits"].items():
        resource.setrlimit(getattr(resource, name), limit)
    call(libc.prctl, 38, 1, 0, 0, 0)  # no new privileges
    try:
        version = call(libc.syscall, 444, 0, 0, 1)
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        version = 0  # no Landlock in this kernel, or switched off
    if version > 0:
        handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1  # every right it knows
        scopes = 3 if version >= 6 else 0  # no signals, no abstract sockets
        rules = call(libc.syscall, 444, struct.pack("QQQ", handled, 0, scopes), 24, 0)
        for path, rights in plan["rights"]:
            beneath = os.open(path, os.O_PATH)
            call(libc.syscall, 445, rules, 1, struct.pack("=Qi", rights & handled, beneath), 0)
            os.close(beneath)
        call(libc.syscall, 446, rules, 0)
        os.close(rules)
    call(libc.capset, struct.pack("Ii", 0x20080522, 0), bytes(24))  # no capabilities
    steps = bytes.fromhex(plan["filter"])
    buffer = ctypes.create_string_buffer(steps, len(steps))
    call(libc.prctl, 22, 2, struct.pack("HP", len(steps) // 8, ctypes.addressof(buffer)), 0, 0)
    write(result, b"confined\n")

    with open(f"{plan['directory']}/program.py", "rb") as file:
        program = compile(file.read(), "program.py", "exec")
    sys.argv = ["program.py"]
    sys.path.append(f"{plan['directory']}/packages")
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__.update(__file__="program.py", __builtins__=builtins)
    exec(program, main.__dict__)
    write(result, read(secret, 32))
    _exit(0)
