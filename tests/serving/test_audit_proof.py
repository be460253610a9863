"""Proofs about the audit log hold without it, and nothing else than the truth can be proved."""

import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from flexolmo.bundle.signing import read_private_key
from flexolmo.errors import AuditError
from flexolmo.serving.audit_check import newest_checkpoint, public_key
from flexolmo.serving.audit_log import AuditLog
from flexolmo.serving.audit_proof import prove_continuation, prove_entry, read_proof
from made_audit import fill

COUNT = 11


@pytest.fixture
def read(tmp_path):
    """`read(text)`: the proof in a file of that text."""

    def write_and_read(text):
        (tmp_path / "proof.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_proof(tmp_path / "proof.json")

    return write_and_read


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Directory, key and all checkpoints of a log of eleven entries in four files."""
    directory = tmp_path_factory.mktemp("made") / "audit"
    log = AuditLog.open(directory, segment_bytes=700)
    checkpoints = [log.checkpoint()]
    for _ in range(COUNT):
        fill(log, 1)
        checkpoints.append(log.checkpoint())
    log.close()
    return directory, public_key(directory), checkpoints


def test_every_entry_can_be_proved(made, read):
    directory, key, _ = made
    lines = [x for f in sorted(directory.glob("0*.jsonl")) for x in f.read_text().splitlines()]
    for number, line in enumerate(lines):
        proof = read(prove_entry(directory, number, key).model_dump_json())
        assert proof.entry == line
        assert proof.claim(key).startswith(f"Entry {number} is in the log flexolmo-audit-log/2/")


def test_the_log_is_proved_to_continue_every_checkpoint(made, read):
    directory, key, checkpoints = made
    for old in checkpoints:
        proof = read(prove_continuation(directory, old, key).model_dump_json())
        assert f"begins with the {old.size} entries" in proof.claim(key)


def test_no_changed_proof_of_an_entry_holds(made, read):
    directory, key, checkpoints = made
    proof = json.loads(prove_entry(directory, 4, key).model_dump_json())
    other = json.loads(prove_entry(directory, 5, key).model_dump_json())
    changes = [
        {"number": 5},
        {"entry": other["entry"]},
        {"entry": proof["entry"].replace("reason", "season")},
        {"entry": other["entry"], "number": 5},
        {"checkpoint": checkpoints[5].note},
        {"checkpoint": checkpoints[4].note},  # which does not count it
        {"checkpoint": proof["checkpoint"].replace("\ntime 2", "\ntime 1")},
        {"hashes": proof["hashes"][1:]},
        {"hashes": proof["hashes"][::-1]},
    ]
    for change in changes:
        changed = read(json.dumps(proof | change))
        with pytest.raises(ValueError, match=r"its entry|its checkpoint|not signed"):
            changed.claim(key)
    with pytest.raises(ValueError, match="not signed"):
        read(json.dumps(proof)).claim(ec.generate_private_key(ec.SECP256R1()).public_key())


def test_no_changed_proof_of_growth_holds(made, tmp_path, read):
    directory, key, checkpoints = made
    proof = json.loads(prove_continuation(directory, checkpoints[6], key).model_dump_json())
    changes = [
        {"older": checkpoints[5].note},
        {"checkpoint": checkpoints[5].note},
        {"checkpoint": checkpoints[10].note},
        {"hashes": proof["hashes"][:-1]},
        {"hashes": []},
    ]
    for change in changes:
        changed = read(json.dumps(proof | change))
        with pytest.raises(
            ValueError, match=r"older checkpoint is of another|were changed between"
        ):
            changed.claim(key)


def test_no_log_is_proved_to_continue_another_not_even_its_empty_beginning(made, tmp_path):
    directory, key, _ = made
    log = AuditLog.open(tmp_path / "audit", read_private_key(directory / "log.pem"))
    other = log.checkpoint()
    log.close()
    with pytest.raises(AuditError, match="is of another log"):
        prove_continuation(directory, other, key)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"format":"flexolmo-audit-inclusion/2"}', b"\xff", b"[" * 100_000]
)
def test_a_file_that_is_no_proof_is_refused(data, read):
    with pytest.raises(AuditError, match="holds no proof"):
        read(data)


def test_more_hashes_than_any_tree_has_levels_are_refused(made, read):
    directory, key, _ = made
    proof = json.loads(prove_entry(directory, 4, key).model_dump_json())
    with pytest.raises(AuditError, match="holds no proof"):
        read(json.dumps(proof | {"hashes": proof["hashes"] * 20}))


def test_an_entry_that_no_checkpoint_counts_yet_cannot_be_proved(tmp_path):
    log = AuditLog.open(tmp_path / "audit")
    fill(log, 1)
    with pytest.raises(AuditError, match="counts 0 entries: no entry 0 is among them"):
        prove_entry(tmp_path / "audit", 0, public_key(tmp_path / "audit"))
    log.close()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("reason 0", "season 0"),
        lambda text: text.replace("reason 1", "season 1"),
        lambda text: "",
        lambda text: text[: len(text) // 2],
    ],
)
def test_a_log_that_does_not_hold_up_proves_nothing(tmp_path, change):
    log = AuditLog.open(tmp_path / "audit")
    fill(log, 1)
    old = log.checkpoint()
    fill(log, 2)
    log.close()
    file = tmp_path / "audit" / f"{0:020}.jsonl"
    file.write_text(change(file.read_text()))
    key = public_key(tmp_path / "audit")
    with pytest.raises(AuditError, match="flexolmo audit verify"):
        prove_entry(tmp_path / "audit", 1, key)
    with pytest.raises(AuditError, match="flexolmo audit verify"):
        prove_continuation(tmp_path / "audit", old, key)


def test_a_log_cut_back_does_not_continue_what_it_was(tmp_path):
    log = AuditLog.open(tmp_path / "audit")
    fill(log, 3)
    kept = (tmp_path / "audit/checkpoints.jsonl").read_bytes()
    old = log.checkpoint()
    log.close()
    (tmp_path / "audit/checkpoints.jsonl").write_bytes(kept)
    key = public_key(tmp_path / "audit")
    assert newest_checkpoint(tmp_path / "audit", key).size == 0
    with pytest.raises(AuditError, match="counts more entries"):
        prove_continuation(tmp_path / "audit", old, key)
