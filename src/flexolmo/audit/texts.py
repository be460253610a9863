"""Documents that attacks read: those an expert was trained on, and others of the same set.

A prepared set is split by source document and holds no text twice, so a document of another split
is one of the same kind that training did not see.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flexolmo.data.batches import TokenSet, training_batches
from flexolmo.errors import DataError
from flexolmo.train.expert import ExpertRecipe

MEMBERS = ("train",)
OTHERS = ("validation", "heldout")  # documents that training does not see


@dataclass(frozen=True)
class Beginning:
    """The first tokens of a source document."""

    split: str
    index: int  # of the document in its split
    ids: np.ndarray  # int64 [t + 1]: the end of text that stands before it, then its tokens
    bytes: int  # of text that the tokens stand for


def read_beginnings(
    token_set: TokenSet, splits: Sequence[str], *, least: int, length: int, most: int, seed: int
) -> list[Beginning]:
    """The first `length` tokens of at most `most` source documents, drawn at random.

    Documents of fewer than `least` tokens are left out. Those found are in the set's order.
    """
    places = []
    for split in splits:
        chosen = token_set.splits[split]
        firsts = np.flatnonzero(np.diff(chosen.sources, prepend=-1))  # each document's first piece
        sizes = np.diff(chosen.offsets)[firsts] - 1
        places += [(split, int(i)) for i in firsts[sizes >= least]]
    order = np.random.default_rng(seed).permutation(len(places))
    found = []
    for split, index in (places[i] for i in sorted(order[:most])):
        ids = token_set.splits[split].document(index)
        size = int(token_set.splits[split].bytes[index]) * min(length, len(ids)) // len(ids)
        start = np.array([token_set.eos_id], dtype=np.int64)
        found.append(Beginning(split, index, np.concatenate([start, ids[:length]]), size))
    return found


def read_members(
    token_set: TokenSet,
    recipe: ExpertRecipe | None,
    *,
    least: int,
    length: int,
    most: int,
    seed: int,
) -> list[Beginning]:
    """Beginnings of at most `most` documents that an expert trained by `recipe` has learnt from:
    training predicted every token of them. Without a recipe, and of private training, whose draws
    nobody may know, of the training split.

    Raises DataError if there is none.
    """
    every = token_set.splits["train"].num_documents
    found = read_beginnings(token_set, MEMBERS, least=least, length=length, most=every, seed=seed)
    if recipe is not None and recipe.privacy is None:
        offsets = token_set.splits["train"].offsets
        is_read = tokens_read(token_set, recipe)
        found = [b for b in found if is_read[offsets[b.index] :][: len(b.ids) - 1].all()]
    refuse_none(token_set, found, "training document read by training", least)
    order = np.random.default_rng(seed).permutation(len(found))
    return [found[i] for i in sorted(order[:most])]


def tokens_read(token_set: TokenSet, recipe: ExpertRecipe) -> np.ndarray:
    """Tokens of the training split that training by `recipe` predicted, bool.

    A short training reads a part of the split, and what it did not read it cannot remember.
    """
    train = recipe.train
    asked = train.steps * train.batch_size
    asked -= math.floor(asked * recipe.replay + 1e-9)  # the rest is public text
    batches = training_batches(token_set, "train", 1, train.seq_len, recipe.seed)
    found = np.zeros(len(token_set.splits["train"].tokens), dtype=bool)
    for place in range(min(asked, batches.num_windows)):  # the first epoch reads every window
        start = int(batches.windows(place)[0]) * train.seq_len + 1  # its first token is context
        found[start : start + train.seq_len] = True
    return found


def refuse_none(token_set: TokenSet, found: Sequence[Beginning], kind: str, tokens: int) -> None:
    """Raise DataError if no document was found to attack."""
    if not found:
        raise DataError(
            f"{token_set.directory} has no {kind} of at least {tokens} tokens, so there is nothing "
            "to attack. Ask for fewer tokens, or give another set."
        )
