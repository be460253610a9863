"""Indexes of made text, policies that let them be looked up, and the slow truth about spans."""

from pathlib import Path

import numpy as np

from flexolmo.data.prepare import prepare_set
from flexolmo.trace.build import build_index
from flexolmo.trace.index import Index, open_index
from flexolmo.trace.shard import Shard, id_bytes, write_shard
from made_sets import SMALL, write_raw

TRACE_POLICY = """
@id("papers are traced for all")
permit (principal, action == FlexOlmo::Action::"trace", resource == FlexOlmo::Expert::"papers");
"""
CLINIC_POLICY = """
@id("the clinic traces its notes")
permit (
    principal in FlexOlmo::Group::"clinic",
    action == FlexOlmo::Action::"trace",
    resource == FlexOlmo::Expert::"notes"
);
"""


class Named:
    """An index under another name, which remembers nothing else."""

    def __init__(self, index, name):
        self.index, self.name_here = index, name

    def __getattr__(self, name):
        return getattr(self.index, name)


def write_parts(where: Path, parts: list[list[list[int]]], vocab_size: int) -> list[Shard]:
    """Parts of an index: of each, documents of ids; 0 ends every document."""
    shards = []
    width = id_bytes(vocab_size)
    for number, documents in enumerate(parts):
        directory = where / f"{number}"
        directory.mkdir(parents=True)
        offsets = np.cumsum([0, *(len(d) + 1 for d in documents)])
        ids = np.array([i for d in documents for i in [*d, 0]], dtype=np.uint32)
        names = [f"{number}-{n}" for n in range(len(documents))]
        write_shard(directory, ids, offsets, names, width)
        shards.append(Shard(directory, width))
    return shards


def places_of(run: list[int], document: list[int]) -> list[int]:
    """Every place at which `run` occurs in `document`, by looking at each."""
    size = len(run)
    return [k for k in range(len(document) - size + 1) if document[k : k + size] == run]


def slow_spans(
    ids: list[int], cuts: list[int], documents: list[list[int]], min_tokens: int
) -> list[tuple[int, int]]:
    """Maximal spans by trying every pair of cuts, and leaving out what another contains."""
    found = [
        (start, end)
        for start in cuts
        for end in cuts
        if end - start >= min_tokens and any(places_of(ids[start:end], d) for d in documents)
    ]
    return [
        (start, end)
        for start, end in found
        if not any(a <= start and end <= b and (a, b) != (start, end) for a, b in found)
    ]


def prepare_text(where: Path, texts: list[str], name: str = "clinic") -> Path:
    """A prepared set of `texts`, a tenth of them held out and a tenth to choose settings on."""
    settings = SMALL.model_copy(update={"min_document_bytes": 1, "max_document_bytes": 50_000})
    prepare_set(write_raw(where / "raw", name, texts), where / "prepared", settings=settings)
    return where / "prepared"


def made_index(where: Path, texts: list[str], shard_tokens: int = 1500) -> Index:
    """An index of `texts`, most of which are in its training split."""
    build_index(prepare_text(where, texts), where / "index", shard_tokens)
    return open_index(where / "index")


def documents_of(index: Index) -> list[tuple[list[int], str]]:
    """Ids of every document of an index, and its name."""
    found = []
    for shard in index.shards:
        for n, start in enumerate(shard.documents[:-1]):
            found.append((shard.ids(int(start), int(shard.documents[n + 1]) - 1), shard.name(n)))
    return found
