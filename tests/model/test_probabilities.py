"""Mixing by probabilities: against a posterior worked out by hand, and the law of opting out."""

import math
from functools import cache
from itertools import chain, combinations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexolmo.errors import ConfigError, PolicyError
from flexolmo.model import probabilities
from flexolmo.model.assemble import assemble_mixture, expert_tensors
from flexolmo.model.lanes import Lanes
from flexolmo.model.probabilities import ProbabilityMixture, ProbabilitySettings, _Seats, arrange
from flexolmo.model.router import LinearSettings, slot
from flexolmo.model.statistics import UNTOLD, EvidenceSettings
from flexolmo.model.transformer import Transformer

OWNERS = ("amber", "basalt", "cobalt")
SUBSETS = list(chain.from_iterable(combinations(OWNERS, n) for n in range(4)))
WHOLE = {"attention_rank": 32, "embedding_rank": 32, "head_rank": 32}
LOW = {"rank": 3, "attention_rank": 2, "embedding_rank": 3, "head_rank": 4}
PARTS = {
    "whole": dict.fromkeys(OWNERS, WHOLE),
    "low": dict.fromkeys(OWNERS, LOW),
    "uneven": {"amber": {"d_ff": 20}, "basalt": {"rank": 2, "head_rank": 32}, "cobalt": WHOLE},
}
IN_SESSION = settings(
    derandomize=True,
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def wild(make_wild):
    return make_wild()


@pytest.fixture(scope="module")
def mixture(wild):
    """`mixture(names, parts)`, each assembled once."""
    made = {}

    def get(names=OWNERS, parts="whole"):
        if (names, parts) not in made:
            shapes = {n: wild.shape(**PARTS[parts][n]) for n in names}
            made[names, parts] = wild.mixture(EvidenceSettings(), list(names), None, shapes)
        return made[names, parts]

    return get


def alone(wild, name):
    """An expert of whole matrices as a dense model."""
    tensors = wild.expert(
        EvidenceSettings(), sum(name.encode()), **wild.shape(**WHOLE).model_dump()
    )
    state = dict(wild.anchor.model.state_dict())
    model = assemble_mixture(wild.anchor, {name: tensors}, EvidenceSettings())
    for key, values in expert_tensors(model, name).items():
        if "router" not in key:
            for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
                key = key.replace(f".{part}", f".self_attn.{part}")
            for part in ("gate_proj", "up_proj", "down_proj"):
                key = key.replace(f".{part}", f".mlp.{part}")
            assert key in state
            state[key] = values
    model = Transformer(wild.anchor.config)
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


def posterior_by_hand(said, ids, eos, choice):
    """Mixed log-probabilities [T,V] where all models read every token; said [E,T,V]."""
    E, T, _ = said.shape
    chance, mixed = [1 / E] * E, []
    for t in range(T):
        if t:
            scores = [
                p * math.exp(said[e, t - 1, ids[t]] / choice.temperature)
                for e, p in enumerate(chance)
            ]
            chance = [
                (1 - choice.switch_rate) * s / sum(scores) + choice.switch_rate / E for s in scores
            ]
        if ids[t] == eos:
            chance = [1 / E] * E
        powers = [p**choice.sharpness for p in chance]
        mixed.append(
            np.log(sum(w / sum(powers) * np.exp(said[e, t]) for e, w in enumerate(powers)))
        )
    return np.array(mixed)


def test_where_everybody_reads_it_is_the_posterior_over_whole_models(wild, mixture):
    choice = ProbabilitySettings(lanes=4, min_weight=1e-30)
    ids = wild.ids(2, 40, seed=3)
    found = ProbabilityMixture(mixture(), choice)(ids)
    models = [wild.anchor.model, *(alone(wild, n) for n in OWNERS)]
    for row, text in enumerate(ids):
        said = torch.stack([m(text[None])[0].double().log_softmax(-1) for m in models]).numpy()
        by_hand = posterior_by_hand(said, text.tolist(), wild.anchor.config.eos_token_id, choice)
        np.testing.assert_allclose(found[row].numpy(), by_hand, atol=2e-4)


def test_an_expert_whose_table_tells_of_every_token_reads_from_a_smaller_weight_on(wild):
    """As one with noise does; a table that leaves a token out has none."""
    choice = ProbabilitySettings(lanes=4, min_weight=0.999, private_min_weight=1e-30)
    ids = wild.ids(2, 40, seed=3)
    readers = []
    for level in (0, UNTOLD):
        model = wild.mixture(EvidenceSettings(), list(OWNERS), None)
        for name in OWNERS:
            model.router.table(name).token_levels[:] = 0
            model.router.table(name).token_levels[7] = level
            model.router.table(name).weigh(wild.anchor.public, model.settings)
        weights = []
        ProbabilityMixture(model, choice)(ids, routing=weights)
        readers.append((weights[0][..., 1:] > 0).sum(-1).float())  # [B,T] owners
    assert (readers[0] == len(OWNERS)).all()
    assert readers[1].mean() < 1  # the likeliest, public among them; two where they are alike


@pytest.mark.parametrize("parts", sorted(PARTS))
def test_what_it_says_are_probabilities(wild, mixture, parts):
    said = ProbabilityMixture(mixture(parts=parts))(wild.ids(2, 30))
    assert torch.allclose(said.exp().sum(-1), torch.ones(2, 30), atol=1e-5)


@pytest.mark.parametrize("parts", sorted(PARTS))
def test_all_owners_off_is_the_anchor(wild, mixture, parts):
    ids = wild.ids(2, 30)
    model = ProbabilityMixture(mixture(parts=parts))
    said = model(ids, active=model.expert_mask([[], []]))
    expected = wild.anchor.model(ids).log_softmax(-1)
    assert torch.allclose(said, expected, atol=1e-5)


def poison(model, names):
    """NaN in all that the experts `names` hold."""
    for name, t in chain(model.named_parameters(), model.named_buffers()):
        if set(name.split(".")) & {slot(n) for n in names} and t.is_floating_point():
            t.data.fill_(math.nan)


def tell_all(wild, model, name):
    """Let an owner's table tell of every token, as one with noise does."""
    table = model.router.table(name)
    table.token_levels[table.token_levels == UNTOLD] = 0
    table.weigh(wild.anchor.public, model.settings)


CASES = st.fixed_dictionaries(
    {
        "parts": st.sampled_from(sorted(PARTS)),
        "masks": st.lists(st.sampled_from(SUBSETS), min_size=1, max_size=4),
        "telling": st.sampled_from(SUBSETS),
        "lanes": st.integers(1, 4),
        "min_weight": st.sampled_from([1e-9, 0.05, 0.2]),
        "length": st.integers(1, 40),
        "columns": st.integers(0, 3),
        "is_padded": st.booleans(),
        "numbers": st.sampled_from([1, 1 << 24]),
        "seed": st.integers(0, 99),
    }
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("document_mask", [False, True])
def test_an_expert_that_is_off_leaves_the_bits_of_one_never_merged(
    make_wild, dtype, document_mask, monkeypatch
):
    """Also with NaN in it, and whatever the texts beside it may read."""
    wild = make_wild(dtype, document_mask=document_mask)

    @cache
    def assemble(names, parts, telling, off=()):
        shapes = {n: wild.shape(**PARTS[parts][n]) for n in names}
        found = wild.mixture(EvidenceSettings(), list(names), None, shapes)
        for name in set(names) & set(telling):
            tell_all(wild, found, name)
        poison(found, off)
        return found

    @given(case=CASES)
    @IN_SESSION
    def check(case):
        masks, length = case["masks"], case["length"]
        monkeypatch.setattr(probabilities, "NUMBERS_AT_ONCE", case["numbers"] * 300)
        ids = wild.ids(len(masks), length + case["columns"], case["seed"])
        starts = torch.arange(len(masks))[:, None] % length if case["is_padded"] else 0
        is_token = torch.arange(length).expand(len(masks), -1) >= starts
        weights = {"min_weight": case["min_weight"], "private_min_weight": 1e-9}
        choice = ProbabilitySettings(lanes=case["lanes"], **weights)
        again = torch.arange(len(masks)).flip(0).repeat(2)

        def read(model, active):
            """The texts, then each twice in another order."""
            model = ProbabilityMixture(model, choice)
            store = model.new_cache()
            mask = model.expert_mask(active)
            with torch.inference_mode():
                said = [model(ids[:, :length], cache=store, is_token=is_token, active=mask)]
                store = store.select(again)
                said += [
                    model(column, cache=store)[again.argsort(stable=True)[::2]]
                    for column in ids[again, length:].split(1, dim=1)
                    if column.numel()
                ]
            return torch.cat(said, dim=1)

        off = tuple(n for n in OWNERS if not any(n in m for m in masks))
        together = read(assemble(OWNERS, case["parts"], case["telling"], off), masks)
        for row, mask in enumerate(masks):
            never = read(
                assemble(mask, case["parts"], case["telling"]),
                [[n for n in m if n in mask] for m in masks],
            )
            real = torch.cat([is_token[row], torch.ones(case["columns"], dtype=torch.bool)])
            a, b = together[row][real], never[row][real]
            assert not a.isnan().any()
            assert torch.equal(a.view(torch.int32), b.view(torch.int32))

    check()


@pytest.mark.parametrize("parts", sorted(PARTS))
def test_reading_on_is_reading_at_once(wild, mixture, parts, monkeypatch):
    model, ids = ProbabilityMixture(mixture(parts=parts)), wild.ids(2, 30, seed=5)
    whole = model(ids)
    cache = model.new_cache()
    parts = [model(x, cache=cache) for x in ids.split([11, 1, 1, 17], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-4)
    monkeypatch.setattr(probabilities, "NUMBERS_AT_ONCE", 7 * 300)
    assert torch.allclose(model(ids), whole, atol=1e-4)
    assert torch.allclose(model(ids, last=9), whole[:, -9:], atol=1e-4)


def test_padding_and_selection_change_nothing(wild, mixture):
    model, ids = ProbabilityMixture(mixture()), wild.ids(1, 20, seed=7)
    whole = model(ids)
    padded = torch.cat([torch.full((1, 6), 3), ids[:, :14]], dim=1)
    both = torch.cat([ids[:, :20], padded])
    is_token = torch.ones(2, 20, dtype=torch.bool)
    is_token[1, :6] = False
    cache = model.new_cache()
    found = model(both, cache=cache, is_token=is_token)
    assert torch.allclose(found[0], whole[0], atol=1e-4)
    assert torch.allclose(found[1, 6:], whole[0, :14], atol=1e-4)
    chosen = cache.select(torch.tensor([1, 1]))
    on = model(ids[:, 14:].expand(2, 6), cache=chosen)
    assert torch.allclose(on, whole[:, 14:].expand(2, 6, -1), atol=1e-4)


@pytest.mark.parametrize("count", [5, 6, 7, 8])
def test_padding_counts_nothing_however_the_text_is_cut(wild, mixture, count):
    model, ids = ProbabilityMixture(mixture()), wild.ids(1, 20, seed=7)
    ids[0, 0] = 17  # no end of text, after which all would begin anew
    padded = torch.cat([torch.full((1, count), 3), ids], dim=1)
    is_token = torch.arange(20 + count)[None] >= count
    for cut in (count, 7, 15):
        store = model.new_cache()
        found = [
            model(part, cache=store, is_token=real)
            for part, real in zip(padded.split(cut, 1), is_token.split(cut, 1), strict=True)
        ]
        said = torch.cat(found, dim=1)[:, count:]
        assert torch.allclose(said, model(ids), atol=1e-4)


def test_a_choice_of_experts_stays(wild, mixture):
    model, cache = ProbabilityMixture(mixture()), None
    cache = model.new_cache()
    model(wild.ids(1, 5), cache=cache, active=model.expert_mask([["amber"]]))
    with pytest.raises(PolicyError, match="cannot change"):
        model(wild.ids(1, 5), cache=cache, active=model.expert_mask([["basalt"]]))


def test_a_router_in_every_layer_is_refused(wild):
    with pytest.raises(ConfigError, match="kind linear"):
        ProbabilityMixture(wild.mixture(LinearSettings(), ["amber"]))


# --- lanes ----------------------------------------------------------------------------------------


@given(
    wanted=st.lists(st.sets(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=30),
    cut=st.integers(0, 30),
)
def test_everybody_who_reads_has_one_lane_and_keeps_it(wanted, cut):
    routed = np.zeros((1, len(wanted), 6))
    for t, experts in enumerate(wanted):
        routed[0, t, list(experts)] = 1 / len(experts)
    seats = _Seats(1, 3)
    chosen = [seats.follow(part) for part in np.split(routed, [cut], axis=1) if part.shape[1]]
    chosen = np.concatenate(chosen, axis=2)[0]  # [K,T]
    for t, experts in enumerate(wanted):
        assert sorted(e for e in chosen[:, t] if e >= 0) == sorted(experts)
        if t:
            for e in experts & wanted[t - 1]:
                assert (chosen[:, t] == e).argmax() == (chosen[:, t - 1] == e).argmax()


def test_a_lane_comes_back_to_who_read_in_it():
    seats = _Seats(1, 3)
    read = ([0, 1, 2], [0, 1], [0], [0, 3], [0, 1, 3], [0], [0, 2])
    routed = np.zeros((1, len(read), 4))
    for t, experts in enumerate(read):
        routed[0, t, experts] = 0.5
    first, second, third = seats.follow(routed)[0].tolist()
    assert first == [0] * 7
    assert second == [1, 1, -1, -1, 1, -1, 2]
    assert third == [2, -1, -1, 3, 3, -1, -1]  # idle for longer than the second, then as long


def test_a_lane_that_nobody_reads_holds_what_its_leader_does():
    x = torch.arange(24.0).view(4, 1, 3, 2)  # two texts of two lanes
    chosen = torch.tensor([[0, 0, -1], [-1, 1, 1], [2, 2, 2], [-1, -1, 0]])
    found = Lanes(chosen, torch.tensor([[0, 0, 1], [0, 0, 0]])).fill(x)
    expected = x.clone()
    expected[0, 0, 2] = x[1, 0, 2]
    expected[1, 0, 0] = x[0, 0, 0]
    expected[3, 0, :2] = x[2, 0, :2]
    assert torch.equal(found, expected)


def test_who_comes_to_a_lane_has_before_it_all_that_the_leader_read(wild, mixture):
    """Dense models one after the other, with one cache: that is what they share."""
    eos, ids = wild.anchor.config.eos_token_id, torch.tensor([[5, 9, 40, 7, 21]])
    assert eos not in ids
    chosen = torch.tensor([[1, 1, 1, 1, 1], [-1, -1, 0, 2, -1]])
    model = mixture()
    x, ctx = model.stream(ids.repeat(2, 1), lanes=Lanes(chosen, torch.zeros(1, 5, dtype=int)))
    said = model.predict_at(x, ctx, slice(0, 7))  # the first lane's five, then the second's two
    amber, basalt = alone(wild, "amber"), alone(wild, "basalt")
    assert torch.allclose(said[:5], amber(ids)[0], atol=1e-4)
    led = amber.new_cache()
    amber(ids[:, :2], cache=led)
    third = wild.anchor.model(ids[:, 2:3], cache=led)
    assert torch.allclose(said[5], third[0, 0], atol=1e-4)
    fourth = basalt(ids[:, 3:4], cache=led)
    assert torch.allclose(said[6], fourth[0, 0], atol=1e-4)


def test_a_row_is_alone_where_nothing_else_can_be_in_its_batch(mixture):
    model, ids = mixture(), torch.tensor([[5, 9], [40, 7]])

    def is_alone(ids, **options):
        return model.stream(ids, **options)[1].is_alone

    assert is_alone(ids[:1, :1])
    assert not is_alone(ids[:, :1])
    assert not is_alone(ids[:1])
    # another model may come to read it too
    assert not is_alone(ids[:1, :1], lanes=Lanes(torch.tensor([[0]]), torch.zeros(1, 1, dtype=int)))


@given(seed=st.integers(0, 10**6), owners_on=st.sampled_from(SUBSETS))
@IN_SESSION
def test_who_did_not_read_is_judged_by_the_table(mixture, seed, owners_on):
    """The posterior, worked out expert by expert."""
    model = ProbabilityMixture(mixture(), ProbabilitySettings(lanes=2))
    rng, (E, T, K), choice = np.random.default_rng(seed), (4, 12, 2), model.settings
    on = [True, *(n in owners_on for n in OWNERS)]
    who = np.array([rng.permutation([*np.flatnonzero(on), -1])[:K] for _ in range(T)])
    who[0], who[5] = -1, -1
    seen, tables = -rng.exponential(3, (K, T)), rng.normal(0, 2, (E, T))
    tables[0], tables[~np.array(on)] = 0.0, math.nan
    ids = rng.integers(1, 300, T)
    ids[8] = model.config.eos_token_id
    found = model._follow(
        ids[None],
        np.ones((1, T), bool),
        np.array(on)[None],
        tables[:, :, None],
        seen[None],
        who.T[None],
        None,
    )
    tempering, even = model.router.settings.tempering, 1 / sum(on)
    chance = [even if is_on else 0.0 for is_on in on]
    for t in range(T):
        heard = {e: seen[k, t] / choice.temperature for k, e in enumerate(who[t]) if e >= 0}
        if heard:
            best = max(heard, key=lambda e: (chance[e], -e))
            logs = [
                heard.get(e, heard[best] + tempering * (tables[e, t] - tables[best, t]))
                for e in range(E)
            ]
            scores = [p * math.exp(x) if p else 0.0 for p, x in zip(chance, logs, strict=True)]
            chance = [
                (1 - choice.switch_rate) * s / sum(scores) + choice.switch_rate * even * is_on
                for s, is_on in zip(scores, on, strict=True)
            ]
        if ids[t] == model.config.eos_token_id:
            chance = [even * is_on for is_on in on]
        np.testing.assert_allclose(found[t, :, 0], chance, atol=1e-12)


def test_what_is_no_mix_is_refused(mixture):
    with pytest.raises(ConfigError, match="'logits' is not known; states and probabilities are"):
        arrange(mixture(), "logits")


def test_an_expert_that_is_off_cannot_be_put_into_a_lane():
    lanes = Lanes(torch.tensor([[1]]), torch.tensor([[0]]))
    with pytest.raises(PolicyError, match="off would read"):
        lanes.weights(2, torch.tensor([[True, False]]))
