"""Rows on disk are as lists in memory, however little of them is in memory."""

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.data import rows as rows_module
from flexolmo.data.rows import ArrayWriter, Rows, group_starts, sort_rows, whole_groups

_ROW = np.dtype([("key", "S3"), ("number", "<i8")])
_KEYS = st.sampled_from([b"aaa", b"aa\0", b"\0\0\0", b"\xff\0b"]) | st.binary(
    min_size=3, max_size=3
)


@given(st.lists(st.lists(_KEYS, max_size=9), max_size=9), st.sampled_from([1, 30, 90, 10**6]))
def test_sorted_on_disk_is_sorted_and_groups_come_whole(batches, size):
    keys = [key for batch in batches for key in batch]
    arrays = []
    first = 0
    for batch in batches:
        numbered = [(key, first + i) for i, key in enumerate(batch)]
        arrays.append(np.array(numbered, dtype=_ROW))
        first += len(batch)
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.multiple(rows_module, BYTES_AT_ONCE=size, _LEAST_BYTES_OF_RUN=1),
    ):
        found = list(whole_groups(sort_rows(arrays, "key", Path(directory)), "key"))
    everything = np.concatenate(found) if found else np.zeros(0, _ROW)
    exact = [key.ljust(3, b"\0") for key in everything["key"].tolist()]
    assert exact == sorted(keys)
    assert sorted(everything["number"].tolist()) == list(range(len(keys)))
    assert all(keys[number] == key for key, number in zip(exact, everything["number"], strict=True))
    groups = [key for some in found for key in some["key"][group_starts(some["key"])].tolist()]
    assert len(groups) == len(set(keys))


def test_rows_are_written_read_and_taken_by_place(tmp_path):
    rows = Rows((np.uint32, (2,)), tmp_path / "rows")
    rows.append(np.arange(6).reshape(3, 2))
    rows.write(4, np.array([[8, 9]]))
    expected = [[0, 1], [2, 3], [4, 5], [0, 0], [8, 9]]
    for again in (rows, Rows((np.uint32, (2,)), tmp_path / "rows")):
        assert len(again) == 5 and again.read(0, 9).tolist() == expected
        assert again.take([4, 0, 0]).tolist() == [expected[4], expected[0], expected[0]]
        assert again.take([1, 2]).tolist() == expected[1:3] and len(again.take([])) == 0
        assert [row for some in again.batches(1, 4) for row in some.tolist()] == expected[1:4]
    assert Rows("u1", tmp_path / "rows", offset=8).read(0, 1).tolist() == [2]


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, (np.uint32, (4,))])
@pytest.mark.parametrize("count", [0, 1, 12345])
def test_an_array_that_grows_is_the_file_that_numpy_saves(tmp_path, dtype, count):
    shape = (count, *np.dtype(dtype).shape)
    whole = np.arange(np.prod(shape)).reshape(shape).astype(np.dtype(dtype).base)
    with ArrayWriter(tmp_path / "a.npy", dtype) as writer:
        for some in np.array_split(whole, 3):
            writer.append(some)
    np.save(tmp_path / "b.npy", whole)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
