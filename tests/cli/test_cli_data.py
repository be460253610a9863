import json
import os
import stat

import pytest
from typer.testing import CliRunner

from flexolmo.cli.data import app
from flexolmo.data.corpus import FORMAT
from flexolmo.data.documents import Document, write_documents
from flexolmo.errors import ConfigError, DataError, SourceUnavailable
from flexolmo.files import digest_file, write_json
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


def _prepare_public(tmp_path):
    _records(tmp_path / "open", 0, 40)
    return _run("prepare", "open", "--name", "public", "--licence", "CC0", "--vocab-size", "300")


def test_an_owner_goes_from_files_to_a_prepared_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = _prepare_public(tmp_path)
    assert result.exit_code == 0 and "heldout" in result.output
    _records(tmp_path / "closed", 1000, 40)
    (tmp_path / "closed" / "scan.pdf").write_bytes(b"%PDF")
    result = _run("prepare", "closed", "--name", "hospital")  # the public set in --out is found
    assert result.exit_code == 0 and "read 1 files, 40 documents" in result.output
    assert "1 of 2 files are not read:\n  1 of kind .pdf: scan.pdf" in result.output
    cards = [
        json.loads((tmp_path / "prepared" / name / "card.json").read_text())
        for name in ("public", "hospital")
    ]
    assert cards[0]["tokenizer"] == cards[1]["tokenizer"]
    assert cards[1]["public"] is not None
    assert cards[1]["reading"] == {
        "files": 1,
        "documents": 40,
        "not_read": {"of kind .pdf": ["scan.pdf"]},
    }


def test_an_owner_s_set_is_private_and_what_a_killed_run_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o022)
    try:
        _prepare_public(tmp_path)
        _records(tmp_path / "closed", 1000, 40)
        (tmp_path / "prepared" / "hospital").mkdir()  # readable by all until now
        left = tmp_path / "prepared" / ".hospital.abcd1234.aside"
        left.mkdir()
        (left / "spill").write_text("the text in the clear")
        result = _run("prepare", "closed", "--name", "hospital")
    finally:
        os.umask(before)
    assert not left.exists() and "left by a run that was killed" in result.output
    modes = {
        name: {
            stat.S_IMODE(p.stat().st_mode)
            for p in [tmp_path / "prepared" / name, *(tmp_path / "prepared" / name).iterdir()]
        }
        for name in ("public", "hospital")
    }
    assert modes == {"public": {0o755, 0o644}, "hospital": {0o700, 0o600}}


def test_an_owner_without_a_public_set_is_told_what_to_give(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _records(tmp_path / "closed", 0, 5)
    with pytest.raises(ConfigError, match="--public"):
        _run("prepare", "closed", "--name", "hospital")


def test_names_missing_or_given_twice_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _records(tmp_path / "a", 0, 5)
    with pytest.raises(DataError, match="--name hospital"):
        _run("prepare", "a")
    with pytest.raises(ConfigError, match="one by one"):
        _run("prepare", "a", "a", "--name", "x")
    with pytest.raises(DataError, match="no set 'x'"):
        _run("fetch", "--sets", "x", "--out", tmp_path)


def test_a_set_is_not_replaced_by_one_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _prepare_public(tmp_path)
    for name, first in (("north", 1000), ("south", 2000)):
        _records(tmp_path / name, first, 40)
    _run("prepare", "north", "--name", "own")
    before = (tmp_path / "prepared/own/card.json").read_bytes()
    with pytest.raises(DataError, match=r"from north \(local\).*from south \(local\).*--replace"):
        _run("prepare", "south", "--name", "own")
    assert (tmp_path / "prepared/own/card.json").read_bytes() == before
    _run("prepare", "north", "--name", "own")  # the same again is done already
    _run("prepare", "south", "--name", "own", "--replace")
    assert (tmp_path / "prepared/own/card.json").read_bytes() != before


def test_two_fetched_sets_of_one_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for directory in ("x", "y"):
        corpus = tmp_path / directory
        corpus.mkdir()
        count = write_documents(corpus / "d.jsonl.zst", [Document("text", "s")])
        files = {"d.jsonl.zst": {"digest": digest_file(corpus / "d.jsonl.zst")}}
        card = {"format": FORMAT, "name": "own", "sources": [], "documents": count, "files": files}
        write_json(corpus / "card.json", card)
    with pytest.raises(ConfigError, match="x and y are both called 'own'"):
        _run("prepare", "x", "y")
    with pytest.raises(DataError, match="omit --name"):
        _run("prepare", "x", "--name", "other")


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
