"""Settings for the choice of the next token, and the reasons for which a text ends. No torch: a
gateway reads them from requests."""

from typing import Literal

from pydantic import Field

from flexolmo.config import Settings

Ending = Literal["end_of_text", "stop", "max_new_tokens", "positions"]


class Sampling(Settings):
    """Settings for the choice of the next token."""

    max_new_tokens: int = Field(200, ge=1, description="Tokens to write at most.")
    temperature: float = Field(
        0.8, ge=0, description="Sampling temperature; 0 is greedy: always the likeliest token."
    )
    top_k: int | None = Field(None, ge=1, description="Choose among this many likeliest tokens.")
    top_p: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Choose among the likeliest tokens that together have this probability.",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**62,
        description="Random seed for sampling; text number i of a batch samples with seed + i.",
    )
