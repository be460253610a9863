"""Gradients of a step by device, precision and compiling, against float32 on the processor.

A step of a small decoder from the same weights on the same text, for an expert of each scope. What
rounding alone does is told by the same without compiling: a compiled step is right if as near.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import shapes
import torch
import training
from torch import Tensor

from flexolmo.data.tokenizer import train_tokenizer
from flexolmo.model.checkpoint import Anchor, build_anchor
from flexolmo.model.router import LinearSettings
from flexolmo.model.transformer import ModelConfig, Transformer
from flexolmo.train.blocks import arrange_blocks
from flexolmo.train.expert import ExpertRecipe, prepare_training, start_expert
from flexolmo.train.loop import TrainSettings, compute_gradients

SHAPE = shapes.Size(256, 3, 4, 704, 2048)
SCOPES: dict[str, dict[str, Any]] = {
    "all": {},
    "ffn": {"scope": "ffn"},
    "low rank": {"scope": "ffn", "rank": 16},
    "paper": {"scope": "ffn", "router": LinearSettings()},
}
# How a step is taken: precision of products, of float32 products on a GPU, torch.compile's backend
# (aot_eager makes the same program and runs it operation by operation), and for which scopes.
WAYS: dict[str, tuple[str, str, str | None, list[str]]] = {
    "float32": ("float32", "highest", None, [*SCOPES]),
    "bfloat16": ("bfloat16", "highest", None, [*SCOPES]),
    "float32, aot_eager": ("float32", "highest", "aot_eager", ["all", "low rank", "paper"]),
    "bfloat16, inductor": ("bfloat16", "highest", "inductor", ["all", "ffn"]),
    "tf32": ("float32", "high", None, ["all"]),
    "float32, inductor": ("float32", "highest", "inductor", ["all"]),
}
LEAST_SECONDS = 15  # left, for a step to be compiled with inductor


def make_anchor(device: torch.device) -> Anchor:
    """The same small anchor on any device."""
    config = ModelConfig(**vars(SHAPE), max_seq_len=512, eos_token_id=shapes.EOS)
    model = Transformer(config)
    model.initialise(0)
    rows = torch.zeros(config.num_layers, config.d_model)
    tokenizer = train_tokenizer(["some words to begin with"], 300)
    public = shapes.public_table(config.vocab_size)
    return build_anchor(model.to(device), tokenizer, public, rows, {})


def gradients(anchor: Anchor, scope: str, precision: str, is_compiled: bool) -> dict[str, Tensor]:
    """Gradients of a step on the CPU, by name; an expert that has moved from the anchor."""
    how = "on" if is_compiled else "off"
    train = TrainSettings(
        steps=100, batch_size=4, seq_len=256, precision=precision, compile=how, grad_clip=1e9
    )
    recipe = ExpertRecipe(train=train, **SCOPES[scope])
    text = training.owner_text(anchor)
    first = start_expert(anchor, text, recipe)
    generator = torch.Generator().manual_seed(7)
    for name, t in first.items():
        if not name.startswith("router."):
            first[name] = t.cpu() + 0.01 * torch.randn(t.shape, generator=generator)
    pair, parameters, losses, _ = prepare_training(anchor, text, "a", recipe, None, first)
    arrange_blocks(pair, train, "benchmark")
    compute_gradients(parameters, losses, 0, train)
    return {n: p.grad.detach().double().cpu() for n, p in parameters.items() if p.grad is not None}


@contextmanager
def products_and_compiler(matmul: str, backend: str | None) -> Iterator[None]:
    """Precision of float32 products, and the backend of every `torch.compile`."""
    precision = torch.get_float32_matmul_precision()
    compile_ = torch.compile
    torch.set_float32_matmul_precision(matmul)
    torch._dynamo.reset()
    torch.compile = lambda run, **options: compile_(run, backend=backend, **options)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.compile = compile_


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    """Relative errors of gradients: of the median parameter and of the worst, with its name."""
    assert found.keys() == expected.keys()
    errors = {
        n: float((found[n] - g).norm() / g.norm().clamp(min=1e-30)) for n, g in expected.items()
    }
    worst = max(errors, key=errors.__getitem__)
    return {"median": statistics.median(errors.values()), "worst": errors[worst], "at": worst}


def compare(device: torch.device, end: Callable[[], float]) -> dict[str, Any]:
    """Errors by scope and way, one that fails with what it says; `end` is when time is up."""
    reference = make_anchor(torch.device("cpu"))
    anchor = make_anchor(device)
    expected: dict[str, dict[str, Tensor]] = {}
    found: dict[str, Any] = {scope: {} for scope in SCOPES}
    for way, (precision, matmul, backend, scopes) in WAYS.items():
        for scope in scopes:
            is_slow = backend == "inductor"
            if is_slow and (device.type == "cpu" or end() - time.monotonic() < LEAST_SECONDS):
                continue
            if scope not in expected:
                expected[scope] = gradients(reference, scope, "float32", False)
            start = time.monotonic()
            try:
                with products_and_compiler(matmul, backend):
                    own = gradients(anchor, scope, precision, backend is not None)
                found[scope][way] = apart(own, expected[scope])
            except Exception as e:
                found[scope][way] = {"error": f"{type(e).__name__}: {e}"[:400]}
            took = time.monotonic() - start
            print(f"  {scope}, {way}: {found[scope][way]} ({took:.1f} s)", flush=True)
    return found
