"""Prompts of a request, made ready for an engine: token ids, room to write, seeds.

Knows nothing of people and decisions: in the requests made here no expert is on.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from flexolmo.data.tokenizer import Tokenizer
from flexolmo.errors import DataError
from flexolmo.inference.engine import EngineRequest, ModelFacts
from flexolmo.inference.sampling import Sampling
from flexolmo.serving.chat import ChatTemplate
from flexolmo.serving.refusal import Refusal
from flexolmo.serving.requests import Ask, Message

_SEEDS = 2**62  # bound of `Sampling.seed`


@dataclass(frozen=True)
class TextModel:
    """Text to token ids of the model of this digest."""

    digest: str
    tokenizer: Tokenizer
    chat: ChatTemplate | None

    def encode(
        self, prompt: str | Sequence[int] | Sequence[Message], start: Sequence[int]
    ) -> list[int]:
        """`start` and the token ids of a text, of ids or of a chat; Refusal (400) if it has none.

        A chat template may write `start` itself.
        """
        if isinstance(prompt, str):
            try:
                return [*start, *self.tokenizer.encode(prompt)]
            except DataError:  # its message quotes the text
                raise _refuse_prompt("It has text that the tokenizer cannot read.") from None
        messages = [part for part in prompt if isinstance(part, Message)]
        if messages:
            ids = self._encode_chat(messages)
            return ids if ids[: len(start)] == list(start) else [*start, *ids]
        ids = [part for part in prompt if isinstance(part, int)]
        if max(ids, default=0) >= self.tokenizer.vocab_size:
            raise _refuse_prompt(f"Token ids are below {self.tokenizer.vocab_size}.")
        return [*start, *ids]

    def _encode_chat(self, messages: Sequence[Message]) -> list[int]:
        if self.chat is None:
            raise Refusal(
                400,
                "no_chat_template",
                "This model has no chat template, so it only continues texts: /v1/completions.",
            )
        return self.chat.encode([{"role": m.role, "content": m.text} for m in messages])


def prepare(
    ask: Ask, facts: ModelFacts, texts: TextModel, max_texts: int, max_tokens: int | None
) -> list[EngineRequest]:
    """The engine's requests for `ask`, one for each text, with no expert on.

    Args:
        max_texts: Texts that one request may have.
        max_tokens: Tokens that a prompt may have; None: as many as the model has room for.

    Raises:
        Refusal: too many texts, or a prompt that is empty, too long or not text (400).
    """
    if ask.num_texts > max_texts:
        raise Refusal(
            400,
            "too_many_texts",
            f"The request has {ask.num_texts} texts (prompts times n); at most {max_texts} are "
            "taken.",
            field="n",
        )
    first_seed = secrets.randbelow(_SEEDS) if ask.seed is None else ask.seed
    is_written = ask.max_new_tokens != 0
    most = facts.max_seq_len - is_written
    if max_tokens is not None:
        most = min(most, max_tokens)
    requests: list[EngineRequest] = []
    for prompt in ask.prompts:
        ids = texts.encode(prompt, facts.start_ids)
        if not 1 <= len(ids) <= most:
            raise Refusal(
                400,
                "context_length_exceeded" if ids else "empty_prompt",
                f"The prompt has {len(ids)} tokens; 1 to {most} are taken.",
                field="prompt",
            )
        room = facts.max_seq_len - len(ids)
        wanted = room if ask.max_new_tokens is None else min(ask.max_new_tokens, room)
        for _ in range(ask.n):
            requests.append(
                EngineRequest(
                    ids=ids,
                    enabled=frozenset(),
                    model_digest=facts.digest,
                    sampling=Sampling(
                        max_new_tokens=max(wanted, 1),
                        temperature=ask.temperature,
                        top_k=ask.top_k,
                        top_p=ask.top_p,
                        seed=(first_seed + len(requests)) % _SEEDS,
                    ),
                    stops=ask.stops,
                    num_logprobs=ask.num_logprobs,
                    scores_prompt=ask.echoes and ask.num_logprobs is not None,
                    writes=is_written,
                )
            )
    return requests


def _refuse_prompt(why: str) -> Refusal:
    return Refusal(400, "invalid_prompt", f"The prompt cannot be read. {why}", field="prompt")
