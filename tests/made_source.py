"""Our own files as Python reads them, for the tests of what may stand in them."""

import ast
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"


@cache
def tree_of(path: Path) -> ast.Module:
    """The file, parsed once: by the process that runs these tests, not by all that collect them."""
    return ast.parse(path.read_text(encoding="utf-8"))


def dotted_name(node: ast.AST) -> str:
    """`a.b` for a name, or for a part of one; nothing for what is no name. Writing all of it out
    again takes ten times as long."""
    if isinstance(node, ast.Attribute) and (of := dotted_name(node.value)):
        return f"{of}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def called_in(path: Path) -> dict[str, int]:
    """Names that are called in the file, each with a line."""
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    return {dotted_name(node.func): node.lineno for node in calls}
