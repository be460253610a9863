"""The sandbox: who passes, what is refused, what is left behind."""

import os
import struct
import sys
import tempfile
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from flexolmo.errors import ConfigError
from flexolmo.progress import Meter
from flexolmo.research.tasks.sandbox import sandbox
from flexolmo.research.tasks.sandbox.sandbox import Limits, check_sandbox, run_program, run_programs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")
ALLOW_ALL = struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)  # a filter that refuses nothing


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    """After each test: no process of any sandbox, not even a dead one, and no directory."""
    started, popen = [], sandbox.subprocess.Popen

    def watch(*arguments, **named):
        started.append(popen(*arguments, **named))
        return started[-1]

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(sandbox.subprocess, "Popen", watch)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield started
    for process in started:
        assert has_no_process(process.pid)
    assert list(temporary.iterdir()) == []


def has_no_process(group):
    """Whether it has none; the system may need a moment to bury an orphan."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def protections():
    return check_sandbox()


@pytest.fixture
def landlock(protections):
    if any("no Landlock" in words for words in protections):
        pytest.skip("this kernel has no Landlock: files outside are not protected")


def are_refused(*attempts, error="PermissionError"):
    """Whether each raises `error` in the sandbox; all in one program."""
    outcome = run_program(f"""
import ctypes, os, resource, socket, subprocess, threading, time, urllib.error, urllib.request
for attempt in {attempts}:
    try:
        exec(attempt)
    except {error}:
        continue
    raise SystemExit("not refused: " + attempt)
""")
    assert outcome.passed, outcome.detail
    return True


def test_a_program_that_runs_to_its_end_passes():
    outcome = run_program("print('hello')\nassert 1 + 1 == 2")
    assert (outcome.passed, outcome.reason, outcome.detail) == (True, "passed", "")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("assert 1 + 1 == 3, 'wrong sum'", "AssertionError: wrong sum"),
        ("def f(:\n", "SyntaxError"),
        ("x = '\udcff'", "Error"),  # not UTF-8
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    ],
)
def test_a_program_that_fails_says_why(program, words):
    outcome = run_program(program)
    assert not outcome.passed and outcome.reason == "failed"
    assert words in outcome.detail


SAY_ON_EVERY_FILE = """
import os
for fd in range(3, 64):
    try:
        os.write(fd, bytes(32))
    except OSError:
        pass
"""


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import atexit, sys; atexit.register(print, 'passed'); sys.exit()",
        "print('passed'); print('confined'); raise SystemExit",
        SAY_ON_EVERY_FILE + "os._exit(0)",
        SAY_ON_EVERY_FILE,  # to its end, but something was said before
    ],
)
def test_leaving_early_or_saying_so_is_not_passing(program):
    outcome = run_program(program)
    assert not outcome.passed and outcome.reason == "failed"


TESTS = "assert _program.add(2, 3) == 5\nassert _program.add('a', 'b') == 'ab'"
WRONG = "def add(a, b): return 7\n"


def test_tests_are_held_to_what_the_program_defines():
    assert run_program("def add(a, b): return a + b", tests=TESTS).passed
    outcome = run_program(WRONG, tests=TESTS)
    assert (outcome.passed, outcome.reason) == (False, "failed")
    assert "AssertionError" in outcome.detail and "_program.add(2, 3) == 5" not in WRONG
    outcome = run_program("def add(a, b): return missing", tests=TESTS)
    assert "NameError: name 'missing' is not defined" in outcome.detail
    assert run_program("def add(a, b): return bytearray(1 << 31)", tests=TESTS).reason == (
        "out of memory"
    )
    assert "has no attribute 'add'" in run_program("", tests=TESTS).detail


@pytest.mark.parametrize(
    "cheat",
    [
        "import os\ndef add(a, b): os._exit(0)",
        "def add(a, b): raise SystemExit(0)",
        # a value that equals everything, or is called before it is compared
        "class Any:\n    def __eq__(self, other): return True\ndef add(a, b): return Any()",
        "class Any(int):\n    def __eq__(self, other): return True\ndef add(a, b): return Any(7)",
        "class Any(str):\n    def __ne__(self, other): return False\ndef add(a, b): return Any()",
        "def add(a, b): raise StopIteration",
        # another meaning for what tests are made of
        "import builtins\nbuiltins.AssertionError = KeyError\n"
        "builtins.all = builtins.isinstance = lambda *a: True\n" + WRONG,
        "import sys\nsys.flags = None\nimport json\njson.dumps = lambda *a: '[\"done\", true]'\n"
        + WRONG,
        # what it has open: it tells every file that all is well, or copies one to the other
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'[\"done\", null]\\n' * 9)\n"
        "    except OSError: pass\nos._exit(0)",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'confined\\n' * 9)\n"
        "    except OSError: pass\nos._exit(0)",
        "import os\ndef add(a, b):\n    for i in range(3, 64):\n        for j in range(3, 64):\n"
        "            try: os.write(j, os.read(i, 32))\n            except OSError: pass\n",
        # answers in a shape that no value has
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'[' * 99999 + b'\\n')\n"
        "    except OSError: pass\n" + WRONG,
    ],
)
def test_a_cheat_fails(cheat):
    """The old way of telling, a secret on a file of the program's, could be copied."""
    outcome = run_program(cheat, Limits(wall_seconds=1.5), tests=TESTS)
    assert not outcome.passed


def test_the_program_does_not_see_its_tests():
    program = """
import gc, os
word = "".join(["sec", "ret"])
def add(a, b):
    seen = [o for o in gc.get_objects() if isinstance(o, (dict, list)) and word in map(str, o)]
    return not seen and word not in open("../text.py").read() and os.listdir(".") == []
"""
    assert run_program(program, tests="secret = 5\nassert _program.add(1, 2) is True").passed


VALUES = """
import math
values = [None, True, -(10 ** 5000), 0.1, float("inf"), 1 + 2j, "\\ud800ä", b"\\xff", (),
          (1, [2]), {1: {2}}, {(1, 2): frozenset({3})}, {"a": 1, 2: None}, dict]
for value in values:
    found = _program.same(value)
    assert found == value and type(found) is type(value)
assert math.isnan(_program.same(math.nan))
assert list(_program.count(3)) == [0, 1, 2] and type(_program.numbers()) is list
box = _program.Box(2)
box.y = 3
assert box.sum() == 5 and _program.same(box).x == 2 and not box == _program.Box(2)
try:
    _program.same(lambda: 1)
except TypeError as e:
    assert "cannot be handed" in str(e)
else:
    raise SystemExit("handed over")
try:
    _program.fails()
except ZeroDivisionError:
    pass
"""


def test_values_cross_as_they_are_and_all_else_stays_with_the_program():
    program = """
import numpy as np
def same(x): return x
def count(n): yield from range(n)
def numbers(): return np.arange(3)
def fails(): return 1 / 0
class Box:
    def __init__(self, x): self.x = x
    def sum(self): return self.x + self.y
    def __eq__(self, other): return True
"""
    outcome = run_program(program, tests=VALUES)
    assert outcome.passed, outcome.detail


def test_calls_that_reach_beyond_the_program_are_refused(tmp_path):
    """Of each: told of files elsewhere, another's queue removed, the machine's contexts used up."""
    (tmp_path / "owner.txt").write_text("closed")
    named = {"inotify_init1": 294, "mq_unlink": 241, "io_setup": 206, "fcntl": 72, "ioctl": 16}
    if os.uname().machine == "aarch64":
        named = {"inotify_init1": 26, "mq_unlink": 181, "io_setup": 0, "fcntl": 25, "ioctl": 29}
    assert are_refused(
        *(
            f"if ctypes.CDLL(None, use_errno=True).syscall({number}, 0, 0, 0, 0) < 0 "
            "and ctypes.get_errno() == 1:\n    raise PermissionError"
            for number in named.values()
        )
    )


def test_it_runs_as_main_without_input_in_a_clean_environment(monkeypatch):
    monkeypatch.setenv("OWNER_TOKEN", "do-not-tell")
    outcome = run_program("""
import os, pickle, sys
class Point: pass
assert __name__ == "__main__" and sys.argv == ["program.py"]
assert isinstance(pickle.loads(pickle.dumps(Point())), Point)
assert __builtins__.len([1]) == 1
def depth(n): return n and 1 + depth(n - 1)
assert depth(990) == 990
try:
    input()
except EOFError:
    pass
else:
    raise AssertionError("there was input")
assert "OWNER_TOKEN" not in os.environ and "do-not-tell" not in str(os.environ)
assert os.environ["HOME"] == os.getcwd() and os.listdir() == []
open("mine", "w").write("kept"); os.rename("mine", "yours")
assert open("yours").read() == "kept"
""")
    assert outcome.passed, outcome


def test_numpy_can_be_imported_and_nothing_else():
    assert run_program(
        "import numpy as np\nassert np.allclose(np.eye(3) @ np.eye(3), np.eye(3))"
    ).passed
    assert are_refused("import rich", "import flexolmo", error="ModuleNotFoundError")


def test_strings_hash_alike_in_every_run():
    program = "raise SystemExit(str(hash('a')))"
    first = run_program(program).detail
    assert int(first) and run_program(program).detail == first


def test_what_does_not_end_is_timed_out():
    forever = "while True:\n    try:\n        {}\n    except BaseException: pass"
    programs = [
        "while True: pass",
        "import time; time.sleep(60)",
        forever.format("while True: pass"),
        "import os\n" + forever.format("os.fork()"),
    ]
    started = time.monotonic()
    outcomes = run_programs(programs, Limits(wall_seconds=0.8), processes=4)
    assert [outcome.reason for outcome in outcomes] == ["timed out"] * 4
    assert not any(outcome.passed for outcome in outcomes)
    assert time.monotonic() - started < 10


def test_processor_time_is_limited():
    limits = Limits(wall_seconds=60, cpu_seconds=1)
    started = os.times().children_user
    assert run_program("while True: pass", limits).reason == "timed out"
    assert os.times().children_user - started < 3


def test_memory_is_limited():
    limits = Limits(memory_bytes=128 << 20)
    assert (
        run_program("x = []\nwhile True: x.append(bytes(10 ** 6))", limits).reason
        == "out of memory"
    )
    assert run_program("x = bytearray(1 << 27)", limits).reason == "out of memory"
    assert run_program("x = bytearray(1 << 25)", limits).passed


def test_other_processes_are_out_of_reach():
    clone = 220 if os.uname().machine == "aarch64" else 56
    assert are_refused(
        "if os.fork() == 0:\n    os.setsid()\n    time.sleep(60)",  # would outlive its parent
        f"if ctypes.CDLL(None, use_errno=True).syscall({clone}, 17, 0, 0, 0, 0) < 0:\n"
        "    raise PermissionError",
        "subprocess.run(['/bin/true'])",
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getppid(), 0)",
        "resource.prlimit(os.getppid(), resource.RLIMIT_CORE)",
    )


def test_threads_are_refused():
    assert are_refused("threading.Thread(target=print).start()", error="RuntimeError")


def test_what_was_started_all_the_same_is_killed_with_the_program(monkeypatch):
    """A second wall, seen only when the first is taken away."""
    monkeypatch.setattr(sandbox, "_call_filter", lambda: ALLOW_ALL)
    assert run_program("import os, time\nif os.fork() == 0:\n    time.sleep(60)").passed
    outcome = run_program("import os, time\nos.fork()\ntime.sleep(60)", Limits(wall_seconds=1))
    assert outcome.reason == "timed out"


def test_sockets_are_refused():
    assert are_refused(
        *(f"socket.socket(socket.{kind})" for kind in ("AF_INET", "AF_INET6", "AF_UNIX"))
    )


def test_the_web_is_out_of_reach_even_on_this_machine():
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        assert are_refused(
            f"urllib.request.urlopen('http://127.0.0.1:{server.server_port}/')",
            error="urllib.error.URLError",
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert asked == []


def test_other_files_cannot_be_read(landlock, tmp_path):
    (tmp_path / "owner.txt").write_text("closed")
    paths = (tmp_path / "owner.txt", sandbox.__file__, "/etc/passwd", "/proc/self/environ")
    assert are_refused(
        *(f"open({str(path)!r})" for path in paths), f"os.listdir({str(tmp_path)!r})"
    )


def test_nothing_can_be_changed_outside(landlock, tmp_path):
    file = tmp_path / "owner.txt"
    file.write_text("closed")
    path, new = repr(str(file)), repr(str(tmp_path / "new"))
    assert are_refused(
        f"open({path}, 'w')",
        f"open({path}, 'a')",
        f"open({new}, 'w')",
        f"os.unlink({path})",
        f"os.rename({path}, {new})",
        error="OSError",
    )
    assert file.read_text() == "closed" and not (tmp_path / "new").exists()


def test_what_landlock_does_not_see_is_refused(tmp_path):
    file = tmp_path / "owner.txt"
    file.write_text("closed")
    os.utime(file, (1, 1))
    path, mode = repr(str(file)), file.stat().st_mode
    assert are_refused(
        f"os.chmod({path}, 0)",
        f"os.utime({path})",
        f"os.truncate({path}, 0)",
        f"os.link({path}, 'a')",
        f"os.symlink({path}, 'a')",
        "os.mkdir('a')",
    )
    assert (file.stat().st_mode, file.stat().st_mtime, file.stat().st_size) == (mode, 1, 6)


def test_written_bytes_are_limited():
    outcome = run_program("open('a', 'wb').write(bytes(2 << 20))")
    assert outcome.reason == "failed" and "File too large" in outcome.detail
    outcome = run_program(
        "i = 0\nwhile True:\n    i += 1\n"
        "    with open(str(i % 2000), 'wb') as f: f.write(bytes(10 ** 5))",
        Limits(directory_bytes=4 << 20),
    )
    assert (outcome.reason, outcome.detail) == ("failed", "wrote more than 4194304 bytes")


def test_floods_of_output_are_not_kept():
    tracemalloc.start()
    try:
        assert run_program("for i in range(300): print('x' * 10 ** 6)").passed
        outcome = run_program("import sys\nwhile True: sys.stderr.write('y' * 10 ** 5)")
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert outcome.reason == "failed" and len(outcome.detail) == 300
    assert peak_bytes < 2 << 20


def test_several_run_at_once_and_keep_their_order(nothing_is_left):
    programs = ["import time; time.sleep(1)", "assert False", "pass"]
    meter = Meter("programs", len(programs), "programs", 0)
    outcomes = run_programs(programs, processes=3, meter=meter)
    assert [outcome.passed for outcome in outcomes] == [True, False, True]
    assert meter.done == 3 and len(nothing_is_left) == 6  # each with its tests
    assert run_programs([]) == []


def answers(call_filter, architecture, number):
    """What the kernel would answer: the filter's instructions, one at a time. Source: ours."""
    steps = [struct.unpack_from("HBBI", call_filter, i) for i in range(0, len(call_filter), 8)]
    at = value = 0
    while True:
        code, if_true, if_false, k = steps[at]
        at += 1
        if code == 0x06:
            return k
        if code == 0x20:
            value = {0: number, 4: architecture}[k]
        else:
            at += if_true if (value == k if code == 0x15 else value >= k) else if_false


@pytest.mark.parametrize(
    ("machine", "architecture", "read", "refused"),
    [
        ("x86_64", 0xC000003E, 0, {"socket": 41, "fork": 57, "inotify_init": 253, "mq_open": 240}),
        ("aarch64", 0xC00000B7, 63, {"socket": 198, "clone": 220, "io_setup": 0, "mq_open": 180}),
    ],
)
def test_the_filter_of_each_machine(monkeypatch, machine, architecture, read, refused):
    monkeypatch.setattr(sandbox.platform, "machine", lambda: machine)
    call_filter = sandbox._call_filter()
    kill, missing, refuse, allow = 0x80000000, 0x50026, 0x50001, 0x7FFF0000
    assert answers(call_filter, architecture, read) == allow
    assert {answers(call_filter, architecture, n) for n in refused.values()} == {refuse}
    assert answers(call_filter, 0x40000003, read) == kill  # 32-bit x86
    assert answers(call_filter, architecture, 0x40000000 + read) == missing  # x32
    assert answers(call_filter, architecture, 470) == missing
    assert answers(call_filter, architecture, 469) == refuse


def test_a_machine_we_do_not_know_runs_nothing(monkeypatch, nothing_is_left):
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    with pytest.raises(ConfigError, match=r"riscv64: expected linux on x86_64 or aarch64"):
        run_programs(["pass", "pass"])
    assert nothing_is_left == []


def test_a_kernel_that_refuses_the_filter_runs_nothing(monkeypatch):
    monkeypatch.setattr(sandbox, "_call_filter", lambda: bytes(8))
    with pytest.raises(ConfigError, match=r"could not be shut away: found .*Invalid argument"):
        run_program("while True: pass")


def test_what_holds_is_told(protections):
    assert protections[:4] == [
        "no network (seccomp)",
        "no other process (seccomp)",
        "no signals (seccomp)",
        "bounded memory (rlimit)",
    ]
    assert len(protections) in (5, 6)


def test_a_door_left_open_is_found(monkeypatch):
    monkeypatch.setattr(sandbox, "_call_filter", lambda: ALLOW_ALL)
    with pytest.raises(ConfigError, match=r"not found: no network .*, no other process"):
        check_sandbox()


def test_a_kernel_without_landlock_is_told(monkeypatch):
    source = sandbox._inside_source().replace("libc.syscall, 444", "libc.syscall, 9999")
    monkeypatch.setattr(sandbox, "_inside_source", lambda: source)
    assert check_sandbox()[4:] == [
        "files outside NOT protected: no Landlock in this kernel (Linux 5.13)"
    ]
