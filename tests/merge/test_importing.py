"""A plan of an import: of the released 7x7B, by its names and shapes, and of what imports make."""

import json
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.errors import CheckpointError, ConfigError
from flexolmo.merge.export import export_stock
from flexolmo.merge.importing import import_stock, plan_import
from flexolmo.model.stock import INDEX
from made_bundles import TERMS
from made_mixtures import NAMES

CLAIMS = {"owner": "Carol", "licence": "MIT", "terms": TERMS}
SUBJECTS = ["math", "news", "code", "academic", "creative", "reddit"]
L, H, F, V, E = 32, 4096, 11008, 100352, 7
CONFIG = {
    "architectures": ["FlexOlmoForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": H,
    "initializer_range": 0.02,
    "intermediate_size": F,
    "max_position_embeddings": 4096,
    "model_type": "flex_olmo",
    "norm_topk_prob": False,
    "num_attention_heads": 32,
    "num_experts": E,
    "num_experts_per_tok": 5,
    "num_hidden_layers": L,
    "num_key_value_heads": 32,
    "output_router_logits": False,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "transformers_version": "4.57.0",
    "use_cache": True,
    "vocab_size": V,
}


def released_shapes():
    """Every name and shape of FlexOlmo-7x7B, written out from the format's description."""
    shapes = {"model.embed_tokens.weight": [V, H], "lm_head.weight": [V, H]}
    shapes["model.norm.weight"] = [H]
    for i in range(L):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{i}.self_attn.{part}.weight"] = [H, H]
        for norm in (
            *("self_attn.q_norm", "self_attn.k_norm"),
            *("post_attention_layernorm", "post_feedforward_layernorm"),
        ):
            shapes[f"model.layers.{i}.{norm}.weight"] = [H]
        shapes[f"model.layers.{i}.mlp.gate.weight"] = [E, H]
        for e in range(E):
            place = f"model.layers.{i}.mlp.experts.{e}"
            shapes[f"{place}.gate_proj.weight"] = shapes[f"{place}.up_proj.weight"] = [F, H]
            shapes[f"{place}.down_proj.weight"] = [H, F]
    return shapes


def numbers_of(shape):
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def write_hollow(path, shapes):
    """A whole safetensors file whose weights are a hole: it takes the disk space of its header."""
    header = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * numbers_of(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    with open(path, "r+b") as file:
        file.truncate(8 + len(data) + end)


def peak_kilobytes():
    """The most memory that this process has held, pages of files among it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


@pytest.fixture
def released(tmp_path, pico_anchor_dir):
    """`released(files, change)`: a directory with the released config and index over 14 files, of
    which those of these numbers are there, their tensors changed by `change`."""

    def make(files=range(14), change=None, **config):
        there = tmp_path / "FlexOlmo-7x7B"
        there.mkdir()
        (there / "config.json").write_text(json.dumps(CONFIG | config))
        (there / "tokenizer.json").write_bytes((pico_anchor_dir / "tokenizer.json").read_bytes())
        source = pico_anchor_dir / "tokenizer_config.json"
        (there / "tokenizer_config.json").write_bytes(source.read_bytes())
        shapes = released_shapes()
        if change is not None:
            change(shapes)
        names = list(shapes)
        where = {}
        for i in range(14):
            file = f"model-{i + 1:05}-of-00014.safetensors"
            where |= dict.fromkeys(names[i::14], file)
            if i in files:
                write_hollow(there / file, {n: shapes[n] for n in names[i::14]})
        (there / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
        return there

    return make


@pytest.mark.parametrize("files", [range(14), [0, 3], []], ids=["all", "two", "none"])
def test_the_released_mixture_passes_without_a_weight_being_read(released, files):
    there = released(files)
    plan_import(there, SUBJECTS)  # so that only the plan is measured, and no import of a module
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_kilobytes()
    begin = time.process_time()
    plan = plan_import(there, SUBJECTS)
    assert time.process_time() - begin < 2
    assert peak_kilobytes() - before < 50_000
    assert plan.changes == []
    assert list(plan.parameters) == [PUBLIC, *SUBJECTS]
    assert sum(plan.parameters.values()) == sum(map(numbers_of, released_shapes().values()))
    assert plan.parameters["math"] == L * (3 * H * F + H)
    rows = 2 * L * H  # of the router, in float32
    assert 0 < plan.weights_bytes["math"] - 2 * plan.parameters["math"] - rows < 20_000
    assert (plan.num_layers, plan.top_k, plan.dtype) == (L, 5, "bfloat16")
    assert (len(plan.files), len(plan.absent_files)) == (14, 14 - len(files))
    assert sorted(p.name for p in there.parent.iterdir()) == ["FlexOlmo-7x7B"]


UP, GATE = "model.layers.31.mlp.experts.6.up_proj.weight", "model.layers.7.mlp.gate.weight"
Q, BIAS = "model.layers.0.self_attn.q_norm.weight", "model.layers.3.mlp.gate.bias"


@pytest.mark.parametrize("files", [range(14), []], ids=["all", "none"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop(UP), f"missing: {UP}"),
        (lambda s: s.pop(Q), f"missing: {Q}"),
        (lambda s: s.pop(GATE), f"missing: {GATE}"),
        (lambda s: s.update({BIAS: [E]}), f"extra: {BIAS}"),
    ],
)
def test_a_missing_or_extra_tensor_is_refused_by_name(released, files, change, said):
    with pytest.raises(CheckpointError) as e:
        plan_import(released(files, change))
    assert str(e.value).splitlines()[1:] == [f"  {said}"]


@pytest.mark.parametrize(("name", "shape"), [(UP, [F, H - 1]), (Q, [128]), (GATE, [E + 1, H])])
def test_a_misshapen_tensor_is_refused_by_name(released, name, shape):
    there = released(range(14), lambda shapes: shapes.update({name: shape}))
    with pytest.raises(CheckpointError) as e:
        plan_import(there)
    expected = released_shapes()[name]
    assert str(e.value).splitlines()[1:] == [
        f"  shape of {name}: found {shape}, expected {expected}"
    ]


def test_a_file_that_has_not_come_whole_is_refused(released):
    there = released([2])
    with open(there / "model-00003-of-00014.safetensors", "r+b") as file:
        file.truncate(10**9)
    with pytest.raises(CheckpointError, match=r"model-00003.* is not a whole safetensors file"):
        plan_import(there)


def test_a_config_of_more_than_its_index_names_is_refused_before_it_fills_the_memory(released):
    with pytest.raises(CheckpointError, match="too few for 16000000 layers"):
        plan_import(released([], num_hidden_layers=16_000_000))


def test_what_only_files_say_is_not_guessed_without_them(released):
    with pytest.raises(CheckpointError, match="has no model-00001-of-00014"):
        plan_import(released([], dtype=None))


def test_experts_too_large_for_a_bundle_and_names_of_none_are_refused(released, monkeypatch):
    there = released([])
    with pytest.raises(ConfigError, match="'Math' cannot name an expert"):
        plan_import(there, ["Math", *SUBJECTS[1:]])
    monkeypatch.setitem(plan_import.__globals__["MAX_FILE_BYTES"], "expert.safetensors", 10**9)
    with pytest.raises(CheckpointError, match=r"1,000,000,000 bytes of weights, found math \(8,6"):
        plan_import(there, SUBJECTS)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_plan_tells_what_the_import_then_makes(house, tmp_path, dtype):
    mixture = house.mixture(NAMES, "stock", top_k=2)
    out = tmp_path / "hf"
    export_stock(mixture, mixture.model, out, {})
    names = sorted(NAMES)
    plan = plan_import(out, names, dtype)
    about = import_stock(out, names, tmp_path / "m", house.keys["Ann"], dtype=dtype, **CLAIMS)
    assert list(plan.parameters) == list(plan.weights_bytes) == [PUBLIC, *about["experts"]]
    anchor = tmp_path / "m" / "anchor" / "model.safetensors"
    files = {n: tmp_path / "m" / "experts" / f"{n}.bundle" / "expert.safetensors" for n in names}
    rows = mixture.model.config.d_model * len(mixture.model.layers)  # in public.safetensors
    for name, file in ({PUBLIC: anchor} | files).items():
        assert plan.weights_bytes[name] == file.stat().st_size
        count = sum(t.numel() for t in load_file(file).values())
        assert plan.parameters[name] == count + (rows if name == PUBLIC else 0)
    assert (plan.top_k, plan.changes, plan.absent_files) == (about["top_k"], [], [])
    assert plan.dtype == str(load_file(anchor)["lm_head.weight"].dtype)[6:]


def test_what_an_export_would_not_have_alike_is_told(house, tmp_path):
    """An FFN of 20 is written with 24, which stock can group, and tied weights are parted."""
    mixture = house.mixture(NAMES, "stock")
    out = tmp_path / "hf"
    export_stock(mixture, mixture.model, out, {})
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts." in name:
            narrow = tensor[:, :20] if "down_proj" in name else tensor[:20]
            tensors[name] = narrow.clone()
    del tensors["lm_head.weight"]
    save_file(tensors, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    config |= {"intermediate_size": 20, "tie_word_embeddings": True}
    (out / "config.json").write_text(json.dumps(config))
    changes = plan_import(out).changes
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    assert f"shape of {name}: found [24, 32], expected [20, 32]" in changes
    assert "extra: lm_head.weight" in changes
    assert len(changes) == 1 + 3 * 4 * len(mixture.model.layers)
