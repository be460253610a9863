"""The part of the tasks that is run: settings, items drawn, and what guessing would give."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from flexolmo.config import Settings
from flexolmo.errors import ConfigError, DataError, SourceUnavailable
from flexolmo.files import digest_bytes
from flexolmo.research.tasks.items import Item
from flexolmo.research.tasks.sources import Sources
from flexolmo.research.tasks.suite import Task, choose_tasks

Row = dict[str, Any]  # of one item, as it is written


class RunSettings(Settings):
    """Settings that decide which part of the tasks is run, and how."""

    limit: int | None = Field(
        None,
        ge=1,
        description="Items of each task, or of each of its "
        "subtasks; drawn by a hash of their ids, so that fewer are among "
        "more (paper: 100 and 1,000).",
    )
    limits: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="Items of each task by its name, in place of `limit`."
    )
    forms: tuple[str, ...] = Field(
        ("rc", "mc"),
        description="Forms of multiple choice: rc completes "
        "the answer, mc names its letter; the better counts (OLMES).",
    )
    write: bool = Field(
        True,
        description="True to let the model write answers; else only bits per byte of right ones.",
    )
    run_code: bool = Field(
        False, description="True to run the programs that the model writes, in a sandbox."
    )
    samples: int = Field(
        1,
        ge=1,
        description="Programs written for each problem: 1 is the "
        "likeliest, more are drawn at temperature 0.8 for pass@k.",
    )
    judge_url: str | None = Field(
        None,
        description="OpenAI-compatible endpoint that judges news "
        "and poems, up to its version; none: ROUGE-L with the text as it "
        "went on, which is not a score of the paper's.",
    )
    judge_model: str = Field("", description="The judge, as its endpoint calls it.")
    batch_size: int = Field(32, ge=1, description="Texts read at once.")
    seed: int = Field(0, ge=0, description="Random seed for drawn samples.")


@dataclass(frozen=True)
class ChosenTask:
    """A task and the items of it that are run."""

    task: Task
    items: Sequence[Item]
    chance: float | None = None  # what guessing gives, 0 to 1; None: not known

    @property
    def digest(self) -> str:
        """Digest of all that is asked."""
        return digest_bytes(
            json.dumps(
                [
                    [
                        i.id,
                        i.subtask,
                        repr(sorted(i.forms.items())),
                        i.prompt,
                        i.gold_text,
                        list(i.references),
                        i.tests,
                    ]
                    for i in self.items
                ]
            ).encode()
        )


def parse_limits(words: Iterable[str]) -> dict[str, Any]:
    """`limit` and `limits` of the settings, from words like "100" and "MMLU=20"; a name is of a
    task or group, and the later word counts. ConfigError: anything else."""
    found: dict[str, Any] = {"limit": None, "limits": {}}
    for word in (w.strip() for several in words for w in several.split(",")):
        name, is_named, number = word.rpartition("=")
        if not (number.isdecimal() and len(number) < 10 and int(number) > 0):
            raise ConfigError(
                f"Limit {word!r} found; expected items of every task, as in 100, or "
                "of one task or group, as in MMLU=20."
            )
        if is_named:
            found["limits"] |= {t.name: int(number) for t in choose_tasks([name])}
        else:
            found["limit"] = int(number)
    return found


def choose_items(
    tasks: Sequence[Task],
    sources: Sources,
    limit: int | None = None,
    limits: Mapping[str, int] | None = None,
) -> tuple[list[ChosenTask], dict[str, str]]:
    """The items of each task, and by name why a task's items could not be had.

    `limit` and `limits` are as in the settings.

    DataError: none can be had, or a file does not hold what its publisher's does.
    """
    chosen_tasks, missing = [], {}
    for task in tasks:
        try:
            items = task.load(sources)
        except SourceUnavailable as e:
            missing[task.name] = str(e)
            continue
        except (LookupError, TypeError, ValueError) as e:
            raise DataError(
                f"The items of {task.name} are not laid out as their publisher's "
                f"({type(e).__name__}: {e})."
            ) from None
        if items:
            drawn = _draw(items, (limits or {}).get(task.name, limit))
            chosen_tasks.append(ChosenTask(task, drawn, _chance(task, items)))
        else:
            missing[task.name] = "its file is empty"
    if not chosen_tasks:
        raise DataError(
            "None of the tasks' items can be had: "
            + "; ".join(f"{n}: {why}" for n, why in missing.items())
        )
    return chosen_tasks, missing


def _draw(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first `limit` of each subtask by a hash of their ids."""
    by_subtask: dict[str, list[Item]] = {}
    for item in sorted(items, key=lambda i: digest_bytes(f"{i.subtask} {i.id}".encode())):
        by_subtask.setdefault(item.subtask, []).append(item)
    return [item for s in sorted(by_subtask) for item in by_subtask[s][:limit]]


def _chance(task: Task, items: Sequence[Item]) -> float | None:
    """Fraction of items that guessing gets right: an even guess or always the same option,
    whichever is better; the commonest written answer of a subtask; no program."""
    if task.kind == "story":
        return None
    if task.kind == "code":
        return 0.0
    if task.kind == "choice":
        asked = [(i.subtask, next(iter(i.forms.values()))) for i in items]
        places = Counter(c.gold for _, c in asked)
        return max(
            macro((s, 1 / len(c.options)) for s, c in asked)[0],
            *(macro((s, c.gold == place) for s, c in asked)[0] for place in places),
        )
    answers: dict[str, Counter[str]] = {}
    for i in items:
        first = str((i.references or (i.gold_text,))[0]).strip().lower()
        answers.setdefault(i.subtask, Counter())[first] += 1
    most = {s: max(a.values()) for s, a in answers.items()}
    return macro((s, 0.0 if most[s] == 1 else most[s] / answers[s].total()) for s in answers)[0]


def macro(values: Iterable[tuple[str, float]]) -> tuple[float, float]:
    """Mean over subtasks of the mean over items, and its standard error; of (subtask, value).

    Of right and wrong, a subtask's variance is p (1 - p) with p = (right + 1) / (items + 2), which
    is above 0 also where all are right.
    """
    by_subtask: dict[str, list[float]] = {}
    for subtask, value in values:
        by_subtask.setdefault(subtask, []).append(float(value))
    means = [float(np.mean(v)) for v in by_subtask.values()]
    variances = [_variance(v) / len(v) for v in by_subtask.values()]
    return float(np.mean(means)), math.sqrt(sum(variances)) / len(means)


def _variance(values: Sequence[float]) -> float:
    if {*values} <= {0.0, 1.0}:
        p = (sum(values) + 1) / (len(values) + 2)
        return p * (1 - p)
    return float(np.var(values, ddof=1)) if len(values) > 1 else 0.25
