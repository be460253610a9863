"""Small sets to prepare: made text, no network."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers

from flexolmo.data.corpus import Corpus, open_corpus
from flexolmo.data.settings import PrepareSettings
from flexolmo.data.tokenizer import Tokenizer

SMALL = PrepareSettings(
    min_document_bytes=20,
    max_document_bytes=600,
    min_split_bytes=300,
    validation_share=0.1,
    heldout_share=0.1,
    vocab_size=300,
)


def made_text(seed: int, num_words: int = 60) -> str:
    """Words no other seed has, so no two texts are near duplicates."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(num_words)]
    return "\n\n".join(" ".join(words[i : i + 12]) for i in range(0, num_words, 12))


def write_raw(directory: Path, name: str, texts: list[str]) -> Corpus:
    """A corpus of `texts`, in the order given."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text, "id": f"d{i}"}) for i, text in enumerate(texts)]
    (directory / "all.jsonl").write_text("\n".join(lines))
    return open_corpus(directory / "all.jsonl", name, licence="CC0-1.0")


def word_tokenizer(*words: str) -> Tokenizer:
    """A tokenizer that knows these words alone and reads every other as `?`."""
    inner = Inner(models.WordLevel({w: i for i, w in enumerate(["</s>", "?", *words])}, "?"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    inner.decoder = decoders.Fuse()
    return Tokenizer(json.loads(inner.to_str()), "</s>")
