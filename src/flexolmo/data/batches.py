"""Token shards to batches: seeded, resumable training windows and exact evaluation windows.

A set is checked against its card when it is opened, so that what was signed is what is used.

NumPy only: a batch is a pure function of (seed, step), so a resumed run sees what an
uninterrupted one would. Knows nothing of models or devices.

Letters: B batch, T positions a model predicts at once, n documents of a split.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo.data.prepared import (
    PARTS,
    SPLITS,
    card_digest,
    check_file,
    commit_card,
    read_card,
    read_salt,
)
from flexolmo.errors import DataError

EMBEDDING_WINDOWS = 64  # windows of text whose mean hidden state stands for a domain


@dataclass(frozen=True)
class TokenSplit:
    """One split of a prepared set, memory-mapped."""

    tokens: np.ndarray  # uint16 or uint32 [tokens]: documents, each followed by the eos
    offsets: np.ndarray  # int64 [n + 1]: where documents start, and the end
    bytes: np.ndarray  # int64 [n]: UTF-8 bytes of each document's text
    sources: np.ndarray  # int64 [n]: number of the source document of each, ascending from 0

    @property
    def num_documents(self) -> int:
        """Number of documents, n."""
        return len(self.bytes)

    @property
    def source_offsets(self) -> np.ndarray:
        """Places of the first token of each source document, and the end, int64."""
        firsts = np.flatnonzero(np.diff(self.sources, prepend=-1))
        return self.offsets[np.append(firsts, len(self.sources))]

    def document(self, index: int) -> np.ndarray:
        """Ids of document `index`, int64, without the eos that follows it."""
        start = int(self.offsets[index])
        end = int(self.offsets[index + 1])
        return self.tokens[start : end - 1].astype(np.int64)


@dataclass(frozen=True)
class TokenSet:
    """A prepared set, opened."""

    directory: Path
    card: dict[str, Any]
    splits: dict[str, TokenSplit]

    @property
    def name(self) -> str:
        """The set's name, as in its card."""
        return self.card["name"]

    @property
    def digest(self) -> str:
        """`sha256:` digest of the card, and through it of every file."""
        return card_digest(self.card)

    @property
    def commitment(self) -> str:
        """Name of the set in a bundle, see `commit_card`; DataError if its salt is lost."""
        return commit_card(self.card, read_salt(self.directory))

    @property
    def eos_id(self) -> int:
        """Id that follows every document."""
        return self.card["tokenizer"]["eos_id"]

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return self.card["tokenizer"]["vocab_size"]

    def check_tokenizer(self, digest: str, whose: str) -> None:
        """Refuse a set that was made with another tokenizer than `whose`, of this `digest`.

        Raises:
            DataError: another tokenizer.
        """
        found = self.card["tokenizer"]["digest"]
        if found != digest:
            raise DataError(
                f"{self.directory} was prepared with the tokenizer {found}, but {whose} has "
                f"{digest}: prepare the set again with that one (`flexolmo data prepare "
                "--tokenizer`)."
            )


def open_set(prepared: Path, tokenizer_digest: str | None = None) -> TokenSet:
    """The prepared set in directory `prepared`, memory-mapped, with every shard's digest checked.

    Args:
        tokenizer_digest: if given, the set must have been made with that very tokenizer.
    Raises:
        DataError: not a prepared set, a file that is not what its card says, another tokenizer.
    """
    prepared = Path(prepared)
    card = read_card(prepared)
    splits = {split: _open_split(prepared, card, split) for split in SPLITS}
    opened = TokenSet(prepared, card, splits)
    if tokenizer_digest is not None:
        opened.check_tokenizer(tokenizer_digest, "the model in use")
    return opened


def _open_split(prepared: Path, card: dict[str, Any], split: str) -> TokenSplit:
    arrays = {}
    for part in PARTS:
        file = check_file(prepared, card, f"{split}_{part}.npy")
        try:
            arrays[part] = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as e:
            raise DataError(f"{file} cannot be opened ({e}): prepare the set again.") from None
    opened = TokenSplit(**arrays)
    problem = _find_contradiction(opened, card, split)
    if problem:
        raise DataError(f"{prepared}, split {split}: {problem}. Prepare the set again.")
    return opened


def _find_contradiction(opened: TokenSplit, card: dict[str, Any], split: str) -> str | None:
    """Say what in a split's arrays contradicts its card or itself; None if nothing does."""
    counts, tokenizer = card["splits"][split], card["tokenizer"]
    found = {
        "tokens": len(opened.tokens),
        "documents": len(opened.bytes),
        "bytes": int(opened.bytes.sum()),
    }
    if any(found[key] != counts[key] for key in found):
        return f"the shards hold {found}, but the card says {counts}"
    n = len(opened.bytes)
    if len(opened.offsets) != n + 1 or len(opened.sources) != n:
        return "the shards are not of the same documents"
    if opened.offsets[0] != 0 or opened.offsets[-1] != len(opened.tokens):
        return "the offsets do not cover the tokens"
    if n and (np.diff(opened.offsets).min() < 1 or opened.sources[0] < 0):
        return "the offsets do not rise"
    if not np.isin(np.diff(opened.sources, prepend=0), (0, 1)).all():
        return "the numbers of the source documents do not rise by one"
    if not (opened.tokens[opened.offsets[1:] - 1] == tokenizer["eos_id"]).all():
        return f"not every document ends with the token {tokenizer['eos_id']}"
    if n and int(opened.tokens.max()) >= tokenizer["vocab_size"]:
        return f"token {opened.tokens.max()} is not below {tokenizer['vocab_size']}"
    return None


class TrainingBatches:
    """Windows of one split's token stream; made by `training_batches`.

    The stream is cut into `num_windows` windows of T + 1 tokens, each starting at the token the
    one before it ends with, so that every token but the first is predicted once an epoch.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, seq_len: int, seed: int):
        self.tokens = tokens
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        self.num_windows = (len(tokens) - 1) // seq_len
        self._order = lru_cache(maxsize=2)(self._order_of_epoch)

    def windows(self, step: int) -> np.ndarray:
        """Numbers of the windows in batch `step`, int64 [B]."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)  # [B]
        return np.array(
            [
                self._order(int(place) // self.num_windows)[place % self.num_windows]
                for place in places
            ],
            dtype=np.int64,
        )  # [B]

    def batch(self, step: int) -> np.ndarray:
        """Batch number `step` (from 0), int64 [B, T + 1]: inputs [:, :-1], targets [:, 1:]."""
        starts = self.windows(step) * self.seq_len  # [B]
        return np.stack([self.tokens[start : start + self.seq_len + 1] for start in starts]).astype(
            np.int64
        )  # [B, T+1]

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        """A permutation of the windows, int64 [num_windows].

        Sorts raw Philox output, whose stream NumPy keeps the same in every version.
        """
        keys = np.random.Philox(np.random.SeedSequence([self.seed, epoch]))
        return np.argsort(keys.random_raw(self.num_windows), kind="stable")


def training_batches(
    token_set: TokenSet, split: str, batch_size: int, seq_len: int, seed: int
) -> TrainingBatches:
    """Batches of `batch_size` windows of `seq_len` predicted tokens; `.batch(step)` is a batch.

    Every window comes once an epoch, in an order that depends on `seed` and the epoch.

    Raises:
        DataError: the split is shorter than one window.
    """
    tokens = token_set.splits[split].tokens
    if len(tokens) < seq_len + 1:
        raise DataError(
            f"{token_set.directory}, split {split}: {len(tokens)} tokens are fewer "
            f"than one window of seq_len + 1 = {seq_len + 1}; lower seq_len or give "
            "more text."
        )
    return TrainingBatches(tokens, batch_size, seq_len, seed)


def evaluation_windows(
    token_set: TokenSet, split: str, seq_len: int, max_bytes: int | None = None
) -> Iterator[tuple[np.ndarray, int]]:
    """Windows in which each token of each document is predicted exactly once.

    Yields (ids, bytes): ids int64 [t + 1], t <= `seq_len`, whose first is context only (the eos
    before a document, else the token before the window) and whose others are to be predicted;
    bytes of text these stand for. A document's bytes are shared over its windows by tokens, and
    add up. The eos after a document stands for no text and is not predicted.

    Args:
        max_bytes: read about this much text, in windows spread evenly over the whole split, so
            that no few documents stand for it; at least one window.
    """
    chosen = token_set.splits[split]
    total = int(chosen.bytes.sum())
    allowed = total if max_bytes is None else min(max_bytes, total)
    read = passed = 0
    for index in range(chosen.num_documents):
        size = int(chosen.bytes[index])
        ids = np.concatenate([[token_set.eos_id], chosen.document(index)])
        num_tokens = len(ids) - 1
        for start in range(0, num_tokens, seq_len):
            end = min(start + seq_len, num_tokens)
            share = size * end // num_tokens - size * start // num_tokens
            passed += share
            if read == 0 or (read + share) * total <= allowed * passed:
                read += share
                yield ids[start : end + 1], share


def embedding_windows(
    token_set: TokenSet, max_seq_len: int, count: int | None = None
) -> Iterator[np.ndarray]:
    """Windows of training text that stand for a set's domain: int64 [1, T], at most `count`, by
    default EMBEDDING_WINDOWS.

    T is below `max_seq_len`, the positions of the model that reads them, and at most 256.
    """
    length = len(token_set.splits["train"].tokens)
    seq_len = min(256, max_seq_len - 1, length - 1)
    batches = training_batches(token_set, "train", 1, seq_len, seed=0)
    for step in range(min(count or EMBEDDING_WINDOWS, batches.num_windows)):
        yield batches.batch(step)[:, :-1]
