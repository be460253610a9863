"""Training an expert against upstream's way, plain dense training and stock transformers.

One optimizer step of each in turn, on texts that our router weighs as it does real ones. Upstream
stacks the experts, so that every gradient of the frozen half is computed, zeroed, and kept in
AdamW's state; attention, embedding and head are frozen there. All take AdamW here, for the
comparison to be of like with like; what Muon adds, our default for matrices, stands beside it.

    .venv/bin/python benchmarks/training.py [--sizes S,M] [--threads 1] [--rounds 5] [--out X.json]

The vocabulary is 4,096, that of the demo and the study: with 16,384 the output head alone would
be more than half of what S computes, where it is a twentieth in the published 7B.

B batch, T positions, N = B*T, D d_model, F d_ff, L layers, V vocabulary, E experts.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import shapes
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexolmo.data.batches import TokenSet, TokenSplit, training_batches
from flexolmo.merge.export import export_stock
from flexolmo.merge.mixture import LoadedMixture
from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.checkpoint import Anchor
from flexolmo.model.loss import language_model_loss
from flexolmo.model.moe import MixtureModel
from flexolmo.model.transformer import ForwardContext, Transformer
from flexolmo.runtime import keep_memory
from flexolmo.train.blocks import arrange_blocks
from flexolmo.train.expert import ExpertRecipe, prepare_training
from flexolmo.train.loop import Losses, TrainSettings, build_optimizers, compute_gradients

VOCAB_SIZE = 4096
BATCHES = {"pico": (2, 32), "S": (8, 256), "M": (4, 512), "L": (2, 512)}  # B, T
SCOPES = ("all", "ffn", "low_rank")
WARM_UP = 2  # steps that are not counted

Step = Callable[[], object]


# --- what is trained ----------------------------------------------------------------------------


def training_size(size: str) -> str:
    """The name of that size with the vocabulary of this benchmark."""
    name = f"{size} {VOCAB_SIZE}"
    vocab_size = min(VOCAB_SIZE, shapes.SIZES[size].vocab_size)
    shapes.SIZES[name] = replace(shapes.SIZES[size], vocab_size=vocab_size)
    return name


def owner_text(anchor: Anchor, count: int = 600) -> TokenSet:
    """A prepared set of one owner's documents, in memory."""
    config = anchor.config
    ids = shapes.write_documents(config.vocab_size, 1, count)  # [count,t]
    offsets = np.arange(0, ids.size + 1, ids.shape[1])
    split = TokenSplit(ids.reshape(-1), offsets, np.full(count, 800), np.arange(count))
    about = {"digest": anchor.tokenizer.digest, "eos_id": 0, "vocab_size": config.vocab_size}
    return TokenSet(Path("made"), {"name": "made", "tokenizer": about}, {"train": split})


def recipe_of(size: str, scope: str, **settings: Any) -> ExpertRecipe:
    """Our settings for a scope; the low-rank FFN has a rank of a sixteenth of D."""
    B, T = BATCHES[size]
    given = {"optimizer": "adamw", "compile": "off"} | settings
    train = TrainSettings(steps=1000, batch_size=B, seq_len=T, **given)
    if scope == "all":
        return ExpertRecipe(train=train)
    rank = shapes.SIZES[size].d_model // 16 if scope == "low_rank" else 0
    return ExpertRecipe(scope="ffn", rank=rank, train=train)


def step_of(
    model: Transformer,
    parameters: dict[str, nn.Parameter],
    loss_of_step: Callable[[int], Losses],
    s: TrainSettings,
) -> Step:
    """One step of our loop."""
    arrange_blocks(model, s, "benchmark")
    optimizers = build_optimizers(parameters, s)
    done = [0]

    def step() -> None:
        loss_and_norm = compute_gradients(parameters, loss_of_step, done[0], s)
        assert np.isfinite(loss_and_norm).all()
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        done[0] += 1

    return step


def expert_step(anchor: Anchor, size: str, scope: str, **settings: Any) -> Step:
    """A step of ours, training one expert."""
    recipe = recipe_of(size, scope, **settings)
    pair, parameters, loss_of_step, _ = prepare_training(
        anchor, owner_text(anchor), "a", recipe, None
    )
    return step_of(pair, parameters, loss_of_step, recipe.train)


def dense_step(anchor: Anchor, size: str, **settings: Any) -> Step:
    """A step of our loop, training the whole anchor."""
    train = recipe_of(size, "all", **settings).train
    model = Transformer(anchor.config)
    model.load_state_dict(anchor.model.state_dict())
    read = batches_of(anchor, size)
    return step_of(
        model.train(),
        dict(model.named_parameters()),
        lambda step: language_model_loss(model, read(step)),
        train,
    )


def batches_of(anchor: Anchor, size: str) -> Callable[[int], Tensor]:
    """Function from a step to ids [B,T+1]."""
    B, T = BATCHES[size]
    batches = training_batches(owner_text(anchor), "train", B, T, 0)
    return lambda step: torch.from_numpy(batches.batch(step))


class StackedExperts(nn.Module):
    """Upstream's layer of two experts, both read at every position, in stacked tensors [E,.,.]."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(2, d_ff, d_model) * 0.02)
        self.up = nn.Parameter(torch.randn(2, d_ff, d_model) * 0.02)
        self.down = nn.Parameter(torch.randn(2, d_model, d_ff) * 0.02)
        self.router = nn.Parameter(torch.randn(2, d_model) * 0.02)

    def forward(self, h: Tensor, ctx: ForwardContext) -> Tensor:
        logits = F.linear(h, self.router).float()  # [B,T,E]
        self.logits = logits  # not in ctx's list, whose length would have each layer compiled anew
        weights = logits.softmax(-1)
        mixed = torch.zeros_like(h)
        for e in range(2):
            inner = F.silu(F.linear(h, self.gate[e])) * F.linear(h, self.up[e])  # [B,T,F]
            mixed = mixed + weights[..., e : e + 1] * F.linear(inner, self.down[e])
        return mixed


def upstream_step(anchor: Anchor, size: str, is_compiled: bool = False) -> Step:
    """A step as upstream takes it, on our decoder."""
    model = Transformer(anchor.config)
    model.load_state_dict(anchor.model.state_dict())
    model.requires_grad_(False)
    experts = [StackedExperts(anchor.config.d_model, anchor.config.d_ff) for _ in model.layers]
    for block, layer in zip(model.layers, experts, strict=True):
        block.mlp = layer
    stacked = [p for layer in experts for p in layer.parameters()]
    if is_compiled:
        for block in model.layers:
            block.compile(dynamic=False)
    read = batches_of(anchor, size)

    def loss_of(step: int) -> Tensor:
        ids = read(step)
        found = model(ids[:, :-1])  # [B,T,V]
        loss = F.cross_entropy(found.flatten(0, 1), ids[:, 1:].flatten())
        for layer in experts:
            loss = loss + 1e-3 / len(experts) * layer.logits.logsumexp(-1).square().mean()
        return loss

    return zeroed_step(model.train(), stacked, loss_of)


def zeroed_step(
    model: nn.Module, stacked: list[nn.Parameter], loss_of: Callable[[int], Tensor]
) -> Step:
    """A step in which the frozen half of every stacked gradient is zeroed."""
    optimizer = torch.optim.AdamW(stacked, lr=6e-4, betas=(0.9, 0.95), weight_decay=0, fused=True)
    done = [0]

    def step() -> None:
        loss = loss_of(done[0])
        loss.backward()
        for p in stacked:
            assert p.grad is not None
            p.grad[: len(p) // 2].zero_()
        norm = float(nn.utils.clip_grad_norm_(stacked, 1.0))
        assert np.isfinite(float(loss.detach()) + norm)
        optimizer.step()
        optimizer.zero_grad()
        done[0] += 1

    return step


def stock_step(anchor: Anchor, size: str, implementation: str) -> Step:
    """A step of stock transformers in which only its stacked experts and router rows learn."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = shapes.SIZES[size]
    expert = shapes.make_expert(anchor, 1, shapes.LINEAR, "ffn")
    pair: MixtureModel = assemble_mixture(anchor, {"a": expert}, shapes.LINEAR)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "hf"
        export_stock(LoadedMixture(pair, anchor.tokenizer, {}, {}), pair, out, {})
        stock: Any = transformers.AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, experts_implementation=implementation
        )
    stock.requires_grad_(False)
    stacked = [p for n, p in stock.named_parameters() if ".mlp.experts." in n or ".mlp.gate." in n]
    assert len(stacked) == 3 * config.num_layers
    for p in stacked:
        p.requires_grad_(True)
    read = batches_of(anchor, size)

    def loss_of(step: int) -> Tensor:
        ids = read(step)
        return stock(ids, labels=ids, use_cache=False).loss

    return zeroed_step(stock.train(), stacked, loss_of)


# --- what it must cost --------------------------------------------------------------------------


def fractions(anchor: Anchor, size: str) -> dict[str, float]:
    """Fractions of positions at which our router weighs both experts, the owner's alone, or
    public alone."""
    recipe = recipe_of(size, "ffn")
    pair, *_ = prepare_training(anchor, owner_text(anchor), "a", recipe, None)
    read = batches_of(anchor, size)
    weights = torch.cat(
        [pair._context(read(s)[:, :-1], None, None, None).weights for s in range(4)]
    )
    public, own = (weights > 0).unbind(-1)  # [B,T] each
    found = {"both": public & own, "own": own & ~public, "public": public & ~own}
    return {name: round(float(where.double().mean()), 4) for name, where in found.items()}


def needed_flops(anchor: Anchor, size: str, scope: str, weighed: dict[str, float]) -> float:
    """FLOPs that one step of ours has to do, in matrix products alone.

    A matrix of P numbers asks for 2 P FLOPs at each position that reads it, as many for the
    gradient of its input, and as many again for its own if it learns. Attention asks for 4 T D a
    position forward (scores and values; half of it by causality), and twice that backward.
    Low rank: the anchor's gate and up at every position, its down once for the weighted sum.
    """
    c = anchor.config
    B, T = BATCHES[size]
    N, D = B * T, c.d_model
    layer_attention = 4 * D * D
    layer_ffn = 3 * D * c.d_ff
    head = c.vocab_size * D
    read_own = weighed["both"] + weighed["own"]
    read_public = weighed["both"] + weighed["public"]
    scores = 3 * 2 * T * D * c.num_layers
    # the frozen first layer's attention has nothing before it that learns
    first_backward = 2 * layer_attention + 2 * 2 * T * D
    if scope == "all":
        matrices = c.num_layers * (layer_attention + layer_ffn) + head
        return N * (4 * matrices * (read_own + read_public) + 2 * matrices * read_own + scores)
    shared = c.num_layers * layer_attention + head
    if scope == "ffn":
        ffn = c.num_layers * layer_ffn
        own = 4 * ffn * (read_own + read_public) + 2 * ffn * read_own
    else:
        rank = recipe_of(size, scope).rank
        own = 4 * c.num_layers * layer_ffn + 6 * c.num_layers * 3 * rank * (D + c.d_ff) * read_own
    return N * (4 * shared + own + scores - first_backward)


def gemm_flops(rounds: int = 5) -> float:
    """FLOPs a second of an fp32 product of 2,048 squared matrices, the best of some."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    seconds = []
    for _ in range(rounds + 1):
        start = now()
        F.linear(a, b)
        seconds.append(now() - start)
    return 2 * 2048**3 / min(seconds)


def now() -> float:
    """Seconds of this process on one thread, whatever else the machine does; else of the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


# --- measuring ----------------------------------------------------------------------------------


def steps_of(size: str) -> dict[str, Callable[[], Step]]:
    """Every kind of step by name, each made when called for."""
    anchor = shapes.make_anchor(size)
    steps: dict[str, Callable[[], Step]] = {
        "upstream": lambda: upstream_step(anchor, size),
        "upstream compiled": lambda: upstream_step(anchor, size, is_compiled=True),
        "dense": lambda: dense_step(anchor, size),
        "dense compiled": lambda: dense_step(anchor, size, compile="on"),
        "dense muon": lambda: dense_step(anchor, size, optimizer="muon"),
        "stock eager": lambda: stock_step(anchor, size, "eager"),
        "stock grouped_mm": lambda: stock_step(anchor, size, "grouped_mm"),
    }
    for scope in SCOPES:
        steps[scope] = lambda scope=scope: expert_step(anchor, size, scope)
        steps[f"{scope} compiled"] = lambda scope=scope: expert_step(
            anchor, size, scope, compile="on"
        )
    steps["all muon"] = lambda: expert_step(anchor, size, "all", optimizer="muon")
    return steps


def peak_memory(kind: str, size: str, threads: int) -> int:
    """Peak bytes of one kind of step, in a process of its own: see `_tell_memory`."""
    command = [sys.executable, __file__, "--memory", kind, "--sizes", size]
    told = subprocess.run(
        [*command, "--threads", str(threads)], check=True, capture_output=True, text=True
    )
    return int(told.stdout.split()[-1])


def _tell_memory(kind: str, size: str) -> None:
    """Print the highest resident bytes of this process while it takes three steps, less those
    before any model was made (Linux: VmHWM, begun again before the steps)."""
    shapes.public_table(shapes.SIZES[size].vocab_size)
    before = _resident("VmRSS")
    if kind.split()[0] in SCOPES:
        keep_memory()  # as training does
    step = steps_of(size)[kind]()
    shapes.make_anchor.cache_clear()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        step()
    print(_resident("VmHWM") - before)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def measure(
    size: str, rounds: int = 5, threads: int = 1, kinds: list[str] | None = None
) -> dict[str, Any]:
    """Figures of training at a size; ratios above 1 say that ours is faster, medians of rounds.

    By scope, as it is and compiled (then vs_dense is against dense training compiled too), and for
    scope all with Muon, our default (vs_dense: with Muon too): vs_upstream, vs_upstream_compiled,
    vs_dense, vs_stock (the better of stock's two), peak_memory_vs_upstream, and pct_gemm (FLOPs
    that have to be done, see `needed_flops`, over time and the ceiling of this run).
    """
    torch.set_num_threads(threads)
    named = training_size(size)
    BATCHES[named] = BATCHES[size]
    anchor = shapes.make_anchor(named)
    steps = {}
    for kind, make in steps_of(named).items():
        if kinds is None or kind in kinds:
            print(f"{size}: {kind} is made ready", file=sys.stderr, flush=True)
            steps[kind] = make()
            for _ in range(WARM_UP):
                steps[kind]()
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    ceilings = []
    for round_ in range(rounds):
        ceilings.append(gemm_flops())
        for kind, step in steps.items():
            start = now()
            step()
            seconds[kind].append(now() - start)
        print(f"{size}: round {round_ + 1} of {rounds}", file=sys.stderr, flush=True)
    weighed = fractions(anchor, named)
    found: dict[str, Any] = {
        "batch": BATCHES[size],
        "vocab_size": anchor.config.vocab_size,
        "fractions": weighed,
        "gemm_gflops": round(statistics.median(ceilings) / 1e9, 1),
        "step_seconds": {k: round(statistics.median(s), 4) for k, s in seconds.items()},
    }

    def ratio(other: str, ours: str) -> float | None:
        if other not in seconds:
            return None
        pairs = zip(seconds[other], seconds[ours], strict=True)
        return round(statistics.median(b / a for b, a in pairs), 3)

    stock = min(
        (k for k in seconds if k.startswith("stock")),
        key=lambda k: statistics.median(seconds[k]),
        default="",
    )
    del steps
    measured = [k for k in seconds if k.split()[0] in SCOPES]
    asked = [k for k in ("upstream", *measured) if k in seconds]
    memory = {k: peak_memory(k, size, threads) for k in asked}
    for kind in measured:
        scope, *how = kind.split()
        flops = needed_flops(anchor, named, scope, weighed)
        achieved = [flops / (s * c) for s, c in zip(seconds[kind], ceilings, strict=True)]
        found[kind.replace(" ", "_")] = {
            "vs_upstream": ratio("upstream", kind),
            "vs_upstream_compiled": ratio("upstream compiled", kind),
            "vs_dense": ratio(" ".join(["dense", *how]), kind),
            "vs_stock": ratio(stock, kind),
            "peak_memory_vs_upstream": round(memory[kind] / memory.get("upstream", 1), 3),
            "peak_memory_mib": memory[kind] >> 20,
            "pct_gemm": round(100 * statistics.median(achieved), 1),
        }
    return found


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="S,M")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", help="kinds of step, separated by commas; none: all")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.memory:
        named = training_size(asked.sizes)
        BATCHES[named] = BATCHES[asked.sizes]
        _tell_memory(asked.memory, named)
        return
    kinds = asked.kinds and asked.kinds.split(",")
    sizes = asked.sizes.split(",")
    found = {size: measure(size, asked.rounds, asked.threads, kinds) for size in sizes}
    text = json.dumps(found | {"threads": asked.threads, "torch": torch.__version__}, indent=1)
    print(text)
    if asked.out:
        asked.out.write_text(text)


if __name__ == "__main__":
    main()
