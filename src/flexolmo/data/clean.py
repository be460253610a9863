"""One text made fit for training, and long texts cut where a reader would pause.

Pure functions of text; knows nothing of files, sets or tokens.
"""

import re
import unicodedata

# Control characters except tab and newline; zero-width marks, soft hyphens, byte-order marks.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\u2060\ufeff]")
_LINE_ENDS = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_SPACE_BEFORE_LINE_END = re.compile(r"[ \t\u00a0]+$", re.MULTILINE)
_MANY_BLANK_LINES = re.compile(r"\n{4,}")
_RULER = re.compile(r"([-=_*#~.+ ])\1{79,}")


def clean_text(text: str) -> str:
    """`text` in Unicode NFC, without control characters, trailing spaces or wide empty stretches.

    Up to two blank lines in a row and all indentation stay: they mean something in code.
    Cleaning twice changes nothing more.
    """
    text = _UNSEEN.sub("", _LINE_ENDS.sub("\n", text))
    text = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode())
    text = _RULER.sub(lambda match: match.group(1) * 79, text)
    text = _SPACE_BEFORE_LINE_END.sub("", text)
    return _MANY_BLANK_LINES.sub("\n\n\n", text).strip("\n")


def split_text(text: str, max_bytes: int) -> list[str]:
    """`text` in pieces of at most `max_bytes` bytes of UTF-8, cut at the largest pause that fits.

    Pauses, largest first: a blank line, a line end, a space, any character. Joined, the pieces
    lack only the pauses.
    """
    if _size(text) <= max_bytes:
        return [text]
    for pause in ("\n\n", "\n", " "):
        parts = text.split(pause)
        if len(parts) > 1:
            return _pack(parts, pause, max_bytes)
    half = len(text) // 2
    return split_text(text[:half], max_bytes) + split_text(text[half:], max_bytes)


def _pack(parts: list[str], pause: str, max_bytes: int) -> list[str]:
    """Join neighbouring `parts` while they fit; cut those that alone are too long."""
    pieces: list[str] = []
    held: list[str] = []
    held_bytes = 0
    for part in parts:
        size = _size(part) + (len(pause) if held else 0)
        if held and held_bytes + size > max_bytes:
            pieces.append(pause.join(held))
            held, held_bytes = [], 0
            size -= len(pause)
        if size > max_bytes:
            pieces.extend(split_text(part, max_bytes))
        else:
            held.append(part)
            held_bytes += size
    if held:
        pieces.append(pause.join(held))
    return [piece for piece in pieces if piece.strip()]


def _size(text: str) -> int:
    return len(text.encode())
