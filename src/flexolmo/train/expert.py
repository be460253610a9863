"""Training of one expert beside the frozen anchor, and its packing into a signed bundle.

Runs on the owner's machine with the anchor and the owner's prepared set, and nothing else: it
opens no connection and no other owner's file. Only the expert's own matrices and, for the linear
router, its rows and biases have gradients and optimizer state.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import safetensors
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from flexolmo.bundle.bundle import write_bundle
from flexolmo.bundle.manifest import PUBLIC, build_manifest, require_name
from flexolmo.bundle.serials import take_serial
from flexolmo.bundle.terms import Terms
from flexolmo.config import Settings
from flexolmo.data.batches import TokenSet, training_batches
from flexolmo.data.units import unit_offsets
from flexolmo.errors import CheckpointError, ConfigError
from flexolmo.files import read_json, save_tensors, work_aside, write_json
from flexolmo.model.assemble import anchor_matrix, assemble_mixture, expert_tensors
from flexolmo.model.checkpoint import Anchor, digest_tensors
from flexolmo.model.loss import language_model_loss
from flexolmo.model.moe import MixtureModel
from flexolmo.model.parallel import are_several, count, first_goes_on, refuse_several
from flexolmo.model.router import DiscriminantSettings, LinearSettings, RouterSettings
from flexolmo.model.shape import ExpertShape, architecture_of, expert_shapes, shape_of_tensors
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.model.transformer import ModelConfig
from flexolmo.runtime import run_record, set_up
from flexolmo.train.at_once import choose_group, in_groups
from flexolmo.train.blocks import arrange_blocks
from flexolmo.train.budget import PrivacySettings
from flexolmo.train.compress import prune_width
from flexolmo.train.dp_sgd import PrivateSteps
from flexolmo.train.first_router import refuse_other_tokenizers, start_router
from flexolmo.train.loop import (
    TOKEN_ROWS,
    Losses,
    TrainSettings,
    identity_of,
    in_parts,
    read_learnt,
    train,
)
from flexolmo.train.protect import in_units, protect, state_budget, windows_of_units
from flexolmo.train.rows import find_frequent_rows, find_open_rows, hide_rows, hold_rows

Scope = Literal["ffn", "ffn+head", "all"]
RECORDED = ("compressed", "healed", "budget")  # in a manifest, beside the recipe's settings


class ExpertRecipe(Settings):
    """Settings that, with the anchor and the data, decide an expert."""

    seed: int = Field(0, ge=0, description="Random seed of batch order and first values.")
    scope: Scope = Field(
        "all",
        description="Parts the owner may change: ffn (paper; exports to the "
        "stock format), ffn+head, or all: also attention and embedding (ours).",
    )
    width: int | None = Field(None, ge=1, description="Width of the FFN; none: the anchor's.")
    rank: int = Field(0, ge=0, description="Rank of the FFN's delta to the anchor's; 0: whole FFN.")
    attention_rank: int | None = Field(
        None,
        ge=1,
        description="Rank of attention's deltas, if in scope; none, or d_model and above: whole "
        "matrices.",
    )
    embedding_rank: int | None = Field(
        None, ge=1, description="Rank of the embedding's delta, likewise."
    )
    head_rank: int | None = Field(
        None, ge=1, description="Rank of the output head's delta, likewise."
    )
    has_half_deltas: bool = Field(
        False,
        description="True to keep low-rank deltas in bfloat16: half the bytes, and they are small "
        "beside the matrices they are added to.",
    )
    replay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Fraction of the sequences that are public text, which shows the expert what "
        "is not its owner's domain (ours).",
    )
    beside_anchor: bool | None = Field(
        None,
        description="True to train the expert beside the anchor, both weighed by the router at "
        "every token (paper); false: alone, as a whole model (ours). By default alone with scope "
        "all and the evidence router, else beside it.",
    )
    train: TrainSettings = TrainSettings(steps=240)
    router: RouterSettings = Field(
        EvidenceSettings(),
        description="Router that weighs the expert against public text; one for all of a mixture.",
    )
    privacy: PrivacySettings | None = Field(
        None,
        description="Differential privacy of all that the bundle tells of the text; none: none. "
        "train.batch_size is then the mean number of units that a step reads.",
    )

    @property
    def is_alone(self) -> bool:
        """True if the anchor takes no part in the training."""
        if self.beside_anchor is not None:
            return not self.beside_anchor
        return self.scope == "all" and isinstance(self.router, EvidenceSettings)

    @property
    def blocks(self) -> TrainSettings:
        """Settings by which blocks run. None is compiled in private training, which reads texts of
        many lengths."""
        return (
            self.train if self.privacy is None else self.train.model_copy(update={"compile": "off"})
        )

    @model_validator(mode="after")
    def _parts_agree(self) -> "ExpertRecipe":
        if self.rank and self.width is not None:
            raise ValueError(
                "an FFN is of a width of its own or a low-rank delta to the "
                "anchor's: give width or rank, not both"
            )
        if self.beside_anchor is False and not isinstance(self.router, EvidenceSettings):
            raise ValueError(
                f"a router of kind {self.router.kind} weighs experts in each layer, and an expert "
                "must be trained under it: leave beside_anchor=false out"
            )
        if self.scope != "ffn" and not isinstance(self.router, EvidenceSettings):
            raise ValueError(
                f"scope {self.scope} needs a router that decides once for all "
                f'layers, which {self.router.kind} does not: set scope = "ffn"'
            )
        return self

    @model_validator(mode="after")
    def _privacy_covers_all(self) -> "ExpertRecipe":
        """Refuse what would be worked out from the text outside the budget."""
        if self.privacy is None:
            return self
        if not isinstance(self.router, EvidenceSettings):
            raise ValueError(
                f"a router of kind {self.router.kind} begins with exact means of the text: private "
                "training needs router.kind evidence"
            )
        share = self.router.epsilon
        if share is None or share >= self.privacy.epsilon:
            raise ValueError(
                f"router.epsilon is {share}, and the table is part of what privacy.epsilon "
                f"{self.privacy.epsilon:g} covers: give it less, such as "
                f"router.epsilon={self.privacy.epsilon / 4:g}"
            )
        if self.width is not None:
            raise ValueError("a width is cut by reading the text exactly: give a rank")
        if self.replay:
            raise ValueError("replay is not for private training: set replay=0")
        if self.train.accumulate > 1:
            raise ValueError("private training reads one unit at a time: set train.accumulate=1")
        if self.train.compile == "on":
            raise ValueError(
                "private training reads texts of many lengths: leave train.compile out"
            )
        return self

    def shape(self, config: ModelConfig) -> ExpertShape:
        """The shape of an expert beside an anchor of this `config`."""
        D = config.d_model

        def rank(given: int | None, *scopes: Scope) -> int:
            return min(given or D, D) if self.scope in scopes else 0

        return ExpertShape(
            d_ff=self.width or config.d_ff,
            rank=self.rank,
            attention_rank=rank(self.attention_rank, "all"),
            embedding_rank=rank(self.embedding_rank, "all"),
            head_rank=rank(self.head_rank, "ffn+head", "all"),
        )


@dataclass(frozen=True)
class Expert:
    """A trained expert, not yet signed."""

    name: str
    anchor_digest: str
    router: RouterSettings
    tensors: dict[str, Tensor]  # see shape.expert_shapes
    record: dict[str, Any]
    data_card_digest: str  # see prepared.commit_card
    architecture: dict[str, int]  # see shape.architecture_of


def start_expert(
    anchor: Anchor,
    data: TokenSet,
    recipe: ExpertRecipe,
    public: TokenSet | None = None,
    run_dir: Path | None = None,
) -> dict[str, Tensor]:
    """Tensors of the expert before training: the anchor's own memory where it begins with that,
    deltas that add nothing, a router's.

    FFN of a width of its own: those columns of the anchor's that the owner's text uses most.
    Deltas: B zero, A drawn from a normal of deviation 1/sqrt(in).
    Router: see `start_router`. Source: §3.3.1.
    """
    config, router = anchor.config, recipe.router
    shape = recipe.shape(config)
    generator = torch.Generator().manual_seed(recipe.seed)
    dtype = anchor.model.embed_tokens.weight.dtype
    tensors: dict[str, Tensor] = {}
    for name, size in expert_shapes(config, shape, router).items():
        if name.endswith("lora_a"):
            drawn = torch.randn(size, generator=generator) / math.sqrt(size[1])
            tensors[name] = drawn.to(dtype)
        elif name.endswith("lora_b"):
            tensors[name] = torch.zeros(size, dtype=dtype)
        elif name.endswith(".weight"):
            base = anchor_matrix(anchor, name.removesuffix(".weight"))
            if base is not None:  # not a router's row
                tensors[name] = base.detach().cpu()
    if shape.d_ff != config.d_ff:
        tensors = prune_width(anchor, tensors, data, shape.d_ff)
    return tensors | start_router(anchor, data, router, public, run_dir, _offsets(data, recipe))


def _offsets(data: TokenSet, recipe: ExpertRecipe) -> np.ndarray:
    """Places of the texts that are protected as one, int64 [n + 1]: see `units.unit_offsets`."""
    if recipe.privacy is None:
        return data.splits["train"].source_offsets
    return unit_offsets(data, recipe.privacy.unit, recipe.train.seq_len)


def train_expert(
    anchor: Anchor,
    data: TokenSet,
    name: str,
    recipe: ExpertRecipe,
    run_dir: Path | None = None,
    num_threads: int | None = None,
    *,
    public: TokenSet | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> Expert:
    """Train one expert on the owner's text, beside the anchor or alone.

    With `run_dir`, resumes a run that was cut off there. `public` is the prepared public set, for
    replay and for the discriminant router. `start` are first values in place of `start_expert`'s;
    a private expert has none.
    Of several processes (see `model.parallel`) the first alone returns.
    Source: §3.3.1.
    """
    if recipe.privacy is not None or _draws_noise(recipe.router):
        refuse_several("Training with noise (privacy.epsilon, router.epsilon), drawn in secret,")
    if recipe.privacy is not None and start is not None:
        raise ConfigError(
            "Private training starts from the anchor: first values that were given may tell of the "
            "text outside its budget."
        )
    set_up(recipe.seed, num_threads, keeps_memory=not are_several())
    commitment = data.commitment  # refused before anything is trained
    pair, parameters, loss_of_step, private = prepare_training(
        anchor, data, name, recipe, public, start, run_dir
    )
    is_read = recipe.replay or isinstance(recipe.router, DiscriminantSettings)
    replayed = {PUBLIC: public.digest} if is_read and public is not None else {}
    digests = {data.name: data.digest, "anchor": anchor.digest, **replayed}
    record = run_record(recipe.model_dump(mode="json"), recipe.seed, digests)
    identity = identity_of(recipe, data=data.digest, anchor=anchor.digest, name=name, **replayed)
    label = f"expert {name}"
    record["is_compiled"] = arrange_blocks(pair, recipe.blocks, label)
    if recipe.privacy is not None and private is not None:
        router = cast(EvidenceSettings, recipe.router)
        record["budget"] = state_budget(private, recipe.privacy, recipe.train, router)
    identity |= {"is_compiled": True} if record["is_compiled"] else {}
    if private is not None:  # a run that was begun with other sampling may not go on as this one
        identity["sampling"] = record["budget"]["sampling"]
        # the group that was chosen counts, not the one asked for
        del identity["config"]["privacy"]["units_at_once"]
        if private.units_at_once > 1:
            identity["units_at_once"] = private.units_at_once
    if start is not None:
        identity["start"] = digest_tensors(start.items())
    if _draws_noise(recipe.router):
        table = {k: t for k, t in expert_tensors(pair, name).items() if k.startswith("router.")}
        identity["table"] = digest_tensors(table.items())
    result = train(
        parameters, loss_of_step, recipe.train, run_dir, label, identity, record, private
    )
    record |= {"tokens": result.tokens, "seconds": round(result.seconds, 1)}
    tensors = expert_tensors(pair, name)
    if are_several() and run_dir is not None:
        record["processes"] = count()
        first_goes_on()
        tensors |= read_learnt(run_dir)
    tensors |= hide_rows(anchor, tensors)  # a mixture moves rows of the head, see untold_rows
    return Expert(
        name,
        anchor.digest,
        recipe.router,
        pack_tensors(tensors, recipe),
        record,
        commitment,
        architecture_of(anchor.config, pair.shapes[name]),
    )


def _draws_noise(router: RouterSettings) -> bool:
    return isinstance(router, EvidenceSettings) and router.epsilon is not None


def prepare_training(
    anchor: Anchor,
    data: TokenSet,
    name: str,
    recipe: ExpertRecipe,
    public: TokenSet | None,
    start: Mapping[str, Tensor] | None = None,
    run_dir: Path | None = None,
) -> tuple[MixtureModel, dict[str, nn.Parameter], Callable[[int], Losses], PrivateSteps | None]:
    """The pair of anchor and new expert, the parameters that learn, the loss of a step, and how its
    gradient is protected."""
    require_name(name)
    refuse_other_tokenizers(anchor, data, public)
    anchor.config.refuse_longer(recipe.train.seq_len, "train.seq_len")
    first = start_expert(anchor, data, recipe, public, run_dir) if start is None else start
    pair = assemble_mixture(anchor, {name: first}, recipe.router)
    parameters = trainable_parameters(pair, name)
    for p in parameters.values():
        p.requires_grad_(True)
    router, privacy = recipe.router, recipe.privacy
    if isinstance(router, EvidenceSettings) and privacy is None:
        hold_rows(parameters, find_open_rows(first, data, router))

    pair.trains_alone = recipe.is_alone

    loss_of = expert_loss(pair, recipe)
    pair.train()
    if privacy is None:
        parts = in_parts(_batches(data, public, recipe), loss_of, recipe.train)
        return pair, parameters, parts, None
    private = protect(data, privacy, recipe.train, cast(EvidenceSettings, router))
    is_open = find_frequent_rows(first, anchor, cast(EvidenceSettings, router), privacy.row_share)
    closed = (~is_open).nonzero()[:, 0].to(pair.device)
    private.closed = {key: closed for key in parameters.keys() & set(TOKEN_ROWS)}
    windows = windows_of_units(data, privacy, recipe.train, private)
    learnt = sum(p.numel() for p in parameters.values())
    size = choose_group(pair, recipe.train, privacy.windows, learnt, privacy.units_at_once)
    private.units_at_once = size
    if size == 1:
        return pair, parameters, in_units(windows, loss_of), private
    several = in_groups(windows, size, privacy.windows, recipe.train, private, pair, parameters)
    return pair, parameters, several, private


def expert_loss(
    pair: MixtureModel, recipe: ExpertRecipe, chunk: int | None = None
) -> Callable[[Tensor], Tensor]:
    """Function from ids [B,T+1] to the loss that an expert in `pair` minimises; `chunk` as in
    `language_model_loss`."""
    learns = isinstance(recipe.router, LinearSettings)

    def loss_of(ids: Tensor) -> Tensor:
        logits: list[Tensor] = []  # of a router that learns, one [B,T,2] a layer
        loss = language_model_loss(pair, ids, chunk=chunk, router_logits=logits if learns else None)
        for z in logits:
            loss = loss + recipe.train.z_loss / len(logits) * z.logsumexp(-1).square().mean()
        return loss

    return loss_of


def pack_tensors(tensors: Mapping[str, Tensor], recipe: ExpertRecipe) -> dict[str, Tensor]:
    """The expert's tensors as a bundle will hold them, on the CPU; may share memory with
    `tensors`."""
    packed = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    if recipe.has_half_deltas:
        packed |= {n: t.bfloat16() for n, t in packed.items() if ".lora_" in n}
    return packed


def refuse_private(expert: Expert, what: str) -> None:
    """Raise ConfigError if the budget of `expert` is spent, as `what` would read the text again."""
    if "budget" in expert.record:
        raise ConfigError(
            f"Expert {expert.name} is private, and its budget is spent: {what} outside it. Choose "
            "before training, such as a rank or router.epsilon, and train again."
        )


def reroute_expert(
    expert: Expert,
    anchor: Anchor,
    data: TokenSet,
    router: RouterSettings,
    public: TokenSet | None = None,
) -> Expert:
    """A trained expert with another router in place of its own, made as before training.

    Its owner alone can do this, with `data` and, for the discriminant router, `public`. What the
    expert learnt it learnt under the old one. With an epsilon every call draws another table, and
    epsilons of tables that are given away add up. Raises ConfigError for a private expert.
    """
    refuse_private(expert, "another table of the text is")
    tensors = {n: t for n, t in expert.tensors.items() if "router." not in n}
    tensors |= start_router(anchor, data, router, public)
    if isinstance(router, EvidenceSettings):
        tensors |= hide_rows(anchor, tensors, find_open_rows(tensors, data, router))
    shape = shape_of_tensors({n: tuple(t.shape) for n, t in tensors.items()}, anchor.config)
    if not (shape.is_ffn_only or isinstance(router, EvidenceSettings)):
        raise ConfigError(
            f"{expert.name} changes more than the FFN, which needs a router that "
            f"decides once for all layers (kind evidence), not {router.kind}."
        )
    settings = {"router": router.model_dump(mode="json")}
    record = expert.record | {
        "config": expert.record["config"] | settings,
        "router_before": expert.router.model_dump(mode="json"),
    }
    return replace(
        expert,
        router=router,
        tensors=tensors,
        record=record,
        architecture=architecture_of(anchor.config, shape),
    )


def _batches(
    data: TokenSet, public: TokenSet | None, recipe: ExpertRecipe
) -> Callable[[int], np.ndarray]:
    """Function from a step to its batch, int64 [B,T+1], in which `recipe.replay` is public text."""
    settings = recipe.train
    size = settings.batch_size
    own = training_batches(data, "train", 1, settings.seq_len, recipe.seed)
    if not recipe.replay:
        whole = training_batches(data, "train", size, settings.seq_len, recipe.seed)
        return whole.batch
    if public is None:
        raise ConfigError(f"replay is {recipe.replay}: give the prepared public set to replay.")
    other = training_batches(public, "train", 1, settings.seq_len, recipe.seed)

    def public_before(place: int) -> int:
        return math.floor(place * recipe.replay + 1e-9)  # 0.29 of 100 is 29, not 28.999...

    def batch(step: int) -> np.ndarray:
        rows = []
        for place in range(step * size, (step + 1) * size):
            replayed = public_before(place)
            if public_before(place + 1) > replayed:
                rows.append(other.batch(replayed)[0])
            else:
                rows.append(own.batch(place - replayed)[0])
        return np.stack(rows)  # [B,T+1]

    return batch


def trainable_parameters(pair: MixtureModel, name: str) -> dict[str, nn.Parameter]:
    """Parameters of `pair` that learn: the expert's, but for an evidence router's statistics."""
    return {n: p for n, p in expert_tensors(pair, name).items() if isinstance(p, nn.Parameter)}


def save_expert(expert: Expert, run_dir: Path) -> None:
    """Write the trained expert, unsigned, into its run's directory."""
    save_tensors(run_dir / "expert.safetensors", expert.tensors, is_private=True)
    write_json(
        run_dir / "expert.json",
        {
            "name": expert.name,
            "anchor_digest": expert.anchor_digest,
            "router": expert.router.model_dump(mode="json"),
            "record": expert.record,
            "data_card_digest": expert.data_card_digest,
            "architecture": expert.architecture,
        },
        is_private=True,
    )


def load_expert(run_dir: Path) -> Expert:
    """The expert that `save_expert` wrote into `run_dir`; CheckpointError if there is none."""
    about = read_json(Path(run_dir) / "expert.json", CheckpointError)
    try:
        with safetensors.safe_open(Path(run_dir) / "expert.safetensors", framework="pt") as f:
            tensors = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
        recipe = ExpertRecipe.model_validate(about["record"]["config"])
        return Expert(
            about["name"],
            about["anchor_digest"],
            recipe.router,
            tensors,
            about["record"],
            about["data_card_digest"],
            about["architecture"],
        )
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as e:
        raise CheckpointError(f"{run_dir} holds no finished expert: {e}.") from None


def pack_expert(
    expert: Expert,
    path: Path,
    private_key: Path,
    *,
    owner: str,
    licence: str,
    terms: Terms,
    serial: int | None = None,
    passphrase: str | None = None,
) -> Path:
    """Sign the expert into a bundle at `path` (NAME.bundle) and return that path.

    Without a `serial` it gets the next one after those that this key has signed for `owner` and
    this name (see `flexolmo.bundle.serials`).

    The bundle holds the expert's tensors, its claims and the signature: no optimizer state, no
    anchor weights, no text, no file names of the owner's. For `passphrase` see
    `flexolmo.bundle.signing.read_private_key`.
    """
    path = Path(path)
    with work_aside(path) as around:
        weights = around / "expert.safetensors"
        save_tensors(weights, expert.tensors)
        manifest = build_manifest(
            weights,
            name=expert.name,
            owner=owner,
            anchor_digest=expert.anchor_digest,
            architecture=expert.architecture,
            router_kind=expert.router.kind,
            router_settings=expert.router.model_dump(mode="json"),
            recipe=copy.deepcopy(
                expert.record["config"]
                | {k: expert.record[k] for k in RECORDED if k in expert.record}
            ),
            tokens_seen=expert.record["tokens"],
            data_card_digest=expert.data_card_digest,
            serial=take_serial(private_key, owner, expert.name, serial),
            licence=licence,
            terms=terms,
            software=_versions(expert.record),
        )
        return write_bundle(path, weights, manifest, Path(private_key), passphrase=passphrase)


def _versions(record: Mapping[str, Any]) -> dict[str, str]:
    return {k: record["software"][k] for k in ("flexolmo", "torch", "safetensors")}
