"""Pages of the site that are made when it is built: from the code, and from files of the root."""

import re
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

import flexolmo
from flexolmo.cli import app
from flexolmo.research.demo.demo import DemoRecipe
from flexolmo.train.anchor import AnchorRecipe
from flexolmo.train.expert import ExpertRecipe

ROOT = Path(__file__).parents[1]
FROM_ROOT = {
    "index.md": "README.md",
    "log.md": "LOG.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are in no file under docs/."""
    made = {name: moved(ROOT / source) for name, source in FROM_ROOT.items()}
    made["reference/cli.md"] = command_line()
    made["reference/recipes.md"] = recipes()
    made["reference/python.md"] = python()
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_post_page(output: str, page: object, config: MkDocsConfig) -> None:
    """Refuse a page that would load something from another host."""
    loaded = re.findall(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="https?:[^>]*>', output)
    if loaded:
        raise PluginError(f"{page} loads from another host: {', '.join(loaded)}")


def moved(path: Path) -> str:
    """A file of the root as a page: links into docs/ hold, other links to files become words."""
    text = path.read_text(encoding="utf-8")
    for name, source in FROM_ROOT.items():
        text = text.replace(f"]({source})", f"](docs/{name})")
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!docs/[^)]*\.md|https?:|#)[^)]*\)", r"\1", text)
    return text.replace("](docs/", "](")


def command_line() -> str:
    """Every command: what it does, its arguments and options."""
    command = typer.main.get_command(app)
    lines = ["# Command line", "", "Made from the code; `--help` after any command says the same."]
    walk(command, "flexolmo", lines)
    return "\n".join(lines) + "\n"


def walk(command, name: str, lines: list[str]) -> None:
    """Add `command` and the commands below it to `lines`."""
    help_text = (command.help or "").strip()
    lines += ["", f"{'##' if name.count(' ') < 2 else '###'} {name}", "", plain(help_text), ""]
    shown = [p for p in command.params if not (p.name or "").endswith("_completion")]
    if shown:
        lines += ["| | what it is | default |", "|---|---|---|"]
    for parameter in shown:
        is_argument = parameter.param_type_name == "argument"
        names = parameter.name.upper() if is_argument else ", ".join(parameter.opts)
        usual = "required" if parameter.required else shown_default(parameter)
        lines.append(
            f"| `{names}` | {cell(getattr(parameter, 'help', '') or '')} | {cell(usual)} |"
        )
    for child, below in sorted(getattr(command, "commands", {}).items()):
        walk(below, f"{name} {child}", lines)


def shown_default(parameter) -> str:
    """The default as the command line shows it, or nothing."""
    said = getattr(parameter, "show_default", None)
    if isinstance(said, str):
        return said
    value = parameter.default
    if callable(value) or value in (None, (), [], False, "") or "UNSET" in repr(value).upper():
        return ""
    return f"`{value}`"


def plain(text: str) -> str:
    """Help text as Markdown, with its examples as code."""
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
    return "\n\n".join(
        re.sub(r"(flexolmo [a-z][^:`]*)$", r"`\1`", p)
        if re.match(r"^(\w+: +)?flexolmo|.*: +flexolmo", p)
        else p
        for p in paragraphs
    )


def cell(text: str) -> str:
    """Text that fits in a cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", r"\|").replace("<", "&lt;")


def recipes() -> str:
    """Every value that a recipe may hold."""
    lines = [
        "# Recipes",
        "",
        "A recipe is a TOML file; `--set train.steps=100` overrides one value.",
    ]
    for title, schema in (
        ("flexolmo anchor train", AnchorRecipe),
        ("flexolmo expert train", ExpertRecipe),
        ("flexolmo demo", DemoRecipe),
        ("fo.Sampling, in Python", flexolmo.Sampling),
    ):
        lines += ["", f"## {title}", "", "| key | default | what it is |", "|---|---|---|"]
        lines += fields(schema())
    return "\n".join(lines) + "\n"


def fields(settings: BaseModel, prefix: str = "") -> list[str]:
    """Rows of a table: the fields of `settings` and of the sections in it."""
    rows = []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            rows += fields(value, f"{prefix}{name}.")
        else:
            shown = (
                "" if value is None else f"`{list(value) if isinstance(value, tuple) else value}`"
            )
            says = "kind of router" if name == "kind" else field.description or ""
            rows.append(f"| `{prefix}{name}` | {shown} | {cell(says)} |")
    return rows


def python() -> str:
    """Every name of the Python interface, from its docstring."""
    lines = ["# Python", "", "`import flexolmo as fo`, then `fo.NAME`."]
    for name in flexolmo.__all__:
        lines += ["", f"::: flexolmo.{flexolmo._HOME[name]}.{name}"]
        kind = getattr(flexolmo, name)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            lines += ["    options: {members: false}", "", "Fields: [Recipes](recipes.md)."]
    return "\n".join(lines) + "\n"
