"""A prepared set as it lies on a disk: its files, the card that lists them, and its salt.

Knows nothing of how a set is made, see `prepare`.
"""

import hmac
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from flexolmo.errors import DataError
from flexolmo.files import canonical_json, digest_bytes, digest_file, read_json

FORMAT = "flexolmo-prepared-set-2"
SPLITS = ("train", "validation", "heldout")
PARTS = ("tokens", "offsets", "bytes", "sources")  # the arrays of a split, see prepare_set
EXACT_FILE = "fingerprints_exact.npy"  # uint8 [n,32], digests of the texts of all splits
NEAR_FILE = "fingerprints_near.npy"  # uint32 [n,S], their MinHash signatures
TOKENIZER_FILE = "tokenizer.json"
SALT_FILE = "salt"
SALT_BYTES = 32


def card_digest(card: dict[str, Any]) -> str:
    """`sha256:` digest that names a prepared set: its card lists the digests of all its files."""
    return digest_bytes(canonical_json(card))


def commit_card(card: dict[str, Any], salt: bytes) -> str:
    """Name of a prepared set before others: `sha256:` and the HMAC-SHA256 of its card's digest,
    with the set's salt as key. Whoever shows card and salt proves which set it was; without the
    salt nobody can try a guess at the text. Source: ours."""
    return f"sha256:{hmac.new(salt, card_digest(card).encode(), 'sha256').hexdigest()}"


def read_salt(prepared: Path) -> bytes:
    """The salt of a prepared set, drawn when it was made; DataError if there is none."""
    path = Path(prepared) / SALT_FILE
    salt = path.read_bytes() if path.is_file() else None
    if salt is None or len(salt) != SALT_BYTES:
        found = "is missing" if salt is None else f"holds {len(salt)} bytes"
        raise DataError(
            f"{path} {found}; expected {SALT_BYTES} bytes drawn at random, without which an "
            "expert's bundle would tell of its text. Prepare the set again."
        )
    return salt


class _Counts(BaseModel):
    documents: int = Field(ge=0)
    bytes: int = Field(ge=0)
    tokens: int = Field(ge=0)


class _TokenizerEntry(BaseModel):
    digest: str
    vocab_size: int = Field(ge=1)
    eos_id: int = Field(ge=0)


class _FileEntry(BaseModel):
    bytes: int = Field(ge=0)
    digest: str


class _Card(BaseModel):
    """The parts of a card that are read again."""

    name: str
    recipe: str
    splits: dict[str, _Counts]
    tokenizer: _TokenizerEntry
    files: dict[str, _FileEntry]


def read_card(prepared: Path) -> dict[str, Any]:
    """The card of a prepared set.

    Raises:
        DataError: `prepared` is not a prepared set of this format, or its card lacks something.
    """
    card = read_json(Path(prepared) / "card.json", DataError)
    found = card.get("format") if isinstance(card, dict) else None
    if found != FORMAT:
        raise DataError(
            f"{prepared} is not a prepared set of format {FORMAT} (its card says {found!r}): make "
            "one with `flexolmo data prepare`; sets of an older format are prepared again."
        )
    try:
        checked = _Card.model_validate(card, strict=True)
    except ValidationError as e:
        problem = e.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise DataError(f"{prepared}/card.json, {where}: {problem['msg']}.") from None
    missing = [name for name in _files_of_set() if name not in checked.files]
    if missing or set(checked.splits) != set(SPLITS):
        raise DataError(
            f"{prepared}/card.json has the splits {', '.join(checked.splits)} and lacks these "
            f"files: {', '.join(missing) or 'none'}. Prepare the set again."
        )
    return card


def check_file(prepared: Path, card: dict[str, Any], name: str) -> Path:
    """Path of the file `name` of a prepared set, which is what the card says.

    Raises:
        DataError: it is missing or was changed.
    """
    path = Path(prepared) / name
    try:
        found = digest_file(path)
    except OSError as e:
        raise DataError(f"{path} cannot be opened ({e}): prepare the set again.") from None
    if found != card["files"][name]["digest"]:
        raise DataError(
            f"{path} is not the file that card.json describes: its digest is {found}. Prepare the "
            "set again."
        )
    return path


def _files_of_set() -> Iterator[str]:
    """Names of the files that a prepared set is read by."""
    for split in SPLITS:
        yield f"{split}.jsonl.zst"
        yield from (f"{split}_{part}.npy" for part in PARTS)
    yield from (EXACT_FILE, NEAR_FILE, TOKENIZER_FILE)
