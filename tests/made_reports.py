"""Release reports of a bundle whose owner attacked it, for the tests that read and demand them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flexolmo.audit.extraction import ExtractionSettings, audit_extraction
from flexolmo.audit.membership import audit_membership
from flexolmo.audit.subjects import open_subjects
from flexolmo.bundle.bundle import open_bundle
from flexolmo.bundle.release import (
    BOM_FILE,
    DATA_CARD_FILE,
    PAGE_FILE,
    Figure,
    ReleaseReport,
    write_release,
)
from flexolmo.bundle.signing import read_private_key
from flexolmo.files import write_json
from made_attacks import WHOLE, build_attacked

BRIEF = ExtractionSettings(
    prefix_tokens=8, continuation_tokens=16, samples=2, max_documents=12, threshold=0.5
)
BUDGET = {  # as `train.protect` states one
    "unit": "document",
    "neighbours": "one unit added or removed",
    "epsilon": 7.9961,
    "delta": 1e-6,
    "accountant": "PRV (Opacus)",
    "sampling": "Poisson, of windows drawn in secret",
    "sampling_rate": 0.1634,
    "steps": 20,
    "noise": 0.9123,
    "clip_norm": 0.1,
    "table_noise": 2.345,
}


def attack(house, data, here: Path, recipe=WHOLE, **claims: Any) -> SimpleNamespace:
    """A mixture of one expert, attacked by its owner: `bundle`, and `results` by attack."""
    model = build_attacked(house, data, here / "model", recipe=recipe, **claims)
    subjects = open_subjects(model, data, house.trusted)
    made = {
        "membership": audit_membership(subjects, data, max_documents=12, max_tokens=32),
        "extraction": audit_extraction(subjects, data, BRIEF, here / "parts", say=lambda _: None),
    }
    for name, pair in made.items():
        assert pair is not None
        write_json(here / name / f"{name}.json", pair[0])
        write_json(here / name / "stays_here.json", pair[1])
    return SimpleNamespace(
        model=model,
        bundle=here / "model-bundles" / f"{data.name}.bundle",
        results={name: here / name for name in made},
    )


def figure(high: float) -> Figure:
    """A figure with this upper end."""
    return Figure(value=high / 2, low=0.0, high=high, model="alone")


def write_made_report(bundle: Path, key: Path, out: Path, **changes: Any) -> str:
    """Sign a report of `bundle` that finds nothing, but for `changes` of its claims."""
    opened = open_bundle(bundle, None, allow_unknown_signer=True)
    m = opened.manifest
    claims = {
        "format": "flexolmo-release-report",
        "format_version": 1,
        "name": m.name,
        "owner": m.owner,
        "serial": m.serial,
        "bundle_digest": opened.digests["manifest.json"],
        "created": "2026-11-22T04:30:00Z",
        "measures": {},
        "findings": {},
    }
    shown = {name: b"{}" for name in (PAGE_FILE, BOM_FILE, DATA_CARD_FILE)}
    report = ReleaseReport(**(claims | changes))
    return write_release(out, report, shown, read_private_key(key))
