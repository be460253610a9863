import random
from collections import Counter
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest

from flexolmo.data import prepare
from flexolmo.data.batches import open_set
from flexolmo.data.documents import read_documents
from flexolmo.data.prepare import SPLITS, card_digest, prepare_set
from flexolmo.data.tokenizer import load_tokenizer, train_tokenizer
from flexolmo.errors import DataError
from flexolmo.files import digest_file
from made_sets import SMALL, made_text, write_raw

BY_SHARE_ALONE = replace(SMALL, min_split_bytes=0)


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
    assert cards[0]["removed"]["exact_duplicate"] == 8


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


def test_text_of_the_public_set_and_of_other_sets_is_removed(tmp_path, public_set):
    own = [made_text(i) for i in range(200, 230)]
    raw = write_raw(tmp_path / "a", "a", [*own, made_text(3), made_text(4) + " more"])
    card = prepare_set(raw, tmp_path / "pa", public=public_set, settings=SMALL)
    assert card["removed"]["in_public_set"] == 2
    raw = write_raw(tmp_path / "b", "b", [*own[:5], *(made_text(i) for i in range(300, 330))])
    card = prepare_set(
        raw, tmp_path / "pb", public=public_set, disjoint_from=[tmp_path / "pa"], settings=SMALL
    )
    assert card["removed"]["in_other_sets"] == 5


def test_short_documents_and_duplicates_are_counted(tmp_path, public_set):
    base = made_text(1, 300)
    texts = [made_text(i) for i in range(400, 430)] + ["short", base, base, base + " and more"]
    raw = write_raw(tmp_path, "owner", texts)
    card = prepare_set(
        raw,
        tmp_path / "p",
        tokenizer=load_tokenizer(public_set),
        settings=replace(SMALL, max_document_bytes=50_000),
    )
    removed = card["removed"]
    assert (removed["too_short"], removed["exact_duplicate"], removed["near_duplicate"]) == (
        1,
        1,
        1,
    )


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
    settings = replace(SMALL, min_split_bytes=200, heldout_share=0.0, validation_share=0.0)
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


def test_too_little_text_is_refused(tmp_path, public_set):
    raw = write_raw(tmp_path, "owner", [made_text(1), made_text(2)])
    with pytest.raises(DataError, match="too few"):
        prepare_set(raw, tmp_path / "p", public=public_set, settings=SMALL)
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

    monkeypatch.setattr(prepare, "save_fingerprints", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_set(raw, tmp_path / "out" / "p", public=public_set, settings=SMALL)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path, public_set, monkeypatch):
    tokenizer = train_tokenizer([made_text(1)], 257)
    monkeypatch.setattr(type(tokenizer), "vocab_size", property(lambda _: 2**16 + 1))
    raw = write_raw(tmp_path, "owner", [made_text(i) for i in range(30)])
    prepare_set(raw, tmp_path / "p", tokenizer=tokenizer, settings=SMALL)
    assert open_set(tmp_path / "p").splits["train"].tokens.dtype == np.uint32
