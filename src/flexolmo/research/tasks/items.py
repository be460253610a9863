"""Items of a task: questions with options, and questions to answer in writing.

An item is complete: its prompts hold the examples. Knows neither models nor where items come from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Choices:
    """One question in one form: what stands before each option, and the options."""

    contexts: tuple[str, ...]  # one for each option; mostly all the same
    options: tuple[str, ...]  # as they continue their context, with the space they begin with
    gold: int  # place of the right option
    bare_context: str | None = None  # says nothing of the question, for the options' own chance


@dataclass(frozen=True)
class Item:
    """One question of a task.

    With `forms` it is multiple choice: "rc" completes the answer's text, "mc" names its letter.
    Without, `prompt` is to be continued; `references` are right answers and `gold_text` is what
    bits per byte are taken of, as it continues the prompt.
    """

    id: str
    subtask: str = ""
    forms: Mapping[str, Choices] = field(default_factory=dict)
    prompt: str = ""
    gold_text: str = ""
    references: tuple[Any, ...] = ()
    tests: str = ""  # a program that ends without error if `_program` is right
    question: str = ""  # without examples, for the contamination check
    more: Mapping[str, Any] = field(default_factory=dict, compare=False)


def question_with_options(question: str, options: Sequence[str]) -> str:
    """A question and its lettered options, to be answered by a letter. Source: OLMES."""
    lines = [f" {letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)]
    return "\n".join([f"Question: {question}", *lines, "Answer:"])


def choice_item(
    id: str,
    question: str,
    options: Sequence[str],
    gold: int,
    *,
    subtask: str = "",
    shots: Sequence[tuple[str, Sequence[str], int]] = (),
    header: str = "",
) -> Item:
    """A multiple-choice question in both OLMES forms, after `shots` (question, options, gold)."""
    completed = [f"Question: {q}\nAnswer: {o[g]}" for q, o, g in shots]
    lettered = [f"{question_with_options(q, o)} {LETTERS[g]}" for q, o, g in shots]
    rc = header + "\n\n".join([*completed, f"Question: {question}\nAnswer:"])
    mc = header + "\n\n".join([*lettered, question_with_options(question, options)])
    count = len(options)
    return Item(
        id,
        subtask,
        {
            "rc": Choices((rc,) * count, tuple(f" {o}" for o in options), gold, "Answer:"),
            "mc": Choices((mc,) * count, tuple(f" {x}" for x in LETTERS[:count]), gold),
        },
        question="\n".join([question, *options]),
    )
