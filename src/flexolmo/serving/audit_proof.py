"""Proofs about the audit log that hold without it: of one entry, and of an older checkpoint.

A proof is a small JSON file. Whoever has it and the log's public key needs nothing else.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field, TypeAdapter

from flexolmo.bundle.strict import Claim
from flexolmo.bundle.tensors import Digest
from flexolmo.errors import AuditError
from flexolmo.files import read_bytes
from flexolmo.serving.audit_check import newest_checkpoint
from flexolmo.serving.checkpoint import Checkpoint, read_checkpoint
from flexolmo.serving.entries import MAX_ENTRY_BYTES, Count, digest_leaf
from flexolmo.serving.segments import list_segments, read_hashes, read_lines
from flexolmo.serving.tree import (
    Range,
    consistency_ranges,
    hash_leaf,
    hash_ranges,
    inclusion_ranges,
    is_consistent,
    is_included,
)

MAX_PROOF_BYTES = 4 * MAX_ENTRY_BYTES  # an entry stands in it as a JSON string, escaped
Hashes = Annotated[list[Digest], Field(max_length=64)]


class InclusionProof(Claim):
    """Proof that an entry is in the log of a checkpoint."""

    format: Literal["flexolmo-audit-inclusion/1"]
    number: Count
    entry: str  # its line
    checkpoint: str
    hashes: Hashes

    def claim(self, key: ec.EllipticCurvePublicKey) -> str:
        """The sentence that is proved; ValueError if it is not."""
        checkpoint = read_checkpoint(self.checkpoint, key)
        if self.number >= checkpoint.size:
            raise ValueError(f"its checkpoint does not count entry {self.number}")
        leaf = hash_leaf(self.entry.encode())
        hashes = _bytes_of(self.hashes)
        if not is_included(leaf, self.number, checkpoint.size, checkpoint.root, hashes):
            raise ValueError(f"its entry is not the one that the log has as number {self.number}")
        return (
            f"Entry {self.number} is in the log {checkpoint.origin} of {checkpoint.size:,} entries "
            f"at {checkpoint.time}."
        )


class ConsistencyProof(Claim):
    """Proof that nothing before an older checkpoint was changed up to a newer one."""

    format: Literal["flexolmo-audit-consistency/1"]
    older: str
    checkpoint: str
    hashes: Hashes

    def claim(self, key: ec.EllipticCurvePublicKey) -> str:
        """The sentence that is proved; ValueError if it is not."""
        old = read_checkpoint(self.older, key)
        new = read_checkpoint(self.checkpoint, key)
        if old.origin != new.origin or old.size > new.size:
            raise ValueError("the older checkpoint is of another log, or counts more entries")
        if not is_consistent(old.size, new.size, old.root, new.root, _bytes_of(self.hashes)):
            raise ValueError(f"the first {old.size:,} entries were changed between the two")
        return (
            f"The log {new.origin} of {new.size:,} entries at {new.time} begins with the "
            f"{old.size:,} entries that it had at {old.time}."
        )


Proof = InclusionProof | ConsistencyProof
_PROOF: TypeAdapter[Proof] = TypeAdapter(Annotated[Proof, Field(discriminator="format")])


def read_proof(path: Path) -> Proof:
    """The proof in the file `path`; AuditError if it holds none, OSError if it cannot be read."""
    try:
        return _PROOF.validate_json(read_bytes(path, MAX_PROOF_BYTES))
    except ValueError:
        raise AuditError(
            f"{path} holds no proof of an audit log. Make one with flexolmo audit prove."
        ) from None


def prove_entry(directory: Path, number: int, key: ec.EllipticCurvePublicKey) -> InclusionProof:
    """A proof that entry `number` is in the log, under its newest checkpoint.

    Raises:
        AuditError: there is no such entry, it was removed by retention, no checkpoint covers it
            yet, or the log does not hold up.
    """
    checkpoint = newest_checkpoint(directory, key)
    if not 0 <= number < checkpoint.size:
        raise AuditError(
            f"The newest checkpoint of {directory}, of {checkpoint.time}, counts {checkpoint.size} "
            f"entries: no entry {number} is among them. A server signs one every minute."
        )
    proof = InclusionProof(
        format="flexolmo-audit-inclusion/1",
        number=number,
        entry=_read_entry(directory, number).decode(errors="replace"),
        checkpoint=checkpoint.note,
        hashes=_prove(directory, inclusion_ranges(number, checkpoint.size)),
    )
    _check(proof, directory, key)
    return proof


def prove_continuation(
    directory: Path, older: Checkpoint, key: ec.EllipticCurvePublicKey
) -> ConsistencyProof:
    """A proof that the log at its newest checkpoint begins with all it had at the `older` one.

    Raises:
        AuditError: it does not.
    """
    newest = newest_checkpoint(directory, key)
    size = min(older.size, newest.size)  # where it is less than the older one's, no proof holds
    proof = ConsistencyProof(
        format="flexolmo-audit-consistency/1",
        older=older.note,
        checkpoint=newest.note,
        hashes=_prove(directory, consistency_ranges(size, newest.size)),
    )
    _check(proof, directory, key)
    return proof


def _check(proof: Proof, directory: Path, key: ec.EllipticCurvePublicKey) -> None:
    try:
        proof.claim(key)
    except ValueError as e:
        raise AuditError(
            f"The audit log {directory} gives no such proof: {e}. See what is wrong with "
            "flexolmo audit verify."
        ) from None


def _bytes_of(hashes: list[str]) -> list[bytes]:
    return [bytes.fromhex(h.removeprefix("sha256:")) for h in hashes]


def _prove(directory: Path, ranges: list[Range]) -> list[str]:
    try:
        return [digest_leaf(h) for h in hash_ranges(_leaves(directory), ranges)]
    except ValueError as e:
        raise AuditError(
            f"{directory} lacks entries that its newest checkpoint counts: {e}. See which with "
            "flexolmo audit verify."
        ) from None


def _leaves(directory: Path) -> Iterator[bytes]:
    """The leaf hash of each entry, in order."""
    for segment in list_segments(directory):
        if segment.is_removed:
            yield from read_hashes(segment.path)
        else:
            for line, _ in read_lines(segment.path, MAX_ENTRY_BYTES):
                yield hash_leaf(line)


def _read_entry(directory: Path, number: int) -> bytes:
    """The line of an entry; empty if its file is too short for it."""
    holding = [s for s in list_segments(directory) if s.first <= number]
    if not holding or holding[-1].is_removed:
        raise AuditError(f"Entry {number} of {directory} was removed: only its hash is left.")
    lines = read_lines(holding[-1].path, MAX_ENTRY_BYTES)
    return next((line for line, _ in islice(lines, number - holding[-1].first, None)), b"")
