"""Limits that a coordinator sets, as they are written on a command line. Knows no measure."""

import re
from collections.abc import Collection

from flexolmo.errors import ConfigError


def parse_limits(text: str, measures: Collection[str], example: str) -> dict[str, float]:
    """Limits by measure, written as in `example`; ConfigError if malformed, unknown or repeated."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*<=\s*(\d+\.?\d*)\s*(%?)\s*", part)
        if not found or found[1] not in measures or found[1] in limits:
            raise ConfigError(
                f"{part.strip()!r} is not a limit. Expected one each of {', '.join(measures)}, or "
                f'of some of them, separated by commas: "{example}".'
            )
        limits[found[1]] = float(found[2]) / (100 if found[3] else 1)
    return limits
