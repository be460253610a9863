"""One text made fit for training, and long texts cut where a reader would pause.

Pure functions of text; knows nothing of files, sets or tokens.
"""

import re
import unicodedata

# Control characters but tab and line ends, and halves of a character: neither text nor space.
_NOISE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")
_LINE_ENDS = re.compile(r"\r\n?|[\x0b\x0c\u2028\u2029]")
_MANY_BLANK_LINES = re.compile(r"\n{4,}")


def clean_text(text: str, normalise: bool = False) -> tuple[str, int]:
    """`text` without control characters, and how many of them a space now stands for.

    Every line ends in a line feed; empty lines and byte-order marks around the text go. All else
    stays itself: spaces at the end of a line, characters of no width, U+0080 to U+009F (letters
    and quotes of Windows text read as Latin-1). Cleaning twice changes nothing more, and takes
    time in proportion to the text.

    Args:
        normalise: also compose characters (Unicode NFC), and cut spaces at the end of lines and
            blank lines after two in a row.
    """
    text, replaced = _NOISE.subn(" ", _LINE_ENDS.sub("\n", text))
    if normalise:
        text = unicodedata.normalize("NFC", text)
        text = "\n".join(line.rstrip(" \t\u00a0") for line in text.split("\n"))
        text = _MANY_BLANK_LINES.sub("\n\n\n", text)
    return text.lstrip("\ufeff\n").rstrip("\n"), replaced


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
