"""All timings of FlexOlmo in one command: training, reading, writing, router, start and data.

Each is set against what users have (stock transformers, upstream's way to train, the anchor alone)
and against the ceilings of the machine, taken in the same run: fp32 matrix products and memory
bandwidth. What is compared runs in turn (A B C A B C); ratios are medians of the paired ratios, in
seconds of this process on one thread (others may use the machine), of the clock on more.

    .venv/bin/python benchmarks/speed.py                  # hours: S, M and L on one and two threads
    .venv/bin/python benchmarks/speed.py --resume         # goes on where a run was stopped
    .venv/bin/python benchmarks/speed.py --table          # the results as Markdown
    .venv/bin/python benchmarks/speed.py --sizes S --parts prefill,decode --out a.json

B batch, T positions, E experts, V vocabulary.
"""

import argparse
import copy
import functools
import gc
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import (
    EOS,
    LINEAR,
    SIZES,
    chosen_experts,
    load_stock,
    made_texts,
    make_anchor,
    make_mixture,
    owner_names,
    shares_chosen,
)
from speed_table import markdown_table
from torch import Tensor

from flexolmo.files import read_json, write_json
from flexolmo.inference.decode import Request, Sampling, decode
from flexolmo.inference.reader import OwnReader, spread
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import mixture_weights
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.model.transformer import ModelConfig
from flexolmo.progress import progress
from flexolmo.research.study.cost import dense_flops, mixture_flops
from flexolmo.runtime import software_versions, source_commit

Run = Callable[[], Callable[[], object]]  # prepares, untimed, and returns the work to time
Record = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "speed.json"
PARTS = ("start", "data", "training", "prefill", "decode", "router", "low_rank")
PREFILL_SHAPES = ((1, 512), (4, 512), (1, 128), (16, 64))
DECODE_BATCHES = (1, 16, 64)
PROMPT_TOKENS = 128
NEW_TOKENS = 16
RANKS = (4, 8, 16, 32)
GEMM_WIDTH = 2048
STREAM_BYTES = 2**29  # larger than what is kept of it in a cache


# --- timing -------------------------------------------------------------------------------------


def clock() -> float:
    """Seconds of this process, whatever else the machine does; on more threads, of the clock."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def time_run(run: Run) -> float:
    """Seconds of one run's work."""
    work = run()
    with torch.inference_mode():
        start = clock()
        work()
        return clock() - start


def in_turn(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, one after the other, after one untimed round."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            seconds = time_run(run)
            if i:
                found[name].append(seconds)
    return found


def fastest(runs: Mapping[str, Run]) -> str:
    """Name of the run that takes least time: the better of two, after an untimed one."""
    seconds = in_turn(runs, 2)
    return min(seconds, key=lambda name: min(seconds[name]))


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median of the paired ratios of two runs' seconds."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


@functools.cache
def _gemm_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(GEMM_WIDTH, GEMM_WIDTH), torch.randn(GEMM_WIDTH, GEMM_WIDTH)


@functools.cache
def _stream() -> Tensor:
    return torch.ones(STREAM_BYTES // 4096, 1024)


def ceilings() -> dict[str, Run]:
    """Runs of a square product in fp32, and of a matrix in memory times a vector."""
    a, b = _gemm_inputs()
    return {"gemm": lambda: lambda: a @ b, "stream": lambda: lambda: _stream() @ a[0, :1024]}


def measured(seconds: Mapping[str, Sequence[float]]) -> Record:
    """Ceilings of the machine and milliseconds of each run, medians."""
    middle = {name: statistics.median(s) for name, s in seconds.items()}
    return {
        "gemm_gflops": 2e-9 * GEMM_WIDTH**3 / middle["gemm"],
        "bandwidth_gb_per_second": 1e-9 * STREAM_BYTES / middle["stream"],
        "milliseconds": {n: 1000 * s for n, s in middle.items() if n not in ("gemm", "stream")},
    }


# --- what is compared ---------------------------------------------------------------------------


@dataclass
class Models:
    """Models of one kind and size: ours, what they are compared with, and by what name."""

    size: str
    ours: OwnReader
    other: OwnReader  # the same experts under the evidence router, or the anchor
    stock: Any = None  # in transformers

    @property
    def model(self) -> MixtureModel:
        model = self.ours.model
        assert isinstance(model, MixtureModel)
        return model


@functools.lru_cache(maxsize=1)
def build(size: str, kind: str) -> Models:
    """`top2`, `top4`: whole FFN experts under a linear router, and stock's; `default`: ours."""
    anchor = make_anchor(size)

    def reader(model: Any) -> OwnReader:
        return OwnReader(model, anchor.tokenizer)

    if kind == "default":
        mixture = make_mixture(size, EvidenceSettings(), "all")
        return Models(size, reader(mixture), reader(anchor.model))
    top_k = int(kind.removeprefix("top"))
    linear = make_mixture(size, LINEAR, "ffn", top_k=top_k)
    evidence = make_mixture(size, EvidenceSettings(min_weight=0.0), "ffn", top_k=top_k)
    return Models(size, reader(linear), reader(evidence), load_stock(size, linear))


def with_head_once(config: ModelConfig, length: int) -> ModelConfig:
    """The configuration whose costs a token are those of a text that needs only its last
    position's logits."""
    return config.model_copy(update={"vocab_size": max(1, config.vocab_size // length)})


def flops(model: MixtureModel, config: ModelConfig, shares: Sequence[float]) -> float:
    """FLOPs a token if each expert, public first, is chosen at this share of positions."""
    return mixture_flops(config, model.shapes.values(), shares[1:], shares[0])


def assert_same(ours: Tensor, stock: Tensor) -> float:
    """Largest difference of logits [B,T,V]; AssertionError unless they are the same. Where two
    experts are all but equally likely, rounding may choose another: at few positions."""
    apart = (ours - stock).abs().amax(-1).flatten()
    assert float(apart.quantile(0.95)) < 1e-3, f"logits differ by up to {float(apart.max())}"
    return float(apart.max())


# --- reading ------------------------------------------------------------------------------------


def read_run(reader: OwnReader, ids: Tensor) -> Run:
    """Reading `ids` [B,T] into a new state, as far as the logits of the last position."""

    def prepare() -> Callable[[], object]:
        state = spread(reader.new_state(), len(ids))
        return lambda: reader.read(ids, state, last=1)

    return prepare


def stock_read_run(stock: Any, implementation: str, ids: Tensor) -> Run:
    def prepare() -> Callable[[], object]:
        stock.set_experts_implementation(implementation)
        return lambda: stock(ids, use_cache=True, logits_to_keep=1)

    return prepare


def time_prefill_against_stock(size: str, kind: str, shape: tuple[int, int], rounds: int) -> Record:
    """Our linear mixture against the same in stock and against the same experts under the evidence
    router, which chooses as many."""
    models, ids = build(size, kind), made_texts(size, *shape)
    config = with_head_once(models.model.config, shape[1])
    with torch.inference_mode():
        state = spread(models.ours.new_state(), len(ids))
        read = models.ours.read(ids, state, last=shape[1])
        apart = assert_same(read, models.stock(ids).logits)
        del read, state
    theirs = {i: stock_read_run(models.stock, i, ids) for i in ("eager", "grouped_mm")}
    best = fastest(theirs)
    seconds = in_turn(
        {
            "ours": read_run(models.ours, ids),
            "stock": theirs[best],
            "evidence": read_run(models.other, ids),
            **ceilings(),
        },
        rounds,
    )
    found = measured(seconds)
    shares = shares_chosen(chosen_experts(models.model, ids))
    rate = ids.numel() * flops(models.model, config, shares) / statistics.median(seconds["ours"])
    return found | {
        "vs_stock": ratio(seconds["stock"], seconds["ours"]),
        "pct_gemm": 100e-9 * rate / found["gemm_gflops"],
        "evidence_vs_linear": ratio(seconds["evidence"], seconds["ours"]),
        "stock": best,
        "largest_difference": apart,
    }


def time_prefill_default(size: str, kind: str, shape: tuple[int, int], rounds: int) -> Record:
    """Our default mixture against the anchor, beside what FLOPs say."""
    models, ids = build(size, kind), made_texts(size, *shape)
    config = with_head_once(models.model.config, shape[1])
    seconds = in_turn(
        {
            "default": read_run(models.ours, ids),
            "anchor": read_run(models.other, ids),
            **ceilings(),
        },
        rounds,
    )
    shares = shares_chosen(chosen_experts(models.model, ids))
    expected = flops(models.model, config, shares) / dense_flops(config)
    times = ratio(seconds["default"], seconds["anchor"])
    return measured(seconds) | {
        "vs_anchor": times,
        "flops_vs_anchor": expected,
        "times_flops": times / expected,
    }


# --- writing ------------------------------------------------------------------------------------


class Written:
    """A batch of texts [B,P+N]: a prompt, and the tokens that every model is made to write.

    The likeliest token is looked for all the same. So all read the same, which routes as real text
    does; what random weights would write does not.
    """

    def __init__(self, size: str, batch: int):
        self.texts = made_texts(size, batch, PROMPT_TOKENS + NEW_TOKENS)
        self.texts[:, PROMPT_TOKENS:].clamp_(min=EOS + 1)  # a text that ends leaves the batch
        self.prompt = self.texts[:, :PROMPT_TOKENS]

    def next_tokens(self, step: int) -> list[int]:
        """Tokens [B] that follow the one read at `step`, from 0."""
        place = min(PROMPT_TOKENS + step + 1, self.texts.shape[1] - 1)
        return self.texts[:, place].tolist()

    def run(
        self, reader: OwnReader, enabled: list[list[str]] | None = None, is_sampled: bool = False
    ) -> Run:
        """NEW_TOKENS tokens of every text after the prompt, which is read once for all runs."""
        # the logits of random weights are about ten times flatter than a trained model's
        sampling = Sampling(temperature=0.1 if is_sampled else 0.0, max_new_tokens=NEW_TOKENS)
        requests = [
            Request([int(row[PROMPT_TOKENS])], sampling.model_copy(update={"seed": i}))
            for i, row in enumerate(self.texts)
        ]
        everyone = torch.arange(len(self.texts))
        with torch.inference_mode():
            alone = reader.new_state() if enabled is None else reader.new_state(enabled)
            state = spread(alone, len(self.texts)) if enabled is None else alone
            reader.read(self.prompt, state, last=1)

        def prepare() -> Callable[[], object]:
            with torch.inference_mode():
                own = state.select(everyone)
            steps = iter(range(NEW_TOKENS))

            def choose(logits: Tensor, numbers: Sequence[int]) -> list[int]:
                logits.argmax(-1).tolist()
                return self.next_tokens(next(steps))

            options = {} if is_sampled else {"choose": choose}
            return lambda: list(
                decode(reader, requests, state=own, held_tokens=PROMPT_TOKENS, **options)
            )

        return prepare

    def stock_run(self, stock: Any, implementation: str, cache_kind: str) -> Run:
        """The same by hand in transformers, after its own reading of the prompt."""
        from transformers import DynamicCache, StaticCache

        if cache_kind == "static":
            cache = StaticCache(config=stock.config, max_cache_len=PROMPT_TOKENS + NEW_TOKENS)
        else:
            cache = DynamicCache(config=stock.config)
        with torch.inference_mode():
            stock(self.prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

        def prepare() -> Callable[[], object]:
            stock.set_experts_implementation(implementation)
            own = copy.deepcopy(cache)

            def work() -> None:
                token = self.texts[:, PROMPT_TOKENS : PROMPT_TOKENS + 1]
                for step in range(NEW_TOKENS):
                    logits = stock(token, past_key_values=own, use_cache=True).logits
                    logits[:, -1].argmax(-1).tolist()
                    token = torch.tensor(self.next_tokens(step))[:, None]

            return work

        return prepare

    def touched(self, model: MixtureModel) -> tuple[float, float]:
        """FLOPs a token, and bytes of weights a step for all texts: an expert's are read once if
        any text chose it."""
        chosen = [c[:, PROMPT_TOKENS:] for c in chosen_experts(model, self.texts)]
        together = [c.any(0, keepdim=True) for c in chosen]
        weights = flops(model, model.config, shares_chosen(together)) / 2
        return (
            flops(model, model.config, shares_chosen(chosen)),
            weights * model.lm_head.weight.element_size(),
        )

    def check(self, models: Models) -> float:
        """Largest difference between ours and stock's logits at three steps from a cache."""
        state = spread(models.ours.new_state(), len(self.texts))
        with torch.inference_mode():
            models.ours.read(self.prompt, state, last=1)
            out = models.stock(self.prompt, use_cache=True, logits_to_keep=1)
            ours, stock = [], []
            for t in range(PROMPT_TOKENS, PROMPT_TOKENS + 3):
                token = self.texts[:, t : t + 1]
                ours.append(models.ours.read(token, state, last=1))
                out = models.stock(token, past_key_values=out.past_key_values, use_cache=True)
                stock.append(out.logits)
        return assert_same(torch.cat(ours, 1), torch.cat(stock, 1))


def time_decode_against_stock(size: str, kind: str, batch: int, rounds: int) -> Record:
    """Our linear mixture against stock's loop; against itself with a mask that differs from text to
    text (each leaves out another owner, so that all experts serve the batch, as without a mask);
    and sampling against the likeliest token."""
    models, written = build(size, kind), Written(size, batch)
    apart = written.check(models)
    theirs = {
        f"{i}, {c}": written.stock_run(models.stock, i, c)
        for i in ("eager", "grouped_mm")
        for c in ("dynamic", "static")
    }
    best = fastest(theirs)
    owners = owner_names()
    masks = [[o for o in owners if o != owners[i % len(owners)]] for i in range(batch)]
    seconds = in_turn(
        {
            "ours": written.run(models.ours),
            "stock": theirs[best],
            "mixed": written.run(models.ours, enabled=masks),
            "sampled": written.run(models.ours, is_sampled=True),
            **ceilings(),
        },
        rounds,
    )
    found = measured(seconds)
    _, size_bytes = written.touched(models.model)
    floor = NEW_TOKENS * size_bytes / (1e9 * found["bandwidth_gb_per_second"])
    return found | {
        "vs_stock": ratio(seconds["stock"], seconds["ours"]),
        "times_floor": statistics.median(seconds["ours"]) / floor,
        "mixed_mask_cost": ratio(seconds["mixed"], seconds["ours"]),
        "sampling_cost": ratio(seconds["sampled"], seconds["ours"]),
        "tokens_per_second": batch * NEW_TOKENS / statistics.median(seconds["ours"]),
        "stock": best,
        "largest_difference": apart,
    }


def time_decode_default(size: str, kind: str, batch: int, rounds: int) -> Record:
    """Our default mixture against the anchor, beside what FLOPs and bytes of weights say."""
    models, written = build(size, kind), Written(size, batch)
    config = models.model.config
    seconds = in_turn(
        {"default": written.run(models.ours), "anchor": written.run(models.other), **ceilings()},
        rounds,
    )
    work, size_bytes = written.touched(models.model)
    times = ratio(seconds["default"], seconds["anchor"])
    expected = work / dense_flops(config)
    found = measured(seconds)
    floor = NEW_TOKENS * size_bytes / (1e9 * found["bandwidth_gb_per_second"])
    return found | {
        "vs_anchor": times,
        "flops_vs_anchor": expected,
        "bytes_vs_anchor": size_bytes / (dense_flops(config) / 2 * 4),
        "times_flops": times / expected,
        "times_floor": statistics.median(seconds["default"]) / floor,
    }


# --- router, low rank, start --------------------------------------------------------------------


def filter_in_a_loop(likelihood: np.ndarray, fresh: np.ndarray, rate: float) -> np.ndarray:
    """Experts' weights [T,E,B] after each token, in float64, from their likelihoods [T,E,B] and the
    ends of texts [T,B]: the evidence router's filter, position by position."""
    prior = np.full(likelihood.shape[1:], 1.0 / likelihood.shape[1])
    weights, found = prior, np.empty_like(likelihood)
    for t, here in enumerate(likelihood):
        seen = weights * here
        moved = (1.0 - rate) * (seen / seen.sum(0)) + rate * prior
        weights = np.where(fresh[t], prior, moved)
        found[t] = weights
    return found


def time_router(size: str, kind: str, shape: tuple[int, int], rounds: int) -> Record:
    """The default router on `shape` ids, tables and filter, against a plain loop of the filter."""
    model, ids = build(size, kind).model, made_texts(size, *shape)
    router = model.router
    assert router is not None
    before = torch.cat([torch.full_like(ids[:, :1], EOS), ids[:, :-1]], dim=1)
    logs = [router.table(n)(before, ids) for n in router.names]
    limit = router.settings.clip_nats
    gaps = [router.settings.tempering * (x - logs[0]).clamp(-limit, limit) for x in logs]
    likelihood = torch.stack([g.double().exp().T for g in gaps], dim=1).numpy()  # [T,E,B]
    ends = (ids == EOS).T.numpy()  # [T,B]
    rate = router.settings.switch_rate
    loop = torch.from_numpy(filter_in_a_loop(likelihood, ends, rate)).permute(2, 0, 1)  # [B,T,E]
    ours = mixture_weights(list(router(ids, None, None, None)[0]), None, None)
    apart = float((ours - loop).abs().max())
    assert apart < 1e-5, f"the filter's weights are {apart} from the loop's"
    seconds = in_turn(
        {
            "router": lambda: lambda: router(ids, None, None, None),
            "loop": lambda: lambda: filter_in_a_loop(likelihood, ends, rate),
            **ceilings(),
        },
        rounds,
    )
    return measured(seconds) | {
        "microseconds_a_token": 1e6 * statistics.median(seconds["router"]) / ids.numel(),
        "loop_microseconds_a_token": 1e6 * statistics.median(seconds["loop"]) / ids.numel(),
        "vs_loop": ratio(seconds["loop"], seconds["router"]),
    }


def time_low_rank(size: str, kind: str, rank: int, rounds: int) -> Record:
    """Eight low-rank experts (FFN), all on every token, against the anchor, on 4 x 512 tokens."""
    anchor, ids = make_anchor(size), made_texts(size, 4, 512)
    build.cache_clear()
    even = EvidenceSettings(min_weight=0.0)
    model = make_mixture(size, even, "ffn", num_experts=9, rank=rank)
    config = with_head_once(model.config, 512)
    chosen = shares_chosen(chosen_experts(model, ids))
    seconds = in_turn(
        {
            "low_rank": read_run(OwnReader(model, anchor.tokenizer), ids),
            "anchor": read_run(OwnReader(anchor.model, anchor.tokenizer), ids),
            **ceilings(),
        },
        rounds,
    )
    return measured(seconds) | {
        "vs_anchor": ratio(seconds["low_rank"], seconds["anchor"]),
        "flops_vs_anchor": flops(model, config, chosen) / dense_flops(config),
    }


def time_start(command: Sequence[str], rounds: int) -> float:
    """Processor seconds of a `flexolmo` command, the median."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    seconds = []
    for _ in range(rounds + 1):
        before = used()
        subprocess.run(
            [sys.executable, "-m", "flexolmo", *command], check=True, stdout=subprocess.DEVNULL
        )
        seconds.append(used() - before)
    return statistics.median(seconds[1:])


def time_training(size: str, threads: int, rounds: int) -> Record:
    """Steps of training an expert, by scope; see training.py."""
    import training

    return training.measure(size, rounds, threads)


def time_data(rounds: int) -> Record:
    """Megabytes a second of `data prepare`; see data.py."""
    import data

    return data.measure()


# --- all of it ----------------------------------------------------------------------------------


def cases(options: argparse.Namespace) -> dict[str, tuple[int, Callable[[], Record]]]:
    """Threads and measurement of every case asked for, by place in the results, the two-threaded
    ones under `two_threads`; those that share models follow one another."""
    rounds, found = options.rounds, {}

    def add(part: str, place: str, threads: int, work: Callable[..., Record], *args: Any) -> None:
        if part in options.parts:
            root = "" if threads == 1 else f"{NUMBERS[threads]}_threads/"
            found[f"{root}{part}/{place}"] = (threads, functools.partial(work, *args, rounds))

    if "start" in options.parts:
        add("start", "help", 1, lambda n: {"seconds": time_start(["--help"], n)})
        if options.mixture:
            words = f"generate --model {options.mixture} --trust-any-signer --max-new-tokens 1"
            command = [*shlex.split(words), "--prompt", "The"]
            add("start", "first_token", 1, lambda n: {"seconds": time_start(command, n)})
    add("data", "prepare", 1, time_data)
    for size in options.sizes:
        for threads in options.threads:
            add("training", size, threads, time_training, size, threads)
        for kind in ("top2", "top4", "default"):
            is_default = kind == "default"
            read = time_prefill_default if is_default else time_prefill_against_stock
            write = time_decode_default if is_default else time_decode_against_stock
            for threads in options.threads:
                for shape in PREFILL_SHAPES:
                    place = f"{size}/{shape[0]}x{shape[1]}"
                    add("prefill", f"{place}/{kind}", threads, read, size, kind, shape)
                    if is_default:
                        add("router", place, threads, time_router, size, kind, shape)
                for batch in DECODE_BATCHES:
                    add("decode", f"{size}/{batch}/{kind}", threads, write, size, kind, batch)
        for rank in RANKS:
            add("low_rank", f"{size}/{rank}", 1, time_low_rank, size, "", rank)
    return found


NUMBERS = {1: "one", 2: "two", 4: "four", 8: "eight"}
WORST = {"vs_stock": min, "pct_gemm": min, "evidence_vs_linear": max}
WORST |= {"times_floor": max, "mixed_mask_cost": max}


def results(done: Mapping[str, Record]) -> Record:
    """Records by place; of a shape's or batch's two kinds against stock, the worse of each figure
    stands beside them."""
    found: Record = {}
    for place, record in done.items():
        *path, last = place.split("/")
        level = found
        for step in path:
            level = level.setdefault(step, {})
        level[last] = level.get(last, {}) | record["found"]
        if last in ("top2", "top4"):
            kinds = [level[k] for k in ("top2", "top4") if k in level]
            for name, worst in WORST.items():
                if name in record["found"]:
                    level[name] = worst(k[name] for k in kinds)
    return found


def machine(done: Mapping[str, Record]) -> Record:
    """The machine, its load during the run, and its ceilings by number of threads."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    loads = [r["load"] for r in done.values()]
    found: Record = {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "load": {"median": statistics.median(loads), "most": max(loads)},
        "software": software_versions(),
    }
    for threads in sorted({r["threads"] for r in done.values()}):
        these = [r["found"] for r in done.values() if r["threads"] == threads]
        for name in ("gemm_gflops", "bandwidth_gb_per_second"):
            if values := [f[name] for f in these if name in f]:
                found.setdefault(name, {})[NUMBERS[threads]] = statistics.median(values)
    return found


def rounded(value: Any) -> Any:
    """`value` with its floating-point numbers to four digits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def run_all(options: argparse.Namespace) -> Record:
    """Measure what is missing, writing each case as it comes, and then the results."""
    partial = options.out.with_suffix(".partial.json")
    commit, asked = source_commit(), cases(options)
    done: dict[str, Record] = {}
    if options.resume and partial.exists():
        before = read_json(partial)
        if (before["commit"], before["rounds"]) != (commit, options.rounds):
            sys.exit(
                f"{partial} holds {before['rounds']} rounds of commit {before['commit']}; asked "
                f"for are {options.rounds} of {commit}: begin anew, without --resume."
            )
        done = {k: r for k, r in before["done"].items() if k in asked}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with progress("speed", len(asked), "cases", len(done)) as meter:
        for place, (threads, measure) in asked.items():
            if place in done:
                continue
            torch.set_num_threads(threads)
            gc.collect()
            found = measure()
            done[place] = {"found": found, "threads": threads, "load": os.getloadavg()[0]}
            write_json(partial, rounded({"commit": commit, "rounds": options.rounds, "done": done}))
            meter.advance(note=place)
    found = rounded(
        {
            **results(done),
            "machine": machine(done),
            "rounds": options.rounds,
            "commit": commit,
            "command": shlex.join(["python", "benchmarks/speed.py", *options.words]),
        }
    )
    write_json(options.out, found)
    partial.unlink()
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Measure and write the results, or show them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--sizes", type=names, default=["S", "M", "L"], help=", ".join(SIZES))
    parser.add_argument("--parts", type=names, default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--threads", type=lambda t: [int(n) for n in names(t)], default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5, help="at least 5 for what is published")
    parser.add_argument("--mixture", type=Path, help="a mixture on disk whose first token is timed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--resume", action="store_true", help="keep the cases already measured")
    parser.add_argument("--table", action="store_true", help="only print the results in --out")
    options = parser.parse_args(words)
    options.words = list(sys.argv[1:] if words is None else words)
    for given, known in (
        (options.sizes, SIZES),
        (options.parts, PARTS),
        (options.threads, NUMBERS),
    ):
        if unknown := [str(n) for n in given if n not in known]:
            parser.error(
                f"unknown: {', '.join(unknown)}; choose among {', '.join(map(str, known))}"
            )
    if not options.table:
        run_all(options)
    print(markdown_table(json.loads(options.out.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
