"""Texts under way in an engine: what each has read and written, and what it reads next."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.data.tokenizer import Tokenizer
from flexolmo.inference.admission import room_behind
from flexolmo.inference.decode import Answer
from flexolmo.inference.engine import EngineRequest, Event, Scored
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import EvidenceState
from flexolmo.model.spans import BLOCK, Span


@dataclass(frozen=True)
class Progress:
    """State of a text after its first positions, beside their keys and values."""

    num_read: int
    evidence: EvidenceState | None  # for the router, to go on from
    weights: np.ndarray  # [E] float64, sums over the positions


class Text:
    """One request under way; see `engine.Request`."""

    def __init__(
        self,
        request: EngineRequest,
        say: Callable[[Event], None],
        model: MixtureModel,
        tokenizer: Tokenizer,
        num_start: int,
    ):
        """`num_start` ids stand before every text. The request is one that
        `admission.refuse_request` lets pass."""
        self.request, self.say = request, say
        self.ids = list(request.ids)
        self.num_positions = len(self.ids)
        self.answer: Answer | None = None
        if request.writes:
            room = room_behind(len(self.ids), model.config.max_seq_len, num_start)
            self.answer = Answer(tokenizer, request.sampling, request.stops, room)
            self.num_positions += self.answer.most
        self.draws = torch.Generator().manual_seed(request.sampling.seed)
        self.active = model.expert_mask([request.enabled])[0].cpu()  # [E]
        self.progress = Progress(0, None, np.zeros(len(model.expert_names)))
        self.marks: list[Progress] = []  # after each whole block of the prompt
        self.scores: list[Scored] = []  # of the prompt
        self.held: range | None = None  # blocks of memory
        self.num_cached = 0
        self.is_cancelled = False
        self.is_over = False

    def cancel(self) -> None:
        """End it before the next step."""
        self.is_cancelled = True

    def carry_over(self, old: MixtureModel, new: MixtureModel) -> None:
        """Go on with a model that computes the same for this text, though its experts are others
        beside those that are on."""

        def move(progress: Progress) -> Progress:
            evidence = progress.evidence
            if evidence is not None and old.router is not None and new.router is not None:
                weights = _move(evidence[1].numpy(), old.router.domains, new.router.domains)
                evidence = (evidence[0], torch.from_numpy(weights))
            sums = _move(progress.weights, old.expert_names, new.expert_names)
            return Progress(progress.num_read, evidence, sums)

        self.active = new.expert_mask([self.request.enabled])[0].cpu()
        self.progress = move(self.progress)
        self.marks = [move(mark) for mark in self.marks]

    @property
    def has_read_prompt(self) -> bool:
        """True once the whole prompt has been read."""
        return self.progress.num_read >= len(self.ids)

    def next_spans(self, most: int, eos: int | None) -> list[Span]:
        """Spans to read in the next step: the last token written, or as many blocks of the prompt
        as have at most `most` tokens; an id `eos` starts a document of its own."""
        assert self.held is not None
        start, place = self.progress.num_read, self.held.start * BLOCK
        ids = self.ids
        if self.has_read_prompt and self.answer is not None:
            last = self.answer.written[-1:]
            document = _last(ids, eos)
            return [
                Span(last, start, place, self.active, self.progress.evidence, document=document)
            ]
        spans: list[Span] = []
        while start < len(ids):
            piece = ids[start : (start // BLOCK + 1) * BLOCK]
            most -= len(piece)
            if most < 0:
                break
            span = Span(piece, start, place, self.active, document=_last(ids[:start], eos))
            if spans:
                span.before = spans[-1]
            else:
                span.evidence = self.progress.evidence
            spans.append(span)
            start += len(piece)
        return spans

    def take_in(self, spans: Sequence[Span], weights: Sequence[np.ndarray]) -> None:
        """Take note that `spans` were read, with sums of weights [E] over the tokens of each."""
        for span, sums in zip(spans, weights, strict=True):
            end = span.start + len(span.ids)
            self.progress = Progress(end, span.after, self.progress.weights + sums)
            if end % BLOCK == 0 and end <= len(self.ids):
                self.marks.append(self.progress)

    def score_prompt(self, logits: Tensor, start: int) -> None:
        """Score the prompt's tokens that stand behind positions `start` and on, by logits [.,V]
        there."""
        for token, own in zip(self.ids[start + 1 :], logits, strict=False):
            self.scores.append(score(own, token, self.request.num_logprobs))

    def rows_to_predict(self, spans: Sequence[Span]) -> list[int]:
        """Rows of a step of which logits are needed, in the order of the text."""
        rows = [s.row + i for s in spans for i in range(len(s.ids))]
        end = spans[-1].start + len(spans[-1].ids)
        if self.request.scores_prompt and end <= len(self.ids):
            return rows
        return rows[-1:] if self.answer is not None and end >= len(self.ids) else []

    def shares(self, model: MixtureModel) -> dict[str, float]:
        """Mean weight of public text and of each enabled expert, over what has been read."""
        means = self.progress.weights / max(self.progress.num_read, 1)
        by_name = dict(zip(model.expert_names, means.tolist(), strict=True))
        return {n: by_name[n] for n in (PUBLIC, *sorted(self.request.enabled))}


def score(logits: Tensor, token: int, num_likeliest: int | None = None) -> Scored:
    """The score of a token by logits [V], with so many of the likeliest."""
    logs = logits.log_softmax(-1)
    values, ids = logs.topk(num_likeliest or 0)
    likeliest = dict(zip(ids.tolist(), values.tolist(), strict=True))
    return Scored(token, float(logs[token]), likeliest)


def _last(ids: Sequence[int], eos: int | None) -> int:
    """Place of the last `eos` among `ids`; 0 if there is none."""
    return len(ids) - 1 - ids[::-1].index(eos) if eos in ids else 0


def _move(values: np.ndarray, old: Sequence[str], new: Sequence[str]) -> np.ndarray:
    """Values, one for each of `old`, for each of `new`; 0 where there was none."""
    found = np.zeros((len(new), *values.shape[1:]))
    for i, name in enumerate(new):
        if name in old:
            found[i] = values[old.index(name)]
    return found
