"""Runs tasks over a model, item by item, and resumes where it was; compares two runs.

out/run.json             what is run: model, experts on, tasks, settings, data digests
out/items/TASK.jsonl     one line an item, written as it is done
out/results.json         scores by task, group and in all
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo.errors import ConfigError, DataError
from flexolmo.evaluation.scorer import Scorer
from flexolmo.files import explain_full_disk, hold_lock, parse_json, read_json, write_json
from flexolmo.inference.reader import Reader
from flexolmo.progress import Meter, progress
from flexolmo.research.tasks.answers import judge_story, score_items
from flexolmo.research.tasks.compare import paired_bootstrap
from flexolmo.research.tasks.judge import EndpointJudge
from flexolmo.research.tasks.sandbox.sandbox import check_sandbox
from flexolmo.research.tasks.selection import ChosenTask, Row, RunSettings, choose_items, macro
from flexolmo.research.tasks.sources import Sources
from flexolmo.research.tasks.stories import QUALITIES
from flexolmo.research.tasks.suite import GROUPS, TASKS, Task
from flexolmo.research.tasks.summary import summarise
from flexolmo.runtime import run_record

STORY_SLICE = 4  # stories, each judged several times by a model that may fail
SLICE = 64  # items read together and then written; results do not depend on where a run stopped


def run_suite(
    reader: Reader,
    about: Mapping[str, Any],
    tasks: Sequence[Task],
    sources: Sources,
    out: Path,
    settings: RunSettings,
) -> dict[str, Any]:
    """Run what is not yet run, and return what `results.json` then holds.

    `about` says what the model is: kind, digest, and the experts that are on. ConfigError if `out`
    holds a run of something else, FlexOlmoError if another run is at work in it.
    """
    out = Path(out)
    judges = _judges(settings)
    protections = _protections() if settings.run_code else []
    chosen_tasks, missing = choose_items(tasks, sources, settings.limit, settings.limits)
    with hold_lock(out / "lock", wait=False):
        return _run_jobs(
            reader,
            about,
            chosen_tasks,
            missing,
            out,
            settings,
            judges,
            {
                "sandbox": protections,
                "run": run_record(settings.model_dump(mode="json"), settings.seed, sources.digests),
            },
        )


def _run_jobs(
    reader: Reader,
    about: Mapping[str, Any],
    chosen_tasks: Sequence[ChosenTask],
    missing: Mapping[str, str],
    out: Path,
    settings: RunSettings,
    judges: Mapping[str, EndpointJudge],
    record: Mapping[str, Any],
) -> dict[str, Any]:
    what = {
        "model": dict(about),
        "settings": settings.model_dump(mode="json"),
        "tasks": {
            j.task.name: {"version": j.task.version, "items": len(j.items), "digest": j.digest}
            for j in chosen_tasks
        },
    }
    what["tasks"] = _refuse_another_run(out, what) | what["tasks"]
    write_json(out / "run.json", what | {"missing": dict(missing), **record})
    stamp = {"model": about["digest"], "seed": settings.seed}
    stamp |= {key: about.get(key) for key in ("enabled", "mix")}
    found: dict[str, list[Row]] = {}
    done = {j.task.name: _read_rows(out / "items" / f"{j.task.name}.jsonl") for j in chosen_tasks}
    total = sum(len(j.items) for j in chosen_tasks)
    scorer = Scorer(reader, settings.batch_size)
    with progress("evaluate", total, "items", sum(map(len, done.values()))) as meter:
        for chosen in chosen_tasks:
            meter.note = chosen.task.name
            found[chosen.task.name] = _run_task(
                scorer,
                chosen,
                done[chosen.task.name],
                stamp,
                out / "items" / f"{chosen.task.name}.jsonl",
                settings,
                judges,
                meter,
            )
    summary = summarise(chosen_tasks, found, missing, settings, reader.max_seq_len)
    results = {"model": dict(about), **summary, "run": record["run"]}
    write_json(out / "results.json", results)
    return results


def _protections() -> list[str]:
    """Protections of the sandbox that hold on this machine.

    ConfigError if a program could read or write this user's files, or worse.
    """
    found = check_sandbox()
    if bad := [words for words in found if "NOT" in words]:
        raise ConfigError(
            f"Programs that a model writes are not run here: {', '.join(bad)}. Use a "
            "Linux kernel with Landlock, or leave --run-code out."
        )
    return found


def _judges(settings: RunSettings) -> dict[str, EndpointJudge]:
    """Judges by the quality they judge; ConfigError now rather than after hours."""
    if settings.judge_url is None:
        return {}
    if not settings.judge_model:
        raise ConfigError("A judge's endpoint was named without its model; give --judge-model too.")
    return {
        q: EndpointJudge(settings.judge_url, settings.judge_model, quality=q) for q in QUALITIES
    }


def _refuse_another_run(out: Path, what: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks that the run in `out` has had so far."""
    if not (out / "run.json").is_file():
        return {}
    before = read_json(out / "run.json")
    different = ["model"] if before.get("model") != what["model"] else []
    old, new = before.get("settings", {}), what["settings"]
    different += [
        f"setting {key}"
        for key in new  # limits are seen in the items
        if key not in ("limit", "limits") and old.get(key) != new[key]
    ]
    different += [
        f"the items of {n}"
        for n, task in what["tasks"].items()
        if before.get("tasks", {}).get(n, task) != task
    ]
    if different:
        raise ConfigError(
            f"{out} holds a run that differs in {', '.join(different)} from this "
            "one; choose another --out, or remove it."
        )
    return before.get("tasks", {})


def _read_rows(path: Path) -> dict[tuple[str, str], Row]:
    """The rows of a file by subtask and id; a line that a kill tore is cut off.

    DataError: a whole line is no row.
    """
    if not path.is_file():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        with open(path, "r+b") as f:
            f.truncate(len(whole))
    rows: dict[tuple[str, str], Row] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = parse_json(line)
            rows[row["subtask"], row["id"]] = row
        except (ValueError, LookupError, TypeError) as e:
            raise DataError(
                f"{path}, line {number}: expected a row that an evaluation wrote, found another "
                f"({type(e).__name__}: {e}). Remove the file and run its task again."
            ) from None
    return rows


def _run_task(
    scorer: Scorer,
    chosen: ChosenTask,
    done: dict[tuple[str, str], Row],
    stamp: Row,
    path: Path,
    settings: RunSettings,
    judges: Mapping[str, EndpointJudge],
    meter: Meter,
) -> list[Row]:
    path.parent.mkdir(parents=True, exist_ok=True)
    size = STORY_SLICE if chosen.task.kind == "story" else SLICE
    with explain_full_disk(path), open(path, "ab") as f:
        for start in range(0, len(chosen.items), size):
            items = chosen.items[start : start + size]
            left = [i for i in items if (i.subtask, i.id) not in done]
            if not left:
                continue
            scored = score_items(scorer, chosen.task, items, settings)
            rows = {(r["subtask"], r["id"]): r for r in scored}
            for item in left:  # the others were written before; they were read again to be in
                row = rows[item.subtask, item.id]  # the same batches, for the same last bits
                if chosen.task.kind == "story" and judges:
                    row |= judge_story(item, row, judges)
                row = {"task": chosen.task.name, "version": chosen.task.version, **row, **stamp}
                done[item.subtask, item.id] = row
                f.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
            meter.advance(len(left), chosen.task.name)
    return [done[i.subtask, i.id] for i in chosen.items]


# --- comparing ------------------------------------------------------------------------------------


def compare_runs(a: Path, b: Path, *, draws: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Difference of the scores of two runs, `b` - `a`, on the items that both have.

    Returns `score` (percent; of multiple choice each run's better form) and `bits_per_byte`
    (negative is better), each as `paired_bootstrap` gives it with the levels tasks and groups, or
    None if no task has both; `items` by task: compared, and in one run only; and `without_score`,
    tasks of which an item has none in one run. DataError if nothing is in both, or a task was run
    in two versions.
    """
    found: dict[str, Any] = {"items": {}}
    tasks = [
        t for t in TASKS if all((Path(r) / "items" / f"{t.name}.jsonl").is_file() for r in (a, b))
    ]
    values: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "score": ({}, {}),
        "bits_per_byte": ({}, {}),
    }
    members: dict[str, list[str]] = {}
    for task in tasks:
        runs = [_read_rows(Path(r) / "items" / f"{task.name}.jsonl") for r in (a, b)]
        versions = {row["version"] for run in runs for row in run.values()}
        if len(versions) > 1:
            raise DataError(
                f"{task.name} is of versions {', '.join(map(str, sorted(versions)))} "
                "in these runs: other items or prompts. Run one of them again."
            )
        both = sorted(runs[0].keys() & runs[1].keys())
        found["items"][task.name] = {
            "compared": len(both),
            "in_one": len(runs[0].keys() ^ runs[1].keys()),
        }
        forms = [_better_form(task, list(run.values())) for run in runs]
        for subtask in sorted({s for s, _ in both}):
            name = f"{task.name}/{subtask}"
            keys = [k for k in both if k[0] == subtask]
            members.setdefault(task.name, []).append(name)
            for run, form, scores, bits in zip(
                runs, forms, values["score"], values["bits_per_byte"], strict=True
            ):
                own = [_score_of(run[k], form) for k in keys]
                if None not in own:
                    scores[name] = 100 * np.array(own, dtype=np.float64)
                bits[name] = np.array([run[k]["bits"] / max(1, run[k]["bytes"]) for k in keys])
    if not members:
        raise DataError(f"{a} and {b} have no item in common; name two runs of the same tasks.")
    found["without_score"] = [
        t
        for t, subtasks in members.items()
        if not all(n in run for n in subtasks for run in values["score"])
    ]
    for kind, (x, y) in values.items():
        names = {
            t: subtasks
            for t, subtasks in members.items()
            if all(n in x and n in y for n in subtasks)
        }
        groups = {
            g: several
            for g in GROUPS
            if (several := [t.name for t in tasks if t.group == g and t.name in names])
        }
        kept = [n for subtasks in names.values() for n in subtasks]
        found[kind] = (
            paired_bootstrap(
                {n: x[n] for n in kept},
                {n: y[n] for n in kept},
                levels=[names, groups],
                draws=draws,
                seed=seed,
            )
            if kept
            else None
        )
    return found


def _better_form(task: Task, rows: Sequence[Row]) -> str:
    forms = rows[0].get("right", {}) if rows else {}
    return max(
        forms, key=lambda f: macro((r["subtask"], r["right"][f]) for r in rows)[0], default=""
    )


def _score_of(row: Row, form: str) -> float | None:
    return row["right"][form] if form else row.get("score")
