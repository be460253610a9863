"""The manifest of an expert bundle: everything that it claims about itself.

Read from bytes that may be hostile. Knows nothing of keys, of files on a disk, or of what an anchor
expects; `docs/bundle_format.md` is the norm.
"""

import datetime
import importlib.metadata
import io
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    JsonValue,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from flexolmo.bundle.licence import spell_licence
from flexolmo.bundle.strict import Claim, check_canonical, parse_object, read_claims
from flexolmo.bundle.tensors import Digest, Positive, TensorEntry, TensorName, read_weights
from flexolmo.bundle.terms import Terms
from flexolmo.errors import BundleError, ConfigError
from flexolmo.files import canonical_json

FORMAT_VERSION = 4
MAX_MANIFEST_BYTES = 4 << 20
MAX_FREE_JSON_BYTES = 64 << 10  # recipe and router settings: room for a recipe, not for a corpus
PUBLIC = "public"  # the public set, and the anchor's own FFN among a mixture's experts
RESERVED_NAMES = ("anchor", PUBLIC)  # no owner's expert may be called so
NAME_PATTERN = r"[a-z0-9][a-z0-9_-]{0,63}"  # of sets and experts, and so of their directories


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


def require_owner(owner: str) -> None:
    """ConfigError unless `owner`, as somebody gave it, can be an owner's name."""
    try:
        check_owner(owner)
    except ValueError as e:
        raise ConfigError(f"The owner {owner!a} cannot be: {e}.") from None


def _check_name(name: str) -> str:
    if name in RESERVED_NAMES:
        raise ValueError(f"{name!r} is reserved for the anchor; choose another name")
    return name


def _check_created(text: str) -> str:
    moment = datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ")
    if moment.strftime("%Y-%m-%dT%H:%M:%SZ") != text:
        raise ValueError("expected a UTC time like 2026-01-31T12:00:00Z")
    return text


def _check_free_json(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if len(canonical_json(value)) > MAX_FREE_JSON_BYTES:
        raise ValueError(f"longer than {MAX_FREE_JSON_BYTES} bytes as JSON")
    return value


FreeJson = Annotated[dict[str, JsonValue], AfterValidator(_check_free_json)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Word = Annotated[str, StringConstraints(pattern=rf"^{NAME_PATTERN}$")]
Name = Annotated[Word, AfterValidator(_check_name)]
Owner = Annotated[str, AfterValidator(check_owner)]
Created = Annotated[str, AfterValidator(_check_created)]
_NAME: TypeAdapter[str] = TypeAdapter(Name)


def require_name(name: str) -> None:
    """ConfigError unless `name`, as somebody gave it, can be an expert's."""
    try:
        _NAME.validate_python(name)
    except ValidationError as e:
        raise ConfigError(
            f"{name!r} cannot name an expert: {e.errors()[0]['msg']}. Use lower-case "
            "letters, digits, - and _, at most 64, starting with a letter or digit."
        ) from None


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


class Manifest(Claim):
    """Everything an expert bundle claims about itself. No field has a default.

    One of version 3 has a `serial` of 0 and terms that permit any purpose.
    """

    format_version: Literal[3, 4]  # first: the two checks below ask it
    name: Name
    owner: Owner
    anchor_digest: Digest
    architecture: Architecture
    router: Router
    tensors: Annotated[dict[TensorName, TensorEntry], Field(min_length=1)]
    weights_digest: Digest
    recipe: FreeJson
    tokens_seen: Annotated[int, Field(ge=0, lt=2**63)]
    data_card_digest: Digest
    serial: Count  # grows with each bundle of this owner and name
    licence: Annotated[str, StringConstraints(min_length=1, max_length=1000)]
    terms: Terms
    created: Created
    software: Annotated[dict[str, str], Field(min_length=1)]

    @field_validator("serial")
    @classmethod
    def _check_serial(cls, serial: int, fields: ValidationInfo) -> int:
        if (serial == 0) != (fields.data.get("format_version") == 3):
            raise ValueError("a number from 1")
        return serial

    @field_validator("licence")
    @classmethod
    def _check_licence(cls, licence: str, fields: ValidationInfo) -> str:
        if fields.data.get("format_version") != 3:
            spell_licence(licence)
        return licence


# --- canonical bytes ---------------------------------------------------------------------------


def encode_manifest(manifest: Manifest) -> bytes:
    """The only byte string that states this manifest. Source: ours.

    BundleError for one of version 3, which is read and no longer written.
    """
    if manifest.format_version != FORMAT_VERSION:
        raise BundleError(
            f"A manifest of format version {manifest.format_version} can be read, not written: "
            "build one of the owner's expert and terms."
        )
    return canonical_json(manifest.model_dump(mode="json"))


def _upgrade(claims: dict[str, Any], advice: str) -> dict[str, Any]:
    """Claims of version 3, which had no serial and fewer terms, with the fields of version 4."""
    terms = claims.get("terms")
    if "serial" in claims or not isinstance(terms, dict) or terms.keys() != {"text", "expires"}:
        raise BundleError(
            "manifest.json is not a valid manifest: format version 3 has no serial, and terms of "
            f"text and expires alone. {advice}"
        )
    upgraded = {
        "text": terms["text"],
        "permitted": ["any"],
        "prohibited": [],
        "audience": [],
        "valid_from": None,
        "valid_until": terms["expires"],
        "attribution": None,
    }
    return claims | {"serial": 0, "terms": upgraded}


def read_manifest(data: bytes) -> Manifest:
    """The manifest in `data`, if these are its canonical bytes, of version 4 or 3.

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
    value = parse_object(data, "manifest.json", advice)
    found = value.get("format_version")
    if type(found) is not int or found not in (3, FORMAT_VERSION):
        raise BundleError(
            f"manifest.json: found format_version {ascii(found)[:80]}, expected {FORMAT_VERSION}. "
            "Use the FlexOlmo release that wrote this bundle, or ask the owner to train and pack "
            "it again."
        )
    check_canonical(value, data, "manifest.json", advice)
    if found == 3:
        data = canonical_json(_upgrade(value, advice))
    return read_claims(data, Manifest, "manifest.json", advice)


def build_manifest(
    weights: bytes | Path,
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
    serial: int,
    licence: str,
    terms: Terms,
    created: str | None = None,
    software: Mapping[str, str] | None = None,
) -> Manifest:
    """The manifest for `weights` (a safetensors file, or its bytes), through the same gate as one
    received.

    `serial` must be higher than that of every bundle of this owner and name before (see
    `flexolmo.bundle.serials`), and `licence` in its plain spelling. `created` defaults to now;
    `software` to this package's, torch's and safetensors' versions.
    """
    _refuse_alias(licence)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    packages = ("flexolmo", "safetensors", "torch")
    if isinstance(weights, bytes):
        found = read_weights(io.BytesIO(weights), len(weights))
    else:
        with io.FileIO(weights) as file:
            found = read_weights(file, weights.stat().st_size)
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
        "serial": serial,
        "licence": licence,
        "terms": terms.model_dump(mode="json"),
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


def _refuse_alias(licence: str) -> None:
    """Refuse a licence that is not in its plain spelling: `gpl` might not be what is meant."""
    try:
        plain = spell_licence(licence)
    except ValueError as e:
        raise BundleError(f"The licence {licence!a} cannot be packed. Expected {e}.") from None
    if plain != licence:
        raise BundleError(f"The licence {licence!a} stands for {plain}: if it is meant, say so.")
