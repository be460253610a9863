"""An owner's index that is served elsewhere, asked span by span.

What comes back is untrusted: bounded in size, of one form, and never followed elsewhere.
"""

import bisect
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from pydantic import ValidationError

from flexolmo.bundle.strict import Claim
from flexolmo.config import is_loopback
from flexolmo.errors import BusyError, ConfigError, DataError, PolicyError
from flexolmo.trace.index import Occurrence
from flexolmo.trace.questions import (
    MAX_IDS,
    MAX_SPAN_TOKENS,
    MAX_SPANS,
    Answer,
    Found,
    Offer,
    Question,
    sign_question,
)
from flexolmo.trace.spans import Span
from flexolmo.trace.words import Words

PATH = "/v1/trace"
_MAX_ANSWER_BYTES = 8 << 20
_SECONDS = 10.0
Reply = TypeVar("Reply", bound=Claim)
Ask = Callable[[Sequence[tuple[int, int]]], tuple[int, Found] | None]


class CutShortError(BusyError):
    """A text of which the owner answered only the first questions; `spans` are those found."""

    def __init__(self, message: str, spans: Sequence[Span]):
        super().__init__(message)
        self.spans = spans


def ask_spans(
    cuts: Sequence[int], min_tokens: int, ask: Ask
) -> Iterator[tuple[tuple[int, int], Found]]:
    """Every maximal span of at least `min_tokens`, in order, from few answers that one occurs.

    First it is asked, of all starts, for the shortest span that reaches beyond the last one found;
    then, from the start that has one, for longer spans, the longest first.

    Args:
        ask: number of the first of these spans that occurs, and what is told of it; None if none
            does.
    """
    furthest = 0
    starts = list(cuts[:-1])
    while True:
        shortest = []
        for start in starts:
            k = bisect.bisect_left(cuts, max(start + min_tokens, furthest + 1))
            if k < len(cuts):
                shortest.append((start, cuts[k]))
        first = ask(shortest) if shortest else None
        if first is None:
            return
        start, end = shortest[first[0]]
        longer = [(start, cut) for cut in reversed(cuts) if cut > end]
        try:
            longest = ask(longer) if longer else None
        except BusyError:
            yield (start, end), first[1]
            raise
        if longest is not None:
            first, end = longest, longer[longest[0]][1]
        yield (start, end), first[1]
        furthest = end
        starts = [later for later in starts if later > start]


class RemoteIndex:
    """One owner's service. May be asked from any thread; one text at a time is looked up.

    Args:
        name: of the source, which the owner's index has too.
        url: of the service, without a path; https unless it is on this machine.
        key: of the coordinator, which signs each question.
    Raises:
        ConfigError: an address that would send questions in the clear.
    """

    def __init__(self, name: str, url: str, key: EllipticCurvePrivateKey):
        parts = urlsplit(url)
        is_safe = parts.scheme == "https" or (
            parts.scheme == "http" and is_loopback(parts.hostname or "")
        )
        if not is_safe or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ConfigError(
                f"{url!r} is no address of a service: expected https://HOST, or http:// on this "
                "machine."
            )
        self.name = name
        self._url = url.rstrip("/") + PATH
        self._key = key
        self._number = 0
        self._asking = threading.Lock()  # numbers of questions must arrive in order
        self._opener = urllib.request.build_opener(_NoRedirects)

    def offer(self) -> Offer:
        """The owner's rules; DataError if it is another source than this one is held for."""
        offer = self._exchange(None, Offer)
        if offer.source != self.name:
            raise DataError(
                f"The service at {self._url} is of {offer.source!a}, not of {self.name!a}."
            )
        return offer

    def find_spans(self, words: Words, tokenizer_digest: str) -> list[Span]:
        """Every maximal span of `words`, of at least as many tokens as the owner answers for.

        Raises:
            DataError: the owner's index is of another tokenizer, or the answer is malformed.
            PolicyError: the owner refuses.
            CutShortError: a budget is spent, or the service is busy.
        """
        offer = self.offer()
        if offer.tokenizer != tokenizer_digest:
            raise DataError(
                f"The index of {self.name!a} was made with the tokenizer {offer.tokenizer}, but "
                f"the text is read with {tokenizer_digest}."
            )
        ids = words.ids

        def ask(spans: Sequence[tuple[int, int]]) -> tuple[int, Found] | None:
            for some in _in_questions(spans):
                answer = self._ask([list(ids[a:b]) for a, b in some])
                if answer.found is not None:
                    return spans.index(some[answer.answered - 1]), answer.found
            return None

        found: list[Span] = []
        try:
            with self._asking:
                for place, told in ask_spans(words.cuts, max(1, offer.min_tokens), ask):
                    found.append(self._span(words, place, told))
        except BusyError as e:
            raise CutShortError(str(e), found) from None
        return found

    def _ask(self, spans: list[list[int]]) -> Answer:
        """The answer to one question; BusyError unless all its spans were answered."""
        self._number = max(self._number + 1, time.time_ns() // 1000)
        question = Question(
            format="flexolmo-trace-question",
            format_version=1,
            source=self.name,
            number=self._number,
            spans=spans,
        )
        answer = self._exchange(sign_question(question, self._key), Answer)
        if answer.answered > len(spans) or (answer.found and not answer.answered):
            raise DataError(f"The service at {self._url} answers more than it was asked.")
        if answer.found is None and answer.answered < len(spans):
            raise BusyError(
                f"{self.name!a} answers no more questions today: the owner's budget is spent."
            )
        return answer

    def _span(self, words: Words, place: tuple[int, int], told: Found) -> Span:
        start, end = place
        first, last = words.characters(start, end)
        places = told.places or []
        return Span(
            self.name,
            start,
            end,
            first,
            last,
            count=told.at_least,
            occurrences=tuple(Occurrence(**p.model_dump()) for p in places),
            documents=tuple(told.documents or ()),
        )

    def _exchange(self, body: bytes | None, kind: type[Reply]) -> Reply:
        headers = {} if body is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url, body, headers)
        try:
            with self._opener.open(request, timeout=_SECONDS) as response:
                data = response.read(_MAX_ANSWER_BYTES + 1)
        except urllib.error.HTTPError as e:
            said = _read_refusal(e.read(_MAX_ANSWER_BYTES))
            kind_of_error = BusyError if e.code in (429, 503) else PolicyError
            raise kind_of_error(f"{self.name!a} refuses ({e.code}): {said}") from None
        except (OSError, ValueError) as e:
            reason = getattr(e, "reason", e)
            raise DataError(f"The service at {self._url} cannot be asked: {reason}.") from None
        try:
            if len(data) > _MAX_ANSWER_BYTES:
                raise ValueError
            return kind.model_validate_json(data)
        except (ValidationError, ValueError):
            raise DataError(
                f"The service at {self._url} sends something else than {kind.__name__.lower()}s of "
                "this format."
            ) from None


def _in_questions(spans: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """`spans` in order, as many at once as one question may have; too long ones are left out."""
    some: list[tuple[int, int]] = []
    num_ids = 0
    for start, end in spans:
        size = end - start
        if size > MAX_SPAN_TOKENS:
            continue
        if len(some) == MAX_SPANS or num_ids + size > MAX_IDS:
            yield some
            some, num_ids = [], 0
        some.append((start, end))
        num_ids += size
    if some:
        yield some


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refusal to ask elsewhere: a signed question is for one address."""

    def redirect_request(self, *_: object) -> None:
        return None


def _read_refusal(data: bytes) -> str:
    try:
        return ascii(str(json.loads(data)["error"]["message"])[:500])
    except (ValueError, KeyError, TypeError, RecursionError):
        return "without a reason"
