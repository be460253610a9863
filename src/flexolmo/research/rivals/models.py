"""The models of a study: made, written, read back. Rivals are trained here, ours elsewhere.

V vocabulary, D d_model, L layers, E experts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from flexolmo.data.batches import TokenSet, training_batches
from flexolmo.files import save_arrays
from flexolmo.model.checkpoint import Anchor
from flexolmo.model.loss import language_model_loss
from flexolmo.model.moe import MixtureModel
from flexolmo.model.parallel import mean, own_rows, refuse_uneven, save_parts, share_out
from flexolmo.model.router import LinearSettings
from flexolmo.model.shape import ExpertShape
from flexolmo.model.transformer import Transformer
from flexolmo.research.rivals.baselines import average_shared
from flexolmo.train.loop import TrainSettings, in_parts, train

ROW_DEVIATION = 0.02  # of a rival's router rows before training, as all matrices of OLMo 2
BALANCE = 0.01  # weight of the load-balancing loss. Source: OLMoE (arXiv 2409.02060)


def save_model(model: Transformer, path: Path, **about: Any) -> None:
    """Write a model's tensors, and `about` it, into one file; by all processes that hold it."""
    save_parts(path, model.state_dict(), {"about": json.dumps(about)}, is_private=False)


def load_dense(anchor: Anchor, path: Path) -> Transformer:
    """A dense model of the anchor's shape, on its device."""
    model = Transformer(anchor.config)
    model.load_state_dict(load_file(path))
    return model.to(anchor.model.device).requires_grad_(False).eval()


def train_dense(
    anchor: Anchor, data: TokenSet, settings: TrainSettings, seed: int, out: Path
) -> Transformer:
    """Continued training of all of the anchor on one owner's text: the rivals' expert (§4.3)."""
    model = anchor.model.requires_grad_(True).train()
    share_out(model)
    batches = training_batches(data, "train", settings.batch_size, settings.seq_len, seed)
    train(
        dict(model.named_parameters()),
        in_parts(batches.batch, lambda ids: language_model_loss(model, ids), settings),
        settings,
        out / "run",
        f"dense {data.name}",
        {
            "seed": seed,
            "data": data.digest,
            "anchor": anchor.digest,
            "train": settings.model_dump(mode="json"),
        },
        {},
    )
    return model.requires_grad_(False).eval()


def rival_mixture(anchor: Anchor, names: Sequence[str], top_k: int, seed: int) -> MixtureModel:
    """A mixture with a linear router, every expert a copy of the anchor's FFN (upcycling); on the
    anchor's device."""
    shape = ExpertShape(d_ff=anchor.config.d_ff)
    model = MixtureModel(
        anchor.config, {n: shape for n in names}, LinearSettings(has_bias=False), top_k=top_k
    )
    state = anchor.model.state_dict()
    frame = {n: t for n, t in state.items() if ".mlp." not in n}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.load_state_dict(frame, strict=False)
        for i, mixture in enumerate(model.mixtures()):
            for name in model.expert_names:
                ffn = {
                    p: state[f"layers.{i}.mlp.{p}.weight"]
                    for p in ("gate_proj", "up_proj", "down_proj")
                }
                mixture.expert(name).load_state_dict({f"{p}.weight": w for p, w in ffn.items()})
                assert mixture.router is not None
                mixture.router.row(name).weight.normal_(0, ROW_DEVIATION, generator=generator)
    return model.to(anchor.model.device)


def load_rival(anchor: Anchor, names: Sequence[str], top_k: int, path: Path) -> MixtureModel:
    """A rival mixture that `save_model` wrote."""
    model = rival_mixture(anchor, names, top_k, 0)
    model.load_state_dict(load_file(path))
    return model.requires_grad_(False).eval()


def btx_start(
    anchor: Anchor, dense: Mapping[str, Mapping[str, Tensor]], top_k: int, seed: int
) -> MixtureModel:
    """BTX before its training: dense FFNs as experts, everything else averaged (§4.3)."""
    frame, ffns = average_shared(dense, anchor.model.state_dict())
    model = rival_mixture(anchor, sorted(dense), top_k, seed)
    with torch.no_grad():
        model.load_state_dict(frame, strict=False)
        for i, mixture in enumerate(model.mixtures()):
            for name in model.expert_names:
                own = {
                    n.removeprefix(f"layers.{i}.mlp."): t
                    for n, t in ffns[name].items()
                    if n.startswith(f"layers.{i}.mlp.")
                }
                mixture.expert(name).load_state_dict(own)
    return model


def train_rival(
    model: MixtureModel,
    sets: Sequence[TokenSet],
    settings: TrainSettings,
    seed: int,
    out: Path,
    label: str,
) -> None:
    """Train all of a mixture, in place, on sequences taken from the sets in turn.

    Adds the load-balancing loss that keeps learned routers from using few experts.
    """
    streams = [training_batches(s, "train", 1, settings.seq_len, seed) for s in sets]

    def loss_of_step(step: int) -> Tensor:
        places = range(step * settings.batch_size, (step + 1) * settings.batch_size)
        ids = np.concatenate([streams[p % len(streams)].batch(p // len(streams)) for p in places])
        routing: list[Tensor] = []
        logits: list[Tensor] = []
        loss = language_model_loss(
            model, torch.from_numpy(own_rows(ids)), routing=routing, router_logits=logits
        )
        for weights, z in zip(routing, logits, strict=True):
            picked = mean((weights > 0).float().mean((0, 1)))  # [E] fraction of the batch's tokens
            chance = z.softmax(-1).mean((0, 1))  # [E]
            balance = len(picked) / (model.top_k or len(picked)) * (picked * chance).sum()
            loss = loss + (
                BALANCE * balance + settings.z_loss * z.logsumexp(-1).square().mean()
            ) / len(routing)
        return loss

    refuse_uneven(settings.batch_size, 1)
    model.requires_grad_(True).train()
    share_out(model)
    train(
        dict(model.named_parameters()),
        loss_of_step,
        settings,
        out / "run",
        label,
        {
            "seed": seed,
            "data": [s.digest for s in sets],
            "label": label,
            "train": settings.model_dump(mode="json"),
        },
        {},
    )
    model.requires_grad_(False).eval()


@dataclass(frozen=True)
class Reading:
    """A model's log-probabilities of the study's windows: nats of every predicted token."""

    log_probs: dict[str, list[np.ndarray]]  # by set, float32 [T] a window

    def save(self, path: Path) -> None:
        save_arrays(path, **{n: np.concatenate(r) for n, r in self.log_probs.items()})


def load_reading(path: Path, windows: Mapping[str, Sequence[tuple[np.ndarray, int]]]) -> Reading:
    """The reading of `windows` at `path`; of the sets it holds."""
    with np.load(path, allow_pickle=False) as f:
        found = {}
        for name in f.files:
            ends = np.cumsum([len(ids) - 1 for ids, _ in windows[name]])
            found[name] = np.split(f[name], ends[:-1])
    return Reading(found)
