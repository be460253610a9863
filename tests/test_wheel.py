"""The wheel, built and installed into an environment of its own, without a network."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def call(*words, **options):
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=120, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, by the build back end that is installed here."""
    copy = tmp_path_factory.mktemp("wheel") / "flexolmo"
    ignored = shutil.ignore_patterns("*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "src", copy / "src", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", copy, copy)
    (found,) = copy.glob("*.whl")
    return found


def test_the_wheel_holds_every_file_of_the_package_and_the_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src"
    wanted = {
        str(p.relative_to(package))
        for p in (package / "flexolmo").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert wanted <= names, wanted - names
    assert {n for n in names if n.startswith("flexolmo/")} == wanted
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_the_wheel_works_in_a_bare_environment(wheel, tmp_path):
    """Dependencies come from the environment of the tests, through a .pth file."""
    bare = tmp_path / "bare"
    # no PYTHONPATH, by which pip could find the package installed already
    clean = {"cwd": tmp_path, "env": {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}}
    call(sys.executable, "-m", "venv", "--without-pip", bare)
    python = bare / "bin" / "python"
    site = Path(
        call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    offline = ("--no-index", "--no-deps", "--no-compile", "--quiet")
    call(sys.executable, "-m", "pip", "--python", python, "install", *offline, wheel, **clean)
    here = sysconfig.get_path("purelib")
    (site / "dependencies.pth").write_text(f"{here}\n{sysconfig.get_path('platlib')}\n")
    where = call(python, "-c", "import flexolmo; print(flexolmo.__file__)", **clean)
    assert Path(where.strip()).is_relative_to(site)
    assert "doctor" in call(bare / "bin" / "flexolmo", "--help", **clean)
    recipe = "from flexolmo.research.demo.demo import default_recipe as d; print(d().read_text())"
    assert "vocab_size" in call(python, "-c", recipe, **clean)
