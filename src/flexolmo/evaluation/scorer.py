"""Log-likelihoods and continuations of many texts, in batches, each shared beginning read once.

Three methods, as evaluation harnesses ask for: the likelihood of continuations given contexts, of
whole texts, and greedy or sampled continuations. Texts are sorted by length, so that there is
little padding. What many requests begin with (examples of a task) is read once for all, what some
begin with (a question with several answers) once for those. Results do not depend on the order of
requests, but on which are given together, in the last bits. Source: ours.

B batch, T positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from flexolmo.errors import ConfigError
from flexolmo.inference.decode import Request, decode, text_before
from flexolmo.inference.reader import Reader, pad_left, spread
from flexolmo.inference.sampling import Sampling
from flexolmo.progress import Meter

MIN_SHARED_TOKENS = 16  # of a beginning that is read apart
MIN_SAVED_TOKENS = 256  # by reading it apart
Job = TypeVar("Job")


@dataclass(frozen=True)
class Score:
    """Likelihood of one continuation under a model."""

    log_prob: float  # nats, of the whole continuation
    is_greedy: bool  # whether every token was the likeliest
    tokens: int
    is_cut: bool = False  # whether the model did not hold the whole context

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.log_prob + other.log_prob,
            self.is_greedy and other.is_greedy,
            self.tokens + other.tokens,
            self.is_cut or other.is_cut,
        )


@dataclass(frozen=True)
class _Part:
    """A piece of a request that the model holds: what it reads, and what it is to predict."""

    request: int
    context: tuple[int, ...]  # at least one
    targets: tuple[int, ...]  # at least one
    is_cut: bool


class Scorer:
    """The three methods over one reader, `batch_size` texts at a time.

    `batch_tokens` bounds the tokens of a batch, those read before included; with them, memory.
    """

    def __init__(self, reader: Reader, batch_size: int = 32, batch_tokens: int = 8192):
        self.reader = reader
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens

    # --- text ---------------------------------------------------------------------------------

    def log_likelihoods(
        self, pairs: Sequence[tuple[str, str]], meter: Meter | None = None
    ) -> list[Score]:
        """Score each continuation after its context, both text, in the order of `pairs`.

        Spaces that end a context count to the continuation, for tokens begin with them.
        """
        return self.score_ids(self._encode_pairs(pairs), meter)

    def rolling_log_likelihoods(
        self, texts: Sequence[str], meter: Meter | None = None
    ) -> list[Score]:
        """Score each whole text. One that is too long is read in pieces as long as the model
        holds, the last with as much before it as fits, as harnesses do."""
        nothing = self.reader.start or [self.reader.tokenizer.eos_id]
        ids = self.reader.tokenizer.encode_batch(texts)
        return self.score_ids([(nothing, row) for row in ids], meter)

    def continuations(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        stops: Sequence[str] = (),
        seeds: Sequence[int] | None = None,
        meter: Meter | None = None,
    ) -> list[tuple[str, bool]]:
        """Continue each prompt up to the first of `stops`, which is left out; returns the text and
        whether the prompt was cut to leave room.

        Prompt number i draws from `seeds[i]`; without them, from the sampling's seed + i.
        """
        stops = [s for s in stops if s]
        if seeds is None:
            seeds = range(sampling.seed, sampling.seed + len(prompts))
        room = self.reader.max_seq_len - sampling.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"{sampling.max_new_tokens} new tokens were asked for; this model "
                f"holds {self.reader.max_seq_len}, prompt and continuation together."
            )
        rows = [self.reader.start + r for r in self.reader.tokenizer.encode_batch(prompts)]
        rows = [r or [self.reader.tokenizer.eos_id] for r in rows]
        found = [("", len(r) > room) for r in rows]
        cut = [tuple(self._cut(r, room)) for r in rows]
        for root, members in _share(cut, self.reader.shares_prefixes):
            state = self._read_root(root)
            batches = (
                self._batches(members, lambda i: cut[i])
                if self.reader.shares_prefixes
                else ([i] for i in members)
            )  # texts that end cannot leave a batch
            for places in batches:
                requests = [
                    Request(
                        cut[i][len(root) :], sampling.model_copy(update={"seed": seeds[i]}), stops
                    )
                    for i in places
                ]
                written: list[list[int]] = [[] for _ in places]
                for step in decode(
                    self.reader, requests, state=spread(state, len(places)), held_tokens=len(root)
                ):
                    if step.token is not None:
                        written[step.text].append(step.token)
                for i, row in zip(places, written, strict=True):
                    text = text_before(self.reader.tokenizer.decode(row), stops)
                    found[i] = (text, found[i][1])
                if meter is not None:
                    meter.advance(len(places))
        return found

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Ids of context and continuation, cut where the context's own tokens end."""
        moved = []
        for context, continuation in pairs:
            bare = context.rstrip()
            moved.append((bare, context[len(bare) :] + continuation))
        tokenizer, start = self.reader.tokenizer, self.reader.start
        contexts = list(dict.fromkeys(c for c, _ in moved))
        known = dict(zip(contexts, tokenizer.encode_batch(contexts), strict=True))
        whole = tokenizer.encode_batch([c + t for c, t in moved])
        found = []
        for (context, continuation), ids in zip(moved, whole, strict=True):
            length = len(known[context])
            if len(ids) <= length:
                raise ConfigError(
                    f"Nothing is left to predict of {continuation!r} after "
                    f"{context[-40:]!r}; a continuation needs a token of its own."
                )
            head = start + ids[:length]
            found.append((head or [tokenizer.eos_id], ids[length:]))
        return found

    # --- likelihood -----------------------------------------------------------------------------

    def score_ids(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], meter: Meter | None = None
    ) -> list[Score]:
        """Score each continuation after its context, which is not empty; both are ids.

        What does not fit is cut from the context's left, as harnesses do; a continuation longer
        than the model holds is read in pieces.
        """
        parts = [p for i, pair in enumerate(pairs) for p in self._parts(i, *pair)]
        found: list[Score | None] = [None] * len(pairs)
        left = [0] * len(pairs)
        for p in parts:
            left[p.request] += 1
        with torch.inference_mode():
            for part, score in self._score_parts(parts):
                past = found[part.request]
                found[part.request] = score if past is None else past + score
                left[part.request] -= 1
                if meter is not None and not left[part.request]:
                    meter.advance(1)
        return [s or Score(0.0, True, 0) for s in found]  # nothing to predict is certain

    def _parts(
        self, request: int, context: Sequence[int], targets: Sequence[int]
    ) -> Iterator[_Part]:
        limit = self.reader.max_seq_len
        for start in range(0, len(targets), limit):
            piece = tuple(targets[start : start + limit])
            before = [*context, *targets[:start]]
            room = limit + 1 - len(piece)  # the last target is not read
            yield _Part(request, tuple(self._cut(before, room)), piece, len(before) > room)

    def _cut(self, ids: Sequence[int], room: int) -> Sequence[int]:
        """The last `room` ids; of a longer text after those that the reader keeps of its start."""
        kept = self.reader.kept_tokens if self.reader.kept_tokens < room < len(ids) else 0
        return [*ids[:kept], *ids[kept:][-(room - kept) :]]

    def _score_parts(self, parts: Sequence[_Part]) -> Iterator[tuple[_Part, Score]]:
        by_context: dict[tuple[int, ...], list[_Part]] = {}
        for p in parts:
            by_context.setdefault(p.context, []).append(p)
        contexts = list(by_context)
        for root, members in _share(contexts, self.reader.shares_prefixes):
            state = self._read_root(root)
            single, forked = [], []
            for i in members:
                same = by_context[contexts[i]]
                if self.reader.shares_prefixes and len(same) > 1:
                    forked.append((contexts[i][len(root) :], same))
                else:
                    single += [(contexts[i][len(root) :], p) for p in same]
            yield from self._score_single(single, state, len(root))
            yield from self._score_forked(forked, state, len(root))

    def _score_single(
        self, jobs: Sequence[tuple[tuple[int, ...], _Part]], state: Any, held: int
    ) -> Iterator[tuple[_Part, Score]]:
        """Rest of the context and continuation in one go; `state` holds `held` tokens."""
        for batch in self._batches(jobs, lambda job: (*job[0], *job[1].targets[:-1]), held):
            ids, real = pad_left([(*rest, *p.targets[:-1]) for rest, p in batch])
            last = max(len(p.targets) for _, p in batch)
            said = self.reader.read(ids, spread(state, len(batch)), is_token=real, last=last)
            scores = _judge(said, [p.targets for _, p in batch])
            for (_, p), score in zip(batch, scores, strict=True):
                yield p, replace(score, is_cut=p.is_cut)

    def _score_forked(
        self, jobs: Sequence[tuple[tuple[int, ...], Sequence[_Part]]], state: Any, held: int
    ) -> Iterator[tuple[_Part, Score]]:
        """The rest of each context once, then its continuations from there."""
        for batch in self._batches(jobs, lambda job: job[0], held):
            ids, real = pad_left([rest for rest, _ in batch])
            stem = spread(state, len(batch))
            said = self.reader.read(ids, stem, is_token=real, last=1)[:, 0].log_softmax(-1)  # [B,V]
            likeliest = said.argmax(-1).tolist()
            leaves = [(b, p) for b, (_, same) in enumerate(batch) for p in same]
            firsts = said[[b for b, _ in leaves], [p.targets[0] for _, p in leaves]].tolist()
            found = {
                id(p): Score(first, likeliest[b] == p.targets[0], 1, p.is_cut)
                for (b, p), first in zip(leaves, firsts, strict=True)
            }
            longer = [leaf for leaf in leaves if len(leaf[1].targets) > 1]
            for group in self._batches(
                longer, lambda leaf: leaf[1].targets[:-1], held + ids.shape[1]
            ):
                ids, real = pad_left([p.targets[:-1] for _, p in group])
                state_here = stem.select(torch.tensor([b for b, _ in group]))
                said = self.reader.read(ids, state_here, is_token=real, last=ids.shape[1])
                rests = _judge(said, [p.targets[1:] for _, p in group])
                for (_, p), rest in zip(group, rests, strict=True):
                    found[id(p)] += rest
            yield from ((p, found[id(p)]) for _, p in leaves)

    # --- continuing -----------------------------------------------------------------------------

    def _read_root(self, root: tuple[int, ...]) -> Any:
        """The state after what many texts begin with; a state of one text."""
        state = self.reader.new_state()
        if root:
            with torch.inference_mode():
                self.reader.read(torch.tensor([root]), state, last=1)
        return state

    def _batches(
        self, jobs: Sequence[Job], row: Callable[[Job], tuple[int, ...]], held: int = 0
    ) -> Iterator[list[Job]]:
        """Jobs from the longest row to read to the shortest, as many at once as are allowed; each
        goes on from a state of `held` tokens."""
        ordered = sorted(jobs, key=lambda job: (-len(row(job)), row(job)))
        start = 0
        while start < len(ordered):
            longest = held + len(row(ordered[start]))
            end = start + min(self.batch_size, max(1, self.batch_tokens // longest))
            yield ordered[start:end]
            start = end


def _share(
    rows: Sequence[tuple[int, ...]], is_possible: bool
) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Groups of rows by what they begin with: the beginning, shorter than each row, and places.

    In alphabetical order, a row joins the group before it if that keeps at least half of the
    group's beginning. Groups that would save little are read together, with no beginning.
    """
    groups: list[tuple[int, list[int]]] = []  # tokens shared, places
    for i in sorted(range(len(rows)), key=lambda i: rows[i]) if is_possible else ():
        if groups:
            shared, places = groups[-1]
            common = min(_common(rows[places[0]], rows[i]), len(rows[i]) - 1, shared)
            if common >= MIN_SHARED_TOKENS and (len(places) == 1 or 2 * common >= shared):
                groups[-1] = (common, [*places, i])
                continue
        groups.append((len(rows[i]) - 1, [i]))
    worth = [(n, places) for n, places in groups if n * (len(places) - 1) >= MIN_SAVED_TOKENS]
    yield from ((rows[places[0]][:n], places) for n, places in worth)
    taken = {i for _, places in worth for i in places}
    if others := [i for i in range(len(rows)) if i not in taken]:
        yield (), others


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def _judge(said: Tensor, targets: Sequence[tuple[int, ...]]) -> list[Score]:
    """Scores of `targets` by the logits [B,T,V] of the positions before them; each row's are its
    last."""
    T = said.shape[1]
    ids = torch.tensor([(0,) * (T - len(t)) + t for t in targets], device=said.device)
    missing = torch.tensor([T - len(t) for t in targets], device=said.device)
    real = torch.arange(T, device=said.device) >= missing[:, None]
    picked = said.log_softmax(-1).gather(-1, ids[..., None])[..., 0].double()  # [B,T]
    sums = picked.where(real, 0.0).sum(1).tolist()
    greedy = ((said.argmax(-1) == ids) | ~real).all(1).tolist()
    return [Score(s, g, len(t)) for s, g, t in zip(sums, greedy, targets, strict=True)]
