"""A text in tokens, and the places in it at which a span may begin or end.

A span never cuts a word: it begins and ends where no two letters, digits or their marks touch.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from flexolmo.data.tokenizer import Tokenizer
from flexolmo.errors import DataError

MAX_TEXT_TOKENS = 16_384  # an answer, not a corpus


@dataclass(frozen=True)
class Words:
    """A text to trace."""

    text: str
    ids: Sequence[int]
    places: Sequence[tuple[int, int]]  # of each id, its first character in `text` and the end
    cuts: Sequence[int]  # ascending: token numbers between words, from 0 to len(ids)

    def characters(self, start: int, end: int) -> tuple[int, int]:
        """First character of tokens [start, end), and the end."""
        return self.places[start][0], self.places[end - 1][1]


def split_words(text: str, tokenizer: Tokenizer) -> Words:
    """`text` as `tokenizer` reads it.

    Raises:
        DataError: more than MAX_TEXT_TOKENS tokens, or text that the tokenizer refuses.
    """
    ids, places = tokenizer.encode_with_places(text)
    if len(ids) > MAX_TEXT_TOKENS:
        raise DataError(
            f"The text to trace has {len(ids):,} tokens; at most {MAX_TEXT_TOKENS:,} are traced "
            "at once. Cut it into parts."
        )
    inner = [k for k in range(1, len(ids)) if _is_between_words(text, places[k - 1], places[k])]
    return Words(text, ids, places, [0, *inner, len(ids)] if ids else [0])


def _is_between_words(text: str, before: tuple[int, int], after: tuple[int, int]) -> bool:
    """True if no word, and no single character, is on both sides of where `after` begins."""
    place = after[0]
    if place < before[1] or not 0 < place < len(text):
        return False
    return not (_is_in_word(text[place - 1]) and _is_in_word(text[place]))


def _is_in_word(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character).startswith("M")
