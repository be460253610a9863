"""The rivals against plain loops, and the laws that keep the comparison honest."""

import math
import random
from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.errors import ConfigError, DataError, MergeError
from flexolmo.merge.baselines import (
    InstructRouter,
    TextClassifier,
    average_shared,
    btm_prefix_weights,
    btm_weights,
    likelihood_weights,
    mix_log_probs,
    prefix_for_budget,
    prompt_routing_weights,
    soup,
)
from flexolmo.model.transformer import ModelConfig, Transformer

FREQUENT = settings(derandomize=True, max_examples=60)
TEMPERATURES = st.sampled_from([0.3, 1.0, 4.0])
RATES = st.sampled_from([0.0, 1e-4, 0.1, 1.0])
# every way of weighting a window token by token, as (log_probs, top_k) -> [E,T]
METHODS = {
    "btm": lambda lp, k: btm_weights(lp, top_k=k),
    "cool btm": lambda lp, k: btm_weights(lp, top_k=k, temperature=0.2),
    "fixed share": lambda lp, k: btm_weights(lp, top_k=k, switch_rate=0.05),
    "prefix": lambda lp, k: btm_prefix_weights(lp, prefix_tokens=4, top_k=k),
    "no prefix": lambda lp, k: btm_prefix_weights(lp, prefix_tokens=0, top_k=k),
}
METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@st.composite
def windows(draw, max_experts=5, max_tokens=12):
    """Log-probabilities [E,T], mostly far from each other, without ties."""
    shape = draw(st.integers(1, max_experts)), draw(st.integers(1, max_tokens))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    return -rng.exponential(draw(st.sampled_from([0.1, 3.0, 60.0])), shape)


def softmax_loop(scores):
    highest = max(scores)
    parts = [math.exp(s - highest) for s in scores]
    return [p / math.fsum(parts) for p in parts]


def keep_top_loop(weights, k):
    """The K largest, the first of equals first, renormalised."""
    kept = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[:k]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


def btm_loop(log_probs, temperature=1.0, top_k=None):
    E, T = log_probs.shape
    columns = []
    for t in range(T):
        past = [math.fsum(log_probs[i, :t]) / temperature for i in range(E)]
        columns.append(keep_top_loop(softmax_loop(past), top_k or E))
    return np.array(columns).T


def paths(E, length, rate):
    """Every way to switch between E models: (models in order, prior probability)."""
    for path in product(range(E), repeat=length):
        prior = 1 / E
        for a, b in pairwise(path):
            prior *= rate / E + (1 - rate) * (a == b)
        yield path, prior


def fixed_share_by_paths(log_probs, temperature, rate):
    """P(the model at t | tokens before t), by summing over every path of switches."""
    E, T = log_probs.shape
    weights = np.zeros((E, T))
    for t in range(T):
        for path, prior in paths(E, t + 1, rate):
            past = sum(log_probs[path[s], s] for s in range(t))
            weights[path[t], t] += prior * math.exp(past / temperature)
    return weights / weights.sum(0)


# --- laws of every method -----------------------------------------------------------------------


@METHOD
@FREQUENT
@given(log_probs=windows(), top_k=st.integers(1, 6))
def test_weights_are_a_distribution_over_at_most_top_k(method, log_probs, top_k):
    for k in (top_k, len(log_probs)):
        weights = method(log_probs, k)
        assert weights.shape == log_probs.shape and weights.dtype == np.float64
        assert (weights >= 0).all()
        np.testing.assert_allclose(weights.sum(0), 1, rtol=1e-12)
        late = weights[:, 4:] if method is METHODS["prefix"] else weights
        assert ((late > 0).sum(0) <= k).all()


@METHOD
@FREQUENT
@given(log_probs=windows(), top_k=st.integers(1, 6), data=st.data())
def test_no_weight_depends_on_its_own_token_or_a_later_one(method, log_probs, top_k, data):
    t = data.draw(st.integers(0, log_probs.shape[1] - 1))
    other = log_probs.copy()
    other[:, t:] = data.draw(windows(1, 1))[0, 0] * np.arange(1, len(other) + 1)[:, None]
    before, after = method(log_probs, top_k), method(other, top_k)
    assert (before[:, :t + 1] == after[:, :t + 1]).all()
    np.testing.assert_allclose(method(log_probs[:, :t + 1], top_k), before[:, :t + 1], rtol=1e-12)


def test_these_weights_do_depend_on_the_tokens_before():
    """Else the law above would hold of anything."""
    log_probs = -np.random.default_rng(0).exponential(2, (3, 8))
    other = log_probs.copy()
    other[0, 4] -= 5
    for name, method in METHODS.items():
        assert (method(log_probs, 3)[:, 5:] != method(other, 3)[:, 5:]).all(), name


@METHOD
@FREQUENT
@given(log_probs=windows(), top_k=st.integers(1, 6), seed=st.integers(0, 99))
def test_permuting_the_models_permutes_the_weights(method, log_probs, top_k, seed):
    order = np.random.default_rng(seed).permutation(len(log_probs))
    # before the first token all are equal, and "ties to the first" does know positions
    k, start = (len(order), 0) if method is METHODS["no prefix"] else (top_k, 1)
    there = method(log_probs[order], k)[:, start:]
    np.testing.assert_allclose(there, method(log_probs, k)[order][:, start:], rtol=1e-9, atol=1e-15)


@METHOD
def test_single_precision_is_read_in_double(method):
    log_probs = -np.random.default_rng(0).exponential(2, (3, 20)).astype(np.float32)
    assert (method(log_probs, 2) == method(log_probs.astype(np.float64), 2)).all()


@METHOD
def test_long_windows_neither_overflow_nor_forget_how_to_count(method):
    log_probs = np.full((3, 4000), -40.0)
    log_probs[1] = -30.0
    weights = method(log_probs, 2)
    assert np.isfinite(weights).all()
    if method is not METHODS["no prefix"]:
        assert weights[:, -1].argmax() == 1


@METHOD
def test_losses_and_missing_numbers_are_no_log_probabilities(method):
    with pytest.raises(AssertionError, match="at most 0"):
        method(np.full((2, 9), 2.5), 2)
    with pytest.raises(AssertionError), np.errstate(invalid="ignore"):
        method(np.full((2, 9), np.nan), 2)


# --- BTM ----------------------------------------------------------------------------------------


@FREQUENT
@given(windows(), TEMPERATURES, st.sampled_from([None, 1, 2, 3]))
def test_btm_is_the_softmax_of_what_was_said_so_far(log_probs, temperature, top_k):
    found = btm_weights(log_probs, temperature=temperature, top_k=top_k)
    np.testing.assert_allclose(found, btm_loop(log_probs, temperature, top_k), rtol=1e-9,
                               atol=1e-300)


@FREQUENT
@given(windows(3, 5), TEMPERATURES, RATES)
def test_fixed_share_sums_over_every_way_to_switch(log_probs, temperature, rate):
    log_probs = np.maximum(log_probs, -20)  # the sum over paths is not guarded against underflow
    found = btm_weights(log_probs, temperature=temperature, switch_rate=rate)
    np.testing.assert_allclose(found, fixed_share_by_paths(log_probs, temperature, rate),
                               rtol=1e-9, atol=1e-300)


@FREQUENT
@given(windows(), TEMPERATURES)
def test_a_vanishing_switch_rate_is_plain_btm(log_probs, temperature):
    log_probs = np.maximum(log_probs, -5)  # else a share even of 1e-300 could tell in the end
    np.testing.assert_allclose(btm_weights(log_probs, temperature=temperature, switch_rate=1e-300),
                               btm_weights(log_probs, temperature=temperature), rtol=1e-9)


@FREQUENT
@given(windows(3, 5), RATES)
def test_the_mixture_of_a_window_is_the_mean_over_paths(log_probs, rate):
    """The chain rule: step by step, or all at once over every way to switch."""
    stepwise = mix_log_probs(log_probs, btm_weights(log_probs, switch_rate=rate)).sum()
    E, T = log_probs.shape
    total = [math.log(prior) + sum(log_probs[m, t] for t, m in enumerate(path))
             for path, prior in paths(E, T, rate) if prior > 0]
    assert stepwise == pytest.approx(np.logaddexp.reduce(total), rel=1e-9)


@FREQUENT
@given(windows(max_tokens=40))
def test_plain_btm_loses_at_most_log_e_to_the_best_model(log_probs):
    mixed = mix_log_probs(log_probs, btm_weights(log_probs)).sum()
    assert mixed >= log_probs.sum(1).max() - math.log(len(log_probs)) - 1e-9


def test_fixed_share_follows_a_switch_that_plain_btm_misses():
    log_probs = np.full((2, 200), -5.0)
    log_probs[0, :100] = log_probs[1, 100:] = -2.0
    plain, shared = btm_weights(log_probs), btm_weights(log_probs, switch_rate=0.01)
    assert plain[1, 110] < 1e-50 and shared[1, 110] > 0.98
    assert shared[0, 90] > 0.98


def test_ties_go_to_the_first():
    log_probs = np.full((4, 6), -1.0)
    for weights in (btm_weights(log_probs, top_k=2),
                    btm_weights(log_probs, top_k=2, switch_rate=0.1),
                    btm_prefix_weights(log_probs, prefix_tokens=0, top_k=2)):
        assert (weights[:2] == 0.5).all() and (weights[2:] == 0).all()


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"temperature": math.nan}, {"top_k": 0},
                                   {"switch_rate": -0.1}, {"switch_rate": 1.5}], ids=str)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} .* found; expected"):
        btm_weights(np.zeros((2, 2)), **wrong)


# --- BTM at a budget ----------------------------------------------------------------------------


@FREQUENT
@given(windows(), st.integers(0, 14), st.integers(1, 6), TEMPERATURES)
def test_members_are_chosen_by_the_prefix_and_weigh_among_themselves(log_probs, prefix, top_k,
                                                                     temperature):
    E, T = log_probs.shape
    seen = [math.fsum(log_probs[i, :prefix]) for i in range(E)]
    members = sorted(sorted(range(E), key=lambda i: (-seen[i], i))[:top_k])
    expected = btm_loop(log_probs, temperature)
    expected[:, prefix:] = 0
    expected[members, prefix:] = btm_loop(log_probs[members], temperature)[:, prefix:]
    found = btm_prefix_weights(log_probs, prefix_tokens=prefix, top_k=top_k,
                               temperature=temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-300)
    assert found.shape == (E, T)


@FREQUENT
@given(windows(), st.integers(0, 14), st.integers(1, 6))
def test_what_was_not_run_is_not_read(log_probs, prefix, top_k):
    weights = btm_prefix_weights(log_probs, prefix_tokens=prefix, top_k=top_k)
    mixed = mix_log_probs(log_probs, weights)
    seen = log_probs[:, :prefix].cumsum(1)[:, -1] if prefix else np.zeros(len(log_probs))
    not_run = log_probs.copy()
    not_run[np.argsort(-seen, kind="stable")[top_k:], prefix:] = np.nan
    assert (btm_prefix_weights(not_run, prefix_tokens=prefix, top_k=top_k) == weights).all()
    assert (mix_log_probs(not_run, weights) == mixed).all()


@FREQUENT
@given(windows())
def test_a_prefix_of_the_whole_window_is_plain_btm(log_probs):
    for prefix, top_k in ((99, 1), (0, len(log_probs))):
        assert (btm_prefix_weights(log_probs, prefix_tokens=prefix, top_k=top_k)
                == btm_weights(log_probs)).all()


def test_the_prefix_is_the_longest_within_the_budget():
    """Every tenth of a model counts: 2.3 as a budget is 2.3, not what a float makes of it."""
    for T, E, top_k, tenths in product((1, 7, 20, 50), range(1, 5), range(1, 6), range(5, 45)):
        k, budget = min(top_k, E), Fraction(tenths, 10)
        found = prefix_for_budget(T, E, top_k, tenths / 10)
        if budget < k:
            assert found is None
        elif budget >= E:
            assert found == T
        else:
            assert found == math.floor((budget - k) * T / (E - k))


def test_settings_of_the_prefix_are_refused_too():
    for wrong in ({"prefix_tokens": -1, "top_k": 1}, {"prefix_tokens": 1, "top_k": 0},
                  {"prefix_tokens": 1, "top_k": 1, "temperature": -1.0}):
        with pytest.raises(ConfigError, match="found; expected"):
            btm_prefix_weights(np.zeros((2, 2)), **wrong)


# --- mixing -------------------------------------------------------------------------------------


@FREQUENT
@given(windows(), st.integers(0, 99))
def test_mixing_is_the_log_of_the_weighted_sum(log_probs, seed):
    log_probs = np.maximum(log_probs, -300)
    weights = np.random.default_rng(seed).random(log_probs.shape) ** 4
    weights[0, log_probs.shape[1] // 2:] = 0
    weights /= np.maximum(weights.sum(0), 1e-300)
    for t, found in enumerate(mix_log_probs(log_probs, weights)):
        total = math.fsum(w * math.exp(lp) for w, lp in zip(weights[:, t], log_probs[:, t],
                                                            strict=True))
        assert found == (pytest.approx(math.log(total), rel=1e-9) if total else -math.inf)


def test_mixing_survives_tiny_probabilities():
    log_probs = np.array([[-2000.0], [-2001.0], [np.nan]])
    mixed = mix_log_probs(log_probs, np.array([[0.25], [0.75], [0.0]]))
    assert mixed == pytest.approx(-2000 + math.log(0.25 + 0.75 / math.e))
    with pytest.raises(AssertionError):
        mix_log_probs(log_probs, np.array([[0.5], [0.7], [-0.2]]))


# --- soups --------------------------------------------------------------------------------------


def pico(seed, dtype=torch.float32):
    model = Transformer(ModelConfig(vocab_size=13, d_model=8, num_layers=2, num_heads=2, d_ff=6,
                                    max_seq_len=16))
    model.initialise(seed)
    return model.to(dtype).state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("weights", [None, {"a": 2.0, "b": 0.0, "c": 6.0}], ids=["mean", "given"])
def test_a_soup_is_the_weighted_mean_of_every_number(dtype, weights):
    models = {n: pico(i, dtype) for i, n in enumerate("abc")}
    mixed = soup(models, weights)
    assert list(mixed) == list(models["a"])
    w = weights or {"a": 1.0, "b": 1.0, "c": 1.0}
    for name, tensor in mixed.items():
        assert tensor.dtype == dtype
        expected = [math.fsum(w[m] * v for m, v in zip("abc", values, strict=True))
                    / sum(w.values()) for values in
                    zip(*(models[m][name].flatten().tolist() for m in "abc"), strict=True)]
        wanted = torch.tensor(expected, dtype=torch.float64).to(dtype).view(tensor.shape)
        # the last bit may go either way where the sums end half way between two numbers
        torch.testing.assert_close(tensor, wanted, rtol=torch.finfo(dtype).eps, atol=1e-15)


@FREQUENT
@given(st.permutations("abcd"), st.lists(st.integers(0, 5), min_size=4, max_size=4).filter(any))
def test_the_order_of_the_models_does_not_matter(order, weights):
    numbers = torch.linspace(-1, 2, 4, dtype=torch.float64) ** 3
    models = {n: {"w": number} for n, number in zip("abcd", numbers, strict=True)}
    given = {n: w / 7 for n, w in zip("abcd", weights, strict=True)}
    other = soup({n: models[n] for n in order}, {n: given[n] for n in reversed(order)})
    assert torch.equal(soup(models, given)["w"], other["w"])
    doubled = soup(models, {n: 2 * w for n, w in given.items()})
    assert torch.equal(soup(models, given)["w"], doubled["w"])


def test_a_soup_of_one_is_that_model_and_a_model_of_weight_zero_leaves_no_trace():
    here, broken = pico(0), {n: torch.full_like(t, math.nan) for n, t in pico(1).items()}
    for mixed in (soup({"a": here}), soup({"a": here, "b": here, "c": here}),
                  soup({"a": here, "b": broken}, {"a": 0.3, "b": 0.0})):
        assert all(torch.equal(mixed[n], t) for n, t in here.items())


def test_models_of_another_form_are_refused_with_all_that_differs():
    here = pico(0)
    other = dict(here)
    other["extra.weight"] = other.pop("norm.weight")
    other["lm_head.weight"] = torch.zeros(13, 9)
    other["embed_tokens.weight"] = other["embed_tokens.weight"].double()
    for refused in (lambda: soup({"a": here, "b": other}),
                    lambda: average_shared({"a": here, "b": other}, here)):
        with pytest.raises(MergeError) as error:
            refused()
        for part in ("b lacks norm.weight", "b has extra.weight besides", "[13, 9]", "[13, 8]",
                     "torch.float64"):
            assert part in str(error.value)
    with pytest.raises(MergeError, match="No model found"):
        soup({})


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0},
                                     {"a": 2.0, "b": -1.0}, {"a": 0.0, "b": 0.0},
                                     {"a": math.nan, "b": 1.0}, {"a": 1.0, "b": math.nan},
                                     {"a": math.inf, "b": 1.0}], ids=str)
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(MergeError, match="Soup weights"):
        soup({"a": pico(0), "b": pico(1)}, weights)


@FREQUENT
@given(windows(max_tokens=1), TEMPERATURES)
def test_likelihood_weights_are_a_softmax(log_likelihood, temperature):
    log_likelihood = log_likelihood[:, 0] * 100
    found = likelihood_weights(log_likelihood, temperature)
    np.testing.assert_allclose(found, softmax_loop((log_likelihood / temperature).tolist()),
                               rtol=1e-9, atol=1e-300)
    with pytest.raises(ConfigError, match="temperature"):
        likelihood_weights(log_likelihood, 0.0)


def test_btx_averages_all_but_the_ffns():
    anchor, dense = pico(0), {"code": pico(1), "news": pico(2)}
    frame, ffns = average_shared(dense, anchor)
    assert list(ffns) == ["public", "code", "news"]
    for name, tensor in anchor.items():
        if ".mlp." in name:
            assert name not in frame
            for model, theirs in {"public": anchor, **dense}.items():
                assert torch.equal(ffns[model][name], theirs[name])
        else:
            assert all(name not in f for f in ffns.values())
            mean = (tensor.double() + dense["code"][name] + dense["news"][name]) / 3
            torch.testing.assert_close(frame[name], mean.float())
    assert len(ffns["public"]) == 2 * 3 and "layers.1.post_feedforward_layernorm.weight" in frame
    with pytest.raises(MergeError, match="names the anchor"):
        average_shared({"public": anchor}, anchor)


# --- prompt routing -----------------------------------------------------------------------------


@FREQUENT
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.integers(1, 12), st.integers(0, 15),
       st.data())
def test_public_answers_until_the_prompt_is_read(probabilities, T, prompt, data):
    public = data.draw(st.integers(0, len(probabilities) - 1))
    weights = prompt_routing_weights(np.array(probabilities), T, prompt, public)
    best = probabilities.index(max(probabilities))
    for i in range(len(probabilities)):
        for t in range(T):
            assert weights[i, t] == (i == (public if t < prompt else best))


DOMAINS = {"public": "general prose", "code": "programs", "news": "newspaper articles"}
WORDS = {"common": "the of and to in that it was for on with",
         "public": "time year people way day man thing woman life child world school",
         "code": "def return self import class lambda yield assert = ( ) : [ ]",
         "news": "minister vote court budget strike police mayor border report union"}


def made_texts(name, count, seed, length=25):
    """`count` texts; half of the words stand in every domain."""
    rng = random.Random(f"{name} {seed}")
    return [" ".join(rng.choice(WORDS[name if rng.random() < 0.5 else "common"].split())
                     for _ in range(length)) for _ in range(count)]


@pytest.mark.parametrize("names", [["public", "code"], ["news", "public", "code"]], ids=len)
def test_the_text_classifier_tells_domains_apart_in_the_order_given(names):
    classifier = TextClassifier.fit({n: made_texts(n, 20, 0) for n in names})
    assert classifier.names == names
    for i, name in enumerate(names):
        found = classifier.probabilities(made_texts(name, 20, 1))
        assert found.shape == (20, len(names))
        np.testing.assert_allclose(found.sum(1), 1)
        assert (found.argmax(1) == i).mean() > 0.9


def test_fitting_twice_gives_the_same_and_a_text_is_judged_by_itself():
    texts = {n: made_texts(n, 10, 0) for n in DOMAINS}
    asked = [made_texts(n, 1, 2)[0] for n in DOMAINS]
    classifier, again = TextClassifier.fit(texts), TextClassifier.fit(texts)
    first = classifier.probabilities(asked)
    assert (first == again.probabilities(asked)).all()
    alone = np.concatenate([classifier.probabilities([t]) for t in asked])
    np.testing.assert_allclose(alone, first, rtol=1e-12)


def test_a_domain_with_more_texts_is_not_likelier_for_that():
    classifier = TextClassifier.fit({"public": made_texts("public", 60, 0),
                                     "news": made_texts("news", 6, 0)})
    assert classifier.probabilities(["zzz"])[0, 0] < 0.75  # 60 of 66 would be 0.91


@pytest.mark.parametrize("texts", [{}, {"a": ["b c"]}, {"a": ["b c"], "empty": []},
                                   {"a": ["b c"], "empty": [" \n"]}], ids=str)
def test_too_little_to_learn_from_is_refused(texts):
    with pytest.raises(DataError, match="found"):
        TextClassifier.fit(texts)


@pytest.mark.parametrize("answer, domain, is_clear", [
    ("code", "code", True), ("  NEWS.\n", "news", True), ("**Code**", "code", True),
    ("2", "code", True), ("3.", "news", True), ("1", "public", True), ("Public", "public", True),
    ("", "public", False), ("0", "public", False), ("4", "public", False),
    ("codes", "public", False), ("code or news", "public", False), ("2 or 3", "public", False),
    ("It is code.", "public", False)])
def test_an_answer_counts_only_if_it_is_one_name_or_number(answer, domain, is_clear):
    router = InstructRouter(lambda prompt: answer, DOMAINS)
    found = router.probabilities(["x", "y"])
    assert found.tolist() == [[float(n == domain) for n in router.names]] * 2
    assert router.num_unclear == (0 if is_clear else 2)
    assert router.probabilities([]).shape == (0, 3)


def test_the_model_is_shown_every_domain_and_only_the_start_of_the_text():
    prompts = []

    def ask(prompt):
        prompts.append(prompt)
        return "news"

    InstructRouter(ask, DOMAINS, start_characters=5).probabilities(["abcdefgh"])
    assert "abcde" in prompts[0] and "abcdef" not in prompts[0]
    for i, (name, description) in enumerate(DOMAINS.items(), start=1):
        assert f"{i}. {name}: {description}" in prompts[0]


@pytest.mark.parametrize("names", [["code", "news"], ["public", "code", "Code"], ["public", "2"]],
                         ids=str)
def test_domains_that_an_answer_could_confuse_are_refused(names):
    with pytest.raises(ConfigError, match="expected public among"):
        InstructRouter(lambda prompt: "", dict.fromkeys(names, ""))
