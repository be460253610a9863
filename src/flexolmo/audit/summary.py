"""Public summary of the training content of a mixture, for exactly the sources that are on.

Follows the structure of the European Commission's template for Article 53(1)(d) of the AI Act, see
TEMPLATE. Says what signed manifests, release reports, the anchor's record and the publisher say;
what nobody said stays None, with whom to ask. A source that is off leaves no trace but its name and
digest in `held`. No counts of an owner leave: sizes are the template's ranges.
"""

import datetime
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, StringConstraints

from flexolmo.bundle.bundle import MANIFEST_FILE, Bundle, open_bundle
from flexolmo.bundle.manifest import PUBLIC
from flexolmo.bundle.release import check_release, place_of, stated_budget
from flexolmo.bundle.terms import Day
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.config import Settings
from flexolmo.errors import ConfigError, MergeError
from flexolmo.files import canonical_json, digest_bytes, digest_file, read_json
from flexolmo.inference.policy import choose_experts
from flexolmo.merge.index import ABOUT
from flexolmo.merge.mixture import load_mixture

TEMPLATE = (
    "Explanatory Notice and Template for the Public Summary of Training Content for "
    "general-purpose AI models required by Article 53(1)(d) of Regulation (EU) 2024/1689 (AI Act), "
    "European Commission, 24 July 2025; C(2025) 8311 of 5 December 2025"
)
Kind = Literal[
    "public-dataset", "licensed", "third-party", "crawled", "user-data", "synthetic", "other"
]
KINDS: dict[Kind, str] = {  # headings of section 2 of the template
    "public-dataset": "2.1 Publicly available datasets",
    "licensed": "2.2.1 Private datasets commercially licensed by rightsholders or their "
    "representatives",
    "third-party": "2.2.2 Private datasets obtained from other third parties",
    "crawled": "2.3 Data crawled and scraped from online sources",
    "user-data": "2.4 User data",
    "synthetic": "2.5 Synthetic data",
    "other": "2.6 Other sources of data",
}
SIZES = (  # ranges of section 1.3 of the template
    "less than 1 billion tokens",
    "1 billion to 10 trillion tokens",
    "more than 10 trillion tokens",
)
_EDGES = (10**9, 10**13 + 1)
PROVIDER = "the provider"
ANCHOR_MAKER = "whoever made the anchor"
ASKED = (  # of each source
    "kinds",
    "description",
    "size",
    "languages",
    "collected_until",
    "licences",
    "reservations",
    "illegal_content",
)
OPTIONAL = ("representative", "dependencies", "other")  # of provider, model and processing
Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=10_000)]
Lines = Annotated[tuple[Words, ...], Field(min_length=1)]


class Provider(Settings):
    """Section 1.1: who places the model on the market."""

    name: Words | None = None
    contact: Words | None = None
    representative: Words | None = None  # authorised, with contact; of providers outside the Union


class Model(Settings):
    """Section 1.2: which model is meant."""

    name: Words | None = None  # with its version
    placed_on_market: Day | None = None
    dependencies: Words | None = None  # models that it is made from, and where their summaries are
    other: Words | None = None


class Processing(Settings):
    """Section 3, of all sources together."""

    signed_code_of_practice: StrictBool | None = None
    reservations: Words | None = None  # of text and data mining: how they were respected
    illegal_content: Words | None = None  # how it was removed
    other: Words | None = None


class Source(Settings):
    """One source: the name of an expert, or "public"."""

    kinds: Annotated[tuple[Kind, ...], Field(min_length=1)] | None = None
    description: Words | None = None
    languages: Lines | None = None
    licences: Lines | None = None  # of the text
    link: Words | None = None
    collected_until: Day | None = None  # latest day on which text was acquired
    tokens: Annotated[StrictInt, Field(ge=1)] | None = None  # about; its range alone is printed
    reservations: Words | None = None
    illegal_content: Words | None = None


class About(Settings):
    """The publisher's own words, in the file of --about."""

    provider: Provider = Provider()
    model: Model = Model()
    processing: Processing = Processing()
    sources: dict[str, Source] = Field(default_factory=dict)


def make_summary(
    model_dir: Path,
    trusted: TrustedOwners | None,
    about: About | None = None,
    *,
    without: Iterable[str] = (),
    only: Iterable[str] | None = None,
    created: datetime.date | None = None,
) -> dict[str, Any]:
    """The summary of the mixture in `model_dir` with these experts on, see `choose_experts`.

    Signatures and digests of the bundles that are on are checked, and no bundle that is off is
    opened. But for `held`, the result is that of a mixture which never held what is off.

    Args:
        about: What the publisher says. Of a source that is off nothing is used.
        created: Day of the summary. Default: today, in UTC.
    Raises:
        ConfigError: `about` names a source that the mixture does not hold.
        PolicyError: an unknown expert, or both `without` and `only`.
        BundleError, CheckpointError, MergeError: a mixture that does not hold up.
    """
    about = about or About()
    index = load_mixture(model_dir, trusted, []).about  # the anchor is checked, no bundle is read
    held = index["experts"]
    unknown = sorted(about.sources.keys() - held.keys() - {PUBLIC})
    if unknown:
        raise ConfigError(
            f"What is said about {', '.join(unknown)} is of no source here: the mixture holds "
            f"{', '.join([PUBLIC, *sorted(held)])}. Correct the name under [sources]."
        )
    on = choose_experts(held.keys(), without=without, only=only)
    said = {name: about.sources.get(name, Source()) for name in (PUBLIC, *sorted(on))}
    record = read_json(Path(model_dir) / "anchor" / "anchor.json").get("record")
    bounds = {PUBLIC: _bounds(said[PUBLIC].tokens, _look(record, "tokens"))}
    sources = {PUBLIC: _describe(said[PUBLIC], bounds[PUBLIC], ANCHOR_MAKER)}
    digests = {}
    for name in sorted(on):
        bundle = open_bundle(
            Path(model_dir) / "experts" / f"{name}.bundle",
            trusted,
            trusted is not None and trusted.allows_unknown,
            expected=held[name]["files"],
        )
        findings, report_digest = _read_report(Path(model_dir), name, bundle, index)
        tokens = said[name].tokens or _look(findings, "text", "counts", "tokens")
        bounds[name] = _bounds(tokens, bundle.manifest.tokens_seen)
        sources[name] = _describe(said[name], bounds[name], bundle.manifest.owner)
        sources[name] |= _signed(bundle, findings) | {"report_digest": report_digest}
        sources[name]["licences"] = sources[name]["licences"] or _listed(
            findings, "data", "licences"
        )
        digests[name] = bundle.digests[MANIFEST_FILE]
    model = about.model.model_dump(mode="json")
    model["dependencies"] = model["dependencies"] or _look(record, "config", "imported_from")
    frame = {key: index[key] for key in ("anchor_digest", "router", "top_k")}
    return {
        "format": "flexolmo-training-summary",
        "format_version": 1,
        "template": TEMPLATE,
        "created": str(created or datetime.datetime.now(datetime.UTC).date()),
        "provider": about.provider.model_dump(mode="json"),
        "model": model
        | {
            "digest": digest_bytes(canonical_json(frame | {"experts": digests})),
            "anchor_digest": index["anchor_digest"],
            "bundle_digests": digests,
        },
        "overall": _overall(sources, bounds),
        "sources": sources,
        "processing": about.processing.model_dump(mode="json"),
        "held": {
            "mixture_digest": digest_file(Path(model_dir) / ABOUT),
            "off": {n: held[n]["files"][MANIFEST_FILE] for n in sorted(held.keys() - on)},
        },
    }


def find_unstated(summary: Mapping[str, Any]) -> dict[str, list[str]]:
    """Keys that nobody gave a value, as `part.key`, by whom to ask."""
    found: dict[str, list[str]] = {}
    for part in ("provider", "model", "processing"):
        keys = [k for k, v in summary[part].items() if v is None and k not in OPTIONAL]
        found.setdefault(PROVIDER, []).extend(f"{part}.{key}" for key in keys)
    for name, source in summary["sources"].items():
        keys = [key for key in ASKED if source[key] is None]
        found.setdefault(source["ask"], []).extend(f"{name}.{key}" for key in keys)
    return {who: what for who, what in found.items() if what}


def _describe(said: Source, bounds: tuple[float, float], ask: str) -> dict[str, Any]:
    """The publisher's words on a source, its size as a range, and whom to ask the rest."""
    return said.model_dump(mode="json", exclude={"tokens"}) | {"size": _range(bounds), "ask": ask}


def _signed(bundle: Bundle, findings: Mapping[str, Any]) -> dict[str, Any]:
    """Claims of an owner's manifest and release report."""
    m = bundle.manifest
    budget = stated_budget(m)
    privacy = None if budget is None else budget.summary()
    personal = _look(findings, "text", "personal")
    least = _look(findings, "least_documents")
    kinds = None
    if isinstance(personal, dict) and type(least) is int:
        kinds = [k for k, x in personal.items() if _look(x, "documents") is not None]
    return {
        "owner": m.owner,
        "bundle_digest": bundle.digests[MANIFEST_FILE],
        "packed": m.created[:10],
        "expert_licence": m.licence,
        "terms": m.terms.summary(),
        "privacy": privacy,
        "personal_data": kinds,
        "personal_data_documents": None if kinds is None else least,  # of fewer nothing is told
    }


def _read_report(
    model_dir: Path, name: str, bundle: Bundle, index: Mapping[str, Any]
) -> tuple[dict[str, Any], str | None]:
    """Findings and digest of the release report that the mixture demanded, if it did."""
    known = _look(index.get("release"), "experts", name, "report_digest")
    if known is None:
        return {}, None
    release = check_release(place_of(model_dir / "experts" / f"{name}.bundle"), bundle)
    if release.digest != known:
        raise MergeError(
            f"The release report of {name} has digest {release.digest}, {ABOUT} says {known}. Put "
            "the one back that came with the bundle."
        )
    return dict(release.report.findings), release.digest


def _overall(
    sources: Mapping[str, Mapping[str, Any]], bounds: Mapping[str, tuple[float, float]]
) -> dict[str, Any]:
    """Section 1.3, worked out from the sources that are on, as far as they are known."""
    low, high = (sum(ends) for ends in zip(*bounds.values(), strict=True))
    days = [x["collected_until"] for x in sources.values() if x["collected_until"]]
    languages = {language for x in sources.values() for language in x["languages"] or ()}
    return {
        "modality": "text",
        "size": _range((low, high)),
        "languages": sorted(languages),
        "collected_until": max(days, default=None),
    }


def _bounds(stated: Any, read: Any) -> tuple[float, float]:
    """Least and most tokens that a text can have.

    Args:
        stated: tokens that somebody states; anything but a whole number: nobody does.
        read: tokens that training read, each as often as it read it, so that the text has no more;
            anything but a whole number: not known.
    """
    most = read if isinstance(read, int) else float("inf")
    if not isinstance(stated, int):
        return 0, most
    size = min(stated, most)
    return size, size


def _range(bounds: tuple[float, float]) -> str | None:
    """The one of SIZES that holds both ends; None if there is none."""
    first, last = (bisect_right(_EDGES, end) for end in bounds)
    return SIZES[first] if first == last else None


def _listed(value: Any, *keys: str) -> list[str] | None:
    """The list that stands there, of words; None if there is none, or it is empty."""
    found = _look(value, *keys)
    return [str(x) for x in found] or None if isinstance(found, list) else None


def _look(value: Any, *keys: str) -> Any:
    """The value under these keys of a `value` whose form is not ours to know; else None."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
