"""The stock checkpoint format: what its config and tensors say, read as stock reads it or refused.

`Olmo2ForCausalLM` for a dense model, `FlexOlmoForCausalLM` for a mixture. Every key of a config is
either read as transformers reads it, known to change no logit, or refused by name; nothing is
guessed, for versions of transformers differ in their defaults. safetensors only; no code of a
directory runs. Knows nothing of anchors, owners or bundles.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from flexolmo.config import parse_settings
from flexolmo.data.tokenizer import Tokenizer
from flexolmo.errors import CheckpointError, ConfigError
from flexolmo.files import (
    LaterTensor,
    dtype_name,
    read_json,
    save_tensors,
    size_of_tensors,
    write_json,
)
from flexolmo.model.transformer import ModelConfig, Transformer, copy_matrix

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DtypeName = Literal["float32", "bfloat16", "float16"]
INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}  # of the safetensors file; transformers asks for it
Size = Annotated[int, Field(ge=1, lt=2**24)]
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StockRope(BaseModel):
    """Rotary positions in a stock config: of the plain kind, which alone is built here."""

    model_config = _STRICT

    rope_type: Literal["default"] = "default"
    type: Literal["default"] = Field("default", description="Older name of rope_type.")
    rope_theta: float | None = Field(None, gt=0, description="Base of the angles.")


class StockConfig(BaseModel):
    """The keys of a dense stock `config.json` that decide its logits.

    What has no default here has another one in some version of transformers, and must be given.
    """

    model_config = _STRICT

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    max_position_embeddings: Size
    rms_norm_eps: float = Field(gt=0)
    rope_parameters: StockRope | None = None
    rope_scaling: StockRope | None = Field(None, description="Older name of rope_parameters.")
    rope_theta: float | None = Field(None, gt=0, description="Older place of the angles' base.")
    tie_word_embeddings: bool = False
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    dtype: DtypeName | None = Field(None, description="Precision that stock runs the model in.")
    torch_dtype: DtypeName | None = Field(None, description="Older name of dtype.")
    document_mask: bool = Field(
        False, description="True if attention stays within a document; ours, not read by stock."
    )
    # of these, one value alone is built here
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    is_encoder_decoder: Literal[False] = False
    # of these, any value gives the same logits
    model_type: Any = None
    name_or_path: Any = Field(None, alias="_name_or_path")
    architectures: Any = None
    attention_dropout: Any = None
    bos_token_id: Any = None
    chunk_size_feed_forward: Any = None
    id2label: Any = None
    initializer_range: Any = None
    label2id: Any = None
    output_hidden_states: bool | None = None
    problem_type: Any = None
    return_dict: bool | None = None
    transformers_version: Any = None
    use_cache: bool | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "StockConfig":
        if len(self._thetas()) != 1:
            said = ", ".join(map(str, sorted(self._thetas()))) or "none"
            raise ValueError(
                "expected one rope_theta, in rope_parameters, rope_scaling or beside them, "
                f"found {said}"
            )
        if (self.pad_token_id or 0) >= self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is outside the vocabulary")
        return self

    def _thetas(self) -> set[float]:
        ropes = (self.rope_parameters, self.rope_scaling)
        found = {self.rope_theta, *(rope.rope_theta for rope in ropes if rope)}
        return {theta for theta in found if theta is not None}

    @property
    def first_eos_id(self) -> int:
        """Id that ends a text; of several the first, 0 if there is none."""
        eos = self.eos_token_id
        if isinstance(eos, list):
            return eos[0] if eos else 0
        return eos or 0

    @property
    def decoder(self) -> ModelConfig:
        """The shape of the decoder."""
        values = {
            "vocab_size": self.vocab_size,
            "d_model": self.hidden_size,
            "num_layers": self.num_hidden_layers,
            "num_heads": self.num_attention_heads,
            "num_kv_heads": self.num_key_value_heads,
            "d_ff": self.intermediate_size,
            "max_seq_len": self.max_position_embeddings,
            "rope_theta": self._thetas().pop(),
            "norm_eps": self.rms_norm_eps,
            "eos_token_id": self.first_eos_id,
            "document_mask": self.document_mask,
        }
        names = (
            "hidden_size is d_model, num_attention_heads and num_key_value_heads num_heads, "
            "rms_norm_eps norm_eps"
        )
        return parse_settings(values, ModelConfig, f"config.json ({names})")


class StockMixtureConfig(StockConfig):
    """config.json of a stock mixture: that of a dense model, and how its experts are routed."""

    num_experts: Size | None = None
    num_local_experts: Size | None = Field(None, description="Another name of num_experts.")
    num_experts_per_tok: Size
    norm_topk_prob: Literal[False] = False
    output_router_logits: bool | None = None
    router_aux_loss_coef: Any = None

    @model_validator(mode="after")
    def _counts_agree(self) -> "StockMixtureConfig":
        counts = [n for n in (self.num_experts, self.num_local_experts) if n is not None]
        if len(set(counts)) != 1:
            raise ValueError(f"num_experts, num_local_experts: expected one, found {counts}")
        if self.num_experts_per_tok > self.experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.experts}"
            )
        return self

    @property
    def experts(self) -> int:
        """Number of experts, the public one among them."""
        return self.num_experts or self.num_local_experts or 0


MODEL_TYPES: dict[type[StockConfig], str] = {StockConfig: "olmo2", StockMixtureConfig: "flex_olmo"}
Kind = TypeVar("Kind", bound=StockConfig)


def read_stock(
    directory: Path,
    kind: type[Kind],
    dtype: DtypeName | None = None,
    *,
    presumed: Mapping[str, Tensor] | None = None,
) -> tuple[Kind, dict[str, Tensor]]:
    """A stock checkpoint: its config and its tensors, by stock names, all of one precision.

    The precision is the config's, as in stock, else the files' own; `dtype` puts another in its
    place. Of tied weights both are given. With `presumed` no weight is read, see `read_tensors`.
    Raises CheckpointError, naming it, for whatever would make the model another than stock's.
    """
    config = read_stock_config(directory, kind)
    tensors = read_tensors(directory, presumed)
    dtypes = {t.dtype for t in tensors.values()}
    name = dtype or config.dtype or config.torch_dtype
    if unknown := sorted(str(d) for d in dtypes - {torch.float64, *DTYPES.values()}):
        raise CheckpointError(
            f"{directory} holds tensors of {', '.join(unknown)}; expected {', '.join(DTYPES)}."
        )
    if name is None and (len(dtypes) != 1 or torch.float64 in dtypes):
        raise CheckpointError(
            f"{directory} holds tensors of {', '.join(sorted(map(str, dtypes)))}, and its "
            f"config.json has no dtype that says which of {', '.join(DTYPES)} to run."
        )
    chosen = DTYPES[name] if name is not None else dtypes.pop()
    tensors = {n: t.to(chosen) for n, t in tensors.items()}
    embedding = "model.embed_tokens.weight"
    head = "lm_head.weight"
    if config.tie_word_embeddings and embedding in tensors:
        is_compared = head in tensors and presumed is None
        if is_compared and not torch.equal(tensors[head], tensors[embedding]):
            raise CheckpointError(
                f"{directory} says tie_word_embeddings, but its {head} is not its {embedding}."
            )
        tensors[head] = tensors[embedding]
    return config, tensors


def read_stock_config(directory: Path, kind: type[Kind]) -> Kind:
    """`directory`/config.json; CheckpointError lists every key that is not read as stock does."""
    path = Path(directory) / "config.json"
    raw = read_json(path, CheckpointError)
    if not isinstance(raw, dict) or raw.get("model_type") != MODEL_TYPES[kind]:
        found = repr(raw.get("model_type")) if isinstance(raw, dict) else "not there"
        raise CheckpointError(f"{path}: model_type is {found}, expected {MODEL_TYPES[kind]!r}.")
    given = {k: v for k, v in raw.items() if v is not None or k in kind.model_fields}
    try:
        config = parse_settings(given, kind, str(path))
        _ = config.decoder
    except ConfigError as e:
        raise CheckpointError(f"{path} asks for what cannot be read as stock does. {e}") from None
    return config


def read_tensors(
    directory: Path, presumed: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Every tensor of a stock checkpoint, mapped from one file or from those its index names.

    With `presumed` all are on torch's meta device, of the dtypes and shapes that the files' headers
    state. A file that is named by the index and is not there is then taken to hold those of
    `presumed`, if there are any, that the index puts in it.
    """
    directory = Path(directory)
    single = directory / "model.safetensors"
    index = directory / INDEX
    for other in (index, directory / "adapter_config.json"):
        if other.exists() and (single.exists() or other != index):
            raise CheckpointError(
                f"{directory} holds two sets of weights, {other.name} beside others; which of them "
                "is the model is not guessed. Remove one."
            )
    files = files_of_index(index) if index.exists() else [single.name]
    tensors: dict[str, Tensor] = {}
    if presumed:
        nothing = torch.empty(0, device="meta")
        absent = {n for n in files if not (directory / n).exists()}
        where = read_index(index)
        tensors = {k: presumed.get(k, nothing) for k, name in where.items() if name in absent}
        files = [n for n in files if n not in absent]
    for name in files:
        try:
            with safetensors.safe_open(directory / name, framework="pt") as f:
                for key in f.keys():  # noqa: SIM118 (not a mapping)
                    if key in tensors:
                        raise CheckpointError(f"{directory}: {key} is in two files.")
                    tensors[key] = f.get_tensor(key) if presumed is None else _hollow(f, key)
        except FileNotFoundError:
            raise CheckpointError(
                f"{directory} has no {name}; only safetensors checkpoints are read."
            ) from None
        except (OSError, ValueError, safetensors.SafetensorError) as e:
            raise CheckpointError(
                f"{directory / name} is not a whole safetensors file: {e}."
            ) from None
    return tensors


def _hollow(file: Any, key: str) -> Tensor:
    """A tensor of an open safetensors file, on the meta device: of its numbers none is touched."""
    stored = file.get_slice(key)
    known = {dtype_name(dtype): dtype for dtype in (torch.float64, *DTYPES.values())}
    name = stored.get_dtype()
    if name not in known:
        raise CheckpointError(f"{key} is of dtype {name}; expected one of {', '.join(known)}.")
    return torch.empty(stored.get_shape(), dtype=known[name], device="meta")


def read_index(index: Path) -> dict[str, str]:
    """The safetensors file, beside `index`, of each tensor.

    Raises CheckpointError for an index of another form, or one that names anything else.
    """
    raw = read_json(index, CheckpointError)
    where = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{index} has no weight_map from tensors to files.")
    for file in where.values():
        if not isinstance(file, str) or not file.isprintable() or Path(file).name != file:
            raise CheckpointError(f"{index} names {file!r}, which is outside its directory.")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {file!r}, which is no safetensors file.")
    return where


def files_of_index(index: Path) -> list[str]:
    """Names of the safetensors files, all beside `index`, that it spreads the tensors over;
    CheckpointError as `read_index`."""
    return sorted(set(read_index(index).values()))


def stock_name(name: str) -> str:
    """Our parameter's name in a stock checkpoint."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def gate_name(layer: int) -> str:
    """Name of a layer's router, [E,D], in a stock mixture."""
    return f"model.layers.{layer}.mlp.gate.weight"


def expert_name(layer: int, expert: int, part: str) -> str:
    """Name of a matrix of an expert's FFN in a stock mixture; expert 0 is public."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"


def mixture_shapes(
    config: ModelConfig, count: int, names: Collection[str], where: str
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a stock mixture of `count` experts.

    Raises CheckpointError if `where`, which holds tensors of these `names`, holds so few that the
    config cannot be theirs: it might ask for more than fits into memory.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    model = _frame(config, config.num_layers * count, names, where)
    for name, tensor in model.state_dict().items():
        if ".mlp." not in name:
            shapes[stock_name(name)] = tuple(tensor.shape)
            continue
        _, layer, _, part, _ = name.split(".")
        shapes |= {expert_name(int(layer), e, part): tuple(tensor.shape) for e in range(count)}
    gates = {gate_name(i): (count, config.d_model) for i in range(config.num_layers)}
    return shapes | gates


def _frame(config: ModelConfig, least: int, names: Collection[str], where: str) -> Transformer:
    """The decoder on the meta device; CheckpointError for fewer than `least` names."""
    if len(names) < least:
        raise CheckpointError(
            f"{where} holds {len(names)} tensors, too few for {config.num_layers} layers."
        )
    with torch.device("meta"):
        return Transformer(config)


def list_misfits(
    tensors: Mapping[str, Tensor | LaterTensor], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """A line for each missing, extra and misshapen tensor."""
    lines = [f"missing: {n}" for n in sorted(expected.keys() - tensors.keys())]
    lines += [f"extra: {n}" for n in sorted(tensors.keys() - expected.keys())]
    lines += [
        f"shape of {n}: found {list(tensors[n].shape)}, expected {list(expected[n])}"
        for n in sorted(expected.keys() & tensors.keys())
        if tuple(tensors[n].shape) != tuple(expected[n])
    ]
    return lines


def refuse_misfits(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """CheckpointError with a line for each missing, extra and misshapen tensor of `where`."""
    if lines := list_misfits(tensors, expected):
        raise CheckpointError(f"{where} does not fit the model:\n  " + "\n  ".join(lines))


def build_transformer(
    config: ModelConfig, tensors: Mapping[str, Tensor], where: str, *, is_mapped: bool = False
) -> Transformer:
    """The dense decoder of `tensors`, by stock names, in their own precision.

    With `is_mapped` it is made of the very tensors, to look at them where they are: mapped from a
    file they take no memory, but compute more slowly. Else they are copied.

    Raises CheckpointError that lists every missing, extra and misshapen tensor of `where`.
    """
    model = _frame(config, config.num_layers, tensors, where)
    refuse_misfits(tensors, {stock_name(n): t.shape for n, t in model.state_dict().items()}, where)
    if is_mapped:
        mapped = {name: tensors[stock_name(name)] for name in model.state_dict()}
        model.load_state_dict(mapped, assign=True)
        return model.eval()
    # Copied, for mapped tensors are aligned to 8 bytes alone, tied ones are parted, and a matrix of
    # ours has the numbers of a column together.
    loaded: dict[str, Tensor] = {}
    for name, place in model.state_dict().items():
        given = tensors[stock_name(name)]
        loaded[name] = torch.empty_strided(place.shape, place.stride(), dtype=given.dtype)
        copy_matrix(loaded[name], given)
    model.load_state_dict(loaded, assign=True)
    return model.eval()


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
        "dtype": str(dtype).removeprefix("torch."),
        **({"document_mask": True} if config.document_mask else {}),
        **more,
    }


def write_stock(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor | LaterTensor],
    tokenizer: Tokenizer,
) -> None:
    """Write config.json, model.safetensors, tokenizer.json into an existing directory."""
    write_json(directory / "config.json", dict(config))
    write_json(
        directory / "generation_config.json",
        {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    save_tensors(directory / "model.safetensors", tensors, METADATA)
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


def size_of_stock(tensors: Mapping[str, Tensor | LaterTensor]) -> int:
    """Bytes of the model.safetensors that `write_stock` writes."""
    return size_of_tensors(tensors, METADATA)
