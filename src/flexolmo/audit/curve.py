"""Quality of a mixture against what its owners' tables hide, for a researcher who has all sets.

Tables are fitted again from the sets under each choice of settings; experts stay as they were
trained. No owner could measure this, for it needs the text of all of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexolmo.data.batches import TokenSet, evaluation_windows
from flexolmo.errors import ConfigError, DataError
from flexolmo.evaluation.likelihood import read_windows
from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.checkpoint import Anchor
from flexolmo.model.private_statistics import tabulate
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.progress import progress
from flexolmo.runtime import run_record
from flexolmo.train.expert import Expert
from flexolmo.train.first_router import table_tensors

Windows = list[tuple[np.ndarray, int]]

TURN_TOKENS = 64  # after which mixed text turns to the next set, or sooner: all are in a window
MIXED = "all in turn"


def quality_curve(
    anchor: Anchor,
    experts: Sequence[Expert],
    sets: Mapping[str, TokenSet],
    choices: Sequence[EvidenceSettings],
    *,
    split: str = "heldout",
    max_bytes: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Bits per byte of the mixture of `experts` under each of the `choices`, and of the anchor.

    `sets` by name: those that the experts were trained on, and others, such as public text. Returns
    "anchor" and "points". In each "name" says what is hidden, "sets" has bits per byte by set and
    of text that turns from set to set, and "own" is their mean over the experts' sets. Noise is
    drawn with `seed`: these tables must not leave the house. Raises ConfigError if an expert's set
    is missing.
    """
    own = {e.name: _set_of(e, sets) for e in experts}
    seq_len = min(256, anchor.config.max_seq_len - 1)
    texts: dict[str, Windows] = {
        name: list(evaluation_windows(data, split, seq_len, max_bytes))
        for name, data in sets.items()
    }
    turn = min(TURN_TOKENS, (anchor.config.max_seq_len - 1) // len(sets))
    texts[MIXED] = mix_windows(
        [list(evaluation_windows(data, split, turn, max_bytes)) for data in sets.values()]
    )
    tokens = sum(len(ids) - 1 for windows in texts.values() for ids, _ in windows)
    rng = np.random.default_rng(seed)
    points = []
    with progress("curve", tokens * (len(choices) + 1), "tok") as meter:

        def measure(model: Any) -> dict[str, Any]:
            bits = {
                name: read_windows(model, windows, meter=meter).bits_per_byte
                for name, windows in texts.items()
            }
            return {"own": float(np.mean([bits[s] for s in own.values()])), "sets": bits}

        alone = {"name": "anchor alone", **measure(anchor.model)}
        for settings in choices:
            meter.note = name_choice(settings)
            tensors = {}
            for expert in experts:
                chosen = sets[own[expert.name]].splits["train"]
                table = tabulate(
                    chosen.tokens,
                    chosen.source_offsets,
                    anchor.public,
                    settings,
                    rng.standard_normal,
                )
                trained = {n: t for n, t in expert.tensors.items() if not n.startswith("router.")}
                tensors[expert.name] = trained | table_tensors(table)
            found = measure(assemble_mixture(anchor, tensors, settings))
            made = {"name": name_choice(settings), "settings": settings.model_dump(mode="json")}
            points.append(made | found)
    config = {"split": split, "seq_len": seq_len, "max_bytes": max_bytes}
    digests = {name: data.digest for name, data in sets.items()}
    return {
        "experts": own,
        "anchor": alone,
        "points": points,
        "run": run_record(config, seed, {**digests, "anchor": anchor.digest}),
    }


def name_choice(settings: EvidenceSettings) -> str:
    """Short name of what one point of a curve hides."""
    if settings.epsilon is None:
        return f"k = {settings.min_documents}"
    return f"epsilon = {settings.epsilon:g}"


def mix_windows(sets: Sequence[Windows]) -> Windows:
    """Windows that turn from set to set: of each set in turn one window, another first each time.

    As many as the set with the fewest windows has. A window's first id is context alone, so of a
    later part it is left out.
    """
    mixed = []
    for i, parts in enumerate(zip(*sets, strict=False)):
        first = i % len(parts)
        turned = parts[first:] + parts[:first]
        ids = [turned[0][0], *(part[1:] for part, _ in turned[1:])]
        mixed.append((np.concatenate(ids), sum(size for _, size in turned)))
    return mixed


def _set_of(expert: Expert, sets: Mapping[str, TokenSet]) -> str:
    """Name of the set that an expert was trained on."""
    for name, data in sets.items():
        try:
            if data.commitment == expert.data_card_digest:
                return name
        except DataError:  # a set without a salt, on which nobody was trained
            continue
    raise ConfigError(
        f"Expert {expert.name} was trained on the set of commitment {expert.data_card_digest}, "
        f"which is none of {', '.join(str(d.directory) for d in sets.values())}. Give that set as "
        "it was prepared then."
    )
