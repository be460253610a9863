"""Results of runs that never were, for the tests of figures and report."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from flexolmo.report import plots

OWNERS = {
    1: ("code",),
    3: ("code", "forum", "maths"),
    7: (
        "code",
        "clinical_trial_reports_2024",
        "news",
        "parliament debates and minutes",
        "maths",
        "poems",
        "a$b_{x}$\u202e",
    ),
}
NASTY = (
    "\x00\x1b[31m<script>alert('x')</script> & \"q\" $x_{1}$ \ud83d\u202e漢字 \\frac " + "w" * 200
)


def _make_results(
    names: tuple[str, ...],
    kept: float = 0.93,
    paper_kept: float | None = 0.4,
    num_layers: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """Plausible results of a demo with these owners; numbers are made up by a formula."""
    rng = np.random.default_rng(seed)
    sets = ["public", *names]
    anchor = {s: round(2.1 + 0.25 * i, 3) for i, s in enumerate(sets)}
    gain = {s: 0.12 + 0.22 * float(rng.random()) for s in names}

    def rows(share: float, noise: float) -> dict[str, dict[str, float]]:
        def row(on: tuple[str, ...], part: float) -> dict[str, float]:
            return {
                s: anchor[s]
                * (1 - (part * gain[s] if s in on else 0.0) + noise * float(rng.normal()))
                for s in sets
            }

        found = {f"expert {n}": row((n,), 1.0) for n in names}
        found["mixture"] = row(names, share)
        for n in names:
            found[f"mixture without {n}"] = row(tuple(m for m in names if m != n), share)
        return found

    def routing(spread: float, same: bool) -> dict[str, Any]:
        weights = {}
        for s in sets:
            layers = []
            for _ in range(1 if same else num_layers):
                w = rng.random(len(sets)) * spread + 3.0 * (np.array(sets) == s) + 0.05
                layers.append((w / w.sum()).round(4).tolist())
            weights[s] = layers * (num_layers if same else 1)
        return {"sets": sets, "experts": sets, "weights": weights}

    def summary(bits: dict[str, dict[str, float]]) -> dict[str, Any]:
        kept_of = {
            n: (anchor[n] - bits["mixture"][n]) / (anchor[n] - bits[f"expert {n}"][n])
            for n in names
        }
        return {
            "kept_of_pair_gain": {**kept_of, "mean": sum(kept_of.values()) / len(names)},
            "public_change": bits["mixture"]["public"] / anchor["public"] - 1,
            "optout_vs_anchor": {n: bits[f"mixture without {n}"][n] / anchor[n] - 1 for n in names},
            "optout_side_effect": {
                n: max(
                    (
                        bits[f"mixture without {n}"][s] / bits["mixture"][s] - 1
                        for s in sets
                        if s != n
                    ),
                    key=abs,
                )
                for n in names
            },
        }

    ours = {"anchor": anchor, **rows(kept, 0.002)}
    results: dict[str, Any] = {
        "bits_per_byte": ours,
        "summary": summary(ours),
        "routing": routing(0.1, True),
        "owners": [
            {
                "name": n,
                "owner": f"{n.title()} House",
                "set_description": f"text about {n}",
                "documents": 1200 + 77 * i,
                "tokens": 510_000 + 9_000 * i,
                "tokens_seen": 983_040,
                "seconds": 61.5 + i,
                "licence": "Python-2.0",
                "terms": "research only",
                "bundle_bytes": 4_720_000,
                "key_id": "ed25519:" + "9f" * 16,
                "sources": [f"{n} standard library"],
            }
            for i, n in enumerate(names)
        ],
        "seconds": {
            "data": 41.0,
            "anchor": 190.2,
            **{f"expert {n}": 61.5 for n in names},
            "total": 480.1,
        },
        "seed": seed,
    }
    results["summary"]["bars"] = [
        {
            "text": "mixture better than the anchor on every owner's set",
            "met": True,
            "value": f"{len(names)} of {len(names)}",
        },
        {"text": "at least 90 % of each pair's gain is kept", "met": False, "value": "87 %"},
    ]
    if paper_kept is not None:
        paper = rows(paper_kept, 0.004)
        results["paper_router"] = {
            "bits_per_byte": paper,
            "routing": routing(4.0, False),
            "summary": summary({"anchor": anchor, **paper}),
        }
    return results


def _make_page(names: tuple[str, ...], **changes: Any) -> dict[str, Any]:
    """Results with everything a report can show."""
    code = "    for name in names:\n        if name is None:\n            continue\n"
    return (
        _make_results(names)
        | {
            "anchor": {
                "parameters": 3_300_000,
                "digest": "sha256:" + "ab" * 32,
                "tokens": 2_900_000,
                "seconds": 190.2,
                "config": {"d_model": 192},
            },
            "samples": [
                {
                    "source": n,
                    "prompt": "def read(names):\n" if n == "code" else "The meeting was opened at",
                    "with": code * 6
                    if n == "code"
                    else "ten o'clock by the chair, who thanked all for coming. " * 9,
                    "without": NASTY,
                }
                for n in names[:3]
            ],
            "versions": {"python": "3.11.9", "torch": "2.13.0"},
            "commit": "c0ffee" * 6,
            "digests": {
                "anchor": "sha256:" + "ab" * 32,
                "bundles": {n: "sha256:" + "cd" * 32 for n in names},
            },
            "machine": {"cpu_count": 8, "platform": "Linux-6.1"},
            "recipe": {"anchor": {"steps": 700}},
            "skipped": {"mail": "apt is not installed"},
        }
        | changes
    )


@pytest.fixture(scope="session")
def make_results() -> Callable[..., dict[str, Any]]:
    """Call it with 1, 3 or 7 owners for the numbers of a run with them."""
    return lambda owners=3, **how: _make_results(OWNERS[owners], **how)


@pytest.fixture(scope="session")
def make_page() -> Callable[..., dict[str, Any]]:
    """Call it with 1, 3 or 7 owners for everything a report of them can show."""
    return lambda owners=1, **changes: _make_page(OWNERS[owners], **changes)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures stay empty, for tests that do not look at them."""
    for name in ("bits_per_byte", "optout_matrix", "routing", "kept_gain"):
        monkeypatch.setattr(plots, f"plot_{name}", lambda *_, **__: Figure())
