import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.data.batches import (
    TokenSet,
    TokenSplit,
    embedding_windows,
    evaluation_windows,
    open_set,
    training_batches,
)
from flexolmo.data.prepared import PARTS, SPLITS, read_card
from flexolmo.errors import DataError
from flexolmo.files import digest_file, write_json

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
        np.arange(len(lengths)),
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


@pytest.fixture
def copied_set(public_set, tmp_path):
    """A prepared set to do damage to."""
    return Path(shutil.copytree(public_set, tmp_path / "set"))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("part", PARTS)
def test_a_changed_shard_is_refused(copied_set, split, part):
    """Training on other text than the card names would sign a lie."""
    file = copied_set / f"{split}_{part}.npy"
    array = np.load(file)
    array[len(array) // 2] ^= 1
    np.save(file, array)
    with pytest.raises(DataError, match=f"{file.name} is not the file that card.json describes"):
        open_set(copied_set)
    file.unlink()
    with pytest.raises(DataError, match=f"{file.name} cannot be opened"):
        open_set(copied_set)


def _sign_again(copied_set, **arrays):
    """Replace arrays, and bring the card in line with the files."""
    card = read_card(copied_set)
    for name, array in arrays.items():
        np.save(copied_set / f"{name}.npy", array)
        card["files"][f"{name}.npy"]["digest"] = digest_file(copied_set / f"{name}.npy")
    write_json(copied_set / "card.json", card)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train_tokens", lambda a: a[:-1], "the card says"),
        ("train_tokens", lambda a: np.where(np.arange(len(a)) == 1, 300, a), "300 is not below"),
        ("train_tokens", lambda a: np.ones_like(a), "ends with"),
        ("train_bytes", lambda a: a + 1, "the card says"),
        ("train_offsets", lambda a: a[:-1], "same documents"),
        ("train_offsets", lambda a: np.concatenate([a[:-1], a[-2:-1]]), "do not cover"),
        ("train_offsets", lambda a: np.concatenate([a[:1], a[2:0:-1], a[3:]]), "do not rise"),
        ("train_sources", lambda a: a[1:], "same documents"),
        ("train_sources", lambda a: a[::-1], "do not rise by one"),
        ("train_sources", lambda a: a * 2, "do not rise by one"),
    ],
)
def test_shards_that_contradict_each_other_are_refused(copied_set, name, change, message):
    _sign_again(copied_set, **{name: change(np.load(copied_set / f"{name}.npy"))})
    with pytest.raises(DataError, match=message):
        open_set(copied_set)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a prepared set"),
        ({"splits": {}}, r"lacks these files: none"),
        ({"files": {}}, r"lacks these files: train\.jsonl\.zst"),
        ({"tokenizer": []}, r"card\.json, tokenizer"),
        ({"name": 3}, r"card\.json, name"),
    ],
)
def test_a_card_that_lacks_something_is_refused(copied_set, change, message):
    card = read_card(copied_set)
    write_json(copied_set / "card.json", card | change)
    with pytest.raises(DataError, match=message):
        open_set(copied_set)


def test_windows_for_an_embedding_fit_the_model(public_set):
    windows = list(embedding_windows(open_set(public_set), 33, count=5))
    assert [w.shape for w in windows] == [(1, 32)] * 5
