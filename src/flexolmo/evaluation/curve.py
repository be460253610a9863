"""Bits per byte that a finished expert would have at several smaller sizes.

The pair of anchor and expert is what is measured: it is what the owner trained, and needs no
other owner's text.
"""

from typing import Any

from flexolmo.data.batches import TokenSet, evaluation_windows
from flexolmo.evaluation.likelihood import read_windows
from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.checkpoint import Anchor, digest_tensors
from flexolmo.progress import progress
from flexolmo.runtime import run_record
from flexolmo.train.expert import Expert
from flexolmo.train.shrink import compress_expert, count_bytes, curvature_of

SPLIT = "validation"
LADDER = (2, 4, 8, 16, 32, 64, 128)  # ranks that a curve tries, as far as they make sense
FRACTIONS = (0.125, 0.25, 0.5, 0.75)  # widths that it tries, of the expert's own


def measure_curve(
    anchor: Anchor, expert: Expert, data: TokenSet, *, max_bytes: int | None = None
) -> dict[str, Any]:
    """Bytes and bits per byte of the expert as it is and at several smaller sizes.

    Read on the validation split of `data`, for this is a choice of settings. Of a whole FFN both
    ranks and widths are tried, of a low-rank one lower ranks, of a narrow one widths. Returns
    "anchor" and "whole" (bits per byte), "points" (from the smallest of each series), and the run.
    """
    data.check_tokenizer(anchor.tokenizer.digest, "the anchor")
    seq_len = min(256, anchor.config.max_seq_len - 1)
    windows = list(evaluation_windows(data, SPLIT, seq_len, max_bytes))
    plans = _sizes_to_try(anchor, expert)
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
        curvature = curvature_of(anchor, expert, data)
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


def _sizes_to_try(anchor: Anchor, expert: Expert) -> list[tuple[str, dict[str, int]]]:
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
