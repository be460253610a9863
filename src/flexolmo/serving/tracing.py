"""Tracing of answers: spans that occur in the training text of some sources.

A source that is off, or that whoever asks may not trace, is not asked, so nothing can tell of it.
"""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import safetensors

from flexolmo.data.tokenizer import Tokenizer
from flexolmo.errors import FlexOlmoError
from flexolmo.serving.replies import PlaceReply, SpanReply, TraceReply
from flexolmo.trace.index import Index
from flexolmo.trace.questions import LEVELS, MAX_DOCUMENTS, Level
from flexolmo.trace.remote import CutShortError, RemoteIndex
from flexolmo.trace.spans import Span, find_spans, rank_spans
from flexolmo.trace.words import split_words

_NUM_THREADS = 8


class Tracer:
    """Sources whose training text can be looked up, by the name of their expert.

    Args:
        level: What is told of a span in an index that is on this machine; of a served index its
            owner decides.
        public_bits: Rarity of each token of the model in public text, [V], by which spans are
            ranked, whatever their owners tell; without it by length.
    """

    def __init__(
        self,
        sources: Mapping[str, Index | RemoteIndex],
        level: Level,
        public_bits: np.ndarray | None = None,
    ):
        self.sources = sources
        self._level = level
        self._public_bits = public_bits
        # Of its own: an owner who answers slowly must keep nothing else in the server waiting.
        self.threads = ThreadPoolExecutor(_NUM_THREADS, "trace")

    def trace(
        self, texts: Sequence[str], names: Collection[str], tokenizer: Tokenizer
    ) -> list[TraceReply]:
        """Spans of each text in the sources `names`; `tokenizer` is the model's."""
        return [self._trace(text, sorted(names), tokenizer) for text in texts]

    def _trace(self, text: str, names: Sequence[str], tokenizer: Tokenizer) -> TraceReply:
        found: list[Span] = []
        untraced = {}
        for name in names:
            try:
                found += self._look(text, name, tokenizer)
            except CutShortError as e:
                found += e.spans
                untraced[name] = str(e)
            except FlexOlmoError as e:  # an answer is worth having without its trace
                untraced[name] = str(e)

        def rarity(span: Span) -> float:
            ids = tokenizer.encode(text[span.first : span.last])
            return len(ids) if self._public_bits is None else float(self._public_bits[ids].sum())

        ranked = rank_spans(found, rarity)
        return TraceReply(spans=[_reply(span) for span in ranked], untraced=untraced)

    def _look(self, text: str, name: str, tokenizer: Tokenizer) -> list[Span]:
        source = self.sources[name]
        if isinstance(source, RemoteIndex):
            words = split_words(text, tokenizer)
            return source.find_spans(words, tokenizer.digest)
        spans = find_spans(
            source, split_words(text, source.tokenizer), max_occurrences=MAX_DOCUMENTS
        )
        return [replace(limit_span(span, self._level), source=name) for span in spans]


def read_public_bits(anchor: Path) -> np.ndarray:
    """Rarity of each token in public text, -log2 of its share, float32 [V], by the anchor in
    directory `anchor`, whose files were verified when the model was opened."""
    with safetensors.safe_open(anchor / "public.safetensors", framework="np") as f:
        found: np.ndarray = f.get_tensor("public.unigram") / -np.log(2)
    return found


def limit_span(span: Span, level: Level) -> Span:
    """`span` with no more than `level` allows to be told."""
    rank = LEVELS.index(level)
    return replace(
        span,
        bits=span.bits if rank >= 3 else None,
        count=span.count if rank >= 1 else None,
        documents=span.documents if rank >= 2 else (),
        occurrences=span.occurrences if rank >= 3 else (),
    )


def _reply(span: Span) -> SpanReply:
    return SpanReply(
        source=span.source,
        first=span.first,
        last=span.last,
        tokens=span.end - span.start,
        bits=span.bits,
        count=span.count,
        documents=list(span.documents),
        places=[PlaceReply(**asdict(o)) for o in span.occurrences],
    )
