"""Two mixtures, one of which never held an expert, compared bit for bit while it is off.

Every number that either computes is read back: of a text's first tokens at once, of the next ones
one by one from a cache; in batches of one shape, and side by side as a server does; with the expert
off for all, and off beside texts for which it is on. Inputs follow from a seed alone, on any
machine. Source: ours.

B texts, T positions, V vocabulary.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flexolmo.bundle.manifest import Name
from flexolmo.bundle.strict import Claim
from flexolmo.bundle.tensors import Digest, Positive
from flexolmo.data.tokenizer import Tokenizer
from flexolmo.errors import ConfigError, ProofError
from flexolmo.files import canonical_json, digest_bytes
from flexolmo.inference.side_by_side import SideBySide
from flexolmo.merge.lineage import bytes_of
from flexolmo.merge.mixture import LoadedMixture
from flexolmo.model.moe import MixtureModel
from flexolmo.model.panels import Panels
from flexolmo.model.probabilities import AnyMixture, Mix, arrange
from flexolmo.model.router import DiscriminantSettings
from flexolmo.progress import progress

SEQUENCE_TOKENS = 64  # of a sequence at most, with the end-of-text token that begins it
WRITTEN_TOKENS = 8  # of them that are read one by one
BATCH_SEQUENCES = 2  # so few that the second copy of the matrices is used
MOST_CLAIMED = 64  # tokens, and pairs of them, of which texts that an expert claims are made
MOST_SUBSETS = 1 << 16
How = Literal["whole", "panels", "served"]  # from which copy of the matrices, or as a server does
# Ways to read: what of the experts is mixed, and how.
WAYS: dict[str, tuple[Mix, How]] = {
    "states": ("states", "whole"),
    "states, from panels": ("states", "panels"),
    "probabilities": ("probabilities", "whole"),
    "states, as served": ("states", "served"),
}

Sequences = list[list[int]]  # token ids
Kind = Literal["random", "claimed", "given"]  # tokens at random, an expert's, of given texts


class Inputs(Claim):
    """Sequences of one kind, and a digest of all logits that were computed of them."""

    sequences: Positive
    tokens: Positive
    ids: Digest
    logits: Digest


class Compared(Claim):
    """Everything that was compared, and found equal bit for bit."""

    subsets: list[list[Name]]  # of the other experts, that were on
    ways: list[str]
    dtype: str
    inputs: dict[Kind, Inputs]
    # positions after which the expert, when on, changed a logit; None: it was not there
    changed_positions: int | None = Field(ge=0)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(x.tokens for x in self.inputs.values())

    @property
    def positions(self) -> int:
        """Positions after which logits were compared, with the expert off in the whole batch."""
        return self.tokens * len(self.subsets) * len(self.ways)


# --- inputs -------------------------------------------------------------------------------------


def draw(seed: int, label: str, count: int) -> np.ndarray:
    """`count` whole numbers below 2^64, of `seed` and `label` alone, uint64; by SHAKE-256."""
    data = hashlib.shake_256(f"{seed} {label}".encode()).digest(8 * count)
    return np.frombuffer(data, "<u8")


def draw_subsets(names: Sequence[str], most: int | None, seed: int) -> list[list[str]]:
    """Subsets of `names`: all, or `most` different ones, first nobody, then everybody, then drawn.

    Raises ConfigError for more than MOST_SUBSETS.
    """
    possible = 1 << len(names)
    count = possible if most is None else min(most, possible)
    if count > MOST_SUBSETS:
        raise ConfigError(
            f"{count} sets of experts would be compared; give at most {MOST_SUBSETS} (--subsets)."
        )
    chosen = dict.fromkeys([0, possible - 1][:count])  # bit i: the i-th name is on
    if count == possible:
        chosen = dict.fromkeys(range(possible))
    drawn = 0
    while len(chosen) < count:
        data = hashlib.shake_256(f"{seed} subset {drawn}".encode()).digest(16 + len(names) // 8)
        chosen[int.from_bytes(data, "little") % possible] = None
        drawn += 1
    return [[n for i, n in enumerate(names) if number >> i & 1] for number in chosen]


def random_sequences(model: MixtureModel, count: int, seed: int) -> Sequences:
    """Sequences of any tokens; one in 16 ends a text."""
    length, eos = _length(model), model.config.eos_token_id
    drawn = draw(seed, "random", count * (length - 1)).reshape(count, length - 1)
    ids = np.where(drawn >> 60 == 0, eos, drawn % model.config.vocab_size)
    return [[eos, *row] for row in ids.tolist()]


def claimed_sequences(model: MixtureModel, name: str, count: int, seed: int) -> Sequences:
    """Sequences of the tokens, and pairs of tokens, that the expert's table claims most; none if
    its router has no table."""
    if model.router is None:
        return []
    table = model.router.table(name).table
    pairs = table.keys[np.argsort(-table.pair_levels.astype(int), kind="stable")[:MOST_CLAIMED]]
    tokens = np.argsort(-table.token_levels.astype(int), kind="stable")[:MOST_CLAIMED]
    words = [divmod(pair, model.config.vocab_size) for pair in pairs.tolist()]
    words += [(token,) for token in tokens.tolist()]
    length, eos = _length(model), model.config.eos_token_id
    drawn = draw(seed, "claimed", count * length).reshape(count, length) % len(words)
    rows = [[token for i in row for token in words[i]] for row in drawn.tolist()]
    return [[eos, *row][:length] for row in rows]


def text_sequences(model: MixtureModel, tokenizer: Tokenizer, texts: Sequence[str]) -> Sequences:
    """Every token of `texts`, each text in as many sequences as it fills."""
    size, eos = _length(model) - 1, model.config.eos_token_id
    return [
        [eos, *ids[start : start + size]]
        for ids in tokenizer.encode_batch(texts)
        for start in range(0, max(len(ids), 1), size)
    ]


def _length(model: MixtureModel) -> int:
    return min(SEQUENCE_TOKENS, model.config.max_seq_len)


# --- comparison ---------------------------------------------------------------------------------


def compare_mixtures(
    mixture: LoadedMixture,
    never: LoadedMixture,
    name: str,
    subsets: Sequence[Sequence[str]],
    inputs: Mapping[Kind, Sequences],
    ways: Collection[str] | None = None,
) -> Compared:
    """Compare logits of `mixture`, with expert `name` off, with those of `never`, which does not
    hold it, for each of `subsets` of the other experts and all `inputs`, by kind.

    `ways` are the ones of WAYS to read in, by default all; those that the router bars are left out.
    `mixture` need not hold the expert either. Lays out both models' matrices anew, and changes no
    number.

    Raises:
        ProofError: a bit differs; a logit is NaN or infinite; or the expert, when on, changes
            nothing, so that these inputs could not have shown a trace of it.
    """
    has_expert = name in mixture.expert_names
    used = [way for way in WAYS if (ways is None or way in ways) and _is_open(mixture.model, way)]
    batches = {kind: list(_batches(sequences)) for kind, sequences in inputs.items()}
    digests = {kind: hashlib.sha256() for kind in inputs}
    changed = 0
    total = len(used) * len(subsets) * sum(map(len, batches.values()))
    with torch.inference_mode(), progress("compare", total, "batches") as meter:
        for way in used:
            one, two = (_open(m, way) for m in (mixture, never))
            for on, kind in product(subsets, inputs):
                where = f"{kind} sequences, read as {way}, with {', '.join(on) or 'nobody else'} on"
                for batch in batches[kind]:
                    count = len(batch.ids)
                    off = [on] * count
                    expected = two.read(batch, off)
                    _refuse_difference(one.read(batch, off), expected, where)
                    digests[kind].update(_bytes(expected))
                    others = [[*on, name]] * count if has_expert else off
                    mixed = one.read(batch.twice(), [*off, *others])
                    expected = two.read(batch.twice(), [*off, *off])[:count]
                    _refuse_difference(mixed[:count], expected, f"{where}, beside texts with it on")
                    digests[kind].update(_bytes(expected))
                    changed += int((_differs(*mixed.chunk(2)) & batch.is_token).sum())
                    meter.advance()
    if has_expert and not changed:
        raise ProofError(
            f"{name} changed no number when it was on, so these inputs could show no trace of it. "
            "Give texts of its subject (--texts)."
        )
    return Compared(
        subsets=[list(on) for on in subsets],
        ways=used,
        dtype=str(mixture.model.embed_tokens.weight.dtype).removeprefix("torch."),
        inputs={
            kind: Inputs(
                sequences=len(found),
                tokens=sum(map(len, found)),
                ids=digest_bytes(canonical_json(found)),
                logits=f"sha256:{digests[kind].hexdigest()}",
            )
            for kind, found in inputs.items()
        },
        changed_positions=changed if has_expert else None,
    )


@dataclass(frozen=True)
class _Batch:
    """Sequences read together."""

    ids: Tensor  # [B,T]
    is_token: Tensor  # [B,T] False on padding, which stands before the tokens
    first: int  # positions that are read at once; the rest one by one

    def twice(self) -> "_Batch":
        """Every sequence two times, [2B,T]."""
        return _Batch(self.ids.repeat(2, 1), self.is_token.repeat(2, 1), self.first)


def _batches(sequences: Sequences) -> Iterator[_Batch]:
    for start in range(0, len(sequences), BATCH_SEQUENCES):
        rows = sequences[start : start + BATCH_SEQUENCES]
        longest = max(map(len, rows))
        missing = torch.tensor([longest - len(row) for row in rows])
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        written = min(WRITTEN_TOKENS, min(map(len, rows)) - 1)
        yield _Batch(ids, torch.arange(longest) >= missing[:, None], longest - written)


class _Reading(Protocol):
    """A mixture, read in one of WAYS."""

    def read(self, batch: _Batch, on: Sequence[Sequence[str]]) -> Tensor:
        """Logits, or log-probabilities, after every position, [B,T,V]; `on` are the experts that
        are on for each text."""


def _is_open(model: MixtureModel, way: str) -> bool:
    """True if a mixture with this router can be read so."""
    mix, how = WAYS[way]
    if how == "served":
        return not isinstance(model.settings, DiscriminantSettings)
    return mix == "states" or model.router is not None


def _open(mixture: LoadedMixture, way: str) -> _Reading:
    mix, how = WAYS[way]
    if how == "served":
        return _Served(SideBySide(mixture.model, mixture.tokenizer))
    mixture.model.space_weights()  # as whoever generates does
    panels = mixture.model.cut_panels() if how == "panels" else None
    return _Batched(arrange(mixture.model, mix), panels)


@dataclass(frozen=True)
class _Served:
    """A mixture, read as a server does."""

    texts: SideBySide

    def read(self, batch: _Batch, on: Sequence[Sequence[str]]) -> Tensor:
        """See `_Reading`; zeros on padding."""
        rows = [ids[real].tolist() for ids, real in zip(batch.ids, batch.is_token, strict=True)]
        found = self.texts.read(rows, on, batch.ids.shape[1] - batch.first)
        return pad_sequence(found, batch_first=True, padding_side="left")


@dataclass(frozen=True)
class _Batched:
    """A mixture, read in batches of one shape."""

    model: AnyMixture
    panels: Panels | None

    def read(self, batch: _Batch, on: Sequence[Sequence[str]]) -> Tensor:
        """See `_Reading`."""
        cache = self.model.new_cache()
        cache.active = self.model.expert_mask(on)
        is_token = batch.is_token[:, : batch.first]
        prompt = batch.ids[:, : batch.first]
        found = [self.model(prompt, is_token=is_token, cache=cache, panels=self.panels)]
        for t in range(batch.first, batch.ids.shape[1]):
            ids = batch.ids[:, t : t + 1]
            found.append(self.model(ids, cache=cache, panels=self.panels))
        return torch.cat(found, dim=1)


def _differs(found: Tensor, expected: Tensor) -> Tensor:
    """Positions [B,T] after which a bit of the logits [B,T,V] differs."""
    return (found.contiguous().view(torch.uint8) != expected.contiguous().view(torch.uint8)).any(-1)


def _refuse_difference(found: Tensor, expected: Tensor, where: str) -> None:
    """ProofError unless both have the same bits, and all are numbers."""
    differs = _differs(found, expected)
    if differs.any():
        raise ProofError(
            f"The expert that is off leaves a trace: after {int(differs.sum())} of "
            f"{differs.numel()} positions the logits are not those of the mixture without it, of "
            f"{where}."
        )
    if not torch.isfinite(expected).all():
        raise ProofError(f"Among the logits are NaN or infinity: of {where}.")


def _bytes(logits: Tensor) -> memoryview:
    return bytes_of(logits).numpy().data
