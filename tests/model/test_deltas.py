"""What owners add to the anchor's matrices, against a plain loop over tokens and experts."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexolmo.model.assemble import assemble_mixture, expert_tensors
from flexolmo.model.deltas import DeltaLinear, Share, shares_of
from flexolmo.model.loss import language_model_loss
from flexolmo.model.panels import in_steps
from flexolmo.model.router import PUBLIC
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.model.transformer import ForwardContext

OWNERS = ("amber", "basalt", "cobalt")
ROUTER = EvidenceSettings()
IN_SESSION = settings(
    derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
D = 32  # of the wild anchor: a whole matrix
RANKS = st.sampled_from([0, 0, 1, 2, 5, D])
SIZES = st.fixed_dictionaries(
    {
        "ffn": st.sampled_from([{}, {"d_ff": 20}, {"d_ff": 70}, {"rank": 1}, {"rank": 4}]),
        "attention_rank": RANKS,
        "embedding_rank": RANKS,
        "head_rank": RANKS,
    }
)


def sizes_of(drawn):
    """What `wild.expert` takes, from an example of SIZES."""
    return {k: v for k, v in drawn.items() if k != "ffn"} | drawn["ffn"]


@pytest.fixture(scope="module")
def exact(make_wild):
    """A Wild anchor in float64."""
    return make_wild(torch.float64)


# --- the reference ------------------------------------------------------------------------------


class Reference:
    """The mixture in float64, a token, a layer, a head and an expert at a time.

    The weights of the experts at each position are given; everything else is computed here.
    """

    def __init__(self, anchor, experts, weights):
        self.config = anchor.config
        self.anchor = {n: t.double() for n, t in anchor.model.state_dict().items()}
        self.experts = {n: {k: t.double() for k, t in e.items()} for n, e in experts.items()}
        self.names = sorted(experts)
        self.weights = weights.double()  # [B,T,E], public first

    def matrix(self, name, base, b, t):
        """W + w_1 (W_1 - W) + w_2 B_2 A_2 + ... at one position."""
        found = self.anchor[base].clone()
        for e, owner in enumerate(self.names, start=1):
            tensors = self.experts[owner]
            if f"{name}.weight" in tensors:
                found += self.weights[b, t, e] * (tensors[f"{name}.weight"] - self.anchor[base])
            if f"{name}.lora_a" in tensors:
                product = tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]
                found += self.weights[b, t, e] * product
        return found

    def norm(self, x, name):
        return x / (x.square().mean() + self.config.norm_eps).sqrt() * self.anchor[name]

    def rotate(self, x, t):
        half = len(x) // 2
        angle = t / self.config.rope_theta ** (torch.arange(half).double() / half)
        first, second = x[:half], x[half:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
        )

    def attend(self, i, xs, b):
        """What attention adds at each position of one sequence."""
        c, H, G = self.config.d_head, self.config.num_heads, self.config.kv_heads
        q, k, v, out = [], [], [], []
        for t, x in enumerate(xs):
            own = {
                part: self.matrix(f"layers.{i}.{part}", f"layers.{i}.self_attn.{part}.weight", b, t)
                @ x
                for part in ("q_proj", "k_proj", "v_proj")
            }
            for part, heads, to in (("q", H, q), ("k", G, k)):
                y = self.norm(own[f"{part}_proj"], f"layers.{i}.self_attn.{part}_norm.weight")
                to.append([self.rotate(y[h * c : (h + 1) * c], t) for h in range(heads)])
            v.append(own["v_proj"].split(c))
        for t in range(len(xs)):
            heads = []
            for h in range(H):
                g = h // (H // G)
                scores = torch.stack([q[t][h] @ k[s][g] / math.sqrt(c) for s in range(t + 1)])
                heads.append(sum(p * v[s][g] for s, p in enumerate(scores.softmax(0))))
            o = self.matrix(f"layers.{i}.o_proj", f"layers.{i}.self_attn.o_proj.weight", b, t)
            out.append(o @ torch.cat(heads))
        return out

    def feed_forward(self, i, x, b, t):
        total = torch.zeros_like(x)
        for e, owner in enumerate([PUBLIC, *self.names]):
            tensors, found = self.experts.get(owner, {}), {}
            for part in ("gate_proj", "up_proj", "down_proj"):
                name = f"layers.{i}.{part}"
                found[part] = self.anchor[f"layers.{i}.mlp.{part}.weight"]
                if f"{name}.weight" in tensors:
                    found[part] = tensors[f"{name}.weight"]
                elif owner != PUBLIC:
                    low, high = (tensors[f"{name}.lora_{x}"] for x in "ab")
                    found[part] = found[part] + high @ low
            gate = found["gate_proj"] @ x
            inner = gate / (1 + (-gate).exp()) * (found["up_proj"] @ x)
            total += self.weights[b, t, e] * (found["down_proj"] @ inner)
        return total

    def logits(self, ids):
        """[B,T,V]."""
        out = []
        for b, row in enumerate(ids):
            xs = [
                self.matrix("embed_tokens", "embed_tokens.weight", b, t)[token]
                for t, token in enumerate(row)
            ]
            for i in range(self.config.num_layers):
                added = self.attend(i, xs, b)
                hs = [
                    x + self.norm(a, f"layers.{i}.post_attention_layernorm.weight")
                    for x, a in zip(xs, added, strict=True)
                ]
                xs = [
                    h
                    + self.norm(
                        self.feed_forward(i, h, b, t),
                        f"layers.{i}.post_feedforward_layernorm.weight",
                    )
                    for t, h in enumerate(hs)
                ]
            out.append(
                torch.stack(
                    [
                        self.matrix("lm_head", "lm_head.weight", b, t) @ self.norm(x, "norm.weight")
                        for t, x in enumerate(xs)
                    ]
                )
            )
        return torch.stack(out)


@given(
    drawn=st.lists(SIZES, min_size=1, max_size=3),
    top_k=st.sampled_from([None, None, 1, 2]),
    seed=st.integers(0, 99),
    off=st.sampled_from([(), OWNERS[:1], OWNERS[1:]]),
)
@settings(IN_SESSION, max_examples=40)
def test_a_mixture_of_any_shapes_is_the_loop(exact, drawn, top_k, seed, off):
    experts = {
        n: exact.expert(ROUTER, seed + i, **sizes_of(d))
        for i, (n, d) in enumerate(zip(OWNERS, drawn, strict=False))
    }
    model, routing = assemble_mixture(exact.anchor, experts, ROUTER, top_k=top_k), []
    ids = exact.ids(2, 6, seed)
    active = model.expert_mask([None, set(experts) - set(off)])
    found = model(ids, active=active, routing=routing)
    held = {n: expert_tensors(model, n) for n in experts}  # rows of heads have moved
    expected = Reference(exact.anchor, held, routing[0]).logits(ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@given(
    drawn=st.lists(SIZES, min_size=1, max_size=3),
    seed=st.integers(0, 99),
    off=st.sampled_from([(), OWNERS[:1], OWNERS[1:]]),
    chunk=st.sampled_from([16, 64, 400]),
)
@IN_SESSION
def test_working_in_pieces_changes_nothing(exact, drawn, seed, off, chunk):
    """To the last bits; neither does training mode, in which nothing is cut."""
    experts = {
        n: exact.expert(ROUTER, seed + i, **sizes_of(d))
        for i, (n, d) in enumerate(zip(OWNERS, drawn, strict=False))
    }
    model, ids = assemble_mixture(exact.anchor, experts, ROUTER), exact.ids(3, 30, seed)
    active = model.expert_mask([None, set(experts) - set(off), ()])
    expected = model(ids, active=active)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexolmo.model.transformer.CHUNK_ROWS", chunk)
        patch.setattr("flexolmo.model.transformer.PIECE_NUMBERS", chunk)
        for mode, panels in ((False, None), (False, model.cut_panels()), (True, None)):
            found = model.train(mode)(ids, active=active, panels=panels)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@given(
    weights=st.lists(st.sampled_from([0.0, 0.25, 1.0, math.nan]), min_size=2, max_size=5),
    rows=st.integers(1, 80),
    most=st.sampled_from([16, 32, 48]),
    seed=st.integers(0, 99),
)
@settings(derandomize=True, max_examples=60, deadline=None)
def test_shares_are_the_weights_that_are_not_0_whole_or_in_pieces(weights, rows, most, seed):
    picks = torch.randint(len(weights), (1, rows, 3), generator=torch.manual_seed(seed))
    table = torch.tensor(weights)[picks]  # [1,rows,3]
    for e, share in enumerate(shares_of(table, None, in_steps, torch.float32)):
        expected = table[0, :, e]
        if share is None:
            assert not expected.count_nonzero()
            continue
        found, x = torch.zeros(rows), torch.arange(rows)[:, None].float()
        for part in share.pieces(most):
            at = torch.arange(rows) if part.rows is None else part.rows
            assert part.rows is None or len(part.rows) <= most
            assert torch.equal(part.pick(x)[: len(at), 0], x[at, 0])
            found[at] += part.weight[:, 0]
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@given(
    drawn=st.lists(SIZES, min_size=1, max_size=3),
    top_k=st.sampled_from([None, 1, 2]),
    seed=st.integers(0, 99),
    off=st.sampled_from([(), OWNERS[:1], OWNERS[1:]]),
)
@IN_SESSION
def test_training_and_evaluation_compute_the_same(exact, drawn, top_k, seed, off):
    """To the last bits, though one multiplies in tiles; also for the last position alone."""
    found = []
    experts = {
        n: exact.expert(ROUTER, seed + i, **sizes_of(d))
        for i, (n, d) in enumerate(zip(OWNERS, drawn, strict=False))
    }
    ids, model = exact.ids(3, 9, seed), assemble_mixture(exact.anchor, experts, ROUTER, top_k=top_k)
    active = model.expert_mask([None, set(experts) - set(off), ()])
    for is_training in (False, True):
        model, cache = model.train(is_training), model.new_cache()
        found.append(
            [
                model(ids, active=active),
                model(ids[:, :6], active=active, cache=cache),
                model(ids[:, 6:], active=active, cache=cache),
                model(ids, active=active, last=1),
                language_model_loss(model, ids, active=active).double(),
            ]
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_the_reference_tells_every_part_from_none(exact):
    """Else the test above would see nothing: without any one part its logits differ."""
    expert = exact.expert(ROUTER, 0, rank=2, attention_rank=2, embedding_rank=2, head_rank=2)
    weights, ids = torch.full((1, 5, 2), 0.5), exact.ids(1, 5)
    whole = Reference(exact.anchor, {"a": expert}, weights).logits(ids)
    for name in {n.rpartition(".")[0] for n in expert if "lora" in n}:
        less = expert | {f"{name}.lora_b": torch.zeros_like(expert[f"{name}.lora_b"])}
        other = Reference(exact.anchor, {"a": less}, weights).logits(ids)
        assert (whole - other).abs().max() > 1e-2, name


# --- gradients ----------------------------------------------------------------------------------


@given(
    drawn=st.lists(SIZES, min_size=1, max_size=2),
    seed=st.integers(0, 99),
    chunk=st.integers(1, 20),
    masked=st.booleans(),
)
@settings(IN_SESSION, max_examples=40)
def test_the_loss_has_the_gradients_of_its_plain_formula(exact, drawn, seed, chunk, masked):
    """Of the owner's tensors all, of the anchor's and the other owner's none."""
    experts = {
        n: exact.expert(ROUTER, seed + i, **sizes_of(d))
        for i, (n, d) in enumerate(zip(OWNERS, drawn, strict=False))
    }
    ids, found = exact.ids(2, 9, seed), []
    model = assemble_mixture(exact.anchor, experts, ROUTER).train()
    own = {n: p for n, p in expert_tensors(model, "amber").items() if "router" not in n}
    for p in own.values():
        p.requires_grad_(True)
    active = model.expert_mask([("amber",), ()]) if masked else None
    for is_plain in (False, True):
        model.zero_grad()
        if is_plain:
            logits = model(ids[:, :-1], active=active)
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        else:
            loss = language_model_loss(model, ids, chunk=chunk, active=active)
        loss.backward()
        assert {id(p) for p in model.parameters() if p.grad is not None} == {
            id(p) for p in own.values()
        }
        found.append({n: p.grad for n, p in own.items()} | {"loss": loss.detach().double()})
    for name, g in found[0].items():  # the sums are taken in float32
        torch.testing.assert_close(g, found[1][name], rtol=1e-4, atol=1e-6, msg=name)
        assert g.abs().max() > 0, name


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_nothing_of_the_anchor_runs_where_whole_experts_have_all_the_weight(wild, top_k):
    """Else the FLOPs of `evaluation.cost` would be too few."""
    experts = {
        n: wild.expert(ROUTER, i, attention_rank=D, embedding_rank=D, head_rank=D)
        for i, n in enumerate(OWNERS)
    }
    model = assemble_mixture(wild.anchor, experts, ROUTER, top_k=top_k)
    ctx = model._context(wild.ids(4, 40), None, None, None)
    public = ctx.weights[..., 0] > 0
    assert 0 < public.sum() < public.numel()
    torch.testing.assert_close(ctx.weights.sum(-1), torch.ones(4, 40))
    for module in (model.embed_tokens, model.lm_head, model.layers[1].self_attn.q_proj):
        rest = module.deltas.rest(ctx)
        assert torch.equal(rest.rows, public.flatten().nonzero()[:, 0])
        torch.testing.assert_close(rest.weight[:, 0], ctx.weights[..., 0][public])


@pytest.mark.parametrize("part", ["head", "embedding"])
def test_a_delta_of_the_loss_is_learnt_by_descent(wild, part):
    """From B = 0, where A has no gradient yet: one step along it lowers the loss."""
    expert = wild.expert(ROUTER, 0, **{f"{part}_rank": 3})
    name = {"head": "lm_head", "embedding": "embed_tokens"}[part]
    expert[f"{name}.lora_b"] = torch.zeros_like(expert[f"{name}.lora_b"])
    model, ids = assemble_mixture(wild.anchor, {"a": expert}, ROUTER).train(), wild.ids(4, 20)
    parameters = expert_tensors(model, "a")
    a, b = (parameters[f"{name}.lora_{x}"].requires_grad_(True) for x in "ab")
    before = language_model_loss(model, ids)
    before.backward()
    assert (a.grad == 0).all() and (b.grad != 0).any()
    with torch.no_grad():
        b -= 0.1 * b.grad / b.grad.norm()
    assert language_model_loss(model, ids) < before


# --- shares -------------------------------------------------------------------------------------


def test_where_an_expert_is_off_even_an_infinite_product_adds_nothing(wild):
    base = wild.anchor.model.lm_head
    layer = DeltaLinear(base, {"a": 2}, [PUBLIC, "a"])
    layer.weight.data.copy_(base.weight)
    delta = layer.deltas.of("a")
    delta.lora_a.data.fill_(1e30)
    delta.lora_b.data.fill_(1.0)
    x = torch.ones(2, 3, 32)
    x[0] *= 1e10  # of the sequence for which it is off: 1e10 * 1e30 is no float32
    on = torch.tensor([3, 4, 5])  # the positions of the second sequence
    share = Share(torch.full((3, 1), 1e-30), 6, on, on)
    ctx = ForwardContext(x.dtype, x, x, None, None, shares=[None, share])
    plain, parts = layer(x, ctx), layer.parts(x, ctx)
    (every, weight, rows), (low, lora_b, picked) = parts
    assert rows is None
    summed = (every @ weight.T).index_add(0, picked, low @ lora_b.T).view_as(plain)
    for y in (plain, summed):
        assert torch.equal(y[0], F.linear(x, base.weight)[0])
    torch.testing.assert_close(plain, summed)
    assert (plain[1] - F.linear(x, base.weight)[1]).abs().min() > 1


def test_a_delta_without_a_routing_for_all_layers_is_a_programming_error(wild):
    layer, x = (
        DeltaLinear(wild.anchor.model.lm_head, {"a": 2}, [PUBLIC, "a"]),
        torch.zeros(1, 1, 32),
    )
    with pytest.raises(AssertionError, match="one routing"):
        layer(x, ForwardContext(x.dtype, x, x, None, None))
