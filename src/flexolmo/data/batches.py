"""Token shards to batches: seeded, resumable training windows and exact evaluation windows.

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

from flexolmo.data.prepare import SPLITS, card_digest, read_card
from flexolmo.errors import DataError


@dataclass(frozen=True)
class TokenSplit:
    """One split of a prepared set, memory-mapped."""

    tokens: np.ndarray  # uint16 or uint32 [tokens]: documents, each followed by the eos
    offsets: np.ndarray  # int64 [n + 1]: where documents start, and the end
    bytes: np.ndarray  # int64 [n]: UTF-8 bytes of each document's text

    @property
    def num_documents(self) -> int:
        """n."""
        return len(self.bytes)

    def document(self, index: int) -> np.ndarray:
        """Ids of document `index`, int64, without the eos that follows it."""
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
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
    def eos_id(self) -> int:
        """Id that follows every document."""
        return self.card["tokenizer"]["eos_id"]

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return self.card["tokenizer"]["vocab_size"]


def open_set(prepared: Path, tokenizer_digest: str | None = None) -> TokenSet:
    """The prepared set in directory `prepared`, memory-mapped.

    Args:
        tokenizer_digest: if given, the set must have been made with that very tokenizer.
    Raises:
        DataError: not a prepared set, a shard that does not fit its card, another tokenizer.
    """
    prepared = Path(prepared)
    card = read_card(prepared)
    found = card["tokenizer"]["digest"]
    if tokenizer_digest is not None and found != tokenizer_digest:
        raise DataError(
            f"{prepared} was tokenized with {found}, but {tokenizer_digest} is in "
            "use here: prepare the set again with the anchor's tokenizer."
        )
    return TokenSet(prepared, card, {split: _open_split(prepared, card, split) for split in SPLITS})


def _open_split(prepared: Path, card: dict[str, Any], split: str) -> TokenSplit:
    arrays = {}
    for part in ("tokens", "offsets", "bytes"):
        file = prepared / f"{split}_{part}.npy"
        try:
            arrays[part] = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as e:
            raise DataError(f"{file} cannot be opened ({e}): prepare the set again.") from None
    opened = TokenSplit(**arrays)
    counts = card["splits"][split]
    if (
        len(opened.tokens) != counts["tokens"]
        or len(opened.bytes) != counts["documents"]
        or len(opened.offsets) != counts["documents"] + 1
        or opened.offsets[-1] != counts["tokens"]
    ):
        raise DataError(
            f"{prepared}, split {split}: the shards hold {len(opened.tokens)} tokens in "
            f"{len(opened.bytes)} documents; its card says {counts['tokens']} in "
            f"{counts['documents']}. Prepare the set again."
        )
    return opened


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

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every window is visited once."""
        return self.num_windows / self.batch_size

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
