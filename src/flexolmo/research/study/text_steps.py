"""The text of a study: its corpus, and the windows that every method reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.data.batches import TokenSet, evaluation_windows, open_set
from flexolmo.data.corpus import open_corpus
from flexolmo.data.deduplicate import NEAR_DUPLICATE_JACCARD
from flexolmo.data.prepare import prepare_set
from flexolmo.data.settings import PrepareSettings
from flexolmo.data.tokenizer import load_tokenizer
from flexolmo.files import save_arrays, write_bytes
from flexolmo.research.corpora.fetch import fetch_set
from flexolmo.research.corpora.sources import CLIENTS
from flexolmo.research.steps.step import StepContext, step_kind
from flexolmo.research.study.splice import load_spliced, save_spliced, splice_windows

Windows = dict[str, list[tuple[np.ndarray, int]]]  # by set: (ids, bytes) as evaluation_windows
SPLITS = ("validation", "heldout")
MIXED = "mixed"  # the name that mixed documents go by among the sets


@step_kind("corpus", version=3)
def corpus(step: StepContext) -> dict[str, Any]:
    """Fetch and prepare the sets. Leaves prepared/SET. No inputs.

    Settings: sets; from_directory, a directory of SET/*.jsonl.gz, with the digests of its files, or
    null for packages; vocab_size.
    """
    done: list[Path] = []
    tokens = {}
    for name in step.settings["sets"]:
        if step.settings["from_directory"]:
            directory = Path(step.settings["from_directory"]) / name
            opened = open_corpus(directory, name, "see the directory's own list")
        else:
            fetch_set(name, step.out / "corpus", CLIENTS)
            opened = open_corpus(step.out / "corpus" / name)
        public = None if name == PUBLIC else step.out / "prepared" / PUBLIC
        card = prepare_set(
            opened,
            step.out / "prepared" / name,
            None,
            public,
            done,
            PrepareSettings(
                vocab_size=step.settings["vocab_size"],
                min_document_bytes=200,
                near_duplicate=NEAR_DUPLICATE_JACCARD,
                normalise=True,
            ),
            may_replace=True,
        )
        tokens[name] = {split: n["tokens"] for split, n in card["splits"].items()}
        if name != PUBLIC:
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
            found = list(
                evaluation_windows(token_set, split, settings["seq_len"], settings["bytes"][split])
            )
            arrays[f"{name}.ids"] = np.concatenate([ids for ids, _ in found])
            arrays[f"{name}.lengths"] = np.array([len(ids) for ids, _ in found])
            arrays[f"{name}.bytes"] = np.array([size for _, size in found])
        save_arrays(step.out / f"{split}.npz", **arrays)
        spliced = splice_windows(
            sets,
            split,
            num_windows=settings["mixed"][split],
            seq_len=settings["seq_len"],
            seed=settings["seed"],
        )
        save_spliced(spliced, step.out / f"{split}-mixed.npz")
        count[split] = {n: int(arrays[f"{n}.bytes"].sum()) for n in sets}
        count[split][MIXED] = sum(w.bytes for w in spliced)
        shown = spliced.marked_text(0, load_tokenizer(sets[PUBLIC].directory))
        write_bytes(step.out / f"{split}-mixed.txt", shown.encode())
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
