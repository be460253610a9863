"""A finished expert made smaller, and what being smaller costs in bits per byte.

The pair of anchor and expert is what is measured: it is what the owner trained, and needs no
other owner's text.

D d_model, F d_ff.
"""

import datetime
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from flexolmo.data.batches import TokenSet, evaluation_windows
from flexolmo.errors import ConfigError
from flexolmo.evaluation.likelihood import read_windows
from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.checkpoint import Anchor, digest_tensors
from flexolmo.model.shape import architecture_of, shape_of_tensors
from flexolmo.progress import progress
from flexolmo.runtime import run_record
from flexolmo.train.compress import Curvature, compress_rank, measure_curvature, prune_width
from flexolmo.train.expert import Expert, ExpertRecipe, train_expert
from flexolmo.train.loop import TrainSettings

SPLIT = "validation"
HEALING = TrainSettings(steps=40, optimizer="adamw", learning_rate=4e-4, warmup_steps=4)
LADDER = (2, 4, 8, 16, 32, 64, 128)  # ranks that a curve tries, as far as they make sense
FRACTIONS = (0.125, 0.25, 0.5, 0.75)  # widths that it tries, of the expert's own


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
    or a size that this expert cannot have.
    """
    _refuse_other_anchor(anchor, expert)
    if (rank is None) == (width is None):
        raise ConfigError(f"Found rank {rank} and width {width}; give one of them.")
    how: dict[str, Any]
    if rank is not None:
        is_cut = delta_rank is not None or not expert.architecture["rank"]  # a whole matrix
        if curvature is None and data is not None and is_cut:
            curvature = _curvature_of(anchor, expert, data)
        tensors = compress_rank(anchor, expert.tensors, rank, delta_rank, curvature)
        how = {
            "rank": rank,
            "delta_rank": dict(delta_rank) if isinstance(delta_rank, Mapping) else delta_rank,
        }
        if curvature is not None and data is not None:
            how["data"] = data.digest
    else:
        if delta_rank is not None:
            raise ConfigError(f"Found delta_rank {delta_rank} with a width; it goes with a rank.")
        if width is None or data is None:
            raise ConfigError(
                "Columns are chosen by reading text: with a width, give the owner's prepared set."
            )
        tensors = prune_width(anchor, expert.tensors, data, width)
        how = {"width": width, "data": data.digest}
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


def _curvature_of(anchor: Anchor, expert: Expert, data: TokenSet) -> dict[str, Curvature]:
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
    """A compressed expert, trained on for `steps` as it is: what a cut broke is soon made good.

    It reads the batches that its training read first, again, at a low rate. With
    `has_half_deltas` its low-rank deltas are kept in bfloat16 afterwards. With `run_dir`, resumes
    a run that was cut off there. Raises ConfigError for another anchor or another set than it was
    trained on, or if it has no low-rank delta to keep.
    """
    _refuse_other_anchor(anchor, expert)
    if data.digest != expert.data_card_digest:
        raise ConfigError(
            f"Expert {expert.name} was trained on a set with digest "
            f"{expert.data_card_digest}; {data.directory} has {data.digest}. Heal it "
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
    recipe = ExpertRecipe(
        seed=expert.record["seed"],
        router=expert.router,
        train=settings,
        rank=sizes["rank"],
        width=None if sizes["rank"] else sizes["d_ff"],
        has_half_deltas=has_half_deltas,
        scope="all" if sizes["attention_rank"] else "ffn+head" if sizes["head_rank"] else "ffn",
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
            {k: healed.record[k] for k in ("config", "data", "tokens", "seconds")},
        ],
    }
    return replace(expert, tensors=healed.tensors, record=record)


def count_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of an expert's numbers, without a file's header."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def measure_curve(
    anchor: Anchor, expert: Expert, data: TokenSet, *, max_bytes: int | None = None
) -> dict[str, Any]:
    """Bytes and bits per byte of the expert as it is and at several smaller sizes.

    Read on the validation split of `data`, for this is a choice of settings. Of a whole FFN both
    ranks and widths are tried, of a low-rank one lower ranks, of a narrow one widths. Returns
    "anchor" and "whole" (bits per byte), "points" (from the smallest of each series), and the run.
    """
    seq_len = min(256, anchor.config.max_seq_len - 1)
    windows = list(evaluation_windows(data, SPLIT, seq_len, max_bytes))
    plans = _plan(anchor, expert)
    tokens = sum(len(ids) - 1 for ids, _ in windows)
    points = []
    with progress(f"curve of {expert.name}", tokens * (len(plans) + 2), "tok") as meter:

        def bits_of(candidate: Expert | None) -> float:
            model = (
                anchor.model
                if candidate is None
                else assemble_mixture(anchor, {expert.name: candidate.tensors}, expert.router)
            )
            return read_windows(model, windows, meter=meter).bits_per_byte

        bits = {"anchor": bits_of(None), "whole": bits_of(expert)}
        curvature = _curvature_of(anchor, expert, data)
        for series, sizes in plans:
            meter.note = ", ".join(f"{k} {v}" for k, v in sizes.items())
            small = compress_expert(
                anchor, expert, **sizes, data=data, curvature=curvature if "rank" in sizes else None
            )
            points.append(
                {
                    "series": series,
                    **sizes,
                    "bytes": count_bytes(small.tensors),
                    "bits_per_byte": bits_of(small),
                }
            )
    config = {"split": SPLIT, "seq_len": seq_len, "max_bytes": max_bytes}
    return {
        "expert": expert.name,
        "set": data.name,
        "whole_bytes": count_bytes(expert.tensors),
        "architecture": expert.architecture,
        "bits_per_byte": bits,
        "points": points,
        "run": run_record(
            config,
            0,
            {
                data.name: data.digest,
                "anchor": anchor.digest,
                "expert": digest_tensors(expert.tensors.items()),
            },
        ),
    }


def _plan(anchor: Anchor, expert: Expert) -> list[tuple[str, dict[str, int]]]:
    """Series and sizes to try, each series from the smallest."""
    config, sizes = anchor.config, expert.architecture
    has_deltas = any(sizes[k] for k in ("attention_rank", "embedding_rank", "head_rank"))
    plans: list[tuple[str, dict[str, int]]] = []
    if sizes["d_ff"] == config.d_ff:  # of the anchor's width, or a delta to it
        limit = sizes["rank"] or min(config.d_model, config.d_ff) // 2 + 1
        ranks = [r for r in LADDER if r < limit]
        plans += [("FFN of low rank", {"rank": r}) for r in ranks]
        if has_deltas:
            plans += [("FFN and deltas of low rank", {"rank": r, "delta_rank": r}) for r in ranks]
    if not sizes["rank"]:
        widths = sorted({max(1, int(f * sizes["d_ff"])) for f in FRACTIONS} - {sizes["d_ff"]})
        plans += [("narrow FFN", {"width": w}) for w in widths]
    return plans
