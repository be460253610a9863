"""The house's rules of language and layout that a machine can check, over all of the package."""

import ast
from collections.abc import Iterator

import pytest

from made_source import SOURCE, tree_of

NOT_A_NOUN_OR_VERB = """
what whatever which whether who whoever where when why how that those as of its is are does from to
out not with in for on by per at else every-place up-to
""".split()  # noqa: SIM905


def begins_wrong(text: str) -> bool:
    """True if the first word, or the first two, are none that a text here may begin with."""
    words = text.lower().replace(",", "").split()[:2]
    return words[0] in NOT_A_NOUN_OR_VERB or "-".join(words) in NOT_A_NOUN_OR_VERB


def trees() -> list[tuple[str, ast.Module]]:
    return [(str(path.relative_to(SOURCE)), tree_of(path)) for path in sorted(SOURCE.rglob("*.py"))]


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring, description and help, joined where it is in parts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield getattr(node, "lineno", 1), text
        elif isinstance(node, ast.keyword) and node.arg in ("description", "help"):
            parts = [part for part in ast.walk(node.value) if isinstance(part, ast.Constant)]
            if parts and isinstance(parts[0].value, str):
                yield node.value.lineno, parts[0].value


def test_texts_begin_with_a_noun_or_a_verb() -> None:
    wrong = [
        f"{name}:{line}: {text[:60]!r}"
        for name, tree in trees()
        for line, text in texts(tree)
        if begins_wrong(text)
    ]
    assert not wrong, "\n".join(wrong)


def nested_conditionals(tree: ast.AST) -> list[int]:
    """Lines of the conditional expressions that hold another as a branch."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.IfExp)
        and any(
            isinstance(part, ast.IfExp)
            for branch in (node.body, node.orelse)
            for part in ast.walk(branch)
        )
    ]


def packed_assignments(tree: ast.AST) -> list[int]:
    """Lines that assign two or more calls at once."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and any(isinstance(target, ast.Tuple) for target in node.targets)
        and sum(isinstance(value, ast.Call) for value in node.value.elts) >= 2
    ]


@pytest.mark.parametrize("rule", [nested_conditionals, packed_assignments])
def test_no_line_is_dense(rule) -> None:
    wrong = [f"{name}:{line}" for name, tree in trees() for line in rule(tree)]
    assert not wrong, "\n".join(wrong)
