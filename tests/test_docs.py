"""The documentation agrees with the code. `make docs` builds the site, strictly."""

import importlib.util
import re
from pathlib import Path

import pytest
import typer
import yaml

import flexolmo
from flexolmo.cli import app

DOCS = Path(__file__).parents[1] / "docs"
SOURCE = Path(flexolmo.__file__).parent


def load(path):
    """A script under docs/ as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks():
    """The hooks of the site."""
    pytest.importorskip("mkdocs")
    return load(DOCS / "hooks.py")


def commands(command, name):
    """Every command below `command`, by its whole name."""
    yield name, command
    for child, below in getattr(command, "commands", {}).items():
        yield from commands(below, f"{name} {child}")


def test_the_page_of_the_command_line_has_every_command_option_and_its_help(hooks):
    page = hooks.command_line()
    sections = dict(re.findall(r"^###? (flexolmo[^\n]*)\n(.*?)(?=^##|\Z)", page, re.S | re.M))
    found = dict(commands(typer.main.get_command(app), "flexolmo"))
    assert set(sections) == set(found)
    for name, command in found.items():
        for parameter in command.params:
            if not parameter.name.endswith("_completion"):
                wanted = parameter.name.upper(), *parameter.opts
                assert any(f"`{w}" in sections[name] or f"{w}`" in sections[name] for w in wanted)
                assert parameter.help, f"{name}: {parameter.name} has no help"


def test_the_page_of_recipes_has_every_key_with_its_default_and_meaning(hooks):
    page = hooks.recipes()
    assert "| `train.steps` | `240` |" in page
    assert "| `router.min_documents` | `20` |" in page
    assert "| `anchor.model.d_model` | `192` |" in page
    assert not re.findall(r"^\| `[^|]*\|[^|]*\|\s*\|$", page, re.M), "a key without a description"


def test_the_page_of_python_has_every_name(hooks):
    page = hooks.python()
    assert all(f"::: flexolmo.{home}.{name}" in page for name, home in flexolmo._HOME.items())


def test_a_page_that_loads_from_another_host_is_refused(hooks):
    hooks.on_post_page('<a href="https://arxiv.org">paper</a><img src="images/x.png">', "p", None)
    with pytest.raises(Exception, match=r"fonts\.example"):
        hooks.on_post_page('<link rel="x" href="https://fonts.example/a.css">', "p", None)


def test_every_page_is_in_the_navigation_once(hooks):
    text = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    pages = re.findall(r"[\w/]+\.md", yaml.safe_dump(yaml.safe_load(text)["nav"]))
    written = {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")}
    made = {*hooks.FROM_ROOT, "reference/cli.md", "reference/recipes.md", "reference/python.md"}
    assert sorted(pages) == sorted(written | made)


def test_the_diagrams_are_what_their_script_draws_and_name_every_room(monkeypatch, tmp_path):
    script = load(DOCS / "images" / "diagrams.py")
    monkeypatch.setattr(script, "HERE", tmp_path)
    script.draw_idea()
    script.draw_rooms()
    for drawn in tmp_path.iterdir():
        assert drawn.read_bytes() == (DOCS / "images" / drawn.name).read_bytes(), drawn.name
    rooms = {p.name for p in SOURCE.iterdir() if (p / "__init__.py").is_file()}
    rooms |= {p.stem for p in SOURCE.glob("*.py") if not p.stem.startswith("__")}
    drawn_rooms = [word for row in script.ROOMS for name, _, _ in row for word in name.split()]
    assert sorted(drawn_rooms) == sorted(rooms)
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert all(f"`{room}`" in page for room in rooms)


def test_no_file_of_the_documentation_is_over_100_kb_but_figures():
    large = [p for p in DOCS.rglob("*") if p.is_file() and p.stat().st_size > 100_000]
    assert not [p for p in large if p.suffix not in (".png", ".svg")]
