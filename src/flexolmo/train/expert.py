"""Closed data in, signed bundle out: an owner trains one expert beside the frozen anchor.

Runs on the owner's machine with the anchor and the owner's prepared set, and nothing else: it
opens no connection and no other owner's file. Only the expert's FFN and, for the linear router,
its rows and biases have gradients and optimizer state.
"""

import copy
import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors.torch import save, save_file
from torch import Tensor, nn

from flexolmo.bundle.bundle import write_bundle
from flexolmo.bundle.manifest import Name, build_manifest
from flexolmo.data.batches import TokenSet, training_batches
from flexolmo.errors import CheckpointError, ConfigError
from flexolmo.files import read_json, write_aside, write_json
from flexolmo.model.assemble import assemble_mixture, expert_tensors
from flexolmo.model.checkpoint import FFN_PARTS, Anchor, mean_hidden_state
from flexolmo.model.moe import MixtureModel
from flexolmo.model.router import FIRST_RAW_BIAS, RouterSettings
from flexolmo.model.statistics import EvidenceSettings, owner_table
from flexolmo.model.transformer import language_model_loss
from flexolmo.runtime import run_record, set_up
from flexolmo.train.anchor import embedding_windows, identity_of
from flexolmo.train.loop import TrainSettings, train


class ExpertRecipe(BaseModel):
    """Everything that decides an expert, beside the anchor and the data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(0, ge=0, description="of batch order")
    train: TrainSettings = TrainSettings(steps=240)
    router: RouterSettings = Field(EvidenceSettings(), description="how the expert is weighed "
                                   "against public text; the same for all of one mixture")


@dataclass(frozen=True)
class Expert:
    """A trained expert, still at its owner's."""

    name: str
    anchor_digest: str
    router: RouterSettings
    tensors: dict[str, Tensor]  # see assemble.expert_shapes
    record: dict[str, Any]
    data_card_digest: str


def start_expert(anchor: Anchor, data: TokenSet, name: str, router: RouterSettings
                 ) -> dict[str, Tensor]:
    """The expert before training: the anchor's FFN, and the router's part for this owner.

    evidence: the table from the owner's token counts, final. linear: in every layer the same row,
    the mean hidden state over the owner's text, and a bias near -0.13. Source: §3.3.1-2.
    """
    weights = anchor.model.state_dict()
    tensors = {f"layers.{i}.{part}.weight": weights[f"layers.{i}.mlp.{part}.weight"].clone()
               for i in range(anchor.config.num_layers) for part in FFN_PARTS}
    split = data.splits["train"]
    if isinstance(router, EvidenceSettings):
        table = owner_table(split.tokens, split.offsets, anchor.public, router,
                            anchor.config.eos_token_id)
        tensors["router.evidence"] = torch.from_numpy(table)
        return tensors
    row = mean_hidden_state(anchor.model, embedding_windows(data, anchor.config))
    for i in range(anchor.config.num_layers):
        tensors[f"layers.{i}.router.weight"] = row[None].clone()
        if router.has_bias:
            tensors[f"layers.{i}.router.raw_bias"] = torch.full((1,), FIRST_RAW_BIAS)
    return tensors


def train_expert(anchor: Anchor, data: TokenSet, name: str, recipe: ExpertRecipe,
                 run_dir: Path | None = None, num_threads: int | None = None) -> Expert:
    """Train one expert to coordinate: a mixture of it and the public expert, on the owner's text.

    With `run_dir`, resumes a run that was cut off there. Source: §3.3.1.
    """
    _refuse_bad_name(name)
    set_up(recipe.seed, num_threads)
    pair = assemble_mixture(anchor, {name: start_expert(anchor, data, name, recipe.router)},
                            recipe.router)
    parameters = trainable_parameters(pair, name)
    for p in parameters.values():
        p.requires_grad_(True)
    record = run_record(recipe.model_dump(mode="json"), recipe.seed,
                        {data.name: data.digest, "anchor": anchor.digest})
    batches = training_batches(data, "train", recipe.train.batch_size, recipe.train.seq_len,
                               recipe.seed)

    def loss_of_step(step: int) -> Tensor:
        logits: list[Tensor] = []  # of the linear router, one [B,T,2] a layer
        loss = language_model_loss(pair, torch.from_numpy(batches.batch(step)),
                                   router_logits=logits)
        for z in logits:
            loss = loss + recipe.train.z_loss / len(logits) * z.logsumexp(-1).square().mean()
        return loss

    pair.train()
    result = train(parameters, loss_of_step, recipe.train, run_dir, f"expert {name}",
                   identity_of(recipe, data=data.digest, anchor=anchor.digest, name=name), record)
    record |= {"tokens": result.tokens, "seconds": round(result.seconds, 1)}
    tensors = {n: t.detach().clone() for n, t in expert_tensors(pair, name).items()}
    return Expert(name, anchor.digest, recipe.router, tensors, record, data.digest)


def _refuse_bad_name(name: str) -> None:
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError as e:
        raise ConfigError(f"{name!r} cannot name an expert: {e.errors()[0]['msg']}. Use lower-case "
                          "letters, digits, - and _, at most 64, starting with a letter or digit."
                          ) from None


def trainable_parameters(pair: MixtureModel, name: str) -> dict[str, nn.Parameter]:
    """What of `pair` learns: the expert's FFN, and a linear router's row and bias for it."""
    return {n: p for n, p in expert_tensors(pair, name).items()
            if isinstance(p, nn.Parameter) and n != "router.evidence"}


def save_expert(expert: Expert, run_dir: Path) -> None:
    """Write the trained expert into its run's directory; it is not signed and goes nowhere."""
    with write_aside(run_dir / "expert.safetensors") as aside:
        save_file(expert.tensors, aside)
    write_json(run_dir / "expert.json", {
        "name": expert.name, "anchor_digest": expert.anchor_digest,
        "router": expert.router.model_dump(mode="json"), "record": expert.record,
        "data_card_digest": expert.data_card_digest})


def load_expert(run_dir: Path) -> Expert:
    """The expert that `save_expert` left in `run_dir`."""
    about = read_json(Path(run_dir) / "expert.json", CheckpointError)
    try:
        with safetensors.safe_open(Path(run_dir) / "expert.safetensors", framework="pt") as f:
            tensors = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
        recipe = ExpertRecipe.model_validate(about["record"]["config"])
        return Expert(about["name"], about["anchor_digest"], recipe.router, tensors,
                      about["record"], about["data_card_digest"])
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as e:
        raise CheckpointError(f"{run_dir} holds no finished expert: {e}.") from None


def pack_expert(expert: Expert, path: Path, private_key: Path, *, owner: str, licence: str,
                terms: str, expires: datetime.date | None = None) -> Path:
    """Sign the expert into a bundle at `path` (NAME.bundle) and return that path.

    The bundle holds the expert's tensors, its claims and the signature: no optimizer state, no
    anchor weights, no text, no file names of the owner's.
    """
    weights = save({n: t.contiguous() for n, t in expert.tensors.items()})
    gate = expert.tensors["layers.0.gate_proj.weight"]
    manifest = build_manifest(
        weights,
        name=expert.name,
        owner=owner,
        anchor_digest=expert.anchor_digest,
        num_layers=1 + max(int(n.split(".")[1]) for n in expert.tensors if n.startswith("layers")),
        d_model=gate.shape[1],
        d_ff=gate.shape[0],
        router_kind=expert.router.kind,
        router_settings=expert.router.model_dump(mode="json"),
        recipe=copy.deepcopy(expert.record["config"]),
        tokens_seen=expert.record["tokens"],
        data_card_digest=expert.data_card_digest,
        licence=licence,
        terms_text=terms,
        terms_expire=expires,
        software=_versions(expert.record),
    )
    return write_bundle(Path(path), weights, manifest, Path(private_key))


def _versions(record: Mapping[str, Any]) -> dict[str, str]:
    return {k: record["software"][k] for k in ("flexolmo", "torch", "safetensors")}
