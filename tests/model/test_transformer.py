"""The decoder against stock transformers, against itself through a cache, and its loss."""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.checkpoint import save_anchor, stock_config, stock_name, write_stock
from flexolmo.model.loss import _ChunkedLoss, language_model_loss
from flexolmo.model.router import PUBLIC, LinearSettings
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.model.transformer import (
    FeedForward,
    ForwardContext,
    ModelConfig,
    RMSNorm,
    Transformer,
)

SHAPES = {
    "as many key-value heads": {"num_kv_heads": None},
    "grouped": {"num_kv_heads": 2},
    "one key-value head": {"num_kv_heads": 1, "rope_theta": 1000.0, "norm_eps": 1e-4},
}
UNTIL_CLOSE = {"rtol": 0, "atol": 1e-4}
IN_SESSION = settings(
    derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# --- stock transformers -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_anchor_is_stock_olmo2(make_wild, tmp_path, shape):
    from transformers import Olmo2ForCausalLM

    wild = make_wild(**SHAPES[shape])
    save_anchor(wild.anchor, tmp_path / "anchor")
    stock, info = Olmo2ForCausalLM.from_pretrained(tmp_path / "anchor", output_loading_info=True)
    assert not any(info.values())
    ids = wild.ids(3, 40)
    with torch.no_grad():
        theirs = stock(ids, labels=ids)
    torch.testing.assert_close(wild.anchor.model(ids), theirs.logits, **UNTIL_CLOSE)
    torch.testing.assert_close(
        language_model_loss(wild.anchor.model, ids), theirs.loss, rtol=1e-6, atol=1e-6
    )


def save_as_stock_mixture(model, directory, tokenizer):
    """Write a bias-free linear mixture whose experts all have the anchor's width."""
    tensors = {}
    for name, t in model.state_dict().items():
        if ".mlp." not in name:
            tensors[stock_name(name)] = t
    for i, mixture in enumerate(model.mixtures()):
        rows = [mixture.router.row(n).weight for n in model.expert_names]
        tensors[f"model.layers.{i}.mlp.gate.weight"] = torch.cat(rows)
        for e, name in enumerate(model.expert_names):
            for part, t in mixture.expert(name).state_dict().items():
                tensors[f"model.layers.{i}.mlp.experts.{e}.{part}"] = t
    directory.mkdir()
    write_stock(
        directory,
        stock_config(
            model.config,
            torch.float32,
            architectures=["FlexOlmoForCausalLM"],
            model_type="flex_olmo",
            num_experts=len(model.expert_names),
            num_experts_per_tok=model.top_k or len(model.expert_names),
            norm_topk_prob=False,
            output_router_logits=False,
        ),
        tensors,
        tokenizer,
    )


@pytest.mark.parametrize("top_k", [None, 2, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_linear_mixture_is_stock_flex_olmo(make_wild, tmp_path, shape, top_k):
    from transformers import FlexOlmoForCausalLM

    wild, router = make_wild(**SHAPES[shape]), LinearSettings(has_bias=False)
    experts = {n: wild.expert(router, i) for i, n in enumerate("abc")}
    model = assemble_mixture(wild.anchor, experts, router, top_k=top_k)
    save_as_stock_mixture(model, tmp_path / "stock", wild.anchor.tokenizer)
    stock, info = FlexOlmoForCausalLM.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(info.values())
    ids, routing = wild.ids(3, 40), []
    ours = model(ids, routing=routing)
    with torch.no_grad():
        theirs = stock(ids, labels=ids)
    weights = torch.stack(routing)
    assert (weights.std(dim=2) > 0.05).any(dim=1).all(), "routing must vary over positions"
    torch.testing.assert_close(ours, theirs.logits, **UNTIL_CLOSE)
    torch.testing.assert_close(language_model_loss(model, ids), theirs.loss, rtol=1e-6, atol=1e-6)


def test_a_bias_moves_weight_from_the_expert_to_the_public_one(wild):
    weight_of_public = []
    for raw_bias in (-30.0, 0.0, 4.0):
        expert = wild.expert(LinearSettings(), 0)
        expert |= {n: torch.full_like(t, raw_bias) for n, t in expert.items() if "raw_bias" in n}
        model, routing = assemble_mixture(wild.anchor, {"a": expert}, LinearSettings()), []
        model(wild.ids(2, 10), routing=routing)
        assert model.expert_names[0] == PUBLIC
        weight_of_public.append(routing[0][..., 0])
    assert (weight_of_public[0] < weight_of_public[1]).all()
    assert (weight_of_public[1] < weight_of_public[2]).all()


# --- cache and padding --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixtures(wild, router):
    """`mixtures(top_k, is_rich)`: a and b, of whole FFNs or of all kinds of parts, merged once."""

    @cache
    def get(top_k=None, is_rich=False):
        shapes = wild.rich_shapes(router, "ab") if is_rich else None
        return wild.mixture(router, "ab", top_k, shapes)

    return get


@pytest.fixture(scope="module")
def models(wild, router, mixtures):
    """Of this router: of whole FFNs and of all kinds of parts; and once the anchor."""
    of_router = [mixtures(), mixtures(2, is_rich=True)]
    return [wild.anchor.model, *of_router] if router == EvidenceSettings() else of_router


@given(cuts=st.sets(st.integers(1, 29)), seed=st.integers(0, 99))
@settings(IN_SESSION, max_examples=12)  # for each router
def test_reading_in_pieces_is_reading_at_once(wild, models, cuts, seed):
    ids = wild.ids(2, 30, seed)
    for model in models:
        edges, cache = [0, *sorted(cuts), 30], model.new_cache()
        pieces = [model(ids[:, a:b], cache=cache) for a, b in pairwise(edges)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), **UNTIL_CLOSE)
        assert cache.num_positions == 30


@given(
    padding=st.lists(st.integers(0, 7), min_size=3, max_size=3),
    seed=st.integers(0, 99),
    fill=st.sampled_from(["eos", "word"]),
)
@settings(IN_SESSION, max_examples=12)  # for each router
def test_left_padding_is_no_padding(wild, models, padding, seed, fill):
    """In one pass and through the cache, whatever id the padding has."""
    texts = [wild.ids(1, 12 - p, seed + i) for i, p in enumerate(padding)]
    after = wild.ids(3, 4, seed)
    filler = wild.anchor.config.eos_token_id if fill == "eos" else 7
    ids = torch.cat([F.pad(t, (p, 0), value=filler) for t, p in zip(texts, padding, strict=True)])
    is_token = torch.arange(12)[None] >= torch.tensor(padding)[:, None]
    for model in models:
        plain, cache = model(ids, is_token=is_token), model.new_cache()
        first = model(ids, is_token=is_token, cache=cache)
        rest = torch.cat([model(after[:, :1], cache=cache), model(after[:, 1:], cache=cache)], 1)
        for i, (text, p) in enumerate(zip(texts, padding, strict=True)):
            alone = model(torch.cat([text, after[i : i + 1]], dim=1))[0]
            torch.testing.assert_close(plain[i, p:], alone[: 12 - p], **UNTIL_CLOSE)
            torch.testing.assert_close(first[i, p:], alone[: 12 - p], **UNTIL_CLOSE)
            torch.testing.assert_close(rest[i], alone[12 - p :], **UNTIL_CLOSE)


def test_no_position_sees_a_later_one(wild, mixtures):
    ids, model = wild.ids(1, 20), mixtures(is_rich=True)
    changed = ids.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % wild.anchor.config.vocab_size
    assert torch.equal(model(ids)[0, :12], model(changed)[0, :12])
    assert not torch.equal(model(ids)[0, 12:], model(changed)[0, 12:])


@pytest.mark.parametrize("last", [1, 4, 9, 20])
def test_the_last_positions_logits_are_those_of_all(wild, mixtures, last):
    model, ids = mixtures(is_rich=True), wild.ids(3, 9)
    active = model.expert_mask([("a",), None, ()])
    torch.testing.assert_close(
        model(ids, active=active, last=last),
        model(ids, active=active)[:, -last:],
        rtol=0,
        atol=1e-5,
    )


@given(
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    first=st.integers(1, 8),
    pads=st.tuples(*[st.integers(0, 3)] * 3),
)
@settings(IN_SESSION, max_examples=12)  # for each router
def test_a_selected_cache_goes_on_as_its_sequences_would(wild, mixtures, rows, first, pads):
    """And what the selection reads is not seen by what it was taken from."""
    model = mixtures(is_rich=True)
    ids, picked = wild.ids(3, 12), torch.tensor(rows)
    active = model.expert_mask([("a",), None, ()])
    real = torch.tensor([[t >= p for t in range(4)] for p in pads])  # padding in the middle
    padded = torch.cat([ids[:, :first], ids[:, :4], ids[:, first:]], dim=1)
    cache = model.new_cache()
    model(padded[:, :first], active=active, cache=cache)
    chosen = cache.select(picked)
    for c, at, on in ((chosen, picked, active[picked]), (cache, torch.arange(3), active)):
        model(padded[at][:, first : first + 4], active=on, cache=c, is_token=real[at])
        found = model(padded[at][:, first + 4 :], active=on, cache=c)
        for row, i in zip(found, at.tolist(), strict=True):
            text = torch.cat([ids[i, :first], ids[i, pads[i] : 4], ids[i, first:]])[None]
            alone = model(text, active=active[i : i + 1])[0]
            torch.testing.assert_close(row, alone[first + 4 - pads[i] :], rtol=0, atol=2e-5)


def test_what_is_left_of_a_batch_keeps_the_room_that_was_taken(wild):
    model = wild.anchor.model.eval()
    cache, ids = model.new_cache(), torch.arange(1, 13).view(3, 4)
    cache.reserve(9)
    with torch.inference_mode():
        model(ids, cache=cache)
        rest = cache.select(torch.tensor([0, 2]))
        places = [layer.keys.data_ptr() for layer in rest.layers]
        model(ids[:2], cache=rest)
    assert [layer.keys.data_ptr() for layer in rest.layers] == places
    assert rest.layers[0].keys.shape[2] == 9


def test_one_sequence_is_selected_many_times_without_copies(wild, mixtures):
    model, ids = mixtures(), wild.ids(1, 6)
    cache = model.new_cache()
    model(ids, cache=cache)
    many = cache.select(torch.zeros(5, dtype=torch.long))
    assert many.layers[0].keys.data_ptr() == cache.layers[0].keys.data_ptr()
    again = model(wild.ids(5, 3, 1), cache=many)
    torch.testing.assert_close(
        again[2], model(torch.cat([ids, wild.ids(5, 3, 1)[2:3]], 1))[0, 6:], rtol=0, atol=2e-5
    )


@given(
    shape=st.sampled_from([(1, 8), (3, 5, 8), (2, 4, 3, 16)]),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
)
def test_norms_in_training_are_those_of_torch_with_its_gradients(shape, seed, scale):
    g = torch.Generator().manual_seed(seed)
    norm = RMSNorm(shape[-1], eps=1e-6, dtype=torch.float64)
    norm.weight.data.normal_(generator=g)
    x = (scale * torch.randn(shape, generator=g, dtype=torch.float64)).requires_grad_()
    out = torch.randn(shape, generator=g, dtype=torch.float64)
    found, expected = norm.train()(x), norm.eval()(x)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        *(torch.autograd.grad((y * out).sum(), (x, norm.weight)) for y in (found, expected)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


# --- loss ---------------------------------------------------------------------------------------


@given(
    sizes=st.tuples(st.integers(0, 9), st.integers(1, 40), st.integers(1, 20)),
    learns=st.sampled_from([{"gate", "up", "down"}, {"down"}, set()]),
    by_columns=st.booleans(),
    precision=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@IN_SESSION
def test_an_ffn_in_training_has_the_bits_of_its_steps_and_keeps_half_of_them(
    sizes, learns, by_columns, precision, seed
):
    rows, d_ff, d_model = sizes
    torch.manual_seed(seed)
    ffn = FeedForward(d_model, d_ff).train()
    for name, p in ffn.named_parameters():
        nn.init.normal_(p, std=2.0).requires_grad_(name.split("_")[0] in learns)
        if not by_columns:  # as several processes hold it
            p.data = p.data.contiguous()
    x = torch.randn(rows, d_model, requires_grad=True)
    weight = torch.randn(rows, d_model)
    kept = set()

    def note(tensor):
        kept.add(tensor.data_ptr())
        return tensor

    def read():
        return ffn.read(x, ForwardContext(torch.float32, x, x, None, None))

    def read_in_steps():
        gate, up = (F.linear(x, m.weight) for m in (ffn.gate_proj, ffn.up_proj))
        return F.linear(F.silu(gate) * up, ffn.down_proj.weight)

    def differentiate(read):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            y = read()
        learnt = [x, *(p for p in ffn.parameters() if p.requires_grad)]
        return [y, *torch.autograd.grad((y * weight).sum(), learnt)]

    for one, other in zip(differentiate(read), differentiate(read_in_steps), strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()
    if rows and precision == torch.float32:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            read()
        assert len(kept - {t.data_ptr() for t in (x, *ffn.parameters())}) == 2


@given(
    num=st.integers(1, 40),
    chunk=st.integers(1, 50),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1.0, -3.0, 0.01]),
    ranks=st.lists(st.integers(1, 5), max_size=3),
    asked=st.integers(1, 255),
)
@IN_SESSION
def test_chunked_loss_is_cross_entropy_with_the_gradients_asked_for(
    num, chunk, seed, scale, ranks, asked
):
    """Of logits sum_j u_j w_j^T, each for all or some positions, and for any subset of the u and
    w; the others get none."""
    rng = np.random.default_rng(seed)
    rows = [
        torch.from_numpy(np.flatnonzero(rng.random(num) < 0.4)) if rng.random() < 0.5 else None
        for _ in (8, *ranks)
    ]
    parts = [
        torch.from_numpy(rng.normal(size=(n, inner)) * 3 * inner**-0.5)
        for inner, at in zip((8, *ranks), rows, strict=True)
        for n in (num if at is None else len(at), 13)
    ]
    targets = torch.from_numpy(rng.integers(0, 13, num))
    wanted = [bool(asked >> j & 1) for j in range(len(parts))]
    wanted[0] |= not any(wanted)

    def plain(*parts):
        logits = torch.zeros(num, 13, dtype=torch.float64)
        for u, w, at in zip(parts[::2], parts[1::2], rows, strict=True):
            logits = logits.index_add(0, torch.arange(num) if at is None else at, u @ w.T)
        return F.cross_entropy(logits, targets, reduction="sum")

    found, expected = [], []
    for out, loss_of in (
        (found, lambda *p: _ChunkedLoss.apply(targets, chunk, rows, *p)),
        (expected, plain),
    ):
        leaves = [p.clone().requires_grad_(w) for p, w in zip(parts, wanted, strict=True)]
        loss = loss_of(*leaves)
        (loss * scale).backward()
        assert [x.grad is not None for x in leaves] == wanted
        out += [loss.detach().double(), *(x.grad for x in leaves if x.grad is not None)]
    for a, b in zip(found, expected, strict=True):  # the sums are taken in float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * num)


def test_loss_does_not_depend_on_the_chunk(wild):
    ids = wild.ids(3, 21)
    shapes = {"a": wild.shape(head_rank=3), "b": wild.shape(head_rank=1)}
    for model in (wild.anchor.model, wild.mixture(EvidenceSettings(), "ab", shapes=shapes)):
        losses = [language_model_loss(model, ids, chunk=c) for c in (1, 7, 60, 1024)]
        expected = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        for loss in losses:
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


# --- the shape ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "multiple of num_heads"),
        ({"num_heads": 32}, "must be even"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"eos_token_id": 300}, "outside the vocabulary"),
        ({"layers": 3}, "Extra inputs"),
        ({"norm_eps": 1e-46}, "norm_eps"),  # 0 in float32: NaN for zeros
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(change, message):
    shape = {"vocab_size": 300, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 48}
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(shape | change)


def test_initial_weights_depend_on_the_seed_alone(wild):
    models = [Transformer(wild.anchor.config) for _ in range(3)]
    for i, (model, seed) in enumerate(zip(models, (3, 3, 4), strict=True)):
        torch.manual_seed(i)
        model.initialise(seed)
    a, b, c = (m.state_dict() for m in models)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])
    assert (a["norm.weight"] == 1).all()
    assert a["lm_head.weight"].abs().max() <= 0.06
