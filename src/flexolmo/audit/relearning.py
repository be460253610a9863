"""Attack by relearning: does an owner's knowledge come back from a mixture that has it off?

What was only hidden comes back after a little training on other text, faster than it is learnt
anew. So a mixture with the owner's expert off and the bare anchor are trained alike, on some public
text and some that is related to the owner's, and the owner's training text is read on the way.
Source: relearning after removal, arXiv 2606.13873; here against the anchor, ours.

n documents.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from flexolmo.audit.intervals import RESAMPLES
from flexolmo.audit.subjects import ANCHOR, OFF, ON, Subjects
from flexolmo.audit.texts import read_members
from flexolmo.config import Settings
from flexolmo.data.batches import TokenSet, training_batches
from flexolmo.errors import ConfigError
from flexolmo.evaluation.likelihood import Likelihood, read_windows
from flexolmo.inference.reader import OwnReader
from flexolmo.model.loss import language_model_loss
from flexolmo.model.moe import MixtureModel
from flexolmo.model.transformer import Transformer
from flexolmo.runtime import run_record
from flexolmo.train.loop import TrainSettings, train

LEAST_TOKENS = 20
READ_TOKENS = 256  # of a document
RELATED = "validation"  # split of the owner's set, on which nobody trained


class RelearningSettings(Settings):
    """Settings of the attack."""

    steps: int = Field(40, ge=1, description="Optimizer steps.")
    every: int = Field(10, ge=1, description="Steps between two readings of the owner's text.")
    batch_size: int = Field(4, ge=2, description="Sequences in a step, half public, half related.")
    seq_len: int = Field(256, ge=2, description="Tokens predicted in a sequence.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    max_documents: int = Field(200, ge=1, description="Training documents to read at most.")
    seed: int = Field(0, ge=0, lt=2**31, description="Random seed of batches and documents.")


def audit_relearning(
    subjects: Subjects, token_set: TokenSet, public: TokenSet, settings: RelearningSettings
) -> dict[str, Any]:
    """Train the mixture without the owner's expert, and its anchor, on the same text, in place.

    The text is half `public`, half the validation split of the owner's set, which is related and
    which no expert was trained on. Under "curves", by start (off, anchor): bits per byte of
    training documents after so many steps. "aimed_at": with the expert on. "extra": bits per byte
    that the mixture has gained more than the anchor in the end, with its interval; not above 0 if
    nothing comes back. "is_same": whether both read alike at every step, to the bit; none where
    other experts are on.

    Raises ConfigError for a model that is no mixture with the expert on.
    """
    models = {s.name: cast(OwnReader, s.reader) for s in subjects.models}
    if ON not in models:
        raise ConfigError("Relearning is tried on a mixture that has the owner's expert on.")
    subjects.check_set(token_set)
    public.check_tokenizer(models[ON].tokenizer.digest, "the mixture")
    config = models[ON].model.config
    config.refuse_longer(settings.seq_len, "seq_len")
    length = min(READ_TOKENS, config.max_seq_len - 1)
    documents = read_members(
        token_set,
        subjects.recipe,
        least=min(LEAST_TOKENS, length),
        length=length,
        most=settings.max_documents,
        seed=settings.seed,
    )
    windows = [(d.ids, d.bytes) for d in documents]
    aimed_at = read_windows(models[ON].model, windows, enabled=models[ON].enabled)
    batch = _batches(token_set, public, settings)
    readings = {
        name: _relearn(models[name], windows, batch, settings, name) for name in (OFF, ANCHOR)
    }
    return {
        "audit": "relearning",
        "about": subjects.about,
        "documents": len(windows),
        "aimed_at": aimed_at.bits_per_byte,
        "curves": {
            name: [{"step": step, "bits_per_byte": x.bits_per_byte} for step, x in found]
            for name, found in readings.items()
        },
        "extra": _extra(
            [x for _, x in readings[OFF]], [x for _, x in readings[ANCHOR]], windows, settings.seed
        ),
        "is_same": (
            all(
                _are_equal(one, other)
                for (_, one), (_, other) in zip(readings[OFF], readings[ANCHOR], strict=True)
            )
            if subjects.is_alone
            else None
        ),
        "run": run_record(
            settings.model_dump(),
            settings.seed,
            {
                token_set.name: token_set.digest,
                public.name: public.digest,
                "model": subjects.about["digest"],
            },
        ),
    }


def _batches(
    token_set: TokenSet, public: TokenSet, settings: RelearningSettings
) -> Callable[[int], Tensor]:
    """Function from a step to its batch, int64 [B,T+1]: public text, then related."""
    half = settings.batch_size // 2
    sizes = ((public, "train", settings.batch_size - half), (token_set, RELATED, half))
    sources = [
        training_batches(data, split, size, settings.seq_len, settings.seed)
        for data, split, size in sizes
    ]
    return lambda step: torch.from_numpy(np.concatenate([s.batch(step) for s in sources]))


def _relearn(
    reader: OwnReader,
    windows: Sequence[tuple[np.ndarray, int]],
    batch: Callable[[int], Tensor],
    settings: RelearningSettings,
    label: str,
) -> list[tuple[int, Likelihood]]:
    """Train all that takes part in the model's answers; the readings of `windows`, by step."""
    model = cast(Transformer, reader.model)
    options: dict[str, Any] = {}
    if isinstance(model, MixtureModel):
        options["active"] = model.expert_mask([reader.enabled] * settings.batch_size)
    model.requires_grad_(True)
    language_model_loss(model, batch(0), **options).backward()
    taking_part = {n: p for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found: list[tuple[int, Likelihood]] = []

    def read(step: int) -> None:
        found.append((step, read_windows(model, windows, enabled=reader.enabled)))

    def loss(step: int) -> Tensor:
        if step % settings.every == 0:
            read(step)
        return language_model_loss(model, batch(step), **options)

    how = TrainSettings(
        steps=settings.steps,
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        optimizer="adamw",
        learning_rate=settings.learning_rate,
        warmup_steps=0,
    )
    train(taking_part, loss, how, None, f"relearning, {label}", {}, {})
    read(settings.steps)
    return found


def _extra(
    off: Sequence[Likelihood],
    anchor: Sequence[Likelihood],
    windows: Sequence[tuple[np.ndarray, int]],
    seed: int,
) -> dict[str, Any]:
    """Bits per byte gained from the first reading to the last, by the mixture less by the anchor,
    and the 95 % interval of a bootstrap over documents."""

    def gains(readings: Sequence[Likelihood]) -> np.ndarray:
        first, last = (
            np.array([x.sum(dtype=np.float64) for x in r.log_probs])
            for r in (readings[0], readings[-1])
        )
        return (last - first) / np.log(2)  # [n]

    more = gains(off) - gains(anchor)
    sizes = np.array([size for _, size in windows])
    drawn = np.random.default_rng(seed).integers(len(more), size=(RESAMPLES, len(more)))
    bounds = np.quantile(more[drawn].sum(1) / sizes[drawn].sum(1), [0.025, 0.975])
    return {"bits_per_byte": float(more.sum() / sizes.sum()), "interval": bounds.tolist()}


def _are_equal(one: Likelihood, other: Likelihood) -> bool:
    """True if every token's log-probability is the same, to the bit."""
    return all(np.array_equal(a, b) for a, b in zip(one.log_probs, other.log_probs, strict=True))
