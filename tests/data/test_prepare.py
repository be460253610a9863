import hmac
import json
import random
import re
import shutil
from collections import Counter
from hashlib import sha256

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from flexolmo.data import pieces, prepare, rows
from flexolmo.data.batches import open_set
from flexolmo.data.corpus import open_corpus
from flexolmo.data.documents import read_documents
from flexolmo.data.formats import ReadSettings
from flexolmo.data.prepare import prepare_set
from flexolmo.data.prepared import SPLITS, card_digest, read_salt
from flexolmo.data.settings import PrepareSettings
from flexolmo.data.tokenizer import load_tokenizer, train_tokenizer
from flexolmo.errors import DataError
from flexolmo.files import digest_file, write_json
from made_sets import SMALL, made_text, word_tokenizer, write_raw

BY_SHARE_ALONE = SMALL.model_copy(update={"min_split_bytes": 0})


def _files(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def _split_of(prepared):
    return {
        document.id: split
        for split in SPLITS
        for document in read_documents(prepared / f"{split}.jsonl.zst")
    }


def test_shards_text_and_card_agree(public_set):
    tokenizer = load_tokenizer(public_set)
    opened = open_set(public_set, tokenizer.digest)
    for split, shard in opened.splits.items():
        texts = [d.text for d in read_documents(public_set / f"{split}.jsonl.zst")]
        assert [tokenizer.decode(shard.document(i)) for i in range(len(texts))] == texts
        assert shard.bytes.tolist() == [len(text.encode()) for text in texts]
        ends = shard.tokens[shard.offsets[1:] - 1]
        assert (ends == tokenizer.eos_id).all() and shard.tokens.dtype == np.uint16
        assert (np.asarray(shard.tokens) == tokenizer.eos_id).sum() == len(texts)
        assert opened.card["splits"][split]["bytes"] >= 300
    for name, entry in opened.card["files"].items():
        assert digest_file(public_set / name) == entry["digest"]
    assert opened.card["licences"] == ["CC0-1.0"]


def test_the_order_of_documents_does_not_matter(tmp_path, public_set):
    texts = [made_text(i) for i in range(40)] + [made_text(i).upper() for i in range(8)]
    texts += texts[:3]
    cards = []
    for order in (0, 1):
        random.Random(order).shuffle(texts)
        raw = write_raw(tmp_path / str(order), "owner", texts)
        cards.append(
            prepare_set(
                raw, tmp_path / f"p{order}", tokenizer=load_tokenizer(public_set), settings=SMALL
            )
        )
    for name in cards[0]["files"]:
        if not name.endswith(".zst"):  # the text files hold ids, which say the order
            assert (tmp_path / "p0" / name).read_bytes() == (tmp_path / "p1" / name).read_bytes()
    assert cards[0]["removed"]["documents"] == {"exact duplicate": 3}
    assert cards[0]["splits"]["train"]["source_documents"] > 30


def test_the_number_of_processes_changes_no_byte(tmp_path, public_set, monkeypatch):
    """Nor does how the documents are dealt out to them, or how few are in memory together."""
    texts = [made_text(i % 37 + 50) + " more" * (i % 3) for i in range(150)] + ["", "é\x00" * 30]
    raw = write_raw(tmp_path, "owner", texts)
    settings = SMALL.model_copy(update={"near_duplicate": 0.7})
    cards = []
    for workers, size in ((1, 1 << 20), (1, 700), (2, 700)):
        monkeypatch.setattr(pieces, "_BYTES_AT_ONCE", size)
        monkeypatch.setattr(rows, "BYTES_AT_ONCE", size)
        out = tmp_path / f"p{len(cards)}"
        said: list[str] = []
        cards.append(
            prepare_set(raw, out, None, public_set, (), settings, say=said.append, workers=workers)
        )
        found, first = _files(out), _files(tmp_path / "p0")
        assert found.pop("salt") != first.pop("salt") or workers == 1
        assert found == first and cards[-1] == cards[0] and said
    reasons = {"empty", "too short", "in public set", "exact duplicate", "near duplicate"}
    assert reasons >= {*cards[0]["removed"]["documents"]} >= reasons - {"too short"}


def test_an_error_in_another_process_is_the_same_error(tmp_path, public_set):
    raw = write_raw(tmp_path, "owner", [made_text(i) for i in range(30)])
    with open(tmp_path / "all.jsonl", "ab") as f:
        f.write(b"more")
    with pytest.raises(DataError, match="has changed"):
        prepare_set(raw, tmp_path / "p", public=public_set, settings=SMALL, workers=2)
    assert not (tmp_path / "p").exists()


def test_preparing_again_does_nothing_and_a_damaged_file_is_made_anew(tmp_path, public_set):
    raw = write_raw(tmp_path, "owner", [made_text(i) for i in range(100, 130)])
    out = tmp_path / "p"
    card = prepare_set(raw, out, public=public_set, settings=SMALL)
    before, node = _files(out), (out / "card.json").stat().st_ino
    assert card_digest(prepare_set(raw, out, public=public_set, settings=SMALL)) == (
        card_digest(card)
    )
    assert (out / "card.json").stat().st_ino == node
    (out / "train_tokens.npy").write_bytes(b"damaged")
    prepare_set(raw, out, public=public_set, settings=SMALL)
    assert _files(out) == before


def test_a_commitment_names_card_and_salt_and_tells_neither(tmp_path, public_set):
    texts = [made_text(i) for i in range(100, 130)]
    raw = write_raw(tmp_path, "owner", texts)
    for name in ("a", "b"):
        prepare_set(raw, tmp_path / name, public=public_set, settings=SMALL)
    a, b = (open_set(tmp_path / name) for name in ("a", "b"))
    assert a.digest == b.digest and a.commitment != b.commitment
    salt = (tmp_path / "a" / "salt").read_bytes()
    expected = hmac.new(salt, a.digest.encode(), sha256).hexdigest()
    assert a.commitment == f"sha256:{expected}" and len(salt) == 32
    assert (tmp_path / "a" / "salt").stat().st_mode & 0o077 == 0
    (tmp_path / "a" / "salt").write_bytes(b"short")
    with pytest.raises(DataError, match="holds 5 bytes; expected 32"):
        _ = open_set(tmp_path / "a").commitment
    prepare_set(raw, tmp_path / "a", public=public_set, settings=SMALL)  # as the error says
    mended = read_salt(tmp_path / "a")
    (tmp_path / "a" / "salt").unlink()
    with pytest.raises(DataError, match="salt is missing"):
        read_salt(tmp_path / "a")
    prepare_set(raw, tmp_path / "a", public=public_set, settings=SMALL)
    assert len({salt, mended, read_salt(tmp_path / "a")}) == 3


def test_another_set_in_its_place_has_another_salt(tmp_path, public_set):
    """Or who knows the salt of the first could try guesses at the second."""
    for number in (100, 200):
        raw = write_raw(tmp_path / str(number), "owner", [made_text(i + number) for i in range(30)])
        prepare_set(raw, tmp_path / "a", public=public_set, settings=SMALL, may_replace=True)
        (tmp_path / f"salt{number}").write_bytes(read_salt(tmp_path / "a"))
    assert (tmp_path / "salt100").read_bytes() != (tmp_path / "salt200").read_bytes()


def test_text_of_the_public_set_and_of_other_sets_is_removed(tmp_path, public_set):
    own = [made_text(i) for i in range(200, 230)]
    raw = write_raw(tmp_path / "a", "a", [*own, made_text(3), made_text(4) + " more"])
    card = prepare_set(raw, tmp_path / "pa", public=public_set, settings=SMALL)
    assert card["removed"]["documents"] == {"in public set": 2}
    raw = write_raw(tmp_path / "b", "b", [*own[:5], *(made_text(i) for i in range(300, 330))])
    card = prepare_set(
        raw, tmp_path / "pb", public=public_set, disjoint_from=[tmp_path / "pa"], settings=SMALL
    )
    assert card["removed"]["documents"] == {"in other sets": 5}


def test_what_is_removed_is_counted_by_reason_and_said_with_an_example(tmp_path, public_set):
    base = made_text(1, 300)
    texts = [made_text(i) for i in range(400, 430)]
    texts += ["short", " \n", base, base, base + " and more", base.upper()]
    raw = write_raw(tmp_path, "owner", texts)
    settings = SMALL.model_copy(update={"max_document_bytes": 50_000, "near_duplicate": 0.7})
    said: list[str] = []
    card = prepare_set(
        raw, tmp_path / "p", load_tokenizer(public_set), settings=settings, say=said.append
    )
    removed = card["removed"]
    size = len(base.encode())
    assert removed["documents"] == {
        "too short": 1,
        "empty": 1,
        "exact duplicate": 1,
        "near duplicate": 2,
    }
    assert removed["bytes"]["exact duplicate"] == size and removed["bytes"]["too short"] == 5
    assert {*removed["examples"]["exact duplicate"]} == {"d32", "d33"}
    assert len(said) == 2 and re.fullmatch(
        r"owner: 1 documents removed, exact duplicate. For example (d32|d33) \('.{60}'\) "
        r"was taken for (d32|d33) \('.{60}'\)\.",
        said[0].replace("\\n", " ")[:400],
    ), said
    assert base not in json.dumps(card)


def test_losing_more_than_a_fifth_is_said_aloud(tmp_path, public_set):
    texts = [made_text(i) for i in range(400, 430)] + ["short"] * 8
    for count in (37, 38):
        said: list[str] = []
        prepare_set(
            write_raw(tmp_path / str(count), "owner", texts[:count]),
            tmp_path / f"p{count}",
            load_tokenizer(public_set),
            settings=SMALL,
            say=said.append,
        )
        aloud = ["owner: 8 of 38 documents are not in the set: 8 too short."]
        assert said == (aloud if count == 38 else [])


FORM = "Name: {} {}\nAddress: {} Station Road\nI agree to the terms of this form. Signed: {}."
SETS_OF_ALIKE = {
    "notes of one line": [f"Pt {i}: BP 1{i % 10}0/80, no complaints." for i in range(60)],
    "Chinese": [f"患者{i}号复查，血压正常，无不适。" for i in range(60)],
    "forms": [FORM.format("Ann", "abcdefgh"[i % 8] * 3, i, i) for i in range(60)],
    "ledger": [f"Balance {sign}{i},00 EUR" for i in range(30) for sign in ("", "-")],
    "formulas": [f"x{i} {sign} y" for i in range(30) for sign in "+-"],
}


@pytest.mark.parametrize("kind", SETS_OF_ALIKE)
def test_short_and_templated_sets_are_kept_whole_by_default(tmp_path, public_set, kind):
    texts = SETS_OF_ALIKE[kind]
    card = prepare_set(
        write_raw(tmp_path, "owner", texts),
        tmp_path / "p",
        public=public_set,
        settings=PrepareSettings(),
        say=pytest.fail,
    )
    assert sum(split["documents"] for split in card["splits"].values()) == 60
    assert sum(split["source_documents"] for split in card["splits"].values()) == 60
    found = [d.text for s in SPLITS for d in read_documents(tmp_path / "p" / f"{s}.jsonl.zst")]
    assert sorted(found) == sorted(texts)


def test_what_cleaning_replaces_is_counted_and_normalising_is_asked_for(tmp_path, public_set):
    texts = [made_text(i) + " \0 it\x92s e\u0301  \nend" for i in range(30)]
    raw = write_raw(tmp_path, "owner", texts)
    for normalise, end in ((False, "it\x92s e\u0301  \nend"), (True, "it\x92s é\nend")):
        settings = SMALL.model_copy(update={"normalise": normalise})
        out = tmp_path / str(normalise)
        card = prepare_set(raw, out, load_tokenizer(public_set), settings=settings)
        assert card["removed"]["characters_replaced_by_a_space"] == 30
        found = list(read_documents(out / "train.jsonl.zst"))
        assert all(d.text.endswith(f"   {end}") for d in found)


def test_a_tokenizer_that_cannot_carry_the_text_is_refused_or_said_aloud(tmp_path):
    texts = [f"{'a ' * (i + 10)}b" for i in range(40)]
    said: list[str] = []
    raw = write_raw(tmp_path, "owner", [*texts, "a a a a a a a a a a a a c b a"])
    card = prepare_set(
        raw, tmp_path / "p", word_tokenizer("a", "b", " "), settings=SMALL, say=said.append
    )
    assert card["tokenizer"]["changed_documents"] == 1
    assert said == [
        "owner: the tokenizer does not carry the text of 1 of 41 documents. For example d40 has "
        "'a a a a a a a a a a c b a' and is read back as 'a a a a a a a a a a ? b a'."
    ]
    with pytest.raises(DataError, match=r"text of 41 of 41 documents.*byte-level"):
        prepare_set(raw, tmp_path / "q", word_tokenizer("a", " "), settings=SMALL)
    assert not (tmp_path / "q").exists()


def test_documents_know_their_source_document(tmp_path, public_set):
    texts = [made_text(i, 60 + 300 * (i % 2)) for i in range(30)]
    raw = write_raw(tmp_path, "owner", [*texts, *(t.upper() for t in texts[:5])])
    prepare_set(raw, tmp_path / "p", tokenizer=load_tokenizer(public_set), settings=SMALL)
    for split, opened in open_set(tmp_path / "p").splits.items():
        found = [d.id for d in read_documents(tmp_path / "p" / f"{split}.jsonl.zst")]
        names = {f"d{30 + i}": f"d{i}" for i in range(5)}  # texts of the same words are one
        bare = [names.get(i.split("#")[0], i.split("#")[0]) for i in found]
        numbers = opened.sources.tolist()
        assert len(set(zip(bare, numbers, strict=True))) == len(set(bare)) == len(set(numbers))
        assert numbers == sorted(numbers)
        starts = opened.source_offsets
        assert starts[0] == 0 and starts[-1] == len(opened.tokens)
        assert len(starts) == len(set(bare)) + 1 and {*starts} <= {*opened.offsets}


def test_texts_of_a_unit_share_a_split_and_count_as_one_document(tmp_path, public_set):
    rows = [{"text": made_text(i), "id": f"d{i}", "patient": i % 17} for i in range(80)]
    (tmp_path / "in").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:40]), tmp_path / "in/a.parquet")
    (tmp_path / "in/b.jsonl").write_text("\n".join(map(json.dumps, rows[40:])))
    corpus = open_corpus(tmp_path / "in", "owner", settings=ReadSettings(unit_field="patient"))
    card = prepare_set(corpus, tmp_path / "p", load_tokenizer(public_set), settings=SMALL)
    opened = open_set(tmp_path / "p").splits
    where: dict[int, set[str]] = {}
    for identity, split in _split_of(tmp_path / "p").items():
        where.setdefault(int(identity.split("#")[0][1:]) % 17, set()).add(split)
    assert len(where) == 17 and all(len(found) == 1 for found in where.values())
    for split in SPLITS:
        held = sum(found == {split} for found in where.values())
        assert held == len(opened[split].source_offsets) - 1
    assert card["removed"]["documents"] == {}


def test_texts_of_the_same_words_in_two_units_are_in_no_two_splits(tmp_path, public_set):
    rows = [{"text": made_text(i), "id": f"d{i}", "patient": i} for i in range(40)]
    rows += [{"text": r["text"].upper(), "id": f"{r['id']}#", "patient": 99} for r in rows[:9]]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = open_corpus(
        tmp_path / "in.jsonl", "owner", settings=ReadSettings(unit_field="patient")
    )
    card = prepare_set(corpus, tmp_path / "p", load_tokenizer(public_set), settings=SMALL)
    assert card["removed"]["documents"] == {"same words in another unit": 9}
    assert sum(s["documents"] for s in card["splits"].values()) == 40


def test_units_are_strings_or_whole_numbers(tmp_path):
    values = [7, "7", " 7 ", 7.0, "P7"]
    lines = [json.dumps({"text": "x", "patient": v}) for v in values]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = read_documents(tmp_path, settings=ReadSettings(unit_field="patient"))
    assert [d.unit for d in found] == ["7", "7", "7", "7", "P7"]


def test_too_few_units_are_called_so(tmp_path, public_set):
    rows = [{"text": made_text(i), "patient": i % 2} for i in range(40)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = open_corpus(
        tmp_path / "in.jsonl", "owner", settings=ReadSettings(unit_field="patient")
    )
    with pytest.raises(DataError, match=r"found 2 units \(--unit-field\)"):
        prepare_set(corpus, tmp_path / "p", load_tokenizer(public_set), settings=SMALL)


def test_a_fetched_set_has_no_units(public_set):
    with pytest.raises(DataError, match="omit --unit-field"):
        open_corpus(public_set, settings=ReadSettings(unit_field="patient"))


@pytest.mark.parametrize(
    "value", [None, " ", True, 7.5, [1], {"a": 1}, "p\ud800", "missing", "plain"]
)
def test_a_text_that_is_of_no_unit_is_refused_by_its_place(tmp_path, value):
    record = {"text": "x"} | ({} if value == "missing" else {"patient": value})
    name, text = ("a.txt", "x") if value == "plain" else ("a.jsonl", json.dumps(record))
    (tmp_path / name).write_text(text)
    found = "not there, its fields are: .*text" if value in ("missing", "plain") else ""
    with pytest.raises(DataError, match=rf"{name}.*field 'patient' is {found}"):
        list(read_documents(tmp_path, settings=ReadSettings(unit_field="patient")))


def test_a_set_of_an_older_format_is_refused_and_made_anew(tmp_path, public_set):
    raw = write_raw(tmp_path, "owner", [made_text(i) for i in range(100, 130)])
    card = prepare_set(raw, tmp_path / "p", public=public_set, settings=SMALL)
    write_json(tmp_path / "p" / "card.json", card | {"format": "flexolmo-prepared-set-1"})
    with pytest.raises(DataError, match="older format are prepared again"):
        open_set(tmp_path / "p")
    again = prepare_set(raw, tmp_path / "p", None, public_set, (), SMALL, may_replace=True)
    assert again == card


def test_pieces_of_one_document_share_a_split_and_none_is_too_long(tmp_path, public_set):
    raw = write_raw(tmp_path, "owner", [made_text(i, 700) for i in range(30)])
    prepare_set(raw, tmp_path / "p", tokenizer=load_tokenizer(public_set), settings=SMALL)
    splits: dict[str, set[str]] = {}
    for identity, split in _split_of(tmp_path / "p").items():
        splits.setdefault(identity.split("#")[0], set()).add(split)
    assert len(splits) == 30 and all(len(found) == 1 for found in splits.values())
    assert open_set(tmp_path / "p").splits["train"].bytes.max() <= SMALL.max_document_bytes


def test_split_is_by_hash_and_does_not_change_when_documents_are_added(tmp_path, public_set):
    texts = [made_text(i, 24) for i in range(600, 840)]
    found = []
    for count in (160, 240):
        raw = write_raw(tmp_path / str(count), "owner", texts[:count])
        prepare_set(
            raw,
            tmp_path / f"p{count}",
            tokenizer=load_tokenizer(public_set),
            settings=BY_SHARE_ALONE,
        )
        found.append(_split_of(tmp_path / f"p{count}"))
    assert all(found[1][identity] == split for identity, split in found[0].items())
    for i, text in enumerate(texts):
        place = int.from_bytes(sha256(" ".join(text.split()).encode()).digest()[:8]) / 2**64
        expected = "heldout" if place < 0.1 else "validation" if place > 0.9 else "train"
        assert found[1][f"d{i}"] == expected
    assert set(Counter(found[1].values())) == set(SPLITS)


def test_a_minimum_of_heldout_text_never_takes_from_train_when_documents_are_added(
    tmp_path, public_set
):
    texts = [made_text(i, 24) for i in range(900, 960)]
    settings = SMALL.model_copy(
        update={"min_split_bytes": 200, "heldout_share": 0.0, "validation_share": 0.0}
    )
    found = []
    for count in (30, 60):
        raw = write_raw(tmp_path / str(count), "owner", texts[:count])
        prepare_set(
            raw, tmp_path / f"p{count}", tokenizer=load_tokenizer(public_set), settings=settings
        )
        found.append(_split_of(tmp_path / f"p{count}"))
    assert {found[0][i] for i in found[0] if found[1][i] != found[0][i]} <= {
        "heldout",
        "validation",
    }


NOVEL = "\n\n".join(made_text(i) for i in range(1000, 1200))
SHORT = [made_text(i, 6) for i in range(1200, 1202)]


@pytest.mark.parametrize(
    ("texts", "found", "needed"),
    [
        ([], "found 0 documents of 0 bytes", "at least 3 documents are needed"),
        ([NOVEL], "found 1 documents of 66,", "at least 3 documents are needed"),
        ([NOVEL, NOVEL.upper()], "found 1 documents", "at least 3 documents are needed"),
        ([NOVEL, *SHORT], "found 3 documents", "none are left to train on"),
    ],
)
def test_too_few_documents_are_refused_with_what_was_found(
    tmp_path, public_set, texts, found, needed
):
    """However long they are: a document is never in two splits."""
    raw = write_raw(tmp_path, "owner", texts)
    with pytest.raises(DataError) as refused:
        prepare_set(raw, tmp_path / "p", public=public_set, settings=SMALL)
    for part in (found, needed, "chapters, into a file or a record each"):
        assert part in str(refused.value)
    assert not (tmp_path / "p").exists()


def test_a_directory_without_a_card_needs_a_name(tmp_path):
    with pytest.raises(DataError, match="--name hospital"):
        prepare_set(tmp_path, tmp_path / "p")


def test_a_changed_raw_file_is_refused(tmp_path, public_set):
    raw = write_raw(tmp_path, "owner", [made_text(i) for i in range(30)])
    with open(tmp_path / "all.jsonl", "ab") as f:
        f.write(b"more")
    with pytest.raises(DataError, match="has changed"):
        prepare_set(raw, tmp_path / "p", public=public_set, settings=SMALL)


def test_a_run_that_is_killed_leaves_nothing(tmp_path, public_set, monkeypatch):
    raw = write_raw(tmp_path, "owner", [made_text(i) for i in range(100, 130)])

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "write_splits", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_set(raw, tmp_path / "out" / "p", public=public_set, settings=SMALL)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path, public_set, monkeypatch):
    tokenizer = train_tokenizer([made_text(1)], 257)
    monkeypatch.setattr(type(tokenizer), "vocab_size", property(lambda _: 2**16 + 1))
    raw = write_raw(tmp_path, "owner", [made_text(i) for i in range(30)])
    prepare_set(raw, tmp_path / "p", tokenizer=tokenizer, settings=SMALL)
    assert open_set(tmp_path / "p").splits["train"].tokens.dtype == np.uint32


def test_an_owners_set_is_private_on_the_disk(tmp_path, public_set):
    raw = write_raw(tmp_path, "owner", [made_text(i) for i in range(100, 130)])
    prepare_set(raw, tmp_path / "p", public=public_set, settings=SMALL)
    assert (tmp_path / "p").stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "p").iterdir()} == {0o600}
    assert (public_set / "card.json").stat().st_mode & 0o077


def test_changed_fingerprints_of_the_public_set_are_refused(tmp_path, public_set):
    changed = shutil.copytree(public_set, tmp_path / "public")
    marks = np.load(changed / "fingerprints_exact.npy")
    np.save(changed / "fingerprints_exact.npy", marks[:0])
    raw = write_raw(tmp_path, "owner", [made_text(i) for i in range(100, 130)])
    with pytest.raises(DataError, match=r"fingerprints_exact\.npy is not the file"):
        prepare_set(raw, tmp_path / "p", public=changed, settings=SMALL)
