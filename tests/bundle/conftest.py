"""A valid bundle and its keys."""

import shutil

import pytest

from flexolmo.bundle.bundle import write_bundle
from flexolmo.bundle.signing import create_key
from flexolmo.bundle.trust import TrustedOwners
from made_bundles import make_manifest, make_weights


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    directory = tmp_path_factory.mktemp("keys")
    for name in ("Ann", "Bob"):
        create_key(directory / name)
    return directory


@pytest.fixture(scope="module")
def trusted(keys):
    return TrustedOwners.from_keys({"Ann": (keys / "Ann.pub").read_bytes()})


@pytest.fixture(scope="module")
def valid(tmp_path_factory, keys):
    """A valid bundle's directory; tests copy it before they touch it."""
    path = tmp_path_factory.mktemp("valid") / "maths.bundle"
    weights = make_weights()
    return write_bundle(path, weights, make_manifest(weights), keys / "Ann")


@pytest.fixture
def copy(valid, tmp_path):
    return shutil.copytree(valid, tmp_path / "maths.bundle")
