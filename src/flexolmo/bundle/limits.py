"""Limits that a coordinator sets, as they are written on a command line. Knows no measure."""

import math
import re
from collections.abc import Collection

from flexolmo.errors import ConfigError


def parse_limits(
    text: str,
    measures: Collection[str],
    example: str,
    *,
    up_to_one: Collection[str] = (),
    no_percent: Collection[str] = (),
) -> dict[str, float]:
    """Limits by measure, written as in `example`.

    ConfigError if malformed, unknown or repeated, and if a limit demands nothing: it is not finite,
    or 1 or more of a measure that is `up_to_one`.
    """
    limits: dict[str, float] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*<=\s*(\d+\.?\d*)\s*(%?)\s*", part)
        if not found or found[1] not in measures or found[1] in limits:
            raise ConfigError(
                f"{_shorten(part)} is not a limit. Expected one each of {', '.join(measures)}, or "
                f'of some of them, separated by commas: "{example}".'
            )
        name = found[1]
        if found[3] and name in no_percent:
            raise ConfigError(
                f"{_shorten(part)} has a percent sign, and {name} is no share. Write the number "
                f'without it, as in "{example}".'
            )
        limit = float(found[2]) / (100 if found[3] else 1)
        most = 1 if name in up_to_one else math.inf
        if limit >= most:
            below = "below 1" if name in no_percent else "below 1, or below 100%"
            expected = "one that is finite" if most == math.inf else f"one {below}"
            raise ConfigError(
                f"{_shorten(part)} demands nothing: {name} is always within it. "
                f'Expected {expected}, as in "{example}".'
            )
        limits[name] = limit
    return limits


def _shorten(part: str) -> str:
    """A part of what somebody wrote, for a message."""
    words = part.strip()
    return ascii(words if len(words) <= 60 else f"{words[:57]}...")
