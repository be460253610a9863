"""What the README says is run as it stands."""

import re
import shutil
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(language):
    return re.findall(
        rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def test_the_python_example_runs_and_is_under_15_lines(
    pico_anchor_dir, pico_set_dirs, tmp_path, monkeypatch, capsys
):
    example = blocks("python")[0]
    assert len(example.strip().splitlines()) < 15
    shutil.copytree(pico_anchor_dir, tmp_path / "anchor")
    shutil.copytree(pico_set_dirs["maths"], tmp_path / "prepared" / "math")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(README), "exec"), {})
    with_it, without = capsys.readouterr().out.split("\n---\n")
    assert with_it and without and with_it != without
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "anchor",
        "math.bundle",
        "math.pem",
        "math.pem.pub",
        "model",
        "prepared",
    ]


def test_the_two_commands_come_first():
    first = blocks("")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]


def test_links_to_files_lead_somewhere():
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    missing = [link for link in links if not (README.parent / link).exists()]
    assert links and not missing


def commands():
    text = "\n".join(blocks("")).replace("\\\n", " ")
    for line in text.splitlines():
        for part in line.split("#")[0].split("&&"):
            if part.split()[:1] == ["flexolmo"]:
                yield part.strip()


@pytest.mark.parametrize("command", commands())
def test_every_command_names_verbs_and_options_that_exist(command):
    import shlex

    import typer

    from flexolmo.cli import app

    words = shlex.split(command)[1:]
    verb = typer.main.get_command(app)
    while words and words[0] in getattr(verb, "commands", {}):
        verb = verb.commands[words.pop(0)]
    with verb.make_context("flexolmo", words, resilient_parsing=False) as context:
        assert context.params
