"""Overlap of an owner's training text with public text, token by token. Source: ours.

NumPy only. Both sets are prepared with one tokenizer, so the same words are the same tokens. Equal
spans are found by 64-bit digests; that two others have one is as good as excluded.

n tokens of a stream, k tokens of a span.
"""

from typing import Any

import numpy as np

from flexolmo.data.batches import TokenSet
from flexolmo.progress import progress

SHORT_TOKENS = 8
LONG_TOKENS = 50
TOKENS_AT_ONCE = 1 << 20  # of public text that is held against the owner's
_FACTOR = 0x9E3779B97F4A7C15
_MIX = np.uint64(0xD6E8FEB86659FD93)
_SHIFT = np.uint64(32)
_BITS = 22
_LAST_BITS = np.uint64(64 - _BITS)


def measure_overlap(own: TokenSet, public: TokenSet) -> dict[str, Any]:
    """Distance of the owner's training text from the public set's training text.

    `short`: share of its spans of `short_tokens` tokens that occur in public text, each place
    counted, None if it has no span; `long`: number of its source documents with a span of
    `long_tokens` that does. A span lies within one document.

    Raises DataError if the sets have different tokenizers.
    """
    public.check_tokenizer(own.card["tokenizer"]["digest"], "the owner's set")
    found: dict[str, Any] = {"short_tokens": SHORT_TOKENS, "long_tokens": LONG_TOKENS}
    split = own.splits["train"]
    total = 2 * len(public.splits["train"].tokens)
    with progress("overlap with public text", total, "tok") as meter:
        for name, k in (("short", SHORT_TOKENS), ("long", LONG_TOKENS)):
            digests, places = span_digests(split.tokens, k, own.eos_id)
            ours, numbers = np.unique(digests, return_inverse=True)
            is_public = np.zeros(len(ours), dtype=bool)
            is_begun = np.zeros(1 << _BITS, dtype=bool)  # by first bits: few others come further
            is_begun[ours >> _LAST_BITS] = True
            theirs = public.splits["train"].tokens
            for start in range(0, len(theirs), TOKENS_AT_ONCE):
                some = theirs[start : start + TOKENS_AT_ONCE + k - 1]
                held = span_digests(some, k, public.eos_id)[0]
                held = held[is_begun[held >> _LAST_BITS]]
                found_at = np.searchsorted(ours, held).clip(max=len(ours) - 1)
                is_public[found_at[ours[found_at] == held]] = True
                meter.advance(min(TOKENS_AT_ONCE, len(theirs) - start))
            is_public = is_public[numbers]
            if name == "short":
                found[name] = float(is_public.mean()) if len(places) else None
            else:
                holders = np.searchsorted(split.source_offsets, places[is_public], "right") - 1
                found[name] = len(np.unique(holders))
    return found


def span_digests(tokens: np.ndarray, k: int, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Digests, uint64, of all spans of `k` of `tokens` [n] that hold no end of text, and the places
    where they begin, int64."""
    count = len(tokens) - k + 1
    if count <= 0:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    ids = np.asarray(tokens).astype(np.uint64)
    with np.errstate(over="ignore"):
        mixed = (ids + np.uint64(1)) * _MIX
        mixed ^= mixed >> _SHIFT
        digests = _sums(mixed * _MIX, k)
        digests ^= digests >> _SHIFT
    ends = np.concatenate([[0], np.cumsum(ids == eos_id)])
    places = np.flatnonzero(ends[k:] == ends[:-k])
    return digests[places], places


def _sums(mixed: np.ndarray, k: int) -> np.ndarray:
    """One number for each span of `k` of `mixed` [n], uint64 [n - k + 1], modulo 2^64: a span of
    x_1 to x_k has x_1 f^(k-1) + x_2 f^(k-2) + ... + x_k, where f is _FACTOR.

    A span's number is worked out from those of its two halves, so that log k passes suffice.
    """
    if k == 1:
        return mixed
    half = k // 2
    part = _sums(mixed, half)
    factor = np.uint64(pow(_FACTOR, half, 1 << 64))
    whole = part[: len(part) - half] * factor + part[half:]  # of 2 * half numbers
    return whole if k % 2 == 0 else whole[:-1] * np.uint64(_FACTOR) + mixed[k - 1 :]
