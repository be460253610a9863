"""Memory, reading and time that merging, removing, exporting and loading take, in gigabytes.

    .venv/bin/python benchmarks/weights.py [--gigabytes 1,2,4,9] [--room DIR] [--out FILE]
    .venv/bin/python benchmarks/weights.py --jobs digests,build,add,remove   # beside hashing

For each size a mixture of eight owners is made, seeded, of random numbers in bfloat16: stock FFNs
behind a linear router without bias, so that it can be exported too. It takes three times its size
on the disk. Every job runs in a process of its own, once what it reads has left the page cache.

`anonymous_bytes` is the peak of memory that is no file's (RssAnon, looked at every 5 ms), of which
`anonymous_bytes_before` were there before; `resident_bytes` counts mapped pages of files too
(VmHWM). `read_bytes` is what read calls gave, and `touched_bytes` what of each file is in the page
cache afterwards, maps and read-ahead included. `hashing_seconds` are processor seconds to hash the
files that the job must hash, once, by themselves. The format asks for two digests of a bundle's
weights, of the file and of each tensor: the job `digests` reads what `build` reads and computes
both, in one thread, and nothing else, so what a build takes beside hashing is the difference.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

OWNERS = 8
WIDTH, LAYERS, VOCABULARY = 2048, 4, 8192
ENABLED = ["owner2", "owner7"]  # of the job that loads two of eight
RESULTS = Path(__file__).with_name("results") / "weights.json"


# --- what is measured ---------------------------------------------------------------------------


def make(root: Path, gigabytes: float) -> None:
    """Write an anchor, owners' keys and bundles of `gigabytes` in all into `root`."""
    import torch
    from shapes import sign_expert

    from flexolmo.data.tokenizer import train_tokenizer
    from flexolmo.model.checkpoint import build_anchor, save_anchor
    from flexolmo.model.router import LinearSettings
    from flexolmo.model.shape import ExpertShape, expert_shapes
    from flexolmo.model.statistics import BigramModel
    from flexolmo.model.transformer import ModelConfig, Transformer

    each = gigabytes * 1e9 / (OWNERS + 1)
    width = max(64, round(each / (6 * WIDTH * LAYERS) / 64) * 64)  # two bytes a number
    config = ModelConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, num_layers=LAYERS, num_heads=16, d_ff=width
    )
    draws = np.random.default_rng(17)
    block = draws.normal(0, 0.02, 1 << 22).astype(np.float32)

    def draw(target: "torch.Tensor") -> None:
        """Fill `target` with the block, turned and scaled by chance, again and again."""
        flat = target.view(-1)
        for begin in range(0, flat.numel(), len(block)):
            piece = np.roll(block, int(draws.integers(len(block)))) * draws.uniform(0.5, 1.5)
            part = flat[begin : begin + len(block)]
            part.copy_(torch.from_numpy(piece[: part.numel()].astype(np.float32)))

    model = Transformer(config).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            with torch.no_grad():
                values = torch.empty(parameter.shape, dtype=torch.bfloat16)
                draw(values)
                parameter.copy_(values)
        else:
            torch.nn.init.ones_(parameter)
    even = np.full(VOCABULARY, -np.log(VOCABULARY), dtype=np.float32)
    public = BigramModel(
        even, np.zeros_like(even), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    )
    rows = torch.zeros(LAYERS, WIDTH)
    tokenizer = train_tokenizer(["some words to begin with"], 300)
    anchor = build_anchor(model, tokenizer, public, rows, {})
    save_anchor(anchor, root / "anchor")
    router, shape = LinearSettings(has_bias=False), ExpertShape(d_ff=width)
    for number in range(1, OWNERS + 1):
        name, tensors = f"owner{number}", {}
        for key, dims in expert_shapes(config, shape, router).items():
            dtype = torch.float32 if "router" in key else torch.bfloat16
            tensors[key] = torch.empty(dims, dtype=dtype)
            draw(tensors[key])
        key = sign_expert(root, name, tensors, anchor, router)
        key.rename(root / f"{name}.private")  # the public keys stay


# --- measuring ----------------------------------------------------------------------------------


def _status(field: str) -> int:
    """Bytes that /proc/self/status gives for `field`."""
    with open("/proc/self/status", encoding="ascii") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field + ":")) * 1024


def _bytes_read() -> int:
    with open("/proc/self/io", encoding="ascii") as f:
        return int(f.readline().split()[1])


def watch(work: Callable[[], object]) -> dict[str, Any]:
    """Peaks of memory, bytes read and seconds of `work`."""
    peak = _status("RssAnon")
    is_done = threading.Event()
    looking = 0.0  # processor seconds that are not of the work

    def look() -> None:
        nonlocal peak, looking
        while not is_done.wait(0.005):
            peak = max(peak, _status("RssAnon"))
        looking = time.thread_time()

    watcher = threading.Thread(target=look)
    held = peak
    watcher.start()
    read, start, processor = _bytes_read(), time.perf_counter(), time.process_time()
    try:
        work()
    finally:
        seconds = time.perf_counter() - start
        is_done.set()
        watcher.join()
    return {
        "seconds": seconds,
        "processor_seconds": time.process_time() - processor - looking,
        "anonymous_bytes": peak,
        "anonymous_bytes_before": held,
        "resident_bytes": _status("VmHWM"),
        "read_bytes": _bytes_read() - read,
    }


def forget(files: Iterable[Path]) -> None:
    """Put files out of the page cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def touched(file: Path) -> int:
    """Bytes of a file that are in the page cache."""
    size = file.stat().st_size
    if not size:
        return 0
    page = mmap.PAGESIZE
    with open(file, "rb") as f, mmap.mmap(f.fileno(), size, access=mmap.ACCESS_COPY) as held:
        seen = (ctypes.c_ubyte * -(-size // page))()
        start = ctypes.addressof(ctypes.c_char.from_buffer(held))
        if ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(start), ctypes.c_size_t(size), seen
        ):
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(x & 1 for x in seen) * page


# --- jobs ---------------------------------------------------------------------------------------


def _trusted(root: Path) -> Any:
    from flexolmo.bundle.trust import TrustedOwners

    return TrustedOwners.load(root / "keys")


def digests(root: Path) -> dict[str, Any]:
    """Compute the digests that a build must compute: one of the anchor, two of each bundle."""

    def work() -> None:
        piece = memoryview(bytearray(1 << 20))
        bundles = [root / f"owner{i}.bundle/expert.safetensors" for i in range(1, OWNERS)]
        for path, count in [(root / "anchor/model.safetensors", 1), *((b, 2) for b in bundles)]:
            hashes = [hashlib.sha256() for _ in range(count)]
            with open(path, "rb", buffering=0) as f:
                while size := f.readinto(piece):
                    for one in hashes:
                        one.update(piece[:size])

    return watch(work)


def build(root: Path) -> dict[str, Any]:
    """Build a mixture of all bundles but the last."""
    from flexolmo.merge.mixture import build_mixture

    bundles = [root / f"owner{i}.bundle" for i in range(1, OWNERS)]
    trusted = _trusted(root)
    return watch(lambda: build_mixture(root / "anchor", bundles, root / "mixture", trusted))


def add(root: Path) -> dict[str, Any]:
    """Add the last."""
    from flexolmo.merge.mixture import add_experts

    trusted = _trusted(root)
    return watch(lambda: add_experts(root / "mixture", [root / f"owner{OWNERS}.bundle"], trusted))


def load_two(root: Path, verify: bool = False) -> dict[str, Any]:
    """Load two of the eight experts, verified before."""
    from flexolmo.merge.mixture import load_mixture

    trusted = _trusted(root)
    return watch(lambda: load_mixture(root / "mixture", trusted, experts=ENABLED, verify=verify))


def load_two_verify(root: Path) -> dict[str, Any]:
    """Load two of the eight experts, hashed again."""
    return load_two(root, verify=True)


def export(root: Path) -> dict[str, Any]:
    """Write the stock checkpoint, as `mix export` does."""
    from flexolmo.cli.mix import export as export_verb

    with contextlib.redirect_stdout(sys.stderr):
        return watch(lambda: export_verb(root / "mixture", root / "hf", trust=root / "keys"))


def remove(root: Path) -> dict[str, Any]:
    """Remove one owner."""
    from flexolmo.merge.mixture import remove_experts

    trusted = _trusted(root)
    return watch(lambda: remove_experts(root / "mixture", ["owner3"], trusted))


def import_(root: Path) -> dict[str, Any]:
    """Import the stock checkpoint."""
    from flexolmo.bundle.terms import make_terms
    from flexolmo.merge.importing import import_stock

    names = [f"owner{i}" for i in range(1, OWNERS + 1)]
    shutil.copy(root / "owner1.private", root / "importer")
    terms = make_terms("For a benchmark.", ["any"])
    return watch(
        lambda: import_stock(
            root / "hf",
            names,
            root / "imported",
            root / "importer",
            owner="importer",
            licence="MIT",
            terms=terms,
        )
    )


JOBS = {
    job.__name__.rstrip("_"): job
    for job in (digests, build, add, load_two, load_two_verify, export, import_, remove)
}


def run_job(name: str, root: Path) -> dict[str, Any]:
    """Figures of a job that ran in a process of its own, and how much of each file it touched."""
    files = sorted(f for f in root.rglob("*.safetensors"))
    forget(files)
    own = {"FLEXOLMO_CACHE": str(root / "cache"), "XDG_CONFIG_HOME": str(root / "config")}
    words = [sys.executable, __file__, "--job", name, str(root)]
    done = subprocess.run(
        words, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | own
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    seen: dict[tuple[int, int], tuple[str, int]] = {}
    for file in files:
        if file.exists():
            status = file.stat()
            seen[status.st_dev, status.st_ino] = (str(file.relative_to(root)), touched(file))
    found["touched_bytes"] = dict(sorted(seen.values()))
    return found


def hash_alone(root: Path) -> dict[str, float]:
    """Processor seconds to hash each file of weights once, from the page cache; of two tries."""
    seconds = {}
    for path in [root / "anchor/model.safetensors", *sorted(root.glob("*.bundle/*.safetensors"))]:
        tries = []
        for _ in range(2):
            start = time.process_time()
            with open(path, "rb") as f:
                hashlib.file_digest(f, "sha256")
            tries.append(time.process_time() - start)
        seconds[str(path.relative_to(root))] = min(tries)
    return seconds


def measure(root: Path, gigabytes: float, jobs: Sequence[str]) -> dict[str, Any]:
    """Everything of these jobs on a mixture of this size, made in `root`."""
    make(root, gigabytes)
    hashing = hash_alone(root)
    anchor, *bundles = hashing.values()
    must_hash = {"build": anchor + sum(bundles[:-1]), "add": bundles[-1], "load_two_verify": 0.0}
    must_hash["load_two_verify"] = anchor + sum(bundles) * len(ENABLED) / OWNERS
    found = {}
    for name in jobs:
        figures = run_job(name, root)
        if name in must_hash:
            figures["hashing_seconds"] = must_hash[name]
        found[name] = figures
        print(name, {k: v for k, v in figures.items() if k != "touched_bytes"}, flush=True)
    sizes = [
        f.stat().st_size for f in (root / "anchor", *root.glob("*.bundle")) for f in f.iterdir()
    ]
    return {"bytes": sum(sizes), "hash_seconds": hashing, "jobs": found}


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    words = list(sys.argv[1:] if words is None else words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", default="1,2,4,9", help="Sizes of the mixtures.")
    parser.add_argument("--room", type=Path, help="Directory to work in. Default: a temporary one.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--jobs", default=",".join(JOBS), help="Jobs, in this order; each needs those before."
    )
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.job:
        name, root = given.job
        print(json.dumps(JOBS[name](Path(root))))
        return
    from flexolmo.files import write_json
    from flexolmo.runtime import software_versions, source_commit

    begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    by_size = {}
    for gigabytes in map(float, given.gigabytes.split(",")):
        with tempfile.TemporaryDirectory(prefix="weights-", dir=given.room) as directory:
            by_size[f"{gigabytes:g}"] = measure(Path(directory), gigabytes, given.jobs.split(","))
    cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    about = {
        "date": begun,
        "commit": source_commit(),
        "command": " ".join(["python benchmarks/weights.py", *words]),
        "machine": {
            "cpu": cpu[0].split(":")[1].strip() if cpu else "unknown",
            "cores": os.cpu_count(),
            "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
            "load": os.getloadavg(),
            "software": software_versions(),
        },
    }
    write_json(given.out, about | {"gigabytes": by_size})


if __name__ == "__main__":
    main()
