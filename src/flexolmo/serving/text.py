"""Tokens to text as they are written: whole characters, and never a stop string or a part of one.

Knows nothing of HTTP or of who asked.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from flexolmo.inference.engine import TokenWritten

_CONTEXT = 8  # ids of the prompt that are enough to decode the answer's first
_UNFINISHED = "\ufffd"  # decoded for a character whose bytes are still to come


@dataclass(frozen=True)
class Shown:
    """One token whose text has been given out whole."""

    event: TokenWritten
    offset: int  # characters of the answer before it


@dataclass(frozen=True)
class Piece:
    """The next text of an answer, and the tokens that are shown in full with it."""

    text: str = ""
    tokens: Sequence[Shown] = field(default_factory=tuple)


class TextStream:
    """The text of one answer, in pieces.

    Text that may yet turn out to begin one of `stops` is held back until it has or has not; from a
    stop string on nothing is given out. `decode` turns ids to text. Each token decodes a window of
    the last few, not the whole answer.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str] = (),
        before: Sequence[int] = (),
    ):
        self._decode = decode
        self._stops = stops
        context = list(before[-_CONTEXT:])
        self._ids = [] if decode(context).endswith(_UNFINISHED) else context
        self._window = 0  # the first id of the window, before which characters are whole
        self._read = len(self._ids)  # ids whose text is in `_text`, or not of the answer
        self._text = ""
        self._shown = 0  # characters given out
        self._tokens: deque[tuple[TokenWritten, int, int]] = deque()  # with start and end of each
        self._unread: list[TokenWritten] = []  # of the character that is unfinished
        self.has_stopped = False

    def add(self, event: TokenWritten) -> Piece:
        """Read one token; the piece may be empty."""
        if self.has_stopped:
            return Piece()
        self._ids.append(event.token)
        self._unread.append(event)
        if self._decode(self._ids[self._window :]).endswith(_UNFINISHED):
            return Piece()
        self._take_in()
        return self._give(self._count_held())

    def end(self) -> Piece:
        """The rest, once no token follows; bytes that became no character are shown as U+FFFD."""
        if self.has_stopped:
            return Piece()
        self._take_in()
        return self._give(0)

    def _take_in(self) -> None:
        """Put the text of all ids read so far into `_text`."""
        before = self._decode(self._ids[self._window : self._read])
        start = len(self._text)
        self._text += self._decode(self._ids[self._window :])[len(before) :]
        self._tokens.extend((event, start, len(self._text)) for event in self._unread)
        self._unread = []
        self._window = self._read
        self._read = len(self._ids)

    def _count_held(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        tail = self._text[max(self._shown, len(self._text) - longest) :]
        ends = (tail[start:] for start in range(len(tail)))
        return next((len(e) for e in ends if any(s.startswith(e) for s in self._stops)), 0)

    def _give(self, held: int) -> Piece:
        """The text not shown yet, up to a stop string or the last `held` characters."""
        found = [place for s in self._stops if (place := self._text.find(s, self._shown)) >= 0]
        self.has_stopped = bool(found)
        until = min(found) if found else len(self._text) - held
        text = self._text[self._shown : until]
        self._shown = until
        tokens = []
        while self._tokens and self._tokens[0][2] <= until:
            event, start, _ = self._tokens.popleft()
            tokens.append(Shown(event, start))
        return Piece(text, tokens)
