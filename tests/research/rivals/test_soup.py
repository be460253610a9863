"""Soups against plain sums over every number, and the weights they are made with."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.errors import MergeError
from flexolmo.model.transformer import ModelConfig, Transformer
from flexolmo.research.rivals.baselines import average_shared, soup

FREQUENT = settings(derandomize=True, max_examples=60)


def pico(seed, dtype=torch.float32):
    model = Transformer(
        ModelConfig(vocab_size=13, d_model=8, num_layers=2, num_heads=2, d_ff=6, max_seq_len=16)
    )
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
        expected = [
            math.fsum(w[m] * v for m, v in zip("abc", values, strict=True)) / sum(w.values())
            for values in zip(*(models[m][name].flatten().tolist() for m in "abc"), strict=True)
        ]
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
    for mixed in (
        soup({"a": here}),
        soup({"a": here, "b": here, "c": here}),
        soup({"a": here, "b": broken}, {"a": 0.3, "b": 0.0}),
    ):
        assert all(torch.equal(mixed[n], t) for n, t in here.items())


def test_models_of_another_form_are_refused_with_all_that_differs():
    here = pico(0)
    other = dict(here)
    other["extra.weight"] = other.pop("norm.weight")
    other["lm_head.weight"] = torch.zeros(13, 9)
    other["embed_tokens.weight"] = other["embed_tokens.weight"].double()
    for refused in (
        lambda: soup({"a": here, "b": other}),
        lambda: average_shared({"a": here, "b": other}, here),
    ):
        with pytest.raises(MergeError) as error:
            refused()
        for part in (
            "b lacks norm.weight",
            "b has extra.weight besides",
            "[13, 9]",
            "[13, 8]",
            "torch.float64",
        ):
            assert part in str(error.value)
    with pytest.raises(MergeError, match="No model found"):
        soup({})


@pytest.mark.parametrize(
    "weights",
    [
        {"a": 1.0},
        {"a": 1.0, "b": 1.0, "c": 1.0},
        {"a": 2.0, "b": -1.0},
        {"a": 0.0, "b": 0.0},
        {"a": math.nan, "b": 1.0},
        {"a": 1.0, "b": math.nan},
        {"a": math.inf, "b": 1.0},
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(MergeError, match="Soup weights"):
        soup({"a": pico(0), "b": pico(1)}, weights)


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
