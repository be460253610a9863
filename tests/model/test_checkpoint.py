"""Anchors come back from disk as they were, or are refused by name."""

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flexolmo.errors import CheckpointError, FlexOlmoError
from flexolmo.model.checkpoint import (
    build_anchor,
    digest_tensor,
    digest_tensors,
    load_anchor,
    save_anchor,
)
from flexolmo.model.statistics import BigramModel, OwnerTable
from flexolmo.model.stock import StockConfig, read_stock_config, read_tensors


@pytest.fixture
def copied(pico_anchor_dir, tmp_path):
    """A copy of the pico anchor's directory, to be spoilt."""
    return shutil.copytree(pico_anchor_dir, tmp_path / "anchor")


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            del content[key]
        else:
            content[key] = value
    path.write_text(json.dumps(content))


# --- round trip ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_anchor_comes_back_bit_for_bit(make_wild, tmp_path, dtype):
    anchor = make_wild(dtype).anchor
    save_anchor(anchor, tmp_path / "anchor")
    back = load_anchor(tmp_path / "anchor")
    assert back.digest == anchor.digest
    assert back.config == anchor.config
    assert back.tokenizer.digest == anchor.tokenizer.digest
    assert torch.equal(back.router_rows, anchor.router_rows)
    for part, array in vars(anchor.public).items():
        assert np.array_equal(vars(back.public)[part], array), part
    before, after = anchor.model.state_dict(), back.model.state_dict()
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before
    )
    assert not any(p.requires_grad for p in back.model.parameters())
    assert not back.model.training
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(back.model(ids), anchor.model(ids))


def test_saving_twice_writes_the_same_bytes(pico_anchor, pico_anchor_dir, tmp_path):
    save_anchor(load_anchor(pico_anchor_dir), tmp_path / "again")
    for file in sorted(pico_anchor_dir.iterdir()):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_digest_covers_weights_statistics_and_rows(pico_anchor):
    a = pico_anchor

    def digest(model=a.model, public=a.public, rows=a.router_rows, forms=a.forms):
        return build_anchor(model, a.tokenizer, public, rows, {}, forms=forms).digest

    assert digest() == a.digest
    changed = type(a.model)(a.config)
    changed.load_state_dict(a.model.state_dict())
    weight = changed.layers[1].mlp.up_proj.weight.data
    weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    publics = []
    for part, array in vars(a.public).items():
        other = array.copy()
        other[7] += 1
        publics.append(BigramModel(**(vars(a.public) | {part: other})))
    first, *others = a.forms
    fewer = replace(first, keys=first.keys[:-1], pair_levels=first.pair_levels[:-1])
    formed = [others, a.forms[::-1], [fewer, *others]]
    for part in ("token_levels", "pair_levels"):
        lower = vars(first)[part].copy()
        lower[lower > -100] -= 1
        formed.append([replace(first, **{part: lower}), *others])
    shifted = a.router_rows.clone()
    shifted[0, 0] += 1e-3
    digests = {
        digest(),
        digest(model=changed),
        digest(rows=shifted),
        *(digest(public=p) for p in publics),
        *(digest(forms=f) for f in formed),
    }
    assert len(digests) == 12


def test_a_table_of_forms_that_is_none_is_refused(pico_anchor, tmp_path):
    """Also with a digest that is of the whole."""
    a = pico_anchor
    first, *others = a.forms
    for part, values in (
        ("token_levels", first.token_levels[:-1]),
        ("token_levels", first.token_levels.astype(np.int64)),
        ("token_levels", np.full_like(first.token_levels, 40)),
        ("keys", first.keys[::-1]),
        ("keys", first.keys[:-1]),
        ("keys", first.keys[:, None]),
        ("keys", np.array(first.keys[0])),
        ("pair_levels", np.full_like(first.pair_levels, 100)),
    ):
        forms = [replace(first, **{part: values}), *others]
        made = build_anchor(a.model, a.tokenizer, a.public, a.router_rows, {}, forms=forms)
        save_anchor(made, tmp_path / "anchor")
        with pytest.raises(CheckpointError, match="table 0 of public text in other forms is none"):
            load_anchor(tmp_path / "anchor")


def test_an_anchor_without_forms_is_read_as_before(pico_anchor, tmp_path):
    a = pico_anchor
    old = build_anchor(a.model, a.tokenizer, a.public, a.router_rows, {})
    save_anchor(old, tmp_path / "old")
    back = load_anchor(tmp_path / "old")
    assert back.forms == () and back.digest == old.digest != a.digest


def test_a_tensors_digest_tells_dtype_shape_and_bytes_apart():
    zeros = torch.zeros(2, 3)
    different = [
        zeros,
        zeros.T,
        zeros.int(),
        -zeros,
        zeros.bfloat16(),
        torch.zeros(6),
        torch.zeros(0),
        torch.zeros(0).long(),
        torch.zeros(2, 0),
    ]
    assert len({digest_tensor(t) for t in different}) == len(different)
    view = torch.arange(6.0).view(2, 3).T
    assert digest_tensor(view) == digest_tensor(view.contiguous())
    pair = [("a", zeros), ("b", -zeros)]
    assert digest_tensors(pair) == digest_tensors(pair[::-1])
    assert digest_tensors(pair) != digest_tensors([("a", -zeros), ("b", zeros)])


# --- tampering ----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.safetensors", "public.safetensors"])
def test_one_flipped_byte_anywhere_in_the_numbers_is_refused(copied, file):
    path, rng = copied / file, random.Random(0)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for place in [header, len(data) - 1, *(rng.randrange(header, len(data)) for _ in range(6))]:
        spoilt = bytearray(data)
        spoilt[place] ^= 1 << rng.randrange(8)
        path.write_bytes(spoilt)
        with pytest.raises(CheckpointError, match=r"was changed.*Fetch the anchor again"):
            load_anchor(copied)
    path.write_bytes(data)
    load_anchor(copied)


@pytest.mark.parametrize("file", ["model.safetensors", "public.safetensors", "tokenizer.json"])
def test_a_flipped_bit_in_a_header_or_the_tokenizer_is_refused_in_words(copied, file):
    path, rng = copied / file, random.Random(1)
    data = path.read_bytes()
    end = len(data)
    if file.endswith(".safetensors"):
        end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(12):
        spoilt = bytearray(data)
        spoilt[rng.randrange(end)] ^= 1 << rng.randrange(7)
        path.write_bytes(spoilt)
        with pytest.raises(FlexOlmoError):
            load_anchor(copied)


def test_another_tokenizer_is_refused(copied):
    path = copied / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["model"]["merges"] = definition["model"]["merges"][:-1]
    path.write_text(json.dumps(definition))
    with pytest.raises(CheckpointError, match="was changed"):
        load_anchor(copied)


def test_another_angle_base_is_refused(copied):
    edit_json(
        copied / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    )
    with pytest.raises(CheckpointError, match="was changed"):
        load_anchor(copied)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("anchor.json", "anchor.json does not exist"),
        ("config.json", "config.json does not exist"),
        ("model.safetensors", "has no model.safetensors"),
        ("public.safetensors", "public.safetensors cannot be read"),
        ("tokenizer.json", "No tokenizer at"),
    ],
)
def test_a_missing_file_is_named(copied, file, message):
    (copied / file).unlink()
    with pytest.raises(FlexOlmoError, match=message):
        load_anchor(copied)


def test_an_anchor_of_the_first_format_is_still_read(pico_anchor, tmp_path):
    """Its digest, which bundles name, leaves out the number of positions."""
    a = pico_anchor
    old = build_anchor(a.model, a.tokenizer, a.public, a.router_rows, a.record, format_version=1)
    assert old.digest != a.digest
    save_anchor(old, tmp_path / "a")
    assert load_anchor(tmp_path / "a").digest == old.digest
    about = json.loads((tmp_path / "a" / "anchor.json").read_text())
    assert about["format_version"] == 1
    (tmp_path / "a" / "anchor.json").write_text(json.dumps(about | {"format_version": 2}))
    with pytest.raises(CheckpointError, match="was changed"):
        load_anchor(tmp_path / "a")


@pytest.mark.parametrize(("version", "count"), [(2, 1), (3, 17)])
def test_an_anchor_with_more_tables_of_forms_than_its_format_has_is_refused(
    pico_anchor, tmp_path, version, count
):
    a, size = pico_anchor, pico_anchor.config.vocab_size
    nothing = np.zeros(0, dtype=np.int64)
    table = OwnerTable(np.zeros(size, dtype=np.int8), nothing, nothing.astype(np.int8))
    made = build_anchor(
        a.model, a.tokenizer, a.public, a.router_rows, a.record, version, [table] * count
    )
    save_anchor(made, tmp_path / "a")
    with pytest.raises(CheckpointError, match=f"has {count} tables"):
        load_anchor(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "expected 'flexolmo-anchor' version 3"),
        ({"format_version": 4}, "expected 'flexolmo-anchor' version 3"),
        ({"digest": "sha256:0"}, "was changed"),
        ({"digest": None}, "not an anchor's description"),
        ({"record": None}, "not an anchor's description"),
    ],
)
def test_an_anchor_json_that_does_not_fit_is_refused(copied, change, message):
    edit_json(copied / "anchor.json", **change)
    with pytest.raises(CheckpointError, match=message):
        load_anchor(copied)


def test_missing_extra_and_misshapen_tensors_are_listed(copied):
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    save_file(tensors, copied / "model.safetensors")
    with pytest.raises(CheckpointError) as e:
        load_anchor(copied)
    for line in (
        "missing: model.norm.weight",
        "extra: model.layers.0.self_attn.q_proj.bias",
        "shape of lm_head.weight: found [299, 32], expected [300, 32]",
    ):
        assert line in str(e.value)


def test_mixed_dtypes_are_refused(copied):
    tensors = load_file(copied / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, copied / "model.safetensors")
    edit_json(copied / "config.json", dtype=None)
    with pytest.raises(CheckpointError, match=r"torch.bfloat16, torch.float32, and .*no dtype"):
        load_anchor(copied)


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(pico_anchor, make_wild):
    with pytest.raises(CheckpointError, match="300 ids, the model's vocabulary only 290"):
        make_wild(vocab_size=290)
    other_end = 1 if pico_anchor.config.eos_token_id != 1 else 2
    with pytest.raises(CheckpointError, match="ends texts with id"):
        make_wild(eos_token_id=other_end)


def test_numbers_beside_which_no_expert_can_be_trained_are_refused_by_name(make_wild, pico_anchor):
    """Else training ends in "lower the learning rate" at any rate."""
    with pytest.raises(CheckpointError, match=r"float16.*--dtype float32"):
        make_wild(torch.float16)
    anchor = make_wild().anchor
    weight = anchor.model.layers[1].mlp.up_proj.weight
    weight[3, 4] = float("nan")
    with pytest.raises(CheckpointError, match=r"NaN or infinity in layers.1.mlp.up_proj.weight:"):
        build_anchor(anchor.model, anchor.tokenizer, anchor.public, anchor.router_rows, {})


# --- stock checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: .*'silu', found 'gelu'"),
        ({"attention_bias": True}, "attention_bias: .*found True"),
        ({"norm_topk_prob": True}, "norm_topk_prob: unknown key"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rope_parameters.rope_type: .*found 'yarn'",
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_scaling.rope_type: .*found 'linear'",
        ),
        ({"model_type": "llama"}, "model_type is 'llama', expected 'olmo2'"),
        ({"hidden_size": None}, "hidden_size: Field required"),
        ({"num_attention_heads": 3}, "multiple of num_heads"),
    ],
)
def test_a_feature_this_decoder_lacks_is_refused_by_name(copied, change, message):
    edit_json(copied / "config.json", **change)
    with pytest.raises(CheckpointError, match=message):
        read_stock_config(copied, StockConfig)


def test_a_rope_type_under_its_older_key_is_refused(copied):
    """transformers reads `type` where there is no `rope_type`."""
    edit_json(
        copied / "config.json",
        rope_parameters=None,
        rope_scaling={"type": "linear", "factor": 2.0},
        rope_theta=500000.0,
    )
    with pytest.raises(CheckpointError, match=r"rope_scaling.type: .*found 'linear'"):
        read_stock_config(copied, StockConfig)


def test_an_older_config_gives_its_angle_base_at_the_top(copied):
    edit_json(copied / "config.json", rope_parameters=None, rope_theta=1234.0)
    assert read_stock_config(copied, StockConfig).decoder.rope_theta == 1234.0


@pytest.mark.parametrize(
    ("gone", "named"), [("rope_parameters", "rope_theta"), ("rms_norm_eps", "rms_norm_eps")]
)
def test_a_number_that_decides_the_logits_is_not_guessed(copied, gone, named):
    """Versions of transformers differ in what they take it for."""
    edit_json(copied / "config.json", **{gone: None})
    with pytest.raises(CheckpointError, match=f"{named}"):
        read_stock_config(copied, StockConfig)


def test_key_value_heads_left_out_are_as_many_as_heads(copied):
    edit_json(copied / "config.json", num_key_value_heads=None)
    config = read_stock_config(copied, StockConfig).decoder
    assert config.kv_heads == config.num_heads


def shard(directory, parts):
    """Spread model.safetensors over `parts` files with an index."""
    tensors = load_file(directory / "model.safetensors")
    names, where = sorted(tensors), {}
    for i in range(parts):
        file = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        save_file({n: tensors[n] for n in names[i::parts]}, directory / file)
        where |= dict.fromkeys(names[i::parts], file)
    (directory / "model.safetensors").unlink()
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index, where


def test_a_checkpoint_in_several_files_is_read_through_its_index(copied, pico_anchor):
    whole = read_tensors(copied)
    shard(copied, 3)
    parts = read_tensors(copied)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[n], parts[n]) for n in whole)
    assert load_anchor(copied).digest == pico_anchor.digest


def test_an_index_that_leads_elsewhere_or_nowhere_is_refused(copied):
    index, where = shard(copied, 2)
    name = next(iter(where))
    for file, message in (
        (f"../{copied.name}/{where[name]}", "outside its directory"),
        ("/etc/passwd", "outside its directory"),
        ("model-00009-of-00002.safetensors", "has no model-00009"),
    ):
        index.write_text(json.dumps({"weight_map": where | {name: file}}))
        with pytest.raises(CheckpointError, match=message):
            read_tensors(copied)


def test_a_tensor_in_two_files_is_refused(copied):
    _, where = shard(copied, 2)
    one, other = sorted(set(where.values()))
    save_file(load_file(copied / one) | load_file(copied / other), copied / other)
    with pytest.raises(CheckpointError, match="is in two files"):
        read_tensors(copied)


def test_a_pickled_checkpoint_is_not_even_opened(copied):
    (copied / "model.safetensors").unlink()
    (copied / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")
    with pytest.raises(CheckpointError, match="only safetensors checkpoints are read"):
        load_anchor(copied)


def test_a_truncated_file_is_refused(copied):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_anchor(copied)
