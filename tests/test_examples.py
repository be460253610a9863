"""The scripts in examples/ run as they stand, on a pico anchor."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def run_example(tmp_path_factory):
    """`run_example(name, *arguments)`: run in one directory that all examples here share."""
    here = tmp_path_factory.mktemp("examples")

    def run(name, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(here)
            patch.setattr(sys, "argv", [name, *map(str, arguments)])
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return here

    return run


@pytest.fixture(scope="module")
def owned(run_example, pico_anchor_dir, pico_set_dirs):
    """A directory with two bundles, made by the first example, and their keys, trusted."""
    for name in ("maths", "news"):
        here = run_example("own_an_expert.py", pico_anchor_dir, pico_set_dirs[name], name, 2)
    (here / "trusted").mkdir()
    for name in ("maths", "news"):
        shutil.copy(here / f"{name}.pem.pub", here / "trusted" / f"{name} house.pub")
    return here


@pytest.fixture(scope="module")
def merged(run_example, owned, pico_anchor_dir):
    """The same directory with a mixture, made by the second example."""
    bundles = ("maths.bundle", "news.bundle")
    run_example("merge_and_switch.py", pico_anchor_dir, "trusted", "the sum of", *bundles)
    return owned


def test_an_owner_makes_a_signed_bundle(owned, run_example, capsys):
    assert {p.name for p in (owned / "maths.bundle").iterdir()} == {
        "expert.safetensors",
        "manifest.json",
        "signer.pub",
        "signature.sig",
    }


def test_a_bundle_is_read(owned, run_example, capsys):
    run_example("read_a_bundle.py", "news.bundle", "trusted")
    said = capsys.readouterr().out
    assert "news, of news house" in said and "layers.1.down_proj.weight" in said


def test_a_bundle_is_read_without_torch(owned):
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    code = f"import sys; sys.modules['torch'] = None; {code}".replace("argv[1]", "argv.pop(1)")
    command = [sys.executable, "-c", code, EXAMPLES / "read_a_bundle.py", "news.bundle"]
    done = subprocess.run(command, cwd=owned, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "signer   unknown" in done.stdout


def test_owners_are_merged_and_switched(merged, run_example, capsys, pico_anchor_dir):
    shutil.rmtree(merged / "mixture")
    bundles = ("maths.bundle", "news.bundle")
    run_example("merge_and_switch.py", pico_anchor_dir, "trusted", "the sum of", *bundles)
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("---")] == [
        "--- without nobody",
        "--- without maths",
        "--- without news",
    ]


def test_opting_out_is_measured(merged, run_example, pico_set_dirs, capsys):
    run_example("evaluate_opt_out.py", "mixture", "trusted", *pico_set_dirs.values())
    table = dict(line.rsplit("public", 1) for line in capsys.readouterr().out.splitlines())
    table = {name.strip(): row for name, row in table.items()}
    assert table["mixture without maths"] == table["expert news"]  # the law, in numbers
    assert table["mixture"] != table["anchor"]


def test_every_example_is_tested_and_short():
    scripts = {p.name: p.read_text(encoding="utf-8") for p in EXAMPLES.glob("*.py")}
    here = Path(__file__).read_text(encoding="utf-8")
    assert scripts and all(name in here for name in scripts)
    assert all(len(text.splitlines()) <= 45 for name, text in scripts.items() if "make" not in name)


def test_the_records_are_what_make_records_py_writes(run_example):
    made = run_example("make_records.py", "records") / "records"
    shipped = EXAMPLES / "records"
    assert {p.name for p in made.iterdir()} == {p.name for p in shipped.iterdir()}
    assert all((shipped / p.name).read_bytes() == p.read_bytes() for p in made.iterdir())
