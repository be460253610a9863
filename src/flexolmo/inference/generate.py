"""Text from a mixture, token by token, under a choice of experts for each sequence.

The cache belongs to one call and is never shared, so what one choice of experts computed can
never reach another.

B batch, T positions, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from flexolmo.data.tokenizer import Tokenizer
from flexolmo.errors import ConfigError
from flexolmo.inference.policy import choose_experts
from flexolmo.merge.mixture import LoadedMixture
from flexolmo.model.transformer import Transformer


class Sampling(BaseModel):
    """How the next token is chosen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int = Field(200, ge=1, description="tokens to write at most")
    temperature: float = Field(0.8, ge=0, description="0 is greedy: always the likeliest token")
    top_k: int | None = Field(None, ge=1, description="choose among this many likeliest tokens")
    top_p: float = Field(
        0.95,
        gt=0,
        le=1,
        description="choose among the likeliest tokens that together have this probability",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**62,
        description="of the draws; sequence number i of a batch draws from seed + i",
    )


def decode(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    eos_id: int,
    sampling: Sampling,
    active: Tensor | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of every sequence, None where a sequence has ended.

    `prompts` are ids without the leading end-of-text token, which is added; `active` is [B,E].
    """
    rows = [[eos_id, *p] for p in prompts]
    longest = max(len(r) for r in rows)
    limit = model.config.max_seq_len
    if longest >= limit:
        raise ConfigError(
            f"The longest prompt has {longest - 1} tokens; this model holds {limit} "
            "positions, prompt and continuation together."
        )
    ids = torch.tensor([[eos_id] * (longest - len(r)) + r for r in rows])  # [B,T]
    real = torch.tensor([[i >= longest - len(r) for i in range(longest)] for r in rows])  # [B,T]
    is_token = None if bool(real.all()) else real
    draws = [torch.Generator().manual_seed(sampling.seed + i) for i in range(len(rows))]
    cache = model.new_cache()
    ended = [False] * len(rows)
    with torch.inference_mode():
        for _ in range(min(sampling.max_new_tokens, limit - longest)):
            logits = (
                model(ids, cache=cache, active=active, is_token=is_token, last=1)[:, 0]
                .float()
                .cpu()
            )  # [B,V]
            chosen = [choose_token(z, sampling, g) for z, g in zip(logits, draws, strict=True)]
            ended = [e or t == eos_id for e, t in zip(ended, chosen, strict=True)]
            yield [None if e else t for e, t in zip(ended, chosen, strict=True)]
            if all(ended):
                return
            ids, is_token = torch.tensor(chosen)[:, None], None  # [B,1]


def continue_ids(
    model: Transformer, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[list[int]]:
    """The continuations of `prompts` (ids, as for `decode`), without their end-of-text tokens."""
    written: list[list[int]] = [[] for _ in prompts]
    for tokens in decode(model, prompts, model.config.eos_token_id, sampling):
        for row, token in zip(written, tokens, strict=True):
            if token is not None:
                row.append(token)
    return [[t for t in row if t != model.config.eos_token_id] for row in written]


def choose_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from logits [V] under temperature, and under both top-k and top-p of what it
    gives."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = ((logits - logits.max()) / sampling.temperature).softmax(-1)
    ranked, order = probabilities.sort(descending=True, stable=True)
    keep = ranked.cumsum(-1) - ranked < sampling.top_p  # the first always stays
    if sampling.top_k is not None:
        keep[sampling.top_k :] = False
    return int(order[torch.multinomial(ranked * keep, 1, generator=generator)])


def generate(
    mixture: LoadedMixture,
    prompts: Sequence[str],
    *,
    without: Iterable[str] | Sequence[Iterable[str]] = (),
    only: Iterable[str] | Sequence[Iterable[str]] | None = None,
    sampling: Sampling | None = None,
) -> list[str]:
    """Continuations of `prompts`, as one batch.

    `without` and `only` name experts, for all prompts (`["news"]`) or for each prompt its own
    (`[["news"], []]`). Raises PolicyError for an unknown name.
    """
    if not prompts:
        return []
    sampling = sampling or Sampling()
    left_out = _for_each(without, len(prompts))
    alone = [None] * len(prompts) if only is None else _for_each(only, len(prompts))
    enabled = [
        choose_experts(mixture.expert_names, without=w or (), only=o)
        for w, o in zip(left_out, alone, strict=True)
    ]
    active = mixture.model.expert_mask(enabled)
    written: list[list[int]] = [[] for _ in prompts]
    encoded = mixture.tokenizer.encode_batch(list(prompts))
    for tokens in decode(mixture.model, encoded, mixture.tokenizer.eos_id, sampling, active):
        for row, token in zip(written, tokens, strict=True):
            if token is not None:
                row.append(token)
    return [mixture.tokenizer.decode(row) for row in written]


def stream(
    mixture: LoadedMixture,
    prompt: str,
    *,
    without: Iterable[str] = (),
    only: Iterable[str] | None = None,
    sampling: Sampling | None = None,
) -> Iterator[str]:
    """The continuation of `prompt` in pieces of whole characters, as they are written."""
    enabled = choose_experts(mixture.expert_names, without=without, only=only)
    return stream_ids(
        mixture.model,
        mixture.tokenizer,
        prompt,
        sampling or Sampling(),
        mixture.model.expert_mask([enabled]),
    )


def stream_ids(
    model: Transformer, tokenizer: Tokenizer, prompt: str, sampling: Sampling, active: Tensor | None
) -> Iterator[str]:
    """As `stream`, for any decoder; an anchor has no experts to switch."""
    written: list[int] = []
    shown = ""
    for (token,) in decode(model, [tokenizer.encode(prompt)], tokenizer.eos_id, sampling, active):
        if token is None:
            break
        written.append(token)
        text = tokenizer.decode(written)
        if not text.endswith("\ufffd"):  # a character whose bytes are still to come
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(written)[len(shown) :]


def _for_each(names: Iterable[str] | Sequence[Iterable[str]], count: int) -> list[list[str]]:
    items = list(names)
    if all(isinstance(n, str) for n in items):
        return [[str(n) for n in items]] * count
    if any(isinstance(n, str) for n in items) or len(items) != count:
        raise ConfigError(
            f"Give one list of expert names for all prompts, or one list for each "
            f"of the {count} prompts; found {items!r}."
        )
    return [list(n) for n in items]
