"""A method of a finished study as a model that can be evaluated: ours, and the rivals.

Text-level rivals (weighted soup, prompt routing) choose a model for every text by its own start and
are not among them.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flexolmo.errors import ConfigError
from flexolmo.evaluation.readers import BtmReader, OwnReader, Reader
from flexolmo.files import digest_bytes, read_json
from flexolmo.inference.policy import choose_experts
from flexolmo.model.moe import MixtureModel
from flexolmo.study.inputs import anchor_of
from flexolmo.study.plan import StudyRecipe, build_graph
from flexolmo.study.reading import model_of
from flexolmo.study.step import Step, StepContext

BTM = "btm"
_CHOSEN_SCALE = "dume"
_NOT_MODELS = ("soup_weighted", "samples", "cost", "without", "pair_on_mixed", "windows", "corpus",
               "anchor")


def open_method(root: Path, method: str, *, seed: int | None = None, without: Iterable[str] = (),
                only: Iterable[str] | None = None) -> tuple[Reader, dict[str, Any]]:
    """A method of the study in `root`, and what it is; `seed` is the first of the study's if none.

    Names are those of results.json, `dense.NAME` and `pair.default.NAME`. What a method chose on
    validation text, it keeps: for held-out documents. Raises ConfigError for a method that there
    is not, PolicyError for an expert it does not hold.
    """
    try:
        recipe = StudyRecipe.model_validate(read_json(Path(root) / "results.json")["recipe"])
    except (KeyError, TypeError, ValidationError):
        raise ConfigError(f"{Path(root) / 'results.json'} is not of a study that this version "
                          "made; name the directory that flexolmo study wrote.") from None
    graph = build_graph(recipe)
    seed = recipe.seeds[0] if seed is None else seed
    if seed not in graph.scores:
        raise ConfigError(f"The study has no seed {seed}; it has "
                          f"{', '.join(map(str, graph.scores))}.")
    score = graph.scores[seed]
    score.result(root)
    chosen = read_json(score.directory(root) / "scores.json")["chosen_on_validation"]
    reads = {r: s for r, s in score.inputs.items() if r.split(".")[0] not in _NOT_MODELS}
    known = sorted({r for r in reads if not r.startswith("dume.")} | {BTM, _CHOSEN_SCALE})
    if method not in known:
        raise ConfigError(f"The study has no model called {method!r}; there are "
                          f"{', '.join(known)}.")
    about = {"kind": "study", "method": method, "seed": seed}
    if method == BTM:
        names = ["public", *recipe.owners]
        steps = [reads[f"dense.{n}"] for n in names]
        choose_experts([], without=without, only=only)
        temperature = chosen[BTM]["temperature (held-out)"]
        digest = digest_bytes("".join([*(s.identity for s in steps), str(temperature)]).encode())
        return (BtmReader([_open(s, root) for s in steps], temperature),
                about | {"temperature": temperature, "digest": digest})
    if method == _CHOSEN_SCALE:
        about["scale"] = int(chosen[_CHOSEN_SCALE]["scale (held-out)"])
        step = reads[f"dume.{about['scale']}"]
    else:
        step = reads[method]
    reader = _open(step, root)
    available = reader.model.expert_names[1:] if isinstance(reader.model, MixtureModel) else []
    enabled = sorted(choose_experts(available, without=without, only=only))
    if available:
        reader = replace(reader, enabled=enabled)
    return reader, about | {"digest": f"sha256:{step.identity}", "enabled": enabled}


def _open(step: Step, root: Path) -> OwnReader:
    """The model that a reading step read."""
    inputs = {role: s.directory(root) for role, s in step.inputs.items()}
    context = StepContext(step.label, dict(step.settings), inputs, step.directory(root))
    return OwnReader(model_of(context), anchor_of(context).tokenizer)
