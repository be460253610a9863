"""Three servers under the same load: stock vLLM, and ours on vLLM and on its own engine.

A mixture as stock's, of a linear router and FFN experts of random weights, is served by ours from
its directory, and by vLLM's own HTTP server from its export, with its defaults but for float32 (of
itself it takes bfloat16) and the memory for keys and values. Locust's clients ask each for the same
texts, all experts on, one server at a time, in turns. Every engine has one thread. What a server
takes is told in processor seconds, its engine's process included; seconds of the clock beside them
are worth something on a quiet machine alone. Needs the extra `bench`, and vLLM's environment.

    .venv/bin/python benchmarks/load_beside_stock.py --engine-python .venv-vllm/bin/python
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from load import (
    RESULTS,
    make_keys,
    memory_bytes,
    percentiles,
    processor_seconds,
    run_clients,
    serving,
)
from shapes import EOS, LINEAR, make_expert, owner_names, public_table, sign_expert

from flexolmo.bundle.trust import TrustedOwners
from flexolmo.data.tokenizer import END_OF_TEXT, train_tokenizer
from flexolmo.files import read_json, write_json
from flexolmo.merge.export import export_stock
from flexolmo.merge.mixture import build_mixture, load_mixture
from flexolmo.model.checkpoint import build_anchor, save_anchor
from flexolmo.model.transformer import ModelConfig, Transformer
from flexolmo.progress import progress
from flexolmo.runtime import software_versions, source_commit

VOCABULARY = 4096
WIDTH, LAYERS, HEADS, FFN = 256, 4, 4, 704
TOP_K = 2
PROMPT_WORDS = 120
NEW_TOKENS = 32
MEMORY_BYTES = 1 << 30  # for keys and values
PORT = 8766
SERVERS = ("vLLM as it comes", "flexolmo serve on vLLM", "flexolmo serve, own engine")
POLICY = """@id("everybody reads all")
permit (principal, action == FlexOlmo::Action::"activate", resource);
"""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def make_words(count: int, seed: int) -> list[str]:
    """Made words, the first of which are the most frequent in texts."""
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnoprstuvwy", k=5)) for _ in range(count)]


def write_text(words: list[str], count: int, seed: int) -> str:
    """`count` of the words, by Zipf's law."""
    chances = [1 / (i + 1) for i in range(len(words))]
    return " ".join(random.Random(seed).choices(words, chances, k=count))


def make_models(where: Path) -> None:
    """Write the mixture to `where`/model, its trust store to `where`/keys, its export to
    `where`/hf."""
    words = make_words(VOCABULARY, 0)
    texts = [write_text(words, 2000, seed) for seed in range(100)]
    tokenizer = train_tokenizer([*texts, " ".join(words)], VOCABULARY)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        d_ff=FFN,
        max_seq_len=1024,
        eos_token_id=EOS,
    )
    model = Transformer(config)
    model.initialise(0)
    with torch.no_grad():
        model.lm_head.weight[EOS] = 0  # so that no text ends before it is as long as was asked
    rows = torch.randn(LAYERS, WIDTH, generator=torch.Generator().manual_seed(9))
    table = public_table(config.vocab_size)
    anchor = build_anchor(model, tokenizer, table, 0.02 * rows, {})
    save_anchor(anchor, where / "anchor")
    bundles = []
    for domain, name in enumerate(owner_names(), start=1):
        private = sign_expert(
            where, name, make_expert(anchor, domain, LINEAR, "ffn"), anchor, LINEAR
        )
        private.unlink()  # the public keys stay
        bundles.append(where / f"{name}.bundle")
    trusted = TrustedOwners.load(where / "keys")
    build_mixture(where / "anchor", bundles, where / "model", trusted, top_k=TOP_K)
    mixture = load_mixture(where / "model", trusted)
    export_stock(mixture, mixture.model, where / "hf", {})


def plan(name: str, count: int, seed: int, key: str) -> list[dict[str, Any]]:
    """Requests to the server of that name, under this API key, of texts that it has not read."""
    words = make_words(VOCABULARY, 0)
    body = {"model": "model", "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True}
    first = END_OF_TEXT if name == SERVERS[0] else ""  # with which ours begins every text
    texts = [first + write_text(words, PROMPT_WORDS, seed * 100_000 + i) for i in range(count)]
    return [{"key": key, "body": body | {"prompt": text}} for text in texts]


@contextmanager
def stock(model: Path, where: Path, python: str) -> Iterator["subprocess.Popen[bytes]"]:
    """vLLM's own HTTP server on loopback until the block ends."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(PORT)]
    command += ["--kv-cache-memory-bytes", str(MEMORY_BYTES), "--dtype", "float32"]
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    quiet = {"VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with open(where / "server.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=kept | quiet)
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise SystemExit((where / "server.log").read_text())
        yield server
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(120)


def start(name: str, models: Path, where: Path, python: str) -> Any:
    """The server of that name, as a context."""
    if name == SERVERS[0]:
        return stock(models / "hf", where, python)
    options = ["--memory-bytes", str(MEMORY_BYTES), "--max-texts-each", "256"]
    if name == SERVERS[1]:
        options += ["--engine", "vllm", "--engine-python", python]
    return serving(models / "model", models / "keys", where, PORT, options)


def measure_once(
    name: str, models: Path, python: str, clients: list[int], count: int, seed: int
) -> dict[int, dict[str, Any]]:
    """Costs of `count` texts to one start of a server, by number of clients."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory)
        (where / "policy").mkdir()
        (where / "policy" / "all.cedar").write_text(POLICY)
        key = make_keys(where)["ada"]
        with start(name, models, where, python) as server:
            write_plan(
                where / "first.jsonl", plan(name, 32, 99, key)
            )  # what is made once is made now
            run_clients(where, "first", 8, PORT)
            for many in clients:
                write_plan(where / f"{many}.jsonl", plan(name, count, seed * 100 + many, key))
                before = processor_seconds(server.pid)
                begun = time.perf_counter()
                answers = run_clients(where, str(many), many, PORT)
                seconds = time.perf_counter() - begun
                worked = processor_seconds(server.pid) - before
                ended = [x.get("ended") for x in answers]
                if ended != ["length"] * count:
                    raise SystemExit(f"{name}: {count} texts were asked for, found {ended}.")
                found[many] = {
                    "worked": worked,
                    "seconds": seconds,
                    "times": [x["times"] for x in answers],
                    "texts": [x["text"] for x in answers],
                    "memory_bytes": memory_bytes(server.pid),
                }
    return found


def write_plan(path: Path, requests: list[dict[str, Any]]) -> None:
    """Write requests as locust's clients read them."""
    path.write_text("".join(json.dumps(r) + "\n" for r in requests))


def sum_up(rounds: list[dict[str, Any]], reference: list[list[str]], count: int) -> dict[str, Any]:
    """Medians over the rounds of a server with so many clients."""
    new = count * NEW_TOKENS
    times = [t for r in rounds for t in r["times"]]
    # vLLM keeps the last bytes of a text to itself if they are only a part of a character
    found = [text.rstrip("\ufffd") for r in rounds for text in r["texts"]]
    told = [text.rstrip("\ufffd") for texts in reference for text in texts]
    equal = sum(a == b for a, b in zip(found, told, strict=True))
    return {
        "new_tokens_per_processor_second": round(
            statistics.median(new / r["worked"] for r in rounds), 1
        ),
        "each_round": [round(new / r["worked"], 1) for r in rounds],
        "new_tokens_per_second": round(statistics.median(new / r["seconds"] for r in rounds), 1),
        "time_to_first_token": percentiles([t[0] for t in times]),
        "between_tokens": percentiles([b - a for t in times for a, b in pairwise(t)]),
        "answers_equal_to_stock": round(equal / (count * len(rounds)), 4),
        "memory_bytes": max(r["memory_bytes"] for r in rounds),
    }


def main() -> None:
    """Measure all, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine-python", required=True, help="Python of vLLM's environment")
    parser.add_argument("--clients", default="8,64")
    parser.add_argument("--requests", type=int, default=192, help="of each number of clients")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    os.environ.update(ONE_THREAD)
    clients = [int(x) for x in asked.clients.split(",")]
    rounds: dict[str, list[dict[int, dict[str, Any]]]] = {name: [] for name in SERVERS}
    with tempfile.TemporaryDirectory() as directory:
        models = Path(directory)
        make_models(models)
        with progress("load", asked.rounds * len(SERVERS), "servers") as meter:
            for seed in range(asked.rounds):
                for name in SERVERS if seed % 2 else reversed(SERVERS):
                    rounds[name].append(
                        measure_once(
                            name, models, asked.engine_python, clients, asked.requests, seed
                        )
                    )
                    meter.advance(note=name)
    record = {
        "servers": {
            name: {
                str(many): sum_up(
                    [r[many] for r in found],
                    [r[many]["texts"] for r in rounds[SERVERS[0]]],
                    asked.requests,
                )
                for many in clients
            }
            for name, found in rounds.items()
        },
        "requests": asked.requests,
        "rounds": asked.rounds,
        "prompt_words": PROMPT_WORDS,
        "new_tokens": NEW_TOKENS,
        "load": os.getloadavg()[0],
        "cpu_count": os.cpu_count(),
        "commit": source_commit(),
        "software": software_versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    held = read_json(asked.out, ValueError) if asked.out.exists() else {}
    write_json(asked.out, held | {"beside_stock": record})
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
