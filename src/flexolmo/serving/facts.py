"""Facts about experts that policies judge by: those of a mixture on disk, or of a file with them.

Read without torch and without any weights, to explain and to test policies. No signature is checked
here: that is done where a mixture is loaded.
"""

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from flexolmo.bundle.bundle import MANIFEST_FILE
from flexolmo.bundle.facts import ExpertFacts, facts_of
from flexolmo.bundle.manifest import MAX_MANIFEST_BYTES, Name, read_manifest
from flexolmo.bundle.tensors import Digest
from flexolmo.errors import BundleError, PolicyError
from flexolmo.files import digest_bytes, read_bytes

INDEX_FILE = "mixture.json"
MAX_FILE_BYTES = 64 << 20
_FACTS = TypeAdapter(dict[Name, ExpertFacts], config=ConfigDict(extra="forbid"))


class _Expert(BaseModel):
    key_id: str
    files: dict[str, Digest]


class _Index(BaseModel):
    """Parts of `mixture.json` that are needed here."""

    experts: dict[Name, _Expert]


def read_facts(path: Path) -> dict[str, ExpertFacts]:
    """Facts about each expert of the mixture in directory `path`, or those in the JSON file `path`.

    Raises:
        PolicyError: neither a mixture nor such a file, or a manifest that is missing, malformed or
            another than the mixture was built with.
    """
    path = Path(path)
    is_mixture = path.is_dir()
    file = path / INDEX_FILE if is_mixture else path
    try:
        data = read_bytes(file, MAX_FILE_BYTES)
        if not is_mixture:
            return _FACTS.validate_json(data)
        experts = _Index.model_validate_json(data).experts
    except ValidationError as e:
        lines = [f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors()[:20]]
        raise PolicyError(f"{file} does not describe experts:\n  " + "\n  ".join(lines)) from None
    except (OSError, ValueError) as e:
        raise PolicyError(
            f"{file} cannot be read: {e}. Name a mixture, or a file that flexolmo policy describe "
            "wrote."
        ) from None
    return {name: _facts_of(path, name, entry) for name, entry in sorted(experts.items())}


def encode_facts(facts: Mapping[str, ExpertFacts]) -> bytes:
    """A JSON file that `read_facts` reads."""
    return _FACTS.dump_json(dict(facts), indent=2) + b"\n"


def _facts_of(model: Path, name: str, entry: _Expert) -> ExpertFacts:
    file = model / "experts" / f"{name}.bundle" / MANIFEST_FILE
    try:
        data = read_bytes(file, MAX_MANIFEST_BYTES)
        manifest = read_manifest(data)
        digest = digest_bytes(data)
        if digest != entry.files.get(MANIFEST_FILE):
            raise ValueError(f"its digest is not the one in {INDEX_FILE}")
    except (OSError, ValueError, BundleError) as e:
        raise PolicyError(f"{file} cannot be used, build the mixture again: {e}") from None
    return facts_of(manifest, entry.key_id, digest)
