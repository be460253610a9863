"""Routers fitted after the merge: jointly on proxy data (the paper), or in closed form (DUME).

Both look at all owners' experts or statistics at once. A row then carries a trace of the others:
taking an owner out of a jointly fitted router no longer takes out all of its influence. They are
here to be compared with; what we ship needs no fitting after the merge.

N tokens, D d_model, E experts, L layers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flexolmo.data.batches import TokenSet, training_batches
from flexolmo.data.proxy import Proxy
from flexolmo.model.moe import MixtureModel
from flexolmo.model.transformer import language_model_loss
from flexolmo.train.loop import TrainSettings, train


def tune_router(model: MixtureModel, proxies: Sequence[Proxy], public: TokenSet,
                settings: TrainSettings, seed: int, run_dir: Path | None = None) -> None:
    """Tune all rows and biases of a linear router together, in place; all else stays frozen.

    Sequences come in turn from each owner's proxy (public text like its own, see data/proxy.py)
    and from public text. Weakens opting out: see above. Source: §3.3.3, "router training".
    """
    parameters: dict[str, nn.Parameter] = {}
    for i, mixture in enumerate(model.mixtures()):
        assert mixture.router is not None, "joint tuning is for the linear router"
        mixture.router.requires_grad_(True)
        parameters |= {f"layers.{i}.{n}": p for n, p in mixture.router.named_parameters()}
    T = settings.seq_len
    pieces = [_windows_of(p, T, seed) for p in proxies]
    stream = training_batches(public, "train", 1, T, seed)

    def loss_of_step(step: int) -> Tensor:
        rows = []
        for place in range(step * settings.batch_size, (step + 1) * settings.batch_size):
            which, turn = place % (len(pieces) + 1), place // (len(pieces) + 1)
            rows.append(stream.batch(turn)[0] if which == len(pieces)
                        else pieces[which][turn % len(pieces[which])])
        logits: list[Tensor] = []
        loss = language_model_loss(model, torch.from_numpy(np.stack(rows)), router_logits=logits)
        return loss + settings.z_loss * torch.stack(
            [z.logsumexp(-1).square().mean() for z in logits]).mean()

    model.train()
    train(parameters, loss_of_step, settings, run_dir, "tune the router",
          {"seed": seed, "public": public.digest, "train": settings.model_dump(mode="json"),
           "proxies": [[p.owner_digest, p.pieces.tolist()] for p in proxies]}, {})
    model.requires_grad_(False).eval()


def _windows_of(proxy: Proxy, seq_len: int, seed: int) -> np.ndarray:
    """The proxy's tokens as windows of T + 1, int64 [n,T+1], in an order drawn from `seed`."""
    tokens = np.concatenate(proxy.ids).astype(np.int64)
    count = max((len(tokens) - 1) // seq_len, 1)
    tokens = np.resize(tokens, count * seq_len + 1)
    windows = np.stack([tokens[i * seq_len:(i + 1) * seq_len + 1] for i in range(count)])
    order = np.argsort(np.random.Philox(seed).random_raw(count), kind="stable")
    return windows[order]


def ridge_rows(model: MixtureModel, text: Mapping[str, Sequence[np.ndarray]],
               ridge: float = 1e-2) -> list[Tensor]:
    """Router rows [E,D] a layer, float32, from each owner's sums alone, without training.

    `text` holds windows (ids, int64 [T]) of each expert's own domain, public among them. An owner
    sends two sums a layer, of h h^T and of h: rows solve ridge regression from the residual stream
    to the owner's one-hot label. The solution changes with the set of owners, so it is solved
    again when one leaves. Solved in float64; `ridge` is a fraction of the mean squared feature.
    Source: DUME (arXiv 2603.29765).
    """
    D = model.config.d_model
    names = model.expert_names
    gram = [torch.zeros(D, D, dtype=torch.float64) for _ in model.layers]
    cross = [torch.zeros(D, len(names), dtype=torch.float64) for _ in model.layers]
    seen: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
             for m in model.mixtures()]
    try:
        with torch.inference_mode():
            for e, name in enumerate(names):
                for ids in text[name]:
                    seen.clear()
                    model.hidden(torch.from_numpy(ids)[None])
                    for i, h in enumerate(seen):
                        x = h.flatten(0, 1).double()  # [N,D]
                        gram[i] += x.T @ x / len(text[name])
                        cross[i][:, e] += x.sum(0) / len(text[name])
    finally:
        for hook in hooks:
            hook.remove()
    rows = []
    for g, c in zip(gram, cross, strict=True):
        damped = g + ridge * g.diagonal().mean() * torch.eye(D, dtype=torch.float64)
        rows.append(torch.linalg.solve(damped, c).T.float().contiguous())
    return rows
