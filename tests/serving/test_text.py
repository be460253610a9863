"""Text comes in whole characters, all of it, and no stop string is ever seen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.inference.engine import TokenWritten
from flexolmo.serving.text import TextStream


@pytest.fixture(scope="module")
def tokenizer(pico_anchor):
    return pico_anchor.tokenizer


def read(tokenizer, ids, stops=(), before=()):
    """All pieces of the text of `ids`."""
    stream = TextStream(tokenizer.decode, stops, before)
    return [*(stream.add(TokenWritten(token, None)) for token in ids), stream.end()]


def cut(text, stops):
    """What may be shown of `text`, by the definition: all before the first stop string."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


@given(ids=st.lists(st.integers(0, 299), max_size=40))
def test_pieces_of_any_ids_make_their_text(tokenizer, ids):
    pieces = read(tokenizer, ids)
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids)
    assert [shown.event.token for piece in pieces for shown in piece.tokens] == ids


@given(text=st.text(max_size=30), before=st.lists(st.integers(0, 299), max_size=10))
def test_no_piece_of_a_text_has_half_a_character_whatever_stands_before(tokenizer, text, before):
    pieces = read(tokenizer, tokenizer.encode(text), before=before)
    assert "".join(piece.text for piece in pieces) == text
    assert all("\ufffd" not in piece.text for piece in pieces) or "\ufffd" in text


@given(
    text=st.text("abé🙂", max_size=30),
    stops=st.lists(st.text("abé🙂", min_size=1, max_size=4), max_size=4),
)
def test_text_is_cut_before_the_first_stop_string_wherever_tokens_end(tokenizer, text, stops):
    ids = tokenizer.encode(text)
    shown = ""
    for piece in read(tokenizer, ids, stops):
        shown += piece.text
        assert not any(stop in shown for stop in stops)
    # Two stop strings may be completed one after the other; the first completed ends the text.
    assert shown == first_completed(tokenizer, ids, stops)


def first_completed(tokenizer, ids, stops):
    """By brute force: decode ever more ids until a stop string is whole; text before the first."""
    for count in range(len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        if not text.endswith("\ufffd") and any(stop in text for stop in stops):
            return cut(text, stops)
    return tokenizer.decode(ids)


@given(text=st.text("ab ", max_size=40), stop=st.text("ab ", min_size=1, max_size=3))
def test_tokens_are_shown_with_their_text_and_none_of_a_stop_string(tokenizer, text, stop):
    ids = tokenizer.encode(text)
    shown = "".join(piece.text for piece in read(tokenizer, ids, [stop]))
    tokens = [shown for piece in read(tokenizer, ids, [stop]) for shown in piece.tokens]
    assert [t.event.token for t in tokens] == ids[: len(tokens)]
    assert (
        tokenizer.decode(ids[: len(tokens)]) == shown[: len(tokenizer.decode(ids[: len(tokens)]))]
    )
    offsets = [len(tokenizer.decode(ids[:number])) for number in range(len(tokens))]
    assert [t.offset for t in tokens] == offsets
    for piece in read(tokenizer, ids, [stop]):
        for token in piece.tokens:
            end = token.offset + len(tokenizer.decode([token.event.token]))
            assert end <= len(shown)


def test_text_that_cannot_become_a_stop_string_is_given_out_at_once(tokenizer):
    ids = [*tokenizer.encode("a"), *tokenizer.encode("b"), *tokenizer.encode("c")]
    assert [p.text for p in read(tokenizer, ids, ["bx"])] == ["a", "", "bc", ""]


def test_a_tokenizer_that_drops_the_space_before_a_text_keeps_it_before_an_answer():
    words = ["The", " cat", " sat"]

    class Dropping:
        @staticmethod
        def decode(ids):
            return "".join(words[token] for token in ids).removeprefix(" ")

    assert [piece.text for piece in read(Dropping, [1, 2], before=[0])] == [" cat", " sat", ""]
    assert [piece.text for piece in read(Dropping, [1, 2])] == ["cat", " sat", ""]
