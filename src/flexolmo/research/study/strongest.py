"""Settings that the paper's method leaves open, to be chosen for it on validation text.

A rival that was tuned less than ours would prove nothing. Its experts are trained in each of
`TRAININGS`, and each mixture is read in each of `READINGS`. Source: ours.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Training:
    """Changes to the training of the paper's experts."""

    expert: dict[str, Any] = field(default_factory=dict)  # settings of its recipe
    rate: float = 1.0  # of the router's rows, in the recipe's
    length: int = 1  # in the recipe's steps
    rows: str | None = None  # how they start, see `inputs.first_rows`; none: the anchor's states
    train: dict[str, Any] = field(default_factory=dict)  # settings of the training


_REPLAY = {"replay": 0.25}
TRAININGS = {
    "as published": Training(),
    "10 % replay": Training({"replay": 0.1}),
    "25 % replay": Training(_REPLAY),
    "50 % replay": Training({"replay": 0.5}),
    "a row per layer, 25 % replay": Training(_REPLAY, rows="per_layer"),
    "no bias, 25 % replay": Training(_REPLAY | {"router": {"kind": "linear", "has_bias": False}}),
    "rows learn 3 times as fast, 25 % replay": Training(_REPLAY, rate=3),
    "rows learn 10 times as fast, 25 % replay": Training(_REPLAY, rate=10),
    "AdamW for all, 25 % replay": Training(_REPLAY, train={"optimizer": "adamw"}),
    "3 times as long, 25 % replay": Training(_REPLAY, length=3),
    "3 times as long, rows learn 3 times as fast, 50 % replay": Training(
        {"replay": 0.5}, rate=3, length=3
    ),
}
READINGS: dict[str, dict[str, Any]] = {
    "top-1": {"top_k": 1},
    "top-2": {"top_k": 2},
    "top-4": {"top_k": 4},
    "top-2, rows of length 1": {"top_k": 2, "row_length": 1.0},
    "top-2, rows of length 2": {"top_k": 2, "row_length": 2.0},
    "top-4, rows of length 2": {"top_k": 4, "row_length": 2.0},
}
