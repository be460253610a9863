"""Checks of a request that need nothing but the facts of the model. No torch."""

from flexolmo.errors import ConfigError, PolicyError
from flexolmo.inference.engine import EngineRequest, ModelFacts


def refuse_request(request: EngineRequest, facts: ModelFacts) -> None:
    """Refuse what the model of `facts` can never serve.

    Raises:
        PolicyError: an expert that it does not hold, or another model than was decided for.
        ConfigError: ids that are none, too long a prompt, more likeliest tokens than there are.
    """
    ids = request.ids
    if request.model_digest != facts.digest:
        raise PolicyError(
            f"The request was decided for model {request.model_digest}; {facts.digest} is "
            "served by now. Decide again."
        )
    if unknown := sorted(request.enabled - set(facts.experts)):
        raise PolicyError(
            f"Expert {', '.join(unknown)} is not served, or no longer: the model holds "
            f"{', '.join(sorted(facts.experts)) or 'none'}."
        )
    if not ids or min(ids) < 0 or max(ids) >= facts.vocab_size:
        raise ConfigError(
            f"Expected at least one token id, and each from 0 to {facts.vocab_size - 1}."
        )
    if not 0 <= (request.num_logprobs or 0) <= facts.vocab_size:
        raise ConfigError(f"{request.num_logprobs} likeliest tokens cannot be reported.")
    if len(ids) > facts.max_seq_len:
        raise ConfigError(
            f"Found {len(ids):,} tokens in this text; the model has {facts.max_seq_len:,} "
            "positions and has learnt nothing of what lies beyond. Give fewer."
        )
    if request.writes:
        room_behind(len(ids), facts.max_seq_len, len(facts.start_ids))


def room_behind(num_tokens: int, max_seq_len: int, num_start: int) -> int:
    """Positions behind a prompt of so many tokens, `num_start` of them put before its text.
    ConfigError if there is none to write to."""
    room = max_seq_len - num_tokens
    if room < 1:
        raise ConfigError(
            f"A prompt has {num_tokens - num_start} tokens; this model holds {max_seq_len} "
            "positions, prompt and continuation together: give at most "
            f"{max_seq_len - num_start - 1} tokens of prompt."
        )
    return room
