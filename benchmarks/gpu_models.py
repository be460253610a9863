"""Shapes and anchors that are measured on a GPU, with random weights drawn where they stay."""

import functools

import shapes
import torch
from torch import nn

from flexolmo.data.tokenizer import train_tokenizer
from flexolmo.model.checkpoint import Anchor, VerifiedAnchor, build_anchor
from flexolmo.model.parallel import place
from flexolmo.model.transformer import ModelConfig, Transformer

shapes.SIZES |= {
    "1B": shapes.Size(2048, 16, 16, 8192, 100_352),  # OLMo 2 1B
    "tiny": shapes.SIZES["pico"],
}


def make_config(size: str) -> ModelConfig:
    """The shape that is trained."""
    return ModelConfig(**vars(shapes.SIZES[size]), max_seq_len=4096, eos_token_id=shapes.EOS)


@functools.lru_cache(maxsize=1)
def make_anchor(size: str, device: str, dtype: torch.dtype = torch.float32) -> Anchor:
    """An anchor of this size whose random weights are drawn where they stay; not looked over, as
    its digest means nothing."""
    config = make_config(size)
    tokenizer = train_tokenizer(["some words to begin with"], 300)
    with torch.device("meta"):
        model = Transformer(config)
    place(model, torch.empty(0, device=device, dtype=dtype))
    draw(model)
    public = shapes.public_table(config.vocab_size)
    rows = 0.02 * torch.randn(config.num_layers, config.d_model)
    unread = VerifiedAnchor("sha256:" + "0" * 64, {})
    return build_anchor(model, tokenizer, public, rows, {}, verified=unread)


def draw(model: nn.Module) -> None:
    """Draw matrices from a normal of deviation 0.02, and set norms to 1."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02) if p.dim() == 2 else p.fill_(1)


def synchronise(is_gpu: bool) -> None:
    """Wait for a GPU."""
    if is_gpu:
        torch.cuda.synchronize()
