"""Text to token ids and back: our byte-level BPE, or any Hugging Face tokenizer file.

Every tokenizer has one token that ends a document. Text can never produce that token, not even
by spelling its name: only the code that joins documents may. Knows nothing of files of documents.
"""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from flexolmo.errors import DataError
from flexolmo.files import canonical_json, digest_bytes, read_json, write_bytes, write_json

END_OF_TEXT = "<|endoftext|>"
BYTES = 256
LONGEST_LEARNED_TOKEN_CHARACTERS = 20

# GPT-2's rule for words, except that every digit stands alone (numbers keep their places).
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Names under which published tokenizers keep the token that ends a text, most explicit first.
_KNOWN_END_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<|end_of_sentence|>",
    "<|end▁of▁sentence|>",
)


class Tokenizer:
    """A `tokenizers.Tokenizer` whose special tokens text can never spell.

    `definition` is the parsed content of a tokenizer.json; `eos` names the token that ends a
    document and serves as bos and pad too.
    """

    def __init__(self, definition: dict[str, Any], eos: str):
        self.definition = definition
        self.eos = eos
        self._inner = tokenizers.Tokenizer.from_str(json.dumps(_only_text(definition, eos)))
        self._inner.encode_special_tokens = True
        eos_id = self._inner.token_to_id(eos)
        if eos_id is None:
            raise DataError(f"The tokenizer has no token {eos!r}; name one of its own as its eos.")
        self.eos_id: int = eos_id

    @property
    def vocab_size(self) -> int:
        """Number of ids a model must have an embedding for: the largest id plus one."""
        return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def digest(self) -> str:
        """`sha256:` digest of the definition and the eos, the same wherever the file lies."""
        return digest_bytes(canonical_json({"definition": self.definition, "eos": self.eos}))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with no special token added; never contains `eos_id`."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores the library may use."""
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens stand for no text. For ours, `decode(encode(t)) == t`."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def save(self, path: Path) -> None:
        """Write a tokenizer.json that `load_tokenizer` and Hugging Face libraries open.

        Where the file alone would not say which token is the eos, a tokenizer_config.json
        beside it does.
        """
        path = Path(path)
        write_bytes(path, json.dumps(self.definition, ensure_ascii=False, indent=1).encode())
        if _recognise_eos([], set(self._inner.get_vocab())) != self.eos:
            write_json(path.with_name("tokenizer_config.json"), {"eos_token": self.eos})


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE learned from `texts`; any text survives encoding and decoding unchanged.

    Args:
        texts: public text only, since a tokenizer shows which words its text has.
        vocab_size: ids in all, at least 257 (256 bytes and one special token); fewer are made
            when the text is too short to learn that many.
    Source: ours; GPT-2's byte-level BPE, with digits apart.
    """
    if vocab_size < BYTES + 1:
        raise DataError(
            f"A byte-level vocabulary has at least {BYTES + 1} entries "
            f"(256 bytes and {END_OF_TEXT}); {vocab_size} were asked for."
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=LONGEST_LEARNED_TOKEN_CHARACTERS,
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer=trainer)
    return Tokenizer(json.loads(inner.to_str()), END_OF_TEXT)


def load_tokenizer(path: Path, eos: str | None = None) -> Tokenizer:
    """The tokenizer in a tokenizer.json, or in a Hugging Face model directory that has one.

    Args:
        path: file or directory.
        eos: token that ends a document; by default the one the file or its directory names.
    Raises:
        DataError: no such file, not a tokenizer, or no token recognisable as the end of a text.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"No tokenizer at {file}: give a tokenizer.json, or a model directory that has one."
        )
    definition = read_json(file, DataError)
    if not isinstance(definition, dict) or "model" not in definition:
        raise DataError(f"{file} is JSON but not a tokenizer: it has no `model` entry.")
    try:
        known = set(tokenizers.Tokenizer.from_str(json.dumps(definition)).get_vocab())
    except Exception as e:  # the library raises bare Exception for every malformed definition
        raise DataError(f"{file} is not a tokenizer this library can read: {e}.") from None
    if eos is not None and eos not in known:
        raise DataError(f"{file} has no token {eos!r}, which was named as its eos.")
    found = _recognise_eos([eos, _eos_beside(file)], known)
    if found is not None:
        return Tokenizer(definition, found)
    raise DataError(
        f"{file} has no token recognisable as the end of a text (looked for "
        f"{', '.join(_KNOWN_END_NAMES)}). Put a tokenizer_config.json with an `eos_token` beside "
        "it, or name the token with eos=."
    )


def _recognise_eos(named: list[str | None], known: set[str]) -> str | None:
    """The first of `named`, then of the names everybody uses, that the tokenizer has."""
    return next((name for name in [*named, *_KNOWN_END_NAMES] if name in known), None)


def _eos_beside(file: Path) -> str | None:
    """`eos_token` of the tokenizer_config.json next to `file`, if there is one."""
    config = file.with_name("tokenizer_config.json")
    if not config.is_file():
        return None
    eos = read_json(config, DataError).get("eos_token")
    return eos.get("content") if isinstance(eos, dict) else eos


def _only_text(definition: dict[str, Any], eos: str) -> dict[str, Any]:
    """`definition` with nothing that shortens, pads, or lets text spell the end of a document."""
    added = [
        {**token, "special": True} if token.get("content") == eos else token
        for token in definition.get("added_tokens") or []
    ]
    return {**definition, "added_tokens": added, "truncation": None, "padding": None}
