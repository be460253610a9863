"""The law: a disabled expert leaves the same bits as an expert that was never merged.

Rows of a batch may have different masks. Each row is compared with a mixture assembled without
the row's disabled experts and run on the same whole batch, since a matrix product may round
differently when it has another number of rows.
"""

from functools import cache
from itertools import chain, combinations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexolmo.errors import PolicyError
from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.router import LinearSettings, mixture_weights
from flexolmo.model.statistics import EvidenceSettings

OWNERS = ("amber", "basalt", "cobalt")
SUBSETS = list(chain.from_iterable(combinations(OWNERS, n) for n in range(4)))
ROUTERS = {"evidence": EvidenceSettings(), "linear": LinearSettings()}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AS_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
IN_SESSION = settings(deadline=None, derandomize=True, max_examples=40,
                      suppress_health_check=[HealthCheck.function_scoped_fixture])


def same_bits(a, b):
    """Equal as integers: -0 differs from +0, and a NaN from nothing but another NaN."""
    return a.dtype == b.dtype and torch.equal(a.view(AS_INTEGERS[a.dtype]),
                                              b.view(AS_INTEGERS[b.dtype]))


@pytest.fixture(scope="module")
def mixtures(make_wild):
    """`mixtures(router, dtype, names, top_k)`, each assembled once."""
    wilds = {name: make_wild(dtype) for name, dtype in DTYPES.items()}

    @cache
    def get(kind, dtype, names, top_k):
        return wilds[dtype].mixture(ROUTERS[kind], list(names), top_k)
    get.wilds = wilds
    return get


def run(model, prompt, decode, masks, is_token):
    """Logits of the prompt, then of each decoded column, all through one cache."""
    store = model.new_cache()
    active = None if masks is None else model.expert_mask(masks)
    out = [model(prompt, cache=store, active=active, is_token=is_token)]
    out += [model(column, cache=store, active=active) for column in decode]
    return out


CASES = st.fixed_dictionaries({
    "kind": st.sampled_from(sorted(ROUTERS)),
    "dtype": st.sampled_from(sorted(DTYPES)),
    "top_k": st.sampled_from([None, 1, 2, 3]),
    "masks": st.lists(st.sampled_from(SUBSETS), min_size=1, max_size=5),
    "length": st.integers(1, 24),
    "steps": st.integers(0, 3),
    "padding": st.lists(st.integers(0, 23), min_size=5, max_size=5),
    "is_padded": st.booleans(),
    "seed": st.integers(0, 999),
})


@given(case=CASES)
@settings(IN_SESSION, max_examples=120)
def test_disabled_is_never_merged_in_every_row_of_a_mixed_batch(mixtures, case):
    masks, length, key = case["masks"], case["length"], (case["kind"], case["dtype"])
    ids = mixtures.wilds["float32"].ids(len(masks), length + case["steps"], case["seed"])
    prompt, decode = ids[:, :length], [ids[:, length + i:length + i + 1]
                                       for i in range(case["steps"])]
    is_token = None
    if case["is_padded"]:
        first = torch.tensor([p % length for p in case["padding"][:len(masks)]])
        is_token = torch.arange(length)[None] >= first[:, None]
    merged = run(mixtures(*key, OWNERS, case["top_k"]), prompt, decode, masks, is_token)
    for subset in set(masks):
        rows = torch.tensor([i for i, m in enumerate(masks) if m == subset])
        never = run(mixtures(*key, subset, case["top_k"]), prompt, decode, None, is_token)
        for got, expected in zip(merged, never, strict=True):
            assert torch.isfinite(expected).all()
            assert same_bits(got[rows], expected[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("top_k", [None, 2])
def test_disabled_is_never_merged_for_every_subset(mixtures, kind, dtype, top_k):
    ids = mixtures.wilds["float32"].ids(2, 40)
    merged = mixtures(kind, dtype, OWNERS, top_k)
    seen = []
    for subset in SUBSETS:
        expected = mixtures(kind, dtype, subset, top_k)(ids)
        got = merged(ids, active=merged.expert_mask([subset, subset]))
        assert same_bits(got, expected)
        assert not any(torch.equal(got, other) for other in seen), "this expert has no effect"
        seen.append(got)


def test_disabled_is_never_merged_beyond_one_chunk_of_evidence(mixtures):
    """The router reads 256 positions at a time."""
    ids = mixtures.wilds["float32"].ids(2, 530, eos_every=200)
    merged = mixtures("evidence", "float32", OWNERS, None)
    got = merged(ids, active=merged.expert_mask([("basalt",), ()]))
    for row, subset in enumerate([("basalt",), ()]):
        expected = mixtures("evidence", "float32", subset, None)(ids)
        assert same_bits(got[row], expected[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ROUTERS)
def test_all_off_is_the_anchor(mixtures, kind, dtype):
    anchor = mixtures.wilds[dtype].anchor.model
    ids = mixtures.wilds[dtype].ids(3, 20)
    merged = mixtures(kind, dtype, OWNERS, 2)
    prompt, decode = ids[:, :17], [ids[:, i:i + 1] for i in (17, 18, 19)]
    store = anchor.new_cache()
    expected = [anchor(part, cache=store) for part in (prompt, *decode)]
    for got, wanted in zip(run(merged, prompt, decode, [()] * 3, None), expected, strict=True):
        assert same_bits(got, wanted)
    assert same_bits(run(mixtures(kind, dtype, (), None), ids, [], None, None)[0], anchor(ids))


def test_all_off_is_the_anchor_after_real_training(pico_anchor, wild, router):
    merged = assemble_mixture(pico_anchor, {"amber": wild.expert(router, 5)}, router)
    ids = wild.ids(2, 30)
    assert same_bits(merged(ids, active=merged.expert_mask([(), ()])), pico_anchor.model(ids))


@given(order=st.permutations(OWNERS), seed=st.integers(0, 99))
@settings(IN_SESSION, max_examples=15)
def test_the_order_of_merging_is_irrelevant(wild, router, order, seed):
    experts = {n: wild.expert(router, i) for i, n in enumerate(OWNERS)}
    one = assemble_mixture(wild.anchor, experts, router, top_k=2)
    other = assemble_mixture(wild.anchor, {n: experts[n] for n in order}, router, top_k=2)
    ids = wild.ids(2, 12, seed)
    assert one.expert_names == other.expert_names == ["public", *OWNERS]
    assert same_bits(one(ids), other(ids))
    masks = [["cobalt", "amber"], None]
    assert same_bits(one(ids, active=one.expert_mask(masks)),
                     other(ids, active=other.expert_mask(masks)))


def test_what_a_disabled_expert_holds_changes_no_bit(wild, router):
    """Even weights near the largest number, whose products overflow."""
    ids, outputs = wild.ids(3, 16), []
    for scale in (1.0, 1e30):
        experts = {n: wild.expert(router, i) for i, n in enumerate(OWNERS)}
        experts["basalt"] = {n: t * scale for n, t in experts["basalt"].items()}
        model = assemble_mixture(wild.anchor, experts, router, top_k=2)
        outputs.append(model(ids, active=model.expert_mask([("amber",), OWNERS, ()])))
    assert same_bits(outputs[0][0], outputs[1][0])
    assert same_bits(outputs[0][2], outputs[1][2])
    assert not torch.equal(outputs[0][1], outputs[1][1])


@given(data=st.data(), experts=st.integers(9, 40), top_k=st.sampled_from([None, 3]))
@IN_SESSION
def test_weights_keep_their_bits_when_many_experts_are_dropped(data, experts, top_k):
    """Sums over more experts than a vector register holds are no longer taken one by one."""
    active = torch.tensor([True, *data.draw(
        st.lists(st.booleans(), min_size=experts - 1, max_size=experts - 1))])
    generator = torch.Generator().manual_seed(experts)
    logits = [torch.randn(2, 7, generator=generator) for _ in range(experts)]
    masked = mixture_weights(logits, active.expand(2, -1), top_k)
    dropped = mixture_weights([z for z, on in zip(logits, active, strict=True) if on], None, top_k)
    assert same_bits(masked[..., active], dropped)
    assert (masked[..., ~active] == 0).all()


def test_disabled_is_never_merged_among_twenty_owners(wild, router):
    owners = [f"owner{i:02}" for i in range(20)]
    ids, merged = wild.ids(3, 12), wild.mixture(router, owners, 6)
    masks = [owners[::2], owners[3:], owners[7:9]]
    got = merged(ids, active=merged.expert_mask(masks))
    for row, names in enumerate(masks):
        assert same_bits(got[row], wild.mixture(router, names, 6)(ids)[row])


def count_runs(model, name):
    """Inputs that the expert's FFN was given, over all layers."""
    seen = []
    for mixture in model.mixtures():
        mixture.expert(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return seen


def test_an_expert_that_no_sequence_enables_is_never_run(wild, router):
    model = wild.mixture(router, list(OWNERS))
    runs = {name: count_runs(model, name) for name in model.expert_names}
    store = model.new_cache()
    active = model.expert_mask([("amber",), ("amber", "cobalt")])
    model(wild.ids(2, 8), active=active, cache=store)
    model(wild.ids(2, 1), active=active, cache=store)
    layers = len(model.layers)
    assert {n: len(r) for n, r in runs.items()} == {
        "public": 2 * layers, "amber": 2 * layers, "basalt": 0, "cobalt": 2 * layers}
    model.train()(wild.ids(2, 8), active=active)  # nor while a router is being calibrated
    assert len(runs["cobalt"]) == 3 * layers
    assert not runs["basalt"]


def test_an_expert_sees_zeros_for_sequences_that_disable_it(wild, router):
    model = wild.mixture(router, list(OWNERS))
    seen = count_runs(model, "cobalt")
    model(wild.ids(3, 8), active=model.expert_mask([("amber",), ("cobalt",), ()]))
    assert len(seen) == len(model.layers)
    for x in seen:
        assert (x[[0, 2]] == 0).all()
        assert (x[1] != 0).any(dim=-1).all()


def test_a_mask_names_experts_and_always_keeps_the_public_one(wild, router):
    model = wild.mixture(router, list(OWNERS))
    mask = model.expert_mask([(), None, ["cobalt"], ["public", "amber", "amber"]])
    assert mask.int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 0, 0]]
    with pytest.raises(PolicyError, match=r"Unknown expert granite.*amber, basalt, cobalt"):
        model.expert_mask([["granite", "amber"]])
