"""The commands of each tutorial, in order, in one `sh -e`, in a checkout after `make demo`.

Replaced are the demo's files, by those of a one-layer model on made text, and the start of each
`flexolmo` (see made_shell). Everything else is as written.
"""

import re

import pytest

from made_shell import ROOT, script_of

TUTORIALS = ROOT / "docs" / "tutorials"


def run(shell, demo_root, name):
    return shell.run(script_of(TUTORIALS / f"{name}.md", "sh"), demo_root)


def test_the_owner_trains_signs_and_measures(shell, demo_root):
    said = run(shell, demo_root, "owner")
    assert "St Mary" in said
    assert (demo_root / "hospital/hospital.bundle/signature.sig").is_file()
    assert (demo_root / "hospital/hospital.pem").stat().st_mode & 0o077 == 0
    assert (demo_root / "hospital/eval/results.json").is_file()


def test_the_coordinator_refuses_merges_and_exports(shell, demo_root):
    said = run(shell, demo_root, "coordinator")
    assert "manifest.json" in said.split("damaged.bundle --trust")[1]
    assert (demo_root / "coordinator/model/experts/code.bundle").is_dir()
    assert (demo_root / "coordinator/model-hf/model.safetensors").is_file()


def test_the_deployer_switches_and_compares(shell, demo_root):
    said = run(shell, demo_root, "deployer")
    assert "coed" in said.split("--without coed")[1]
    off, never = (demo_root / "deployer" / f"{name}.txt" for name in ("off", "never"))
    assert off.read_bytes() == never.read_bytes() != b""
    assert "\n---\n" in said.split("python serve.py")[1].split("model-hf")[0]
    assert "\n---\n" in said.split("python hf.py")[1]


def test_the_researcher_measures_and_compares(shell, demo_root):
    said = run(shell, demo_root, "researcher")
    assert "without its owner" in said and "steps are done" in said
    assert (demo_root / "researcher/table/page.md").is_file()


def test_every_tutorial_is_tested_and_leads_to_the_next():
    pages = {page.stem: page.read_text(encoding="utf-8") for page in TUTORIALS.glob("*.md")}
    assert set(pages) == {"owner", "coordinator", "deployer", "researcher"}
    assert all(re.search(r"^```sh\n\. \.venv/bin/activate", text, re.M) for text in pages.values())


LINES = ["flexolmo --version", "exit 1", "cat nothing | grep nothing"]
LINES += [f". .venv/bin/activate; echo '{code}' | python -" for code in ("import no", "exit(2)")]


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_fails_is_seen(shell, demo_root, line):
    with pytest.raises(AssertionError):
        shell.run(f"{line}\necho went on", demo_root)
