import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from flexolmo.data.batches import TokenSet, open_set
from flexolmo.data.prepare import prepare_set
from flexolmo.data.tokenizer import load_tokenizer
from flexolmo.errors import ConfigError, DataError
from flexolmo.research.rivals.proxy import Proxy, load_proxy, save_proxy, select_proxy
from made_sets import SMALL, write_raw

TOPICS = {
    topic: words.split()
    for topic, words in {
        "garden": "rose tulip spade soil seed hedge lawn moss fern pruning compost bulb",
        "harbour": "ship crane quay rope tide anchor cargo pilot buoy mast sail dock",
        "common": "the of and to in that it was for on with as at by from",
    }.items()
}


def _text(topic: str, seed: int) -> str:
    """90 words, half of them of the topic."""
    rng = random.Random(f"{topic} {seed}")
    return " ".join(
        rng.choice(TOPICS[topic if rng.random() < 0.5 else "common"]) for _ in range(90)
    )


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, TokenSet]:
    """An owner of garden text, and a public set on harbours with a few garden texts."""
    here = tmp_path_factory.mktemp("proxy")
    texts = {
        "public": [_text("garden" if i % 10 == 0 else "harbour", i) for i in range(120)],
        "gardener": [_text("garden", 1000 + i) for i in range(40)],
    }
    for name, some in texts.items():
        raw = write_raw(here / name, name, some)
        prepare_set(
            raw,
            here / "prepared" / name,
            settings=SMALL.model_copy(update={"max_document_bytes": 5000}),
            public=None if name == "public" else here / "prepared" / "public",
        )
    return {name: open_set(here / "prepared" / name) for name in texts}


def _select(sets, tokens=400, piece_tokens=60, **options):
    return select_proxy(
        sets["gardener"], sets["public"], tokens=tokens, piece_tokens=piece_tokens, **options
    )


@pytest.fixture(scope="module")
def proxy(sets) -> Proxy:
    return _select(sets)


@pytest.fixture
def saved(proxy, tmp_path) -> Path:
    """A file with `proxy`."""
    save_proxy(proxy, tmp_path / "proxy.json")
    return tmp_path / "proxy.json"


def _is_garden(text: str) -> bool:
    words = text.split()
    return sum(word in TOPICS["garden"] for word in words) > sum(
        word in TOPICS["harbour"] for word in words
    )


def test_the_public_text_most_like_the_owners_is_chosen(sets, proxy):
    tokenizer = load_tokenizer(sets["public"].directory)
    assert all(_is_garden(tokenizer.decode(ids.tolist())) for ids in proxy.ids)
    assert proxy.accuracy > 0.8 and proxy.scores is not None
    assert (proxy.owner, proxy.owner_digest) == ("gardener", sets["gardener"].digest)


def test_the_pieces_are_of_the_public_train_split_in_order_and_as_many_as_asked(sets):
    split = sets["public"].splits["train"]
    for tokens in (1, 59, 400, 2000, len(split.tokens) - 1):
        proxy = _select(sets, tokens=tokens)
        assert len(proxy.pieces) == len(proxy.ids) == len(proxy.scores)
        sizes = [len(ids) for ids in proxy.ids]
        whole = len(split.tokens) - split.num_documents
        assert min(tokens, whole) <= proxy.num_tokens == sum(sizes) < tokens + max(sizes)
        assert max(sizes) <= 60
        for (document, start, end), ids in zip(proxy.pieces.tolist(), proxy.ids, strict=True):
            np.testing.assert_array_equal(split.document(document)[start:end], ids)
        assert all(a < b for a, b in pairwise(proxy.pieces.tolist()))


def test_fewer_tokens_are_the_best_of_more(sets):
    few, many = _select(sets, tokens=200), _select(sets, tokens=900)
    chosen = {
        tuple(piece): score for piece, score in zip(many.pieces.tolist(), many.scores, strict=True)
    }
    assert {tuple(piece) for piece in few.pieces.tolist()} <= chosen.keys()
    left_out = [score for piece, score in chosen.items() if list(piece) not in few.pieces.tolist()]
    assert few.scores.min() >= max(left_out)


class _Unread(dict):
    """Splits of which the held-out one must not be looked at."""

    def __getitem__(self, split):
        assert split != "heldout"
        return super().__getitem__(split)


def test_held_out_text_is_never_read_and_validation_text_does_not_choose(sets, proxy):
    careful = {name: replace(one, splits=_Unread(one.splits)) for name, one in sets.items()}
    np.testing.assert_array_equal(_select(careful).pieces, proxy.pieces)
    swapped = {
        name: replace(one, splits={**one.splits, "validation": one.splits["train"]})
        for name, one in sets.items()
    }
    np.testing.assert_array_equal(_select(swapped).pieces, proxy.pieces)


def test_no_public_text_is_ranked_by_a_classifier_that_was_told_it_is_public(sets):
    """An embedder that knows texts by heart finds nothing to tell unseen ones by."""
    places: dict[str, int] = {}

    def by_heart(texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), 2000))
        for row, text in zip(rows, texts, strict=True):
            row[places.setdefault(text, len(places))] = 1
        return rows

    split = sets["public"].splits["train"]
    for max_pieces in (4000, 30):
        proxy = _select(sets, tokens=len(split.tokens) - 1, embed=by_heart, max_pieces=max_pieces)
        halves = proxy.pieces[:, 0] >= split.num_documents // 2
        for half in (halves, ~halves):
            np.testing.assert_allclose(proxy.scores[half], proxy.scores[half][0])


def test_an_embedder_can_take_the_place_of_words(sets):
    def embed(texts: Sequence[str]) -> np.ndarray:
        return np.array([[text.count("ro"), text.count("sh")] for text in texts], float)

    proxy = _select(sets, embed=embed)
    tokenizer = load_tokenizer(sets["public"].directory)
    garden = [_is_garden(tokenizer.decode(ids.tolist())) for ids in proxy.ids]
    assert np.mean(garden) > 0.3, "a tenth by chance"
    assert _select(sets, embed=lambda texts: np.ones((len(texts), 1))).accuracy == 0.5


def test_what_leaves_the_house_is_the_choice_and_two_digests(sets, proxy, saved):
    written = json.loads(saved.read_text())
    assert set(written) == {
        "format",
        "owner",
        "owner_digest",
        "public_digest",
        "accuracy",
        "pieces",
    }
    loaded = load_proxy(saved, sets["public"])
    assert loaded.scores is None
    assert (loaded.owner, loaded.owner_digest, loaded.public_digest, loaded.accuracy) == (
        proxy.owner,
        proxy.owner_digest,
        proxy.public_digest,
        proxy.accuracy,
    )
    np.testing.assert_array_equal(loaded.pieces, proxy.pieces)
    for a, b in zip(loaded.ids, proxy.ids, strict=True):
        np.testing.assert_array_equal(a, b)
    first = saved.read_bytes()
    save_proxy(_select(sets), saved)
    assert saved.read_bytes() == first


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [[0, 0, 10**9]],
        [[10**9, 0, 1]],
        [[-1, 0, 1]],
        [[0, -1, 1]],
        [[0, 5, 5]],
        [[0, 0, 1.0]],
        [[0, 0, True]],
        [[0, 1]],
        [[1, 0, 5], [0, 0, 5]],
        [[0, 0, 5], [0, 0, 5]],
        [[0, 0, 5], [0, 4, 9]],
        ["abc"],
        [None],
    ],
    ids=str,
)
def test_pieces_the_public_set_does_not_have_are_refused(sets, saved, pieces):
    written = json.loads(saved.read_text())
    saved.write_text(json.dumps(written | {"pieces": pieces}))
    with pytest.raises(DataError, match="not stretches of the"):
        load_proxy(saved, sets["public"])


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"accuracy": float("nan")},
        {"accuracy": "1"},
        {"owner": 3},
        {"more": 1},
        {"pieces": {}},
    ],
    ids=str,
)
def test_a_file_that_is_no_proxy_is_refused(sets, saved, change):
    written = json.loads(saved.read_text())
    for content in (written | change, [written], 3):
        saved.write_text(json.dumps(content))
        with pytest.raises(DataError, match="not a proxy file"):
            load_proxy(saved, sets["public"])


def test_a_proxy_of_another_public_set_is_refused(sets, saved):
    with pytest.raises(DataError, match="chosen from the public set"):
        load_proxy(saved, sets["gardener"])


@pytest.mark.parametrize(
    "change", [{"tokens": 0}, {"tokens": 10**9}, {"piece_tokens": 0}, {"max_pieces": 0}], ids=str
)
def test_sizes_that_cannot_be_are_refused(sets, change):
    with pytest.raises(ConfigError, match="expected at least 1 each"):
        _select(sets, **change)


def test_another_tokenizer_is_refused(sets):
    tokenizer = sets["gardener"].card["tokenizer"] | {"digest": "sha256:other"}
    other = replace(sets["gardener"], card=sets["gardener"].card | {"tokenizer": tokenizer})
    with pytest.raises(DataError, match="but public has sha256"):
        _select({**sets, "gardener": other})


def test_scikit_learn_is_imported_only_when_needed():
    code = "import sys, flexolmo.research.rivals.proxy; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
