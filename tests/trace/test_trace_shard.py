"""Suffixes in order, by which a run of ids is found: held against looking at every place."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.errors import DataError
from flexolmo.trace.shard import Shard, encode_ids, id_bytes
from made_traces import places_of, write_parts

# Few ids, so that much is repeated; some of them differ in one byte alone.
IDS = st.sampled_from([1, 2, 256, 257, 65_535])
WIDE_IDS = st.sampled_from([1, 2, 256, 65_536, 65_537, 99_999])
CASES = st.sampled_from([(IDS, 65_536), (WIDE_IDS, 100_000)]).flatmap(
    lambda case: st.tuples(
        st.lists(st.lists(case[0], max_size=30), min_size=1, max_size=5),
        st.lists(case[0], min_size=1, max_size=8),
        st.just(case[1]),
    )
)


@given(CASES)
@settings(max_examples=150)
def test_every_place_of_a_run_is_found_and_no_other(case):
    documents, run, vocab_size = case
    with tempfile.TemporaryDirectory() as where:
        (shard,) = write_parts(Path(where), [documents], vocab_size)
        pattern = encode_ids(run, shard.width).tobytes()
        found = []
        for number in shard.find(pattern):
            place = shard.place(number)
            document = shard.document(place)
            start = int(shard.documents[document])
            assert shard.name(document) == f"0-{document}"
            assert shard.ids(place, place + len(run)) == run
            found.append((document, place - start))
    truth = [(n, k) for n, document in enumerate(documents) for k in places_of(run, document)]
    assert sorted(found) == truth


@given(CASES)
@settings(max_examples=150)
def test_the_longest_beginning_that_occurs_is_found(case):
    documents, run, vocab_size = case
    with tempfile.TemporaryDirectory() as where:
        (shard,) = write_parts(Path(where), [documents], vocab_size)
        found = shard.longest(encode_ids(run, shard.width).tobytes())
    sizes = [k for k in range(len(run) + 1) if any(places_of(run[:k], d) for d in documents)]
    assert found == max(sizes, default=0)


@pytest.mark.parametrize("size", [63, 64, 65, 255, 256, 257, 1500])
def test_a_long_match_is_found_to_its_end(tmp_path, size):
    document = np.random.default_rng(0).integers(1, 300, 2000).tolist()
    (shard,) = write_parts(tmp_path, [[document]], 300)
    run = [*document[7 : 7 + size], 299 if document[7 + size] != 299 else 298]
    assert shard.longest(encode_ids(run, shard.width).tobytes()) == size


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    write_parts(tmp_path, [[[1, 2, 3]], [[1, 2]]], 300)
    (tmp_path / "0/suffixes.npy").write_bytes((tmp_path / "1/suffixes.npy").read_bytes())
    with pytest.raises(DataError, match="do not fit together"):
        Shard(tmp_path / "0", 2)
    (tmp_path / "0/tokens.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match="cannot be opened"):
        Shard(tmp_path / "0", 2)


def test_a_vocabulary_has_two_or_three_bytes():
    assert [id_bytes(n) for n in (300, 65_536, 65_537, 1 << 24)] == [2, 2, 3, 3]
    with pytest.raises(DataError, match="at most"):
        id_bytes((1 << 24) + 1)
