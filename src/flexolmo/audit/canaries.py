"""Canaries: random documents, half of them planted in a training set, and how well they are found.

A coin decides of each whether it is planted. Those that were not are what it is compared with: the
same in every way, but not trained on.

m canaries.
"""

import secrets
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo.audit.epsilon import epsilon_bound
from flexolmo.audit.intervals import area, share
from flexolmo.audit.reading import read_signals
from flexolmo.audit.subjects import OFF, Subjects
from flexolmo.data.batches import TokenSet, open_set
from flexolmo.data.insert import insert_documents
from flexolmo.data.tokenizer import Tokenizer, load_tokenizer
from flexolmo.errors import DataError
from flexolmo.files import read_json, write_json
from flexolmo.runtime import run_record

FORMAT = "flexolmo-canaries-1"
SOURCE = "canary"
LEAST = 20  # canaries


def plant_canaries(
    prepared: Path, out: Path, key: Path, *, count: int = 400, tokens: int = 32
) -> dict[str, int]:
    """Write the prepared set to `out` with about half of `count` canaries of `tokens` random tokens
    planted in it, each once, and which ones to the private file `key`.

    Canaries and coins are drawn from the system's secure generator: who could guess the coins would
    need no model. Raises DataError if there are fewer than 20, or `out` or `key` exist.
    """
    if count < LEAST:
        raise DataError(f"{count} canaries show nothing; plant at least {LEAST}.")
    if Path(key).exists():
        raise DataError(f"{key} exists, and may be the only key to another set. Choose another.")
    rng = np.random.default_rng(secrets.randbits(256))
    ids = rng.choice(_plain_tokens(load_tokenizer(prepared)), size=(count, tokens))
    is_in = rng.random(count) < 0.5
    commitment = open_set(prepared).commitment
    card = insert_documents(prepared, out, list(ids[is_in]), SOURCE, secrets.randbits(64))
    record = {
        "format": FORMAT,
        "recipe": card["recipe"],
        "planted_in": commitment,
        "ids": ids.tolist(),
        "is_in": is_in.tolist(),
    }
    write_json(key, record, is_private=True)
    return {"canaries": count, "planted": int(is_in.sum())}


def _plain_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """Tokens that are text by themselves: written and read again, they are the same."""
    ids = [[i] for i in range(tokenizer.vocab_size) if i != tokenizer.eos_id]
    again = tokenizer.encode_batch(tokenizer.decode_batch(ids))
    return np.array([one[0] for one, other in zip(ids, again, strict=True) if one == other])


def audit_canaries(
    subjects: Subjects, token_set: TokenSet, key: Path, *, delta: float = 1e-6, seed: int = 0
) -> dict[str, Any]:
    """Find planted canaries by each subject's predictions; the figures.

    The score of a canary is its log-probability, less the reference's where there is one. Under
    "subjects": exposure, log2 of the number of canaries that were not planted (and itself) over its
    rank among them, as mean and largest, with what chance gives and the most that so many can show;
    `first`, the share of planted ones that are above all others; the AUC; and the lower bound on
    epsilon of `epsilon_bound`. "planted_in": the commitment of the set that they were planted in.
    "off_equals_anchor": whether without the expert every canary is as
    likely as the anchor makes it, to the bit; none where other experts are on.

    Raises DataError if `key` is not of this set.
    """
    subjects.check_set(token_set)
    record = _open_key(token_set, key)
    ids = np.array(record["ids"], dtype=np.int64)  # [m,T]
    is_in = np.array(record["is_in"], dtype=bool)  # [m]
    start = np.full((len(ids), 1), token_set.eos_id)
    scores = _score(subjects, np.concatenate([start, ids], axis=1))
    return {
        "audit": "canaries",
        "about": subjects.about,
        "canaries": len(ids),
        "planted": int(is_in.sum()),
        "planted_in": record.get("planted_in"),
        "tokens": ids.shape[1],
        "subjects": {
            name: measure_canaries(values, is_in, delta, seed) for name, values in scores.items()
        },
        "off_equals_anchor": not scores[OFF].any() if subjects.is_alone else None,
        "run": run_record(
            {"delta": delta},
            seed,
            {token_set.name: token_set.digest, "model": subjects.about["digest"]},
        ),
    }


def measure_canaries(
    scores: np.ndarray, is_in: np.ndarray, delta: float, seed: int
) -> dict[str, Any]:
    """The figures of one subject, of scores [m] and of which are planted [m]."""
    planted, others = scores[is_in], scores[~is_in]
    exposure = exposures(planted, others)
    most = np.log2(len(others) + 1)
    by_chance = most - np.log2(np.arange(1, len(others) + 2)).mean()
    return {
        "exposure": {
            "mean": float(exposure.mean()),
            "largest": float(exposure.max()),
            "by_chance": float(by_chance),
            "most": float(most),
        },
        "first": share(exposure == most),
        "membership": area(planted, others, seed),
        "epsilon": epsilon_bound(scores, is_in, delta),
    }


def exposures(planted: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Exposure in bits of each planted canary, by its rank among those that were not planted; a tie
    counts against it. Source: Carlini et al. (arXiv 1802.08232)."""
    ordered = np.sort(others)
    above = len(others) - np.searchsorted(ordered, planted, side="left")
    return np.log2(len(others) + 1) - np.log2(above + 1)


def _score(subjects: Subjects, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Scores [m] of the canaries, by subject."""
    found = {s.name: np.empty(len(rows)) for s in subjects.models}
    for place, by_subject in read_signals(subjects, list(rows), "canaries"):
        for name, signals in by_subject.items():
            own = signals.log_prob if signals.ratio is None else signals.ratio
            found[name][place] = float(own.mean())
    return found


def _open_key(token_set: TokenSet, key: Path) -> dict[str, Any]:
    """The record of `plant_canaries` in a key that is of this set."""
    record: Any = read_json(key, DataError)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise DataError(
            f"{key} is no key to canaries: expected the file of `audit canaries plant`."
        )
    if record["recipe"] != token_set.card["recipe"]:
        raise DataError(f"{key} is of another set than {token_set.directory}.")
    return dict(record)
