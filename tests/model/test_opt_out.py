"""The law: a disabled expert leaves the same bits as an expert that was never merged.

Rows of a batch may have different masks. Each row is compared with a mixture assembled without
the row's disabled experts and run on the same whole batch, since a matrix product may round
differently when it has another number of rows.
"""

import copy
from functools import cache
from itertools import chain, combinations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from flexolmo.errors import PolicyError
from flexolmo.model import packed, panels
from flexolmo.model.assemble import assemble_mixture, expert_tensors
from flexolmo.model.loss import language_model_loss
from flexolmo.model.panels import IN_PANELS
from flexolmo.model.router import DiscriminantSettings, LinearSettings, mixture_weights
from flexolmo.model.statistics import EvidenceSettings
from made_layouts import LAYOUTS, laid_out
from made_threads import threads

OWNERS = ("amber", "basalt", "cobalt")
SUBSETS = list(chain.from_iterable(combinations(OWNERS, n) for n in range(4)))
ROUTERS = {
    "evidence": EvidenceSettings(),
    "linear": LinearSettings(),
    "discriminant": DiscriminantSettings(),
    "discriminant with context": DiscriminantSettings(has_context=True),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What an owner may hold, by parts; routers that decide in every layer take FFNs alone.
FFNS = ({}, {"d_ff": 20}, {"d_ff": 70}, {"rank": 1}, {"rank": 3})
MORE = (
    {},
    {"attention_rank": 2},
    {"embedding_rank": 3},
    {"head_rank": 2},
    {"embedding_rank": 1, "head_rank": 4},
    {"attention_rank": 3, "embedding_rank": 2, "head_rank": 1},
    {"attention_rank": 32, "embedding_rank": 32, "head_rank": 32},  # whole
    {"attention_rank": 32, "embedding_rank": 2, "head_rank": 32},
)
PLAIN, RICH = ((0, 0), (1, 0), (2, 0)), ((0, 6), (3, 5), (4, 7))  # of the three owners
AS_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
IN_SESSION = settings(
    derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module", autouse=True)
def small_pieces():
    """So that texts as short as here are worked on in several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexolmo.model.transformer.CHUNK_ROWS", 32)
        patch.setattr("flexolmo.model.transformer.PIECE_NUMBERS", 500)
        patch.setattr("flexolmo.model.panels.MOST_ROWS", 40)
        patch.setattr("flexolmo.model.moe.GROUPED_ROWS", 20)
        patch.setattr("flexolmo.model.packed.MOST_ROWS", 40)
        forget_trials()
        yield
    forget_trials()


def forget_trials():
    """As `MOST_ROWS` is another."""
    panels._rows.cache_clear()
    packed._rows.cache_clear()


def same_bits(a, b):
    """Equal as integers: -0 differs from +0, and a NaN from nothing but another NaN."""
    return a.dtype == b.dtype and torch.equal(
        a.view(AS_INTEGERS[a.dtype]), b.view(AS_INTEGERS[b.dtype])
    )


def shapes_of(wild, kind, parts):
    """By owner, from places in FFNS and MORE."""
    return {
        n: wild.shape(**FFNS[ffn], **(MORE[more] if kind == "evidence" else {}))
        for n, (ffn, more) in zip(OWNERS, parts, strict=True)
    }


@pytest.fixture(scope="module")
def mixtures(make_wild):
    """`mixtures(router, dtype, names, top_k, parts)`, each assembled once."""
    wilds = {name: make_wild(dtype) for name, dtype in DTYPES.items()}

    @cache
    def get(kind, dtype, names, top_k, parts=PLAIN):
        wild = wilds[dtype]
        return wild.mixture(ROUTERS[kind], list(names), top_k, shapes_of(wild, kind, parts))

    get.wilds = wilds
    return get


@cache
def panels_of(model, layout):
    """Of a model laid out as a reader does."""
    model.space_weights()
    return model.cut_panels()


def run(model, prompt, decode, masks, is_token, layout=None):
    """Logits of the prompt, then of each decoded column, all through one cache."""
    store = model.new_cache()
    active = None if masks is None else model.expert_mask(masks)
    with laid_out(layout or IN_PANELS):
        panels = panels_of(model, layout) if layout else None
        options = {"cache": store, "active": active, "panels": panels}
        return [
            model(prompt, is_token=is_token, **options),
            *(model(column, **options) for column in decode),
        ]


CASES = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(sorted(ROUTERS)),
        "dtype": st.sampled_from(sorted(DTYPES)),
        "top_k": st.sampled_from([None, 1, 2, 3]),
        "parts": st.tuples(
            *[st.tuples(st.sampled_from(range(len(FFNS))), st.sampled_from(range(len(MORE))))] * 3
        ),
        "masks": st.lists(st.sampled_from(SUBSETS), min_size=1, max_size=5),
        "length": st.integers(1, 24),
        "layout": st.sampled_from([None, *LAYOUTS]),
        "threads": st.sampled_from([1, 1, 2]),
        "has_grad": st.booleans(),  # without, an FFN works a piece at a time
        "steps": st.integers(0, 3),
        "padding": st.lists(st.integers(0, 23), min_size=5, max_size=5),
        "is_padded": st.booleans(),
        "seed": st.integers(0, 999),
    }
)


@given(case=CASES)
@settings(IN_SESSION, max_examples=160)
def test_disabled_is_never_merged_in_every_row_of_a_mixed_batch(mixtures, case):
    masks, length, key = case["masks"], case["length"], (case["kind"], case["dtype"])
    more = (case["top_k"], case["parts"])
    ids = mixtures.wilds["float32"].ids(len(masks), length + case["steps"], case["seed"])
    prompt, decode = (
        ids[:, :length],
        [ids[:, length + i : length + i + 1] for i in range(case["steps"])],
    )
    is_token = None
    if case["is_padded"]:
        first = torch.tensor([p % length for p in case["padding"][: len(masks)]])
        is_token = torch.arange(length)[None] >= first[:, None]
    with torch.set_grad_enabled(case["has_grad"]), threads(case["threads"]):
        rest = (is_token, case["layout"])
        merged = run(mixtures(*key, OWNERS, *more), prompt, decode, masks, *rest)
        for subset in set(masks):
            rows = torch.tensor([i for i, m in enumerate(masks) if m == subset])
            never = run(mixtures(*key, subset, *more), prompt, decode, None, *rest)
            for got, expected in zip(merged, never, strict=True):
                assert torch.isfinite(expected).all()
                assert same_bits(got[rows], expected[rows])


@given(case=CASES, layout=st.sampled_from(LAYOUTS))
@settings(IN_SESSION, max_examples=60)
def test_a_layout_changes_the_last_bits_alone(mixtures, case, layout):
    model = mixtures(case["kind"], "float32", OWNERS, case["top_k"], case["parts"])
    ids = mixtures.wilds["float32"].ids(len(case["masks"]), case["length"] + 1, case["seed"])
    with torch.inference_mode():
        right, found = (
            run(model, ids[:, :-1], [ids[:, -1:]], case["masks"], None, own)
            for own in (None, layout)
        )
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@given(case=CASES, bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]))
@settings(IN_SESSION, max_examples=60)
def test_no_number_of_a_disabled_expert_is_ever_used(mixtures, case, bad):
    """All of the expert that is off is NaN or infinite; the others read and learn as without it."""
    masks = [tuple(n for n in m if n != "basalt") for m in case["masks"]] + [("basalt",)]
    rest, more = ("amber", "cobalt"), (case["top_k"], case["parts"])
    merged = copy.deepcopy(mixtures(case["kind"], case["dtype"], OWNERS, *more))
    never = mixtures(case["kind"], case["dtype"], rest, *more)
    for tensor in expert_tensors(merged, "basalt").values():
        tensor.detach().fill_(bad if tensor.is_floating_point() else -1)
    ids = mixtures.wilds["float32"].ids(len(masks), case["length"] + 1, case["seed"])
    with torch.set_grad_enabled(case["has_grad"]):
        for all_masks in (masks, masks[:-1]):  # basalt on beside the others, or nowhere
            rows = ids[: len(all_masks)]
            got = run(merged, rows[:, :-1], [rows[:, -1:]], all_masks, None)
            others = [() if m == ("basalt",) else m for m in all_masks]
            expected = run(never, rows[:, :-1], [rows[:, -1:]], others, None)
            for a, b in zip(got, expected, strict=True):
                assert torch.isfinite(b).all()
                assert same_bits(a[: len(masks) - 1], b[: len(masks) - 1])


def test_a_disabled_experts_head_is_never_used_in_the_loss(mixtures):
    merged = copy.deepcopy(mixtures("evidence", "float32", OWNERS, None, RICH))
    for tensor in expert_tensors(merged, "basalt").values():
        tensor.detach().fill_(float("nan") if tensor.is_floating_point() else -1)
    ids = mixtures.wilds["float32"].ids(2, 20)
    x, ctx = merged.stream(ids, active=merged.expert_mask([("amber",), ("basalt",)]))
    spoilt = [rows for _, w, rows in merged.lm_head.parts(x, ctx) if not w.isfinite().all()]
    assert all(rows is not None and rows.min() >= 20 for rows in spoilt), "the second's alone"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("parts", [PLAIN, RICH])
def test_disabled_is_never_merged_for_every_subset(mixtures, kind, dtype, top_k, parts):
    ids = mixtures.wilds["float32"].ids(2, 40)
    merged = mixtures(kind, dtype, OWNERS, top_k, parts)
    seen = []
    for subset in SUBSETS:
        expected = mixtures(kind, dtype, subset, top_k, parts)(ids)
        got = merged(ids, active=merged.expert_mask([subset, subset]))
        assert same_bits(got, expected)
        assert not any(torch.equal(got, other) for other in seen), "this expert has no effect"
        seen.append(got)


def test_disabled_is_never_merged_in_a_long_text(mixtures):
    ids = mixtures.wilds["float32"].ids(2, 500, eos_every=200)
    merged = mixtures("evidence", "float32", OWNERS, None, RICH)
    got = merged(ids, active=merged.expert_mask([("basalt",), ()]))
    for row, subset in enumerate([("basalt",), ()]):
        expected = mixtures("evidence", "float32", subset, None, RICH)(ids)
        assert same_bits(got[row], expected[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("parts", [PLAIN, RICH])
def test_all_off_is_the_anchor(mixtures, kind, dtype, parts):
    anchor = mixtures.wilds[dtype].anchor.model
    ids = mixtures.wilds[dtype].ids(3, 20)
    merged = mixtures(kind, dtype, OWNERS, 2, parts)
    prompt, decode = ids[:, :17], [ids[:, i : i + 1] for i in (17, 18, 19)]
    store = anchor.new_cache()
    expected = [anchor(part, cache=store) for part in (prompt, *decode)]
    for got, wanted in zip(run(merged, prompt, decode, [()] * 3, None), expected, strict=True):
        assert same_bits(got, wanted)
    assert same_bits(run(mixtures(kind, dtype, (), None), ids, [], None, None)[0], anchor(ids))


def test_all_off_is_the_anchor_after_real_training(pico_anchor, wild, router):
    more = {} if isinstance(router, LinearSettings) else MORE[-1]
    merged = assemble_mixture(pico_anchor, {"amber": wild.expert(router, 5, **more)}, router)
    ids = wild.ids(2, 30)
    assert same_bits(merged(ids, active=merged.expert_mask([(), ()])), pico_anchor.model(ids))


def rich_experts(wild, router):
    """Tensors by owner: of every kind of part that the router allows."""
    shapes = shapes_of(wild, router.kind, RICH)
    return {n: wild.expert(router, i, **shapes[n].model_dump()) for i, n in enumerate(OWNERS)}


@given(order=st.permutations(OWNERS), seed=st.integers(0, 99))
@settings(IN_SESSION, max_examples=15)
def test_the_order_of_merging_is_irrelevant(wild, router, order, seed):
    experts = rich_experts(wild, router)
    one = assemble_mixture(wild.anchor, experts, router, top_k=2)
    other = assemble_mixture(wild.anchor, {n: experts[n] for n in order}, router, top_k=2)
    ids = wild.ids(2, 12, seed)
    assert one.expert_names == other.expert_names == ["public", *OWNERS]
    assert same_bits(one(ids), other(ids))
    masks = [["cobalt", "amber"], None]
    assert same_bits(
        one(ids, active=one.expert_mask(masks)), other(ids, active=other.expert_mask(masks))
    )


@pytest.mark.parametrize("off", OWNERS)
@pytest.mark.parametrize("scale", [1e30, 3e38])
def test_what_a_disabled_expert_holds_changes_no_bit(wild, router, off, scale):
    """Even weights near the largest number, whose products overflow."""
    ids, outputs, losses = wild.ids(3, 16), [], []
    others = tuple(n for n in OWNERS if n != off)
    for factor in (1.0, scale):
        experts = rich_experts(wild, router)
        experts[off] = {
            n: t if "keys" in n else t.sign() * factor if factor > 1 else t
            for n, t in experts[off].items()
        }
        model = assemble_mixture(wild.anchor, experts, router, top_k=2)
        outputs.append(model(ids, active=model.expert_mask([others, OWNERS, ()])))
        two = ids[[0, 2]]
        losses.append(language_model_loss(model, two, active=model.expert_mask([others, ()])))
        outputs[-1] = torch.cat([outputs[-1], model(two, active=model.expert_mask([others, ()]))])
    for row in (0, 2, 3, 4):
        assert torch.isfinite(outputs[0][row]).all()
        assert same_bits(outputs[0][row], outputs[1][row])
    assert same_bits(*losses)
    assert not torch.equal(outputs[0][1], outputs[1][1])


def test_a_loss_under_mixed_masks_is_that_of_the_logits(wild):
    """Also where what an expert that is off computes overflows."""
    router, ids = EvidenceSettings(), wild.ids(3, 17)
    experts = rich_experts(wild, router)
    experts["cobalt"] = {
        n: t if "router" in n else t.sign() * 1e30 for n, t in experts["cobalt"].items()
    }
    model = assemble_mixture(wild.anchor, experts, router)
    active = model.expert_mask([("amber",), ("basalt", "amber"), ()])
    logits = model(ids[:, :-1], active=active)
    targets = ids[:, 1:].flatten().to(logits.device)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
    assert torch.isfinite(expected)
    torch.testing.assert_close(language_model_loss(model, ids, chunk=7, active=active), expected)


@given(data=st.data(), experts=st.integers(9, 40), top_k=st.sampled_from([None, 3]))
@IN_SESSION
def test_weights_keep_their_bits_when_many_experts_are_dropped(data, experts, top_k):
    """Sums over more experts than a vector register holds are no longer taken one by one."""
    active = torch.tensor(
        [True, *data.draw(st.lists(st.booleans(), min_size=experts - 1, max_size=experts - 1))]
    )
    generator = torch.Generator().manual_seed(experts)
    logits = torch.randn(2, 7, experts, generator=generator)
    masked = mixture_weights(logits, active.expand(2, -1), top_k)
    dropped = mixture_weights(logits[..., active], None, top_k)
    assert same_bits(masked[..., active], dropped)
    assert (masked[..., ~active] == 0).all()


def test_disabled_is_never_merged_among_many_owners(wild, router):
    owners = [f"owner{i:02}" for i in range(36)]
    ids, merged = wild.ids(3, 12), wild.mixture(router, owners, None)
    for block in merged.mixtures():  # biases all unlike, as training makes them
        for i, raw in enumerate(getattr(block.router, "raw_bias", {}).values()):
            raw.data.fill_(0.37 * i - 5)
    biases = [dict(getattr(b.router, "raw_bias", {})) for b in merged.mixtures()]
    masks = [owners[::2], owners[3:], owners[7:9]]
    got = merged(ids, active=merged.expert_mask(masks))
    for row, names in enumerate(masks):
        never = wild.mixture(router, names, None)
        for block, own in zip(never.mixtures(), biases, strict=True):
            for key, raw in getattr(block.router, "raw_bias", {}).items():
                raw.data.copy_(own[key])
        assert same_bits(got[row], never(ids)[row])


class Uses(TorchFunctionMode):
    """By expert, how often one of its parameters goes into any operation; routers do not count."""

    def __init__(self, model):
        super().__init__()
        self.counts = dict.fromkeys(model.expert_names, 0)
        self.owner = {
            id(p): e
            for n, p in model.named_parameters()
            for e in model.expert_names
            if f"expert_{e}" in n.split(".") and "router" not in n
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        for x in (*args, *(kwargs or {}).values()):
            for part in x if isinstance(x, list | tuple) else (x,):  # such as what `cat` takes
                if id(part) in self.owner:
                    self.counts[self.owner[id(part)]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("parts", [PLAIN, RICH])
def test_an_expert_that_no_sequence_enables_is_never_run(wild, router, parts):
    if isinstance(router, EvidenceSettings):
        router = router.model_copy(update={"min_weight": 0.0})  # so that the enabled ones do run
    model = wild.mixture(router, list(OWNERS), shapes=shapes_of(wild, router.kind, parts))
    active = model.expert_mask([("amber",), ("amber", "cobalt")])
    store = model.new_cache()
    for step in (
        lambda: model(wild.ids(2, 8), active=active, cache=store),
        lambda: model(wild.ids(2, 1), active=active, cache=store),
        lambda: model.train()(wild.ids(2, 8), active=active),  # a router is calibrated
        lambda: language_model_loss(model, wild.ids(2, 8), active=active),
    ):
        with Uses(model) as uses:
            step()
        assert uses.counts["basalt"] == 0
        assert min(uses.counts[n] for n in ("public", "amber", "cobalt")) >= 3 * len(model.layers)


def test_a_mask_names_experts_and_always_keeps_the_public_one(wild, router):
    model = wild.mixture(router, list(OWNERS))
    mask = model.expert_mask([(), None, ["cobalt"], ["public", "amber", "amber"]])
    assert mask.int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 0, 0]]
    with pytest.raises(PolicyError, match=r"Unknown expert granite.*amber, basalt, cobalt"):
        model.expert_mask([["granite", "amber"]])
