import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import models, pre_tokenizers

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


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": 3}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="No tokenizer"):
        load_tokenizer(tmp_path)
