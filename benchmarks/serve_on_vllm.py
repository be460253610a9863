"""Mixtures on vLLM: 200 mixed requests against each served alone, and new tokens a second.

Run it with the Python of vLLM's environment (docs/guides/vllm.md). Every engine runs in a process
of its own, one at a time, in turns and on one thread; seconds are the processor's, as the machine
may be busy. What reading the prompts takes is taken off. Stock vLLM runs stock's mixture as
exported, through its transformers backend; the plug-in runs the mixture's directory.

    .venv-vllm/bin/python benchmarks/serve_on_vllm.py                  # half an hour
    .venv-vllm/bin/python benchmarks/serve_on_vllm.py --size S --rounds 1 --out vllm.json
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "vllm.json"
BATCHES = (1, 16, 64)
PROMPT_TOKENS = 128
NEW_TOKENS = 32
NUM_REQUESTS = 200
NUM_SETS = 12
SHARED_TOKENS = 96  # with which every other prompt of the mixed requests begins
MEMORY_BYTES = 1 << 29
LOGPROBS = 1
DEFAULT, STOCK = "default", "stock"  # mixtures: ours of whole models, and stock's
TOP_K = {DEFAULT: None, STOCK: 2}
ENGINES = {
    "own, default mixture": ("own", DEFAULT),
    "plug-in, default mixture": ("plugin", DEFAULT),
    "own, stock's mixture": ("own", STOCK),
    "plug-in, stock's mixture": ("plugin", STOCK),
    "vLLM as it comes, stock's mixture": ("vllm", STOCK),
}

# prompts, experts that are on for each, tokens to write: tokens, log-probabilities and number of
# cached tokens of each
Generate = Callable[
    [Sequence[Sequence[int]], Sequence[Sequence[str]], int],
    list[tuple[list[int], list[float], int]],
]


# --- models -------------------------------------------------------------------------------------


def make_models(where: Path, size: str) -> None:
    """Directories of both mixtures in `where`, and stock's as exported."""
    import safetensors.torch
    from shapes import LINEAR, make_anchor, make_expert, owner_names

    from flexolmo.bundle.bundle import write_bundle
    from flexolmo.bundle.manifest import build_manifest
    from flexolmo.bundle.signing import create_key
    from flexolmo.bundle.terms import make_terms
    from flexolmo.bundle.trust import ANY_SIGNER
    from flexolmo.merge.export import export_stock
    from flexolmo.merge.mixture import build_mixture, load_mixture
    from flexolmo.model.checkpoint import save_anchor
    from flexolmo.model.shape import architecture_of, shape_of_tensors
    from flexolmo.model.statistics import EvidenceSettings
    from flexolmo.train.expert import ExpertRecipe

    anchor = make_anchor(size)
    save_anchor(anchor, where / "anchor")
    create_key(where / "key")
    for kind, router, scope in ((DEFAULT, EvidenceSettings(), "all"), (STOCK, LINEAR, "ffn")):
        bundles = []
        for domain, name in enumerate(owner_names(), start=1):
            tensors = make_expert(anchor, domain, router, scope)
            shapes = {n: tuple(t.shape) for n, t in tensors.items()}
            weights = safetensors.torch.save({n: t.contiguous() for n, t in tensors.items()})
            manifest = build_manifest(
                weights,
                name=name,
                owner="Ann",
                anchor_digest=anchor.digest,
                architecture=architecture_of(
                    anchor.config, shape_of_tensors(shapes, anchor.config)
                ),
                router_kind=router.kind,
                router_settings=router.model_dump(mode="json"),
                recipe=ExpertRecipe(scope=scope, router=router).model_dump(mode="json"),
                tokens_seen=1,
                data_card_digest="sha256:" + "0" * 64,
                serial=1,
                licence="MIT",
                terms=make_terms("For a benchmark.", ["any"]),
            )
            bundles.append(
                write_bundle(where / kind / f"{name}.bundle", weights, manifest, where / "key")
            )
        build_mixture(
            where / "anchor", bundles, where / kind / "model", ANY_SIGNER, top_k=TOP_K[kind]
        )
    mixture = load_mixture(where / STOCK / "model", ANY_SIGNER)
    export_stock(mixture, mixture.model, where / "hf", {})


# --- engines ------------------------------------------------------------------------------------


def opening_of(model: Path) -> Any:
    """Settings of an engine on a mixture."""
    from flexolmo.inference.opening import Opening

    return Opening(model=model, trusts_any_signer=True, memory_bytes=MEMORY_BYTES)


def open_own(model: Path, experts: Sequence[str] | None = None) -> Generate:
    """Our own engine, on all experts or on some alone."""
    from flexolmo.inference.batching import EngineSettings
    from flexolmo.inference.engine import Ended, EngineRequest, Event, TokenWritten
    from flexolmo.inference.open_engine import open_engine
    from flexolmo.inference.sampling import Sampling

    settings = EngineSettings(memory_bytes=MEMORY_BYTES)
    engine = open_engine(model, opening_of(model).read_owners, settings, experts=experts)

    class Heard:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.logs: list[float] = []
            self.num_cached = 0
            self.is_over = threading.Event()

        def __call__(self, event: Event) -> None:
            if isinstance(event, TokenWritten):
                self.tokens.append(event.token)
                self.logs += [event.score.logprob] if event.score else []
            elif isinstance(event, Ended):
                assert event.reason == "max_new_tokens", event
                self.num_cached = event.cached_tokens
                self.is_over.set()

    def generate(
        prompts: Sequence[Sequence[int]], sets: Sequence[Sequence[str]], count: int
    ) -> list[tuple[list[int], list[float], int]]:
        digest = engine.facts.digest
        heard = []
        for prompt, names in zip(prompts, sets, strict=True):
            sampling = Sampling(max_new_tokens=count, temperature=0)
            request = EngineRequest(
                prompt, frozenset(names), digest, sampling, num_logprobs=LOGPROBS
            )
            heard.append(Heard())
            engine.submit(request, heard[-1])
        for one in heard:
            one.is_over.wait()
        return [(one.tokens, one.logs, one.num_cached) for one in heard]

    return generate


def open_vllm(arguments: dict[str, Any], has_experts: bool) -> Generate:
    """vLLM with these arguments."""
    from vllm import LLM, SamplingParams

    llm = LLM(**arguments)

    def generate(
        prompts: Sequence[Sequence[int]], sets: Sequence[Sequence[str]], count: int
    ) -> list[tuple[list[int], list[float], int]]:
        parameters = [
            SamplingParams(
                temperature=0,
                max_tokens=count,
                ignore_eos=True,
                detokenize=False,
                logprobs=LOGPROBS,
                extra_args={"experts": list(names)} if has_experts else None,
            )
            for names in sets
        ]
        texts = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        answers = []
        for found in llm.generate(texts, parameters, use_tqdm=False):
            (written,) = found.outputs
            tokens = list(written.token_ids)
            logs = [
                own[token].logprob
                for own, token in zip(written.logprobs or [], tokens, strict=False)
            ]
            answers.append((tokens, logs, found.num_cached_tokens or 0))
        return answers

    return generate


def open_plugin(model: Path, where: Path) -> Generate:
    """vLLM with the plug-in."""
    from flexolmo_vllm import register
    from flexolmo_vllm.arguments import engine_arguments

    arguments = engine_arguments(opening_of(model), where)
    register()
    return open_vllm(arguments, has_experts=True)


def open_engine_of(what: str, kind: str, models: Path, where: Path) -> Generate:
    """The engine `what` on the mixture `kind`; `where` is for what it needs beside."""
    model = models / kind / "model"
    if what == "own":
        return open_own(model)
    if what == "plugin":
        return open_plugin(model, where)
    from flexolmo_vllm.arguments import engine_arguments

    like_ours = engine_arguments(opening_of(model), where)
    ours = ("load_format", "model_loader_extra_config", "scheduler_cls", "worker_cls")
    ours += ("max_model_len",)
    arguments = {name: value for name, value in like_ours.items() if name not in ours}
    return open_vllm(arguments | {"model": str(models / "hf")}, has_experts=False)


# --- what is measured ---------------------------------------------------------------------------


def measure_speed(generate: Generate, size: str, seed: int) -> dict[str, float]:
    """New tokens a processor second by batch, all experts on, less what the prompts take."""
    from shapes import made_texts, owner_names

    found = {}
    for batch in BATCHES:
        seconds = {}
        for number, count in enumerate((NEW_TOKENS + 1, 1)):
            # other texts each time, so that no engine has read them
            ids = made_texts(size, batch, PROMPT_TOKENS, seed=10 * seed + number).tolist()
            start = time.process_time()
            generate(ids, [owner_names()] * batch, count)
            seconds[count] = time.process_time() - start
        found[str(batch)] = batch * NEW_TOKENS / (seconds[NEW_TOKENS + 1] - seconds[1])
    return found


def mixed_requests(size: str) -> tuple[list[list[int]], list[tuple[str, ...]]]:
    """Prompts, every other with one beginning, and sets of experts, NUM_SETS of them."""
    from shapes import made_texts, owner_names

    names = owner_names()
    every = [c for n in range(len(names) + 1) for c in itertools.combinations(names, n)]
    sets = [every[i * (len(every) - 1) // (NUM_SETS - 1)] for i in range(NUM_SETS)]
    texts = made_texts(size, NUM_REQUESTS, PROMPT_TOKENS, seed=99).tolist()
    for i, text in enumerate(texts):
        if i % 2:
            text[:SHARED_TOKENS] = texts[1][:SHARED_TOKENS]
        texts[i] = text[: PROMPT_TOKENS - i % 29]
    return texts, [sets[(i // 2) % NUM_SETS] for i in range(NUM_REQUESTS)]


def measure_truth(models: Path, size: str, where: Path) -> dict[str, Any]:
    """Differences of mixed requests on vLLM to each served alone, by our own engine on its experts
    alone; and tokens that a set has read from what another had computed."""
    prompts, sets = mixed_requests(size)
    model = models / DEFAULT / "model"
    plugin = open_plugin(model, where)
    asked = sorted(set(sets))
    first = [plugin([prompts[1]], [names], 1)[0][2] for names in asked]
    found = plugin(prompts, sets, NEW_TOKENS)
    wrong = 0
    differences = []
    for names in asked:
        own = open_own(model, names)
        mine = [i for i in range(NUM_REQUESTS) if sets[i] == names]
        alone = own([prompts[i] for i in mine], [names] * len(mine), NEW_TOKENS)
        for i, (tokens, logs, _) in zip(mine, alone, strict=True):
            wrong += found[i][0] != tokens
            if found[i][0] == tokens:
                differences += [abs(a - b) for a, b in zip(found[i][1], logs, strict=True)]
    return {
        "requests": NUM_REQUESTS,
        "sets": len(asked),
        "answers_with_another_token": wrong,
        "largest_difference_of_log_probabilities": max(differences),
        "tokens_cached_across_sets": sum(first),
        "tokens_cached_within_sets": sum(cached for *_, cached in found),
    }


def in_process(models: Path, size: str, what: str, seed: int) -> Any:
    """What this program measures in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, "--size", size, "--models", str(models)]
        command += ["--measure", what, "--seed", str(seed), "--out", file.name]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        subprocess.run(command, check=True, env=environment)
        return json.loads(Path(file.name).read_text())


def main() -> None:
    """Measure all, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        measure(asked)
        return
    from flexolmo.files import write_json
    from flexolmo.progress import progress
    from flexolmo.runtime import software_versions, source_commit

    with tempfile.TemporaryDirectory() as directory:
        models = Path(directory)
        make_models(models, asked.size)
        speeds: dict[str, list[dict[str, float]]] = {name: [] for name in ENGINES}
        with progress("measure", 1 + asked.rounds * len(ENGINES), "runs") as meter:
            truth = in_process(models, asked.size, "truth", 0)
            meter.advance(1)
            for seed in range(asked.rounds):
                for name in ENGINES if seed % 2 else reversed(ENGINES):
                    speeds[name].append(in_process(models, asked.size, name, seed + 1))
                    meter.advance(1)
    record = {
        "size": asked.size,
        "truth": truth,
        "new_tokens_per_processor_second": {
            name: {b: round(statistics.median(r[b] for r in found), 1) for b in found[0]}
            for name, found in speeds.items()
        },
        "rounds": asked.rounds,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "cpu_count": os.cpu_count(),
        "commit": source_commit(),
        "software": software_versions() | {"vllm-cpu": version("vllm-cpu")},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    write_json(asked.out, record)
    print(json.dumps(record, indent=2))


def measure(asked: argparse.Namespace) -> None:
    """Measure one thing, in this process."""
    import torch

    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory)
        if asked.measure == "truth":
            found: dict[str, Any] = measure_truth(asked.models, asked.size, where)
        else:
            generate = open_engine_of(*ENGINES[asked.measure], asked.models, where)
            assert torch.get_num_threads() == 1, torch.get_num_threads()
            measure_speed(generate, asked.size, 0)  # compiles what it does at first
            found = measure_speed(generate, asked.size, asked.seed)
    asked.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
