"""News and poems to be continued: items from the held-out documents of a prepared set.

The paper's own texts (MUSE-News, a collection of poems) are in no package; held-out text of the set
at hand stands in, which no expert was trained on. Source: paper, appendix C.
"""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from flexolmo.data.batches import TokenSet, open_set
from flexolmo.data.tokenizer import load_tokenizer
from flexolmo.errors import SourceUnavailable
from flexolmo.research.tasks.items import Item
from flexolmo.research.tasks.sources import Sources

LEAST_WORDS, MOST_WORDS = 64, 128  # of a whole text (paper)
NEWS_PROMPT_WORDS = 32
POEM_PROMPT_LINES = 4
POEM_SHOTS = 5
LONGEST_VERSE_CHARACTERS = 64
SAMPLES = 5  # continuations of each text, at temperature 0.8 (paper)
TEMPERATURE = 0.8
MAX_NEW_TOKENS = 256
QUALITIES = ("journalistic", "poetic")  # what a judge is asked about


def news_items(sources: Sources) -> list[Item]:
    """The first 32 words of articles, to be continued; of each, at most 128 words count."""
    found = []
    for i, text in _texts(sources, "news", "heldout"):
        words = list(re.finditer(r"\S+", text))
        if len(words) >= LEAST_WORDS:
            start = words[NEWS_PROMPT_WORDS - 1].end()
            end = words[:MOST_WORDS][-1].end()
            found.append(
                Item(
                    str(i),
                    prompt=text[:start],
                    gold_text=text[start:end],
                    references=(text[start:end],),
                    question=text[:end],
                    more={"start": text[:start], "quality": QUALITIES[0]},
                )
            )
    return _some(found, "news")


def poem_items(sources: Sources) -> list[Item]:
    """The first four lines of verses, after five whole ones of the training split."""
    shots = list(
        islice((p for _, t in _texts(sources, "poems", "train") for p in _poems(t)), POEM_SHOTS)
    )
    if len(shots) < POEM_SHOTS:
        raise SourceUnavailable(
            f"--poems has {len(shots)} verses of {LEAST_WORDS} to "
            f"{MOST_WORDS} words to train on; {POEM_SHOTS} are examples"
        )
    before = "".join(f"{p}\n\n\n" for p in shots)
    found = []
    for i, text in _texts(sources, "poems", "heldout"):
        for j, poem in enumerate(_poems(text)):
            lines = poem.split("\n")
            start = "\n".join(lines[:POEM_PROMPT_LINES])
            found.append(
                Item(
                    f"{i}-{j}",
                    prompt=before + start,
                    gold_text=poem[len(start) :],
                    references=(poem[len(start) :],),
                    question=poem,
                    more={"start": start, "quality": QUALITIES[1]},
                )
            )
    return _some(found, "poems")


def _poems(text: str) -> Iterator[str]:
    """Runs of short lines between blank ones, of 64 to 128 words and more than four lines."""
    verses: list[str] = []
    for block in [*re.split(r"\n\s*\n", text), ""]:
        lines = [line.rstrip() for line in block.strip("\n").split("\n")]
        is_verse = len(lines) > 1 and max(map(len, lines)) <= LONGEST_VERSE_CHARACTERS
        if is_verse:
            verses += lines
        count = sum(len(line.split()) for line in verses)
        if count >= LEAST_WORDS or not is_verse:
            if LEAST_WORDS <= count <= MOST_WORDS and len(verses) > POEM_PROMPT_LINES:
                yield "\n".join(verses)
            verses = []


def _texts(sources: Sources, role: str, split: str) -> Iterator[tuple[int, str]]:
    """Place and text of the documents of the set that plays this role."""
    directory = sources.prepared.get(role)
    if directory is None:
        raise SourceUnavailable(
            f"the paper's {role} are in no package; name a prepared set whose "
            f"held-out documents stand in (--{role})"
        )
    opened: TokenSet = open_set(Path(directory))
    tokenizer = load_tokenizer(Path(directory))
    sources.digests[role] = opened.digest
    documents = opened.splits[split]
    for i in range(documents.num_documents):
        yield i, tokenizer.decode(documents.document(i).tolist())


def _some(items: list[Item], role: str) -> list[Item]:
    if not items:
        raise SourceUnavailable(
            f"no held-out document of --{role} is of {LEAST_WORDS} words or more and of that kind"
        )
    return items
