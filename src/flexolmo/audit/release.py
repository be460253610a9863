"""The release report of an owner's bundle: what was trained, what is promised, what attacks found.

Two copies are made of one set of findings. The one that may leave holds figures alone: its counts
of the text are rounded, and none is of fewer source documents than the router's table would need;
figures of attacks are exact, of the documents that were attacked. The one that stays has the exact
counts too, the documents that attacks hit worst, and what the model knows by heart. No weights are
read, and no model is run.
"""

import datetime
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from pydantic import JsonValue

from flexolmo.audit.results import (
    AUDITS,
    LEVELS,
    SUBJECTS,
    Results,
    Row,
    Summary,
    digest_of_results,
    refuse_other_bundle,
    summarise,
    summarise_control,
)
from flexolmo.bundle.bundle import MANIFEST_FILE, Bundle
from flexolmo.bundle.manifest import Manifest
from flexolmo.bundle.release import (
    Figure,
    Measure,
    ReleaseReport,
    origin_of,
    stated_budget,
    stated_epsilon,
)
from flexolmo.data.batches import TokenSet
from flexolmo.data.overlap import measure_overlap
from flexolmo.data.personal import PATTERNS, count_personal
from flexolmo.errors import ConfigError, DataError

LEAST_DOCUMENTS = 20  # if the router's table has no higher number
SPLIT_SIZES = {"members", "others"}  # settings of an attack that count the owner's documents
LEAST_SPAN = 40  # characters of a memorised span that is shown
LEAST_CHANCE = 1e-6  # of a text that is shown where nothing was sampled
NOTICE = "This copy quotes the training text. It must not leave the owner's house."

_ALWAYS_OUTSIDE = (
    "Attacks that nobody has thought of yet: a low figure says that these failed, not that none "
    "can succeed.",
    "What an expert says rather than remembers: a fact that many documents state is learnt, and is "
    "told.",
    "The owner's word: signed, but nobody else can check that the set, the training and the "
    "attacks were as stated.",
)
_OUTSIDE_A_GUARANTEE = (
    "The tokenizer, which is the anchor's and public.",
    "Preparing the set: what was left out as a duplicate, or put in another split, because of "
    "another record.",
    "The number of units, which follows from the sampling rate that the manifest states.",
    "The choice of settings: recipes that were tried on the text and thrown away.",
    "Another expert of the same text, whose budget adds to this one's.",
    "Rounding of the noise, which is computed in floating point.",
    "This report: its counts are coarse, but what attacks found is worked out from the text "
    "exactly, and no epsilon covers it.",
)


@dataclass(frozen=True)
class Findings:
    """One report in its two copies."""

    report: ReleaseReport
    stays: dict[str, Any]  # quotes text


def make_findings(
    bundle: Bundle,
    data: TokenSet,
    results: Sequence[Results],
    *,
    controls: Sequence[Results] = (),
    public: TokenSet | None = None,
    created: str | None = None,
) -> Findings:
    """The report of `bundle` from the prepared set that it was trained on and from attacks on it.

    Args:
        controls: results of the same attacks on an expert that knows its text by heart.
        public: the prepared public set, to which the distance is measured.
        created: UTC time like 2026-01-31T12:00:00Z; default: now.
    Raises:
        ConfigError: the set is not that of the bundle, or an attack is given twice.
        DataError: results of another bundle, or a control that the attack did not find out.
    """
    m = bundle.manifest
    if data.commitment != m.data_card_digest:
        raise ConfigError(
            f"Expert {m.name} was trained on the set of commitment {m.data_card_digest}; "
            f"{data.directory} has {data.commitment}. Give the set that it was trained on."
        )
    origin = origin_of(bundle.digests[MANIFEST_FILE], m.anchor_digest, m.recipe)
    for one in results:
        refuse_other_bundle(one, origin, m.data_card_digest)
    epsilon = stated_epsilon(m)
    by_audit = _by_audit(results, "results")
    summaries = {name: summarise(one, epsilon) for name, one in by_audit.items()}
    known_by_heart = {
        name: summarise_control(one, origin).headline
        for name, one in _by_audit(controls, "control").items()
    }
    least = _least_documents(m)
    exact = _measure_text(data, public)
    findings = {
        "bundle_digest": bundle.digests[MANIFEST_FILE],
        "training": _training(bundle),
        "guarantee": _guarantee(m),
        "outside": [*(_OUTSIDE_A_GUARANTEE if epsilon is not None else ()), *_ALWAYS_OUTSIDE],
        "attacks": [
            _attack(by_audit[name], summaries[name], known_by_heart.get(name), origin, least)
            for name in AUDITS
            if name in by_audit
        ],
        "not_made": [name for name in AUDITS if name not in by_audit],
        "least_documents": least,
        "data": {
            "unit_field": data.card.get("unit_field"),
            "licences": list(data.card.get("licences", [])),
        },
        "text": make_coarse(exact, least),
        "limits_of_patterns": {kind: pattern.limits for kind, pattern in PATTERNS.items()},
        "licence": m.licence,
        "terms": m.terms.model_dump(mode="json") | {"summary": m.terms.summary()},
    }
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    report = ReleaseReport(
        format="flexolmo-release-report",
        format_version=1,
        name=m.name,
        owner=m.owner,
        serial=m.serial,
        bundle_digest=bundle.digests[MANIFEST_FILE],
        created=created or now,
        measures=_measures(summaries),
        findings=cast(dict[str, JsonValue], findings),
    )
    return Findings(report, {"notice": NOTICE, "text": exact} | _hits(results))


def _least_documents(m: Manifest) -> int:
    """Source documents on which each number that leaves depends at least."""
    stated = m.router.settings.get("min_documents")
    return max(stated, LEAST_DOCUMENTS) if isinstance(stated, int) else LEAST_DOCUMENTS


def _measure_text(data: TokenSet, public: TokenSet | None) -> dict[str, Any]:
    """Exact counts of the training text: its size, personal data, and overlap with public text."""
    split = data.card["splits"]["train"]
    removed = data.card.get("removed", {}).get("documents", {})
    return {
        "counts": {
            "documents": len(data.splits["train"].source_offsets) - 1,
            "bytes": split["bytes"],
            "tokens": split["tokens"],
            "removed_as_public": removed.get("in public set", 0),
        },
        "personal": count_personal(data),
        "overlap": None if public is None else measure_overlap(data, public),
    }


def make_coarse(exact: Mapping[str, Any], least: int) -> dict[str, Any]:
    """The part of `_measure_text` that may leave, see `coarse`.

    Where fewer than `least` documents hold a kind of personal data, its matches are not told
    either; of a text of fewer, neither its size nor the share that is public.
    """
    counts = {name: coarse(n, least) for name, n in exact["counts"].items()}
    is_told = counts["documents"] is not None
    if not is_told:
        counts |= {"bytes": None, "tokens": None}
    personal = {}
    for kind, found in exact["personal"].items():
        documents = coarse(found["documents"], least)
        matches = None if documents is None else coarse(found["matches"], least)
        personal[kind] = {"matches": matches, "documents": documents}
    overlap = exact["overlap"]
    if overlap is not None:
        share = overlap["short"]
        overlap = overlap | {
            "short": round(share, 2) if is_told and share is not None else None,
            "long": coarse(overlap["long"], least),
        }
    return {"counts": counts, "personal": personal, "overlap": overlap}


def coarse(count: int, least: int) -> int | None:
    """`count` to two significant digits, and to tens; None if it is below `least`, zero too."""
    if count < least:
        return None
    unit = max(10, 10 ** (len(str(count)) - 2))
    return max(round(count / unit) * unit, least)


def _by_audit(results: Sequence[Results], what: str) -> dict[str, Results]:
    found: dict[str, Results] = {}
    for one in results:
        if one.audit in found:
            raise ConfigError(
                f"{found[one.audit].path} and {one.path} are both the {what} of {one.audit}. Give "
                "one of them."
            )
        found[one.audit] = one
    return found


def _measures(summaries: Mapping[str, Summary]) -> dict[Measure, Figure]:
    found: dict[Measure, Figure] = {}
    audits: dict[Measure, str] = {"extraction": "extraction", "membership_auc": "membership"}
    for measure, audit in audits.items():
        summary = summaries.get(audit)
        row = None if summary is None else summary.limited
        if row is not None and row.low is not None and row.high is not None:
            found[measure] = Figure(
                value=_rounded(row.value),
                low=_rounded(min(row.low, row.value)),  # resampling may leave the value outside
                high=_rounded(max(row.high, row.value)),
                model="alone" if row.model == SUBJECTS["alone"] else "on",
            )
    return found


def _rounded(value: float) -> float:
    return round(float(value), 4)


def _attack(
    results: Results, summary: Summary, control: Row | None, origin: Mapping[str, str], least: int
) -> dict[str, Any]:
    """One attack as both copies tell it; the sizes of the splits, which bound it, are rounded."""
    assert results.origin is not None
    assert summary.level in LEVELS
    settings = dict(summary.settings)
    for name in SPLIT_SIZES & settings.keys():
        settings[name] = coarse(settings[name], least) or f"fewer than {least}"
    return {
        "audit": results.audit,
        "question": AUDITS[results.audit].question,
        "verdict": summary.verdict,
        "level": summary.level,
        "headline": None if summary.headline is None else _figures(summary.headline),
        "rows": [_figures(row) for row in summary.rows],
        "texts": None if summary.texts is None else coarse(summary.texts, least),
        "settings": settings,
        "off_equals_anchor": summary.off_equals_anchor,
        "control": None if control is None else _figures(control),
        "results_digest": digest_of_results(results),
        "bundle_digest": results.origin["bundle"],
        "is_of_a_twin": results.origin["bundle"] != origin["bundle"],
    }


def _figures(row: Row) -> dict[str, Any]:
    return {k: _rounded(v) if isinstance(v, float) else v for k, v in asdict(row).items()}


def _training(bundle: Bundle) -> dict[str, Any]:
    m = bundle.manifest
    return {
        "anchor_digest": m.anchor_digest,
        "weights_digest": m.weights_digest,
        "weights_bytes": bundle.weights_bytes,
        "parameters": sum(math.prod(entry.shape) for entry in m.tensors.values()),
        "tokens_seen": m.tokens_seen,
        "architecture": m.architecture.model_dump(mode="json"),
        "router": m.router.model_dump(mode="json"),
        "recipe": m.recipe,
        "packed": m.created,
        "software": dict(m.software),
    }


def _guarantee(m: Manifest) -> dict[str, Any]:
    """The budget of weights and table, that of the table alone, and documents behind each count."""
    settings = m.router.settings
    budget = stated_budget(m)
    return {
        "budget": None if budget is None else budget.model_dump(mode="json"),
        "table_epsilon": _stated_number(settings.get("epsilon")),
        "table_delta": _stated_number(settings.get("delta")),
        "least_documents": _stated_number(settings.get("min_documents")),
    }


def _stated_number(value: Any) -> float | None:
    """`value` of a router's settings, which nobody checked, if it is a number of the size of one
    that means something; else None."""
    return value if type(value) in (int, float) and 0 <= value <= 1e9 else None


# --- for the owner alone ------------------------------------------------------------------------


def _hits(results: Sequence[Results]) -> dict[str, Any]:
    """Documents that attacks hit worst, and spans that the model wrote; None: nothing is known."""
    found: dict[str, Any] = {"worst_documents": None, "memorised": None}
    for one in results:
        if one.stays is None:
            continue
        try:
            if one.audit == "membership":
                found["worst_documents"] = [_worst_document(x) for x in one.stays["worst"]]
            elif one.audit == "extraction":
                threshold = one.found["run"]["config"]["threshold"]
                found["memorised"] = memorised_spans(one.stays["documents"], threshold)
        except (AttributeError, LookupError, TypeError, ValueError) as e:
            raise DataError(
                f"What stays beside {one.path} is not as this release writes it ({e}). Make the "
                "attack again."
            ) from None
    return found


def _worst_document(worst: Mapping[str, Any]) -> dict[str, Any]:
    """A document that membership attacks hit, as the page shows it."""
    return {
        "document": int(worst["document"]),
        "above_others": float(worst["above_others"]),
        "begins": str(worst["begins"]),
        "tokens": [{"token": str(x["token"])} for x in worst["tokens"]],
    }


def memorised_spans(
    documents: Sequence[Mapping[str, Any]], threshold: float
) -> list[dict[str, Any]]:
    """Spans known by heart: of each document that was attacked, the longest span of its
    continuation that a sample wrote too, word for word, if it has LEAST_SPAN characters, and
    whether it counts as extracted. Where nothing was sampled: the continuation, if sampling writes
    it with LEAST_CHANCE."""
    found = []
    for document in documents:
        own = document["continuation"]
        chance = document["log_probability"]
        if "best" in document:
            match = difflib.SequenceMatcher(
                None, own, document["best"], autojunk=False
            ).find_longest_match()
            span = own[match.a : match.a + match.size]
            similarity = max(document["similarities"])
        else:
            is_likely = chance is not None and chance >= math.log(LEAST_CHANCE)
            span = own if is_likely else ""
            similarity = 1.0
        if len(span) >= LEAST_SPAN:
            found.append(
                {
                    "document": document["document"],
                    "prefix": document["prefix"],
                    "span": span,
                    "similarity": round(similarity, 3),
                    "is_extracted": similarity >= threshold,
                }
            )
    return sorted(found, key=lambda x: -x["similarity"])
