"""Documents put in among those of a prepared set."""

import numpy as np
import pytest

from flexolmo.data.batches import open_set
from flexolmo.data.documents import read_documents
from flexolmo.data.insert import insert_documents
from flexolmo.data.prepare import prepare_set
from flexolmo.data.prepared import read_salt
from flexolmo.errors import DataError
from made_sets import SMALL, made_text, write_raw


@pytest.fixture
def made(pico_set_dirs, tmp_path):
    """The old set, the new one, and what was put in."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 250, size=n) for n in (3, 9, 1, 30)]
    insert_documents(pico_set_dirs["maths"], tmp_path / "new", documents, "canary", 7)
    return open_set(pico_set_dirs["maths"]), open_set(tmp_path / "new"), documents


def rows(split):
    return [tuple(split.document(i)) for i in range(split.num_documents)]


def test_a_new_set_holds_the_old_documents_in_order_and_the_new_ones(made):
    old, new, documents = made
    inserted = [tuple(d) for d in documents]
    found = rows(new.splits["train"])
    assert [r for r in found if r not in inserted] == rows(old.splits["train"])
    assert sorted(r for r in found if r in inserted) == sorted(inserted)
    assert found[-4:] != inserted  # they are spread
    for split in ("validation", "heldout"):
        assert rows(new.splits[split]) == rows(old.splits[split])


def test_each_is_a_source_document_of_its_own(made):
    old, new, documents = made
    split = new.splits["train"]
    inserted = {tuple(d) for d in documents}
    own = [int(split.sources[i]) for i, r in enumerate(rows(split)) if r in inserted]
    assert all((split.sources == s).sum() == 1 for s in own)
    before = old.card["splits"]["train"]["source_documents"]
    assert new.card["splits"]["train"]["source_documents"] == before + 4
    assert split.sources[-1] + 1 == before + 4


def test_pieces_of_one_document_stay_together(tmp_path):
    raw = write_raw(tmp_path, "long", [made_text(i, 400) for i in range(12)])
    prepare_set(raw, tmp_path / "old", settings=SMALL)
    old = open_set(tmp_path / "old").splits["train"]
    assert old.num_documents > 2 * len(set(old.sources))
    documents = [np.arange(1, 4)] * 40
    insert_documents(tmp_path / "old", tmp_path / "new", documents, "canary", 1)
    new = open_set(tmp_path / "new").splits["train"]
    assert sorted(np.bincount(new.sources)) == sorted([1] * 40 + np.bincount(old.sources).tolist())


def test_texts_and_bytes_go_with_the_tokens(made):
    _, new, _ = made
    texts = list(read_documents(new.directory / "train.jsonl.zst"))
    split = new.splits["train"]
    assert len(texts) == split.num_documents
    assert [len(t.text.encode()) for t in texts] == split.bytes.tolist()
    assert sum(t.source == "canary" for t in texts) == 4


def test_it_is_another_set_with_a_salt_of_its_own(made):
    old, new, _ = made
    assert new.digest != old.digest and new.card["recipe"] != old.card["recipe"]
    assert read_salt(new.directory) != read_salt(old.directory)
    with pytest.raises(DataError, match="exists"):
        insert_documents(old.directory, new.directory, [], "canary", 0)
