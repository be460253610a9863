"""Models on disk: the stock format, the name map, and the anchor with its digest.

An anchor directory is a stock `Olmo2ForCausalLM` checkpoint that transformers loads as it is,
plus `public.safetensors` (token statistics of public text) and `anchor.json` (digest, record).
safetensors only; whatever a config asks for that this decoder does not do is refused.

V vocabulary, D d_model, F d_ff, E experts.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from flexolmo.data.tokenizer import Tokenizer, load_tokenizer
from flexolmo.errors import CheckpointError
from flexolmo.files import (
    canonical_json,
    digest_bytes,
    read_json,
    write_directory_aside,
    write_json,
)
from flexolmo.model.statistics import BigramModel
from flexolmo.model.transformer import ModelConfig, Transformer

_TORCH_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


# --- the stock format ---------------------------------------------------------------------------


def stock_config(config: ModelConfig, dtype: torch.dtype, **more: Any) -> dict[str, Any]:
    """The `config.json` that stock transformers reads: `Olmo2`, or `FlexOlmo` with `more`."""
    return {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "pad_token_id": config.eos_token_id,
        "eos_token_id": config.eos_token_id,
        "bos_token_id": config.eos_token_id,
        "dtype": _TORCH_NAMES[dtype],
        **more,
    }


def read_stock_config(directory: Path, model_type: str) -> tuple[ModelConfig, dict[str, Any]]:
    """The shape in `directory`/config.json, and the whole JSON.

    Raises CheckpointError for another model type or a feature this decoder does not have.
    """
    path = Path(directory) / "config.json"
    raw = read_json(path, CheckpointError)
    if raw.get("model_type") != model_type:
        raise CheckpointError(
            f"{path}: model_type is {raw.get('model_type')!r}, expected {model_type!r}."
        )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    wrong = []
    if raw.get("hidden_act", "silu") != "silu":
        wrong.append(f"hidden_act {raw['hidden_act']!r} (only silu)")
    if raw.get("attention_bias"):
        wrong.append("attention_bias true (only false)")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        wrong.append(f"rope type {rope.get('rope_type', rope.get('type'))!r} (only default)")
    if raw.get("norm_topk_prob"):
        wrong.append("norm_topk_prob true (only false)")
    if wrong:
        raise CheckpointError(f"{path} asks for what this decoder does not do: {'; '.join(wrong)}.")
    try:
        eos = raw.get("eos_token_id")
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            d_model=raw["hidden_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw.get("num_key_value_heads"),
            d_ff=raw["intermediate_size"],
            max_seq_len=raw.get("max_position_embeddings", 4096),
            rope_theta=rope["rope_theta"] if "rope_theta" in rope else raw["rope_theta"],
            norm_eps=raw["rms_norm_eps"],
            eos_token_id=(eos[0] if isinstance(eos, list) else eos) or 0,
        ), raw
    except KeyError as e:
        raise CheckpointError(f"{path} has no {e.args[0]!r}; it is not guessed.") from None
    except ValueError as e:
        raise CheckpointError(f"{path}: {e}") from None


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a stock checkpoint, from one file or from those its index names."""
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        where = read_json(index, CheckpointError).get("weight_map", {})
        files = sorted(set(where.values()))
        if any(Path(f).name != f for f in files):
            raise CheckpointError(f"{index} names files outside its directory.")
    else:
        files = ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for name in files:
        try:
            with safetensors.safe_open(directory / name, framework="pt") as f:
                for key in f.keys():  # noqa: SIM118 (not a mapping)
                    if key in tensors:
                        raise CheckpointError(f"{directory}: {key} is in two files.")
                    tensors[key] = f.get_tensor(key)
        except FileNotFoundError:
            raise CheckpointError(
                f"{directory} has no {name}; only safetensors checkpoints are read."
            ) from None
        except safetensors.SafetensorError as e:
            raise CheckpointError(
                f"{directory / name} is not a whole safetensors file: {e}."
            ) from None
    return tensors


def stock_name(name: str) -> str:
    """Our parameter's name in a stock checkpoint."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def load_weights(model: Transformer, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy `tensors`, under our names, into `model`, parameter by parameter.

    Raises CheckpointError that lists every missing, extra and misshapen tensor.
    """
    own = {n: p for n, p in model.state_dict(keep_vars=True).items()}
    lines = [f"missing: {n}" for n in sorted(own.keys() - tensors.keys())]
    lines += [f"extra: {n}" for n in sorted(tensors.keys() - own.keys())]
    lines += [
        f"shape of {n}: found {list(tensors[n].shape)}, expected {list(own[n].shape)}"
        for n in sorted(own.keys() & tensors.keys())
        if tensors[n].shape != own[n].shape
    ]
    if lines:
        raise CheckpointError(f"{where} does not fit the model:\n  " + "\n  ".join(lines))
    with torch.no_grad():
        for n, p in own.items():
            p.copy_(tensors[n])  # into freshly aligned memory: files align to 8 bytes


def build_transformer(
    config: ModelConfig, tensors: Mapping[str, Tensor], where: str
) -> Transformer:
    """The dense decoder from tensors with stock names, in the tensors' own dtype."""
    dtypes = {t.dtype for t in tensors.values()}
    if len(dtypes) != 1:
        raise CheckpointError(f"{where} mixes dtypes: {', '.join(sorted(map(str, dtypes)))}.")
    model = Transformer(config).to(dtypes.pop())
    load_weights(model, {n.removeprefix("model."): t for n, t in tensors.items()}, where)
    return model.eval()


def write_stock(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Write config.json, model.safetensors, tokenizer.json into an existing directory."""
    write_json(directory / "config.json", dict(config))
    write_json(
        directory / "generation_config.json",
        {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    save_file(
        {n: t.contiguous().clone() for n, t in tensors.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    tokenizer.save(directory / "tokenizer.json")
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tokenizer.eos,
            "bos_token": tokenizer.eos,
            "pad_token": tokenizer.eos,
            "model_max_length": config["max_position_embeddings"],
        },
    )


# --- digests ------------------------------------------------------------------------------------


def digest_tensor(tensor: Tensor) -> str:
    """Digest of dtype, shape and bytes."""
    t = tensor.detach().contiguous().cpu()
    head = json.dumps([str(t.dtype), list(t.shape)]).encode()
    data = t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
    return digest_bytes(head + data)


def digest_tensors(tensors: Iterable[tuple[str, Tensor]], **more: str) -> str:
    """One digest over names and contents, whatever their order and files."""
    return digest_bytes(canonical_json({**more, **{n: digest_tensor(t) for n, t in tensors}}))


# --- the anchor ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Anchor:
    """The frozen public model that every owner starts from."""

    model: Transformer
    tokenizer: Tokenizer
    public: BigramModel
    router_rows: Tensor  # [L,D] the public expert's rows for the linear router, float32
    digest: str
    record: dict[str, Any]

    @property
    def config(self) -> ModelConfig:
        return self.model.config


def build_anchor(
    model: Transformer,
    tokenizer: Tokenizer,
    public: BigramModel,
    router_rows: Tensor,
    record: dict[str, Any],
) -> Anchor:
    """An anchor in memory; its digest covers weights, tokenizer and public statistics."""
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
    digest = digest_tensors(
        [*model.state_dict().items(), *_public_tensors(public, router_rows).items()],
        tokenizer=tokenizer.digest,
        config=digest_bytes(
            canonical_json(
                {
                    **model.config.model_dump(exclude={"max_seq_len"}),
                    "num_kv_heads": model.config.kv_heads,
                }
            )
        ),
    )
    model.requires_grad_(False)
    return Anchor(model.eval(), tokenizer, public, router_rows, digest, record)


def _public_tensors(public: BigramModel, router_rows: Tensor) -> dict[str, Tensor]:
    parts = {f"public.{k}": torch.from_numpy(v.copy()) for k, v in vars(public).items()}
    return parts | {"public.router_rows": router_rows.float()}


def save_anchor(anchor: Anchor, directory: Path) -> None:
    """Write the anchor to `directory`, all or nothing."""
    tensors = {stock_name(n): t for n, t in anchor.model.state_dict().items()}
    dtype = next(iter(tensors.values())).dtype
    with write_directory_aside(directory, "anchor.json") as aside:
        write_stock(aside, stock_config(anchor.config, dtype), tensors, anchor.tokenizer)
        save_file(_public_tensors(anchor.public, anchor.router_rows), aside / "public.safetensors")
        write_json(
            aside / "anchor.json",
            {
                "format": "flexolmo-anchor",
                "format_version": 1,
                "digest": anchor.digest,
                "record": anchor.record,
            },
        )


def load_anchor(directory: Path) -> Anchor:
    """The anchor in `directory`; refuses one whose content does not have its stated digest."""
    directory = Path(directory)
    about = read_json(directory / "anchor.json", CheckpointError)
    if not isinstance(about, dict) or "record" not in about or "digest" not in about:
        raise CheckpointError(f"{directory}/anchor.json is not an anchor's description.")
    if about.get("format") != "flexolmo-anchor" or about.get("format_version") != 1:
        raise CheckpointError(
            f"{directory}/anchor.json is format {about.get('format')!r} version "
            f"{about.get('format_version')!r}; expected 'flexolmo-anchor' version 1."
        )
    config, _ = read_stock_config(directory, "olmo2")
    model = build_transformer(config, read_tensors(directory), str(directory))
    try:
        with safetensors.safe_open(directory / "public.safetensors", framework="pt") as f:
            found = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        public = BigramModel(
            **{f.name: found[f"public.{f.name}"].numpy().copy() for f in fields(BigramModel)}
        )
        rows = found["public.router_rows"]
    except (OSError, KeyError, safetensors.SafetensorError) as e:
        raise CheckpointError(f"{directory}/public.safetensors cannot be read: {e}.") from None
    anchor = build_anchor(model, load_tokenizer(directory), public, rows, about["record"])
    if anchor.digest != about.get("digest"):
        raise CheckpointError(
            f"{directory} was changed: its content has digest {anchor.digest}, anchor.json says "
            f"{about.get('digest')}. Fetch the anchor again."
        )
    return anchor


def mean_hidden_state(model: Transformer, windows: Iterable[np.ndarray]) -> Tensor:
    """Mean of the last hidden state over token windows, scaled to unit length, float32 [D].

    Stands for the paper's domain embedding (§3.3.2, table 3 row "public hidden state").
    """
    total = torch.zeros(model.config.d_model)
    with torch.no_grad():
        for ids in windows:
            h = model.hidden(torch.from_numpy(np.atleast_2d(ids)))
            total += h.float().sum((0, 1)).cpu()
    return total / total.norm().clamp(min=1e-12)
