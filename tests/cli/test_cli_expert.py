"""`flexolmo expert train` with its short options, and `flexolmo expert compress`."""

import json
import os
import shutil
import stat

import pytest
import torch

from flexolmo.bundle.bundle import open_bundle
from flexolmo.bundle.signing import encode_public, read_private_key
from flexolmo.bundle.terms import PURPOSES
from flexolmo.data.batches import open_set
from flexolmo.data.units import unit_offsets
from flexolmo.evaluation.likelihood import measure_likelihood
from flexolmo.model.assemble import assemble_mixture
from flexolmo.train.compress import compress_rank, prune_width
from flexolmo.train.expert import ExpertRecipe, load_expert
from flexolmo.train.rows import hide_rows
from flexolmo.train.shrink import compress_expert

BRIEF = [
    x
    for text in ("steps=3", "batch_size=2", "seq_len=16", "warmup_steps=1")
    for x in ("--set", f"train.{text}")
]
RANKS = [x for part in ("attention", "embedding", "head") for x in ("--set", f"{part}_rank=6")]


@pytest.fixture
def train(run, pico_anchor_dir, pico_set_dirs, tmp_path):
    """`train(*words)`: exit code, error, and the run's directory, of a brief training."""

    def call(*words, name="maths"):
        out = tmp_path / f"{name}.run"
        code, _, err = run(
            "expert",
            "train",
            "--anchor",
            pico_anchor_dir,
            "--data",
            pico_set_dirs["maths"],
            "--name",
            name,
            "--out",
            out,
            "--threads",
            "1",
            *BRIEF,
            *RANKS,
            *words,
        )
        return code, err, out

    return call


@pytest.fixture(scope="session")
def trained(pico_anchor, pico_sets, tmp_path_factory):
    """Finished runs: of a whole FFN with all deltas, of a low-rank one, of a narrow one."""
    from flexolmo.train.expert import save_expert, train_expert

    runs = {}
    for kind, sizes in (("whole", {}), ("low", {"rank": 6}), ("narrow", {"width": 20})):
        recipe = ExpertRecipe.model_validate(
            {
                "scope": "all" if kind == "whole" else "ffn",
                "attention_rank": 6,
                "embedding_rank": 6,
                "head_rank": 6,
                **sizes,
                "train": {"steps": 12, "batch_size": 4, "seq_len": 32, "warmup_steps": 2},
            }
        )
        runs[kind] = tmp_path_factory.mktemp("runs") / f"{kind}.run"
        save_expert(train_expert(pico_anchor, pico_sets["maths"], "maths", recipe), runs[kind])
    return runs


# --- train --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "architecture"),
    [
        ([], {"d_ff": 48, "rank": 0, "attention_rank": 6, "embedding_rank": 6, "head_rank": 6}),
        (
            ["--scope", "ffn"],
            {"d_ff": 48, "rank": 0, "attention_rank": 0, "embedding_rank": 0, "head_rank": 0},
        ),
        (
            ["--scope", "ffn+head", "--rank", "3"],
            {"d_ff": 48, "rank": 3, "attention_rank": 0, "embedding_rank": 0, "head_rank": 6},
        ),
        (
            ["--width", "20", "--scope", "ffn"],
            {"d_ff": 20, "rank": 0, "attention_rank": 0, "embedding_rank": 0, "head_rank": 0},
        ),
    ],
)
def test_short_options_say_what_is_trained(train, words, architecture):
    code, err, out = train(*words)
    assert code == 0, err
    found = load_expert(out).architecture
    assert architecture.items() <= found.items()


def test_what_is_made_of_an_owner_s_text_is_private_wherever_it_is_put(
    train, run, trained, pico_anchor_dir, pico_set_dirs, tmp_path
):
    before = os.umask(0o022)
    places = [tmp_path / name for name in ("maths.run", "small.run", "curve")]
    compress = ("expert", "compress", trained["whole"], "--anchor", pico_anchor_dir, "--data")
    given = (*compress, pico_set_dirs["maths"], "--threads", "1", "--out")
    try:
        for there in (places[0], places[2]):
            there.mkdir()
        assert train()[0] == 0
        assert run(*given, places[1], "--rank", "3", "--heal", "2")[0] == 0
        assert run(*given, places[2], "--curve", "--max-bytes", "300")[0] == 0
    finally:
        os.umask(before)
    for place in places:
        files = [path for path in place.iterdir() if path.is_file()]
        assert len(files) >= 3
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE(places[1].stat().st_mode) == 0o700


def test_short_options_win_over_the_recipe_and_over_set(train, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("scope = 'all'\nrank = 9\n")
    code, err, out = train("--recipe", recipe, "--set", "rank=8", "--rank", "2", "--scope", "ffn")
    assert code == 0, err
    assert load_expert(out).architecture["rank"] == 2
    config = json.loads((out / "expert.json").read_text())["record"]["config"]
    assert (config["scope"], config["rank"]) == ("ffn", 2)


def test_a_public_set_is_replayed(train, pico_set_dirs, pico_sets):
    code, err, out = train("--public", pico_set_dirs["public"], "--set", "replay=0.5")
    assert code == 0, err
    assert load_expert(out).record["data"]["public"] == pico_sets["public"].digest


def test_what_does_not_go_together_is_refused_in_a_sentence(train, pico_set_dirs):
    public = pico_set_dirs["public"]
    for words, parts in (
        (["--rank", "3", "--width", "20"], ["give width or rank, not both"]),
        (["--scope", "head"], ["scope", "'ffn+head'", "'head'"]),
        (["--set", "router.kind=linear"], ["scope all", 'set scope = "ffn"']),
        (["--public", public], [str(public), "replay is 0", "--set replay=0.1"]),
        (["--set", "replay=0.5"], ["Replay is 0.5", "--public DIRECTORY"]),
        (["--public", public.parent, "--set", "replay=0.5"], ["card.json"]),
        (["--width", "49"], ["Width 49 is not between 1 and 48"]),
    ):
        code, err, out = train(*words)
        assert code == 2 and "Traceback" not in err
        assert all(part in err for part in parts), err
        assert not (out / "expert.json").exists()


# --- sign ---------------------------------------------------------------------------------------


def test_a_key_with_a_passphrase_is_made_and_signs(run, works, tmp_path, trained, monkeypatch):
    def refuses(result, *parts):
        assert result[0] == 2 and "Traceback" not in result[2]
        assert all(part in result[2] for part in parts), result[2]

    key, words = tmp_path / "me.pem", tmp_path / "words"
    words.write_text("open sesame\n")
    works("expert", "key", key, "--passphrase-file", words)
    assert b"ENCRYPTED" in key.read_bytes()
    said = ("expert", "pack", trained["low"], "--key", key, "--owner", "A", "--licence", "MIT")
    said += ("--purpose", "any")
    out = ("--out", tmp_path / "maths.bundle")
    refuses(run(*said, *out), "has a passphrase", "--passphrase-file")
    refuses(
        run(*said, *out, "--passphrase-file", tmp_path / "none"), "passphrase file", "No such file"
    )
    works(*said, *out, "--passphrase-file", words)
    works("expert", "verify", out[1], "--trust-any-signer")
    refuses(
        run("expert", "verify", out[1], "--trust-any-signer", "--max-bytes", "10"), "at most 10"
    )
    monkeypatch.setenv("FLEXOLMO_KEY_PASSPHRASE", "from the environment")
    works("expert", "key", tmp_path / "other.pem", "--passphrase")
    assert encode_public(read_private_key(tmp_path / "other.pem"))
    key.chmod(0o644)
    refuses(run(*said, "--out", tmp_path / "b/maths.bundle"), "mode 0644", "chmod 600")


def test_terms_serial_and_purposes_are_packed_and_shown(run, works, trained, owner_keys, tmp_path):
    said = ("expert", "pack", trained["low"], "--key", owner_keys["Ann"], "--owner", "Ann")
    said += ("--licence", "LicenseRef-Ann", "--out", tmp_path / "maths.bundle")
    terms = {
        "text": "For research.",
        "permitted": ["clinical-care", "health-research"],
        "prohibited": ["commercial"],
        "audience": ["clinic"],
        "valid_from": "2020-01-02",
        "valid_until": "2099-12-31",
        "attribution": "Ann's maths",
    }
    works(
        *(*said, "--terms", "For research.", "--purpose", "health-research"),
        *("--purpose", "clinical-care", "--prohibit", "commercial", "--audience", "clinic"),
        *("--valid-from", "2020-01-02", "--valid-until", "2099-12-31"),
        *("--attribution", "Ann's maths", "--serial", "70"),
    )
    shown = json.loads(works("expert", "inspect", tmp_path / "maths.bundle", "--json"))
    assert shown["verified"] and shown["claims"]["terms"] == terms
    assert (shown["claims"]["serial"], shown["claims"]["format_version"]) == (70, 4)
    shutil.rmtree(tmp_path / "maths.bundle")
    works(*said, "--purpose", "any")
    shown = json.loads(works("expert", "inspect", tmp_path / "maths.bundle", "--json"))
    assert shown["claims"]["serial"] == 71
    code, _, err = run(*said, "--purpose", "any", "--serial", "71")
    assert code == 2 and "Serial 71 is not higher than 71" in err


def test_every_purpose_is_listed_with_its_meaning(works, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    listed = works("expert", "purposes")
    offered = works("expert", "pack", "--help")
    for name, purpose in PURPOSES.items():
        assert name in listed and purpose.meaning in listed
        assert name in offered


# --- compress -----------------------------------------------------------------------------------


PARTS = ("attention_rank", "embedding_rank", "head_rank")
TWO = ("--attention-rank", "2", "--embedding-rank", "2", "--head-rank", "2")


def weights_of(run):
    expert = load_expert(run)
    return expert, expert.tensors


def test_by_rank_it_is_the_truncated_expert_and_says_so(
    works, trained, pico_anchor, pico_anchor_dir, tmp_path
):
    said = works(
        "expert",
        "compress",
        trained["whole"],
        "--anchor",
        pico_anchor_dir,
        "--rank",
        "3",
        *TWO,
        "--out",
        tmp_path / "small",
    )
    before, tensors = weights_of(trained["whole"])
    small, found = weights_of(tmp_path / "small")
    expected = compress_rank(pico_anchor, tensors, 3, 2)
    expected |= hide_rows(pico_anchor, expected)
    assert found.keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) for n, t in found.items())
    assert small.architecture == before.architecture | {
        "rank": 3,
        "attention_rank": 2,
        "embedding_rank": 2,
        "head_rank": 2,
    }
    (step,) = small.record["compressed"]
    assert step["how"] == {"rank": 3, "delta_rank": dict.fromkeys(PARTS, 2)}
    assert step["from"]["architecture"] == before.architecture
    sizes = [sum(t.numel() * t.element_size() for t in e.values()) for e in (tensors, found)]
    assert step["bytes"] == {"before": sizes[0], "after": sizes[1]}
    assert f"{sizes[0]:,} bytes before, {sizes[1]:,} after" in said
    assert {k: v for k, v in small.record.items() if k != "compressed"} == before.record
    assert small.data_card_digest == before.data_card_digest


def test_healed_it_says_less_wrong_and_has_half_the_bytes(
    works, trained, pico_anchor, pico_anchor_dir, pico_sets, pico_set_dirs, owner_keys, tmp_path
):
    plain = (
        "expert",
        "compress",
        trained["whole"],
        "--anchor",
        pico_anchor_dir,
        "--rank",
        "2",
        *TWO,
        "--data",
        pico_set_dirs["maths"],
        "--out",
    )
    works(*plain, tmp_path / "cut")
    works(*plain, tmp_path / "healed", "--heal", "12", "--half")
    cut, healed = load_expert(tmp_path / "cut"), load_expert(tmp_path / "healed")
    assert healed.architecture == cut.architecture
    for name, t in healed.tensors.items():
        if name.startswith("router."):
            assert torch.equal(t, cut.tensors[name]), name
        else:
            assert t.dtype == torch.bfloat16 and not torch.equal(t.float(), cut.tensors[name])
    bits = [
        measure_likelihood(
            assemble_mixture(pico_anchor, {"maths": e.tensors}, e.router),
            pico_sets["maths"],
            "train",
            max_bytes=4000,
        ).bits
        for e in (cut, healed)
    ]
    assert bits[1] < bits[0]
    again = 12 * 4 * 32  # of the batches that it was trained with
    assert healed.data_card_digest == cut.data_card_digest
    assert healed.record["tokens"] == cut.record["tokens"] + again
    assert healed.record["healed"][0]["tokens"] == again
    works(
        "expert",
        "pack",
        tmp_path / "healed",
        "--key",
        owner_keys["Ann"],
        "--owner",
        "Ann",
        "--licence",
        "MIT",
        "--purpose",
        "any",
        "--out",
        tmp_path / "maths.bundle",
    )
    manifest = open_bundle(tmp_path / "maths.bundle", None, allow_unknown_signer=True).manifest
    assert manifest.recipe["healed"] == healed.record["healed"]
    works(
        "mix",
        "build",
        pico_anchor_dir,
        tmp_path / "maths.bundle",
        "--trust-any-signer",
        "-o",
        tmp_path / "m",
    )


def test_by_width_it_has_the_columns_the_owners_text_uses(
    works, trained, pico_anchor, pico_sets, pico_anchor_dir, pico_set_dirs, tmp_path
):
    works(
        "expert",
        "compress",
        trained["whole"],
        "--anchor",
        pico_anchor_dir,
        "--width",
        "10",
        "--data",
        pico_set_dirs["maths"],
        "--out",
        tmp_path / "small",
    )
    expected = prune_width(
        pico_anchor, load_expert(trained["whole"]).tensors, pico_sets["maths"], 10
    )
    small, found = weights_of(tmp_path / "small")
    assert all(torch.equal(t, expected[n]) for n, t in found.items())
    assert small.architecture["d_ff"] == 10
    how = {"width": 10, "data": pico_sets["maths"].commitment}
    assert small.record["compressed"][0]["how"] == how


def test_a_compressed_expert_is_compressed_further_packed_and_merged(
    works, trained, pico_anchor, pico_anchor_dir, owner_keys, wild, tmp_path
):
    for i, (source, rank) in enumerate(((trained["whole"], 5), (tmp_path / "0", 2))):
        works(
            "expert",
            "compress",
            source,
            "--anchor",
            pico_anchor_dir,
            "--rank",
            rank,
            "--out",
            tmp_path / str(i),
        )
    small = load_expert(tmp_path / "1")
    assert [s["how"]["rank"] for s in small.record["compressed"]] == [5, 2]
    works(
        "expert",
        "pack",
        tmp_path / "1",
        "--key",
        owner_keys["Ann"],
        "--owner",
        "Ann",
        "--licence",
        "MIT",
        "--purpose",
        "any",
        "--out",
        tmp_path / "maths.bundle",
    )
    manifest = open_bundle(tmp_path / "maths.bundle", None, allow_unknown_signer=True).manifest
    assert manifest.architecture.rank == 2
    assert manifest.recipe["compressed"] == small.record["compressed"]
    assert str(tmp_path) not in manifest.model_dump_json()
    works(
        "mix",
        "build",
        pico_anchor_dir,
        tmp_path / "maths.bundle",
        "--trust-any-signer",
        "-o",
        tmp_path / "m",
    )
    from flexolmo.bundle.trust import ANY_SIGNER
    from flexolmo.merge.mixture import load_mixture

    pair = assemble_mixture(pico_anchor, {"maths": small.tensors}, small.router)
    assert torch.equal(
        load_mixture(tmp_path / "m", ANY_SIGNER).model(wild.ids(1, 9)), pair(wild.ids(1, 9))
    )


@pytest.mark.parametrize(
    ("kind", "series"),
    [
        (
            "whole",
            {
                "FFN of low rank": [2, 4, 8, 16],
                "FFN and deltas of low rank": [2, 4, 8, 16],
                "narrow FFN": [6, 12, 24, 36],
            },
        ),
        ("low", {"FFN of low rank": [2, 4]}),
        ("narrow", {"narrow FFN": [2, 5, 10, 15]}),
    ],
)
def test_a_curve_is_measured_printed_and_drawn(
    works,
    trained,
    pico_anchor,
    pico_sets,
    pico_anchor_dir,
    pico_set_dirs,
    tmp_path,
    monkeypatch,
    kind,
    series,
):
    from flexolmo.evaluation.likelihood import measure_likelihood

    monkeypatch.setenv("COLUMNS", "160")
    said = works(
        "expert",
        "compress",
        trained[kind],
        "--anchor",
        pico_anchor_dir,
        "--curve",
        "--data",
        pico_set_dirs["maths"],
        "--out",
        tmp_path / "curve",
        "--threads",
        "1",
    )
    curve = json.loads((tmp_path / "curve" / "curve.json").read_text())
    assert (tmp_path / "curve" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "curve" / "expert.json").exists(), "it makes no expert"
    found = {}
    for point in curve["points"]:
        found.setdefault(point["series"], []).append(point.get("rank", point.get("width")))
        assert f"{point['bits_per_byte']:.4f}" in said and f"{point['bytes']:,}" in said
        assert point["bytes"] < curve["whole_bytes"] or "rank" in point
    assert found == series
    expert, data = load_expert(trained[kind]), pico_sets["maths"]
    last = max((p for p in curve["points"] if "rank" in p), key=lambda p: p["rank"], default=None)
    checks = [(curve["bits_per_byte"]["whole"], expert.tensors)]
    if last is not None:
        checks.append(
            (
                last["bits_per_byte"],
                compress_expert(
                    pico_anchor,
                    expert,
                    rank=last["rank"],
                    delta_rank=last.get("delta_rank"),
                    data=data,
                ).tensors,
            )
        )
    for stated, tensors in checks:
        pair = assemble_mixture(pico_anchor, {"maths": tensors}, expert.router)
        read = measure_likelihood(pair, data, "validation").bits_per_byte
        assert stated == pytest.approx(read, rel=1e-9)
    anchors = measure_likelihood(pico_anchor.model, data, "validation").bits_per_byte
    assert curve["bits_per_byte"]["anchor"] == pytest.approx(anchors, rel=1e-9)
    assert curve["run"]["config"]["split"] == "validation"


def test_what_cannot_be_compressed_is_refused_in_a_sentence(
    run, trained, pico_anchor_dir, house, pico_set_dirs, tmp_path
):
    maths, public, out = pico_set_dirs["maths"], pico_set_dirs["public"], tmp_path / "out"
    (tmp_path / "taken").mkdir()
    shutil.copy(trained["whole"] / "expert.json", tmp_path / "taken")
    good = (trained["whole"], "--anchor", pico_anchor_dir)
    for words, parts in (
        (good, ["Say how", "--rank R", "--curve"]),
        ((*good, "--rank", "2", "--width", "3"), ["in one way"]),
        ((*good, "--rank", "2", "--curve", "--data", maths), ["in one way"]),
        ((*good, "--width", "3"), ["add --data"]),
        ((*good, "--curve"), ["add --data"]),
        ((*good, "--rank", "3", "--heal", "2"), ["--heal 2 trains", "--data"]),
        ((*good, "--curve", "--data", maths, "--heal", "2"), ["no --curve"]),
        ((*good, "--rank", "3", "--half"), ["--half goes with --heal"]),
        ((*good, "--width", "9", "--heal", "1", "--data", public), ["Heal it on the text"]),
        (
            (*good, "--width", "3", "--data", maths, "--head-rank", "2"),
            ["--head-rank 2 goes with --rank"],
        ),
        ((*good, "--rank", "3", "--max-bytes", "2"), ["is for --curve"]),
        ((*good, "--rank", "33"), ["Rank 33 is not between 1 and 32"]),
        ((*good, "--width", "49", "--data", maths), ["Width 49 is not between 1 and 48"]),
        ((*good, "--width", "3", "--data", tmp_path), ["card.json"]),
        ((*good, "--rank", "3", "--out", tmp_path / "taken"), ["finished expert already"]),
        ((*good, "--rank", "3", "--out", trained["whole"]), ["finished expert already"]),
        ((trained["low"], "--anchor", pico_anchor_dir, "--rank", "6"), ["of rank 6 already"]),
        (
            (trained["low"], "--anchor", pico_anchor_dir, "--width", "6", "--data", maths),
            ["Give a rank, not a width"],
        ),
        (
            (trained["narrow"], "--anchor", pico_anchor_dir, "--rank", "3"),
            ["Give a width, not a rank"],
        ),
        (
            (trained["whole"], "--anchor", house.anchor_dir, "--rank", "3"),
            ["trained beside anchor", house.anchor.digest],
        ),
        ((*good, "--rank", "3", "--device", "cuda:999"), ["'cuda:999' cannot be used here"]),
        ((tmp_path, "--anchor", pico_anchor_dir, "--rank", "3"), ["expert.json"]),
    ):
        if "--out" not in words:
            words = (*words, "--out", out)
        code, _, err = run("expert", "compress", *words)
        assert code == 2 and "Traceback" not in err, err
        assert all(str(part) in err for part in parts), err
        assert not out.exists()


def test_private_training_is_asked_for_in_three_options(train):
    """The table gets a quarter of epsilon, or what is said."""
    code, err, out = train("--dp-epsilon", 12, "--dp-delta", 1e-5, "--dp-unit", "sequence")
    assert code == 0, err
    config = load_expert(out).record["config"]
    assert (config["privacy"]["epsilon"], config["privacy"]["delta"]) == (12, 1e-5)
    assert config["privacy"]["unit"] == "sequence"
    assert (config["router"]["epsilon"], config["router"]["delta"]) == (3, 1e-5)
    code, err, out = train("--dp-epsilon", 12, "--set", "router.epsilon=6", name="other")
    assert code == 0, err
    assert load_expert(out).record["config"]["router"]["epsilon"] == 6
    code, err, _ = train("--dp-unit", "sequence", name="third")
    assert code == 2 and "go with --dp-epsilon" in err
    code, err, _ = train("--dp-epsilon", 8, "--dp-unit", "patient", name="third")
    assert code == 2 and "--dp-unit 'patient': expected" in err and "prepared without one" in err


def test_all_texts_of_a_patient_are_protected_as_one(run, pico_anchor_dir, pico_set_dirs, tmp_path):
    """By the field's own name; a set of patients has no single document to protect."""
    text = "on day {day} patient {i} said word {i} and word {day} and that the head hurts again"
    records = [
        {"text": " ".join([text.format(i=i, day=day)] * 4), "patient": i}
        for i in range(90)
        for day in range(2)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    prepared = ["--name", "clinic", "--unit-field", "patient", "--public", pico_set_dirs["public"]]
    code, _, err = run("data", "prepare", tmp_path / "in.jsonl", *prepared, "--out", tmp_path)
    assert code == 0, err
    trained = ["--data", tmp_path / "clinic", "--name", "clinic", "--anchor", pico_anchor_dir]
    trained += ["--recipe", "expert_private", "--dp-epsilon", "50", "--out", tmp_path / "run"]
    for key in ("train.steps=2", "train.batch_size=10", "train.warmup_steps=0", "rank=2"):
        trained += ["--set", key]
    code, _, err = run("expert", "train", *trained, "--dp-unit", "document")
    assert code == 2 and "all texts of one 'patient' together" in err
    code, _, err = run("expert", "train", *trained, "--dp-unit", "patients")
    assert code == 2 and "which is 'patient'" in err
    code, _, err = run("expert", "train", *trained, "--dp-unit", "patient")
    assert code == 0, err
    budget = load_expert(tmp_path / "run").record["budget"]
    patients = len(unit_offsets(open_set(tmp_path / "clinic"), "unit", 128)) - 1
    assert budget["unit"] == "unit" and 50 < patients <= 90
    assert budget["sampling_rate"] == 10 / patients
