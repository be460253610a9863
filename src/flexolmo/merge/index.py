"""`mixture.json`, the index of a mixture: which bundles it holds, and what was found about them.

All that it says of an expert is read again from that expert's bundle.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from flexolmo.bundle.manifest import Name
from flexolmo.bundle.tensors import Digest
from flexolmo.config import Settings
from flexolmo.errors import MergeError
from flexolmo.files import read_json, recover_missing
from flexolmo.model.router import RouterSettings

ABOUT = "mixture.json"
Demand = Literal["extraction", "membership_auc", "epsilon"]


class _Newest(Settings):
    """The newest bundle of one owner and name that a mixture ever held."""

    serial: Annotated[StrictInt, Field(ge=0)]
    bundle_digest: Digest


class _Expert(BaseModel):
    """Digests of a bundle's files; the other fields are compared with its manifest's."""

    model_config = ConfigDict(extra="allow")

    files: dict[
        Literal["expert.safetensors", "manifest.json", "signature.sig", "signer.pub"], Digest
    ]


class _Effect(Settings):
    change: float
    weight: float


class _Effects(Settings):
    public: _Effect
    forms: dict[str, _Effect]
    others: dict[Name, _Effect]


class _Influence(Settings):
    """Findings of `flexolmo.evaluation.influence`, and the limits that they were held to."""

    limits: dict[Literal["public", "claims", "forms", "others"], float]
    public_digest: Digest
    seed: int
    seq_len: int
    experts: dict[Name, _Effects]
    together: _Effects | None


class _Reported(Settings):
    """The release report that came with a bundle, and what `demanded_values` says of it."""

    report_digest: Digest
    values: dict[Demand, float | None]


class _Release(Settings):
    """Limits that release reports were held to."""

    limits: dict[Demand, float]
    experts: dict[Name, _Reported]


class _Index(Settings):
    """`mixture.json`. All that it says of an expert is read again from that expert's bundle."""

    format: Literal["flexolmo-mixture"]
    format_version: Literal[4]
    anchor_digest: Digest
    router: RouterSettings
    top_k: Annotated[StrictInt, Field(ge=1)] | None
    experts: dict[Name, _Expert]
    seen: dict[Name, dict[str, _Newest]]  # by name and owner, of those who were removed too
    influence: _Influence | None
    release: _Release | None = None  # absent in mixtures of before there were reports


def read_about(model_dir: Path) -> dict[str, Any]:
    """The content of `mixture.json`: anchor digest, router, top_k, and each expert's claims."""
    path = Path(model_dir) / ABOUT
    recover_missing(path.parent)
    if not path.parent.exists():
        raise MergeError(
            f"{model_dir} does not exist. Name the directory of a mixture; flexolmo mix build "
            "makes one."
        )
    if not path.is_file():
        raise MergeError(
            f"{model_dir} is not a mixture: it has no {ABOUT}. Make one with flexolmo mix build."
        )
    if (Path(model_dir) / "anchor.json").exists():
        raise MergeError(
            f"{model_dir} has both {ABOUT} and anchor.json, so it is not clear what it is. A "
            "mixture's own anchor is in its directory anchor/. Remove the one that was put there."
        )
    about = read_json(path, MergeError)
    if not isinstance(about, dict):
        raise MergeError(f"{path} does not describe a mixture.")
    if about.get("format") != "flexolmo-mixture" or about.get("format_version") != 4:
        raise MergeError(
            f"{path} is format {about.get('format')!r} version {about.get('format_version')!r}; "
            "expected 'flexolmo-mixture' version 4. Build it again, in another place, from "
            f"{model_dir}/anchor and the bundles in {model_dir}/experts."
        )
    try:
        _Index.model_validate(about)
    except ValidationError as e:
        lines = [
            f"{'.'.join(map(str, x['loc']))}: {x['msg']}, found {str(x['input'])[:100]!r}"
            for x in e.errors()
        ]
        raise MergeError(f"{path} does not describe a mixture:\n  " + "\n  ".join(lines)) from None
    return about
