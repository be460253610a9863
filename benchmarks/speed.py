"""All timings of FlexOlmo in one command: data and start, training, reading, writing, router.

Each is set against what users have (stock transformers, upstream's way to train, the anchor alone)
and against the ceilings of the machine in the same run: see training.py, read_and_write.py, data.py
and timing.py. On one thread, times are seconds of this process; on more, of the clock.

    .venv/bin/python benchmarks/speed.py              # hours: S, M, L; one thread and two
    .venv/bin/python benchmarks/speed.py --resume     # goes on where a run was stopped
    .venv/bin/python benchmarks/speed.py --table      # the results as Markdown
    .venv/bin/python benchmarks/speed.py --sizes S --parts prefill,decode --threads 1 --out a.json
"""

import argparse
import gc
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import read_and_write
import torch
import training
from shapes import SIZES
from speed_table import markdown_table

import data
from flexolmo.files import read_json, write_json
from flexolmo.progress import progress
from flexolmo.runtime import keep_memory, software_versions, source_commit

Record = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "speed.json"
PARTS = ("data", "training", "prefill", "decode", "router", "low_rank")
READ_SHAPES = ((1, 128), (1, 512), (4, 512), (16, 64))
WRITE_BATCHES = (1, 16, 64)
RANKS = (4, 8, 16, 32)
ROOTS = {1: "", 2: "two_threads/"}  # of the results, by number of threads
# of a shape's or batch's two numbers of experts, the worse stands for both
WORSE = {
    "vs_stock": min,
    "pct_gemm": min,
    "evidence_vs_linear": max,
    "times_floor": max,
    "mixed_mask_cost": max,
}


def time_training(size: str, threads: int, rounds: int) -> Record:
    """Steps of training an expert, by scope."""
    return training.measure(size, rounds, threads)


def cases(asked: argparse.Namespace) -> dict[str, tuple[int, Callable[[], Record]]]:
    """Threads and measurement of every case asked for, by its place in the results; those that
    share models follow one another."""
    found: dict[str, tuple[int, Callable[[], Record]]] = {}

    def add(place: str, threads: int, work: Callable[..., Record], *given: Any) -> None:
        if place.split("/")[0] in asked.parts:
            found[ROOTS[threads] + place] = (threads, partial(work, *given, asked.rounds))

    add("data", 1, data.measure)
    for size in asked.sizes:
        for threads in asked.threads:
            add(f"training/{size}", threads, time_training, size, threads)
        for kind in ("top2", "top4", "default"):
            read, write = (
                (read_and_write.time_default_reading, read_and_write.time_default_writing)
                if kind == "default"
                else (read_and_write.time_reading, read_and_write.time_writing)
            )
            for threads in asked.threads:
                for shape in READ_SHAPES:
                    name = f"{size}/{shape[0]}x{shape[1]}"
                    add(f"prefill/{name}/{kind}", threads, read, size, kind, shape)
                    if kind == "default":
                        add(
                            f"router/{name}", threads, read_and_write.time_router, size, kind, shape
                        )
                for batch in WRITE_BATCHES:
                    add(f"decode/{size}/{batch}/{kind}", threads, write, size, kind, batch)
        for rank in RANKS:
            add(f"low_rank/{size}/{rank}", 1, read_and_write.time_low_rank, size, rank)
    return found


def results(done: Mapping[str, Record]) -> Record:
    """Figures by place, and beside those of `top2` and `top4` the worse of each."""
    found: Record = {}
    for place, record in done.items():
        *path, last = place.split("/")
        level = found
        for step in path:
            level = level.setdefault(step, {})
        level[last] = record["found"]
        if last in ("top2", "top4"):
            for name in WORSE.keys() & record["found"].keys():
                level[name] = WORSE[name](level[k][name] for k in ("top2", "top4") if k in level)
    return found


def machine(done: Mapping[str, Record]) -> Record:
    """The machine, its load during the run, and its ceilings by number of threads."""
    cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    loads = [record["load"] for record in done.values()]
    found: Record = {
        "cpu": cpu[0].split(":")[1].strip() if cpu else "unknown",
        "cores": os.cpu_count(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "load": {"median": statistics.median(loads), "most": max(loads)},
        "software": software_versions(),
    }
    for ceiling in ("gemm_gflops", "bandwidth_gb_per_second"):
        taken: dict[str, list[float]] = {}
        for record in done.values():
            if ceiling in record["found"]:
                taken.setdefault(str(record["threads"]), []).append(record["found"][ceiling])
        found[f"{ceiling}_by_threads"] = {n: statistics.median(x) for n, x in taken.items()}
    return found


def rounded(value: Any) -> Any:
    """`value` with its floating-point numbers to four digits."""
    if isinstance(value, Mapping):
        return {k: rounded(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def run_all(asked: argparse.Namespace) -> None:
    """Measure every case that is missing, each kept at once beside the results, then write them."""
    partly, commit, wanted = asked.out.with_suffix(".partial.json"), source_commit(), cases(asked)
    about = {"commit": commit, "rounds": asked.rounds}
    done: dict[str, Record] = {}
    if asked.resume and partly.exists():
        before = read_json(partly)
        if before["about"] != about:
            sys.exit(f"{partly} is of {before['about']}, not {about}: begin without --resume.")
        done = {k: r for k, r in before["done"].items() if k in wanted}
    keep_memory()  # as our commands do; what they are compared with has it too
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with progress("speed", len(wanted), "cases", len(done)) as meter:
        for place in [p for p in wanted if p not in done]:
            threads, measure = wanted[place]
            torch.set_num_threads(threads)
            found = measure()
            gc.collect()
            done[place] = {"found": found, "threads": threads, "load": os.getloadavg()[0]}
            write_json(partly, rounded({"about": about, "done": done}))
            meter.advance(note=place)
    command = shlex.join(["python", "benchmarks/speed.py", *asked.words])
    about |= {"machine": machine(done), "command": command}
    write_json(asked.out, rounded(results(done) | about))
    partly.unlink()


def main(words: Sequence[str] | None = None) -> None:
    """Measure and show the results, or only show them."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def choice(known: Sequence[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            if unknown := [name for name in text.split(",") if name not in known]:
                raise argparse.ArgumentTypeError(
                    f"found {', '.join(unknown)}; choose among {', '.join(known)}"
                )
            return text.split(",")

        return parse

    parser.add_argument("--sizes", type=choice(list(SIZES)), default=["S", "M", "L"])
    parser.add_argument("--parts", type=choice(PARTS), default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--threads", type=choice(["1", "2"]), default=["1", "2"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--resume", action="store_true", help="keep what a stopped run has measured"
    )
    parser.add_argument("--table", action="store_true", help="only show the results in --out")
    asked = parser.parse_args(words)
    asked.words = words
    asked.threads = [int(n) for n in asked.threads]
    if not asked.table:
        run_all(asked)
    print(markdown_table(read_json(asked.out)))


if __name__ == "__main__":
    main()
