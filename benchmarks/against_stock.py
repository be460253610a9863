"""Our mixture against stock transformers' FlexOlmo: prefill, decode, and a training step.

Both run the same checkpoint (random weights, four experts, all active, linear router) in one
process, one after the other in turn; medians and ratios, since the machine may be shared.

    .venv/bin/python benchmarks/against_stock.py [--threads 1] [--rounds 7]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

from flexolmo.data.tokenizer import train_tokenizer
from flexolmo.merge.export import export_stock
from flexolmo.merge.mixture import LoadedMixture
from flexolmo.model.assemble import assemble_mixture, expert_tensors
from flexolmo.model.checkpoint import Anchor, build_anchor
from flexolmo.model.router import LinearSettings
from flexolmo.model.shape import ExpertShape, expert_shapes
from flexolmo.model.statistics import BigramModel
from flexolmo.model.transformer import ModelConfig, Transformer, language_model_loss

SIZES = {"3M": (192, 4, 512), "14M": (384, 6, 1024), "60M": (768, 8, 2048)}  # d_model, layers, d_ff


def make_anchor(size: str) -> Anchor:
    """An anchor with random weights and a 4,096-entry vocabulary."""
    tokenizer = train_tokenizer(["some words to begin with"], 300)
    d_model, num_layers, d_ff = SIZES[size]
    config = ModelConfig(
        vocab_size=4096,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=d_model // 64,
        d_ff=d_ff,
        max_seq_len=1024,
        eos_token_id=tokenizer.eos_id,
    )
    model = Transformer(config)
    model.initialise(0)
    even = np.full(4096, -np.log(4096), dtype=np.float32)
    nothing = BigramModel(
        even, np.zeros_like(even), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    )
    return build_anchor(model, tokenizer, nothing, torch.randn(num_layers, d_model), {})


def compare(
    ours: Callable[[], object], stock: Callable[[], object], rounds: int
) -> tuple[float, float, float]:
    """Median seconds of each, run in turn, and the median of the paired ratios stock / ours.

    On one thread, seconds of this process alone, whatever else the machine does.
    """
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    ours(), stock()
    pairs = []
    for _ in range(rounds):
        seconds = []
        for run in (ours, stock):
            start = now()
            run()
            seconds.append(now() - start)
        pairs.append(seconds)
    return (
        statistics.median(p[0] for p in pairs),
        statistics.median(p[1] for p in pairs),
        statistics.median(p[1] / p[0] for p in pairs),
    )


def measure(size: str, rounds: int) -> list[dict[str, object]]:
    """One row per kind of work."""
    anchor = make_anchor(size)
    router = LinearSettings(has_bias=False)
    generator = torch.Generator().manual_seed(1)
    sizes = expert_shapes(anchor.config, ExpertShape(d_ff=anchor.config.d_ff), router)
    experts = {
        name: {k: torch.randn(size, generator=generator) * 0.02 for k, size in sizes.items()}
        for name in ("a", "b", "c")
    }
    mixture = LoadedMixture(assemble_mixture(anchor, experts, router), anchor.tokenizer, {})
    model = mixture.model
    with tempfile.TemporaryDirectory() as directory:
        export_stock(mixture, model, Path(directory) / "hf", {})
        stock = transformers.AutoModelForCausalLM.from_pretrained(Path(directory) / "hf")
    rows = []

    def row(work: str, tokens: int, ours: Callable[[], object], theirs: Callable[[], object]):
        a, b, ratio = compare(ours, theirs, rounds)
        rows.append(
            {
                "size": size,
                "work": work,
                "ours_tokens_per_second": round(tokens / a),
                "stock_tokens_per_second": round(tokens / b),
                "ratio": round(ratio, 2),
            }
        )

    ids = torch.randint(1, 4000, (4, 257), generator=generator)
    with torch.inference_mode():
        difference = (model(ids) - stock(ids).logits).abs().max()
        assert difference < 1e-3, f"the two do not compute the same: {difference}"
        row("prefill 4 x 256", 4 * 256, lambda: model(ids[:, :256]), lambda: stock(ids[:, :256]))
        for batch in (1, 16):
            start = torch.randint(1, 4000, (batch, 32), generator=generator)

            def ours(start=start):
                cache = model.new_cache()
                token = model(start, cache=cache)[:, -1:].argmax(-1)
                for _ in range(32):
                    token = model(token, cache=cache)[:, -1:].argmax(-1)

            def theirs(start=start):
                out = stock(start, use_cache=True)
                for _ in range(32):
                    token = out.logits[:, -1:].argmax(-1)
                    out = stock(token, past_key_values=out.past_key_values, use_cache=True)

            row(f"decode, batch {batch}", batch * 32, ours, theirs)

    pair = assemble_mixture(anchor, {"a": experts["a"]}, router)
    for p in expert_tensors(pair, "a").values():
        p.requires_grad_(True)
    pair.train()
    with tempfile.TemporaryDirectory() as directory:
        export_stock(LoadedMixture(pair, anchor.tokenizer, {}), pair, Path(directory) / "hf", {})
        whole = transformers.AutoModelForCausalLM.from_pretrained(Path(directory) / "hf")

    def train_ours():
        language_model_loss(pair, ids).backward()

    def train_stock():  # upstream's way: every gradient, the frozen half thrown away
        whole(ids, labels=ids).loss.backward()

    row("train one expert, 4 x 256", 4 * 256, train_ours, train_stock)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [r for size in SIZES for r in measure(size, options.rounds)]
    print("| size | work | ours, tok/s | stock, tok/s | ratio |\n|---|---|---|---|---|")
    for r in rows:
        print(
            "| {size} | {work} | {ours_tokens_per_second:,} | {stock_tokens_per_second:,} | "
            "{ratio} |".format(**r)
        )
    print(
        json.dumps(
            {
                "threads": options.threads,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
