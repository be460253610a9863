"""Units of privacy: stretches of an owner's training text, of which one more or less must not show.

NumPy only. A unit is a source document, all text of one key (such as a patient), or a sequence.
Units follow one another in the token stream and cover it.

n units, T positions a model predicts at once, w windows of one unit.
"""

from typing import Literal

import numpy as np

from flexolmo.data.batches import TokenSet
from flexolmo.errors import DataError

Unit = Literal["document", "sequence", "unit"]


def unit_offsets(token_set: TokenSet, unit: Unit, seq_len: int) -> np.ndarray:
    """Places of the first token of each unit of the training text, and the end, int64 [n + 1].

    document: a source document, however many pieces it was cut into; texts of the same words are
    one. unit: all texts of one value of the field that `data prepare --unit-field` named.
    sequence: `seq_len` tokens of a source document, its last ones maybe fewer.

    Raises:
        DataError: units are asked for of a set without, or documents of a set of units.
    """
    field = token_set.card.get("unit_field")
    if unit == "unit" and field is None:
        raise DataError(
            f"{token_set.directory} does not say whom or what its texts are about: prepare it with "
            "--unit-field FIELD, or protect documents."
        )
    if unit == "document" and field is not None:
        raise DataError(
            f"{token_set.directory} holds all texts of one {field!a} together, and no single "
            "document: protect units."
        )
    sources = token_set.splits["train"].source_offsets
    if unit != "sequence":
        return sources
    counts = -(-np.diff(sources) // seq_len)  # sequences of each source document
    firsts = np.repeat(sources[:-1] - seq_len * (np.cumsum(counts) - counts), counts)
    return np.append(firsts + seq_len * np.arange(counts.sum()), sources[-1])


def read_unit(text: np.ndarray, eos_id: int, seq_len: int, drawn: np.ndarray) -> np.ndarray:
    """Windows of one unit's tokens `text` to learn from, int64 [w, T + 1].

    A unit of at most `seq_len` tokens is one window, all of it, after an end of text. Of a longer
    one as many windows as cover it, and no more than the random uint64 `drawn` [.], each of which
    says where one begins.
    """
    ids = np.concatenate([[eos_id], text]).astype(np.int64)
    places = len(ids) - seq_len
    if places <= 1:
        return ids[None]
    starts = drawn[: -(-len(text) // seq_len)] % np.uint64(places)
    return np.stack([ids[start : start + seq_len + 1] for start in starts.astype(int)])
