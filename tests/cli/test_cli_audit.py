"""`flexolmo audit`, on noised tables and on what tables cost."""

import json
import stat

import pytest

BRIEF = [
    x
    for text in ("steps=2", "batch_size=2", "seq_len=16", "warmup_steps=1")
    for x in ("--set", f"train.{text}")
]


@pytest.fixture
def owner(works, pico_anchor_dir, pico_set_dirs, tmp_path):
    """`owner(name, *words)`: the run of a brief training."""

    def train(name, *words):
        out = tmp_path / f"{name}.run"
        given = ("--anchor", pico_anchor_dir, "--data", pico_set_dirs[name], "--name", name)
        works("expert", "train", *given, "--out", out, "--threads", "1", *BRIEF, *words)
        return out

    return train


def test_an_attack_says_what_noise_there_is(works, owner, pico_anchor_dir, pico_set_dirs):
    run = owner("maths", "--set", "router.epsilon=8")
    given = ("--anchor", pico_anchor_dir, "--data", pico_set_dirs["maths"])
    assert "of 36 documents, noised to epsilon 8, delta 1e-06." in works(
        "audit", "statistics", run, *given
    )


def test_a_curve_is_measured_printed_and_drawn(
    works, run, owner, pico_anchor_dir, pico_set_dirs, tmp_path
):
    """Of experts whose owners chose different noise."""
    runs = [owner("maths"), owner("news", "--set", "router.epsilon=20")]
    given = [*runs, "--anchor", pico_anchor_dir, "--out", tmp_path / "out"]
    for name in ("public", "maths", "news"):
        given += ["--data", pico_set_dirs[name]]
    said = works("audit", "curve", *given, "--k", "2,9", "--epsilon", "8")
    file = tmp_path / "out" / "curve.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    curve = json.loads(file.read_text())
    assert [p["name"] for p in curve["points"]] == ["k = 2", "k = 9", "epsilon = 8"]
    assert curve["run"]["config"]["split"] == "heldout"
    for point in (curve["anchor"], *curve["points"]):
        assert point["name"] in said and f"{point['own']:.4f}" in said
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    code, _, err = run("audit", "curve", *given, "--k", "2,0")
    assert code == 2 and "--k" in err and "min_documents" in err
    other = tmp_path / "other.run"
    owner("maths", "--set", "router.clip_nats=3", "--out", other)
    code, _, err = run("audit", "curve", other, *given)
    assert code == 2 and "a curve needs one router" in err
    code, _, err = run("audit", "curve", *given, "--split", "train")
    assert code == 2 and "Split 'train' is not known" in err


def test_access_is_measured_printed_and_reported(
    works, run, owner, pico_anchor_dir, pico_set_dirs, owner_keys, trust_dir, tmp_path
):
    bundles = []
    for name, who in (("maths", "Ann"), ("news", "Bob")):
        expert = owner(name)
        words = ("--key", owner_keys[who], "--owner", who, "--licence", "MIT", "--terms", "Any.")
        bundles.append(tmp_path / f"{name}.bundle")
        works("expert", "pack", expert, *words, "--purpose", "any", "--out", bundles[-1])
    model = tmp_path / "model"
    works("mix", "build", pico_anchor_dir, *bundles, "--trust", trust_dir, "--out", model)
    given = ["--model", model, "--trust", trust_dir, "--out", tmp_path / "out"]
    data = ["--data", pico_set_dirs["maths"]]
    said = works("audit", "access", *given, *data)
    file = tmp_path / "out" / "access.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(json.loads(file.read_text())["experts"]) == ["maths"] and "maths" in said
    assert "bits per byte" in (tmp_path / "out" / "page.html").read_text()
    code, _, err = run("audit", "access", *given, *data, *data)
    assert code == 2 and "give each set once" in err
    code, _, err = run("audit", "access", *given, "--data", pico_set_dirs["public"])
    assert code == 2 and "Give the prepared set of one of them" in err
