"""Training loop of anchors, experts and rivals: seeded, checkpointed, resumed bit for bit.

Knows a loss and parameters by name; nothing of models, data or owners.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from flexolmo.config import Settings
from flexolmo.errors import CheckpointError
from flexolmo.files import canonical_json, digest_bytes, parse_json, write_json
from flexolmo.model.parallel import (
    agree,
    are_several,
    count,
    fill,
    is_first,
    mean,
    own_rows,
    refuse_apart,
    refuse_several,
    refuse_uneven,
    save_parts,
    whole,
)
from flexolmo.progress import progress
from flexolmo.train.dp_sgd import PrivateSteps
from flexolmo.train.muon import Muon

Losses = Tensor | Iterable[Tensor]  # of a step: one, or several that add up to it
CHECKPOINT = "checkpoint.safetensors"


class TrainSettings(Settings):
    """Length and rates of a training run."""

    steps: int = Field(ge=1, description="Number of optimizer steps.")
    batch_size: int = Field(8, ge=1, description="Sequences in one step.")
    seq_len: int = Field(256, ge=2, description="Tokens predicted in one sequence (paper: 4,096).")
    optimizer: Literal["adamw", "muon"] = Field(
        "muon",
        description="Optimizer: muon for matrices inside the blocks and AdamW for the rest (ours), "
        "or adamw for all (paper).",
    )
    learning_rate: float = Field(
        4e-3, gt=0, description="Peak learning rate of AdamW (paper: 9e-4)."
    )
    muon_learning_rate: float = Field(0.02, gt=0, description="Peak learning rate of Muon.")
    warmup_steps: int = Field(20, ge=0, description="Steps of linear warm-up (paper: 2,000).")
    final_rate: float = Field(
        0.05, ge=0, le=1, description="Last rate as a fraction of the peak, reached along a cosine."
    )
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled weight decay (paper: 0 for experts)."
    )
    grad_clip: float = Field(1.0, gt=0, description="Largest norm of all gradients together.")
    z_loss: float = Field(
        1e-3,
        ge=0,
        description="Weight of the squared log-partition of the linear router's logits "
        "(paper: 1e-3).",
    )
    accumulate: int = Field(
        1,
        ge=1,
        description="Parts of a batch that are read one after another, for less memory: the same "
        "numbers but for rounding.",
    )
    recompute: bool = Field(
        False,
        description="True to compute each block again on the way back, in place of keeping what "
        "it computed: a third more work, for memory.",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Precision of products; weights, norms and optimizer are in float32 with both. "
        "bfloat16 is for GPUs, and processors with AMX.",
    )
    compile: Literal["off", "on", "auto"] = Field(
        "auto",
        description="Use of torch.compile, which makes one program of a block, needs a C++ "
        "compiler and changes last digits; auto: if the run is long enough to win the time back.",
    )
    checkpoint_every_seconds: float = Field(30.0, gt=0, description="Seconds between checkpoints.")

    @model_validator(mode="after")
    def _warm_up_ends(self) -> "TrainSettings":
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} exceeds steps {self.steps}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be read in {self.accumulate} equal parts "
                "(accumulate)"
            )
        return self

    @property
    def tokens(self) -> int:
        """Tokens predicted over the whole run."""
        return self.steps * self.batch_size * self.seq_len


@dataclass
class TrainResult:
    """Losses, time and tokens of a finished run."""

    # One for each step, in nats per token; None where private training read no text.
    losses_nats: list[float | None] = field(default_factory=list)
    seconds: float = 0.0  # training time in seconds, summed over resumptions
    tokens: int = 0  # predicted over the whole run; of private training in the mean, and at most


def rate_fraction(step: int, settings: TrainSettings) -> float:
    """Learning rate at `step` (from 0) as a fraction of the peak: linear up, cosine down."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    span = max(settings.steps - settings.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - settings.warmup_steps) / span))
    return settings.final_rate + (1 - settings.final_rate) * cosine


TOKEN_ROWS = ("embed_tokens.weight", "embed_tokens.lora_b", "lm_head.weight", "lm_head.lora_b")


def build_optimizers(
    parameters: Mapping[str, nn.Parameter], settings: TrainSettings
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimizers with their peak rates; every parameter is in exactly one.

    Rows of embedding and head do not decay: those of rare tokens would vanish, and an owner's
    would no longer be the anchor's where nothing may be learnt.
    """
    inner = {
        n: p
        for n, p in parameters.items()
        if settings.optimizer == "muon"
        and n.startswith("layers.")
        and min(p.shape) > 1
        and p.dim() == 2
    }
    rows = [p for n, p in parameters.items() if n in TOKEN_ROWS]
    outer = [p for n, p in parameters.items() if n not in inner and n not in TOKEN_ROWS]
    built: list[tuple[torch.optim.Optimizer, float]] = []
    if inner:
        built.append(
            (
                Muon(
                    inner.values(),
                    lr=settings.muon_learning_rate,
                    weight_decay=settings.weight_decay,
                    momentum=0.95,
                    adjust_lr_fn="original",
                ),
                settings.muon_learning_rate,
            )
        )
    groups = [{"params": rows, "weight_decay": 0.0}] if rows else []
    groups += [{"params": outer, "weight_decay": settings.weight_decay}] if outer else []
    if groups:
        adam = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
        built.append((adam, settings.learning_rate))
    return built


def identity_of(recipe: BaseModel, **inputs: str) -> dict[str, Any]:
    """Everything that decides a run's numbers: recipe, digests of its inputs, threads."""
    config = recipe.model_dump(mode="json")
    del config["train"]["checkpoint_every_seconds"]
    del config["train"]["compile"]  # what it comes to is told by the caller
    return {"config": config, "inputs": inputs, "threads": torch.get_num_threads()}


def train(
    parameters: Mapping[str, nn.Parameter],
    loss_of_step: Callable[[int], Losses],
    settings: TrainSettings,
    run_dir: Path | None,
    label: str,
    identity: Mapping[str, Any],
    record: Mapping[str, Any],
    private: PrivateSteps | None = None,
) -> TrainResult:
    """Minimise `loss_of_step(step)` over `parameters`, in place.

    Where it gives several losses, each is computed when the one before has given its gradient.
    With `private`, each is one unit's and is protected; one that asks for no gradient has given it
    to `private` already.

    With a `run_dir` the state is written there every `checkpoint_every_seconds`, and a later call
    with the same `identity` (config, seed, data: anything that decides the numbers) resumes from
    it. The first call writes `record` there as `run.json`, the last one the losses as
    `metrics.json`. All of it is for the user alone, since the text may be an owner's.

    Several processes (see `model.parallel`) take the same steps but for rounding, and go on from
    what any number of processes with any number of threads have done; they need a `run_dir` that
    all of them see.

    Raises:
        CheckpointError: `run_dir` belongs to a run of another identity, or a loss is not finite.
        ConfigError: the settings are not for several processes.
    """
    if run_dir is None:
        refuse_several("Training without a directory for its run")
    optimizers = build_optimizers(parameters, settings)
    device = next(iter(parameters.values())).device.type
    identities = _identify({**identity, **({} if device == "cpu" else {"device": device})})
    result = TrainResult(tokens=settings.tokens * (1 if private is None else private.most_windows))
    if run_dir is not None:
        _resume(run_dir / CHECKPOINT, parameters, optimizers, result, identities)
        refuse_apart(len(result.losses_nats), run_dir)
        if not result.losses_nats and is_first():
            write_json(run_dir / "run.json", dict(record), is_private=True)
    if private is not None and len(result.losses_nats) < settings.steps:
        private.open(run_dir, identities["identity"], bool(result.losses_nats))
    what = "tok"
    a_step = settings.batch_size * settings.seq_len
    if private is not None:  # its units are of unequal length, or read in several windows
        what = "unit"
        a_step = settings.batch_size
    first = len(result.losses_nats)
    last_save = start = time.monotonic()
    before = result.seconds
    with progress(label, settings.steps * a_step, what, first * a_step) as meter:
        for step in range(first, settings.steps):
            nats, norm = compute_gradients(parameters, loss_of_step, step, settings, private)
            if not math.isfinite((nats or 0.0) + norm):
                cause = "Lower the learning rate."
                if step == 0:
                    cause = "No step was taken yet: it is the first values that are at fault."
                raise CheckpointError(
                    f"{label}: at step {step} the loss is {nats} and the "
                    f"gradient's norm {norm}. {cause}"
                )
            for optimizer, peak in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = peak * rate_fraction(step, settings)
                optimizer.step()
                optimizer.zero_grad()
            if private is not None and not all(p.isfinite().all() for p in parameters.values()):
                raise CheckpointError(
                    f"{label}: after step {step} not all weights are finite. Lower the learning "
                    "rate, in a run of its own: what this one has drawn counts too."
                )
            result.losses_nats.append(nats)
            meter.advance(a_step, "" if nats is None else f"loss {nats:.3f}")
            result.seconds = before + time.monotonic() - start
            is_due = time.monotonic() - last_save > settings.checkpoint_every_seconds
            if run_dir is not None and (step + 1 == settings.steps or agree(is_due)):
                _save(run_dir / CHECKPOINT, parameters, optimizers, result, identities)
                last_save = time.monotonic()
    if run_dir is not None and is_first():
        write_json(
            run_dir / "metrics.json",
            {"loss_nats": result.losses_nats, "seconds": result.seconds, "tokens": result.tokens},
            is_private=True,
        )
    if private is not None:
        private.close(run_dir)
    return result


def _identify(identity: Mapping[str, Any]) -> dict[str, str]:
    """Two digests: of everything that decides a run's numbers, and of the same without threads,
    processes and compiling, which decide the rounding alone."""
    several = {"processes": count()} if are_several() else {}
    loose = {k: v for k, v in identity.items() if k not in ("threads", "is_compiled")}
    return {
        "identity": digest_bytes(canonical_json({**identity, **several})),
        "identity_but_for_rounding": digest_bytes(canonical_json(loose)),
    }


def read_learnt(run_dir: Path) -> dict[str, Tensor]:
    """Parameters by name, as the run in `run_dir` left them, mapped into memory."""
    prefix = "parameter."
    with safetensors.safe_open(Path(run_dir) / CHECKPOINT, framework="pt") as f:
        return {
            n.removeprefix(prefix): f.get_tensor(n)
            for n in f.keys()  # noqa: SIM118
            if n.startswith(prefix)
        }


def compute_gradients(
    parameters: Mapping[str, nn.Parameter],
    loss_of_step: Callable[[int], Losses],
    step: int,
    settings: TrainSettings,
    private: PrivateSteps | None = None,
) -> tuple[float | None, float]:
    """Leave the step's gradient, clipped, in `parameters`; loss in nats, and norm unclipped.

    With `private`, the gradient is the noised one, and the loss a mean over the units that were
    read, but for those whose own is not finite; None if there are none.
    """
    device = next(iter(parameters.values())).device.type
    is_half = settings.precision == "bfloat16"

    def in_precision() -> torch.autocast:
        return torch.autocast(device, torch.bfloat16, enabled=is_half)

    with in_precision():
        given = loss_of_step(step)
        parts = iter([given] if isinstance(given, Tensor) else given)
        part = next(parts, None)
    total = torch.zeros((), device=next(iter(parameters.values())).device)
    of_units: list[Tensor] = []
    num_parts = 0
    while part is not None:
        if private is None or part.requires_grad:
            part.backward()
            if private is not None:
                private.add(parameters)
        if private is None:
            total += part.detach()
        else:
            of_units.append(part.detach())
        num_parts += 1
        with in_precision():
            part = next(parts, None)
    if private is not None:
        private.finish(parameters, step)
        if of_units:
            losses = torch.stack(of_units)
            losses = losses[losses.isfinite()]
            num_parts = len(losses)
            total = losses.sum() / max(num_parts, 1)
    grads = [p.grad for p in parameters.values() if p.grad is not None]
    norm = whole(nn.utils.get_total_norm(grads))
    nats, size = torch.stack([mean(total), norm.float()]).tolist()  # one wait for a GPU
    if size > settings.grad_clip:
        nn.utils.clip_grads_with_norm_(parameters.values(), settings.grad_clip, norm)
    return nats if num_parts else None, size


def in_parts(
    batch_of_step: Callable[[int], np.ndarray],
    loss_of: Callable[[Tensor], Tensor],
    settings: TrainSettings,
) -> Callable[[int], Iterable[Tensor]]:
    """Function from a step to the losses of the parts in which its batch [B,T+1] is read, by this
    process. ConfigError if several processes cannot share a batch."""
    refuse_uneven(settings.batch_size, settings.accumulate)

    def losses(step: int) -> Iterator[Tensor]:
        for ids in torch.from_numpy(own_rows(batch_of_step(step))).chunk(settings.accumulate):
            yield loss_of(ids) / settings.accumulate

    return losses


def _optimizer_tensors(
    parameters: Mapping[str, nn.Parameter], optimizers: list[tuple[torch.optim.Optimizer, float]]
) -> dict[str, Tensor]:
    name_of = {id(p): n for n, p in parameters.items()}
    return {
        f"optimizer.{name_of[id(p)]}.{key}": value
        for optimizer, _ in optimizers
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def _save(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizers: list[tuple[torch.optim.Optimizer, float]],
    result: TrainResult,
    identities: Mapping[str, str],
) -> None:
    tensors = {f"parameter.{n}": p.detach() for n, p in parameters.items()}
    tensors |= _optimizer_tensors(parameters, optimizers)
    state = {"losses_nats": result.losses_nats, "seconds": result.seconds, **identities}
    save_parts(path, tensors, {"state": json.dumps(state)}, is_private=True)


def _resume(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizers: list[tuple[torch.optim.Optimizer, float]],
    result: TrainResult,
    identities: Mapping[str, str],
) -> None:
    if not path.exists():
        return
    try:
        with safetensors.safe_open(path, framework="pt") as f:
            state = parse_json(f.metadata()["state"])
            tensors = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as e:
        raise CheckpointError(
            f"{path} is not a checkpoint of this loop: {e}. Remove it to start again."
        ) from None
    key = "identity_but_for_rounding" if are_several() else "identity"
    if key not in state:
        raise CheckpointError(
            f"{path} is of an older FlexOlmo, so it cannot be told whose it is. Go on without "
            "torchrun."
        )
    if state[key] != identities[key]:
        raise CheckpointError(
            f"{path} belongs to a run with another recipe, seed, anchor, data, device or number "
            "of threads or processes. Give this run a directory of its own, remove the old one, "
            "or, if only threads or processes differ, go on under torchrun."
        )
    with torch.no_grad():
        for n, p in parameters.items():
            fill(p, tensors.pop(f"parameter.{n}"))
    for optimizer, _ in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                name = next(n for n, q in parameters.items() if q is p)
                prefix = f"optimizer.{name}."
                saved = {
                    n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)
                }
                for key, value in saved.items():  # in the parameter's own order in memory
                    place = torch.empty_like(p if value.shape == p.shape else value)
                    optimizer.state[p][key] = place.to(p.device)
                    fill(optimizer.state[p][key], value)
    result.losses_nats[:] = state["losses_nats"]
    result.seconds = state["seconds"]
