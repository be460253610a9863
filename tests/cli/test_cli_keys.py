"""`flexolmo expert rotate-key` and `revoke`, and the coordinator's `flexolmo mix refresh`."""

import shutil

import pytest

from flexolmo.bundle.serials import take_serial
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.merge.mixture import load_mixture


def test_an_owner_rotates_a_key_and_revokes_and_the_coordinator_refreshes(
    run, works, house, trust_dir, tmp_path, monkeypatch
):
    trusted = shutil.copytree(trust_dir, tmp_path / "trusted")
    monkeypatch.setenv("FLEXOLMO_TRUST", str(trusted))
    model = house.build(["amber", "zinc"], tmp_path / "m")
    old = shutil.copy(house.keys["Ann"], tmp_path / "old.pem")
    take_serial(old, "Ann", "amber", 5)
    monkeypatch.chdir(tmp_path)
    works("expert", "key", "new.pem")
    said = works("expert", "rotate-key", "old.pem", "new.pem", "--owner", "Ann")
    (rotation,) = tmp_path.glob("Ann.from-*.rotation.json")
    assert str(rotation.name) in said
    assert take_serial(tmp_path / "new.pem", "Ann", "amber") == 6
    new = ("expert", "revoke", "--key", "new.pem", "--owner", "Ann", "--reason", "Consent ended.")
    works(*new, "--bundle", house.bundle("amber"), "--out", "inbox/Ann.revoked.json")
    refresh = ("mix", "refresh", model, "--revocations", tmp_path / "inbox")
    code, out, err = run(*refresh)
    assert code == 2 and "counts today" in err and "no expert removed" in out
    assert load_mixture(model, TrustedOwners.load(trusted)).expert_names == ["amber", "zinc"]
    shutil.copy(rotation, trusted)
    out = works(*refresh)
    assert "number 1 of Ann was taken" in out and f"{model}: amber removed" in out
    assert "Consent ended" in out
    assert load_mixture(model, TrustedOwners.load(trusted)).expert_names == ["zinc"]
    code, _, err = run("expert", "verify", house.bundle("amber"))
    assert code == 2 and "revoked by its owner on " in err and "Consent ended" in err
    works(*new, "--expert", "basalt", "--up-to-serial", "3", "--out", "inbox/Ann.revoked.json")
    assert "number 2 of Ann was taken" in works(*refresh)


@pytest.mark.parametrize(
    "words, said",
    [
        ((), "Say what to revoke"),
        (("--expert", "amber"), "go together"),
        (("--up-to-serial", "3"), "go together"),
        (("--bundle", "sha256:x"), "revoked.0.bundle.bundle_digest"),
        (("--bundle", "."), "is no bundle"),
        (("--key-id", "x", "--owner", "a/b"), "owner"),
        (("--key-id", "x", "--signed-by", "none"), "No such file"),
    ],
)
def test_a_revocation_that_says_too_little_is_refused(
    run, house, tmp_path, monkeypatch, words, said
):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(
        *("expert", "revoke", "--key", house.keys["Ann"], "--owner", "Ann", "--reason", "x", *words)
    )
    assert code == 2 and said in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())
