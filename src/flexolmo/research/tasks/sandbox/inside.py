"""Everything that runs inside the sandbox: a new interpreter that has this file's text and no more.

Two of them work on one program. One runs the program and answers; the other runs its tests, which
the program never sees, and asks it over a pipe. Plain values go by what they are; anything else
stays where it is and goes by a number. Nothing that arrives is compared by code of the program's.
"""

import builtins
import ctypes
import errno
import json
import os
import resource
import struct
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, BinaryIO, NoReturn

CONFINED = b"confined\n"
PLAIN = frozenset[Any]({type(None), bool, int, float, str})  # JSON has them as they are
LEFT_EARLY = 3  # the tests' exit code when the program is gone before they are through


def confine(plan: dict[str, Any]) -> None:
    """Give up every privilege and ask the kernel to refuse what the plan does not allow."""

    def call(function: Any, *arguments: bytes | int) -> int:
        passed = (a if isinstance(a, bytes) else ctypes.c_long(a) for a in arguments)
        answer: int = function(*passed)
        if answer < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return answer

    libc = ctypes.CDLL(None, use_errno=True)
    call(libc.prctl, 1, 9, 0, 0, 0)  # be killed when the parent ends
    if os.getppid() != plan["parent"]:
        os._exit(1)
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


# --- values on the pipe ---------------------------------------------------------------------------


def is_plain(value: Any) -> bool:
    """Say whether JSON has `value` as it is; a long number takes it too long to write."""
    kind = type(value)
    return kind in PLAIN and (kind is not int or -(1 << 63) < value < 1 << 63)


def encode(value: Any, keep: Callable[[Any], int]) -> Any:
    """`value` as JSON; `keep` gives the number of what is no plain value."""
    if is_plain(value):
        return value
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), keep)
    if isinstance(value, int):
        return ["int", hex(value)]
    for plain in (str, float):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        return ["dict", [[encode(k, keep), encode(v, keep)] for k, v in value.items()]]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            is_flat = all(map(is_plain, value))  # faster for a million numbers
            return [kind.__name__, list(value) if is_flat else [encode(v, keep) for v in value]]
    name = getattr(value, "__name__", "")
    if isinstance(value, type) and getattr(builtins, name, None) is value:
        return ["type", name]
    return ["object", keep(value)]


def decode(sent: Any, find: Callable[[int], Any]) -> Any:
    """The value that `encode` made `sent` of; `find` gives what has a number."""
    if type(sent) in PLAIN:
        return sent
    kind, content = sent
    if kind == "object":
        return find(content)
    if kind == "type":
        return type_named(content)
    if kind == "int":
        return int(content, 16)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind == "dict":
        return {decode(k, find): decode(v, find) for k, v in content}
    if not set(map(type, content)) <= PLAIN:
        content = [decode(v, find) for v in content]
    kinds: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    return kinds[kind](content)


def type_named(name: str) -> type[Any]:
    """Python's own type of that name; ValueError if there is none."""
    found = getattr(builtins, name, None)
    if not isinstance(found, type):
        raise ValueError(f"{name} is none of Python's types.")
    return found


# --- the program ----------------------------------------------------------------------------------


def run_program(text: bytes, asked: BinaryIO, answers: BinaryIO) -> None:
    """Run the program as `__main__`, then do what is asked of what it defined."""
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__.update(__file__="program.py", __builtins__=builtins)
    kept: list[Any] = [main]
    verbs: dict[str, Callable[..., Any]] = {
        "call": lambda function, arguments, named: function(*arguments, **named),
        "getattr": getattr,
        "setattr": setattr,
        "iter": iter,
        "next": next,
    }

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    def answer(said: Any) -> None:
        answers.write(json.dumps(said).encode() + b"\n")
        answers.flush()

    asked.readline()  # the tests are ready
    exec(compile(text, "program.py", "exec"), main.__dict__)
    answer(["done", None])
    for line in asked:
        try:
            verb, arguments = json.loads(line)
            done = verbs[verb](*decode(arguments, kept.__getitem__))
            answer(["done", encode(done, keep)])
        except Exception as e:
            answer(["raised", [type(e).__name__, str(e)]])


# --- its tests ------------------------------------------------------------------------------------


def run_tests(text: bytes, answers: BinaryIO, ask: BinaryIO) -> None:
    """Have the program run to its end; run the tests, for which it is `_program`.

    `_as_sent` gives them a value just as the program would get it.
    """

    def hear() -> Any:
        line = answers.readline()
        if not line.endswith(b"\n"):
            os._exit(LEFT_EARLY)
        return json.loads(line)

    def do(verb: str, *arguments: Any) -> Any:
        try:
            ask.write(json.dumps([verb, encode(list(arguments), number_of)]).encode() + b"\n")
            ask.flush()
        except BrokenPipeError:
            os._exit(LEFT_EARLY)
        how, content = hear()
        return decode(content, Remote) if how == "done" else fail(verb, *content)

    def number_of(value: Any) -> int:
        if isinstance(value, Remote):
            return value._number
        raise TypeError(f"A {type(value).__name__} cannot be handed to the program.")

    def fail(verb: str, name: str, text: str) -> NoReturn:
        kind = type_named(name)
        would_end_a_loop = kind is StopIteration and verb != "next"  # one of the tests'
        if would_end_a_loop or issubclass(kind, UnicodeError) or not issubclass(kind, Exception):
            raise RuntimeError(f"{name}: {text}")
        raise kind(text)

    class Remote:
        """A value of the program's that stayed there. Equal to nothing but itself."""

        _number: int

        def __init__(self, number: int):
            object.__setattr__(self, "_number", number)

        def __call__(self, *arguments: Any, **named: Any) -> Any:
            return do("call", self, list(arguments), named)

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return do("getattr", self, name)

        def __setattr__(self, name: str, value: Any) -> None:
            do("setattr", self, name, value)

        def __iter__(self) -> Any:
            return do("iter", self)

        def __next__(self) -> Any:
            return do("next", self)

    def as_sent(value: Any) -> Any:
        return decode(encode(value, number_of), Remote)

    ask.write(b"\n")
    ask.flush()
    hear()
    given = {"__name__": "tests", "_program": Remote(0), "_as_sent": as_sent}
    exec(compile(text, "tests.py", "exec"), given)


def main() -> None:
    """Give up every right, then run the text in the directory; the plan is the only argument."""
    plan = json.loads(sys.argv[1])
    come = os.fdopen(os.dup(0), "rb")
    go = os.fdopen(os.dup(1), "wb")
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    confine(plan)
    sys.argv = ["program.py"]
    sys.path.append(f"{plan['directory']}/packages")
    with open(f"{plan['directory']}/text.py", "rb") as file:
        text = file.read()
    if plan["ask"] is None:
        go.write(CONFINED)
        go.flush()
        run_program(text, come, go)
    elif come.readline() == CONFINED:
        go.write(CONFINED)
        go.close()
        run_tests(text, come, os.fdopen(plan["ask"], "wb"))


if __name__ == "__main__":
    main()
