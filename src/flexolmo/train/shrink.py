"""Shrinking of a finished expert by its owner, and training that makes good what was cut.

Knows the expert's record and the owner's text; the linear algebra is in `train.compress`.
"""

import datetime
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from flexolmo.data.batches import TokenSet
from flexolmo.errors import ConfigError
from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.checkpoint import Anchor, digest_tensors
from flexolmo.model.shape import architecture_of, shape_of_tensors
from flexolmo.train.compress import Curvature, compress_rank, measure_curvature, prune_width
from flexolmo.train.expert import Expert, ExpertRecipe, Scope, refuse_private, train_expert
from flexolmo.train.loop import TrainSettings
from flexolmo.train.rows import hide_rows, moved_rows

HEALING = TrainSettings(steps=40, optimizer="adamw", learning_rate=4e-4, warmup_steps=4)


def compress_expert(
    anchor: Anchor,
    expert: Expert,
    *,
    rank: int | None = None,
    delta_rank: int | Mapping[str, int] | None = None,
    width: int | None = None,
    data: TokenSet | None = None,
    curvature: Mapping[str, Curvature] | None = None,
) -> Expert:
    """The expert with its FFN at `rank`, or with the `width` columns that matter most to `data`.

    With `data`, whole matrices are cut to a rank by what the cut costs on that text (see
    `train.compress.truncate`), measured here or given as `curvature`. `delta_rank` cuts attention,
    embedding and head too, all alike or by name (see `compress_rank`). The new expert's record says
    under "compressed" what it was made of and how. Raises ConfigError for another anchor's expert,
    a size that this expert cannot have, or a private one with `data` or
    `curvature`.
    """
    _refuse_other_anchor(anchor, expert)
    if data is not None or curvature is not None:
        refuse_private(expert, "choosing what to cut by the text is")
    if data is not None:
        data.check_tokenizer(anchor.tokenizer.digest, "the anchor")
    if (rank is None) == (width is None):
        raise ConfigError(f"Found rank {rank} and width {width}; give one of them.")
    how: dict[str, Any]
    if rank is not None:
        is_cut = delta_rank is not None or not expert.architecture["rank"]  # a whole matrix
        if curvature is None and data is not None and is_cut:
            curvature = curvature_of(anchor, expert, data)
        tensors = compress_rank(anchor, expert.tensors, rank, delta_rank, curvature)
        tensors |= hide_rows(anchor, tensors, moved_rows(anchor, expert.tensors))
        how = {
            "rank": rank,
            "delta_rank": dict(delta_rank) if isinstance(delta_rank, Mapping) else delta_rank,
        }
        if curvature is not None and data is not None:
            how["data"] = data.commitment
    else:
        if delta_rank is not None:
            raise ConfigError(f"Found delta_rank {delta_rank} with a width; it goes with a rank.")
        if width is None or data is None:
            raise ConfigError(
                "Columns are chosen by reading text: with a width, give the owner's prepared set."
            )
        tensors = prune_width(anchor, expert.tensors, data, width)
        how = {"width": width, "data": data.commitment}
    shape = shape_of_tensors({n: tuple(t.shape) for n, t in tensors.items()}, anchor.config)
    step = {
        "from": {
            "tensors": digest_tensors(expert.tensors.items()),
            "architecture": expert.architecture,
        },
        "how": how,
        "bytes": {"before": count_bytes(expert.tensors), "after": count_bytes(tensors)},
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    record = expert.record | {"compressed": [*expert.record.get("compressed", []), step]}
    return replace(
        expert, tensors=tensors, record=record, architecture=architecture_of(anchor.config, shape)
    )


def _refuse_other_anchor(anchor: Anchor, expert: Expert) -> None:
    if expert.anchor_digest != anchor.digest:
        raise ConfigError(
            f"Expert {expert.name} was trained beside anchor {expert.anchor_digest}; "
            f"this anchor is {anchor.digest}. Give the anchor of its training."
        )


def curvature_of(anchor: Anchor, expert: Expert, data: TokenSet) -> dict[str, Curvature]:
    """Curvature of the expert's whole matrices beside `anchor`, on its owner's training text."""
    pair = assemble_mixture(anchor, {expert.name: expert.tensors}, expert.router)
    return measure_curvature(pair, expert.name, data)


def heal_expert(
    anchor: Anchor,
    expert: Expert,
    data: TokenSet,
    steps: int,
    *,
    has_half_deltas: bool = False,
    settings: TrainSettings | None = None,
    run_dir: Path | None = None,
    num_threads: int | None = None,
) -> Expert:
    """Train a compressed expert for `steps` more, which makes good much of what was cut.

    Reads the batches that its training read first, again, at a low rate. With
    `has_half_deltas` its low-rank deltas are kept in bfloat16 afterwards. With `run_dir`, resumes
    a run that was cut off there. Raises ConfigError for another anchor or another set than it was
    trained on, for a private expert, or if it has no low-rank delta to keep.
    """
    refuse_private(expert, "healing is")
    _refuse_other_anchor(anchor, expert)
    if data.commitment != expert.data_card_digest:
        raise ConfigError(
            f"Expert {expert.name} was trained on a set with commitment "
            f"{expert.data_card_digest}; {data.directory} has {data.commitment}. Heal it "
            "on the text of its training."
        )
    sizes = dict(expert.architecture)
    if has_half_deltas and not any(".lora_" in n for n in expert.tensors):
        raise ConfigError(
            f"Expert {expert.name} has no low-rank delta to keep in bfloat16. Cut it "
            "to a rank, or leave that out."
        )
    trained = expert.record["config"]["train"]
    settings = settings or HEALING.model_copy(
        update={k: trained[k] for k in ("batch_size", "seq_len")}
    )
    settings = settings.model_copy(
        update={"steps": steps, "warmup_steps": min(settings.warmup_steps, steps)}
    )
    scope: Scope = "ffn+head" if sizes["head_rank"] else "ffn"
    if sizes["attention_rank"]:
        scope = "all"
    recipe = ExpertRecipe(
        seed=expert.record["seed"],
        router=expert.router,
        train=settings,
        rank=sizes["rank"],
        width=None if sizes["rank"] else sizes["d_ff"],
        has_half_deltas=has_half_deltas,
        scope=scope,
        **{key: sizes[key] or None for key in ("attention_rank", "embedding_rank", "head_rank")},
    )
    healed = train_expert(
        anchor,
        data,
        expert.name,
        recipe,
        run_dir,
        num_threads,
        start={n: t.clone() for n, t in expert.tensors.items()},
    )
    record = expert.record | {
        "tokens": expert.record["tokens"] + healed.record["tokens"],
        "healed": [
            *expert.record.get("healed", []),
            {k: healed.record[k] for k in ("config", "tokens", "seconds")},
        ],
    }
    return replace(expert, tensors=healed.tensors, record=record)


def count_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of an expert's numbers, without a file's header."""
    return sum(t.numel() * t.element_size() for t in tensors.values())
