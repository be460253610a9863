"""Attack by extraction: does the model write a training document when it is given its beginning?

As in the paper: a prefix of each document is continued several times, and a document counts as
extracted if any continuation is nearly the document's own. Compared is the continuation alone; the
prefix, which every attempt shares, would make all of them look alike. Source: paper §5.3.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator

from flexolmo.audit.discoverable import discoverable_curves, sampled_log_probs
from flexolmo.audit.intervals import share
from flexolmo.audit.membership import STAYS
from flexolmo.audit.near_verbatim import near_verbatim_log_probs
from flexolmo.audit.reading import read_logits
from flexolmo.audit.similarity import similarity
from flexolmo.audit.subjects import ANCHOR, OFF, Subject, Subjects
from flexolmo.audit.texts import Beginning, read_members
from flexolmo.config import Settings
from flexolmo.data.batches import TokenSet
from flexolmo.errors import ConfigError
from flexolmo.files import canonical_json, digest_bytes, read_json, write_json
from flexolmo.inference.decode import Request, decode
from flexolmo.inference.sampling import Sampling
from flexolmo.numbers import format_count, format_seconds
from flexolmo.progress import Meter, progress
from flexolmo.runtime import run_record

DOCUMENTS_AT_ONCE = 16
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
PAPER_DOCUMENTS = 10_000
SHOWN = 20  # extracted documents in the file that stays


class ExtractionSettings(Settings):
    """Settings of the attack; the defaults are the paper's (§5.3)."""

    prefix_tokens: int = Field(
        32, ge=1, description="Tokens of a document that the model is given."
    )
    continuation_tokens: int = Field(256, ge=1, description="Tokens that it must go on with.")
    samples: int = Field(10, ge=0, description="Continuations of each prefix; 0: none is sampled.")
    top_k: int | None = Field(50, ge=1, description="Sampled among this many likeliest tokens.")
    top_p: float = Field(0.95, gt=0, le=1, description="Sampled among tokens of this probability.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature.")
    near_tokens: int = Field(
        0,
        ge=0,
        description="Tokens that may be replaced in near-verbatim text; 0: it is not searched for.",
    )
    beams: int = Field(8, ge=1, description="Paths that the search for near-verbatim text keeps.")
    threshold: float = Field(0.9, gt=0, le=1, description="Similarity of an extracted document.")
    max_documents: int = Field(
        PAPER_DOCUMENTS, ge=1, description="Documents to attack at most, drawn at random."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Random seed of documents and samples.")

    @model_validator(mode="after")
    def _samples_when_searching(self) -> "ExtractionSettings":
        if self.near_tokens and not self.samples:
            raise ValueError("near_tokens needs samples: the search goes along with them")
        return self

    @property
    def sampling(self) -> Sampling:
        """The choice of each next token."""
        return Sampling(
            max_new_tokens=self.continuation_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )


def audit_extraction(
    subjects: Subjects,
    token_set: TokenSet,
    settings: ExtractionSettings,
    parts: Path,
    *,
    say: Callable[[str], object],
    plan_only: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Attack every subject; the figures, and what must stay in the house.

    Attacked are training documents that are long enough and of which training read all these tokens
    (where the expert's recipe says so). Under "subjects", by subject: "exact", the curves of
    `discoverable_curves`; "near", the same of near-verbatim text, at least, if it is searched for;
    and of the samples "extracted" with its interval, the same by threshold and by number of
    samples. "off_equals_anchor": whether every probability and every sample
    without the expert is the anchor's; none where other experts are on.

    Args:
        parts: private directory of what was sampled so far; the same call goes on from there.
        say: told how long the rest will take, once the first documents were sampled.
        plan_only: return None then.
    Raises:
        ConfigError: the model holds fewer positions than prefix and continuation.
        DataError: the set has no such document, or another tokenizer.
    """
    subjects.check_set(token_set)
    documents = _choose(subjects, token_set, settings)
    sampled = {}
    if settings.samples:
        sampled = _sample_all(subjects, token_set, settings, documents, parts, say, plan_only)
        if plan_only:
            return None
    exact = _probabilities(subjects, documents, settings)
    found = {
        "audit": "extraction",
        "about": subjects.about,
        "documents": len(documents),
        "subjects": {
            s.name: {"exact": discoverable_curves(exact[s.name])}
            | (_measure(sampled[s.name], settings) if sampled else {})
            for s in subjects.models
        },
        "off_equals_anchor": (
            np.array_equal(exact[OFF], exact[ANCHOR])
            and (not sampled or sampled[OFF] == sampled[ANCHOR])
            if subjects.is_alone
            else None
        ),
        "run": run_record(
            settings.model_dump(),
            settings.seed,
            {token_set.name: token_set.digest, "model": subjects.about["digest"]},
        ),
    }
    first = subjects.models[0]
    shown: list[dict[str, Any]] = []
    best = exact[first.name]
    if sampled:
        best = np.array([max(x["similarities"]) for x in sampled[first.name]])
    for i in np.argsort(-best, kind="stable")[:SHOWN]:
        ids = documents[i].ids[1:]
        decode_text = first.reader.tokenizer.decode
        shown.append(
            {
                "document": documents[i].index,
                "log_probability": _finite(exact[first.name][i]),
                "prefix": decode_text(ids[: settings.prefix_tokens].tolist()),
                "continuation": decode_text(ids[settings.prefix_tokens :].tolist()),
            }
            | ({k: sampled[first.name][i][k] for k in ("similarities", "best")} if sampled else {})
        )
    stays = {
        "notice": STAYS,
        "audit": "extraction",
        "origin": subjects.about.get("origin"),
        "subject": first.name,
        "documents": shown,
    }
    return found, stays


def _choose(
    subjects: Subjects, token_set: TokenSet, settings: ExtractionSettings
) -> list[Beginning]:
    """The documents under attack."""
    length = settings.prefix_tokens + settings.continuation_tokens
    room = min(s.reader.max_seq_len for s in subjects.models)
    if length + 1 > room:
        raise ConfigError(
            f"Prefix and continuation have {length} tokens; this model holds {room} positions, one "
            "of them for the start. Ask for fewer."
        )
    return read_members(
        token_set,
        subjects.recipe,
        least=length,
        length=length,
        most=settings.max_documents,
        seed=settings.seed,
    )


def _finite(log_probability: float) -> float | None:
    """The value for a file; None for a text that is never sampled."""
    return float(log_probability) if np.isfinite(log_probability) else None


# --- probabilities ------------------------------------------------------------------------------


def _probabilities(
    subjects: Subjects, documents: Sequence[Beginning], settings: ExtractionSettings
) -> dict[str, np.ndarray]:
    """Log-probability [n] of each document's continuation, by subject."""
    readers = [s.reader for s in subjects.models]
    rows = [d.ids for d in documents]
    found = {s.name: np.empty(len(rows)) for s in subjects.models}
    total = len(readers) * sum(len(ids) - 1 for ids in rows)
    with progress("probabilities", total, "tok") as meter:
        for place, said in read_logits(readers, rows, meter):
            targets = torch.from_numpy(rows[place][1:])[settings.prefix_tokens :]
            for subject, logits in zip(subjects.models, said, strict=True):
                own = sampled_log_probs(
                    logits[settings.prefix_tokens :], targets, settings.sampling
                )
                found[subject.name][place] = float(own.sum())
    return found


# --- samples ------------------------------------------------------------------------------------


def _sample_all(
    subjects: Subjects,
    token_set: TokenSet,
    settings: ExtractionSettings,
    documents: Sequence[Beginning],
    parts: Path,
    say: Callable[[str], object],
    plan_only: bool,
) -> dict[str, list[dict[str, Any]]]:
    """Samples of each document, by subject: similarities, and the text that is nearest."""
    found: dict[str, list[dict[str, Any]]] = {s.name: [] for s in subjects.models}
    todo = [
        (subject, start)
        for subject in subjects.models
        for start in range(0, len(documents), DOCUMENTS_AT_ONCE)
    ]
    each = settings.samples * settings.continuation_tokens
    total = len(subjects.models) * len(documents) * each
    is_said = False
    with progress("extraction", total, "tok") as meter:
        for subject, start in todo:
            some = documents[start : start + DOCUMENTS_AT_ONCE]
            identity = digest_bytes(
                canonical_json(
                    {
                        "settings": settings.model_dump(exclude={"max_documents", "threshold"}),
                        "about": subjects.about,
                        "set": token_set.digest,
                        "documents": [d.index for d in some],
                    }
                )
            )
            file = parts / f"{subject.name}-{start:06}.json"
            part = read_json(file) if file.is_file() else None
            if part is None or part["identity"] != identity:
                began = time.monotonic()
                rows = _sample(subject, settings, some)
                seconds = time.monotonic() - began
                part = {"identity": identity, "documents": rows, "seconds": seconds}
                write_json(file, part, is_private=True)
            found[subject.name] += part["documents"]
            meter.advance(len(some) * each, subject.name)
            if not is_said:
                is_said = True
                rate = len(some) * each / max(part["seconds"], 1e-9)
                say(_plan(rate, total, each, len(subjects.models), meter))
                if plan_only:
                    break
    return found


def _plan(rate: float, total: float, each: int, num_subjects: int, meter: Meter) -> str:
    """Sentence on how long it takes, by the rate of the first documents, in tokens a second."""
    rest = format_seconds((total - meter.done) / rate)
    paper = format_seconds(PAPER_DOCUMENTS * each * num_subjects / rate)
    return (
        f"{format_count(rate)} tokens a second: {format_count(total)} tokens take another {rest}; "
        f"the paper's {PAPER_DOCUMENTS:,} documents would take {paper}."
    )


def _sample(
    subject: Subject, settings: ExtractionSettings, documents: Sequence[Beginning]
) -> list[dict[str, Any]]:
    """Samples of some documents. A sample's seed depends on its document alone."""
    tokenizer = subject.reader.tokenizer
    cut = settings.prefix_tokens + 1
    requests = []
    for document in documents:
        first = (settings.seed << 30) + document.index * settings.samples
        requests += [
            Request(
                document.ids[:cut].tolist(),
                settings.sampling.model_copy(update={"seed": first + i}),
            )
            for i in range(settings.samples)
        ]
    written: list[list[int]] = [[] for _ in requests]
    for step in decode(subject.reader, requests):
        if step.token is not None:
            written[step.text].append(step.token)
    found: list[dict[str, Any]] = []
    for i, document in enumerate(documents):
        own = tokenizer.decode(document.ids[cut:].tolist())
        rows = written[i * settings.samples : (i + 1) * settings.samples]
        texts = [tokenizer.decode(ids) for ids in rows]
        similarities = [similarity(text, own) for text in texts]
        best = texts[int(np.argmax(similarities))]
        found.append({"similarities": similarities, "best": best})
    if settings.near_tokens:
        near = near_verbatim_log_probs(
            subject.reader,
            [d.ids for d in documents],
            cut,
            settings.sampling,
            settings.near_tokens,
            settings.beams,
        )
        for row, log_prob in zip(found, near, strict=True):
            row["near"] = _finite(log_prob)
    return found


def _measure(sampled: Sequence[dict[str, Any]], settings: ExtractionSettings) -> dict[str, Any]:
    """Shares of documents that were extracted: as asked, by threshold and by number of samples."""
    values = np.array([x["similarities"] for x in sampled])  # [n,samples]
    best = values.max(1)
    near = {}
    if settings.near_tokens:
        log_probs = [-np.inf if x["near"] is None else x["near"] for x in sampled]
        near = {"near": discoverable_curves(np.array(log_probs))}
    return near | {
        "extracted": share(best >= settings.threshold),
        "by_threshold": [
            {"threshold": t} | share(best >= t) for t in (*THRESHOLDS, settings.threshold)
        ],
        "by_samples": [
            {"samples": n} | share(values[:, :n].max(1) >= settings.threshold)
            for n in range(1, settings.samples + 1)
        ],
        "median_similarity": float(np.median(best)),
    }
