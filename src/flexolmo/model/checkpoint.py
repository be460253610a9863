"""The anchor on disk and in memory, with its digest.

An anchor directory is a stock `Olmo2ForCausalLM` checkpoint that transformers loads as it is,
plus `public.safetensors` (token statistics of public text) and `anchor.json` (digest, record).

D d_model, L layers.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from torch import Tensor

from flexolmo.bundle.signing import read_signature, sign_files
from flexolmo.bundle.strict import raise_listed
from flexolmo.bundle.tensors import largest_bits, value_of
from flexolmo.data.tokenizer import Tokenizer, load_tokenizer
from flexolmo.errors import CheckpointError, SignatureError
from flexolmo.files import (
    canonical_json,
    digest_bytes,
    digest_file,
    dtype_name,
    pieces_of,
    read_json,
    save_tensors,
    write_bytes,
    write_directory_aside,
    write_json,
)
from flexolmo.model.statistics import (
    BigramModel,
    EvidenceSettings,
    OwnerTable,
    in_public_steps,
    table_problems,
)
from flexolmo.model.stock import (
    INDEX,
    StockConfig,
    build_transformer,
    files_of_index,
    read_stock,
    stock_config,
    stock_name,
    write_stock,
)
from flexolmo.model.transformer import ModelConfig, Transformer

ANCHOR_VERSION = 3
FORMLESS_VERSIONS = (1, 2)  # are read too
WORTH_THREADS_BYTES = 1 << 22  # of tensors; fewer are hashed before threads have started
MAX_FORMS = 16  # tables of public text in other forms
SIGNATURE_FILE = "anchor.sig"
_FILES = (
    "anchor.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    INDEX,
    "public.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "LICENSE",
    "NOTICE",
    "README.md",
)

# --- digests ------------------------------------------------------------------------------------


def look_at(tensor: Tensor) -> tuple[str, float]:
    """Digest of dtype, shape and bytes, and the largest absolute value, of numbers in whatever
    memory, in pieces: infinity if not all are finite."""
    kind = dtype_name(tensor.dtype)
    bits = 0
    head = json.dumps([str(tensor.dtype), list(tensor.shape)]).encode()
    found = hashlib.sha256(head)
    for piece in pieces_of(tensor):
        found.update(piece)
        bits = max(bits, largest_bits(piece, kind))
    return "sha256:" + found.hexdigest(), value_of(bits, kind)


def digest_data(tensor: Tensor) -> str:
    """Digest of the bytes alone, as a bundle's manifest has it."""
    found = hashlib.sha256()
    for piece in pieces_of(tensor):
        found.update(piece)
    return "sha256:" + found.hexdigest()


def digest_tensor(tensor: Tensor) -> str:
    """Digest of dtype, shape and bytes."""
    return look_at(tensor)[0]


def digest_tensors(tensors: Iterable[tuple[str, Tensor]], **more: str) -> str:
    """One digest over names and contents, whatever their order and files."""
    return _join({n: digest_tensor(t) for n, t in tensors}, more)


def _join(digests: Mapping[str, str], more: Mapping[str, str]) -> str:
    return digest_bytes(canonical_json({**more, **digests}))


# --- the anchor ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class VerifiedAnchor:
    """Findings about an anchor's files when they were last read whole."""

    digest: str
    largest: Mapping[str, float]  # absolute value of each of the model's tensors


@dataclass(frozen=True)
class Anchor:
    """The frozen public model that every owner starts from."""

    model: Transformer
    tokenizer: Tokenizer
    public: BigramModel
    router_rows: Tensor  # [L,D] the public expert's rows for the linear router, float32
    digest: str
    record: dict[str, Any]
    format_version: int = ANCHOR_VERSION
    forms: tuple[OwnerTable, ...] = ()  # of public text in other forms, fitted as an owner's
    # Largest absolute value of each of the model's tensors.
    largest: Mapping[str, float] = field(default_factory=dict, repr=False)

    @property
    def config(self) -> ModelConfig:
        return self.model.config


def build_anchor(
    model: Transformer,
    tokenizer: Tokenizer,
    public: BigramModel,
    router_rows: Tensor,
    record: dict[str, Any],
    format_version: int = ANCHOR_VERSION,
    forms: Sequence[OwnerTable] = (),
    verified: VerifiedAnchor | None = None,
) -> Anchor:
    """An anchor in memory; its digest covers configuration, weights, tokenizer and statistics.

    In `format_version` 1 it leaves out max_seq_len. Numbers that are `verified` are not looked at.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"The tokenizer has {tokenizer.vocab_size} ids, the model's "
            f"vocabulary only {model.config.vocab_size}."
        )
    if tokenizer.eos_id != model.config.eos_token_id:
        raise CheckpointError(
            f"The tokenizer ends texts with id {tokenizer.eos_id}, the model's "
            f"config says {model.config.eos_token_id}."
        )
    model.requires_grad_(False)
    _refuse_halves(model.state_dict())
    found = verified or _look_over(model, tokenizer, public, router_rows, forms, format_version)
    return Anchor(
        model.eval(),
        tokenizer,
        public,
        router_rows,
        found.digest,
        record,
        format_version,
        tuple(forms),
        found.largest,
    )


def _look_over(
    model: Transformer,
    tokenizer: Tokenizer,
    public: BigramModel,
    router_rows: Tensor,
    forms: Sequence[OwnerTable],
    format_version: int,
) -> VerifiedAnchor:
    """Digest and largest numbers; CheckpointError if nobody could use them."""
    state = model.state_dict()
    tensors = state | _public_tensors(public, router_rows, forms)
    if sum(t.nbytes for t in tensors.values()) < WORTH_THREADS_BYTES:
        found = {name: look_at(tensor) for name, tensor in tensors.items()}
    else:
        with ThreadPoolExecutor(4) as pool:  # hashing leaves the interpreter to others
            found = dict(zip(tensors, pool.map(look_at, tensors.values()), strict=True))
    largest = {name: found[name][1] for name in state}
    _refuse_nonfinite(largest | {"router_rows": found["public.router_rows"][1]})
    unsaid = set() if model.config.document_mask else {"document_mask"}
    if format_version == 1:
        unsaid.add("max_seq_len")
    settings = {**model.config.model_dump(exclude=unsaid), "num_kv_heads": model.config.kv_heads}
    digests = {name: digest for name, (digest, _) in found.items()}
    config = digest_bytes(canonical_json(settings))
    return VerifiedAnchor(
        _join(digests, {"tokenizer": tokenizer.digest, "config": config}), largest
    )


def _refuse_halves(tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for a precision in which no expert can be trained."""
    if any(t.dtype == torch.float16 for t in tensors.values()):
        raise CheckpointError(
            "The anchor is in float16, in which gradients vanish or overflow and no expert can be "
            "trained. Import it with --dtype float32 (exact) or --dtype bfloat16."
        )


def _refuse_nonfinite(largest: Mapping[str, float]) -> None:
    """Raises CheckpointError for numbers beside which no expert can be trained."""
    bad = [name for name, value in largest.items() if not math.isfinite(value)]
    if bad:
        raise CheckpointError(
            f"The anchor holds NaN or infinity in {', '.join(bad)}: neither reading nor training "
            "can use it. Get whole weights."
        )


def _refuse_forms(directory: Path, anchor: Anchor) -> None:
    """Raises CheckpointError for too many tables of public text in other forms, or bad ones."""
    if len(anchor.forms) > (MAX_FORMS if anchor.format_version == ANCHOR_VERSION else 0):
        raise CheckpointError(
            f"{directory}, format version {anchor.format_version}, has {len(anchor.forms)} tables "
            f"of public text in other forms; version {ANCHOR_VERSION} has at most {MAX_FORMS}, "
            "those before none. Make the anchor again."
        )
    size = len(anchor.public.unigram)
    for i, table in enumerate(anchor.forms):
        shapes = [values.shape for values in vars(table).values()]
        dtypes = [values.dtype for values in vars(table).values()]
        pairs = (table.keys.size,)
        if shapes != [(size,), pairs, pairs] or dtypes != [np.int8, np.int64, np.int8]:
            lines = [f"shapes {shapes} and dtypes {dtypes}"]
        else:
            lines = table_problems(table, anchor.public, in_public_steps(EvidenceSettings()))
        if lines:
            raise CheckpointError(
                f"{directory}: table {i} of public text in other forms is none: {'; '.join(lines)}."
            )


def _public_tensors(
    public: BigramModel, router_rows: Tensor, forms: Sequence[OwnerTable]
) -> dict[str, Tensor]:
    named = [("public", public), *((f"forms.{i}", table) for i, table in enumerate(forms))]
    parts = {f"{n}.{k}": torch.from_numpy(v.copy()) for n, t in named for k, v in vars(t).items()}
    return parts | {"public.router_rows": router_rows.float()}


def save_anchor(anchor: Anchor, directory: Path) -> None:
    """Write the anchor to `directory`, all or nothing."""
    tensors = {stock_name(n): t for n, t in anchor.model.state_dict().items()}
    dtype = next(iter(tensors.values())).dtype
    with write_directory_aside(directory, "anchor.json") as aside:
        write_stock(aside, stock_config(anchor.config, dtype), tensors, anchor.tokenizer)
        save_tensors(
            aside / "public.safetensors",
            _public_tensors(anchor.public, anchor.router_rows, anchor.forms),
        )
        write_json(
            aside / "anchor.json",
            {
                "format": "flexolmo-anchor",
                "format_version": anchor.format_version,
                "digest": anchor.digest,
                "record": anchor.record,
            },
        )


def load_anchor(
    directory: Path, *, is_mapped: bool = False, verified: VerifiedAnchor | None = None
) -> Anchor:
    """The anchor in `directory`; refuses one whose content does not have its stated digest.

    Args:
        is_mapped: Leave the weights in their file, which nobody else may be able to change, mapped
            into memory: to look at, not to run.
        verified: Findings about these very files, which the caller knows to be unchanged. Their
            numbers are then not looked at again.
    """
    directory = Path(directory)
    if (directory / "mixture.json").exists():
        raise CheckpointError(
            f"{directory} holds a mixture.json, so it is a mixture; its anchor is in "
            f"{directory}/anchor."
        )
    about = read_json(directory / "anchor.json", CheckpointError)
    if not isinstance(about, dict) or "record" not in about or "digest" not in about:
        raise CheckpointError(f"{directory}/anchor.json is not an anchor's description.")
    if about.get("format") != "flexolmo-anchor" or about.get("format_version") not in (
        *FORMLESS_VERSIONS,
        ANCHOR_VERSION,
    ):
        raise CheckpointError(
            f"{directory}/anchor.json is format {about.get('format')!r} version "
            f"{about.get('format_version')!r}; expected 'flexolmo-anchor' version {ANCHOR_VERSION}."
        )
    config, tensors = read_stock(directory, StockConfig)
    model = build_transformer(config.decoder, tensors, str(directory), is_mapped=is_mapped)
    try:
        with safetensors.safe_open(directory / "public.safetensors", framework="pt") as f:
            found = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        public = BigramModel(
            **{f.name: found[f"public.{f.name}"].numpy().copy() for f in fields(BigramModel)}
        )
        numbers = {key.split(".")[1] for key in found if key.startswith("forms.")}
        forms = [
            OwnerTable(
                **{f.name: found[f"forms.{i}.{f.name}"].numpy().copy() for f in fields(OwnerTable)}
            )
            for i in range(len(numbers))
        ]
        rows = found["public.router_rows"]
    except (OSError, KeyError, safetensors.SafetensorError) as e:
        raise CheckpointError(f"{directory}/public.safetensors cannot be read: {e}.") from None
    tokenizer = load_tokenizer(directory)
    version = about["format_version"]
    anchor = build_anchor(model, tokenizer, public, rows, about["record"], version, forms, verified)
    if anchor.digest != about.get("digest"):
        raise CheckpointError(
            f"{directory} was changed: its content has digest {anchor.digest}, anchor.json says "
            f"{about.get('digest')}. Fetch the anchor again."
        )
    _refuse_forms(directory, anchor)
    return anchor


def anchor_files(directory: Path) -> list[str]:
    """Names of the files that make up the anchor in `directory`; whatever else is there is not of
    it."""
    found = [n for n in (*_FILES, SIGNATURE_FILE) if os.path.lexists(directory / n)]
    if INDEX in found:
        found += files_of_index(directory / INDEX)
    return found


def sign_anchor(directory: Path, key: ec.EllipticCurvePrivateKey) -> Anchor:
    """Sign the anchor's digest and each of its files, as bundles are signed, into anchor.sig."""
    directory = Path(directory)
    anchor = load_anchor(directory, is_mapped=True)
    write_bytes(
        directory / SIGNATURE_FILE, sign_files(anchor.digest, _digest_files(directory), key)
    )
    return anchor


def check_anchor(
    anchor: Anchor, directory: Path, digest: str | None = None, coordinator: Path | None = None
) -> None:
    """Check that `anchor`, read from `directory`, is the one agreed upon.

    Args:
        digest: Digest that it must have.
        coordinator: Public key (PEM file) that must have signed it and its files.

    Raises:
        CheckpointError: another digest.
        SignatureError: not signed, not by this key, or changed since.
    """
    if digest is not None and digest != anchor.digest:
        raise CheckpointError(
            f"{directory} has digest {anchor.digest}, expected {digest}. Ask the coordinator for "
            "the anchor again."
        )
    if coordinator is None:
        return
    try:
        public_pem = Path(coordinator).read_bytes()
        signature = (Path(directory) / SIGNATURE_FILE).read_bytes()
    except OSError as e:
        raise SignatureError(
            f"{e.filename} cannot be read ({e.strerror}). Both the coordinator's public key and "
            f"{directory}/{SIGNATURE_FILE} are needed; flexolmo anchor sign makes the latter."
        ) from None
    try:
        signed = read_signature(signature, public_pem)
    except SignatureError as e:
        raise SignatureError(
            f"{directory}/{SIGNATURE_FILE} was not made with the coordinator's key. {e}"
        ) from None
    lines = [] if signed.subject == anchor.digest else [f"digest: found {anchor.digest}"]
    found = _digest_files(Path(directory))
    changed = {
        n for n in found.keys() | signed.digests.keys() if found.get(n) != signed.digests.get(n)
    }
    lines += [f"{n}: changed, missing or added since it was signed" for n in sorted(changed)]
    raise_listed(
        SignatureError,
        f"{directory} is not what the coordinator signed:",
        lines,
        "Ask the coordinator for the anchor again.",
    )


def _digest_files(directory: Path) -> dict[str, str]:
    return {n: digest_file(directory / n) for n in anchor_files(directory) if n != SIGNATURE_FILE}
