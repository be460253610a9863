"""Index a prepared set: one part after another, each written whole or not at all.

A run that was killed leaves OUT.part with the parts that are done; the same call goes on from
there. Files have mode 0600 and directories 0700, for they hold the owner's text.
"""

import os
import shutil
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from flexolmo.data.batches import TokenSet, open_set
from flexolmo.data.documents import read_documents
from flexolmo.data.prepared import check_file
from flexolmo.data.tokenizer import load_tokenizer
from flexolmo.data.workers import open_workers
from flexolmo.errors import DataError
from flexolmo.files import (
    canonical_json,
    digest_bytes,
    digest_file,
    explain_full_disk,
    lock_directory,
    read_json,
    sync,
    write_directory_aside,
    write_json,
)
from flexolmo.progress import progress
from flexolmo.trace.index import CARD, COUNTS, FORMAT, IndexCard, ShardCard, read_card, shard_name
from flexolmo.trace.shard import FILES, id_bytes, write_shard

SPLIT = "train"
SHARD_TOKENS = 1 << 24
_PLAN = "plan.json"
_SHARD_CARD = "shard.json"
_COUNTED_AT_ONCE = 1 << 22
_Job = tuple[int, int, int, list[str]]  # number of a part, its documents from, to, their names


def build_index(
    prepared: Path, out: Path, shard_tokens: int = SHARD_TOKENS, workers: int = 1
) -> IndexCard:
    """Index the training split of the set `prepared` into `out`; returns the index's card.

    Args:
        shard_tokens: tokens of a part, whole documents. A larger part makes questions faster; a
            part takes about 14 bytes of memory a token while it is made, and more for a
            vocabulary of over 65,536.
        workers: processes, each at one part. The result is the same for any number.
    Raises:
        DataError: `prepared` is no prepared set or is empty, or `out` is something else.
        DiskFullError: there is no room; what is done is kept for the next run.
    """
    out = Path(out)
    token_set = open_set(prepared)
    recipe = digest_bytes(canonical_json([FORMAT, token_set.digest, shard_tokens]))
    if out.exists():
        card = read_card(out)
        if card.recipe != recipe:
            raise DataError(
                f"{out} is an index of another set or of other parts, and is not replaced. Remove "
                "it, or choose another place."
            )
        return card
    part = out.with_name(out.name + ".part")
    part.mkdir(0o700, parents=True, exist_ok=True)
    with explain_full_disk(part), lock_directory(part, wait=False) as is_held:
        if not is_held:
            raise DataError(
                f"{part} cannot be locked: another run makes this index, or the file system has no "
                "locks. Wait for its end, or choose another place."
            )
        _begin(part, recipe)
        card = _fill(part, token_set, recipe, shard_tokens, workers)
        os.replace(part, out)
        sync(out.parent)
    return card


def _begin(part: Path, recipe: str) -> None:
    """Remove what a run for another index left in `part`."""
    plan = part / _PLAN
    if plan.exists() and read_json(plan) == recipe:
        return
    for left in part.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()
    write_json(plan, recipe, is_private=True)


def _fill(
    part: Path, token_set: TokenSet, recipe: str, shard_tokens: int, workers: int
) -> IndexCard:
    """Make all that `part` lacks; its card, written last."""
    split = token_set.splits[SPLIT]
    ranges = cut_documents(split.offsets, shard_tokens)
    if not ranges:
        raise DataError(f"{token_set.directory} has no document in its split {SPLIT!r}.")
    tokenizer = load_tokenizer(token_set.directory)
    width = id_bytes(token_set.vocab_size)
    make = partial(_make_shard, token_set.directory, part, width)
    with (
        open_workers(workers) as run,
        progress(f"Indexing {token_set.name}", len(split.tokens), "tokens") as meter,
    ):
        for shard in run(make, _list_jobs(token_set, ranges)):
            meter.advance(shard.tokens)
    shards = [_read_shard_card(part / shard_name(n)) for n in range(len(ranges))]
    tokenizer.save(part / "tokenizer.json")
    np.save(part / COUNTS, _count_ids(token_set), allow_pickle=False)
    beside = [p for p in part.iterdir() if p.is_file() and p.name not in (_PLAN, CARD)]
    for path in beside:
        os.chmod(path, 0o600)
        sync(path)
    card = IndexCard(
        format=FORMAT,
        name=token_set.name,
        recipe=recipe,
        tokenizer=tokenizer.digest,
        eos=tokenizer.eos,
        id_bytes=width,
        documents=split.num_documents,
        bytes=int(split.bytes.sum()),
        shards=shards,
        digests={path.name: digest_file(path) for path in sorted(beside)},
    )
    write_json(part / CARD, card.model_dump(), is_private=True)
    return card


def cut_documents(offsets: np.ndarray, shard_tokens: int) -> list[tuple[int, int]]:
    """Documents [first, end) of each part: as many as fit into `shard_tokens`, at least one."""
    ranges = []
    first = 0
    while first < len(offsets) - 1:
        end = int(np.searchsorted(offsets, offsets[first] + shard_tokens, side="right")) - 1
        ranges.append((first, max(end, first + 1)))
        first = ranges[-1][1]
    return ranges


def _list_jobs(token_set: TokenSet, ranges: list[tuple[int, int]]) -> Iterator[_Job]:
    """Work for each part; a document without a name is called by its number."""
    file = check_file(token_set.directory, token_set.card, f"{SPLIT}.jsonl.zst")
    documents = read_documents(file)
    for number, (first, end) in enumerate(ranges):
        some = enumerate(islice(documents, end - first), first)
        yield number, first, end, [document.id or str(n) for n, document in some]


def _make_shard(prepared: Path, part: Path, width: int, job: _Job) -> ShardCard:
    """Make one part, if it is not there, in whatever process this is; its card."""
    number, first, end, names = job
    directory = part / shard_name(number)
    if directory.exists():
        return _read_shard_card(directory)
    offsets = np.load(prepared / f"{SPLIT}_offsets.npy", mmap_mode="r", allow_pickle=False)
    tokens = np.load(prepared / f"{SPLIT}_tokens.npy", mmap_mode="r", allow_pickle=False)
    documents = offsets[first : end + 1] - offsets[first]
    ids = tokens[int(offsets[first]) : int(offsets[end])]
    with write_directory_aside(directory, _SHARD_CARD, is_private=True) as aside:
        write_shard(aside, ids, documents, names, width)
        digests = {name: digest_file(aside / name) for name in FILES}
        card = ShardCard(documents=end - first, tokens=len(ids), digests=digests)
        write_json(aside / _SHARD_CARD, card.model_dump(), is_private=True)
    return card


def _read_shard_card(directory: Path) -> ShardCard:
    return ShardCard.model_validate(read_json(directory / _SHARD_CARD))


def _count_ids(token_set: TokenSet) -> np.ndarray:
    """Tokens of each id, int64 [V]; the end-of-text id is no text and counts none."""
    tokens = token_set.splits[SPLIT].tokens
    counts = np.zeros(token_set.vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), _COUNTED_AT_ONCE):
        some = tokens[start : start + _COUNTED_AT_ONCE]
        counts += np.bincount(some, minlength=token_set.vocab_size)
    counts[token_set.eos_id] = 0
    return counts
