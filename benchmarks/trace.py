"""Tracing: making an index, and tracing an output of 256 tokens in a large one.

    .venv/bin/python benchmarks/trace.py [--megabytes 1000] [--directory DIR] [--out FILE]

The text is made: words of the standard library's source, as frequent as there, drawn alone; every
tenth document begins with half of the one before, so that long matches are there. Its tokenizer is
learned from it. All is timed in processor seconds of one process, so that other work on the machine
does not count. Each query is of another output, a third of it copied from the index, which is in
the page cache.
"""

import argparse
import itertools
import json
import multiprocessing
import random
import re
import statistics
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo.files import digest_bytes, digest_file, write_json
from flexolmo.trace.index import open_index
from flexolmo.trace.spans import find_spans
from flexolmo.trace.words import split_words

OUTPUT_TOKENS = 256
QUERIES = 100
WARM_UP = 5  # more, not counted
DOCUMENT_WORDS = 400


def make_texts(megabytes: int, seed: int = 0) -> Iterator[str]:
    """Texts of so many bytes in all, one document each."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    source = "".join(file.read_text("utf-8", "replace") for file in files)
    counts = Counter(re.findall(r"[A-Za-z]{2,}|[.,:;]", source))
    words = np.array(list(counts))
    shares = np.array(list(counts.values())) / counts.total()
    rng = np.random.default_rng(seed)
    before = ""
    made = 0
    for number in itertools.count():
        if number % 256 == 0:
            rows = words[rng.choice(len(words), (256, DOCUMENT_WORDS), p=shares)]
        text = " ".join(rows[number % 256])
        if number % 10 == 0:
            text = before[: len(before) // 2] + text
        before = text
        made += len(text)
        yield text
        if made >= megabytes * 1_000_000:
            return


def write_set(directory: Path, megabytes: int) -> None:
    """Write a prepared set of made text, without the search for duplicates."""
    from flexolmo.data.documents import Document, write_documents
    from flexolmo.data.prepared import FORMAT, PARTS, SPLITS
    from flexolmo.data.tokenizer import train_tokenizer

    directory.mkdir()
    tokenizer = train_tokenizer(make_texts(5, seed=1), 32_000)
    tokenizer.save(directory / "tokenizer.json")
    lengths: list[int] = []
    sizes: list[int] = []
    ids: list[np.ndarray] = []

    def documents():
        for number, text in enumerate(make_texts(megabytes)):
            (encoded,) = tokenizer.encode_arrays([text])
            ids.append(encoded.astype(np.uint16))
            ids.append(np.array([tokenizer.eos_id], dtype=np.uint16))
            lengths.append(len(encoded) + 1)
            sizes.append(len(text.encode()))
            yield Document(text, "made", f"made-{number}")

    write_documents(directory / "train.jsonl.zst", documents())
    arrays = {
        "tokens": np.concatenate(ids),
        "offsets": np.cumsum([0, *lengths], dtype=np.int64),
        "bytes": np.array(sizes, dtype=np.int64),
        "sources": np.arange(len(sizes), dtype=np.int64),
    }
    splits = {split: {"documents": 0, "bytes": 0, "tokens": 0} for split in SPLITS}
    splits["train"] = {"documents": len(sizes), "bytes": sum(sizes), "tokens": sum(lengths)}
    for split in SPLITS:
        for part in PARTS:
            array = arrays[part] if split == "train" else arrays[part][: part == "offsets"]
            np.save(directory / f"{split}_{part}.npy", array, allow_pickle=False)
        if split != "train":
            write_documents(directory / f"{split}.jsonl.zst", [])
    for name in ("fingerprints_exact.npy", "fingerprints_near.npy"):
        np.save(directory / name, np.zeros(0, dtype=np.uint8), allow_pickle=False)
    entry = {"digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size}
    card = {
        "format": FORMAT,
        "name": "made",
        "recipe": digest_bytes(b"made"),
        "splits": splits,
        "tokenizer": entry | {"eos": tokenizer.eos, "eos_id": tokenizer.eos_id},
        "files": {
            file.name: {"bytes": file.stat().st_size, "digest": digest_file(file)}
            for file in sorted(directory.iterdir())
        },
    }
    write_json(directory / "card.json", card)


def make_outputs(directory: Path, count: int) -> list[str]:
    """Texts of about OUTPUT_TOKENS tokens: a third of each copied from one place of the index."""
    index = open_index(directory)
    rng = random.Random(0)
    third = OUTPUT_TOKENS // 3
    fresh = (index.tokenizer.encode(text)[:third] for text in make_texts(9, seed=2))
    outputs = []
    for _ in range(count):
        shard = rng.choice(index.shards)
        place = rng.randrange(shard.num_tokens - OUTPUT_TOKENS)
        copied = shard.ids(place, place + third + 1)
        outputs.append(index.tokenizer.decode([*next(fresh), *copied, *next(fresh)]))
    return outputs


def read_memory(field: str) -> int:
    """Bytes of this process: RssAnon, those that are no files', or VmHWM, the most, with files."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10


def measure_queries(directory: Path, outputs: list[str]) -> dict[str, Any]:
    """Milliseconds of a query, and memory; the index is read once before."""
    start = time.perf_counter()
    index = open_index(directory)
    found: dict[str, Any] = {"open_seconds": time.perf_counter() - start}
    taken = []
    tokens = []
    spans = 0
    for output in outputs:
        start = time.process_time()
        words = split_words(output, index.tokenizer)
        spans += len(find_spans(index, words))
        taken.append(1e3 * (time.process_time() - start))
        tokens.append(len(words.ids))
    percentiles = statistics.quantiles(taken[WARM_UP:], n=100)
    return found | {
        "queries": len(taken) - 5,
        "output_tokens": statistics.median(tokens),
        "spans_per_output": spans / len(outputs),
        "p50_processor_ms": percentiles[49],
        "p99_processor_ms": percentiles[98],
        "memory_bytes_beside_page_cache": read_memory("RssAnon"),
    }


def measure_making(prepared: Path, out: Path) -> dict[str, Any]:
    """Bytes of text a processor second, and bytes of index a byte of text."""
    from flexolmo.trace.build import build_index

    start = time.process_time()
    card = build_index(prepared, out)
    seconds = time.process_time() - start
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    tokens = sum(shard.tokens for shard in card.shards)
    return {
        "text_bytes": card.bytes,
        "tokens": tokens,
        "parts": len(card.shards),
        "processor_seconds": seconds,
        "megabytes_per_processor_second": card.bytes / seconds / 1e6,
        "index_bytes": size,
        "index_bytes_per_text_byte": size / card.bytes,
        "index_bytes_per_token": size / tokens,
        "most_memory_bytes": read_memory("VmHWM"),
    }


def main() -> None:
    """Measure, print, and write the figures if asked; each step in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--directory", type=Path, help="where text and index are made")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        where = Path(name)
        run_alone(write_set, where / "set", options.megabytes)
        making = run_alone(measure_making, where / "set", where / "index")
        outputs = run_alone(make_outputs, where / "index", QUERIES + WARM_UP)
        queries = run_alone(measure_queries, where / "index", outputs)
    from flexolmo.runtime import run_record

    found = {
        "making": making,
        "query": queries,
        "run": run_record({"megabytes": options.megabytes}, 0, {}),
    }
    json.dump(found, sys.stdout, indent=2)
    if options.out is not None:
        write_json(options.out, found)


def run_alone(step: Any, *arguments: Any) -> Any:
    """Result of `step` in a new process, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(step, arguments)


if __name__ == "__main__":
    main()
