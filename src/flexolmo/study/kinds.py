"""What the steps of a study do; each runs in a process of its own, on one thread.

Every kind states in its docstring what its inputs are called and what it leaves behind.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from flexolmo.data.batches import TokenSet, evaluation_windows, open_set, training_batches
from flexolmo.data.fetch import fetch_local, fetch_set
from flexolmo.data.prepare import PrepareSettings, prepare_set
from flexolmo.data.proxy import load_proxy, save_proxy, select_proxy
from flexolmo.data.sources import CLIENTS
from flexolmo.data.splice import load_spliced, save_spliced, splice_windows
from flexolmo.data.tokenizer import load_tokenizer
from flexolmo.evaluation.compression import compress_expert, count_bytes
from flexolmo.evaluation.likelihood import read_windows
from flexolmo.inference.generate import Sampling, continue_ids
from flexolmo.merge.baselines import likelihood_weights, soup
from flexolmo.merge.calibrate import set_rows, solve_ridge, tune_router
from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.checkpoint import Anchor, load_anchor, mean_hidden_state, save_anchor
from flexolmo.model.hidden_statistics import HiddenSums, gather
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import LinearSettings, RouterSettings, first_raw_bias
from flexolmo.model.transformer import Transformer
from flexolmo.progress import progress
from flexolmo.study.embedder import embed_set, fetch_embedder
from flexolmo.study.models import (
    Reading,
    btx_start,
    load_dense,
    load_rival,
    rival_mixture,
    save_model,
    train_dense,
    train_rival,
)
from flexolmo.study.step import StepContext, step_kind
from flexolmo.train.anchor import AnchorRecipe, embedding_windows, train_anchor
from flexolmo.train.expert import (
    ExpertRecipe,
    load_expert,
    reroute_expert,
    save_expert,
    start_expert,
    train_expert,
)
from flexolmo.train.loop import TrainSettings

Windows = dict[str, list[tuple[np.ndarray, int]]]  # by set: (ids, bytes) as evaluation_windows
SPLITS = ("validation", "heldout")
MIXED = "mixed"  # the name that mixed documents go by among the sets


# --- text -----------------------------------------------------------------------------------------


@step_kind("corpus", version=1)
def corpus(step: StepContext) -> dict[str, Any]:
    """Fetch and prepare the sets. Leaves prepared/SET. No inputs.

    Settings: sets; from_directory, a directory of SET/*.jsonl.gz, or null for packages;
    vocab_size.
    """
    done: list[Path] = []
    tokens = {}
    for name in step.settings["sets"]:
        if step.settings["from_directory"]:
            fetch_local(Path(step.settings["from_directory"]) / name, name, step.out / "corpus",
                        "see the directory's own list", "text")
        else:
            fetch_set(name, step.out / "corpus", CLIENTS)
        public = None if name == "public" else step.out / "prepared" / "public"
        card = prepare_set(step.out / "corpus" / name, step.out / "prepared" / name, None, public,
                           done, PrepareSettings(vocab_size=step.settings["vocab_size"]))
        tokens[name] = {split: n["tokens"] for split, n in card["splits"].items()}
        if name != "public":
            done.append(step.out / "prepared" / name)
    return {"tokens": tokens}


def open_sets(corpus_dir: Path, names: Sequence[str]) -> dict[str, TokenSet]:
    """The prepared sets of a corpus step."""
    return {n: open_set(corpus_dir / "prepared" / n) for n in names}


@step_kind("windows", version=1)
def windows(step: StepContext) -> dict[str, Any]:
    """The text that every method reads. Input: corpus. Leaves SPLIT.npz and SPLIT-mixed.npz.

    Settings: sets, seq_len, bytes (by split, of each set), mixed (windows, by split), seed.
    """
    settings = step.settings
    sets = open_sets(step.inputs["corpus"], settings["sets"])
    count: dict[str, Any] = {}
    for split in SPLITS:
        arrays: dict[str, np.ndarray] = {}
        for name, token_set in sets.items():
            found = list(evaluation_windows(token_set, split, settings["seq_len"],
                                            settings["bytes"][split]))
            arrays[f"{name}.ids"] = np.concatenate([ids for ids, _ in found])
            arrays[f"{name}.lengths"] = np.array([len(ids) for ids, _ in found])
            arrays[f"{name}.bytes"] = np.array([size for _, size in found])
        np.savez(step.out / f"{split}.npz", **arrays)  # type: ignore[arg-type]
        spliced = splice_windows(sets, split, num_windows=settings["mixed"][split],
                                 seq_len=settings["seq_len"], seed=settings["seed"])
        save_spliced(spliced, step.out / f"{split}-mixed.npz")
        count[split] = {n: int(arrays[f"{n}.bytes"].sum()) for n in sets}
        count[split][MIXED] = sum(w.bytes for w in spliced)
        (step.out / f"{split}-mixed.txt").write_text(
            spliced.marked_text(0, load_tokenizer(sets["public"].directory)), encoding="utf-8")
    return {"bytes": count}


def load_windows(directory: Path, split: str) -> Windows:
    """The windows of one split, mixed documents among them."""
    with np.load(directory / f"{split}.npz", allow_pickle=False) as f:
        found: Windows = {}
        for name in sorted({key.rsplit(".", 1)[0] for key in f.files}):
            ends = np.cumsum(f[f"{name}.lengths"])
            rows = np.split(f[f"{name}.ids"], ends[:-1])
            found[name] = list(zip(rows, f[f"{name}.bytes"].tolist(), strict=True))
    spliced = load_spliced(directory / f"{split}-mixed.npz")
    return found | {MIXED: [(w.ids, w.bytes) for w in spliced]}


def load_sources(directory: Path, split: str) -> tuple[list[str], list[np.ndarray]]:
    """Names of the sets, and which of them each token of each mixed document came from."""
    spliced = load_spliced(directory / f"{split}-mixed.npz")
    return spliced.names, [w.source for w in spliced]


# --- training -------------------------------------------------------------------------------------


@step_kind("anchor", version=1)
def anchor(step: StepContext) -> dict[str, Any]:
    """Train the anchor on public text. Input: corpus. Leaves anchor/."""
    public = step.inputs["corpus"] / "prepared" / "public"
    recipe = AnchorRecipe.model_validate(step.settings["recipe"] | {"seed": step.settings["seed"]})
    made = train_anchor(open_set(public), load_tokenizer(public), recipe, step.out / "run", 1)
    save_anchor(made, step.out / "anchor")
    return {"tokens": made.record["tokens"]}


def _anchor(step: StepContext) -> Anchor:
    return load_anchor(step.inputs["anchor"] / "anchor")


def _set(step: StepContext, name: str) -> TokenSet:
    return open_set(step.inputs["corpus"] / "prepared" / name)


@step_kind("dense", version=1)
def dense(step: StepContext) -> dict[str, Any]:
    """Continued training of the whole anchor on one set. Inputs: corpus, anchor."""
    settings = TrainSettings.model_validate(step.settings["train"])
    model = train_dense(_anchor(step), _set(step, step.settings["set"]), settings,
                        step.settings["seed"], step.out)
    save_model(model, step.out / "model.safetensors")
    return {"tokens": settings.tokens}


@step_kind("expert", version=1)
def expert(step: StepContext) -> dict[str, Any]:
    """Train one owner's expert. Inputs: corpus, anchor. Leaves expert/.

    Settings: set, recipe; rows: how a linear router's rows start (see `_rows`), or null.
    """
    start_from = _with_rows(step, _anchor(step))
    recipe = ExpertRecipe.model_validate(step.settings["recipe"] | {"seed": step.settings["seed"]})
    data = _set(step, step.settings["set"])
    start = None
    if step.settings.get("rows") is not None:
        start = start_expert(start_from, data, recipe)
        for i, row in enumerate(_rows(step, start_from, data)):
            start[f"layers.{i}.router.weight"] = row[None].clone()
    made = train_expert(start_from, data, step.settings["set"], recipe, step.out / "run", 1,
                        public=_set(step, "public") if recipe.replay else None, start=start)
    save_expert(made, step.out / "expert")
    return {"tokens": made.record["tokens"], "bytes": _bytes(made.tensors),
            "architecture": made.architecture}


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _rows(step: StepContext, base: Anchor, data: TokenSet) -> Tensor:
    """First rows [L,D] of one set's expert. Settings, rows: random | per_layer | minilm."""
    kind, L, D = step.settings["rows"], base.config.num_layers, base.config.d_model
    if kind == "random":
        seed = step.settings["seed"] * 1000 + sum(data.name.encode())
        row = torch.randn(D, generator=torch.Generator().manual_seed(seed))
        return (row / row.norm()).repeat(L, 1)
    if kind == "per_layer":
        sums = [torch.zeros(D) for _ in range(L)]

        def watch(total: Tensor) -> Any:
            def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                total.add_(args[0].sum((0, 1)))
            return add

        hooks = [cast(nn.Module, block.mlp).register_forward_pre_hook(watch(total))
                 for block, total in zip(base.model.layers, sums, strict=True)]
        mean_hidden_state(base.model, embedding_windows(data, base.config))
        for hook in hooks:
            hook.remove()
        return torch.stack([s / s.norm() for s in sums])
    return embed_set(data, base.config, step.inputs["embedder"]).repeat(L, 1)


@step_kind("embedder", version=1)
def embedder(step: StepContext) -> dict[str, Any]:
    """MiniLM's files. No inputs."""
    return {"digest": fetch_embedder(step.out)}


def _with_rows(step: StepContext, base: Anchor) -> Anchor:
    if step.settings.get("rows") is None:
        return base
    return dataclasses.replace(base, router_rows=_rows(step, base, _set(step, "public")))


@step_kind("uncoordinated", version=1)
def uncoordinated(step: StepContext) -> dict[str, Any]:
    """An expert that was not trained to coordinate: the FFNs of a dense model, whose other
    weights are thrown away, with the rows its owner's text starts with. Inputs: corpus, anchor,
    dense."""
    base, recipe = _anchor(step), ExpertRecipe.model_validate(step.settings["recipe"])
    start = start_expert(base, _set(step, step.settings["set"]), recipe)
    state = load_dense(base, step.inputs["dense"] / "model.safetensors").state_dict()
    for key in start:
        if key.startswith("layers.") and "proj" in key:
            layer, part = key.split(".")[1:3]
            start[key] = state[f"layers.{layer}.mlp.{part}.weight"]
    made = dataclasses.replace(
        train_expert(base, _set(step, step.settings["set"]), step.settings["set"],
                     recipe.model_copy(update={"train": recipe.train.model_copy(
                         update={"steps": 1, "warmup_steps": 0, "learning_rate": 1e-12,
                                 "muon_learning_rate": 1e-12})}), None, 1), tensors=start)
    save_expert(made, step.out / "expert")
    return {"tokens": step.settings["tokens"], "bytes": _bytes(start),
            "architecture": made.architecture}


@step_kind("compressed", version=1)
def compressed(step: StepContext) -> dict[str, Any]:
    """A trained expert cut to a lower rank. Inputs: corpus, anchor, expert. Settings: set, rank,
    delta_rank."""
    made = load_expert(step.inputs["expert"] / "expert")
    small = compress_expert(_anchor(step), made, rank=step.settings["rank"],
                            delta_rank=step.settings["delta_rank"],
                            data=_set(step, step.settings["set"]))
    save_expert(small, step.out / "expert")
    return {"bytes": count_bytes(small.tensors), "tokens": made.record["tokens"],
            "architecture": small.architecture}


@step_kind("rerouted", version=1)
def rerouted(step: StepContext) -> dict[str, Any]:
    """A trained expert with another router. Inputs: corpus, anchor, expert. Settings: set,
    router."""
    router: RouterSettings = TypeAdapter(RouterSettings).validate_python(step.settings["router"])
    made = reroute_expert(load_expert(step.inputs["expert"] / "expert"), _anchor(step),
                          _set(step, step.settings["set"]), router, _set(step, "public"))
    save_expert(made, step.out / "expert")
    return {"tokens": made.record["tokens"], "bytes": _bytes(made.tensors),
            "architecture": made.architecture}


@step_kind("unrestricted", version=1)
def unrestricted(step: StepContext) -> dict[str, Any]:
    """One mixture, all its weights trained on all sets together. Inputs: corpus, anchor."""
    base, names = _anchor(step), step.settings["sets"]
    settings = TrainSettings.model_validate(step.settings["train"])
    model = rival_mixture(base, names, step.settings["top_k"], step.settings["seed"])
    train_rival(model, [_set(step, n) for n in ["public", *names]], settings,
                step.settings["seed"], step.out, step.label)
    save_model(model, step.out / "model.safetensors")
    return {"tokens": settings.tokens}


@step_kind("btx", version=1)
def btx(step: StepContext) -> dict[str, Any]:
    """Branch-train-mix, then training on public text. Inputs: corpus, anchor, dense.SET."""
    base, names = _anchor(step), step.settings["sets"]
    settings = TrainSettings.model_validate(step.settings["train"])
    model = btx_start(base, _dense_states(step, base), step.settings["top_k"],
                      step.settings["seed"])
    train_rival(model, [_set(step, "public")], settings, step.settings["seed"], step.out,
                step.label)
    save_model(model, step.out / "model.safetensors")
    assert model.expert_names[1:] == sorted(names)
    return {"tokens": settings.tokens}


def _dense_states(step: StepContext, base: Anchor) -> dict[str, dict[str, Tensor]]:
    return {n: load_dense(base, step.inputs[f"dense.{n}"] / "model.safetensors").state_dict()
            for n in step.settings["sets"]}


@step_kind("dume", version=1)
def dume(step: StepContext) -> dict[str, Any]:
    """Dense experts' FFNs in an averaged frame, router by ridge regression on every owner's
    statistics, untrained. Inputs: corpus, anchor, dense.SET. Settings: windows, ridge, and scale,
    by which rows are multiplied, for ridge targets of 0 and 1 leave a softmax nearly even."""
    base = _anchor(step)
    model = btx_start(base, _dense_states(step, base), step.settings["top_k"], 0).eval()
    rows = solve_ridge(_hidden_sums(step, model, model.expert_names), ridge=step.settings["ridge"])
    set_rows(model, rows, step.settings["scale"])
    save_model(model, step.out / "model.safetensors")
    return {"tokens": 0}


@step_kind("ridge", version=1)
def ridge(step: StepContext) -> dict[str, Any]:
    """Trained experts with a router by ridge regression on what each owner sums in the anchor.

    Inputs: corpus, anchor, expert.SET. Settings as for dume, and no_bias: true.
    """
    base, model = _anchor(step), _mixture(step, None)
    rows = solve_ridge(_hidden_sums(step, base.model, model.expert_names),
                       ridge=step.settings["ridge"])
    set_rows(model, rows, step.settings["scale"])
    save_model(model, step.out / "model.safetensors")
    return {"tokens": 0}


def _hidden_sums(step: StepContext, model: Transformer, names: Sequence[str]
                 ) -> dict[str, HiddenSums]:
    return {n: gather(model, _training_windows(_set(step, n), step.settings["windows"],
                                               step.settings["seq_len"])) for n in names}


def _training_windows(token_set: TokenSet, count: int, seq_len: int) -> list[np.ndarray]:
    batches = training_batches(token_set, "train", 1, seq_len, seed=1)
    return [batches.batch(i)[0, :-1] for i in range(min(count, batches.num_windows))]


@step_kind("proxy", version=1)
def proxy(step: StepContext) -> dict[str, Any]:
    """The public text most like one owner's, chosen in that owner's house. Inputs: corpus."""
    found = select_proxy(_set(step, step.settings["set"]), _set(step, "public"),
                         tokens=step.settings["tokens"])
    save_proxy(found, step.out / "proxy.json")
    return {"accuracy": found.accuracy}


@step_kind("tuned", version=1)
def tuned(step: StepContext) -> dict[str, Any]:
    """The paper's joint tuning of all router rows on proxies and public text (§3.3.3).

    Inputs: corpus, anchor, expert.SET, proxy.SET. Weakens opting out: see merge/calibrate.py.
    """
    model, public = _mixture(step, None), _set(step, "public")
    settings = TrainSettings.model_validate(step.settings["train"])
    proxies = [load_proxy(step.inputs[f"proxy.{n}"] / "proxy.json", public)
               for n in step.settings["sets"]]
    tune_router(model, proxies, public, settings, step.settings["seed"], step.out / "run")
    save_model(model, step.out / "model.safetensors")
    return {"tokens": settings.tokens}


# --- reading --------------------------------------------------------------------------------------


def _mixture(step: StepContext, top_k: int | None) -> MixtureModel:
    """The mixture of the inputs expert.SET."""
    base = _with_rows(step, _anchor(step))
    experts = {role.removeprefix("expert."): load_expert(path / "expert")
               for role, path in step.inputs.items() if role.startswith("expert.")}
    router: RouterSettings = next(iter(experts.values())).router
    tensors = {n: e.tensors for n, e in experts.items()}
    if isinstance(router, LinearSettings) and step.settings.get("no_bias"):
        for found in tensors.values():
            for key in [k for k in found if k.endswith("raw_bias")]:
                zero = router.model_copy(update={"bias_form": "clamp"})
                found[key] = first_raw_bias(zero)
        router = router.model_copy(update={"bias_form": "clamp"})
    return assemble_mixture(base, tensors, router, top_k=top_k)


def _model(step: StepContext) -> Transformer:
    """What settings.what says: anchor, dense, mixture, rival (unrestricted, BTX, DUME), tuned,
    soup."""
    what, top_k = step.settings["what"], step.settings.get("top_k")
    if what == "anchor":
        return _anchor(step).model
    if what == "dense":
        return load_dense(_anchor(step), step.inputs["model"] / "model.safetensors")
    if what == "rival":
        return load_rival(_anchor(step), step.settings["sets"], step.settings["top_k"],
                          step.inputs["model"] / "model.safetensors")
    if what == "soup":
        base = _anchor(step)
        models = {"public": base.model.state_dict()} | _dense_states(step, base)
        base.model.load_state_dict(soup(models))
        return base.model
    model = _mixture(step, top_k)
    if what == "tuned":
        from safetensors.torch import load_file

        model.load_state_dict(load_file(step.inputs["model"] / "model.safetensors"))
    return model


@step_kind("read", version=1)
def read(step: StepContext) -> dict[str, Any]:
    """What a model says of the windows. Inputs: windows, anchor, and those `_model` needs.

    Settings: what; enabled, owners on (null: all); splits; on, the sets to read (null: all).
    Leaves SPLIT.npz of log-probabilities; metrics: mean weights (routing) and fractions of
    tokens on which an expert ran (active) by set, [L][E].
    """
    model, settings = _model(step), step.settings
    if isinstance(model, MixtureModel):
        model.is_sparse = True  # the same to the last bits, and faster when few are picked
    routing: dict[str, Any] = {}
    active: dict[str, Any] = {}
    for split in settings.get("splits", SPLITS):
        text = load_windows(step.inputs["windows"], split)
        chosen = settings.get("on") or list(text)
        with progress(f"{step.label}, {split}",
                      sum(len(i) - 1 for n in chosen for i, _ in text[n]), "tok") as meter:
            found = {n: read_windows(model, text[n], enabled=settings.get("enabled"), meter=meter)
                     for n in chosen}
        Reading({n: f.log_probs for n, f in found.items()}).save(step.out / f"{split}.npz")
        if split == "heldout":
            routing = {n: f.routing for n, f in found.items() if f.routing is not None}
            active = {n: f.active for n, f in found.items() if f.active is not None}
    names = model.expert_names if isinstance(model, MixtureModel) else None
    return {"routing": routing, "active": active, "experts": names}


@step_kind("read_weighted_soup", version=1)
def read_weighted_soup(step: StepContext) -> dict[str, Any]:
    """A soup of its own for every window, weighted by how likely each model found its start.

    Inputs: windows, anchor, dense.SET, read.NAME (readings of the anchor and every dense model).
    Settings: prompt_tokens, temperature, splits. Before the prompt is read, the mean soup speaks.
    """
    base, settings = _anchor(step), step.settings
    states = {"public": base.model.state_dict()} | _dense_states(step, base)
    states = {n: {k: t.clone() for k, t in s.items()} for n, s in states.items()}
    names, P = list(states), settings["prompt_tokens"]
    model = Transformer(base.config).requires_grad_(False).eval()
    from flexolmo.study.models import load_reading

    for split in settings["splits"]:
        text = load_windows(step.inputs["windows"], split)
        readings = {n: load_reading(step.inputs[f"read.{n}"] / f"{split}.npz", text)
                    for n in names}
        start = load_reading(step.inputs["read.mean"] / f"{split}.npz", text)
        found: dict[str, list[np.ndarray]] = {}
        total = sum(len(ids) - 1 for w in text.values() for ids, _ in w)
        with progress(step.label, total, "tok") as meter:
            for name, rows in text.items():
                found[name] = []
                for i, (ids, size) in enumerate(rows):
                    likelihood = np.array([readings[n].log_probs[name][i][:P].sum()
                                           for n in names])
                    weights = likelihood_weights(likelihood, settings["temperature"])
                    model.load_state_dict(soup(states, dict(zip(names, weights.tolist(),
                                                                strict=True))))
                    said = read_windows(model, [(ids, size)]).log_probs[0]
                    found[name].append(np.concatenate([start.log_probs[name][i][:P], said[P:]]))
                    meter.advance(len(ids) - 1)
        Reading(found).save(step.out / f"{split}.npz")
    return {}


@step_kind("samples", version=1)
def samples(step: StepContext) -> dict[str, Any]:
    """Text that one dense model writes from nothing: what a coordinator may fit a classifier on.

    Inputs: anchor, model (absent: the anchor speaks). Settings: count, tokens, seed.
    """
    base = _anchor(step)
    model = (load_dense(base, step.inputs["model"] / "model.safetensors")
             if "model" in step.inputs else base.model)
    sampling = Sampling(max_new_tokens=step.settings["tokens"], temperature=1.0, top_p=1.0,
                        seed=step.settings["seed"])
    rows = continue_ids(model, [[] for _ in range(step.settings["count"])], sampling)
    np.savez(step.out / "samples.npz", ids=np.concatenate([np.array(r, dtype=np.int64)
                                                           for r in rows]),
             lengths=np.array([len(r) for r in rows]))
    return {}
