"""`flexolmo doctor`: what it says of an installation, and its exit code."""

import json
from importlib import metadata

import pytest

from flexolmo.bundle.signing import create_key
from flexolmo.errors import ConfigError
from flexolmo.research.tasks.sandbox import sandbox


@pytest.fixture
def ask(run, monkeypatch, tmp_path):
    """`ask()`: exit code and findings by name, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLEXOLMO_TRUST", raising=False)
    monkeypatch.setattr(sandbox, "check_sandbox", lambda: ["no network"])

    def call():
        code, out, err = run("doctor", "--json")
        assert code in (0, 1), err
        found = {}
        for check in json.loads(out):
            found.setdefault(check["name"], check)
        return code, found

    return call


def test_a_sound_installation_has_no_problem_and_every_part_is_named(ask):
    code, found = ask()
    assert code == 0
    assert {c["state"] for c in found.values()} <= {"ok", "optional"}
    assert set(found) >= {
        "Python", "command", "packages", "extra eval", "extra docs", "extra test", "memory",
        "free disk", "torch", "GPU", "pip", "npm", "apt-get", "sandbox", "trusted owners",
    }  # fmt: skip
    for extra in ("serve", "private", "trace", "scale"):
        assert found[f"extra {extra}"]["state"] == "ok"


def test_a_missing_or_old_package_is_a_problem_and_a_missing_extra_is_not(ask, monkeypatch):
    real = metadata.version

    def version(name):
        if name in ("safetensors", "mkdocs-material", "opacus"):
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "numpy" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    code, found = ask()
    assert code == 1
    assert "safetensors" in found["packages"]["found"]
    assert "numpy 0.1, not >=2" in found["packages"]["found"]
    assert found["extra docs"]["state"] == "optional"
    assert "[docs]" in found["extra docs"]["advice"]
    assert found["extra private"]["state"] == "optional"
    assert "private training; missing: opacus" in found["extra private"]["found"]


def test_a_command_that_is_not_on_the_path_comes_with_the_line_that_puts_it_there(ask, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    _, found = ask()
    assert found["command"]["state"] == "optional"
    assert "bin/activate" in found["command"]["advice"]
    assert found["npm"]["state"] == "optional" and "Install npm" in found["npm"]["advice"]


def test_a_private_key_that_others_can_read_is_a_problem(ask, tmp_path):
    create_key(tmp_path / "me.pem")
    code, found = ask()
    assert (code, found["private key"]["state"]) == (0, "ok")
    (tmp_path / "me.pem").chmod(0o644)
    code, found = ask()
    assert (code, found["private key"]["state"]) == (1, "problem")
    assert "chmod 600" in found["private key"]["advice"]


def test_the_trust_directory_is_read(ask, monkeypatch, tmp_path):
    create_key(tmp_path / "keys" / "k")
    trusted = tmp_path / "trusted"
    trusted.mkdir()
    (tmp_path / "keys" / "k.pub").rename(trusted / "St Mary.pub")
    monkeypatch.setenv("FLEXOLMO_TRUST", str(trusted))
    assert ask()[1]["trusted owners"]["found"] == f"{trusted}: St Mary"
    (trusted / "St Mary.pub").write_text("no key")
    code, found = ask()
    assert (code, found["trusted owners"]["state"]) == (1, "problem")


def test_no_sandbox_is_said_and_no_problem(ask, monkeypatch):
    def refuse():
        raise ConfigError("No seccomp here.")

    monkeypatch.setattr(sandbox, "check_sandbox", refuse)
    code, found = ask()
    assert code == 0
    assert found["sandbox"]["found"] == "No seccomp here."


def test_without_json_each_advice_is_printed(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLEXOLMO_TRUST")
    monkeypatch.setattr(sandbox, "check_sandbox", lambda: ["no network"])
    code, out, _ = run("doctor")
    assert code == 0
    assert "FLEXOLMO_TRUST" in out and "no network" in out
