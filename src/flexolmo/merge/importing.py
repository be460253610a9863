"""Import of a stock `FlexOlmoForCausalLM` checkpoint as a mixture, and a plan of it.

The checkpoint is taken apart into an anchor and experts by the names and shapes of its tensors
alone. A plan does that, and all that follows of it, on torch's meta device: no weight is read.

D d_model, E experts, L layers.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexolmo.bundle.bundle import MAX_FILE_BYTES, WEIGHTS_FILE, write_bundle
from flexolmo.bundle.manifest import PUBLIC, build_manifest, require_name
from flexolmo.bundle.serials import take_serial
from flexolmo.bundle.terms import Terms
from flexolmo.bundle.trust import ANY_SIGNER
from flexolmo.data.tokenizer import Tokenizer, load_tokenizer
from flexolmo.errors import CheckpointError
from flexolmo.files import digest_file, save_tensors, size_of_tensors
from flexolmo.merge.export import stock_tensors
from flexolmo.merge.mixture import build_mixture
from flexolmo.model.assemble import frame_mixture
from flexolmo.model.checkpoint import Anchor, VerifiedAnchor, build_anchor, save_anchor
from flexolmo.model.router import LinearSettings
from flexolmo.model.shape import FFN_PARTS, ExpertShape, architecture_of
from flexolmo.model.statistics import BigramModel
from flexolmo.model.stock import (
    DTYPES,
    INDEX,
    DtypeName,
    StockMixtureConfig,
    build_transformer,
    expert_name,
    files_of_index,
    gate_name,
    list_misfits,
    mixture_shapes,
    read_index,
    read_stock,
    read_stock_config,
    refuse_misfits,
    size_of_stock,
    stock_name,
)
from flexolmo.model.transformer import ModelConfig
from flexolmo.runtime import run_record

ROUTER = LinearSettings(has_bias=False)


@dataclass(frozen=True)
class _Parts:
    """A stock mixture taken apart."""

    stock: StockMixtureConfig
    config: ModelConfig
    tokenizer: Tokenizer
    dense: dict[str, Tensor]  # of the public expert, as a dense stock checkpoint names them
    public_rows: Tensor  # [L,D] of the router, float32
    experts: dict[str, dict[str, Tensor]]  # by name, as in `expert_shapes`


def import_stock(
    directory: Path,
    names: Sequence[str],
    out: Path,
    private_key: Path,
    *,
    owner: str,
    licence: str,
    terms: Terms,
    dtype: DtypeName | None = None,
) -> dict[str, Any]:
    """A mixture of ours from a stock FlexOlmo checkpoint; expert 0 becomes the public anchor.

    `names` are the other experts' names, in the checkpoint's order. Each is signed with the
    importer's key, for whom `owner` stands: the checkpoint itself carries no signature. Routing is
    in float32, the rest in the precision stock runs the checkpoint in, or in `dtype`.
    """
    stock, tensors = read_stock(directory, StockMixtureConfig, dtype)
    parts = _take_apart(directory, stock, tensors, names)
    record = run_record({"imported_from": Path(directory).name}, 0, {})
    anchor = _make_anchor(parts, directory, record)
    source_digest = digest_file(Path(directory) / "config.json")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(out).resolve().parent) as temporary:
        aside = Path(temporary)
        save_anchor(anchor, aside / "anchor")
        bundles = []
        for name, expert in parts.experts.items():
            weights = aside / "expert.safetensors"
            save_tensors(weights, expert)
            expert.clear()
            manifest = build_manifest(
                weights,
                name=name,
                owner=owner,
                anchor_digest=anchor.digest,
                architecture=architecture_of(parts.config, ExpertShape(d_ff=parts.config.d_ff)),
                router_kind="linear",
                router_settings=ROUTER.model_dump(mode="json"),
                recipe={"imported_from": Path(directory).name},
                tokens_seen=0,
                data_card_digest=source_digest,
                serial=take_serial(private_key, owner, name),
                licence=licence,
                terms=terms,
            )
            bundles.append(write_bundle(aside / f"{name}.bundle", weights, manifest, private_key))
        about = build_mixture(
            aside / "anchor", bundles, Path(out), ANY_SIGNER, top_k=stock.num_experts_per_tok
        )
    return about


def _take_apart(
    directory: Path, stock: StockMixtureConfig, tensors: dict[str, Tensor], names: Sequence[str]
) -> _Parts:
    """The parts of a stock mixture, by the names of its tensors, each under its new one; `tensors`
    is emptied. Raises CheckpointError that lists every missing, extra and misshapen tensor."""
    count = stock.experts
    if len(names) != count - 1 or len(set(names)) != len(names):
        raise CheckpointError(
            f"{directory} has {count} experts, the first of them public: give "
            f"{count - 1} different names, found {len(names)}: "
            f"{', '.join(names)}."
        )
    for name in names:
        require_name(name)
    tokenizer = load_tokenizer(directory)
    config = stock.decoder.model_copy(update={"eos_token_id": tokenizer.eos_id})
    refuse_misfits(tensors, mixture_shapes(config, count, tensors, str(directory)), str(directory))
    experts: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    dense: dict[str, Tensor] = {}
    public_rows = []
    for i in range(config.num_layers):
        gate = tensors.pop(gate_name(i)).float()  # [E,D]
        public_rows.append(gate[0])
        for part in FFN_PARTS:
            dense[stock_name(f"layers.{i}.mlp.{part}.weight")] = tensors.pop(
                expert_name(i, 0, part)
            )
        for e, expert in enumerate(experts.values(), 1):
            for part in FFN_PARTS:
                expert[f"layers.{i}.{part}.weight"] = tensors.pop(expert_name(i, e, part))
            expert[f"layers.{i}.router.weight"] = gate[e : e + 1].contiguous()
    dense |= tensors
    tensors.clear()
    _refuse_large(directory, experts)
    return _Parts(stock, config, tokenizer, dense, torch.stack(public_rows), experts)


def _refuse_large(directory: Path, experts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """CheckpointError if an expert does not fit into a bundle."""
    most = MAX_FILE_BYTES[WEIGHTS_FILE]
    sizes = {name: size_of_tensors(expert) for name, expert in experts.items()}
    if large := [f"{name} ({size:,} bytes)" for name, size in sizes.items() if size > most]:
        raise CheckpointError(
            f"{directory}: a bundle has at most {most:,} bytes of weights, found "
            f"{', '.join(large)}. Give a smaller precision (--dtype)."
        )


def _make_anchor(
    parts: _Parts, directory: Path, record: dict[str, Any], verified: VerifiedAnchor | None = None
) -> Anchor:
    """The public expert as an anchor, without statistics of public text."""
    model = build_transformer(parts.config, parts.dense, str(directory), is_mapped=True)
    size = parts.config.vocab_size
    even = np.full(size, -math.log(size), dtype=np.float32)
    nothing = BigramModel(
        even, np.zeros_like(even), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    )
    return build_anchor(
        model, parts.tokenizer, nothing, parts.public_rows, record, verified=verified
    )


# --- a plan -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImportPlan:
    """Sizes of the mixture that an import would make, public first among its experts."""

    num_layers: int
    top_k: int
    dtype: str
    parameters: dict[str, int]  # by expert; public has all that is no owner's
    weights_bytes: dict[str, int]  # by expert, of its file of weights
    files: list[str]  # of the checkpoint's weights
    absent_files: list[str]  # those that are not there, whose shapes are taken from the config
    changes: list[str]  # a line for each name and shape that an export of it would not have alike


def plan_import(
    directory: Path, names: Sequence[str] | None = None, dtype: DtypeName | None = None
) -> ImportPlan:
    """Result that `import_stock` would have on a checkpoint of which config, index, tokenizer and
    headers are read, and no weight.

    Files that the index names need not be there yet, if config or `dtype` state a precision.
    Without `names` experts are called by their numbers. Raises CheckpointError, or MergeError, for
    whatever of names and shapes the import would refuse; what it asks of the numbers themselves
    (that all are finite, and none too large) is not asked.
    """
    directory = Path(directory)
    presumed = _presume(directory, dtype)
    stock, tensors = read_stock(directory, StockMixtureConfig, dtype, presumed=presumed)
    came = {name: tuple(t.shape) for name, t in tensors.items()}
    if stock.tie_word_embeddings:  # one matrix there, two here
        came.pop("lm_head.weight", None)
    if names is None:
        names = [f"expert{e}" for e in range(1, stock.experts)]
    parts = _take_apart(directory, stock, tensors, names)
    anchor = _make_anchor(parts, directory, {}, VerifiedAnchor("", {}))
    shapes = {
        name: {key: tuple(t.shape) for key, t in expert.items()}
        for name, expert in parts.experts.items()
    }
    model = frame_mixture(anchor, shapes, ROUTER, top_k=stock.num_experts_per_tok)
    public = {stock_name(n): t for n, t in anchor.model.state_dict().items()}
    sizes = {name: size_of_tensors(expert) for name, expert in parts.experts.items()}
    index = directory / INDEX
    files = files_of_index(index) if index.exists() else ["model.safetensors"]
    parameters = {name: _count(expert) for name, expert in parts.experts.items()}
    return ImportPlan(
        num_layers=parts.config.num_layers,
        top_k=stock.num_experts_per_tok,
        dtype=str(anchor.model.embed_tokens.weight.dtype).removeprefix("torch."),
        parameters={PUBLIC: _count(public) + parts.public_rows.numel(), **parameters},
        weights_bytes={PUBLIC: size_of_stock(public), **sizes},
        files=files,
        absent_files=[name for name in files if not (directory / name).exists()],
        changes=list_misfits(stock_tensors(model), came),
    )


def _presume(directory: Path, dtype: DtypeName | None) -> dict[str, Tensor]:
    """Tensors, on the meta device, that a checkpoint of this config and index must hold; none if
    there is no index, or nothing says their precision."""
    stock = read_stock_config(directory, StockMixtureConfig)
    precision = dtype or stock.dtype or stock.torch_dtype
    if precision is None or not (directory / INDEX).exists():
        return {}
    names = read_index(directory / INDEX)
    shapes = mixture_shapes(stock.decoder, stock.experts, names, str(directory))
    return {
        name: torch.empty(shape, dtype=DTYPES[precision], device="meta")
        for name, shape in shapes.items()
    }


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() for t in tensors.values())
