"""Counts of what looks like personal data in text, by patterns of our own and their checksums.

A pattern knows a form, not a person: it finds neither names nor what is told of somebody, and takes
some numbers for what they are not. No text is kept, only counts. Source: ours; IBAN by ISO 13616,
card numbers by ISO/IEC 7812.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from flexolmo.data.batches import TokenSet
from flexolmo.data.documents import read_documents
from flexolmo.data.prepared import check_file
from flexolmo.progress import progress

# Length of an IBAN by country. Source: IBAN registry of SWIFT.
_IBAN_LENGTHS = {
    length: countries.split()
    for length, countries in {
        15: "NO",
        16: "BE",
        18: "DK FO FI GL NL SD",
        19: "MK SI",
        20: "AT BA EE KZ LT LU MN XK",
        21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA",
        23: "AE GI IL IQ OM SO TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST",
        26: "IS TR",
        27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HU LB NI PL SV",
        29: "BR EG PS QA UA",
        30: "JO KW MU",
        31: "MT SC",
        32: "LC",
        33: "RU",
    }.items()
}
_IBAN_LENGTH = {c: length for length, found in _IBAN_LENGTHS.items() for c in found}
_MONTHS = (  # in English and in German
    "jan(?:uary?)?|feb(?:ruary?)?|mar(?:ch)?|m(?:ä|Ä|ae)rz|apr(?:il)?|may|mai|jun[ei]?|jul[yi]?|"
    "aug(?:ust)?|sep(?:t(?:ember)?)?|o[ck]t(?:ober)?|nov(?:ember)?|de[cz](?:ember)?"
)
_DAY = (
    r"(?:\d{1,2}[./-]\d{1,2}[./-]\d{2,4}|\d{4}-\d{2}-\d{2}"
    rf"|\d{{1,2}}(?:st|nd|rd|th|\.)? (?:{_MONTHS})\.?,? \d{{4}}"
    rf"|(?:{_MONTHS})\.? \d{{1,2}},? \d{{4}})"
)


def _is_iban(found: str) -> bool:
    """True if the text begins with an IBAN: its country's length, and remainder 1 of 97."""
    compact = found.replace(" ", "")
    length = _IBAN_LENGTH.get(compact[:2], 0)
    if not length or len(compact) < length:
        return False
    turned = compact[4:length] + compact[:4]
    return int("".join(str(int(c, 36)) for c in turned)) % 97 == 1


def _is_card(found: str) -> bool:
    """True for 13 to 19 digits with the check digit of payment cards (Luhn)."""
    digits = [int(c) for c in found if c.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    doubled = [d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(digits[::-1])]
    return sum(doubled) % 10 == 0


def _is_address(found: str) -> bool:
    """True for an IP address that reaches a machine on the Internet."""
    try:
        return ipaddress.ip_address(found).is_global
    except ValueError:
        return False


def _is_phone(found: str) -> bool:
    return 8 <= sum(c.isdigit() for c in found) <= 15


@dataclass(frozen=True)
class Pattern:
    """One kind of personal data: its form, a check that a match must pass, and its limits."""

    form: re.Pattern[str]
    limits: str
    passes: Callable[[str], bool] = bool


def _form(text: str, flags: int = 0) -> re.Pattern[str]:
    return re.compile(text, re.ASCII | flags)


PATTERNS = {
    "e-mail address": Pattern(
        _form(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?!\w)"),
        "role addresses such as info@ count too, and a password before a host; addresses that are "
        "spelled out do not",
    ),
    "phone number": Pattern(
        _form(
            r"(?<![\w+-])(?<!\d )(?:(?:\+|00)[1-9]\d{0,2}(?:[ ./-]?\(?\d{1,5}\)?){2,6}"
            r"|(?:tel|phone|mobile|cell|fax)\w{0,6}[.:]{0,2} {0,3}"
            r"\(?0?\d{1,5}\)?(?:[ ./-]?\d{1,5}){2,5}"
            r"|\(\d{3}\) ?\d{3}-\d{4}|\d{3}-\d{3}-\d{4})(?![\w-])",
            re.IGNORECASE,
        ),
        "with a country's code, after a word such as phone, or in the form of North America; other "
        "national numbers are missed",
        _is_phone,
    ),
    "IBAN": Pattern(
        _form(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?"),
        "length of its country and checksum are right; other account numbers are missed",
        _is_iban,
    ),
    "card number": Pattern(
        _form(r"(?<![\w.-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\w-])"),
        "check digit is right, as it is of one in ten other numbers of this length",
        _is_card,
    ),
    "social security number": Pattern(
        _form(r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])"),
        "of the United States; other numbers of this form count too, other countries' are missed",
    ),
    "IP address": Pattern(
        _form(
            r"(?<![\w.:])(?:(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)"
            r"|[23][0-9a-fA-F]{3}:(?:[0-9a-fA-F]{0,4}:){1,6}[0-9a-fA-F]{1,4}(?![\w:]))"
        ),
        "of the Internet, not of a house; versions of four numbers look the same",
        _is_address,
    ),
    "URL with credentials": Pattern(
        _form(r"(?<!\w)[A-Za-z][A-Za-z0-9+.-]{1,15}://[^\s/@:]{1,100}:[^\s/@]{1,100}@[\w.-]"),
        "examples in manuals count too",
    ),
    "private key": Pattern(
        _form(r"-----BEGIN (?:[A-Z]{2,10} ){0,3}PRIVATE KEY-----"),
        "PEM alone; passwords and tokens of other forms are missed",
    ),
    "date of birth": Pattern(
        _form(
            r"(?<!\w)(?:born(?: on)?|date of birth|birth ?date|d\.?o\.?b\.?|geb(?:oren|\.)?(?: am)?"
            rf"|née? le|nacid[oa] el)[\s:,]{{0,4}}{_DAY}(?!\w)",
            re.IGNORECASE,
        ),
        "right after a word such as born, geboren, née le or nacido el, its month a number or a "
        "name in English or German; other dates are not counted",
    ),
}


def find_personal(text: str) -> dict[str, int]:
    """Number of matches of each of PATTERNS in `text`, of those that match at all."""
    counts = {
        kind: sum(pattern.passes(found[0]) for found in pattern.form.finditer(text))
        for kind, pattern in PATTERNS.items()
    }
    return {kind: n for kind, n in counts.items() if n}


def count_personal(token_set: TokenSet, split: str = "train") -> dict[str, dict[str, int]]:
    """Counts by kind of PATTERNS: `matches`, and `documents`, the source documents with one.

    Raises DataError if the text in the set is not what its card says.
    """
    found = {kind: {"matches": 0, "documents": 0} for kind in PATTERNS}
    for kinds in _by_source(token_set, split):
        for kind, matches in kinds.items():
            found[kind]["matches"] += matches
            found[kind]["documents"] += 1
    return found


def _by_source(token_set: TokenSet, split: str) -> Iterator[dict[str, int]]:
    """Matches of each kind, source document by source document."""
    file = check_file(token_set.directory, token_set.card, f"{split}.jsonl.zst")
    sources = token_set.splits[split].sources
    texts = (document.text for document in read_documents(file))
    with progress("personal data", int(token_set.splits[split].bytes.sum()), "bytes") as meter:
        held: dict[str, int] = {}
        for text, is_last in zip(texts, _ends(sources), strict=True):
            for kind, matches in find_personal(text).items():
                held[kind] = held.get(kind, 0) + matches
            meter.advance(len(text.encode()))
            if is_last:
                yield held
                held = {}


def _ends(sources: np.ndarray) -> Iterable[bool]:
    """True for each piece [n] of a split if the next one is of another source document, or it is
    the last. `sources` [n] has the number of each piece's source document."""
    return (np.diff(sources, append=-1) != 0).tolist()
