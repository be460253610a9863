"""A study's page says what results.json holds, nothing else, and judges bars at their marks."""

import copy
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from flexolmo.cli import app
from flexolmo.study.figures import plot_methods, plot_routing
from flexolmo.study.findings import (
    DEFAULT,
    PAPER_AVERAGES,
    RIVALS,
    TABLES,
    WORDS,
    Bar,
    best_rival,
    compare_orders,
    find_bars,
)
from flexolmo.study.markdown import escape, number, write_table
from flexolmo.study.page import write_page

OWNERS = ("academic", "code", "creative", "edu", "forum", "math", "news")
METHODS = {  # gap closed held-out and mixed, FLOPs in the anchor's, strict opt-out
    "flexolmo_default": (0.93, 0.90, 2.0, True), "flexolmo_all_active": (0.94, 0.91, 5.2, True),
    "flexolmo_paper": (0.35, 0.31, 1.46, True), "low_rank": (0.91, 0.86, 1.4, True),
    "flexolmo_joint_tuned": (0.42, 0.36, 1.46, False), "btx": (0.19, 0.16, 1.46, False),
    "unrestricted_1x": (0.69, 0.61, 1.46, False), "unrestricted_2x": (0.88, 0.79, 1.46, False),
    "soup_mean": (0.31, 0.30, 1.0, True), "soup_weighted": (0.60, 0.33, 1.44, True),
    "soup_weighted_equal_flops": (0.55, 0.50, 1.25, True),
    "btm": (0.95, 0.55, 8.0, True), "btm_switching": (0.94, 0.86, 8.0, True),
    "btm_equal_flops": (0.82, 0.41, 1.99, True), "prompt_routing": (0.74, 0.28, 1.0, True),
    "dume": (0.44, 0.39, 1.46, True), "own_pair": (0.96, None, 1.73, True)}
FIGURES = {"figure_2_routing", "figure_3_active_experts", "figure_4_optout", "methods",
           "kept_gain"}
ONE = 5_111_808
Make = Callable[..., dict[str, Any]]


def make_results(seeds: int = 1, owners: tuple[str, ...] = OWNERS, has_ablations: bool = False,
                 num_layers: int = 4) -> dict[str, Any]:
    """Plausible results of a study that never was; numbers from a formula and a little noise."""
    rng = np.random.default_rng(len(owners))
    anchor = {s: 2.0 + 0.17 * i for i, s in enumerate(["public", *owners, "mixed"])}
    gap = {s: 0.25 + 0.08 * (i % 4) for i, s in enumerate(owners)}  # dense gain, bits per byte

    def bits_at(closed: float, sets: tuple[str, ...]) -> dict[str, float]:
        return {s: anchor[s] - closed * gap.get(s, -0.01) for s in sets}

    def entry(closed: float, flops: float, strict: bool) -> dict[str, Any]:
        noise = rng.normal(0, 0.02, len(owners))
        sets = {n: closed + float(x) for n, x in zip(owners, noise, strict=True)}
        return {"mean": fmean(sets.values()), "sets": sets, "flops_per_token": flops * ONE,
                "strict_opt_out": strict}

    def weights(same: bool, sharp: float) -> dict[str, Any]:
        sets, experts = ["public", *owners, "mixed"], ["public", *owners]
        found = {}
        for s in sets:
            rows = rng.random((num_layers, len(experts))) + sharp * (np.array(experts) == s)
            rows = rows[:1].repeat(num_layers, 0) if same else rows
            found[s] = (rows / rows.sum(1, keepdims=True)).tolist()
        return {"routing": found, "experts": experts}

    def one_seed() -> dict[str, Any]:
        closed = {m: entry(held, flops, strict) for m, (held, _, flops, strict) in METHODS.items()}
        everywhere = ("public", *owners, "mixed")
        bits = {m: {s: anchor[s] - e["sets"].get(s, e["mean"]) * gap.get(s, 0.01)
                    for s in (owners if m == "own_pair" else everywhere)}
                for m, e in closed.items()}
        bits["dense public"] = dict(anchor)
        for n in owners:
            bits[f"dense {n}"] = {s: anchor[s] - (gap[n] if s == n else -0.1) for s in everywhere}
        return {
            "gap_closed": closed,
            "mixed": {m: entry(mixed, flops, strict) for m, (_, mixed, flops, strict)
                      in METHODS.items() if mixed is not None},
            "bits_per_byte": bits,
            "kept": {f: {"sets": (found := {n: share + float(rng.normal(0, 0.03))
                                            for n in owners}),
                         "mean": fmean(found.values()), "public_change": change}
                     for f, share, change in (("default", 0.97, 0.004), ("low", 0.95, 0.003),
                                              ("paper", 0.44, 0.012))},
            "optout": {f: {n: {s: anchor[s] * worse if s == n else bits[m][s] + 0.002
                               for s in ("public", *owners)} for n in owners}
                       for f, m, worse in (("default", DEFAULT, 1.001),
                                           ("paper", "flexolmo_paper", 1.006))},
            "routing": {m: weights(m == DEFAULT, sharp) for m, sharp in
                        ((DEFAULT, 40.0), ("flexolmo_paper", 1.0), ("flexolmo_joint_tuned", 3.0))},
            "bytes": {"default": [9_307_324] * len(owners), "low": [2_292_700] * len(owners)},
            "low_rank_share_of_gain": {n: 0.97 + float(rng.normal(0, 0.01)) for n in owners},
            "chosen_on_validation": {
                "btm": {"temperature (held-out)": 8.0, "temperature (mixed)": 256.0},
                "dume": {"scale (held-out)": 10}},
            "anchor_flops_per_token": ONE,
        }

    found = [one_seed() for _ in range(seeds)]
    results: dict[str, Any] = {
        "recipe": {
            "seeds": [0, 1, 2], "owners": list(owners), "vocab_size": 4096, "seq_len": 512,
            "heldout_bytes": 40_000, "heldout_mixed": 48,
            "low_rank": {"train": {"steps": 40, "batch_size": 4, "seq_len": 512}},
            "anchor": {"model": {"d_model": 192, "num_layers": 4, "num_heads": 3,
                                 "num_kv_heads": None, "d_ff": 512},
                       "train": {"steps": 800, "batch_size": 4, "seq_len": 512}},
            "train": {"steps": 160, "batch_size": 4, "seq_len": 512, "learning_rate": 0.004}},
        "seeds_done": list(range(seeds)),
        "seeds": {str(i): s for i, s in enumerate(found)},
        "cost": {"anchor": {"steps": seeds, "seconds": 812.4, "tokens": seeds * 1_638_400},
                 "expert": {"steps": 21, "seconds": 4321.0, "tokens": 6_881_280},
                 "read": {"steps": 60, "seconds": 900.0, "tokens": 0}},
        "commits": ["833d67d0123456789abcdef+changes"],
        "software": {"python": "3.11.7", "torch": "2.13.0+cpu"},
        "machine": {"cpu_count": 2, "torch_threads": 1, "platform": "Linux-x86_64"}}
    for kind in TABLES:
        results[kind] = {m: {
            "mean": fmean(means := [s[kind][m]["mean"] for s in found]),
            "spread": stdev(means) if seeds > 1 else None, "seeds": means,
            "sets": {n: fmean(s[kind][m]["sets"][n] for s in found) for n in owners},
            "flops_per_token": found[0][kind][m]["flops_per_token"],
            "strict_opt_out": found[0][kind][m]["strict_opt_out"]}
            for m in (found[0][kind] if found else ())}
    if has_ablations:
        names = [f"{f}{change}" for f in ("paper", "default") for change in (
            "", ", 10 % replay", ", 25 % replay")]
        names += ["paper, no bias", "paper, upstream's clamp", "paper, random rows",
                  "paper, a row per layer", "paper, MiniLM rows", "paper, no coordination",
                  "default, scope ffn", "default, scope ffn+head", "another thing"]
        names += [f"{f}, top-{k}" for f in ("default", "paper") for k in range(1, len(owners) + 2)]
        results["ablations"] = {n: {kind: {"mean": (m := 0.3 + 0.4 * float(rng.random())),
                                           "sets": dict.fromkeys(owners, m)} for kind in TABLES}
                                | {"bits_per_byte": bits_at(0.5, ("public", *owners, "mixed"))}
                                for n in names}
    return results


def set_mean(results: dict[str, Any], kind: str, method: str, mean: float) -> None:
    """Give a method the same mean in all seeds."""
    for table in (results[kind], *(s[kind] for s in results["seeds"].values())):
        table[method]["mean"] = mean


def find(bars: list[Bar], *words: str) -> Bar:
    [bar] = [b for b in bars if all(w in b.asked for w in words)]
    return bar


def rows_of(page: str, heading: str) -> dict[str, list[str]]:
    """The rows of the first table after `heading`, by their first cell, as shown."""
    block = page[page.index(heading):]
    table = itertools.takewhile(lambda line: line.startswith("|"),
                                itertools.dropwhile(lambda line: not line.startswith("|"),
                                                    block.splitlines()))
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]
    assert len({len(row) for row in cells}) == 1  # as wide as its head
    return {row[0]: row[1:] for row in cells[2:]}


def pruned(value: Any, keys: set[str]) -> Any:
    """`value` without those keys, at any depth."""
    if isinstance(value, dict):
        return {k: pruned(v, keys) for k, v in value.items() if k not in keys}
    return value


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """Three seeds with ablations: results, directory, page."""
    results, out = make_results(3, has_ablations=True), tmp_path_factory.mktemp("study")
    return results, out, write_page(results, out).read_text(encoding="utf-8")


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that read the page only; drawing takes seconds."""
    monkeypatch.setattr("flexolmo.study.page._FIGURES", ())


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the figures that would have been written; they are made, but not rendered."""
    names: set[str] = set()
    monkeypatch.setattr("flexolmo.study.page.save_figure", lambda fig, path: names.add(path.stem))
    return names


def test_the_page_shows_every_figure_it_wrote(whole: tuple[dict[str, Any], Path, str]) -> None:
    _, out, page = whole
    shown = set(re.findall(r"!\[[^\]]+\]\(figures/(\w+)\.png\)", page))
    assert shown == FIGURES == {p.stem for p in (out / "figures").iterdir()}
    for name in FIGURES:
        width = matplotlib.image.imread(out / "figures" / f"{name}.png").shape[1]
        assert 800 <= width <= 1780, name


def test_table_1_has_every_method_with_its_numbers(
        whole: tuple[dict[str, Any], Path, str]) -> None:
    results, _, page = whole
    rows = {k.split(":")[0].strip("*"): v for k, v in rows_of(page, "## Table 1").items()
            if not k.startswith(("*For", "*Told"))}
    assert set(rows) == {WORDS[m] for m in METHODS if m != "own_pair"}
    bits = [s["bits_per_byte"] for s in results["seeds"].values()]
    heights = []
    for m in METHODS:
        if m == "own_pair":
            continue
        row = rows[WORDS[m]]
        for shown, kind in zip(row, TABLES, strict=False):
            e = results[kind][m]
            assert shown == f"{e['mean']:.3f}\u00a0±\u00a0{e['spread']:.3f}"
        assert row[2] == f"{fmean(b[m][n] for b in bits for n in OWNERS):.3f}"
        gain = fmean(1 - fmean(b[m][n] for b in bits) / fmean(
            b["dense public"][n] for b in bits) for n in OWNERS)
        assert row[3] == f"{100 * gain:+.1f}\u00a0%"
        assert row[4] == f"{METHODS[m][2]:.2f}"
        assert row[5] == ("yes" if METHODS[m][3] else "no")
        assert row[6] == (f"{PAPER_AVERAGES[m]:.1f}" if m in PAPER_AVERAGES else "–")
    for shown in rows:
        m = next(k for k, v in WORDS.items() if v == shown)
        heights.append(results["gap_closed"][m]["mean"] + results["mixed"][m]["mean"])
    assert heights == sorted(heights, reverse=True)


def test_table_2_has_bits_of_every_model_by_set(whole: tuple[dict[str, Any], Path, str]) -> None:
    results, _, page = whole
    rows = rows_of(page, "## Table 2")
    assert len(rows) == 1 + len(OWNERS) + 7
    for n, shown in zip(["public", *OWNERS, "mixed"], rows["**our default**"], strict=True):
        mean = fmean(s["bits_per_byte"][DEFAULT][n] for s in results["seeds"].values())
        assert shown.strip("*") == f"{mean:.3f}"
    assert rows["own pair"][0] == rows["own pair"][-1] == "–"


def test_table_3_has_every_variant_once_and_its_difference(
        whole: tuple[dict[str, Any], Path, str]) -> None:
    results, _, page = whole
    table = page[page.index("## Table 3"):page.index("## Figures")]
    for name, entry in results["ablations"].items():
        [line] = [x for x in table.splitlines() if f"| {escape(name)} |" in x]
        assert f"| {entry['gap_closed']['mean']:.3f} |" in line
        if "," in name:
            base = results["ablations"][name.partition(",")[0]]
            change = entry["mixed"]["mean"] - base["mixed"]["mean"]
            assert f"| {change:+.3f} |".replace("-", "−") in line
    assert table.index("top-2 |") < table.index("top-8 |")


@given(x=st.floats(-9, 9), flops=st.floats(0.5, 9))
def test_any_number_in_the_results_is_the_one_shown(x: float, flops: float) -> None:
    from flexolmo.study.tables import table_of_methods

    results = copy.deepcopy(SMALL)
    set_mean(results, "gap_closed", "dume", x)
    results["gap_closed"]["dume"]["flops_per_token"] = flops * ONE
    page = "\n\n".join(table_of_methods(results))
    [row] = [v for k, v in rows_of(page, "## Table 1").items() if k.startswith("DUME")]
    assert row[0] == number(x, 3) and float(row[0].replace("−", "-")) == pytest.approx(x, abs=6e-4)
    assert row[4] == f"{flops:.2f}"


def test_spread_is_shown_with_several_seeds_only(tmp_path: Path, saved: set[str]) -> None:
    page = write_page(make_results(1, ("code", "news")), tmp_path).read_text(encoding="utf-8")
    assert "±" not in page and "By seed" not in page and "1 of 3 seeds done (0)" in page
    assert saved == FIGURES - {"figure_3_active_experts"} and "Table 3" not in page


def test_the_opening_says_what_was_run(whole: tuple[dict[str, Any], Path, str]) -> None:
    opening = whole[2][:whole[2].index("## How")]
    for said in ("7 owners", "3.3 million parameters", "1.64 million tokens", "327,680 tokens",
                 "40,000 bytes", "48 mixed documents of 512 tokens", "3 of 3 seeds done (0, 1, 2)",
                 "833d67d012+changes", "2 cores", "torch 2.13.0", "40 steps", "81,920"):
        assert said in opening
    assert "temperature (held-out) 8, temperature (mixed) 256" in whole[2]


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


@pytest.mark.parametrize(("method", "kind", "words", "mark"), [
    ("btm", "mixed", ("mixed", "1.1 times BTM"), 1.1),
    ("btm", "gap_closed", ("held-out", "0.95 times BTM"), 0.95),
    ("unrestricted_2x", "gap_closed", ("held-out", "half"), 0.5),
    ("unrestricted_2x", "mixed", ("mixed", "half"), 0.5)])
def test_bars_against_one_method_are_judged_at_their_mark(
        method: str, kind: str, words: tuple[str, ...], mark: float) -> None:
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
        seed["optout"]["default"]["math"]["math"] = (
            seed["bits_per_byte"]["dense public"]["math"] * (1 + change))
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


def test_verdicts_on_the_page_are_those_of_the_bars(
        whole: tuple[dict[str, Any], Path, str]) -> None:
    results, _, page = whole
    part = page[page.index("## What was asked"):page.index("## Table 2")]
    bars = find_bars(results)
    assert part.count("✓ met") == sum(b.met is True for b in bars)
    assert part.count("✗ **missed**") == sum(b.met is False for b in bars)
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
        tmp_path: Path, no_figures: None) -> None:
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
        ("unrestricted_1x", "btm", 2), ("flexolmo_paper", "btm", 1)}
    page = write_page(results, tmp_path).read_text(encoding="utf-8")
    assert ("| held-out | unrestricted 1x | BTM | 46.3 v 43.4 | 0.463 v 0.470 | 2 of 3 |"
            in page)


def test_our_default_may_stand_in_for_the_papers_flexolmo() -> None:
    results = make_results(1)
    found = compare_orders(results, "mixed", {"flexolmo_paper": DEFAULT})
    assert found is not None
    assert found.ours["flexolmo_paper"] == results["mixed"][DEFAULT]["mean"]


# --- whatever is missing --------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [
    {"mixed"}, {"flexolmo_paper", "paper"}, {DEFAULT, "default"}, {"btm", "dume", "own_pair"},
    {"routing", "optout"}, {"kept", "bytes", "low_rank_share_of_gain"}, {"bits_per_byte"},
    {"anchor_flops_per_token"}, {"chosen_on_validation", "cost", "commits", "machine"},
    {"recipe"}, {"gap_closed"}, {"software", "train", "anchor"}])
def test_what_is_missing_is_left_out(missing: set[str], tmp_path: Path,
                                     saved: set[str]) -> None:
    results = pruned(make_results(1, ("code", "news"), has_ablations=True), missing)
    page = write_page(results, tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"\bnan\b|\binf\b|None", page)
    assert saved == set(re.findall(r"\(figures/(\w+)\.png\)", page))
    for m in missing & set(WORDS):
        assert not re.search(rf"^\| \**{re.escape(WORDS[m])}\**:", page, re.MULTILINE)


def test_a_study_with_nothing_done_has_a_page_that_says_so(tmp_path: Path) -> None:
    results = make_results(0) | {"cost": {}}
    page = write_page(results, tmp_path).read_text(encoding="utf-8")
    assert "0 of 3 seeds done: no numbers yet." in page and "Table" not in page
    assert not (tmp_path / "figures").exists()


def test_a_method_this_page_does_not_know_is_shown_by_its_name(
        tmp_path: Path, no_figures: None) -> None:
    results = make_results(2, ("code", "news"))
    for table in (*(results[k] for k in TABLES), *(s[k] for s in results["seeds"].values()
                                                   for k in TABLES)):
        table["new_rival"] = dict(table["dume"])
    assert "| new\\_rival |" in write_page(results, tmp_path).read_text(encoding="utf-8")


def test_notes_become_part_of_the_page_as_they_are(
        tmp_path: Path, no_figures: None) -> None:
    (tmp_path / "notes.md").write_text("The **why**: café, 漢字.\n", encoding="utf-8")
    page = write_page(make_results(1, ("code", "news")), tmp_path).read_text(encoding="utf-8")
    assert "\n\nThe **why**: café, 漢字.\n\n## Cost" in page


def test_names_cannot_act_on_the_page(tmp_path: Path) -> None:
    names = ("a|b_c*d", "<script>x</script>", "é漢\ud83d\u202e`$x_{1}$", "line\nend")
    page = write_page(make_results(1, names), tmp_path).read_bytes()
    text = page.decode("utf-8")
    assert "<script" not in text and "\u202e" not in text and "a\\|b\\_c\\*d" in text
    rows_of(text, "## Table 2")  # still a table
    assert json.loads(json.dumps(text)) == text


@given(text=st.text())
def test_escaped_text_stays_in_its_cell(text: str) -> None:
    row = write_table(["a", "b"], [[escape(text), "x"]], "ll").splitlines()
    assert len(row) == 3 and len(re.split(r"(?<!\\)(?:\\\\)*\|", row[2])) == 4


# --- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 3])
def test_no_two_labels_of_methods_cover_each_other(seeds: int) -> None:
    names = {WORDS[m] for m in METHODS}
    fig = plot_methods(make_results(seeds))
    assert fig is not None
    fig.draw_without_rendering()
    for ax in fig.axes:
        boxes = [t.get_window_extent() for t in ax.texts if t.get_text() in names]
        assert len(boxes) == len(METHODS) - 1
        for a, b in itertools.combinations(boxes, 2):
            assert not a.shrunk(0.96, 0.8).overlaps(b.shrunk(0.96, 0.8))


def test_of_many_layers_some_are_drawn() -> None:
    fig = plot_routing(make_results(1, ("code", "news"), num_layers=32))
    assert fig is not None
    titles = [ax.get_title(loc="left") for ax in fig.axes if ax.axison]
    assert len(titles) == 1 + 8 and "every layer" in titles[0]
    assert "layer 1 of 32" in titles[1] and "layer 32 of 32" in titles[-1]


def test_the_command_writes_results_and_page(tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexolmo.study.graph.run_graph", lambda *_: [])
    done = CliRunner().invoke(app, ["study", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "page.md" in done.output and "results.json" in done.output
    assert "no numbers yet" in (tmp_path / "page.md").read_text(encoding="utf-8")


SMALL = make_results(1, ("code", "news"))
