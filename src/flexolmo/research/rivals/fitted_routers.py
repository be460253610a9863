"""Routers fitted after the merge: jointly on proxy data (the paper), or in closed form (DUME).

Both look at all owners' experts or statistics at once. A row then carries a trace of the others:
taking an owner out of a jointly fitted router no longer takes out all of its influence, unless it
is fitted again without it, which only the closed form makes cheap. They are here to be compared
with; what we ship needs no fitting after the merge. See docs/decisions/routers.md.

D d_model, E experts, L layers.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.data.batches import TokenSet, training_batches
from flexolmo.errors import MergeError
from flexolmo.model.hidden_statistics import HiddenSums
from flexolmo.model.loss import language_model_loss
from flexolmo.model.moe import MixtureModel
from flexolmo.model.parallel import own_rows, refuse_uneven
from flexolmo.model.router import LinearRouter
from flexolmo.research.rivals.proxy import Proxy
from flexolmo.train.loop import TrainSettings, train


def tune_router(
    model: MixtureModel,
    proxies: Sequence[Proxy],
    public: TokenSet,
    settings: TrainSettings,
    seed: int,
    run_dir: Path | None = None,
) -> None:
    """Tune all rows and biases of a linear router together, in place; all else stays frozen.

    Sequences come in turn from each owner's proxy (public text like its own, see data/proxy.py)
    and from public text. Weakens opting out: see above. Source: §3.3.3, "router training".
    """
    parameters: dict[str, nn.Parameter] = {}
    for i, mixture in enumerate(model.mixtures()):
        assert isinstance(mixture.router, LinearRouter), "joint tuning is for the linear router"
        mixture.router.requires_grad_(True)
        parameters |= {f"layers.{i}.{n}": p for n, p in mixture.router.named_parameters()}
    T = settings.seq_len
    pieces = [_windows_of(p, T, seed) for p in proxies]
    stream = training_batches(public, "train", 1, T, seed)

    def loss_of_step(step: int) -> Tensor:
        rows = []
        for place in range(step * settings.batch_size, (step + 1) * settings.batch_size):
            which, turn = place % (len(pieces) + 1), place // (len(pieces) + 1)
            rows.append(
                stream.batch(turn)[0]
                if which == len(pieces)
                else pieces[which][turn % len(pieces[which])]
            )
        logits: list[Tensor] = []
        ids = torch.from_numpy(own_rows(np.stack(rows)))
        loss = language_model_loss(model, ids, router_logits=logits)
        return (
            loss
            + settings.z_loss
            * torch.stack([z.logsumexp(-1).square().mean() for z in logits]).mean()
        )

    refuse_uneven(settings.batch_size, 1)
    model.train()
    train(
        parameters,
        loss_of_step,
        settings,
        run_dir,
        "tune the router",
        {
            "seed": seed,
            PUBLIC: public.digest,
            "train": settings.model_dump(mode="json"),
            "proxies": [[p.owner_digest, p.pieces.tolist()] for p in proxies],
        },
        {},
    )
    model.requires_grad_(False).eval()


def _windows_of(proxy: Proxy, seq_len: int, seed: int) -> np.ndarray:
    """The proxy's tokens as windows of T + 1, int64 [n,T+1], in an order drawn from `seed`."""
    tokens = np.concatenate(proxy.ids).astype(np.int64)
    count = max((len(tokens) - 1) // seq_len, 1)
    tokens = np.resize(tokens, count * seq_len + 1)
    windows = np.stack([tokens[i * seq_len : (i + 1) * seq_len + 1] for i in range(count)])
    order = np.argsort(np.random.Philox(seed).random_raw(count), kind="stable")
    return windows[order]


def solve_ridge(
    sums: Mapping[str, HiddenSums], enabled: Iterable[str] | None = None, ridge: float = 1e-2
) -> dict[str, Tensor]:
    """Linear-router rows [L,D] of public and the `enabled` owners (none: all), float32.

    An owner sends its sums and no row: rows solve ridge regression from the residual stream to
    the one-hot label of whose text it is, every text counting alike. They change with the set of
    owners, so opting out is strict if, and only if, they are solved again without those who leave.
    Solved in float64; `ridge` is a fraction of the mean squared feature.
    Source: DUME (arXiv 2603.29765).
    """
    owners = set(sums if enabled is None else enabled) - {PUBLIC}
    names = [PUBLIC, *sorted(owners)]
    if unknown := sorted(owners - set(sums)):
        raise MergeError(
            f"No sums of {', '.join(unknown)}: these were given for {', '.join(sorted(sums))}."
        )
    gram = torch.zeros_like(sums[PUBLIC].gram)  # [L,D,D]
    for name in names:
        gram = gram + sums[name].gram / sums[name].count
    cross = torch.stack([sums[n].total / sums[n].count for n in names], dim=-1)  # [L,D,E]
    damping = ridge * gram.diagonal(dim1=1, dim2=2).mean(-1)  # [L]
    damped = gram + damping[:, None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype)
    rows = torch.linalg.solve(damped, cross).float()  # [L,D,E]
    return {name: rows[..., e].contiguous() for e, name in enumerate(names)}


def set_rows(model: MixtureModel, rows: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """Put `rows` [L,D] of every expert, times `scale`, in a linear router, in place."""
    with torch.no_grad():
        for i, mixture in enumerate(model.mixtures()):
            assert isinstance(mixture.router, LinearRouter), "rows are for the linear router"
            for name in model.expert_names:
                mixture.router.row(name).weight.copy_(scale * rows[name][i][None])


def set_row_lengths(model: MixtureModel, length: float) -> None:
    """Bring every row of a linear router to one `length`, in place."""
    with torch.no_grad():
        for mixture in model.mixtures():
            assert isinstance(mixture.router, LinearRouter), "rows are of the linear router"
            for name in model.expert_names:
                row = mixture.router.row(name).weight
                row.mul_(length / row.norm())
