"""The Python interface: every name is there, and importing the package costs nothing."""

import subprocess
import sys

import pytest

import flexolmo


@pytest.mark.parametrize("name", flexolmo.__all__)
def test_every_public_name_is_there_and_documented(name):
    found = getattr(flexolmo, name)
    assert callable(found) or name.isupper()
    assert found.__doc__
    assert found.__module__ == f"flexolmo.{flexolmo._HOME[name]}"


def test_the_names_can_be_listed_and_imported_all_at_once():
    assert dir(flexolmo) == flexolmo.__all__ == sorted(set(flexolmo.__all__))
    space = {}
    exec("from flexolmo import *", space)
    assert set(flexolmo.__all__) <= space.keys()


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(AttributeError, match=r"flexolmo has no 'soup'; it has .*build_mixture"):
        flexolmo.soup  # noqa: B018


def test_neither_importing_nor_help_loads_torch():
    code = (
        "import sys, flexolmo; from flexolmo.cli import app; "
        "from typer.testing import CliRunner; "
        "assert CliRunner().invoke(app, ['generate', '--help']).exit_code == 0; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
