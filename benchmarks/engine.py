"""Our serving engine against stock transformers' `generate` and our own loop, on the same texts.

All read the same prompts and write the likeliest tokens, on one thread: the engine with a linear
router (stock's mixture), with the evidence router that chooses as many experts, and on our default
mixture of whole models; with the same experts on for every text, and with sets that differ. Stock
runs with the better of its two ways to run experts, and its answers are compared. Beside the
ratios stands the floor of a step of one text: the time to read its weights once from memory.

    .venv/bin/python benchmarks/engine.py                          # S and M, a quarter of an hour
    .venv/bin/python benchmarks/engine.py --sizes S --batches 16 --rounds 3 --out engine.json
"""

import argparse
import gc
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from read_and_write import IMPLEMENTATIONS
from shapes import (
    LINEAR,
    NUM_EXPERTS,
    load_stock,
    made_texts,
    make_anchor,
    make_mixture,
    owner_names,
)
from speed import rounded
from timing import Run, Turns
from torch import Tensor

from flexolmo.bundle.terms import Terms
from flexolmo.files import read_json, write_json
from flexolmo.inference.batching import BatchEngine, EngineSettings
from flexolmo.inference.decode import Request, decode
from flexolmo.inference.engine import (
    Ended,
    EngineRequest,
    Event,
    ExpertFacts,
    ModelFacts,
    TokenWritten,
)
from flexolmo.inference.reader import OwnReader
from flexolmo.inference.sampling import Sampling
from flexolmo.inference.stepping import EngineModel
from flexolmo.model.moe import MixtureModel
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.progress import progress
from flexolmo.research.study.cost import mixture_flops
from flexolmo.runtime import keep_memory, software_versions, source_commit

RESULTS = Path(__file__).parent / "results" / "serving.json"
PROMPT_TOKENS = 128
NEW_TOKENS = 32
KIND = "benchmark"


def open_engine(size: str, model: MixtureModel) -> BatchEngine:
    """An engine on a mixture in memory."""
    terms = Terms.model_construct()
    experts = {n: ExpertFacts(n, n, n, 1, "MIT", terms) for n in model.expert_names[1:]}
    c = model.config
    facts = ModelFacts(KIND, experts, c.max_seq_len, c.vocab_size, [c.eos_token_id])
    loaded = EngineModel(model, make_anchor(size).tokenizer, facts, KIND)
    return BatchEngine(lambda: loaded, EngineSettings(memory_bytes=1 << 28))


class Answer:
    """Tokens of one request, as the engine says them."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.is_over = threading.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, TokenWritten):
            self.tokens.append(event.token)
        elif isinstance(event, Ended):
            assert event.reason == "max_new_tokens", event
            self.is_over.set()


class Writers:
    """Everyone who writes, and what each wrote last. Texts differ from round to round, as an
    engine finds what it has read before."""

    def __init__(self, size: str, batch: int):
        self.size, self.batch = size, batch
        self.answers: dict[str, list[list[int]]] = {}
        self.rounds: dict[str, int] = {}

    def run(self, name: str, write: Callable[[Tensor], list[list[int]]]) -> Run:
        """One who writes, called `name`."""

        def prepare() -> Callable[[], object]:
            self.rounds[name] = self.rounds.get(name, 0) + 1
            texts = made_texts(self.size, self.batch, PROMPT_TOKENS, self.rounds[name])

            def work() -> None:
                self.answers[name] = write(texts)

            return work

        return prepare


def write_by_engine(
    engine: BatchEngine, sets: Sequence[Sequence[str]]
) -> Callable[[Tensor], list[list[int]]]:
    """Writing by the engine with these experts on for each text."""
    sampling = Sampling(temperature=0, max_new_tokens=NEW_TOKENS)

    def write(texts: Tensor) -> list[list[int]]:
        answers = [Answer() for _ in texts]
        for ids, enabled, answer in zip(texts.tolist(), sets, answers, strict=True):
            engine.submit(EngineRequest(tuple(ids), frozenset(enabled), KIND, sampling), answer)
        for answer in answers:
            answer.is_over.wait()
        return [answer.tokens for answer in answers]

    return write


def write_by_loop(reader: OwnReader) -> Callable[[Tensor], list[list[int]]]:
    """Writing by `decode`, whose texts begin and end together."""

    def write(texts: Tensor) -> list[list[int]]:
        sampling = Sampling(temperature=0, max_new_tokens=NEW_TOKENS)
        found: list[list[int]] = [[] for _ in texts]
        for step in decode(reader, [Request(ids, sampling) for ids in texts.tolist()]):
            if step.token is not None:
                found[step.text].append(step.token)
        return found

    return write


def write_by_stock(stock: Any, implementation: str) -> Callable[[Tensor], list[list[int]]]:
    """Writing by stock's `generate`."""

    def write(texts: Tensor) -> list[list[int]]:
        stock.set_experts_implementation(implementation)
        found: Tensor = stock.generate(
            texts,
            attention_mask=torch.ones_like(texts),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            pad_token_id=0,
            eos_token_id=None,
        )
        return found[:, texts.shape[1] :].tolist()

    return write


def measure(size: str, batches: Sequence[int], rounds: int) -> Iterator[tuple[int, Any]]:
    """Records of one size, with the batch of each."""
    linear = make_mixture(size, LINEAR, "ffn", top_k=2)
    evidence = make_mixture(size, EvidenceSettings(min_weight=0.0), "ffn", top_k=2)
    stock = load_stock(size, linear)
    engines = {
        "linear": open_engine(size, linear),
        "evidence": open_engine(size, evidence),
        "default": open_engine(size, make_mixture(size, EvidenceSettings(), "all")),
    }
    reader = OwnReader(linear, make_anchor(size).tokenizer, has_panels=True)
    owners = owner_names()
    for batch in batches:
        writers = Writers(size, batch)
        all_on = [owners] * batch
        mixed = [[o for o in owners if o != owners[i % len(owners)]] for i in range(batch)]
        runs = {name: write_by_engine(engine, all_on) for name, engine in engines.items()}
        runs["mixed"] = write_by_engine(engines["linear"], mixed)
        runs["loop"] = write_by_loop(reader)
        runs |= {i: write_by_stock(stock, i) for i in IMPLEMENTATIONS}
        turns = Turns({name: writers.run(name, write) for name, write in runs.items()}, rounds)
        best = min(IMPLEMENTATIONS, key=turns.median)
        same = [writers.answers["linear"][i] == writers.answers[best][i] for i in range(batch)]
        yield (
            batch,
            turns.record(
                vs_stock={n: turns.ratio(best, n) for n in (*engines, "loop")},
                mixed_sets_cost=turns.ratio("mixed", "linear") - 1,
                stock=best,
                answers_equal=sum(same) / batch,
                floor_ms=1000 * NEW_TOKENS * step_bytes(linear) / turns.bytes_per_second,
            ),
        )
    for engine in engines.values():
        engine.close(0)


def step_bytes(model: MixtureModel) -> float:
    """Bytes of the weights that one token needs, whichever experts it chose."""
    assert model.top_k is not None
    shares = [model.top_k / NUM_EXPERTS] * NUM_EXPERTS
    public, *owners = shares
    numbers = mixture_flops(model.config, model.shapes.values(), owners, public) / 2
    return numbers * model.lm_head.weight.element_size()


def main() -> None:
    """Measure, and put each result beside the other figures of serving at once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["S", "M"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    keep_memory()  # as our commands do; stock has it too
    about = {
        "command": shlex.join(["python", "benchmarks/engine.py", *sys.argv[1:]]),
        "commit": source_commit(),
        "cpu_count": os.cpu_count(),
        "software": software_versions(),
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "threads": 1,
    }
    with progress("engine", len(asked.sizes) * len(asked.batches), "cases") as meter:
        for size in asked.sizes:
            for batch, record in measure(size, asked.batches, asked.rounds):
                record |= about | {"load": os.getloadavg()[1]}
                held = read_json(asked.out, ValueError) if asked.out.exists() else {}
                throughput = held.get("throughput", {})
                sizes = {size: throughput.get(size, {}) | {str(batch): rounded(record)}}
                write_json(asked.out, held | {"throughput": throughput | sizes})
                meter.advance(note=f"{size}, {batch}")
            gc.collect()


if __name__ == "__main__":
    main()
