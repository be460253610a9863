"""An index of an owner's training text, opened: where does a run of ids occur, word for word?

The directory holds `card.json`, `tokenizer.json`, `counts.npy` (int64 [V], tokens of each id) and
one directory for each part (`shard`). It holds the text, so it stays where the text is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import numpy as np
from pydantic import Field, ValidationError

from flexolmo.bundle.strict import Claim
from flexolmo.bundle.tensors import Digest
from flexolmo.data.tokenizer import Tokenizer, load_tokenizer
from flexolmo.errors import DataError
from flexolmo.files import digest_file, read_json
from flexolmo.trace.shard import FILES, Shard, encode_ids

FORMAT: Final = "flexolmo-trace-index-1"
CARD = "card.json"
COUNTS = "counts.npy"


class ShardCard(Claim):
    """Sizes of one part, and the digests of its files."""

    documents: int = Field(ge=1)
    tokens: int = Field(ge=1)
    digests: dict[str, Digest]


class IndexCard(Claim):
    """Content of card.json."""

    format: Literal["flexolmo-trace-index-1"]
    name: str  # of the prepared set, and of the source
    recipe: Digest  # of all that decides the index: the prepared set, the size of parts
    tokenizer: Digest
    eos: str
    id_bytes: int = Field(ge=2, le=3)
    documents: int = Field(ge=1)
    bytes: int = Field(ge=0)  # of text
    shards: list[ShardCard] = Field(min_length=1)
    digests: dict[str, Digest]  # of the files beside the parts


def shard_name(number: int) -> str:
    """Name of the directory of part `number`."""
    return f"shard-{number:05}"


@dataclass(frozen=True)
class Occurrence:
    """One place where a span occurs: a document of the owner's, and the text around."""

    document: str
    position: int  # bytes of the document's text before the span
    before: str
    text: str
    after: str


class Index:
    """One index; made by `open_index`."""

    def __init__(self, directory: Path, card: IndexCard, shards: Sequence[Shard]):
        self.directory = directory
        self.card = card
        self.shards = shards

    @property
    def name(self) -> str:
        """Name of the source."""
        return self.card.name

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the text was read with."""
        return load_tokenizer(self.directory, self.card.eos)

    @cached_property
    def bits(self) -> np.ndarray:
        """Rarity of each id in this text, -log2 of its share, float64 [V]; inf if there is none."""
        counts = np.load(self.directory / COUNTS, allow_pickle=False)
        with np.errstate(divide="ignore"):
            return np.log2(counts.sum()) - np.log2(counts)

    def encode(self, ids: Sequence[int]) -> bytes:
        """`ids`, each below 256**id_bytes, as patterns are given to `reach`, `count` and `find`."""
        return encode_ids(ids, self.card.id_bytes).tobytes()

    def occurs(self, ids: Sequence[int]) -> bool:
        """True if `ids`, whatever numbers they are, occur within one document."""
        if max(ids) >= self.tokenizer.vocab_size or self.tokenizer.eos_id in ids:
            return False  # the end-of-text id would lead from one document into the next
        return self.reach(self.encode(ids)) == len(ids)

    def reach(self, pattern: bytes) -> int:
        """Number of ids with which `pattern` begins somewhere in the text."""
        return max(shard.longest(pattern) for shard in self.shards)

    def count(self, pattern: bytes) -> int:
        """Number of places at which `pattern` occurs."""
        return sum(len(shard.find(pattern)) for shard in self.shards)

    def find(self, pattern: bytes, context_tokens: int) -> Iterator[Occurrence]:
        """The places at which `pattern` occurs, each with so much text on both sides of it."""
        size = len(pattern) // self.card.id_bytes
        for shard in self.shards:
            for number in shard.find(pattern):
                yield self._show(shard, shard.place(number), size, context_tokens)

    def _show(self, shard: Shard, place: int, size: int, context_tokens: int) -> Occurrence:
        document = shard.document(place)
        first = int(shard.documents[document])
        last = int(shard.documents[document + 1]) - 1  # the end-of-text id is no text
        decode = self.tokenizer.decode
        end = place + size
        return Occurrence(
            document=shard.name(document),
            position=len(decode(shard.ids(first, place)).encode()),
            before=decode(shard.ids(max(first, place - context_tokens), place)),
            text=decode(shard.ids(place, end)),
            after=decode(shard.ids(end, min(last, end + context_tokens))),
        )


def read_card(directory: Path) -> IndexCard:
    """The card of the index in `directory`; DataError if there is none of this format."""
    path = Path(directory) / CARD
    value = read_json(path, DataError)
    try:
        return IndexCard.model_validate(value)
    except ValidationError as e:
        problem = e.errors(include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise DataError(
            f"{path} is no card of an index of format {FORMAT} ({where}: {problem['msg']}). Make "
            "one with flexolmo trace index."
        ) from None


def open_index(directory: Path) -> Index:
    """The index in `directory`, memory-mapped, with the digest of every file checked.

    Raises:
        DataError: no index, or a file that is not what the card says.
    """
    directory = Path(directory)
    card = read_card(directory)
    wanted = dict(card.digests)
    for number, shard in enumerate(card.shards):
        wanted |= {f"{shard_name(number)}/{name}": shard.digests.get(name, "") for name in FILES}
    for name in ("tokenizer.json", COUNTS):
        wanted.setdefault(name, "")
    for name, digest in wanted.items():
        _check_file(directory / name, digest)
    names = [shard_name(number) for number in range(len(card.shards))]
    return Index(directory, card, [Shard(directory / name, card.id_bytes) for name in names])


def _check_file(path: Path, digest: str) -> None:
    try:
        found = digest_file(path)
    except OSError as e:
        raise DataError(f"{path} cannot be read ({e.strerror}): index again.") from None
    if found != digest:
        raise DataError(f"{path} is not the file that {CARD} describes: index again.")
