"""What the README says is true of the repository, and runs as it stands.

Its commands run in order in one `sh -e`, with the Python example between them. Replaced are only
`make` and the start of each `flexolmo` (see made_shell): `make demo` finds the files of a demo of
a one-layer model on made text, `make test` does nothing.
"""

import re
import shlex
from pathlib import Path

import typer

from flexolmo.cli import app
from made_shell import ROOT, blocks_of, script_of

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def test_it_can_be_read_in_two_minutes():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_two_commands_come_first():
    first = blocks_of(README, "sh")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]


def test_the_python_example_is_short():
    assert len(blocks_of(README, "python")[0].strip().splitlines()) <= 12


def test_no_line_fails_in_a_fresh_shell(shell, demo_root):
    said = shell.run(script_of(README, "sh", "python"), demo_root)
    assert "doctor" in said and "bits per byte" in said
    assert (demo_root / "hospital.bundle/manifest.json").is_file()
    with_code, without = said.split("print(*fo.generate")[-1].split("\n---\n")[:2]
    assert with_code and without


def test_links_to_files_lead_somewhere():
    made = ("index.md", "log.md", "changelog.md", "contributing.md", "security.md", "cli.md")
    made += ("recipes.md", "python.md")  # by docs/hooks.py; make docs checks them
    missing = []
    for page in PAGES:
        links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
        lost = [x for x in links if not (page.parent / x).exists() and Path(x).name not in made]
        missing += [f"{page.relative_to(ROOT)}: {link}" for link in lost]
        assert links or page != README
    assert not missing


def commands():
    """Every `flexolmo` line of README and of the pages, whatever the block's language."""
    for page in PAGES:
        text = "\n".join(blocks_of(page, "sh", "")).replace("\\\n", " ")
        for line in text.splitlines():
            for part in re.split(r"&&|;|\||>|#", line):
                words = part.replace("if flexolmo", "flexolmo").split()
                if words[:1] == ["flexolmo"]:
                    yield page.stem, " ".join(words)


def refusal_of(command):
    """Why the command line cannot read a command; None if it can."""
    words = shlex.split(command)[1:]
    verb = typer.main.get_command(app)
    while words and words[0] in getattr(verb, "commands", {}):
        verb = verb.commands[words.pop(0)]
    if "--help" in words:
        words.remove("--help")
    try:
        verb.make_context("flexolmo", words, resilient_parsing=not words).close()
    except typer.TyperException as e:
        return str(e)


def test_every_command_names_verbs_and_options_that_exist():
    told = {f"{page}: {command}": refusal_of(command) for page, command in commands()}
    assert len(told) > 100 and not {c: why for c, why in told.items() if why is not None}
