"""A whole study, tiny and in one process: every kind of step runs and its numbers hang together."""

import dataclasses
import json
from math import prod
from pathlib import Path

import numpy as np
import pytest

import flexolmo
from flexolmo.config import read_recipe
from flexolmo.data.corpus import open_corpus
from flexolmo.data.prepare import prepare_set
from flexolmo.data.settings import PrepareSettings
from flexolmo.errors import ConfigError, PolicyError
from flexolmo.evaluation.scorer import Scorer
from flexolmo.files import read_json, write_json
from flexolmo.model.shape import ExpertShape, expert_shapes
from flexolmo.model.transformer import ModelConfig
from flexolmo.research.rivals.baselines import btm_prefix_weights
from flexolmo.research.rivals.models import load_reading
from flexolmo.research.steps.step import _KINDS, StepContext
from flexolmo.research.study import method as methods
from flexolmo.research.study.gains import btm, mix, prompt_routing
from flexolmo.research.study.method import open_method
from flexolmo.research.study.read_steps import fit_prompt_classifier, load_samples
from flexolmo.research.study.recipe import StudyRecipe, build_graph
from flexolmo.research.study.results import write_results
from flexolmo.research.study.strongest import READINGS, TRAININGS
from flexolmo.research.study.study_page import write_page
from flexolmo.research.study.text_steps import load_windows
from flexolmo.runtime import run_record
from made_documents import write_documents

RECIPES = Path(flexolmo.__file__).parent / "recipes"
SETS = PrepareSettings(
    min_document_bytes=20,
    max_document_bytes=5000,
    min_split_bytes=300,
    validation_share=0.25,
    heldout_share=0.25,
    vocab_size=300,
)
RUN = run_record({}, 0, {})
BRIEF = {"steps": 2, "batch_size": 2, "seq_len": 64, "warmup_steps": 1}
RECIPE = StudyRecipe.model_validate(
    {
        "seeds": [0],
        "owners": ["maths", "news"],
        "vocab_size": 300,
        "seq_len": 320,
        "heldout_bytes": 2000,
        "validation_bytes": 2000,
        "heldout_mixed": 2,
        "validation_mixed": 2,
        "samples": 8,
        "tuning_steps": 2,
        "proxy_tokens": 500,
        "has_ablations": False,
        "anchor": {
            "model": {
                "d_model": 32,
                "num_layers": 2,
                "num_heads": 2,
                "d_ff": 48,
                "max_seq_len": 512,
            },
            "train": BRIEF | {"steps": 4},
        },
        "train": BRIEF,
        "low_rank": {
            "rank": 2,
            "attention_rank": 2,
            "embedding_rank": 2,
            "head_rank": 2,
            "train": BRIEF,
        },
    }
)


def make_corpus(directory):
    """What the corpus step leaves, of made text."""
    for name, count in (("public", 120), ("maths", 60), ("news", 60)):
        (directory / "in" / name).mkdir(parents=True)
        (directory / "in" / name / "all.jsonl").write_text(
            "\n".join(
                json.dumps({"text": t, "id": f"d{i}"})
                for i, t in enumerate(write_documents(name, count, 0))
            )
        )
        corpus = open_corpus(directory / "in" / name, name, licence="CC0-1.0")
        public = None if name == "public" else directory / "prepared" / "public"
        prepare_set(corpus, directory / "prepared" / name, public=public, settings=SETS)
    return {"tokens": {}}


def do_all(step, root):
    """Do a step and all it needs, here and now; as the graph does it in processes."""
    out = step.directory(root)
    if step.is_done(root):
        return
    for needed in step.inputs.values():
        do_all(needed, root)
    out.mkdir(parents=True)
    inputs = {role: s.directory(root) for role, s in step.inputs.items()}
    context = StepContext(step.label, dict(step.settings), inputs, out)
    metrics = make_corpus(out) if step.kind == "corpus" else _KINDS[step.kind].run(context)
    write_json(
        out / "done.json",
        {
            "identity": step.identity,
            "seconds": 1.0,
            "outputs": {},
            "metrics": dict(metrics or {}),
            "run": RUN,
        },
    )


@pytest.fixture(scope="module")
def study(make_root, few_tried):
    root = make_root("study")
    graph = build_graph(RECIPE)
    for target in graph.targets:
        do_all(target, root)
    write_results(graph, root)
    return graph, root


def test_every_method_has_its_figures(study, sketched):
    graph, root = study
    results = read_json(write_results(graph, root))
    cost = results["cost_by_method"]
    assert set(cost) == set(results["gap_closed"])
    tokens = {m: sum(c["tokens"].values()) for m, c in cost.items()}
    assert tokens["btm"] == tokens["soup_mean"] == 2 * RECIPE.train.tokens  # two dense models
    assert tokens["flexolmo_default"] == 2 * RECIPE.train.tokens < tokens["low_rank"]
    assert tokens["unrestricted_2x"] == 2 * RECIPE.train.tokens > tokens["unrestricted_1x"]
    assert all(c["reading_seconds"] > 0 for c in cost.values())
    methods = {
        "flexolmo_paper",
        "flexolmo_default",
        "flexolmo_probabilities",
        "flexolmo_joint_tuned",
        "own_pair",
        "low_rank",
        "btm",
        "btm_equal_flops",
        "soup_mean",
        "soup_weighted",
        "prompt_routing",
        "btx",
        "dume",
        "unrestricted_1x",
        "unrestricted_2x",
    }
    assert methods <= set(results["gap_closed"]) & set(results["mixed"])
    for kind in ("gap_closed", "mixed"):
        for entry in results[kind].values():
            assert set(entry["sets"]) == {"maths", "news"}
            assert entry["mean"] == pytest.approx(sum(entry["sets"].values()) / 2)
            assert entry["flops_per_token"] > 0 and isinstance(entry["strict_opt_out"], bool)
    flops = {n: e["flops_per_token"] for n, e in results["gap_closed"].items()}
    assert flops["btm_equal_flops"] <= flops["flexolmo_default"] * (1 + 1e-9)
    assert flops["btm"] == 3 * results["seeds"]["0"]["anchor_flops_per_token"]
    write_page(results, root)
    assert "flexolmo" in (root / "page.md").read_text(encoding="utf-8").lower()


@pytest.mark.parametrize("name", ["mini", "small"])
def test_a_shipped_recipes_small_expert_is_at_most_a_quarter_of_the_full_one(name):
    recipe = read_recipe(RECIPES / f"study_{name}.toml", StudyRecipe, ())
    config = ModelConfig(vocab_size=recipe.vocab_size, **recipe.anchor.model.model_dump())
    ranks = recipe.low_rank.model_dump(exclude={"train", "has_half_deltas"})
    low = ExpertShape(d_ff=config.d_ff, **ranks)
    bytes_of = [
        sum(
            prod(size) * (2 if ".lora_" in n else 4)
            for n, size in expert_shapes(config, shape, recipe.default.router).items()
        )
        for shape in (low, recipe.default.shape(config))
    ]
    assert recipe.low_rank.has_half_deltas and bytes_of[0] <= bytes_of[1] / 4
    assert recipe.seq_len <= config.max_seq_len and len(build_graph(recipe).scores)


def test_a_directory_of_text_is_named_whole(monkeypatch, tmp_path):
    """Steps run in directories of their own; and what the files say counts, not their names."""
    monkeypatch.chdir(tmp_path)
    for name in ("public", *RECIPE.owners):
        (tmp_path / "texts" / name).mkdir(parents=True)
        (tmp_path / "texts" / name / "a.txt").write_text(name)
    graph = build_graph(RECIPE.model_copy(update={"from_directory": "texts"}))
    corpus = graph.scores[0].inputs["windows"].inputs["corpus"]
    assert corpus.settings["from_directory"] == str(tmp_path / "texts")
    (tmp_path / "texts" / "public" / "a.txt").write_text("something else")
    later = build_graph(RECIPE.model_copy(update={"from_directory": "texts"})).scores[0]
    assert later.inputs["windows"].inputs["corpus"].identity != corpus.identity


def test_only_experts_with_heads_are_read_anew_when_other_rows_move(monkeypatch):
    def identities():
        reads = build_graph(RECIPE).scores[0].inputs
        return {n: s.identity for n, s in reads.items() if s.kind == "read"}

    before = identities()
    monkeypatch.setattr("flexolmo.research.study.recipe.RAREST", 0.3)
    changed = {n.split(".")[0] for n, x in identities().items() if x != before[n]}
    assert changed >= {"flexolmo_default", "flexolmo_probabilities", "low_rank", "pair_on_mixed"}
    assert not changed & {"dense", "flexolmo_paper", "soup_mean", "unrestricted_2x", "btx"}


def test_a_jointly_tuned_router_differs_from_the_untuned_one(study):
    graph, root = study
    routing = read_json(graph.scores[0].directory(root) / "scores.json")["routing"]
    assert routing["flexolmo_paper"]["routing"] != routing["flexolmo_joint_tuned"]["routing"]


def test_ablations_run_and_differ_from_what_they_are_compared_with(study):
    """All but those whose rows come from a package that would have to be fetched."""
    _, root = study
    rows = build_graph(RECIPE.model_copy(update={"has_ablations": True})).ablations.inputs
    read = {}
    for name in (
        "paper",
        "paper, no coordination",
        "paper, random rows",
        "paper, a row per layer",
        "paper, upstream's clamp",
        "paper, no bias",
        "paper, 25 % replay",
        "default, scope ffn+head",
        "paper, top-1",
    ):
        step = rows[f"row.{name}"]
        do_all(step, root)
        with np.load(step.directory(root) / "heldout.npz") as found:
            read[name] = found["maths"]
    assert all(np.isfinite(r).all() for r in read.values())
    assert all(not np.array_equal(r, read["paper"]) for n, r in read.items() if n != "paper")


def test_the_strongest_paper_is_chosen_on_validation_text_alone(study):
    _, root = study
    step = build_graph(RECIPE.model_copy(update={"has_strongest_paper": True})).strongest_paper
    kept = {r: s for r, s in step.inputs.items() if not r.startswith("row.")}
    rows = [f"row.{t}; {r}" for t in ("as published", "50 % replay") for r in READINGS]
    some = dataclasses.replace(step, inputs=kept | {r: step.inputs[r] for r in rows})
    do_all(some, root)
    found = read_json(some.directory(root) / "strongest.json")
    for kind, best in found["best"].items():
        means = {n: e[kind]["mean"] for n, e in found["tried"]["validation"].items()}
        assert len(means) == len(rows)
        assert means[best] == max(means.values())
    held = found["tried"]["heldout"]
    assert held["as published; top-2"] != held["as published; top-1"]
    assert held["as published; top-2"] != held["as published; top-2, rows of length 2"]
    assert held["as published; top-2"] != held["50 % replay; top-2"]


def test_trainings_of_the_strongest_paper_differ_as_they_say():
    step = build_graph(RECIPE.model_copy(update={"has_strongest_paper": True})).strongest_paper
    settings = {
        name: step.inputs[f"row.{name}; top-2"].inputs["expert.maths"].settings
        for name in TRAININGS
    }
    train = {name: s["recipe"]["train"] for name, s in settings.items()}
    usual = train["as published"]
    assert train["3 times as long, 25 % replay"]["steps"] == 3 * usual["steps"]
    fast = train["rows learn 10 times as fast, 25 % replay"]["learning_rate"]
    assert fast == pytest.approx(10 * usual["learning_rate"])
    assert settings["no bias, 25 % replay"]["recipe"]["router"]["has_bias"] is False
    assert len({str(s) for s in settings.values()}) == len(TRAININGS)


def test_one_recipe_is_one_graph():
    again = build_graph(RECIPE)
    assert [t.identity for t in again.targets] == [t.identity for t in build_graph(RECIPE).targets]
    other = build_graph(RECIPE.model_copy(update={"top_k": 1}))
    assert other.targets[0].identity != again.targets[0].identity


RIVALS_OVER_DENSE = [
    "btm",
    "btm_switching",
    "btm_equal_flops",
    "soup_weighted",
    "soup_weighted_equal_flops",
    "prompt_routing",
]


@pytest.mark.parametrize(
    "method",
    [
        "flexolmo_default",
        "flexolmo_paper",
        "low_rank",
        "btx",
        "dume",
        "soup_mean",
        "dense.news",
        "unrestricted_1x",
        "flexolmo_joint_tuned",
        *RIVALS_OVER_DENSE,
    ],
)
def test_a_method_opened_for_tasks_says_what_the_study_read(study, method):
    """The same windows, one by one through the scorer, as the study's own reading of them."""
    graph, root = study
    reader, about = open_method(root, method)
    score = graph.scores[RECIPE.seeds[0]]
    windows = load_windows(score.inputs["windows"].directory(root), "heldout")

    def read(name):
        return load_reading(score.inputs[name].directory(root) / "heldout.npz", windows).log_probs

    said = read_by_the_study(
        method,
        about,
        read,
        windows,
        reader.tokenizer,
        lambda n: load_samples(score.inputs[f"samples.{n}"].directory(root)),
    )
    for name in ("news", "mixed") if "mixed" in said else ("news",):
        for (ids, _), log_probs in list(zip(windows[name], said[name], strict=True))[:3]:
            (found,) = Scorer(reader).score_ids([(ids[:1].tolist(), ids[1:].tolist())])
            assert found.log_prob == pytest.approx(float(log_probs.sum()), rel=1e-4)


def read_by_the_study(method, about, read, windows, tokenizer, samples):
    """Rows of held-out text by a method, from readings of whole windows."""
    names = ["public", *RECIPE.owners]
    dense = {n: read(f"dense.{n}") for n in names} if method in RIVALS_OVER_DENSE else {}
    if method in ("btm", "btm_switching"):
        return btm(dense, about["temperature"], switch_rate=about.get("switch rate", 0.0))
    if method == "btm_equal_flops":
        assert 0 < about["prompt tokens"] < RECIPE.seq_len and about["top k"] == 1
        return mix(
            dense,
            lambda p, _n, _i: btm_prefix_weights(
                p, prefix_tokens=about["prompt tokens"], top_k=1, temperature=about["temperature"]
            ),
        )
    if method.startswith("soup_weighted"):
        return read(f"soup_weighted.{about['prompt tokens']}.{about['temperature']}")
    if method == "prompt_routing":
        length = about["prompt tokens"]
        classifier = fit_prompt_classifier({n: samples(n) for n in names}, tokenizer, length)
        assert classifier.names == names
        starts = {
            n: [tokenizer.decode(ids[1 : 1 + length].tolist()) for ids, _ in rows]
            for n, rows in windows.items()
        }
        return prompt_routing(
            dense, {n: classifier.probabilities(s) for n, s in starts.items()}, length
        )
    return read(f"dume.{about['scale']}" if method == "dume" else method)


def test_a_method_is_opened_without_an_owner_and_not_by_a_wrong_name(study):
    _, root = study
    assert open_method(root, "flexolmo_default", without=["news"])[1]["enabled"] == ["maths"]
    for method, said in (
        ("btn", "no model called 'btn'.*flexolmo_default"),
        ("samples.news", "no model called"),
    ):
        with pytest.raises(ConfigError, match=said):
            open_method(root, method)
    with pytest.raises(ConfigError, match="no seed 7"):
        open_method(root, "btm", seed=7)
    with pytest.raises(PolicyError, match="news"):
        open_method(root, "dense.news", without=["news"])


@pytest.mark.parametrize("method", RIVALS_OVER_DENSE)
def test_a_rival_over_dense_models_does_not_open_those_that_are_off(study, method, monkeypatch):
    _, root = study
    opened, really_open = [], methods._open
    monkeypatch.setattr(
        methods, "_open", lambda step, root: opened.append(step.label) or really_open(step, root)
    )
    reader, about = open_method(root, method, without=["news"])
    assert len(opened) == 2 and not any("news" in label for label in opened)
    whole, about_whole = open_method(root, method)
    assert about["enabled"] == ["maths"] and about_whole["enabled"] == ["maths", "news"]
    assert about["digest"] != about_whole["digest"]
    texts = [(text[:90], text[90:110]) for text in write_documents("news", 20, 5)]
    assert Scorer(reader).log_likelihoods(texts) != Scorer(whole).log_likelihoods(texts)
