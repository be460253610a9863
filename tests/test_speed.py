"""The benchmark of speed: that all of it runs, that its figures have their places, and resuming."""

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexolmo.cli import app

KINDS = ["upstream", "dense", "stock eager", "all", "ffn", "low_rank"]  # none compiled
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def speed(monkeypatch):
    """The module, measuring as little as it can."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import read_and_write
    import speed
    import timing
    import training

    import data

    monkeypatch.setattr(timing, "LEAST_SECONDS", 0)
    monkeypatch.setattr(timing, "GEMM_WIDTH", 64)
    monkeypatch.setattr(timing, "STREAM_BYTES", 2**16)
    monkeypatch.setattr(read_and_write, "PROMPT_TOKENS", 8)
    monkeypatch.setattr(read_and_write, "NEW_TOKENS", 3)
    monkeypatch.setattr(
        data, "run_job", lambda name, *given, quiet=False: data.JOBS[name](*map(str, given))
    )  # not in a process of its own
    package = str(BENCHMARKS.parent / "src" / "flexolmo")  # what is prepared
    paths = SimpleNamespace(get_paths=lambda: dict.fromkeys(("purelib", "stdlib"), package))
    monkeypatch.setattr(data, "sysconfig", paths)
    monkeypatch.setattr(data.os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(data, "measure", partial(data.measure, megabytes=0.3, size="pico"))
    monkeypatch.setattr(training, "measure", partial(training.measure, kinds=KINDS))
    monkeypatch.setattr(training, "peak_memory", lambda *_: 2**20)  # takes processes
    monkeypatch.setattr(data, "NUM_OWNERS", 2)
    time_command = data.time_command
    monkeypatch.setattr(  # torch takes seconds to load
        data,
        "time_command",
        lambda *words: (
            time_command(*words)
            if words[1:] == ()
            else data.watch(lambda: app([*map(str, words)], standalone_mode=False))["seconds"]
        ),
    )
    monkeypatch.setattr(speed, "READ_SHAPES", ((2, 24),))
    monkeypatch.setattr(speed, "WRITE_BATCHES", (2,))
    monkeypatch.setattr(speed, "RANKS", (2,))
    yield speed
    torch.set_num_threads(1)


def figures(level: dict, *names: str) -> list[float]:
    return [level[name] for name in names]


def test_every_figure_is_measured_and_has_its_place(speed, tmp_path, capsys):
    out = tmp_path / "speed.json"
    words = ["--sizes", "pico", "--threads", "1", "--rounds", "1", "--out", str(out)]
    speed.main(words)
    found = json.loads(out.read_text())
    assert found["command"] == f"python benchmarks/speed.py {' '.join(words)}"
    assert "commit" in found and found["rounds"] == 1
    assert found["machine"].keys() >= {"cpu", "cores", "load", "software"}
    seconds = list(found["machine"]["gemm_gflops_by_threads"].values())
    read, write = found["prefill"]["pico"]["2x24"], found["decode"]["pico"]["2"]
    seconds += figures(read, "vs_stock", "pct_gemm", "evidence_vs_linear")
    seconds += figures(write, "vs_stock", "times_floor", "mixed_mask_cost")
    for default in (read["default"], write["default"]):
        seconds += figures(default, "vs_anchor", "flops_vs_anchor", "times_flops")
        assert 1 < default["flops_vs_anchor"] < 8
    assert read["vs_stock"] == min(read[k]["vs_stock"] for k in ("top2", "top4"))
    assert write["times_floor"] == max(write[k]["times_floor"] for k in ("top2", "top4"))
    seconds += figures(found["router"]["pico"]["2x24"], "microseconds_a_token", "vs_loop")
    for scope in ("all", "ffn", "low_rank"):
        names = ("vs_upstream", "vs_dense", "vs_stock", "pct_gemm", "peak_memory_vs_upstream")
        seconds += figures(found["training"]["pico"][scope], *names)
    seconds += figures(found["data"]["mixture"], "help_seconds", "first_token_seconds")
    seconds.append(found["data"]["prepare"]["share_of_encode_batch"])
    seconds += figures(found["low_rank"]["pico"]["2"], "vs_anchor", "flops_vs_anchor")
    assert all(x > 0 and math.isfinite(x) for x in seconds)
    assert list(tmp_path.iterdir()) == [out]
    assert " | - |" not in capsys.readouterr().out, "a row has a place where nothing is"


def test_a_stopped_run_is_resumed_where_it_was(speed, tmp_path, monkeypatch):
    taken = []

    def stop(size, threads, rounds):
        assert torch.get_num_threads() == threads
        taken.append((size, threads))
        if len(taken) == 2:
            raise KeyboardInterrupt
        return {"vs_upstream": 2.0 + len(taken)}

    monkeypatch.setattr(speed, "time_training", stop)
    monkeypatch.setattr(speed, "source_commit", lambda: "here")
    out = tmp_path / "speed.json"
    words = ["--sizes", "S", "--parts", "training", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        speed.main(words)
    assert not out.exists()
    with pytest.raises(SystemExit, match="7"):
        speed.main([*words, "--resume", "--rounds", "7"])
    speed.main([*words, "--resume"])
    assert taken == [("S", 1), ("S", 2), ("S", 2)]
    found = json.loads(out.read_text())
    assert found["training"] == {"S": {"vs_upstream": 3.0}}
    assert found["two_threads"]["training"] == {"S": {"vs_upstream": 5.0}}


def test_the_table_shows_what_misses_its_bar_in_bold(speed):
    found = {
        "training": {"S": {"all": {"vs_upstream": 1.2}}, "M": {"all": {"vs_upstream": 1.4}}},
        "two_threads": {"training": {"S": {"all": {"vs_upstream": 1.5}}}},
    }
    table = speed.markdown_table(found).splitlines()
    assert table[0] == "| one thread / two | bar | S | M |"
    assert table[2].endswith("| ≥ 1.3x | **1.20x** / 1.50x | 1.40x / - |")
    assert len(table) == 3


def test_preparing_and_starting_have_a_table_of_their_own(speed):
    rates = {"prepare": {"megabytes_per_processor_second": 1.5}}
    found = {"data": {"prepare": {"runs": rates}, "mixture": {"help_seconds": 0.2}}}
    table = speed.markdown_table(found).splitlines()
    assert (
        table[2]
        == "| prepare text | ≥ 2 MB/s of processor time | **1.50 MB/s of processor time** |"
    )
    assert table[4] == "| `flexolmo --help` | ≤ 0.3 s | 0.20 s |"
    assert len(table) == 6


def test_an_unknown_size_is_refused(speed, capsys):
    with pytest.raises(SystemExit):
        speed.main(["--sizes", "S,XL"])
    assert "found XL; choose among pico, S, M, L" in capsys.readouterr().err
