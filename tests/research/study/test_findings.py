"""Bars are judged at their marks; orders are compared pair by pair."""

import math
from pathlib import Path

import pytest

from flexolmo.research.study.findings import (
    DEFAULT,
    PAPER_AVERAGES,
    RIVALS,
    TABLES,
    Bar,
    best_rival,
    compare_orders,
    find_bars,
)
from flexolmo.research.study.study_page import write_page
from made_results import make_results, set_mean


def find(bars: list[Bar], *words: str) -> Bar:
    [bar] = [b for b in bars if all(w in b.asked for w in words)]
    return bar


# --- bars -----------------------------------------------------------------------------------------


def test_a_rival_bar_is_met_at_eleven_tenths_and_missed_below() -> None:
    for mean, met in ((0.55, True), (0.5499, False)):
        results = make_results(3)
        for kind in TABLES:
            for m in RIVALS:
                set_mean(results, kind, m, 0.2)
            set_mean(results, kind, "dume", 0.5)
            set_mean(results, kind, DEFAULT, mean)
        bars = find_bars(results)
        for text in TABLES.values():
            bar = find(bars, text, "respects data separation")
            assert bar.met is met and bar.value == pytest.approx(mean / 0.5)
            assert "DUME" in bar.detail and len(bar.by_seed) == 3


def test_the_best_rival_spends_no_more_than_ours_and_keeps_data_apart() -> None:
    table = make_results(1)["gap_closed"]
    assert best_rival(table) == "btm_equal_flops"
    table["prompt_routing"]["flops_per_token"] = 1.02 * table[DEFAULT]["flops_per_token"]
    table["prompt_routing"]["mean"] = 0.99
    assert best_rival(table) == "prompt_routing"
    table["prompt_routing"]["flops_per_token"] *= 1.0001
    assert best_rival(table) == "btm_equal_flops"
    table["unrestricted_2x"]["mean"] = table["btm"]["mean"] = 5.0
    assert best_rival(table) == "btm_equal_flops"


@pytest.mark.parametrize(
    ("method", "kind", "words", "mark"),
    [
        ("btm", "mixed", ("mixed", "1.1 times BTM"), 1.1),
        ("btm", "gap_closed", ("held-out", "0.95 times BTM"), 0.95),
        ("unrestricted_2x", "gap_closed", ("held-out", "half"), 0.5),
        ("unrestricted_2x", "mixed", ("mixed", "half"), 0.5),
    ],
)
def test_bars_against_one_method_are_judged_at_their_mark(
    method: str, kind: str, words: tuple[str, ...], mark: float
) -> None:
    results = make_results(2)
    set_mean(results, kind, method, 0.8)
    for ours, met in ((0.8 * mark, True), (0.8 * mark - 1e-4, False)):
        set_mean(results, kind, DEFAULT, ours)
        assert find(find_bars(results), *words).met is met


def test_better_than_unrestricted_means_better() -> None:
    results = make_results(1)
    for ours, met in ((0.7, False), (0.7001, True)):
        set_mean(results, "mixed", DEFAULT, ours)
        set_mean(results, "mixed", "unrestricted_1x", 0.7)
        assert find(find_bars(results), "mixed", "1x").met is met


def test_kept_gain_public_size_and_share_are_judged_at_their_marks() -> None:
    for off, met in ((0.0, True), (1e-4, False)):
        results = make_results(2)
        for seed in results["seeds"].values():
            seed["kept"]["default"] |= {"mean": 0.9 - off, "public_change": 0.01 + off}
            seed["bytes"] = {"default": [1000, 4000], "low": [200, 1000 + round(1e4 * off)]}
            seed["low_rank_share_of_gain"] = {"a": 0.9 - off, "b": 1.0 - off}
        bars = find_bars(results)
        for words in ("90 %", "1 % more bits", "quarter", "95 % of the full"):
            assert find(bars, words).met is met, words


def test_one_owner_in_one_seed_is_enough_to_miss_the_opt_out_bar() -> None:
    results = make_results(3)
    assert find(find_bars(results), "owner off").met is True
    seed = results["seeds"]["1"]
    for change, met in ((0.005, True), (0.0051, False)):
        seed["optout"]["default"]["math"]["math"] = seed["bits_per_byte"]["dense public"][
            "math"
        ] * (1 + change)
        bar = find(find_bars(results), "owner off")
        assert bar.met is met and "math" in bar.detail and bar.value == pytest.approx(change)


def test_against_a_rival_below_the_anchor_ours_must_be_above_it() -> None:
    results = make_results(1)
    set_mean(results, "mixed", "btm", -0.1)
    bar = find(find_bars(results), "1.1 times BTM")
    assert bar.met is True and math.isinf(bar.value)
    set_mean(results, "mixed", DEFAULT, -0.05)
    bar = find(find_bars(results), "1.1 times BTM")
    assert bar.met is False and math.isnan(bar.value)


def test_verdicts_on_the_page_are_those_of_the_bars(tmp_path: Path, no_figures: None) -> None:
    results = make_results(3, has_ablations=True)
    page = write_page(results, tmp_path).read_text(encoding="utf-8")
    part = page[page.index("## What was asked") : page.index("## Table 2")]
    bars = find_bars(results)
    assert part.count("✓ met") == sum(b.met is True for b in bars)
    assert part.count("**✗ not met**") == sum(b.met is False for b in bars)
    assert part.count("(for information)") == sum(b.is_information for b in bars)
    for b in bars:
        assert f"| {b.asked} |" in part


# --- orders ---------------------------------------------------------------------------------------


def test_the_papers_own_order_agrees_with_itself_and_its_reverse_does_not() -> None:
    for sign, tau, swaps in ((1, 1.0, 0), (-1, -1.0, 45)):
        results = make_results(2)
        for m, x in PAPER_AVERAGES.items():
            if m != "public":
                set_mean(results, "mixed", m, sign * (x - PAPER_AVERAGES["public"]))
        found = compare_orders(results, "mixed")
        assert found is not None and found.tau == tau and len(found.swaps) == swaps
        assert found.num_pairs == 45 and all(s.seeds == 2 for s in found.swaps)


def test_one_swapped_pair_is_named_with_the_seeds_it_swaps_in(
    tmp_path: Path, no_figures: None
) -> None:
    results = make_results(3)
    for m, x in PAPER_AVERAGES.items():
        if m != "public":
            set_mean(results, "gap_closed", m, x / 100)
    results["gap_closed"]["btm"]["mean"] = 0.47  # past unrestricted_1x and flexolmo_paper
    for seed, x in zip(results["seeds"].values(), (0.48, 0.465, 0.40), strict=True):
        seed["gap_closed"]["btm"]["mean"] = x
    found = compare_orders(results, "gap_closed")
    assert found is not None and found.tau == pytest.approx((43 - 2) / 45)
    assert {(s.better, s.worse, s.seeds) for s in found.swaps} == {
        ("unrestricted_1x", "btm", 2),
        ("flexolmo_paper", "btm", 1),
    }
    page = write_page(results, tmp_path).read_text(encoding="utf-8")
    assert "| held-out | unrestricted 1x | BTM | 46.3 v 43.4 | 0.463 v 0.470 | 2 of 3 |" in page


def test_our_default_may_stand_in_for_the_papers_flexolmo() -> None:
    results = make_results(1)
    found = compare_orders(results, "mixed", {"flexolmo_paper": DEFAULT})
    assert found is not None
    assert found.ours["flexolmo_paper"] == results["mixed"][DEFAULT]["mean"]
