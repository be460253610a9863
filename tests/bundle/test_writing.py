"""Writing bundles, and looking at them without trust."""

import datetime
import json
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from flexolmo.bundle import bundle as room
from flexolmo.bundle.bundle import inspect_bundle, write_bundle
from flexolmo.bundle.signing import key_id
from flexolmo.errors import BundleError, DiskFullError
from made_bundles import TERMS, TODAY, make_manifest, make_weights, terms_until

# --- writing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent, changes, message",
    [
        ({"a": np.ones(1, "f4")}, {}, "extra: a"),
        ({"layers.0.up": np.ones((3, 4), "f4")}, {}, "data of layers.0.up"),
        (None, {"terms": terms_until(datetime.date(2026, 11, 21))}, "expired"),
    ],
)
def test_an_expert_unlike_its_manifest_is_not_written(tmp_path, keys, sent, changes, message):
    manifest = make_manifest(make_weights(), **changes)
    with pytest.raises(BundleError, match=f"was not written(?s:.*){message}"):
        write_bundle(
            tmp_path / "maths.bundle", make_weights(**sent or {}), manifest, keys / "Ann", TODAY
        )
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_may_be_packed_before_its_terms_begin(tmp_path, keys, trusted):
    first = TODAY + datetime.timedelta(days=9)
    weights = make_weights()
    manifest = make_manifest(weights, terms=TERMS.model_copy(update={"valid_from": first}))
    path = write_bundle(tmp_path / "maths.bundle", weights, manifest, keys / "Ann", today=TODAY)
    assert room.open_bundle(path, trusted, today=first).manifest.terms.valid_from == first
    with pytest.raises(BundleError, match="terms begin on 2026-12-01, today is 2026-11-22"):
        room.open_bundle(path, trusted, today=TODAY)


def test_an_expert_that_is_not_finite_is_not_written(tmp_path, keys):
    weights = make_weights(a=np.array([np.inf], "f4"))
    with pytest.raises(BundleError, match="not finite: a"):
        write_bundle(tmp_path / "maths.bundle", weights, make_manifest(weights), keys / "Ann")
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_never_overwritten_nor_misnamed(copy, keys):
    weights = make_weights()
    before = (copy / "signature.sig").read_bytes()
    with pytest.raises(BundleError, match="not overwritten"):
        write_bundle(copy, weights, make_manifest(weights), keys / "Ann")
    with pytest.raises(BundleError, match=r"expected the directory name maths\.bundle"):
        write_bundle(copy.parent / "other", weights, make_manifest(weights), keys / "Ann")
    assert (copy / "signature.sig").read_bytes() == before


def test_a_manifest_changed_behind_its_checks_is_not_written(tmp_path, keys):
    weights = make_weights()
    manifest = make_manifest(weights).model_copy(update={"licence": "do what you like"})
    with pytest.raises(BundleError, match="licence"):
        write_bundle(tmp_path / "maths.bundle", weights, manifest, keys / "Ann")


def test_a_disk_that_gives_back_other_bytes_is_noticed(tmp_path, keys, monkeypatch):
    real = room.open_bundle

    def spoil_then_open(path, *args, **kwargs):
        file = path / "expert.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(room, "open_bundle", spoil_then_open)
    weights = make_weights()
    with pytest.raises(BundleError, match=r"expert\.safetensors"):
        write_bundle(tmp_path / "maths.bundle", weights, make_manifest(weights), keys / "Ann")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, keys, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "open_bundle", fail)
    weights = make_weights()
    with pytest.raises(DiskFullError, match="No space left"):
        write_bundle(tmp_path / "maths.bundle", weights, make_manifest(weights), keys / "Ann")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_writing_leaves_nothing_at_the_path(tmp_path, keys, valid):
    script = """
        import os, signal, sys
        from pathlib import Path
        from flexolmo.bundle import bundle
        from flexolmo.bundle.manifest import read_manifest
        valid, path, key = map(Path, sys.argv[1:])
        bundle.open_bundle = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        manifest = read_manifest((valid / "manifest.json").read_bytes())
        bundle.write_bundle(path, (valid / "expert.safetensors").read_bytes(), manifest, key)
    """
    path = tmp_path / "maths.bundle"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), valid, path, keys / "Ann"],
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not path.exists()
    weights = make_weights()
    assert write_bundle(path, weights, make_manifest(weights), keys / "Ann") == path


# --- inspecting --------------------------------------------------------------------------------


def test_inspecting_a_trusted_bundle_says_verified(valid, trusted, keys):
    report = inspect_bundle(valid, trusted)
    assert report["verified"] is True
    assert report["why_not"] is None
    assert report["signer"] == "Ann"
    assert report["key_id"] == key_id((keys / "Ann.pub").read_bytes())
    assert report["claims"]["name"] == "maths"
    assert report["file_bytes"]["expert.safetensors"] == len(make_weights())
    json.dumps(report)


def test_inspecting_an_unknown_signers_bundle_shows_claims_as_unverified(valid):
    report = inspect_bundle(valid)
    assert report["verified"] is False
    assert "unknown key" in report["why_not"]
    assert report["key_id"] in report["why_not"]
    assert report["claims"]["owner"] == "Ann"


def test_inspecting_a_damaged_bundle_says_why(copy, trusted):
    (copy / "expert.safetensors").write_bytes(b"evil")
    report = inspect_bundle(copy, trusted)
    assert report["verified"] is False
    assert "expert.safetensors" in report["why_not"]
    assert report["signer"] == "Ann"  # the manifest is hers, the weights are not
    (copy / "manifest.json").write_bytes(b"evil")
    (copy / "extra").mkdir()
    report = inspect_bundle(copy, trusted)
    assert report["claims"] is None and report["key_id"] is None
    assert "extra" in report["why_not"]
    assert "directory" in inspect_bundle(copy / "none")["why_not"]
