"""Running tasks: against scores by hand, through kills, and what the sums say."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from flexolmo.errors import ConfigError, DataError, FlexOlmoError, SourceUnavailable
from flexolmo.evaluation.scorer import Scorer
from flexolmo.files import hold_lock
from flexolmo.inference.reader import open_reader
from flexolmo.research.tasks import answers
from flexolmo.research.tasks import run as room
from flexolmo.research.tasks.items import Choices, Item
from flexolmo.research.tasks.metrics import token_f1
from flexolmo.research.tasks.run import compare_runs, run_suite
from flexolmo.research.tasks.selection import ChosenTask, RunSettings, choose_items, parse_limits
from flexolmo.research.tasks.summary import summarise
from made_items import WORDS, choice_items, code_items, task_of, written_items
from made_mixtures import NAMES

SOURCES = SimpleNamespace(digests={})


@pytest.fixture(scope="module")
def opened(house):
    """A mixture of three, all on."""
    return open_reader(house.mixture_dir(NAMES, "rich"), house.trusted)


@pytest.fixture
def tasks():
    """One of each kind."""
    return [
        task_of("arc_easy", choice_items()),
        task_of("squad", written_items(), "answer"),
        task_of("mbpp", code_items(), "code"),
    ]


def lines(out, task):
    return [json.loads(x) for x in (out / "items" / f"{task}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("normalise", ["none", "character", "pmi"])
def test_choices_are_judged_as_by_hand(opened, tmp_path, normalise):
    items = choice_items()
    results = run_suite(
        *opened, [task_of("arc_easy", items, normalise=normalise)], SOURCES, tmp_path, RunSettings()
    )
    scorer = Scorer(opened[0], 4)
    right = {"rc": [], "mc": []}
    for item, row in zip(
        items, sorted(lines(tmp_path, "arc_easy"), key=lambda r: r["id"]), strict=True
    ):
        for form, c in item.forms.items():
            said = np.array(
                [
                    scorer.log_likelihoods([p])[0].log_prob
                    for p in zip(c.contexts, c.options, strict=True)
                ]
            )
            assert row["log_probs"][form] == pytest.approx(said, abs=2e-3)
            if form == "rc":
                assert row["bits"] == pytest.approx(-said[c.gold] / math.log(2), abs=2e-3)
                assert row["bytes"] == len(c.options[c.gold].encode())
                if normalise == "character":
                    said = said / [len(o.strip()) for o in c.options]
                elif normalise == "pmi":
                    said = said - [
                        scorer.log_likelihoods([("Answer:", o)])[0].log_prob for o in c.options
                    ]
            right[form].append((item.subtask, int(said.argmax()) == c.gold))
    by_form = {
        f: 100 * np.mean([np.mean([ok for s, ok in r if s == which]) for which in "ab"])
        for f, r in right.items()
    }
    found = results["tasks"]["arc_easy"]
    assert found["forms"] == pytest.approx(by_form)
    assert found["score"] == max(by_form.values()) and found["items"] == 9
    assert found["chance"] == 50  # the right place is one in all of a, the other in all of b


def test_what_is_written_is_judged_up_to_its_stop(opened, tmp_path):
    items = written_items()
    task = task_of("squad", items, "answer")
    run_suite(*opened, [task], SOURCES, tmp_path, RunSettings())
    for row in lines(tmp_path, "squad"):
        item = next(i for i in items if i.id == row["id"])
        assert "\n" not in row["text"] and row["score"] == task.judge(row["text"], item)


class Killed(Exception):
    pass


@pytest.mark.parametrize("torn", [False, True])
def test_a_run_goes_on_where_it_was_killed_and_ends_the_same(
    opened, tmp_path, tasks, monkeypatch, torn
):
    monkeypatch.setattr(room, "SLICE", 4)
    whole = run_suite(*opened, tasks, SOURCES, tmp_path / "whole", RunSettings())
    score, calls = room.score_items, []

    def killed_later(*args):
        calls.append(args[1].name)
        if len(calls) == 3:
            raise Killed
        return score(*args)

    monkeypatch.setattr(room, "score_items", killed_later)
    with pytest.raises(Killed):
        run_suite(*opened, tasks, SOURCES, tmp_path / "part", RunSettings())
    assert len(lines(tmp_path / "part", "arc_easy")) == 8
    if torn:
        with open(tmp_path / "part/items/arc_easy.jsonl", "r+b") as f:
            f.truncate(f.seek(0, 2) - 20)
    monkeypatch.setattr(room, "score_items", lambda *a: calls.append(a[1].name) or score(*a))
    again = run_suite(*opened, tasks, SOURCES, tmp_path / "part", RunSettings())
    assert len(calls) == 3 + (2 if torn else 1) + 2 + 1  # only what was left
    for name in ("arc_easy", "squad", "mbpp"):
        part, all_at_once = lines(tmp_path / "part", name), lines(tmp_path / "whole", name)
        assert {r["id"]: r for r in part} == {r["id"]: r for r in all_at_once}
        assert len(part) == len(all_at_once)
    assert {k: again[k] for k in ("tasks", "groups", "average")} == {
        k: whole[k] for k in ("tasks", "groups", "average")
    }


@pytest.mark.parametrize("line", [b"no JSON", b"[" * 9999, b"[]", b'{"id": "1"}', b"7", b"\xff"])
def test_a_line_that_is_no_row_is_told_with_its_place(opened, tmp_path, tasks, line):
    run_suite(*opened, tasks[:1], SOURCES, tmp_path, RunSettings(limit=2))
    path = tmp_path / "items" / "arc_easy.jsonl"
    before = path.read_bytes()
    path.write_bytes(before + line + b"\n")
    with pytest.raises(DataError, match=r"arc_easy\.jsonl, line \d: expected a row"):
        compare_runs(tmp_path, tmp_path)
    with pytest.raises(DataError, match=r"arc_easy\.jsonl, line \d: expected a row"):
        run_suite(*opened, tasks[:1], SOURCES, tmp_path, RunSettings(limit=2))


def test_another_run_in_the_same_place_is_refused(opened, house, tmp_path, tasks):
    run_suite(*opened, tasks[:1], SOURCES, tmp_path, RunSettings(limit=2))
    before = (tmp_path / "items/arc_easy.jsonl").read_bytes()
    for model, settings, asked, said in (
        (opened, RunSettings(limit=3), tasks[:1], "items of arc_easy"),
        (opened, RunSettings(limit=2, seed=1), tasks[:1], "setting seed"),
        (
            open_reader(house.mixture_dir(NAMES, "rich"), house.trusted, without=["amber"]),
            RunSettings(limit=2),
            tasks[:1],
            "model",
        ),
        (opened, RunSettings(limit=2), [task_of("arc_easy", choice_items(4))], "arc_easy"),
    ):
        with pytest.raises(ConfigError, match=f"differs in .*{said}"):
            run_suite(*model, asked, SOURCES, tmp_path, settings)
    assert (tmp_path / "items/arc_easy.jsonl").read_bytes() == before


def test_what_a_run_has_had_is_remembered_when_other_tasks_are_asked(opened, tmp_path, tasks):
    run_suite(*opened, tasks[:1], SOURCES, tmp_path, RunSettings())
    run_suite(*opened, tasks[1:2], SOURCES, tmp_path, RunSettings())
    with pytest.raises(ConfigError, match="items of arc_easy"):
        run_suite(*opened, [task_of("arc_easy", choice_items(4))], SOURCES, tmp_path, RunSettings())


def test_files_of_another_layout_are_told_by_task(tmp_path):
    def broken(_):
        return {}["question"]

    with pytest.raises(DataError, match=r"arc_easy are not laid out.*question"):
        choose_items([task_of("arc_easy", [], load=broken)], SOURCES, None)
    chosen_tasks, missing = choose_items(
        [task_of("arc_easy", []), task_of("boolq", choice_items())], SOURCES, None
    )
    assert missing == {"arc_easy": "its file is empty"} and len(chosen_tasks) == 1


def test_a_judge_is_checked_before_anything_is_read(opened, tmp_path, tasks):
    for settings, said in (
        (RunSettings(judge_url="http://localhost:1/v1"), "--judge-model"),
        (RunSettings(judge_url="ftp://x", judge_model="m"), "http"),
    ):
        with pytest.raises(ConfigError, match=said):
            run_suite(*opened, tasks, SOURCES, tmp_path, settings)
    assert not (tmp_path / "items").exists()


def test_programs_are_not_run_where_they_could_read_files(opened, tmp_path, tasks, monkeypatch):
    held = ["no network (seccomp)"]
    monkeypatch.setattr(room, "check_sandbox", lambda: [*held, "files outside NOT protected: no x"])
    with pytest.raises(ConfigError, match="files outside NOT protected"):
        run_suite(*opened, tasks, SOURCES, tmp_path, RunSettings(run_code=True))
    assert not (tmp_path / "run.json").exists()
    monkeypatch.setattr(room, "check_sandbox", lambda: held)
    run_suite(*opened, tasks[:1], SOURCES, tmp_path, RunSettings(run_code=True))
    assert json.loads((tmp_path / "run.json").read_text())["sandbox"] == held


def test_more_tasks_may_be_asked_of_the_same_run(opened, tmp_path, tasks):
    run_suite(*opened, tasks[:1], SOURCES, tmp_path, RunSettings())
    results = run_suite(*opened, tasks, SOURCES, tmp_path, RunSettings())
    assert set(results["tasks"]) == {"arc_easy", "squad", "mbpp"}


def test_an_expert_left_out_gives_the_rows_of_a_model_without_it(house, tmp_path, tasks):
    for name, (reader, about) in (
        (
            "without",
            open_reader(house.mixture_dir(NAMES, "rich"), house.trusted, without=["basalt"]),
        ),
        ("never", open_reader(house.mixture_dir(("amber", "zinc"), "rich"), house.trusted)),
    ):
        run_suite(
            reader, about | {"digest": "same"}, tasks, SOURCES, tmp_path / name, RunSettings()
        )
    for name in ("arc_easy", "squad", "mbpp"):
        assert lines(tmp_path / "without", name) == lines(tmp_path / "never", name)


def test_every_row_says_what_it_is_of(opened, tmp_path, tasks):
    run_suite(*opened, tasks, SOURCES, tmp_path, RunSettings(seed=5))
    for task in tasks:
        for row in lines(tmp_path, task.name):
            assert row["model"] == opened[1]["digest"] and row["enabled"] == sorted(NAMES)
            assert (row["task"], row["version"], row["seed"]) == (task.name, 1, 5)


def test_fewer_items_are_among_more():
    task = task_of("arc_easy", choice_items(30))
    drawn = [{i.id for i in choose_items([task], SOURCES, n)[0][0].items} for n in (2, 7, None)]
    assert drawn[0] < drawn[1] < drawn[2] and list(map(len, drawn)) == [4, 14, 30]
    (chosen,), _ = choose_items([task_of("arc_easy", choice_items(30)[::-1])], SOURCES, 7)
    assert {i.id for i in chosen.items} == drawn[1]


def unavailable(_):
    raise SourceUnavailable("not here")


def test_what_cannot_be_had_is_named_and_not_averaged(opened, tmp_path, tasks):
    gone = task_of("winogrande", [], load=unavailable)
    results = run_suite(*opened, [*tasks, gone], SOURCES, tmp_path, RunSettings())
    assert results["missing"] == {"winogrande": "not here"}
    group = results["groups"]["MC9"]
    assert group["score"] == results["tasks"]["arc_easy"]["score"]
    assert (group["scored"], group["of"]) == (1, 9) and "winogrande" in group["not_scored"]
    assert not results["average"]["is_whole"]
    with pytest.raises(DataError, match="winogrande: not here"):
        choose_items([gone], SOURCES, None)


def test_sums_are_means_of_subtasks_of_tasks_of_groups():
    def row(subtask, right):
        return {
            "subtask": subtask,
            "id": "",
            "bits": 2.0,
            "bytes": 1,
            "cut": False,
            "options": 4,
            "right": {"rc": right, "mc": 0},
        }

    chosen_tasks = [ChosenTask(task_of(n, []), []) for n in ("arc_easy", "boolq")]
    rows = {"arc_easy": [row("a", 1), row("a", 0), row("b", 1)], "boolq": [row("", 0)] * 2}
    found = summarise(chosen_tasks, rows, {}, RunSettings(), 64)
    assert found["tasks"]["arc_easy"]["score"] == 75 and found["tasks"]["boolq"]["score"] == 0
    assert found["groups"]["MC9"]["score"] == 37.5 == found["average"]["score"]
    assert found["tasks"]["arc_easy"]["error"] == pytest.approx(
        100 * math.sqrt(1 / 4 / 2 + 2 / 9) / 2
    )  # p is (1 + 1) / 4 of two, (1 + 1) / 3 of one
    assert found["groups"]["MC9"]["bits_per_byte"] == 2


def test_chance_is_seldom_called_better_than_chance():
    """100 tasks of 200 guesses in two forms; at most 2.5 % would be called so, 8 at odds of 1 in
    500 that this test fails."""
    rng, called = np.random.default_rng(0), 0
    for _ in range(100):
        rows = [
            {
                "subtask": "",
                "id": "",
                "bits": 1.0,
                "bytes": 1,
                "cut": False,
                "options": 4,
                "right": {"rc": int(a), "mc": int(b)},
            }
            for a, b in rng.random((200, 2)) < 0.25
        ]
        found = summarise(
            [ChosenTask(task_of("boolq", []), [], 0.25)], {"boolq": rows}, {}, RunSettings(), 64
        )
        called += found["tasks"]["boolq"]["above_chance"]
    assert called <= 8
    rows = [r | {"right": {"rc": 1, "mc": 0}} for r in rows]
    found = summarise(
        [ChosenTask(task_of("boolq", []), [], 0.25)], {"boolq": rows}, {}, RunSettings(), 64
    )
    assert found["tasks"]["boolq"]["above_chance"]


def test_chance_of_a_closed_set_of_answers_is_its_commonest_one():
    """In every subtask; answers that all differ cannot be guessed."""
    items = [
        Item(f"{s}{i}", s, references=(a,))
        for s, answers in (("a", ["yes", "Yes", "no"]), ("b", ["1", "2", "3", "4"]))
        for i, a in enumerate(answers)
    ]
    for limit in (1, None):
        (chosen,), _ = choose_items([task_of("bbh", items, "answer")], SOURCES, limit)
        assert chosen.chance == pytest.approx((2 / 3 + 0) / 2)
    (chosen,), _ = choose_items([task_of("mbpp", code_items(), "code")], SOURCES, None)
    assert chosen.chance == 0


def test_chance_of_options_is_an_even_guess_or_always_the_same_place():
    def chance(golds, count):
        choices = [Choices(("q",) * count, tuple("abcd"[:count]), g) for g in golds]
        items = [Item(f"{i}", "", {"rc": c, "mc": c}) for i, c in enumerate(choices)]
        return choose_items([task_of("boolq", items)], SOURCES)[0][0].chance

    assert chance([0, 0, 1, 0], 2) == 0.75
    assert chance([0, 1, 1, 0], 2) == 0.5
    assert chance([0, 1, 2], 4) == pytest.approx(1 / 3)


def test_answers_that_suit_any_question_are_not_above_chance():
    """A word that is in every reference scores, and as much on other questions."""
    items = [Item(f"{i}", references=(f"the cells {WORDS[i]}",)) for i in range(10)]
    for answer, is_above in (("cells", False), ("{}", True)):
        texts = [answer.format(WORDS[i]) for i in range(10)]
        rows = [
            {
                "subtask": "",
                "id": i.id,
                "bits": 1.0,
                "bytes": 1,
                "cut": False,
                "text": t,
                "score": token_f1(t, i.references),
            }
            for i, t in zip(items, texts, strict=True)
        ]
        found = summarise(
            [ChosenTask(task_of("squad", items, "answer"), items, 0.0)],
            {"squad": rows},
            {},
            RunSettings(),
            64,
        )["tasks"]["squad"]
        assert found["above_chance"] == is_above and found["score"] > 50
        assert found["chance"] == pytest.approx(0 if is_above else found["score"])


def test_a_run_of_some_tasks_is_not_called_whole(opened, tmp_path, tasks):
    results = run_suite(*opened, tasks, SOURCES, tmp_path, RunSettings())
    assert not results["average"]["is_whole"]
    assert (results["groups"]["Gen5"]["of"], results["groups"]["Gen5"]["read"]) == (5, 1)


def test_an_equal_option_is_as_right_as_the_right_one(opened, tmp_path):
    item = choice_items(2)[1]  # its gold is the second
    same = {f: replace(c, options=(c.options[1],) * len(c.options)) for f, c in item.forms.items()}
    run_suite(
        *opened,
        [task_of("arc_easy", [replace(item, forms=same)])],
        SOURCES,
        tmp_path,
        RunSettings(),
    )
    assert lines(tmp_path, "arc_easy")[0]["right"] == {"rc": 1, "mc": 1}


def test_answers_shorter_than_asked_are_told(opened, tmp_path):
    task = task_of("squad", written_items(2), "answer", max_new_tokens=300)
    reader = replace(opened[0])
    reader.max_seq_len = 40
    results = run_suite(reader, opened[1], [task], SOURCES, tmp_path, RunSettings())
    found = results["tasks"]["squad"]
    assert (found["new_tokens"], found["asked_new_tokens"]) == (20, 300)


def test_programs_run_only_when_asked_and_are_judged_by_their_tests(monkeypatch):
    task, items = task_of("mbpp", code_items(), "code"), code_items()
    scorer = SimpleNamespace(
        reader=SimpleNamespace(max_seq_len=64),
        log_likelihoods=lambda pairs: [SimpleNamespace(log_prob=-1.0, is_cut=False)] * len(pairs),
        continuations=lambda prompts, *_: [("pass\n", True)] * len(prompts),
    )
    ran = []
    monkeypatch.setattr(
        answers,
        "run_programs",
        lambda programs, *_, tests, **__: [
            ran.append(p) or SimpleNamespace(passed="is None" in t, reason="?")
            for p, t in zip(programs, tests, strict=True)
        ],
    )
    rows = answers.score_items(scorer, task, items, RunSettings())
    assert not ran and "score" not in rows[0]
    assert not rows[0]["cut"]
    rows = answers.score_items(scorer, task, items, RunSettings(run_code=True, samples=10))
    assert rows[0]["cut"]
    assert [r["score"] for r in rows] == [1, 0] and [r["pass@10"] for r in rows] == [1, 0]
    assert ran[0] == "def f():\n    pass\n"


def test_two_runs_do_not_write_into_one_directory(opened, tmp_path, tasks):
    with (
        hold_lock(tmp_path / "lock", wait=False),
        pytest.raises(FlexOlmoError, match="Another run is at work"),
    ):
        run_suite(*opened, tasks, SOURCES, tmp_path, RunSettings())
    assert not (tmp_path / "run.json").exists()
    run_suite(*opened, tasks[:1], SOURCES, tmp_path, RunSettings())


# --- comparing ------------------------------------------------------------------------------------


def test_a_comparison_is_of_the_summed_up_scores_on_the_items_of_both(
    opened, house, tmp_path, tasks
):
    anchor = open_reader(house.mixture_dir(NAMES, "rich"), house.trusted, only=[])
    found = {
        name: run_suite(*model, tasks, SOURCES, tmp_path / name, RunSettings())
        for name, model in (("a", anchor), ("b", opened))
    }
    both = compare_runs(tmp_path / "a", tmp_path / "b", draws=200)
    for kind, scored in (
        ("score", ("arc_easy", "squad")),
        ("bits_per_byte", ("arc_easy", "squad", "mbpp")),
    ):
        entries, groups = both[kind]["levels"]
        assert set(entries) == set(scored)
        for run, results in found.items():
            for name in scored:
                assert entries[name][run] == pytest.approx(results["tasks"][name][kind])
            for name, entry in groups.items():
                assert entry[run] == pytest.approx(results["groups"][name][kind])
            assert both[kind]["overall"][run] == pytest.approx(results["average"][kind])
    assert both["items"]["arc_easy"] == {"compared": 9, "in_one": 0}
    same = compare_runs(tmp_path / "a", tmp_path / "a", draws=200)
    assert same["score"]["overall"]["difference"] == 0 and same["score"]["overall"]["p"] == 1


def test_runs_of_different_items_are_compared_on_those_of_both(opened, tmp_path, tasks):
    run_suite(*opened, tasks[:1], SOURCES, tmp_path / "few", RunSettings(limit=2))
    run_suite(*opened, tasks[:1], SOURCES, tmp_path / "all", RunSettings())
    found = compare_runs(tmp_path / "few", tmp_path / "all", draws=200)
    assert found["items"]["arc_easy"] == {"compared": 4, "in_one": 5}
    with pytest.raises(DataError, match="no item in common"):
        compare_runs(tmp_path / "few", tmp_path / "nowhere")


def test_a_limit_of_a_task_goes_before_the_limit_of_all():
    found = parse_limits(["5", "bbh=1", "Code4=2", "mbpp=3"])
    assert found["limit"] == 5 and found["limits"]["humaneval"] == 2
    assert (found["limits"]["bbh"], found["limits"]["mbpp"]) == (1, 3)
    tasks = [task_of("bbh", choice_items()), task_of("arc_easy", choice_items(12))]
    chosen_tasks, _ = choose_items(tasks, SOURCES, **found)
    assert [len(j.items) for j in chosen_tasks] == [2, 10]  # two subtasks each
    assert parse_limits(["5,bbh=1"]) == {"limit": 5, "limits": {"bbh": 1}}
    for word in ("", "1" * 5000, "0", "x", "bbh=", "bbh=0", "nosuch=3", "-1", "1.5"):
        with pytest.raises(ConfigError):
            parse_limits([word])
