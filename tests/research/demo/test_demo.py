"""The demo on made text: every command it gives, in this process and one after the other.

Downloading is the only thing replaced, and drawing in all runs but the first. `test_jobs` tests the
processes; here each command line is run by the real command line, in the directory the demo names.
"""

import json
import os
import random
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import tomli_w

from flexolmo.bundle.bundle import open_bundle
from flexolmo.bundle.release import read_release
from flexolmo.bundle.trust import ANY_SIGNER, TrustedOwners
from flexolmo.cli import app
from flexolmo.errors import ConfigError, FlexOlmoError, SourceUnavailable
from flexolmo.evaluation import influence
from flexolmo.merge.mixture import load_mixture
from flexolmo.model.router import LinearSettings
from flexolmo.report import drawing, page
from flexolmo.research.corpora import fetch
from flexolmo.research.demo.demo import DemoRecipe, _Demo, run_demo
from flexolmo.research.steps import jobs
from flexolmo.research.steps.jobs import UNAVAILABLE
from flexolmo.train.anchor import AnchorRecipe, AnchorShape
from flexolmo.train.expert import ExpertRecipe
from flexolmo.train.loop import TrainSettings

BRIEF = TrainSettings(steps=4, batch_size=2, seq_len=24, warmup_steps=1)
READ = BRIEF.model_copy(update={"batch_size": 128})  # half of each text
RECIPE = DemoRecipe(
    seed=3,
    sets=("code", "academic", "creative"),
    vocab_size=300,
    processes=1,
    evaluation_bytes=1000,
    sample_tokens=4,
    expert_train=READ,
    anchor=AnchorRecipe(
        train=BRIEF,
        model=AnchorShape(d_model=16, num_layers=1, num_heads=2, d_ff=24, max_seq_len=320),
    ),
)
LESS_TEXT = {"PUBLIC_BYTES": 2000, "FORM_BYTES": 300, "OWN_SEQUENCES": 2, "OWN_TOKENS": 24}
STEPS = ["gather text", "train the anchor", "train experts", "merge, measure and attack"]


def made_texts(source):
    """Sixty texts of 80 words; each set has words of its own."""
    rng = random.Random(source.set)
    words = ["".join(rng.choices("aeioulnrst", k=rng.randint(3, 8))) for _ in range(60)]
    rng = random.Random(source.name)
    return [(f"{source.name}{i}", " ".join(rng.choices(words, k=80))) for i in range(60)]


@pytest.fixture(scope="module")
def made_sources():
    """Sources give made text; those of `creative` cannot be had."""

    def give(source, _cache):
        if source.set == "creative":
            raise SourceUnavailable(f"{source.client} is missing.")
        entry = {
            "source": source.name,
            "client": source.client,
            "package": source.package,
            "version": "1",
            "licence": source.licence,
            "digest": "sha256:" + "0" * 64,
        }
        return entry, made_texts(source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "_fetch_source", give)
        yield


class Runner:
    """In place of the start of a job's process: the job's command, here and now.

    KeyboardInterrupt at the first job after the one labelled `last`.
    """

    def __init__(self, last=None):
        self.labels, self.last = [], last

    def __call__(self, job, _variables):
        if self.last in self.labels:
            raise KeyboardInterrupt
        self.labels.append(job.label)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        before, code = os.getcwd(), 0
        os.chdir(job.directory)
        try:
            app(list(job.arguments), standalone_mode=False)
        except FlexOlmoError as e:
            job.log.write_text(f"{e}\n")
            code = UNAVAILABLE if isinstance(e, SourceUnavailable) else 2
        finally:
            os.chdir(before)
        return Ended(code)


class Ended:
    """A process that has ended when it is looked at again: none has as soon as it is started."""

    def __init__(self, code):
        self.codes = [code, None]

    def poll(self):
        return self.codes.pop() if len(self.codes) > 1 else self.codes[0]

    def terminate(self):
        pass

    def wait(self, _):
        pass


def leave_undrawn(_figure, path, **_options):
    """In place of `save_figure` where nobody looks at figures: drawing takes most of the time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for kind in (".png", ".svg"):
        path.with_suffix(kind).write_bytes(b"undrawn")


def run(out, runner, recipe=RECIPE, sets=None, is_drawn=False):
    with pytest.MonkeyPatch.context() as patch:
        for amount, less in LESS_TEXT.items():
            patch.setattr(influence, amount, less)
        if not is_drawn:
            for module in (drawing, page):
                patch.setattr(module, "save_figure", leave_undrawn)
        patch.setattr(jobs, "start_child", runner)
        patch.setattr(jobs, "_POLL_SECONDS", 0.0)
        return run_demo(recipe, out, sets)


def run_until(label, out):
    """Labels of the jobs of a demo that is stopped when the one with this label has ended well."""
    runner = Runner(last=label)
    with pytest.raises(KeyboardInterrupt):
        run(out, runner)
    return runner.labels


@pytest.fixture(scope="module")
def finished(made_sources, tmp_path_factory):
    """A demo that ran through: its directory, its results, the labels of its jobs."""
    out = tmp_path_factory.mktemp("demo") / "run"
    runner = Runner()
    return out, run(out, runner, is_drawn=True), runner.labels


def test_every_owner_and_the_coordinator_do_their_part(finished):
    assert finished[2] == [
        "fetch public",
        "prepare public",
        "fetch code",
        "fetch academic",
        "fetch creative",
        "prepare code",
        "prepare academic",
        "anchor",
        "key code",
        "key academic",
        "expert code",
        "expert academic",
        "expert code-paper",
        "expert academic-paper",
        "pack code",
        "pack academic",
        "pack code-paper",
        "pack academic-paper",
        "merge",
        "merge-paper",
        "evaluate",
        "evaluate-paper",
        "check bundles",
        "membership code",
        "extraction code",
        "audit code",
        "audit academic",
        "report code",
    ]


def test_the_documentation_names_files_of_a_demo_that_are_there(finished):
    root = Path(__file__).parents[3]
    pages = [root / "README.md", *(root / "docs/tutorials").glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    paths = set(re.findall(r"(?:runs/demo|\$demo)/([\w./-]*\w)", text))
    assert len(paths) > 10
    assert not [path for path in paths if not (finished[0] / path).exists()]


def test_the_results_have_what_the_report_and_machines_need(finished):
    out, results, _ = finished
    assert json.loads((out / "results.json").read_text()) == results
    rows = [
        "anchor",
        "expert academic",
        "expert code",
        "mixture",
        "mixture without academic",
        "mixture without code",
    ]
    ours, paper = results["bits_per_byte"], results["paper_router"]["bits_per_byte"]
    for table in (ours, paper):
        assert list(table) == rows
        assert all(0 < x < 20 for row in table.values() for x in row.values())
    sets = ["public", "code", "academic"]
    assert all(list(row) == sets for row in ours.values())
    for arrangement, row in paper.items():
        alone = arrangement.removeprefix("expert ")
        assert list(row) == ([s for s in sets if s in ("public", alone)] if alone in sets else sets)
    assert ours["anchor"] == paper["anchor"]
    assert ours["mixture"] != paper["mixture"]
    assert list(results["seconds"]) == [*STEPS, "total", "this run"]
    assert results["seconds"]["total"] == pytest.approx(
        sum(results["seconds"][s] for s in STEPS), abs=0.1
    )
    assert results["seed"] == 3 and results["recipe"] == RECIPE.model_dump(mode="json")
    assert {"flexolmo", "torch", "python"} <= results["versions"].keys()
    assert results["digests"].keys() == {
        "anchor",
        "set public",
        "set code",
        "set academic",
        "bundle code",
        "bundle academic",
    }
    assert len(results["summary"]["bars"]) == 5
    assert results["routing"]["experts"] == ["public", "academic", "code"]
    assert list(results["influence"]["experts"]) == ["academic", "code"]
    assert 0 < results["influence"]["experts"]["code"]["public"]["weight"] < 1
    for name, found in results["statistics_attack"].items():
        assert found["expert"] == name
        assert found["token_presence"]["embed_tokens"]["auc"] == 0.5
    assert list(results["statistics_attack"]) == ["code", "academic"]


def test_an_owner_signs_a_report_of_what_attacks_found_and_keeps_what_quotes(finished):
    out, results, _ = finished
    page = (out / "report.html").read_text(encoding="utf-8")
    for name, told in results["release"].items():
        house = out / "owners" / name
        report = read_release(house / "release" / f"{name}.report")
        bundle = open_bundle(house / "outbox" / f"{name}.bundle", None, allow_unknown_signer=True)
        assert report.report.bundle_digest == bundle.digests["manifest.json"]
        assert report.key_id == bundle.key_id
        assert [x["audit"] for x in told["attacks"]] == ["membership", "extraction", "statistics"]
        assert [x["off_equals_anchor"] for x in told["attacks"]] == [True, True, None]
        assert told["not_made"] == ["canaries", "relearning"] and not told["has_guarantee"]
        assert f'href="{told["page"]}"' in page and (out / told["page"]).is_file()
        assert (house / "audits" / "report" / "page.html").is_file()
    assert list(results["release"]) == ["code"]
    assert "Control: with the owner off" in page


def test_a_training_too_short_to_attack_is_said_and_reported(finished, tmp_path, capsys):
    out = finished[0]
    demo = _Demo(RECIPE.model_copy(update={"expert_train": BRIEF}), tmp_path, None)
    (tmp_path / "owners").symlink_to(out / "owners")
    assert demo._attacks("code") == {}
    assert "code is not attacked" in capsys.readouterr().out


def test_the_results_tell_of_each_owner_only_what_is_true(finished):
    out, results, _ = finished
    assert [o["name"] for o in results["owners"]] == ["code", "academic"]
    for owner in results["owners"]:
        bundle = out / "owners" / owner["name"] / "outbox" / f"{owner['name']}.bundle"
        assert owner["bundle_bytes"] == sum(f.stat().st_size for f in bundle.iterdir())
        assert owner["tokens_seen"] == READ.tokens
        assert owner["documents"] > 10 and owner["owner"] == f"{owner['name'].capitalize()} House"
        opened = open_bundle(bundle, TrustedOwners.load(out / "coordinator" / "trusted"))
        assert (opened.key_id, opened.manifest.licence) == (owner["key_id"], owner["licence"])
    model = load_mixture(out / "model", ANY_SIGNER).model
    assert results["anchor"]["parameters"] == sum(
        p.numel() for p in load_mixture(out / "model", ANY_SIGNER, experts=[]).model.parameters()
    )
    assert results["anchor"]["config"] == model.config.model_dump()


def test_the_two_mixtures_are_of_the_two_routers(finished):
    out = finished[0]
    ours, paper = (
        load_mixture(out / "model", ANY_SIGNER),
        load_mixture(out / "model-paper", ANY_SIGNER),
    )
    assert ours.expert_names == paper.expert_names == ["academic", "code"]
    assert ours.model.settings.kind == "evidence"
    assert paper.model.settings == LinearSettings(has_bias=True)
    assert not any(s.is_ffn_only for s in ours.model.shapes.values())
    assert all(s.is_ffn_only for s in paper.model.shapes.values())


def test_samples_start_from_held_out_text_with_and_without_the_source(finished):
    _, results, _ = finished
    assert [s["source"] for s in results["samples"]] == ["code", "academic"]
    for sample in results["samples"]:
        assert 100 < len(sample["prompt"]) <= 200
        assert isinstance(sample["with"], str) and isinstance(sample["without"], str)


def test_an_owner_whose_text_cannot_be_had_is_skipped_by_name(finished, capsys):
    out, results, _ = finished
    assert list(results["skipped"]) == ["creative"]
    assert "missing" in results["skipped"]["creative"]
    assert not (out / "owners" / "creative" / "prepared").exists()


def test_owners_never_meet(finished):
    """An owner's directory holds nothing of another's, and its bundle alone went out."""
    out = finished[0]
    for name, other in (("code", "academic"), ("academic", "code")):
        house = out / "owners" / name
        files = [f for f in house.rglob("*") if f.is_file()]
        assert not [f for f in files if other in f.name]
        secret = (out / "owners" / other / "key.pem").read_bytes()
        assert all(secret not in f.read_bytes() for f in files)
        keys = list((out / "coordinator").rglob("key.pem")) + list((out / "model").rglob("key.pem"))
        assert not keys
        for anchors in (house / "anchor", out / "model" / "anchor"):
            assert (anchors / "anchor.json").read_bytes() == (
                out / "coordinator" / "anchor" / "anchor.json"
            ).read_bytes()


def test_the_report_is_there_and_stands_alone(finished):
    out = finished[0]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Code House" in page and "creative" in page and "mixture without code" in page
    assert 'src="http' not in page and "<script src" not in page
    assert {p.suffix for p in (out / "figures").iterdir()} == {".png", ".svg"}


def test_run_again_it_does_nothing_again(finished, capsys):
    out, results, _ = finished
    runner = Runner()
    again = run(out, runner)
    assert runner.labels == ["fetch creative"]  # perhaps it can be had by now
    said = capsys.readouterr().out
    assert all(f"== {step}: done before" in said for step in STEPS if "gather" not in step)
    for key in results.keys() - {"seconds", "commit", "machine", "started"}:
        assert again[key] == results[key], key
    assert again["seconds"]["total"] == results["seconds"]["total"]


@pytest.fixture(scope="module")
def interrupted(finished, tmp_path_factory):
    """A demo stopped at the job after each of these labels, and run again each time."""
    out, seen = tmp_path_factory.mktemp("demo") / "run", []
    for label in ("fetch public", "fetch code", "expert code", "merge", None):
        runner = Runner(last=label)
        if label is None:
            results = run(out, runner)
        else:
            with pytest.raises(KeyboardInterrupt):
                run(out, runner)
        seen.append(runner.labels)
    return out, results, seen


def test_stopped_and_run_again_it_ends_with_the_same_results(interrupted, finished):
    results, expected = interrupted[1], finished[1]
    for key in (
        "bits_per_byte",
        "paper_router",
        "routing",
        "summary",
        "samples",
        "recipe",
        "skipped",
    ):
        assert results[key] == expected[key], key
    assert results["digests"]["anchor"] == expected["digests"]["anchor"]
    assert results["digests"]["set code"] == expected["digests"]["set code"]


def test_finished_steps_and_experts_are_not_done_again(interrupted):
    _, _, seen = interrupted
    retried = "fetch creative"  # what could not be had is asked for each time
    assert seen[0] == ["fetch public"]
    assert seen[1] == ["prepare public", "fetch code"]
    assert seen[2][0] == "fetch academic" and seen[2][-1] == "expert code"
    assert seen[3][:2] == [retried, "expert academic"] and seen[3][-1] == "merge"
    measured = ["evaluate", "merge-paper", "evaluate-paper", "check bundles"]
    attacked = ["membership code", "extraction code", "audit code", "audit academic", "report code"]
    assert set(seen[4]) == {retried, *measured, *attacked} and len(seen[4]) == 10
    order = seen[4].index
    assert order("merge-paper") < order("evaluate-paper")
    assert max(map(order, attacked)) == order("report code")


def test_another_recipe_does_again_only_what_depends_on_it(interrupted):
    out = interrupted[0]
    runner = Runner()
    run(out, runner, RECIPE.model_copy(update={"evaluation_bytes": 1500}))
    assert runner.labels == ["fetch creative", "evaluate", "evaluate-paper"]
    runner, other = Runner(), BRIEF.model_copy(update={"steps": 5})
    results = run(out, runner, RECIPE.model_copy(update={"expert_train": other}))
    assert runner.labels[1:5] == [
        "expert code",
        "expert academic",
        "expert code-paper",
        "expert academic-paper",
    ]
    assert not {"anchor", "fetch code", "key code"} & set(runner.labels)
    assert [o["tokens_seen"] for o in results["owners"]] == [other.tokens] * 2


@pytest.fixture
def copied(finished, tmp_path):
    """A finished demo, free to change."""
    return shutil.copytree(finished[0], tmp_path / "run")


def forget(out, label):
    """As if the step had been cut off."""
    (out / "steps" / label / "done.json").unlink()


@pytest.fixture(scope="module")
def left(finished, tmp_path_factory):
    """A finished demo run again without one of its owners."""
    out = shutil.copytree(finished[0], tmp_path_factory.mktemp("left") / "run")
    runner = Runner()
    return out, run(out, runner, sets="code"), runner.labels


def test_an_owner_that_left_is_not_in_the_mixture(left):
    out, results, _ = left
    assert load_mixture(out / "model", ANY_SIGNER).expert_names == ["code"]
    assert list(results["bits_per_byte"]) == [
        "anchor",
        "expert code",
        "mixture",
        "mixture without code",
    ]


def test_with_other_owners_neither_the_anchor_nor_trained_experts_are_made_again(left):
    assert not {"anchor", "expert code", "key code"} & set(left[2])


@pytest.mark.parametrize("absent", ["anchor.json", "model.safetensors"])
def test_an_anchor_copied_by_half_is_copied_again(copied, absent):
    house = copied / "owners" / "code"
    (house / "anchor" / absent).unlink()
    shutil.rmtree(house / "expert.run")
    forget(copied, "expert-code")
    run_until("expert code", copied)
    assert (house / "expert.run").is_dir()
    theirs = copied / "coordinator" / "anchor" / absent
    assert (house / "anchor" / absent).read_bytes() == theirs.read_bytes()


def test_a_key_made_by_half_does_not_stop_the_demo_for_ever(copied):
    (copied / "owners" / "code" / "key.pem.pub").unlink()
    forget(copied, "key-code")
    labels = run_until("evaluate", copied)
    assert {"key code", "pack code", "merge", "evaluate"} < set(labels)
    assert "expert code" not in labels and "pack academic" not in labels


@pytest.mark.parametrize("sets", ["public", "code,code", "code,nosuch", ","])
def test_owners_that_cannot_be_are_refused_before_any_work(tmp_path, sets):
    runner = Runner()
    with pytest.raises(ConfigError, match=r"expected different names out of .*code"):
        run(tmp_path / "run", runner, sets=sets)
    assert runner.labels == []


def test_without_any_owner_there_is_no_demo(made_sources, tmp_path):
    with pytest.raises(FlexOlmoError, match="No owner's text"):
        run(tmp_path / "run", Runner(), sets="creative")


# --- recipes for the jobs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe", [RECIPE.anchor, RECIPE, ExpertRecipe(scope="ffn", router=LinearSettings()), BRIEF]
)
def test_recipes_are_read_back_as_they_were(recipe):
    read = tomllib.loads(tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True)))
    assert type(recipe).model_validate(read) == recipe
