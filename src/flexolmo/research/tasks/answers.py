"""A model's answers to a few items: rows of likelihoods, answers, programs and stories.

An item's bits per byte are those of its right answer; they move smoothly with quality where
accuracy is still at chance. Source: paper §4.2; OLMES.
"""

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from flexolmo.evaluation.scorer import Scorer
from flexolmo.files import digest_bytes
from flexolmo.inference.sampling import Sampling
from flexolmo.research.tasks.items import Item
from flexolmo.research.tasks.judge import EndpointJudge
from flexolmo.research.tasks.metrics import pass_at_k, rouge_l
from flexolmo.research.tasks.sandbox.sandbox import Limits, run_programs
from flexolmo.research.tasks.selection import Row, RunSettings
from flexolmo.research.tasks.stories import SAMPLES, TEMPERATURE
from flexolmo.research.tasks.suite import Task, program_of

CODE_LIMITS = Limits(wall_seconds=40.0)  # on a busy machine the 10 seconds of processor decide


def score_items(
    scorer: Scorer, task: Task, items: Sequence[Item], settings: RunSettings
) -> list[Row]:
    """A row for each of a few items, read and written in one go; stories are not yet judged."""
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
            row |= {
                "text": text,
                "score": float(task.judge(text, item)),
                "cut": row["cut"] or is_cut,
            }
    if task.kind == "code" and settings.write and settings.run_code:
        _score_code(scorer, task, items, rows, settings)
    if task.kind == "story" and settings.write:
        _score_stories(scorer, task, items, rows, settings)
    return rows


def _room(scorer: Scorer, task: Task) -> int:
    return min(task.max_new_tokens, scorer.reader.max_seq_len // 2)


def _bits(log_prob: float, text: str) -> Row:
    return {"bits": -log_prob / math.log(2), "bytes": len(text.encode())}


def _score_choices(
    scorer: Scorer, task: Task, items: Sequence[Item], rows: Sequence[Row], forms: Sequence[str]
) -> None:
    asked = dict.fromkeys(  # each pair once, though two forms or two items ask it
        pair for item in items for form in ("rc", *forms) for pair in _pairs(task, item, form)
    )
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


def _score_code(
    scorer: Scorer, task: Task, items: Sequence[Item], rows: Sequence[Row], settings: RunSettings
) -> None:
    n = settings.samples
    written = _write_samples(scorer, task, items, rows, n, 0.8 if n > 1 else 0, settings.seed)
    programs = [program_of(items[j // n], text) for j, text in enumerate(written)]
    tests = [items[j // n].tests for j in range(len(written))]
    outcomes = run_programs(programs, CODE_LIMITS, processes=os.cpu_count() or 1, tests=tests)
    for j, row in enumerate(rows):
        own = outcomes[j * n : (j + 1) * n]
        passed = sum(o.passed for o in own)
        row |= {
            "text": written[j * n],
            "score": pass_at_k(n, passed, 1),
            "outcomes": [o.reason for o in own],
        }
        row |= {"pass@10": pass_at_k(n, passed, 10)} if n >= 10 else {}


def _score_stories(
    scorer: Scorer, task: Task, items: Sequence[Item], rows: Sequence[Row], settings: RunSettings
) -> None:
    written = _write_samples(scorer, task, items, rows, SAMPLES, TEMPERATURE, settings.seed)
    for j, (row, item) in enumerate(zip(rows, items, strict=True)):
        own = written[j * SAMPLES : (j + 1) * SAMPLES]
        row |= {
            "texts": own,
            "rouge_l": float(np.mean([rouge_l(t, item.references[0]) for t in own])),
        }


def judge_story(item: Item, row: Row, judges: Mapping[str, EndpointJudge]) -> Row:
    """A judge's additions to a story's row: how many texts it judged, and their mean score."""
    judge = judges[item.more["quality"]]
    points = [
        v.score / 100
        for text in row["texts"]
        if (v := judge.judge(item.more["start"] + text)) is not None
    ]
    return {"judged": len(points)} | ({"score": float(np.mean(points))} if points else {})


def _write_samples(
    scorer: Scorer,
    task: Task,
    items: Sequence[Item],
    rows: Sequence[Row],
    count: int,
    temperature: float,
    seed: int,
) -> list[str]:
    """`count` continuations of each item, one item after the other. What is drawn for an item
    depends on `seed` and its id."""
    sampling = Sampling(max_new_tokens=_room(scorer, task), temperature=temperature, top_p=1.0)
    seeds = [
        int(digest_bytes(f"{seed} {i.subtask} {i.id} {n}".encode())[-15:], 16)
        for i in items
        for n in range(count)
    ]
    written = scorer.continuations(
        [i.prompt for i in items for _ in range(count)], sampling, task.stops, seeds
    )
    for j, row in enumerate(rows):
        row["cut"] |= any(is_cut for _, is_cut in written[j * count : (j + 1) * count])
    return [text for text, _ in written]
