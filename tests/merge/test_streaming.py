"""Weights that stream: what is read of a mixture's files, and what is not read again."""

import io
import mmap
import os
import shutil
from collections import Counter

import pytest
import torch

from flexolmo.bundle import bundle as bundle_room
from flexolmo.bundle import tensors as tensors_room
from flexolmo.bundle import verified as verified_room
from flexolmo.errors import CheckpointError, MergeError, SignatureError
from flexolmo.files import _exchange
from flexolmo.merge import mixture as mixture_room
from flexolmo.merge.export import export_stock
from flexolmo.merge.mixture import add_experts, build_mixture, load_mixture, remove_experts
from flexolmo.model import checkpoint as checkpoint_room
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.model.untold_rows import find_untold_rows
from made_mixtures import NAMES, flip, tree


@pytest.fixture
def hashed(monkeypatch, tmp_path):
    """What was hashed: names of anchors and bundles, each time; statements count for any size."""
    monkeypatch.setattr(verified_room, "SMALLEST_BYTES", 1)
    monkeypatch.setenv("FLEXOLMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    found: Counter[str] = Counter()
    read, look_over = bundle_room._read_weights, checkpoint_room._look_over

    def read_counted(files, signed, *rest):
        found[signed.subject.removesuffix(".bundle")] += 1
        return read(files, signed, *rest)

    def look_counted(*arguments):
        found["anchor"] += 1
        return look_over(*arguments)

    monkeypatch.setattr(bundle_room, "_read_weights", read_counted)
    monkeypatch.setattr(checkpoint_room, "_look_over", look_counted)

    def taken():
        now = dict(found)
        found.clear()
        return now

    return taken


EVERY = dict.fromkeys(["anchor", *NAMES], 1)


def weights_of(model, name):
    return model / "experts" / f"{name}.bundle" / "expert.safetensors"


# --- what is read -------------------------------------------------------------------------------


def test_no_call_reads_more_of_weights_than_a_piece(house, tmp_path, monkeypatch):
    largest = 0

    class Counted(io.FileIO):
        def readinto(self, buffer):
            nonlocal largest
            largest = max(largest, len(buffer))
            return super().readinto(buffer)

    monkeypatch.setattr(tensors_room, "_PIECE_BYTES", 4096)
    monkeypatch.setattr("flexolmo.bundle.bundle.io.FileIO", Counted)
    monkeypatch.setattr("flexolmo.bundle.manifest.io.FileIO", Counted)
    bundle = house.write(tmp_path, "cobalt", house.tensors("cobalt", "rich"), "rich")
    build_mixture(house.anchor_dir, house.bundles(NAMES, "rich"), tmp_path / "m", house.trusted)
    add_experts(tmp_path / "m", [bundle], house.trusted)
    remove_experts(tmp_path / "m", ["zinc"], house.trusted)
    found = load_mixture(tmp_path / "m", house.trusted)
    assert weights_of(tmp_path / "m", "cobalt").stat().st_size > 5 * 4096
    header = int.from_bytes(weights_of(tmp_path / "m", "cobalt").read_bytes()[:8], "little")
    assert largest <= max(4096, header)
    expected = house.mixture(["amber", "basalt"], "rich").model.state_dict()
    own = found.model.state_dict()
    assert all(torch.equal(own[n], t) for n, t in expected.items())


def test_loading_some_experts_reads_no_weight_of_the_others(house, hashed, monkeypatch):
    read: Counter[int] = Counter()

    class Counted(io.FileIO):
        def readinto(self, buffer):
            count = super().readinto(buffer)
            read[os.fstat(self.fileno()).st_ino] += count
            return count

    model = house.mixture_dir(NAMES)
    monkeypatch.setattr("flexolmo.bundle.bundle.io.FileIO", Counted)
    for _ in range(2):  # the second time nothing is hashed
        load_mixture(model, house.trusted, experts=["zinc"])
        inodes = {name: weights_of(model, name).stat() for name in NAMES}
        assert {n: read[s.st_ino] for n, s in inodes.items()} == {
            "amber": 0,
            "basalt": 0,
            "zinc": inodes["zinc"].st_size,
        }
        read.clear()


# --- what is not hashed again -------------------------------------------------------------------


def test_what_was_verified_is_not_hashed_again(house, tmp_path, hashed):
    model = tmp_path / "m"
    build_mixture(house.anchor_dir, house.bundles(["amber", "basalt"]), model, house.trusted)
    assert hashed() == {"anchor": 1, "amber": 1, "basalt": 1}
    add_experts(model, house.bundles(["zinc"]), house.trusted)
    assert hashed() == {"zinc": 1}
    remove_experts(model, ["basalt"], house.trusted)
    assert hashed() == {}
    add_experts(model, house.bundles(["basalt"]), house.trusted)
    assert hashed() == {"basalt": 1}
    found = load_mixture(model, house.trusted)
    assert hashed() == {}
    expected = house.mixture(NAMES).model.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in found.model.state_dict().items())
    load_mixture(model, house.trusted, verify=True)
    assert hashed() == EVERY
    remove_experts(model, ["zinc"], house.trusted, verify=True)
    assert hashed() == {"anchor": 1, "amber": 1, "basalt": 1}


def test_what_is_copied_in_or_only_loaded_is_not_hashed_again_either(house, tmp_path, hashed):
    bundles = [shutil.copytree(b, tmp_path / b.name) for b in house.bundles(NAMES)]
    for bundle in bundles:
        bundle.chmod(0o777)  # so that files are copied, not linked
    model = tmp_path / "m"
    build_mixture(house.anchor_dir, bundles, model, house.trusted)
    assert hashed() == EVERY
    load_mixture(model, house.trusted)
    assert hashed() == {}
    shutil.copytree(model, tmp_path / "copy")
    load_mixture(tmp_path / "copy", house.trusted)
    assert hashed() == EVERY
    load_mixture(tmp_path / "copy", house.trusted)
    assert hashed() == {}


def test_a_change_that_is_refused_leaves_the_record_as_good_as_before(house, tmp_path, hashed):
    model = tmp_path / "m"
    build_mixture(house.anchor_dir, house.bundles(NAMES), model, house.trusted)
    hashed()
    with pytest.raises(MergeError, match="two experts"):
        add_experts(model, house.bundles(["zinc"]), house.trusted)
    assert hashed() == {"zinc": 1}  # the newcomer
    load_mixture(model, house.trusted)
    assert hashed() == {}


@pytest.mark.parametrize("keeps_time", [True, False])
def test_a_tampered_file_is_refused_though_it_was_verified(house, tmp_path, hashed, keeps_time):
    model = house.build(NAMES, tmp_path / "m")
    load_mixture(model, house.trusted)
    for name, error in (("zinc", SignatureError), ("anchor", CheckpointError)):
        path = weights_of(model, name) if name == "zinc" else model / "anchor/model.safetensors"
        before, old = path.stat(), flip(path, 0.9, 1)
        if keeps_time:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(error):
            load_mixture(model, house.trusted)
        with pytest.raises(error):
            remove_experts(model, ["amber"], house.trusted)
        path.write_bytes(old)
    hashed()
    load_mixture(model, house.trusted)
    assert hashed() == {"anchor": 1, "zinc": 1}


def test_a_file_with_another_time_is_hashed_again_and_no_other(house, tmp_path, hashed):
    model = house.build(NAMES, tmp_path / "m")
    load_mixture(model, house.trusted)
    hashed()
    os.utime(weights_of(model, "amber"))
    load_mixture(model, house.trusted)
    assert hashed() == {"amber": 1}
    load_mixture(model, house.trusted)
    assert hashed() == {}


def test_a_record_under_another_key_counts_for_nothing(house, tmp_path, hashed):
    model = house.build(NAMES, tmp_path / "m")
    load_mixture(model, house.trusted)
    hashed()
    (tmp_path / "config" / "flexolmo" / "verified.key").write_bytes(b"k" * 32)
    load_mixture(model, house.trusted)
    assert hashed() == EVERY


def test_other_weights_in_a_verified_files_place_are_hashed(house, tmp_path, hashed, monkeypatch):
    """They come between the look at the record and the opening."""
    model = house.build(["amber"], tmp_path / "m")
    load_mixture(model, house.trusted)
    begin, path = bundle_room._open_files, weights_of(model, "amber")

    def swap(*arguments):
        if not path.with_name("old").exists():
            shutil.copy2(path, tmp_path / "old")
            flip(tmp_path / "old", 0.9, 1)
            os.replace(tmp_path / "old", path)
        return begin(*arguments)

    monkeypatch.setattr(bundle_room, "_open_files", swap)
    with pytest.raises(SignatureError, match=r"expert\.safetensors: found sha256"):
        load_mixture(model, house.trusted)


def test_terms_and_trust_are_asked_though_weights_are_known(house, tmp_path, hashed):
    from flexolmo.bundle.trust import TrustedOwners

    model = house.build(["amber", "zinc"], tmp_path / "m")
    load_mixture(model, house.trusted)
    ann = TrustedOwners.from_keys({"Ann": house.keys["Ann"].with_name("Ann.pub").read_bytes()})
    with pytest.raises(SignatureError, match=r"zinc\.bundle was refused.*unknown key"):
        load_mixture(model, ann)


@pytest.mark.parametrize("name", ["zinc", "anchor"])
def test_what_can_be_written_through_memory_is_hashed_each_time(house, tmp_path, hashed, name):
    """Such a write changes no time of a file whose page was written before."""
    model = house.build(NAMES, tmp_path / "m")
    path = weights_of(model, name) if name == "zinc" else model / "anchor/model.safetensors"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        file.close()
        memory[-1] = memory[-1]
        load_mixture(model, house.trusted)
        hashed()
        memory[-1] ^= 1
        with pytest.raises((SignatureError, CheckpointError)):
            load_mixture(model, house.trusted)
        memory[-1] ^= 1
        load_mixture(model, house.trusted)
        assert hashed()[name] == 2
    load_mixture(model, house.trusted)
    assert hashed()[name] == 1  # nobody has it open any more
    load_mixture(model, house.trusted)
    assert hashed() == {}


@pytest.mark.parametrize("name", ["amber", "anchor"])
def test_what_others_can_change_is_loaded_not_mapped(house, tmp_path, hashed, name):
    model = house.build(["amber"], tmp_path / "m", "stock")
    path = weights_of(model, name) if name == "amber" else model / "anchor/model.safetensors"
    path.chmod(0o664)
    for _ in range(2):
        hashed()
        found = load_mixture(model, house.trusted, is_mapped=True)
        assert name in hashed()
        assert found.mapped and path not in found.mapped
        before = {n: t.clone() for n, t in found.model.state_dict().items()}
        old = flip(path, 0.9, 1)
        assert all(torch.equal(t, before[n]) for n, t in found.model.state_dict().items())
        found.refuse_changed_files()
        path.write_bytes(old)


# --- mapped -------------------------------------------------------------------------------------


def test_a_mapped_mixture_is_exported_as_a_loaded_one_is(house, tmp_path):
    for router in ("stock",):
        model = house.mixture_dir(NAMES, router)
        for is_mapped in (False, True):
            found = load_mixture(model, house.trusted, is_mapped=is_mapped)
            export_stock(found, found.model, tmp_path / f"{is_mapped}", {"exact": True})
            assert bool(found.mapped) == is_mapped
        assert tree(tmp_path / "True") == tree(tmp_path / "False")
        ids = house.wild.ids(2, 12)
        mapped = load_mixture(model, house.trusted, is_mapped=True).model
        loaded = house.mixture(NAMES, router).model
        torch.testing.assert_close(mapped(ids), loaded(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [4, 32])
def test_rows_move_in_a_mapped_head_and_not_in_its_file(house, tmp_path, rank):
    tensors = house.wild.expert(EvidenceSettings(), 0, head_rank=rank)
    bundle = house.write(tmp_path, "amber", tensors, "rich")
    build_mixture(house.anchor_dir, [bundle], tmp_path / "m", house.trusted)
    before = tree(tmp_path / "m")
    loaded, mapped = (
        load_mixture(tmp_path / "m", house.trusted, is_mapped=x) for x in (False, True)
    )
    rows = find_untold_rows(mapped.model, "amber")
    assert weights_of(tmp_path / "m", "amber") in mapped.mapped
    assert torch.equal(rows.matrix, find_untold_rows(loaded.model, "amber").matrix)
    assert not torch.equal(rows.matrix, tensors[rows.key])
    assert tree(tmp_path / "m") == before


@pytest.mark.parametrize("verify", [False, True])
def test_the_file_that_was_verified_is_mapped_whatever_is_in_its_place(
    house, tmp_path, hashed, monkeypatch, verify
):
    """The bundle is another while it is mapped; no file changes."""
    model = house.build(["amber"], tmp_path / "m", "stock")
    expected = load_mixture(model, house.trusted).model.state_dict()
    bundle = weights_of(model, "amber").parent
    other = shutil.copytree(bundle, tmp_path / "other")
    flip(other / "expert.safetensors", 0.9, 1)
    real = mixture_room.map_expert

    def map_exchanged(*arguments):
        assert _exchange(bundle, other)
        real(*arguments)
        assert _exchange(bundle, other)

    monkeypatch.setattr(mixture_room, "map_expert", map_exchanged)
    found = load_mixture(model, house.trusted, is_mapped=True, verify=verify)
    own = found.model.state_dict()
    assert weights_of(model, "amber") in found.mapped
    assert all(torch.equal(own[name], tensor) for name, tensor in expected.items())
    found.refuse_changed_files()


def test_a_file_cut_short_before_it_is_mapped_is_refused(house, tmp_path, monkeypatch):
    model = house.build(["amber"], tmp_path / "m", "stock")
    path, real = weights_of(model, "amber"), mixture_room.map_expert
    monkeypatch.setattr(mixture_room, "map_expert", lambda *a: os.truncate(path, 4096) or real(*a))
    with pytest.raises(MergeError, match="The weights of amber changed while they were read"):
        load_mixture(model, house.trusted, is_mapped=True)


@pytest.mark.parametrize("name", ["amber", "anchor"])
def test_a_file_that_changes_while_it_is_exported_spoils_the_export(house, tmp_path, name):
    model = house.build(NAMES, tmp_path / "m", "stock")
    found = load_mixture(model, house.trusted, is_mapped=True)
    path = weights_of(model, name) if name == "amber" else model / "anchor/model.safetensors"
    with open(path, "r+b") as f:
        f.seek(-2, 2)
        f.write(b"\1\1")
    with pytest.raises(MergeError, match="Changed while the mixture was read"):
        export_stock(found, found.model, tmp_path / "hf", {"exact": True})
    assert not (tmp_path / "hf").exists()
