import json

import pytest
from typer.testing import CliRunner

from flexolmo.cli.data import app
from flexolmo.errors import ConfigError, DataError, SourceUnavailable
from flexolmo.research.corpora import sources
from flexolmo.research.corpora.sources import SETS

WORDS = "abcdefghijklmnopqrstuvwxyz"


def _records(path, first, count):
    path.mkdir()
    lines = []
    for i in range(first, first + count):
        words = [WORDS[(i * k) % 26] + WORDS[(i + k * k) % 26] + str(i * k % 97) for k in range(80)]
        lines.append(json.dumps({"text": " ".join(words)}))
    (path / "all.jsonl").write_text("\n".join(lines))


def _run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_an_owner_goes_from_files_to_a_prepared_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _records(tmp_path / "open", 0, 40)
    _records(tmp_path / "closed", 1000, 40)
    _run("fetch", "--from", "open", "--name", "public", "--licence", "CC0-1.0")
    _run("fetch", "--from", "closed", "--name", "hospital")
    result = _run("prepare", "corpus/public", "--vocab-size", "300")
    assert result.exit_code == 0 and "heldout" in result.output
    result = _run("prepare", "corpus/hospital")  # the public set in --out is found
    assert result.exit_code == 0 and "hospital" in result.output
    cards = [
        json.loads((tmp_path / "prepared" / name / "card.json").read_text())
        for name in ("public", "hospital")
    ]
    assert cards[0]["tokenizer"] == cards[1]["tokenizer"]
    assert cards[1]["public"] is not None


def test_an_owner_without_a_public_set_is_told_what_to_give(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _records(tmp_path / "closed", 0, 5)
    _run("fetch", "--from", "closed", "--name", "hospital")
    with pytest.raises(ConfigError, match="--public"):
        _run("prepare", "corpus/hospital")


def test_contradictory_or_missing_options_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs --name"):
        _run("fetch", "--from", tmp_path)
    with pytest.raises(ConfigError, match="--name goes with --from"):
        _run("fetch", "--name", "x")
    with pytest.raises(DataError, match="no set 'x'"):
        _run("fetch", "--sets", "x", "--out", tmp_path)


def test_all_sets_without_any_client_are_skipped_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FLEXOLMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        sources,
        "SOURCES",
        tuple(source for source in sources.SOURCES if source.client in ("npm", "apt")),
    )
    with pytest.raises(SourceUnavailable, match="No set"):
        _run("fetch", "--sets", "all", "--out", tmp_path / "out")


def test_the_list_shows_every_set():
    output = _run("list").output
    assert all(name in output for name in SETS)
