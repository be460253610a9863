"""Files put into a mixture: by hard link where nobody but us can change them, else copied.

Knows nothing of what is in them.
"""

import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flexolmo.bundle.bundle import MAX_FILE_BYTES
from flexolmo.bundle.verified import is_ours
from flexolmo.errors import MergeError


def link_or_copy(
    source: Path, target: Path, max_bytes: int | None = None
) -> tuple[Path, dict[str, Any]]:
    """Begin to take a bundle in at `target`; where to open it, and with which options.

    It is then read once: where nobody but us can change its files, `target` has links to them and
    is opened; else `source` is, and copied as it is checked.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    names = sorted(MAX_FILE_BYTES)
    if all(_is_ours(path) for path in (source, *(source / name for name in names))):
        try:
            for name in names:
                os.link(source / name, target / name, follow_symlinks=False)
            return target, {}
        except OSError:  # another file system, or one without hard links
            shutil.rmtree(target)
            target.mkdir()
    return source, {"copy_to": target, "max_bytes": max_bytes}


def _is_ours(path: Path) -> bool:
    """True for a file or directory, and no link, that nobody but us can change."""
    try:
        status = path.lstat()
    except OSError:
        return False
    is_plain = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    return is_plain and is_ours(status)


def place_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy the plain files `names`; by hard link where nobody but us can change them.

    No link is followed: what it points to might not be meant for others.
    """
    target.mkdir()
    for name in names:
        try:
            fd = os.open(source / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as e:
            raise MergeError(
                f"{source / name} is a link, or cannot be read ({e.strerror}). Expected a plain "
                "file: put a copy of what it points to in its place."
            ) from None
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise MergeError(f"{source / name} is not a plain file.")
            if _is_ours(source / name) and _is_ours(source):
                try:
                    os.link(source / name, target / name, follow_symlinks=False)
                    continue
                except OSError:  # another file system, or one without hard links
                    pass
            with open(target / name, "xb") as copy:
                shutil.copyfileobj(file, copy, 1 << 20)
