"""`flexolmo audit summary`: what it writes, says and refuses."""

import json

from made_mixtures import NAMES

ABOUT = """
[provider]
name = "Example Library"
[sources.amber]
kinds = ["licensed"]
description = "Catalogues."
"""


def test_a_summary_is_written_of_what_is_on(works, house, tmp_path):
    (tmp_path / "about.toml").write_text(ABOUT)
    words = ["--model", house.mixture_dir(NAMES), "--out", tmp_path / "out"]
    said = works("audit", "summary", *words, "--about", tmp_path / "about.toml", "--only", "amber")
    assert "On: public, amber. Off: basalt, zinc." in said
    assert "ask the provider: provider.contact, model.name" in said
    assert "ask Ann: amber.languages" in said and "Bob" not in said
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert sorted(found["sources"]) == ["amber", "public"]
    for form in ("html", "md"):
        page = (tmp_path / "out" / f"page.{form}").read_text()
        assert "Example Library" in page and "Catalogues" in page


def test_a_summary_refuses_unknown_names_and_keys(run, house, tmp_path):
    words = ("audit", "summary", "--model", house.mixture_dir(NAMES), "--out", tmp_path / "out")
    code, _, err = run(*words, "--without", "quartz")
    assert code == 2 and "Unknown expert quartz: this mixture holds amber, basalt, zinc." in err
    code, _, err = run(*words, "--without", "amber", "--only", "zinc")
    assert code == 2 and "not both" in err
    about = tmp_path / "about.toml"
    about.write_text('[sources.quartz]\nlink = "x"\n')
    code, _, err = run(*words, "--about", about)
    assert code == 2 and "quartz is of no source here" in err
    about.write_text('[provider]\nnaem = "x"\n')
    code, _, err = run(*words, "--about", about)
    assert code == 2 and "provider.naem: unknown key. Did you mean provider.name?" in err
    code, _, err = run(*words, "--about", tmp_path / "none.toml")
    assert code == 2 and "none.toml does not exist. Name a TOML file." in err
    assert "recipe" not in err.lower()
    assert not (tmp_path / "out").exists()
