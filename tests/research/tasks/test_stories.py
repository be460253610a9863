"""News and poems from held-out documents, and what is made of them."""

from types import SimpleNamespace

import pytest

from flexolmo.errors import SourceUnavailable
from flexolmo.research.tasks import run as room
from flexolmo.research.tasks import stories
from flexolmo.research.tasks.answers import judge_story, score_items
from flexolmo.research.tasks.judge import Verdict
from flexolmo.research.tasks.selection import ChosenTask, RunSettings
from flexolmo.research.tasks.sources import Sources
from flexolmo.research.tasks.suite import TASKS
from flexolmo.research.tasks.summary import summarise

NEWSG = next(t for t in TASKS if t.name == "newsg")


@pytest.fixture
def texts(monkeypatch):
    """Documents by role and split, in place of a prepared set's."""

    def give(**found):
        monkeypatch.setattr(
            stories, "_texts", lambda _, role, split: enumerate(found.get(f"{role}_{split}", []))
        )
        return Sources()

    return give


def test_an_article_is_cut_after_32_words_and_after_128(texts):
    long = " ".join(f"w{i}" for i in range(200))
    items = stories.news_items(
        texts(news_heldout=["too short", long, "\n\n".join(f"v{i} " for i in range(64))])
    )
    assert [i.id for i in items] == ["1", "2"]
    first, second = items
    assert first.prompt == " ".join(f"w{i}" for i in range(32))
    assert (first.prompt + first.gold_text).split() == [f"w{i}" for i in range(128)]
    assert second.prompt.endswith("\n\nv31") and second.gold_text.startswith(" \n\nv32")


def test_poems_are_verses_of_the_right_length_after_five_whole_ones(texts):
    verse = "\n".join(f"line {i} of eight words that is enough" for i in range(10))  # 80 words
    prose = "a very long line of prose that is no verse at all, as anyone can see " * 5
    halves = "\n\n".join([verse.split("\n", 5)[5], *["\n".join(verse.split("\n")[:5])]])
    train = [verse.replace("line", f"train{i}") for i in range(7)]
    items = stories.poem_items(
        texts(
            poems_train=train,
            poems_heldout=[
                f"{prose}\n\n{verse}\n\n{prose}",
                halves,
                "\n".join(["too long a poem"] * 60),
            ],
        )
    )
    assert [i.id for i in items] == ["0-0", "1-0"]
    assert items[0].prompt.count("\n\n\n") == 5 and "train5" not in items[0].prompt
    assert items[0].prompt.endswith("\n".join(verse.split("\n")[:4]))
    assert items[0].prompt.split("\n\n\n")[-1] + items[0].gold_text == verse


def test_items_come_from_held_out_documents_and_are_known_by_their_digest(pico_set_dirs):
    sources = Sources(prepared={"news": pico_set_dirs["news"]})
    found = {text for _, text in stories._texts(sources, "news", "heldout")}
    train = {text for _, text in stories._texts(sources, "news", "train")}
    assert found and train and not found & train and sources.digests["news"].startswith("sha256:")
    with pytest.raises(SourceUnavailable, match="--poems"):
        stories.poem_items(sources)


def written(judge_url, monkeypatch, verdicts):
    items = [
        stories.Item(
            f"{i}",
            prompt="p",
            gold_text=" a b c d",
            references=(" a b c d",),
            more={"start": "p", "quality": "journalistic"},
        )
        for i in range(2)
    ]
    scorer = SimpleNamespace(
        reader=SimpleNamespace(max_seq_len=64),
        log_likelihoods=lambda pairs: [SimpleNamespace(log_prob=-1.0, is_cut=False)] * len(pairs),
        continuations=lambda prompts, *_: [(" a b", False)] * len(prompts),
    )
    said = iter(verdicts)
    monkeypatch.setattr(
        room, "EndpointJudge", lambda *_, **__: SimpleNamespace(judge=lambda text: next(said))
    )
    settings = RunSettings(judge_url=judge_url, judge_model="m")
    rows, judges = score_items(scorer, NEWSG, items, settings), room._judges(settings)
    if judges:
        rows = [row | judge_story(item, row, judges) for row, item in zip(rows, items, strict=True)]
    found = summarise([ChosenTask(NEWSG, items)], {"newsg": rows}, {}, settings, 64)
    return rows, found["tasks"]["newsg"], found["groups"]["NewsG"]


def test_without_a_judge_there_is_no_score_but_a_labelled_stand_in(monkeypatch):
    rows, task, group = written(None, monkeypatch, [])
    assert rows[0]["texts"] == [" a b"] * 5 and task["score"] is None and group["score"] is None
    assert task["rouge_l"] == pytest.approx(100 * 2 / 3) and "no judge; ROUGE-L" in task["why"]


def test_a_judge_s_points_are_averaged_and_what_it_did_not_judge_is_counted(monkeypatch):
    best, worst = Verdict(2, 2, 1), Verdict(0, 0, 0)
    rows, task, group = written(
        "http://localhost:1/v1", monkeypatch, [best, best, None, worst, worst] + [None] * 5
    )
    assert rows[0]["score"] == 0.5 and rows[0]["judged"] == 4 and "score" not in rows[1]
    assert task["score"] == 50 == group["score"] and task["unjudged"] == 1
