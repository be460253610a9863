import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from flexolmo.data.clean import clean_text, split_text


@given(st.text())
def test_cleaning_twice_changes_nothing_more(text):
    once = clean_text(text)
    assert clean_text(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert "\r" not in once and "\x00" not in once


def test_indentation_and_two_blank_lines_stay():
    code = "class A:\n    x = 1\n\n\ndef f():\n\treturn 2"
    assert clean_text(code) == code


def test_empty_stretches_rulers_and_unseen_characters_go():
    assert clean_text("\ufeff\na\u200bb  \r\n\n\n\n\n\nc\x0cd\n" + "=" * 300) == (
        "ab\n\n\nc\nd\n" + "=" * 79
    )


@given(st.text("ab é\n", max_size=400), st.integers(4, 60))
def test_pieces_fit_and_lose_only_pauses(text, max_bytes):
    pieces = split_text(text, max_bytes)
    if len(text.encode()) <= max_bytes:
        assert pieces == [text]
    else:
        assert all(len(piece.encode()) <= max_bytes for piece in pieces)
        assert "".join("".join(pieces).split()) == "".join(text.split())


def test_long_text_is_cut_at_blank_lines_first():
    assert split_text("aaaa\nbb\n\ncccc\n\ndddd", 14) == ["aaaa\nbb\n\ncccc", "dddd"]
