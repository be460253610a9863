"""Retention: entries of the audit log that are old enough give way to their hashes.

The hashes keep every checkpoint, the chain and all proofs of later entries whole.
"""

import datetime
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from flexolmo.errors import AuditError
from flexolmo.files import sync, write_aside
from flexolmo.serving.audit_check import check_log, newest_checkpoint
from flexolmo.serving.entries import MAX_ENTRY_BYTES, Entry
from flexolmo.serving.segments import Segment, list_segments, read_lines
from flexolmo.serving.tree import hash_leaf


def remove_entries(directory: Path, before: datetime.date, key: ec.EllipticCurvePublicKey) -> int:
    """Remove the entries of the days before `before` (UTC); returns how many.

    Whole files are removed, from the first on, and never the last, in which a server may write;
    nor is a day removed in part. Where the log does not hold up nothing is removed: what is wrong
    with it could no longer be seen.

    Raises:
        AuditError: the log does not hold up, or cannot be read.
        DiskFullError: there is no room for the hashes.
    """
    report = check_log(directory, key)
    if report.num_findings:
        raise AuditError(
            f"Nothing was removed from {directory}: it does not hold up. {report.findings[0]} See "
            "all with flexolmo audit verify."
        )
    signed_size = newest_checkpoint(directory, key).size
    segments = [
        s for s in list_segments(directory) if not s.is_removed and s.path.stat().st_size > 0
    ]
    in_use = min((day for s in segments[-1:] for _, day in _read(s)), default="")
    limit = min(before.isoformat(), in_use)
    num_removed = 0
    for segment in segments:
        lines = list(_read(segment))
        is_signed = segment.first + len(lines) <= signed_size
        if not is_signed or max(day for _, day in lines) >= limit:
            break
        with write_aside(segment.path.with_suffix(".hashes"), is_private=True) as aside:
            aside.write_bytes(b"".join(leaf for leaf, _ in lines))
        segment.path.unlink()  # where a kill prevents this the entries count, not the hashes
        sync(directory)
        num_removed += len(lines)
    return num_removed


def _read(segment: Segment) -> Iterator[tuple[bytes, str]]:
    """Leaf hash and day of each entry."""
    for line, is_whole in read_lines(segment.path, MAX_ENTRY_BYTES):
        if is_whole:
            yield hash_leaf(line), Entry.decode(line).time[:10]
