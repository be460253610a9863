"""Numbers as people read them, on a terminal and on a page. Knows nothing of what they measure."""

import math

_MISSING = "–"


def format_number(x: float | None, digits: int) -> str:
    """`x` with commas between thousands and a true minus, never a negative zero.

    "–" stands for a number that is missing or not a number.
    """
    if x is None or math.isnan(x):
        return _MISSING
    shown = f"{x:,.{digits}f}"
    is_zero = not shown.strip("-0.")
    return shown.removeprefix("-") if is_zero else shown.replace("-", "−")


def format_signed(x: float | None, digits: int) -> str:
    """`x` like `format_number`, with a plus before what is above zero."""
    shown = format_number(x, digits)
    has_no_sign = shown.startswith(("−", _MISSING)) or not shown.strip("0.")
    return shown if has_no_sign else f"+{shown}"


def format_spread(mean: float, spread: float | None, digits: int) -> str:
    """`mean` and, where there is one, its spread or error: "1.2 ± 0.1"."""
    shown = format_number(mean, digits)
    return shown if spread is None else f"{shown}\u00a0±\u00a0{format_number(spread, digits)}"


def format_percent(fraction: float | None, digits: int = 1) -> str:
    """`fraction` as a percentage, never broken over lines: "12.3 %"."""
    return _as_percent(format_number(None if fraction is None else 100 * fraction, digits))


def format_change(fraction: float | None, digits: int = 1) -> str:
    """`fraction` as a percentage with its sign: "+12.3 %"."""
    return _as_percent(format_signed(None if fraction is None else 100 * fraction, digits))


def _as_percent(shown: str) -> str:
    return shown if shown == _MISSING else f"{shown}\u00a0%"


def format_megabytes(size_bytes: float | None) -> str:
    """`size_bytes` in millions of bytes, without the unit: one digit, below 100 kB three."""
    if size_bytes is None:
        return _MISSING
    return format_number(size_bytes / 1e6, 1 if size_bytes >= 1e5 else 3)


def format_count(n: float) -> str:
    """`n` with at most four significant characters: 950, 1.2k, 34M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= limit:
            scaled = n / limit
            return f"{scaled:.1f}{unit}" if scaled < 10 else f"{scaled:.0f}{unit}"
    return f"{n:.0f}" if n >= 10 or n == int(n) else f"{n:.1f}"


def format_parameters(n: float) -> str:
    """`n` like `format_count`, with B for billions, as sizes of models are told: 347M, 12B."""
    return format_count(n).replace("G", "B")


def format_duration(seconds: float) -> str:
    """`seconds` in words, by the unit that suits them: 38 seconds, 12 minutes, 259.8 hours."""
    if seconds < 120:
        return f"{format_number(seconds, 1 if seconds < 10 else 0)} seconds"
    if seconds < 7200:
        return f"{format_number(seconds / 60, 0)} minutes"
    return f"{format_number(seconds / 3600, 1)} hours"


def format_seconds(seconds: float | None) -> str:
    """`seconds` as m:ss or h:mm:ss."""
    if seconds is None:
        return _MISSING
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
