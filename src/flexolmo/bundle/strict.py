"""Strict reading of bytes that may be hostile: one meaning each, refusals that name everything.

Serves all files of a bundle, and what owners sign beside bundles. Knows nothing of what they claim.
"""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from flexolmo import files
from flexolmo.errors import BundleError, FlexOlmoError
from flexolmo.files import canonical_json

_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c")


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


Claims = TypeVar("Claims", bound=Claim)


def parse_object(data: bytes, where: str, advice: str) -> dict[str, Any]:
    """The JSON object in `data`, the content of `where`; BundleError if there is none."""
    try:
        value = parse_json(data)
    except ValueError as e:
        raise BundleError(f"{where} is not JSON as expected: {e}. {advice}") from None
    if not isinstance(value, dict):
        raise BundleError(f"{where} holds {type(value).__name__}, not an object. {advice}")
    return value


def check_canonical(value: Any, data: bytes, where: str, advice: str) -> None:
    """BundleError unless `data` are the canonical bytes of `value`, with no hidden character."""
    opening = f"{where} holds characters that could fool its reader:"
    raise_listed(BundleError, opening, _find_hidden_characters(value), advice)
    try:
        is_canonical = canonical_json(value) == data
    except ValueError:  # a number too large for a float
        is_canonical = False
    if not is_canonical:
        raise BundleError(
            f"{where} is not in canonical form: found other spacing, key order, escapes or "
            f"number spelling than canonical JSON has (docs/bundle_format.md). {advice}"
        )


def read_claims(data: bytes, kind: type[Claims], where: str, advice: str) -> Claims:
    """The claims in `data`, canonical JSON; BundleError names each field that is unknown, missing
    or malformed."""
    try:
        claims = kind.model_validate_json(data)
    except ValidationError as e:
        lines = [_describe_field_error(x) for x in e.errors()]
        raise_listed(BundleError, f"{where} does not hold what it must:", lines, advice)
        raise
    if canonical_json(claims.model_dump(mode="json")) != data:  # should pydantic ever accept more
        raise BundleError(f"{where} spells a value in other than its canonical way. {advice}")
    return claims


def _walk_strings(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield f"a key of {where or 'the whole'}", key
            yield from _walk_strings(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _walk_strings(item, f"{where}.{i}")


def _find_hidden_characters(value: Any) -> list[str]:
    """Characters that could fool a terminal, so that what a person reads is what was signed."""
    lines = []
    for where, text in _walk_strings(value, ""):
        if text.isascii() and text.isprintable():  # nearly every text, told at once
            continue
        bad = {c for c in text if c in _BIDI or unicodedata.category(c) in ("Cc", "Cs")}
        if bad := bad - {"\n", "\t"}:
            codes = ", ".join(f"U+{ord(c):04X}" for c in sorted(bad))
            lines.append(f"{where[:100]!a}: control characters {codes}")
    return lines


def _describe_field_error(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"missing field: {where}"
    if error["type"] == "extra_forbidden":
        return f"unknown field: {where}"
    found = ascii(error["input"])
    found = found if len(found) <= 80 else found[:77] + "..."
    return f"{where}: found {found}, expected: {error['msg'].removeprefix('Value error, ')}"


def raise_listed(
    error: type[FlexOlmoError], opening: str, lines: Sequence[str], advice: str
) -> None:
    """Raise `error` naming each difference, or return if there is none."""
    if lines:
        shown = [f"  - {line}" for line in lines[:50]]
        if len(lines) > len(shown):
            shown.append(f"  - and {len(lines) - len(shown)} more")
        raise error("\n".join([opening, *shown, advice]))
