"""Mixed documents: windows spliced from paragraphs of several sets.

On text of one kind, one right model is hard to beat; here no single choice is right for a whole
window. Every paragraph comes from a document of the split asked for. Knows nothing of models.

Letters: T positions a model predicts at once, W windows.
"""

import itertools
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo.data.batches import TokenSet
from flexolmo.data.documents import read_documents
from flexolmo.data.prepared import check_file
from flexolmo.data.tokenizer import Tokenizer, load_tokenizer
from flexolmo.errors import ConfigError, DataError
from flexolmo.files import canonical_json, parse_json, write_aside

FORMAT = "flexolmo-spliced-windows-1"
JOINT = "\n\n"
_BLANK_LINE = re.compile(r"\n{2,}")
_LINE_END = re.compile(r"\n")
_SENTENCE_END = re.compile(r"(?<=[.!?]) +|(?<=[.!?][\"'”’)\]]) +")


@dataclass(frozen=True)
class SplicedWindow:
    """One mixed document."""

    ids: np.ndarray  # int64 [T + 1]: the eos, context only, then the tokens to predict
    source: np.ndarray  # int64 [T]: whose each predicted token is, a place in the sorted names
    bytes: int  # UTF-8 bytes of text the predicted tokens stand for
    num_repeats: int  # pieces of it that were used before


class SplicedWindows(list[SplicedWindow]):
    """Windows, and `card`: what made them (arguments; digests of sets by name, and tokenizer)."""

    def __init__(self, windows: Iterable[SplicedWindow], card: dict[str, Any]):
        super().__init__(windows)
        self.card = card

    @property
    def names(self) -> list[str]:
        """Names of the sets, in the order in which `source` counts them."""
        return sorted(self.card["sets"])

    def pieces(self, index: int) -> Iterator[tuple[str, np.ndarray]]:
        """(set's name, ids) of each piece of one window; all but the first open with a joint."""
        window = self[index]
        starts = 1 + np.flatnonzero(np.diff(window.source))
        for places in np.split(np.arange(len(window.source)), starts):
            yield self.names[window.source[places[0]]], window.ids[1 + places]

    def marked_text(self, index: int, tokenizer: Tokenizer) -> str:
        """One window for a person to read: each piece below its set's name in brackets."""
        return JOINT.join(
            f"[{name}]\n" + tokenizer.decode(ids.tolist()).removeprefix(JOINT)
            for name, ids in self.pieces(index)
        )


def splice_windows(
    sets: Mapping[str, TokenSet],
    split: str,
    *,
    num_windows: int,
    seq_len: int,
    sets_per_window: tuple[int, int] = (2, 4),
    piece_tokens: tuple[int, int] = (48, 160),
    seed: int,
) -> SplicedWindows:
    """`num_windows` windows that read like a report quoting from several places.

    A window draws its sets; the next piece is always of one with fewest pieces so far, and never
    of the set before. A blank line joins pieces and counts to the one it opens. The last is cut
    at the window's end; its bytes are shared by tokens.

    No paragraph comes twice until its set is used up; the set then starts over in the same
    order, and `num_repeats` tells. The same arguments give the same windows on any machine.

    Args:
        sets_per_window: least and most; fewer `sets`, or a window short of room, lower the most.
        piece_tokens: least and most; see `cut_pieces`.
    Raises:
        ConfigError: settings that no window can meet.
        DataError: sets of several tokenizers, a changed text file, too few paragraphs.
    Source: ours.
    """
    names = sorted(sets)
    (fewest, most), (shortest, longest) = sets_per_window, piece_tokens
    if not (num_windows >= 1 and 2 <= fewest <= most and fewest <= len(names)):
        raise ConfigError(
            f"{num_windows} windows of {fewest} to {most} sets each were asked for, "
            f"from {len(names)} sets; expected at least one of at least two."
        )
    if not (1 <= shortest <= longest and fewest * longest <= seq_len):
        raise ConfigError(
            f"piece_tokens is {piece_tokens} with seq_len {seq_len}; expected 1 <= least <= most "
            f"<= seq_len / {fewest}, so that {fewest} pieces have room."
        )
    tokenizer = load_tokenizer(sets[names[0]].directory)
    for name in names:
        sets[name].check_tokenizer(tokenizer.digest, names[0])
    most_of_one_set = (-(-seq_len // shortest) + 1) // 2  # so that no window repeats itself
    supplies = []
    for place, name in enumerate(names):
        pieces = _read_pieces(sets[name], split, tokenizer, piece_tokens)
        if len(pieces) < most_of_one_set:
            raise DataError(
                f"{name}, split {split}: {len(pieces)} paragraphs fit; one window "
                f"may need {most_of_one_set}. Give more text, or lower seq_len."
            )
        supplies.append(_supply([pieces[i] for i in _Draws(seed, 1 + place).order(len(pieces))]))
    card = {
        "format": FORMAT,
        "sets": {name: sets[name].digest for name in names},
        "tokenizer": tokenizer.digest,
        "split": split,
        "seq_len": seq_len,
        "sets_per_window": [fewest, most],
        "piece_tokens": [shortest, longest],
        "seed": seed,
    }
    draws = _Draws(seed, 0)
    return SplicedWindows(
        (_splice(supplies, draws, tokenizer, seq_len, sets_per_window) for _ in range(num_windows)),
        card,
    )


def cut_pieces(text: str, tokenizer: Tokenizer, piece_tokens: tuple[int, int]) -> Iterator[str]:
    """Paragraphs of `text`, each one unbroken stretch of it, of least to most tokens by itself.

    A paragraph that is too long is cut at line ends, then at ends of sentences; short neighbours
    are joined until they are long enough. What fits neither way is left out.
    """
    least, most = piece_tokens

    def count(start: int, end: int) -> int:
        return len(tokenizer.encode(text[start:end]))

    def cut(start: int, end: int, *finer: re.Pattern[str]) -> Iterator[tuple[int, int]]:
        if text[start:end].strip() and count(start, end) <= most:
            yield start, end
        elif finer:
            for part in _between(finer[0], text, start, end):
                yield from cut(*part, *finer[1:])

    held = None  # where a stretch that is too short begins
    for paragraph in _between(_BLANK_LINE, text, 0, len(text)):
        for start, end in cut(*paragraph, _LINE_END, _SENTENCE_END):
            if held is not None and count(held, end) <= most:
                start = held
            if count(start, end) >= least:
                yield text[start:end]
                held = None
            else:
                held = start


def save_spliced(windows: SplicedWindows, path: Path) -> None:
    """Write `windows` to `path` (.npz, no pickle), all or nothing."""
    with write_aside(path) as aside, open(aside, "wb") as f:
        np.savez_compressed(
            f,
            card=np.frombuffer(canonical_json(windows.card), np.uint8),
            ids=np.stack([window.ids for window in windows]),  # [W, T+1]
            source=np.stack([window.source for window in windows]),  # [W, T]
            bytes=np.array([window.bytes for window in windows], np.int64),  # [W]
            num_repeats=np.array([window.num_repeats for window in windows], np.int64),  # [W]
        )


def load_spliced(path: Path, sets: Mapping[str, TokenSet] | None = None) -> SplicedWindows:
    """The windows in `path`.

    Args:
        sets: if given, the windows must have been made from exactly these.
    Raises:
        DataError: not such a file, damaged, or made from other sets.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            card = parse_json(file["card"].tobytes())
            arrays = [file[name] for name in ("ids", "source", "bytes", "num_repeats")]
        ids, source, sizes, repeats = arrays
        num_windows, seq_len = source.shape
        if not (
            card["format"] == FORMAT
            and card["seq_len"] == seq_len
            and ids.shape == (num_windows, seq_len + 1)
            and ids.min() >= 0
            and sizes.shape == repeats.shape == (num_windows,)
            and all(array.dtype == np.int64 for array in arrays)
            and source.min() >= 0
            and source.max() < len(card["sets"])
        ):
            raise ValueError(f"its arrays and card are not of format {FORMAT}")
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as e:
        raise DataError(f"{path} does not hold spliced windows ({e}): splice them again.") from None
    given = card["sets"] if sets is None else {name: sets[name].digest for name in sets}
    other = sorted({name for name, _ in given.items() ^ card["sets"].items()})
    if other:
        raise DataError(
            f"{path} was spliced from other sets: {', '.join(other)} differ, are "
            "missing or are new. Splice the present ones again."
        )
    return SplicedWindows(map(SplicedWindow, ids, source, sizes.tolist(), repeats.tolist()), card)


class _Draws:
    """Random numbers from raw Philox output, whose stream is the same in every NumPy version."""

    def __init__(self, *key: int):
        self._source = np.random.Philox(np.random.SeedSequence(key))

    def below(self, n: int) -> int:
        """A number from 0 to n - 1."""
        return int(self._source.random_raw()) % n

    def order(self, n: int) -> list[int]:
        """A permutation of n places."""
        return np.argsort(self._source.random_raw(n), kind="stable").tolist()


def _supply(pieces: list[str]) -> Iterator[tuple[str, bool]]:
    """Pieces in order, over and over, and whether each was used before."""
    for turn in itertools.count():
        yield from ((piece, turn > 0) for piece in pieces)


def _splice(
    supplies: list[Iterator[tuple[str, bool]]],
    draws: _Draws,
    tokenizer: Tokenizer,
    seq_len: int,
    sets_per_window: tuple[int, int],
) -> SplicedWindow:
    least, most = sets_per_window
    num_sets = least + draws.below(min(most, len(supplies)) - least + 1)
    uses = dict.fromkeys(draws.order(len(supplies))[:num_sets], 0)  # pieces so far, by set
    ids, source = [tokenizer.eos_id], list[int]()
    size = num_repeats = 0
    while len(source) < seq_len:
        others = [place for place in uses if place != (source[-1] if source else None)]
        fewest = min(uses[place] for place in others)
        others = [place for place in others if uses[place] == fewest]
        place = others[draws.below(len(others))]
        uses[place] += 1
        text, is_repeat = next(supplies[place])
        num_repeats += is_repeat
        text = JOINT + text if source else text
        piece = tokenizer.encode(text)
        kept = min(len(piece), seq_len - len(source))
        ids += piece[:kept]
        source += [place] * kept
        size += len(text.encode()) * kept // len(piece)
    return SplicedWindow(np.array(ids, np.int64), np.array(source, np.int64), size, num_repeats)


def _read_pieces(
    token_set: TokenSet, split: str, tokenizer: Tokenizer, piece_tokens: tuple[int, int]
) -> list[str]:
    """Every paragraph of one split, in order, once however often it stands there."""
    path = check_file(token_set.directory, token_set.card, f"{split}.jsonl.zst")
    return list(
        dict.fromkeys(
            piece
            for document in read_documents(path)
            for piece in cut_pieces(document.text, tokenizer, piece_tokens)
        )
    )


def _between(pause: re.Pattern[str], text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Start and end of the stretches of text[start:end] between pauses start and end."""
    for found in pause.finditer(text, start, end):
        yield start, found.start()
        start = found.end()
    yield start, end
