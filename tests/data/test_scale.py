"""Parts give the bytes of the small path, also when they are cut off midway."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from contextlib import contextmanager
from errno import ENOSPC
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexolmo.data import pieces
from flexolmo.data.corpus import Corpus, open_corpus
from flexolmo.data.formats import READ_AS_USUAL
from flexolmo.data.kept_work import hold_work, remove_work, work_directory
from flexolmo.data.prepare import Preparation, prepare_set
from flexolmo.errors import ConfigError, DataError, DiskFullError, FlexOlmoError, UnfinishedError
from made_sets import SMALL, made_text, word_tokenizer, write_raw

pytest.importorskip("datatrove", reason="datatrove is not here: pip install 'flexolmo[scale]'")
from flexolmo.data import scale
from flexolmo.data.parts import STAGES, Stage, do_part, share_of
from flexolmo.data.scale import Execution, prepare_at_scale

NEAR = SMALL.model_copy(update={"near_duplicate": 0.7})


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    monkeypatch.setattr(os, "sync", lambda: None)  # waits for all that the machine writes


def _corpus(directory, files):
    """Texts with repeats of all kinds, in so many files."""
    rng = random.Random(files)
    texts = [made_text(i % 33 + 50) + " more" * (i % 3) for i in range(90)] + ["", "é\x00" * 30]
    texts += [made_text(3), "tiny"]
    rng.shuffle(texts)
    for number in range(files):
        write_raw(directory / "in" / str(number), "owner", texts[number::files])
    return open_corpus(directory / "in", "owner")


def _files(directory):
    return {f.name: f.read_bytes() for f in directory.iterdir() if f.name != "salt"}


@pytest.mark.parametrize(("files", "tasks"), [(1, 3), (3, 2)])
def test_the_result_is_that_of_the_small_path(tmp_path, public_set, monkeypatch, files, tasks):
    monkeypatch.setattr(pieces, "_BYTES_AT_ONCE", 900)
    corpus = _corpus(tmp_path, files)
    said: list[list[str]] = [[], []]
    card = prepare_set(corpus, tmp_path / "a", None, public_set, (), NEAR, say=said[0].append)
    task = Preparation(corpus, tmp_path / "b", None, public_set, (), NEAR)
    found = prepare_at_scale(task, say=said[1].append, execution=Execution(tasks=tasks))
    assert found == card and said[0] == said[1] != []
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    assert not work_directory(tmp_path / "b").exists()
    assert prepare_at_scale(task, say=pytest.fail) == card
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o700


def test_losses_and_text_that_the_tokenizer_changes_are_told_in_the_order_of_reading(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(pieces, "_DOCUMENTS_AT_ONCE", 1)
    texts = [f"{'a ' * (i + 10)}b" for i in range(12)] + ["a a a a a a a a a a a a c b a"]
    corpus = write_raw(tmp_path / "in", "owner", [texts[0], "tiny", "", *texts[1:]])
    tokenizer = word_tokenizer("a", "b", " ")
    card = prepare_set(corpus, tmp_path / "a", tokenizer, settings=SMALL, say=len)
    task = Preparation(corpus, tmp_path / "b", tokenizer, settings=SMALL)
    prepare_at_scale(task, say=len, execution=Execution(tasks=2))
    assert card["tokenizer"]["changed_documents"] == 1
    assert [*card["removed"]["documents"]] == ["too short", "empty"]
    assert _files(tmp_path / "a") == _files(tmp_path / "b")


def _replace(monkeypatch, stage, work_on):
    """Let `work_on(real, plan, part)` do the parts of a stage."""
    real = STAGES[stage]
    changed = Stage(lambda plan, part: work_on(real.work_on, plan, part), real.is_dealt_out)
    monkeypatch.setitem(STAGES, stage, changed)


@pytest.mark.parametrize(
    "cut_off", [("clean", 1), ("choose", 0), ("tokenize", 1)], ids=lambda one: one[0]
)
def test_a_run_that_was_cut_off_goes_on_where_it_was(tmp_path, public_set, monkeypatch, cut_off):
    """The task that was cut off is done again, from what it left; those before it are not."""
    monkeypatch.setattr(pieces, "_BYTES_AT_ONCE", 900)
    corpus = _corpus(tmp_path, 2)
    prepare_set(corpus, tmp_path / "a", None, public_set, (), NEAR, say=len)
    task = Preparation(corpus, tmp_path / "b", None, public_set, (), NEAR)
    ran = []
    for kind in STAGES:

        def work_on(real, plan, part, kind=kind):
            ran.append((kind, part))
            found = real(plan, part)
            if (kind, part) == cut_off and ran.count(cut_off) == 1:
                raise KeyboardInterrupt
            return found

        _replace(monkeypatch, kind, work_on)
    with pytest.raises(KeyboardInterrupt):
        prepare_at_scale(task, say=len, execution=Execution(tasks=2))
    prepare_at_scale(task, say=len, execution=Execution(tasks=2))
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    twice = {one for one in ran if ran.count(one) > 1}
    assert twice == {cut_off}


def _left_by_a_killed_run(task, tasks, monkeypatch):
    """Work of a run that was killed when it had cleaned; the directory of the work."""
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        _replace(m, "choose", _killed)
        prepare_at_scale(task, execution=Execution(tasks=tasks))
    return work_directory(task.out)


def _killed(*_):
    raise KeyboardInterrupt


@pytest.fixture
def task(tmp_path, public_set):
    corpus = _corpus(tmp_path, 2)
    return Preparation(corpus, tmp_path / "b", None, public_set, (), NEAR)


def test_a_late_second_run_of_a_task_that_is_done_changes_no_file(task, monkeypatch):
    left = _left_by_a_killed_run(task, 2, monkeypatch)
    (work,) = (path for path in left.iterdir() if path.is_dir())
    before = {f.name: (f.stat().st_ino, f.read_bytes()) for f in work.glob("*-0000*")}
    assert len(before) == 4 * 2 + 2 + 1  # files and locks of two tasks, and a lock of choosing
    do_part(work, "clean", 1)
    assert {f.name: (f.stat().st_ino, f.read_bytes()) for f in work.glob("*-0000*")} == before


@pytest.mark.parametrize("name", ["pieces", "signatures", "texts"])
@pytest.mark.parametrize("is_gone", [True, False])
def test_a_part_that_lost_documents_is_refused(task, monkeypatch, name, is_gone):
    left = _left_by_a_killed_run(task, 2, monkeypatch)
    (file,) = left.glob(f"*/{name}-00001")
    if is_gone:
        file.unlink()
    else:
        os.truncate(file, 0)
    with pytest.raises(DataError, match="missing" if is_gone else "not as its task left it"):
        prepare_at_scale(task)
    assert not left.exists()  # the next run begins anew


def test_tokens_that_are_not_as_written_are_refused(task, monkeypatch):
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        _replace(m, "write", _killed)
        prepare_at_scale(task, say=len)
    (file,) = work_directory(task.out).glob("*/tokens-00000")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(DataError, match="not as its task left it"):
        prepare_at_scale(task)


def test_a_living_run_keeps_its_work_whatever_another_asks_for(task, monkeypatch):
    left = _left_by_a_killed_run(task, 2, monkeypatch)
    before = sorted(left.rglob("*"))
    holder = (
        "import sys; from pathlib import Path; from flexolmo.data.kept_work import hold_work\n"
        "with hold_work(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, str(task.out)]
    other = Preparation(task.corpus, task.out, None, task.public, (), SMALL)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as living:
        living.stdout.readline()
        for asked, tasks in ((task, None), (task, 3), (other, 2)):
            with pytest.raises(FlexOlmoError, match="Another run is at work"):
                prepare_at_scale(asked, execution=Execution(tasks=tasks))
        prepare_set(task.corpus, task.out, None, task.public, (), SMALL, say=len)
        assert sorted(left.rglob("*")) == before
        living.communicate()
    assert living.returncode == 0
    with hold_work(task.out):  # it was freed
        pass


def test_the_number_of_tasks_is_that_of_the_run_that_was_killed(task, monkeypatch):
    left = _left_by_a_killed_run(task, 3, monkeypatch)
    with pytest.raises(ConfigError, match=r"A run of 3 tasks .* 2 were asked for"):
        prepare_at_scale(task, execution=Execution(tasks=2))
    assert left.exists()
    _replace(monkeypatch, "clean", pytest.fail)
    prepare_at_scale(task, say=len, execution=Execution(workers=1))
    assert not left.exists() and not left.with_name(left.name + ".lock").exists()


def test_other_settings_begin_anew_and_no_text_stays_after_a_refusal(task, monkeypatch):
    left = _left_by_a_killed_run(task, 3, monkeypatch)
    other = Preparation(task.corpus, task.out, None, task.public, (), SMALL)
    began = []
    _replace(monkeypatch, "clean", lambda *_: began.append(len([*left.iterdir()])))
    _replace(monkeypatch, "choose", _refused)
    with pytest.raises(DataError, match="refused"):
        prepare_at_scale(other, execution=Execution(tasks=2))
    assert began == [2, 2]  # the plan and its work, without that of before
    assert not [*task.out.parent.rglob("pieces-*")] and not left.exists()


def _refused(*_):
    raise DataError("refused")


@pytest.mark.parametrize("is_refused", [True, False])
def test_the_small_path_removes_what_a_killed_run_in_tasks_left(task, monkeypatch, is_refused):
    left = _left_by_a_killed_run(task, 2, monkeypatch)
    if is_refused:
        monkeypatch.setattr("flexolmo.data.prepare.choose_pieces", _refused)
        with pytest.raises(DataError, match="refused"):
            prepare_set(task.corpus, task.out, None, task.public, (), NEAR)
    else:
        prepare_set(task.corpus, task.out, None, task.public, (), NEAR, say=len)
    assert not left.exists()


def test_work_and_new_directories_are_the_owners_alone(task, tmp_path, monkeypatch):
    new = Preparation(task.corpus, tmp_path / "new" / "b", None, task.public, (), NEAR)
    left = _left_by_a_killed_run(new, 2, monkeypatch)
    inside = [path for path in left.iterdir() if path.is_dir()]
    modes = [path.stat().st_mode & 0o777 for path in (new.out.parent, left, *inside)]
    assert modes == [0o700] * 3
    left.chmod(0o770)
    with pytest.raises(FlexOlmoError, match="not a directory that you alone can read"):
        prepare_at_scale(new)
    left.chmod(0o700)
    left.rename(tmp_path / "elsewhere")
    left.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FlexOlmoError, match="not a directory that you alone can read"):
        prepare_at_scale(new)
    assert (tmp_path / "elsewhere" / "plan.json").exists()


def test_a_full_disk_is_named_and_nothing_stays(task, monkeypatch):
    def full(*_):
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr(pieces.PieceStore, "add", full)
    with pytest.raises(DiskFullError, match=r"b cannot be written: No space.*Nothing was left"):
        prepare_at_scale(task)
    assert not work_directory(task.out).exists()
    sent = pickle.loads(pickle.dumps(DiskFullError("full", "No space")))  # by a worker
    assert (str(sent), sent.reason) == ("full", "No space")


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(1, 12))
@example([5, 0], 1)
def test_every_batch_of_documents_is_one_parts_in_the_order_of_reading(sizes, parts):
    files = [(Path(str(number)), str(number)) for number in range(len(sizes))]  # not on the disk
    corpus = Corpus({"name": "a"}, files, READ_AS_USUAL, "a", {})
    shares = [share_of(corpus, sizes, part, parts) for part in range(parts)]
    read = [int(number) for some, _, lane, _ in shares if lane == 0 for _, number in some.files]
    assert read == list(range(len(files)))
    for some, group, _, lanes in shares:
        assert lanes in (parts // len(files), -(-parts // len(files))) or parts < len(files)
        same = [lane for other, g, lane, _ in shares if g == group and other.files == some.files]
        assert sorted(same) == list(range(lanes))


@pytest.fixture
def ray(monkeypatch):
    """A list of what was sent to tasks of Ray, for which a module stands in that does them here,
    the last first."""
    sent = []
    made = ModuleType("ray")
    made.__spec__ = ModuleSpec("ray", None)

    class RayError(Exception):
        pass

    def remote(**_):
        def make(do):
            def send(*arguments):
                json.dumps(arguments)
                sent.append(arguments)
                return do, arguments

            return SimpleNamespace(remote=send)

        return make

    def get(task):
        do, arguments = task
        try:
            do(*arguments)
        except Exception as e:
            raise RayError(f"traceback\n{type(e).__name__}: {e}") from None

    made.init, made.shutdown, made.is_initialized = lambda **_: None, int, lambda: False
    made.remote, made.get, made.exceptions = remote, get, SimpleNamespace(RayError=RayError)
    made.wait = lambda tasks, num_returns: ([tasks[-1]], tasks[:-1])
    monkeypatch.setitem(sys.modules, "ray", made)
    return sent


def test_on_ray_the_result_is_that_of_the_small_path(task, tmp_path, monkeypatch, ray):
    monkeypatch.setattr(pieces, "_BYTES_AT_ONCE", 900)
    card = prepare_set(task.corpus, tmp_path / "a", None, task.public, (), NEAR, say=len)
    assert prepare_at_scale(task, say=len, execution=Execution("ray", tasks=3, workers=2)) == card
    assert _files(tmp_path / "a") == _files(task.out)
    assert not work_directory(task.out).exists()
    assert [part for _, stage, part in ray if stage == "clean"] == [0, 1, 2]
    assert len(ray) == 8 and len({work for work, _, _ in ray}) == 1


def test_parts_that_fail_on_ray_are_named_and_the_others_are_kept(task, monkeypatch, ray):
    def fail(real, plan, part):
        if part == 1:
            raise DataError("a line is cut off")
        return real(plan, part)

    with monkeypatch.context() as m:
        _replace(m, "clean", fail)
        with pytest.raises(UnfinishedError, match=r"1 of 3 parts of clean(.|\n)*part 1: a line is"):
            prepare_at_scale(task, execution=Execution("ray", tasks=3))
    assert {stage for _, stage, _ in ray} == {"clean"}
    del ray[:]
    prepare_at_scale(task, say=len, execution=Execution("ray"))
    assert [part for _, stage, part in ray if stage == "clean"] == [1]


def test_ray_and_datatrove_are_named_where_they_are_not_installed(task, monkeypatch):
    monkeypatch.setattr(scale, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="--executor ray needs ray: pip install ray"):
        prepare_at_scale(task, execution=Execution("ray", tasks=2))
    with pytest.raises(ConfigError, match=r"needs datatrove: pip install 'flexolmo\[scale\]'"):
        prepare_at_scale(task)
    assert not work_directory(task.out).exists()


def test_work_stays_when_the_system_kills_a_process(task, monkeypatch):
    @contextmanager
    def broken(count):
        assert count == 2
        raise UnfinishedError("One of 2 processes ended")
        yield

    with monkeypatch.context() as m, pytest.raises(UnfinishedError, match="One of 2 processes"):
        m.setattr("flexolmo.data.on_datatrove.open_workers", broken)
        prepare_at_scale(task, execution=Execution(tasks=2, workers=2))
    assert work_directory(task.out).exists()
    prepare_at_scale(task, say=len)
    assert not work_directory(task.out).exists()


def test_who_reads_a_file_does_not_change_with_the_file(task, monkeypatch):
    """A file emptied after its part was done would give its neighbour's text to that part."""
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        _replace(m, "clean", lambda real, plan, part: real(plan, 0) if part == 0 else _killed())
        prepare_at_scale(task, execution=Execution(tasks=2))
    work = next(work_directory(task.out).glob("*/"))
    task.corpus.files[0][0].write_text("")
    do_part(work, "clean", 1)
    found = [json.loads((work / f"done-clean-0000{part}.json").read_text()) for part in range(2)]
    assert sum(one["found"] for one in found) == 94


def test_what_was_moved_after_a_kill_is_found_where_it_is(tmp_path, public_set, monkeypatch):
    def task_in(place):
        corpus = open_corpus(place / "in", "owner")
        return Preparation(corpus, place / "out" / "owner", None, place / "public", (), NEAR)

    here, there = tmp_path / "here", tmp_path / "there"
    _corpus(here, 2)
    shutil.copytree(public_set, here / "public")
    left = _left_by_a_killed_run(task_in(here), 2, monkeypatch)
    next(left.glob("*/done-clean-00001.json")).unlink()
    here.rename(there)
    prepare_at_scale(task_in(there), say=len)
    assert task_in(there).out.exists() and not here.exists()


def test_nobody_goes_on_from_work_whose_removal_was_cut_off(task, monkeypatch):
    left = _left_by_a_killed_run(task, 2, monkeypatch)

    def cut_off(path):
        shutil.rmtree(next(path.glob("*/")))
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr("flexolmo.data.kept_work.shutil", SimpleNamespace(rmtree=cut_off))
        remove_work(left)
    prepare_at_scale(task, say=len)
    assert task.out.exists() and not left.exists()


def test_an_old_listing_of_a_directory_hides_no_part_that_is_done(task, monkeypatch):
    """As on a network file system, of what another machine wrote."""
    work = next(_left_by_a_killed_run(task, 2, monkeypatch).glob("*/"))
    with monkeypatch.context() as m:
        m.setattr(os, "listdir", lambda _: [])
        do_part(work, "choose", 0)
    assert (work / "done-choose-00000.json").exists()


def test_parts_out_of_turn_and_unknown_ones_are_refused(task, monkeypatch):
    work = next(_left_by_a_killed_run(task, 2, monkeypatch).glob("*/"))
    with pytest.raises(UnfinishedError, match="tokenize needs all of choose, of which 1 of 1"):
        do_part(work, "tokenize", 0)
    with pytest.raises(ConfigError, match=r"no part 2 of clean in .* has parts 0 to 1"):
        do_part(work, "clean", 2)
    with pytest.raises(ConfigError, match=r"no stage '\.\./x'"):
        do_part(work, "../x", 0)
    shutil.rmtree(work.parent)
    with pytest.raises(UnfinishedError, match="Nothing is left to do here"):
        do_part(work, "clean", 0)
    assert not work.parent.exists()
