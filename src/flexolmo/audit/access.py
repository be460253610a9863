"""Two measures of access control on a running mixture: what its switch does, as seen from outside.

An observer has the log-probabilities that the model gives a text, and the public anchor. Source:
domain distinguishability and utility gap, PermLLM (arXiv 2505.22860); their form here is ours.

n documents, T tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexolmo.audit.intervals import RESAMPLES, area, share
from flexolmo.audit.texts import MEMBERS, OTHERS, read_beginnings
from flexolmo.data.batches import TokenSet
from flexolmo.errors import ConfigError
from flexolmo.evaluation.likelihood import Likelihood, read_windows
from flexolmo.inference.policy import choose_experts
from flexolmo.merge.mixture import LoadedMixture
from flexolmo.progress import progress
from flexolmo.runtime import run_record

LEAST_DOCUMENTS = 10  # of each kind, below which an owner is not measured
LEAST_TOKENS = 20  # of a document that is read
FALSE_ALARMS = 0.01  # of the answers without the source, in `recognised`
KINDS = {"unseen": OTHERS, "trained": MEMBERS}  # splits of each


def audit_access(
    mixture: LoadedMixture, sets: Mapping[str, TokenSet], *, max_documents: int = 500, seed: int = 0
) -> dict[str, Any]:
    """Measures of every expert whose prepared set is among `sets` (by name).

    Read is the beginning of at most `max_documents` source documents of each kind, trained and
    unseen (validation and held out), under all experts (on), all but one (off), and none (the
    anchor). Under "experts", by name:

    - distinguishability: whether the source was on, told from the score of an unseen document.
      `plain` by its log-probability, `calibrated` by how far that is above the anchor's,
      `trained` the same of training documents, and `recognised` the share of answers with the
      source whose calibrated score is above all but 1 % of those without it.
    - membership: training documents told from unseen ones by the calibrated score, with the
      source on and off.
    - utility_gap: bits per byte of unseen documents on and off, and what whoever may not use the
      source loses, (off - on) / off.

    Raises ConfigError if no set is an expert's, DataError for another tokenizer.
    """
    names = [n for n in mixture.expert_names if n in sets]
    if not names:
        raise ConfigError(
            f"The sets are {', '.join(sets) or 'none'}; this mixture's experts are "
            f"{', '.join(mixture.expert_names) or 'none'}. Give the prepared set of one of them."
        )
    for name in names:
        sets[name].check_tokenizer(mixture.tokenizer.digest, "the mixture")
    length = min(256, mixture.model.config.max_seq_len - 1)
    texts = {
        (name, kind): _windows(sets[name], splits, length, max_documents, seed)
        for name in names
        for kind, splits in KINDS.items()
    }
    total = 3 * sum(len(ids) - 1 for windows in texts.values() for ids, _ in windows)
    found = {}
    with progress("access", total, "tok") as meter:
        for name in names:
            others = [n for n in mixture.expert_names if n != name]
            enabled = {"on": mixture.expert_names, "off": others, "anchor": []}
            readings = {}
            for kind in KINDS:
                for switch, experts in enabled.items():
                    choose_experts(mixture.terms, only=experts)  # terms may expire meanwhile
                    meter.note = f"{name}, {kind}, {switch}"
                    readings[kind, switch] = read_windows(
                        mixture.model, texts[name, kind], enabled=experts, meter=meter
                    )
            counts = {kind: len(texts[name, kind]) for kind in KINDS}
            found[name] = {"documents": counts} | (
                {"too_few": LEAST_DOCUMENTS}
                if min(counts.values()) < LEAST_DOCUMENTS
                else _measure(readings, texts[name, "unseen"], seed)
            )
    config = {"max_documents": max_documents, "seq_len": length, "top_k": mixture.about["top_k"]}
    digests = {name: sets[name].digest for name in names}
    for name in mixture.expert_names:
        files = mixture.about["experts"][name]["files"]
        digests[f"bundle of {name}"] = files["manifest.json"]
    return {"experts": found, "run": run_record(config, seed, digests)}


def _windows(
    token_set: TokenSet, splits: Sequence[str], length: int, most: int, seed: int
) -> list[tuple[np.ndarray, int]]:
    """The beginnings of source documents, with the bytes that they stand for."""
    found = read_beginnings(
        token_set, splits, least=LEAST_TOKENS, length=length, most=most, seed=seed
    )
    return [(b.ids, b.bytes) for b in found]


def _measure(
    readings: Mapping[tuple[str, str], Likelihood],
    unseen: Sequence[tuple[np.ndarray, int]],
    seed: int,
) -> dict[str, Any]:
    """All measures of one expert, from readings by kind and switch."""
    mean = {
        key: np.array([x.mean(dtype=np.float64) for x in reading.log_probs])
        for key, reading in readings.items()
    }
    over = {  # the anchor's
        (kind, switch): mean[kind, switch] - mean[kind, "anchor"]
        for kind in KINDS
        for switch in ("on", "off")
    }
    on, off = over["unseen", "on"], over["unseen", "off"]
    return {
        "distinguishability": {
            "plain": area(mean["unseen", "on"], mean["unseen", "off"], seed),
            "calibrated": area(on, off, seed),
            "trained": area(over["trained", "on"], over["trained", "off"], seed),
            "recognised": share(on > np.quantile(off, 1 - FALSE_ALARMS, method="higher")),
        },
        "membership": {
            switch: area(over["trained", switch], over["unseen", switch], seed)
            for switch in ("on", "off")
        },
        "utility_gap": _utility_gap(
            readings["unseen", "on"], readings["unseen", "off"], unseen, seed
        ),
    }


def _utility_gap(
    on: Likelihood, off: Likelihood, windows: Sequence[tuple[np.ndarray, int]], seed: int
) -> dict[str, Any]:
    """Bits per byte, and the relative loss of who goes without, with a bootstrap over documents."""
    nats = np.array(
        [
            [-x.sum(dtype=np.float64), -y.sum(dtype=np.float64)]
            for x, y in zip(on.log_probs, off.log_probs, strict=True)
        ]
    )  # [n,2]
    drawn = np.random.default_rng(seed).integers(len(windows), size=(RESAMPLES, len(windows)))
    sums = nats[drawn].sum(1)  # [RESAMPLES,2]
    bounds = np.quantile(1 - sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return {
        "on": on.bits_per_byte,
        "off": off.bits_per_byte,
        "gap": 1 - on.bits / off.bits,
        "interval": [float(x) for x in bounds],
    }
