"""Results of a study that never was."""

from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

import numpy as np

from flexolmo.research.study.findings import DEFAULT, TABLES

OWNERS = ("academic", "code", "creative", "edu", "forum", "math", "news")
METHODS = {  # gap closed held-out and mixed, FLOPs in the anchor's, strict opt-out
    "flexolmo_default": (0.93, 0.90, 2.0, True),
    "flexolmo_all_active": (0.94, 0.91, 5.2, True),
    "flexolmo_paper": (0.35, 0.31, 1.46, True),
    "low_rank": (0.91, 0.86, 1.4, True),
    "flexolmo_joint_tuned": (0.42, 0.36, 1.46, False),
    "btx": (0.19, 0.16, 1.46, False),
    "unrestricted_1x": (0.69, 0.61, 1.46, False),
    "unrestricted_2x": (0.88, 0.79, 1.46, False),
    "soup_mean": (0.31, 0.30, 1.0, True),
    "soup_weighted": (0.60, 0.33, 1.44, True),
    "soup_weighted_equal_flops": (0.55, 0.50, 1.25, True),
    "btm": (0.95, 0.55, 8.0, True),
    "btm_switching": (0.94, 0.86, 8.0, True),
    "btm_equal_flops": (0.82, 0.41, 1.99, True),
    "prompt_routing": (0.74, 0.28, 1.0, True),
    "dume": (0.44, 0.39, 1.46, True),
    "own_pair": (0.96, 0.91, 1.73, True),
}
FIGURES = {"figure_2_routing", "figure_3_active_experts", "figure_4_optout", "methods", "kept_gain"}
ONE = 5_111_808
Make = Callable[..., dict[str, Any]]


def make_results(
    seeds: int = 1,
    owners: tuple[str, ...] = OWNERS,
    has_ablations: bool = False,
    num_layers: int = 4,
) -> dict[str, Any]:
    """Plausible results of a study that never was; numbers from a formula and a little noise."""
    rng = np.random.default_rng(len(owners))
    anchor = {s: 2.0 + 0.17 * i for i, s in enumerate(["public", *owners, "mixed"])}
    gap = {s: 0.25 + 0.08 * (i % 4) for i, s in enumerate(owners)}  # dense gain, bits per byte

    def bits_at(closed: float, sets: tuple[str, ...]) -> dict[str, float]:
        return {s: anchor[s] - closed * gap.get(s, -0.01) for s in sets}

    def entry(closed: float, flops: float, strict: bool) -> dict[str, Any]:
        noise = rng.normal(0, 0.02, len(owners))
        sets = {n: closed + float(x) for n, x in zip(owners, noise, strict=True)}
        return {
            "mean": fmean(sets.values()),
            "sets": sets,
            "flops_per_token": flops * ONE,
            "strict_opt_out": strict,
        }

    def weights(same: bool, sharp: float) -> dict[str, Any]:
        sets, experts = ["public", *owners, "mixed"], ["public", *owners]
        found = {}
        for s in sets:
            rows = rng.random((num_layers, len(experts))) + sharp * (np.array(experts) == s)
            rows = rows[:1].repeat(num_layers, 0) if same else rows
            found[s] = (rows / rows.sum(1, keepdims=True)).tolist()
        return {"routing": found, "experts": experts}

    def one_seed() -> dict[str, Any]:
        closed = {m: entry(held, flops, strict) for m, (held, _, flops, strict) in METHODS.items()}
        everywhere = ("public", *owners, "mixed")
        bits = {
            m: {
                s: anchor[s] - e["sets"].get(s, e["mean"]) * gap.get(s, 0.01)
                for s in (owners if m == "own_pair" else everywhere)
            }
            for m, e in closed.items()
        }
        bits["dense public"] = dict(anchor)
        for n in owners:
            bits[f"dense {n}"] = {s: anchor[s] - (gap[n] if s == n else -0.1) for s in everywhere}
        return {
            "gap_closed": closed,
            "mixed": {
                m: entry(mixed, flops, strict)
                for m, (_, mixed, flops, strict) in METHODS.items()
                if mixed is not None
            },
            "bits_per_byte": bits,
            "kept": {
                f: {
                    "sets": (found := {n: share + float(rng.normal(0, 0.03)) for n in owners}),
                    "mean": fmean(found.values()),
                    "public_change": change,
                }
                for f, share, change in (
                    ("default", 0.97, 0.004),
                    ("low", 0.95, 0.003),
                    ("paper", 0.44, 0.012),
                )
            },
            "optout": {
                f: {
                    n: {
                        s: anchor[s] * worse if s == n else bits[m][s] + 0.002
                        for s in ("public", *owners)
                    }
                    for n in owners
                }
                for f, m, worse in (("default", DEFAULT, 1.001), ("paper", "flexolmo_paper", 1.006))
            },
            "routing": {
                m: weights(m == DEFAULT, sharp)
                for m, sharp in (
                    (DEFAULT, 40.0),
                    ("flexolmo_paper", 1.0),
                    ("flexolmo_joint_tuned", 3.0),
                )
            },
            "bytes": {"default": [9_307_324] * len(owners), "low": [2_292_700] * len(owners)},
            "low_rank_share_of_gain": {n: 0.97 + float(rng.normal(0, 0.01)) for n in owners},
            "chosen_on_validation": {
                "btm": {"temperature (held-out)": 8.0, "temperature (mixed)": 256.0},
                "dume": {"scale (held-out)": 10},
            },
            "anchor_flops_per_token": ONE,
        }

    found = [one_seed() for _ in range(seeds)]
    results: dict[str, Any] = {
        "recipe": {
            "seeds": [0, 1, 2],
            "owners": list(owners),
            "vocab_size": 4096,
            "seq_len": 512,
            "heldout_bytes": 40_000,
            "heldout_mixed": 48,
            "low_rank": {"train": {"steps": 40, "batch_size": 4, "seq_len": 512}},
            "anchor": {
                "model": {
                    "d_model": 192,
                    "num_layers": 4,
                    "num_heads": 3,
                    "num_kv_heads": None,
                    "d_ff": 512,
                },
                "train": {"steps": 800, "batch_size": 4, "seq_len": 512},
            },
            "train": {"steps": 160, "batch_size": 4, "seq_len": 512, "learning_rate": 0.004},
        },
        "seeds_done": list(range(seeds)),
        "seeds": {str(i): s for i, s in enumerate(found)},
        "cost": {
            "anchor": {"steps": seeds, "seconds": 812.4, "tokens": seeds * 1_638_400},
            "expert": {"steps": 21, "seconds": 4321.0, "tokens": 6_881_280},
            "read": {"steps": 60, "seconds": 900.0, "tokens": 0},
        },
        "commits": ["833d67d0123456789abcdef+changes"],
        "software": {"python": "3.11.7", "torch": "2.13.0+cpu"},
        "machine": {"cpu_count": 2, "torch_threads": 1, "platform": "Linux-x86_64"},
    }
    for kind in TABLES:
        results[kind] = {
            m: {
                "mean": fmean(means := [s[kind][m]["mean"] for s in found]),
                "spread": stdev(means) if seeds > 1 else None,
                "seeds": means,
                "sets": {n: fmean(s[kind][m]["sets"][n] for s in found) for n in owners},
                "flops_per_token": found[0][kind][m]["flops_per_token"],
                "strict_opt_out": found[0][kind][m]["strict_opt_out"],
            }
            for m in (found[0][kind] if found else ())
        }
    if has_ablations:
        names = [
            f"{f}{change}"
            for f in ("paper", "default")
            for change in ("", ", 10 % replay", ", 25 % replay")
        ]
        names += [
            "paper, no bias",
            "paper, upstream's clamp",
            "paper, random rows",
            "paper, a row per layer",
            "paper, MiniLM rows",
            "paper, no coordination",
            "default, scope ffn",
            "default, scope ffn+head",
            "another thing",
        ]
        names += [f"{f}, top-{k}" for f in ("default", "paper") for k in range(1, len(owners) + 2)]
        results["ablations"] = {
            n: {
                kind: {
                    "mean": (m := 0.3 + 0.4 * float(rng.random())),
                    "sets": dict.fromkeys(owners, m),
                }
                for kind in TABLES
            }
            | {"bits_per_byte": bits_at(0.5, ("public", *owners, "mixed"))}
            for n in names
        }
        forms = [f"{t}; {r}" for t in ("as published", "10 % replay") for r in ("top-1", "top-2")]
        tried = {
            split: {n: {k: {"mean": float(rng.random())} for k in TABLES} for n in forms}
            for split in ("validation", "heldout")
        }
        results["strongest_paper"] = {
            "tried": tried,
            "best": {
                k: max(forms, key=lambda n, k=k: tried["validation"][n][k]["mean"]) for k in TABLES
            },
        }
    return results


def set_mean(results: dict[str, Any], kind: str, method: str, mean: float) -> None:
    """Give a method the same mean in all seeds."""
    for table in (results[kind], *(s[kind] for s in results["seeds"].values())):
        table[method]["mean"] = mean
