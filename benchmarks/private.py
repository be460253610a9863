"""Gradients of private training, each unit's clipped by itself, against Opacus on stock.

One step's sum of clipped gradients, without the noise, of units of one window, in turn: ours one
unit at a time and in groups, Opacus' gradients of each example, and its ghost clipping. All learn
the same whole matrices of one decoder; ours also deltas of low rank, as the recipe does.

    .venv/bin/python benchmarks/private.py [--sizes S] [--rounds 5] [--out X.json]
"""

import argparse
import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import shapes
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from timing import Turns
from torch import Tensor, nn
from training import Step, owner_text, training_size
from transformers import Olmo2ForCausalLM

from flexolmo.data.batches import TokenSet, TokenSplit
from flexolmo.model.checkpoint import Anchor, save_anchor
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.runtime import run_record, set_up
from flexolmo.train.budget import PrivacySettings
from flexolmo.train.expert import ExpertRecipe, prepare_training
from flexolmo.train.loop import TrainSettings, compute_gradients

SHAPES = {"16x128": (16, 128), "16x512": (16, 512)}  # units of a step, tokens of each
CLIP = 0.1
GROUP = 8  # units whose gradients are found at once
LOW_RANK = {"rank": 4, "attention_rank": 4, "embedding_rank": 4, "head_rank": 4}


def text_in_units(anchor: Anchor, length: int) -> TokenSet:
    """An owner's text, cut into documents of one length."""
    text = owner_text(anchor)
    tokens = text.splits["train"].tokens
    count = len(tokens) // length
    split = TokenSplit(
        tokens[: count * length],
        np.arange(count + 1) * length,
        np.full(count, 4 * length),
        np.arange(count),
    )
    return replace(text, splits={"train": split})


def our_step(
    data: TokenSet, anchor: Anchor, shape: tuple[int, int], at_once: int, **parts: int
) -> Step:
    """The step as `expert train` takes it, of the text's first units; the norm of its mean
    gradient."""
    units, length = shape
    settings = TrainSettings(
        steps=1, batch_size=units, seq_len=length, warmup_steps=0, optimizer="adamw", compile="off"
    )
    privacy = PrivacySettings(epsilon=50.0, clip_norm=CLIP, row_share=0.0, units_at_once=at_once)
    router = EvidenceSettings(epsilon=8.0)
    recipe = ExpertRecipe(train=settings, privacy=privacy, router=router, **parts)
    _, parameters, losses, private = prepare_training(anchor, data, "made", recipe, None)
    assert private is not None
    private.noise = 0.0
    private.open(None, "benchmark", False)
    private.choose = lambda step: np.arange(units)  # type: ignore[method-assign]
    return lambda: compute_gradients(parameters, losses, 0, settings, private)[1]


def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean loss of each row of ids [B,T+1], in nats a token, [B]."""
    positions = torch.arange(ids.shape[1] - 1).expand(len(ids), -1)
    inputs = ids[:, :-1].contiguous()
    logits = model(input_ids=inputs, position_ids=positions, use_cache=False).logits
    return F.cross_entropy(logits.mT, ids[:, 1:], reduction="none").mean(1)


def opacus_step(stock: Path, ids: Tensor, is_ghost: bool) -> Step:
    """The same by Opacus: gradients of each example, or ghost clipping, which goes back twice."""
    base = Olmo2ForCausalLM.from_pretrained(stock, attn_implementation="eager").float().train()
    for p in base.parameters():
        p.requires_grad_(p.dim() == 2)
    kind = GradSampleModuleFastGradientClipping if is_ghost else GradSampleModule
    more: dict[str, Any] = {"max_grad_norm": CLIP} if is_ghost else {}
    model = kind(base, strict=False, loss_reduction="sum", **more)
    learnt = [p for p in base.parameters() if p.requires_grad]

    def norm() -> float:
        found = nn.utils.get_total_norm([p.grad for p in learnt if p.grad is not None]) / len(ids)
        base.zero_grad()
        return found.item()

    def ghost() -> float:
        model.enable_hooks()
        losses = losses_of(model, ids)
        losses.sum().backward(retain_graph=True)
        factors = model.get_clipping_coef()
        base.zero_grad()
        model.disable_hooks()
        (factors * losses).sum().backward()
        return norm()

    def each() -> float:
        losses_of(model, ids).sum().backward()
        samples = [p.grad_sample for p in learnt]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in samples]).norm(dim=0)
        factors = (CLIP / norms).clamp(max=1.0)
        for p, g in zip(learnt, samples, strict=True):
            p.grad = torch.einsum("b,b...->...", factors, g)
            p.grad_sample = None
        return norm()

    return ghost if is_ghost else each


def measure(size: str, rounds: int) -> dict[str, Any]:
    """Figures of every shape: speed of ours over each of Opacus' ways, above 1 where ours is
    faster."""
    anchor = shapes.make_anchor(training_size(size))
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        stock = Path(directory) / "anchor"
        save_anchor(anchor, stock)
        for name, shape in SHAPES.items():
            text = text_in_units(anchor, shape[1])
            rows = text.splits["train"].tokens[: shape[0] * shape[1]].reshape(shape)
            ids = F.pad(torch.from_numpy(rows.astype(np.int64)), (1, 0), value=text.eos_id)
            steps = {
                "ours": our_step(text, anchor, shape, 1),
                "ours, in groups": our_step(text, anchor, shape, GROUP),
                "ours, low rank": our_step(text, anchor, shape, 1, **LOW_RANK),
                "opacus": opacus_step(stock, ids, is_ghost=False),
                "opacus, ghost clipping": opacus_step(stock, ids, is_ghost=True),
            }
            # ghost clipping counts what units read of an end of text otherwise, and clips more
            compared = ("ours", "ours, in groups", "opacus")
            norms = [steps[name]() for name in compared]
            if max(norms) > 1.001 * min(norms):
                raise SystemExit(f"{name}: the steps are not of the same gradient: {norms}")
            turns = Turns({n: partial(in_grad, step) for n, step in steps.items()}, rounds)
            peers = ("opacus", "opacus, ghost clipping")
            found[name] = turns.record(
                **{f"vs_{p}": 1 / turns.ratio("ours", p) for p in peers},
                **{f"low_rank_vs_{p}": 1 / turns.ratio("ours, low rank", p) for p in peers},
            )
    return found


def in_grad(step: Step) -> Step:
    """The step, with gradients where the timing has none."""

    def run() -> None:
        with torch.inference_mode(False), torch.enable_grad():
            step()

    return run


def main() -> None:
    """Measure on one thread and print, or write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="S", help=f"of {', '.join(shapes.SIZES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    set_up(0, 1)
    sizes = asked.sizes.split(",")
    found: dict[str, Any] = {size: measure(size, asked.rounds) for size in sizes}
    found["run"] = run_record({"sizes": sizes, "rounds": asked.rounds}, 0, {})
    text = json.dumps(found, indent=2)
    if asked.out is None:
        print(text)
    else:
        asked.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
