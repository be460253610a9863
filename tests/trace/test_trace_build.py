"""Making an index: whole or not at all, gone on with after a kill, and private."""

import os
import random
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest

from flexolmo.data.batches import open_set
from flexolmo.errors import DataError
from flexolmo.trace import build
from flexolmo.trace.build import build_index, cut_documents
from flexolmo.trace.index import open_index, read_card
from made_sets import made_text
from made_traces import prepare_text

PARTS = 800  # tokens


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("set"), [made_text(n) for n in range(40)])


def content(directory):
    """Every file below, by name."""
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != "plan.json")
    return {str(p.relative_to(directory)): p.read_bytes() for p in paths}


@pytest.fixture(scope="module")
def index_dir(prepared, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "index"
    build_index(prepared, out, PARTS)
    return out


def test_an_index_holds_every_document_of_the_training_split_in_order(prepared, index_dir):
    index = open_index(index_dir)
    split = open_set(prepared).splits["train"]
    ids = [i for shard in index.shards for i in shard.ids(0, shard.num_tokens)]
    assert len(index.shards) > 3
    assert ids == split.tokens.tolist()
    assert index.card.documents == sum(len(s.documents) - 1 for s in index.shards)
    assert index.card.bytes == split.bytes.sum()
    names = [s.name(n) for s in index.shards for n in range(len(s.documents) - 1)]
    from flexolmo.data.documents import read_documents

    assert names == [d.id for d in read_documents(prepared / "train.jsonl.zst")]


def test_suffixes_are_in_order(index_dir):
    for shard in open_index(index_dir).shards:
        ids = shard.ids(0, shard.num_tokens)
        suffixes = [shard.place(k) for k in range(shard.num_tokens)]
        assert suffixes == sorted(range(len(ids)), key=lambda place: ids[place:])


def test_only_its_owner_reads_an_index(index_dir):
    modes = {stat.S_IMODE(p.stat().st_mode) for p in index_dir.rglob("*") if p.is_file()}
    assert modes == {0o600}
    directories = [index_dir, *(p for p in index_dir.rglob("*") if p.is_dir())]
    assert {stat.S_IMODE(p.stat().st_mode) for p in directories} == {0o700}


def test_processes_change_nothing(prepared, index_dir, tmp_path):
    build_index(prepared, tmp_path / "index", PARTS, workers=2)
    assert content(tmp_path / "index") == content(index_dir)


# Kills itself with SIGKILL before its Nth rename of anything.
KILLED = """
import os, signal, sys
from pathlib import Path
left = int(sys.argv[3])
replace = os.replace
def count(*args):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*args)
os.replace = count
from flexolmo.trace.build import build_index
build_index(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[4]))
"""


@pytest.mark.parametrize("step", [1, 4, 9])
def test_a_run_that_is_killed_goes_on_from_the_parts_that_are_done(
    prepared, index_dir, tmp_path, step, monkeypatch
):
    out = tmp_path / "index"
    words = [sys.executable, "-c", KILLED, str(prepared), str(out), str(step), str(PARTS)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(words, env=environment).returncode == -signal.SIGKILL
    assert not out.exists()
    part = tmp_path / "index.part"
    done = {p.name: p.stat().st_ino for p in part.glob("shard-*")}
    assert bool(done) == (step > 1)
    assert stat.S_IMODE(part.stat().st_mode) == 0o700

    made = []
    write = build.write_shard
    monkeypatch.setattr(build, "write_shard", lambda *a: (made.append(a), write(*a)))
    card = build_index(prepared, out, PARTS)
    assert len(made) == len(card.shards) - len(done)
    assert {name: (out / name).stat().st_ino for name in done} == done
    assert content(out) == content(index_dir)
    assert not part.exists()


def test_what_was_begun_for_another_set_is_not_used(prepared, tmp_path, index_dir):
    part = tmp_path / "index.part"
    (part / "shard-00000").mkdir(parents=True)
    (part / "plan.json").write_text('"sha256:other"')
    (part / "shard-00000/tokens.npy").write_bytes(b"stale")
    (tmp_path / "away").write_text("kept")
    (part / "link").symlink_to(tmp_path / "away")
    build_index(prepared, tmp_path / "index", PARTS)
    assert content(tmp_path / "index") == content(index_dir)
    assert (tmp_path / "away").read_text() == "kept"


def test_the_same_index_is_not_made_twice_and_another_is_not_replaced(prepared, index_dir):
    before = content(index_dir)
    assert build_index(prepared, index_dir, PARTS) == read_card(index_dir)
    with pytest.raises(DataError, match="is not replaced"):
        build_index(prepared, index_dir, PARTS + 1)
    assert content(index_dir) == before


def test_two_runs_do_not_make_one_index_at_once(prepared, tmp_path):
    from flexolmo.files import lock_directory

    (tmp_path / "index.part").mkdir()
    with (
        lock_directory(tmp_path / "index.part", wait=False) as is_held,
        pytest.raises(DataError, match="another run"),
    ):
        assert is_held
        build_index(prepared, tmp_path / "index", PARTS)


@pytest.mark.parametrize("name", ["counts.npy", "tokenizer.json", "shard-00001"])
def test_a_changed_byte_of_any_file_that_the_card_names_is_found(prepared, tmp_path, name):
    build_index(prepared, tmp_path / "index", PARTS)
    path = tmp_path / "index" / name
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.name == "shard.json":
            continue  # read while an index is made, never after
        data = file.read_bytes()
        place = random.Random(0).randrange(len(data))
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(DataError, match=file.name if path.is_dir() else name.split(".")[0]):
            open_index(tmp_path / "index")
        file.write_bytes(data)
    open_index(tmp_path / "index")


def test_a_card_without_a_digest_is_refused(index_dir, tmp_path):
    import json
    import shutil

    shutil.copytree(index_dir, tmp_path / "index")
    path = tmp_path / "index/card.json"
    card = json.loads(path.read_text())
    for digests, name in ((card["shards"][0]["digests"], "tokens"), (card["digests"], "counts")):
        digest = digests.pop(f"{name}.npy")
        path.write_text(json.dumps(card))
        with pytest.raises(DataError, match=rf"{name}\.npy"):
            open_index(tmp_path / "index")
        digests[f"{name}.npy"] = digest


def test_parts_are_whole_documents_and_as_large_as_they_may_be():
    rng = random.Random(1)
    for _ in range(200):
        lengths = [rng.randint(1, 9) for _ in range(rng.randint(1, 20))]
        offsets = np.cumsum([0, *lengths])
        size = rng.randint(1, 12)
        ranges = cut_documents(offsets, size)
        assert [n for a, b in ranges for n in range(a, b)] == list(range(len(lengths)))
        for a, b in ranges:
            assert b == a + 1 or sum(lengths[a:b]) <= size
            assert b == len(lengths) or sum(lengths[a : b + 1]) > size
