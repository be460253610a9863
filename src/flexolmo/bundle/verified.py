"""A signed record of files that were verified, so that gigabytes are not hashed at every start.

A statement says that the files of one directory, of these inodes, sizes and times, were found to be
`subject`. It lies in the user's cache, under a message authentication code whose key lies in the
user's configuration, readable by nobody else: whoever can write to a model's directory, or to the
cache, can take statements away and make none. A statement counts as long as nothing in it has
changed; whatever does not count is no error, for the files are then hashed again. Times tell of
every change only where nobody can change a file through memory, so statements are kept of files
that are the user's alone (`are_ours_alone`).

Knows nothing of what makes a bundle or an anchor right.
"""

import hmac
import os
import secrets
import signal
import stat
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flexolmo.errors import FlexOlmoError
from flexolmo.files import (
    cache_directory,
    canonical_json,
    digest_bytes,
    hold_directory,
    parse_json,
    path_of_open,
    read_bytes,
    write_bytes,
)
from flexolmo.terminal import echo

VERIFY_VARIABLE = "FLEXOLMO_VERIFY"
SMALLEST_BYTES = 8 << 20  # of files that are worth a statement; less is hashed in 0.02 s
KEY_BYTES = 32
_MAX_STATEMENT_BYTES = 8 << 20
_CHECKS = 2  # raised when bundles or anchors are checked for more than before, or more is kept
_SECOND = 10**9
# The clock that gives files their times. On Linux it is CLOCK_REALTIME_COARSE, which Python has no
# name for: it stands still between ticks of a few milliseconds, while the other goes on.
_FILE_CLOCK = 5 if sys.platform == "linux" else time.CLOCK_REALTIME


@dataclass(frozen=True)
class Identity:
    """All that a file system says of a file's content without reading it."""

    device: int
    inode: int
    size_bytes: int
    changed_ns: int  # time of the last change of content, which the file's owner can set
    touched_ns: int  # time of the last change of any kind (ctime), which only the system sets
    owner: int

    @classmethod
    def of(cls, file: int | Path) -> "Identity":
        """The identity of an open file, or of the file of a path (not of what a link points to)."""
        found = os.fstat(file) if isinstance(file, int) else os.lstat(file)
        return cls(
            found.st_dev,
            found.st_ino,
            found.st_size,
            found.st_mtime_ns,
            found.st_ctime_ns,
            found.st_uid,
        )

    def is_same_content(self, other: "Identity") -> bool:
        """True if nothing but links to the file may have been made or removed in between. Says
        enough only of files that nobody but us can change."""
        return self == replace(other, touched_ns=self.touched_ns)


Identities = Mapping[str, Identity]  # by the file's name in its directory


def identify(directory: Path, names: Iterable[str]) -> dict[str, Identity]:
    """Identities of files of `directory`."""
    return {name: Identity.of(directory / name) for name in names}


def is_ours(status: os.stat_result) -> bool:
    """True if nobody but us may open the file for writing, or change the directory."""
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def is_ours_alone(file: int) -> bool:
    """True if nobody can change the content of an open file, read-only, but by a new opening, which
    only we can do: no process has it open for writing, nor mapped into memory from such a time.

    Writing through such a mapping need not change any of the file's times. False too where that
    cannot be found out, or an open file has no path, by which alone the very file can be mapped.
    """
    import fcntl  # not on every system that reads files

    status = os.fstat(file)
    can_tell = hasattr(fcntl, "F_SETLEASE") and path_of_open(file) is not None
    if not (can_tell and is_ours(status) and stat.S_ISREG(status.st_mode)):
        return False
    try:
        # A signal that is ignored, in place of one that ends us, if somebody opens it just now.
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)  # fails if anybody could write
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return False
    return True


def are_ours_alone(directory: Path, found: Identities) -> bool:
    """True if that holds of the files of `directory`, plain ones, which are those `found` there.

    Waits first, so that whatever changes them from now on gives them another identity.
    """
    if not wait_until_past(found):
        return False
    for name, identity in found.items():
        try:
            file = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            if Identity.of(file) != identity or not is_ours_alone(file):
                return False
        finally:
            os.close(file)
    return True


def wait_until_past(found: Identities) -> bool:
    """Wait until the clock that gives files their times has moved on, so that whatever changes from
    now on has another time: a few milliseconds at most, three seconds on a file system that counts
    in seconds. False if the times lie further in the future."""
    last = max((x.touched_ns for x in found.values()), default=0)
    if last % _SECOND == 0:  # a file system that knows whole seconds, or two
        last += 2 * _SECOND
    while (ahead := last - time.clock_gettime_ns(_FILE_CLOCK)) >= 0:
        if ahead >= 3 * _SECOND:
            return False
        time.sleep(0.002)
    return True


class VerifiedFiles:
    """One user's statements, in `cache`, under the key in the file `key`, which is made if absent.

    With `is_ignored` no statement counts, and new ones are made all the same.
    """

    def __init__(self, cache: Path, key: Path, is_ignored: bool = False):
        self._cache = cache
        self._key_file = key
        self._is_ignored = is_ignored

    @classmethod
    def of_user(cls, verify: bool = False) -> "VerifiedFiles":
        """The record of who runs this: `verify`, or FLEXOLMO_VERIFY=1, lets no statement count."""
        home = os.environ.get("XDG_CONFIG_HOME")
        config = Path(home) if home else Path.home() / ".config"
        asked = os.environ.get(VERIFY_VARIABLE, "") not in ("", "0")
        key = config / "flexolmo" / "verified.key"
        return cls(cache_directory() / "verified", key, verify or asked)

    def find(self, directory: Path, subject: str, found: Identities) -> dict[str, Any] | None:
        """Facts kept with the statement that exactly these files of `directory` are `subject`; None
        if there is none that counts."""
        if self._is_ignored or not _is_worth_it(found):
            return None
        key = self._read_key()
        try:
            whole = parse_json(read_bytes(self._place(directory), _MAX_STATEMENT_BYTES))
            said, code = whole["statement"], whole["code"]
            if key is None or not hmac.compare_digest(_authenticate(said, key), str(code)):
                return None
            facts: dict[str, Any] = said["facts"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return facts if said == _state(directory, subject, found, facts) else None

    def keep(
        self, directory: Path, subject: str, found: Identities, facts: Mapping[str, Any]
    ) -> None:
        """Keep a statement that files of `directory`, looked at before they were read and after,
        are `subject`, in the place of any other about that directory. If it cannot be written that
        is said, and nothing else changes."""
        if not (_is_worth_it(found) and wait_until_past(found)):
            return
        try:
            key = self._read_key() or self._make_key()
            said = _state(directory, subject, found, facts)
            whole = {"statement": said, "code": _authenticate(said, key)}
            write_bytes(self._place(directory), canonical_json(whole), is_private=True)
        except (OSError, FlexOlmoError) as e:
            echo(
                f"The record that {directory} was verified could not be written ({e}); it will be "
                "hashed again next time.",
                err=True,
            )

    def _place(self, directory: Path) -> Path:
        name = digest_bytes(os.fsencode(_real(directory))).removeprefix("sha256:")
        return self._cache / f"{name}.json"

    def _read_key(self) -> bytes | None:
        """The key; None if there is none, or one that others could know."""
        try:
            status = os.lstat(self._key_file)
            key = read_bytes(self._key_file, KEY_BYTES, follows_links=False)
        except (OSError, ValueError):
            return None
        is_ours = status.st_uid == os.geteuid() and not status.st_mode & 0o077
        return key if is_ours and stat.S_ISREG(status.st_mode) and len(key) == KEY_BYTES else None

    def _make_key(self) -> bytes:
        """A new key, in the place of one that is no good."""
        self._key_file.parent.mkdir(0o700, parents=True, exist_ok=True)
        with hold_directory(self._key_file.parent):
            key = self._read_key()
            if key is None:
                key = secrets.token_bytes(KEY_BYTES)
                write_bytes(self._key_file, key, is_private=True)
        return key


def _is_worth_it(found: Identities) -> bool:
    return sum(x.size_bytes for x in found.values()) >= SMALLEST_BYTES


def _real(directory: Path) -> Path:
    return Path(os.path.realpath(directory))


def _state(
    directory: Path, subject: str, found: Identities, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The statement. Another version of the program may check more, so it counts for one alone."""
    return {
        "format": "flexolmo-verified",
        "format_version": 1,
        "program": version("flexolmo"),
        "checks": _CHECKS,
        "user": os.geteuid(),
        "directory": str(_real(directory)),
        "subject": subject,
        "files": {name: asdict(found[name]) for name in sorted(found)},
        "facts": dict(facts),
    }


def _authenticate(statement: Any, key: bytes) -> str:
    return hmac.digest(
        key, b"flexolmo verified files\n" + canonical_json(statement), "sha256"
    ).hex()
