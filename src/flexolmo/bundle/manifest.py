"""The manifest of an expert bundle: everything that it claims about itself.

Read from bytes that may be hostile. Knows nothing of keys, of files on a disk, or of what an anchor
expects; `docs/bundle_format.md` is the norm.
"""

import datetime
import importlib.metadata
import io
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
)

from flexolmo.bundle.strict import Claim, parse_json, raise_listed
from flexolmo.bundle.tensors import Digest, Positive, TensorEntry, TensorName, read_weights
from flexolmo.errors import BundleError
from flexolmo.files import canonical_json

FORMAT_VERSION = 3
MAX_MANIFEST_BYTES = 4 << 20
MAX_FREE_JSON_BYTES = 64 << 10  # recipe and router settings: room for a recipe, not for a corpus
PUBLIC = "public"  # the public set, and the anchor's own FFN among a mixture's experts
RESERVED_NAMES = ("anchor", PUBLIC)  # no owner's expert may be called so
NAME_PATTERN = r"[a-z0-9][a-z0-9_-]{0,63}"  # of sets and experts, and so of their directories
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c")


# --- the manifest's fields ---------------------------------------------------------------------


def check_owner(owner: str) -> str:
    """`owner` unchanged; ValueError unless it can name a file `<owner>.pub` on any system."""
    if not 1 <= len(owner) <= 100:
        raise ValueError("an owner's name has 1 to 100 characters")
    if owner != owner.strip() or owner.startswith("."):
        raise ValueError("an owner's name starts and ends with no space and does not start with .")
    if not owner.isprintable() or "/" in owner or "\\" in owner:
        raise ValueError("an owner's name has printable characters only, without / and \\")
    if owner != unicodedata.normalize("NFC", owner):
        raise ValueError("an owner's name must be in Unicode's NFC form")
    return owner


def _check_name(name: str) -> str:
    if name in RESERVED_NAMES:
        raise ValueError(f"{name!r} is reserved for the anchor; choose another name")
    return name


def _check_licence(text: str) -> str:
    """Light check of an SPDX expression: its grammar, not its list of identifiers."""
    identifier = re.compile(
        r"(DocumentRef-[A-Za-z0-9.-]+:)?LicenseRef-[A-Za-z0-9.-]+|[A-Za-z0-9][A-Za-z0-9.-]*\+?"
    )
    depth, wants_operand = 0, True
    for word in re.findall(r"[()]|[^\s()]+", text):
        is_operator = word in ("AND", "OR", "WITH")
        if word == "(" and wants_operand:
            depth += 1
        elif word == ")" and not wants_operand and depth > 0:
            depth -= 1
        elif is_operator and not wants_operand:
            wants_operand = True
        elif wants_operand and not is_operator and identifier.fullmatch(word):
            wants_operand = False
        else:
            raise ValueError(f"not an SPDX licence expression at {word!r}")
    if wants_operand or depth:
        raise ValueError("not a complete SPDX licence expression, such as Apache-2.0")
    return text


def _check_created(text: str) -> str:
    moment = datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ")
    if moment.strftime("%Y-%m-%dT%H:%M:%SZ") != text:
        raise ValueError("expected a UTC time like 2026-01-31T12:00:00Z")
    return text


def _read_date(value: Any) -> Any:
    if isinstance(value, datetime.date):
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
        return datetime.date.fromisoformat(value)
    raise ValueError("a date like 2026-01-31, or null")  # pydantic's own also takes Unix seconds


def _check_free_json(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if len(canonical_json(value)) > MAX_FREE_JSON_BYTES:
        raise ValueError(f"longer than {MAX_FREE_JSON_BYTES} bytes as JSON")
    return value


FreeJson = Annotated[dict[str, JsonValue], AfterValidator(_check_free_json)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Word = Annotated[str, StringConstraints(pattern=rf"^{NAME_PATTERN}$")]
Name = Annotated[Word, AfterValidator(_check_name)]


class Architecture(Claim):
    """Sizes of the expert; d_ff may differ from the anchor's. A rank of 0 says: no such delta."""

    num_layers: Positive
    d_model: Positive
    d_ff: Positive
    rank: Count
    attention_rank: Count
    embedding_rank: Count
    head_rank: Count
    num_bigrams: Count


class Router(Claim):
    """Settings with which the expert's router embedding was made and is to be used."""

    kind: Word
    settings: FreeJson


class Terms(Claim):
    """Terms of use for the coordinator; `expires` is the last day of use (UTC), null: no end."""

    text: Annotated[str, StringConstraints(min_length=1, max_length=20_000)]
    expires: Annotated[datetime.date, BeforeValidator(_read_date)] | None


class Manifest(Claim):
    """Everything an expert bundle claims about itself. No field has a default."""

    format_version: Literal[3]
    name: Name
    owner: Annotated[str, AfterValidator(check_owner)]
    anchor_digest: Digest
    architecture: Architecture
    router: Router
    tensors: Annotated[dict[TensorName, TensorEntry], Field(min_length=1)]
    weights_digest: Digest
    recipe: FreeJson
    tokens_seen: Annotated[int, Field(ge=0, lt=2**63)]
    data_card_digest: Digest
    licence: Annotated[str, StringConstraints(max_length=1000), AfterValidator(_check_licence)]
    terms: Terms
    created: Annotated[str, AfterValidator(_check_created)]
    software: Annotated[dict[str, str], Field(min_length=1)]


# --- canonical bytes ---------------------------------------------------------------------------


def encode_manifest(manifest: Manifest) -> bytes:
    """The only byte string that states this manifest. Source: ours."""
    return canonical_json(manifest.model_dump(mode="json"))


def _walk_strings(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield f"a key of {where or 'the manifest'}", key
            yield from _walk_strings(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _walk_strings(item, f"{where}.{i}")


def _find_hidden_characters(value: Any) -> list[str]:
    """Characters that could fool a terminal, so that what a person reads is what was signed."""
    lines = []
    for where, text in _walk_strings(value, ""):
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


def read_manifest(data: bytes) -> Manifest:
    """The manifest in `data`, if these are its canonical bytes.

    Raises:
        BundleError: too long, not JSON, another format version (checked before any other field,
            since only the version says what the rest means), not canonical, or fields that are
            unknown, missing or malformed, each named.
    """
    advice = "Ask the owner to pack the bundle again."
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"manifest.json has {len(data)} bytes; at most {MAX_MANIFEST_BYTES} are read. {advice}"
        )
    try:
        value = parse_json(data)
    except ValueError as e:
        raise BundleError(f"manifest.json is not JSON as expected: {e}. {advice}") from None
    if not isinstance(value, dict):
        raise BundleError(f"manifest.json holds {type(value).__name__}, not an object. {advice}")
    found = value.get("format_version")
    if type(found) is not int or found != FORMAT_VERSION:
        raise BundleError(
            f"manifest.json: found format_version {ascii(found)[:80]}, expected {FORMAT_VERSION}. "
            "Use the FlexOlmo release that wrote this bundle, or ask the owner to train and pack "
            "it again."
        )
    opening = "manifest.json is not a valid manifest:"
    raise_listed(BundleError, opening, _find_hidden_characters(value), advice)
    try:
        is_canonical = canonical_json(value) == data
    except ValueError:  # a number too large for a float
        is_canonical = False
    if not is_canonical:
        raise BundleError(
            "manifest.json is not in canonical form: found other spacing, key order, escapes or "
            f"number spelling than canonical JSON has (docs/bundle_format.md). {advice}"
        )
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as e:
        raise_listed(BundleError, opening, [_describe_field_error(x) for x in e.errors()], advice)
        raise
    if encode_manifest(manifest) != data:  # should pydantic ever accept a second spelling
        raise BundleError(f"manifest.json spells a value in other than its canonical way. {advice}")
    return manifest


def build_manifest(
    weights: bytes,
    *,
    name: str,
    owner: str,
    anchor_digest: str,
    architecture: Mapping[str, int],
    router_kind: str,
    router_settings: Mapping[str, Any],
    recipe: Mapping[str, Any],
    tokens_seen: int,
    data_card_digest: str,
    licence: str,
    terms_text: str,
    terms_expire: datetime.date | None = None,
    created: str | None = None,
    software: Mapping[str, str] | None = None,
) -> Manifest:
    """The manifest for `weights` (a safetensors file), through the same gate as one received.

    `created` defaults to now; `software` to this package's, torch's and safetensors' versions.
    """
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    packages = ("flexolmo", "safetensors", "torch")
    found = read_weights(io.BytesIO(weights), len(weights))
    claims = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "owner": owner,
        "anchor_digest": anchor_digest,
        "architecture": dict(architecture),
        "router": {"kind": router_kind, "settings": router_settings},
        "tensors": {k: e.model_dump(mode="json") for k, e in found.tensors.items()},
        "weights_digest": found.digest,
        "recipe": recipe,
        "tokens_seen": tokens_seen,
        "data_card_digest": data_card_digest,
        "licence": licence,
        "terms": {"text": terms_text, "expires": terms_expire and terms_expire.isoformat()},
        "created": created or now,
        "software": software or {p: importlib.metadata.version(p) for p in packages},
    }
    try:
        data = canonical_json(claims)
    except (TypeError, ValueError) as e:
        raise BundleError(
            f"The manifest of expert {name!r} cannot be written as JSON: {e}. "
            "Recipe and router settings may hold only finite numbers, text, lists and tables."
        ) from None
    return read_manifest(data)
