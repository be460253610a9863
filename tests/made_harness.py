"""Our tasks as lm-evaluation-harness runs them, for which its engine is the oracle of ours."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import lm_eval.evaluator
import lm_eval.tasks
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex

from flexolmo.research.tasks.items import Item
from flexolmo.research.tasks.suite import Task

THEIR_TASKS = Path(lm_eval.tasks.__file__).parent
FOLDERS = [  # of the harness's tasks that tests name
    "arc",
    "super_glue/boolq",
    "commonsense_qa",
    "hellaswag",
    "openbookqa",
    "piqa",
    "siqa",
    "winogrande",
    "nq_open",
    "gsm8k",
    "triviaqa",
    "mmlu/default",
]


@pytest.fixture(autouse=True)
def brief_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the harness from what takes seconds and decides no score: reading the 14,000 task files
    that no test names, and asking pip and git about the machine at every evaluation."""
    files_in = TaskIndex._iter_yaml_files

    def named_files(root: Path) -> list[Path]:
        roots = [root / f for f in FOLDERS] if root == THEIR_TASKS else [root]
        return [file for r in roots for file in files_in(r)]

    monkeypatch.setattr(TaskIndex, "_iter_yaml_files", staticmethod(named_files))
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)
    monkeypatch.setattr(lm_eval.evaluator, "get_git_commit_hash", lambda: "")


@cache
def manager() -> TaskManager:
    """What the harness knows of its task files in `FOLDERS`."""
    return TaskManager()


def harness_task(task: Task, items: Sequence[Item], form: str = "rc") -> Any:
    """One of our tasks as the harness runs it, with our prompts and judging: its `acc` and
    `acc_norm` of a form of multiple choice, or our metric of what is written.

    Code is not run by the harness: judge such a task with `run_suite`.
    """
    common: dict[str, Any] = {
        "task": f"flexolmo_{task.name}",
        "test_split": "test",
        "target_delimiter": "",
        "custom_dataset": lambda **_: {"test": _documents(items, form)},
        "num_fewshot": 0,
        "metadata": {"version": task.version},
    }
    if task.kind == "choice":
        several = any(len(set(i.forms[form].contexts)) > 1 for i in items)
        # as its delimiter, the space before an option is none of the characters of `acc_norm`
        delimiter = (
            " "
            if not several and all(o[:1] == " " for i in items for o in i.forms[form].options)
            else ""
        )
        return ConfigurableTask(
            config=common
            | {
                "target_delimiter": delimiter,
                "output_type": "multiple_choice",
                "doc_to_text": "{{context}}" if not several else _place_of_gold,
                "doc_to_choice": lambda doc: (
                    doc["contexts"]
                    if several
                    else [o.removeprefix(delimiter) for o in doc["options"]]
                ),
                "doc_to_target": (lambda doc: doc["options"][0])
                if several
                else (lambda doc: doc["gold"]),
                "metric_list": [{"metric": "acc"}] + ([] if several else [{"metric": "acc_norm"}]),
            }
        )
    by_id = {(i.subtask, i.id): i for i in items}

    def process_results(doc: dict[str, Any], found: list[str]) -> dict[str, float]:
        assert task.judge is not None
        return {"score": float(task.judge(found[0], by_id[doc["subtask"], doc["id"]]))}

    return ConfigurableTask(
        config=common
        | {
            "output_type": "generate_until",
            "doc_to_text": "{{context}}",
            "doc_to_target": "",
            "generation_kwargs": {
                "until": list(task.stops),
                "max_gen_toks": task.max_new_tokens,
                "do_sample": False,
                "temperature": 0.0,
            },
            "process_results": process_results,
            "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        }
    )


def _place_of_gold(doc: dict[str, Any]) -> int:
    return doc["gold"]


def _documents(items: Sequence[Item], form: str) -> Any:
    rows = []
    for i in items:
        if i.forms:
            c = i.forms[form]
            rows.append(
                {
                    "id": i.id,
                    "subtask": i.subtask,
                    "context": c.contexts[0],
                    "contexts": list(c.contexts),
                    "options": list(c.options),
                    "gold": c.gold,
                }
            )
        else:
            rows.append({"id": i.id, "subtask": i.subtask, "context": i.prompt})
    return datasets.Dataset.from_list(rows)
