"""`flexolmo mix prove-optout` and `verify-optout`: what is printed, and how they end."""

import json

import pytest

from flexolmo.merge import compare
from flexolmo.merge.mixture import remove_experts

NAMES = ("amber", "zinc")


@pytest.fixture(autouse=True)
def short_sequences(monkeypatch):
    monkeypatch.setattr(compare, "SEQUENCE_TOKENS", 6)
    monkeypatch.setattr(compare, "WRITTEN_TOKENS", 1)


@pytest.fixture
def prove(house, owner_keys, tmp_path):
    """Words of a command that proves that zinc leaves no trace."""
    model = house.mixture_dir(NAMES)
    out, key = tmp_path / "cert.json", owner_keys["Ann"]
    words = ["mix", "prove-optout", "--model", model, "--without", "zinc", "--key", key, "-o", out]
    return [*words, "--random", 1]


def test_a_certificate_is_made_read_and_checked(house, works, prove, owner_keys, tmp_path):
    texts = tmp_path / "texts"
    texts.write_text("One line.\n")
    said = works(*prove, "--subsets", "all", "--texts", texts, "--seed", 3)
    findings = json.loads((tmp_path / "cert.json").read_text())["certificate"]["findings"]
    assert len(findings["compared"]["subsets"]) == 2 and findings["plan"]["seed"] == 3
    for title in ("Proven by this comparison:", "Declared by the other owners:", "Not covered:"):
        assert f"{title}\n- " in said
    assert "2 of 2 possible" in said.replace("\n  ", " ") and "As a control zinc" in said
    model = house.build(NAMES, tmp_path / "m")
    check = ["mix", "verify-optout", tmp_path / "cert.json", "--model", model]
    signer = ["--signer", f"{owner_keys['Ann']}.pub"]
    said = works(*check, *signer, "--texts", texts)
    assert "cert.json: holds, signed by Ann (sha256:" in said
    assert "still holds zinc" in said and "here the very numbers" in said
    assert "Not compared again" not in said
    remove_experts(model, ["zinc"], house.trusted)
    said = works(*check)
    assert "no longer holds zinc" in said
    assert "claimed sequences, as" in said and "given sequences, as --texts was not given" in said


def test_what_does_not_hold_ends_with_1_and_the_reason(run, works, prove, tmp_path):
    works(*prove, "--subsets", 1)
    path = tmp_path / "cert.json"
    path.write_text(path.read_text().replace("Side channels", "No channels"))
    code, out, err = run("mix", "verify-optout", path, "--model", prove[3])
    assert (code, out) == (1, "")
    assert "ProofError" in err and "not what was signed" in err and "Traceback" not in err


def test_an_expert_that_is_not_there_ends_with_1(run, prove):
    code, _, err = run(*prove, "--without", "news")
    assert code == 1 and "no expert news" in err


@pytest.mark.parametrize("subsets", ["0", "-1", "some", "", "1.5", "²"])
def test_a_number_of_subsets_that_is_none_is_refused(run, prove, subsets):
    code, _, err = run(*prove, "--subsets", subsets)
    assert code == 2 and "--subsets" in err and "Traceback" not in err


def test_a_key_that_others_may_read_signs_nothing(run, prove, owner_keys, tmp_path):
    open_key = tmp_path / "open.pem"
    open_key.write_bytes(owner_keys["Ann"].read_bytes())
    open_key.chmod(0o644)
    code, _, err = run(*prove, "--key", open_key)
    assert code == 2 and "others may read" in err and not (tmp_path / "cert.json").exists()
