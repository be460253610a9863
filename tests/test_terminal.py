"""Text from outside is shown and never obeyed."""

import io
import os
import pty
import subprocess
import sys

import pytest
from rich.table import Table

from flexolmo.terminal import PlainConsole, echo, make_printable
from made_source import SOURCE, called_in

EVIL = "a\x1b]0;title\x07b[red]c :smile: \x9b2J"
FLEXOLMO = SOURCE / "flexolmo"


def test_nothing_invisible_that_acts_is_shown():
    assert make_printable("a\x00b\x1b[2J\r\nc\td") == "a␀b␛[2J\nc    d"
    assert make_printable("\ud800\u202etxt\x7f\u2028é") == "\ufffd\ufffdtxt\ufffd\né"


class Terminal(io.StringIO):
    """Stands for standard output on a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize("err", [False, True])
def test_control_characters_act_on_no_terminal_and_reach_a_file_unchanged(monkeypatch, err):
    name = "stderr" if err else "stdout"
    for stream, expected in (
        (Terminal(), "a␛]0;title␇b[red]c :smile: \ufffd2J\tz\ny\n"),
        (io.StringIO(), EVIL + "\tz\ny\n"),
    ):
        monkeypatch.setattr(sys, name, stream)
        echo(EVIL + "\tz\ny", err=err)
        assert stream.getvalue() == expected


def test_tables_take_text_as_text():
    console = PlainConsole(file=io.StringIO(), width=80)
    table = Table(EVIL, title=EVIL)
    table.add_row(EVIL)
    console.print(table)
    console.print(EVIL)
    shown = console.file.getvalue()
    assert "\x1b]" not in shown and "\x07" not in shown and "\x9b" not in shown
    assert shown.count("a␛]0;title␇b[red]c :smile: \ufffd2J") == 4


def run_on_terminal(*words, **environment):
    """What the command line writes on a terminal, as bytes, and its exit code."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "flexolmo", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | environment,
    )
    os.close(theirs)
    said = b""
    try:
        while piece := os.read(ours, 65536):
            said += piece
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(ours)
    return said, process.wait()


def test_a_directorys_name_sets_no_window_title(tmp_path):
    directory = tmp_path / "x\x1b]0;owned\x07y"
    directory.mkdir()
    said, code = run_on_terminal("expert", "verify", str(directory), "--trust-any-signer")
    assert code == 2 and b"owned" in said and b"\x1b]" not in said and b"\x07" not in said


def test_all_printing_goes_through_one_file():
    """rich's and typer's own consoles would obey markup or control characters."""
    for path in FLEXOLMO.rglob("*.py"):
        if path == FLEXOLMO / "terminal.py":
            continue
        for name, line in called_in(path).items():
            assert name not in ("print", "typer.echo", "Console", "TextColumn"), (
                f"{path}:{line} prints past flexolmo.terminal"
            )
