"""Tasks of made-up questions, for the tests: no package and no directory is read."""

from dataclasses import replace

from flexolmo.research.tasks.items import Item, choice_item
from flexolmo.research.tasks.metrics import token_f1
from flexolmo.research.tasks.suite import Task

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def choice_items(count: int = 9) -> list[Item]:
    """Questions of two subtasks, with two to four options, some of several words."""
    found = []
    for i in range(count):
        options = [f"{WORDS[(i + a) % 10]} " * (1 + (i + a) % 2) for a in range(2 + i % 3)]
        found.append(
            choice_item(
                f"q{i}",
                f"What comes after {WORDS[i % 10]}?",
                [o.strip() for o in options],
                i % 2,
                subtask="ab"[i % 2],
                shots=[("What comes after one?", ["two", "ten"], 0)],
            )
        )
    return found


def written_items(count: int = 7) -> list[Item]:
    """Questions to be answered in a word."""
    return [
        Item(
            f"w{i}",
            prompt=f"Question: after {WORDS[i]}?\nAnswer:",
            gold_text=f" {WORDS[i + 1]}",
            references=(WORDS[i + 1],),
            question=f"after {WORDS[i]}? {WORDS[i + 1]}",
        )
        for i in range(count)
    ]


def code_items() -> list[Item]:
    """Two programs to be completed, of which `pass` is right for the first."""
    return [
        Item("p0", prompt="def f():\n    ", gold_text="pass", tests="assert f() is None"),
        Item("p1", prompt="def f():\n    ", gold_text="return 2", tests="assert f() == 2"),
    ]


def task_of(name: str, items: list[Item], kind: str = "choice", **more) -> Task:
    """A task of these items, in a group of the suite."""
    judge = (lambda text, item: token_f1(text, item.references)) if kind == "answer" else None
    task = Task(
        name,
        {"choice": "MC9", "answer": "Gen5", "code": "Code4"}[kind],
        lambda _: list(items),
        0,
        kind,
        judge=judge,
        stops=("\n",),
        max_new_tokens=8,
    )
    return replace(task, **more)
