"""The last steps of a study: tables of one seed, from what the models said.

Needs no model: everything is in the readings. See score.py for the arithmetic.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.data.tokenizer import load_tokenizer
from flexolmo.files import write_json
from flexolmo.model.checkpoint import load_anchor
from flexolmo.model.shape import ExpertShape
from flexolmo.model.transformer import ModelConfig
from flexolmo.research.rivals.models import load_reading
from flexolmo.research.steps.step import StepContext, step_kind
from flexolmo.research.study.cost import (
    dense_flops,
    ffn_flops,
    frame_flops,
    mixture_flops,
    models_flops,
)
from flexolmo.research.study.gains import (
    MIXED,
    PROMPTS,
    TEMPERATURES,
    Rows,
    bits_per_byte,
    btm,
    btm_equal_flops,
    gap_closed,
    gap_closed_mixed,
    prompt_routing,
    total,
)
from flexolmo.research.study.read_steps import fit_prompt_classifier, load_samples
from flexolmo.research.study.text_steps import SPLITS, load_sources, load_windows

STRICT = {  # does taking an owner out take out all of its influence?
    "flexolmo_paper": True,
    "flexolmo_default": True,
    "flexolmo_probabilities": True,
    "flexolmo_all_active": True,
    "flexolmo_joint_tuned": False,
    "own_pair": True,
    "low_rank": True,
    "btm": True,
    "btm_switching": True,
    "btm_equal_flops": True,
    "soup_mean": True,
    "soup_weighted": True,
    "soup_weighted_equal_flops": True,
    "prompt_routing": True,
    "btx": False,
    "dume": True,
    "unrestricted_1x": False,
    "unrestricted_2x": False,
}
SWITCH_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)  # for BTM on text that changes domain


class _Study:
    """One seed's readings, and the two measures."""

    def __init__(self, step: StepContext):
        self.step = step
        self.owners: list[str] = step.settings["owners"]
        where = step.inputs["windows"]
        self.text = {split: load_windows(where, split) for split in SPLITS}
        self.sources = {split: load_sources(where, split) for split in SPLITS}
        self.sizes = {n: sum(size for _, size in rows) for n, rows in self.text["heldout"].items()}
        self.dense = {
            split: {n: self.read(f"dense.{n}", split) for n in [PUBLIC, *self.owners]}
            for split in SPLITS
        }

    def read(self, role: str, split: str = "heldout") -> Rows:
        return load_reading(self.step.inputs[role] / f"{split}.npz", self.text[split]).log_probs

    def closed(self, rows: Rows, split: str = "heldout") -> dict[str, float]:
        dense = self.dense[split]
        return gap_closed(rows, dense[PUBLIC], dense, self.owners)

    def closed_mixed(self, rows: Rows, split: str = "heldout") -> dict[str, float]:
        dense, (names, sources) = self.dense[split], self.sources[split]
        return gap_closed_mixed(rows, dense[PUBLIC], dense, sources, names, self.owners)

    def pick(
        self,
        names: Sequence[str],
        options: Iterable[tuple[float, ...]],
        make: Callable[[tuple[float, ...], str], tuple[Rows, float]],
    ) -> tuple[Rows, dict[str, float], dict[str, float]]:
        """A rival that may choose, for each kind of text what did best on validation.

        `make(option, split)` gives rows and FLOPs a token. Returns held-out rows, the FLOPs by
        kind of text, and what was chosen, by `names` of an option's parts and kind.
        """
        kinds = {"gap_closed": self.closed, "mixed": self.closed_mixed}
        tried = {option: make(option, "validation")[0] for option in options}
        best = {}
        for kind, of in kinds.items():
            scores = {option: mean(of(rows, "validation")) for option, rows in tried.items()}
            best[kind] = max(scores, key=scores.__getitem__)
        held, mixed = (make(best[kind], "heldout") for kind in kinds)
        said = {
            f"{name} ({said})": value
            for kind, said in (("gap_closed", "held-out"), ("mixed", "mixed"))
            for name, value in zip(names, best[kind], strict=True)
        }
        return (
            held[0] | {MIXED: mixed[0][MIXED]},
            {"gap_closed": held[1], "mixed": mixed[1]},
            said,
        )


def mean(by_set: Mapping[str, float]) -> float:
    return float(np.mean(list(by_set.values())))


@step_kind("score", version=8)
def score(step: StepContext) -> dict[str, Any]:
    """Every method of one seed. Leaves scores.json."""
    study = _Study(step)
    anchor = load_anchor(step.inputs["anchor"] / "anchor")
    owners, config = study.owners, anchor.config
    shapes = {
        family: [_shape(step.metrics(f"cost.{family}.{n}")) for n in owners]
        for family in ("default", "low")
    }
    one, top_k = dense_flops(config), step.settings["top_k"]
    flops: dict[str, float] = {}
    rows: dict[str, Rows] = {}
    chosen: dict[str, Any] = {}

    # ours
    for name in (
        "flexolmo_default",
        "flexolmo_probabilities",
        "flexolmo_all_active",
        "flexolmo_paper",
        "low_rank",
        "flexolmo_joint_tuned",
        "btx",
        "unrestricted_1x",
        "unrestricted_2x",
        "soup_mean",
    ):
        rows[name] = study.read(name)
    each = frame_flops(config) + top_k * ffn_flops(config)
    flops |= dict.fromkeys(
        ("flexolmo_paper", "flexolmo_joint_tuned", "btx", "unrestricted_1x", "unrestricted_2x"),
        each,
    )
    for name, family in (
        ("flexolmo_default", "default"),
        ("flexolmo_all_active", "default"),
        ("low_rank", "low"),
    ):
        flops[name] = _measured_flops(step, name, config, shapes[family])
    flops["flexolmo_probabilities"] = _measured_flops(
        step, "flexolmo_probabilities", config, shapes["default"], count=models_flops
    )
    flops["own_pair"] = float(
        np.mean(
            [
                _measured_flops(step, f"pair.default.{n}", config, [shape], [n])
                for n, shape in zip(owners, shapes["default"], strict=True)
            ]
        )
    )
    flops["soup_mean"] = one
    rows["own_pair"] = {n: study.read(f"pair.default.{n}")[n] for n in owners}

    # rivals that choose on validation
    budget = flops["flexolmo_default"] / one
    all_read = one * (1 + len(owners))
    by_kind: dict[str, dict[str, float]] = {}  # FLOPs of those whose choice decides them

    def take(
        name: str,
        names: Sequence[str],
        options: Iterable[tuple[float, ...]],
        make: Callable[[tuple[float, ...], str], tuple[Rows, float]],
    ) -> None:
        rows[name], by_kind[name], chosen[name] = study.pick(names, options, make)

    take(
        "btm",
        ["temperature"],
        product(TEMPERATURES),
        lambda o, split: (btm(study.dense[split], o[0]), all_read),
    )
    take(
        "btm_switching",
        ["temperature", "switch rate"],
        product(TEMPERATURES, SWITCH_RATES),
        lambda o, split: (btm(study.dense[split], o[0], switch_rate=o[1]), all_read),
    )

    def within_budget(option: tuple[float, ...], split: str) -> tuple[Rows, float]:
        found, models = btm_equal_flops(study.dense[split], option[0], int(option[1]), budget)
        return found, models * one

    take(
        "btm_equal_flops",
        ["temperature", "top k"],
        product(TEMPERATURES, range(1, int(budget) + 1)),
        within_budget,
    )
    take(
        "dume",
        ["scale"],
        product(step.settings["dume_scales"]),
        lambda o, split: (study.read(f"dume.{o[0]}", split), each),
    )
    cost = _soup_costs(step, study)
    for name, limit in (("soup_weighted", math.inf), ("soup_weighted_equal_flops", budget)):
        if prompts := [p for p in cost if cost[p] <= limit]:
            take(
                name,
                ["prompt tokens", "temperature"],
                product(prompts, step.settings["soup_temperatures"]),
                lambda o, split: (
                    study.read(f"soup_weighted.{o[0]}.{o[1]}", split),
                    one * cost[o[0]],
                ),
            )
    routed = _prompt_routing(step, study)
    take(
        "prompt_routing",
        ["prompt tokens"],
        product(PROMPTS),
        lambda o, split: (routed(int(o[0]), split), one),
    )
    heldout = study.dense["heldout"]

    result: dict[str, Any] = {
        kind: {
            n: _entry(of(r), by_kind[n][kind] if n in by_kind else flops[n], STRICT[n])
            for n, r in rows.items()
            if kind == "gap_closed" or MIXED in r
        }
        for kind, of in (("gap_closed", study.closed), ("mixed", study.closed_mixed))
    }
    result["mixed"]["own_pair"] = _entry(  # each on its owner's pieces, reading the whole document
        {n: study.closed_mixed(study.read(f"pair_on_mixed.{n}"))[n] for n in owners},
        flops["own_pair"],
        STRICT["own_pair"],
    )
    result |= {
        "bits_per_byte": {n: bits_per_byte(r, study.sizes) for n, r in rows.items()}
        | {f"dense {n}": bits_per_byte(r, study.sizes) for n, r in heldout.items()},
        "kept": {
            family: _kept(study, family, rows[name])
            for family, name in (
                ("default", "flexolmo_default"),
                ("low", "low_rank"),
                ("paper", "flexolmo_paper"),
            )
        },
        "optout": {
            family: {
                n: bits_per_byte(study.read(f"without.{family}.{n}"), study.sizes) for n in owners
            }
            for family in ("default", "paper")
        },
        "routing": {
            n: step.metrics(n)
            for n in ("flexolmo_default", "flexolmo_paper", "flexolmo_joint_tuned")
        },
        "bytes": {
            family: [step.metrics(f"cost.{family}.{n}")["bytes"] for n in owners]
            for family in ("default", "low")
        },
        "low_rank_share_of_gain": {
            n: _gain(study, "low", n) / _gain(study, "default", n) for n in owners
        },
        "chosen_on_validation": chosen,
        "anchor_flops_per_token": one,
    }
    write_json(step.out / "scores.json", result)
    return {n: round(e["mean"], 4) for n, e in result["gap_closed"].items()}


def _shape(metrics: Mapping[str, Any]) -> ExpertShape:
    sizes = dict(metrics["architecture"])
    del sizes["num_layers"], sizes["d_model"]
    return ExpertShape(**sizes)


def _measured_flops(
    step: StepContext,
    role: str,
    config: ModelConfig,
    shapes: Sequence[ExpertShape],
    sets: Sequence[str] | None = None,
    count: Callable[..., float] = mixture_flops,
) -> float:
    """Forward FLOPs a token, from how often each expert ran; mean over sets."""
    found, active = [], step.metrics(role)["active"]
    for by_layer in (active[n] for n in sets or active):
        public, *owners = np.mean(by_layer, axis=0).tolist()
        found.append(count(config, shapes, owners, public))
    return float(np.mean(found))


def _entry(by_set: Mapping[str, float], flops: float, is_strict: bool) -> dict[str, Any]:
    return {
        "mean": mean(by_set),
        "sets": dict(by_set),
        "flops_per_token": flops,
        "strict_opt_out": is_strict,
    }


def _gain(study: _Study, family: str, name: str) -> float:
    """Nats that an owner's expert beside the anchor gains on its own held-out text."""
    pair = study.read(f"pair.{family}.{name}")
    public = study.dense["heldout"][PUBLIC]
    return float(
        sum(
            p.astype(np.float64).sum() - q.astype(np.float64).sum()
            for p, q in zip(pair[name], public[name], strict=True)
        )
    )


def _kept(study: _Study, family: str, merged: Rows) -> dict[str, Any]:
    """Share of the own pair's gain that is left after merging; and what public text pays."""
    public = study.dense["heldout"][PUBLIC]
    kept = {
        n: (total(merged[n]) - total(public[n])) / _gain(study, family, n) for n in study.owners
    }
    return {
        "sets": kept,
        "mean": mean(kept),
        "public_change": total(merged[PUBLIC]) / total(public[PUBLIC]) - 1,
    }


def _soup_costs(step: StepContext, study: _Study) -> dict[float, float]:
    """Dense models a token that a weighted soup runs, by the tokens of its prompt: one reads all,
    but before it every model reads the start."""
    lengths = [len(ids) - 1 for rows in study.text["heldout"].values() for ids, _ in rows]
    return {
        p: 1 + (1 + len(study.owners)) * sum(min(p, n) for n in lengths) / sum(lengths)
        for p in step.settings["soup_prompts"]
    }


def _prompt_routing(step: StepContext, study: _Study) -> Callable[[int, str], Rows]:
    """Rows by prompt length and split: a classifier fitted on what each dense model writes, applied
    to the start of each text."""
    tokenizer = load_tokenizer(step.inputs["corpus"] / "prepared" / PUBLIC)
    names = [PUBLIC, *study.owners]
    written = {n: load_samples(step.inputs[f"samples.{n}"]) for n in names}

    def routed(prompt: int, split: str) -> Rows:
        classifier = fit_prompt_classifier(written, tokenizer, prompt)
        order = [classifier.names.index(n) for n in names]
        likely = {
            n: classifier.probabilities(
                [tokenizer.decode(ids[1 : 1 + prompt].tolist()) for ids, _ in rows]
            )[:, order]
            for n, rows in study.text[split].items()
        }
        return prompt_routing(study.dense[split], likely, prompt)

    return routed


@step_kind("ablation_score", version=1)
def ablation_score(step: StepContext) -> dict[str, Any]:
    """Gap closed by every variant. Leaves ablations.json."""
    found = _measure_rows(step)
    write_json(step.out / "ablations.json", found)
    return {n: round(e["gap_closed"]["mean"], 4) for n, e in found.items()}


@step_kind("strongest_score", version=1)
def strongest_score(step: StepContext) -> dict[str, Any]:
    """Gap closed on validation text and held out by every form of the paper's method, and the form
    that is best on validation text of each kind. Leaves strongest.json."""
    tried = {split: _measure_rows(step, split) for split in SPLITS}
    best = {}
    for kind in ("gap_closed", "mixed"):
        means = {name: found[kind]["mean"] for name, found in tried["validation"].items()}
        best[kind] = max(means, key=means.__getitem__)
    write_json(step.out / "strongest.json", {"tried": tried, "best": best})
    return {kind: tried["heldout"][name][kind]["mean"] for kind, name in best.items()}


def _measure_rows(step: StepContext, split: str = "heldout") -> dict[str, Any]:
    """Gap closed and bits by every row among the inputs."""
    study = _Study(step)
    sizes = {n: sum(size for _, size in rows) for n, rows in study.text[split].items()}
    found = {}
    for role in step.inputs:
        if role.startswith("row."):
            rows = study.read(role, split)
            found[role.removeprefix("row.")] = {
                "gap_closed": _plain(study.closed(rows, split)),
                "mixed": _plain(study.closed_mixed(rows, split)),
                "bits_per_byte": bits_per_byte(rows, sizes),
            }
    return found


def _plain(by_set: Mapping[str, float]) -> dict[str, Any]:
    return {"mean": mean(by_set), "sets": dict(by_set)}


@step_kind("scaling_score", version=2)
def scaling_score(step: StepContext) -> dict[str, Any]:
    """The rows of one size of anchor and length of training. Leaves scores.json.

    Inputs: anchor, windows, dense.SET, row.NAME, pair.SET, cost.FAMILY.SET.
    """
    study = _Study(step)
    owners, heldout = study.owners, study.dense["heldout"]
    config = load_anchor(step.inputs["anchor"] / "anchor").config
    rows = {
        role.removeprefix("row."): study.read(role)
        for role in step.inputs
        if role.startswith("row.")
    }
    rows["own_pair"] = {n: study.read(f"pair.{n}")[n] for n in owners}
    rows["btm"], _, chosen = study.pick(
        ["temperature"],
        product(TEMPERATURES),
        lambda o, split: (btm(study.dense[split], o[0]), 0.0),
    )
    costs = [role for role in step.inputs if role.startswith("cost.")]
    families = dict.fromkeys(role.split(".")[1] for role in costs)
    anchor_bits = bits_per_byte(heldout[PUBLIC], study.sizes)
    dense_bits = {n: bits_per_byte(heldout[n], study.sizes)[n] for n in owners}
    result: dict[str, Any] = {
        "gap_closed": {n: _plain(study.closed(r)) for n, r in rows.items()},
        "mixed": {n: _plain(study.closed_mixed(r)) for n, r in rows.items() if MIXED in r},
        "bits_per_byte": {"anchor": anchor_bits, "dense": dense_bits}
        | {n: bits_per_byte(r, study.sizes) for n, r in rows.items()},
        "flops": {
            family: _measured_flops(
                step,
                f"row.{family}",
                config,
                [_shape(step.metrics(f"cost.{family}.{n}")) for n in owners],
            )
            / dense_flops(config)
            for family in families
        }
        | {
            "probabilities": _measured_flops(
                step,
                "row.probabilities",
                config,
                [_shape(step.metrics(f"cost.default.{n}")) for n in owners],
                count=models_flops,
            )
            / dense_flops(config)
        },
        "bytes": {
            family: float(np.mean([step.metrics(f"cost.{family}.{n}")["bytes"] for n in owners]))
            for family in families
        },
        "chosen_on_validation": chosen,
    }
    write_json(step.out / "scores.json", result)
    return {n: round(e["mean"], 4) for n, e in result["gap_closed"].items()}
