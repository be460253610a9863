"""The audit log's one writer: an entry is on the disk before `append` returns.

Entries that many threads append at once share one write and one fsync.
`docs/reference/audit_log.md` is the norm; `audit_check` reads and verifies, also while this writes.
"""

import queue
import secrets
import shlex
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import JsonValue

from flexolmo.bundle.signing import create_key, encode_public, read_private_key
from flexolmo.errors import AuditError
from flexolmo.files import lock_directory, write_bytes
from flexolmo.serving.checkpoint import (
    MAX_KEPT_BYTES,
    NEW_ORIGIN,
    Checkpoint,
    decode_kept,
    encode_kept,
    sign_checkpoint,
)
from flexolmo.serving.entries import (
    MAX_ENTRY_BYTES,
    NOTHING_BEFORE,
    Entry,
    Kind,
    check_fields,
    digest_leaf,
    utc_now,
)
from flexolmo.serving.segments import (
    CHECKPOINTS,
    KEY,
    PUBLIC_KEY,
    LineFile,
    list_segments,
    read_hashes,
    read_last_line,
    read_lines,
    segment_path,
)
from flexolmo.serving.tree import Frontier, hash_leaf


@dataclass(frozen=True)
class _Draft:
    """An entry that waits to be written."""

    kind: Kind
    fields: dict[str, JsonValue]
    number: "Future[int]" = field(default_factory=Future)


class AuditLog:
    """The log in one directory, open for writing. Every method may be called from any thread."""

    def __init__(
        self,
        directory: Path,
        key: ec.EllipticCurvePrivateKey,
        held: ExitStack,
        segment_bytes: int,
        checkpoint_entries: int,
        checkpoint_seconds: float,
    ):
        self.directory = directory
        self._key = key
        self._segment_bytes = segment_bytes
        self._checkpoint_entries = checkpoint_entries
        self._checkpoint_seconds = checkpoint_seconds
        self._checkpoints = LineFile(directory / CHECKPOINTS)
        held.callback(self._checkpoints.close)
        self._origin, self._tree = _newest_checkpoint(directory, key)
        self._previous = _read_on(directory, self._tree)
        segments = [s for s in list_segments(directory) if not s.is_removed]
        self._segment = LineFile(
            segments[-1].path if segments else segment_path(directory, self._tree.size)
        )
        held.callback(lambda: self._segment.close())
        self._day = _day_of(self._segment)  # of the segment's last entry
        self._writing = threading.Lock()  # held to touch the tree and the files
        self._sign()
        self._entering = threading.Lock()  # held to add to the queue or to close it
        self._is_closed = False
        self._queue: queue.SimpleQueue[_Draft | None] = queue.SimpleQueue()  # None: the end
        self._held = held.pop_all()  # files and the directory's lock
        self._thread = threading.Thread(target=self._run, name="audit log", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        directory: Path,
        key: ec.EllipticCurvePrivateKey | None = None,
        *,
        segment_bytes: int = 64 << 20,
        checkpoint_entries: int = 1000,
        checkpoint_seconds: float = 60.0,
    ) -> "AuditLog":
        """Go on with the log in `directory`, or begin one there.

        What a killed server left of a last line is removed; nobody was told of that entry.

        Args:
            key: Key that signs checkpoints; by default one that is kept in the directory, made on
                first use.
            segment_bytes: Bytes of a file of entries after which the next one begins; one also
                begins with each day, so that retention can go by days.
            checkpoint_entries: Entries after which a checkpoint is signed.
            checkpoint_seconds: Seconds after which a checkpoint is signed, if there is a new entry.

        Raises:
            AuditError: another server writes there; what is there does not hold up; or it cannot be
                written.
            SignatureError: the directory's key cannot be read, or others may read it.
            DiskFullError: there is no room for a new log's key.
        """
        directory = Path(directory).resolve()
        with ExitStack() as held, _explain(directory):
            directory.mkdir(0o700, parents=True, exist_ok=True)
            if not held.enter_context(lock_directory(directory, wait=False)):
                raise AuditError(
                    f"{directory} cannot be locked: another server writes its audit log there, or "
                    "the file system has no locks. Give each server a directory of its own."
                )
            found = _find_key(directory, key)
            return cls(
                directory, found, held, segment_bytes, checkpoint_entries, checkpoint_seconds
            )

    def append(self, kind: Kind, fields: Mapping[str, JsonValue]) -> int:
        """Write an entry; returns its number once it is on the disk.

        Raises:
            AuditError: fields that a `kind` has no room for (`entries.FIELDS`); the log is closed;
                or the entry could not be written. Then nothing is half-written, and a later call
                works again once the disk has room.
        """
        draft = _Draft(kind, check_fields(kind, fields))
        with self._entering:
            if self._is_closed:
                raise AuditError(f"The audit log {self.directory} is closed.")
            self._queue.put(draft)
        return draft.number.result()

    def checkpoint(self) -> Checkpoint:
        """Sign how many entries there are, and the root of their tree; keep it and return it.

        Done by itself at opening, at closing, and as `open` was told.

        Raises:
            AuditError: the log is closed, or the checkpoint could not be written.
        """
        with self._writing, _explain(self.directory):
            if self._is_closed:
                raise AuditError(f"The audit log {self.directory} is closed.")
            return self._sign()

    def close(self) -> None:
        """Write what waits, sign a last checkpoint and let another server have the directory.

        Raises:
            AuditError: the checkpoint could not be written; the log is closed all the same.
        """
        with self._entering:
            if self._is_closed:
                return
            self._is_closed = True
            self._queue.put(None)
        self._thread.join()
        with self._held, self._writing, _explain(self.directory):
            self._sign()

    # --- the writing thread ---

    def _run(self) -> None:
        """Write what waits, all at once, until the log is closed."""
        is_closed = False
        while not is_closed:
            drafts = []
            with suppress(queue.Empty):
                drafts.append(self._queue.get(timeout=self._checkpoint_seconds))
            while not self._queue.empty():
                drafts.append(self._queue.get())
            is_closed = None in drafts
            with self._writing:
                self._write([d for d in drafts if d is not None])
                if self._is_checkpoint_due():
                    with suppress(OSError):  # tried again after the next entry
                        self._sign()

    def _write(self, drafts: Sequence[_Draft]) -> None:
        """Write the entries, or none of them, and tell those who wait."""
        if not drafts:
            return
        tree, previous = self._tree.copy(), self._previous
        lines = []
        now = utc_now()
        try:
            for draft in drafts:
                line = Entry(
                    number=tree.size,
                    time=now,
                    kind=draft.kind,
                    fields=draft.fields,
                    previous=previous,
                ).encode()
                lines.append(line + b"\n")
                leaf = hash_leaf(line)
                tree.append(leaf)
                previous = digest_leaf(leaf)
            self._segment_for(now[:10]).append(b"".join(lines))
        except Exception as e:  # whatever it is, nobody may wait for ever
            for draft in drafts:
                draft.number.set_exception(_cannot_write(self.directory, e))
            return
        first = self._tree.size
        self._tree, self._previous = tree, previous
        for number, draft in enumerate(drafts, first):
            draft.number.set_result(number)

    def _segment_for(self, day: str) -> LineFile:
        """The file that takes entries of `day`: a new one for a new day, or if the last is full."""
        segment = self._segment
        if day != self._day or segment.num_bytes >= self._segment_bytes:
            segment.cut()
            self._segment = LineFile(segment_path(self.directory, self._tree.size))
            segment.close()
        self._day = day
        return self._segment

    def _is_checkpoint_due(self) -> bool:
        new = self._tree.size - self._signed_size
        age = time.monotonic() - self._signed_at
        return new >= self._checkpoint_entries or (new > 0 and age >= self._checkpoint_seconds)

    def _sign(self) -> Checkpoint:
        tree = self._tree
        signed = sign_checkpoint(self._origin, tree.size, tree.root(), utc_now(), self._key)
        self._checkpoints.append(encode_kept(signed, tree) + b"\n")
        self._signed_size, self._signed_at = tree.size, time.monotonic()
        return signed


# --- opening ------------------------------------------------------------------------------------


def _find_key(
    directory: Path, key: ec.EllipticCurvePrivateKey | None
) -> ec.EllipticCurvePrivateKey:
    """`key`, or else the directory's own, made if it has none; its public half is there after."""
    private, public = directory / KEY, directory / PUBLIC_KEY
    if key is None:
        if public.exists() and not private.exists():
            raise AuditError(
                f"The key of the audit log {directory} is kept elsewhere, or was lost. Give it, or "
                "begin a new log in another directory."
            )
        if not private.exists():
            create_key(private)
        key = read_private_key(private)
    if not public.exists():
        write_bytes(public, encode_public(key))
    if public.read_bytes() != encode_public(key):
        raise AuditError(
            f"The audit log {directory} was begun with another key. Give that one, or begin a new "
            "log in another directory."
        )
    return key


def _newest_checkpoint(directory: Path, key: ec.EllipticCurvePrivateKey) -> tuple[str, Frontier]:
    """The log's name and its tree at the newest checkpoint; of a new log, a new name."""
    line = read_last_line(directory / CHECKPOINTS, MAX_KEPT_BYTES)
    if not line and not any(s.path.stat().st_size for s in list_segments(directory)):
        return f"{NEW_ORIGIN}{secrets.token_hex(16)}", Frontier()
    try:
        newest, tree = decode_kept(line, key.public_key())
    except ValueError:
        raise _does_not_hold_up(directory, f"the last line of {CHECKPOINTS} is damaged") from None
    return newest.origin, tree


def _read_on(directory: Path, tree: Frontier) -> str:
    """Add the entries after the newest checkpoint to its `tree`; returns the last one's digest.

    Reads from the segment that holds the checkpoint's last entry.
    """
    signed_size = tree.size
    segments = list_segments(directory)
    start = max((i for i, s in enumerate(segments) if s.first < signed_size), default=0)
    number = segments[start].first if signed_size and segments else 0
    previous = NOTHING_BEFORE
    for segment in segments[start:]:
        if segment.first != number:
            raise _does_not_hold_up(directory, f"entries before {segment.path.name} are missing")
        if segment.is_removed:
            for leaf in read_hashes(segment.path):
                number += 1
                previous = digest_leaf(leaf)
            continue
        for line, is_whole in read_lines(segment.path, MAX_ENTRY_BYTES):
            if not is_whole and segment is segments[-1]:
                break
            leaf = hash_leaf(line)
            if number >= signed_size:
                try:
                    entry = Entry.decode(line)
                    if not is_whole or (entry.number, entry.previous) != (number, previous):
                        raise ValueError
                except ValueError:
                    found = f"entry {number} in {segment.path.name} is damaged, or does not follow"
                    raise _does_not_hold_up(directory, found) from None
                tree.append(leaf)
            previous = digest_leaf(leaf)
            number += 1
    if number != tree.size:
        raise _does_not_hold_up(directory, f"it ends before entry {tree.size - 1}")
    return previous


def _day_of(segment: LineFile) -> str:
    """The day, like 2026-01-31, of its last entry; empty if there is none."""
    line = read_last_line(segment.path, MAX_ENTRY_BYTES)
    return Entry.decode(line).time[:10] if line else ""


# --- words --------------------------------------------------------------------------------------


def _does_not_hold_up(directory: Path, found: str) -> AuditError:
    return AuditError(
        f"The audit log {directory} does not hold up: {found}. Nothing was changed. See what is "
        f"wrong: flexolmo audit verify {shlex.quote(str(directory))}. Keep it as it is, and serve "
        "with another directory."
    )


def _cannot_write(directory: Path, error: Exception) -> AuditError:
    reason = getattr(error, "strerror", None) or error
    return AuditError(
        f"The audit log {directory} cannot be written: {reason}. Nothing is half-written. Once "
        "that is put right, as by freeing some space, the next entry is written again."
    )


@contextmanager
def _explain(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise _cannot_write(directory, e) from None
