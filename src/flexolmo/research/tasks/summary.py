"""Rows summed up: scores by task, by group and in all, as the paper averages them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexolmo.research.tasks.items import Item
from flexolmo.research.tasks.selection import ChosenTask, Row, RunSettings, macro
from flexolmo.research.tasks.suite import GROUPS, TASKS

SHIFTS = 5  # other questions that each answer is judged by, to know what luck gives


def summarise(
    chosen_tasks: Sequence[ChosenTask],
    rows: Mapping[str, Sequence[Row]],
    missing: Mapping[str, str],
    settings: RunSettings,
    max_seq_len: int,
) -> dict[str, Any]:
    """Scores in percent by task, by group and in all, as the paper averages them.

    A task with subtasks counts the mean of theirs, a group the mean of its tasks, all the mean of
    the groups; what is missing is named and the averages say over how much they are.
    """
    tasks = {
        j.task.name: _summary_of(j, rows[j.task.name], settings, max_seq_len) for j in chosen_tasks
    }
    groups: dict[str, Any] = {}
    for group in GROUPS:
        own = [t.name for t in TASKS if t.group == group]
        if not any(n in tasks or n in missing for n in own):
            continue
        scored = [n for n in own if tasks.get(n, {}).get("score") is not None]
        read = [n for n in own if n in tasks]
        groups[group] = {
            "score": _mean([tasks[n]["score"] for n in scored]),
            "bits_per_byte": _mean([tasks[n]["bits_per_byte"] for n in read]),
            "of": len(own),
            "scored": len(scored),
            "read": len(read),
            "not_scored": [n for n in own if n not in scored],
        }
    scored_groups = [g for g in groups.values() if g["score"] is not None]
    return {
        "tasks": tasks,
        "missing": dict(missing),
        "groups": groups,
        "average": {
            "score": _mean([g["score"] for g in scored_groups]),
            "bits_per_byte": _mean(
                [g["bits_per_byte"] for g in groups.values() if g["bits_per_byte"] is not None]
            ),
            "groups": len(scored_groups),
            "of": len(GROUPS),
            "is_whole": len(scored_groups) == len(GROUPS)
            and not any(g["not_scored"] for g in groups.values()),
        },
    }


def _summary_of(
    chosen: ChosenTask, rows: Sequence[Row], settings: RunSettings, max_seq_len: int
) -> dict[str, Any]:
    task = chosen.task
    found: dict[str, Any] = {
        "group": task.group,
        "metric": task.metric,
        "shots": task.shots,
        "items": len(rows),
        "version": task.version,
        "stand_in": task.stand_in,
        "cut": sum(bool(r["cut"]) for r in rows),
        "bits_per_byte": macro((r["subtask"], r["bits"] / max(1, r["bytes"])) for r in rows)[0],
    }
    if task.kind != "choice" and settings.write:
        found["new_tokens"] = min(task.max_new_tokens, max_seq_len // 2)
        if found["new_tokens"] < task.max_new_tokens:
            found["asked_new_tokens"] = task.max_new_tokens
    if task.kind == "choice":
        by_form = {f: macro((r["subtask"], r["right"][f]) for r in rows) for f in settings.forms}
        best = max(by_form, key=lambda f: by_form[f][0])
        found |= {
            "score": 100 * by_form[best][0],
            "error": 100 * by_form[best][1],
            "form": best,
            "forms": {f: 100 * m for f, (m, _) in by_form.items()},
            "normalise": task.normalise,
        }
    elif judged := [r for r in rows if "score" in r]:
        mean, error = macro((r["subtask"], r["score"]) for r in judged)
        found |= {"score": 100 * mean, "error": 100 * error}
        if all("pass@10" in r for r in rows):
            found["pass@10"] = 100 * macro((r["subtask"], r["pass@10"]) for r in rows)[0]
        found["unjudged"] = len(rows) - len(judged)
    else:
        why = "not asked to write"
        if settings.write:
            why = "programs were not run" if task.kind == "code" else "no judge"
        if any("rouge_l" in r for r in rows):
            found["rouge_l"] = 100 * macro((r["subtask"], r["rouge_l"]) for r in rows)[0]
            why += f"; ROUGE-L {found['rouge_l']:.1f}"
        return found | {"score": None, "why": why}
    # the better of two forms is above chance more easily than one; luck is itself an estimate
    width = {1: 1.96, 2: 2.24}[len(settings.forms) if task.kind == "choice" else 1]
    if task.kind == "answer":
        width *= math.sqrt(1 + 1 / SHIFTS)
    if chosen.chance is None:
        return found | {"chance": None, "above_chance": None}
    chance = 100 * max(chosen.chance, _by_luck(chosen, rows))
    return found | {
        "chance": chance,
        "above_chance": bool(found["score"] - chance > max(width * found["error"], 1e-6)),
    }


def _by_luck(chosen: ChosenTask, rows: Sequence[Row]) -> float:
    """The score of written answers on other questions of their subtask: words that are in many
    answers, and a form that many have, are not knowledge. 0 where subtasks have one question."""
    task = chosen.task
    if task.kind != "answer" or task.judge is None or not rows:
        return 0.0
    items: dict[str, list[Item]] = {}
    for i in chosen.items:
        items.setdefault(i.subtask, []).append(i)
    written = {(r["subtask"], r["id"]): r["text"] for r in rows}
    lucky = []
    for subtask, several in items.items():
        for shift in range(1, min(SHIFTS + 1, len(several))):
            lucky += [
                (subtask, task.judge(written[subtask, i.id], several[j - shift]))
                for j, i in enumerate(several)
            ]
    return macro(lucky)[0] if lucky else 0.0


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
