"""Text written again in the forms that text comes in: questions and answers, lists, mail, tables.

A form says nothing about a text's subject. Public text in every form therefore shows a router, and
whoever checks one, what must not be taken for an owner's domain. Pure functions of text. Source:
ours.
"""

import json
import re
from collections.abc import Callable, Sequence
from random import Random

MIN_WORDS = 4  # of a sentence that is used
MAX_WORDS = 40
MIN_SENTENCES = 4  # of a text that is written again

_PAUSE = re.compile(r"(?<=[.!?])\s+|\n\s*")
_SPACE = re.compile(r"\s+")
_NO_LETTER = re.compile(r"[^\w\s]|_")


def sentences_of(text: str, most: int) -> list[str]:
    """The first sentences of a text, at most so many, that have 4 to 40 words."""
    found: list[str] = []
    for part in _PAUSE.split(text):
        sentence = _SPACE.sub(" ", part).strip()
        if MIN_WORDS <= sentence.count(" ") + 1 <= MAX_WORDS:
            found.append(sentence)
            if len(found) == most:
                break
    return found


def _questions(sentences: Sequence[str], draw: Random) -> str:
    marks = draw.choice([("Question: ", "Answer: "), ("Q: ", "A: "), ("### Question\n", "### ")])
    asked = [f"{s.rstrip('.!?:')}?" for s in sentences[::2]]
    pairs = zip(asked, sentences[1::2], strict=False)
    return "\n\n".join(f"{marks[0]}{q}\n{marks[1]}{a}" for q, a in pairs)


def _choices(sentences: Sequence[str], draw: Random) -> str:
    ask = draw.choice(["Question: ", "", "Q. "])
    letter = draw.choice(["{}. ", "({}) ", "{}) "])
    answer = draw.choice(["Answer: ", "Answer:", "The answer is "])
    blocks = []
    for group in _groups(sentences, 4):
        asked, *options = group
        lines = [f"{ask}{asked}"]
        lines += [letter.format("ABC"[i]) + _words(o, 6) for i, o in enumerate(options)]
        blocks.append("\n".join([*lines, answer + draw.choice("ABC"[: len(options)] or "A")]))
    return "\n\n".join(blocks)


def _passage(sentences: Sequence[str], draw: Random) -> str:
    head = draw.choice(["Passage: ", "Context: ", "Background: ", "Title: "])
    half = len(sentences) // 2
    asked, *said = sentences[half:]
    end = f"\n\nQuestion: {asked.rstrip('.!?:')}?\nAnswer: {' '.join(said)}"
    return head + " ".join(sentences[:half]) + end


def _dialogue(sentences: Sequence[str], draw: Random) -> str:
    names = draw.choice([("User", "Assistant"), ("A", "B"), ("Anna", "Peter"), ("Human", "AI")])
    return "\n".join(f"{names[i % 2]}: {s}" for i, s in enumerate(sentences))


def _list(sentences: Sequence[str], draw: Random) -> str:
    mark = draw.choice(["- ", "* ", "{}. ", "{}) ", "• "])
    return "\n".join(mark.format(i) + s for i, s in enumerate(sentences, 1))


def _mail(sentences: Sequence[str], draw: Random) -> str:
    name = draw.choice(["Anna", "Peter", "Maria", "John"])
    subject, *body = sentences
    head = f"From: {name.lower()}@example.org\nTo: list@example.org\nSubject: {_words(subject, 6)}"
    return f"{head}\n\nDear all,\n\n{' '.join(body)}\n\nBest regards,\n{name}"


def _fence(sentences: Sequence[str], draw: Random) -> str:
    half = len(sentences) // 2
    inside = "\n".join(sentences[half:])
    return f"{' '.join(sentences[:half])}\n\n```{draw.choice(['', 'text'])}\n{inside}\n```"


def _table(sentences: Sequence[str], draw: Random) -> str:
    rows = [
        (str(i), _words(s, 5).replace(",", ""), str(len(s))) for i, s in enumerate(sentences, 1)
    ]
    if draw.random() < 0.5:
        return "\n".join(",".join(row) for row in [("number", "text", "length"), *rows])
    head = ["| number | text | length |", "|---|---|---|"]
    return "\n".join(head + [f"| {' | '.join(row)} |" for row in rows])


def _headings(sentences: Sequence[str], draw: Random) -> str:
    mark = draw.choice(["# ", "## ", "== "])
    blocks = ((_words(group[0], 4), " ".join(group[1:])) for group in _groups(sentences, 3))
    return "\n\n".join(f"{mark}{title}\n\n{body}" for title, body in blocks)


def _record(sentences: Sequence[str], draw: Random) -> str:
    key = draw.choice(["text", "title", "description"])
    return "\n".join(json.dumps({"id": i, key: s}) for i, s in enumerate(sentences))


def _spoken(sentences: Sequence[str], draw: Random) -> str:
    who = draw.choice(["he said", "she said", "they asked", "said the woman"])
    return " ".join(f"“{s.rstrip('.')},” {who}." for s in sentences)


def _bare(sentences: Sequence[str], draw: Random) -> str:
    join = draw.choice([" ", "\n"])
    return join.join(_SPACE.sub(" ", _NO_LETTER.sub(" ", s)).strip().lower() for s in sentences)


def _lines(sentences: Sequence[str], draw: Random) -> str:
    return draw.choice(["\n", "\n\n"]).join(sentences)


FORMS: dict[str, Callable[[Sequence[str], Random], str]] = {
    "questions": _questions,
    "choices": _choices,
    "passage": _passage,
    "dialogue": _dialogue,
    "list": _list,
    "mail": _mail,
    "fence": _fence,
    "table": _table,
    "headings": _headings,
    "record": _record,
    "spoken": _spoken,
    "bare": _bare,
    "lines": _lines,
}

FAMILIES = {
    "asking": ["questions", "choices", "passage", "dialogue"],
    "layout": ["list", "headings", "lines", "spoken", "bare", "mail"],
    "data": ["fence", "table", "record"],
}


def write_form(form: str, text: str, draw: Random, most_sentences: int = 16) -> str | None:
    """The beginning of `text` in a form of FORMS; None if it has too few sentences for that."""
    sentences = sentences_of(text, most_sentences)
    return FORMS[form](sentences, draw) if len(sentences) >= MIN_SENTENCES else None


def _words(sentence: str, count: int) -> str:
    return " ".join(sentence.split()[:count]).rstrip(".,;:")


def _groups(sentences: Sequence[str], size: int) -> list[Sequence[str]]:
    return [sentences[i : i + size] for i in range(0, len(sentences), size)]
