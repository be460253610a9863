import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.data.batches import (
    TokenSet,
    TokenSplit,
    evaluation_windows,
    open_set,
    training_batches,
)
from flexolmo.errors import DataError

EOS = 0


def _token_set(lengths: list[int], sizes: list[int] | None = None) -> TokenSet:
    """A set in memory whose documents have `lengths` tokens, numbered from 1."""
    flat, offsets, number = [], [0], 1
    for length in lengths:
        flat += [*range(number, number + length), EOS]
        number += length
        offsets.append(len(flat))
    split = TokenSplit(
        np.array(flat, np.uint16),
        np.array(offsets, np.int64),
        np.array(sizes or [3 * length for length in lengths], np.int64),
    )
    return TokenSet(
        None, {"name": "t", "tokenizer": {"eos_id": EOS, "vocab_size": 999}}, {"train": split}
    )


@given(st.integers(20, 300), st.integers(1, 9), st.integers(1, 16), st.integers(0, 5))
def test_every_window_comes_once_an_epoch_and_covers_the_stream(length, batch_size, seq_len, seed):
    batches = training_batches(_token_set([length]), "train", batch_size, seq_len, seed)
    steps = 3 * batches.num_windows
    visited = np.concatenate([batches.windows(step) for step in range(steps)])
    for epoch in range(3):
        first = epoch * batches.num_windows
        assert sorted(visited[first : first + batches.num_windows]) == (
            list(range(batches.num_windows))
        )
    predicted = batches.num_windows * seq_len
    assert length + 1 - predicted - 1 < seq_len  # what is left over is less than one window


@given(st.integers(0, 40), st.integers(0, 3))
def test_a_batch_depends_on_seed_and_step_alone(step, seed):
    token_set = _token_set([50, 70, 90])
    worn = training_batches(token_set, "train", 4, 8, seed)
    for earlier in range(step):
        worn.batch(earlier)
    fresh = training_batches(token_set, "train", 4, 8, seed)
    np.testing.assert_array_equal(worn.batch(step), fresh.batch(step))


def test_batches_are_windows_of_the_stream_with_one_token_shared():
    token_set = _token_set([40, 40])
    batches = training_batches(token_set, "train", 2, 10, seed=1)
    batch = batches.batch(0)
    assert batch.shape == (2, 11) and batch.dtype == np.int64
    for row, window in zip(batch, batches.windows(0), strict=True):
        np.testing.assert_array_equal(row, token_set.splits["train"].tokens[window * 10 :][:11])


def test_seeds_and_epochs_give_different_orders():
    token_set = _token_set([500])
    one, two = (training_batches(token_set, "train", 10, 5, seed) for seed in (1, 2))
    assert one.windows(0).tolist() != two.windows(0).tolist()
    assert one.windows(0).tolist() != one.windows(10).tolist()


def test_the_order_is_the_same_in_every_version_of_numpy():
    batches = training_batches(_token_set([100]), "train", 5, 10, seed=7)
    assert batches.windows(0).tolist() == GOLDEN


GOLDEN = [8, 4, 3, 6, 2]


def test_a_split_shorter_than_a_window_is_refused():
    with pytest.raises(DataError, match="fewer than one window"):
        training_batches(_token_set([5]), "train", 1, 8, 0)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 200)), min_size=1, max_size=8),
    st.integers(1, 12),
)
def test_evaluation_predicts_each_token_once_and_bytes_add_up(documents, seq_len):
    lengths, sizes = zip(*documents, strict=True)
    token_set = _token_set(list(lengths), list(sizes))
    windows = list(evaluation_windows(token_set, "train", seq_len))
    predicted = np.concatenate([ids[1:] for ids, _ in windows])
    np.testing.assert_array_equal(predicted, np.arange(1, sum(lengths) + 1))
    assert sum(size for _, size in windows) == sum(sizes)
    for ids, size in windows:
        assert 1 <= len(ids) - 1 <= seq_len and size >= 0
        first = ids[1] in 1 + np.cumsum([0, *lengths])
        assert ids[0] == (EOS if first else ids[1] - 1)


def test_a_limit_spreads_what_is_read_over_the_whole_split():
    token_set = _token_set([40] * 10, [400] * 10)
    for max_bytes in (400, 1000, 3999):
        read = [
            int(ids[1] - 1) // 40
            for ids, size in evaluation_windows(token_set, "train", 4, max_bytes)
            for _ in range(size)
        ]
        assert max_bytes - 40 <= len(read) <= max_bytes
        shares = np.bincount(read, minlength=10)
        assert shares.max() - shares.min() <= 40, "one window more or less of each document"
    for max_bytes in (None, 4000, 9999):
        assert sum(size for _, size in evaluation_windows(token_set, "train", 4, max_bytes)) == 4000
    assert len(list(evaluation_windows(token_set, "train", 4, 1))) == 1, "at least one window"


def test_a_set_of_another_tokenizer_is_refused(public_set):
    with pytest.raises(DataError, match="sha256:other"):
        open_set(public_set, "sha256:other")


def test_a_shard_that_does_not_fit_its_card_is_refused(public_set, tmp_path):
    for file in public_set.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    np.save(tmp_path / "train_tokens.npy", np.zeros(3, np.uint16))
    with pytest.raises(DataError, match="its card says"):
        open_set(tmp_path)
    (tmp_path / "train_tokens.npy").unlink()
    with pytest.raises(DataError, match="cannot be opened"):
        open_set(tmp_path)
    (tmp_path / "card.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(DataError, match="not a prepared set"):
        open_set(tmp_path)
