"""Bits per byte against a loop that predicts one token at a time, and the summary by hand."""

import copy
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexolmo.data.batches import TokenSet, TokenSplit, evaluation_windows
from flexolmo.errors import DataError
from flexolmo.evaluation import likelihood as room
from flexolmo.evaluation.likelihood import (
    evaluate_mixture,
    measure_likelihood,
    read_windows,
    summarise,
)

os.environ["HF_HUB_OFFLINE"] = "1"
NAMES = ("amber", "basalt", "zinc")
EOS = 0


def made_set(lengths, seed=0, vocab_size=300, tokenizer=None):
    """A set whose held-out documents have `lengths` random tokens, and made-up byte counts."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(1, vocab_size, n) for n in lengths]
    tokens = np.concatenate([np.append(d, EOS) for d in documents]).astype(np.uint16)
    offsets = np.cumsum([0, *(len(d) + 1 for d in documents)])
    sizes = np.array([3 * n + i for i, n in enumerate(lengths)])
    digest = "sha256:other" if tokenizer is None else tokenizer.digest
    entry = {"eos_id": EOS, "vocab_size": vocab_size, "digest": digest}
    card = {"name": "made", "tokenizer": entry}
    return TokenSet(
        None, card, {"heldout": TokenSplit(tokens, offsets, sizes, np.arange(len(sizes)))}
    )


def brute_force(model, token_set, seq_len, enabled=None, documents=None):
    """Bits, bytes and tokens; one forward pass in float64 for each token, without batches."""
    split, nats, size, tokens = token_set.splits["heldout"], 0.0, 0, 0
    active = None if enabled is None else model.expert_mask([enabled])
    for i in range(split.num_documents if documents is None else documents):
        text = [EOS, *split.document(i).tolist()]
        size += int(split.bytes[i])
        for t in range(1, len(text)):
            start = (t - 1) // seq_len * seq_len  # where the window of token t begins
            z = model(torch.tensor([text[start:t]]), active=active)[0, -1]
            assert z.dtype == torch.float64
            nats -= float(z.log_softmax(-1)[text[t]])
            tokens += 1
    return nats / math.log(2), size, tokens


@pytest.mark.parametrize("router", ["evidence", "linear"])
@pytest.mark.parametrize("seq_len", [5, 64])
@pytest.mark.parametrize("enabled", [None, [], ["amber", "zinc"]])
def test_bits_per_byte_are_those_of_one_token_at_a_time(house, router, seq_len, enabled):
    made = made_set([1, 7, 5, 12, 6])
    model = house.mixture(NAMES, router, top_k=2).model
    found = measure_likelihood(model, made, "heldout", enabled=enabled, seq_len=seq_len)
    exact = copy.deepcopy(model).double()
    if exact.router is not None:
        exact.router.float()  # it works in float32 whatever the weights are
    bits, size, tokens = brute_force(exact, made, seq_len, enabled)
    assert (found.bytes, found.tokens) == (size, tokens)
    assert found.bits == pytest.approx(bits, rel=1e-5)
    assert found.bits_per_byte == found.bits / found.bytes


def test_the_anchor_alone_is_measured_as_well(house):
    made = made_set([4, 9])
    found = measure_likelihood(house.anchor.model, made, "heldout", seq_len=6)
    bits, size, _ = brute_force(copy.deepcopy(house.anchor.model).double(), made, 6)
    assert found.bits_per_byte == pytest.approx(bits / size, rel=1e-5)
    assert found.routing is None


@pytest.mark.parametrize("max_bytes, read", [(1, [0]), (24, [0, 3]), (48, [0, 1, 2, 3])])
def test_what_is_read_within_a_limit_is_measured_exactly(house, max_bytes, read):
    sizes = [4, 3, 5, 2]  # 12, 10, 17 and 9 bytes, a window each
    found = measure_likelihood(house.anchor.model, made_set(sizes), "heldout", max_bytes=max_bytes)
    windows = list(evaluation_windows(made_set(sizes), "heldout", 256))
    expected = read_windows(house.anchor.model, [windows[i] for i in read])
    assert (found.bytes, found.tokens) == (expected.bytes, expected.tokens)
    assert found.bits == pytest.approx(expected.bits, rel=1e-5)


@given(order=st.permutations(range(7)), batch_tokens=st.sampled_from([1, 13, 40, 4096]))
@settings(
    derandomize=True,
    max_examples=15,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_neither_order_nor_batches_matter(house, order, batch_tokens):
    model = house.mixture(NAMES).model
    windows = list(evaluation_windows(made_set([3, 20, 11, 2, 2, 17, 1]), "heldout", 256))
    whole = read_windows(model, windows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "BATCH_TOKENS", batch_tokens)
        found = read_windows(model, [windows[i] for i in order])
    assert (found.tokens, found.bytes) == (whole.tokens, whole.bytes)
    assert found.bits == pytest.approx(whole.bits, rel=1e-5)
    np.testing.assert_allclose(found.routing, whole.routing, rtol=1e-4)


def test_a_batch_never_holds_more_than_its_tokens_unless_one_window_does(house, monkeypatch):
    sizes = []

    class Spy(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, ids, active, routing):
            sizes.append(ids.shape)
            return torch.zeros(*ids.shape, 300)

    monkeypatch.setattr(room, "BATCH_TOKENS", 50)
    lengths = [1, 2, 2, 3, 5, 8, 13, 21, 34, 55, 89]
    windows = list(evaluation_windows(made_set(lengths), "heldout", 256))
    found = read_windows(Spy(), windows)
    assert found.tokens == sum(lengths)
    assert found.bits == pytest.approx(sum(lengths) * math.log2(300))
    assert all(b == 1 or b * t <= 50 for b, t in sizes)
    sizes.clear()
    read_windows(Spy(), list(evaluation_windows(made_set([9] * 20), "heldout", 256)))
    assert sizes == [(5, 9)] * 4


def test_routing_is_the_mean_weight_over_tokens(house):
    model = house.mixture(NAMES, "linear").model
    windows = list(evaluation_windows(made_set([6, 9, 4]), "heldout", 256))
    summed = []  # [L,E] of each window
    for ids, _ in windows:
        routing = []
        model(torch.from_numpy(ids[:-1])[None], routing=routing)
        summed.append(torch.stack([w[0].double().sum(0) for w in routing]))
    found = read_windows(model, windows)
    np.testing.assert_allclose(found.routing, (sum(summed) / 19).tolist(), rtol=1e-5)
    for weights, expected in zip(found.weights, summed, strict=True):
        np.testing.assert_allclose(weights, expected.mean(0), rtol=1e-5)


def test_a_disabled_expert_has_no_weight(house):
    found = measure_likelihood(
        house.mixture(NAMES).model, made_set([9]), "heldout", enabled=["zinc"]
    )
    weights = np.array(found.routing)
    assert (weights[:, [1, 2]] == 0).all() and (weights[:, [0, 3]] > 0).all()
    assert ((weights.sum(1) > 0.95) & (weights.sum(1) < 1 + 1e-6)).all()  # small ones are cut off


# --- every arrangement --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_arrangement_is_measured_on_every_set(house, count):
    names = sorted(NAMES)[:count]
    mixture = house.mixture(names)
    sets = {
        n: made_set([8, 5], seed=i, tokenizer=mixture.tokenizer)
        for i, n in enumerate(["public", *names])
    }
    found = evaluate_mixture(mixture, sets, "heldout", seq_len=32)
    assert list(found["bits_per_byte"]) == [
        "anchor",
        *(f"expert {n}" for n in names),
        "mixture",
        *(f"mixture without {n}" for n in names),
    ]
    assert all(list(row) == list(sets) for row in found["bits_per_byte"].values())
    assert found["routing"]["experts"] == ["public", *names]
    assert list(found["routing"]["weights"]) == found["routing"]["sets"] == list(sets)
    assert found["bytes"] == {s: 3 * 13 + 1 for s in sets}
    assert (found["split"], found["seq_len"]) == ("heldout", 32)
    if count == 1:  # then these are two names for one thing
        rows = found["bits_per_byte"]
        assert rows["expert amber"] == rows["mixture"]
        assert rows["mixture without amber"] == rows["anchor"]


@pytest.mark.parametrize("router", ["evidence", "linear"])
def test_each_row_is_what_a_mixture_built_so_would_measure(house, router):
    mixture = house.mixture(NAMES, router)
    sets = {
        n: made_set([8, 5, 9], seed=i, tokenizer=mixture.tokenizer)
        for i, n in enumerate(["public", *NAMES])
    }
    table = evaluate_mixture(mixture, sets, "heldout")["bits_per_byte"]
    built = {"anchor": [], "mixture": list(NAMES)}
    built |= {f"expert {n}": [n] for n in NAMES}
    built |= {f"mixture without {n}": [m for m in NAMES if m != n] for n in NAMES}
    assert table.keys() == built.keys()
    for row, names in built.items():
        model = house.mixture(names, router).model
        assert table[row] == {
            s: measure_likelihood(model, t, "heldout").bits_per_byte for s, t in sets.items()
        }
    assert len({x for row in table.values() for x in row.values()}) == 8 * 4
    own = evaluate_mixture(mixture, sets, "heldout", own_sets=True)["bits_per_byte"]
    for name in NAMES:
        row = table[f"expert {name}"]
        assert own.pop(f"expert {name}") == {s: row.pop(s) for s in ("public", name)}
        del table[f"expert {name}"]
    assert own == table


def test_the_anchors_row_is_stock_transformers_loss(house, pico_sets):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(house.anchor_dir, dtype=torch.float32).eval()
    found = evaluate_mixture(
        house.mixture(NAMES), {"public": pico_sets["public"]}, "heldout", seq_len=48, max_bytes=1500
    )
    nats = size = 0
    for ids, part in evaluation_windows(pico_sets["public"], "heldout", 48, 1500):
        ids = torch.from_numpy(ids)[None]
        with torch.inference_mode():
            nats += float(theirs(ids, labels=ids).loss) * (ids.shape[1] - 1)
        size += part
    expected = nats / math.log(2) / size
    assert found["bits_per_byte"]["anchor"]["public"] == pytest.approx(expected, rel=1e-5)


# --- the summary --------------------------------------------------------------------------------


def table_of(**changes):
    """Two owners, worked by hand; rows in the order public, math, code."""
    rows = {
        "anchor": (2.0, 4.0, 5.0),
        "expert math": (2.1, 3.0, 5.1),
        "expert code": (2.1, 4.1, 3.0),
        "mixture": (2.02, 3.2, 4.0),
        "mixture without math": (2.0, 4.04, 4.02),
        "mixture without code": (2.01, 3.23, 5.05),
    }
    rows |= {k.replace("_", " "): v for k, v in changes.items()}
    return {k: dict(zip(("public", "math", "code"), v, strict=True)) for k, v in rows.items()}


def bars_of(**changes):
    return [b["met"] for b in summarise(table_of(**changes), ["math", "code"])["bars"]]


def test_the_summary_of_a_table_worked_by_hand():
    found = summarise(table_of(), ["math", "code"])
    assert found["kept_of_pair_gain"] == pytest.approx(
        {"math": 0.8 / 1.0, "code": 1.0 / 2.0, "mean": 0.65}
    )
    assert found["public_change"] == pytest.approx(0.01)
    assert found["optout_vs_anchor"] == pytest.approx({"math": 0.01, "code": 0.01})
    assert found["optout_side_effect"] == pytest.approx({"math": 0.005, "code": 3.23 / 3.2 - 1})
    assert [b["met"] for b in found["bars"]] == [True] * 5
    assert [b["value"] for b in found["bars"]] == [
        "2 of 2",
        "65 %",
        "+1.00 %",
        "worst +1.00 %",
        "worst +0.94 %",
    ]


@pytest.mark.parametrize(
    "bar, changes",
    [
        (0, {"mixture": (2.0, 4.0, 3.0), "expert_math": (2.1, 3.0, 5.1)}),
        (1, {"mixture": (2.0, 3.4, 4.1), "mixture_without_code": (2.0, 3.4, 5.0)}),
        (2, {"mixture": (2.05, 3.2, 4.0)}),
        (3, {"mixture_without_math": (2.0, 4.09, 4.0)}),
        (4, {"mixture_without_math": (2.06, 4.0, 4.0)}),
        (4, {"mixture_without_code": (2.0, 3.3, 5.0)}),
    ],
)
def test_a_bar_that_is_missed_is_said_to_be(bar, changes):
    found = bars_of(**changes)
    assert found[bar] is False
    if changes.keys() & {"mixture_without_math", "mixture_without_code"}:
        assert sum(found) == 4


def test_an_owners_own_loss_is_no_side_effect_of_switching_it_off():
    assert bars_of(mixture_without_math=(2.0, 4.0, 4.0))[4] is True  # math itself is 25 % worse


def test_without_a_public_set_there_is_no_bar_for_it():
    table = {k: {s: v for s, v in row.items() if s != "public"} for k, row in table_of().items()}
    found = summarise(table, ["math", "code"])
    assert found["public_change"] is None and len(found["bars"]) == 4


def test_an_owner_whose_set_was_not_read_is_left_out_of_its_own_bars():
    table = {k: {s: v for s, v in row.items() if s != "code"} for k, row in table_of().items()}
    found = summarise(table, ["math", "code"])
    assert found["kept_of_pair_gain"] == pytest.approx({"math": 0.8, "mean": 0.8})
    assert set(found["optout_vs_anchor"]) == {"math"}
    assert set(found["optout_side_effect"]) == {"math", "code"}


def test_an_expert_that_harms_has_no_gain_to_keep():
    table = {
        "anchor": {"a": 2.0},
        "expert a": {"a": 2.1},
        "mixture": {"a": 2.1},
        "mixture without a": {"a": 2.0},
    }
    assert summarise(table, ["a"])["bars"][1]["met"] is False


def test_a_set_of_another_tokenizer_is_refused(house):
    other = replace(made_set([8]), directory=Path("elsewhere"))
    with pytest.raises(DataError, match="elsewhere was prepared with the tokenizer sha256:other"):
        evaluate_mixture(house.mixture(NAMES), {"other": other}, "heldout")
