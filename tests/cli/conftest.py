import sys

import pytest

from flexolmo.cli import main


@pytest.fixture(autouse=True)
def trusting(trust_dir, monkeypatch):
    """Commands trust Ann and Bob unless told otherwise."""
    monkeypatch.setenv("FLEXOLMO_TRUST", str(trust_dir))


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
