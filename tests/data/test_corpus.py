import json

import pytest

from flexolmo.data.corpus import digest_files, open_corpus
from flexolmo.data.formats import ReadSettings
from flexolmo.errors import DataError


def test_the_card_names_no_path_and_changes_with_the_files(tmp_path):
    records = tmp_path / "records"
    records.mkdir()
    (records / "a.jsonl").write_text('{"body": "x"}\n{"body": "y"}')
    settings = ReadSettings(text_field="body")
    corpus = open_corpus(records, "hospital", "closed", settings)
    assert [document.text for document in corpus.read()] == ["x", "y"]
    assert {document.source for document in corpus.read()} == {"hospital"}
    assert corpus.noted["documents"] == 2  # of one reading
    assert corpus.card["sources"][0]["licence"] == "closed"
    assert str(tmp_path) not in json.dumps(corpus.card)
    assert open_corpus(records, "hospital", "closed", settings).card == corpus.card
    (records / "a.jsonl").write_text('{"body": "z"}')
    assert open_corpus(records, "hospital", "closed", settings).card != corpus.card
    with pytest.raises(DataError, match="has changed"):
        next(corpus.read())


@pytest.mark.parametrize("name", ["", "../up", "Hospital", "a b"])
def test_a_name_that_is_no_plain_word_is_refused(tmp_path, name):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="cannot name a set"):
        open_corpus(tmp_path, name)


def test_a_set_that_is_prepared_is_not_prepared_again(tmp_path):
    (tmp_path / "card.json").write_text('{"format": "flexolmo-prepared-set-1"}')
    with pytest.raises(DataError, match="flexolmo-prepared-set-1"):
        open_corpus(tmp_path)


def test_a_file_name_that_is_not_unicode_is_read_and_shown_escaped(tmp_path):
    (tmp_path / "caf\udce9.txt").write_text("x")
    corpus = open_corpus(tmp_path, "own")
    assert [document.id for document in corpus.read()] == ["caf\\udce9.txt"]
    assert digest_files(tmp_path)[0][0] == "caf\\udce9.txt"
