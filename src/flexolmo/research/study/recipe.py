"""A study's recipe, and the graph of steps it asks for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.config import Settings
from flexolmo.data.corpus import digest_files
from flexolmo.model.probabilities import ProbabilitySettings
from flexolmo.model.router import DiscriminantSettings, RouterSettings
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.model.untold_rows import RAREST
from flexolmo.research.steps.step import Step
from flexolmo.research.study import (
    measure_steps,  # noqa: F401  (kinds of steps)
    read_steps,  # noqa: F401  (kinds of steps)
    text_steps,  # noqa: F401  (kinds of steps)
    train_steps,  # noqa: F401  (kinds of steps)
)
from flexolmo.research.study.strongest import READINGS, TRAININGS
from flexolmo.train.anchor import AnchorRecipe
from flexolmo.train.expert import ExpertRecipe
from flexolmo.train.loop import TrainSettings
from flexolmo.train.shrink import HEALING


class LowRankRecipe(Settings):
    """Our small experts: full ones cut to ranks, then trained on for a little."""

    rank: int = Field(44, ge=1, description="Rank of the FFN's deltas.")
    attention_rank: int = Field(52, ge=1, description="Rank of attention's deltas.")
    embedding_rank: int = Field(40, ge=1, description="Rank of the embedding's delta.")
    head_rank: int = Field(80, ge=1, description="Rank of the output head's delta.")
    has_half_deltas: bool = Field(True, description="True to keep the deltas in bfloat16.")
    train: TrainSettings = Field(HEALING, description="Training after the cut.")


class StudyRecipe(Settings):
    """Everything that decides a study."""

    seeds: tuple[int, ...] = Field(
        (0, 1, 2),
        min_length=1,
        description="Random seeds; the study of the first also has the ablations.",
    )
    owners: tuple[str, ...] = Field(
        ("academic", "code", "creative", "edu", "forum", "math", "news"),
        min_length=2,
        description="Owners, by the name of their set.",
    )
    vocab_size: int = Field(4096, ge=300, description="Entries of the tokenizer.")
    from_directory: str | None = Field(
        None,
        description="Directory of SET/*.jsonl.gz to read, "
        "public and every owner's, instead of packages.",
    )
    seq_len: int = Field(512, ge=64, description="Tokens of a window that is read.")
    heldout_bytes: int = Field(40_000, ge=1000, description="Bytes of each set to report on.")
    validation_bytes: int = Field(20_000, ge=1000, description="Bytes of each set to choose by.")
    heldout_mixed: int = Field(48, ge=1, description="Mixed documents to report on.")
    validation_mixed: int = Field(24, ge=1, description="Mixed documents to choose by.")
    anchor: AnchorRecipe = AnchorRecipe()
    train: TrainSettings = Field(
        TrainSettings(steps=160, batch_size=4, seq_len=512),
        description="Training of one owner's model, ours or a rival's.",
    )
    default: ExpertRecipe = Field(ExpertRecipe(), description="Our expert; its train is not used.")
    low_rank: LowRankRecipe = LowRankRecipe()
    top_k: int = Field(2, ge=1, description="Experts active per token, ours and rivals'.")
    tuning_steps: int = Field(60, ge=1, description="Steps of the paper's joint router tuning.")
    proxy_tokens: int = Field(40_000, ge=100, description="Public tokens in an owner's proxy.")
    samples: int = Field(
        96, ge=8, description="Texts each dense model writes for the prompt classifier."
    )
    has_ablations: bool = Field(True, description="True to run the ablations with the first seed.")
    has_strongest_paper: bool = Field(
        False,
        description="True to look, with the first seed, for the settings at which the paper's "
        "method is best.",
    )


@dataclass
class Graph:
    """The steps of a study by what they are for."""

    recipe: StudyRecipe
    scores: dict[int, Step] = field(default_factory=dict)  # by seed
    ablations: Step | None = None
    strongest_paper: Step | None = None

    @property
    def targets(self) -> list[Step]:
        """Steps to ask for, to have everything."""
        asides = (self.ablations, self.strongest_paper)
        return [*self.scores.values(), *(step for step in asides if step is not None)]


def build_graph(recipe: StudyRecipe) -> Graph:
    """All steps of a study. Text in a directory is read once, to know it from other text."""
    graph = Graph(recipe)
    source = describe_source(recipe)
    for seed in recipe.seeds:
        one = SeedSteps(recipe, seed, source)
        graph.scores[seed] = one.score()
        if recipe.has_ablations and seed == recipe.seeds[0]:
            graph.ablations = one.ablations()
        if recipe.has_strongest_paper and seed == recipe.seeds[0]:
            graph.strongest_paper = one.strongest_paper()
    return graph


def describe_source(recipe: StudyRecipe) -> dict[str, Any]:
    """The source of the text, as settings of the corpus step."""
    if not recipe.from_directory:
        return {"from_directory": None}
    directory = Path(recipe.from_directory).resolve()
    return {
        "from_directory": str(directory),
        "files": {n: digest_files(directory / n) for n in (PUBLIC, *recipe.owners)},
    }


class SeedSteps:
    """The steps of one seed."""

    def __init__(
        self,
        recipe: StudyRecipe,
        seed: int,
        source: Mapping[str, Any],
        anchor_name: str = "anchor",
        prefix: str = "",
    ):
        """`anchor_name` is the anchor's label; `prefix`, if given, begins the others'."""
        self.recipe, self.seed, self.owners = recipe, seed, list(recipe.owners)
        self.prefix = f"seed {seed}"
        sets = [PUBLIC, *self.owners]
        self.corpus = Step(
            "corpus", "corpus", {"sets": sets, **source, "vocab_size": recipe.vocab_size}
        )
        self.windows = Step(
            "windows",
            "windows",
            {
                "sets": sets,
                "seq_len": recipe.seq_len,
                "seed": 0,
                "bytes": {"heldout": recipe.heldout_bytes, "validation": recipe.validation_bytes},
                "mixed": {"heldout": recipe.heldout_mixed, "validation": recipe.validation_mixed},
            },
            {"corpus": self.corpus},
        )
        self.base: dict[str, Step] = {"corpus": self.corpus}
        self.anchor = self.step(
            anchor_name,
            "anchor",
            {"recipe": recipe.anchor.model_dump(mode="json", exclude={"seed"})},
        )
        self.base["anchor"] = self.anchor
        self.prefix = prefix or self.prefix
        self.dense = {
            n: self.step(
                f"dense {n}", "dense", {"set": n, "train": recipe.train.model_dump(mode="json")}
            )
            for n in self.owners
        }

    def step(
        self,
        label: str,
        kind: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, Step] | None = None,
    ) -> Step:
        return Step(
            f"{self.prefix}: {label}",
            kind,
            {**settings, "seed": self.seed},
            {**self.base, **(inputs or {})},
        )

    def experts(
        self,
        label: str,
        recipe: ExpertRecipe,
        rows: str | None = None,
        train: TrainSettings | None = None,
    ) -> dict[str, Step]:
        """One expert for each owner, trained as `train` says; none: as the study's recipe does."""
        ours = recipe.model_copy(update={"train": train or self.recipe.train})
        unread = {
            "ffn": {"attention_rank", "embedding_rank", "head_rank"},
            "ffn+head": {"attention_rank", "embedding_rank"},
            "all": set[str](),
        }[ours.scope]
        if not ours.has_half_deltas:
            unread = unread | {"has_half_deltas"}
        settings = {"recipe": ours.model_dump(mode="json", exclude={"seed"} | unread), "rows": rows}
        return {
            n: self.step(f"{label} {n}", "expert", {"set": n, **settings}, _embedder(rows))
            for n in self.owners
        }

    def compressed(
        self, label: str, experts: Mapping[str, Step], recipe: LowRankRecipe
    ) -> dict[str, Step]:
        """Full experts made small."""
        low = recipe.model_dump(mode="json")
        settings = {key: low.pop(key) for key in ("rank", "has_half_deltas", "train")}
        return {
            n: self.step(
                f"{label} {n}",
                "compressed",
                {"set": n, **settings, "delta_rank": low},
                {"expert": e},
            )
            for n, e in experts.items()
        }

    def rerouted(
        self, label: str, experts: Mapping[str, Step], router: RouterSettings
    ) -> dict[str, Step]:
        """Trained experts with another router."""
        return {
            n: self.step(
                f"{label} {n}",
                "rerouted",
                {"set": n, "router": router.model_dump(mode="json")},
                {"expert": e},
            )
            for n, e in experts.items()
        }

    def read(self, label: str, what: str, inputs: Mapping[str, Step], **settings: Any) -> Step:
        moved = {"rarest": RAREST} if any(_has_head(s) for s in inputs.values()) else {}
        return Step(
            f"{self.prefix}: read {label}",
            "read",
            {"what": what, **settings, **moved},
            {"windows": self.windows, **self.base, **inputs},
        )

    def read_mixture(self, label: str, experts: Mapping[str, Step], **settings: Any) -> Step:
        return self.read(
            label,
            "mixture",
            {f"expert.{n}": e for n, e in experts.items()} | _embedder(settings.get("rows")),
            **(settings | ({"seed": self.seed} if settings.get("rows") else {})),
        )

    def read_probabilities(self, experts: Mapping[str, Step]) -> Step:
        """Reading of held-out text by experts whose probabilities are mixed."""
        return self.read(
            "default, probabilities",
            "probabilities",
            {f"expert.{n}": e for n, e in experts.items()},
            mix=ProbabilitySettings().model_dump(),
            splits=["heldout"],
        )

    def pairs(self, label: str, experts: Mapping[str, Step]) -> dict[str, Step]:
        """Readings of each owner's own set by the anchor and its expert alone."""
        return {
            n: self.read(
                f"{label}, pair {n}", "mixture", {f"expert.{n}": experts[n]}, on=[n, PUBLIC]
            )
            for n in self.owners
        }

    def score(self) -> Step:
        """The main rows."""
        r, k = self.recipe, self.recipe.top_k
        default = self.experts("expert", r.default)
        paper = self.experts("paper expert", PAPER)
        low = self.compressed("low-rank expert", default, r.low_rank)
        dense = {f"dense.{n}": d for n, d in self.dense.items()}
        reads = {"dense.public": self.read("anchor", "anchor", {})}
        reads |= {
            f"dense.{n}": self.read(f"dense {n}", "dense", {"model": d})
            for n, d in self.dense.items()
        }
        reads["soup_mean"] = self.read("mean soup", "soup", dense, sets=self.owners)
        for prompt, warmth in product(SOUP_PROMPTS, SOUP_TEMPERATURES):
            reads[f"soup_weighted.{prompt}.{warmth}"] = Step(
                f"{self.prefix}: read weighted soup, {prompt} tokens, temperature {warmth}",
                "read_weighted_soup",
                {"prompt_tokens": prompt, "temperature": warmth, "sets": self.owners},
                {
                    "windows": self.windows,
                    **self.base,
                    **dense,
                    "read.mean": reads["soup_mean"],
                    **{f"read.{n}": reads[f"dense.{n}"] for n in [PUBLIC, *self.owners]},
                },
            )
        reads["flexolmo_default"] = self.read_mixture("default", default, top_k=k)
        reads["flexolmo_probabilities"] = self.read_probabilities(default)
        reads["flexolmo_all_active"] = self.read_mixture(
            "default, all active", default, splits=["heldout"]
        )
        reads["flexolmo_paper"] = self.read_mixture("paper", paper, top_k=k)
        reads["low_rank"] = self.read_mixture("low rank", low)
        for label, experts in (("default", default), ("low", low), ("paper", paper)):
            reads |= {f"pair.{label}.{n}": s for n, s in self.pairs(label, experts).items()}
        for n in self.owners:
            reads[f"pair_on_mixed.{n}"] = self.read(
                f"default, pair {n} on mixed documents",
                "mixture",
                {f"expert.{n}": default[n]},
                on=["mixed"],
                splits=["heldout"],
            )
        for n in self.owners:
            off = [m for m in self.owners if m != n]
            for label, experts in (("default", default), ("paper", paper)):
                reads[f"without.{label}.{n}"] = self.read_mixture(
                    f"{label} without {n}",
                    experts,
                    top_k=k,
                    enabled=off,
                    splits=["heldout"],
                    on=[PUBLIC, *self.owners],
                )
        reads |= self._rivals(paper, dense)
        samples = {
            f"samples.{n}": self.step(
                f"samples {n}",
                "samples",
                {"count": r.samples, "tokens": 128},
                {"model": self.dense[n]} if n in self.dense else {},
            )
            for n in [PUBLIC, *self.owners]
        }
        costs = {f"cost.default.{n}": e for n, e in default.items()}
        costs |= {f"cost.low.{n}": e for n, e in low.items()}
        return Step(
            f"{self.prefix}: score",
            "score",
            {
                "owners": self.owners,
                "top_k": k,
                "dume_scales": list(DUME_SCALES),
                "soup_prompts": list(SOUP_PROMPTS),
                "soup_temperatures": list(SOUP_TEMPERATURES),
                "train": r.train.model_dump(mode="json"),
            },
            {**self.base, "windows": self.windows, **reads, **samples, **costs},
        )

    def _rivals(self, paper: Mapping[str, Step], dense: Mapping[str, Step]) -> dict[str, Step]:
        r, k = self.recipe, self.recipe.top_k
        whole = r.train.steps * len(self.owners)
        reads = {}
        for name, steps in (("unrestricted_1x", whole // 2), ("unrestricted_2x", whole)):
            train = r.train.model_copy(update={"steps": steps})
            model = self.step(
                name,
                "unrestricted",
                {"sets": self.owners, "top_k": k, "train": train.model_dump(mode="json")},
            )
            reads[name] = self.read(name, "rival", {"model": model}, sets=self.owners, top_k=k)
        btx = self.step(
            "btx",
            "btx",
            {"sets": self.owners, "top_k": k, "train": r.train.model_dump(mode="json")},
            dense,
        )
        reads["btx"] = self.read("btx", "rival", {"model": btx}, sets=self.owners, top_k=k)
        for scale in DUME_SCALES:
            model = self.step(
                f"dume {scale}",
                "dume",
                {
                    "sets": self.owners,
                    "top_k": k,
                    "windows": 64,
                    "seq_len": r.train.seq_len,
                    "ridge": 0.01,
                    "scale": scale,
                },
                dense,
            )
            reads[f"dume.{scale}"] = self.read(
                f"dume {scale}", "rival", {"model": model}, sets=self.owners, top_k=k
            )
        proxies = {
            f"proxy.{n}": Step(
                f"proxy {n}", "proxy", {"set": n, "tokens": r.proxy_tokens}, {"corpus": self.corpus}
            )
            for n in self.owners
        }
        experts = {f"expert.{n}": e for n, e in paper.items()}
        tuning = r.train.model_copy(
            update={
                "steps": r.tuning_steps,
                "learning_rate": 2e-3,
                "warmup_steps": min(10, r.tuning_steps),
            }
        )
        tuned = self.step(
            "joint tuning",
            "tuned",
            {"sets": self.owners, "train": tuning.model_dump(mode="json")},
            experts | proxies,
        )
        reads["flexolmo_joint_tuned"] = self.read(
            "joint tuned", "tuned", {**experts, "model": tuned}, top_k=k
        )
        return reads

    def ablations(self) -> Step:
        """One change at a time; own figures in ablations.json."""
        k, paper = self.recipe.top_k, PAPER
        linear, default = paper.router.model_copy, self.recipe.default.model_copy
        variants: dict[str, dict[str, Step]] = {
            "paper": self.experts("paper expert", paper),
            "paper, no bias": self.experts(
                "no bias", paper.model_copy(update={"router": linear(update={"has_bias": False})})
            ),
            "paper, upstream's clamp": self.experts(
                "clamp", paper.model_copy(update={"router": linear(update={"bias_form": "clamp"})})
            ),
            "paper, random rows": self.experts("random rows", paper, "random"),
            "paper, a row per layer": self.experts("rows per layer", paper, "per_layer"),
            "paper, MiniLM rows": self.experts("MiniLM rows", paper, "minilm"),
            "paper, 10 % replay": self.experts(
                "replay 10", paper.model_copy(update={"replay": 0.1})
            ),
            "paper, 25 % replay": self.experts(
                "replay 25", paper.model_copy(update={"replay": 0.25})
            ),
            "default": self.experts("expert", self.recipe.default),
            "default, 10 % replay": self.experts(
                "default replay 10", default(update={"replay": 0.1})
            ),
            "default, 25 % replay": self.experts(
                "default replay 25", default(update={"replay": 0.25})
            ),
            "default, scope ffn": self.experts("scope ffn", default(update={"scope": "ffn"})),
            "default, scope ffn+head": self.experts(
                "scope ffn+head", default(update={"scope": "ffn+head"})
            ),
        }
        variants["paper, no coordination"] = {
            n: self.step(
                f"uncoordinated {n}",
                "uncoordinated",
                {
                    "set": n,
                    "tokens": self.recipe.train.tokens,
                    "recipe": paper.model_copy(update={"train": self.recipe.train}).model_dump(
                        mode="json", exclude={"seed"}
                    ),
                },
                {"dense": self.dense[n]},
            )
            for n in self.owners
        }
        variants |= {
            name: self.rerouted(name, variants["paper"], router)
            for name, router in REROUTED.items()
        }
        rows = {
            "paper, random rows": "random",
            "paper, a row per layer": "per_layer",
            "paper, MiniLM rows": "minilm",
        }
        reads = {
            name: self.read_mixture(
                f"ablation {name}", experts, top_k=k, rows=rows.get(name), splits=["heldout"]
            )
            for name, experts in variants.items()
        }
        for name in ("default", "paper"):
            for active in range(1, len(self.owners) + 2):
                row = f"{name}, top-{active}"
                reads[row] = self.read_mixture(
                    f"ablation {row}", variants[name], top_k=active, splits=["heldout"]
                )
        experts = {f"expert.{n}": e for n, e in variants["paper"].items()}
        for scale in DUME_SCALES:
            row = f"paper experts, ridge router (re-solved), scale {scale}"
            model = self.step(
                row,
                "ridge",
                {
                    "no_bias": True,
                    "windows": 64,
                    "seq_len": self.recipe.train.seq_len,
                    "ridge": 0.01,
                    "scale": scale,
                },
                experts,
            )
            reads[row] = self.read(
                f"ablation {row}",
                "tuned",
                {**experts, "model": model},
                top_k=k,
                no_bias=True,
                splits=["heldout"],
            )
        return self._score_rows("ablations", "ablation_score", reads)

    def strongest_paper(self) -> Step:
        """The paper's method in every form that `strongest` has; figures in strongest.json."""
        reads = {}
        for name, changed in TRAININGS.items():
            recipe = PAPER.model_validate(PAPER.model_dump() | changed.expert)
            base = self.recipe.train
            train = base.model_copy(
                update={
                    "learning_rate": base.learning_rate * changed.rate,
                    "steps": base.steps * changed.length,
                    **changed.train,
                }
            )
            experts = self.experts(f"paper, {name}:", recipe, changed.rows, train)
            for reading, settings in READINGS.items():
                rows = {"rows": changed.rows} if changed.rows else {}
                reads[f"{name}; {reading}"] = self.read_mixture(
                    f"paper, {name}; {reading}", experts, **settings, **rows
                )
        return self._score_rows("strongest paper", "strongest_score", reads)

    def _score_rows(self, label: str, kind: str, reads: Mapping[str, Step]) -> Step:
        """A step that measures `reads` against the dense models."""
        base = {"dense.public": self.read("anchor", "anchor", {})}
        base |= {
            f"dense.{n}": self.read(f"dense {n}", "dense", {"model": d})
            for n, d in self.dense.items()
        }
        return Step(
            f"{self.prefix}: {label}",
            kind,
            {"owners": self.owners},
            {
                **self.base,
                "windows": self.windows,
                **base,
                **{f"row.{n}": s for n, s in reads.items()},
            },
        )


def _has_head(step: Step) -> bool:
    """True if it makes an expert with a head of its own, some rows of which a mixture moves."""
    recipe = step.settings.get("recipe", {})
    return recipe.get("scope", "ffn") != "ffn" or any(
        _has_head(s) for role, s in step.inputs.items() if role == "expert"
    )


def _embedder(rows: str | None) -> dict[str, Step]:
    return {"embedder": Step("MiniLM", "embedder")} if rows == "minilm" else {}


SOUP_PROMPTS = (8, 16, 32, 64)  # tokens of a text that all models read before they are mixed
SOUP_TEMPERATURES = (1.0, 8.0, 32.0)  # of the posterior that weighs them
DUME_SCALES = (3, 10, 30)  # ridge targets are 0 and 1: a softmax of them would be nearly even
REROUTED: dict[str, RouterSettings] = {
    "paper experts, evidence router": EvidenceSettings(),
    "paper experts, Gaussian discriminant": DiscriminantSettings(),
    "paper experts, discriminant with context": DiscriminantSettings(has_context=True),
}
PAPER = ExpertRecipe.model_validate({"scope": "ffn", "router": {"kind": "linear"}})
