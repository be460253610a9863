"""Train an owner's experts with and without privacy, attack each, and write results.json.

    python docs/privacy/measure.py STUDY forum OUT --models expert,dense,three_epochs,control
    python docs/privacy/measure.py STUDY forum OUT --models epsilon_8 --batch-size 400

STUDY is the directory of a study whose anchor of seed 0 is trained (`flexolmo study`), the owner
one of its sets. Everything is made by the commands that an owner would use, on one thread, but for
the dense model, which is a rival's. What is done is kept in OUT and not done again. Run it for
several models at a time in as many shells, then once more with all of them.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from flexolmo.audit.extraction import ExtractionSettings, audit_extraction
from flexolmo.audit.membership import audit_membership
from flexolmo.audit.reading import read_logits
from flexolmo.audit.subjects import ALONE, MODEL, open_subjects
from flexolmo.bundle.trust import load_owners
from flexolmo.data.batches import TokenSet, open_set
from flexolmo.files import read_json, write_json
from flexolmo.inference.reader import OwnReader, Reader, open_reader
from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.checkpoint import build_anchor, load_anchor, save_anchor
from flexolmo.model.probabilities import Mix, arrange
from flexolmo.research.rivals.models import train_dense
from flexolmo.train.expert import ExpertRecipe, load_expert, reroute_expert

STUDY_TRAIN = ("steps=160", "batch_size=4", "seq_len=512")  # of [train] in the study's recipe
WINDOW = 320  # tokens of a beginning with the end of text after it: one window of training
EPOCHS = {"three_epochs": (341, 3), "control": (40, 86)}  # beginnings, how often each is read
WINDOWS = 128  # tokens of a window of validation text
RESAMPLES = 1000
MEMBERS = 400  # of a private expert's documents, which may have been read
EXTRACTED = 100  # documents that extraction attacks at most
PRIVATE = {"epsilon_8": 8.0, "epsilon_2": 2.0, "canaries_epsilon_8": 8.0}
PLANTED = ("canaries", "canaries_epsilon_8")  # trained on a copy of the set with canaries
NEAR = {"control": 4}  # tokens that near-verbatim text may have replaced, where it is searched for
TABLE_EPSILON = 2.0  # of the table, in the recipe of private experts
DRAWS = ("epsilon 2, draw 1", "epsilon 2, draw 2", "epsilon 2, draw 3")
TRUST = ("--trust-any-signer",)


def flexolmo(*arguments: object) -> None:
    """Run a command of the product on one thread."""
    command = [sys.executable, "-m", "flexolmo", *map(str, arguments)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def step_of(study: Path, kind: str) -> Path:
    """Directory of the study's finished step of one kind; of an anchor, the first seed's."""
    for about in sorted(study.glob("steps/*/step.json")):
        step = read_json(about)
        if step["kind"] == kind and step["settings"].get("seed", 0) == 0:
            return about.parent
    raise SystemExit(f"{study} has no step {kind}: run `flexolmo study --out {study}` first.")


# --- models ---------------------------------------------------------------------------------------


class Owner:
    """One owner's text, and the models that are made of it under one directory."""

    def __init__(self, study: Path, name: str, out: Path, batch_size: int):
        self.name, self.out, self.batch_size = name, out, batch_size
        self.prepared = step_of(study, "corpus") / "prepared"
        self.anchor = step_of(study, "anchor") / "anchor"

    def set_for(self, model: str) -> Path:
        """The prepared set that a model is trained on."""
        if model in PLANTED:
            return self._plant()
        if model not in EPOCHS:
            return self.prepared / self.name
        every = self._prepare("beginnings", lambda split, place: True)
        return self._prepare(model, lambda s, i: s != "train" or i < EPOCHS[model][0], every)

    def _plant(self) -> Path:
        """The set with canaries in it; beside it the file that says which."""
        made = self.out / "sets" / "planted" / self.name
        if not made.exists():
            made.parent.mkdir(parents=True, exist_ok=True)
            flexolmo("audit", "canaries", "plant", "--data", self.prepared / self.name,
                     "--out", made, "--key", made.with_suffix(".key"))  # fmt: skip
        return made

    def _prepare(
        self, label: str, is_kept: Callable[[str, int], bool], start: Path | None = None
    ) -> Path:
        """A set of beginnings of the owner's documents, or of those of the set `start`, which are
        all of one length; a text stays in its split, which its hash decides."""
        made = self.out / "sets" / label / self.name
        if made.exists():
            return made
        source = open_set(start or self.prepared / self.name)
        tokenizer = load_anchor(self.anchor).tokenizer
        file = self.out / "sets" / f"{label}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8") as f:
            for split, tokens in source.splits.items():
                whole = 0
                for i in range(tokens.num_documents):
                    ids = tokens.document(i)[: WINDOW - 1].tolist()
                    text = tokenizer.decode(ids)
                    is_whole = len(ids) == WINDOW - 1 and tokenizer.encode(text) == ids
                    if is_whole and is_kept(split, whole):
                        f.write(json.dumps({"text": text}) + "\n")
                    whole += is_whole
        flexolmo("data", "prepare", file, "--name", self.name, "--out", made.parent,
                 "--public", self.prepared / "public")  # fmt: skip
        return made

    def train(self, model: str) -> Path:
        """Train one of the models; its mixture's directory, or a dense model's."""
        done = self.out / model / "model"
        if done.exists():
            return done
        if model == "dense":
            settings = recipe_of(self.train("expert"), self.name).train
            anchor = load_anchor(self.anchor)
            data = open_set(self.set_for(model))
            trained = train_dense(anchor, data, settings, 0, self.out / model)
            kept = (anchor.public, anchor.router_rows, anchor.record, anchor.format_version)
            save_anchor(build_anchor(trained, anchor.tokenizer, *kept, anchor.forms), done)
            return done
        arguments = [f"train.{s}" for s in STUDY_TRAIN]
        recipe = "expert"
        options: list[object] = []
        if model == "canaries":  # every window once
            count = open_set(self.set_for(model)).card["splits"]["train"]["tokens"]
            arguments += [f"train.steps={count // (4 * 512)}"]
        elif model in EPOCHS:
            count, epochs = EPOCHS[model]
            arguments = ["train.batch_size=4", f"train.seq_len={WINDOW}"]
            arguments += [f"train.steps={count * epochs // 4}"]
        elif model in PRIVATE:
            recipe = "expert_private"
            arguments = [f"train.batch_size={self.batch_size}"]
            if model in PLANTED:  # which a document's one window holds whole; less to wait for
                arguments += ["privacy.windows=1"]
            options = ["--dp-epsilon", PRIVATE[model]]
        run, key = self.out / model / "run", self.out / model / "key.pem"
        sets = [x for a in arguments for x in ("--set", a)]
        flexolmo("expert", "train", "--anchor", self.anchor, "--data", self.set_for(model),
                 "--name", self.name, "--out", run, "--recipe", recipe, "--threads", 1,
                 *options, *sets)  # fmt: skip
        bundle = self.out / model / f"{self.name}.bundle"
        flexolmo("expert", "key", key)
        flexolmo("expert", "pack", run, "--key", key, "--owner", "Owner", "--licence", "MIT",
                 "--purpose", "any", "--out", bundle)  # fmt: skip
        flexolmo("mix", "build", self.anchor, bundle, *TRUST, "--out", done)
        return done

    def attack(self, model: str) -> None:
        """Membership and extraction; of experts with canaries whether these are found."""
        made, data = self.train(model), self.set_for(model)
        if model in PLANTED:
            found = self.out / model / "canaries" / "canaries.json"
            if not found.exists():
                flexolmo("audit", "canaries", "measure", "--model", made, "--data", data, *TRUST,
                         "--key", data.with_suffix(".key"), "--out", found.parent)  # fmt: skip
            return
        # which documents the dense model has read, its expert's recipe says: both read the same
        subjects = None
        if model == "dense":
            subjects = open_subjects(made, open_set(data), reference=self.anchor)
            recipe = recipe_of(self.train("expert"), self.name)
            subjects = replace(subjects, recipe=recipe)
        found = self.out / model / "membership" / "membership.json"
        most = MEMBERS if model in PRIVATE else 1000
        if not found.exists() and subjects is not None:
            write_json(found, audit_membership(subjects, open_set(data))[0])
        elif not found.exists():
            flexolmo("audit", "membership", "--model", made, "--data", data, *TRUST,
                     "--out", found.parent, "--max-documents", most)  # fmt: skip
        found = self.out / model / "extraction" / "extraction.json"
        if not found.exists() and subjects is not None:
            settings = ExtractionSettings(max_documents=EXTRACTED)
            parts = found.parent / "parts"
            said = audit_extraction(subjects, open_set(data), settings, parts, say=print)
            assert said is not None
            write_json(found, said[0])
        elif not found.exists():
            flexolmo("audit", "extraction", "--model", made, "--data", data, *TRUST,
                     "--out", found.parent, "--max-documents", EXTRACTED,
                     "--near-tokens", NEAR.get(model, 0))  # fmt: skip


def recipe_of(mixture: Path, name: str) -> ExpertRecipe:
    """The recipe by which the mixture's expert was trained."""
    manifest = read_json(mixture / "experts" / f"{name}.bundle" / "manifest.json")
    known = ExpertRecipe.model_fields
    return ExpertRecipe.model_validate({k: v for k, v in manifest["recipe"].items() if k in known})


# --- what is kept of the gain ---------------------------------------------------------------------


def bits_of_documents(reader: Reader, token_set: TokenSet) -> np.ndarray:
    """Bits that each source document of the validation split takes, float64 [n]: of every token, in
    windows of WINDOWS tokens."""
    split = token_set.splits["validation"]
    rows, documents = [], []
    for i in range(split.num_documents):
        ids = np.concatenate([[token_set.eos_id], split.document(i)])
        for start in range(0, len(ids) - 1, WINDOWS):
            rows.append(ids[start : start + WINDOWS + 1])
            documents.append(split.sources[i])
    bits = np.zeros(int(split.sources[-1]) + 1)
    for place, (logits,) in read_logits([reader], rows):
        nats = -logits.double().log_softmax(-1)
        targets = torch.from_numpy(rows[place][1:])
        bits[documents[place]] += float(nats.gather(1, targets[:, None]).sum()) / np.log(2)
    return bits


def measure_gain(owner: Owner, models: list[str]) -> dict[str, Any]:
    """Bits per byte of the anchor and of each expert alone, and the share of the gain of the expert
    without privacy that each private one keeps, with its interval over documents."""
    token_set = open_set(owner.set_for("expert"))
    split = token_set.splits["validation"]
    sizes = np.bincount(split.sources, split.bytes)  # [n]
    readers: dict[str, Reader] = {"anchor": open_reader(owner.anchor)[0]}
    for model in ("expert", *models):
        subjects = open_subjects(owner.train(model), token_set, load_owners(None, True))
        readers[model] = next(s.reader for s in subjects.models if s.name in (ALONE, MODEL))
    bits = {name: bits_of_documents(reader, token_set) for name, reader in readers.items()}
    drawn = np.random.default_rng(0).integers(len(sizes), size=(RESAMPLES, len(sizes)))
    drawn = np.concatenate([np.arange(len(sizes))[None], drawn])  # the documents as they are first
    means = {
        "documents": {n: (b / sizes)[drawn].mean(1) for n, b in bits.items()},
        "bytes": {n: b[drawn].sum(1) / sizes[drawn].sum(1) for n, b in bits.items()},
    }
    found: dict[str, Any] = {"bits_per_byte": {}, "gain_kept": {m: {} for m in models}}
    for weight, mean in means.items():
        found["bits_per_byte"][weight] = {n: round(float(m[0]), 4) for n, m in mean.items()}
        for model in models:
            kept = (mean["anchor"] - mean[model]) / (mean["anchor"] - mean["expert"])
            low, high = np.quantile(kept[1:], [0.025, 0.975])
            shares = {"kept": kept[0], "low": low, "high": high}
            found["gain_kept"][model][weight] = {n: round(float(v), 4) for n, v in shares.items()}
    return found


def measure_table(owner: Owner) -> dict[str, Any]:
    """Gap that the mixture of the expert without privacy closes, 1 being the dense model, with the
    threshold's table and with tables of the private experts' share of epsilon, by what is mixed."""
    token_set = open_set(owner.set_for("expert"))
    split = token_set.splits["validation"]
    sizes = np.bincount(split.sources, split.bytes)  # [n]
    anchor = load_anchor(owner.anchor)
    expert = load_expert(owner.out / "expert" / "run")
    private = expert.router.model_copy(update={"epsilon": TABLE_EPSILON})
    readers: dict[str, Reader] = {
        "anchor": open_reader(owner.anchor)[0],
        "dense": open_reader(owner.train("dense"))[0],
    }
    for label, router in ({"threshold": expert.router} | dict.fromkeys(DRAWS, private)).items():
        made = expert if label == "threshold" else reroute_expert(expert, anchor, token_set, router)
        model = assemble_mixture(anchor, {owner.name: made.tensors}, router)
        for mix in get_args(Mix):
            mixed = arrange(model, mix)
            readers[f"{mix}, {label}"] = OwnReader(mixed, anchor.tokenizer, [owner.name])
    bits = {name: bits_of_documents(reader, token_set) for name, reader in readers.items()}
    found: dict[str, Any] = {mix: {"documents": {}, "bytes": {}} for mix in get_args(Mix)}
    for weight in ("documents", "bytes"):
        alike = weight == "documents"
        mean = {n: (b / sizes).mean() if alike else b.sum() / sizes.sum() for n, b in bits.items()}
        whole = mean.pop("anchor") - mean["dense"]
        for name, value in mean.items():
            mix, _, label = name.partition(", ")
            if label:
                closed = 1 + (mean["dense"] - value) / whole
                found[mix][weight][label] = round(float(closed), 4)
    return found


# --- results --------------------------------------------------------------------------------------


def attacks_on(owner: Owner, model: str) -> dict[str, dict[str, Any]]:
    """Figures of the attacks on a model, by attack and subject, four digits each."""
    found: dict[str, dict[str, Any]] = {"membership": {}, "extraction": {}, "canaries": {}}
    directory = owner.out / model
    if model in PLANTED:
        said = read_json(directory / "canaries" / "canaries.json")
        for subject, figures in said["subjects"].items():
            best = figures["epsilon"]
            found["canaries"][subject] = {
                "canaries": said["canaries"],
                "planted": said["planted"],
                "auc": round(figures["membership"]["auc"], 4),
                "guesses": best["guesses"],
                "right": best["right"],
                "epsilon_at_least": round(best["epsilon"], 4),
            }
        return found
    said = read_json(directory / "membership" / "membership.json")
    for subject, by_attack in said["subjects"].items():
        row: dict[str, Any] = {k: said["documents"][k] for k in ("members", "others")}
        row["off_equals_anchor"] = said["off_equals_anchor"]
        for attack, figures in by_attack.items():
            low, high = figures["interval"]
            row[attack] = {"auc": round(figures["auc"], 4), "low": round(low, 4)}
            row[attack]["high"] = round(high, 4)
            for rate, name in (("0.01", "1"), ("0.001", "0.1")):
                share = round(figures["caught"][rate]["share"], 4)
                row[attack][f"tpr_at_{name}_percent"] = share
        found["membership"][subject] = row
    said = read_json(directory / "extraction" / "extraction.json")
    for subject, figures in said["subjects"].items():
        low, high = figures["extracted"]["interval"]
        found["extraction"][subject] = {
            "documents": said["documents"],
            "off_equals_anchor": said["off_equals_anchor"],
            "rate": round(figures["extracted"]["share"], 4),
            "low": round(low, 4),
            "high": round(high, 4),
        }
        if "near" in figures:
            found["extraction"][subject]["near_within_a_million"] = {
                **{kind: _within_a_million(figures[kind]) for kind in ("exact", "near")},
                "tokens_replaced": NEAR[model],
            }
    return found


def _within_a_million(curve: dict[str, Any]) -> float:
    """Share of documents that a million attempts write with a probability of 0.9."""
    place = curve["attempts"].index(1_000_000)
    return round(curve["discoverable"]["0.9"][place]["share"], 4)


def describe_run(owner: Owner, model: str) -> dict[str, Any]:
    """Settings, machine and time of a training."""
    run = read_json(owner.out / model / "run" / "run.json")
    manifest = owner.train(model) / "experts" / f"{owner.name}.bundle" / "manifest.json"
    seconds = read_json(owner.out / model / "run" / "metrics.json")["seconds"]
    about = {"seconds": round(seconds, 1), "run": run}
    if model in PRIVATE:
        about["budget"] = read_json(manifest)["recipe"]["budget"]
    return about


def main() -> None:
    """Make and attack what is asked for, and write the results of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="directory of a study")
    parser.add_argument("owner", help="one of its sets")
    parser.add_argument("out", type=Path, help="directory for models, attacks and results.json")
    every = ["expert", "dense", *EPOCHS, *dict.fromkeys([*PRIVATE, *PLANTED])]
    parser.add_argument("--models", default=",".join(every), help="models, comma-separated")
    parser.add_argument("--batch-size", type=int, default=200, help="units a private step reads")
    parser.add_argument("--train-only", action="store_true", help="attack nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    owner = Owner(asked.study, asked.owner, asked.out.resolve(), asked.batch_size)
    models = asked.models.split(",")
    for model in models:
        owner.train(model)
        if not asked.train_only:
            owner.attack(model)
    if asked.train_only:
        return
    kinds = ("membership", "extraction", "canaries", "epsilon", "runs")
    results: dict[str, Any] = {kind: {} for kind in kinds}
    for model in models:
        for attack, by_subject in attacks_on(owner, model).items():
            for subject, row in by_subject.items():
                results[attack][f"{model}, {subject}"] = row
        if model != "dense":
            results["runs"][model] = describe_run(owner, model)
        if model in PRIVATE:
            results["epsilon"][model] = round(results["runs"][model]["budget"]["epsilon"], 4)
    results |= measure_gain(owner, [m for m in models if m in PRIVATE and m not in PLANTED])
    if "dense" in models:
        results["gap_closed_by_table"] = measure_table(owner)
    write_json(owner.out / "results.json", results)


if __name__ == "__main__":
    main()
