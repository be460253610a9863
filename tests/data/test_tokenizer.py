import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Inner

from flexolmo.data import tokenizer as tokenizer_module
from flexolmo.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from flexolmo.errors import DataError

TEXTS = ["The cat sat on the mat, 12 times.\n" * 5, "def f(x):\n    return x + 1\n" * 5]
TOKENIZER = train_tokenizer(TEXTS, 320)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_encoding_and_decoding(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(st.sampled_from([END_OF_TEXT, "a", " ", "<|", "|>"]), max_size=8))
def test_text_never_becomes_the_special_token(parts):
    assert TOKENIZER.eos_id not in TOKENIZER.encode("".join(parts))


def test_batch_encoding_is_encoding_of_each():
    assert TOKENIZER.encode_batch(TEXTS) == [TOKENIZER.encode(text) for text in TEXTS]


HARD = [
    "'s",
    "it's",
    "don'ts",
    " '",
    "\n\n  x",
    " \t\n",
    "  ",
    "a",
    "Z",
    "7",
    "é",
    "患者",
    "½",
    "²",
]
HARD += [
    "\x1c",
    "\x85",
    "\xa0",
    "\u2028",
    "\u200b",
    ".",
    "...",
    "_",
    "--",
    "\U0010ffff",
    " (",
    "\r\n",
]


@given(st.lists(st.sampled_from(HARD) | st.text(st.characters(exclude_categories=["Cs"]))))
def test_ids_by_words_are_those_of_the_library(parts):
    """Also when words are known, unknown, or were forgotten; and they are read back."""
    text = "".join(parts)
    plain = Inner.from_str(json.dumps(TOKENIZER.definition))
    assert TOKENIZER.encode_batch([text, text]) == [plain.encode(text).ids] * 2
    assert TOKENIZER.find_changed([text], TOKENIZER.encode_arrays([text])) == {}


def test_no_word_reaches_over_the_places_where_text_is_cut():
    """What we take for no space is none for the library, and ASCII is the same to both."""
    every = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    space = pre_tokenizers.Split(Regex(r"\s+"), "removed", invert=True)
    theirs = {c for run, _ in space.pre_tokenize_str("".join(every)) for c in run}
    assert {" ", "\n", "\u3000"} <= theirs <= {c for c in every if c.isspace()}
    rule = pre_tokenizers.Split(Regex(tokenizer_module._WORDS), "isolated")
    ascii_pairs = [a + b for a in map(chr, range(128)) for b in map(chr, range(128))]
    for pair in ascii_pairs:
        found = [word for word, _ in rule.pre_tokenize_str(pair)]
        assert tokenizer_module._split_words(pair) == found, repr(pair)


def test_words_that_were_forgotten_are_asked_for_again(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_MOST_KNOWN", 3)
    tokenizer = train_tokenizer(TEXTS, 320)
    assert [tokenizer.encode_batch(TEXTS) for _ in range(2)] == [TOKENIZER.encode_batch(TEXTS)] * 2


def test_text_that_a_tokenizer_of_our_kind_changes_is_found():
    definition = json.loads(json.dumps(TOKENIZER.definition))
    vocabulary = definition["model"]["vocab"]
    letter = vocabulary.pop("z")
    vocabulary["none of them"] = letter
    tokenizer = tokenizer_module.Tokenizer(definition, END_OF_TEXT)
    texts = ["a cat", "a zebra"]
    assert tokenizer.find_changed(texts[:1], tokenizer.encode_arrays(texts[:1])) == {}
    batch = tokenizer.encode_arrays(texts)
    assert batch[0].dtype == np.uint32 and tokenizer.find_changed(texts, batch) == {1: "a ebra"}


def test_digits_stand_alone():
    assert len(TOKENIZER.encode("1234567890" * 3)) == 30


def test_training_twice_gives_the_same_digest_in_any_order_of_texts():
    assert train_tokenizer(TEXTS[::-1], 320).digest == TOKENIZER.digest


def test_saved_tokenizer_loads_as_itself_and_as_a_hugging_face_file(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path).digest == TOKENIZER.digest
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == TOKENIZER.eos_id
    assert Inner.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == (
        TOKENIZER.vocab_size
    )


def test_a_vocabulary_without_room_for_bytes_is_refused():
    with pytest.raises(DataError, match="at least 257"):
        train_tokenizer(TEXTS, 256)


def _foreign(tmp_path, special=()):
    inner = Inner(models.WordLevel({"a": 0, "b": 1, "[end]": 2, "?": 3}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_tokens(list(special))
    inner.enable_truncation(2)
    inner.enable_padding(length=5)
    inner.save(str(tmp_path / "tokenizer.json"))


def test_a_foreign_tokenizer_without_an_end_is_refused_with_advice(tmp_path):
    _foreign(tmp_path)
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_a_foreign_tokenizer_takes_its_end_from_its_config_and_never_truncates(tmp_path):
    _foreign(tmp_path, ["[end]"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "[end]"}}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 2
    assert tokenizer.encode("a b a b") == [0, 1, 0, 1]
    tokenizer.save(tmp_path / "other" / "tokenizer.json")
    assert load_tokenizer(tmp_path / "other").digest == tokenizer.digest


def _entries(words):
    return {word: number for number, word in enumerate(words)}


def _word_level(end):
    inner = Inner(models.WordLevel(_entries([end, "?", "a", "b", "<i>"]), unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return inner


def _unigram(end):
    letters = [(c, -3.0) for c in sorted({*"ab_<i>", *end})]
    inner = Inner(models.Unigram([("?", 0.0), (end, -1.0), ("<i>", -1.0), *letters], 0, False))
    inner.pre_tokenizer = pre_tokenizers.Metaspace("_")
    inner.decoder = decoders.Metaspace("_")
    return inner


def _bpe(end, **more):
    """Its merges make `end` letter by letter."""
    letters = sorted({*"ab <i>", *end})
    joined = [end[:length] for length in range(2, len(end) + 1)]
    merges = [(end[:length], end[length]) for length in range(1, len(end))]
    return Inner(models.BPE(_entries([*letters, *joined, "<i"]), [*merges, ("<", "i")], **more))


def _wordpiece(end):
    inner = Inner(models.WordPiece(_entries(["[UNK]", end, "a", "b", "<i>"]), unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return inner


@pytest.mark.parametrize("is_added", [False, True])
@pytest.mark.parametrize("end", ["</s>", "<eos>", "[EOS]"])
@pytest.mark.parametrize("kind", [_word_level, _unigram, _bpe, _wordpiece])
def test_no_imported_tokenizer_lets_text_become_a_special_token(tmp_path, kind, end, is_added):
    inner = kind(end)
    if is_added:
        inner.add_special_tokens([end, "<i>", "<new>"])
        inner.add_tokens(["<ordinary>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    vocabulary = inner.get_vocab()
    assert tokenizer.eos_id == vocabulary[end] and tokenizer.vocab_size == len(vocabulary)
    special = {vocabulary[name] for name in ([end, "<i>", "<new>"] if is_added else [end])}
    text = f"a {end} b{end}{end} <i> <new> a"
    ids = tokenizer.encode(text)
    assert not special & set(ids) and ids[0] == inner.encode("a").ids[0]
    assert tokenizer.encode("a b a") == inner.encode("a b a").ids
    assert is_added <= (vocabulary.get("<ordinary>") in tokenizer.encode("a <ordinary> b"))
    assert end not in tokenizer.decode([ids[0], tokenizer.eos_id, ids[0]])
    if kind is _bpe:
        assert tokenizer.decode(tokenizer.encode(f"a {end} b")).replace(" ", "") == f"a{end}b"


def test_a_tokenizer_whose_end_stands_for_unknown_words_is_refused_on_meeting_one(tmp_path):
    inner = Inner(models.WordLevel(_entries(["</s>", "a"]), unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a a") == [1, 1]
    with pytest.raises(
        DataError, match="special token '</s>' for part of a text that begins 'a b'"
    ):
        tokenizer.encode("a b")


def test_dropout_is_switched_off(tmp_path):
    inner = _bpe("</s>", dropout=0.9)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert len({tuple(tokenizer.encode("<i<i<i<i a")) for _ in range(20)}) == 1
    tokenizer.save(tmp_path / "again" / "tokenizer.json")
    assert load_tokenizer(tmp_path / "again").digest == tokenizer.digest
    assert Inner.from_file(str(tmp_path / "again" / "tokenizer.json")).model.dropout is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token": ["[end]", "b"]}, r"eos_token is \[.*the name of one token was expected"),
        ({"eos_token": {"content": 3}}, "eos_token is 3"),
        ({"eos_token": "[END]"}, r"no token '\[END\]'"),
        (["[end]"], "is a JSON list"),
    ],
)
def test_a_config_that_does_not_name_one_end_is_refused(tmp_path, config, message):
    _foreign(tmp_path, ["[end]"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, eos="[end]").eos_id == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": 3}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="No tokenizer"):
        load_tokenizer(tmp_path)
