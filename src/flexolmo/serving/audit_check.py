"""Verification of the audit log: names every entry that was altered, removed, moved or put in.

Reads the log once, in order, also while a server writes. `docs/reference/audit_log.md` is the norm.
"""

import heapq
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from flexolmo.bundle.signing import MAX_KEY_BYTES
from flexolmo.errors import AuditError
from flexolmo.files import read_bytes
from flexolmo.progress import Meter, progress
from flexolmo.serving.checkpoint import MAX_KEPT_BYTES, Checkpoint, decode_kept, load_key
from flexolmo.serving.entries import MAX_ENTRY_BYTES, NOTHING_BEFORE, Entry, digest_leaf
from flexolmo.serving.segments import (
    CHECKPOINTS,
    HASH_BYTES,
    PUBLIC_KEY,
    Segment,
    list_segments,
    open_plain,
    read_hashes,
    read_last_line,
    read_lines,
)
from flexolmo.serving.tree import Frontier, hash_leaf

MAX_FINDINGS = 100  # that are named; the rest are counted
_PATIENCE_SECONDS = 1.0  # a line that a living server writes is whole long before


@dataclass
class Report:
    """All that a reading of the log has found."""

    findings: list[str] = field(default_factory=list)  # a sentence each; empty: all holds
    num_findings: int = 0
    num_entries: int = 0  # entries 0 to num_entries - 1, removed ones included
    num_removed: int = 0  # by retention; their hashes hold
    newest: Checkpoint | None = None  # of those that the log keeps

    def add(self, sentence: str) -> None:
        """Say what is wrong."""
        self.num_findings += 1
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(sentence)


def public_key(directory: Path, path: Path | None = None) -> ec.EllipticCurvePublicKey:
    """The key in the file `path`, or else the one that lies beside the log."""
    found = directory / PUBLIC_KEY if path is None else path
    try:
        pem = read_bytes(found, MAX_KEY_BYTES, follows_links=path is not None)
    except (OSError, ValueError) as e:
        raise AuditError(
            f"The audit log's public key {found} cannot be read: {getattr(e, 'strerror', e)}. Name "
            "the directory of a log, or give the key with --key."
        ) from None
    return load_key(pem)


def newest_checkpoint(directory: Path, key: ec.EllipticCurvePublicKey) -> Checkpoint:
    """The newest checkpoint that the log keeps; AuditError if there is none, or none that holds."""
    path = directory / CHECKPOINTS
    try:
        return decode_kept(read_last_line(path, MAX_KEPT_BYTES), key)[0]
    except OSError as e:
        raise AuditError(f"{directory} holds no audit log: {path}: {e.strerror}.") from None
    except ValueError as e:
        raise AuditError(
            f"The last line of {path} is no checkpoint of this log: {_in_short(e)}."
        ) from None


def check_log(
    directory: Path,
    key: ec.EllipticCurvePublicKey,
    against: Sequence[Checkpoint] = (),
    see: Callable[[Entry], None] = lambda entry: None,
) -> Report:
    """Read the whole log and report all that does not hold.

    Args:
        key: Key that signed its checkpoints.
        against: Checkpoints that were kept elsewhere; the log must be a continuation of each.
        see: Told of each entry that is in its place, in order, whether altered or not.

    Raises:
        AuditError: there is no log, or it cannot be read.
    """
    report = Report()
    path = directory / CHECKPOINTS
    try:
        # First, so that what it counts is there when the entries are read.
        num_bytes = path.stat().st_size
        kept = _kept_checkpoints(path, num_bytes, key, report)
        elsewhere = sorted(((c, "kept elsewhere") for c in against), key=_size_of)
        merged = heapq.merge(kept, elsewhere, key=_size_of)
        walk = _Walk(report, see, _of_one_log(merged, report))
        segments = list_segments(directory)
        total = sum(s.path.stat().st_size for s in segments)
        with progress("verify", total, "bytes") as meter:
            for segment in segments:
                walk.take(segment, is_last=segment is segments[-1], meter=meter)
        walk.end()
    except OSError as e:
        raise AuditError(
            f"{directory} holds no audit log that can be read: {e.filename}: {e.strerror}."
        ) from None
    return report


def _size_of(found: tuple[Checkpoint, str]) -> int:
    return found[0].size


def _kept_checkpoints(
    path: Path, num_bytes: int, key: ec.EllipticCurvePublicKey, report: Report
) -> Iterator[tuple[Checkpoint, str]]:
    """The checkpoints in the first `num_bytes` of `path`, each with its place, that are sound."""
    newest = None
    for number, (line, is_whole) in enumerate(read_lines(path, MAX_KEPT_BYTES), 1):
        place = f"{path.name}, line {number}"
        if not is_whole and _becomes_whole(path):
            return
        try:
            if not is_whole:
                raise ValueError("it is cut short")
            checkpoint, _ = decode_kept(line, key)
            if newest is not None and newest.size > checkpoint.size:
                raise ValueError("it counts fewer entries than the one before")
        except ValueError as e:
            report.add(f"The checkpoint in {place} was altered, moved or put in: {_in_short(e)}.")
        else:
            report.newest = newest = checkpoint
            yield checkpoint, place
        num_bytes -= len(line) + 1
        if num_bytes <= 0:
            break
    if newest is None:
        report.add(f"{path.name} holds no checkpoint of this log.")


def _of_one_log(
    checkpoints: Iterator[tuple[Checkpoint, str]], report: Report
) -> Iterator[tuple[Checkpoint, str]]:
    """`checkpoints` without those of another log than the first."""
    origin = None
    for checkpoint, place in checkpoints:
        origin = origin or checkpoint.origin
        if checkpoint.origin == origin:
            yield checkpoint, place
        else:
            report.add(
                f"The checkpoint ({place}) is of {checkpoint.origin}, and this log is {origin}: "
                "it was replaced as a whole, or the checkpoint is of another server."
            )


def _becomes_whole(path: Path) -> bool:
    """True if a writer ends the last line within a second."""
    until = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < until:
        with open_plain(path) as f:
            num_bytes = os.fstat(f.fileno()).st_size
            if num_bytes == 0 or os.pread(f.fileno(), 1, num_bytes - 1) == b"\n":
                return True
        time.sleep(0.05)
    return False


def _in_short(error: ValueError) -> str:
    """The first line of a message; pydantic's are long."""
    if isinstance(error, ValidationError):
        return "it is not in the form of one"
    return str(error)


class _Walk:
    """A reading of the log from its beginning, and what must hold of the next entry."""

    def __init__(
        self,
        report: Report,
        see: Callable[[Entry], None],
        checkpoints: Iterator[tuple[Checkpoint, str]],
    ):
        self._report = report
        self._see = see
        self._checkpoints = checkpoints
        self._due = next(checkpoints, None)  # the next to be met
        self._tree = Frontier()
        self._is_tree_whole = True  # False once an entry is missing or known to be another
        self._num_signed = 0  # entries under the newest checkpoint that was found to agree
        self._number = 0  # of the next entry
        self._previous: str | None = NOTHING_BEFORE  # digest that it must name; None: any
        self._place = ""  # of the entry before
        self._doubt = ""  # place of an entry whose hash the one after it does not name

    # --- files ---

    def take(self, segment: Segment, is_last: bool, meter: Meter) -> None:
        """Read one file."""
        if segment.is_removed:
            self._take_hashes(segment, meter)
            return
        name, first, num_bytes = segment.path.name, self._number, 0
        for n, (line, is_whole) in enumerate(read_lines(segment.path, MAX_ENTRY_BYTES), 1):
            place = f"{name}, line {n}"
            if not is_whole:
                if not (is_last and _becomes_whole(segment.path)):
                    self._report.add(
                        f"Entry {self._number} ({place}) is cut short: a server was killed while "
                        "it wrote it, and the next start removes it; or somebody cut it."
                    )
                break
            self._take_line(line, place)
            if n == 1 and self._number == first + 1 and first != segment.first:
                self._report.add(f"{name} begins with entry {first}: it was renamed.")
            num_bytes += len(line) + 1
            if num_bytes > 1 << 20:
                meter.advance(num_bytes)
                num_bytes = 0
        meter.advance(num_bytes)

    def _take_hashes(self, segment: Segment, meter: Meter) -> None:
        """Read the hashes of removed entries."""
        name = segment.path.name
        if segment.first < self._number:
            self._report.add(f"{name} stands for entries that are there: it was put in or renamed.")
            return
        if segment.first > self._number:
            self._miss(segment.first, f"before {name}")
        self._settle_doubt()
        for leaf in read_hashes(segment.path):
            if len(leaf) < HASH_BYTES:
                self._report.add(f"{name} is cut short.")
                break
            self._step(leaf, f"The hash of entry {self._number} ({name})")
            self._report.num_removed += 1
        meter.advance(segment.path.stat().st_size)

    # --- entries ---

    def _take_line(self, line: bytes, place: str) -> None:
        try:
            entry = Entry.decode(line)
        except ValueError:
            self._report.add(
                f"{place} is no entry, after entry {self._number - 1}: it was altered or put in."
            )
            return
        follows = entry.previous == self._previous
        if entry.number != self._number and follows:
            altered = f"Entry {self._number} ({place})"
            self._report.add(f"{altered} was altered: it says that it is number {entry.number}.")
            self._step(None, altered)
            return
        place = f"Entry {entry.number} ({place})"
        if entry.number < self._number:
            self._report.add(
                f"{place} stands after entry {self._number - 1}: it was moved or put in."
            )
            return
        if entry.number > self._number:
            self._miss(entry.number, f"before {place}")
        elif self._previous is not None:
            self._judge_link(follows, place)
        self._see(entry)
        self._step(hash_leaf(line), place)

    def _judge_link(self, follows: bool, place: str) -> None:
        """Find out which of two entries was altered when the second does not name the first's hash:
        the second, if the third does not name its hash either."""
        if follows and self._doubt:
            self._report.add(f"{self._doubt} was altered: the entry after it names another hash.")
            self._doubt = ""
        elif not follows and self._doubt:
            self._report.add(f"{self._place} was altered, and perhaps {self._doubt}.")
            self._doubt = ""
        elif not follows:
            self._doubt = self._place
            self._is_tree_whole = False

    def _settle_doubt(self) -> None:
        if self._doubt:
            self._report.add(f"{self._doubt} was altered, or {self._place}.")
            self._doubt = ""

    def _miss(self, number: int, where: str) -> None:
        """Entries before `number` are not there."""
        self._settle_doubt()
        self._meet_checkpoints()
        is_one = number == self._number + 1
        run = f"y {self._number} is" if is_one else f"ies {self._number} to {number - 1} are"
        self._report.add(f"Entr{run} missing {where}.")
        self._number, self._previous = number, None
        self._is_tree_whole = False

    def _step(self, leaf: bytes | None, place: str) -> None:
        """Go on to the next entry; `leaf` is None if this one's hash cannot be the true one."""
        self._meet_checkpoints()  # now that the link to the entry before was judged
        if leaf is None:
            self._is_tree_whole = False
        elif self._is_tree_whole:
            self._tree.append(leaf)
        self._previous = None if leaf is None else digest_leaf(leaf)
        self._place = place
        self._number += 1

    def _meet_checkpoints(self) -> None:
        """Compare the tree so far with the checkpoints of just so many entries."""
        while self._due is not None and self._due[0].size <= self._number:
            checkpoint, place = self._due
            if self._is_tree_whole and self._tree.root() != checkpoint.root:
                self._report.add(
                    f"{self._place}, or entries before it from {self._num_signed} on, were altered "
                    f"and chained anew: the checkpoint ({place}) of {checkpoint.time} was signed "
                    "over others."
                )
                self._is_tree_whole = False
            elif self._is_tree_whole:
                self._num_signed = checkpoint.size
            self._due = next(self._checkpoints, None)

    def end(self) -> None:
        """Look for what must be there after the last entry."""
        self._settle_doubt()
        self._meet_checkpoints()
        self._report.num_entries = self._number
        beyond = None
        while self._due is not None:
            beyond = self._due
            self._due = next(self._checkpoints, None)
        if beyond is not None:
            checkpoint, place = beyond
            self._miss(
                checkpoint.size,
                f"at the end: the checkpoint ({place}) of {checkpoint.time} was signed over it",
            )
