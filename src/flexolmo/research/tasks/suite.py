"""The 31 tasks of the paper in eleven groups: their items, forms, metrics and stops.

Prompts and examples are OLMES's, ready-made in the package for 21 tasks and rendered here for the
others. Source: paper §4.2 and appendix C; OLMES (arXiv 2406.08446).
"""

import ast
import builtins
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

from flexolmo.errors import ConfigError, DataError
from flexolmo.files import digest_bytes, parse_json
from flexolmo.research.tasks import metrics
from flexolmo.research.tasks.items import LETTERS, Choices, Item, choice_item
from flexolmo.research.tasks.sources import AGI_EVAL_TASKS, BBH_TASKS, HubPart, Sources
from flexolmo.research.tasks.stories import MAX_NEW_TOKENS, POEM_SHOTS, news_items, poem_items

UNCONDITIONED = 1_000_000  # the package's place for options without their question
Kind = Literal["choice", "answer", "code", "story"]


@dataclass(frozen=True)
class Task:
    """One task: where its items come from and how an answer to one is judged."""

    name: str
    group: str
    load: Callable[[Sources], list[Item]]
    shots: int
    kind: Kind = "choice"
    metric: str = "accuracy"
    normalise: Literal["none", "character", "pmi"] = "character"  # of the rc form's options
    judge: Callable[[str, Item], float] | None = None  # 0 to 1, of a written answer
    stops: tuple[str, ...] = ()
    max_new_tokens: int = 50
    stand_in: str = ""  # what is read in place of the paper's data
    version: int = 1  # goes up when items, prompts or judging change


# --- ready-made in the package --------------------------------------------------------------------


def _rendered_choices(
    task: str, split: str, keep: str = "", rc: str = "", mc: str = ""
) -> Callable[[Sources], list[Item]]:
    """Both forms of a task of the package; `keep` is what ids begin with."""

    def load(sources: Sources) -> list[Item]:
        forms = {
            form: _choices(sources, task, name or f"{split}{form}_5shot")
            for form, name in (("rc", rc), ("mc", mc))
        }
        if forms["rc"].keys() != forms["mc"].keys():
            raise DataError(f"The package's two forms of {task} hold different questions.")
        natives = [native for native, _, _ in forms["rc"].values()]
        repeated = len(set(natives)) < len(natives)  # then ids need their place to be ids
        return [
            Item(
                f"{native} {doc}" if repeated else native,
                forms={"rc": choices, "mc": forms["mc"][doc][1]},
                question=question,
            )
            for doc, (native, choices, question) in forms["rc"].items()
            if native.startswith(keep)
        ]

    return load


def _choices(sources: Sources, task: str, variant: str) -> dict[int, tuple[str, Choices, str]]:
    """Id, choices, and bare question with its options, by the place of the item."""
    found, bare = {}, {}
    rows = sources.requests(task, variant)
    for doc, group in groupby(rows, key=lambda r: r["doc_id"]):
        several = list(group)
        contexts = tuple(r["request"]["context"] for r in several)
        if doc >= UNCONDITIONED:
            bare[doc - UNCONDITIONED] = contexts[0]
            continue
        options = tuple(r["request"]["continuation"] for r in several)
        native = several[0]["native_id"]
        found[doc] = (
            str(doc if native is None else native),
            Choices(contexts, options, int(several[0]["label"])),
            _bare_question(contexts[0]) + "".join(options),
        )
    return {
        doc: (native, Choices(c.contexts, c.options, c.gold, bare.get(doc)), question)
        for doc, (native, c, question) in found.items()
    }


def _bare_question(context: str) -> str:
    """The last paragraph of a prompt: the question without its examples."""
    return context.rstrip().rsplit("\n\n", 1)[-1]


def _rendered_answers(
    task: str,
    variant: str,
    subtask: str = "",
    references: Callable[[Any], Iterable[Any]] = tuple,
    gold: Callable[[dict[str, Any]], str] | None = None,
) -> Callable[[Sources], list[Item]]:
    """Questions of the package to be answered in writing; `references` are made of its label."""

    def load(sources: Sources) -> list[Item]:
        found = []
        for row in sources.requests(task, variant):
            request, native = row["request"], row["native_id"]
            text = gold(row) if gold else request["continuation"]
            found.append(
                Item(
                    str(row["doc_id"] if native is None else native),
                    subtask,
                    prompt=request["context"],
                    gold_text=text,
                    references=tuple(references(row["label"])),
                    question=_bare_question(request["context"]) + text,
                )
            )
        return found

    return load


def _math(sources: Sources) -> list[Item]:
    subsets = (
        "algebra",
        "counting_and_probability",
        "geometry",
        "intermediate_algebra",
        "number_theory",
        "prealgebra",
        "precalculus",
    )
    found = [
        item
        for s in subsets
        for item in _rendered_answers(f"minerva_math_{s}", "gold_bpb_0shot", s, references=_labels)(
            sources
        )
    ]
    # the package's label was damaged by Minerva's normaliser (x^2 = 9 became 9)
    return [replace(i, references=(metrics.math_answer(i.gold_text),)) for i in found]


# --- rendered here --------------------------------------------------------------------------------


def _mmlu(sources: Sources) -> list[Item]:
    found = []
    for folder in sources.arrow_folders("hails/mmlu_no_train/[a-z_]+/test"):
        subject = folder.split("/")[-2]
        header = (
            "The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.\n\n"
        )
        shots = [
            (r["question"], r["choices"], r["answer"])
            for r in sources.arrow(folder.removesuffix("test") + "dev")
        ]
        found += [
            choice_item(
                f"{subject}-{i}",
                r["question"],
                r["choices"],
                r["answer"],
                subtask=subject,
                shots=shots,
                header=header,
            )
            for i, r in enumerate(sources.arrow(folder))
        ]
    return found


def _mmlu_pro(sources: Sources) -> list[Item]:
    rows = sources.rows("mmlu_pro", [HubPart("TIGER-Lab/MMLU-Pro", "test")])
    questions = [
        (str(r["question_id"]), r["category"], r["question"], r["options"], r["answer_index"])
        for r in rows
    ]
    return _with_own_examples(
        questions, 5, "The following are multiple choice questions (with answers) about {}.\n\n"
    )


def _agi_eval(sources: Sources) -> list[Item]:
    questions = []
    parts = [HubPart(f"hails/agieval-{task}", "test") for task in AGI_EVAL_TASKS]
    for i, r in enumerate(sources.rows("agieval_flexolmo", parts, _agi_eval_of_hub)):
        options = [o[3:].strip() if o[:1] == "(" and o[2:3] == ")" else o for o in r["options"]]
        question = "\n".join(x for x in (r["passage"], r["question"]) if x)
        questions.append(
            (f"{r['task']}-{i}", r["task"], question, options, LETTERS.index(r["label"]))
        )
    return _with_own_examples(questions, 1, "")


def _agi_eval_of_hub(row: Mapping[str, Any], part: HubPart) -> dict[str, Any]:
    """A row whose `query` holds passage, "Q: " and question, and the options once more."""
    asked, found, _ = row["query"].rpartition("Answer Choices:")
    passage, q, question = asked.rpartition("Q: ")
    if not (found and q):
        raise ValueError(f"{row['query'][:80]!r} is no question with answer choices")
    return {
        "task": part.path.removeprefix("hails/agieval-"),
        "passage": passage.strip() or None,
        "question": question.strip(),
        "options": row["choices"],
        "label": LETTERS[row["gold"][0]],
    }


def _with_own_examples(
    questions: Sequence[tuple[str, str, str, Sequence[str], int]], count: int, header: str
) -> list[Item]:
    """Each subtask's first `count` questions, by a hash of their ids, are its examples and are not
    asked."""
    found = []
    by_subtask: dict[str, list[Any]] = {}
    for q in questions:
        by_subtask.setdefault(q[1], []).append(q)
    for subtask, several in by_subtask.items():
        ordered = sorted(several, key=lambda q: digest_bytes(f"example {q[0]}".encode()))
        shots = [(q[2], q[3], q[4]) for q in ordered[:count]]
        left_out = {q[0] for q in ordered[:count]}
        found += [
            choice_item(
                i, text, options, gold, subtask=subtask, shots=shots, header=header.format(subtask)
            )
            for i, _, text, options, gold in several
            if i not in left_out
        ]
    return found


def _bbh(sources: Sources) -> list[Item]:
    parts = [HubPart("SaylorTwift/bbh", "test", task) for task in BBH_TASKS]
    rows = sources.rows("bbh", parts, lambda row, part: {"task": part.config, **row})
    examples, found = sources.bbh_prompts(), []
    for i, r in enumerate(rows):
        question = f"Q: {r['input']}\nA: Let's think step by step."
        found.append(
            Item(
                f"{r['task']}-{i}",
                r["task"],
                prompt=f"{examples[r['task']]}\n\n{question}",
                gold_text=f" So the answer is {r['target']}.",
                references=(r["target"],),
                question=f"{r['input']} {r['target']}",
            )
        )
    return found


def _trivia_qa(sources: Sources) -> list[Item]:
    rows = sources.arrow("trivia_qa/rc.wikipedia.nocontext/validation")
    ordered = sorted(rows, key=lambda r: digest_bytes(f"example {r['question_id']}".encode()))
    shots = "".join(
        f"Question: {r['question']}\nAnswer: {r['answer']['value']}\n\n" for r in ordered[:5]
    )
    return [
        Item(
            r["question_id"],
            prompt=f"{shots}Question: {r['question']}\nAnswer:",
            gold_text=f" {r['answer']['value']}",
            references=tuple(r["answer"]["aliases"]) or (r["answer"]["value"],),
            question=f"{r['question']} {r['answer']['value']}",
        )
        for r in ordered[5:]
    ]


def _covid_qa(sources: Sources) -> list[Item]:
    return [
        Item(
            f"{r['doc_id']}-{i}",
            prompt=f"{r['context']}\n\nQuestion: {r['question']}\nAnswer:",
            gold_text=" " + r["answers"][0].strip(),
            references=tuple(a.strip() for a in r["answers"]),
            question=f"{r['question']} {r['answers'][0]}",
        )
        for i, r in enumerate(sources.rows("covid_deepset_qa"))
    ]


def _sciriff(name: str) -> Callable[[Sources], list[Item]]:
    def load(sources: Sources) -> list[Item]:
        found = []
        for r in sources.rows(f"sciriff_{name}"):
            answer = parse_json(r["output"])
            references = tuple(answer) if isinstance(answer, list) else (answer["verdict"],)
            gold = r["output"] if isinstance(answer, list) else answer["verdict"]
            found.append(
                Item(
                    r["_instance_id"],
                    prompt=f"{r['input']}\n\nAnswer:",
                    gold_text=f" {gold}",
                    references=references,
                    question=f"{r['input'][-400:]} {gold}",
                )
            )
        return found

    return load


# --- code -----------------------------------------------------------------------------------------


def _human_eval(sources: Sources) -> list[Item]:
    found = []
    for row in sources.requests("codex_humaneval", "gold_bpb_0shot"):
        doc = row["doc"]
        found.append(
            Item(
                doc["task_id"],
                prompt=doc["prompt"],
                gold_text=doc["canonical_solution"],
                question=doc["prompt"],
                tests=f"{doc['prompt']}{doc['canonical_solution']}\n{doc['test']}\n"
                f"check(_program.{doc['entry_point']})\n",  # the prompt has what tests call
            )
        )
    return found


def _human_eval_plus(sources: Sources) -> list[Item]:
    return [
        Item(
            r["task_id"],
            prompt=r["prompt"],
            gold_text=r["canonical_solution"],
            question=r["prompt"],
            tests=_plus_tests(r, r["prompt"] + r["canonical_solution"]),
        )
        for r in sources.rows("humaneval_plus_full")
    ]


def _mbpp(sources: Sources) -> list[Item]:
    found = []
    for row in sources.requests("codex_mbpp", "gold_bpb_3shot"):
        doc, request = row["doc"], row["request"]
        found.append(
            Item(
                str(doc["task_id"]),
                prompt=request["context"],
                gold_text=request["continuation"],
                question=doc["text"],
                tests=_ask_program([doc["test_setup_code"], *doc["test_list"]], doc["code"]),
                more={"alone": True},
            )
        )
    return found


def _mbpp_plus(sources: Sources) -> list[Item]:
    found = []
    for r in sources.rows("mbpp_plus_full"):
        prompt = f"{r['prompt'].strip()}\n```python\n"
        solution = r["canonical_solution"]
        found.append(
            Item(
                r["task_id"],
                prompt=prompt,
                gold_text=solution.strip() + "\n```",
                question=r["prompt"],
                more={"alone": True},
                tests=_ask_program([r["assertion"]], solution) + _plus_tests(r, solution),
            )
        )
    return found


def _plus_tests(row: Mapping[str, Any], solution: str) -> str:
    """Tests that hold a program to what the published solution says of all inputs of EvalPlus.

    An input that the solution refuses is passed over. Source: arXiv 2305.01210.
    """
    inputs = [*row["base_input"], *row["plus_input"]]
    return (
        "import math as _math\n"
        "from math import inf, nan\n"  # as inputs spell them
        f"_theirs, _ours = _program.{row['entry_point']}, {{}}\n"
        f"exec({solution!r}, _ours)\n"
        "def _same(a, b):\n"
        "    if isinstance(a, float) or isinstance(b, float):\n"
        f"        return a == b or _math.isclose(a, b, rel_tol=1e-7, abs_tol={row['atol']!r}) or "
        "(a != a and b != b)\n"
        "    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):\n"
        "        return len(a) == len(b) and all(map(_same, a, b))\n"
        "    if type(b).__name__ == 'Match':\n"  # of a regular expression: it is one, or none
        "        return a is not None\n"
        "    return a == b\n"
        f"for _input in {inputs!r}:\n"
        "    try:\n"
        f"        _right = _ours[{row['entry_point']!r}](*_as_sent(_input))\n"
        "    except Exception:\n"
        "        continue\n"
        "    assert _same(_theirs(*_input), _right), _input\n"
    )


def _ask_program(lines: Sequence[str], solution: str) -> str:
    """Tests made of `lines`; names are the program's where the published `solution` defines them.

    Other names that are not Python's, nor the lines' own, are modules or the program's, too.
    """
    text = "\n".join(lines)
    names = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)]
    solved = {getattr(node, "name", "") for node in ast.parse(solution).body}
    known = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(dir(builtins))
    asked = [
        f"import {name}"
        if name in sys.stdlib_module_names - solved
        else f"{name} = _program.{name}"
        for name in dict.fromkeys(node.id for node in names)
        if name in solved or name not in known
    ]
    return "\n".join([*asked, text, ""])


def program_of(item: Item, written: str) -> str:
    """The program to be tested: the model's code, after the prompt if it continues that."""
    return written if item.more.get("alone") else item.prompt + written


# --- the table ------------------------------------------------------------------------------------


def _labels(label: Any) -> Sequence[Any]:
    return label if isinstance(label, list) else [label]


def _written(metric: Callable[..., float]) -> Callable[[str, Item], float]:
    return lambda text, item: metric(text.strip().split("\n")[0], item.references)


_PLUS_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
_STAND_IN_SHOTS = "examples are questions of the test set, left out of the score"

TASKS: tuple[Task, ...] = (
    Task("arc_easy", "MC9", _rendered_choices("arc_easy", "test_"), 5),
    Task("arc_challenge", "MC9", _rendered_choices("arc_challenge", "test_"), 5, normalise="pmi"),
    Task("boolq", "MC9", _rendered_choices("boolq", "val_"), 5, normalise="none"),
    Task("csqa", "MC9", _rendered_choices("csqa", "val_"), 5, normalise="pmi"),
    Task("hellaswag", "MC9", _rendered_choices("hellaswag", "val_"), 5),
    Task("openbookqa", "MC9", _rendered_choices("openbookqa", "test_"), 5, normalise="pmi"),
    Task("piqa", "MC9", _rendered_choices("piqa", "val_"), 5),
    Task("socialiqa", "MC9", _rendered_choices("socialiqa", "val_"), 5),
    Task("winogrande", "MC9", _rendered_choices("winogrande", "val_"), 5, normalise="none"),
    Task(
        "coqa",
        "Gen5",
        _rendered_answers("coqa", "bpb_0shot", references=_labels),
        0,
        "answer",
        "F1",
        judge=_written(metrics.token_f1),
        stops=("\n\n",),
    ),
    Task(
        "squad",
        "Gen5",
        _rendered_answers("squad", "bpb_5shot", references=_labels),
        5,
        "answer",
        "F1",
        judge=_written(metrics.token_f1),
        stops=("Title:", "\n\n"),
    ),
    Task(
        "naturalqs",
        "Gen5",
        _rendered_answers("naturalqs_open", "bpb_5shot", references=_labels),
        5,
        "answer",
        "F1",
        judge=_written(metrics.token_f1),
        stops=("Question:", "Q:", "\n\n"),
    ),
    Task(
        "triviaqa",
        "Gen5",
        _trivia_qa,
        5,
        "answer",
        "F1",
        judge=_written(metrics.token_f1),
        stops=("Question:", "Q:", "\n\n"),
        stand_in=_STAND_IN_SHOTS,
    ),
    Task(
        "drop",
        "Gen5",
        _rendered_answers(
            "drop",
            "bpb_5shot",
            references=_labels,
            gold=lambda row: " " + ", ".join(row["doc"]["answers"][0]),
        ),
        5,
        "answer",
        "F1",
        judge=lambda t, i: metrics.drop_scores(t.strip().split("\n")[0], i.references)[1],
        stops=("Passage:", "Question:", "\n\n"),
    ),
    Task("mmlu", "MMLU", _mmlu, 5),
    Task("mmlu_pro", "MMLU-Pro", _mmlu_pro, 5, stand_in=_STAND_IN_SHOTS),
    Task("agi_eval", "AGIEval", _agi_eval, 1, stand_in=_STAND_IN_SHOTS),
    Task(
        "bbh",
        "BBH",
        _bbh,
        3,
        "answer",
        "exact match",
        judge=lambda t, i: metrics.bbh_match(metrics.bbh_answer(t), i.references[0]),
        stops=("Q:", "\n\n"),
        max_new_tokens=512,
    ),
    Task(
        "gsm8k",
        "Math2",
        _rendered_answers("gsm8k", "gold_bpb_5shot", references=_labels),
        8,
        "answer",
        "exact match",
        judge=lambda t, i: float(metrics.same_number(metrics.gsm8k_answer(t), i.references[0])),
        stops=("Question:", "</s>", "<|im_end|>", "\n\n"),
        max_new_tokens=512,
    ),
    Task(
        "math",
        "Math2",
        _math,
        4,
        "answer",
        "exact match",
        judge=lambda t, i: float(metrics.same_math(metrics.math_answer(t), i.references[0])),
        stops=("Problem:", "\n\n"),
        max_new_tokens=1024,
    ),
    Task(
        "humaneval",
        "Code4",
        _human_eval,
        0,
        "code",
        "pass@1",
        stops=_PLUS_STOPS,
        max_new_tokens=512,
    ),
    Task(
        "humaneval_plus",
        "Code4",
        _human_eval_plus,
        0,
        "code",
        "pass@1",
        stops=_PLUS_STOPS,
        max_new_tokens=512,
    ),
    Task("mbpp", "Code4", _mbpp, 3, "code", "pass@1", stops=("```",), max_new_tokens=512),
    Task("mbpp_plus", "Code4", _mbpp_plus, 0, "code", "pass@1", stops=("```",), max_new_tokens=512),
    Task(
        "bioasq_yesno",
        "SciRIFF5",
        _rendered_choices("sciriff_yesno", "", "bioasq", "rc_5shot", "mc_5shot"),
        5,
        normalise="none",
    ),
    Task(
        "pubmedqa",
        "SciRIFF5",
        _rendered_choices("sciriff_yesno", "", "pubmedqa", "rc_5shot", "mc_5shot"),
        5,
        normalise="none",
    ),
    Task(
        "bioasq_general",
        "SciRIFF5",
        _sciriff("bioasq_list_qa"),
        0,
        "answer",
        "F1",
        judge=_written(metrics.list_f1),
        stops=("\n\n",),
        stand_in="BioASQ list questions",
    ),
    Task(
        "bioasq_factoid",
        "SciRIFF5",
        _sciriff("scifact_entailment"),
        0,
        "answer",
        "F1",
        judge=_written(metrics.token_f1),
        stops=("\n\n",),
        stand_in="SciFact verdicts",
    ),
    Task(
        "covidqa",
        "SciRIFF5",
        _covid_qa,
        0,
        "answer",
        "F1",
        judge=_written(metrics.token_f1),
        stops=("Question:", "\n\n"),
    ),
    Task(
        "newsg",
        "NewsG",
        news_items,
        0,
        "story",
        "judged",
        max_new_tokens=MAX_NEW_TOKENS,
        stand_in="held-out documents of --news",
    ),
    Task(
        "poemg",
        "PoemG",
        poem_items,
        POEM_SHOTS,
        "story",
        "judged",
        stops=("\n\n\n",),
        max_new_tokens=MAX_NEW_TOKENS,
        stand_in="held-out verses of --poems",
    ),
)
GROUPS = tuple(dict.fromkeys(t.group for t in TASKS))


def choose_tasks(names: Iterable[str] | None) -> list[Task]:
    """The tasks or groups named, in the suite's order; None: all.

    ConfigError: a name that is neither.
    """
    if names is None:
        return list(TASKS)
    wanted = set(names)
    unknown = sorted(wanted - {t.name for t in TASKS} - set(GROUPS))
    if unknown or not wanted:
        raise ConfigError(
            f"Unknown task {', '.join(unknown) or '(none named)'}; there are "
            f"{', '.join(t.name for t in TASKS)}, and the groups "
            f"{', '.join(GROUPS)}."
        )
    return [t for t in TASKS if t.name in wanted or t.group in wanted]
