"""Text to token ids and back: our byte-level BPE, or any Hugging Face tokenizer file.

Every tokenizer has one token that ends a document. Text can never produce that token, not even
by spelling its name: only the code that joins documents may. Knows nothing of files of documents.
"""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from flexolmo.errors import DataError
from flexolmo.files import canonical_json, digest_bytes, read_json, write_bytes, write_json

END_OF_TEXT = "<|endoftext|>"
BYTES = 256
LONGEST_LEARNED_TOKEN_CHARACTERS = 20

# GPT-2's rule for words, except that every digit stands alone (numbers keep their places).
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD_RULE = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
# The same rule where all is ASCII. By the rule no word goes on from what is no space to a space, so
# other text may be cut there: first its lines, of which most are ASCII after all.
_ASCII_WORDS = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII
)
_LINES = re.compile(r"(?<=\S)(?=\n)")
_PIECES = re.compile(r"(?<=\S)(?=[ \t\n])")
_MOST_KNOWN = 1 << 18  # words whose ids are kept

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

    `definition` is the parsed content of a tokenizer.json, of which random dropout of merges is
    switched off; `eos` names the token that ends a document and serves as bos and pad too.
    """

    def __init__(self, definition: dict[str, Any], eos: str):
        if definition["model"].get("dropout"):
            definition = {**definition, "model": {**definition["model"], "dropout": None}}
        self.definition = definition
        self.eos = eos
        readable = _only_text(definition, eos)
        self._inner = tokenizers.Tokenizer.from_str(json.dumps(readable))
        eos_id = self._inner.token_to_id(eos)
        if eos_id is None:
            raise DataError(f"The tokenizer has no token {eos!r}; name one of its own as its eos.")
        self.eos_id: int = eos_id
        self._inner.add_special_tokens([eos])  # where it is an ordinary entry of the vocabulary
        names = {token["content"] for token in readable["added_tokens"] if token.get("special")}
        controls = names - {_unknown(definition["model"])} | {eos}
        # ids of special tokens, which no text spells
        found = map(self._inner.token_to_id, controls)
        self.controls = {control for control in found if control is not None}
        unspellable = _without_names(readable, controls)
        self._encoder = tokenizers.Tokenizer.from_str(json.dumps(unspellable))
        self._encoder.encode_special_tokens = True
        self._known: dict[str, bytes] = {}  # ids of words and pieces, uint32
        self._is_by_words = _is_by_words(readable, controls)
        self._is_faithful = self._is_by_words  # all of `_known` decode to themselves

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids a model must have an embedding for: the largest id plus one."""
        return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def digest(self) -> str:
        """`sha256:` digest of the definition and the eos, the same wherever the file lies."""
        return digest_bytes(canonical_json({"definition": self.definition, "eos": self.eos}))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with no special token added; never contains `eos_id`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores the library may use.

        Raises:
            DataError: the tokenizer gives a special token for part of a text, or one of `texts`
                is no string of whole Unicode characters.
        """
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_batch`, as arrays uint32 [n].

        Our own kind of tokenizer gives a word the same ids wherever it stands, so the library is
        asked once for each; that is three times as fast.
        """
        try:
            if not self._is_by_words:
                return [np.array(ids, dtype=np.uint32) for ids in self._encode_whole(texts)]
            words = [_split_words(text) for text in texts]
            known = self._known if len(self._known) < _MOST_KNOWN else {}
            self._known = known  # by name: another thread may put its own in the place
            new = list(set[str]().union(*words).difference(known))
            found = self._encode_whole(new)
        except (TypeError, AttributeError):  # the library's word for it does not name the text
            raise _not_text(texts) from None
        if self._is_faithful and self.decode_batch(found) != new:
            self._is_faithful = False
        for word, ids in zip(new, found, strict=True):
            known[word] = np.array(ids, dtype=np.uint32).tobytes()
        return [
            np.frombuffer(b"".join(map(known.__getitem__, some)), dtype=np.uint32) for some in words
        ]

    def _encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids by the library alone; TypeError for what is no text."""
        encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        found = [encoding.ids for encoding in encodings]
        for text, ids in zip(texts, found, strict=True):
            control = next(iter(self.controls.intersection(ids)), None)
            if control is not None:
                raise DataError(
                    f"The tokenizer gives its special token {self._inner.id_to_token(control)!r} "
                    f"for part of a text that begins {text[:40]!r}: because it stands for all that "
                    "the vocabulary lacks, or because the text has U+10FFFF around that name. "
                    "Choose another tokenizer, or take that text out."
                )
        return found

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode` of `text`, and the characters of `text`, first and end, that each id is for.

        Several ids may be for one character, if they are its bytes. Raises DataError as `encode`
        does, and for text that the library reads otherwise as a whole than word by word.
        """
        ids = self.encode(text)
        encoding = self._encoder.encode(text, add_special_tokens=False)
        if encoding.ids != ids:
            raise DataError(f"The tokenizer reads a text in two ways that begins {text[:40]!r}.")
        return ids, encoding.offsets

    def find_changed(self, texts: Sequence[str], batch: Sequence[np.ndarray]) -> dict[int, str]:
        """Texts that their ids in `batch` do not give back, by number, as they are read back."""
        if self._is_faithful:  # then so is every text, being words one after another
            return {}
        back = self.decode_batch([ids.tolist() for ids in batch])
        return {n: back[n] for n, text in enumerate(texts) if back[n] != text}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens stand for no text. For ours, `decode(encode(t)) == t`."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def decode_batch(self, batch: Sequence[list[int]]) -> list[str]:
        """`decode` of each, on all cores the library may use."""
        return self._inner.decode_batch(list(batch), skip_special_tokens=True)

    def save(self, path: Path) -> None:
        """Write a tokenizer.json that `load_tokenizer` and Hugging Face libraries open.

        Where the file alone would not say which token is the eos, a tokenizer_config.json
        beside it does.
        """
        path = Path(path)
        write_bytes(path, json.dumps(self.definition, ensure_ascii=False, indent=1).encode())
        if _recognise_eos(self._inner.get_vocab()) != self.eos:
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
    inner.pre_tokenizer = _WORD_RULE
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
    named = _eos_beside(file) if eos is None else eos
    if named is not None and named not in known:
        raise DataError(f"{file} has no token {named!r}, which was named as its eos.")
    found = _recognise_eos(known) if named is None else named
    if found is not None:
        return Tokenizer(definition, found)
    raise DataError(
        f"{file} has no token recognisable as the end of a text (looked for "
        f"{', '.join(_KNOWN_END_NAMES)}). Put a tokenizer_config.json with an `eos_token` beside "
        "it, or name the token with eos=."
    )


def _is_by_words(definition: dict[str, Any], controls: Collection[str]) -> bool:
    """True if the ids of a text are those of its words by our rule, one after another."""
    plain = tokenizers.Tokenizer(models.BPE())
    plain.pre_tokenizer = _WORD_RULE
    plain.decoder = decoders.ByteLevel()
    ours = json.loads(plain.to_str())
    parts = ("normalizer", "pre_tokenizer", "decoder")
    return (
        definition["model"].get("type") == "BPE"
        and all(definition.get(part) == ours[part] for part in parts)
        and all(token["content"] in controls for token in definition["added_tokens"])
    )


def _split_words(text: str) -> list[str]:
    """Words of `text` by our rule where it is ASCII, else pieces that no word reaches beyond."""
    if text.isascii():
        return _ASCII_WORDS.findall(text)
    words: list[str] = []
    for line in _LINES.split(text):
        words += _ASCII_WORDS.findall(line) if line.isascii() else _PIECES.split(line)
    return words


def _not_text(texts: Sequence[Any]) -> DataError:
    """The error that names the first of `texts` that cannot be encoded."""
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            return DataError(f"Text {number} is a {type(text).__name__}; a string was expected.")
        halves = re.search("[\ud800-\udfff]", text)
        if halves:
            return DataError(
                f"Text {number} has half of a character, {halves[0]!r} at place {halves.start()}; "
                'whole ones were expected. Replace it, for example by text.encode("utf-8", '
                '"replace").decode().'
            )
    return DataError("These texts cannot be encoded; strings were expected.")


def _recognise_eos(known: Collection[str]) -> str | None:
    """The first of the names everybody uses that the tokenizer has."""
    return next((name for name in _KNOWN_END_NAMES if name in known), None)


def _eos_beside(file: Path) -> str | None:
    """`eos_token` of the tokenizer_config.json next to `file`, if there is one."""
    path = file.with_name("tokenizer_config.json")
    config = read_json(path, DataError) if path.is_file() else {}
    if not isinstance(config, dict):
        raise DataError(f"{path} is a JSON {type(config).__name__}; an object was expected.")
    eos = config.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if eos is not None and not isinstance(eos, str):
        raise DataError(
            f"{path}: eos_token is {json.dumps(eos)[:80]}; the name of one token was expected. "
            "Write there the one that ends a document."
        )
    return eos


def _only_text(definition: dict[str, Any], eos: str) -> dict[str, Any]:
    """`definition` with nothing that shortens, pads, or lets text spell the end of a document."""
    added = [
        {**token, "special": True} if token.get("content") == eos else token
        for token in definition.get("added_tokens") or []
    ]
    return {**definition, "added_tokens": added, "truncation": None, "padding": None}


def _unknown(model: dict[str, Any]) -> str | None:
    """Name of the token that stands for what the vocabulary lacks."""
    number = model.get("unk_id")
    return model.get("unk_token") if number is None else model["vocab"][number][0]


def _without_names(definition: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """`definition` with the tokens `names` under names that text does not have, of the same ids.

    A text with such a name in it is then read as its letters, whatever the kind of model.
    """

    def renamed(token: str) -> str:
        return f"\U0010ffff{token}\U0010ffff" if token in names else token

    model = dict(definition["model"])
    if model.get("unk_token"):
        model["unk_token"] = renamed(model["unk_token"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed(token): number for token, number in model["vocab"].items()}
    else:
        model["vocab"] = [[renamed(token), score] for token, score in model["vocab"]]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [
            [left, right]
            for left, right in pairs
            if not {left, right, left + right.removeprefix(prefix)} & set(names)
        ]
    added = [
        {**token, "content": renamed(token["content"])} for token in definition["added_tokens"]
    ]
    return {**definition, "model": model, "added_tokens": added}
