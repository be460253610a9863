"""Bundles are opened whole and unchanged, or refused by name."""

import datetime
import os
import shutil
import struct
import tracemalloc

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.bundle import bundle as room
from flexolmo.bundle.bundle import MAX_FILE_BYTES, open_bundle, write_bundle
from flexolmo.bundle.manifest import encode_manifest
from flexolmo.bundle.signing import key_id
from flexolmo.bundle.trust import TrustedOwners
from flexolmo.errors import BundleError, SignatureError
from made_bundles import FILES, TODAY, make_manifest, make_weights, sign_as, terms_until


def tensor_bytes(weights):
    return {name: bytes(found["data"]) for name, found in safetensors.deserialize(weights)}


def kept_bytes(opened):
    return {name: bytes(data) for name, data in opened.tensors.items()}


# --- a valid bundle ----------------------------------------------------------------------------


def test_what_was_written_is_what_is_opened(valid, trusted, keys):
    opened = open_bundle(valid, trusted, keep_tensors=True)
    assert kept_bytes(opened) == tensor_bytes(make_weights())
    assert opened.weights_bytes == len(make_weights())
    assert open_bundle(valid, trusted).tensors == {}
    assert opened.manifest == make_manifest(make_weights())
    assert opened.signer == "Ann"
    assert opened.key_id == key_id((keys / "Ann.pub").read_bytes())
    assert sorted(p.name for p in valid.iterdir()) == FILES
    assert sorted(p.name for p in valid.parent.iterdir()) == ["maths.bundle"]
    assert "mmap" not in repr(opened)


def test_a_copy_is_of_the_bytes_that_were_checked_and_none_is_made_before(valid, copy, trusted):
    out = copy.parent / "out"
    out.mkdir()
    opened = open_bundle(valid, trusted, copy_to=out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in valid.iterdir()
    }
    assert opened == open_bundle(out, trusted)
    refused = copy.parent / "refused"
    refused.mkdir()
    (copy / "manifest.json").write_bytes(b"{}")
    with pytest.raises(SignatureError, match=r"manifest\.json"):
        open_bundle(copy, trusted, copy_to=refused)
    assert not list(refused.iterdir())


def test_a_bundle_may_be_moved_and_renamed(copy, trusted):
    assert open_bundle(copy.rename(copy.parent / "elsewhere"), trusted).manifest.name == "maths"


@settings(max_examples=10)
@given(
    shapes=st.dictionaries(
        st.from_regex(r"[a-z][a-z.]{0,9}", fullmatch=True),
        st.lists(st.integers(1, 4), max_size=3),
        min_size=1,
        max_size=4,
    ),
    dtype=st.sampled_from(["f2", "f4", "f8"]),
)
def test_any_tensor_table_survives_a_round_trip(tmp_path_factory, keys, trusted, shapes, dtype):
    weights = safetensors.numpy.save({n: np.ones(s, dtype) for n, s in shapes.items()})
    path = tmp_path_factory.mktemp("any") / "maths.bundle"
    write_bundle(path, weights, make_manifest(weights), keys / "Ann")
    opened = open_bundle(path, trusted, keep_tensors=True)
    assert kept_bytes(opened) == tensor_bytes(weights)
    assert opened.manifest.tensors.keys() == opened.tensors.keys()


def test_the_stock_model_signing_package_accepts_the_signature(valid, keys):
    from model_signing import hashing, verifying

    def verify(path):
        config = verifying.Config().use_elliptic_key_verifier(public_key=keys / "Ann.pub")
        ignored = hashing.Config().set_ignored_paths(
            paths=[path / "signature.sig"], ignore_git_paths=False
        )
        config.set_hashing_config(ignored).verify(path, path / "signature.sig")

    verify(valid)


# --- tampering ---------------------------------------------------------------------------------


@settings(max_examples=150)
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_refused_naming_the_file(
    valid, trusted, tmp_path_factory, data
):
    path = shutil.copytree(valid, tmp_path_factory.mktemp("flip") / "maths.bundle")
    file = path / data.draw(st.sampled_from(FILES))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    with pytest.raises(BundleError) as e:
        open_bundle(path, trusted)
    assert file.name in str(e.value)
    with pytest.raises(BundleError):
        open_bundle(path, None, allow_unknown_signer=True)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "change",
    [lambda d: b"", lambda d: d[:-1], lambda d: d[1:], lambda d: d + b"\n", lambda d: d + b"\0"],
)
def test_a_truncated_or_extended_file_is_refused_by_name(copy, trusted, name, change):
    (copy / name).write_bytes(change((copy / name).read_bytes()))
    with pytest.raises(BundleError) as e:
        open_bundle(copy, trusted)
    assert name in str(e.value)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused_by_name(copy, trusted, name):
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"missing: {name}"):
        open_bundle(copy, trusted)


def test_everything_extra_and_missing_is_listed_at_once(copy, trusted):
    (copy / "optimizer.pt").write_bytes(b"state")
    (copy / ".gitignore").write_text("*")
    (copy / ".git").mkdir()
    (copy / os.fsdecode(b"\xff\x1b")).write_text("")
    (copy / "manifest.json").unlink()
    with pytest.raises(BundleError) as e:
        open_bundle(copy, trusted)
    for name in ("optimizer.pt", ".gitignore", ".git'", "\\udcff\\x1b", "missing: manifest.json"):
        assert name in str(e.value)
    str(e.value).encode()


@pytest.mark.parametrize("name", FILES)
def test_a_link_is_refused_by_name_even_to_the_right_bytes(copy, trusted, name):
    (copy / name).rename(copy.parent / name)
    (copy / name).symlink_to(copy.parent / name)
    with pytest.raises(BundleError, match=f"{name}: found a link"):
        open_bundle(copy, trusted)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", FILES)
def test_a_directory_or_pipe_is_refused_by_name(copy, trusted, name, make):
    (copy / name).unlink()
    make(copy / name)
    with pytest.raises(BundleError, match=f"{name}: found something other"):
        open_bundle(copy, trusted)


def test_a_file_that_is_too_large_is_refused_unread(copy, trusted):
    for name in FILES:
        os.truncate(copy / name, MAX_FILE_BYTES[name] + 1)  # sparse: takes no disk
    with pytest.raises(BundleError) as e:
        open_bundle(copy, trusted)
    assert all(f"{name}: found {MAX_FILE_BYTES[name] + 1} bytes" in str(e.value) for name in FILES)


def test_a_file_that_grows_while_read_is_refused(copy, trusted, monkeypatch):
    real = os.fstat

    def fstat(fd):
        status = real(fd)
        with open(copy / "manifest.json", "ab") as f:
            f.write(b" ")
        return status

    monkeypatch.setattr(room.os, "fstat", fstat)
    with pytest.raises(BundleError, match=r"manifest\.json: changed its size"):
        open_bundle(copy, trusted)


def test_files_changed_after_opening_do_not_change_what_was_opened(copy, trusted):
    opened = open_bundle(copy, trusted, keep_tensors=True)
    with open(copy / "expert.safetensors", "r+b") as f:
        f.write(b"evil" * 60)
    assert kept_bytes(opened) == tensor_bytes(make_weights())


def test_what_changes_while_it_is_read_is_what_is_checked(copy, trusted, monkeypatch):
    """The bytes that were digested are refused or are the bytes handed out."""
    real, file = room.read_weights, copy / "expert.safetensors"

    def change_and_read(f, size, *options):
        with open(file, "r+b") as g:
            g.seek(-4, 2)
            g.write(b"evil")
        return real(f, size, *options)

    monkeypatch.setattr(room, "read_weights", change_and_read)
    with pytest.raises(SignatureError, match=r"expert\.safetensors: found sha256"):
        open_bundle(copy, trusted, keep_tensors=True)


def test_weights_that_are_cut_short_while_read_are_refused(copy, trusted, monkeypatch):
    real, file = room.read_weights, copy / "expert.safetensors"

    def cut_and_read(f, size, *options):
        os.truncate(file, size - 8)
        return real(f, size, *options)

    monkeypatch.setattr(room, "read_weights", cut_and_read)
    with pytest.raises(SignatureError, match=r"expert\.safetensors: found sha256"):
        open_bundle(copy, trusted, keep_tensors=True)


@pytest.mark.parametrize("names", [["expert.safetensors"], ["manifest.json"], ["signature.sig"],
                                   ["signer.pub"], ["signature.sig", "signer.pub"],
                                   ["manifest.json", "expert.safetensors"]])  # fmt: skip
def test_files_swapped_in_from_another_bundle_are_refused(copy, trusted, keys, tmp_path, names):
    weights = make_weights(seed=1)
    key = keys / ("Bob" if "signer.pub" in names else "Ann")
    other = sign_as(tmp_path / "other", encode_manifest(make_manifest(weights)), weights, key)
    for name in names:
        shutil.copy(other / name, copy / name)
    with pytest.raises(BundleError) as e:
        open_bundle(copy, trusted)
    if names == ["signature.sig"]:
        # A genuine signature by the same key: what differs is the files it was made for.
        assert "manifest.json: found" in str(e.value)
    elif names != ["signature.sig", "signer.pub"]:  # step by step: the weights come last
        assert names[0] in str(e.value)


def test_what_is_no_directory_is_refused(copy, trusted, tmp_path):
    for path in (tmp_path / "none", copy / "manifest.json"):
        with pytest.raises(BundleError, match="cannot be opened as a directory"):
            open_bundle(path, trusted)


# --- signers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("trust_nobody", [None, TrustedOwners.from_keys({})])
def test_an_unknown_signer_is_refused_unless_let_in(valid, keys, trust_nobody):
    with pytest.raises(SignatureError, match="unknown key") as e:
        open_bundle(valid, trust_nobody)
    assert key_id((keys / "Ann.pub").read_bytes()) in str(e.value)
    opened = open_bundle(valid, trust_nobody, allow_unknown_signer=True)
    assert opened.signer is None


def test_a_trusted_key_under_another_name_is_refused(valid, keys):
    trusted = TrustedOwners.from_keys({"Anna": (keys / "Ann.pub").read_bytes()})
    for allow in (False, True):
        with pytest.raises(SignatureError, match=r"'Ann', but the signing key.*'Anna'"):
            open_bundle(valid, trusted, allow_unknown_signer=allow)


def test_an_unknown_key_cannot_pass_for_a_trusted_owner(keys, trusted, tmp_path):
    weights = make_weights()
    manifest = encode_manifest(make_manifest(weights))
    forged = sign_as(tmp_path / "forged", manifest, weights, keys / "Bob")
    with pytest.raises(SignatureError, match="unknown key"):
        open_bundle(forged, trusted)
    with pytest.raises(SignatureError, match="claims to be by 'Ann'"):
        open_bundle(forged, trusted, allow_unknown_signer=True)


# --- signed, and still refused -----------------------------------------------------------------


def test_signed_tensors_that_differ_from_the_manifest_are_all_listed(keys, trusted, tmp_path):
    claimed = make_weights(a=np.ones(2, "f4"), b=np.ones(2, "f4"), c=np.ones(4, "f2"))
    sent = make_weights(
        a=np.ones(3, "f4"), c=np.ones(4, "f4"), d=np.ones(1, "f4"), e=np.array([np.nan], "f4")
    )
    manifest = encode_manifest(
        make_manifest(claimed, terms=terms_until(datetime.date(2026, 11, 21)))
    )
    path = sign_as(tmp_path / "b", manifest, sent, keys / "Ann", subject="poems.bundle")
    with pytest.raises(BundleError) as e:
        open_bundle(path, trusted, today=TODAY)
    for line in (
        "expert.safetensors: found digest",
        "missing: b",
        "extra: d",
        "extra: e",
        "shape of a: found [3], expected [2]",
        "dtype of c: found F32, expected F16",
        "data of a: found sha256:",
        "data of c: found sha256:",
        "not finite: e",
        "the owner's terms expired on 2026-11-21, today is 2026-11-22",
        "signature.sig: found the name 'poems.bundle', expected maths.bundle",
    ):
        assert line in str(e.value)
    assert "layers.0.up" not in str(e.value)


def test_signed_weights_that_are_no_safetensors_are_refused(keys, trusted, tmp_path):
    manifest = encode_manifest(make_manifest(make_weights()))
    with_text = safetensors.numpy.save({"a": np.ones(1, "f4")}, metadata={"text": "secret"})
    for i, weights in enumerate((b"\x80\x04K\x01.", struct.pack("<Q", 2) + b"{}", with_text)):
        path = sign_as(tmp_path / f"b{i}", manifest, weights, keys / "Ann")
        with pytest.raises(BundleError, match=r"expert\.safetensors"):
            open_bundle(path, trusted)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.replace(b'"format_version":4', b'"format_version":1'), "expected 4"),
        (lambda m: m.replace(b'"tokens_seen":1000,', b""), "missing field: tokens_seen"),
        (lambda m: m + b"\n", "canonical"),
    ],
)
def test_a_signed_manifest_is_held_to_the_format(keys, trusted, tmp_path, change, message):
    weights = make_weights()
    manifest = change(encode_manifest(make_manifest(weights)))
    path = sign_as(tmp_path / "b", manifest, weights, keys / "Ann")
    with pytest.raises(BundleError, match=rf"manifest\.json.*(?s:.*){message}"):
        open_bundle(path, trusted)


def test_terms_hold_through_their_last_day(keys, trusted, tmp_path):
    weights = make_weights()
    manifest = make_manifest(weights, terms=terms_until(TODAY))
    path = write_bundle(tmp_path / "maths.bundle", weights, manifest, keys / "Ann", today=TODAY)
    assert open_bundle(path, trusted, today=TODAY).manifest.terms.valid_until == TODAY
    with pytest.raises(BundleError, match="expired"):
        open_bundle(path, trusted, today=TODAY + datetime.timedelta(days=1))


def test_nothing_of_the_weights_is_read_before_signature_and_signer_hold(
    copy, trusted, keys, monkeypatch
):
    """A sparse file of 30 GiB, unsigned, by an unknown key, or larger than was signed."""
    monkeypatch.setattr(room, "read_weights", lambda *_: pytest.fail("read"))
    os.truncate(copy / "expert.safetensors", 30 << 30)
    with pytest.raises(SignatureError, match="unknown key"):
        open_bundle(copy, TrustedOwners.from_keys({}))
    with pytest.raises(SignatureError, match=r"has 32212254720 bytes, the tensors in manifest"):
        open_bundle(copy, trusted)
    with pytest.raises(BundleError, match=r"expert\.safetensors: found 32212254720 bytes.*most 9"):
        open_bundle(copy, trusted, max_bytes=9)
    (copy / "signature.sig").write_bytes(b"{}")
    with pytest.raises(SignatureError, match=r"signature\.sig"):
        open_bundle(copy, None, allow_unknown_signer=True)


def test_a_large_bundle_is_checked_in_little_memory(tmp_path, keys, trusted):
    weights = safetensors.numpy.save({"a": np.zeros(8 << 20, "f4")})
    path = write_bundle(tmp_path / "maths.bundle", weights, make_manifest(weights), keys / "Ann")
    del weights
    tracemalloc.start()
    open_bundle(path, trusted)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20  # of 32 MiB


def test_no_weights_are_parsed_before_the_signature_holds(copy, trusted, monkeypatch):
    def parse(*_):
        raise RuntimeError("parsed unverified bytes")

    for name in ("read_weights", "read_manifest"):
        monkeypatch.setattr(room, name, parse)
    flip = bytearray((copy / "signature.sig").read_bytes())
    flip[-60] ^= 1
    (copy / "signature.sig").write_bytes(flip)
    with pytest.raises(SignatureError):
        open_bundle(copy, trusted)
