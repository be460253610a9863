"""The audit log: entries a second, alone and from many threads, and what a reader of it waits for.

    .venv/bin/python benchmarks/audit_log.py [--directory DIR] [--entries 20000] [--out FILE]

An entry is on the disk when `append` returns, so the disk decides: DIR says which one is measured,
and `fsync_ms` what one write and fsync of a file alone takes there. Latency is that of `append`.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from flexolmo.files import digest_bytes, write_json
from flexolmo.runtime import run_record
from flexolmo.serving.audit_check import check_log, public_key
from flexolmo.serving.audit_log import AuditLog
from flexolmo.serving.audit_proof import prove_entry

DECISION = {
    "request_id": "5f0c6f0e-8a3e-4b7e-9d50-0f3c7f1f5b1a",
    "principal": "alice@hospital.example",
    "groups": ["clinic", "research"],
    "roles": ["doctor"],
    "purposes": ["health-research"],
    "asked": ["academic", "code", "creative"],
    "enabled": ["academic", "code"],
    "refused": {"creative": ["the owner's terms permit education, not health-research"]},
    "model_digest": digest_bytes(b"model"),
    "policy_digest": digest_bytes(b"policy"),
}


def time_fsync(directory: Path) -> float:
    """Median milliseconds of a write of 600 bytes at a file's end and its fsync."""
    taken = []
    with open(directory / "file", "wb", buffering=0) as f:
        for _ in range(200):
            start = time.perf_counter()
            f.write(b"x" * 600)
            os.fsync(f.fileno())
            taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken)


def time_appends(log: AuditLog, threads: int, entries: int) -> dict[str, float]:
    """Append `entries` from so many threads: entries a second, and milliseconds of each."""
    taken: list[float] = []

    def work() -> None:
        for _ in range(entries // threads):
            start = time.perf_counter()
            log.append("decision", DECISION)
            taken.append(time.perf_counter() - start)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - start
    percentiles = statistics.quantiles(taken, n=100)
    return {
        "threads": threads,
        "entries_per_second": len(taken) / seconds,
        "p50_ms": 1e3 * percentiles[49],
        "p99_ms": 1e3 * percentiles[98],
    }


def measure(directory: Path, entries: int) -> dict[str, Any]:
    """All figures, of a log made in `directory`."""
    audit = directory / "audit"
    log = AuditLog.open(audit)
    found: dict[str, Any] = {"fsync_ms": time_fsync(directory)}
    found["alone"] = time_appends(log, 1, entries // 20)
    found["many"] = time_appends(log, 64, entries)
    log.close()
    key = public_key(audit)
    start = time.process_time()
    report = check_log(audit, key)
    assert not report.findings
    seconds = time.process_time() - start
    found["verified_entries_per_processor_second"] = report.num_entries / seconds
    for name, act in [
        ("prove_seconds", lambda: prove_entry(audit, report.num_entries // 2, key)),
        ("open_seconds", lambda: AuditLog.open(audit).close()),
    ]:
        start = time.perf_counter()
        act()
        found[name] = time.perf_counter() - start
    found["bytes_per_entry"] = sum(p.stat().st_size for p in audit.iterdir()) / report.num_entries
    return found


def main() -> None:
    """Measure, print, and write the figures if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", type=Path, help="where the log is made; removed afterwards")
    parser.add_argument("--entries", type=int, default=20_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        found = measure(Path(directory), options.entries)
    found["run"] = run_record({"entries": options.entries}, 0, {})
    json.dump(found, sys.stdout, indent=2)
    if options.out is not None:
        write_json(options.out, found)


if __name__ == "__main__":
    main()
