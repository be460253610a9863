"""Our scorer against lm-evaluation-harness's own `hf` model: multiple-choice items per second.

Of the mini study's mixture with the paper's experts (seven owners, two active), exported to stock
transformers: the same weights for both, one after the other in turn, on the same items, in the
same batch size. Then our default mixture, which stock transformers cannot hold. Medians and
ratios of process time, since the machine may be shared.

    .venv/bin/python benchmarks/scoring.py --study runs/study-mini [--items 64] [--rounds 5]
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from flexolmo.evaluation.scorer import Scorer
from flexolmo.inference.reader import OwnReader
from flexolmo.merge.export import export_stock, router_rows, with_stock_router
from flexolmo.merge.mixture import LoadedMixture
from flexolmo.research.study.method import open_method
from flexolmo.research.tasks.selection import prepare_jobs
from flexolmo.research.tasks.sources import Sources
from flexolmo.research.tasks.suite import choose_tasks

TASKS = (("arc_easy", "rc"), ("hellaswag", "rc"), ("mmlu", "rc"), ("mmlu", "mc"))
BATCH_SIZE = 32


def main() -> None:
    """Print one JSON line for each task and form."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--study", type=Path, required=True, help="a finished mini study")
    parser.add_argument("--items", type=int, default=64, help="items of each task")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    logging.disable(logging.WARNING)
    now = time.process_time if asked.threads == 1 else time.perf_counter
    paper, _ = open_method(asked.study, "flexolmo_paper")
    default, _ = open_method(asked.study, "flexolmo_default")
    model = with_stock_router(paper.model, router_rows(paper.model))
    with tempfile.TemporaryDirectory() as directory:
        export_stock(
            LoadedMixture(model, paper.tokenizer, {}, {}), model, Path(directory) / "hf", {}
        )
        stock = HFLM(
            pretrained=str(Path(directory) / "hf"),
            batch_size=BATCH_SIZE,
            device="cpu",
            dtype="float32",
        )
    same = OwnReader(model, paper.tokenizer)
    same.start = []  # the harness puts nothing before a text
    jobs, _ = prepare_jobs(choose_tasks([t for t, _ in TASKS]), Sources(), None)
    items = {j.task.name: sorted(j.items, key=lambda i: i.id)[: asked.items] for j in jobs}
    for task, form in TASKS:
        pairs = [
            p
            for i in items[task]
            for p in zip(i.forms[form].contexts, i.forms[form].options, strict=True)
        ]
        requests = [Instance("loglikelihood", {}, p, n) for n, p in enumerate(pairs)]
        runs = {
            "hf": lambda r=requests: [s for s, _ in stock.loglikelihood(r, disable_tqdm=True)],
            "same": lambda p=pairs: [
                s.log_prob for s in Scorer(same, BATCH_SIZE).log_likelihoods(p)
            ],
            "default": lambda p=pairs: [
                s.log_prob for s in Scorer(default, BATCH_SIZE).log_likelihoods(p)
            ],
        }
        said = {name: run() for name, run in runs.items()}
        off = max(abs(a - b) for a, b in zip(said["hf"], said["same"], strict=True))
        assert off < 0.05, f"the two do not compute the same: {off}"
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(asked.rounds):
            for name, run in runs.items():
                start = now()
                run()
                seconds[name].append(now() - start)
        ratio = {
            n: statistics.median(h / o for h, o in zip(seconds["hf"], seconds[n], strict=True))
            for n in ("same", "default")
        }
        print(
            json.dumps(
                {
                    "task": task,
                    "form": form,
                    "items": len(items[task]),
                    "requests": len(pairs),
                    "items_per_second": {
                        n: round(len(items[task]) / statistics.median(s), 1)
                        for n, s in seconds.items()
                    },
                    "times_hf": {n: round(r, 2) for n, r in ratio.items()},
                    "largest_difference_nats": round(off, 5),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
