"""Out to the stock format and back: stock transformers is the oracle."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flexolmo.bundle.trust import ANY_SIGNER
from flexolmo.data.batches import TokenSplit, open_set
from flexolmo.data.tokenizer import load_tokenizer
from flexolmo.errors import CheckpointError, FlexOlmoError, MergeError
from flexolmo.inference.own_text import own_windows
from flexolmo.merge.export import (
    LARGEST_LOG_ODDS,
    export_stock,
    is_stock_router,
    refit_router,
    refuse_more_than_ffn,
    router_rows,
    whole_ffn,
    with_stock_router,
)
from flexolmo.merge.importing import import_stock
from flexolmo.merge.mixture import LoadedMixture, load_mixture
from flexolmo.model.assemble import assemble_mixture, expert_tensors
from flexolmo.model.checkpoint import load_anchor, save_anchor
from flexolmo.model.shape import FFN_PARTS
from flexolmo.train.anchor import import_anchor
from made_bundles import TERMS
from made_mixtures import NAMES, ROUTERS

os.environ["HF_HUB_OFFLINE"] = "1"
CLAIMS = {"owner": "Carol", "licence": "MIT", "terms": TERMS}


def stock(directory, **options):
    """The checkpoint as stock transformers loads it; nothing missing, nothing ignored."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model.eval()


def stock_logits(model, ids):
    with torch.inference_mode():
        return model(ids).logits


def with_shapes(house, router, shapes, top_k=None):
    """A mixture in memory of the owners in `shapes`, under one of made_mixtures' routers."""
    settings = ROUTERS[router]
    experts = {n: house.wild.expert(settings, sum(n.encode()), **s) for n, s in shapes.items()}
    model = assemble_mixture(house.anchor, experts, settings, top_k=top_k)
    return LoadedMixture(model, house.anchor.tokenizer, {}, {})


@pytest.fixture(scope="module", params=[None, 2], ids=["all experts", "2 of 4"])
def exported(request, house, tmp_path_factory):
    """A stock-router mixture of narrow and wide experts, and where it was exported."""
    mixture = house.mixture(NAMES, "stock", top_k=request.param)
    out = tmp_path_factory.mktemp("exported") / "hf"
    export_stock(mixture, mixture.model, out, {"exact": True})
    return mixture, out, stock(out)


def test_the_mixtures_under_test_really_route(house):
    """Else the tests below would not see a wrong router."""
    routing = []
    house.mixture(NAMES, "stock").model(house.wild.ids(2, 40), routing=routing)
    for w in routing:
        favourite = w.argmax(-1).flatten().bincount(minlength=4)
        assert (favourite > 0).sum() >= 3
        assert w.amax(-1).mean() > 0.4


def test_stock_transformers_computes_the_same_logits(exported, house):
    mixture, _, theirs = exported
    assert type(theirs).__name__ == "FlexOlmoForCausalLM"
    ids = house.wild.ids(3, 50)
    ours = mixture.model(ids)
    assert (stock_logits(theirs, ids) - ours).abs().max() < 1e-4
    assert ours.std() > 0.3  # so that 1e-4 is small


def test_stock_transformers_continues_a_text_as_we_do(exported, house):
    mixture, _, theirs = exported
    ids = house.wild.ids(1, 12, eos_every=10**6)
    with torch.inference_mode():
        out = theirs.generate(
            ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        for _ in range(8):
            ids = torch.cat([ids, mixture.model(ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, ids)


def test_narrow_experts_are_padded_with_zeros(exported):
    mixture, out, _ = exported
    widths = {"public": 48} | {n: s.d_ff for n, s in mixture.model.shapes.items()}
    assert len(set(widths.values())) == 2  # this mixture has narrow experts
    tensors = load_file(out / "model.safetensors")
    for e, name in enumerate(mixture.model.expert_names):
        for i, m in enumerate(mixture.model.mixtures()):
            prefix = f"model.layers.{i}.mlp.experts.{e}."
            up, down = tensors[prefix + "up_proj.weight"], tensors[prefix + "down_proj.weight"]
            assert up.shape[0] == down.shape[1] == max(widths.values())
            assert torch.equal(up[: widths[name]], m.expert(name).up_proj.weight)
            assert torch.equal(down[:, : widths[name]], m.expert(name).down_proj.weight)
            assert (up[widths[name] :] == 0).all() and (down[:, widths[name] :] == 0).all()


def test_the_export_names_its_experts_and_has_no_other_tensors(exported, house):
    mixture, out, _ = exported
    assert json.loads((out / "flexolmo.json").read_text()) == {
        "experts": ["public", *sorted(NAMES)],
        "document_mask": False,
        "exact": True,
    }
    config = json.loads((out / "config.json").read_text())
    assert config["num_experts"] == 4
    assert config["num_experts_per_tok"] == (mixture.model.top_k or 4)
    per_layer = 4 * 3 + 1 + 8  # experts, gate, attention and norms
    assert len(load_file(out / "model.safetensors")) == 2 * per_layer + 3
    assert load_tokenizer(out).digest == house.anchor.tokenizer.digest


@pytest.mark.parametrize("off", NAMES)
def test_a_stock_opt_out_by_slicing_is_ours_by_policy(exported, house, tmp_path, off):
    """Gate rows sliced, experts renumbered, counts lowered: see checkpoint.md."""
    mixture, out, _ = exported
    names = mixture.model.expert_names
    kept = [n for n in names if n != off]
    tensors, sliced = load_file(out / "model.safetensors"), {}
    for key, t in tensors.items():
        if key.endswith("mlp.gate.weight"):
            sliced[key] = t[[names.index(n) for n in kept]].contiguous()
        elif ".experts." in key:
            head, _, rest = key.partition(".experts.")
            number, _, part = rest.partition(".")
            if names[int(number)] in kept:
                sliced[f"{head}.experts.{kept.index(names[int(number)])}.{part}"] = t
        else:
            sliced[key] = t
    config = json.loads((out / "config.json").read_text())
    config |= {"num_experts": 3, "num_experts_per_tok": min(config["num_experts_per_tok"], 3)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(sliced, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids = house.wild.ids(2, 30)
    active = mixture.model.expert_mask([[n for n in NAMES if n != off]] * 2)
    ours = mixture.model(ids, active=active)
    assert (stock_logits(stock(tmp_path), ids) - ours).abs().max() < 1e-4
    assert (mixture.model(ids) - ours).abs().max() > 0.1  # the expert did matter


def test_an_export_comes_back_with_the_same_logits(exported, house, tmp_path):
    mixture, out, _ = exported
    about = import_stock(out, sorted(NAMES), tmp_path / "m", house.keys["Ann"], **CLAIMS)
    back = load_mixture(tmp_path / "m", ANY_SIGNER)
    assert list(about["experts"]) == back.expert_names == sorted(NAMES)
    assert {e["owner"] for e in about["experts"].values()} == {"Carol"}
    ids = house.wild.ids(3, 40)
    wide, narrow = back.model(ids), mixture.model(ids)
    assert (wide - narrow).abs().max() < 2e-5  # padding regroups sums
    again = tmp_path / "again"
    export_stock(back, back.model, again, {"exact": True})
    first, second = (load_file(d / "model.safetensors") for d in (out, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert torch.equal(stock(again)(ids).logits, stock(out)(ids).logits)


def test_what_stock_does_without_a_document_mask_is_said_and_measured(make_wild, tmp_path):
    """One text has the same logits; the model whose cost is measured reads several as stock."""
    wild = make_wild(document_mask=True)
    model = wild.mixture(ROUTERS["linear"], NAMES)
    mixture = LoadedMixture(model, wild.anchor.tokenizer, {}, {})
    written = own_windows(mixture, 2, 16)["public"]
    rewritten = with_stock_router(model, refit_router(model, written))
    export_stock(mixture, rewritten, tmp_path / "hf", {})
    assert json.loads((tmp_path / "hf" / "flexolmo.json").read_text())["document_mask"] is True
    masked = with_stock_router(model, router_rows(rewritten))
    masked.config = model.config
    theirs = stock(tmp_path / "hf")
    several, one = wild.ids(2, 50), wild.ids(1, 50, eos_every=10**6).clamp(min=1)
    for ids, is_same in ((one, True), (several, False)):
        expected = stock_logits(theirs, ids)
        assert (rewritten(ids) - expected).abs().max() < 1e-4
        assert bool((masked(ids) - expected).abs().max() < 1e-4) == is_same


def test_without_narrow_experts_the_way_out_and_back_changes_no_bit(house, tmp_path):
    wide = ["amber", "basalt"]
    mixture = house.mixture(wide, "stock")
    assert {s.d_ff for s in mixture.model.shapes.values()} == {48}
    export_stock(mixture, mixture.model, tmp_path / "hf", {"exact": True})
    import_stock(tmp_path / "hf", wide, tmp_path / "m", house.keys["Ann"], **CLAIMS)
    ids = house.wild.ids(2, 20)
    assert torch.equal(load_mixture(tmp_path / "m", ANY_SIGNER).model(ids), mixture.model(ids))


@pytest.mark.parametrize("names", [[], ["amber"], ["amber", "amber", "zinc"], ["a", "b", "c", "d"]])
def test_a_wrong_number_of_names_is_refused(exported, house, tmp_path, names):
    with pytest.raises(CheckpointError, match=r"has 4 experts, the first of them public: give 3 "):
        import_stock(exported[1], names, tmp_path / "m", house.keys["Ann"], **CLAIMS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [["Amber", "b", "c"], ["public", "b", "c"], ["../a", "b", "c"]])
def test_names_that_no_expert_may_have_are_refused(exported, house, tmp_path, names):
    with pytest.raises(FlexOlmoError, match="name"):
        import_stock(exported[1], names, tmp_path / "m", house.keys["Ann"], **CLAIMS)
    assert not list(tmp_path.iterdir())


def changed_export(exported, tmp_path, change):
    """A copy of the exported checkpoint, its tensors changed in place by `change`."""
    tensors = load_file(exported[1] / "model.safetensors")
    change(tensors)
    copy = tmp_path / "hf"
    copy.mkdir()
    for file in exported[1].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_a_checkpoint_without_an_expert_is_refused_by_the_tensors_name(exported, house, tmp_path):
    missing = "model.layers.1.mlp.experts.2.up_proj.weight"
    copy = changed_export(exported, tmp_path, lambda t: t.pop(missing))
    with pytest.raises(CheckpointError, match=missing):
        import_stock(copy, NAMES, tmp_path / "m", house.keys["Ann"], **CLAIMS)


@pytest.mark.parametrize(
    "extra", ["model.layers.0.mlp.gate.bias", "model.layers.0.mlp.experts.4.up_proj.weight"]
)
def test_a_tensor_that_would_be_ignored_is_refused(exported, house, tmp_path, extra):
    """checkpoint.md: an extra bias is ignored by transformers and vLLM; we must not."""

    def add(tensors):
        tensors[extra] = torch.ones(4)

    copy = changed_export(exported, tmp_path, add)
    with pytest.raises(FlexOlmoError, match=extra):
        import_stock(copy, NAMES, tmp_path / "m", house.keys["Ann"], **CLAIMS)


def test_an_import_makes_the_directories_it_needs(exported, house, tmp_path):
    import_stock(exported[1], NAMES, tmp_path / "new" / "m", house.keys["Ann"], **CLAIMS)


def test_a_dense_checkpoint_is_no_mixture(house, tmp_path):
    with pytest.raises(CheckpointError, match="model_type is 'olmo2', expected 'flex_olmo'"):
        import_stock(house.anchor_dir, [], tmp_path / "m", house.keys["Ann"], **CLAIMS)


@pytest.mark.parametrize("router", ["evidence", "linear"])
def test_only_the_stock_router_is_exported_as_it_is(house, tmp_path, router):
    mixture = house.mixture(NAMES, router)
    assert not is_stock_router(mixture.model)
    with pytest.raises(MergeError, match="refit"):
        export_stock(mixture, mixture.model, tmp_path / "hf", {})
    assert not list(tmp_path.iterdir())


# --- other shapes -------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(
    "shapes",
    [
        {"amber": {"rank": 1}, "basalt": {"rank": 5}},
        {"amber": {"rank": 40}, "zinc": {"d_ff": 20}},
        {"amber": {"rank": 3}, "basalt": {"d_ff": 70}, "zinc": {}},
    ],
)
def test_low_rank_and_wide_experts_are_exported_exactly(house, tmp_path, shapes, top_k):
    mixture = with_shapes(house, "stock", shapes, top_k)
    export_stock(mixture, mixture.model, tmp_path / "hf", {"exact": True})
    theirs, ids = stock(tmp_path / "hf"), house.wild.ids(3, 40)
    widest = 72 if shapes["amber"] == {"rank": 3} else 48  # 70 and two of padding
    assert theirs.config.intermediate_size == widest
    ours = mixture.model(ids)
    assert (stock_logits(theirs, ids) - ours).abs().max() < 1e-4
    for off in shapes:
        rest = [n for n in shapes if n != off]
        active = mixture.model.expert_mask([rest] * 3)
        assert (mixture.model(ids, active=active) - ours).abs().max() > 0.1, off
    import_stock(tmp_path / "hf", sorted(shapes), tmp_path / "m", house.keys["Ann"], **CLAIMS)
    assert (load_mixture(tmp_path / "m", ANY_SIGNER).model(ids) - ours).abs().max() < 1e-4


def test_a_low_rank_experts_matrices_are_the_anchors_and_the_product(house):
    model = with_shapes(house, "stock", {"amber": {"rank": 3}}).model
    expert = expert_tensors(model, "amber")
    for i in range(2):
        for part in FFN_PARTS:
            w = whole_ffn(model, "amber", i, part)
            base = house.anchor.model.state_dict()[f"layers.{i}.mlp.{part}.weight"]
            a, b = (expert[f"layers.{i}.{part}.lora_{x}"] for x in "ab")
            torch.testing.assert_close(w, base + b @ a)


@pytest.mark.parametrize("part", ["attention_rank", "embedding_rank", "head_rank"])
def test_what_the_stock_format_has_no_place_for_is_refused_by_name(house, tmp_path, part):
    mixture = with_shapes(
        house,
        "evidence",
        {"amber": {}, "basalt": {part: 2}, "zinc": {"rank": 1}, "cobalt": {part: 1}},
    )
    said = (
        r"basalt, cobalt also change attention, embedding or output head\..*"
        r"flexolmo mix remove.*--scope ffn"
    )
    rows = refit_router(mixture.model, windows_of(house))
    for act in (
        lambda: refuse_more_than_ffn(mixture.model),
        lambda: with_stock_router(mixture.model, rows),
    ):
        with pytest.raises(MergeError, match=said) as e:
            act()
        assert "amber" not in str(e.value) and "zinc" not in str(e.value)
    allowed = with_shapes(house, "evidence", {"amber": {}, "zinc": {"rank": 1}})
    refuse_more_than_ffn(allowed.model)
    other = with_stock_router(allowed.model, refit_router(allowed.model, windows_of(house)))
    export_stock(allowed, other, tmp_path / "hf", {"exact": False})
    ids = house.wild.ids(2, 30)
    assert (stock_logits(stock(tmp_path / "hf"), ids) - other(ids)).abs().max() < 1e-4


def test_every_expert_speaks_from_its_own_ffn_whatever_its_shape(house):
    mixture = with_shapes(
        house,
        "evidence",
        {"amber": {"rank": 2}, "basalt": {"d_ff": 20}, "zinc": {"rank": 2, "head_rank": 3}},
    )
    for windows in own_windows(mixture, sequences=2, tokens=12).values():
        assert len(windows) == 2 and all(ids.shape == (13,) for ids, _ in windows)


# --- refitting ----------------------------------------------------------------------------------


def windows_of(house, count=5, length=40):
    return [(house.wild.ids(1, length, seed=i)[0].numpy(), length) for i in range(count)]


@pytest.mark.parametrize("router", ["evidence", "linear"])
@pytest.mark.parametrize("top_k", [None, 2])
def test_refitting_is_least_squares(house, router, top_k):
    """Brute force: every token a row, the ridge as D more rows, numpy's lstsq in float64."""
    model, ridge = house.mixture(NAMES, router, top_k).model, 0.02
    windows = windows_of(house)
    found = refit_router(model, windows, ridge=ridge)
    inputs = [[] for _ in model.layers]
    targets = [[] for _ in model.layers]
    for ids, _ in windows:
        routing, residual = [], []
        hooks = [
            m.register_forward_hook(lambda _m, args, _out, to=residual: to.append(args[0]))
            for m in model.mixtures()
        ]
        model(torch.from_numpy(ids[:-1])[None], routing=routing)
        for hook in hooks:
            hook.remove()
        for i in range(len(model.layers)):
            inputs[i].append(residual[i][0].double().numpy())
            targets[i].append(routing[i][0].double().numpy())
    for i, rows in enumerate(found):
        x, w = np.concatenate(inputs[i]), np.concatenate(targets[i])
        y = np.log(np.maximum(w, np.exp(-2 * LARGEST_LOG_ODDS)))
        y = np.clip(y - y.mean(1, keepdims=True), -LARGEST_LOG_ODDS, LARGEST_LOG_ODDS)
        scale = np.sqrt(ridge * (x**2).sum(0).mean())
        x = np.concatenate([x, scale * np.eye(x.shape[1])])
        y = np.concatenate([y, np.zeros((x.shape[1], y.shape[1]))])
        expected = np.linalg.lstsq(x, y, rcond=None)[0].T
        assert rows.dtype == torch.float32 and rows.shape == (4, 32)
        np.testing.assert_allclose(rows.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert not any(m._forward_pre_hooks for m in model.mixtures())


def test_refitting_a_stock_router_finds_it_again(house):
    """Up to what a softmax ignores: one vector added to every row. Enough tokens to tell."""
    model = house.mixture(NAMES, "stock").model
    found = refit_router(model, windows_of(house, count=30, length=100), ridge=1e-9)
    for rows, true in zip(found, router_rows(model), strict=True):
        logits = true - true.mean(0)
        assert (rows - rows.mean(0) - logits).norm() < 0.2 * logits.norm()


def test_a_stock_router_keeps_every_weight_of_the_experts(house):
    model = house.mixture(NAMES, "evidence", top_k=2).model
    before = {n: t.clone() for n, t in model.state_dict().items()}
    rows = refit_router(model, windows_of(house))
    other = with_stock_router(model, rows)
    assert is_stock_router(other) and other.top_k == 2
    assert other.expert_names == model.expert_names
    after = other.state_dict()
    kept = {n for n in before if not n.startswith("router.")}
    assert kept == {n for n in after if ".mlp.router." not in n}
    assert all(torch.equal(before[n], after[n]) for n in kept)
    assert all(torch.equal(a, b) for a, b in zip(router_rows(other), rows, strict=True))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_refit_mixture_exports_exactly_what_it_became(house, tmp_path):
    mixture = house.mixture(NAMES, "evidence")
    other = with_stock_router(mixture.model, refit_router(mixture.model, windows_of(house)))
    export_stock(mixture, other, tmp_path / "hf", {"exact": False})
    ids = house.wild.ids(2, 30)
    assert (stock_logits(stock(tmp_path / "hf"), ids) - other(ids)).abs().max() < 1e-4


def test_the_mixture_writes_its_own_text_to_refit_on(house):
    """One text a sequence and expert, public included; the same for the same seed."""
    mixture = house.mixture(NAMES, "evidence")

    def written(seed: int) -> list[tuple[np.ndarray, int]]:
        found = own_windows(mixture, sequences=2, tokens=20, seed=seed)
        assert list(found) == mixture.model.expert_names
        return [w for own in found.values() for w in own]

    windows = written(3)
    assert len(windows) == 2 * 4
    eos = mixture.tokenizer.eos_id
    for ids, size in windows:
        assert ids.shape == (21,) and ids[0] == eos and (ids[1:] != eos).all()
        assert size == len(mixture.tokenizer.decode(ids[1:].tolist()).encode())
    again = written(3)
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(windows, again, strict=True))
    other = written(4)
    assert not all(np.array_equal(a, b) for (a, _), (b, _) in zip(windows, other, strict=True))


# --- the anchor ---------------------------------------------------------------------------------


def test_an_anchor_of_little_public_text_is_imported_and_saved(house, pico_set_dirs, tmp_path):
    """So little that no bigram is in enough documents; its tables are empty."""
    public = open_set(pico_set_dirs["public"])
    train = public.splits["train"]
    few = TokenSplit(
        train.tokens[: train.offsets[2]], train.offsets[:3], train.bytes[:2], train.sources[:2]
    )
    anchor = import_anchor(house.anchor_dir, replace(public, splits=public.splits | {"train": few}))
    assert not len(anchor.public.keys)
    save_anchor(anchor, tmp_path / "anchor")
    assert load_anchor(tmp_path / "anchor").digest == anchor.digest


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 2, "rope_theta": 10_000.0}, {"tie_word_embeddings": True}],
)
def test_an_imported_stock_anchor_computes_the_same_logits(pico_set_dirs, tmp_path, changes):
    from transformers import Olmo2Config, Olmo2ForCausalLM

    public = open_set(pico_set_dirs["public"])
    theta = changes.pop("rope_theta", 500_000.0)
    torch.manual_seed(0)
    made = Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=public.vocab_size,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            **changes,
        )
    ).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p) / 6 if p.dim() == 2 else 1 + 0.3 * torch.randn_like(p))
    made.save_pretrained(tmp_path / "stock")
    load_tokenizer(pico_set_dirs["public"]).save(tmp_path / "stock" / "tokenizer.json")
    anchor = import_anchor(tmp_path / "stock", public)
    ids = torch.randint(0, public.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    assert (stock_logits(made, ids) - anchor.model(ids)).abs().max() < 1e-4
    save_anchor(anchor, tmp_path / "anchor")
    assert load_anchor(tmp_path / "anchor").digest == anchor.digest
    assert (stock_logits(stock(tmp_path / "anchor"), ids) - anchor.model(ids)).abs().max() < 1e-4
