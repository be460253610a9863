"""How it grows: the cells of a tiny study, lines through cells, an owner's cost, the page."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_study import RECIPE, RECIPES, do_all

from flexolmo.config import read_recipe
from flexolmo.errors import ConfigError
from flexolmo.files import read_json
from flexolmo.model.shape import ExpertShape, count_anchor
from flexolmo.model.transformer import ModelConfig, Transformer
from flexolmo.research.steps.graph import order_steps
from flexolmo.research.study.cost import dense_flops, training_flops
from flexolmo.research.study.scaling import Cell, ScalingRecipe, build_scaling_graph
from flexolmo.research.study.scaling_page import write_scaling_page
from flexolmo.research.study.scaling_results import (
    PAPER_ANCHOR,
    fit_lines,
    owner_costs,
    predict,
    write_scaling_results,
)

SHAPE = RECIPE.anchor.model.model_dump()
TINY = ScalingRecipe.model_validate(
    {
        "expert_steps": [2],
        "ranks": [2, 64],
        "sizes": {"tiny": SHAPE},
        "study": RECIPE.model_dump(mode="json"),
    }
)


@pytest.fixture(scope="module")
def study(make_root, few_tried):
    root = make_root("scaling")
    graph = build_scaling_graph(TINY)
    for target in graph.targets:
        do_all(target, root)
    return graph, root


def test_a_cell_holds_every_row(study):
    graph, root = study
    results = read_json(write_scaling_results(graph, root))
    (cell,) = results["cells"]
    assert (cell["size"], cell["steps"], cell["seed"]) == ("tiny", 2, 0)
    rows = {
        "default",
        "ffn",
        "paper",
        "rank 2",
        "trained at rank 2",
        "probabilities",
        "unrestricted_2x",
        "btm",
    }
    assert set(cell["gap_closed"]) == rows | {"own_pair"}  # and no rank above the width
    assert set(cell["mixed"]) == rows
    assert cell["tokens"] == 2 * 2 * 64
    model = Transformer(ModelConfig(vocab_size=300, **SHAPE))
    assert cell["parameters"] == sum(p.numel() for p in model.parameters())
    size = cell["bytes"]
    assert size["rank 2"] < size["ffn"] < size["default"]
    assert set(size) == set(cell["seconds"]) == rows - {"probabilities", "unrestricted_2x", "btm"}
    assert set(cell["flops"]) == set(size) | {"probabilities"}
    assert not results["lines"]["gap_closed"]  # of one cell
    page = write_scaling_page(results, root).read_text(encoding="utf-8")
    assert "1 of 1 cells" in page and "trained at rank 2" in page


def test_what_is_not_done_is_left_out(tmp_path):
    graph = build_scaling_graph(TINY)
    results = read_json(write_scaling_results(graph, tmp_path))
    assert results["cells"] == []
    page = write_scaling_page(results, tmp_path).read_text(encoding="utf-8")
    assert "0 of 1 cells" in page and "7B" in page


def test_the_shipped_recipe_makes_each_anchor_once():
    recipe = read_recipe(RECIPES / "study_scaling.toml", ScalingRecipe, ())
    graph = build_scaling_graph(recipe)
    kinds = [step.kind for step, _ in order_steps(graph.targets, RECIPES)]
    assert kinds.count("anchor") == len(recipe.sizes) == 3
    assert kinds.count("corpus") == 1 and kinds.count("scaling_score") == 9
    sizes = [
        count_anchor(ModelConfig(vocab_size=recipe.study.vocab_size, **s.model_dump())) / 1e6
        for s in recipe.sizes.values()
    ]
    assert sizes == pytest.approx([1, 3, 10], rel=0.2)
    for steps in recipe.expert_steps:
        train = recipe.cell(Cell("1M", steps, 0)).train
        assert train.steps == steps >= 8 * train.warmup_steps


def test_ablations_are_refused():
    with pytest.raises(ConfigError, match="has_ablations=false"):
        read_recipe(RECIPES / "study_scaling.toml", ScalingRecipe, ["study.has_ablations=true"])


# --- lines ----------------------------------------------------------------------------------------


def make_cells(of, sizes=(1e6, 3e6, 1e7), tokens=(4e4, 1.6e5, 6.4e5)):
    return [
        {"parameters": n, "tokens": t, "mixed": {"row": {"mean": of(n, t)}}}
        for n in sizes
        for t in tokens
    ]


NUMBERS = st.floats(-2, 2)


@given(a=NUMBERS, b=NUMBERS, c=NUMBERS)
def test_a_line_through_points_of_a_line_is_that_line(a, b, c):
    def of(n, t):
        return a + b * np.log10(n / 1e6) + c * np.log10(t / 1e5)

    line = fit_lines(make_cells(of), "mixed")["row"]
    assert [line[k] for k in ("at", "per_tenfold_parameters", "per_tenfold_tokens")] == (
        pytest.approx([a, b, c], abs=1e-9)
    )
    end = predict(line, 7e9, 5e10)
    assert end["mean"] == pytest.approx(of(7e9, 5e10), abs=1e-8)
    assert end["high"] - end["low"] < 1e-6


def test_the_interval_holds_19_of_20_new_cells():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        cells = make_cells(lambda n, t: 0.3 * np.log10(n / 1e6) + rng.normal(0, 0.1))
        end = predict(fit_lines(cells, "mixed")["row"], 1e8, 1e7)
        hits += end["low"] <= 0.3 * 2 + rng.normal(0, 0.1) <= end["high"]
    assert 0.92 <= hits / 400 <= 0.98


def test_too_few_cells_make_no_line():
    assert fit_lines(make_cells(lambda n, t: n, tokens=(1e5,)), "mixed") == {}
    assert fit_lines(make_cells(lambda n, t: n)[:4], "mixed") == {}


# --- cost -----------------------------------------------------------------------------------------


def test_an_experts_cost_at_the_papers_size():
    costs = {c["kind"]: c for c in owner_costs() if c["size"] == "7B"}
    assert costs["ffn"]["bytes"] == pytest.approx(2 * 4.33e9, rel=0.01)  # the paper's expert
    assert costs["rank 128"]["bytes"] < 0.1 * costs["ffn"]["bytes"]
    assert costs["rank 8"]["bytes"] < costs["rank 32"]["bytes"] < costs["rank 128"]["bytes"]
    assert count_anchor(PAPER_ANCHOR) == pytest.approx(7.3e9, rel=0.01)


def test_training_an_expert_that_is_all_new_costs_what_a_dense_model_does():
    config = ModelConfig(vocab_size=300, **SHAPE)
    D, dense = config.d_model, dense_flops(config)
    whole = ExpertShape(d_ff=config.d_ff, attention_rank=D, embedding_rank=D, head_rank=D)
    assert training_flops(config, whole) == 3 * dense
    assert training_flops(config, whole, public=1.0) == 2 * 2 * dense + dense
