"""`flexolmo audit membership`, `extraction`, `canaries` and `relearning`."""

import json
import stat

import pytest

from flexolmo.data.batches import open_set
from made_attacks import build_attacked


@pytest.fixture
def given(house, pico_sets, pico_set_dirs, tmp_path):
    """Options that name a mixture, the set its expert was trained on, and where to write."""
    model = build_attacked(house, pico_sets["maths"], tmp_path / "model", ["code"])
    return ["--model", model, "--data", pico_set_dirs["maths"], "--out", tmp_path / "out"]


def test_membership_is_told_and_what_must_stay_is_private(works, given, tmp_path):
    said = works("audit", "membership", *given, "--max-documents", "8", "--only", "maths")
    out = tmp_path / "out"
    assert "8 members and " in said and "InfoRMIA" in said
    assert "Control: with the expert off, every number is the anchor's, to the bit." in said
    for name in ("membership.json", "stays_here.json"):
        assert stat.S_IMODE((out / name).stat().st_mode) == 0o600
    stays = json.loads((out / "stays_here.json").read_text())
    assert "must not leave" in stays["notice"] and len(stays["worst"]) == 8
    shown = json.dumps(json.loads((out / "membership.json").read_text())) + said
    shown += (out / "page.html").read_text()
    assert not any(x["begins"] in shown for x in stays["worst"])
    assert (out / "roc.png").read_bytes().startswith(b"\x89PNG")


def test_a_dense_model_is_attacked_against_where_it_came_from(
    works, run, house, pico_anchor_dir, pico_set_dirs, tmp_path
):
    data = ["--data", pico_set_dirs["maths"], "--out", tmp_path / "out"]
    brief = ("--max-documents", "5")
    said = works(
        "audit", "membership", "--model", house.anchor_dir, *data, *brief,
        "--reference", pico_anchor_dir,
    )  # fmt: skip
    assert "InfoRMIA" in said and "Control" not in said
    said = works("audit", "membership", "--model", house.anchor_dir, *data, *brief)
    assert "InfoRMIA" not in said and "zlib" in said
    code, _, err = run("audit", "extraction", "--model", house.anchor_dir, *data, "--only", "code")
    assert code == 2 and "Unknown expert code" in err


def test_extraction_is_planned_then_done(works, run, given, tmp_path):
    how = ["--prefix-tokens", "8", "--continuation-tokens", "12", "--samples", "2"]
    how += ["--max-documents", "3"]
    code, said, err = run("audit", "extraction", *given, *how, "--plan")
    assert code == 0 and "the paper's 10,000 documents would take" in err
    assert not (tmp_path / "out" / "extraction.json").exists()
    said = works("audit", "extraction", *given, *how)
    assert "mixture, expert on" in said and "Control" not in said
    found = json.loads((tmp_path / "out" / "extraction.json").read_text())
    assert found["run"]["config"]["samples"] == 2 and found["documents"] == 3
    assert stat.S_IMODE((tmp_path / "out" / "stays_here.json").stat().st_mode) == 0o600
    assert "not sampled" in works("audit", "extraction", *given, *how, "--samples", "0")
    code, _, err = run("audit", "extraction", *given, *how, "--top-p", "2")
    assert code == 2 and "top_p" in err


def test_canaries_are_planted_then_looked_for(works, house, pico_set_dirs, tmp_path):
    planted, key = tmp_path / "planted", tmp_path / "key"
    given = ["--data", pico_set_dirs["maths"], "--out", planted, "--key", key]
    said = works("audit", "canaries", "plant", *given, "--count", "40", "--tokens", "5")
    assert "of 40 canaries planted" in said
    model = build_attacked(house, open_set(planted), tmp_path / "model")
    given = ["--model", model, "--data", planted, "--key", key, "--out", tmp_path / "out"]
    said = works("audit", "canaries", "measure", *given)
    assert "of 40 canaries were planted" in said and "epsilon, at least" in said
    assert (tmp_path / "out" / "page.html").is_file()


def test_relearning_says_whether_anything_comes_back(works, given, pico_set_dirs, tmp_path):
    brief = ["--steps", "2", "--every", "1", "--batch-size", "2", "--seq-len", "16"]
    given = [*given, "--public", pico_set_dirs["public"], *brief, "--max-documents", "4"]
    said = works("audit", "relearning", *given)
    assert "bits per byte more than the anchor" in said and "Control" not in said
    said = works("audit", "relearning", *given, "--without", "code")
    assert "The mixture gains +0.0000 bits per byte more" in said
    assert "at every step the mixture reads as the anchor does" in said
    assert (tmp_path / "out" / "relearning.png").is_file()
