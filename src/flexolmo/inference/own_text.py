"""Text that a mixture writes by itself, one expert at a time, to fit and measure a router on.

A coordinator holds no owner's text; what an expert writes stands in for it.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flexolmo.inference.decode import Sampling, continue_ids
from flexolmo.inference.reader import OwnReader
from flexolmo.merge.export import whole_ffn
from flexolmo.merge.mixture import LoadedMixture
from flexolmo.model.moe import MixtureModel
from flexolmo.model.transformer import Transformer


def own_windows(
    mixture: LoadedMixture, sequences: int = 16, tokens: int = 192, seed: int = 0
) -> list[tuple[np.ndarray, int]]:
    """Windows of text by each expert, public included, (ids, bytes) as `evaluation_windows` gives.

    An expert writes from its own FFN alone, whatever the router would say, and so samples its
    owner's domain. Each window holds one text of `tokens` tokens with no end. Source: ours.
    """
    eos = mixture.tokenizer.eos_id
    generator = torch.Generator().manual_seed(seed)

    def draw(logits: Tensor, _: Sequence[int]) -> list[int]:
        logits[:, eos] = -math.inf
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].tolist()

    windows = []
    for name in mixture.model.expert_names:
        reader = OwnReader(dense_expert(mixture.model, name), mixture.tokenizer)
        sampling = Sampling(max_new_tokens=tokens)
        for written in continue_ids(reader, [[]] * sequences, sampling, choose=draw):
            size = len(mixture.tokenizer.decode(written).encode())
            windows.append((np.array([eos, *written], dtype=np.int64), size))
    return windows


def dense_expert(model: MixtureModel, name: str) -> Transformer:
    """The dense decoder whose FFNs are those of one expert."""
    ffns = [whole_ffn(model, name, i) for i in range(model.config.num_layers)]
    width = len(ffns[0]["gate_proj"])
    dense = Transformer(model.config.model_copy(update={"d_ff": width}))
    dense.to(model.embed_tokens.weight.dtype)
    state = {
        k: v
        for k, v in model.state_dict().items()
        if not (".mlp." in k or ".deltas." in k or k.startswith("router."))
    }
    for i, ffn in enumerate(ffns):
        state |= {f"layers.{i}.mlp.{part}.weight": w for part, w in ffn.items()}
    dense.load_state_dict(state)
    return dense.requires_grad_(False).eval()
