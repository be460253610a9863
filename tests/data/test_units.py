"""Units of privacy: they cover the text, cross no document, and give bounded windows."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.data.batches import TokenSet, TokenSplit, open_set
from flexolmo.data.corpus import open_corpus
from flexolmo.data.formats import ReadSettings
from flexolmo.data.prepare import prepare_set
from flexolmo.data.settings import PrepareSettings
from flexolmo.data.tokenizer import load_tokenizer
from flexolmo.data.units import read_unit, unit_offsets
from flexolmo.errors import DataError

EOS = 0


def set_of(documents, **card):
    """A set of source documents, each a list of the lengths of its pieces, eos included."""
    pieces = [length for document in documents for length in document]
    sources = [i for i, document in enumerate(documents) for _ in document]
    split = TokenSplit(
        np.ones(sum(pieces), np.uint16),
        np.concatenate([[0], np.cumsum(pieces, dtype=np.int64)]),
        np.array(pieces, np.int64),
        np.array(sources, np.int64),
    )
    return TokenSet(Path("set"), card, {"train": split})


documents_drawn = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1)


@given(documents_drawn, st.integers(1, 12))
def test_sequences_cover_the_text_and_cross_no_document(documents, seq_len):
    expected = []
    for length in map(sum, documents):
        whole, rest = divmod(length, seq_len)
        expected += [seq_len] * whole + [rest] * (rest > 0)
    offsets = unit_offsets(set_of(documents), "sequence", seq_len)
    assert offsets[0] == 0
    assert np.diff(offsets).tolist() == expected


@given(documents_drawn)
def test_all_pieces_of_a_document_are_one_unit(documents):
    lengths = [sum(document) for document in documents]
    assert np.diff(unit_offsets(set_of(documents), "document", 4)).tolist() == lengths
    of_units = set_of(documents, unit_field="patient")
    assert np.diff(unit_offsets(of_units, "unit", 4)).tolist() == lengths


def test_a_unit_that_the_set_does_not_hold_is_refused():
    with pytest.raises(DataError, match="--unit-field FIELD, or protect documents"):
        unit_offsets(set_of([[3]]), "unit", 4)
    with pytest.raises(DataError, match="all texts of one 'patient' together"):
        unit_offsets(set_of([[3]], unit_field="patient"), "document", 4)


def drawn(seed, count):
    return np.random.default_rng(seed).integers(2**64, size=count, dtype=np.uint64)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.integers(0, 10))
def test_windows_are_bounded_stretches_of_the_unit(length, seq_len, most, seed):
    text = np.arange(1, length + 1).astype(np.uint16)
    windows = read_unit(text, EOS, seq_len, drawn(seed, most))
    whole = [EOS, *text.tolist()]
    assert windows.dtype == np.int64
    assert windows.shape[1] == min(length, seq_len) + 1
    assert len(windows) == (min(most, -(-length // seq_len)) if length > seq_len else 1)
    for window in windows.tolist():
        start = window[0]
        assert window == whole[start : start + len(window)]


def test_every_token_of_a_long_unit_is_read_by_and_by():
    text = np.arange(1, 41)
    read = {int(i) for s in range(200) for i in read_unit(text, EOS, 8, drawn(s, 1))[0, 1:]}
    assert read == set(range(1, 41))


def test_a_prepared_set_says_that_it_holds_units(pico_set_dirs, tmp_path):
    """Two records of each of 30 patients; each patient is one unit."""
    records = [
        {"text": f"record {i} of a visit with words {i * 7919} and {i * 104729}", "patient": i % 30}
        for i in range(60)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(r) for r in records))
    small = PrepareSettings(min_split_bytes=0, validation_share=0.1, heldout_share=0.1)
    settings = ReadSettings(unit_field="patient")
    corpus = open_corpus(tmp_path / "in.jsonl", "clinic", "CC0-1.0", settings)
    prepare_set(corpus, tmp_path / "out", load_tokenizer(pico_set_dirs["public"]), settings=small)
    opened = open_set(tmp_path / "out")
    assert opened.card["unit_field"] == "patient"
    train = opened.splits["train"]
    assert len(unit_offsets(opened, "unit", 8)) - 1 == train.num_documents / 2
