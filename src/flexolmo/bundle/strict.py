"""Strict reading of bytes that may be hostile: one meaning each, refusals that name everything.

Serves all files of a bundle. Knows nothing of what they claim.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from flexolmo import files
from flexolmo.errors import FlexOlmoError


class Claim(BaseModel):
    """Fields someone states about a bundle: none unknown, none coerced, none changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def parse_json(data: bytes) -> Any:
    """The JSON value in `data`; ValueError if not UTF-8, if a key repeats, if a number is none,
    or if nested too deeply."""

    def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for key, item in pairs:
            if key in value:
                raise ValueError(f"key {key[:100]!r} appears twice")
            value[key] = item
        return value

    def refuse_constant(text: str) -> Any:
        raise ValueError(f"{text} is not a JSON number")

    return files.parse_json(
        data.decode("utf-8"), object_pairs_hook=build_object, parse_constant=refuse_constant
    )


def raise_listed(
    error: type[FlexOlmoError], opening: str, lines: Sequence[str], advice: str
) -> None:
    """Raise `error` naming each difference, or return if there is none."""
    if lines:
        shown = [f"  - {line}" for line in lines[:50]]
        if len(lines) > len(shown):
            shown.append(f"  - and {len(lines) - len(shown)} more")
        raise error("\n".join([opening, *shown, advice]))
