"""Load test of `flexolmo serve`: many clients, identities and sets, and every answer judged.

Starts a server on a mixture with policies and keys of its own, lets locust's clients ask (see
load_users.py), and then holds each answer against the same request served alone, on a model of only
the experts that may take part; what may is a table here, not the policy engine's word. Before that
every set of experts asks for one long prompt, one set after another, and none may find what another
has read. Needs the extra `bench`.

    .venv/bin/python benchmarks/load.py                # 64 clients, 2,000 requests
    .venv/bin/python benchmarks/load.py --requests 200 --clients 8 --out load.json
    .venv/bin/python benchmarks/load.py --engine vllm --engine-python .venv-vllm/bin/python
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo.files import read_json, write_json
from flexolmo.runtime import software_versions, source_commit

RESULTS = Path(__file__).parent / "results" / "serving.json"
DEMO = Path("runs/demo")
RECORDS = {"own": "load", "vllm": "load_on_vllm"}  # of each engine, in the results
MOST_DIFFERENCE = 1e-3  # of log-probabilities, in nats, from those of a model read on its own
MOST_TOKENS = (8, 16, 32)
PROMPTS = (
    "def read(path):",
    "import os\nimport",
    "class Reader:\n    def __init__(self",
    "We show that",
    "Abstract. In this paper we",
    "The results of the experiment",
    "And it came to pass",
    "Hamlet. To be,",
    "The king said unto",
    "The city council decided on",
    "Once there was a",
    "For more information see",
)
LONG = " ".join(f"Chapter {i}. The city council met and decided on the road." for i in range(1, 9))
Answer = dict[str, Any]  # its text, and the scores of its tokens
# who: groups, and the experts that the policies below give them, by purpose
PEOPLE: dict[str, dict[str, Any]] = {
    "ada": {"groups": ["developers"], "may": {"education": {"code"}}},
    "ben": {"groups": ["readers"], "may": {"education": {"creative"}}},
    "cho": {"groups": ["developers", "readers"], "may": {"education": {"code", "creative"}}},
    "dan": {
        "groups": ["scholars"],
        "may": {"education": {"academic"}, "general-research": {"academic", "code", "creative"}},
    },
    "eve": {"groups": ["visitors"], "may": {}},
}
POLICIES = """
@id("developers read code")
permit (principal in FlexOlmo::Group::"developers", action == FlexOlmo::Action::"activate",
        resource == FlexOlmo::Expert::"code")
when { context.purpose == FlexOlmo::Purpose::"education" };

@id("readers read fiction")
permit (principal in FlexOlmo::Group::"readers", action == FlexOlmo::Action::"activate",
        resource == FlexOlmo::Expert::"creative")
when { context.purpose == FlexOlmo::Purpose::"education" };

@id("scholars read papers")
permit (principal in FlexOlmo::Group::"scholars", action == FlexOlmo::Action::"activate",
        resource == FlexOlmo::Expert::"academic");

@id("scholars do research")
permit (principal in FlexOlmo::Group::"scholars", action == FlexOlmo::Action::"activate", resource)
when { context.purpose == FlexOlmo::Purpose::"general-research" };

@id("visitors have public text alone")
forbid (principal in FlexOlmo::Group::"visitors", action, resource);
"""
PURPOSES = ("education", "general-research")
EXPERTS = ("academic", "code", "creative")


def plan_requests(count: int, keys: dict[str, str], seed: int) -> list[dict[str, Any]]:
    """Requests at random, each with the experts that must take part."""
    draw = random.Random(seed)
    requests = []
    for number in range(count):
        who = draw.choice(list(PEOPLE))
        purpose = draw.choice(PURPOSES)
        named = draw.sample(EXPERTS, draw.randint(0, len(EXPERTS)))
        choice, asked = draw.choice(
            [("all", set(EXPERTS)), ("only", set(named)), ("without", set(EXPERTS) - set(named))]
        )
        body = {
            "model": "model",
            "prompt": draw.choice(PROMPTS),
            "max_tokens": draw.choice(MOST_TOKENS),
            "temperature": 0,
            "stream": draw.random() < 0.8,
            "purpose": purpose,
        }
        if number % 4 == 0:
            body["logprobs"] = 0
        if choice != "all":
            body["experts"] = {choice: sorted(named)}
        enabled = sorted(asked & PEOPLE[who]["may"].get(purpose, set()))
        requests.append({"who": who, "key": keys[who], "body": body, "enabled": enabled})
    return requests


def plan_sets(keys: dict[str, str]) -> list[dict[str, Any]]:
    """Requests of every set of experts for one prompt, one set after another, twice over."""
    body = {"model": "model", "prompt": LONG, "max_tokens": MOST_TOKENS[0], "temperature": 0}
    body |= {"stream": False, "purpose": "general-research"}
    sets = [c for n in range(len(EXPERTS) + 1) for c in itertools.combinations(EXPERTS, n)]
    return [
        {
            "who": "dan",
            "key": keys["dan"],
            "body": body | {"experts": {"only": list(names)}},
            "enabled": list(names),
        }
        for names in sets * 2
    ]


def answer_alone(model: Path, trust: Path, requests: Path, out: Path) -> None:
    """Write the answer to each different request, as text and log-probabilities, by a model of only
    its experts."""
    import torch

    from flexolmo.bundle.trust import TrustedOwners
    from flexolmo.inference.decode import continue_ids
    from flexolmo.inference.reader import OwnReader
    from flexolmo.inference.sampling import Sampling
    from flexolmo.merge.mixture import load_mixture
    from flexolmo.progress import progress

    wanted: dict[tuple[str, ...], set[str]] = {}
    for line in requests.read_text().splitlines():
        asked = json.loads(line)
        wanted.setdefault(tuple(asked["enabled"]), set()).add(asked["body"]["prompt"])
    greedy = Sampling(max_new_tokens=max(MOST_TOKENS), temperature=0)
    answers: dict[str, dict[str, list[Answer]]] = {}
    with (
        torch.inference_mode(),
        progress("served alone", sum(map(len, wanted.values())), "text") as meter,
    ):
        for enabled, prompts in wanted.items():
            mixture = load_mixture(model, TrustedOwners.load(trust), experts=enabled)
            reader = OwnReader(mixture.model, mixture.tokenizer)
            for prompt in sorted(prompts):
                ids = mixture.tokenizer.encode(prompt)
                (written,) = continue_ids(reader, [ids], greedy)
                whole = torch.tensor([[*reader.start, *ids, *written]])
                logs = mixture.model(whole)[0].log_softmax(-1)[-1 - len(written) : -1]
                chosen = logs.gather(1, torch.tensor(written, dtype=torch.long)[:, None])
                scores = chosen[:, 0].tolist()
                answers.setdefault(",".join(enabled), {})[prompt] = [
                    {"text": mixture.tokenizer.decode(written[:most]), "scores": scores[:most]}
                    for most in MOST_TOKENS
                ]
                meter.advance(1)
    write_json(out, answers)


@contextmanager
def serving(
    model: Path, trust: Path, where: Path, port: int, options: list[str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A server on loopback until the block ends; drained, then waited for."""
    command = [
        *(sys.executable, "-m", "flexolmo", "serve", "--model", model, "--trust", trust),
        *("--policy", where / "policy", "--audit", where / "audit", "--auth", where / "auth.toml"),
        *("--port", str(port), "--name", "model", *options),
    ]
    with open(where / "server.log", "wb") as log:
        server = subprocess.Popen([str(x) for x in command], stdout=log, stderr=log)
    try:
        for _ in range(3000):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1)
                break
            except OSError:
                if server.poll() is not None:
                    raise SystemExit((where / "server.log").read_text()) from None
                time.sleep(0.1)
        yield server
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def family(process: int) -> list[int]:
    """A process and those that it has started, such as its engine's."""
    children = Path(f"/proc/{process}/task").glob("*/children")
    started = [int(child) for file in children for child in file.read_text().split()]
    return [process, *(one for child in started for one in family(child))]


def memory_bytes(process: int) -> int:
    """Resident memory of a process and of those that it has started."""
    pages = sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in family(process))
    return pages * os.sysconf("SC_PAGE_SIZE")


def processor_seconds(process: int) -> float:
    """Seconds that the processor has given to a process and to those that it has started."""
    ticks = 0
    for one in family(process):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # for itself, and for what it asks the system
    return ticks / os.sysconf("SC_CLK_TCK")


def run_clients(where: Path, name: str, clients: int, port: int) -> list[dict[str, Any]]:
    """What locust's clients found, in the order of the plan."""
    plan = {"requests": str(where / f"{name}.jsonl"), "found": str(where / f"{name}_found.jsonl")}
    command = [sys.executable, "-m", "locust", "-f", str(Path(__file__).with_name("load_users.py"))]
    command += ["--headless", "-u", str(clients), "-r", str(clients), "--only-summary"]
    command += ["--host", f"http://127.0.0.1:{port}"]
    environment = os.environ | {"FLEXOLMO_LOAD_PLAN": json.dumps(plan)}
    subprocess.run(command, env=environment, check=False, capture_output=True)
    found = [json.loads(line) for line in Path(plan["found"]).read_text().splitlines()]
    return sorted(found, key=lambda x: x["number"])


def judge(
    requests: list[dict[str, Any]],
    found: list[dict[str, Any]],
    answers: dict[str, dict[str, list[Answer]]],
    logged: dict[int, dict[str, Any]],
) -> dict[str, int]:
    """Numbers of wrongs of each kind; all are 0 where the server keeps its word."""
    kinds = ("lost", "refused", "set", "text", "scores", "not_logged", "log_differs")
    wrongs = Counter(dict.fromkeys(kinds, 0))
    wrongs["lost"] += len(requests) - len(found)
    for one in found:
        asked = requests[one["number"]]
        # whoever asks for nothing but sources that may not take part is told so
        is_forbidden = bool(asked["body"].get("experts", {}).get("only")) and not asked["enabled"]
        if one["status"] != 200 or is_forbidden:
            wrongs["refused"] += one["status"] != (403 if is_forbidden else 200)
            continue
        told = one.get("told")
        if told is None:
            wrongs["lost"] += 1
            continue
        wrongs["set"] += told["enabled"] != asked["enabled"]
        alone = find_alone(asked, answers)
        wrongs["text"] += one["text"] != alone["text"]
        wrongs["scores"] += differ_by(asked, one, alone) > MOST_DIFFERENCE
        entry = logged.get(told["entry"])
        if entry is None:
            wrongs["not_logged"] += 1
        else:
            fields = entry["fields"]
            wrongs["log_differs"] += (fields["principal"], fields["enabled"]) != (
                asked["who"],
                asked["enabled"],
            )
    return dict(wrongs)


def find_alone(asked: dict[str, Any], answers: dict[str, dict[str, list[Answer]]]) -> Answer:
    """The answer to a request by a model of only its experts."""
    most = MOST_TOKENS.index(asked["body"]["max_tokens"])
    return answers[",".join(asked["enabled"])][asked["body"]["prompt"]][most]


def differ_by(asked: dict[str, Any], one: dict[str, Any], alone: Answer) -> float:
    """The largest difference of log-probabilities, in nats; infinite for another number of them
    than was asked for."""
    expected = alone["scores"] if "logprobs" in asked["body"] else []
    if len(one["scores"]) != len(expected):
        return float("inf")
    pairs = zip(one["scores"], expected, strict=True)
    return max((abs(a - b) for a, b in pairs), default=0.0)


def count_shared(found: list[dict[str, Any]]) -> int:
    """Sets of `plan_sets` that found in the cache what another had read, or nothing of their own
    at the second time, which would show nothing."""
    half = len(found) // 2
    first = [one["cached"] for one in found[:half]]
    again = [one["cached"] for one in found[half:]]
    return sum(a > 0 or b == 0 for a, b in zip(first, again, strict=True))


def percentiles(values: list[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds."""
    p50, p99 = np.percentile(np.array(values) * 1000, [50, 99])
    return {"p50_ms": round(float(p50), 1), "p99_ms": round(float(p99), 1)}


def read_log(audit: Path) -> dict[int, dict[str, Any]]:
    """Decisions of the audit log by number, after `audit verify` has held it for whole."""
    subprocess.run([sys.executable, "-m", "flexolmo", "audit", "verify", str(audit)], check=True)
    entries = {}
    for file in sorted(audit.glob("[0-9]*.jsonl")):
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            entries[entry["number"]] = entry
    return {n: e for n, e in entries.items() if e["kind"] == "decision"}


def main() -> None:
    """Run the load test; exit 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--trust", type=Path, default=DEMO / "coordinator" / "trusted")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--after", type=int, default=200, help="more, for memory afterwards")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--engine", choices=list(RECORDS), default="own")
    parser.add_argument("--engine-python", help="Python of vLLM's environment")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--answers", type=Path, nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.answers:
        answer_alone(asked.model, asked.trust, *asked.answers)
        return
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory)
        record = measure(asked, where)
    held = read_json(asked.out, ValueError) if asked.out.exists() else {}
    write_json(asked.out, held | {RECORDS[asked.engine]: record})
    print(json.dumps(record, indent=2))
    sys.exit(1 if any(record["wrong"].values()) else 0)


def measure(asked: argparse.Namespace, where: Path) -> dict[str, Any]:
    """The record of one load test, with everything that it makes in `where`."""
    (where / "policy").mkdir()
    (where / "policy" / "load.cedar").write_text(POLICIES)
    keys = make_keys(where)
    total = asked.requests + asked.after
    requests = plan_requests(total, keys, asked.seed)
    parts = {
        "sets": plan_sets(keys),
        "load": requests[: asked.requests],
        "after": requests[asked.requests :],
    }
    every = [request for part in parts.values() for request in part]
    for name, part in [*parts.items(), ("all", every)]:
        (where / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    command = [sys.executable, __file__, "--model", asked.model, "--trust", asked.trust]
    command += ["--answers", where / "all.jsonl", where / "answers.json"]
    subprocess.run([str(x) for x in command], check=True)
    found: dict[str, list[dict[str, Any]]] = {}
    memory = {}
    options = ["--engine", asked.engine]
    if asked.engine_python is not None:
        options += ["--engine-python", asked.engine_python]
    with serving(asked.model, asked.trust, where, asked.port, options) as server:
        found["sets"] = run_clients(where, "sets", 1, asked.port)
        before = processor_seconds(server.pid)
        start = time.perf_counter()
        found["load"] = run_clients(where, "load", asked.clients, asked.port)
        seconds = time.perf_counter() - start
        worked = processor_seconds(server.pid) - before
        memory["after_load"] = memory_bytes(server.pid)
        found["after"] = run_clients(where, "after", asked.clients, asked.port)
        memory["after_more"] = memory_bytes(server.pid)
    logged = read_log(where / "audit")
    answers = read_json(where / "answers.json", ValueError)
    wrongs = [judge(parts[name], found[name], answers, logged) for name in parts]
    differences = [
        differ_by(parts[name][one["number"]], one, find_alone(parts[name][one["number"]], answers))
        for name in parts
        for one in found[name]
        if one["status"] == 200
    ]
    streams = [
        x["times"]
        for x in found["load"]
        if x["times"] and parts["load"][x["number"]]["body"]["stream"]
    ]
    gaps = [b - a for times in streams for a, b in pairwise(times)]
    return {
        "engine": asked.engine,
        "requests": asked.requests,
        "clients": asked.clients,
        "sets": len({tuple(r["enabled"]) for r in parts["load"]}),
        "wrong": {kind: sum(w[kind] for w in wrongs) for kind in wrongs[0]}
        | {"cache": count_shared(found["sets"])},
        "log_probabilities_differ_by": max(differences),
        "answers_logged": len(logged),
        "seconds": round(seconds, 1),
        "requests_per_second": round(asked.requests / seconds, 2),
        "requests_per_processor_second": round(asked.requests / worked, 2),
        "time_to_first_token": percentiles([times[0] for times in streams]),
        "between_tokens": percentiles(gaps),
        "memory_bytes": memory,
        "cpu_count": os.cpu_count(),
        "commit": source_commit(),
        "software": software_versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def make_keys(where: Path) -> dict[str, str]:
    """API keys of all people, in a file that the server reads; keys by name."""
    keys = {}
    for who, about in PEOPLE.items():
        command = [sys.executable, "-m", "flexolmo", "serve", "key", "add"]
        command += ["--keys", str(where / "keys.json"), "--subject", who]
        command += ["--groups", ",".join(about["groups"])]
        keys[who] = subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout.strip()
    (where / "auth.toml").write_text('api_keys = "keys.json"\n')
    return keys


if __name__ == "__main__":
    main()
