"""What comes before a model reads: preparing text, building and loading a mixture, starting.

    .venv/bin/python benchmarks/data.py [--rounds 5] [--megabytes 20] [--size S] [--out FILE]
    .venv/bin/python benchmarks/data.py --memory 50,200,1000 --out benchmarks/results/data.json

Each job runs in a process of its own, in turn. Seconds are those of the processor, of all threads
and processes of a job, but where a name says wall. The text is Python's own and its packages'
source code and documents, so it differs a little from machine to machine. Memory is the peak of
the job above what the process held before; bytes read are those of read calls, not of maps.
`--memory` prepares ever more text with all cores, once, and tells the peaks of the process and of
the largest of its workers, whole.
"""

import argparse
import contextlib
import inspect
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUM_OWNERS = 8
SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt"}


def write_text(out: Path, megabytes: float) -> None:
    """Write a corpus of Python files and documents as JSON lines; if they are too few, again and
    again, each time with another word at the end of each line."""
    paths = sysconfig.get_paths()
    roots = {Path(paths["purelib"]), Path(paths["stdlib"])}
    files = sorted({f for root in roots for f in root.rglob("*") if f.suffix in SUFFIXES})
    random.Random(0).shuffle(files)
    left = megabytes * 1e6
    with open(out, "w", encoding="utf-8") as f:
        for number in itertools.count():
            times, place = divmod(number, len(files))
            with contextlib.suppress(OSError, UnicodeDecodeError):
                text = files[place].read_text(encoding="utf-8")
                if times:
                    text = text.replace("\n", f" again{times}\n")
                f.write(json.dumps({"id": str(number), "text": text}, ensure_ascii=False) + "\n")
                left -= len(text.encode())
            if left < 0:
                return


def read_texts(path: Path) -> list[str]:
    """The texts that `write_text` wrote."""
    with open(path, encoding="utf-8") as f:
        return [json.loads(line)["text"] for line in f]


def write_bundles(root: Path, size: str) -> None:
    """Write an anchor, owners' keys and signed bundles of our default kind into `root`."""
    import shapes

    from flexolmo.model.checkpoint import save_anchor
    from flexolmo.model.statistics import EvidenceSettings

    anchor = shapes.make_anchor(size)
    save_anchor(anchor, root / "anchor")
    settings = EvidenceSettings()
    for number in range(1, NUM_OWNERS + 1):
        tensors = shapes.make_expert(anchor, number, settings, "all")
        key = shapes.sign_expert(root, f"owner{number}", tensors, anchor, settings)
        key.unlink()  # the public keys stay


# --- jobs, each in a process of its own ---------------------------------------------------------


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _bytes_read() -> int:
    with open("/proc/self/io", encoding="ascii") as f:
        return int(f.readline().split()[1])


def watch(work: Callable[[], object]) -> dict[str, Any]:
    """What `work` takes."""
    with open("/proc/self/statm", encoding="ascii") as f:
        held = int(f.read().split()[1]) * resource.getpagesize()
    start = _processor_seconds()
    wall_start = time.perf_counter()
    read = _bytes_read()
    work()
    return {
        "bytes_read": _bytes_read() - read,
        "seconds": _processor_seconds() - start,
        "wall_seconds": time.perf_counter() - wall_start,
        "peak_bytes": _peak_bytes() - held,
        "whole_peak_bytes": _peak_bytes(),
        "worker_peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }


def _peak_bytes() -> int:
    """Of this program; what getrusage tells may be of the one that started it."""
    with open("/proc/self/status", encoding="ascii") as f:
        line = next(line for line in f if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def prepare_text(root: str, text: str, tokenizer: str, workers: str) -> dict[str, Any]:
    """Prepare a set; with no tokenizer one is trained."""
    from flexolmo.data.corpus import open_corpus
    from flexolmo.data.prepare import prepare_set
    from flexolmo.data.tokenizer import load_tokenizer

    given = load_tokenizer(Path(tokenizer)) if tokenizer else None
    more = {"workers": int(workers)} if workers != "1" else {}
    with tempfile.TemporaryDirectory(dir=root) as directory:
        out = Path(directory) / "set"
        corpus = open_corpus(Path(text), "text")
        return watch(lambda: prepare_set(corpus, out, given, say=lambda _: None, **more))


def encode_text(root: str, text: str, tokenizer: str) -> dict[str, Any]:
    """Encode the same text by the library alone, in one call of the faster form of encode_batch."""
    import tokenizers

    inner = tokenizers.Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    texts = read_texts(Path(text))
    return watch(lambda: inner.encode_batch_fast(texts, add_special_tokens=False))


def build(root: str) -> dict[str, Any]:
    """Build a mixture of all bundles."""
    from flexolmo.bundle.trust import TrustedOwners
    from flexolmo.merge.mixture import build_mixture

    bundles = sorted(Path(root).glob("*.bundle"))
    trusted = TrustedOwners.load(Path(root) / "keys")
    with tempfile.TemporaryDirectory(dir=root) as out:
        target = Path(out) / "mixture"
        return watch(lambda: build_mixture(Path(root) / "anchor", bundles, target, trusted))


def load(root: str) -> dict[str, Any]:
    """Load the mixture."""
    from flexolmo.bundle.trust import TrustedOwners
    from flexolmo.merge.mixture import load_mixture

    trusted = TrustedOwners.load(Path(root) / "keys")
    return watch(lambda: load_mixture(Path(root) / "mixture", trusted))


JOBS = {job.__name__: job for job in (prepare_text, encode_text, build, load)}


def run_job(name: str, *arguments: object, quiet: bool = False) -> dict[str, Any]:
    """What a job found, run in a process of its own; on one thread if `quiet`."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false" if quiet else "true"}
    words = [sys.executable, __file__, "--job", name, *map(str, arguments)]
    done = subprocess.run(
        words,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def time_command(*words: object) -> float:
    """Processor seconds of `flexolmo` with `words`."""
    before = os.times()
    command = [sys.executable, "-m", "flexolmo", *map(str, words)]
    subprocess.run(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    after = os.times()
    return (
        after.children_user + after.children_system - before.children_user - before.children_system
    )


# --- figures ------------------------------------------------------------------------------------


def _median(found: list[dict[str, Any]], key: str) -> float:
    return statistics.median(one[key] for one in found)


def measure_preparing(rounds: int, megabytes: float) -> dict[str, Any]:
    """Rates of `data prepare`, and against `tokenizers.encode_batch` alone on the same text."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as root:
        text = Path(root) / "text.jsonl"
        write_text(text, megabytes)
        public = Path(root) / "public.jsonl"
        write_text(public, min(megabytes, 5))
        _prepare_public(public, Path(root) / "public")
        tokenizer = Path(root) / "public"
        runs: dict[str, Callable[[], dict[str, Any]]] = {
            "encode_batch": lambda: run_job("encode_text", root, text, tokenizer, quiet=True),
            "encode_batch_all_cores": lambda: run_job("encode_text", root, text, tokenizer),
            "prepare": lambda: run_job("prepare_text", root, text, tokenizer, 1, quiet=True),
            "prepare_and_train": lambda: run_job("prepare_text", root, text, "", 1, quiet=True),
        }
        if "workers" in inspect.signature(_prepare_set()).parameters and cores > 1:
            runs["prepare_all_cores"] = lambda: run_job(
                "prepare_text", root, text, tokenizer, cores
            )
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                found[name].append(run())
        size = sum(len(one.encode()) for one in read_texts(text)) / 1e6
    table = {
        name: {
            "megabytes_per_processor_second": size / _median(some, "seconds"),
            "megabytes_per_wall_second": size / _median(some, "wall_seconds"),
            "peak_bytes": _median(some, "peak_bytes"),
        }
        for name, some in found.items()
    }

    def ratio(key: str, over: str, under: str) -> float:
        pairs = zip(found[over], found[under], strict=True)
        return statistics.median(a[key] / b[key] for a, b in pairs)

    whole = "prepare_all_cores" if "prepare_all_cores" in found else "prepare"
    return {
        "megabytes": size,
        "cores": cores,
        "runs": table,
        "share_of_encode_batch": ratio("seconds", "encode_batch", "prepare"),
        "share_of_encode_batch_all_cores_wall": ratio(
            "wall_seconds", "encode_batch_all_cores", whole
        ),
    }


def measure_memory(sizes: list[float]) -> list[dict[str, Any]]:
    """Peaks of `data prepare` with all cores, of so many megabytes of text each."""
    cores = len(os.sched_getaffinity(0))
    found = []
    with tempfile.TemporaryDirectory() as root:
        public = Path(root) / "public.jsonl"
        write_text(public, 5)
        _prepare_public(public, Path(root) / "public")
        for megabytes in sizes:
            text = Path(root) / "text.jsonl"
            write_text(text, megabytes)
            done = run_job("prepare_text", root, text, Path(root) / "public", cores)
            found.append(
                {
                    "megabytes": megabytes,
                    "workers": cores,
                    "peak_bytes": done["whole_peak_bytes"],
                    "worker_peak_bytes": done["worker_peak_bytes"],
                    "megabytes_per_processor_second": megabytes / done["seconds"],
                    "megabytes_per_wall_second": megabytes / done["wall_seconds"],
                }
            )
            print(found[-1], file=sys.stderr, flush=True)
    return found


def _prepare_set() -> Callable[..., Any]:
    from flexolmo.data.prepare import prepare_set

    return prepare_set


def _prepare_public(text: Path, out: Path) -> None:
    from flexolmo.data.corpus import open_corpus

    _prepare_set()(open_corpus(text, "public"), out, say=lambda _: None)


def measure_mixture(rounds: int, size: str) -> dict[str, Any]:
    """Building and loading a mixture of eight owners, and the first token that it writes."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_bundles(root, size)
        bundles = sorted(root.glob("*.bundle"))
        _build(root, bundles)
        weights = [(b / "expert.safetensors").stat().st_size for b in bundles]
        options = ["--model", root / "mixture", "--trust", root / "keys", "--prompt", "some words"]
        found: dict[str, list[dict[str, Any]]] = {"build": [], "load": [], "start": []}
        for _ in range(rounds):
            found["build"].append(run_job("build", root))
            found["load"].append(run_job("load", root))
            token = time_command("generate", *options, "--max-new-tokens", 1)
            found["start"].append({"help": time_command("--help"), "first_token": token})
    keys = ("bytes_read", "seconds", "wall_seconds", "peak_bytes")
    return {
        "owners": NUM_OWNERS,
        "bundle_bytes": sum(weights),
        "largest_bundle_bytes": max(weights),
        "build": {key: _median(found["build"], key) for key in keys},
        "load": {key: _median(found["load"], key) for key in keys},
        "help_seconds": _median(found["start"], "help"),
        "first_token_seconds": _median(found["start"], "first_token"),
    }


def _build(root: Path, bundles: list[Path]) -> None:
    from flexolmo.bundle.trust import TrustedOwners
    from flexolmo.merge.mixture import build_mixture

    build_mixture(root / "anchor", bundles, root / "mixture", TrustedOwners.load(root / "keys"))


def measure(rounds: int = 5, megabytes: float = 20, size: str = "S") -> dict[str, Any]:
    """All figures of this file; `size` of the mixture is a key of `shapes.SIZES`."""
    return {
        "prepare": measure_preparing(rounds, megabytes),
        "mixture": {"size": size, **measure_mixture(rounds, size)},
        "load_average": os.getloadavg(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--size", default="S")
    parser.add_argument("--memory", help="megabytes of text, such as 50,200,1000")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", nargs="+", help="for this program itself")
    given = parser.parse_args()
    if given.job:
        name, *arguments = given.job
        print(json.dumps(JOBS[name](*arguments)))
        return
    if given.memory:
        from flexolmo.runtime import software_versions, source_commit

        sizes = [float(size) for size in given.memory.split(",")]
        about = {"commit": source_commit(), "software": software_versions()}
        result = {"memory": measure_memory(sizes), "load_average": os.getloadavg(), **about}
    else:
        result = measure(given.rounds, given.megabytes, given.size)
    text = json.dumps(result, indent=2)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
