"""Attack on membership: was a document trained on? By an attacker who has the model's predictions.

The reference that two of the attacks need is at hand: the same mixture with the expert off.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flexolmo.audit.intervals import area, caught, roc
from flexolmo.audit.reading import read_signals
from flexolmo.audit.signals import Signals, scores_of
from flexolmo.audit.subjects import ANCHOR, OFF, Subjects
from flexolmo.audit.texts import OTHERS, Beginning, read_beginnings, read_members, refuse_none
from flexolmo.data.batches import TokenSet
from flexolmo.errors import DataError
from flexolmo.inference.reader import Reader
from flexolmo.runtime import run_record

LEAST_TOKENS = 20  # of a document that is read
RATES = (0.01, 0.001)  # of false alarms
WORST_DOCUMENTS = 20
WORST_TOKENS = 10
SHOWN_CHARACTERS = 200
STAYS = "This file quotes the training text. It must not leave the owner's house."


def audit_membership(
    subjects: Subjects,
    token_set: TokenSet,
    *,
    max_tokens: int = 256,
    max_documents: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attack every subject; the figures, and what must stay in the house.

    Read are the first `max_tokens` of at most `max_documents` documents of each kind: members, of
    which training read all these tokens (where the expert's recipe says so; else of the training
    split), and others, which are validation and held-out documents. Under "subjects", by subject
    and attack: AUC with its interval, true positive rate at 1 % and 0.1 % false positives, and the
    ROC curve. "off_equals_anchor": whether every score without the expert is the anchor's to the
    bit; none where other experts are on.

    Raises DataError for a set with no such documents or of another tokenizer.
    """
    subjects.check_set(token_set)
    length = min(max_tokens, *(s.reader.max_seq_len - 1 for s in subjects.models))
    how = {"least": min(LEAST_TOKENS, length), "length": length, "seed": seed}
    members = read_members(token_set, subjects.recipe, most=max_documents, **how)
    others = read_beginnings(token_set, OTHERS, most=max_documents, **how)
    refuse_none(token_set, others, "validation or held-out document", how["least"])
    scores, tokens = _read(subjects, [*members, *others])
    count = len(members)
    results = {
        subject: {
            attack: _measure(values[:count], values[count:], seed)
            for attack, values in by_attack.items()
        }
        for subject, by_attack in scores.items()
    }
    found = {
        "audit": "membership",
        "about": subjects.about,
        "documents": {
            "members": count,
            "others": len(others),
            "in_training_split": token_set.card["splits"]["train"]["source_documents"],
        },
        "tokens": length,
        "subjects": results,
        "off_equals_anchor": _is_anchor(scores) if subjects.is_alone else None,
        "run": run_record(
            {"max_tokens": max_tokens, "max_documents": max_documents},
            seed,
            {token_set.name: token_set.digest, "model": subjects.about["digest"]},
        ),
    }
    first = subjects.models[0]
    strongest = strongest_of(results[first.name])
    values = scores[first.name][strongest]
    worst = np.argsort(-values[:count])[:WORST_DOCUMENTS]
    stays = {
        "notice": STAYS,
        "audit": "membership",
        "origin": subjects.about.get("origin"),
        "subject": first.name,
        "attack": strongest,
        "worst": [
            {
                "document": members[i].index,
                "score": float(values[i]),
                "above_others": float((values[count:] < values[i]).mean()),
                "begins": _text(first.reader, members[i].ids[1:])[:SHOWN_CHARACTERS],
                "tokens": tokens[i],
            }
            for i in worst
        ],
    }
    return found, stays


def strongest_of(by_attack: Mapping[str, Mapping[str, Any]]) -> str:
    """The attack that finds most on one subject, by its AUC."""
    return max(by_attack, key=lambda attack: float(by_attack[attack]["auc"]))


def _read(
    subjects: Subjects, documents: list[Beginning]
) -> tuple[dict[str, dict[str, np.ndarray]], list[list[dict[str, Any]]]]:
    """Scores [n] of all documents by subject and attack, and of each document the tokens that the
    first subject's signals say most of."""
    rows = [d.ids for d in documents]
    first = subjects.models[0]
    scores: dict[str, dict[str, np.ndarray]] = {s.name: {} for s in subjects.models}
    tokens: list[list[dict[str, Any]]] = [[] for _ in rows]
    for place, by_subject in read_signals(subjects, rows, "membership"):
        text = _text(first.reader, rows[place][1:])
        for name, signals in by_subject.items():
            for attack, score in scores_of(signals, text).items():
                scores[name].setdefault(attack, np.empty(len(rows)))[place] = score
        tokens[place] = _worst_tokens(first.reader, rows[place][1:], by_subject[first.name])
    return scores, tokens


def _worst_tokens(reader: Reader, ids: np.ndarray, signals: Signals) -> list[dict[str, Any]]:
    """The tokens of one document that give it away most."""
    values = signals.log_prob if signals.information is None else signals.information
    places = values.argsort(descending=True)[:WORST_TOKENS].tolist()
    return [
        {"place": i, "token": _text(reader, ids[i : i + 1]), "score": float(values[i])}
        for i in places
    ]


def _measure(members: np.ndarray, others: np.ndarray, seed: int) -> dict[str, Any]:
    """AUC, true positive rates and ROC curve of one attack on one subject.

    Raises DataError for a score that is not finite, by which nobody would seem caught.
    """
    if not (np.isfinite(members).all() and np.isfinite(others).all()):
        raise DataError(
            "A document's score is NaN or infinite, so the model's probabilities are: nothing can "
            "be said of it. See whether it reads this text at all (flexolmo eval sets)."
        )
    return area(members, others, seed) | {
        "caught": {f"{rate:g}": caught(members, others, rate) for rate in RATES},
        "roc": roc(members, others),
    }


def _is_anchor(scores: dict[str, dict[str, np.ndarray]]) -> bool:
    """True if every score without the expert is the anchor's, to the bit."""
    return all(
        np.array_equal(scores[OFF][attack], values) for attack, values in scores[ANCHOR].items()
    )


def _text(reader: Reader, ids: np.ndarray) -> str:
    return reader.tokenizer.decode(ids.tolist())
