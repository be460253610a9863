"""The steps of a study that read: what each model says of the windows, and writes by itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.data.tokenizer import Tokenizer
from flexolmo.evaluation.likelihood import panels_of, read_windows
from flexolmo.files import save_arrays
from flexolmo.inference.decode import continue_ids
from flexolmo.inference.reader import OwnReader
from flexolmo.inference.sampling import Sampling
from flexolmo.model.probabilities import AnyMixture, ProbabilityMixture, ProbabilitySettings
from flexolmo.model.transformer import Transformer
from flexolmo.progress import progress
from flexolmo.research.rivals.baselines import TextClassifier, likelihood_weights, soup
from flexolmo.research.rivals.models import Reading, load_dense, load_reading, load_rival
from flexolmo.research.steps.step import StepContext, step_kind
from flexolmo.research.study.inputs import anchor_of, dense_states, mixture_of
from flexolmo.research.study.text_steps import SPLITS, load_windows


def model_of(step: StepContext) -> Transformer | ProbabilityMixture:
    """The model that settings.what names.

    It is anchor, dense, mixture, probabilities (of a mixture), rival (unrestricted, BTX, DUME),
    tuned, or soup.
    """
    what, top_k = step.settings["what"], step.settings.get("top_k")
    if what == "anchor":
        return anchor_of(step).model
    if what == "dense":
        return load_dense(anchor_of(step), step.inputs["model"] / "model.safetensors")
    if what == "rival":
        return load_rival(
            anchor_of(step),
            step.settings["sets"],
            step.settings["top_k"],
            step.inputs["model"] / "model.safetensors",
        )
    if what == "soup":
        base = anchor_of(step)
        models = {PUBLIC: base.model.state_dict()} | dense_states(step, base)
        base.model.load_state_dict(soup(models))
        return base.model
    model = mixture_of(step, top_k)
    if what == "probabilities":
        return ProbabilityMixture(model, ProbabilitySettings(**step.settings["mix"]))
    if what == "tuned":
        from safetensors.torch import load_file

        model.load_state_dict(load_file(step.inputs["model"] / "model.safetensors"))
    return model


@step_kind("read", version=1)
def read(step: StepContext) -> dict[str, Any]:
    """A model's predictions of the windows. Inputs: windows, anchor, and those `model_of` needs.

    Settings: what; mix, of probabilities; enabled, owners on (null: all); splits; on, the sets to
    read (null: all); rarest, by which rows of heads moved (`untold_rows`), for the record.
    Leaves SPLIT.npz of log-probabilities; metrics: mean weights (routing) and fractions of
    tokens on which an expert ran (active) by set, [L][E].
    """
    model, settings = model_of(step), step.settings
    panels = panels_of(model)
    routing: dict[str, Any] = {}
    active: dict[str, Any] = {}
    for split in settings.get("splits", SPLITS):
        text = load_windows(step.inputs["windows"], split)
        chosen = settings.get("on") or list(text)
        with progress(
            f"{step.label}, {split}", sum(len(i) - 1 for n in chosen for i, _ in text[n]), "tok"
        ) as meter:
            found = {
                n: read_windows(
                    model, text[n], enabled=settings.get("enabled"), panels=panels, meter=meter
                )
                for n in chosen
            }
        Reading({n: f.log_probs for n, f in found.items()}).save(step.out / f"{split}.npz")
        if split == "heldout":
            routing = {n: f.routing for n, f in found.items() if f.routing is not None}
            active = {n: f.active for n, f in found.items() if f.active is not None}
    names = model.expert_names if isinstance(model, AnyMixture) else None
    return {"routing": routing, "active": active, "experts": names}


@step_kind("read_weighted_soup", version=1)
def read_weighted_soup(step: StepContext) -> dict[str, Any]:
    """A soup of its own for every window, weighted by how likely each model found its start.

    Inputs: windows, anchor, dense.SET, read.NAME (readings of the anchor and every dense model).
    Settings: prompt_tokens, temperature. Before the prompt is read, the mean soup speaks.
    """
    base, settings = anchor_of(step), step.settings
    states = {PUBLIC: base.model.state_dict()} | dense_states(step, base)
    states = {n: {k: t.clone() for k, t in s.items()} for n, s in states.items()}
    names, P = list(states), settings["prompt_tokens"]
    model = Transformer(base.config).to(base.model.device).requires_grad_(False).eval()
    for split in SPLITS:
        text = load_windows(step.inputs["windows"], split)
        readings = {n: load_reading(step.inputs[f"read.{n}"] / f"{split}.npz", text) for n in names}
        start = load_reading(step.inputs["read.mean"] / f"{split}.npz", text)
        found: dict[str, list[np.ndarray]] = {}
        total = sum(len(ids) - 1 for w in text.values() for ids, _ in w)
        with progress(step.label, total, "tok") as meter:
            for name, rows in text.items():
                found[name] = []
                for i, (ids, size) in enumerate(rows):
                    likelihood = np.array([readings[n].log_probs[name][i][:P].sum() for n in names])
                    weights = likelihood_weights(likelihood, settings["temperature"])
                    model.load_state_dict(
                        soup(states, dict(zip(names, weights.tolist(), strict=True)))
                    )
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
    base = anchor_of(step)
    model = (
        load_dense(base, step.inputs["model"] / "model.safetensors")
        if "model" in step.inputs
        else base.model
    )
    sampling = Sampling(
        max_new_tokens=step.settings["tokens"],
        temperature=1.0,
        top_p=1.0,
        seed=step.settings["seed"],
    )
    reader = OwnReader(model, base.tokenizer)
    rows = continue_ids(reader, [[] for _ in range(step.settings["count"])], sampling)
    save_arrays(
        step.out / "samples.npz",
        ids=np.concatenate([np.array(r, dtype=np.int64) for r in rows]),
        lengths=np.array([len(r) for r in rows]),
    )
    return {}


def load_samples(directory: Path) -> list[np.ndarray]:
    """The ids of each text that the step `samples` left."""
    with np.load(directory / "samples.npz", allow_pickle=False) as f:
        return np.split(f["ids"], np.cumsum(f["lengths"])[:-1])


def fit_prompt_classifier(
    written: Mapping[str, Sequence[np.ndarray]], tokenizer: Tokenizer, prompt_tokens: int
) -> TextClassifier:
    """Tells by a text's first tokens which of the models wrote it; of their samples by name."""
    return TextClassifier.fit(
        {
            name: [
                tokenizer.decode(row[i : i + prompt_tokens].tolist())
                for row in rows
                for i in range(0, len(row) - prompt_tokens + 1, prompt_tokens)
            ]
            for name, rows in written.items()
        }
    )
