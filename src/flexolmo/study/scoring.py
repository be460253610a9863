"""The last steps of a study: tables of one seed, from what the models said.

Needs no model: everything is in the readings. See score.py for the arithmetic.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from flexolmo.data.tokenizer import load_tokenizer
from flexolmo.evaluation.cost import (
    dense_flops,
    ffn_flops,
    frame_flops,
    mixture_flops,
)
from flexolmo.files import write_json
from flexolmo.merge.baselines import TextClassifier
from flexolmo.model.checkpoint import load_anchor
from flexolmo.model.shape import ExpertShape
from flexolmo.model.transformer import ModelConfig
from flexolmo.study.models import load_reading
from flexolmo.study.score import (
    MIXED,
    PROMPTS,
    PUBLIC,
    TEMPERATURES,
    Rows,
    bits_per_byte,
    btm,
    btm_equal_flops,
    choose,
    gap_closed,
    gap_closed_mixed,
    prompt_routing,
)
from flexolmo.study.step import StepContext, step_kind
from flexolmo.study.text import SPLITS, load_sources, load_windows

STRICT = {  # does taking an owner out take out all of its influence?
    "flexolmo_paper": True, "flexolmo_default": True, "flexolmo_all_active": True,
    "flexolmo_joint_tuned": False, "own_pair": True, "low_rank": True, "btm": True,
    "btm_switching": True, "btm_equal_flops": True, "soup_mean": True, "soup_weighted": True,
    "soup_weighted_equal_flops": True,
    "prompt_routing": True, "btx": False, "dume": True, "unrestricted_1x": False,
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
        self.dense = {split: {n: self.read(f"dense.{n}", split)
                              for n in [PUBLIC, *self.owners]} for split in SPLITS}

    def read(self, role: str, split: str = "heldout") -> Rows:
        return load_reading(self.step.inputs[role] / f"{split}.npz", self.text[split]).log_probs

    def closed(self, rows: Rows, split: str = "heldout") -> dict[str, float]:
        dense = self.dense[split]
        return gap_closed(rows, dense[PUBLIC], dense, self.owners)

    def closed_mixed(self, rows: Rows, split: str = "heldout") -> dict[str, float]:
        dense, (names, sources) = self.dense[split], self.sources[split]
        return gap_closed_mixed(rows, dense[PUBLIC], dense, sources, names, self.owners)

    def measure(self, rows: Rows) -> float:
        """What is chosen by, on validation: the mean over both kinds of text."""
        return mean(self.closed(rows, "validation")) + mean(self.closed_mixed(rows, "validation"))


def mean(by_set: Mapping[str, float]) -> float:
    return float(np.mean(list(by_set.values())))


@step_kind("score", version=5)
def score(step: StepContext) -> dict[str, Any]:
    """Every method of one seed. Leaves scores.json."""
    study = _Study(step)
    anchor = load_anchor(step.inputs["anchor"] / "anchor")
    owners, config = study.owners, anchor.config
    shapes = {family: [_shape(step.metrics(f"cost.{family}.{n}")) for n in owners]
              for family in ("default", "low")}
    one, top_k = dense_flops(config), step.settings["top_k"]
    flops: dict[str, float] = {}
    rows: dict[str, Rows] = {}
    chosen: dict[str, Any] = {}

    # ours
    for name in ("flexolmo_default", "flexolmo_all_active", "flexolmo_paper", "low_rank",
                 "flexolmo_joint_tuned", "btx", "unrestricted_1x", "unrestricted_2x",
                 "soup_mean"):
        rows[name] = study.read(name)
    each = frame_flops(config) + top_k * ffn_flops(config)
    flops |= dict.fromkeys(("flexolmo_paper", "flexolmo_joint_tuned", "btx", "dume",
                            "unrestricted_1x", "unrestricted_2x"), each)
    for name, family in (("flexolmo_default", "default"), ("flexolmo_all_active", "default"),
                         ("low_rank", "low")):
        flops[name] = _measured_flops(step, name, config, shapes[family])
    flops["own_pair"] = float(np.mean([
        _measured_flops(step, f"pair.default.{n}", config, [shape], [n])
        for n, shape in zip(owners, shapes["default"], strict=True)]))
    flops |= {"soup_mean": one, "prompt_routing": one, "btm": one * (1 + len(owners)),
              "btm_switching": one * (1 + len(owners))}
    rows["own_pair"] = {n: study.read(f"pair.default.{n}")[n] for n in owners}

    # rivals that choose on validation
    validation, heldout = study.dense["validation"], study.dense["heldout"]
    warmth = choose(TEMPERATURES, lambda t: btm(validation, t), study.measure)
    chosen["btm"] = {"temperature": warmth}
    rows["btm"] = btm(heldout, warmth)
    warmth, rate = choose(list(product(TEMPERATURES, SWITCH_RATES)),
                          lambda o: btm(validation, o[0], switch_rate=o[1]), study.measure)
    chosen["btm_switching"] = {"temperature": warmth, "switch_rate": rate}
    rows["btm_switching"] = btm(heldout, warmth, switch_rate=rate)
    budget = flops["flexolmo_default"] / one
    for name, limit in (("soup_weighted", math.inf), ("soup_weighted_equal_flops", budget)):
        if found := _weighted_soup(step, study, one, limit):
            rows[name], flops[name], chosen[name] = found
    warmth, members = choose(
        list(product(TEMPERATURES, range(1, int(budget) + 1))),
        lambda o: btm_equal_flops(validation, o[0], o[1], budget)[0], study.measure)
    rows["btm_equal_flops"], models = btm_equal_flops(heldout, warmth, members, budget)
    flops["btm_equal_flops"] = models * one
    chosen["btm_equal_flops"] = {"top_k": members, "temperature": warmth, "budget": budget}
    scale = choose(step.settings["dume_scales"],
                   lambda s: study.read(f"dume.{s}", "validation"), study.measure)
    chosen["dume"] = {"scale": scale}
    rows["dume"] = study.read(f"dume.{scale}")
    chosen["prompt_routing"], rows["prompt_routing"] = _prompt_routing(step, study)

    result: dict[str, Any] = {
        "gap_closed": {n: _entry(study.closed(r), flops[n], STRICT[n]) for n, r in rows.items()},
        "mixed": {n: _entry(study.closed_mixed(r), flops[n], STRICT[n])
                  for n, r in rows.items() if MIXED in r},
        "bits_per_byte": {n: bits_per_byte(r, study.sizes) for n, r in rows.items()}
        | {f"dense {n}": bits_per_byte(r, study.sizes) for n, r in heldout.items()},
        "kept": {family: _kept(study, family, rows[name]) for family, name in (
            ("default", "flexolmo_default"), ("low", "low_rank"), ("paper", "flexolmo_paper"))},
        "optout": {family: {n: bits_per_byte(study.read(f"without.{family}.{n}"), study.sizes)
                            for n in owners} for family in ("default", "paper")},
        "routing": {n: step.metrics(n) for n in ("flexolmo_default", "flexolmo_paper",
                                                 "flexolmo_joint_tuned")},
        "bytes": {family: [step.metrics(f"cost.{family}.{n}")["bytes"] for n in owners]
                  for family in ("default", "low")},
        "low_rank_share_of_gain": {n: _gain(study, "low", n) / _gain(study, "default", n)
                                   for n in owners},
        "chosen_on_validation": chosen,
        "anchor_flops_per_token": one,
    }
    write_json(step.out / "scores.json", result)
    return {n: round(e["mean"], 4) for n, e in result["gap_closed"].items()}


def _shape(metrics: Mapping[str, Any]) -> ExpertShape:
    sizes = dict(metrics["architecture"])
    del sizes["num_layers"], sizes["d_model"]
    return ExpertShape(**sizes)


def _measured_flops(step: StepContext, role: str, config: ModelConfig,
                    shapes: Sequence[ExpertShape], sets: Sequence[str] | None = None) -> float:
    """Forward FLOPs a token, from how often each expert ran; mean over sets."""
    found, active = [], step.metrics(role)["active"]
    for by_layer in (active[n] for n in sets or active):
        public, *owners = np.mean(by_layer, axis=0).tolist()
        found.append(mixture_flops(config, shapes, owners, public))
    return float(np.mean(found))


def _entry(by_set: Mapping[str, float], flops: float, is_strict: bool) -> dict[str, Any]:
    return {"mean": mean(by_set), "sets": dict(by_set), "flops_per_token": flops,
            "strict_opt_out": is_strict}


def _gain(study: _Study, family: str, name: str) -> float:
    """Nats that an owner's expert beside the anchor gains on its own held-out text."""
    pair = study.read(f"pair.{family}.{name}")
    public = study.dense["heldout"][PUBLIC]
    return float(sum(p.astype(np.float64).sum() - q.astype(np.float64).sum()
                     for p, q in zip(pair[name], public[name], strict=True)))


def _kept(study: _Study, family: str, merged: Rows) -> dict[str, Any]:
    """Share of the own pair's gain that is left after merging; and what public text pays."""
    public = study.dense["heldout"][PUBLIC]

    def total(rows: Sequence[np.ndarray]) -> float:
        return float(sum(r.astype(np.float64).sum() for r in rows))

    kept = {n: (total(merged[n]) - total(public[n])) / _gain(study, family, n)
            for n in study.owners}
    return {"sets": kept, "mean": mean(kept),
            "public_change": total(merged[PUBLIC]) / total(public[PUBLIC]) - 1}


def _weighted_soup(step: StepContext, study: _Study, one: float, budget: float
                   ) -> tuple[Rows, float, dict[str, Any]] | None:
    """Rows, FLOPs a token and choice of the weighted soup, within `budget` dense models a token;
    None if even the shortest start costs more."""
    models = len(study.owners) + 1
    lengths = [len(ids) - 1 for rows in study.text["heldout"].values() for ids, _ in rows]

    def cost(prompt: int) -> float:  # one soup reads all; but it, every model reads the start
        return 1 + models * sum(min(prompt, n) for n in lengths) / sum(lengths)

    options = [(p, t) for p, t in product(step.settings["soup_prompts"],
                                          step.settings["soup_temperatures"]) if cost(p) <= budget]
    if not options:
        return None
    prompt, warmth = choose(options, lambda o: study.read(f"soup_weighted.{o[0]}.{o[1]}",
                                                          "validation"), study.measure)
    return (study.read(f"soup_weighted.{prompt}.{warmth}"), one * cost(prompt),
            {"prompt_tokens": prompt, "temperature": warmth})


def _prompt_routing(step: StepContext, study: _Study) -> tuple[dict[str, Any], Rows]:
    """A classifier fitted on what each dense model writes, applied to the start of each text."""
    tokenizer = load_tokenizer(step.inputs["corpus"] / "prepared" / PUBLIC)
    names = [PUBLIC, *study.owners]
    written = {}
    for n in names:
        with np.load(step.inputs[f"samples.{n}"] / "samples.npz", allow_pickle=False) as f:
            written[n] = np.split(f["ids"], np.cumsum(f["lengths"])[:-1])

    def routed(prompt: int, split: str) -> Rows:
        pieces = {n: [tokenizer.decode(row[i:i + prompt].tolist()) for row in rows
                      for i in range(0, len(row) - prompt + 1, prompt)]
                  for n, rows in written.items()}
        classifier = TextClassifier.fit(pieces)
        order = [classifier.names.index(n) for n in names]
        likely = {n: classifier.probabilities(
            [tokenizer.decode(ids[1:1 + prompt].tolist()) for ids, _ in rows])[:, order]
            for n, rows in study.text[split].items()}
        return prompt_routing(study.dense[split], likely, prompt)

    best = choose(PROMPTS, lambda p: routed(p, "validation"), study.measure)
    return {"prompt_tokens": best}, routed(best, "heldout")


@step_kind("ablation_score", version=1)
def ablation_score(step: StepContext) -> dict[str, Any]:
    """Gap closed by every variant. Leaves ablations.json."""
    study = _Study(step)
    found = {}
    for role in step.inputs:
        if role.startswith("row."):
            rows = study.read(role)
            found[role.removeprefix("row.")] = {
                "gap_closed": _plain(study.closed(rows)),
                "mixed": _plain(study.closed_mixed(rows)),
                "bits_per_byte": bits_per_byte(rows, study.sizes)}
    write_json(step.out / "ablations.json", found)
    return {n: round(e["gap_closed"]["mean"], 4) for n, e in found.items()}


def _plain(by_set: Mapping[str, float]) -> dict[str, Any]:
    return {"mean": mean(by_set), "sets": dict(by_set)}


