"""Router tensors that an expert starts from, made of the anchor and the owner's text alone.

Those of the default router are final: a table of the owner's text, which leaves with the bundle.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import torch
from torch import Tensor

from flexolmo.data.batches import TokenSet, embedding_windows
from flexolmo.errors import CheckpointError, ConfigError
from flexolmo.files import canonical_json, digest_bytes, save_tensors
from flexolmo.model.checkpoint import Anchor
from flexolmo.model.hidden_statistics import discriminant_tensors, gather, mean_hidden_state
from flexolmo.model.private_statistics import tabulate
from flexolmo.model.router import DiscriminantSettings, RouterSettings, first_raw_bias
from flexolmo.model.shape import BIGRAM_KEYS, BIGRAM_LEVELS, TOKEN_LEVELS
from flexolmo.model.statistics import UNTOLD, EvidenceSettings, OwnerTable

PUBLIC_WINDOWS = 256  # of public text, whose states' covariance the discriminant router needs
NOISED_TABLE = "noised_table.safetensors"  # in a run's directory, if router.epsilon is given


def start_router(
    anchor: Anchor,
    data: TokenSet,
    router: RouterSettings,
    public: TokenSet | None = None,
    run_dir: Path | None = None,
    offsets: np.ndarray | None = None,
) -> dict[str, Tensor]:
    """Router tensors of an expert before training, from the anchor and the owner's text alone.

    evidence: the table of that text, final; the rest as in `start_table`. linear: in every layer
    the same row, the mean hidden state over the text, and a bias of -0.13. discriminant: a row and
    offset per layer from the text's states and from those of `public`, the prepared public set,
    final. Source: §3.3.2 for linear; the others ours.
    """
    refuse_other_tokenizers(anchor, data, public)
    config = anchor.config
    tensors: dict[str, Tensor] = {}
    if isinstance(router, EvidenceSettings):
        return start_table(anchor, data, router, run_dir, offsets)
    if isinstance(router, DiscriminantSettings):
        if public is None:
            raise ConfigError(
                "The discriminant router holds an owner's states against public "
                "text: give the prepared public set."
            )
        own_sums, public_sums = (
            gather(anchor.model, embedding_windows(s, config.max_seq_len, n), router)
            for s, n in ((data, None), (public, PUBLIC_WINDOWS))
        )
        return discriminant_tensors(own_sums, public_sums, router)
    row = mean_hidden_state(anchor.model, embedding_windows(data, config.max_seq_len))
    for i in range(config.num_layers):
        tensors[f"layers.{i}.router.weight"] = row[None].clone()
        if router.has_bias:
            tensors[f"layers.{i}.router.raw_bias"] = first_raw_bias(router)
    return tensors


def start_table(
    anchor: Anchor,
    data: TokenSet,
    router: EvidenceSettings,
    run_dir: Path | None = None,
    offsets: np.ndarray | None = None,
) -> dict[str, Tensor]:
    """Tensors of the table of the owner's text.

    `offsets` [n + 1] are those of the texts that epsilon protects, by default source documents. A
    noised table is drawn once for a run and kept in `run_dir`, for a second one of the same text
    would spend its epsilon again. Raises CheckpointError if the one there is of something else.
    """
    kept = None if run_dir is None or router.epsilon is None else Path(run_dir) / NOISED_TABLE
    split = data.splits["train"]
    offsets = split.source_offsets if offsets is None else offsets
    count = len(offsets) - 1
    origin = {
        "anchor": anchor.digest,
        "data": data.digest,
        "router": router.model_dump(mode="json"),
        "texts": count,
    }
    metadata = {"origin": digest_bytes(canonical_json(origin))}
    if router.epsilon is not None and router.delta * count >= 1:
        raise ConfigError(
            f"router.delta {router.delta:g} allows that one of the {count:,} protected texts of "
            f"{data.directory} is told of outright; give less than {1 / count:.1g}."
        )
    if kept is not None and kept.exists():
        tensors = _read_kept(kept, metadata)
    else:
        table = tabulate(split.tokens, offsets, anchor.public, router)
        tensors = table_tensors(table)
        if kept is not None:  # also one that is refused below: another draw would be counted
            save_tensors(kept, tensors, metadata, is_private=True)
    if not (tensors[TOKEN_LEVELS] != UNTOLD).any():
        raise ConfigError(
            f"No token is in at least {router.min_documents} of the {count:,} source documents of "
            f"{data.directory}, so the router has nothing to go by. Give more documents, or lower "
            "router.min_documents, which all owners of a mixture must agree on."
        )
    is_noise = not tensors[TOKEN_LEVELS].any() and BIGRAM_KEYS not in tensors
    if router.epsilon is not None and is_noise:
        raise ConfigError(
            f"Noise of router.epsilon {router.epsilon:g} hides all that the {count:,} source "
            f"documents of {data.directory} tell from public text. Give more documents, or raise "
            "router.epsilon, in a run of its own: what was drawn for this one counts too."
        )
    return tensors


def table_tensors(table: OwnerTable) -> dict[str, Tensor]:
    """Tensors of a table, as an expert holds them."""
    tensors = {TOKEN_LEVELS: torch.from_numpy(table.token_levels)}
    if len(table.keys):
        tensors[BIGRAM_KEYS] = torch.from_numpy(table.keys)
        tensors[BIGRAM_LEVELS] = torch.from_numpy(table.pair_levels)
    return tensors


def _read_kept(path: Path, metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of a noised table that an earlier start of the same run drew."""
    try:
        with safetensors.safe_open(path, framework="pt") as f:
            found = f.metadata() or {}
            tensors = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as e:
        raise CheckpointError(f"{path} holds no table: {e}. Use another directory.") from None
    if found != metadata:
        raise CheckpointError(
            f"{path} is the noised table of other text, of another anchor or of other router "
            "settings. Give this run a directory of its own."
        )
    return tensors


def refuse_other_tokenizers(anchor: Anchor, data: TokenSet, public: TokenSet | None) -> None:
    """Raise DataError for a set that was not prepared with the anchor's tokenizer."""
    for token_set in (data, public):
        if token_set is not None:
            token_set.check_tokenizer(anchor.tokenizer.digest, "the anchor")
