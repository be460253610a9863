import json
import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.data.batches import TokenSet, open_set
from flexolmo.data.documents import read_documents
from flexolmo.data.prepare import prepare_set
from flexolmo.data.prepared import SPLITS
from flexolmo.data.tokenizer import Tokenizer, load_tokenizer
from flexolmo.errors import ConfigError, DataError
from flexolmo.research.study.splice import (
    JOINT,
    SplicedWindows,
    _Draws,
    cut_pieces,
    load_spliced,
    save_spliced,
    splice_windows,
)
from made_sets import SMALL, write_raw

LETTERS = {"ash": "abcdefg", "birch": "hijklmn", "cedar": "opqrstu", "public": "vwxyzéß世"}
PIECES = (10, 40)
few = settings(max_examples=8)


def _text(name: str, seed: int) -> str:
    """Paragraphs of one to three lines of words in the set's own letters."""
    rng = random.Random(f"{name} {seed}")

    def line() -> str:
        words = (
            "".join(rng.choices(LETTERS[name], k=rng.randint(2, 6)))
            for _ in range(rng.randint(2, 12))
        )
        return " ".join(words) + rng.choice([".", "", '?"', " (!)"])

    return "\n\n".join(
        "\n".join(rng.choice(["", "    "]) + line() for _ in range(rng.randint(1, 3)))
        for _ in range(6)
    )


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, TokenSet]:
    """Four prepared sets of one tokenizer, no letter in common."""
    here = tmp_path_factory.mktemp("spliced")
    some = SMALL.model_copy(update={"validation_share": 0.3, "heldout_share": 0.3})
    for name in ("public", "ash", "birch", "cedar"):
        raw = write_raw(here / name, name, [_text(name, i) for i in range(40)])
        prepare_set(
            raw,
            here / "prepared" / name,
            settings=some,
            public=None if name == "public" else here / "prepared" / "public",
        )
    return {name: open_set(here / "prepared" / name) for name in LETTERS}


@pytest.fixture(scope="module")
def tokenizer(sets) -> Tokenizer:
    return load_tokenizer(sets["public"].directory)


def _splice(
    sets, split="heldout", num_windows=4, seq_len=120, sets_per_window=(2, 3), seed=1
) -> SplicedWindows:
    return splice_windows(
        sets,
        split,
        num_windows=num_windows,
        seq_len=seq_len,
        seed=seed,
        sets_per_window=sets_per_window,
        piece_tokens=PIECES,
    )


def _texts(token_set: TokenSet, split: str) -> str:
    path = token_set.directory / f"{split}.jsonl.zst"
    return "\0".join(document.text for document in read_documents(path))


@few
@given(seed=st.integers(0, 99), seq_len=st.integers(80, 300), split=st.sampled_from(SPLITS))
def test_each_token_belongs_to_the_set_and_the_split_it_names(
    sets, tokenizer, seed, seq_len, split
):
    windows = _splice(sets, split, seq_len=seq_len, seed=seed)
    assert windows.names == sorted(sets)
    for index, window in enumerate(windows):
        assert window.ids.shape == (seq_len + 1,) and window.source.shape == (seq_len,)
        assert window.ids.dtype == window.source.dtype == np.int64
        eos = sets["ash"].eos_id
        assert window.ids[0] == eos and eos not in window.ids[1:]
        pieces = list(windows.pieces(index))
        np.testing.assert_array_equal(np.concatenate([ids for _, ids in pieces]), window.ids[1:])
        for place, (name, ids) in enumerate(pieces):
            text = tokenizer.decode(ids.tolist())
            assert text.startswith(JOINT if place else text.lstrip("\n")) or len(ids) == 1
            text = text.removeprefix(JOINT).rstrip("\ufffd")  # the cut may fall in a character
            assert text in _texts(sets[name], split)
            if place < len(pieces) - 1:
                for other in set(SPLITS) - {split}:
                    assert text not in _texts(sets[name], other)


@few
@given(seed=st.integers(0, 99), least=st.integers(2, 4), more=st.integers(0, 2))
def test_sets_alternate_and_a_window_has_as_many_as_asked(sets, seed, least, more):
    windows = _splice(sets, seq_len=200, sets_per_window=(least, least + more), seed=seed)
    for index, window in enumerate(windows):
        order = [name for name, _ in windows.pieces(index)]
        assert all(a != b for a, b in pairwise(order))
        assert least <= len(set(window.source.tolist())) <= least + more
        counts = [order.count(name) for name in set(order)]
        assert max(counts) - min(counts) <= 1, "sets take turns"


@few
@given(seed=st.integers(0, 99))
def test_pieces_have_the_length_asked_for_and_bytes_add_up(sets, tokenizer, seed):
    windows = _splice(sets, seed=seed)
    for index, window in enumerate(windows):
        *whole, (_, last) = windows.pieces(index)
        texts = [tokenizer.decode(ids.tolist()) for _, ids in whole]
        for text in texts:
            length = len(tokenizer.encode(text.removeprefix(JOINT)))
            assert PIECES[0] <= length <= PIECES[1]
        rest = window.bytes - sum(len(text.encode()) for text in texts)
        longest = max(len(tokenizer.decode([i]).encode()) for i in range(tokenizer.vocab_size))
        assert 0 <= rest <= longest * len(last)
        whole_text = "".join(texts)
        together = tokenizer.encode(whole_text)
        assert together == window.ids[1 : 1 + len(together)].tolist(), "reads as one text"


def test_a_window_that_ends_with_a_piece_has_its_exact_bytes(sets, tokenizer):
    window = _splice(sets, num_windows=1, seq_len=150)
    whole = sum(len(ids) for _, ids in list(window.pieces(0))[:-1])
    shorter = _splice(sets, num_windows=1, seq_len=whole)[0]
    np.testing.assert_array_equal(shorter.ids, window[0].ids[: whole + 1])
    assert shorter.bytes == len(tokenizer.decode(shorter.ids[1:].tolist()).encode())


def test_a_paragraph_comes_again_only_when_its_set_is_used_up(sets, tokenizer):
    windows = _splice(sets, num_windows=150)
    used: dict[str, list[str]] = {name: [] for name in sets}
    for index in range(len(windows)):
        pieces = [
            (name, tokenizer.decode(ids.tolist()).removeprefix(JOINT))
            for name, ids in windows.pieces(index)
        ]
        assert len(set(pieces)) == len(pieces), "never twice in one window"
        for place, (name, text) in enumerate(pieces):
            used[name].append(text if place < len(pieces) - 1 else "cut off")
    repeats = 0
    for name, texts in used.items():
        supply = {
            piece
            for document in read_documents(sets[name].directory / "heldout.jsonl.zst")
            for piece in cut_pieces(document.text, tokenizer, PIECES)
        }
        assert len(texts) > len(supply), "every set was used up"
        first = [text for text in texts[: len(supply)] if text != "cut off"]
        assert len(set(first)) == len(first) and set(first) <= supply
        repeats += len(texts) - len(supply)
    assert sum(window.num_repeats for window in windows) == repeats
    assert windows[0].num_repeats == 0


def test_a_paragraph_that_many_documents_share_comes_once(sets, tokenizer, tmp_path):
    shared = "abc def gab cde fga bcd efg."
    raw = write_raw(tmp_path, "oak", [f"{_text('ash', i)}\n\n{shared}" for i in range(99, 119)])
    prepare_set(raw, tmp_path / "oak", settings=SMALL, public=sets["public"].directory)
    windows = _splice(
        {"oak": open_set(tmp_path / "oak"), "birch": sets["birch"]},
        "train",
        num_windows=200,
        sets_per_window=(2, 2),
    )
    fresh = [tokenizer.decode(window.ids.tolist()) for window in windows if not window.num_repeats]
    assert len(fresh) < len(windows) and sum(text.count(shared) for text in fresh) == 1


def test_the_same_seed_gives_the_same_windows_and_another_does_not(sets):
    one, two, three = _splice(sets), _splice(dict(reversed(sets.items()))), _splice(sets, seed=2)
    assert one.card == two.card != three.card
    for a, b, c in zip(one, two, three, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.source, b.source)
        assert a.bytes == b.bytes and a.ids.tolist() != c.ids.tolist()
    more = _splice(sets, num_windows=6)
    np.testing.assert_array_equal(more[3].ids, one[3].ids)


def test_draws_are_the_same_in_every_version_of_numpy():
    draws = _Draws(7, 1)
    assert (draws.order(6), [draws.below(10) for _ in range(6)]) == GOLDEN


GOLDEN = ([1, 4, 3, 2, 5, 0], [3, 0, 9, 1, 0, 1])


@given(
    st.text(st.sampled_from('ab .!?\n"世'), max_size=400), st.integers(1, 12), st.integers(0, 30)
)
def test_pieces_are_stretches_of_their_text_in_order(tokenizer, text, least, more):
    place = 0
    for piece in cut_pieces(text, tokenizer, (least, least + more)):
        place = text.index(piece, place) + len(piece)
        assert least <= len(tokenizer.encode(piece)) <= least + more


def test_pieces_end_where_a_reader_pauses(tokenizer):
    prose = " ".join(["This is it."] * 12)
    verse = "\n".join(["    a line of verse"] * 6)
    cut = list(
        cut_pieces(
            f"Head\n\nA whole paragraph here.\n\n\n{prose}\n\n{verse}\n\nlost", tokenizer, PIECES
        )
    )
    assert cut[0].startswith("Head\n\nA whole")
    assert [piece for piece in cut if not piece.endswith((".", "verse"))] == []
    assert any(piece.startswith("    a line") for piece in cut), "indentation is kept"
    assert list(cut_pieces("x" * 500, tokenizer, PIECES)) == [], "no pause, no piece"


def test_what_is_loaded_is_what_was_saved(sets, tokenizer, tmp_path):
    windows = _splice(sets)
    save_spliced(windows, tmp_path / "mixed.npz")
    for given_sets in (None, sets):
        loaded = load_spliced(tmp_path / "mixed.npz", given_sets)
        assert loaded.card == windows.card and len(loaded) == len(windows)
        for a, b in zip(windows, loaded, strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)
            np.testing.assert_array_equal(a.source, b.source)
            assert (a.bytes, a.num_repeats) == (b.bytes, b.num_repeats)
        assert loaded.marked_text(0, tokenizer) == windows.marked_text(0, tokenizer)
    assert windows.marked_text(0, tokenizer).count("[") == len(list(windows.pieces(0)))


def test_windows_of_other_sets_are_refused(sets, tmp_path):
    save_spliced(_splice(sets), tmp_path / "mixed.npz")
    changed = replace(sets["birch"], card=sets["birch"].card | {"recipe": "other"})
    for others, named in (
        ({**sets, "birch": changed}, "birch"),
        ({k: v for k, v in sets.items() if k != "ash"}, "ash"),
        ({**sets, "oak": changed}, "oak"),
    ):
        with pytest.raises(DataError, match=f"other sets: {named} differ"):
            load_spliced(tmp_path / "mixed.npz", others)


@pytest.mark.parametrize(
    "change",
    [
        {"ids": np.zeros((4, 5), np.int64)},
        {"source": np.full((4, 120), 4)},
        {"source": np.zeros((4, 120))},
        {"bytes": np.zeros(3, np.int64)},
        {"seq_len": 119},
        {"format": "other"},
        {"num_repeats": None},
        {"ids": np.full((4, 121), -1)},
        {"bytes": np.array([{}] * 4, object)},
        {"card": np.zeros(3, np.uint8)},
    ],
    ids=str,
)
def test_a_file_that_does_not_fit_is_refused(sets, tmp_path, change):
    path = tmp_path / "mixed.npz"
    save_spliced(_splice(sets), path)
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    card = json.loads(arrays["card"].tobytes())
    for key, value in change.items():
        if key in arrays:
            arrays[key] = value
        else:
            arrays["card"] = np.frombuffer(json.dumps(card | {key: value}).encode(), np.uint8)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(DataError, match="does not hold spliced windows"):
        load_spliced(path)


def test_a_damaged_or_missing_file_is_refused(sets, tmp_path):
    path = tmp_path / "mixed.npz"
    save_spliced(_splice(sets), path)
    whole = path.read_bytes()
    for damaged in (
        whole[:100],
        whole[: len(whole) // 2],
        b"",
        b"\x00" + whole[1:],
        whole[:900] + bytes([whole[900] ^ 255]) + whole[901:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="does not hold"):
            load_spliced(path)
    with pytest.raises(DataError, match="does not hold"):
        load_spliced(tmp_path / "none.npz")
    np.savez(path, card=np.frombuffer(b"[" * 9999, np.uint8))
    with pytest.raises(DataError, match=r"does not hold .* nested more than"):
        load_spliced(path)


@pytest.mark.parametrize(
    "change",
    [
        {"num_windows": 0},
        {"sets_per_window": (1, 2)},
        {"sets_per_window": (3, 2)},
        {"sets_per_window": (5, 6)},
        {"seq_len": 79},
    ],
    ids=str,
)
def test_settings_no_window_can_meet_are_refused(sets, change):
    with pytest.raises(ConfigError, match="expected"):
        _splice(sets, **change)


def test_too_little_text_other_tokenizers_and_changed_text_are_refused(sets, tmp_path):
    with pytest.raises(DataError, match="paragraphs fit; one window may need"):
        _splice(sets, seq_len=40_000)
    tokenizer = sets["ash"].card["tokenizer"] | {"digest": "sha256:other"}
    other = replace(sets["ash"], card=sets["ash"].card | {"tokenizer": tokenizer})
    with pytest.raises(DataError, match="was prepared with the tokenizer"):
        _splice({**sets, "ash": other})
    for file in sets["ash"].directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "heldout.jsonl.zst").write_bytes(b"")
    with pytest.raises(DataError, match=r"not the file that card\.json describes"):
        _splice({**sets, "ash": open_set(tmp_path)})
