"""A method of a finished study as a model that can be evaluated: ours, and the rivals."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.errors import ConfigError
from flexolmo.files import digest_bytes, read_json
from flexolmo.inference.policy import choose_experts
from flexolmo.inference.reader import OwnReader, Reader
from flexolmo.model.probabilities import AnyMixture
from flexolmo.model.transformer import Transformer
from flexolmo.research.rivals.baselines import likelihood_weights, prefix_for_budget, soup
from flexolmo.research.rivals.readers import BtmReader, PromptReader, log_likelihood
from flexolmo.research.steps.step import Step, StepContext
from flexolmo.research.study.inputs import anchor_of
from flexolmo.research.study.read_steps import fit_prompt_classifier, load_samples, model_of
from flexolmo.research.study.recipe import StudyRecipe, build_graph

_CHOSEN_SCALE = "dume"
_NOT_MODELS = (
    "soup_weighted",
    "samples",
    "cost",
    "without",
    "pair_on_mixed",
    "windows",
    "corpus",
    "anchor",
)
_REMEMBERED = 32  # models chosen by prompts, or soups


def open_method(
    root: Path,
    method: str,
    *,
    seed: int | None = None,
    without: Iterable[str] = (),
    only: Iterable[str] | None = None,
) -> tuple[Reader, dict[str, Any]]:
    """A method of the study in `root`, and what it is; `seed` is the first of the study's if none.

    Names are those of results.json, `dense.NAME` and `pair.default.NAME`. What a method chose on
    validation text, it keeps: for held-out documents. A rival over dense models is made of those
    that are on. Raises ConfigError for a method that there is not, PolicyError for an expert it
    does not hold.
    """
    try:
        results = read_json(Path(root) / "results.json")
        recipe = StudyRecipe.model_validate(results["recipe"])
    except (KeyError, TypeError, ValidationError):
        raise ConfigError(
            f"{Path(root) / 'results.json'} is not of a study that this version "
            "made; name the directory that flexolmo study wrote."
        ) from None
    graph = build_graph(recipe)
    seed = recipe.seeds[0] if seed is None else seed
    if seed not in graph.scores:
        raise ConfigError(
            f"The study has no seed {seed}; it has {', '.join(map(str, graph.scores))}."
        )
    score = graph.scores[seed]
    score.result(root)
    scores = read_json(score.directory(root) / "scores.json")
    chosen = {
        name: {
            key.removesuffix(" (held-out)"): value
            for key, value in found.items()
            if key.endswith(" (held-out)")
        }
        for name, found in scores["chosen_on_validation"].items()
    }
    reads = {r: s for r, s in score.inputs.items() if r.split(".")[0] not in _NOT_MODELS}
    rivals = [name for name in _OVER_DENSE if name in chosen]
    known = sorted({r for r in reads if not r.startswith("dume.")} | {*rivals, _CHOSEN_SCALE})
    if method not in known:
        raise ConfigError(
            f"The study has no model called {method!r}; there are {', '.join(known)}."
        )
    about = {"kind": "study", "method": method, "seed": seed, **chosen.get(method, {})}
    if method in rivals:
        enabled = sorted(choose_experts(recipe.owners, without=without, only=only))
        steps = {n: reads[f"dense.{n}"] for n in [PUBLIC, *enabled]}
        if method == "btm_equal_flops":
            flops = scores["gap_closed"]["flexolmo_default"]["flops_per_token"]
            about["prompt tokens"] = (
                prefix_for_budget(
                    recipe.seq_len,
                    len(steps),
                    about["top k"],
                    flops / scores["anchor_flops_per_token"],
                )
                or 0
            )
        samples = {n: score.inputs[f"samples.{n}"].directory(root) for n in steps}
        if "prompt tokens" in about:
            about["chosen by"] = "the first tokens of a text, examples before a question included"
        parts = [*(s.identity for s in steps.values()), str(sorted(about.items()))]
        if method == "prompt_routing":
            parts += [score.inputs[f"samples.{n}"].identity for n in steps]
        return (
            _OVER_DENSE[method]({n: _open(s, root) for n, s in steps.items()}, about, samples),
            about | {"digest": digest_bytes("".join(parts).encode()), "enabled": enabled},
        )
    step = reads[f"dume.{about['scale']}" if method == _CHOSEN_SCALE else method]
    reader = _open(step, root)
    available = reader.model.expert_names[1:] if isinstance(reader.model, AnyMixture) else []
    enabled = sorted(choose_experts(available, without=without, only=only))
    if available:
        reader = replace(reader, enabled=enabled)
    return reader, about | {"digest": f"sha256:{step.identity}", "enabled": enabled}


def _open(step: Step, root: Path) -> OwnReader:
    """The model that a reading step read."""
    inputs = {role: s.directory(root) for role, s in step.inputs.items()}
    context = StepContext(step.label, dict(step.settings), inputs, step.directory(root))
    return OwnReader(model_of(context), anchor_of(context).tokenizer)


# --- rivals over dense models, public first -------------------------------------------------------

_Dense = Mapping[str, OwnReader]


def _btm(dense: _Dense, chosen: Mapping[str, Any], _: Mapping[str, Path]) -> Reader:
    return BtmReader(list(dense.values()), chosen["temperature"], chosen.get("switch rate", 0.0))


def _btm_equal_flops(dense: _Dense, chosen: Mapping[str, Any], _: Mapping[str, Path]) -> Reader:
    """Models that all read a prefix, as long as the budget allows in a window of the study's,
    of which the likeliest go on. A shorter text costs more than the budget, a longer one less."""
    models = list(dense.values())

    def choose(prefix: tuple[int, ...]) -> Reader:
        best = np.argsort([-log_likelihood(m, prefix) for m in models], kind="stable")
        kept = sorted(best[: chosen["top k"]].tolist())  # one reader for the same models
        return going_on(tuple(kept))

    @lru_cache(_REMEMBERED)
    def going_on(kept: tuple[int, ...]) -> Reader:
        return BtmReader([models[i] for i in kept], chosen["temperature"])

    return PromptReader(
        BtmReader(models, chosen["temperature"]),
        lru_cache(_REMEMBERED)(choose),
        chosen["prompt tokens"],
    )


def _soup_weighted(dense: _Dense, chosen: Mapping[str, Any], _: Mapping[str, Path]) -> Reader:
    """A soup for every prompt; before it is read, the mean soup predicts."""
    states = {n: r.model.state_dict() for n, r in dense.items()}

    def cook(weights: Mapping[str, float] | None = None) -> OwnReader:
        like = dense[PUBLIC]
        model = Transformer(like.model.config)
        model.load_state_dict(soup(states, weights))
        return OwnReader(model.requires_grad_(False).eval(), like.tokenizer)

    def choose(prefix: tuple[int, ...]) -> Reader:
        likelihood = np.array([log_likelihood(r, prefix) for r in dense.values()])
        weights = likelihood_weights(likelihood, chosen["temperature"]).tolist()
        return cook(dict(zip(dense, weights, strict=True)))

    return PromptReader(cook(), lru_cache(_REMEMBERED)(choose), chosen["prompt tokens"])


def _prompt_routing(
    dense: _Dense, chosen: Mapping[str, Any], samples: Mapping[str, Path]
) -> Reader:
    tokenizer, start = dense[PUBLIC].tokenizer, dense[PUBLIC].start
    classifier = fit_prompt_classifier(
        {n: load_samples(d) for n, d in samples.items()}, tokenizer, chosen["prompt tokens"]
    )

    def choose(prefix: tuple[int, ...]) -> Reader:
        likely = classifier.probabilities([tokenizer.decode(list(prefix[len(start) :]))])[0]
        return dense[classifier.names[int(likely.argmax())]]

    return PromptReader(dense[PUBLIC], lru_cache(4096)(choose), chosen["prompt tokens"])


_OVER_DENSE: dict[str, Callable[[_Dense, Mapping[str, Any], Mapping[str, Path]], Reader]] = {
    "btm": _btm,
    "btm_switching": _btm,
    "btm_equal_flops": _btm_equal_flops,
    "soup_weighted": _soup_weighted,
    "soup_weighted_equal_flops": _soup_weighted,
    "prompt_routing": _prompt_routing,
}
