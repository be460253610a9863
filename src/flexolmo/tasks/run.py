"""Runs tasks over a model, item by item, and resumes where it was; then sums them up.

    out/run.json             what is run: model, experts on, tasks, settings, data digests
    out/items/TASK.jsonl     one line an item, written as it is done
    out/results.json         scores by task, group and in all

An item's bits per byte are those of its right answer; they move smoothly with quality where
accuracy is still at chance. Source: paper §4.2; OLMES.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from flexolmo.errors import ConfigError, DataError, SourceUnavailable
from flexolmo.evaluation.readers import Reader
from flexolmo.evaluation.scorer import Scorer
from flexolmo.files import digest_bytes, read_json, write_json
from flexolmo.inference.generate import Sampling
from flexolmo.progress import Meter, progress
from flexolmo.runtime import run_record
from flexolmo.tasks.compare import paired_bootstrap
from flexolmo.tasks.items import Item
from flexolmo.tasks.judge import EndpointJudge
from flexolmo.tasks.metrics import pass_at_k, rouge_l
from flexolmo.tasks.sandbox import Limits, run_programs
from flexolmo.tasks.sources import Sources
from flexolmo.tasks.stories import QUALITIES, SAMPLES, TEMPERATURE
from flexolmo.tasks.suite import GROUPS, TASKS, Task, program_of

STORY_SLICE = 4  # stories, each judged several times by a model that may fail
SLICE = 64  # items read together and then written; results do not depend on where a run stopped
CODE_LIMITS = Limits(wall_seconds=40.0)  # on a busy machine the 10 seconds of processor decide
Row = dict[str, Any]


class RunSettings(BaseModel):
    """What of the tasks is run, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    limit: int | None = Field(None, ge=1, description="items of each task, or of each of its "
                              "subtasks; drawn by a hash of their ids, so that fewer are among "
                              "more (paper: 100 and 1,000)")
    forms: tuple[str, ...] = Field(("rc", "mc"), description="of multiple choice: rc completes "
                                   "the answer, mc names its letter; the better counts (OLMES)")
    write: bool = Field(True, description="let the model write answers; else only bits per byte "
                        "of the right ones")
    run_code: bool = Field(False, description="run the programs it writes, in a sandbox")
    samples: int = Field(1, ge=1, description="programs written for each problem: 1 is the "
                         "likeliest, more are drawn at temperature 0.8 for pass@k")
    judge_url: str | None = Field(None, description="OpenAI-compatible endpoint that judges news "
                                  "and poems, up to its version; none: ROUGE-L with the text as it "
                                  "went on, which is not a score of the paper's")
    judge_model: str = Field("", description="the judge, as its endpoint calls it")
    batch_size: int = Field(32, ge=1, description="texts read at once")
    seed: int = Field(0, ge=0, description="of drawn samples")


@dataclass(frozen=True)
class Job:
    """A task and the items of it that are run."""

    task: Task
    items: Sequence[Item]
    chance: float | None = None  # what guessing gives, 0 to 1; None: not known

    @property
    def digest(self) -> str:
        """Of all that is asked."""
        return digest_bytes(json.dumps([[i.id, i.subtask, repr(sorted(i.forms.items())), i.prompt,
                                         i.gold_text, list(i.references), i.tests]
                                        for i in self.items]).encode())


def prepare_jobs(tasks: Sequence[Task], sources: Sources, limit: int | None
                 ) -> tuple[list[Job], dict[str, str]]:
    """The items of each task, and by name why a task's items could not be had.

    DataError: none can be had, or a file does not hold what its publisher's does.
    """
    jobs, missing = [], {}
    for task in tasks:
        try:
            items = task.load(sources)
        except SourceUnavailable as e:
            missing[task.name] = str(e)
            continue
        except (LookupError, TypeError, ValueError) as e:
            raise DataError(f"The items of {task.name} are not laid out as their publisher's "
                            f"({type(e).__name__}: {e}).") from None
        if items:
            jobs.append(Job(task, _draw(items, limit), _chance(task, items)))
        else:
            missing[task.name] = "its file is empty"
    if not jobs:
        raise DataError("None of the tasks' items can be had: " + "; ".join(
            f"{n}: {why}" for n, why in missing.items()))
    return jobs, missing


def _draw(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first `limit` of each subtask by a hash of their ids."""
    by_subtask: dict[str, list[Item]] = {}
    for item in sorted(items, key=lambda i: digest_bytes(f"{i.subtask} {i.id}".encode())):
        by_subtask.setdefault(item.subtask, []).append(item)
    return [item for s in sorted(by_subtask) for item in by_subtask[s][:limit]]


def _chance(task: Task, items: Sequence[Item]) -> float | None:
    """What is right by guessing, of all items: one option of several; the commonest answer of a
    subtask; no program."""
    if task.kind == "story":
        return None
    if task.kind == "code":
        return 0.0
    rows: list[Row] = []
    if task.kind == "choice":
        rows = [{"subtask": i.subtask, "right": 1 / len(next(iter(i.forms.values())).options)}
                for i in items]
    else:
        first = [(i.subtask, str((i.references or (i.gold_text,))[0]).strip().lower())
                 for i in items]
        for subtask in {s for s, _ in first}:
            answers = Counter(a for s, a in first if s == subtask)
            share = max(answers.values()) / answers.total()
            rows.append({"subtask": subtask, "right": 0.0 if max(answers.values()) == 1 else share})
    return _macro(rows, lambda r: r["right"])[0]


def run_suite(reader: Reader, about: Mapping[str, Any], tasks: Sequence[Task], sources: Sources,
              out: Path, settings: RunSettings) -> dict[str, Any]:
    """Run what is not yet run, and return what `results.json` then holds.

    `about` says what the model is: kind, digest, and the experts that are on. ConfigError if `out`
    holds a run of something else.
    """
    out = Path(out)
    judges = _judges(settings)
    jobs, missing = prepare_jobs(tasks, sources, settings.limit)
    what = {"model": dict(about), "settings": settings.model_dump(mode="json"),
            "tasks": {j.task.name: {"version": j.task.version, "items": len(j.items),
                                    "digest": j.digest} for j in jobs}}
    what["tasks"] = _refuse_another_run(out, what) | what["tasks"]
    record = run_record({k: v for k, v in what.items()}, settings.seed, sources.digests)
    write_json(out / "run.json", what | {"missing": missing, "run": record})
    stamp = {"model": about["digest"], "enabled": about.get("enabled"), "seed": settings.seed}
    found: dict[str, list[Row]] = {}
    done = {j.task.name: _read_rows(out / "items" / f"{j.task.name}.jsonl") for j in jobs}
    total = sum(len(j.items) for j in jobs)
    scorer = Scorer(reader, settings.batch_size)
    with progress("evaluate", total, "items", sum(map(len, done.values()))) as meter:
        for job in jobs:
            meter.note = job.task.name
            found[job.task.name] = _run_task(scorer, job, done[job.task.name], stamp,
                                             out / "items" / f"{job.task.name}.jsonl", settings,
                                             judges, meter)
    summary = summarise(jobs, found, missing, settings, reader.max_seq_len)
    results = {"model": dict(about), **summary, "run": record}
    write_json(out / "results.json", results)
    return results


def _judges(settings: RunSettings) -> dict[str, EndpointJudge]:
    """By what the quality of a text is of; ConfigError now rather than after hours."""
    if settings.judge_url is None:
        return {}
    if not settings.judge_model:
        raise ConfigError("A judge's endpoint was named without its model; give --judge-model too.")
    return {q: EndpointJudge(settings.judge_url, settings.judge_model, quality=q)
            for q in QUALITIES}


def _refuse_another_run(out: Path, what: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks that the run in `out` has had so far."""
    if not (out / "run.json").is_file():
        return {}
    before = read_json(out / "run.json")
    different = [key for key in ("model", "settings") if before.get(key) != what[key]]
    different += [f"the items of {n}" for n, task in what["tasks"].items()
                  if before.get("tasks", {}).get(n, task) != task]
    if different:
        raise ConfigError(f"{out} holds a run that differs in {', '.join(different)} from this "
                          "one; choose another --out, or remove it.")
    return before.get("tasks", {})


def _read_rows(path: Path) -> dict[tuple[str, str], Row]:
    """The rows of a file by subtask and id; a line that a kill tore is cut off."""
    if not path.is_file():
        return {}
    data = path.read_bytes()
    whole = data[:data.rfind(b"\n") + 1]
    if whole != data:
        with open(path, "r+b") as f:
            f.truncate(len(whole))
    rows = [json.loads(line) for line in whole.splitlines()]
    return {(r["subtask"], r["id"]): r for r in rows}


def _run_task(scorer: Scorer, job: Job, done: dict[tuple[str, str], Row], stamp: Row, path: Path,
              settings: RunSettings, judges: Mapping[str, EndpointJudge], meter: Meter
              ) -> list[Row]:
    path.parent.mkdir(parents=True, exist_ok=True)
    size = STORY_SLICE if job.task.kind == "story" else SLICE
    with open(path, "ab") as f:
        for start in range(0, len(job.items), size):
            items = job.items[start:start + size]
            left = [i for i in items if (i.subtask, i.id) not in done]
            if not left:
                continue
            scored = _score(scorer, job.task, items, settings)
            rows = {(r["subtask"], r["id"]): r for r in scored}
            for item in left:
                if job.task.kind == "story" and judges:
                    rows[item.subtask, item.id] |= _judge(item, rows[item.subtask, item.id],
                                                          judges)
            for item in left:  # the others were written before; they were read again to be in
                row = rows[item.subtask, item.id]  # the same batches, for the same last bits
                row = {"task": job.task.name, "version": job.task.version, **row, **stamp}
                done[item.subtask, item.id] = row
                f.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
            meter.advance(len(left), job.task.name)
    return [done[i.subtask, i.id] for i in job.items]


# --- one slice ------------------------------------------------------------------------------------


def _score(scorer: Scorer, task: Task, items: Sequence[Item], settings: RunSettings) -> list[Row]:
    rows: list[Row] = [{"subtask": i.subtask, "id": i.id} for i in items]
    if task.kind == "choice":
        _score_choices(scorer, task, items, rows, settings.forms)
        return rows
    golds = scorer.log_likelihoods([(i.prompt, i.gold_text) for i in items])
    for row, item, score in zip(rows, items, golds, strict=True):
        row |= _bits(score.log_prob, item.gold_text) | {"cut": score.is_cut}
    if task.kind == "answer" and settings.write and task.judge is not None:
        sampling = Sampling(max_new_tokens=_room(scorer, task), temperature=0)
        written = scorer.continuations([i.prompt for i in items], sampling, task.stops)
        for row, item, (text, is_cut) in zip(rows, items, written, strict=True):
            row |= {"text": text, "score": float(task.judge(text, item)),
                    "cut": row["cut"] or is_cut}
    if task.kind == "code" and settings.write and settings.run_code:
        _score_code(scorer, task, items, rows, settings)
    if task.kind == "story" and settings.write:
        _score_stories(scorer, task, items, rows, settings)
    return rows


def _room(scorer: Scorer, task: Task) -> int:
    return min(task.max_new_tokens, scorer.reader.max_seq_len // 2)


def _bits(log_prob: float, text: str) -> Row:
    return {"bits": -log_prob / math.log(2), "bytes": len(text.encode())}


def _score_choices(scorer: Scorer, task: Task, items: Sequence[Item], rows: Sequence[Row],
                   forms: Sequence[str]) -> None:
    asked = dict.fromkeys(  # each pair once, though two forms or two items ask it
        pair for item in items for form in ("rc", *forms) for pair in _pairs(task, item, form))
    scores = dict(zip(asked, scorer.log_likelihoods(list(asked)), strict=True))
    for row, item in zip(rows, items, strict=True):
        row |= {"right": {}, "log_probs": {}, "cut": False}
        for form in dict.fromkeys(("rc", *forms)):
            choices, pairs = item.forms[form], _pairs(task, item, form)
            said = [scores[p] for p in pairs]
            count = len(choices.options)
            own = np.array([s.log_prob for s in said[:count]])
            gold_pair = pairs[choices.gold]
            if form == "rc":
                gold = choices.options[choices.gold]
                row |= _bits(float(own[choices.gold]), gold)
            row["cut"] |= any(s.is_cut for s in said)
            if form not in forms:
                continue
            if form == "rc" and task.normalise == "pmi":
                own = own - [s.log_prob for s in said[count:]]
            elif form == "rc" and task.normalise == "character":
                own = own / [max(1, len(o.strip())) for o in choices.options]
            row["right"][form] = int(pairs[own.argmax()] == gold_pair)  # or its equal
            row["log_probs"][form] = [round(s.log_prob, 4) for s in said[:count]]
        row["options"] = count


def _pairs(task: Task, item: Item, form: str) -> list[tuple[str, str]]:
    choices = item.forms[form]
    pairs = list(zip(choices.contexts, choices.options, strict=True))
    if form == "rc" and task.normalise == "pmi":
        pairs += [(choices.bare_context or "Answer:", o) for o in choices.options]
    return pairs


def _score_code(scorer: Scorer, task: Task, items: Sequence[Item], rows: Sequence[Row],
                settings: RunSettings) -> None:
    n = settings.samples
    written = _write_samples(scorer, task, items, rows, n, 0.8 if n > 1 else 0, settings.seed)
    programs = [program_of(items[j // n], text) for j, text in enumerate(written)]
    outcomes = run_programs(programs, CODE_LIMITS, processes=os.cpu_count() or 1)
    for j, row in enumerate(rows):
        own = outcomes[j * n:(j + 1) * n]
        passed = sum(o.passed for o in own)
        row |= {"text": written[j * n], "score": pass_at_k(n, passed, 1),
                "outcomes": [o.reason for o in own]}
        row |= {"pass@10": pass_at_k(n, passed, 10)} if n >= 10 else {}


def _score_stories(scorer: Scorer, task: Task, items: Sequence[Item], rows: Sequence[Row],
                   settings: RunSettings) -> None:
    written = _write_samples(scorer, task, items, rows, SAMPLES, TEMPERATURE, settings.seed)
    for j, (row, item) in enumerate(zip(rows, items, strict=True)):
        own = written[j * SAMPLES:(j + 1) * SAMPLES]
        row |= {"texts": own, "rouge_l": float(np.mean([rouge_l(t, item.references[0])
                                                        for t in own]))}


def _judge(item: Item, row: Row, judges: Mapping[str, EndpointJudge]) -> Row:
    judge = judges[item.more["quality"]]
    points = [v.score / 100 for text in row["texts"]
              if (v := judge.judge(item.more["start"] + text)) is not None]
    return {"judged": len(points)} | ({"score": float(np.mean(points))} if points else {})


def _write_samples(scorer: Scorer, task: Task, items: Sequence[Item], rows: Sequence[Row],
                   count: int, temperature: float, seed: int) -> list[str]:
    """`count` continuations of each item, one item after the other. What is drawn for an item
    depends on `seed` and its id."""
    sampling = Sampling(max_new_tokens=_room(scorer, task), temperature=temperature, top_p=1.0)
    seeds = [int(digest_bytes(f"{seed} {i.subtask} {i.id} {n}".encode())[-15:], 16)
             for i in items for n in range(count)]
    written = scorer.continuations([i.prompt for i in items for _ in range(count)], sampling,
                                   task.stops, seeds)
    for j, row in enumerate(rows):
        row["cut"] |= any(is_cut for _, is_cut in written[j * count:(j + 1) * count])
    return [text for text, _ in written]


# --- comparing ------------------------------------------------------------------------------------


def compare_runs(a: Path, b: Path, *, draws: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """By how much the run in `b` does better than the run in `a`, on the items that both have.

    Returns `score` (percent; of multiple choice each run's better form) and `bits_per_byte`
    (negative is better), each as `paired_bootstrap` gives it with the levels tasks and groups, or
    None if no task has both; `items` by task: compared, and in one run only; and `without_score`,
    tasks of which an item has none in one run. DataError if nothing is in both, or a task was run
    in two versions.
    """
    found: dict[str, Any] = {"items": {}}
    tasks = [t for t in TASKS if all((Path(r) / "items" / f"{t.name}.jsonl").is_file()
                                     for r in (a, b))]
    values: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {"score": ({}, {}),
                                                                "bits_per_byte": ({}, {})}
    members: dict[str, list[str]] = {}
    for task in tasks:
        runs = [_read_rows(Path(r) / "items" / f"{task.name}.jsonl") for r in (a, b)]
        versions = {row["version"] for run in runs for row in run.values()}
        if len(versions) > 1:
            raise DataError(f"{task.name} is of versions {', '.join(map(str, sorted(versions)))} "
                            "in these runs: other items or prompts. Run one of them again.")
        both = sorted(runs[0].keys() & runs[1].keys())
        found["items"][task.name] = {"compared": len(both),
                                     "in_one": len(runs[0].keys() ^ runs[1].keys())}
        forms = [_better_form(task, list(run.values())) for run in runs]
        for subtask in sorted({s for s, _ in both}):
            name = f"{task.name}/{subtask}"
            keys = [k for k in both if k[0] == subtask]
            members.setdefault(task.name, []).append(name)
            for run, form, scores, bits in zip(runs, forms, values["score"],
                                               values["bits_per_byte"], strict=True):
                own = [_score_of(run[k], form) for k in keys]
                if None not in own:
                    scores[name] = 100 * np.array(own, dtype=np.float64)
                bits[name] = np.array([run[k]["bits"] / max(1, run[k]["bytes"]) for k in keys])
    if not members:
        raise DataError(f"{a} and {b} have no item in common; name two runs of the same tasks.")
    found["without_score"] = [t for t, subtasks in members.items() if not all(
        n in run for n in subtasks for run in values["score"])]
    for kind, (x, y) in values.items():
        names = {t: subtasks for t, subtasks in members.items()
                 if all(n in x and n in y for n in subtasks)}
        groups = {g: several for g in GROUPS
                  if (several := [t.name for t in tasks if t.group == g and t.name in names])}
        kept = [n for subtasks in names.values() for n in subtasks]
        found[kind] = paired_bootstrap(
            {n: x[n] for n in kept}, {n: y[n] for n in kept}, levels=[names, groups], draws=draws,
            seed=seed) if kept else None
    return found


def _better_form(task: Task, rows: Sequence[Row]) -> str:
    forms = rows[0].get("right", {}) if rows else {}
    return max(forms, key=lambda f: _macro(rows, lambda r: r["right"][f])[0], default="")


def _score_of(row: Row, form: str) -> float | None:
    return row["right"][form] if form else row.get("score")


# --- summing up -----------------------------------------------------------------------------------


def summarise(jobs: Sequence[Job], rows: Mapping[str, Sequence[Row]], missing: Mapping[str, str],
              settings: RunSettings, max_seq_len: int) -> dict[str, Any]:
    """Scores in percent by task, by group and in all, as the paper averages them.

    A task with subtasks counts the mean of theirs, a group the mean of its tasks, all the mean of
    the groups; what is missing is named and the averages say over how much they are.
    """
    tasks = {j.task.name: _summary_of(j, rows[j.task.name], settings, max_seq_len) for j in jobs}
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
            "of": len(own), "scored": len(scored), "read": len(read),
            "not_scored": [n for n in own if n not in scored]}
    scored_groups = [g for g in groups.values() if g["score"] is not None]
    return {"tasks": tasks, "missing": dict(missing), "groups": groups, "average": {
        "score": _mean([g["score"] for g in scored_groups]),
        "bits_per_byte": _mean([g["bits_per_byte"] for g in groups.values()
                                if g["bits_per_byte"] is not None]),
        "groups": len(scored_groups), "of": len(GROUPS),
        "is_whole": len(scored_groups) == len(GROUPS)
        and not any(g["not_scored"] for g in groups.values())}}


def _summary_of(job: Job, rows: Sequence[Row], settings: RunSettings, max_seq_len: int
                ) -> dict[str, Any]:
    task = job.task
    found: dict[str, Any] = {
        "group": task.group, "metric": task.metric, "shots": task.shots, "items": len(rows),
        "version": task.version, "stand_in": task.stand_in,
        "cut": sum(bool(r["cut"]) for r in rows),
        "bits_per_byte": _macro(rows, lambda r: r["bits"] / max(1, r["bytes"]))[0]}
    if task.kind != "choice" and settings.write:
        found["new_tokens"] = min(task.max_new_tokens, max_seq_len // 2)
        if found["new_tokens"] < task.max_new_tokens:
            found["asked_new_tokens"] = task.max_new_tokens
    if task.kind == "choice":
        by_form = {f: _macro(rows, lambda r, f=f: r["right"][f]) for f in settings.forms}
        best = max(by_form, key=lambda f: by_form[f][0])
        found |= {"score": 100 * by_form[best][0], "error": 100 * by_form[best][1], "form": best,
                  "forms": {f: 100 * m for f, (m, _) in by_form.items()},
                  "normalise": task.normalise}
    elif judged := [r for r in rows if "score" in r]:
        mean, error = _macro(judged, lambda r: r["score"])
        found |= {"score": 100 * mean, "error": 100 * error}
        if all("pass@10" in r for r in rows):
            found["pass@10"] = 100 * _macro(rows, lambda r: r["pass@10"])[0]
        found["unjudged"] = len(rows) - len(judged)
    else:
        why = "not asked to write"
        if settings.write:
            why = "programs were not run" if task.kind == "code" else "no judge"
        if any("rouge_l" in r for r in rows):
            found["rouge_l"] = 100 * _macro(rows, lambda r: r["rouge_l"])[0]
            why += f"; ROUGE-L {found['rouge_l']:.1f}"
        return found | {"score": None, "why": why}
    # the better of two forms is above chance more easily than one
    width = {1: 1.96, 2: 2.24}[len(settings.forms) if task.kind == "choice" else 1]
    if job.chance is None:
        return found | {"chance": None, "above_chance": None}
    return found | {"chance": 100 * job.chance, "above_chance": bool(
        found["score"] - 100 * job.chance > width * found["error"])}


def _macro(rows: Sequence[Row], value: Any) -> tuple[float, float]:
    """Mean over subtasks of the mean over items, and its standard error.

    Of right and wrong, a subtask's variance is p (1 - p) with p = (right + 1) / (items + 2), which
    is above 0 also where all are right.
    """
    by_subtask: dict[str, list[float]] = {}
    for r in rows:
        by_subtask.setdefault(r["subtask"], []).append(float(value(r)))
    means = [float(np.mean(v)) for v in by_subtask.values()]
    variances = [_variance(v) / len(v) for v in by_subtask.values()]
    return float(np.mean(means)), math.sqrt(sum(variances)) / len(means)


def _variance(values: Sequence[float]) -> float:
    if {*values} <= {0.0, 1.0}:
        p = (sum(values) + 1) / (len(values) + 2)
        return p * (1 - p)
    return float(np.var(values, ddof=1)) if len(values) > 1 else 0.25


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
