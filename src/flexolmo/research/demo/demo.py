"""The whole story on real text: owners train apart, a coordinator merges, a user switches.

    coordinator/    public text, the anchor, the owners' public keys, the measurements
    owners/NAME/    that owner's text, runs, private key, and the bundles it sends
    model/, model-paper/    the mixtures: our router, and the paper's
    owners/NAME/release/NAME.report/    the first owner's signed release report
    report.html, figures/, results.json, recipe.json
    steps/    a record of each command: what it was, seconds, digests of what it made

Every step is a `flexolmo` command in a process and directory of its own. Run again after a kill,
finished steps are skipped and the step that was cut off resumes.
"""

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import tomli_w
from pydantic import Field

from flexolmo.audit.membership import LEAST_TOKENS
from flexolmo.audit.texts import read_members
from flexolmo.bundle.facts import ExpertFacts
from flexolmo.bundle.manifest import PUBLIC
from flexolmo.bundle.release import PAGE_FILE, read_release
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.config import Settings
from flexolmo.data.batches import open_set
from flexolmo.data.documents import read_documents
from flexolmo.data.prepared import read_card
from flexolmo.errors import ConfigError, DataError, FlexOlmoError
from flexolmo.files import read_json, write_directory_aside, write_json
from flexolmo.inference.generate import generate
from flexolmo.inference.sampling import Sampling
from flexolmo.merge.mixture import LoadedMixture, load_mixture
from flexolmo.model.router import slot
from flexolmo.numbers import format_seconds
from flexolmo.research.corpora.sources import CLIENTS, SETS
from flexolmo.research.demo.report import write_report
from flexolmo.research.steps.command import command_step
from flexolmo.research.steps.graph import elapsed_seconds, run_graph
from flexolmo.research.steps.jobs import UNAVAILABLE, JobFailed
from flexolmo.research.steps.step import Step
from flexolmo.runtime import run_record
from flexolmo.terminal import echo
from flexolmo.train.anchor import AnchorRecipe
from flexolmo.train.expert import ExpertRecipe
from flexolmo.train.loop import TrainSettings

ROUTERS = {"evidence": "", "linear": "-paper"}  # router kind: suffix of its files
TERMS = "For this demonstration."
# Purposes that owners permit and prohibit, as options of `expert pack`, to show that these differ.
ANY_PURPOSE = "--purpose any"
PURPOSES = {"academic": "--purpose education --purpose general-research --prohibit commercial"}
# The demo's text is of packages: pages laid out with spaces, and many copies of one text.
PREPARE = "data prepare --min-bytes=200 --near-duplicates=0.7 --normalise --out prepared"
ATTACKED_OWNERS = 1  # each takes about twenty seconds
ATTACKED_TOKENS = 64  # at most, of a document: attacks take seconds
SCOPES = {"evidence": "all", "linear": "ffn"}  # what an owner trains; the paper's, the FFN alone


class DemoRecipe(Settings):
    """Everything that decides a demo."""

    seed: int = Field(
        0, ge=0, description="Random seed of the anchor, the experts and the samples."
    )
    sets: tuple[str, ...] = Field(
        ("code", "academic", "creative"),
        min_length=1,
        description="Owners, by the name of their set.",
    )
    vocab_size: int = Field(4096, ge=300, description="Entries of the tokenizer.")
    processes: int = Field(2, ge=1, description="Owners that train at once, one thread each.")
    evaluation_bytes: int = Field(50_000, ge=1000, description="Held-out text read of each set.")
    sample_tokens: int = Field(100, ge=1, description="Tokens of each sample continuation.")
    anchor: AnchorRecipe = AnchorRecipe()
    expert_train: TrainSettings = TrainSettings(steps=180)


def default_recipe() -> Path:
    """The recipe that comes with the package."""
    return Path(__file__).parents[2] / "recipes" / "demo.toml"


def run_demo(recipe: DemoRecipe, out: Path, sets: str | None = None) -> dict[str, Any]:
    """Run or resume the demo in `out`; returns what is in results.json."""
    everything = sets == "all"
    names = [s.strip() for s in sets.split(",")] if sets else list(recipe.sets)
    if everything:
        names = [s for s in SETS if s != PUBLIC]
    unknown = sorted(set(names) - (set(SETS) - {PUBLIC}))
    if unknown or len(set(names)) != len(names):
        raise ConfigError(
            f"Owners {', '.join(names)}: expected different names out of "
            f"{', '.join(s for s in SETS if s != 'public')}."
        )
    started = time.monotonic()
    demo = _Demo(recipe, Path(out), CLIENTS if everything else None)
    demo.gather(names)
    demo.train()
    demo.merge_measure_and_attack()
    results = demo.results(time.monotonic() - started)
    write_json(Path(out) / "results.json", results)
    write_report(results, Path(out))
    return results


class _Demo:
    def __init__(self, recipe: DemoRecipe, out: Path, clients: Sequence[str] | None):
        self.recipe, self.out, self.clients = recipe, out, clients
        self.names: list[str] = []
        self.skipped: dict[str, str] = {}
        self.coordinator = out / "coordinator"
        self.record = run_record(recipe.model_dump(mode="json"), recipe.seed, {})
        write_json(out / "recipe.json", recipe.model_dump(mode="json"))
        self.stages: dict[str, list[Step]] = {}

    def house(self, name: str) -> Path:
        """The directory of one owner."""
        return self.out / "owners" / name

    # --- stages ---------------------------------------------------------------------------------

    def stage(self, label: str, steps: Iterable[Step]) -> None:
        """Run those of `steps` that are not done; FlexOlmoError if one done before is damaged."""
        self.stages[label] = list(steps)
        if all(step.is_done(self.out) for step in self.stages[label]):
            echo(f"== {label}: done before, {format_seconds(self.seconds(label))}")
            for step in self.stages[label]:
                step.result(self.out)
        else:
            echo(f"== {label}")
            run_graph(self.stages[label], self.out, self.recipe.processes)

    def seconds(self, label: str) -> float:
        """Seconds that a stage took, whenever that was."""
        return elapsed_seconds(self.stages[label], self.out)

    def gather(self, names: Sequence[str]) -> None:
        """Text: public, which trains the tokenizer, and every owner's own."""

        def fetch(name: str, directory: str) -> Step:
            clients = f" --clients {','.join(self.clients)}" if self.clients else ""
            return command_step(
                f"fetch {name}",
                directory,
                f"data fetch --sets {name} --out corpus{clients}",
                makes=[f"corpus/{name}"],
                is_resumable=True,
            )

        public = fetch(PUBLIC, "coordinator")
        self.public = command_step(
            "prepare public",
            "coordinator",
            f"{PREPARE} corpus/public --vocab-size {self.recipe.vocab_size}",
            makes=["prepared/public"],
            after=[public],
        )
        fetched = {name: fetch(name, f"owners/{name}") for name in names}
        self.prepared = prepared = {
            name: command_step(
                f"prepare {name}",
                f"owners/{name}",
                f"{PREPARE} corpus/{name} --public ../../coordinator/prepared/public",
                makes=[f"prepared/{name}"],
                after=[fetched[name], self.public],
            )
            for name in names
        }
        try:
            self.stage("gather text", [public, self.public, *fetched.values(), *prepared.values()])
        except JobFailed as e:
            is_public_there = self.public.is_done(self.out)
            if set(e.codes.values()) != {UNAVAILABLE} or not is_public_there:
                raise
            self.skipped = {job.directory.name: job.last_words(lines=1) for job in e.codes}
            for name, reason in self.skipped.items():
                echo(f"{name}: skipped. {reason}\nRun the demo again when it can be had.")
        self.names = [name for name in names if name not in self.skipped]
        if not self.names:
            raise FlexOlmoError("No owner's text could be had; the reasons are above.")

    def train(self) -> None:
        """The anchor on public text; then every owner's key and experts."""
        recipe = self.recipe
        settings = recipe.anchor.model_dump(mode="json", exclude_none=True) | {"seed": recipe.seed}
        anchor = command_step(
            "anchor",
            "coordinator",
            "anchor train --data prepared/public --recipe anchor.toml "
            f"--threads {recipe.processes}",
            makes=["anchor", "anchor.run"],
            after=[self.public],
            files={"anchor.toml": tomli_w.dumps(settings)},
            is_resumable=True,
        )
        self.stage("train the anchor", [anchor])
        self.experts = {}
        for kind, suffix in ROUTERS.items():
            settings = {
                "seed": recipe.seed,
                "scope": SCOPES[kind],
                "router": {"kind": kind},
                "train": recipe.expert_train.model_dump(exclude_none=True),
            }
            for name in self.names:
                self.experts[name, suffix] = command_step(
                    f"expert {name}{suffix}",
                    f"owners/{name}",
                    f"expert train --anchor anchor --data prepared/{name} --name {name} "
                    f"--recipe expert{suffix}.toml --out expert{suffix}.run --threads 1",
                    makes=[f"expert{suffix}.run"],
                    after=[anchor, self.prepared[name]],
                    files={f"expert{suffix}.toml": tomli_w.dumps(settings)},
                    is_resumable=True,
                )
        if not all(step.is_done(self.out) for step in self.experts.values()):
            for name in self.names:  # each owner gets the published anchor, whole and fresh
                shutil.rmtree(self.house(name) / "anchor", ignore_errors=True)
                with write_directory_aside(self.house(name) / "anchor", "anchor.json") as aside:
                    shutil.copytree(self.coordinator / "anchor", aside, dirs_exist_ok=True)
        self.keys = {
            name: command_step(
                f"key {name}",
                f"owners/{name}",
                "expert key key.pem",
                makes=["key.pem", "key.pem.pub"],
            )
            for name in self.names
        }
        self.stage("train experts", [*self.keys.values(), *self.experts.values()])

    def merge_measure_and_attack(self) -> None:
        """Owners sign and attack their bundles; the coordinator checks, merges, and reads held-out
        text. All in one stage, so that fewer processors wait."""
        packs = {
            (name, suffix): command_step(
                f"pack {name}{suffix}",
                f"owners/{name}",
                f"expert pack expert{suffix}.run --key key.pem --owner '{owner_of(name)}' "
                f"--licence LicenseRef-Demo --terms '{TERMS}' {PURPOSES.get(name, ANY_PURPOSE)} "
                f"--out outbox{suffix}/{name}.bundle",
                makes=[f"outbox{suffix}"],
                after=[self.keys[name], expert],
                seconds=5.0,
            )
            for (name, suffix), expert in self.experts.items()
        }
        trusted = self.coordinator / "trusted"
        shutil.rmtree(trusted, ignore_errors=True)
        trusted.mkdir()
        for name in self.names:
            shutil.copy(self.house(name) / "key.pem.pub", trusted / f"{owner_of(name)}.pub")
        merges: list[Step] = []
        evaluations: list[Step] = []
        own = "".join(f" --data ../owners/{name}/prepared/{name}" for name in self.names)
        for suffix in ROUTERS.values():
            own_sets = "--own-sets " if suffix else ""  # what the report shows of the paper's
            bundles = [f"../owners/{n}/outbox{suffix}/{n}.bundle" for n in self.names]
            merge = command_step(
                f"merge{suffix}",
                "coordinator",
                f"mix build anchor {' '.join(bundles)} --trust trusted -o ../model{suffix}",
                makes=[f"../model{suffix}"],
                after=[packs[name, suffix] for name in self.names],
                seconds=5.0,
            )
            merges.append(merge)
            evaluations.append(
                command_step(
                    f"evaluate{suffix}",
                    "coordinator",
                    f"eval sets --model ../model{suffix} --data prepared/public{own} --trust "
                    f"trusted --max-bytes {self.recipe.evaluation_bytes} {own_sets}--threads 1 "
                    f"--out eval{suffix}",
                    makes=[f"eval{suffix}"],
                    after=[merge],
                    seconds=75.0,
                )
            )
        bundles = [f"../owners/{n}/outbox/{n}.bundle" for n in self.names]
        check = command_step(
            "check bundles",
            "coordinator",
            f"mix check {' '.join(bundles)} --anchor anchor --public prepared/public "
            f"--trust trusted --seed {self.recipe.seed} --out influence.json",
            makes=["influence.json"],
            after=[packs[name, ""] for name in self.names],
            seconds=50.0,
        )
        statistics = {
            name: command_step(
                f"audit {name}",
                f"owners/{name}",
                f"audit statistics outbox/{name}.bundle --anchor anchor --data prepared/{name} "
                f"--seed {self.recipe.seed} --out audit.json",
                makes=["audit.json"],
                after=[packs[name, ""]],
                seconds=15.0,
            )
            for name in self.names
        }
        reports = self._reports(merges[0], statistics)
        self.stage(
            "merge, measure and attack",
            [*packs.values(), *merges, *evaluations, check, *statistics.values(), *reports],
        )

    def _reports(self, merge: Step, statistics: Mapping[str, Step]) -> list[Step]:
        """Steps in which an owner attacks its expert in the mixture, and signs a release report;
        the first alone, so that it takes seconds."""
        steps: list[Step] = []
        for name in self.names[:ATTACKED_OWNERS]:
            attacks = {
                kind: command_step(
                    f"{kind} {name}",
                    f"owners/{name}",
                    f"audit {kind} --model ../../model --data prepared/{name} --expert {name} "
                    f"--only {name} --trust ../../coordinator/trusted {how} "
                    f"--seed {self.recipe.seed} --out audits/{kind}",
                    makes=[f"audits/{kind}"],
                    after=[merge],
                    seconds=20.0,
                )
                for kind, how in self._attacks(name).items()
            }
            given = "".join(f" --results audits/{kind}" for kind in attacks)
            report = command_step(
                f"report {name}",
                f"owners/{name}",
                f"audit report outbox/{name}.bundle --data prepared/{name} --key key.pem{given} "
                "--results audit.json --public ../../coordinator/prepared/public "
                f"--out release/{name}.report --stays audits/report",
                makes=["release", "audits/report"],
                after=[*attacks.values(), statistics[name], self.public],
                seconds=10.0,
            )
            steps += [*attacks.values(), report]
        return steps

    def _attacks(self, name: str) -> dict[str, str]:
        """Options of attacks that read the beginnings of documents, by attack; none if a short
        training read no document's beginning."""
        train = self.recipe.expert_train
        tokens = max(LEAST_TOKENS, min(ATTACKED_TOKENS, train.seq_len // 4))
        recipe = ExpertRecipe(seed=self.recipe.seed, train=train)
        data = open_set(self.house(name) / "prepared" / name)
        try:
            read_members(data, recipe, least=tokens, length=tokens, most=1, seed=0)
        except DataError as e:
            echo(f"{name} is not attacked: {e}")
            return {}
        half = tokens // 2
        return {
            "membership": f"--max-documents 100 --max-tokens {tokens}",
            "extraction": f"--max-documents 16 --samples 2 --prefix-tokens {half} "
            f"--continuation-tokens {tokens - half}",
        }

    # --- what came of it ------------------------------------------------------------------------

    def results(self, seconds: float) -> dict[str, Any]:
        """Everything the report shows, as one JSON value."""
        ours, paper = (
            read_json(self.coordinator / f"eval{suffix}" / "results.json")
            for suffix in ROUTERS.values()
        )
        anchor = read_json(self.coordinator / "anchor" / "anchor.json")
        trusted = TrustedOwners.load(self.coordinator / "trusted")
        mixture = load_mixture(self.out / "model", trusted)
        stage_seconds = {stage: round(self.seconds(stage), 1) for stage in self.stages}
        sets = {PUBLIC: self.coordinator / "prepared/public"}
        sets |= {n: self.house(n) / "prepared" / n for n in self.names}
        return {
            "bits_per_byte": ours["bits_per_byte"],
            "summary": ours["summary"],
            "routing": ours["routing"],
            "paper_router": {k: paper[k] for k in ("bits_per_byte", "summary", "routing")},
            "influence": read_json(self.coordinator / "influence.json"),
            "statistics_attack": {n: read_json(self.house(n) / "audit.json") for n in self.names},
            "release": {n: self._release(n) for n in self.names[:ATTACKED_OWNERS]},
            "owners": [self._owner(n, mixture.facts[n]) for n in self.names],
            "anchor": {
                "parameters": sum(
                    p.numel()
                    for n, p in mixture.model.named_parameters()
                    if not n.startswith("router.")
                    and not any(f".{slot(e)}." in n for e in self.names)
                ),
                "digest": anchor["digest"],
                "tokens": anchor["record"]["tokens"],
                "seconds": anchor["record"]["seconds"],
                "config": mixture.model.config.model_dump(),
            },
            "samples": self._samples(mixture),
            "seconds": {
                **stage_seconds,
                "total": round(sum(stage_seconds.values()), 1),
                "this run": round(seconds, 1),
            },
            "skipped": self.skipped,
            "seed": self.recipe.seed,
            "recipe": self.recipe.model_dump(mode="json"),
            "versions": self.record["software"],
            "commit": self.record["commit"],
            "machine": self.record["machine"],
            "started": self.record["started"],
            "digests": {
                "anchor": anchor["digest"],
                **{f"set {n}": open_set(d).digest for n, d in sets.items()},
                **{
                    f"bundle {n}": e["files"]["expert.safetensors"]
                    for n, e in mixture.about["experts"].items()
                },
            },
        }

    def _release(self, name: str) -> dict[str, Any]:
        """The attacks in an owner's release report, and where its page is."""
        directory = self.house(name) / "release" / f"{name}.report"
        found = read_release(directory).report.findings
        attacks = cast(list[dict[str, Any]], found["attacks"])
        kept = ("audit", "question", "level", "verdict", "headline", "off_equals_anchor")
        return {
            "page": str((directory / PAGE_FILE).relative_to(self.out)),
            "has_guarantee": cast(dict[str, Any], found["guarantee"])["budget"] is not None,
            "attacks": [{k: attack[k] for k in kept} for attack in attacks],
            "not_made": found["not_made"],
        }

    def _owner(self, name: str, facts: ExpertFacts) -> dict[str, Any]:
        card = read_card(self.house(name) / "prepared" / name)
        bundle = self.house(name) / "outbox" / f"{name}.bundle"
        expert = read_json(self.house(name) / "expert.run/expert.json")
        return {
            "name": name,
            "owner": owner_of(name),
            "set_description": SETS[name].description,
            "documents": card["splits"]["train"]["documents"],
            "tokens": card["splits"]["train"]["tokens"],
            "tokens_seen": expert["record"]["tokens"],
            "seconds": expert["record"]["seconds"],
            "licence": facts.licence,
            "terms": f"{facts.terms.text} ({facts.terms.summary()})",
            "bundle_bytes": sum(f.stat().st_size for f in bundle.iterdir()),
            "key_id": facts.key_id,
            "sources": [s["source"] for s in card["sources"]],
        }

    def _samples(self, mixture: LoadedMixture) -> list[dict[str, str]]:
        samples = []
        sampling = Sampling(
            max_new_tokens=self.recipe.sample_tokens, temperature=0.7, seed=self.recipe.seed
        )
        for name in self.names:
            prepared = self.house(name) / "prepared" / name
            document = next(iter(read_documents(prepared / "heldout.jsonl.zst")))
            prompt = document.text[:200].rsplit(" ", 1)[0]
            with_it, without = generate(
                mixture, [prompt, prompt], without=[[], [name]], sampling=sampling
            )
            samples.append({"source": name, "prompt": prompt, "with": with_it, "without": without})
        return samples


def owner_of(name: str) -> str:
    """Name of a set's owner in the demo."""
    return f"{name.capitalize()} House"
