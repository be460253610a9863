"""Bits per byte on held-out documents: of the anchor, each pair, the mixture, and without each.

Bits per byte do not depend on the tokenizer: nats of all predicted tokens / ln 2 / UTF-8 bytes of
the text. A document is read in windows of at most `seq_len` tokens; every token is predicted
exactly once, from the tokens before it in its window. Source: paper §7 conventions, ours.

B batch, T positions, E experts, L layers.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flexolmo.bundle.manifest import PUBLIC
from flexolmo.data.batches import TokenSet, evaluation_windows
from flexolmo.inference.policy import choose_experts
from flexolmo.merge.mixture import LoadedMixture
from flexolmo.model.panels import Panels
from flexolmo.model.probabilities import AnyMixture, Mix, ProbabilityMixture, arrange
from flexolmo.model.transformer import Transformer
from flexolmo.progress import Meter, progress

BATCH_TOKENS = 4096
COPIED_BYTES = 2**30  # of weights that may be held up to twice more to read faster


@dataclass(frozen=True)
class Likelihood:
    """Likelihood of a text, and the routing while it was read."""

    bits: float
    bytes: int
    tokens: int
    routing: list[list[float]] | None  # [L][E] mean weight over tokens, of a mixture
    active: list[list[float]] | None  # [L][E] fraction of tokens on which it ran
    log_probs: list[np.ndarray]  # of each window's predicted tokens in nats, float32 [T]
    weights: list[np.ndarray]  # of each window, mean over layers and summed over tokens, [E]

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.bytes


def measure_likelihood(
    model: Transformer,
    token_set: TokenSet,
    split: str,
    *,
    enabled: Iterable[str] | None = None,
    seq_len: int = 256,
    max_bytes: int | None = None,
    meter: Meter | None = None,
) -> Likelihood:
    """Read `split` of a prepared set; `enabled` names a mixture's active experts (None: all)."""
    windows = list(evaluation_windows(token_set, split, seq_len, max_bytes))
    return read_windows(model, windows, enabled=enabled, meter=meter)


def read_windows(
    model: Transformer | ProbabilityMixture,
    windows: Sequence[tuple[np.ndarray, int]],
    *,
    enabled: Iterable[str] | None = None,
    panels: Panels | None = None,
    meter: Meter | None = None,
) -> Likelihood:
    """Read (ids, bytes) windows, as `evaluation_windows` gives them, batched by length; faster with
    the model's `panels`, see `Transformer.cut_panels`."""
    order = sorted(range(len(windows)), key=lambda i: len(windows[i][0]))
    ordered = [windows[i] for i in order]
    log_probs = [np.zeros(0, dtype=np.float32)] * len(windows)
    weights = [np.zeros(0)] * len(windows)
    nats, tokens = 0.0, 0
    routed: Tensor | None = None  # [2,L,E] weights, and whether any, summed over tokens
    start = 0
    with torch.inference_mode():
        while start < len(ordered):
            longest = len(
                ordered[min(start + BATCH_TOKENS // len(ordered[start][0]), len(ordered) - 1)][0]
            )
            batch = [ids for ids, _ in ordered[start : start + max(1, BATCH_TOKENS // longest)]]
            places = order[start : start + len(batch)]
            start += len(batch)
            ids, real = (x.to(model.device) for x in _pad(batch))
            active = None
            if isinstance(model, AnyMixture) and enabled is not None:
                active = model.expert_mask([list(enabled)] * len(batch))
            routing: list[Tensor] = []
            options = {"panels": panels} if panels else {}  # of which stock knows nothing
            logits = model(ids[:, :-1], active=active, routing=routing, **options)  # [B,T,V]
            loss = F.cross_entropy(
                logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
            ).view(real.shape)
            nats += float(loss[real].double().sum())
            for place, row, own in zip(places, loss, batch, strict=True):
                log_probs[place] = -row[: len(own) - 1].cpu().numpy()
            tokens += int(real.sum())
            if routing:
                said = torch.stack(routing).double()  # [L,B,T,E]
                said = said.masked_fill(~real[:, :, None], 0.0)
                summed = said.sum(2)  # [L,B,E]
                for place, row in zip(places, summed.mean(0).cpu().numpy(), strict=True):
                    weights[place] = row
                step = torch.stack([summed.sum(1), (said > 0).double().sum((1, 2))])
                routed = step if routed is None else routed + step
            if meter is not None:
                meter.advance(int(real.sum()))
    mean, active = [None, None] if routed is None else (routed / tokens).tolist()
    size = sum(size for _, size in windows)
    return Likelihood(nats / math.log(2), size, tokens, mean, active, log_probs, weights)


def _pad(batch: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Right-pad to one length: ids [B,T+1], and which targets are real [B,T]."""
    length = max(len(ids) for ids in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    real = torch.zeros(len(batch), length - 1, dtype=torch.bool)
    for i, row in enumerate(batch):
        ids[i, : len(row)] = torch.from_numpy(row)
        real[i, : len(row) - 1] = True
    return ids, real


def panels_of(model: Transformer | ProbabilityMixture) -> Panels | None:
    """Panels to read many windows with; None where copies of the weights would be large."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return model.cut_panels() if size <= COPIED_BYTES else None


def evaluate_mixture(
    mixture: LoadedMixture,
    sets: Mapping[str, TokenSet],
    split: str,
    *,
    seq_len: int = 256,
    max_bytes: int | None = None,
    mix: Mix = "states",
    own_sets: bool = False,
    label: str = "evaluate",
) -> dict[str, Any]:
    """Bits per byte of every arrangement on every set, the routing, and a summary.

    Arrangements: `anchor`, `expert NAME` (with the anchor alone), `mixture`, `mixture without
    NAME`. With `own_sets`, an expert alone reads its owner's set and public text only. Routing is
    the whole mixture's mean weight, by set, layer and expert; where `mix` is probabilities, of its
    predictions. `models_per_token` is how many experts read a token, by set.
    """
    model = arrange(mixture.model, mix)
    for token_set in sets.values():
        token_set.check_tokenizer(mixture.tokenizer.digest, "the mixture")
    names = mixture.expert_names
    alone = {f"expert {n}": n for n in names}
    arrangements: dict[str, list[str]] = {"anchor": []}
    arrangements |= {arrangement: [n] for arrangement, n in alone.items()}
    arrangements["mixture"] = names
    arrangements |= {f"mixture without {n}": [m for m in names if m != n] for n in names}
    windows = {s: list(evaluation_windows(t, split, seq_len, max_bytes)) for s, t in sets.items()}
    asked = {arrangement: list(windows) for arrangement in arrangements}
    if own_sets:
        asked |= {a: [s for s in windows if s in (PUBLIC, n)] for a, n in alone.items()}
    tokens = {s: sum(len(ids) - 1 for ids, _ in w) for s, w in windows.items()}
    total = sum(tokens[s] for on_sets in asked.values() for s in on_sets)
    panels = panels_of(model)
    table: dict[str, dict[str, float]] = {}
    routing: dict[str, Any] = {}
    read_by: dict[str, float] = {}
    with progress(label, total, "tok") as meter:
        for arrangement, enabled in arrangements.items():
            table[arrangement] = {}
            for set_name in asked[arrangement]:
                meter.note = f"{arrangement} on {set_name}"
                choose_experts(mixture.terms, only=enabled)  # terms may expire meanwhile
                found = read_windows(
                    model, windows[set_name], enabled=enabled, panels=panels, meter=meter
                )
                table[arrangement][set_name] = found.bits_per_byte
                if arrangement == "mixture":
                    routing[set_name] = found.routing
                    read_by[set_name] = float(np.mean(np.sum(found.active or [[]], axis=1)))
    return {
        "bits_per_byte": table,
        "routing": {"sets": list(sets), "experts": mixture.model.expert_names, "weights": routing},
        "models_per_token": read_by,
        "summary": summarise(table, names),
        "split": split,
        "seq_len": seq_len,
        "bytes": {s: sum(size for _, size in w) for s, w in windows.items()},
    }


def summarise(table: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> dict[str, Any]:
    """Measures of merging and opting out from the table; needs a set named as each expert.

    kept_of_pair_gain: (anchor - mixture) / (anchor - own pair) on the owner's own set; the mean
    counts none as more than 1, so that no pair that gained little can carry the others.
    public_change: mixture over anchor on public text, minus one. optout_vs_anchor: the owner's
    set without its expert, over the anchor, minus one. optout_side_effect: the largest relative
    loss of any other set when the owner is off.
    """
    anchor, merged = table["anchor"], table["mixture"]
    own = [n for n in names if n in anchor]
    kept = {}
    for n in own:
        gain = anchor[n] - table[f"expert {n}"][n]
        kept[n] = (anchor[n] - merged[n]) / gain if gain > 0 else 0.0  # no gain, nothing kept
    away = {n: table[f"mixture without {n}"][n] / anchor[n] - 1 for n in own}
    side = {
        n: max(
            (table[f"mixture without {n}"][s] / merged[s] - 1 for s in merged if s != n),
            default=0.0,
        )
        for n in names
    }
    better = sum(merged[n] < anchor[n] for n in own)
    mean_kept = sum(min(k, 1.0) for k in kept.values()) / len(kept) if kept else 0.0
    public = merged[PUBLIC] / anchor[PUBLIC] - 1 if PUBLIC in anchor else None
    worst_away = max(away.values(), default=0.0)
    worst_side = max(side.values(), default=0.0)
    bars = []

    def bar(text: str, met: bool, value: str) -> None:
        bars.append({"text": text, "met": bool(met), "value": value})

    if own:
        bar(
            "The mixture is better than the anchor on every owner's set",
            better == len(own),
            f"{better} of {len(own)}",
        )
        bar(
            "It keeps on average at least 60 % of what anchor + own expert gains",
            mean_kept >= 0.6,
            f"{100 * mean_kept:.0f} %",
        )
    if public is not None:
        bar(
            "On public text it is within 2 % of the anchor",
            public <= 0.02,
            f"{100 * public:+.2f} %",
        )
    if own:
        bar(
            "With an owner off, that owner's set is at most 2 % worse than the anchor",
            worst_away <= 0.02,
            f"worst {100 * worst_away:+.2f} %",
        )
    bar(
        "With an owner off, no other set is more than 1 % worse than before",
        worst_side <= 0.01,
        f"worst {100 * worst_side:+.2f} %",
    )
    return {
        "kept_of_pair_gain": {**kept, "mean": mean_kept},
        "public_change": public,
        "optout_vs_anchor": away,
        "optout_side_effect": side,
        "bars": bars,
    }
