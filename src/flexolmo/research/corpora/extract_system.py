"""Natural documents from npm and Debian packages, for the sets that pip alone cannot fill.

As in `extract_pip`, each is a pure function of an `Archive` and runs nothing.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from flexolmo.research.corpora.archives import Archive
from flexolmo.research.corpora.extract_pip import Texts
from flexolmo.research.corpora.markup import plain_brown, plain_html, plain_mail

_INDEX = re.compile(r"Jump to:|Documentation Categories|Hide navigation")


def brown_categories(letters: str) -> Callable[[Archive], Texts]:
    """An extractor of the Brown corpus (1961): texts of the categories in `letters`."""

    def extract(package: Archive) -> Texts:
        for name, text in package.texts(rf"(^|/)c[{letters}]\d\d$"):
            yield Path(name).stem, plain_brown(text)

    return extract


def html_pages(pattern: str, least_characters: int = 500) -> Callable[[Archive], Texts]:
    """An extractor of the HTML pages whose names match `pattern`; no index pages, none shorter."""

    def extract(package: Archive) -> Texts:
        for name, page in package.texts(pattern):
            text = plain_html(page)
            if _INDEX.search(text[:400]):
                package.leave_out("index pages", text)
            elif len(text) < least_characters:
                package.leave_out(f"pages under {least_characters} characters", text)
            else:
                yield "/".join(name.split("/")[-2:]), text

    return extract


def presidential_messages(package: Archive) -> Texts:
    """State of the Union messages up to 1949; later ones are like the speeches of the news set."""
    for name, text in package.texts(r"/data/\d{4}_.*\.json$"):
        message = json.loads(text)
        if message["year"] < 1950:
            yield Path(name).stem, message["text"]
        else:
            package.leave_out("messages after 1949", message["text"])


def foldoc_entries(package: Archive) -> Texts:
    """Pages of 20 neighbouring entries of the Free On-line Dictionary of Computing."""
    index = package.read(package.names(r"foldoc\.index$")[0]).decode()
    content = gzip.decompress(package.read(package.names(r"foldoc\.dict\.dz$")[0]))
    starts: dict[int, tuple[str, int]] = {}
    for line in index.splitlines():
        word, start, size = line.split("\t")[:3]
        if not word.startswith("00-database"):
            starts.setdefault(_base64_number(start), (word, _base64_number(size)))
    entries = []
    for at, (word, length) in sorted(starts.items()):
        entry = package.decode(content[at : at + length])
        if len(entry) < 120:
            package.leave_out("entries under 120 characters, which refer to another", entry)
            continue
        lines = "\n".join(line.strip() for line in entry.splitlines())
        entries.append((word, re.sub(r"[{}]", "", lines).strip()))
    for first in range(0, len(entries), 20):
        page = entries[first : first + 20]
        yield page[0][0], "\n\n".join(text for _, text in page)


def _base64_number(digits: str) -> int:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    number = 0
    for digit in digits:
        number = number * 64 + alphabet.index(digit)
    return number


def austen_chapters(package: Archive) -> Texts:
    """Chapters of Jane Austen's six novels, from R's stored objects, read without R."""
    [name] = package.names(r"janeaustenr/data/Rdata\.rdb$")
    for novel in _stored_r_objects(package.read(name)):
        lines = [package.decode(line) for line in _r_strings(novel)]
        text = "\n".join(lines)
        if not 200_000 < len(text) < 2_000_000:  # the table of all novels together is longer
            package.leave_out("objects that are no novel by their length", text)
            continue
        title = next(line for line in lines if line.strip()).strip()
        chapters = re.split(r"\n(?=chapter [IVXLC\d]+\b)", text, flags=re.IGNORECASE)
        package.leave_out("pages before a first chapter", chapters[0])
        for number, chapter in enumerate(chapters[1:], 1):
            yield f"{title.lower()}-{number}", chapter.strip()


def _stored_r_objects(database: bytes) -> Iterator[bytes]:
    """The objects of an R lazy-load database: 4 bytes of length, then a zlib stream, repeated."""
    at = 0
    while at + 4 < len(database):
        stream = zlib.decompressobj()
        yield stream.decompress(database[at + 4 :])
        at = len(database) - len(stream.unused_data)


def _r_strings(stored: bytes) -> Iterator[bytes]:
    """Character strings of a serialized R object: a CHARSXP mark, 4 bytes of length, the bytes."""
    at = 0
    mark = re.compile(rb"\x00[\x00\x04][\x00\x40\x80\x20]\x09(?=\x00\x00)")
    while (found := mark.search(stored, at)) is not None:
        start = found.end() + 4
        length = int.from_bytes(stored[found.end() : start])
        yield stored[start : start + length]
        at = start + length


def moby_dick_chapters(package: Archive) -> Texts:
    """Chapters of Moby-Dick."""
    for name, text in package.texts(r"/data/chapter_\d+\.json$"):
        chapter = json.loads(text)
        yield (
            Path(name).stem,
            (f"Chapter {chapter['chapter']}. {chapter['title']}\n\n{chapter['text']}"),
        )


def fortune_verses(package: Archive) -> Texts:
    """Songs and poems of the fortunes file, of 200 characters or more."""
    [(_, text)] = package.texts(r"games/fortunes/songs-poems$")
    for number, verse in enumerate(text.split("\n%\n")):
        if len(verse) >= 200:
            yield f"songs-poems-{number}", verse.replace("\t", "    ")
        else:
            package.leave_out("verses under 200 characters", verse)


def mailing_lists(package: Archive) -> Texts:
    """Wanted mails of the SpamAssassin collection, from public lists of 2002; their own words."""
    for name, text in package.texts(r"/data/(easy-ham-1|easy-ham-2)/.*\.json$"):
        source = json.loads(text)["text"]
        mail = plain_mail(source)
        if mail:
            yield "/".join(name.split("/")[-2:]).removesuffix(".json"), mail
        else:
            package.leave_out("mails with under 100 characters of their own", source)


def word_explanations(package: Archive) -> Texts:
    """Pages of 60 neighbouring WordNet entries: words, what they mean, examples."""
    for name, text in package.texts(r"wordnet/data\.(noun|verb|adj|adv)$"):
        entries = []
        for line in text.splitlines():
            if line.startswith("  ") or " | " not in line:
                package.leave_out("lines that explain no word", line)
                continue
            fields, gloss = line.split(" | ", 1)
            parts = fields.split()
            words = parts[4 : 4 + 2 * int(parts[3], 16) : 2]
            spelled = ", ".join(re.sub(r"\(.*\)", "", w).replace("_", " ") for w in words)
            entries.append(f"{spelled}: {gloss.strip()}")
        for first in range(0, len(entries), 60):
            yield f"{Path(name).suffix[1:]}-{first // 60}", "\n".join(entries[first : first + 60])
