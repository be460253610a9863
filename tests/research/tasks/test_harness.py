"""lm-evaluation-harness on the same questions: its engine is the oracle of ours."""

import json
import os

import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from flexolmo.errors import ConfigError
from flexolmo.evaluation.scorer import Scorer
from flexolmo.inference.reader import StockReader, open_reader
from flexolmo.model.checkpoint import save_anchor
from flexolmo.research.tasks.harness import HarnessModel, run_harness
from made_harness import brief_harness, harness_task, manager
from made_items import choice_items, task_of, written_items
from made_mixtures import NAMES

__all__ = ["brief_harness"]


@pytest.fixture(scope="module")
def stock_dir(pico_anchor, tmp_path_factory):
    """A stock model directory."""
    where = tmp_path_factory.mktemp("stock") / "model"
    save_anchor(pico_anchor, where)
    return where


def answers(model, tasks):
    """What the harness makes of a model: by task, responses and results."""
    found = simple_evaluate(model, tasks=tasks, task_manager=manager(), bootstrap_iters=0)
    return found["samples"], found["results"]


def test_scores_are_the_harness_s_item_by_item(stock_dir):
    """Both forms of choices, and greedy answers; of a stock model, so that both read one thing."""

    def tasks():
        return [
            harness_task(task_of("arc_easy", []), choice_items(), "rc"),
            harness_task(task_of("boolq", []), choice_items(), "mc"),
            harness_task(task_of("squad", [], "answer"), written_items()),
        ]

    reader = StockReader.open(stock_dir, torch.device("cpu"))
    ours, our_results = answers(HarnessModel(reader, batch_size=3), tasks())
    theirs, their_results = answers(
        HFLM(pretrained=str(stock_dir), batch_size=4, device="cpu", dtype="float32"), tasks()
    )
    assert our_results == their_results
    for name, samples in theirs.items():
        for mine, his in zip(ours[name], samples, strict=True):
            for a, b in zip(mine["resps"], his["resps"], strict=True):
                if isinstance(b[0], str):
                    assert a == b
                else:
                    assert a[0][0] == pytest.approx(b[0][0], abs=1e-3) and a[0][1] == b[0][1]


def test_a_task_of_the_harness_runs_on_a_mixture_without_an_expert(house, trust_dir):
    task = harness_task(task_of("arc_easy", []), choice_items())
    found = [
        answers(
            HarnessModel(str(house.mixture_dir(*which)), trust=str(trust_dir), without=off), [task]
        )[0]
        for which, off in (
            ((NAMES, "rich"), "basalt"),
            ((("amber", "zinc"), "rich"), ""),
            ((NAMES, "rich"), ""),
        )
    ]
    resps = [[s["resps"] for s in f["flexolmo_arc_easy"]] for f in found]
    assert resps[0] == resps[1] != resps[2]


def test_whole_texts_are_scored_as_the_harness_does(stock_dir):
    from lm_eval.api.instance import Instance

    texts = ["one two three four five " * n for n in (1, 3, 40)]
    requests = [Instance("loglikelihood_rolling", {}, (t,), i) for i, t in enumerate(texts)]
    theirs = HFLM(pretrained=str(stock_dir), batch_size=1, device="cpu", dtype="float32")
    reader = StockReader.open(stock_dir, torch.device("cpu"))
    for a, b in zip(
        HarnessModel(reader).loglikelihood_rolling(requests),
        theirs.loglikelihood_rolling(requests),
        strict=True,
    ):
        assert a == pytest.approx(b, rel=1e-5)
    assert len(reader.tokenizer.encode(texts[-1])) > reader.max_seq_len


def test_a_user_s_own_task_runs_and_an_unknown_one_is_named(house, tmp_path):
    rows = [
        {"q": "What comes after one?", "o": ["two", "ten"], "g": 0},
        {"q": "After two?", "o": ["nine", "three"], "g": 1},
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: '{tmp_path}/mine.jsonl'}}}}\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{o}}"\ndoc_to_target: "{{g}}"\n'
        "metric_list: [{metric: acc}]\n"
    )
    reader, _ = open_reader(house.mixture_dir(NAMES, "rich"), house.trusted, without=["zinc"])
    found = run_harness(reader, ["mine"], tmp_path)
    scores = [Scorer(reader).log_likelihoods([(r["q"], f" {o}") for o in r["o"]]) for r in rows]
    right = [
        max(s, key=lambda x: x.log_prob) is s[r["g"]] for s, r in zip(scores, rows, strict=True)
    ]
    assert found["mine"]["acc,none"] == sum(right) / 2
    with pytest.raises(ConfigError, match="no task nosuch;"):
        run_harness(reader, ["mine", "arc_easy", "nosuch"], tmp_path)  # theirs are known as well
