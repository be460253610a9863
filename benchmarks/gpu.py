"""Training and serving at the shape of a 1B model on one GPU, against its ceilings and our plans.

Each kind of training runs as `flexolmo expert train` and `anchor train` run it: same assembly,
loss, clipping and optimizer, products in bfloat16 and weights in float32. Beside its time stand
stock transformers with AdamW, what `flexolmo plan` foretells, and the share of the GPU's peak and
of a bare product's speed (MFU). Compiled blocks are forced where training would not yet use them,
and their gradients are held against float32 on the processor.

    python benchmarks/gpu.py --device cuda --seconds 100 --out gpu.json --profile profiles/
    python benchmarks/gpu.py --device cuda --cases gradients,serving --seconds 60 --out more.json
    python benchmarks/gpu.py --device cpu --size tiny --out tiny.json

`results/gpu.json` holds two runs on an H100, by tokens a step, and the gradients there.
A case is left out where the seconds are used up; one that fails says why, and the next goes on.

B batch, T positions, V vocabulary.
"""

import argparse
import functools
import gc
import os
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_gradients
import gpu_serving
import numpy as np
import shapes
import torch
import training
from gpu_models import make_anchor, make_config, synchronise
from packaging.version import Version
from speed import rounded
from torch import Tensor, nn

from flexolmo.files import write_bytes, write_json
from flexolmo.model.checkpoint import Anchor
from flexolmo.model.loss import language_model_loss
from flexolmo.model.shape import count_anchor
from flexolmo.model.transformer import Transformer
from flexolmo.runtime import choose_device, set_up, software_versions, source_commit
from flexolmo.train import blocks, count
from flexolmo.train.anchor import AnchorRecipe
from flexolmo.train.blocks import arrange_blocks
from flexolmo.train.expert import ExpertRecipe, prepare_training
from flexolmo.train.forecast import find_memory
from flexolmo.train.loop import Losses, TrainSettings, build_optimizers, compute_gradients, in_parts
from flexolmo.train.rates import GPUS, Machine, time_step

Record = dict[str, Any]
Forward = Callable[[int], Losses]

BATCHES = {"1B": (8, 2048), "tiny": (2, 32)}  # B, T of each part that is read
GEMM_WIDTHS = {"1B": 8192, "tiny": 64}
COPY_BYTES = {"1B": 2**30, "tiny": 2**16}
PEAK_FLOPS = 989e12  # of an H100 or H200 (SXM), dense, in bfloat16, by the data sheet
WARM_UP = 2
# Cases in the order in which they run, and the seconds that must be left for each to begin.
CASES = {
    "all": 8,
    "all compiled": 15,
    "gradients": 10,
    "ffn": 6,
    "serving": 10,
    "low rank": 6,
    "stock": 8,
    "dense": 6,
    "dense compiled": 15,
    "ffn compiled": 15,
    "low rank compiled": 15,
}


# --- what is trained ----------------------------------------------------------------------------


def recipe_of(kind: str, size: str, parts: int) -> AnchorRecipe | ExpertRecipe:
    """Our defaults for a kind of training, in bfloat16, of batches that are read in so many parts;
    low rank: a sixteenth of the width."""
    B, T = BATCHES[size]
    train = TrainSettings(
        steps=1000,
        batch_size=parts * B,
        accumulate=parts,
        seq_len=T,
        precision="bfloat16",
        compile="off",
    )
    if kind == "dense":
        return AnchorRecipe(train=train)
    if kind == "all":
        return ExpertRecipe(train=train)
    rank = shapes.SIZES[size].d_model // 16 if kind == "low rank" else 0
    return ExpertRecipe(scope="ffn", rank=rank, train=train)


class Program:
    """One kind of training, made ready, whose steps tell the seconds of their parts."""

    def __init__(self, anchor: Anchor, recipe: AnchorRecipe | ExpertRecipe):
        self.settings = recipe.train
        self.model: Transformer = anchor.model
        self.public_share: float | None = None  # of positions at which the anchor is read too
        text = training.owner_text(anchor)
        if isinstance(recipe, ExpertRecipe):
            pair, self.parameters, self.losses, _ = prepare_training(
                anchor, text, "a", recipe, None
            )
            self.model = pair
            read = training.training_batches(text, "train", *_batch(recipe), 0)
            ids = torch.from_numpy(read.batch(0))[:, :-1].to(pair.device)
            weights = pair._context(ids, None, None, None).weights
            assert weights is not None
            self.public_share = float((weights[..., 0] > 0).double().mean())
        else:
            read = training.training_batches(text, "train", *_batch(recipe), 0)
            self.parameters = dict(self.model.named_parameters())
            for p in self.parameters.values():
                p.requires_grad_(True)
            self.model.train()
            self.losses = in_parts(
                read.batch, lambda ids: language_model_loss(self.model, ids), recipe.train
            )
        self.optimizers = [o for o, _ in build_optimizers(self.parameters, self.settings)]
        self.done = 0

    def arrange(self, how: str) -> None:
        """Have blocks compiled ("on") or not ("off")."""
        settings = self.settings.model_copy(update={"compile": how})
        arrange_blocks(self.model, settings, "benchmark")

    def step(self, marks: "Marks") -> None:
        """A step of our loop."""
        found = compute_gradients(
            self.parameters, marks.around(self.losses), self.done, self.settings
        )
        assert np.isfinite(found).all(), found
        marks.put("clip")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        marks.put("update")
        self.done += 1

    def end(self) -> None:
        """Freeze what learnt, as an anchor's matrices are used again."""
        for p in self.parameters.values():
            p.requires_grad_(False)


def _batch(recipe: AnchorRecipe | ExpertRecipe) -> tuple[int, int]:
    return recipe.train.batch_size, recipe.train.seq_len


class StockProgram:
    """Plain training of stock transformers' model of the same shape with AdamW, in twice as many
    parts, as its logits of all positions at once do not fit else."""

    def __init__(self, size: str, device: str, parts: int):
        from transformers import Olmo2Config, Olmo2ForCausalLM

        s = shapes.SIZES[size]
        config = Olmo2Config(
            vocab_size=s.vocab_size,
            hidden_size=s.d_model,
            intermediate_size=s.d_ff,
            num_hidden_layers=s.num_layers,
            num_attention_heads=s.num_heads,
            max_position_embeddings=4096,
            pad_token_id=None,
            eos_token_id=shapes.EOS,
            use_cache=False,
        )
        config._attn_implementation = "sdpa"
        with torch.device(device):
            self.model = Olmo2ForCausalLM(config).train()
        B, T = BATCHES[size]
        self.parts = 2 * parts
        self.ids = torch.randint(1, s.vocab_size, (parts * B, T + 1), device=device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True
        )

    def arrange(self, how: str) -> None:
        """Nothing: stock is not compiled here."""

    def step(self, marks: "Marks") -> None:
        """A step as most people write it."""

        def losses(_: int) -> Iterator[Tensor]:
            for ids in self.ids.chunk(self.parts):
                with torch.autocast(ids.device.type, torch.bfloat16):
                    loss = self.model(ids, labels=ids).loss / self.parts
                yield loss

        for loss in marks.around(losses)(0):
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        assert torch.isfinite(norm)
        marks.put("clip")
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.put("update")

    def end(self) -> None:
        """Nothing to do."""


# --- measuring ----------------------------------------------------------------------------------


class Marks:
    """Moments of a step on the device, each with the name of what ended there."""

    def __init__(self, device: str):
        self.is_gpu = device.startswith("cuda")
        self.moments: list[tuple[str, Any]] = []

    def put(self, name: str) -> None:
        """Mark the end of `name`, which has been going on since the last mark."""
        moment: Any = time.perf_counter()
        if self.is_gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.moments.append((name, moment))

    def around(self, losses: Forward) -> Forward:
        """`losses` with a mark before and after each part, which tells forward from backward."""

        def marked(step: int) -> Iterator[Tensor]:
            given = iter(losses(step))
            self.put("start")
            for part in given:
                self.put("forward")
                yield part
                self.put("backward")

        return marked

    def seconds(self) -> dict[str, float]:
        """Seconds by name, and of all."""
        synchronise(self.is_gpu)
        found: dict[str, float] = {}
        for (_, a), (name, b) in zip(self.moments, self.moments[1:], strict=False):
            took = a.elapsed_time(b) / 1000 if self.is_gpu else b - a
            found[name] = found.get(name, 0.0) + took
        return found | {"step": sum(found.values())}


def time_work(work: Callable[[], object], is_gpu: bool, rounds: int = 10) -> float:
    """Least seconds of `work` over some rounds."""
    found = []
    for _ in range(rounds + 3):
        synchronise(is_gpu)
        start = time.perf_counter()
        work()
        synchronise(is_gpu)
        found.append(time.perf_counter() - start)
    return min(found)


def ceilings(size: str, device: str) -> dict[str, float]:
    """FLOPs a second of a bfloat16 product, and bytes a second read and written by a copy."""
    is_gpu = device.startswith("cuda")
    n = GEMM_WIDTHS[size]
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    b = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    one = torch.empty(COPY_BYTES[size], dtype=torch.uint8, device=device).zero_()
    other = torch.empty_like(one)
    return {
        "gemm_flops": 2 * n**3 / time_work(lambda: a @ b, is_gpu),
        "copy_bytes": 2 * one.numel() / time_work(lambda: other.copy_(one), is_gpu),
    }


class Bench:
    """One run of this program: what is asked, what was found, and the time that is left."""

    def __init__(self, asked: argparse.Namespace):
        self.asked = asked
        self.device: str = asked.device
        self.size: str = asked.size
        self.is_gpu = self.device.startswith("cuda")
        self.end = time.monotonic() + asked.seconds
        self.found: Record = {}
        self.held: dict[str, Program | StockProgram] = {}  # the last kind, with its memory

    @property
    def machine(self) -> Machine:
        """The GPU of the planner's table that is the nearest."""
        name = torch.cuda.get_device_name() if self.is_gpu else "H100"
        return GPUS[next((n for n in GPUS if n in name), "H100")]

    def run(self, name: str, case: Callable[[], Record]) -> None:
        """Measure one case, and keep what was found at once."""
        least = CASES.get(name, 0) if self.is_gpu else 0
        left = self.end - time.monotonic()
        if left < least:
            print(f"{name}: left out, {left:.0f} seconds are left of {least} it needs", flush=True)
            return
        start = time.monotonic()
        try:
            record = case()
        except Exception as e:  # anything may go wrong where nothing ran before
            print(f"{name}:", traceback.format_exc(limit=-6), flush=True)
            record = {"error": f"{type(e).__name__}: {e}".splitlines()[0]}
            self.held.clear()  # it may be half made
        self.found[name] = record | {"case_seconds": time.monotonic() - start}
        write_json(self.asked.out, rounded(self.found))
        print(f"{name}: {show(record)} ({time.monotonic() - start:.1f} s)", flush=True)

    def train(self, kind: str, how: str) -> Record:
        """Steps of one kind of training."""
        began = time.monotonic()
        program = self.program(kind)
        program.arrange(how)
        synchronise(self.is_gpu)
        ready = time.monotonic() - began
        first = time.monotonic()
        for _ in range(WARM_UP):
            program.step(Marks(self.device))
        synchronise(self.is_gpu)
        warm = time.monotonic() - first
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        steps = []
        for _ in range(self.asked.rounds):
            marks = Marks(self.device)
            program.step(marks)
            steps.append(marks.seconds())
        seconds = {k: statistics.median(s[k] for s in steps) for k in steps[0]}
        peak = torch.cuda.max_memory_allocated() if self.is_gpu else None
        if self.asked.profile:
            self.profile(program, f"{kind} {how}".replace(" ", "_"))
        share = getattr(program, "public_share", None)
        print(f"  {kind} {how}: {rounded(seconds)}, {peak} bytes", flush=True)
        found = self.judge("dense" if kind == "stock" else kind, seconds, peak, share)
        if kind == "stock":  # its products are our dense model's; no more is known of it beforehand
            del found["plan"], found["update_flops"]
        return found | {"ready_seconds": ready, "warm_up_seconds": warm}

    def program(self, kind: str) -> "Program | StockProgram":
        """Training of a kind, made ready; what another kind holds is given up first."""
        if kind not in self.held:
            self.let_go()
            if kind == "stock":
                make_anchor.cache_clear()
                self.held[kind] = StockProgram(self.size, self.device, self.asked.parts)
            else:
                recipe = recipe_of(kind, self.size, self.asked.parts)
                self.held[kind] = Program(make_anchor(self.size, self.device), recipe)
        return self.held[kind]

    def let_go(self) -> None:
        """Give back the memory of what was trained."""
        for program in self.held.values():
            program.end()
        self.held.clear()
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()

    def judge(
        self, kind: str, seconds: dict[str, float], peak: float | None, share: float | None
    ) -> Record:
        """Figures of a step: its speed, MFU, and what the planner foretells."""
        parts = self.asked.parts
        counted = count_training(kind, self.size, share, min(parts, 2))
        told = time_step(counted, self.machine, parts)
        unread = kind != "dense"  # an anchor is held beside what is trained
        beside = 4 * count_anchor(make_config(self.size)) if unread else 0
        memory = find_memory(counted, self.machine, 1, beside)
        flops = parts * counted.part.flops
        B, T = BATCHES[self.size]
        tokens = parts * B * T
        reading = seconds["forward"] + seconds["backward"]
        gemm = self.found["ceilings"]["gemm_flops"]
        return {
            "tokens_a_second": tokens / seconds["step"],
            "ms": {name: 1000 * s for name, s in seconds.items()},
            "flops_a_token": flops / tokens,
            "mfu": flops / seconds["step"] / PEAK_FLOPS,
            "mfu_of_gemm": flops / seconds["step"] / gemm,
            # of a batch of so many parts that the update counts little
            "mfu_without_update": flops / reading / PEAK_FLOPS,
            "mfu_without_update_of_gemm": flops / reading / gemm,
            "update_flops": counted.update.flops,
            "peak_bytes": peak,
            "public_share": share,
            "plan": {
                "ms": 1000 * told.total,
                "products_ms": 1000 * told.products,
                "rest_ms": 1000 * told.rest,
                "update_ms": 1000 * told.update,
                "moved_bytes": counted.part.moved_bytes,
                "memory_bytes": memory.total,
            },
        }

    def profile(self, program: Program | StockProgram, name: str) -> None:
        """Write the kernels of a step that take longest, as text."""
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.is_gpu
        with profile(activities=kinds) as taken:
            program.step(Marks(self.device))
            synchronise(self.is_gpu)
        key = "self_cuda_time_total" if self.is_gpu else "self_cpu_time_total"
        table = taken.key_averages().table(
            sort_by=key, row_limit=40, max_name_column_width=90, top_level_events_only=False
        )
        self.asked.profile.mkdir(parents=True, exist_ok=True)
        write_bytes(self.asked.profile / f"{name}.txt", table.encode())


@functools.cache
def count_training(kind: str, size: str, share: float | None, parts: int) -> count.StepCount:
    """Counts of a step as the planner has them, of a text whose `share` the anchor reads too."""
    count.PUBLIC_SHARE = count.PUBLIC_SHARE if share is None else share
    return count.count_step(
        make_config(size), recipe_of(kind, size, parts), muon_dtype=torch.bfloat16, device="cuda"
    )


def show(record: Record) -> str:
    """One line of a record."""
    if "ms" not in record:
        return str(rounded(record))
    ms = ", ".join(f"{k} {v:.1f}" for k, v in record["ms"].items())
    peak = "" if record["peak_bytes"] is None else f"; {record['peak_bytes'] / 1e9:.1f} GB"
    told = ""
    if plan := record.get("plan"):
        told = f"; plan {plan['ms']:.1f} ms, {plan['memory_bytes'] / 1e9:.1f} GB"
    return (
        f"{record['tokens_a_second']:,.0f} tokens/s, MFU {record['mfu']:.1%} (without update "
        f"{record['mfu_without_update']:.1%}, of a product's "
        f"{record['mfu_without_update_of_gemm']:.1%}); ms: {ms}{peak}{told}"
    )


@contextmanager
def compiling() -> Iterator[None]:
    """Have blocks compiled with whatever torch there is."""
    before = blocks.COMPILES_FROM
    blocks.COMPILES_FROM = Version("2")
    torch._dynamo.reset()
    try:
        yield
    finally:
        blocks.COMPILES_FROM = before


def run_all(asked: argparse.Namespace) -> None:
    """Measure every case that is asked for and that time is left for."""
    bench = Bench(asked)
    device = choose_device(asked.device)
    set_up(0)
    bench.found["about"] = {
        "command": shlex.join(["python", "benchmarks/gpu.py", *asked.words]),
        "commit": source_commit(),
        "gpu": torch.cuda.get_device_name() if bench.is_gpu else None,
        "cpu_count": os.cpu_count(),
        "software": software_versions(),
        "size": asked.size,
        "part": BATCHES[asked.size],
        "parts": asked.parts,
        "rounds": asked.rounds,
        "peak_flops": PEAK_FLOPS,
    }
    bench.run("ceilings", lambda: ceilings(asked.size, asked.device))
    for name in asked.cases:
        if name == "gradients":
            bench.let_go()
            with compiling():
                bench.run(name, lambda: gpu_gradients.compare(device, lambda: bench.end))
        elif name == "serving":
            bench.let_go()
            make_anchor.cache_clear()
            bench.run(name, lambda: gpu_serving.measure(asked.size, device, bench.end))
        else:
            kind = name.removesuffix(" compiled")
            with compiling():
                how = "off" if kind == name else "on"
                bench.run(name, functools.partial(bench.train, kind, how))
    print(f"{time.monotonic() - bench.end + asked.seconds:.0f} seconds in all; {asked.out}")


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print a line for each case, and write all as JSON."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def cases(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in CASES]:
            raise argparse.ArgumentTypeError(f"found {unknown}; choose among {', '.join(CASES)}")
        return text.split(",")

    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=list(BATCHES), default="1B")
    parser.add_argument("--cases", type=cases, default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", help="sequences and tokens of a part, such as 8x2048")
    parser.add_argument("--parts", type=int, default=1, help="of a batch, read one by one")
    parser.add_argument("--seconds", type=float, default=90.0, help="after which no case begins")
    parser.add_argument("--profile", type=Path, help="directory for the longest kernels of steps")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args(words)
    asked.words = words
    if asked.batch:
        BATCHES[asked.size] = tuple(map(int, asked.batch.split("x")))
    run_all(asked)


if __name__ == "__main__":
    main()
