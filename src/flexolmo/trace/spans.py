"""Maximal spans of a text that occur word for word in an index, the longest and rarest first.

A span is maximal if no longer one around it occurs. Source: OLMoTrace (arXiv 2504.07096, section
3), but for two things: a span may go on over the end of a sentence, since a whole paragraph
that was learned by heart is what an owner looks for; and the number of spans is the caller's.
"""

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

from flexolmo.errors import DataError
from flexolmo.trace.index import Index, Occurrence
from flexolmo.trace.shard import Shard
from flexolmo.trace.words import Words

MIN_TOKENS = 8
CONTEXT_TOKENS = 40


@dataclass(frozen=True)
class Span:
    """A run of tokens of the traced text, and where it occurs in one source.

    What the source does not tell is None or empty.
    """

    source: str
    start: int  # first token
    end: int
    first: int  # character of the text
    last: int  # character after the span
    bits: float | None = None  # -log2 of the product of its ids' shares of the source's tokens
    count: int | None = None  # places at which it occurs; from a served index, at least so many
    occurrences: tuple[Occurrence, ...] = ()  # some of them
    documents: tuple[str, ...] = ()  # names of documents that it is in, some of them


def maximal_spans(
    cuts: Sequence[int], reach: Callable[[int], int], min_tokens: int
) -> Iterator[tuple[int, int]]:
    """Tokens [start, end) of each maximal span, in order.

    Args:
        cuts: tokens at which a span may begin or end, ascending.
        reach: the end of the longest run that begins at a token and occurs; of one with fewer
            than `min_tokens` any smaller number will do.
    """
    furthest = 0  # no span may end here or before: it would be inside another
    for start in cuts[:-1]:
        if cuts[-1] - start < min_tokens:
            return
        end = cuts[bisect.bisect_right(cuts, reach(start)) - 1]
        if end > furthest and end - start >= min_tokens:
            yield start, end
        furthest = max(furthest, end)


def find_spans(
    index: Index,
    words: Words,
    min_tokens: int = MIN_TOKENS,
    max_occurrences: int = 10,
    context_tokens: int = CONTEXT_TOKENS,
) -> list[Span]:
    """Every maximal span of `words` of at least `min_tokens` that occurs in `index`, in order.

    Raises:
        DataError: `words` were not made with the tokenizer of the index.
    """
    if words.ids and max(words.ids) >= index.tokenizer.vocab_size:
        raise DataError(
            f"The text was read with another tokenizer than the index {index.directory} has."
        )
    width = index.card.id_bytes
    whole = index.encode(words.ids)
    spans = []
    for start, end in maximal_spans(words.cuts, _make_reach(index, whole, min_tokens), min_tokens):
        pattern = whole[start * width : end * width]
        occurrences = tuple(islice(index.find(pattern, context_tokens), max_occurrences))
        first, last = words.characters(start, end)
        spans.append(
            Span(
                index.name,
                start,
                end,
                first,
                last,
                bits=float(index.bits[list(words.ids[start:end])].sum()),
                count=index.count(pattern),
                occurrences=occurrences,
                documents=tuple(dict.fromkeys(o.document for o in occurrences)),
            )
        )
    return spans


def _make_reach(index: Index, whole: bytes, min_tokens: int) -> Callable[[int], int]:
    """The `reach` of `maximal_spans` for the ids `whole`, which looks up few of them.

    A run of `min_tokens` holds a whole block, which begins at a multiple of a stride. Where that
    block does not occur the run does not, and one look has settled as many starts as the stride.
    """
    width = index.card.id_bytes
    stride = max(1, min_tokens // 2)
    size = min_tokens - stride + 1

    @cache
    def shards_with_block(place: int) -> list[Shard]:
        block = whole[place * width : (place + size) * width]
        return [shard for shard in index.shards if shard.longest(block) == size]

    def reach(start: int) -> int:
        shards = shards_with_block(-(-start // stride) * stride)
        return start + max((s.longest(whole[start * width :]) for s in shards), default=0)

    return reach


def rank_spans(spans: Sequence[Span], rarity: Callable[[Span], float]) -> list[Span]:
    """`spans` with those of most `rarity` first, then the longest.

    The smaller it is, the more such a span is a common phrase that any text may have.
    """
    return sorted(spans, key=lambda s: (-rarity(s), s.start - s.end, s.start, s.source))


def rank_by_bits(spans: Sequence[Span], keep: int | None = None) -> list[Span]:
    """The first `keep` of `spans`, ranked by bits where all have them, else by length."""
    have_all = all(s.bits is not None for s in spans)
    return rank_spans(spans, lambda s: (s.bits or 0.0) if have_all else 0.0)[:keep]
