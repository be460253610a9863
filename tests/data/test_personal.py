"""Patterns of personal data: what they find by checksum, what they leave, and how fast."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.data.batches import open_set
from flexolmo.data.corpus import open_corpus
from flexolmo.data.personal import PATTERNS, count_personal, find_personal
from flexolmo.data.prepare import prepare_set
from made_documents import write_documents
from made_sets import SMALL

GERMAN = """
Januar Februar März April Mai Juni Juli August September Oktober November Dezember
""".split()  # noqa: SIM905
FOUND = {
    "e-mail address": ["write to anna.b+x@mail.example.org.", "<o'neil@example.co.uk>"],
    "phone number": ["+49 30 901820", "call (555) 123-4567", "Tel.: 030 90 18 20", "0033 1 42 68"],
    "IBAN": ["DE89 3704 0044 0532 0130 00 and more", "GB82WEST12345698765432"],
    "card number": ["4111 1111 1111 1111", "5500-0055-5555-5559"],
    "social security number": ["SSN 536-90-4399."],
    "IP address": ["from 8.8.8.8:53", "2001:4860:4860::8888"],
    "URL with credentials": ["postgres://bob:secret@db.example.org/x"],
    "private key": ["-----BEGIN RSA PRIVATE KEY-----"],
    "date of birth": [
        *["born on 3 May 1980", "DOB: 1980-05-03", "geboren am 03.05.1980", "geb. 7. Dez. 1980"],
        *[f"geboren am 3. {month} 1980" for month in GERMAN],
    ],
}  # fmt: skip
LEFT = [
    "a@b, @home, x@localhost",
    "DE88370400440532013000",
    "4111 1111 1111 1112",
    "0000 0000 0000 0000",
    "10.0.0.1, 192.168.1.1, 300.1.1.1, 127.0.0.1",
    "12:30:45 and a::b",
    "536-00-4399, 900-11-2222",
    "https://example.org:8080/a@b",
    "on 3 May 1980 the minister was born to rule",
    "-----BEGIN PUBLIC KEY-----",
    "version 1.2 of 2024-01-02, 12345678901",
]


@pytest.mark.parametrize("kind", PATTERNS)
def test_each_kind_is_found_and_nothing_else_is(kind):
    for text in FOUND[kind]:
        found = find_personal(f"Text, {text}\nmore.")
        assert found.pop(kind) == 1
        assert not found or (kind, *found) == ("URL with credentials", "e-mail address"), text


@pytest.mark.parametrize("text", LEFT)
def test_what_only_looks_like_it_is_left(text):
    assert find_personal(f"Text, {text}\nmore.") == {}


@given(st.integers(0, 10**18 - 1), st.integers(4, 21), st.integers(1, 9))
def test_an_iban_with_one_digit_changed_is_none(account, place, change):
    """Source of the check digits: 98 less the remainder of 97, ISO 7064."""
    body = f"{account:018}"
    check = 98 - int(f"{body}131400") % 97
    iban = f"DE{check:02}{body}"
    assert find_personal(iban)["IBAN"] == 1
    digit = str((int(iban[place]) + change) % 10)
    assert "IBAN" not in find_personal(iban[:place] + digit + iban[place + 1 :])


@given(st.integers(0, 10**14 - 1), st.integers(1, 15), st.integers(1, 9))
def test_a_card_number_with_one_digit_changed_is_none(account, place, change):
    body = f"4{account:014}"
    digits = [int(c) for c in body]
    for i in range(len(digits) - 1, -1, -2):
        digits[i] = digits[i] * 2 - 9 * (digits[i] > 4)
    number = body + str(-sum(digits) % 10)
    assert find_personal(number)["card number"] == 1
    digit = str((int(number[place]) + change) % 10)
    assert "card number" not in find_personal(number[:place] + digit + number[place + 1 :])


@pytest.mark.parametrize(
    "piece", ["a", "1 ", "a.", "::", "(1)", "1.", "x@", "born ", "DE12", "+1 ", "4111 ", "a://b:"]
)
def test_no_text_takes_long(piece):
    began = time.perf_counter()
    find_personal(piece * (60_000 // len(piece)))
    assert time.perf_counter() - began < 2


def test_documents_are_counted_once_however_they_were_cut(tmp_path, public_set):
    texts = write_documents("maths", 60, 0)
    long = "\n\n".join([*texts[50:], "anna@example.org wrote", *texts[40:50], "bob@example.org"])
    texts = [*texts[:40], long, texts[0] + " carl@example.org, 4111 1111 1111 1111"]
    (tmp_path / "in").mkdir()
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "in" / "all.jsonl").write_text("\n".join(lines))
    corpus = open_corpus(tmp_path / "in", "maths", licence="CC0-1.0")
    settings = SMALL.model_copy(update={"max_document_bytes": 1500})
    prepare_set(corpus, tmp_path / "prepared", public=public_set, settings=settings)
    data = open_set(tmp_path / "prepared")
    found: dict[str, dict[str, int]] = {kind: {"matches": 0, "documents": 0} for kind in PATTERNS}
    for split in data.splits:
        for kind, x in count_personal(data, split).items():
            for name, n in x.items():
                found[kind][name] += n
    assert found["e-mail address"] == {"matches": 3, "documents": 2}
    assert found["card number"] == {"matches": 1, "documents": 1}
    assert sum(x["documents"] for x in found.values()) == 3
