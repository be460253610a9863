"""The whole story on real text: owners train apart, a coordinator merges, a user switches.

    coordinator/    public text, the anchor, the owners' public keys, the measurements
    owners/NAME/    that owner's text, runs, private key, and the bundles it sends
    model/, model-paper/    the mixtures: our router, and the paper's
    report.html, figures/, results.json, recipe.json, stages.json

Every step is a `flexolmo` command in a process and directory of its own. Run again after a kill,
finished steps are skipped and the step that was cut off resumes.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ConfigDict, Field

from flexolmo.bundle.bundle import inspect_bundle
from flexolmo.bundle.signing import TrustedOwners
from flexolmo.data.batches import open_set
from flexolmo.data.documents import read_documents
from flexolmo.data.prepare import read_card
from flexolmo.errors import ConfigError, FlexOlmoError
from flexolmo.files import (
    canonical_json,
    digest_bytes,
    read_json,
    write_bytes,
    write_directory_aside,
    write_json,
)
from flexolmo.inference.decode import Sampling
from flexolmo.inference.generate import generate
from flexolmo.merge.mixture import LoadedMixture, load_mixture
from flexolmo.model.router import slot
from flexolmo.numbers import format_seconds
from flexolmo.research.corpora.sources import CLIENTS, SETS
from flexolmo.research.demo.report import write_report
from flexolmo.research.steps.jobs import UNAVAILABLE, Job, JobFailed, run_jobs
from flexolmo.runtime import run_record
from flexolmo.terminal import echo
from flexolmo.train.anchor import AnchorRecipe
from flexolmo.train.loop import TrainSettings

ROUTERS = {"evidence": "", "linear": "-paper"}  # router kind: suffix of its files
# The demo's text is of packages: pages laid out with spaces, and many copies of one text.
PREPARE = (
    "data",
    "prepare",
    "--replace",
    "--min-bytes=200",
    "--near-duplicates=0.7",
    "--normalise",
)
SCOPES = {"evidence": "all", "linear": "ffn"}  # what an owner trains; the paper's, the FFN alone


class DemoRecipe(BaseModel):
    """Everything that decides a demo."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(0, ge=0, description="random seed of the anchor, the experts and the samples")
    sets: tuple[str, ...] = Field(
        ("code", "academic", "creative"),
        min_length=1,
        description="owners, by the name of their set",
    )
    vocab_size: int = Field(4096, ge=300, description="entries of the tokenizer")
    processes: int = Field(2, ge=1, description="owners that train at once, one thread each")
    evaluation_bytes: int = Field(50_000, ge=1000, description="held-out text read of each set")
    sample_tokens: int = Field(100, ge=1, description="tokens of each sample continuation")
    anchor: AnchorRecipe = AnchorRecipe()
    expert_train: TrainSettings = TrainSettings(steps=180)


def default_recipe() -> Path:
    """The recipe that comes with the package."""
    return Path(__file__).parents[2] / "recipes" / "demo.toml"


def run_demo(recipe: DemoRecipe, out: Path, sets: str | None = None) -> dict[str, Any]:
    """Run or resume the demo in `out`; returns what is in results.json."""
    everything = sets == "all"
    names = (
        [s for s in SETS if s != "public"]
        if everything
        else [s.strip() for s in sets.split(",")]
        if sets
        else list(recipe.sets)
    )
    unknown = sorted(set(names) - (set(SETS) - {"public"}))
    if unknown or len(set(names)) != len(names):
        raise ConfigError(
            f"Owners {', '.join(names)}: expected different names out of "
            f"{', '.join(s for s in SETS if s != 'public')}."
        )
    started = time.monotonic()
    demo = _Demo(recipe, Path(out), CLIENTS if everything else None)
    demo.gather(names)
    demo.train()
    demo.merge_and_measure()
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
        self.stages: dict[str, Any] = {}
        if (out / "stages.json").exists():
            self.stages = read_json(out / "stages.json", FlexOlmoError)

    def house(self, name: str) -> Path:
        """The directory of one owner."""
        return self.out / "owners" / name

    # --- steps ----------------------------------------------------------------------------------

    def step(self, label: str, after: Sequence[str], settings: Any, run: Callable[[], Any]) -> None:
        """Run a step unless it was finished with these settings `after` these steps."""
        identity = digest_bytes(
            canonical_json([settings, [self.stages[earlier]["identity"] for earlier in after]])
        )
        done = self.stages.get(label, {})
        if done.get("identity") == identity and done.get("finished"):
            echo(f"== {label}: done before, {format_seconds(done['seconds'])}")
            return
        if done and done.get("identity") != identity:
            self._clear(label)
        echo(f"== {label}")
        spent = done.get("seconds", 0.0) if done.get("identity") == identity else 0.0
        start = time.monotonic()

        def note(finished: bool) -> None:
            self.stages[label] = {
                "identity": identity,
                "finished": finished,
                "seconds": spent + time.monotonic() - start,
            }
            write_json(self.out / "stages.json", self.stages)

        note(finished=False)  # so that after a kill the next run knows what was under way
        try:
            run()
        except BaseException:
            note(finished=False)
            raise
        note(finished=True)

    def _clear(self, label: str) -> None:
        """Remove what an earlier run with another recipe left of this step."""
        for path in {
            "train the anchor": [self.coordinator / "anchor", self.coordinator / "anchor.run"],
            "sign and merge": [
                *self.out.glob("owners/*/outbox*"),
                *(self.out / f"model{s}" for s in ROUTERS.values()),
            ],
            "measure": [self.coordinator / f"eval{s}" for s in ROUTERS.values()],
        }.get(label, []):
            shutil.rmtree(path, ignore_errors=True)

    def gather(self, names: Sequence[str]) -> None:
        """Text: public first, for it trains the tokenizer; then every owner's own."""
        settings = {"vocab_size": self.recipe.vocab_size, "clients": self.clients}

        def fetch(name: str, directory: Path) -> Job:
            clients = f" --clients {','.join(self.clients)}" if self.clients else ""
            command = f"data fetch --sets {name} --out corpus{clients}"
            return _job(f"fetch {name}", directory, command)

        def public() -> None:
            run_jobs([fetch("public", self.coordinator)], 1)
            size = self.recipe.vocab_size
            command = f"data prepare corpus/public --out prepared --vocab-size {size}"
            run_jobs([_job("prepare public", self.coordinator, command)], 1)

        def owners() -> None:
            for name in names:
                (self.house(name) / "skipped.json").unlink(missing_ok=True)
                try:
                    run_jobs([fetch(name, self.house(name))], 1)
                except JobFailed as e:
                    if e.code != UNAVAILABLE:
                        raise
                    echo(
                        f"{name}: skipped. {e}\nWhen it can be had, run the demo into another "
                        "directory (--out)."
                    )
                    write_json(self.house(name) / "skipped.json", str(e).splitlines()[-1])
            public_set = (self.coordinator / "prepared/public").resolve()
            run_jobs(
                [
                    _job(
                        f"prepare {name}",
                        self.house(name),
                        f"data prepare corpus/{name} --out prepared --public {{}}",
                        public_set,
                    )
                    for name in names
                    if not (self.house(name) / "skipped.json").exists()
                ],
                self.recipe.processes,
            )

        self.step("gather public text", (), settings, public)
        self.step("gather owners' text", ("gather public text",), sorted(names), owners)
        self.names = [n for n in names if not (self.house(n) / "skipped.json").exists()]
        self.skipped = {
            n: read_json(self.house(n) / "skipped.json") for n in names if n not in self.names
        }
        if not self.names:
            raise FlexOlmoError("No owner's text could be had; the reasons are above.")

    def train(self) -> None:
        """The anchor on public text; then every owner's experts, two owners at a time."""
        recipe = self.recipe

        def anchor() -> None:
            write_toml(
                self.coordinator / "anchor.toml",
                recipe.anchor.model_dump(mode="json", exclude_none=True) | {"seed": recipe.seed},
            )
            command = "anchor train --data prepared/public --recipe anchor.toml --threads"
            run_jobs([_job("anchor", self.coordinator, f"{command} {recipe.processes}")], 1)

        def experts() -> None:
            for name in self.names:  # each owner gets the published anchor, whole and fresh
                shutil.rmtree(self.house(name) / "anchor", ignore_errors=True)
                with write_directory_aside(self.house(name) / "anchor", "anchor.json") as aside:
                    shutil.copytree(self.coordinator / "anchor", aside, dirs_exist_ok=True)
            jobs = []
            for kind, suffix in ROUTERS.items():
                for name in self.names:
                    house = self.house(name)
                    write_toml(
                        house / f"expert{suffix}.toml",
                        {
                            "seed": recipe.seed,
                            "scope": SCOPES[kind],
                            "router": {"kind": kind},
                            "train": recipe.expert_train.model_dump(exclude_none=True),
                        },
                    )
                    command = (
                        f"expert train --anchor anchor --data prepared/{name} --name {name} "
                        f"--recipe expert{suffix}.toml --out expert{suffix}.run --threads 1"
                    )
                    if not self._is_trained(name, suffix):
                        jobs.append(_job(f"expert {name}{suffix}", house, command))
            run_jobs(jobs, recipe.processes)

        card = read_card(self.coordinator / "prepared/public")
        self.step(
            "train the anchor",
            ("gather public text",),
            [recipe.anchor.model_dump(mode="json"), recipe.seed, card["files"]],
            anchor,
        )
        self.step(
            "train experts",
            ("train the anchor", "gather owners' text"),
            [recipe.expert_train.model_dump(mode="json"), self.names],
            experts,
        )

    def _is_trained(self, name: str, suffix: str) -> bool:
        """Whether the expert is there; removes a run with another recipe, anchor or text."""
        house = self.house(name)
        run = house / f"expert{suffix}.run"
        wanted = digest_bytes(
            b"".join(
                p.read_bytes()
                for p in (
                    house / f"expert{suffix}.toml",
                    house / "anchor/anchor.json",
                    house / "prepared" / name / "card.json",
                )
            )
        )
        mark = house / f"expert{suffix}.wanted.json"
        if not mark.exists() or read_json(mark) != wanted:
            shutil.rmtree(run, ignore_errors=True)
            write_json(mark, wanted)
        return (run / "expert.json").exists()

    def merge_and_measure(self) -> None:
        """Owners sign; the coordinator checks, merges, and reads held-out text."""

        def merge() -> None:
            trusted = self.coordinator / "trusted"
            shutil.rmtree(trusted, ignore_errors=True)
            trusted.mkdir(parents=True)
            keyless = [
                n
                for n in self.names
                if not all((self.house(n) / half).exists() for half in ("key.pem", "key.pem.pub"))
            ]
            for name in keyless:
                for half in ("key.pem", "key.pem.pub"):  # a kill may have left one
                    (self.house(name) / half).unlink(missing_ok=True)
            run_jobs(
                [_job(f"key {n}", self.house(n), "expert key key.pem") for n in keyless],
                self.recipe.processes,
            )
            packs, merges = [], []
            for name in self.names:
                shutil.copy(self.house(name) / "key.pem.pub", trusted / f"{owner_of(name)}.pub")
            for suffix in ROUTERS.values():
                bundles = [self.house(n) / f"outbox{suffix}" / f"{n}.bundle" for n in self.names]
                for name, bundle in zip(self.names, bundles, strict=True):
                    shutil.rmtree(bundle, ignore_errors=True)
                    bundle.parent.mkdir(exist_ok=True)
                    packs.append(
                        _job(
                            f"pack {name}{suffix}",
                            self.house(name),
                            f"expert pack expert{suffix}.run --key key.pem --owner {{}} --licence "
                            f"LicenseRef-Demo --terms {{}} --out outbox{suffix}/{name}.bundle",
                            owner_of(name),
                            "For this demonstration.",
                        )
                    )
                merges.append(
                    _job(
                        f"merge{suffix}",
                        self.coordinator,
                        f"mix build anchor {'{} ' * len(bundles)} --trust trusted -o {{}}",
                        *(bundle.resolve() for bundle in bundles),
                        (self.out / f"model{suffix}").resolve(),
                    )
                )
            run_jobs(packs, self.recipe.processes)
            run_jobs(merges, self.recipe.processes)

        def measure() -> None:
            data = [
                self.coordinator / "prepared/public",
                *(self.house(n) / "prepared" / n for n in self.names),
            ]
            command = (
                f"eval sets --model {{}} {'--data {} ' * len(data)} --trust trusted "
                f"--max-bytes {self.recipe.evaluation_bytes} --threads 1 --out eval"
            )
            run_jobs(
                [
                    _job(
                        f"evaluate{suffix}",
                        self.coordinator,
                        f"{command}{suffix}",
                        (self.out / f"model{suffix}").resolve(),
                        *(directory.resolve() for directory in data),
                    )
                    for suffix in ROUTERS.values()
                ],
                self.recipe.processes,
            )

        self.step("sign and merge", ("train experts",), self.names, merge)
        self.step("measure", ("sign and merge",), self.recipe.evaluation_bytes, measure)

    # --- what came of it ------------------------------------------------------------------------

    def results(self, seconds: float) -> dict[str, Any]:
        """Everything the report shows, as one JSON value."""
        ours, paper = (
            read_json(self.coordinator / f"eval{suffix}" / "results.json")
            for suffix in ROUTERS.values()
        )
        anchor = json.loads((self.coordinator / "anchor/anchor.json").read_text())
        trusted = TrustedOwners.load(self.coordinator / "trusted")
        mixture = load_mixture(self.out / "model", trusted)
        stage_seconds = {k: round(v["seconds"], 1) for k, v in self.stages.items()}
        sets = {"public": self.coordinator / "prepared/public"}
        sets |= {n: self.house(n) / "prepared" / n for n in self.names}
        return {
            "bits_per_byte": ours["bits_per_byte"],
            "summary": ours["summary"],
            "routing": ours["routing"],
            "paper_router": {k: paper[k] for k in ("bits_per_byte", "summary", "routing")},
            "owners": [self._owner(n) for n in self.names],
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

    def _owner(self, name: str) -> dict[str, Any]:
        card = read_card(self.house(name) / "prepared" / name)
        bundle = self.house(name) / "outbox" / f"{name}.bundle"
        claims = inspect_bundle(bundle)
        expert = read_json(self.house(name) / "expert.run/expert.json")
        return {
            "name": name,
            "owner": owner_of(name),
            "set_description": SETS[name].description,
            "documents": card["splits"]["train"]["documents"],
            "tokens": card["splits"]["train"]["tokens"],
            "tokens_seen": expert["record"]["tokens"],
            "seconds": expert["record"]["seconds"],
            "licence": claims["claims"]["licence"],
            "terms": claims["claims"]["terms"]["text"],
            "bundle_bytes": sum(f.stat().st_size for f in bundle.iterdir()),
            "key_id": claims["key_id"],
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


def _job(label: str, directory: Path, command: str, *values: str | Path) -> Job:
    """A `flexolmo` command in `directory`; its words, each {} being the next of `values`."""
    following = iter(values)
    words = (str(next(following)) if word == "{}" else word for word in command.split())
    return Job(label, tuple(words), directory)


def owner_of(name: str) -> str:
    """Name of a set's owner in the demo."""
    return f"{name.capitalize()} House"


def write_toml(path: Path, values: Mapping[str, Any]) -> None:
    """Write a recipe's settings as TOML."""
    write_bytes(path, tomli_w.dumps(values).encode())
