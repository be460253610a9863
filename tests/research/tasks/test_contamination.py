"""Overlaps against a search of every n-gram in every document, and what the counts mean."""

import json
import random
import re
import weakref
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.data.documents import Document
from flexolmo.errors import ConfigError, DataError
from flexolmo.progress import Meter
from flexolmo.research.tasks import contamination as room
from flexolmo.research.tasks.contamination import find_overlaps

FREQUENT = settings(derandomize=True, max_examples=120)
WORDS = [f"w{i}" for i in range(1000)]


def as_written(rng, words):
    """`words` with capitals, punctuation and spaces as they may come."""
    pieces = [rng.choice([str.upper, str.lower, str.title])(w) for w in words]
    return "".join(w + rng.choice([" ", ", ", "\n", " -- ", "_", "'", "… "]) for w in pieces)


@st.composite
def corpora(draw):
    """Items of two tasks and documents patched together from them, with a word here and there."""
    rng = random.Random(draw(st.integers(0, 10**6)))
    vocabulary = WORDS[: draw(st.sampled_from([1, 2, 6, 40]))]
    items = [
        (rng.choice(["arc", "boolq"]), f"{i}", rng.choices(vocabulary, k=rng.randint(0, 14)))
        for i in range(draw(st.integers(1, 8)))
    ]
    documents = []
    for _ in range(draw(st.integers(0, 5))):
        words = []
        for _ in range(rng.randint(0, 6)):
            source = rng.choice(items)[2]
            start = rng.randint(0, len(source))
            words += source[start : start + rng.randint(0, 14)] + ["other"] * rng.randint(0, 1)
        documents.append(words)
    return (
        [(task, name, as_written(rng, words)) for task, name, words in items],
        [Document(as_written(rng, w), "made", f"d{i}") for i, w in enumerate(documents)],
    )


def every_gram(text, n):
    words = re.sub(r"[\W_]+", " ", text).lower().split()
    length = min(n, len(words))
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)], len(words)


def search_all(items, documents, n, template_items):
    """What `find_overlaps` should say, by item: share and documents; and tasks' counts."""
    own, counts = {}, {}
    for task, name, text in items:
        grams, length = every_gram(text, n)
        count = counts.setdefault(task, {"items": 0, "too_short": 0, "only_template": 0})
        count["items"] += 1
        if length < min(n, 8):
            count["too_short"] += 1
        else:
            own[task, name] = set(grams)
    hits = {}
    for (task, name), grams in own.items():
        kept = {
            g
            for g in grams
            if sum(g in other for (t, _), other in own.items() if t == task) <= template_items
        }
        counts[task]["only_template"] += not kept
        found, where = set(), []
        for document in documents:
            held = {g for g in kept if g in every_gram(document.text, len(g))[0]}
            found |= held
            where += [document.id] * bool(held)
        if where:
            hits[task, name] = (len(found) / len(kept), where)
    return counts, hits


@FREQUENT
@given(
    corpus=corpora(),
    n=st.sampled_from([1, 2, 5, 9, 13]),
    template_items=st.integers(1, 4),
    sizes=st.sampled_from([(1, 1), (20, 6), (1 << 20, 15), (1 << 20, 1 << 18)]),
)
def test_overlaps_are_those_of_a_search_of_everything(corpus, n, template_items, sizes):
    items, documents = corpus
    with patch.multiple(room, _PIECE_CHARACTERS=sizes[0], _BATCH_WORDS=sizes[1]):
        found = find_overlaps(iter(items), iter(documents), n=n, template_items=template_items)
    counts, hits = search_all(items, documents, n, template_items)
    assert set(found.tasks) == set(counts)
    for task, count in counts.items():
        assert {name: getattr(found.tasks[task], name) for name in count} == count
        assert list(found.tasks[task].hits) == [name for t, name in hits if t == task]
        for name, hit in found.tasks[task].hits.items():
            share, where = hits[task, name]
            assert hit.share == pytest.approx(share)
            assert (hit.num_documents, hit.documents) == (len(where), where[:5])
            text = next(t for *key, t in items if key == [task, name])
            assert tuple(hit.example.split()) in every_gram(text, n)[0]
    named = [d.id for d in documents if any(d.id in where for _, where in hits.values())]
    assert found.contaminated_documents() == named
    for name, document in found.documents.items():
        shares = [share for share, where in hits.values() if name in where]
        assert (document.items, document.largest_share) == (len(shares), pytest.approx(max(shares)))
    assert found.num_documents == len(documents)
    assert found.read_bytes == sum(len(d.text.encode()) for d in documents)


def sentence(first, last):
    return " ".join(WORDS[first:last])


def test_thirteen_words_in_a_row_are_needed_and_enough():
    items = [("arc", "q", sentence(0, 20))]
    for length, is_hit in ((12, False), (13, True)):
        document = Document("so " + sentence(3, 3 + length) + " there", "made", "d")
        assert bool(find_overlaps(items, [document]).documents) == is_hit


def test_a_short_item_is_sought_whole_and_a_very_short_one_not_at_all():
    items = [("nq", "eight", sentence(0, 8)), ("nq", "seven", sentence(0, 7))]
    found = find_overlaps(items, [Document(sentence(0, 8), "made", "d")]).tasks["nq"]
    assert (found.items, found.too_short, list(found.hits)) == (2, 1, ["eight"])
    assert find_overlaps(items, [Document(sentence(0, 7), "made", "d")]).documents == {}


def test_what_many_items_of_a_task_share_is_template_in_that_task_only():
    shared = sentence(500, 513)
    items = [("bbh", f"{i}", f"{shared} {sentence(20 * i, 20 * i + 13)}") for i in range(11)]
    items += [("bbh", "bare", shared), ("arc", "q", shared)]
    found = find_overlaps(items, [Document(shared, "made", "d")])
    assert list(found.tasks["arc"].hits) == ["q"] and not found.tasks["bbh"].hits
    assert found.tasks["bbh"].only_template == 1
    # one n-gram of 14 in each of 11 items, and the only one of "bare"
    assert found.tasks["bbh"].template_share == pytest.approx(12 / (11 * 14 + 1))
    assert (
        len(
            find_overlaps(items, [Document(shared, "made", "d")], template_items=12)
            .tasks["bbh"]
            .hits
        )
        == 12
    )


def test_other_writings_of_the_same_words_are_found():
    items = [("drop", "q", "The café's ﬁrst owner, 12 years old, didn't sell “more” than 3.5")]
    text = "the CAFE\u0301’S first owner (12 years old) didn’t sell 'more' than 3.5!"
    assert find_overlaps(items, [Document(text, "made", "d")]).tasks["drop"].hits["q"].share == 1


def test_n_grams_do_not_reach_from_document_to_document():
    items = [("arc", "q", sentence(0, 13))]
    halves = [Document(sentence(0, 6), "made", "a"), Document(sentence(6, 13), "made", "b")]
    assert find_overlaps(items, halves).documents == {}


def test_a_find_at_the_end_of_a_batch_is_its_own_document_s(monkeypatch):
    monkeypatch.setattr(room, "_BATCH_WORDS", 10)
    documents = [Document(sentence(0, 8), "made", "a"), Document("clean", "made", "b")]
    assert find_overlaps([("nq", "q", sentence(0, 8))], documents).contaminated_documents() == ["a"]


def test_documents_keep_their_order_whatever_is_found_first():
    items = [("nq", "short", sentence(0, 8)), ("arc", "long", sentence(20, 40))]
    documents = [Document(sentence(20, 40), "made", "b"), Document(sentence(0, 8), "made", "a")]
    assert find_overlaps(items, documents).contaminated_documents() == ["b", "a"]


def test_documents_can_be_told_by_how_much_of_an_item_they_are_about():
    items = [("arc", "whole", sentence(0, 40)), ("arc", "line", sentence(100, 140))]
    documents = [
        Document(sentence(0, 40), "made", "copy"),
        Document(sentence(100, 113), "made", None),
        Document("clean", "made", "clean"),
    ]
    found = find_overlaps(items, documents)
    assert found.contaminated_documents() == ["copy", "#2"]
    assert found.contaminated_documents(least_share=0.5) == ["copy"]


def test_the_result_is_json():
    items = [("arc", "q", sentence(0, 14)), ("nq", "short", "why")]
    found = find_overlaps(items, [Document(sentence(0, 13), "made", "d")]).to_json()
    assert (
        json.loads(json.dumps(found))
        == found
        == {
            "n": 13,
            "template_items": 10,
            "num_documents": 1,
            "read_bytes": 41,
            "tasks": {
                "arc": {
                    "items": 1,
                    "too_short": 0,
                    "only_template": 0,
                    "template_share": 0.0,
                    "items_hit": 1,
                    "hits": {
                        "q": {
                            "example": sentence(0, 13),
                            "share": 0.5,
                            "num_documents": 1,
                            "documents": ["d"],
                        }
                    },
                },
                "nq": {
                    "items": 1,
                    "too_short": 1,
                    "only_template": 0,
                    "template_share": 0.0,
                    "items_hit": 0,
                    "hits": {},
                },
            },
            "documents": {"d": {"items": 1, "largest_share": 0.5}},
        }
    )


def test_documents_are_not_held_and_are_counted_as_they_go():
    alive = weakref.WeakSet()

    def stream():
        for i in range(50):
            document = Document(sentence(i, i + 30), "made", f"d{i}")
            alive.add(document)
            yield document
            assert len(alive) <= 2

    meter = Meter("Looking", 50, "documents", 0)
    found = find_overlaps([("arc", "q", sentence(0, 13))], stream(), meter=meter)
    assert (meter.done, found.num_documents) == (50, 50)


def test_what_cannot_be_looked_for_is_refused():
    with pytest.raises(DataError, match="No item found"):
        find_overlaps([], [])
    with pytest.raises(DataError, match="Task arc has item q twice"):
        find_overlaps([("arc", "q", "a"), ("nq", "q", "a"), ("arc", "q", "b")], [])
    with pytest.raises(ConfigError, match="n 0"):
        find_overlaps([("arc", "q", "a")], [], n=0)
