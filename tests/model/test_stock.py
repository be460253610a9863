"""A stock checkpoint is read as stock transformers reads it, or refused by name."""

import dataclasses
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FlexOlmoConfig, Olmo2Config

from flexolmo.bundle.trust import ANY_SIGNER
from flexolmo.errors import CheckpointError
from flexolmo.inference.reader import StockReader
from flexolmo.merge.importing import import_stock
from flexolmo.merge.mixture import load_mixture
from flexolmo.model.stock import (
    INDEX,
    StockConfig,
    StockMixtureConfig,
    build_transformer,
    read_stock,
    read_stock_config,
    read_tensors,
)
from made_bundles import TERMS
from made_mixtures import draw_weights

CLAIMS = {"owner": "Ann", "licence": "MIT", "terms": TERMS}
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
IDS = torch.randint(0, 300, (2, 60), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(pico_anchor_dir, tmp_path_factory):
    """`made(kind, dtype)`: a stock checkpoint as stock itself saves it, made once."""
    here, done = tmp_path_factory.mktemp("stock"), {}

    def make(kind="olmo2", dtype=torch.float32, **more):
        key = f"{kind}-{str(dtype)[6:]}-{len(more)}"
        if key not in done:
            config = (
                Olmo2Config(**SIZES, **more)
                if kind == "olmo2"
                else FlexOlmoConfig(**SIZES, **(EXPERTS | more))
            )
            model = AutoModelForCausalLM.from_config(config)
            draw_weights(model, seed=3)
            model.to(dtype).save_pretrained(here / key)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(pico_anchor_dir / name, here / key)
            done[key] = here / key
        return done[key]

    return make


def spoil(source, target, tensors=None, **changes):
    """A copy of a checkpoint with other values in its config, and its tensors put through a
    function; None takes a key away."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text()) | changes
    config = {k: v for k, v in config.items() if not (k in changes and v is None)}
    (target / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        found = load_file(target / "model.safetensors")
        tensors(found)
        save_file(found, target / "model.safetensors", metadata={"format": "pt"})
    return target


def stock_logits(directory, by_columns=False, **options):
    model = AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    if by_columns:  # as our matrices lie, which changes the last bits of some processors' products
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = module.weight.data.T.contiguous().T
    with torch.inference_mode():
        return model(IDS).logits


def our_logits(directory, in_tiles=False):
    config, tensors = read_stock(directory, StockConfig)
    model = build_transformer(config.decoder, tensors, str(directory))
    model.in_tiles = in_tiles
    return model(IDS)


def imported(directory, keys, tmp_path):
    """Logits of a stock mixture, imported."""
    import_stock(directory, ["a", "b", "c"], tmp_path / "m", keys, **CLAIMS)
    return load_mixture(tmp_path / "m", ANY_SIGNER).model(IDS)


@pytest.fixture(scope="module")
def keys(owner_keys):
    return owner_keys["Ann"]


# --- precision ----------------------------------------------------------------------------------


CLOSE = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


@pytest.mark.parametrize("dtype", CLOSE)
def test_a_dense_checkpoint_gives_stocks_logits_bit_for_bit_in_its_precision(made, dtype):
    ours = our_logits(made("olmo2", dtype))
    theirs = stock_logits(made("olmo2", dtype), by_columns=True)
    assert ours.dtype == dtype and torch.equal(ours, theirs)
    assert ours.float().std() > 0.3
    in_tiles = our_logits(made("olmo2", dtype), in_tiles=True)  # as they are read by default
    torch.testing.assert_close(in_tiles, theirs, rtol=0, atol=CLOSE[dtype])


def test_a_bfloat16_mixture_is_as_near_to_exact_numbers_as_stock_is(made, keys, tmp_path):
    """Not bit for bit: we route in float32, and stock's own ways to run experts differ too."""
    there = made("flex_olmo", torch.bfloat16, num_experts_per_tok=4)
    exact, theirs = stock_logits(there, dtype=torch.float32), stock_logits(there)
    ours = imported(there, keys, tmp_path)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean() < 0.02


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_configs_precision_wins_over_the_files_as_in_stock(made, tmp_path, key):
    there = spoil(made(), tmp_path / "x", **{"dtype": None} | {key: "bfloat16"})
    ours = our_logits(there)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, stock_logits(there))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int8])
def test_a_precision_that_is_not_run_is_refused_by_name(made, tmp_path, dtype):
    def cast(tensors):
        tensors |= {n: t.to(dtype) for n, t in tensors.items()}

    there = spoil(made(), tmp_path / "x", cast, dtype=None)
    with pytest.raises(CheckpointError, match=str(dtype)):
        read_stock(there, StockConfig)


# --- the config ---------------------------------------------------------------------------------

MORE_KEYS = {
    "rope_theta": [10000.0, 500.0, "x"],
    "rope_scaling": [
        {"rope_type": "linear", "factor": 4.0},
        {"type": "linear", "factor": 4.0},
        {"rope_type": "default", "rope_theta": 77.0},
    ],
    "rope_parameters": [
        {},
        {"rope_type": "default"},
        {"rope_type": "default", "rope_theta": 99.0},
        {"rope_type": "default", "rope_theta": 10000.0, "factor": 3.0},
        {"rope_type": "linear", "type": "default", "factor": 4.0, "rope_theta": 10000.0},
        {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    ],
    "head_dim": [8, 16],
    "partial_rotary_factor": [0.5],
    "clip_qkv": [8.0],
    "sliding_window": [4],
    "layer_types": [["sliding_attention", "full_attention"]],
    "per_layer_config": [{"0": {"hidden_act": "gelu"}}],
    "quantization_config": [{"quant_method": "fp8"}],
    "transformers_weights": ["other.safetensors"],
    "torch_dtype": ["bfloat16"],
    "dtype": ["bfloat16", "float64", "int8"],
    "num_local_experts": [2, 4],
    "tie_word_embeddings": [True],
    "hidden_size": ["32", 32.0],
    "eos_token_id": [[], [3, 4], -1],
}


ALSO_OF_MIXTURES = {"num_local_experts", "dtype", "rope_scaling"}


def others(value):
    """Values unlike `value`, of its kind and of others."""
    if isinstance(value, bool):
        return [not value, "x", 7]
    if isinstance(value, int):
        return [value + 1, 2 * value, 0, -1, "x", None]
    if isinstance(value, float):
        return [2 * value + 0.5, -1.0, "x", None]
    return [None, "x", 7, True, {}, [[]]]


@pytest.mark.parametrize("kind", [Olmo2Config, FlexOlmoConfig])
def test_every_key_of_the_config_has_stocks_value_or_is_refused_by_name(made, tmp_path, kind, keys):
    """Each key of stock's own class, and some that stock takes besides, with other values."""
    whole = made(kind.model_type)
    config = json.loads((whole / "config.json").read_text())
    defaults = {f.name: getattr(kind(), f.name, None) for f in dataclasses.fields(kind)}
    values = {k: others(config.get(k, v)) for k, v in defaults.items()}
    for key, more in MORE_KEYS.items():
        values.setdefault(key, []).extend(more)
    if kind is FlexOlmoConfig:  # the others are read by the same lines of ours
        dense = {f.name for f in dataclasses.fields(Olmo2Config)} | MORE_KEYS.keys()
        values = {k: v for k, v in values.items() if k not in dense or k in ALSO_OF_MIXTURES}
    there, unchanged = spoil(whole, tmp_path / "x"), stock_logits(whole)
    accepted, refused = set(), set()
    for key, choices in values.items():
        for value in choices:
            (there / "config.json").write_text(json.dumps(config | {key: value}))
            try:
                ours = our_logits(there) if kind is Olmo2Config else imported(there, keys, tmp_path)
            except CheckpointError as e:
                said = (key, "shape of ", "missing: ", "experts, the first")
                assert any(word in str(e) for word in said), (key, value)
                refused.add(key)
                continue
            accepted.add(key)
            try:
                theirs = stock_logits(there)
            except Exception:  # a value that stock refuses, of a key that says nothing of the model
                theirs = unchanged
            close = 1e-4 if theirs.dtype == torch.float32 else 0.1  # see docs/decisions
            assert torch.equal(ours, theirs) or (
                kind is FlexOlmoConfig and (ours - theirs).abs().max() < close
            ), (key, value)
    assert {"hidden_act", "rope_scaling", "head_dim", "num_experts"} & values.keys() <= refused
    assert {"use_cache", "architectures", "num_experts_per_tok"} & values.keys() <= accepted


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_experts_per_tok": None}, "num_experts_per_tok: Field required"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds num_experts 4"),
        ({"num_experts": None}, r"num_experts, num_local_experts: expected one, found \[\]"),
        ({"num_local_experts": 3}, r"expected one, found \[4, 3\]"),
        ({"hidden_size": None}, "hidden_size: Field required"),
        ({"max_position_embeddings": None}, "max_position_embeddings: Field required"),
    ],
)
def test_what_versions_of_stock_take_differently_is_not_guessed(made, tmp_path, change, named):
    there = spoil(made("flex_olmo"), tmp_path / "x", **change)
    with pytest.raises(CheckpointError, match=named):
        read_stock(there, StockMixtureConfig)


# --- the tensors --------------------------------------------------------------------------------


def drop(name):
    return lambda tensors: tensors.pop(name)


def rename(name, other):
    return lambda tensors: tensors.update({other: tensors.pop(name)})


def cut(name):
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


Q, UP = "model.layers.1.self_attn.q_norm.weight", "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("olmo2", drop(Q), f"missing: {Q}"),
        ("olmo2", drop("lm_head.weight"), "missing: lm_head.weight"),
        ("olmo2", rename(Q, "model.layers.1.q_norm.weight"), "extra: model.layers.1.q_norm.weight"),
        ("olmo2", cut(Q), f"shape of {Q}: found .31., expected .32."),
        ("olmo2", lambda t: t.update({"norm.weight": torch.ones(32)}), "extra: norm.weight"),
        (
            "flex_olmo",
            drop(UP),
            r"parts of model\.layers\.1\.mlp\.experts\.gate_up_proj are missing",
        ),
    ],
)
def test_no_model_is_read_that_is_not_there(made, tmp_path, kind, change, named, capfd, caplog):
    """Stock fills up what is missing with numbers drawn at random, and says so in a log alone."""
    there = spoil(made(kind), tmp_path / "x", change)
    capfd.readouterr()
    if named != "extra: norm.weight":  # which stock itself takes for one of the two
        with pytest.raises(CheckpointError, match=named):
            StockReader.open(there, torch.device("cpu"))
        assert (capfd.readouterr().err, caplog.text) == ("", ""), "only our message is shown"
    if kind == "olmo2":
        with pytest.raises(CheckpointError, match=named):
            our_logits(there)


@pytest.mark.parametrize("kind", ["olmo2", "flex_olmo"])
def test_tied_weights_are_not_missing(made, kind, keys, tmp_path):
    there = made(kind, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(there / "model.safetensors")
    StockReader.open(there, torch.device("cpu"))
    ours = our_logits(there) if kind == "olmo2" else imported(there, keys, tmp_path)
    assert (ours - stock_logits(there)).abs().max() < 1e-4

    def untie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        read_stock(
            spoil(there, tmp_path / "x", untie),
            StockConfig if kind == "olmo2" else StockMixtureConfig,
        )


@pytest.mark.parametrize("other", [INDEX, "adapter_config.json"])
def test_two_sets_of_weights_are_refused(made, tmp_path, other):
    there = spoil(made(), tmp_path / "x")
    (there / other).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    with pytest.raises(CheckpointError, match=f"two sets of weights, {other}"):
        read_tensors(there)


@pytest.mark.parametrize(
    "index",
    [
        *(None, [], 7, {}, {"weight_map": None}, {"weight_map": {}}, {"weight_map": ["a"]}),
        *({"weight_map": {"a": file}} for file in (None, 3, "", ".", "..", "x\0.safetensors")),
        *({"weight_map": {"a": file}} for file in ("\ud800.safetensors", "config.json", "../x")),
    ],
)
def test_an_index_of_another_kind_is_refused(tmp_path, index):
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=INDEX):
        read_tensors(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(sorted({*StockMixtureConfig.model_fields, "head_dim"}))


@settings(max_examples=150)
@given(JSON, st.dictionaries(NAMES, JSON, max_size=3), st.booleans(), JSON)
def test_any_json_is_read_or_refused(made, tmp_path_factory, whole, changes, is_dense, index):
    """And never ends in another error, or in a model larger than its tensors."""
    source = made("olmo2" if is_dense else "flex_olmo")
    there, kind = tmp_path_factory.mktemp("any"), StockConfig if is_dense else StockMixtureConfig
    config = json.loads((source / "config.json").read_text()) | changes
    for text in (json.dumps(whole), json.dumps(config)):
        (there / "config.json").write_text(text)
        try:
            shape = read_stock_config(there, kind).decoder
            build_transformer(shape, read_tensors(source), "made")
        except CheckpointError:
            pass
    for mapped in (index, {"weight_map": index}):
        (there / INDEX).write_text(json.dumps(mapped))
        with pytest.raises(CheckpointError):
            read_tensors(there)


def test_a_config_nested_beyond_measure_is_refused(made, tmp_path):
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="not readable JSON"):
        read_stock_config(tmp_path, StockConfig)


@pytest.mark.parametrize("text", ["[]", "7", "{}", '{"model_type": "olmo2", "hidden_size": []}'])
def test_stock_reader_refuses_what_stock_stumbles_over(made, tmp_path, text):
    there = spoil(made(), tmp_path / "x")
    (there / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="no model that stock"):
        StockReader.open(there, torch.device("cpu"))
