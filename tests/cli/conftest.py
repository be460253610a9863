import sys

import pytest

from flexolmo.cli import main
from made_mixtures import House


@pytest.fixture(scope="session")
def house(wild, owner_keys, tmp_path_factory) -> House:
    """An anchor with large random weights, two owners, and a workshop for bundles."""
    return House(wild, owner_keys, tmp_path_factory.mktemp("house"))


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(*words)`: exit code, standard output and standard error of the whole program."""
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["flexolmo", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0, *capsys.readouterr()
    return call


@pytest.fixture
def works(run):
    """As `run`, for commands that must succeed; standard output alone."""
    def call(*words):
        code, out, err = run(*words)
        assert code == 0, err
        return out
    return call
