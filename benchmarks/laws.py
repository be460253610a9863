"""Laws of cost as curves: what grows with owners, with a model's size, with experts, with text.

    .venv/bin/python benchmarks/laws.py [--parts owners,sizes,requests,experts] [--rounds 5]
    .venv/bin/python benchmarks/laws.py --draw        # the figure, and a table for docs/laws.md

owners    one more owner, beside 2 to 64: its own work (training, signing), and the coordinator's
          (building the mixture of all, adding the newcomer, removing an owner). The owner is given
          the anchor and its own text, so that its cost does not depend on others by construction;
          it is measured all the same. Experts are small, so that what each owner adds can be seen.
sizes     building, adding and removing by gigabytes of the mixture, as benchmarks/weights.py does.
requests  switching an owner off for one request, by the model's size.
experts   reading and writing by our engine's loop with two of 2 to 64 FFN experts on each token.
prepare   memory of `data prepare`, from results/data.json.

All in processor seconds of one thread, medians of rounds in which every case takes its turn.
"""

import argparse
import gc
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import weights
from read_and_write import NEW_TOKENS, Written, read_run
from shapes import (
    LINEAR,
    chosen_experts,
    made_texts,
    make_anchor,
    make_expert,
    make_mixture,
    owner_names,
    sign_expert,
)
from timing import Turns

from flexolmo.bundle.terms import make_terms
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.data.batches import open_set
from flexolmo.data.corpus import open_corpus
from flexolmo.data.prepare import prepare_set
from flexolmo.data.settings import PrepareSettings
from flexolmo.data.tokenizer import load_tokenizer
from flexolmo.files import read_json, write_json
from flexolmo.inference.policy import choose_experts
from flexolmo.inference.reader import OwnReader
from flexolmo.merge.mixture import add_experts, build_mixture, remove_experts
from flexolmo.model.checkpoint import Anchor, save_anchor
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.progress import progress
from flexolmo.runtime import set_up, software_versions, source_commit
from flexolmo.train.anchor import AnchorRecipe, AnchorShape, train_anchor
from flexolmo.train.expert import ExpertRecipe, pack_expert, train_expert
from flexolmo.train.loop import TrainSettings

Record = dict[str, Any]
HERE = Path(__file__).parent
RESULTS = HERE / "results" / "laws.json"
FIGURE = HERE.parent / "docs" / "images" / "laws.png"

OWNERS = (2, 8, 32, 64)
EXPERTS = (2, 4, 8, 16, 32, 64)  # public among them
GIGABYTES = (0.25, 0.5, 1.0, 2.0)
SIZES = ("S", "M")
SIZE = "S"  # of the model with 2 to 64 experts
SHAPE = AnchorShape(d_model=64, num_layers=2, num_heads=2, d_ff=128, max_seq_len=256)
TRAIN = TrainSettings(steps=8, batch_size=4, seq_len=128, warmup_steps=1)
TEXTS = {"public": 300, "newcomer": 100}  # documents of a set
SWITCHES = 200  # of which the mean is one figure


def processor_seconds(work: Callable[[], object]) -> float:
    """Processor seconds of `work` in this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def take_turns(
    label: str, cases: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int
) -> Record:
    """Median of each figure of each case, over `rounds` after one that is not counted."""
    figures: dict[str, list[Mapping[str, float]]] = {name: [] for name in cases}
    order = list(cases)
    shuffle = random.Random(0).shuffle
    with progress(label, (rounds + 1) * len(cases), "cases") as meter:
        for turn in range(rounds + 1):
            shuffle(order)
            for name in order:
                found = cases[name]()
                if turn:
                    figures[name].append(found)
                meter.advance(note=name)
    return {
        name: {key: statistics.median(f[key] for f in each) for key in each[0]}
        for name, each in figures.items()
    }


# --- owners -------------------------------------------------------------------------------------


def _prepare(room: Path, name: str, seed: int, public: Path | None) -> Path:
    """A prepared set of made words, of which a third are the set's own."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnoprstuvwy"))
    shared = ["".join(letters[np.random.default_rng(i).integers(0, 23, 5)]) for i in range(400)]
    own = ["".join(rng.choice(letters, 5)) for _ in range(200)]
    words = np.array(shared + own)
    source = room / "texts" / name
    source.mkdir(parents=True)
    for i in range(TEXTS[name]):
        (source / f"{i}.txt").write_text(" ".join(words[rng.integers(0, len(words), 150)]) + ".")
    prepare_set(
        open_corpus(source, name, licence="CC0-1.0"),
        room / "prepared" / name,
        public=public,
        settings=PrepareSettings(vocab_size=600, min_document_bytes=100),
    )
    return room / "prepared" / name


class Coordination:
    """A newcomer to so many owners: its own work, and its coordinator's."""

    def __init__(self, room: Path, anchor: Anchor, data: Path, owners: int):
        self.room, self.anchor, self.data = room / f"of {owners}", anchor, data
        self.names = [f"owner{i}" for i in range(1, owners + 1)]
        self.room.mkdir()
        merged = make_anchor("pico")
        router = EvidenceSettings()
        for domain, name in enumerate([*self.names, "newcomer"], start=1):
            tensors = make_expert(merged, domain, router, "all")
            key = sign_expert(self.room, name, tensors, merged, router)
            key.rename(self.room / f"{name}.private")  # the public keys stay
        self.trusted = TrustedOwners.load(self.room / "keys")

    def once(self) -> Record:
        """Processor seconds of each piece of work, and bytes of the newcomer's bundle."""
        with tempfile.TemporaryDirectory(dir=self.room) as directory:
            here = Path(directory)
            os.environ["FLEXOLMO_CACHE"] = str(here / "cache")  # nothing was verified before
            mixture = here / "mixture"
            bundle = here / "newcomer.bundle"
            old = [self.room / f"{name}.bundle" for name in self.names]
            shutil.copytree(self.room / "newcomer.bundle", bundle)
            anchor = self.room.parent / "anchor"
            return {
                "owner_seconds": processor_seconds(lambda: self._work_as_owner(here)),
                "bundle_bytes": _bytes_in(here / "signed"),
                "build_seconds": processor_seconds(
                    lambda: build_mixture(anchor, old, mixture, self.trusted)
                ),
                "add_seconds": processor_seconds(
                    lambda: add_experts(mixture, [bundle], self.trusted)
                ),
                "remove_seconds": processor_seconds(
                    lambda: remove_experts(mixture, ["owner1"], self.trusted)
                ),
            }

    def _work_as_owner(self, here: Path) -> None:
        recipe = ExpertRecipe(train=TRAIN)
        (here / "signed").mkdir()
        made = train_expert(self.anchor, open_set(self.data), "newcomer", recipe, here / "run", 1)
        pack_expert(
            made,
            here / "signed" / "newcomer.bundle",
            self.room / "newcomer.private",
            owner="newcomer",
            licence="MIT",
            terms=make_terms("For a benchmark.", ["any"]),
        )


def _bytes_in(directory: Path) -> int:
    return sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())


def measure_owners(room: Path, rounds: int) -> Record:
    """Figures by number of owners."""
    public = _prepare(room, "public", 0, None)
    data = _prepare(room, "newcomer", 1, public)
    recipe = AnchorRecipe(model=SHAPE, train=TRAIN)
    anchor = train_anchor(open_set(public), load_tokenizer(public), recipe, num_threads=1)
    save_anchor(make_anchor("pico"), room / "anchor")  # of the mixtures, with made experts
    cases = {str(n): Coordination(room, anchor, data, n).once for n in OWNERS}
    return take_turns("owners", cases, rounds)


# --- sizes --------------------------------------------------------------------------------------


def measure_sizes(room: Path, rounds: int) -> Record:
    """Figures by gigabytes of a mixture of eight owners, of which one is added and one removed."""
    cases = {}
    for gigabytes in GIGABYTES:
        root = room / f"{gigabytes:g}"
        root.mkdir()
        weights.make(root, gigabytes)
        cases[f"{gigabytes:g}"] = lambda root=root: _merge_once(root)
    return take_turns("sizes", cases, rounds)


def _merge_once(root: Path) -> Record:
    for left in ("mixture", "cache", "config"):
        shutil.rmtree(root / left, ignore_errors=True)
    found: Record = {}
    for job in ("build", "add", "remove"):
        figures = weights.run_job(job, root)
        found[f"{job}_seconds"] = figures["processor_seconds"]
        found[f"{job}_clock_seconds"] = figures["seconds"]
    return found


# --- requests -----------------------------------------------------------------------------------


def measure_requests(room: Path, rounds: int) -> Record:
    """Switching one of seven owners off, by size: microseconds, and how long a text then takes
    against all on."""
    found = {}
    owners = owner_names()
    for size in SIZES:
        gc.collect()
        model = make_mixture(size, EvidenceSettings(), "ffn")
        reader = OwnReader(model, make_anchor(size).tokenizer)
        ids = made_texts(size, 1, 64)
        enabled = [sorted(choose_experts(owners, without=["owner3"]))]

        def read(chosen: list[list[str]] | None, ids: Any = ids, reader: Any = reader) -> Any:
            def prepare() -> Callable[[], object]:
                return lambda: reader.read(ids, reader.new_state(chosen or [owners]), last=1)

            return prepare

        def switch(model: Any = model) -> Callable[[], object]:
            def work() -> None:
                for _ in range(SWITCHES):
                    model.expert_mask([choose_experts(owners, without=["owner3"])])

            return work

        turns = Turns({"on": read(None), "off": read(enabled), "switch": switch}, rounds)
        found[size] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "switch_microseconds": 1e6 * turns.median("switch") / SWITCHES,
            "off_vs_on": turns.ratio("off", "on"),
        }
    return found


# --- experts ------------------------------------------------------------------------------------


def measure_experts(room: Path, rounds: int) -> Record:
    """Milliseconds by number of FFN experts, of which a linear router picks two on each token."""
    runs = {}
    found = {}
    tokenizer = make_anchor(SIZE).tokenizer
    long = made_texts(SIZE, 1, 128)
    wide = made_texts(SIZE, 16, 64)
    written = {batch: Written(SIZE, batch) for batch in (1, 16)}
    for count in EXPERTS:
        model = make_mixture(SIZE, LINEAR, "ffn", num_experts=count, top_k=2)
        reader = OwnReader(model, tokenizer, has_panels=True)
        runs[f"read 1x128 {count}"] = read_run(reader, long)
        runs[f"read 16x64 {count}"] = read_run(reader, wide)
        for batch, texts in written.items():
            runs[f"write {batch} {count}"] = texts.run(reader)
        chosen = chosen_experts(model, wide)  # [B,T,E] a layer
        met = torch.stack([c.any(0).sum(-1).float().mean() for c in chosen]).mean()
        found[str(count)] = {
            "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            "experts_met_by_16_texts": float(met),
        }
    turns = Turns(runs, rounds)
    for count in EXPERTS:
        for what in ("read 1x128", "read 16x64"):
            key = f"{what.replace(' ', '_')}_milliseconds"
            found[str(count)][key] = 1e3 * turns.median(f"{what} {count}")
        for batch in written:
            seconds = turns.median(f"write {batch} {count}") / NEW_TOKENS
            found[str(count)][f"write_{batch}_milliseconds_a_token"] = 1e3 * seconds
    return found


# --- results ------------------------------------------------------------------------------------


PARTS: dict[str, Callable[[Path, int], Record]] = {
    "owners": measure_owners,
    "sizes": measure_sizes,
    "requests": measure_requests,
    "experts": measure_experts,
}


def measure(parts: Sequence[str], rounds: int, room: Path | None, out: Path, words: str) -> None:
    """Measure `parts`; the others stay as they are in `out`."""
    found: Record = read_json(out)["laws"] if out.exists() else {}
    for part in parts:
        set_up(0, 1)
        with tempfile.TemporaryDirectory(prefix="laws-", dir=room) as directory:
            figures = PARTS[part](Path(directory), rounds)
        found[part] = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": source_commit(),
            "rounds": rounds,
            "load": os.getloadavg()[0],
            "by": figures,
        }
        prepared = read_json(HERE / "results" / "data.json")
        memory = {
            f"{m['megabytes']:g}": {"peak_bytes": m["peak_bytes"]} for m in prepared["memory"]
        }
        found["prepare"] = {"commit": prepared["commit"], "by": memory}
        cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        machine = {
            "cpu": cpu[0].split(":")[1].strip() if cpu else "unknown",
            "cores": os.cpu_count(),
            "software": software_versions(),
        }
        write_json(out, {"command": words, "machine": machine, "laws": found})


CURVES = {  # part: title, label of x, and (key, name in the legend, factor) of each curve
    "owners": (
        "One more owner",
        "owners before it",
        [
            ("owner_seconds", "its training and signing", 1.0),
            ("add_seconds", "coordinator adds it", 1.0),
            ("remove_seconds", "coordinator removes one", 1.0),
            ("build_seconds", "coordinator builds anew", 1.0),
        ],
    ),
    "sizes": (
        "Merging and opting out",
        "gigabytes of the mixture",
        [
            ("build_seconds", "build of seven", 1.0),
            ("add_seconds", "add the eighth", 1.0),
            ("remove_seconds", "remove one", 1.0),
        ],
    ),
    "experts": (
        "Two experts a token",
        "experts in the mixture",
        [
            ("read_1x128_milliseconds", "read 1 x 128", 1e-3),
            ("read_16x64_milliseconds", "read 16 x 64", 1e-3),
            ("write_1_milliseconds_a_token", "write a token, 1 text", 1e-3),
            ("write_16_milliseconds_a_token", "write a token, 16 texts", 1e-3),
        ],
    ),
    "prepare": ("Preparing text", "megabytes of text", [("peak_bytes", "peak memory", 1e-9)]),
}


def draw(laws: Record, path: Path) -> None:
    """Draw the curves of the parts that were measured, on logarithmic axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    from flexolmo.report.drawing import MAX_WIDTH_INCHES, MUTED, save_figure, styled

    @styled
    def plot() -> Figure:
        parts = [part for part in CURVES if part in laws]
        rows = -(-len(parts) // 2)
        fig = Figure(figsize=(MAX_WIDTH_INCHES, 3.6 * rows))
        for ax, part in zip(fig.subplots(rows, 2, squeeze=False).flat, parts, strict=False):
            title, x_label, curves = CURVES[part]
            by = laws[part]["by"]
            x = [float(place) for place in by]
            for (key, name, factor), marker in zip(curves, "osD^", strict=False):
                y = [factor * by[place][key] for place in by]
                ax.plot(x, y, marker=marker, ms=5, lw=1.6, label=name)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            ax.set_xticks(x, [f"{place:g}" for place in x])
            ax.minorticks_off()
            ax.grid()
            low, high = ax.get_ylim()
            ax.set_ylim(low / 2, high * 2)
            ax.set_title(title)
            ax.set_xlabel(x_label)
            ax.set_ylabel("GB" if part == "prepare" else "processor seconds", color=MUTED)
            ax.legend(fontsize=8, loc="best")
        return fig

    save_figure(plot(), path)
    path.with_suffix(".svg").unlink(missing_ok=True)  # the page shows the other form


def table(laws: Record) -> str:
    """All figures as Markdown tables."""
    lines = []
    for part, found in laws.items():
        by = found["by"]
        keys = list(next(iter(by.values())))
        lines += [f"| {part} | {' | '.join(by)} |", "|---" * (1 + len(by)) + "|"]
        for key in keys:
            values = [by[place][key] for place in by]
            shown = [f"{v:,.0f}" if v >= 1000 else f"{v:.4g}" for v in values]
            lines.append(f"| {key.replace('_', ' ')} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, or draw what was measured."""
    words = list(sys.argv[1:] if words is None else words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="Parts to measure.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--room", type=Path, help="Directory to work in. Default: a temporary one.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--draw", action="store_true", help="Only draw and show the results.")
    given = parser.parse_args(words)
    parts = given.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"unknown parts {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not given.draw:
        command = " ".join(["python benchmarks/laws.py", *words])
        measure(parts, given.rounds, given.room, given.out, command)
    laws = read_json(given.out)["laws"]
    draw(laws, given.figure)
    print(table(laws))


if __name__ == "__main__":
    main()
