"""The steps of a study that make models, each in a process of its own, on one thread; training is
shared out by several where torchrun started them.

Every kind states in its docstring what its inputs are called and what it leaves behind.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.data.batches import TokenSet, open_set, training_batches
from flexolmo.data.tokenizer import load_tokenizer
from flexolmo.model.checkpoint import save_anchor
from flexolmo.model.hidden_statistics import HiddenSums, gather
from flexolmo.model.parallel import apart, of_first
from flexolmo.model.router import RouterSettings
from flexolmo.model.shape import architecture_of
from flexolmo.model.transformer import Transformer
from flexolmo.research.rivals.fitted_routers import set_rows, solve_ridge, tune_router
from flexolmo.research.rivals.models import (
    btx_start,
    load_dense,
    rival_mixture,
    save_model,
    train_dense,
    train_rival,
)
from flexolmo.research.rivals.proxy import load_proxy, save_proxy, select_proxy
from flexolmo.research.steps.step import StepContext, step_kind
from flexolmo.research.study.embedder import fetch_embedder
from flexolmo.research.study.inputs import (
    anchor_of,
    dense_states,
    first_rows,
    mixture_of,
    set_of,
    with_rows,
)
from flexolmo.runtime import choose_device, run_record
from flexolmo.train.anchor import AnchorRecipe, train_anchor
from flexolmo.train.expert import (
    Expert,
    ExpertRecipe,
    load_expert,
    reroute_expert,
    save_expert,
    start_expert,
    train_expert,
)
from flexolmo.train.loop import TrainSettings
from flexolmo.train.shrink import compress_expert, count_bytes, heal_expert


@step_kind("anchor", version=2, is_shared=True)
def anchor(step: StepContext) -> dict[str, Any]:
    """Train the anchor on public text. Input: corpus. Leaves anchor/."""
    public = step.inputs["corpus"] / "prepared" / PUBLIC
    recipe = AnchorRecipe.model_validate(step.settings["recipe"] | {"seed": step.settings["seed"]})
    made = train_anchor(
        open_set(public),
        load_tokenizer(public),
        recipe,
        step.out / "run",
        1,
        choose_device(step.device),
    )
    save_anchor(made, step.out / "anchor")
    return {"tokens": made.record["tokens"]}


@step_kind("dense", version=1, is_shared=True)
def dense(step: StepContext) -> dict[str, Any]:
    """Continued training of the whole anchor on one set. Inputs: corpus, anchor."""
    settings = TrainSettings.model_validate(step.settings["train"])
    model = train_dense(
        anchor_of(step),
        set_of(step, step.settings["set"]),
        settings,
        step.settings["seed"],
        step.out,
    )
    save_model(model, step.out / "model.safetensors")
    return {"tokens": settings.tokens}


@step_kind("expert", version=2, is_shared=True)
def expert(step: StepContext) -> dict[str, Any]:
    """Train one owner's expert. Inputs: corpus, anchor. Leaves expert/.

    Settings: set, recipe; rows: how a linear router's rows start (`inputs.first_rows`), or null.
    """
    start_from = with_rows(step, anchor_of(step))
    recipe = ExpertRecipe.model_validate(step.settings["recipe"] | {"seed": step.settings["seed"]})
    data = set_of(step, step.settings["set"])
    start = None
    if step.settings.get("rows") is not None:
        start = start_expert(start_from, data, recipe)
        for i, row in enumerate(first_rows(step, start_from, data)):
            start[f"layers.{i}.router.weight"] = row[None].clone()
    made = train_expert(
        start_from,
        data,
        step.settings["set"],
        recipe,
        step.out / "run",
        1,
        public=set_of(step, PUBLIC) if recipe.replay else None,
        start=start,
    )
    return _leave(step, made, made.record["tokens"])


def _leave(step: StepContext, made: Expert, tokens: int) -> dict[str, Any]:
    """Write the expert into expert/; the metrics of a step that made it from `tokens`."""
    save_expert(made, step.out / "expert")
    return {"tokens": tokens, "bytes": count_bytes(made.tensors), "architecture": made.architecture}


@step_kind("compressed", version=1, is_shared=True)
def compressed(step: StepContext) -> dict[str, Any]:
    """A full expert cut to ranks, then healed. Inputs: corpus, anchor, expert. Leaves expert/.

    Settings: set, rank, delta_rank (by name), has_half_deltas, train (of the healing).
    """
    base = anchor_of(step)
    data = set_of(step, step.settings["set"])
    with apart():
        small = compress_expert(
            base,
            load_expert(step.inputs["expert"] / "expert"),
            data=data,
            rank=step.settings["rank"],
            delta_rank=step.settings["delta_rank"],
        )
    small = replace(small, tensors=of_first(small.tensors))
    train = TrainSettings.model_validate(step.settings["train"])
    made = heal_expert(
        base,
        small,
        data,
        train.steps,
        settings=train,
        run_dir=step.out / "run",
        has_half_deltas=step.settings["has_half_deltas"],
        num_threads=1,
    )
    return _leave(step, made, train.tokens)


@step_kind("embedder", version=1)
def embedder(step: StepContext) -> dict[str, Any]:
    """MiniLM's files. No inputs."""
    return {"digest": fetch_embedder(step.out)}


@step_kind("uncoordinated", version=1)
def uncoordinated(step: StepContext) -> dict[str, Any]:
    """An expert that was not trained to coordinate: the FFNs of a dense model, whose other
    weights are thrown away, with the rows its owner's text starts with. Inputs: corpus, anchor,
    dense."""
    base = anchor_of(step)
    recipe = ExpertRecipe.model_validate(step.settings["recipe"])
    start = start_expert(base, set_of(step, step.settings["set"]), recipe)
    state = load_dense(base, step.inputs["dense"] / "model.safetensors").state_dict()
    for key in start:
        if key.startswith("layers.") and "proj" in key:
            layer, part = key.split(".")[1:3]
            start[key] = state[f"layers.{layer}.mlp.{part}.weight"]
    data = set_of(step, step.settings["set"])
    record = run_record(recipe.model_dump(mode="json"), recipe.seed, {data.name: data.digest})
    made = Expert(
        data.name,
        base.digest,
        recipe.router,
        start,
        record | {"tokens": step.settings["tokens"]},
        data.commitment,
        architecture_of(base.config, recipe.shape(base.config)),
    )
    return _leave(step, made, step.settings["tokens"])


@step_kind("rerouted", version=1)
def rerouted(step: StepContext) -> dict[str, Any]:
    """A trained expert with another router. Inputs: corpus, anchor, expert. Settings: set,
    router."""
    router: RouterSettings = TypeAdapter(RouterSettings).validate_python(step.settings["router"])
    made = reroute_expert(
        load_expert(step.inputs["expert"] / "expert"),
        anchor_of(step),
        set_of(step, step.settings["set"]),
        router,
        set_of(step, PUBLIC),
    )
    return _leave(step, made, made.record["tokens"])


@step_kind("unrestricted", version=1, is_shared=True)
def unrestricted(step: StepContext) -> dict[str, Any]:
    """One mixture, all its weights trained on all sets together. Inputs: corpus, anchor."""
    base, names = anchor_of(step), step.settings["sets"]
    settings = TrainSettings.model_validate(step.settings["train"])
    model = rival_mixture(base, names, step.settings["top_k"], step.settings["seed"])
    train_rival(
        model,
        [set_of(step, n) for n in [PUBLIC, *names]],
        settings,
        step.settings["seed"],
        step.out,
        step.label,
    )
    save_model(model, step.out / "model.safetensors")
    return {"tokens": settings.tokens}


@step_kind("btx", version=1, is_shared=True)
def btx(step: StepContext) -> dict[str, Any]:
    """Branch-train-mix, then training on public text. Inputs: corpus, anchor, dense.SET."""
    base, names = anchor_of(step), step.settings["sets"]
    settings = TrainSettings.model_validate(step.settings["train"])
    model = btx_start(base, dense_states(step, base), step.settings["top_k"], step.settings["seed"])
    train_rival(
        model, [set_of(step, PUBLIC)], settings, step.settings["seed"], step.out, step.label
    )
    save_model(model, step.out / "model.safetensors")
    assert model.expert_names[1:] == sorted(names)
    return {"tokens": settings.tokens}


@step_kind("dume", version=1)
def dume(step: StepContext) -> dict[str, Any]:
    """Dense experts' FFNs in an averaged frame, router by ridge regression on every owner's
    statistics, untrained. Inputs: corpus, anchor, dense.SET. Settings: windows, ridge, and scale,
    by which rows are multiplied, for ridge targets of 0 and 1 leave a softmax nearly even."""
    base = anchor_of(step)
    model = btx_start(base, dense_states(step, base), step.settings["top_k"], 0).eval()
    rows = solve_ridge(_hidden_sums(step, model, model.expert_names), ridge=step.settings["ridge"])
    set_rows(model, rows, step.settings["scale"])
    save_model(model, step.out / "model.safetensors")
    return {"tokens": 0}


@step_kind("ridge", version=1)
def ridge(step: StepContext) -> dict[str, Any]:
    """Trained experts with a router by ridge regression on what each owner sums in the anchor.

    Inputs: corpus, anchor, expert.SET. Settings as for dume, and no_bias: true.
    """
    base = anchor_of(step)
    model = mixture_of(step, None)
    rows = solve_ridge(
        _hidden_sums(step, base.model, model.expert_names), ridge=step.settings["ridge"]
    )
    set_rows(model, rows, step.settings["scale"])
    save_model(model, step.out / "model.safetensors")
    return {"tokens": 0}


def _hidden_sums(
    step: StepContext, model: Transformer, names: Sequence[str]
) -> dict[str, HiddenSums]:
    return {
        n: gather(
            model,
            _training_windows(set_of(step, n), step.settings["windows"], step.settings["seq_len"]),
        )
        for n in names
    }


def _training_windows(token_set: TokenSet, count: int, seq_len: int) -> list[np.ndarray]:
    batches = training_batches(token_set, "train", 1, seq_len, seed=1)
    return [batches.batch(i)[0, :-1] for i in range(min(count, batches.num_windows))]


@step_kind("proxy", version=1)
def proxy(step: StepContext) -> dict[str, Any]:
    """The public text most like one owner's, chosen on that owner's premises. Inputs: corpus."""
    found = select_proxy(
        set_of(step, step.settings["set"]), set_of(step, PUBLIC), tokens=step.settings["tokens"]
    )
    save_proxy(found, step.out / "proxy.json")
    return {"accuracy": found.accuracy}


@step_kind("tuned", version=1, is_shared=True)
def tuned(step: StepContext) -> dict[str, Any]:
    """The paper's joint tuning of all router rows on proxies and public text (§3.3.3).

    Inputs: corpus, anchor, expert.SET, proxy.SET. Weakens opting out: see merge/calibrate.py.
    """
    model = mixture_of(step, None)
    public = set_of(step, PUBLIC)
    settings = TrainSettings.model_validate(step.settings["train"])
    proxies = [
        load_proxy(step.inputs[f"proxy.{n}"] / "proxy.json", public) for n in step.settings["sets"]
    ]
    tune_router(model, proxies, public, settings, step.settings["seed"], step.out / "run")
    save_model(model, step.out / "model.safetensors")
    return {"tokens": settings.tokens}
