import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.data.clean import clean_text, split_text

ANY_TEXT = st.text(st.characters() | st.sampled_from("\ufeff\n\r\0\x85 \t\ud800\u0301"))
NOISE = {*map(chr, range(32)), "\x7f", *map(chr, range(0xD800, 0xE000))} - {*"\t\n\v\f\r"}


@given(ANY_TEXT, st.booleans())
def test_cleaning_twice_changes_nothing_more(text, normalise):
    once, replaced = clean_text(text, normalise)
    assert clean_text(once, normalise) == (once, 0)
    assert replaced == sum(c in NOISE for c in text)
    assert not normalise or unicodedata.is_normalized("NFC", once)
    assert "\r" not in once and "\x00" not in once


@pytest.mark.parametrize(
    "text",
    [
        "class A:\n    x = 1\n\n\ndef f():\n\treturn 2",
        "it\x92s 1990\x961995, and so on\x85",
        "\u1780\u17b6\u179a\u200b\u17a2\u17b6\u1793",  # Khmer words, parted by U+200B
        "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \uf900 e\u0301 \u212b",  # not in NFC
        "co\u00adoperate, a\u2060b, a\ufeffb, nai\u0308ve",
        "one line  \nof two, a\tb\t\t\n-- \nAnn",  # a Markdown break, empty cells, a signature
        "Chapter 1 " + "." * 200 + " 7\n" + "=" * 300 + "\n\n\n\n\n\n\n" + "-" * 100,
        "    indented first line",
    ],
)
def test_what_is_not_noise_stays(text):
    assert clean_text(text) == (text, 0)


@pytest.mark.parametrize(
    ("text", "cleaned", "replaced"),
    [
        ("a\0b", "a b", 1),
        ("12\x0034\x0056", "12 34 56", 2),
        ("\x1b[31mred\x1b[0m \x7f", " [31mred [0m  ", 3),
        ("\ufeff\n\na\r\nb\rc\x0cd\u2028e\n\n", "a\nb\nc\nd\ne", 0),
        ("half \ud83d of one", "half   of one", 1),
    ],
)
def test_a_space_stands_for_what_must_go_and_it_is_counted(text, cleaned, replaced):
    assert clean_text(text) == (cleaned, replaced)


def test_normalising_is_asked_for():
    text = "e\u0301  \nb\t\n\n\n\n\n\nc\xa0"
    assert clean_text(text) == (text, 0)
    assert clean_text(text, normalise=True) == ("\xe9\nb\n\n\nc", 0)


@pytest.mark.parametrize(
    "unit", ["\t", " ", "\n", "\r", " \n", "=", "\0", "a", "a ", "\u200b", ". "]
)
def test_cleaning_and_cutting_take_time_in_proportion(unit):
    """Quadratic cleaning took about 4 minutes for this many tabs."""
    started = time.process_time()
    text, _ = clean_text("a" + unit * 300_000 + "b", normalise=True)
    clean_text("a" + unit * 300_000 + "b")
    split_text(text, 50_000)
    assert time.process_time() - started < 5


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
